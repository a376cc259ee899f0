"""What a simulated run came to, for a person, in a few plain lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manyhands.cli.summary import in_parts, seconds
from manyhands.studies.table import in_bytes as size
from manyhands.task import Task, described

if TYPE_CHECKING:
    from manyhands.simulation.running import Simulation

#: Of the records the last ones are shown.
SHOWN = 5
_HOW = {
    "values": "real gradients",
    "folded": "sizes only, all workers alike",
    "vectors": "sizes only, a clock a worker",
    "ranks": "sizes only, every worker by itself",
}


def lines(task: Task, found: Simulation) -> list[str]:
    """The figures that one looks at first; all times but the last are virtual."""
    said = found.summary
    step = said.step_s
    workers = "1 worker" if said.workers == 1 else f"{said.workers:,} workers"
    rows = []
    if said.test_accuracy is not None:
        rows.append(("test accuracy", f"{said.test_accuracy:.2%}"))
    if said.train_loss is not None:
        rows.append(("training loss", f"{said.train_loss:.4g}"))
    rows += [
        ("global batch", f"{said.global_batch:,}"),
        ("optimizer", described(task.optimizer)),
        ("length", f"{said.steps:,} steps, {said.epochs:.4g} epochs, in {seconds(said.wall_s)} of virtual time"),
        ("step", f"{seconds(step.median)} (one in ten under {seconds(step.p10)}, one in ten over {seconds(step.p90)})"),
        ("parts", in_parts(said.step_parts_s)),
        ("samples per second", f"{said.samples_per_s:,.0f}"),
        ("sent", f"{size(said.sent_B_per_step)} a step by worker 0"),
    ]
    if said.staleness_mean is not None:
        text = f"{said.staleness_mean:.2f} updates of others on average, {said.staleness_max} at most"
        rows.append(("staleness", text))
    if found.failures is not None:
        broken = found.failures
        rows.append(
            (
                "failures",
                f"{broken.failures}: {broken.useful:.1%} of the time useful; lost {seconds(broken.lost_s)} of work, "
                f"{seconds(broken.restarts_s)} in restarts, {seconds(broken.checkpoints_s)} in checkpoints",
            )
        )
    for record in found.history[-SHOWN:]:
        accuracy = "" if record["test_accuracy"] is None else f", accuracy {record['test_accuracy']:.2%}"
        loss = "" if record["train_loss"] is None else f"loss {record['train_loss']:.4g}"
        rows.append(
            (f"at {seconds(record.get('wall_s', record['train_s']))}", f"step {record['step']:,}: {loss}{accuracy}")
        )
    rows.append(("simulated", f"{_HOW[found.how]}, in {seconds(found.took_s)}"))
    head = (
        f"{said.model} ({said.parameters:,} parameters) on {said.data}: {said.strategy}, {workers} on {found.cluster}"
    )
    return [head, *(f"  {name:<18}  {value}" for name, value in rows), *(f"  {note}" for note in found.notes)]
