"""What a plan will cost on a cluster, before it is run: the strategy's own code on priced replicas.

    step    = compute + exposed communication + wait + update (+ bubble), of rank 0 in virtual time
    error   = √(Σ (share of the step × error of where that share came from)²)

Computing is, in this order: the user's own step measured here (`profile`), operators from this machine's tables, the
roofline of a device's specification (`computed`). Communication is, in this order: the plan's own exchanges measured
beside the profile (`exchanges`), the calibrated curves of the plan's transport, α + βn of the cluster's links.
Strategies run as in `simulation.sizes`; a cut model, and what looks at numbers (a robust rule, a compressor), as one
rank measured among mirrors, whose exchanges meet in lock-step (`running`).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from manyhands.communication.topology import Mesh
from manyhands.contract import Measurement, StepParts, Strategy
from manyhands.errors import BadInput
from manyhands.modelling.given import Given
from manyhands.modelling.memory.fitting import fits, would_fit
from manyhands.modelling.memory.footprint import footprint
from manyhands.modelling.memory.parts import Memory
from manyhands.modelling.prediction.computed import Computed, Source, computing, cut_anew, is_cut, through_stages
from manyhands.modelling.prediction.running import asked_by, by_sizes, in_lock_step, of_the_whole_run
from manyhands.plan import Plan
from manyhands.simulation.prices import Prices
from manyhands.simulation.trace import Spans

#: Relative errors that were found in validation (docs/validation.md), by where a figure comes from. A formula's is what
#: α-β forms miss by on curves that were measured; a roofline's is that of published tables without a constant.
ERRORS = {
    **{"measured": 0.03, "grid": 0.05, "operators": 0.08, "roofline": 0.6},
    **{"curve": 0.10, "extrapolated": 0.2, "formula": 0.35},
}
#: Steps that are simulated for a median; the whole run is as many of them as it has.
STEPS = 200
#: Processes that are started for a prediction, at most.
SIDE_BY_SIDE = 8


@dataclass(frozen=True)
class Prediction:
    """What `predict` gives back. ``summary`` is the record of a run that has not been; its loss and accuracy are None.

    ``error`` is the relative error bar of the step; ``sources`` say which share of the step came from where.
    """

    plan: Plan
    cluster: str
    summary: Measurement
    error: float
    sources: Mapping[str, float]
    #: Payload a step, over each level of the cluster's links, of worker 0.
    link_B: Mapping[str, float]
    notes: tuple[str, ...] = ()
    took_s: float = 0.0
    #: In parts, by worker; None where it was not asked for.
    memory: Memory | None = None

    @property
    def step_s(self) -> float:
        """The median step."""
        return self.summary.step_s.median

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: the summary, and what is said of a prediction beside it."""
        return {
            **self.summary.as_dict(),
            "cluster": self.cluster,
            "error": self.error,
            "sources": dict(self.sources),
            "link_B_per_step": dict(self.link_B),
            "memory": None if self.memory is None else self.memory.as_dict(),
            "took_s": self.took_s,
            "notes": list(self.notes),
        }


