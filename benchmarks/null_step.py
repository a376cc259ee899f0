"""Steps that compute nothing, on the parameter server: what it costs to fetch parameters and to send an update.

    scalar               one element
    dense 1 … 100 MB     all of them are pushed and pulled; the gradient lies there already
    sparse 64, 512 MB    32 random rows of 256 bytes are looked up (pulled), summed, and their gradients pushed

The experiment is TensorFlow's (Abadi et al. 2016, Figure 6): 1.8 ms for a scalar, 147 ms for dense 100 MB, and 5 to
20 ms for sparse, independent of the table's size. Here: `asynchronous` with two shards over shared memory, plain SGD,
1 and 2 workers. A figure is the median step of a burst on the slower rank.

What is timed is `Worker.step` alone: rows are drawn beforehand, tables have been read once by every worker so that no
page is touched for the first time, and nothing is evaluated, copied or saved meanwhile. A step of the sparse rows is
dominated by the interpreter; what may depend on the table are the caches and the address translation.

    python benchmarks/null_step.py [--quick] [--json FILE] [--rounds N]
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import _measure as measure
import torch
from _measure import Burst, Report, Rounds, Spread, Target
from torch import Tensor, nn

from manyhands.communication.communicator import Communicator
from manyhands.consistency.asynchronous import Asynchronous
from manyhands.contract import Batch, Worker
from manyhands.partition.data import DataReplica
from manyhands.training.member import Member
from manyhands.training.team import Team, team

MB = 10**6
SHARDS = 2
WIDTH = 64  # floats in a row
LOOKED_UP = 32
DRAWS = 1000  # of rows, made beforehand
LR = 1e-6


class Case(NamedTuple):
    """What a step fetches and sends: everything, or some rows."""

    name: str
    numel: int
    sparse: bool = False


SCALAR, D1, D10, D50, D100, S64, S512 = CASES = (
    Case("scalar", 1),
    Case("dense 1 MB", MB // 4),
    Case("dense 10 MB", 10 * MB // 4),
    Case("dense 50 MB", 50 * MB // 4),
    Case("dense 100 MB", 100 * MB // 4),
    Case("sparse, 64 MB", 64 * MB // 4, sparse=True),
    Case("sparse, 512 MB", 512 * MB // 4, sparse=True),
)

# -- in the workers ----------------------------------------------------------------------------------------------------


class Whole(nn.Module):
    """One parameter, of which the loss is the sum."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(numel))

    def forward(self, inputs: Tensor) -> Tensor:
        """The inputs, which are empty, play no part."""
        return self.weight.sum()


class Rows(nn.Module):
    """A table with sparse gradients; the loss is the sum of the rows that are looked up."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        rows = numel // WIDTH
        self.table = nn.Embedding(rows, WIDTH, sparse=True, _weight=torch.zeros(rows, WIDTH))

    def forward(self, rows: Tensor) -> Tensor:
        """0-dim."""
        return self.table(rows).sum()


def the_loss(outputs: Tensor, target: object) -> Tensor:
    """It comes out of the model."""
    return outputs


def null_worker(comm: Communicator, case: Case, shards: int = SHARDS) -> tuple[Worker, list[Batch]]:
    """A worker of the parameter server, ready for its first timed step, and the batches it takes in turn."""
    module: nn.Module = (Rows if case.sparse else Whole)(case.numel)
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    replica = DataReplica(module, optimizer, the_loss, comm, common=False, sparse=True)
    worker = Asynchronous(servers=shards).start(replica, comm)
    if not case.sparse:
        batch = Batch(torch.empty(0), None, 1, comm.size)
        worker.step(batch)  # … has written the gradient, which stays
        nothing = torch.zeros(()), 1.0
        replica.gradients = lambda batch, ready=None: nothing  # type: ignore[method-assign]
        return worker, [batch]
    generator = torch.Generator().manual_seed(comm.rank)
    rows = torch.randint(case.numel // WIDTH, (DRAWS, LOOKED_UP), generator=generator)
    return worker, [Batch(each, None, 1, comm.size) for each in rows]


_steps: dict[str, Callable[[], object]] = {}


def prepare(member: Member, *case: object) -> None:
    """A job of a standing team: make the step and keep it."""
    what = Case(*case)  # type: ignore[arg-type]
    worker, batches = null_worker(member.comm, what)
    worker.consensus()  # reads the servers' memory once on every rank
    turns, numbers = itertools.cycle(batches), itertools.count()

    def step() -> object:
        member.comm.step = next(numbers)
        return worker.step(next(turns))

    _steps[what.name] = step


def team_burst(member: Member, name: str, steps: int, warm: int, start_at: float) -> list[float]:
    """A job of a standing team: one burst."""
    return list(measure.burst(_steps[name], steps, warm, start_at))


# -- in this process ---------------------------------------------------------------------------------------------------


class OnTeam:
    """A standing team as a candidate for one case."""

    def __init__(self, crew: Team, case: Case) -> None:
        self._crew, self._name = crew, case.name
        crew.run("null_step:prepare", *case)

    def __call__(self, steps: int, warm: int) -> list[Burst]:
        """One burst."""
        start_at = time.perf_counter() + 0.002
        return [Burst(*b) for b in self._crew.run("null_step:team_burst", self._name, steps, warm, start_at)]


def targets_of(measured: Rounds) -> list[Target]:
    """The issue's, from both sides."""
    ratio = measured.ratio(S512.name, S64.name)
    return [Target("sparse 512 MB / 64 MB", ratio, "≥", 0.8), Target("sparse 512 MB / 64 MB", ratio, "≤", 1.25)]


def notes_of(measured: Rounds) -> list[str]:
    """What the experiment is known for and nobody asks a figure of."""

    def said(value: Spread) -> str:
        return f"{value.median:.3g} ({value.p10:.3g} – {value.p90:.3g})"

    return [
        f"dense 100 MB / scalar: {said(measured.ratio(D100.name, SCALAR.name))}; TensorFlow's: 82",
        f"dense 100 MB / 50 MB: {said(measured.ratio(D100.name, D50.name))}; linear: 2",
        f"dense 100 MB / 10 MB: {said(measured.ratio(D100.name, D10.name))}; linear: 10, but 10 MB may be cached",
        f"sparse 512 MB / scalar: {said(measured.ratio(S512.name, SCALAR.name))}",
    ]


def main() -> None:
    """One worker, then two."""
    options = measure.arguments(__doc__ or "")
    report = Report("null_step")
    rounds = options.rounds or (3 if options.quick else 15)
    probe = measure.PingPong()
    with contextlib.closing(probe):
        for workers in (1, 2):
            with team("shared", workers, threads=1) as crew:
                candidates = {case.name: OnTeam(crew, case) for case in CASES}
                burst_s = 0.05 if options.quick else 0.2
                measured = measure.alternate(candidates, probe, rounds=rounds, burst_s=burst_s)
            title = f"null step, {workers} {'worker' if workers == 1 else 'workers'}"
            report.row(title, measured, targets_of(measured), workers=workers, shards=SHARDS)
            for note in notes_of(measured):
                report.note(note)
    report.finish(options.json)


if __name__ == "__main__":
    main()
