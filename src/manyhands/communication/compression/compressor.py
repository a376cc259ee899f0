"""What every compressor is: a description, the one verb `aggregate`, and error feedback around it, once for all.

    x_p = g_p + e_p;   ḡ = (1/P) Σ_p C(x_p);   e_p ← x_p − C(x_p)

g_p worker p's gradient, already multiplied by P·n_p / Σ n (its share; 1 where shares are even), C the compressor, e_p
the *residual*: what has not been sent yet (Seide et al. 2014; Stich, Cordonnier & Jaggi 2018, arXiv:1809.07599;
Karimireddy et al. 2019, arXiv:1901.09847). Without ``feedback`` e_p is 0 and what C leaves out is lost.

Guarantee, with feedback: what has been sent plus residuals is the sum of all gradients, up to rounding. Always: every
worker ends with the same bits, because all do the same arithmetic on the same bytes in rank order.

`Compressor.exchange` says how payloads meet; `one_shot` has the common case, one payload a worker.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from manyhands.calling import described
from manyhands.catalogue import Reference
from manyhands.communication.communicator import Communicator, reference_B
from manyhands.communication.compression import compressors
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.state import State
from manyhands.errors import BadInput
from manyhands.grammar import format_description

#: Subtracts what was sent from the vector it was made of.
Sent = Callable[[Tensor], None]


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


def compressor_from(value: str | Compressor) -> Compressor:
    """A compressor from its text; `str` of the result reads back to an equal one."""
    return _read(value) if isinstance(value, str) else _described(value)


def _described(value: str | Compressor) -> Compressor:
    return described("compressor", value, compressors, Compressor, "top_k(ratio=0.01)")  # type: ignore[type-abstract]


#: Strategies read their text at every look.
_read = lru_cache(maxsize=256)(_described)
