"""What a strategy sees of a worker's model and optimizer: a sequence of pieces, and a few verbs on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.compressor import Compressor
from manyhands.communication.compression.layout import Layout
from manyhands.contract.block import Block

#: ``ready(i, lo, hi, loss, count)``; see `Replica.gradients`.
Ready = Callable[[int, int, int, Tensor, float], None]
#: What one announcement covers at least. Li et al. (2020, §5.2) found 10 to 25 MB best for NCCL and 5 MB for gloo.
BUCKET_B = 4 * 2**20


@dataclass(slots=True)
class Batch:
    """A worker's share of one step: any pytrees of tensors whose leading dim is the sample, and how many samples.

    ``count`` may be 0 (more workers than samples): the tensors then have no rows, or are None. ``total`` is the count
    of all workers together; None: nobody has said.
    """

    inputs: Any
    target: Any
    count: int
    total: int | None = None


@dataclass(eq=False)
class Piece:
    """Some of the parameters, laid end to end. Every parameter lies in exactly one piece.

    There is one piece per (parameter group, axes, dtype), or several where parts of the model come and go. ``flat`` and
    ``grad`` have one dim and equal length.
    A strategy aggregates ``grad`` only over the mesh axes in ``replicated_over``. ``group`` is that of the optimizer
    whose hyper-parameters update it; ``spans`` are the bounds of the single parameters, ``shapes`` their shapes.

    A *sparse* piece is a table whose rows have ``width`` elements: ``rows`` names those that the last backward touched,
    each once and in order, and ``grad`` holds their gradients alone. Only strategies that ask for them get any.
    """

    flat: Tensor
    grad: Tensor
    replicated_over: frozenset[str]
    rows: Tensor | None = None
    name: str = ""
    group: int = 0
    spans: Sequence[tuple[int, int]] = ()
    width: int = 0  # 0: dense
    #: Where alone ``grad`` is not zero, ascending, if a strategy knows it; None: anywhere.
    entries: Tensor | None = None
    shapes: Sequence[tuple[int, ...]] = ()


@dataclass(frozen=True)
class StateSlice:
    """Part of an optimizer's state: ``values`` belongs to elements ``[lo, hi)`` of parameter ``parameter``.

    ``lo == hi == -1`` marks state that belongs to the parameter as a whole (Adam's step count).
    """

    parameter: str
    key: str
    lo: int
    hi: int
    values: Tensor


class Replica(Protocol):
    """A worker's model and optimizer, whole or cut. Made by ``partition``; all compute goes through it."""

    pieces: list[Piece]
    #: Of the model's tensors, by name, the part that is here, for those of which it is only a part.
    blocks: dict[str, Block]
    #: The user's; its hyper-parameters are as the schedule has them now.
    optimizer: torch.optim.Optimizer
    #: Whether there may be parameters that no worker's backward has reached so far; see `reached`.
    watching: bool
    #: Global-norm limit of the task, or None.
    clip: float | None
    #: Time spent so far in `gradients` and in `apply`.
    compute_s: float
    count: float  # of the last `gradients`: samples, or what the loss counted
    update_s: float

    @property
    def buffers(self) -> list[Tensor]:
        """The model's buffers (BatchNorm statistics and the like) as they are now, in ``named_buffers``' order."""
        ...

    @property
    def runs(self) -> int:
        """In how many runs `gradients` announces them to who wants to send some while others are computed.

        1 where all of them are too few for that: what comes at the end of backward goes on beside nothing.
        """
        ...

    def gradients(self, batch: Batch, ready: Ready | None = None) -> tuple[Tensor, float]:
        """Forward and backward over one share; the gradients lie in the pieces, overwriting what was there. Local.

        Returns ``(loss, count)``: the local mean loss (0-dim, detached) and the weight with which loss and gradient
        enter the mean over workers (samples, or what the loss counted). A loss that is a *sum* over samples has count
        1 on every worker and a gradient already multiplied by the number of workers, so that the mean is the sum.
        A share of 0 samples gives loss 0, count 0 and zero gradients.

        ``ready(i, lo, hi, loss, count)`` is called during backward, in the same order on every worker, as soon as
        ``pieces[i].grad[lo:hi]`` is final, with what this call will return; all pieces are covered when it does.
        """
        ...

    def reached(self) -> dict[int, Tensor]:
        """By piece, for those that are not settled: a number per parameter, 1 where a backward has reached it.

        torch leaves a parameter alone that never had a gradient. What this worker's own backward did not reach is left
        out of `apply` and `norm`; workers that must update alike add these vectors over the ranks that hold the piece
        and `settle` the sums, after `gradients` and while `watching`.
        """
        ...

    def settle(self, reached: Mapping[int, Tensor]) -> None:
        """What is 0 in a `reached` (or a sum of them) stays as it is; a piece without a 0 is watched no longer."""
        ...

    def regroup(self, comm: Communicator) -> None:
        """The workers are now those of ``comm``: batches are divided among them."""
        ...

    def before_lookup(self, piece: int, tell: Callable[[Tensor], None]) -> None:
        """``tell`` which rows of a sparse piece a training forward is about to look up, each once and in order."""
        ...

    def share(self, batch: Batch) -> float:
        """This worker's part in the mean over all workers, as far as it is known without asking them.

        The part of the samples; alike for a loss that is a sum. Approximation where the loss counts something else.
        """
        ...

    def apply(self, piece: Piece, lo: int, hi: int) -> None:
        """Optimizer update of ``piece.flat[lo:hi]`` from ``piece.grad[lo:hi]``, L2 term included (once).

        Bounds may change from call to call; the optimizer's state follows, cut and joined where that can be done.
        """
        ...

    def add_l2(self, bounds: Sequence[tuple[int, int]]) -> None:
        """Add the loss's L2 term to ``pieces[i].grad[lo:hi]`` now, so that `norm` sees it; `apply` then does not."""
        ...

    def norm(self, bounds: Sequence[tuple[int, int]]) -> Tensor:
        """Two-norm over ``pieces[i].grad[lo:hi]`` for all i, 0-dim; over whole pieces it is torch's, bit for bit."""
        ...

    def own_norm(self) -> Tensor:
        """Two-norm of all gradients of this replica, of which other ranks may hold some. Collective among those."""
        ...

    def coded(self, compressor: Compressor, layout: Layout, encoded: float, decoded: float) -> None:
        """So many vectors have been made payloads, or read out of some: takes time where that is virtual."""
        ...

    def any_of_us(self, flag: bool) -> bool:
        """Whether some rank of this replica says so. Collective among them; the flag itself where there is one."""
        ...

    def optimizer_state(self) -> list[StateSlice]:
        """The optimizer state that this worker holds."""
        ...

    def format_state(self) -> dict[str, Any]:
        """What a number format that is simulated keeps on this worker."""
        ...

    def load_format_state(self, state: Mapping[str, Any]) -> None:
        """Take up a `format_state` of the same rank."""
        ...

    def load_optimizer_state(self, state: Sequence[StateSlice]) -> None:
        """Take up optimizer state, of which the slices that are later asked for by `apply` will be used."""
        ...
