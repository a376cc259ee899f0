"""Compressors of one payload a worker, and the three routes by which payloads meet.

The route with the fewest bytes is taken (c: bytes of a payload, n: of the dense vector):

    gather    everybody's payload to everybody                          (P−1) · c
    scatter   slices to their owners, who sum, encode again (with a     2(P−1)/P · c      `OneShot.scatters`
              residual of their own) and give the result to everybody
    dense     the decoded vector is all-reduced: the payload is longer  2(P−1)/P · n

A payload whose length depends on the values is measured first (8 bytes a worker, counted as ``control``), and all
choose alike. So no one-shot compressor ever sends more than a dense exchange. For 4 bytes an entry that crossover lies
at k/n = 2/P entries.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyhands.communication.communicator import Communicator, reference_B
from manyhands.communication.compression.compressor import NOTHING, Compressor, Cost, Round, Sent, sum_cost
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.state import State
from manyhands.communication.reduction import slices
from manyhands.errors import DamagedPayload

#: Fewer elements than one in so many are gone through by themselves: each costs a line of memory or two, out of order.
FEW = 64


class Entries(NamedTuple):
    """Some elements of a vector, all others of which are zero: where they are, ascending, and what."""

    indices: NDArray[Any]
    values: NDArray[Any]


class OneShot(Compressor):
    """One payload a worker, made by itself; see the file's head for how they meet."""

    #: Slices can be encoded by themselves, and their mean again, in payloads whose length is known beforehand.
    scatters: ClassVar[bool] = False

    @abstractmethod
    def encode(self, x: Tensor, state: State) -> Tensor:
        """The payload, bytes, that stands for ``x``."""

    @abstractmethod
    def add_(self, out: Tensor, payload: Tensor, state: State, sign: int = 1) -> None:
        """Add what ``payload`` stands for to ``out``, or subtract it.

        Raises `DamagedPayload` for one that does not fit, before anything is written out of bounds.
        """

    def entries(self, payload: Tensor, state: State) -> Entries | None:
        """What ``payload`` stands for, where that are some entries; None: a whole vector. Raises as `add_` does."""
        return None

    def trim(self, state: State) -> None:
        """What becomes of the residual after a payload has been sent; nothing, as a rule."""

    def decode(self, payload: Tensor, state: State) -> Tensor:
        """What ``payload`` stands for."""
        out = torch.zeros(state.layout.numel, dtype=state.layout.dtype)
        self.add_(out, payload, state)
        return out

    def start(self, layout: Layout, rank: int = 0, size: int = 1, index: int = 0) -> State:
        """The state before the first step; with that of every slice, where slices are encoded by themselves."""
        state = super().start(layout, rank, size, index)
        if self.cost(layout, size).route == "scatter":
            cuts = slices(layout.numel, size)
            for p, (lo, hi) in enumerate([*cuts, cuts[rank]]):
                part = State(layout.part(lo, hi), rank, size, index * (size + 1) + p)
                self.prepare(part)
                if p < size:  # these residuals are parts of the whole vector's
                    part.tensors.pop("residual", None)
                state.parts.append(part)
        return state

    def cost(self, layout: Layout, size: int) -> Cost:
        """The cheapest route's; of equal ones, that with the fewest messages."""
        if size == 1 or not layout.numel:
            return NOTHING
        payload_B = self.payload_B(layout)
        routes = [Cost((size - 1) * payload_B, size - 1, "gather")]
        if self.scatters and slices(layout.numel, size)[-1][0] < layout.numel:  # no slice is empty
            slice_B = self._slice_B(layout, size)
            routes.append(Cost(2 * (size - 1) * slice_B, 2 * (size - 1), "scatter"))
        routes.append(sum_cost("dense", size, layout.numel * layout.itemsize))
        best = min(routes, key=lambda cost: cost[:2])
        # Any route but the dense one may turn out to be shorter than it.
        return best._replace(messages=2 * (size - 1)) if self.variable else best

    def rounds(self, layout: Layout, size: int, payload_B: int) -> list[Round]:
        """See `Compressor.rounds`: those of the route that is taken."""
        if size == 1 or not layout.numel:
            return []
        if self.cost(layout, size).route == "scatter":
            both_B = size * self._slice_B(layout, size)
            return [("all_to_all", both_B), ("all_gather", both_B)]
        gathered_B, dense_B = size * payload_B, layout.numel * layout.itemsize
        if reference_B("all_gather", gathered_B, size) <= reference_B("all_reduce", dense_B, size):
            return [("all_gather", gathered_B)]
        return [("all_reduce", dense_B)]

    def _slice_B(self, layout: Layout, size: int) -> int:
        """Of the longest slice's payload: messages to all owners are as long."""
        return max(self.payload_B(layout.part(lo, hi)) for lo, hi in slices(layout.numel, size))

    def exchange(self, x: Tensor, out: Tensor, comm: Communicator, state: State) -> Sent:
        """By the cheapest route."""
        layout, size = state.layout, comm.size
        if not layout.numel:
            return _nothing
        route = self.cost(layout, size).route
        if route == "scatter":
            return self._scatter(x, out, comm, state)
        payload = self.encode(x, state)
        lengths = [payload.numel()] * size
        if self.variable:
            lengths = _gather_lengths(payload.numel(), comm)
            dense_B = reference_B("all_reduce", layout.numel * layout.itemsize, size)
            route = "gather" if reference_B("all_gather", sum(lengths), size) <= dense_B else "dense"
        if route == "dense":
            out.copy_(self.decode(payload, state))
            comm.all_reduce(out).wait()
            out.mul_(1 / size)
        else:
            self._set_mean(out, gather(payload, lengths, comm, meanwhile=out.zero_), state)
        return lambda residual: self.add_(residual, payload, state, -1)

    def _set_mean(self, out: Tensor, payloads: Sequence[Tensor], state: State) -> None:
        """Of ``out``, which is zero; where it stays so but for a few elements, only these are gone through."""
        found = [self.entries(each, state) for each in payloads]
        some = [each for each in found if each is not None]
        if len(some) < len(found) or sum(each.indices.size for each in some) * FEW > out.numel():
            for payload, each in zip(payloads, found, strict=True):
                if each is None:
                    self.add_(out, payload, state)
                else:
                    out.numpy()[each.indices] += each.values
            out.mul_(1 / len(payloads))
            return
        every = np.sort(np.concatenate([each.indices for each in some]).astype(np.int64))
        where = every[np.diff(every, prepend=-1) > 0]
        values = np.zeros(where.size, state.layout.scalar)
        for each in some:
            values[np.searchsorted(where, each.indices)] += each.values
        values *= 1 / len(payloads)
        out.numpy()[where] = values
        state.touched = torch.from_numpy(where)

    def _scatter(self, x: Tensor, out: Tensor, comm: Communicator, state: State) -> Sent:
        layout, size = state.layout, comm.size
        cuts, slice_B = slices(layout.numel, size), self._slice_B(layout, size)
        *parts, own = state.parts
        payloads = [self.encode(x[lo:hi], part) for (lo, hi), part in zip(cuts, parts, strict=True)]
        outgoing = torch.zeros(size, slice_B, dtype=torch.uint8)
        for row, payload in zip(outgoing, payloads, strict=True):
            row[: payload.numel()] = payload
        incoming = comm.all_to_all(outgoing.view(-1)).view(size, slice_B)
        mean = torch.zeros(own.layout.numel, dtype=layout.dtype)
        for row in incoming:
            self.add_(mean, row[: self.payload_B(own.layout)], own)
        mean.mul_(1 / size)
        if self.feedback:
            mean = own.tensors["residual"].add_(mean)
        summary = self.encode(mean, own)
        if self.feedback:
            self.add_(mean, summary, own, -1)
        summaries = torch.zeros(size, slice_B, dtype=torch.uint8)
        summaries[comm.rank, : summary.numel()] = summary
        comm.all_gather(summaries.view(-1), [(p * slice_B, (p + 1) * slice_B) for p in range(size)]).wait()
        out.zero_()
        for (lo, hi), part, row in zip(cuts, parts, summaries, strict=True):
            self.add_(out[lo:hi], row[: self.payload_B(part.layout)], part)

        def subtract(residual: Tensor) -> None:
            for (lo, hi), part, payload in zip(cuts, parts, payloads, strict=True):
                self.add_(residual[lo:hi], payload, part, -1)

        return subtract


