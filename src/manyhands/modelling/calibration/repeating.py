"""What to make of a block that was disturbed: do it again, and if that is no better, say how far the results differ.

A block is calm if the host has not changed its state during it (`probe.flipped`) and its medians are sure enough. Of
several tries the calm one counts; of none calm the one whose host stood still, then the surest, and its spread is
widened by what the tries differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from manyhands.cluster.measured import Curve
from manyhands.modelling.calibration.probe import flipped

#: Mean relative standard error of a block's medians beyond which it is done again; where ranks wait for a core, twice
#: that is usual.
NOISY, NOISY_OVERSUBSCRIBED = 0.1, 0.25
TRIES = 3
#: No spread is written that says more than "nobody knows".
WIDEST = 9.0


@dataclass(frozen=True)
class Try:
    """A block as it was measured once."""

    found: dict[str, Any]
    before_s: float | None
    after_s: float | None
    oversubscribed: bool = False

    @property
    def flipped(self) -> bool:
        """The host has changed its state during it."""
        return flipped(self.before_s, self.after_s)

    @property
    def calm(self) -> bool:
        """Whether it can be taken as it is."""
        return not self.flipped and self.found["noise"] <= (NOISY_OVERSUBSCRIBED if self.oversubscribed else NOISY)

    def curves(self, transport: str, ranks: int) -> list[Curve]:
        """What it says, to four digits."""
        probe = tuple(digits(s) for s in (self.before_s, self.after_s) if s is not None)
        return [
            Curve(
                transport=transport,
                operation=operation,
                ranks=ranks,
                sizes_B=tuple(self.found["sizes_B"]),
                seconds=tuple(digits(s) if s >= 1e-9 else 0.0 for s in series["seconds"]),
                spread=tuple(min(digits(s, 2), WIDEST) for s in series["spread"]),
                oversubscribed=self.oversubscribed,
                probe_s=probe,
            )
            for operation, series in self.found["series"].items()
        ]


def best(tries: Sequence[Try]) -> Try:
    """The one that counts."""
    return min(tries, key=lambda t: (not t.calm, t.flipped, t.found["noise"]))


def settled(tries: Sequence[Try], transport: str, ranks: int) -> list[Curve]:
    """The curves of the best try; wider by what the others differ from it, if it is not calm."""
    taken = best(tries)
    found = taken.curves(transport, ranks)
    if taken.calm:
        return found
    others = [t.curves(transport, ranks) for t in tries if t is not taken]
    return [widened(curve, [other[i] for other in others]) for i, curve in enumerate(found)]


def widened(curve: Curve, others: Sequence[Curve]) -> Curve:
    """With the relative distance to the farthest of the others in the spread; twice the spread if there is none."""
    spread = []
    for size, seconds, own in zip(curve.sizes_B, curve.seconds, curve.spread, strict=True):
        apart = max((abs(other.at(size) - seconds) for other in others), default=0.0)
        more = apart / seconds if seconds else 0.0
        spread.append(min(digits(math.hypot(own, more) if others else 2 * own, 2), WIDEST))
    return replace(curve, spread=tuple(spread))


def digits(value: float, kept: int = 4) -> float:
    """As many as a measurement has."""
    return float(f"{value:.{kept}g}")
