"""What workers say to servers that are ranks, and how it travels (survey §VI-A).

    OPEN       what shards to hold, and how to update them; from rank 0. Older ones are dropped
    SET        a shard's values
    PULL       → values
    PUSH       a gradient, the version it was taken at, hyper-parameters → how late it was[, values]
    LOOK_UP    rows of a table → their values;  PUSH_ROWS is a push of their gradients
    ADD        a change, added as it is
    USE        which parameters a backward has reached → which any worker's has
    KEEP       → what `CommonStore.state_dict` holds of a shard;  RESTORE takes it up
    POST       the worker's counter on a board;  WAIT → all counters, and again once those waited for are far enough
    ROUNDS     how gradients are joined from now on;  ASIDE: a worker that rounds do not wait for, or do again
    BRING      a gradient to the round under way → how far all have come, and the shards once the round has ended
    STOP       answers say from now on that the workers are to meet
    LEAVE      this worker asks no more

A request is a `header` of float64, which holds every count and every hyper-parameter exactly, and what it announces. An
answer begins with three: version, lateness, stopped; those to LOOK_UP also, those to USE, KEEP and WAIT do not. That
to BRING says instead of lateness how late, or negated what became of the round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from manyhands.communication.communicator import Work

REQUEST, PAYLOAD, ANSWER = 1, 2, 3  # tags
#: Of a parameter group what the rules read, betas apart. A schedule may move any of it, so it comes with each push.
HYPERPARAMETERS = (
    "lr",
    "weight_decay",
    "momentum",
    "dampening",
    "nesterov",
    "lr_decay",
    "eps",
    "initial_accumulator_value",
    "decoupled_weight_decay",
)
#: Numbers of a header before those.
FIXED = 6
HEADER = FIXED + len(HYPERPARAMETERS) + 2
ANSWERED_B = 3 * 8


class Ask(IntEnum):
    """What a request wants."""

    LEAVE, OPEN, SET, PULL, PUSH, ADD, USE, KEEP, RESTORE, STOP, POST, WAIT, LOOK_UP, PUSH_ROWS = range(14)
    ROUNDS, BRING, ASIDE = range(14, 17)


def header(
    what: Ask,
    shard: int = 0,
    *,
    read: int = 0,
    count: int = 0,
    in_use: bool = False,
    packed: int = 0,
    group: Mapping[str, Any] | None = None,
) -> Tensor:
    """A request's beginning.

    ``count``: how many follow, of OPEN, USE and rows; of PUSH, whether values shall come back; of WAIT, for whom; of
    BRING, whether there is a vote.
    ``in_use``: all parameters are. Of POST and WAIT, ``shard`` is the board and ``read`` the counter.
    Of ASIDE, ``read`` is by how many workers.
    ``packed``: what PUSH and ADD bring is a compressor's payload, of so many bytes less 1; 0: it is the vector.
    """
    group = group or {}
    numbers = [group.get(name) or 0.0 for name in HYPERPARAMETERS]
    return torch.tensor(
        [what, shard, read, count, in_use, packed, *numbers, *group.get("betas", (0.0, 0.0))], dtype=torch.float64
    )


def frame(numel: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for an answer with so many values: as bytes, its beginning, and the values."""
    whole = torch.zeros(ANSWERED_B + numel * dtype.itemsize, dtype=torch.uint8)
    return whole, whole[:ANSWERED_B].view(torch.float64), whole[ANSWERED_B:].view(dtype)


def group_of(numbers: Sequence[float]) -> dict[str, Any]:
    """The hyper-parameters of a header."""
    return dict(zip(HYPERPARAMETERS, numbers, strict=False)) | {"betas": tuple(numbers[len(HYPERPARAMETERS) :])}


def finish(works: Sequence[Work]) -> None:
    """Wait until requests are out."""
    for work in works:
        work.wait()
