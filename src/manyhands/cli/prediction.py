"""What a plan is predicted to cost, for a person, in a few plain lines."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from manyhands.cli.summary import in_parts, seconds
from manyhands.studies.table import in_bytes as size
from manyhands.task import Task

if TYPE_CHECKING:
    from manyhands.modelling.memory.parts import Footprint
    from manyhands.modelling.prediction import Prediction

_PARTS = (
    *("parameters_B", "gradients_B", "optimizer_B", "activations_B", "buffers_B", "temporaries_B"),
    *("mapped_B", "data_B", "process_B", "allocator_B"),
)
_SOURCES = {
    "measured": "this task's own step, measured here",
    "operators": "this machine's tables of operators",
    "roofline": "the device's specification",
    "curve": "this machine's curves of its transports",
    "extrapolated": "those curves, drawn on",
    "formula": "latency and bandwidth of the links",
}


def lines(task: Task, found: Prediction) -> list[str]:
    """The figures that one looks at first."""
    said = found.summary
    workers = "1 worker" if said.workers == 1 else f"{said.workers:,} workers"
    bar = f"± {found.error:.0%}"
    rows = [
        ("step", f"{seconds(said.step_s.median)} {bar}"),
        ("parts", in_parts(said.step_parts_s)),
        ("samples per second", f"{said.samples_per_s:,.0f}"),
        ("the run", f"{said.steps:,} steps, {said.epochs:.4g} epochs, in {seconds(said.wall_s)}"),
        ("sent", f"{size(said.sent_B_per_step)} a step by worker 0" + _levels(found)),
    ]
    if said.staleness_mean is not None:
        text = f"{said.staleness_mean:.2f} updates of others on average, {said.staleness_max} at most"
        rows.append(("staleness", text))
    if found.memory is not None:
        rows.append(("memory", f"{size(said.peak_memory_B)}, the largest worker: {_in_parts(found.memory.largest)}"))
    ordered = sorted(found.sources.items(), key=lambda x: -x[1])
    known = "; ".join(f"{share:.0%} from {_SOURCES.get(name, name)}" for name, share in ordered if share >= 0.005)
    rows += [("known", known), ("predicted", f"in {seconds(found.took_s)}")]
    head = (
        f"{said.model} ({said.parameters:,} parameters) on {said.data}: {said.strategy}, {workers}, {said.transport}, "
        f"on {found.cluster}"
    )
    return [head, *(f"  {name:<18}  {value}" for name, value in rows), *(f"  {note}" for note in found.notes)]


def _in_parts(worker: Footprint) -> str:
    """What is a hundredth of it and more, the largest first."""
    parts = [(name.removesuffix("_B"), n) for name, n in dataclasses.asdict(worker).items() if name in _PARTS]
    shown = sorted((part for part in parts if part[1] >= worker.resident_B / 100), key=lambda x: -x[1])
    return ", ".join(f"{name} {size(n)}" for name, n in shown)


def _levels(found: Prediction) -> str:
    across = {"within": "within a node", "between": "between nodes"}
    return "".join(f", {across.get(level, level)}" for level in found.link_B)
