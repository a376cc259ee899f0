"""A plan's ``compress`` is an option of its strategy, where it has that option."""

from __future__ import annotations

import dataclasses

from manyhands.consistency import strategies
from manyhands.consistency.compressed import Compressing
from manyhands.contract import Strategy
from manyhands.errors import Problem
from manyhands.plan.description import Plan

#: What the plan's word is where the choice is left to us. It is made when the model is known (`modelling.compression`).
AUTO = "auto"


def compressed(plan: Plan, strategy: Strategy, device: str, found: list[Problem]) -> Strategy:
    """The strategy, sending what the plan's ``compress`` says."""
    options = {f.name for f in dataclasses.fields(strategy)}
    compress = plan.compress or getattr(strategy, "compress", "none")
    asked = f"compress={compress}"
    if compress == "none":
        return strategy
    if "compress" not in options and compress != AUTO:
        able = [name for name in strategies if issubclass(strategies.load(name), Compressing)]
        cure = f"Use {', '.join(able)}, or leave compress out."
        found.append(Problem(f"{asked} with {strategy}", strategy.uncompressed, cure))
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
