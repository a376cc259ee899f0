"""A plan's ``compress`` is an option of its strategy, where it has that option."""

from __future__ import annotations

import dataclasses

from manyhands.contract import Strategy
from manyhands.errors import Problem
from manyhands.plan.description import Plan

#: What the plan's word is where the choice is left to us. It is made when the model is known (`modelling.compression`).
AUTO = "auto"
#: Strategies with that option, in the order in which they are offered.
ABLE = ("synchronous", "local", "diloco", "elastic", "gossip", "asynchronous", "downpour", "ssp")
#: Why some others have none.
WHY_NOT = {
    "parallel_sgd": "it sends nothing in any step, and the average at its end is exact.",
    "hogwild": "workers write into one memory, and nothing is sent.",
    "push_sum": "a share is pushed together with its weight, and what a compressor left out would be missing there.",
    "asynchronous_gossip": "a pair averages in the middle of others' steps; neither knows what the other knew last.",
    "backup_workers": "who comes too late would lose what it had left over, too.",
    "replica_average": "it is the baseline whose workers get everybody's whole vector.",
    "slice_update": "slices of parameters are gathered, and a compressed parameter is another one.",
    "slice_own_batch": "slices of parameters are gathered, and a compressed parameter is another one.",
    "sandblaster": "L-BFGS compares gradients of one step with those of the step before.",
}


def compressed(plan: Plan, strategy: Strategy, device: str, found: list[Problem]) -> Strategy:
    """The strategy, sending what the plan's ``compress`` says."""
    options = {f.name for f in dataclasses.fields(strategy)}
    compress = plan.compress or getattr(strategy, "compress", "none")
    asked = f"compress={compress}"
    if compress == "none":
        return strategy
    if "compress" not in options and compress != AUTO:
        why = WHY_NOT.get(strategy.name, "a worker sends there what others need as it is.")
        found.append(Problem(f"{asked} with {strategy}", why, f"Use {', '.join(ABLE)}, or leave compress out."))
        return strategy
    if device == "cuda" and compress != AUTO:
        found.append(
            Problem(
                f"{asked} on cuda",
                "payloads are packed in the host's memory.",
                "Use device=cpu, or leave compress out.",
            )
        )
    said = getattr(strategy, "compress", "none")
    if said not in ("none", compress):
        found.append(Problem(f"{asked} with {strategy}", "they contradict each other.", "Say one of them."))
        return strategy
    if compress == AUTO:
        return strategy
    return dataclasses.replace(strategy, **{"compress": compress})
