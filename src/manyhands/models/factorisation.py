"""Matrix factorisation: a matrix as the product L·Rᵀ of two narrow ones, learned from some of its entries.

    output[u, i] = Σ_k L[u, k] · R[i, k]

L lies above R in one table, so that a sample (a user's row and an item's) touches two rows of it and nothing else.
Learn it with ``loss=squared_error``; ``squared_error(l2=…)`` adds the usual λ/2·(‖L‖² + ‖R‖²).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyhands.catalogue import Reference
from manyhands.checks import whole
from manyhands.errors import BadInput
from manyhands.models.sizes import sample_shape


class Factorisation(nn.Module):
    """Rows ``(n, 2)`` of the table, a user's and an item's, to ``(n, 1)``.

    It starts with outputs of about a quarter: not at 0, where nothing has a gradient.
    """

    def __init__(self, rows: int, rank: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, rank, sparse=True)
        nn.init.normal_(self.table.weight, std=0.5 * rank**-0.25)

    def forward(self, inputs: Tensor) -> Tensor:
        """The entries."""
        users, items = self.table(inputs).unbind(1)
        product: Tensor = torch.sum(users * items, dim=1, keepdim=True)
        return product


def factorisation(inputs: tuple[int, ...], *, rank: int = 4) -> Factorisation:
    """``(n, 2) → (n, 1)``; ``rank`` parameters for each user and each item."""
    shape = sample_shape("factorisation", inputs)
    if len(shape) != 1:
        raise BadInput(
            f"model factorisation: inputs={shape} does not fit; it takes entries of a matrix, such as data=ratings."
        )
    return Factorisation(shape[0], whole("model factorisation: rank", rank))


vars(factorisation)["data"] = "ratings"  # what samples it takes
vars(factorisation)["paper"] = Reference(
    "Y. Koren, R. Bell, C. Volinsky",
    "Matrix factorization techniques for recommender systems",
    2009,
    "IEEE Computer 42(8), 30-37",
)
