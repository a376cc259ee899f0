"""A search over plans: decided, held against memory, priced in the order of what a price costs, and ranked.

    1  every plan is decided as training would decide it; what cannot work is refused with training's own message
    2  what does not fit into memory, with a margin, is refused
    3  what costs no more than a simulation of some milliseconds is priced
    4  what costs more (a step of its own to be measured, ranks that run one by one) goes in the order of the least that
       it could take, were its exchanges free; what could not be the first even so is refused, and so is what is beyond
       the `Pricer`'s budget. The others are rehearsed on the model, and then measured or run

No plan ends a search: what training or measuring it would raise becomes its reason.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from manyhands.checks import is_positive, is_whole
from manyhands.contract import Setting, Strategy
from manyhands.errors import BadInput, InvalidPlan, ManyhandsError, Problem
from manyhands.modelling.prediction import Prediction
from manyhands.modelling.search.ranking import (
    SHOWN,
    Learning,
    Ranked,
    Ranking,
    Refused,
    Timed,
    in_order,
    key,
    with_times,
)
from manyhands.plan import Plan, Resolved
from manyhands.plan.description import strategy_from

#: Of the memory there is, so much is left free: what a prediction misses, and what others on the machine need.
MARGIN = 0.10

#: strategy → workers → samples until the target, as a study has measured them on this task.
Samples = Mapping[str, Mapping[int, float]]


class Pricer(Protocol):
    """What plans cost; they are decided."""

    def begin(self, plans: Sequence[Plan]) -> None:
        """All that will be asked for, before anything is."""

    def effort(self, plan: Plan) -> tuple[str, float]:
        """What pricing it takes of which budget, of which there is 1 of each; 0: next to nothing."""

    def least_s(self, plan: Plan) -> float:
        """Of an epoch: less than it can take."""

    def price(self, plan: Plan) -> Prediction:
        """Raises `BadInput` where there is no price."""

    def short(self, plan: Plan, margin: float) -> Problem | None:
        """What is missing of memory, of which a part ``margin`` stays free; None: it fits."""

    def needed_B(self, plan: Plan) -> int | None:
        """Bytes of memory; None: nobody knows. May take a tenth of a second."""


def search(
    plans: Iterable[Plan],
    decide: Callable[[Plan], Resolved],
    pricer: Pricer,
    *,
    rehearse: Callable[[Resolved], Resolved] = lambda made: made,
    cluster: str = "",
    samples: Samples | None = None,
    price_per_worker_hour: float | None = None,
    notes: Sequence[str] = (),
    here: bool = True,
) -> Ranking:
    """See the file's head. ``rehearse`` holds a plan whose price is costly against the model; raises what is wrong."""
    began = time.perf_counter()
    decided, refused, asked = _decided(plans, decide)
    cheap: list[Resolved] = []
    costly: list[tuple[str, float, Resolved]] = []
    for each in decided:
        try:
            budget, share = pricer.effort(each.plan)
        except ManyhandsError as e:
            refused.append(Refused(each.plan, "no price", str(e)))
        else:
            if share:
                costly.append((budget, share, each))
            else:
                cheap.append(each)
    cheap = _fitting(cheap, pricer, refused)
    measuring = time.perf_counter()
    pricer.begin([each.plan for each in (*cheap, *(each for _, _, each in costly))])
    measuring_s = time.perf_counter() - measuring
    found: list[Ranked] = []

    def take(each: Resolved) -> None:
        try:
            found.append(_priced(each, pricer, samples))
        except ManyhandsError as e:
            refused.append(Refused(each.plan, "no price", str(e)))

    for each in cheap:
        take(each)
    spent: dict[str, float] = {}
    for least_s, budget, share, each in sorted(
        ((pricer.least_s(each.plan), budget, share, each) for budget, share, each in costly), key=lambda c: c[0]
    ):
        first = min((one for one in found if one.learning != "unknown"), key=key, default=None)
        if first is not None and least_s > first.high_s:
            reason = f"even if its exchanges were free an epoch would take {least_s / first.epoch_s:.2f} × the best"
            refused.append(Refused(each.plan, "slower", reason))
            continue
        if spent.get(budget, 0.0) + share > 1:
            reason = f"{budget} have been enough for one search. Search fewer plans, or ask predict for this one"
            refused.append(Refused(each.plan, "not looked at", reason))
            continue
        try:
            whole = rehearse(each)
        except BadInput as e:
            refused.append(Refused(each.plan, "cannot work", str(e)))
            continue
        if _fitting([whole], pricer, refused, others=cheap):
            spent[budget] = spent.get(budget, 0.0) + share
            take(whole)
    ranked, apart = (_with_memory(part, pricer) for part in in_order(found))
    by_target = any(each.target_s is not None for each in ranked)
    return Ranking(
        cluster,
        asked,
        ranked,
        apart,
        tuple(refused),
        "target" if by_target else "epoch",
        price_per_worker_hour,
        tuple(notes),
        time.perf_counter() - began,
        measuring_s,
        here,
    )


