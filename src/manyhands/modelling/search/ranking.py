"""Plans with what they are predicted to cost, in an order, and what that order is worth. Pure.

    bars overlap   t_j (1 − e_j) ≤ t_1 (1 + e_1), t_1 the first of the order: the two may change places
    gain           (t(w₁) / t(w₂))^(1 / log₂(w₂ / w₁)): the speed-up of doubling the workers, from one count to the next
    knee           the last count up to which every gain is at least `KNEE`
    price          workers × hours of an epoch × price of a worker-hour

A plan that learns from a sample as one process does (`Strategy.exact`) is ranked by the time of an epoch. Of the others
nobody knows how many samples they need, unless a study has measured it; they stand apart, fast or not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from manyhands.communication.topology import Mesh
from manyhands.contract import StepParts, Strategy
from manyhands.modelling.prediction import Prediction
from manyhands.plan import Plan

#: Of a doubling of the workers: three quarters of what they could give.
KNEE = 1.5
#: So many are told of.
SHOWN = 10

#: How it is known what a plan learns from a sample: as one process by construction, from a study, or not at all.
Learning = Literal["exact", "measured", "unknown"]
#: Why a plan is not ranked.
Why = Literal["cannot work", "memory", "no price", "slower", "not looked at"]


@dataclass(frozen=True)
class Timed:
    """What a plan took when it was run: seconds of an epoch, the median of some runs, and half their range over it."""

    epoch_s: float
    spread: float
    runs: int


@dataclass(frozen=True)
class Ranked:
    """A plan that can be run, and its cost."""

    plan: Plan
    prediction: Prediction
    learning: Learning = "exact"
    samples_to_target: float | None = None
    needed_B: int | None = None  # of memory
    timed: Timed | None = None

    @property
    def epoch_s(self) -> float:
        """Predicted."""
        said = self.prediction.summary
        return said.wall_s / said.epochs

    @property
    def target_s(self) -> float | None:
        """Predicted, until the target is reached; None: nobody knows."""
        if self.samples_to_target is None:
            return None
        return self.samples_to_target / self.prediction.summary.samples_per_s

    @property
    def low_s(self) -> float:
        """The lower end of the bar of an epoch."""
        return self.epoch_s * (1 - self.prediction.error)

    @property
    def high_s(self) -> float:
        """Its upper end."""
        return self.epoch_s * (1 + self.prediction.error)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        said = self.prediction.summary
        return {
            "plan": self.plan.as_table(),
            "epoch_s": self.epoch_s,
            "error": self.prediction.error,
            "target_s": self.target_s,
            "learning": self.learning,
            "bound": bound(said.step_parts_s)[0],
            "needed_B": self.needed_B,
            "measured_epoch_s": None if self.timed is None else self.timed.epoch_s,
            "measured_spread": None if self.timed is None else self.timed.spread,
            "prediction": self.prediction.as_dict(),
        }


@dataclass(frozen=True)
class Refused:
    """A plan that is not ranked."""

    plan: Plan
    why: Why
    reason: str


@dataclass(frozen=True)
class Point:
    """The fastest plan of so many workers."""

    workers: int
    epoch_s: float
    gain: float | None  # from the count before; None of the first
    plan: Plan
    price: float | None = None


@dataclass(frozen=True)
class Worth:
    """How many workers are worth it, of one way to divide the work."""

    points: tuple[Point, ...]
    knee: Point
    fastest: Point
    cheapest: Point

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        points = [
            {"workers": p.workers, "threads": p.plan.threads, "epoch_s": p.epoch_s, "gain": p.gain, "price": p.price}
            for p in self.points
        ]
        named = {"knee": self.knee, "fastest": self.fastest, "cheapest": self.cheapest}
        return {"points": points, **{name: point.workers for name, point in named.items()}}


@dataclass(frozen=True)
class Ranking:
    """What `search` gives back: ``ranked`` in order, ``apart`` those of which nobody knows what they learn.

    ``by``: what the order is of, ``epoch`` or ``target``. ``choice`` is None where nothing can be run.
    """

    cluster: str
    looked_at: int
    ranked: tuple[Ranked, ...]
    apart: tuple[Ranked, ...]
    refused: tuple[Refused, ...]
    by: Literal["epoch", "target"] = "epoch"
    price_per_worker_hour: float | None = None
    notes: tuple[str, ...] = ()
    took_s: float = 0.0
    measuring_s: float = 0.0  # of that, until the steps that all prices rest on were known
    here: bool = True  # the cluster is this machine, so that plans can be run

    @property
    def choice(self) -> Ranked | None:
        """The first."""
        return next(iter(self.ranked), None)

    @property
    def ties(self) -> tuple[Ranked, ...]:
        """Those after the first that may be as fast, for all that the error bars say."""
        return tied(self.ranked)

    @property
    def worth(self) -> Worth | None:
        """How many workers are worth it, dividing the work as the first plan does."""
        return None if self.choice is None else worth(self.choice, self.ranked, self.price_per_worker_hour)

    @property
    def regret(self) -> float | None:
        """measured(first as predicted) / measured(best) − 1, of those that were run."""
        run = [each for each in self.ranked if each.timed is not None]
        if len(run) < 2:
            return None
        times = {id(each): each.timed.epoch_s for each in run if each.timed is not None}
        first = min(run, key=key)
        return times[id(first)] / min(times.values()) - 1

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; refused plans by reason."""
        worth = self.worth
        return {
            "cluster": self.cluster,
            "by": self.by,
            "looked_at": self.looked_at,
            "choice": None if self.choice is None else self.choice.plan.as_table(),
            "within_error_bars": len(self.ties),
            "ranked": [each.as_dict() for each in self.ranked[:SHOWN]],
            "apart": [each.as_dict() for each in self.apart[:SHOWN]],
            "refused": [
                {"why": first.why, "plans": len(same), "reason": first.reason, "for_example": first.plan.as_table()}
                for same in grouped(self.refused)
                for first in same[:1]
            ],
            "worth": None if worth is None else worth.as_dict(),
            "regret": self.regret,
            "took_s": self.took_s,
            "measuring_s": self.measuring_s,
            "notes": list(self.notes),
        }