def predicted(
    given: Given,
    plan: Plan,
    *,
    compute: Source | None = None,
    fresh: bool = False,
    notes: tuple[str, ...] = (),
    computed: Computed | None = None,
    steps: int = STEPS,
    spans: Spans | None = None,
) -> Prediction:
    """``plan`` is decided.

    ``computed``: what is known of its computing already. ``steps``: so many are simulated at most. ``spans``: who did
    what when in them; of strategies that run in virtual time.
    """
    began = time.perf_counter()
    assert isinstance(plan.strategy, Strategy)
    assert isinstance(plan.mesh, Mesh)
    assert plan.workers is not None
    _refuse(plan)
    cluster, here = given.cluster, given.here
    transport = plan.transport if here else None
    if computed is None:
        asked = functools.partial(asked_by, given, plan)
        computed = computing(given, plan, compute=compute, fresh=fresh, asked=asked)
    curves = computed.curves if here else ()
    prices = Prices(cluster, plan.workers, transport, curves)
    if curves and computed.cost.compute_s:
        computed = cut_anew(computed, prices)
    profiled = computed.measured is not None and not computed.measured.plain
    if not profiled and plan.strategy.servers_update:  # else it is in the price of a push
        itemsize = next((p.element_size() for p in given.model.parameters() if p.requires_grad), 4)
        prices.serving_s_per_B = computed.cost.update(1) / itemsize
    if plan.mesh["pipeline"] > 1:
        computed = through_stages(plan, computed, prices)
    if is_cut(plan):
        outcome = in_lock_step(given, plan, computed, prices)
    else:
        try:
            outcome = by_sizes(given, plan, computed, prices, steps=steps, spans=spans)
        except BadInput:
            if computed.measured is None or computed.measured.plain:
                raise  # a plain step's exchanges are not this strategy's
            outcome = in_lock_step(given, plan, computed, prices)
    summary = of_the_whole_run(given, plan, outcome)
    if computed.bubble:
        summary = replace(summary, bubble_by_worker=list(computed.bubble))
    sources = _sources(computed, summary, prices)
    error = math.sqrt(
        sum((share * ERRORS[name]) ** 2 for name, share in sources.items())
        + computed.spread**2
        + _spread(prices, sources) ** 2
    )
    level = None if plan.workers == 1 else "within" if here else cluster.level(plan.workers)
    return Prediction(
        plan,
        cluster.name,
        summary,
        error,
        sources,
        {} if level is None else {level: summary.sent_B_per_step},
        (*notes, *computed.notes),
        time.perf_counter() - began,
    )


def with_memory(given: Given, found: Prediction) -> Prediction:
    """``found`` with what each worker will hold, and a note if that does not fit.

    ``peak_memory_B`` is the largest resident set of a worker; on a device with memory of its own what lies there.
    """
    began = time.perf_counter()
    plan, task, cluster, folder = found.plan, given.task, given.cluster, given.data_dir
    memory = footprint(task, plan, given.model, given.splits, data_dir=None if folder is None else Path(folder))
    peak_B = memory.resident_B if cluster.device.kind == "cpu" else memory.tensors_B
    notes = found.notes
    if fits(memory, cluster, plan.workers or 1) is not None:
        problem = would_fit(task, plan, given.model, given.splits, cluster)
        notes += () if problem is None else (f"out of memory: {problem}",)
    took_s = found.took_s + time.perf_counter() - began
    summary = replace(found.summary, peak_memory_B=peak_B)
    return replace(found, memory=memory, summary=summary, notes=notes, took_s=took_s)


def _refuse(plan: Plan) -> None:
    assert isinstance(plan.mesh, Mesh)
    assert isinstance(plan.strategy, Strategy)
    if not plan.strategy.scheduled:
        raise BadInput(
            f"predict with {plan.strategy} on {plan.mesh}: its messages have an order only once they came, and are "
            "not priced. Predict pipedream or synchronous on this mesh; `manyhands plan` tells what each worker holds."
        )
    if plan.mesh["pipeline"] > 1 and (plan.workers or 1) > SIDE_BY_SIDE:
        raise BadInput(
            f"predict with {plan.mesh}: the stages of a pipeline are measured side by side, each a process here, and "
            f"{plan.workers} are more than {SIDE_BY_SIDE}. Predict fewer workers."
        )


def _spread(prices: Prices, sources: Mapping[str, float]) -> float:
    """By how much of the step the calibrated prices may be off."""
    priced_s = sum(prices.sources.values())
    communication = sum(share for name, share in sources.items() if name in prices.sources)
    return communication * prices.spread_s / priced_s if priced_s else 0.0


def _sources(computed: Computed, summary: Measurement, prices: Prices) -> dict[str, float]:
    """Shares of the step, by where they come from; what is waited for comes from computing."""
    parts: StepParts = summary.step_parts_s
    whole = parts.compute + parts.communicate + parts.wait + parts.update + computed.cost.rest_s
    if not whole:
        return {computed.source: 1.0}
    communication = parts.communicate / whole
    by_price = prices.sources
    priced = sum(by_price.values()) or 1.0
    found: dict[str, float] = {computed.source: 1.0 - communication}
    for name, seconds in by_price.items():
        if seconds:
            found[name] = found.get(name, 0.0) + communication * seconds / priced
    return found
