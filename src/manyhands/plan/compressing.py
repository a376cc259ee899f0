"""A plan's ``compress`` is an option of its strategy, where it has that option."""

from __future__ import annotations

import dataclasses

from manyhands.contract import Strategy
from manyhands.errors import Problem
from manyhands.plan.description import Plan

#: What the plan's word would be if the choice were left to us.
AUTO = "auto"


def compressed(plan: Plan, strategy: Strategy, device: str, found: list[Problem]) -> Strategy:
    """The strategy, sending what the plan's ``compress`` says."""
    options = {f.name for f in dataclasses.fields(strategy)}
    compress = plan.compress or getattr(strategy, "compress", "none")
    asked = f"compress={compress}"
    if compress == "none":
        return strategy
    if compress == AUTO:
        found.append(
            Problem(
                asked,
                "choosing by measured costs and links is not part of this release.",
                "Name one, e.g. compress=top_k; `manyhands list compressors` shows what each sends.",
            )
        )
        return strategy
    if "compress" not in options:
        found.append(
            Problem(
                f"{asked} with {strategy}",
                f"what workers of {strategy.name} exchange is not compressed in this release.",
                "Use synchronous, or leave compress out.",
            )
        )
        return strategy
    if device == "cuda":
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
    return dataclasses.replace(strategy, **{"compress": compress})
