"""Prices read off the curves that `manyhands calibrate` has measured of a transport on this machine.

    exactly so many ranks       the curve
    another number of them      the closed form there × (curve / closed form) where it was measured; between two numbers
                                of ranks that quotient goes by a straight line in the logarithms

Ranks that wait for each other's cores are a regime of their own: a run of more workers than cores is priced by curves
of that kind as long as there are any. An all-gather of one copy is its own curve, a barrier and little more; what comes
with it is that everybody then reads what others have written, which no rank that computes by itself pays (`reread`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from manyhands.cluster.measured import COMMON_GATHER, REREAD, WOKEN, Curve, Measured

#: Where a price comes from.
CURVE, EXTRAPOLATED, FORMULA = "curve", "extrapolated", "formula"
#: Relative spread of what is not read off a curve of exactly so many ranks: what predictors are off by away from their
#: own set (Calculon 11 to 20 %).
UNSURE = 0.2
#: Of what no curve says; α + βn alone is off by 21 % at worst on curves that it was fitted to, and these are not.
UNKNOWN = 0.35
#: So far beyond its last knot a curve is believed.
BEYOND = 2.0
#: Nothing but a meeting where the tensor is one copy.
_MEETINGS = {"all_gather": COMMON_GATHER, "broadcast": "barrier"}
#: What two ranks do, or one: the number of ranks says how busy the machine is, and no form depends on it.
_OF_TWO = ("send", "pull", "push", WOKEN)


class Priced(NamedTuple):
    """Seconds, how unsure they are, and where they come from."""

    seconds: float
    spread_s: float
    source: str


class Curves:
    """Of one transport, for a run of ``workers``; ``form(name, bytes, ranks)`` is the closed form."""

    def __init__(
        self, curves: Sequence[Curve], workers: int, cores: int, form: Callable[[str, float, int], float]
    ) -> None:
        self._workers, self._oversubscribed, self._form = workers, workers > cores, form
        self._by_ranks: dict[str, dict[int, Curve]] = {}
        for curve in curves:
            self._by_ranks.setdefault(curve.operation, {})[curve.ranks] = curve

    def price(self, name: str, payload_B: float, ranks: int, *, common: bool = False) -> Priced | None:
        """Of an operation; None where nothing like it was measured."""
        if common and name in _MEETINGS:
            meeting = self._read(_MEETINGS[name], payload_B, ranks) or self._read("barrier", 0.0, ranks)
            again = self._read(REREAD, payload_B, ranks) if name == "all_gather" else None
            return meeting if meeting is None or again is None else _sum(meeting, again)
        found = self._read(name, payload_B, self._workers if name in _OF_TWO else ranks)
        if found is None and name in ("pull", "push"):  # servers that are reached by messages
            return self.price("send", payload_B, ranks)
        return found

    def _read(self, name: str, n: float, ranks: int) -> Priced | None:
        every = self._by_ranks.get(name)
        if not every:
            return None
        alike = {q: c for q, c in every.items() if c.oversubscribed == self._oversubscribed} or every
        if ranks in alike:
            return self._at(alike[ranks], n)
        here = self._form(name, n, ranks)
        near = sorted(
            {max((q for q in alike if q < ranks), default=0), min((q for q in alike if q > ranks), default=0)}
        )
        near = [q for q in near if q]
        quotients = []
        for q in near:
            there = self._form(name, n, q)
            quotients.append(alike[q].at(n) / there if there else 1.0)
        quotient = quotients[0]
        if len(near) == 2:
            part = math.log(ranks / near[0]) / math.log(near[1] / near[0])
            quotient = _between(quotients[0], quotients[1], part)
        seconds = here * quotient
        spread = max(alike[q].spread_at(n) for q in near)
        return Priced(seconds, seconds * math.hypot(spread, UNSURE), EXTRAPOLATED)

    def _at(self, curve: Curve, n: float) -> Priced:
        seconds, spread = curve.at(n), curve.spread_at(n)
        if n > BEYOND * curve.sizes_B[-1] and len(curve.sizes_B) > 1:
            return Priced(seconds, seconds * math.hypot(spread, UNSURE), EXTRAPOLATED)
        return Priced(seconds, seconds * spread, CURVE)


def curves_of(measured: Measured | None, transport: str | None) -> list[Curve]:
    """Those of a transport; None: of shared memory, which is what workers of one simulated node have."""
    return [c for c in measured.curves if c.transport == (transport or "shared")] if measured is not None else []


def _between(low: float, high: float, part: float) -> float:
    if low <= 0 or high <= 0:
        return low + part * (high - low)
    return low * math.exp(part * math.log(high / low))


def _sum(a: Priced, b: Priced) -> Priced:
    source = a.source if a.source == b.source else EXTRAPOLATED
    return Priced(a.seconds + b.seconds, a.spread_s + b.spread_s, source)