def key(each: Ranked) -> tuple[float, int]:
    """What plans are ordered by; of equal ones fewer cores go first."""
    cores = (each.plan.workers or 1) * max(each.plan.threads, 1)
    return (each.epoch_s if each.target_s is None else each.target_s, cores)


def in_order(found: Iterable[Ranked]) -> tuple[tuple[Ranked, ...], tuple[Ranked, ...]]:
    """Those whose learning is known, and those apart. Where a study told of any plan, ``exact`` alone is not enough."""
    every = sorted(found, key=key)
    by_target = any(each.target_s is not None for each in every)
    known = [each for each in every if (each.target_s is not None if by_target else each.learning != "unknown")]
    apart = sorted((each for each in every if each not in known), key=lambda each: each.epoch_s)
    return tuple(known), tuple(apart)


def tied(ranked: Sequence[Ranked]) -> tuple[Ranked, ...]:
    """See `Ranking.ties`. What was measured has the bar of its runs."""
    if not ranked:
        return ()
    first_s, first = _bar(ranked[0])
    return tuple(each for each in ranked[1:] if (bar := _bar(each))[0] * (1 - bar[1]) <= first_s * (1 + first))


def _bar(each: Ranked) -> tuple[float, float]:
    if each.timed is not None:
        return each.timed.epoch_s, each.timed.spread
    return key(each)[0], each.prediction.error


def with_times(ranked: Sequence[Ranked], times: Mapping[Plan, Timed]) -> tuple[Ranked, ...]:
    """Those that were run first, by what they took; then the others as they were."""
    run = [replace(each, timed=times[each.plan]) for each in ranked if each.plan in times]
    rest = [each for each in ranked if each.plan not in times]
    return (*sorted(run, key=_measured), *rest)


def _measured(each: Ranked) -> float:
    """An epoch as it was measured; until the target, as many samples as ever."""
    assert each.timed is not None
    return each.timed.epoch_s * key(each)[0] / each.epoch_s


def bound(parts: StepParts) -> tuple[str, float]:
    """What most of a step is, and which share of it: ``computing``, ``communicating`` or ``waiting``."""
    each = {
        "computing": parts.compute + parts.update,
        "communicating": parts.communicate,
        "waiting": parts.wait,
    }
    name = max(each, key=lambda n: each[n])
    whole = sum(each.values())
    return name, each[name] / whole if whole else 1.0


def grouped(refused: Iterable[Refused]) -> list[list[Refused]]:
    """By reason, whatever numbers are in it; the largest groups first."""
    groups: dict[tuple[str, str], list[Refused]] = {}
    for each in refused:
        groups.setdefault((each.why, re.sub(r"\d[\d.,e+-]*", "…", each.reason)), []).append(each)
    return sorted(groups.values(), key=len, reverse=True)


# -- how many workers are worth it -------------------------------------------------------------------------------------


def worth(choice: Ranked, ranked: Sequence[Ranked], price: float | None = None) -> Worth:
    """The fastest plan of each number of workers that divides the work as ``choice`` does; one worker is of any way."""
    best: dict[int, Ranked] = {}
    for each in ranked:
        workers = each.plan.workers or 1
        alike = workers == 1 or _way(each.plan) == _way(choice.plan)
        if alike and (workers not in best or each.epoch_s < best[workers].epoch_s):
            best[workers] = each
    points: list[Point] = []
    for workers, each in sorted(best.items()):
        before = points[-1] if points else None
        gain = None
        if before is not None:
            gain = (before.epoch_s / each.epoch_s) ** (1 / math.log2(workers / before.workers))
        paid = None if price is None else workers * each.epoch_s / 3600 * price
        points.append(Point(workers, each.epoch_s, gain, each.plan, paid))
    return Worth(
        tuple(points),
        knee(points),
        min(points, key=lambda p: p.epoch_s),
        min(points, key=lambda p: p.workers * p.epoch_s),
    )


def knee(points: Sequence[Point]) -> Point:
    """See the file's head; ``points`` by ascending workers."""
    last = points[0]
    for point in points[1:]:
        if point.gain is None or point.gain < KNEE:
            break
        last = point
    return last


def _way(plan: Plan) -> tuple[str, str, bool]:
    """Strategy, compressor, and whether the model is cut."""
    assert isinstance(plan.strategy, Strategy)
    cut = isinstance(plan.mesh, Mesh) and plan.mesh["data"] != plan.workers
    return plan.strategy.name, str(getattr(plan.strategy, "compress", "none")), cut
