"""What workers exchange, compressed: means of all, and parcels for a server (survey §VI-B).

    together   x̄ = (1/P) Σ_p C(s_p x_p + e_p),   s_p = P n_p / Σ n        `CompressedMean`
    one by one a server gets C(x_p + e_p)                                 `Parcels`

x_p what worker p has to tell: a gradient under `synchronous` and on servers, how far it has gone since workers last
agreed under `local`, `diloco` and `ssp` (Basu, Data, Karakus & Diggavi 2019, Qsparse-local-SGD, arXiv:1906.02367), the
pull of its spring under `elastic`. C is a compressor with residuals e_p (`communication.compression`). A worker's share
s_p is 1 where all count alike, so that thresholds are in units of a worker's own vector however many there are.

`CompressedWorker` is synchronous SGD whose gradients are: θ ← u(θ, x̄). Shares are settled first, 8 bytes a worker. That
is also where a loss or a gradient that is not finite stops all workers at once, before it gets into anybody's residual.
Clip and L2 come after the mean.

Guarantee: of a mean all workers get the same bits. A resume is exact: residuals and whatever else a compressor keeps
are in the state. Without numbers (`x.is_meta`) the same operations are called, see `rehearsal`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator, reference_B
from manyhands.communication.compression import parcel
from manyhands.communication.compression.compressor import Compressor, compressor_from
from manyhands.communication.compression.layout import Layout, Shape
from manyhands.communication.compression.one_shot import OneShot
from manyhands.communication.compression.rehearsal import codings, rehearse
from manyhands.communication.compression.state import State
from manyhands.communication.compression.table_rows import mean_of_rows
from manyhands.consistency.agreement import agree_on_unused, gather_weights, told_weights
from manyhands.consistency.clipping import clip_
from manyhands.contract import Batch, Piece, Replica, Setting, Worker, is_finite
from manyhands.errors import Problem


class Compressing:
    """What strategies have in common that have ``compress`` among their fields."""

    #: Who gets a payload by itself: a server, a neighbour; else all meet in a mean.
    alone: ClassVar[str] = ""
    #: What is sent, if not gradients: ``changes of parameters are``.
    moves: ClassVar[str] = ""

    compress: str

    @property
    def compressor(self) -> Compressor:
        """What ``compress`` says."""
        return compressor_from(self.compress)

    @property
    def compresses(self) -> bool:
        """Whether it says anything but none."""
        return self.compress != "none"

    def _read_compress(self) -> None:
        """Equal compressors, equal text."""
        if self.compresses:
            object.__setattr__(self, "compress", str(self.compressor))

    def mean_B(self, shapes: Sequence[Shape], size: int, itemsize: int) -> tuple[int, int]:
        """Bytes and messages of a rank for a mean over ``size`` of one piece of these ``shapes``."""
        if not self.compresses:
            n_B = sum(map(math.prod, shapes)) * itemsize
            return reference_B("all_reduce", n_B, size), 2 * (size - 1)
        cost = self.compressor.cost(layout_for(shapes, itemsize), size)
        return cost.sent_B, cost.messages


def layout_for(shapes: Sequence[Shape], itemsize: int) -> Layout:
    """Of tensors whose elements have so many bytes."""
    return Layout(shapes, torch.float64 if itemsize == 8 else torch.float32)


def layout_of(piece: Piece) -> Layout:
    """The tensors that a piece consists of."""
    return Layout(piece.shapes or ((piece.flat.numel(),),), piece.flat.dtype)


def problems_of(
    compressor: Compressor, asked: str, setting: Setting, *, alone: str = "", moves: str = ""
) -> list[Problem]:
    """Why what is ``asked`` cannot work.

    ``alone``: who gets a payload by itself; else all meet. ``moves``: what is sent, where that are no gradients.
    """
    found = []
    if alone and not parcel.travels(compressor):
        why = (
            "is a momentum of all workers"
            if compressor.replaces_optimizer
            else "means something only beside all others"
        )
        found.append(
            Problem(
                asked,
                f"{alone} gets one worker's payload by itself, and what {compressor.name} sends {why}.",
                "Use a scheme whose payload stands for a vector: top_k, strom, int8, qsgd, one_bit, bfloat16, …",
            )
        )
    elif moves and compressor.replaces_optimizer:
        found.append(
            Problem(
                asked,
                f"its momentum is that of gradients, and {moves} sent, which the optimizer has made already.",
                "Use top_k(ratio=…) and the optimizer's own momentum, or strategy=synchronous.",
            )
        )
    if moves and compressor.votes:
        found.append(
            Problem(
                asked,
                f"{moves} sent, and a vote says of that no more than the sign: parameters would move by ±1.",
                "Use sign_sgd(feedback=True), whose signs have a scale, or one_bit.",
            )
        )
    if setting.transport == "nccl":
        found.append(
            Problem(
                f"{asked} on transport=nccl",
                "payloads are packed in the host's memory.",
                "Leave compress out; links between GPUs of a machine seldom gain by it.",
            )
        )
    return found


class CompressedMean:
    """Means over the workers that hold a piece, one vector a piece, with what each has not sent so far."""

    def __init__(
        self, replica: Replica, comm: Communicator, compressor: Compressor, axes: Sequence[frozenset[str]]
    ) -> None:
        self._replica, self._comm, self._compressor = replica, comm, compressor
        self._groups = [comm.over(each) for each in axes]
        self._members = [next(ranks for ranks in comm.mesh.groups(each) if comm.rank in ranks) for each in axes]
        self._states = []
        for i, (piece, group) in enumerate(zip(replica.pieces, self._groups, strict=True)):
            layout, rank, size = layout_of(piece), group.rank, group.size
            keeps = not (piece.flat.is_meta or piece.width)
            self._states.append(compressor.start(layout, rank, size, i) if keeps else State(layout))

    def average_(self, vectors: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor | None]:
        """Each vector becomes its mean, every rank of the communicator weighing as ``weights`` say. Collective.

        Vectors and weights are finite. The gradient of a sparse piece becomes that of all rows that anybody has.
        Returns of each mean where alone it is not zero, if that is few places.
        """
        compressor, pieces = self._compressor, self._replica.pieces
        for x, piece, group, members, state in zip(
            vectors, pieces, self._groups, self._members, self._states, strict=True
        ):
            total = sum(weights[rank] for rank in members)
            share = group.size * weights[self._comm.rank] / total if total else 0.0
            if share != 1.0 and group.size > 1:
                x.mul_(share)
            if piece.width:
                _average_rows(piece, group)
                continue
            self._replica.coded(compressor, state.layout, *codings(compressor, state.layout, group.size))
            if x.is_meta:
                rehearse(x, compressor, group, state.layout)
            else:
                compressor.aggregate(x, group, state)
        return [state.touched for state in self._states]

    def state_dict(self) -> list[dict[str, Any]]:
        """What the compressor keeps of every piece."""
        return [state.state_dict() for state in self._states]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Take up a `state_dict` of the same rank."""
        _load(self._states, state)


