"""Sparse-row gradients: of a table of which a batch has looked up a few rows, those rows alone are sent, and whole.

    ḡ[r] = (1/P) Σ_p g_p[r]   for every row r that somebody has looked up; all others have no gradient

Payload: 4 + w · itemsize bytes a row of w values, gathered: (P−1)/P of all workers' rows. Their numbers are told first,
8 bytes a worker. What a step costs depends on the batch and not on the table.
Guarantee: exact, nothing is left out; every worker ends with the same bits.

S. Kim, G.-I. Yu, H. Park, S. Cho, E. Jeong, H. Ha, S. Lee, J. S. Jeong & B.-G. Chun (2019), Parallax: sparsity-aware
data parallel training of deep neural networks, EuroSys, arXiv:1808.02621 (all-gather of sparse gradients).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.one_shot import gather
from manyhands.errors import DamagedPayload


def mean_of_rows(
    rows: Tensor, values: Tensor, width: int, comm: Communicator, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The rows that any rank has, in order, and the means of their values, one after the other. Collective.

    ``rows`` are this rank's, ``values`` theirs, and ``counts`` says how many rows each rank has.
    """
    row_B = 4 + width * values.element_size()
    payload = torch.cat([rows.to(torch.int32).view(torch.uint8), values.contiguous().view(torch.uint8)])
    gathered = gather(payload, [row_B * count for count in counts], comm)
    numbers, parts = list[Tensor](), list[Tensor]()
    for each, count in zip(gathered, counts, strict=True):
        # Copies, because a part need not begin where its dtype could.
        numbers.append(each[: 4 * count].clone().view(torch.int32).long())
        parts.append(each[4 * count :].clone().view(values.dtype).view(count, width))
    everybodys = torch.cat(numbers)
    if len(everybodys) and int(everybodys.min()) < 0:
        raise DamagedPayload(f"a row with the number {int(everybodys.min())}")
    found, place = torch.unique(everybodys, return_inverse=True)
    mean = values.new_zeros(len(found), width).index_add_(0, place, torch.cat(parts))
    return found, mean.mul_(1 / comm.size).view(-1)
