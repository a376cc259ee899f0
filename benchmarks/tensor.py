"""A transformer block cut among two workers by heads and neurons: against torch's DTensor over gloo, and one worker.

    ours, TRANSPORT      2 workers, a thread each; attention by heads, the perceptron by columns and rows
    DTensor, gloo        2 ranks, a thread each; torch's parallelize_module with the same layers column- and row-wise
    one worker           the whole block, one thread;  one process: with all threads

The block is gpt's: width 128, 4 heads, sequences of 64, a batch of 4, float32. A step is gradients to zero, forward and
backward of a mean squared error; no update. Two sums of 4·64·128 floats go forward, two back.

    python benchmarks/tensor.py [--quick] [--json FILE] [--rounds N] [--only block|wide]
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from manyhands.communication import futex
from manyhands.models.gpt import Block
from manyhands.partition.tensor.cut import cut
from manyhands.partition.tensor.rehearsal import rehearsed
from manyhands.training.allocator import tune
from manyhands.training.member import Member
from manyhands.training.team import Team, team

RANKS = 2
COLUMNS = ("attention.query", "attention.key", "attention.value", "mlp.up")
ROWS_OF_WEIGHTS = ("attention.out", "mlp.down")
ONE, ALL, RIVAL = "one worker", "one process, all threads", "DTensor, gloo"


class Row(NamedTuple):
    """A block and a batch, and what the issue asks for; None: nothing."""

    name: str
    width: int
    heads: int
    length: int
    samples: int
    rival: float | None


ROWS = (Row("block", 128, 4, 64, 4, 1.5), Row("wide", 512, 8, 128, 8, None))


def block(row: Row) -> Block:
    """The same everywhere."""
    torch.manual_seed(0)
    return Block(row.width, row.heads, 0.0)


def batch(row: Row) -> tuple[Tensor, Tensor]:
    """The same everywhere."""
    torch.manual_seed(1)
    x, y = torch.randn(2, row.samples, row.length, row.width)
    return x, y


def step_of(module: nn.Module, row: Row) -> Callable[[], object]:
    """Gradients to zero, forward and backward; the input wants a gradient, as between two blocks."""
    x, y = batch(row)
    x.requires_grad_()

    def step() -> None:
        for p in module.parameters():
            if p.grad is not None:
                p.grad.zero_()
        x.grad = None
        F.mse_loss(module(x), y).backward()  # type: ignore[no-untyped-call]

    return step


_steps: dict[str, Callable[[], object]] = {}


def prepare(member: Member, row: list[object]) -> None:
    """A job of a standing team."""
    asked = Row(*row)  # type: ignore[arg-type]
    module = block(asked)
    cut(module, rehearsed(module, None, RANKS, batch(asked)[0][:1]).rules, member.comm)
    _steps["ours"] = step_of(module, asked)


def our_burst(member: Member, steps: int, warm: int, start_at: float) -> list[float]:
    """A job of a standing team: one burst."""
    return list(measure.burst(_steps["ours"], steps, warm, start_at))


def rival_step(rank: int, row: Row, meeting: str) -> Callable[[], object]:
    """As the documentation of torch.distributed.tensor.parallel has it."""
    tune()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=120)
    )
    module = block(row)
    styles = {name: ColwiseParallel() for name in COLUMNS} | {name: RowwiseParallel() for name in ROWS_OF_WEIGHTS}
    return step_of(parallelize_module(module, init_device_mesh("cpu", (RANKS,)), styles), row)


def one_step(rank: int, row: Row, threads: int) -> Callable[[], object]:
    """One process."""
    tune()
    torch.set_num_threads(threads)
    return step_of(block(row), row)


class Ours:
    """A standing team as a candidate."""

    def __init__(self, crew: Team) -> None:
        self._crew = crew

    def __call__(self, steps: int, warm: int) -> list[Burst]:
        """One burst."""
        start_at = time.perf_counter() + 0.002
        return [Burst(*b) for b in self._crew.run("tensor:our_burst", steps, warm, start_at)]


def measure_row(report: Report, row: Row, probe: measure.PingPong, *, rounds: int, burst_s: float) -> None:
    """All candidates side by side."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        candidates: dict[str, measure.Candidate] = {}
        for transport in ("shared", "gloo"):
            crew = stack.enter_context(team(transport, RANKS, threads=1))
            crew.run("tensor:prepare", list(row))
            candidates[f"ours, {transport}"] = Ours(crew)
        groups = {
            RIVAL: Group(RANKS, rival_step, row, str(folder / "meeting")),
            ONE: Group(1, one_step, row, 1),
            ALL: Group(1, one_step, row, futex.cores()),
        }
        for group in groups.values():
            stack.callback(group.close)
        candidates |= groups
        found = measure.alternate(candidates, probe, rounds=rounds, burst_s=burst_s)
    targets = []
    if row.rival is not None:
        targets = [Target(f"{RIVAL} / ours, shared", found.ratio(RIVAL, "ours, shared"), "≥", row.rival)]
    title = f"{row.name}: width {row.width}, {row.heads} heads, {row.samples} sequences of {row.length}"
    report.row(title, found, targets, **row._asdict())


def main() -> None:
    """Run the benchmark."""
    options = measure.arguments(__doc__, only="one row: block or wide")
    rounds = options.rounds or (2 if options.quick else 15)
    burst_s = 0.05 if options.quick else 0.4
    report = Report("tensor")
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
