"""A network in two stages on two workers: against one worker, and against torch.distributed.pipelining over gloo.

    ours, NAME            2 workers on shared memory, a thread each, `Pipeline` with that schedule
    torch, NAME           2 ranks over gloo, a thread each, ScheduleGPipe or Schedule1F1B of the same stages
    ours, pipedream       the same of PipeDream: an SGD update of a stage after every micro-batch, stashed weights
    one worker            all stages in one process, one thread, the same micro-batches one after the other
    one worker, updating  the same with an SGD update after every micro-batch, as pipedream's
    one worker, full      the same in a single forward and backward

A stage is layers of Linear and Tanh of one width, float32; the loss is a mean squared error. A step is a batch:
gradients to zero, forwards, backwards; no update but pipedream's and that worker's. Everybody has the tuned allocator.
m micro-batches on p = 2 equal stages can be at most p·m/(m + p − 1) times as fast as one worker: 1.6 at m = 4, 1.88 at
m = 16. Zero bubble may be faster than that.

    python benchmarks/pipeline.py [--quick] [--json FILE] [--rounds N] [--only large|small]
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import _measure as measure
import torch
from _measure import Burst, Group, Report, Target
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.nn import functional as F

from manyhands.communication.topology import Mesh
from manyhands.contract import Batch
from manyhands.partition.pipeline import gpipe, schedules
from manyhands.partition.pipeline.runtime import Pipeline, Times, measured_bubble
from manyhands.partition.pipeline.stashing import StashingReplica
from manyhands.partition.pipeline.strategy import PipeDream
from manyhands.training.allocator import tune
from manyhands.training.member import Member
from manyhands.training.team import Team, team

STAGES = 2
OURS = ("gpipe", "one_f_one_b", "zero_bubble")
TORCH = {"gpipe": pipelining.ScheduleGPipe, "one_f_one_b": pipelining.Schedule1F1B}
ONE, FULL, UPDATING = "one worker", "one worker, full batch", "one worker, updating"
PIPEDREAM = "pipedream"
_LR = 1e-4


class Row(NamedTuple):
    """A size of stages, and what the issue asks for; None: nothing."""

    name: str
    width: int
    layers: int
    samples: int  # of a micro-batch
    micro_batches: int
    of_ideal: float | None
    torch: float


ROWS = (
    Row("large", 1024, 4, 64, 4, 0.93, 1.0),
    Row("large", 1024, 4, 64, 16, 0.93, 1.0),
    Row("small", 256, 2, 32, 4, None, 1.5),
    Row("small", 256, 2, 32, 16, None, 1.5),
)

# -- in the workers ----------------------------------------------------------------------------------------------------


def stages(row: Row) -> list[nn.Sequential]:
    """The same everywhere."""
    torch.manual_seed(0)
    return [
        nn.Sequential(*(m for _ in range(row.layers) for m in (nn.Linear(row.width, row.width), nn.Tanh())))
        for _ in range(STAGES)
    ]


def batch(row: Row) -> tuple[Tensor, Tensor]:
    """The same everywhere."""
    torch.manual_seed(1)
    x, y = torch.randn(2, row.samples * row.micro_batches, row.width)
    return x, y


_pipelines: dict[str, tuple[Pipeline, Callable[[], object]]] = {}


def pipedreaming(member: Member, row: Row) -> tuple[Pipeline, Callable[[], object]]:
    """This rank's stage under the strategy, which updates within a step."""
    member.comm.mesh = Mesh(pipeline=STAGES)
    x, y = batch(row)
    rank, strategy = member.comm.rank, PipeDream()
    model = stages(row)[rank]
    schedule = schedules.load(PIPEDREAM)(STAGES, row.micro_batches)
    replica = StashingReplica(
        *(model, torch.optim.SGD(model.parameters(), lr=_LR), F.mse_loss, member.comm),
        stages={rank: model},
        schedule=schedule,
        strategy=strategy,
        common=False,
    )
    worker = strategy.start(replica, member.comm)
    return replica.pipeline, lambda: worker.step(Batch(x, y, len(x)))


def prepare(member: Member, row: list[object]) -> None:
    """A job of the standing team: make a step of each schedule and keep it."""
    asked = Row(*row)  # type: ignore[arg-type]
    x, y = batch(asked)
    for name in OURS:
        schedule = schedules.load(name)(STAGES, asked.micro_batches)
        stage = stages(asked)[member.comm.rank]
        pipeline = Pipeline({member.comm.rank: stage}, schedule, member.comm, F.mse_loss)
        first, last = member.comm.rank == 0, member.comm.rank == STAGES - 1

        def step(
            pipeline: Pipeline = pipeline, stage: nn.Module = stage, first: bool = first, last: bool = last
        ) -> None:
            zero(stage)
            pipeline.run(x if first else None, y if last else None, len(x))

        _pipelines[name] = pipeline, step
    _pipelines[PIPEDREAM] = pipedreaming(member, asked)


def our_burst(member: Member, name: str, steps: int, warm: int, start_at: float) -> list[float]:
    """A job of the standing team: one burst."""
    return list(measure.burst(_pipelines[name][1], steps, warm, start_at))


