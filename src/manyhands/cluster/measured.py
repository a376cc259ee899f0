"""What `manyhands calibrate` has measured of a machine: tables beside the figures, for those who predict.

    curves       what an operation of a transport takes from the arrival of the last rank, by its size
    operators    what an operator of torch takes inside a real training step
    host         which state the machine was in, by probes before and after

All of it holds for one machine, its versions and its settings; a cluster file of specifications has none.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Transports that can be measured, by the names of their catalogue, which lies above.
TRANSPORTS = ("shared", "threads", "gloo", "mpi", "nccl")
#: As `communication.transports.events.Operation` names them, and two that only common memory has: an all-gather of one
#: copy, and what it costs afterwards to read there what another core has written. And how much later than a lock is
#: given back who has waited for it goes on.
COMMON_GATHER, REREAD, WOKEN = "all_gather_common", "reread", "woken"
OPERATIONS = (
    *("all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all", "barrier"),
    *("send", "pull", "push", COMMON_GATHER, REREAD, WOKEN),
)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One operation on ``ranks`` ranks of a transport: medians at sizes that grow, in bytes of one rank's tensor.

    ``operation`` is one of `OPERATIONS`. Of ``send``, ``pull``, ``push`` and ``woken``, which two ranks or one take
    part in, ``ranks`` says how many there were in all.
    """

    transport: str
    operation: str
    ranks: int
    sizes_B: tuple[int, ...]
    seconds: tuple[float, ...]
    #: Relative, of each median.
    spread: tuple[float, ...]
    #: More ranks than cores, which is a regime of its own: ranks wait for their turn on a core.
    oversubscribed: bool = False
    #: Half a round of a cache line between two cores, before and after: the state the host was in.
    probe_s: tuple[float, ...] = ()

    def at(self, size_B: float) -> float:
        """Seconds for a size: between knots a straight line in the logarithms, beyond the last one in the bytes."""
        sizes, seconds = self.sizes_B, self.seconds
        if len(sizes) == 1 or size_B <= sizes[0]:
            return seconds[0]
        if size_B >= sizes[-1]:
            slope = max(seconds[-1] - seconds[-2], 0.0) / (sizes[-1] - sizes[-2])
            return seconds[-1] + slope * (size_B - sizes[-1])
        i = bisect.bisect_right(sizes, size_B)
        low, high = seconds[i - 1], seconds[i]
        if not low or not high or not sizes[i - 1]:  # what has no logarithm
            return low + (high - low) * (size_B - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
        part = math.log(size_B / sizes[i - 1]) / math.log(sizes[i] / sizes[i - 1])
        return low * math.exp(part * math.log(high / low))

    def spread_at(self, size_B: float) -> float:
        """The relative spread of the nearest knot above."""
        return self.spread[min(bisect.bisect_left(self.sizes_B, size_B), len(self.spread) - 1)]


@dataclass(frozen=True, kw_only=True)
class OperatorTime:
    """One operator of torch as it ran in a training step; all but the last four as `modelling.operations` records it.

    Of the phase ``update`` it is a whole update of parameters with these shapes; of the phase ``host`` what running the
    step costs beside its operators (`modelling.operators.overhead`); of the phase ``gauge`` a network's gradients.
    """

    name: str
    phase: str
    operands: tuple[tuple[int, ...], ...]
    results: tuple[tuple[int, ...], ...]
    options: str
    dtype: str
    layout: str = ""
    flops: int = 0
    moved_B: int = 0
    threads: int
    co_runners: int
    seconds: float
    spread: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Everything measured of one machine, and under what."""

    when: str  # ISO 8601, UTC
    curves: tuple[Curve, ...] = ()
    operators: tuple[OperatorTime, ...] = ()
    #: Probes and settings: ping-pong before and after, allocator, threads, noise …; plain values.
    host: Mapping[str, Any] = field(default_factory=dict)
    #: What a reader is to know: a noisy machine, bars widened.
    notes: tuple[str, ...] = ()

    def curve(self, transport: str, operation: str, ranks: int) -> Curve | None:
        """The curve of exactly so many ranks."""
        for curve in self.curves:
            if (curve.transport, curve.operation, curve.ranks) == (transport, operation, ranks):
                return curve
        return None
