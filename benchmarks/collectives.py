"""All-reduce of 1 … 10⁷ floats between 2 ranks, and barriers of 2, 4 and 8 workers.

    shared       ours, on symmetric memory (`Communicator.allocate`): where parameters and gradients lie
    gloo         torch.distributed.all_reduce over loopback, in place
    mpi          mpi4py's Allreduce in place, MPICH from the wheel, ranks started by its mpiexec
    plain copy   one process copies the same bytes from one tensor to another; 1 thread

A figure is the median operation of a burst on the slower rank; of barriers, whose workers may outnumber the cores, the
mean. Operations follow each other at once: ranks arrive together and the memory is as warm as it gets, for everybody.

    python benchmarks/collectives.py [--quick] [--json FILE] [--rounds N]
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import _measure as measure
import torch
from _measure import Burst, Candidate, Group, Report, Target

from manyhands.errors import ManyhandsError
from manyhands.training.member import Member
from manyhands.training.team import Team, team

SIZES = (1, 100, 1_000, 28_938, 100_000, 1_000_000, 10_000_000)
COUNTS = (2, 4, 8)
SHARED, GLOO, MPI, COPY = "shared", "gloo", "mpi", "plain copy"
BARRIER = 0  # the size that stands for it

# -- in the workers ----------------------------------------------------------------------------------------------------

_steps: dict[int, Callable[[], object]] = {}


def prepare(member: Member, size: int) -> None:
    """A job of a standing team: make what a burst repeats, on our shared memory or straight on MPI."""
    comm = member.comm
    if comm.transport == "mpi":
        from mpi4py import MPI as mpi

        world = mpi.COMM_WORLD
        x = torch.zeros(size).numpy()
        _steps[size] = (lambda: world.Allreduce(mpi.IN_PLACE, x)) if size else world.Barrier
        return
    y = comm.allocate(max(size, 1))
    _steps[size] = (lambda: comm.all_reduce(y).wait()) if size else comm.barrier


def team_burst(member: Member, size: int, steps: int, warm: int, start_at: float) -> list[float]:
    """A job of a standing team: one burst."""
    return list(measure.burst(_steps[size], steps, warm, start_at))


def gloo_operation(rank: int, size: int, meeting: str) -> Callable[[], object]:
    """torch.distributed between two processes."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    x = torch.zeros(size)
    return (lambda: torch.distributed.all_reduce(x)) if size else torch.distributed.barrier


def copy_operation(rank: int, size: int) -> Callable[[], object]:
    """What moving the bytes once costs at least."""
    torch.set_num_threads(1)
    x, y = torch.zeros(size), torch.zeros(size)
    return lambda: y.copy_(x)


# -- in this process ---------------------------------------------------------------------------------------------------


class OnTeam:
    """A standing team as a candidate for one size."""

    def __init__(self, crew: Team, size: int) -> None:
        self._crew, self._size = crew, size
        crew.run("collectives:prepare", size)

    def __call__(self, steps: int, warm: int) -> list[Burst]:
        """One burst."""
        start_at = time.perf_counter() + 0.002
        return [Burst(*b) for b in self._crew.run("collectives:team_burst", self._size, steps, warm, start_at)]


def mpi_team(stack: ExitStack, report: Report) -> Team | None:
    """Two ranks under mpiexec, or None and the reason in the report."""
    # Other workers inherit this process's module path; those of mpiexec are programs of their own.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))
    try:
        return stack.enter_context(team("mpi", 2, threads=1))
    except (ManyhandsError, ImportError, OSError) as e:
        report.note(f"mpi is left out: {e}")
        return None


def main() -> None:
    """All sizes, then barriers."""
    options = measure.arguments(__doc__ or "")
    report = Report("collectives")
    sizes = (1, 28_938, 1_000_000) if options.quick else SIZES
    rounds = options.rounds or (3 if options.quick else 20)
    burst_s = 0.01 if options.quick else 0.05
    probe = measure.PingPong()
    with (
        contextlib.closing(probe),
        ExitStack() as stack,
        tempfile.TemporaryDirectory(prefix="manyhands-bench-") as folder,
    ):
        shared = stack.enter_context(team("shared", 2, threads=1))
        mpi = mpi_team(stack, report)

        def rivals(row: ExitStack, size: int) -> dict[str, Candidate]:
            gloo = Group(2, gloo_operation, size, str(Path(folder) / f"gloo-{size}"))
            row.callback(gloo.close)
            return {GLOO: gloo} | ({} if mpi is None else {MPI: OnTeam(mpi, size)})

        for size in sizes:
            with ExitStack() as row:
                copy = Group(1, copy_operation, size)
                row.callback(copy.close)
                candidates = {SHARED: OnTeam(shared, size)} | rivals(row, size) | {COPY: copy}
                measured = measure.alternate(candidates, probe, rounds=rounds, burst_s=burst_s)
            targets = []
            if size in (28_938, 1_000_000):
                targets.append(Target("gloo / shared", measured.ratio(GLOO, SHARED), "≥", 20))
            if size == 1_000_000:
                targets.append(Target("shared / plain copy", measured.ratio(SHARED, COPY), "≤", 2))
            report.row(f"all-reduce of {size:,} floats, 2 ranks", measured, targets, operation="all_reduce", size=size)

        with ExitStack() as row:
            crews = {n: shared if n == 2 else row.enter_context(team("shared", n, threads=1)) for n in COUNTS}
            ours = {f"{SHARED}, {n} workers": OnTeam(crew, BARRIER) for n, crew in crews.items()}
            others = {f"{name}, 2 ranks": c for name, c in rivals(row, BARRIER).items()}
            candidates = ours | others
            measured = measure.alternate(
                candidates,
                probe,
                rounds=rounds,
                burst_s=burst_s,
                counts=dict.fromkeys(candidates, measure.slowest_mean),
            )
        eight = measured.of(lambda s: s[f"{SHARED}, 8 workers"] * 1e6)
        target = Target("8 workers", eight, "≤", 100, "µs")
        report.row("barrier", measured, [target], operation="barrier")
    report.finish(options.json)


if __name__ == "__main__":
    main()