class Parcels:
    """A worker's payloads for others, of vectors told apart by their place, with what it has not told so far."""

    def __init__(
        self,
        replica: Replica,
        comm: Communicator,
        compressor: Compressor,
        layouts: Sequence[Layout],
        *,
        feedback: bool = True,
    ) -> None:
        assert isinstance(compressor, OneShot), "the plan has been checked"
        self._replica, self._comm, self._compressor = replica, comm, compressor
        self._feedback = feedback and compressor.feedback
        sizes_only = any(piece.flat.is_meta for piece in replica.pieces)
        self._states = [
            State(layout) if sizes_only else parcel.begun(compressor, layout, comm.rank, i, feedback=self._feedback)
            for i, layout in enumerate(layouts)
        ]

    def pack_(self, i: int, x: Tensor, *, copies: int = 1) -> Tensor:
        """The payload for vector ``i``, sent to so many; ``x`` becomes what it stands for."""
        self._replica.coded(self._compressor, self._states[i].layout, 1.0, 1.0)
        return parcel.pack_(x, self._compressor, self._comm, self._states[i], copies=copies)

    def read(self, i: int, payload: Tensor) -> Tensor:
        """What somebody else's payload for its vector ``i`` stands for."""
        layout = self._states[i].layout
        self._replica.coded(self._compressor, layout, 0.0, 1.0)
        if payload.is_meta:
            return payload.new_empty(layout.numel, dtype=layout.dtype)
        return parcel.unpacked(payload, self._compressor, layout)

    def state_dict(self) -> list[dict[str, Any]]:
        """What the compressor keeps of every vector."""
        return [state.state_dict() for state in self._states]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Take up a `state_dict` of the same rank."""
        _load(self._states, state)


def _average_rows(piece: Piece, group: Communicator) -> None:
    assert piece.rows is not None
    if group.size == 1:
        return
    counted, purpose = group.counters.compression, group.context.purpose
    before_B = group.counters.sent_B(purpose)
    counts = [int(count) for count in told_weights(group, float(len(piece.rows)))]
    piece.rows, piece.grad = mean_of_rows(piece.rows, piece.grad, piece.width, group, counts)
    counted.dense_B += reference_B("all_reduce", piece.flat.nbytes, group.size)
    counted.sent_B += group.counters.sent_B(purpose) - before_B


def _load(states: Sequence[State], kept: Sequence[Mapping[str, Any]]) -> None:
    for mine, each in zip(states, kept, strict=True):
        mine.load_state_dict(each)


class CompressedWorker(Worker):
    """Everybody compresses its gradient, averages what the others have compressed, and updates everything."""

    def __init__(self, replica: Replica, comm: Communicator, compressor: Compressor) -> None:
        super().__init__(replica, comm)
        self._mean = CompressedMean(replica, comm, compressor, [piece.replicated_over for piece in replica.pieces])

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        replica, comm = self.replica, self.comm
        loss, count = replica.gradients(batch)
        if replica.watching:
            agree_on_unused(replica, comm)
        gradients = [piece.grad for piece in replica.pieces]
        finite = all(map(is_finite, gradients))
        weights = gather_weights(comm, loss, count if finite else math.inf, what="loss or the gradient")
        for piece, touched in zip(replica.pieces, self._mean.average_(gradients, weights), strict=True):
            piece.entries = touched
        clip_(replica, comm, [(0, piece.flat.numel()) for piece in replica.pieces], sliced=False)
        for piece in replica.pieces:
            replica.apply(piece, 0, piece.flat.numel())
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What the compressor keeps of every piece."""
        return {"compression": self._mean.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank."""
        self._mean.load_state_dict(state["compression"])