def _decided(plans: Iterable[Plan], decide: Callable[[Plan], Resolved]) -> tuple[list[Resolved], list[Refused], int]:
    """What can work, each once: several plans may be decided alike."""
    found: dict[Plan, Resolved] = {}
    refused: list[Refused] = []
    asked = 0
    for plan in plans:
        asked += 1
        try:
            made = decide(plan)
        except BadInput as e:
            refused.append(Refused(plan, "cannot work", str(e)))
        else:
            found.setdefault(made.plan, made)
    return list(found.values()), refused, asked


def _fitting(
    decided: Sequence[Resolved], pricer: Pricer, refused: list[Refused], others: Sequence[Resolved] = ()
) -> list[Resolved]:
    """What fits into memory; what does not is told what would."""
    found: list[Resolved] = []
    short: list[tuple[Plan, Problem]] = []
    for each in decided:
        try:
            lacking = pricer.short(each.plan, MARGIN)
        except ManyhandsError as e:
            refused.append(Refused(each.plan, "no price", str(e)))
            continue
        if lacking is None:
            found.append(each)
        else:
            short.append((each.plan, lacking))
    fits = "No plan of this search fits."
    if short and (found or others):
        fits = f"What fits, for one: {max((*found, *others), key=lambda each: each.plan.workers or 1).plan}."
    refused += [Refused(plan, "memory", f"{lacking} {fits}") for plan, lacking in short]
    return found


def _priced(each: Resolved, pricer: Pricer, samples: Samples | None) -> Ranked:
    learning, until = learned(each, samples)
    return Ranked(each.plan, pricer.price(each.plan), learning, until)


def _with_memory(ranked: Sequence[Ranked], pricer: Pricer) -> tuple[Ranked, ...]:
    """What is shown has its memory told."""
    told = [dataclasses.replace(each, needed_B=pricer.needed_B(each.plan)) for each in ranked[:SHOWN]]
    return (*told, *ranked[SHOWN:])


def learned(each: Resolved, samples: Samples | None) -> tuple[Learning, float | None]:
    """How it is known what a plan learns, and its samples to the target, if they are.

    Exact plans learn alike on any number of workers; others are known at the very number that a study has measured.
    """
    strategy, setting = each.plan.strategy, each.setting
    assert isinstance(strategy, Strategy)
    exact = strategy.exact(setting)
    if samples:
        own = samples.get(str(strategy), {}).get(each.plan.workers or 1)
        if own is not None:
            return "measured", own
        alike = [
            value
            for text, by_workers in samples.items()
            for workers, value in by_workers.items()
            if exact and _exact(text, workers, setting)
        ]
        if alike:
            return "measured", sum(alike) / len(alike)
    return ("exact" if exact else "unknown"), None


def _exact(text: str, workers: int, setting: Setting) -> bool:
    """Whether what a study ran was plain SGD; one worker alone is."""
    strategy = strategy_from(text)
    return strategy.exact(dataclasses.replace(setting, workers=workers))


def measured(
    ranking: Ranking, run: Callable[[Mapping[Plan, float]], Mapping[Plan, Sequence[float]]], count: int
) -> Ranking:
    """The first ``count`` run for real, and put in the order of what they took.

    ``run`` gets the plans with the seconds of a step that are predicted, and tells those of some runs of each.
    """
    began = time.perf_counter()
    first = {each.plan: each for each in ranking.ranked[:count]}
    steps = run({plan: _mean_step_s(each) for plan, each in first.items()})
    times = {plan: _timed(taken, first[plan]) for plan, taken in steps.items() if taken}
    ranked = with_times(ranking.ranked, times)
    missing = len(first) - len(times)
    notes = (f"{missing} of the first {count} plans could not be measured",) if missing else ()
    took_s = ranking.took_s + time.perf_counter() - began
    return dataclasses.replace(ranking, ranked=ranked, took_s=took_s, notes=(*ranking.notes, *notes))


def _mean_step_s(each: Ranked) -> float:
    said = each.prediction.summary
    return said.wall_s / said.steps


def _timed(taken: Sequence[float], of: Ranked) -> Timed:
    middle = statistics.median(taken)
    return Timed(middle * of.epoch_s / _mean_step_s(of), (max(taken) - min(taken)) / (2 * middle), len(taken))


def check(*, measure: int, limit: int, price: float | None, here: bool, cluster: str, study: Samples | None) -> None:
    """Raise `InvalidPlan` for what a search cannot be told."""
    found = []
    if not is_whole(measure, 0):
        found.append(Problem(f"measure={measure!r}", "how many plans to run is a whole number from 0.", "E.g. 3."))
    elif measure and not here:
        found.append(
            Problem(
                f"measure={measure} on cluster {cluster}",
                "plans are run on this machine.",
                "Leave cluster out, or measure.",
            )
        )
    if not is_whole(limit, 1):
        found.append(Problem(f"limit={limit!r}", "the most plans to look at is a whole number from 1.", "E.g. 1000."))
    if price is not None and not is_positive(price):
        found.append(
            Problem(f"price_per_worker_hour={price!r}", "a price is a positive number.", "E.g. 0.05 (--price 0.05).")
        )
    if study is not None and not study:
        found.append(
            Problem(
                "a study without samples to a target",
                "it has to have reached its target, on this model, data, batch and optimizer.",
                "Leave study out; plans are then ranked by the time of an epoch.",
            )
        )
    if found:
        raise InvalidPlan(found)
