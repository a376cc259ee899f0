"""What a run did, for a person, in a few plain lines."""

from __future__ import annotations

import dataclasses

from manyhands.communication.topology import Mesh
from manyhands.contract import Measurement, StepParts
from manyhands.studies.table import in_bytes as size
from manyhands.task import Task, described
from manyhands.verbs import Result


def lines(task: Task, result: Result) -> list[str]:
    """The figures of ``summary.json`` that one looks at first."""
    said = result.summary
    assert said is not None
    step = said.step_s
    mesh = result.plan.mesh
    assert isinstance(mesh, Mesh)
    cut = mesh["data"] != said.workers
    whom = "replicas of the model" if cut else "workers"
    share = "" if mesh["data"] == 1 else f" = {_shares(said.global_batch, mesh['data'])} over {mesh['data']} {whom}"
    workers = "1 worker" if said.workers == 1 else f"{said.workers} workers"
    if cut:
        workers += f" as {mesh}"
    rows = [
        ("test accuracy", f"{said.test_accuracy:.2%}" if said.test_accuracy is not None else "not measured"),
        ("training loss", f"{said.train_loss:.4g}" if said.train_loss is not None else "not measured"),
        ("global batch", f"{said.global_batch}{share}"),
        ("optimizer", described(task.optimizer) + (f", {described(task.schedule)}" if task.schedule else "")),
        ("length", f"{said.steps:,} steps, {said.epochs:.4g} epochs; this run took {seconds(said.wall_s)}"),
        ("step", f"{seconds(step.median)} (one in ten under {seconds(step.p10)}, one in ten over {seconds(step.p90)})"),
        ("parts", in_parts(said.step_parts_s)),
        ("samples per second", f"{said.samples_per_s:,.0f}"),
        ("sent", f"{size(said.sent_B_per_step)} a step by each worker"),
        *_of_compression(said),
        *_of_workers(said),
        ("memory", f"{size(said.peak_memory_B)}, the largest worker"),
        ("files", str(result.out) if result.out is not None else "none kept; --out DIR keeps them"),
    ]
    head = f"{said.model} ({said.parameters:,} parameters) on {said.data}: {said.strategy}, {workers}, {said.transport}"
    return [head, *(f"  {name:<18}  {value}" for name, value in rows)]


def in_parts(parts: StepParts) -> str:
    """What was counted of a mean step, and its sum: means do not add up to the median step."""
    each = dataclasses.asdict(parts)
    told = " + ".join(f"{name} {seconds(s)}" for name, s in each.items())
    return f"{told} = {seconds(sum(each.values()))} (means of worker 0)"


def _of_workers(said: Measurement) -> list[tuple[str, str]]:
    """How long each worker waits for others, and how late updates come."""
    rows = []
    if said.workers > 1 and said.wait_s_by_worker:
        least, most = min(said.wait_s_by_worker), max(said.wait_s_by_worker)
        who = said.wait_s_by_worker.index(most)
        rows.append(("waiting", f"{seconds(least)} to {seconds(most)} a step (most: worker {who})"))
    if said.bubble_by_worker:
        rows.append(("bubble", _bubble(said)))
    if said.staleness_mean is not None:
        text = f"{said.staleness_mean:.2f} updates of others on average, {said.staleness_max} at most"
        rows.append(("staleness", text))
    return rows


def _of_compression(said: Measurement) -> list[tuple[str, str]]:
    """How much was left out, and what leaving it out took."""
    if said.compression_s is None:
        return []
    text = "nothing was sent" if said.compression_ratio is None else f"{said.compression_ratio:,.4g} times fewer bytes"
    if said.compression_error is not None and said.compression_kept is not None:
        text += f"; error {said.compression_error:.3g}, kept mass {said.compression_kept:.3g}"
    return [("compression", f"{text}; {seconds(said.compression_s)} a step")]


def _bubble(said: Measurement) -> str:
    """What was idle of a step, beside what would be if stages cost the same and nothing else cost anything."""
    each = said.bubble_by_worker
    text = f"{min(each):.3f} to {max(each):.3f} of a step, by worker (medians)"
    if said.bubble_of_schedule is None or said.bubble_of_flush is None:
        return text
    return f"{text}; of the schedule {said.bubble_of_schedule:.3f}, (p − 1)/(m + p − 1) = {said.bubble_of_flush:.3f}"


def _shares(batch: int, workers: int) -> str:
    whole, rest = divmod(batch, workers)
    return f"{whole} or {whole + 1} each" if rest else f"{whole} each"


def seconds(value: float) -> str:
    """A duration with three digits and a unit.

    >>> seconds(0.00021), seconds(0.0042), seconds(12.34)
    ('210 µs', '4.2 ms', '12.3 s')
    """
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}" if value < 1000 else f"{value:,.0f} s"
    return "0 s" if value <= 0 else "under 1 µs"
