"""PowerSGD: every matrix by one of low rank, which one step of power iteration finds for all workers together
(Vogels, Karimireddy & Jaggi 2019).

    P ← M̄ Q;   P̂ ← orthogonalised P;   Q ← M̄ᵀ P̂;   ḡ = P̂ Qᵀ

M̄ is the mean of the workers' gradients (with what they have not sent yet), a matrix a layer: a weight of several dims
has its first as rows and the others together as columns. P and Q are linear in M, so the two products are averaged by
all-reduces and M̄ is never made. Q is kept for the next step (*warm start*): over steps the iteration converges.
What a matrix of ``rank`` would not make smaller (biases, narrow layers) is averaged as it is, along with the Ps.

Payload: r (rows + columns) values a matrix and n of what is left as it is, in two all-reduces.
Guarantee: an approximation. With feedback each worker keeps M − P̂Qᵀ, so sent and the mean of residuals add up to the
mean of gradients. No more than min(rows, columns) ranks are used, and all of them are exact.

T. Vogels, S. P. Karimireddy & M. Jaggi (2019), PowerSGD: practical low-rank gradient compression for distributed
optimization, arXiv:1905.13727, algorithms 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.checks import is_whole
from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.compressor import NOTHING, Compressor, Cost, Round, Sent, sum_cost
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.state import State


class Matrix(NamedTuple):
    """A tensor that is sent at low rank, where it lies in the vector."""

    at: int
    rows: int
    columns: int
    rank: int


def orthogonalised(p: Tensor) -> Tensor:
    """Orthonormal columns that span those of ``p`` (and more, where these are dependent)."""
    q: Tensor = torch.linalg.qr(p)[0]
    return q


@dataclass(frozen=True)
class PowerSGD(Compressor):
    """Every matrix as the product of two narrow ones, of ``rank`` columns; the rest as it is."""

    name: ClassVar[str] = "powersgd"
    paper: ClassVar[Reference] = Reference(
        "Vogels, Karimireddy & Jaggi",
        "PowerSGD: practical low-rank gradient compression for distributed optimization",
        2019,
        "NeurIPS, arXiv:1905.13727",
        survey="VI-B",
    )
    summable: ClassVar[bool] = True

    rank: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.rank, 1):
            raise ValueError(f"rank={self.rank!r}: it is a whole number from 1")
        if not is_whole(self.seed, 0):
            raise ValueError(f"seed={self.seed!r}: it is a whole number from 0")

    def matrices(self, layout: Layout) -> tuple[list[Matrix], list[tuple[int, int]]]:
        """What is sent at low rank, and the bounds of what is not."""
        low, whole, at = list[Matrix](), list[tuple[int, int]](), 0
        for shape in layout.shapes:
            numel = math.prod(shape)
            rows = shape[0] if len(shape) > 1 and numel else 1
            columns = numel // rows
            rank = min(self.rank, rows, columns)
            if rank * (rows + columns) < numel:
                low.append(Matrix(at, rows, columns, rank))
            elif whole and whole[-1][1] == at:
                whole[-1] = whole[-1][0], at + numel
            else:
                whole.append((at, at + numel))
            at += numel
        return low, whole

    def _lengths(self, layout: Layout) -> tuple[int, int, int]:
        """Elements of all Ps, of what is sent as it is, and of all Qs."""
        low, whole = self.matrices(layout)
        ps, qs = sum(m.rows * m.rank for m in low), sum(m.columns * m.rank for m in low)
        return ps, sum(hi - lo for lo, hi in whole), qs

    def payload_B(self, layout: Layout) -> int:
        """Both factors, and what is sent as it is."""
        return sum(self._lengths(layout)) * layout.itemsize

    def cost(self, layout: Layout, size: int) -> Cost:
        """Two all-reduces; one if there is nothing of low rank."""
        if size == 1 or not layout.numel:
            return NOTHING
        return sum_cost("sum", size, *(n_B for _, n_B in self.rounds(layout, size, 0)))

    def rounds(self, layout: Layout, size: int, payload_B: int) -> list[Round]:
        """See `Compressor.rounds`."""
        if size == 1 or not layout.numel:
            return []
        ps, whole, qs = self._lengths(layout)
        first: Round = "all_reduce", (ps + whole) * layout.itemsize
        return [first, ("all_reduce", qs * layout.itemsize)] if qs else [first]

    def prepare(self, state: State) -> None:
        """See `Compressor.prepare`; all workers begin with the same Qs."""
        super().prepare(state)
        if state.size > 1:
            draw = state.random(self.seed, alike=True).standard_normal(self._lengths(state.layout)[2])
            state.tensors["q"] = torch.from_numpy(draw).to(state.layout.dtype)

    def exchange(self, x: Tensor, out: Tensor, comm: Communicator, state: State) -> Sent:
        """See `Compressor.exchange`."""
        if not x.numel():
            return lambda _: None
        low, whole = self.matrices(state.layout)
        given = [_view(x, matrix) for matrix in low]
        qs = _cut(state.tensors["q"], [(m.columns, m.rank) for m in low])
        first = torch.cat(
            [
                *((m @ q).view(-1) for m, q in zip(given, qs, strict=True)),
                *(x[lo:hi] for lo, hi in whole),
            ]
        )
        comm.all_reduce(first, weight=1.0).wait()
        ps = [orthogonalised(p) for p in _cut(first, [(m.rows, m.rank) for m in low])]
        if low:
            for m, p, q in zip(given, ps, qs, strict=True):
                torch.mm(m.t(), p, out=q)
            comm.all_reduce(state.tensors["q"], weight=1.0).wait()
        at = sum(p.numel() for p in ps)
        for lo, hi in whole:
            out[lo:hi] = first[at : at + hi - lo]
            at += hi - lo
        for matrix, p, q in zip(low, ps, qs, strict=True):
            torch.mm(p, q.t(), out=_view(out, matrix))

        def subtract(residual: Tensor) -> None:
            for matrix in low:
                _view(residual, matrix).sub_(_view(out, matrix))
            for lo, hi in whole:
                residual[lo:hi].zero_()

        return subtract


def _view(vector: Tensor, matrix: Matrix) -> Tensor:
    """The matrix, where it lies in ``vector``."""
    at, rows, columns, _ = matrix
    return vector[at : at + rows * columns].view(rows, columns)


def _cut(vector: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Matrices that lie in ``vector`` one after the other, as views."""
    result, at = [], 0
    for rows, columns in shapes:
        result.append(vector[at : at + rows * columns].view(rows, columns))
        at += rows * columns
    return result
