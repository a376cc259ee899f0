"""What every compressor is: a description, the one verb `aggregate`, and error feedback around it, once for all.

    x_p = g_p + e_p;   ḡ = (1/P) Σ_p C(x_p);   e_p ← x_p − C(x_p)

g_p worker p's gradient, already multiplied by P·n_p / Σ n (its share; 1 where shares are even), C the compressor, e_p
the *residual*: what has not been sent yet (Seide et al. 2014; Stich, Cordonnier & Jaggi 2018, arXiv:1809.07599;
Karimireddy et al. 2019, arXiv:1901.09847). Without ``feedback`` e_p is 0 and what C leaves out is lost.

Guarantee, with feedback: what has been sent plus residuals is the sum of all gradients, up to rounding. Always: every
worker ends with the same bits, because all do the same arithmetic on the same bytes in rank order.

`Compressor.exchange` says how payloads meet. `OneShot` is the common case, one payload a worker, and has three routes;
the one with the fewest bytes is taken (c: bytes of a payload, n: of the dense vector):

    gather    everybody's payload to everybody                          (P−1) · c
    scatter   slices to their owners, who sum, encode again (with a     2(P−1)/P · c      `OneShot.scatters`
              residual of their own) and give the result to everybody
    dense     the decoded vector is all-reduced: the payload is longer  2(P−1)/P · n

A payload whose length depends on the values is measured first (8 bytes a worker, counted as ``control``), and all
choose alike. So no one-shot compressor ever sends more than a dense exchange. For 4 bytes an entry that crossover lies
at k/n = 2/P entries.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyhands.calling import described
from manyhands.catalogue import Reference
from manyhands.communication.communicator import Communicator, reference_B
from manyhands.communication.compression import compressors, meter
from manyhands.communication.reduction import slices
from manyhands.errors import BadInput, DamagedPayload
from manyhands.grammar import format_description

Shape = tuple[int, ...]
#: Fewer elements than one in so many are gone through by themselves: each costs a line of memory or two, out of order.
FEW = 64
#: Subtracts what was sent from the vector it was made of.
Sent = Callable[[Tensor], None]


class Layout:
    """The tensors that a flat vector consists of, end to end. Work is done in float32, or float64 where they are."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype = torch.float32) -> None:
        self.shapes = tuple(tuple(shape) for shape in shapes)
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        sizes = [math.prod(shape) for shape in self.shapes]
        self.numel = sum(sizes)
        self._ends = np.cumsum(np.array(sizes, np.int64))

    @property
    def itemsize(self) -> int:
        """Bytes of a value as it is worked on, and sent where values are."""
        return 8 if self.dtype == torch.float64 else 4

    @property
    def scalar(self) -> type[np.floating[Any]]:
        """The same as NumPy's type."""
        return np.float64 if self.dtype == torch.float64 else np.float32

    @cached_property
    def tensors(self) -> NDArray[np.int64]:
        """Where each tensor that is not empty begins."""
        return _starts(self._ends)

    @cached_property
    def columns(self) -> NDArray[np.int64]:
        """Where each column begins: the weights into one unit, which torch stores as a row; else a whole tensor."""
        ends = [np.zeros(0, np.int64)]
        for shape, end in zip(self.shapes, self._ends.tolist(), strict=True):
            numel = math.prod(shape)
            width = numel // shape[0] if len(shape) > 1 and numel else max(numel, 1)
            ends.append(np.arange(end - numel + width, end + 1, width))
        return _starts(np.concatenate(ends))

    def blocks(self, width: int) -> NDArray[np.int64]:
        """Where each run of ``width`` values begins, whatever tensors they belong to."""
        return np.arange(0, self.numel, width)

    def lengths(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of the runs that begin at ``starts``."""
        return np.diff(starts, append=self.numel)

    def part(self, lo: int, hi: int) -> Layout:
        """The vector's elements ``[lo, hi)`` as a vector of their own; tensors and columns are cut at its bounds."""
        part = Layout(((hi - lo,),), self.dtype)
        part.tensors, part.columns = (_clipped(starts, lo, hi) for starts in (self.tensors, self.columns))
        return part


def _starts(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.unique(np.concatenate([np.zeros(1, np.int64), ends]))[:-1]


def _clipped(starts: NDArray[np.int64], lo: int, hi: int) -> NDArray[np.int64]:
    inner = starts[(starts > lo) & (starts < hi)] - lo
    return np.concatenate([np.zeros(int(hi > lo), np.int64), inner])


class Entries(NamedTuple):
    """Some elements of a vector, all others of which are zero: where they are, ascending, and what."""

    indices: NDArray[Any]
    values: NDArray[Any]


@dataclass
class State:
    """What a worker keeps for one vector from step to step; all of it is needed for an exact resume."""

    layout: Layout
    rank: int = 0
    size: int = 1
    index: int = 0  # which of the worker's vectors this is: each draws random numbers of its own
    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    #: Of the slices, then of this rank's own slice when it is encoded again; see the scatter route.
    parts: list[State] = field(default_factory=list)
    exchanges: int = 0  # of this process; no part of a checkpoint
    #: Where alone the last mean is not zero, ascending, if that is few places; None: anywhere. No part of one either.
    touched: Tensor | None = None

    def is_looked_at(self) -> bool:
        """Whether the exchange that begins is one whose error is told (see `meter`)."""
        self.exchanges += 1
        return meter.is_looked_at(self.exchanges - 1)

    def count(self, name: str = "step") -> int:
        """How often this has been called before."""
        value = int(self.numbers.get(name, 0))
        self.numbers[name] = value + 1
        return value

    def random(self, seed: int, *, alike: bool = False) -> np.random.Generator:
        """Numbers of this step; on all ranks ``alike``, else each rank's own. They repeat with the run."""
        who = 0 if alike else self.rank + 1
        return np.random.Generator(np.random.SFC64([seed, self.index, self.count("draws"), who]))

    def uniform(self, seed: int) -> Callable[[int], NDArray[Any]]:
        """What draws so many numbers from [0, 1), in the vector's dtype; they are this step's and each rank's own."""
        random = self.random(seed)
        if self.layout.itemsize == 8:
            return random.random
        bits = random.bit_generator

        def draw(count: int) -> NDArray[Any]:
            # Twice as fast: 23 random bits as the mantissa of a float32 from [1, 2).
            words: NDArray[Any] = bits.random_raw((count + 1) // 2).view(np.uint32)[:count]
            words >>= np.uint32(9)
            words |= np.float32(1).view(np.uint32)
            numbers = words.view(np.float32)
            numbers -= 1
            return numbers

        return draw

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers."""
        parts = [part.state_dict() for part in self.parts]
        return {"tensors": dict(self.tensors), "numbers": dict(self.numbers), "parts": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank."""
        for name, kept in state["tensors"].items():
            self.tensors[name] = kept.clone()
        self.numbers = dict(state["numbers"])
        for part, kept in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(kept)


class Cost(NamedTuple):
    """What a rank sends in one step under an operation's reference algorithm, and by which route."""

    sent_B: int
    messages: int
    route: Literal["nothing", "sum", "gather", "scatter", "dense"]


NOTHING = Cost(0, 0, "nothing")
#: A collective, and the bytes of a rank's tensor in it.
Round = tuple[Literal["all_reduce", "all_gather", "all_to_all"], int]


def sum_cost(route: Literal["sum", "dense"], size: int, *nbytes: int) -> Cost:
    """Of all-reduces one after the other."""
    return Cost(sum(reference_B("all_reduce", n, size) for n in nbytes), 2 * (size - 1) * len(nbytes), route)


@dataclass(frozen=True)
class Compressor(ABC):
    """Description of a scheme: comparable, printable (`str` parses back), and its promises.

    ``feedback``: what was left out of one step is added to the next.
    """

    name: ClassVar[str]
    paper: ClassVar[Reference]
    #: Payloads of several workers are added without decoding them, by an all-reduce.
    summable: ClassVar[bool] = False
    #: E C(x) = x over the scheme's own random numbers, without feedback.
    unbiased: ClassVar[bool] = False
    #: C(x) = x.
    lossless: ClassVar[bool] = False
    #: Works on top of the optimizer, which is then plain SGD; also on one worker.
    replaces_optimizer: ClassVar[bool] = False
    #: The longest vector, for schemes whose indices have so many values.
    longest: ClassVar[int | None] = None

    feedback: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.feedback, bool):
            raise ValueError(f"feedback={self.feedback!r}: it is True or False")

    def __str__(self) -> str:
        own = type(self) if self.name not in compressors else None
        return format_description(f"{own.__module__}:{own.__qualname__}" if own else self.name, self)

    @property
    def variable(self) -> bool:
        """How long a payload is depends on the values; `payload_B` and `cost` are then bounds."""
        return False

    @property
    def approaches(self) -> bool:
        """‖x − C(x)‖ ≤ ‖x‖, to rounding: differences to what is known, sent again and again, get there."""
        return True

    @property
    def votes(self) -> bool:
        """What comes out are signs, and not of the size of what went in."""
        return False

    def contraction(self, numel: int) -> float:
        """δ of ‖x − C(x)‖² ≤ (1 − δ) ‖x‖² for every x of so many values (in the mean, where C is random).

        0: nothing is promised.
        """
        return 0.0

    def variance(self, numel: int) -> float:
        """ω of E ‖x − C(x)‖² ≤ ω ‖x‖², for schemes that are unbiased; inf: nothing is promised."""
        return math.inf

    @abstractmethod
    def payload_B(self, layout: Layout) -> int:
        """Bytes of what stands for one vector; a bound where it is `variable`."""

    @abstractmethod
    def cost(self, layout: Layout, size: int) -> Cost:
        """What each of ``size`` ranks sends in a step; a bound where it is `variable`."""

    def rounds(self, layout: Layout, size: int, payload_B: int) -> list[Round]:
        """What `exchange` asks of the communicator if a payload has so many bytes; of ``control`` nothing."""
        return [("all_reduce", payload_B)] if size > 1 and layout.numel else []

    @abstractmethod
    def exchange(self, x: Tensor, out: Tensor, comm: Communicator, state: State) -> Sent:
        """Fill ``out`` with the mean of what stands for every rank's ``x``. Collective; ``x`` may be ``out``.

        Returns what subtracts from a copy of ``x`` the part of it that was sent.
        """

    def start(self, layout: Layout, rank: int = 0, size: int = 1, index: int = 0) -> State:
        """The state before the first step. Raises `BadInput` for a vector that is too long."""
        if self.longest is not None and layout.numel > self.longest:
            raise BadInput(
                f"compress={self} of {layout.numel} values in one tensor group: an index has {self.longest} values at "
                "most. Use a scheme that sends no indices (e.g. int8), or parameter groups that are smaller."
            )
        state = State(layout, rank, size, index)
        self.prepare(state)
        return state

    def prepare(self, state: State) -> None:
        """Put into a new state what is there before the first step."""
        if self.feedback and state.size > 1:
            state.tensors["residual"] = torch.zeros(state.layout.numel, dtype=state.layout.dtype)

    def aggregate(self, gradient: Tensor, comm: Communicator, state: State) -> Tensor:
        """The mean over ranks of what stands for their gradients, in this one's memory. Collective.

        Every ``gradient`` is finite and has been multiplied by its rank's share. A rank that is alone sends nothing and
        keeps its gradient as it is.
        """
        state.touched = None
        if comm.size == 1:
            return gradient
        counters, began = comm.counters, time.perf_counter()
        before = counters.sent_B(comm.context.purpose), counters.communicate_s + counters.wait_s
        x = gradient.to(state.layout.dtype)
        if self.feedback:
            left = state.tensors["residual"].add_(x)
            given = left.clone() if state.is_looked_at() else None
            self.exchange(left, x, comm, state)(left)
        else:
            given = x.clone() if state.is_looked_at() and not self.votes else None
            left = x if given is None else x.clone()
            subtract = self.exchange(x, x, comm, state)
            if given is not None:
                subtract(left)
        counted = counters.compression
        counted.dense_B += reference_B("all_reduce", gradient.nbytes, comm.size)
        counted.sent_B += counters.sent_B(comm.context.purpose) - before[0]
        counted.coding_s += time.perf_counter() - began - (counters.communicate_s + counters.wait_s - before[1])
        if given is not None:
            counted.looked(given, left)
        return x if x is gradient else gradient.copy_(x)


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


def compressor_from(value: str | Compressor) -> Compressor:
    """A compressor from its text; `str` of the result reads back to an equal one."""
    return _read(value) if isinstance(value, str) else _described(value)


def _described(value: str | Compressor) -> Compressor:
    return described("compressor", value, compressors, Compressor, "top_k(ratio=0.01)")  # type: ignore[type-abstract]


#: Strategies read their text at every look.
_read = lru_cache(maxsize=256)(_described)
