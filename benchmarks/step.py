"""One training step: ours with 2 workers against DistributedDataParallel over gloo and against one process.

    ours                  2 workers on shared memory, synchronous(update='sharded'), a thread each
    DDP                   2 ranks as torchrun starts them, over gloo, a thread each; gradients as bucket views, with or
                          without static_graph, whichever was faster in a heat before the rounds
    DDP, our allocator    the same after `manyhands.training.allocator.tune()`
    one process           the plain loop, with 1 thread and with all, nothing else running
    two single workers    our engine with one worker (transport single) at half the batch on the first core, while an
                          independent copy does the same on the second: what a step costs when nobody waits for anybody

float32, plain SGD (the default, foreach and fused variants of torch are equal to 3 % here), cross-entropy, eight
batches made beforehand; every process holds its share. The cnn has channels-last memory for everybody. A figure is the
median step of a burst, the slower rank's where there are two (the mean of the two for the single workers).

    python benchmarks/step.py [--quick] [--json FILE] [--rounds N] [--only perceptron|cnn]
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import _measure as measure
import torch
from _measure import Burst, Group, Report, Rounds, Spread, Target
from torch import Tensor
from torch.nn import functional as F

from manyhands import models
from manyhands.communication.communicator import Communicator
from manyhands.communication.transports.single import SingleCommunicator
from manyhands.consistency.synchronous import Synchronous
from manyhands.contract import Batch
from manyhands.models import losses
from manyhands.partition.data import DataReplica
from manyhands.training.allocator import tune
from manyhands.training.member import Member
from manyhands.training.team import Team, team

LR = 0.01
BATCHES = 8
WORKERS = 2
OURS, DDP, TUNED, ONE, ALL, COPIES = (
    "ours, 2 workers",
    "DDP, 2 ranks",
    "DDP, our allocator",
    "one process, 1 thread",
    "one process, all threads",
    "two single workers at half the batch",
)


class Row(NamedTuple):
    """A model, a global batch and what the issue asks for; None: nothing."""

    model: str
    batch: int
    ddp: float
    tuned: float | None
    one: float | None
    all: float | None
    best: float | None
    overhead_percent: float | None


ROWS = (
    Row("perceptron(hidden=50)", 50, 8, None, None, None, 1.2, 25),
    Row("perceptron(hidden=50)", 1000, 1.5, None, None, None, 1.1, None),
    Row("cnn", 50, 1.6, 1.3, 1.75, 1.2, None, 5),
    Row("cnn", 200, 1.5, 1.05, 2.2, 1.2, None, 5),
    Row("cnn", 1000, 1.5, 1.0, 2.2, 1.2, None, 5),
)
#: Instead of the ratio to DDP at the smallest step: microseconds above the single workers.
ABOVE_US = 30.0

# -- in the workers ----------------------------------------------------------------------------------------------------


def share_of_batches(batch: int, rank: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's contiguous share of batches that are the same for everyone."""
    torch.manual_seed(batch)
    result = []
    for _ in range(BATCHES):
        images, labels = torch.rand(batch, 1, 28, 28), torch.randint(0, 10, (batch,))
        lo, hi = rank * batch // size, (rank + 1) * batch // size
        result.append((images[lo:hi].clone(), labels[lo:hi].clone()))
    return result


def build(model: str) -> torch.nn.Module:
    """The same initial weights everywhere."""
    torch.manual_seed(0)
    return models.build(model, inputs=(1, 28, 28), classes=10)


def our_step(comm: Communicator, model: str, batch: int) -> Callable[[], object]:
    """A step of our engine, as `manyhands.training.loop` calls it."""
    module = build(model)
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    replica = DataReplica(module, optimizer, losses.build("cross_entropy"), comm, common=True)
    worker = Synchronous(update="sharded").start(replica, comm)
    batches = itertools.cycle([Batch(x, y, len(y)) for x, y in share_of_batches(batch, comm.rank, comm.size)])
    numbers = itertools.count()

    def step() -> object:
        comm.step = next(numbers)
        return worker.step(next(batches))

    return step


_steps: dict[str, Callable[[], object]] = {}


def prepare(member: Member, model: str, batch: int) -> None:
    """A job of the standing team: make the step and keep it."""
    _steps["step"] = our_step(member.comm, model, batch)


def our_burst(member: Member, steps: int, warm: int, start_at: float) -> list[float]:
    """A job of the standing team: one burst."""
    return list(measure.burst(_steps["step"], steps, warm, start_at))


def ddp_step(
    rank: int, model: str, batch: int, meeting: str, static_graph: bool, our_allocator: bool
) -> Callable[[], object]:
    """A step under DistributedDataParallel, as the tutorial writes it."""
    if our_allocator:
        tune()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORKERS, timeout=timedelta(seconds=120)
    )
    return plain_step(
        torch.nn.parallel.DistributedDataParallel(
            build(model), gradient_as_bucket_view=True, static_graph=static_graph
        ),
        share_of_batches(batch, rank, WORKERS),
    )


def one_process_step(rank: int, model: str, batch: int, threads: int) -> Callable[[], object]:
    """A step of the plain loop; 0 threads: as torch comes."""
    if threads:
        torch.set_num_threads(threads)
    return plain_step(build(model), share_of_batches(batch, 0, 1))