def gather(
    payload: Tensor, lengths: Sequence[int], comm: Communicator, *, meanwhile: Callable[[], object] | None = None
) -> list[Tensor]:
    """Everybody's payload in rank order. Collective; ``meanwhile`` is called while they are on their way."""
    ends = np.cumsum(lengths).tolist()
    bounds = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    everything = torch.empty(ends[-1], dtype=torch.uint8)
    everything[slice(*bounds[comm.rank])] = payload
    work = comm.all_gather(everything, bounds)
    if meanwhile is not None:
        meanwhile()
    work.wait()
    return [everything[lo:hi] for lo, hi in bounds]


def _gather_lengths(length: int, comm: Communicator) -> list[int]:
    lengths = torch.zeros(comm.size, dtype=torch.int64)
    lengths[comm.rank] = length
    with comm.counting("control"):
        comm.all_gather(lengths, [(p, p + 1) for p in range(comm.size)]).wait()
    result: list[int] = lengths.tolist()
    if min(result) < 0:
        raise DamagedPayload(f"a payload of {min(result)} bytes was announced")
    return result


def _nothing(residual: Tensor) -> None:
    return


def check_length(payload: Tensor | NDArray[np.uint8], wanted: int, name: str) -> None:
    """Refuse a payload of another length than its scheme's."""
    found = payload.numel() if isinstance(payload, Tensor) else payload.size
    if found != wanted:
        raise DamagedPayload(f"{name}: a payload of {found} bytes; {wanted} stand for this vector")


def check_numbers(found: NDArray[Any], name: str, most: float = 1.0) -> None:
    """Refuse values of a payload that are not finite, or would not be when multiplied by ``most``."""
    largest = np.abs(found).max(initial=0)
    if not largest <= np.finfo(found.dtype).max / most:
        raise DamagedPayload(f"{name}: a value of {largest}")