def our_times(member: Member, name: str) -> list[float]:
    """A job of the standing team: where the time of the last batch went."""
    times = _pipelines[name][0].times
    return [times.batch_s, times.compute_s, times.wait_s]


def zero(module: nn.Module) -> None:
    """Gradients stay where they are, as those of a replica do."""
    for p in module.parameters():
        if p.grad is not None:
            p.grad.zero_()


def torch_step(rank: int, row: Row, name: str, meeting: str) -> Callable[[], object]:
    """As the documentation of torch.distributed.pipelining has it, with stages made by hand."""
    tune()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=STAGES, timeout=timedelta(seconds=120)
    )
    module = stages(row)[rank]
    x, y = batch(row)
    stage = pipelining.PipelineStage(module, rank, STAGES, torch.device("cpu"))
    schedule = TORCH[name](stage, row.micro_batches, loss_fn=F.mse_loss)

    def step() -> None:
        zero(module)
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y, losses=[])

    return step


def one_step(rank: int, row: Row, micro_batches: int, updates: bool = False) -> Callable[[], object]:
    """One process and one thread; an update after every micro-batch, or none."""
    tune()
    torch.set_num_threads(1)
    module = nn.Sequential(*stages(row))
    x, y = batch(row)
    optimizer = torch.optim.SGD(module.parameters(), lr=_LR)

    def step() -> None:
        zero(module)
        for part, target in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            loss = F.mse_loss(module(part), target) / (1 if updates else micro_batches)
            loss.backward()  # type: ignore[no-untyped-call]
            if updates:
                optimizer.step()
                zero(module)

    return step


# -- in this process ---------------------------------------------------------------------------------------------------


class Ours:
    """The standing team with one schedule as a candidate."""

    def __init__(self, crew: Team, name: str) -> None:
        self._crew, self._name = crew, name

    def __call__(self, steps: int, warm: int) -> list[Burst]:
        """One burst."""
        start_at = time.perf_counter() + 0.002
        return [Burst(*b) for b in self._crew.run("pipeline:our_burst", self._name, steps, warm, start_at)]


def measure_row(report: Report, row: Row, probe: measure.PingPong, *, rounds: int, burst_s: float) -> None:
    """All candidates side by side."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        crew = stack.enter_context(team("shared", STAGES, threads=1))
        crew.run("pipeline:prepare", list(row))
        candidates: dict[str, measure.Candidate] = {f"ours, {name}": Ours(crew, name) for name in (*OURS, PIPEDREAM)}
        groups = {f"torch, {name}": Group(STAGES, torch_step, row, name, str(folder / name)) for name in TORCH}
        groups[ONE] = Group(1, one_step, row, row.micro_batches)
        groups[FULL] = Group(1, one_step, row, 1)
        groups[UPDATING] = Group(1, one_step, row, row.micro_batches, True)
        for group in groups.values():
            stack.callback(group.close)
        candidates |= groups
        found = measure.alternate(candidates, probe, rounds=rounds, burst_s=burst_s)
        bubbles = {name: measured_bubble([Times(*t) for t in crew.run("pipeline:our_times", name)]) for name in OURS}
    m = row.micro_batches
    ideal = STAGES * m / (m + STAGES - 1)
    targets = []
    if row.of_ideal is not None:
        targets = [
            Target(f"{ONE} / ours, {name}", found.ratio(ONE, f"ours, {name}"), "≥", round(row.of_ideal * ideal, 3))
            for name in ("gpipe", "one_f_one_b")
        ]
    targets += [
        Target(f"torch, {name} / ours, {name}", found.ratio(f"torch, {name}", f"ours, {name}"), "≥", row.torch)
        for name in TORCH
    ]
    stage_s = found.seconds(ONE).median / (m * STAGES)
    title = f"{row.name}: {STAGES} stages of {stage_s * 1e3:.2g} ms (forward and backward), m = {m}"
    report.row(title, found, targets, **row._asdict(), stage_s=stage_s, bubble=bubbles)
    rates = ", ".join(
        f"{name} {row.samples * m / found.seconds(name).median:.0f}"
        for name in (f"ours, {PIPEDREAM}", "ours, one_f_one_b", UPDATING, ONE)
    )
    report.note(f"samples/s: {rates}")
    said = ", ".join(f"{name} {value:.3f}" for name, value in bubbles.items())
    report.note(f"bubble of one batch, measured: {said}; (p − 1)/(m + p − 1) = {gpipe.bubble(STAGES, m):.3f}")


def main() -> None:
    """Run the benchmark."""
    options = measure.arguments(__doc__, only="the rows of one size: large or small")
    rounds = options.rounds or (2 if options.quick else 15)
    burst_s = 0.05 if options.quick else 0.6
    report = Report("pipeline")
    probe = measure.PingPong()
    try:
        for row in ROWS:
            if options.only in (None, row.name):
                measure_row(report, row, probe, rounds=rounds, burst_s=burst_s)
    finally:
        probe.close()
    report.finish(options.json)


if __name__ == "__main__":
    main()