def plain_step(module: torch.nn.Module, shares: list[tuple[Tensor, Tensor]]) -> Callable[[], object]:
    """Forward, backward, step."""
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    batches = itertools.cycle(shares)

    def step() -> object:
        images, labels = next(batches)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(module(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    return step


def single_step(rank: int, model: str, batch: int, cores: list[int]) -> Callable[[], object]:
    """Our engine alone on one core, on its half of the batch, as one of the two workers would have it."""
    os.sched_setaffinity(0, {cores[rank]})
    tune()
    torch.set_num_threads(1)
    return our_step(SingleCommunicator(), model, batch)


# -- in this process ---------------------------------------------------------------------------------------------------


class Ours:
    """The standing team as a candidate."""

    def __init__(self, crew: Team) -> None:
        self._crew = crew

    def __call__(self, steps: int, warm: int) -> list[Burst]:
        """One burst."""
        return [Burst(*b) for b in self._crew.run("step:our_burst", steps, warm, time.perf_counter() + 0.002)]


def faster_ddp(
    stack: ExitStack, folder: Path, row: Row, *, our_allocator: bool, probe: Any, quick: bool
) -> tuple[Group, str]:
    """DDP with or without ``static_graph``: both run a heat, the faster stays."""
    names = ("plain",) if quick else ("plain", "static graph")
    heat = {
        name: Group(
            WORKERS,
            ddp_step,
            row.model,
            row.batch,
            str(folder / f"{row.model}-{row.batch}-{name}-{our_allocator}"),
            name == "static graph",
            our_allocator,
        )
        for name in names
    }
    for group in heat.values():
        stack.callback(group.close)
    if quick:
        return heat["plain"], "plain"
    rounds = measure.alternate(heat, probe, rounds=5, burst_s=0.1)
    faster = rounds.fastest(list(heat))
    for name, group in heat.items():
        if name != faster:
            group.close()
    return heat[faster], faster


def run_row(row: Row, folder: Path, probe: Any, *, rounds: int, quick: bool) -> tuple[Rounds, dict[str, Any]]:
    """Start all candidates of a row and let them take turns."""
    with ExitStack() as stack:
        crew = stack.enter_context(team("shared", WORKERS, threads=1))
        crew.run("step:prepare", row.model, row.batch)
        cores = sorted(os.sched_getaffinity(0))
        groups: dict[str, Group] = {
            ONE: Group(1, one_process_step, row.model, row.batch, 1),
            ALL: Group(1, one_process_step, row.model, row.batch, 0),
            COPIES: Group(2, single_step, row.model, row.batch // 2, [cores[0], cores[-1]]),
        }
        for group in groups.values():
            stack.callback(group.close)
        ddp, how = faster_ddp(stack, folder, row, our_allocator=False, probe=probe, quick=quick)
        tuned, how_tuned = faster_ddp(stack, folder, row, our_allocator=True, probe=probe, quick=quick)
        candidates: dict[str, measure.Candidate] = {OURS: Ours(crew), DDP: ddp, TUNED: tuned, **groups}
        measured = measure.alternate(
            candidates,
            probe,
            rounds=rounds,
            burst_s=0.02 if quick else 0.15,
            counts={COPIES: measure.mean_median},
        )
        return measured, {DDP: how, TUNED: how_tuned}


def targets_of(row: Row, rounds: Rounds) -> list[Target]:
    """The issue's table for this row."""
    targets = [Target("DDP / ours", rounds.ratio(DDP, OURS), "≥", row.ddp)]
    above = rounds.of(lambda s: (s[OURS] - s[COPIES]) * 1e6)
    if row.model.startswith("perceptron") and row.batch == 50:
        targets.append(Target("… or ours above the single workers", above, "≤", ABOVE_US, "µs"))
    if row.best is not None:
        best = rounds.fastest([ONE, ALL])
        targets.append(Target(f"best single process ({best[13:]}) / ours", rounds.ratio(best, OURS), "≥", row.best))
    for name, what, least in (
        (TUNED, "DDP with our allocator / ours", row.tuned),
        (ONE, "one process, 1 thread / ours", row.one),
        (ALL, "one process, all threads / ours", row.all),
    ):
        if least is not None:
            targets.append(Target(what, rounds.ratio(name, OURS), "≥", least))
    if row.overhead_percent is not None:
        overhead: Spread = rounds.of(lambda s: 100 * (s[OURS] / s[COPIES] - 1))
        targets.append(Target("overhead of parallelism", overhead, "≤", row.overhead_percent, "%"))
    return targets


def main() -> None:
    """All rows; a smoke run takes the first of each model."""
    options = measure.arguments(__doc__ or "", only="rows whose model begins so")
    report = Report("step")
    rows = [r for r in ROWS if options.only is None or r.model.startswith(options.only)]
    if options.quick:
        rows = [r for r in rows if r.batch == 50]
    probe = measure.PingPong()
    with contextlib.closing(probe), tempfile.TemporaryDirectory(prefix="manyhands-bench-") as folder:
        for row in rows:
            rounds = options.rounds or (2 if options.quick else 12 if row.batch == 1000 else 20)
            measured, variants = run_row(row, Path(folder), probe, rounds=rounds, quick=options.quick)
            title = f"{row.model}, global batch {row.batch}"
            report.row(title, measured, targets_of(row, measured), model=row.model, batch=row.batch, ddp=variants)
    report.finish(options.json)


if __name__ == "__main__":
    main()
