"""Asynchronous SGD: the simulated server against Oyama's formulas, and both against real runs of two workers.

    python -m validation.asynchronous [--write] [--no-runs]

Three figures are compared, as Oyama et al. (2016) report them: the time of an epoch, the effective batch (samples that
arrive while the server waits for so long, here 2.5 of a worker's cycles), and the staleness of an update. Each is read
off the times at which gradients arrive, of all workers while all are at it. The distance of two distributions is half
the sum of what their probabilities differ by.

A prediction knows one worker's step beside the other (`profile`, a quarter of a second) and how much steps vary, as a
lognormal; the strategy's own code runs on that in virtual time. Runs and predictions take turns. A busy machine tells
nothing here: both workers want a core of their own.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import manyhands as mh
from manyhands import verbs
from manyhands.cluster import Cluster, load
from manyhands.communication.topology import Mesh
from manyhands.contract import Batch
from manyhands.modelling import calibration
from manyhands.modelling.profile import profile
from manyhands.modelling.published import oyama
from manyhands.simulation.trace import Spans
from manyhands.training.loop import logged, train
from manyhands.training.member import Member
from manyhands.training.preparation import prepare
from manyhands.training.run import Options
from manyhands.training.team import team
from validation import page, scores

JOB = "validation.asynchronous:job"  # run as a script this file has another name
#: An update gathers what arrives within so many of a worker's cycles.
GATHERS = 2.5
#: As Oyama et al. report for their own model, in percent: time of a sweep, batch, staleness.
TARGETS = (5.0, 9.0, 19.0)


@dataclass(frozen=True)
class Statistics:
    """What the times of arrival say."""

    epoch_s: float
    batch: Mapping[int, float]  # probabilities
    staleness: Mapping[int, float]

    @property
    def means(self) -> tuple[float, float, float]:
        """Time of an epoch, effective batch, staleness."""
        return self.epoch_s, _mean(self.batch), _mean(self.staleness)


def of_arrivals(arrivals: Sequence[Sequence[float]], batch: int, samples: int, gather_s: float) -> Statistics:
    """From when each worker's gradients of ``batch`` samples arrived, from the first common moment to the last one."""
    begun, ended = max(each[0] for each in arrivals), min(each[-1] for each in arrivals)
    inside = [[t for t in each if begun <= t <= ended] for each in arrivals]
    staleness: Counter[int] = Counter()
    for worker, own in enumerate(inside):
        others = sorted(t for other, each in enumerate(inside) if other != worker for t in each)
        for before, after in itertools.pairwise(own):
            staleness[bisect.bisect_left(others, after) - bisect.bisect_left(others, before)] += 1
    every = sorted(itertools.chain.from_iterable(inside))
    starts = np.linspace(begun, max(ended - gather_s, begun), 2000)
    counts = np.searchsorted(every, starts + gather_s) - np.searchsorted(every, starts)
    rate = (len(every) - len(inside)) / (ended - begun)
    return Statistics(samples / (batch * rate), _shares(Counter((batch * counts).tolist())), _shares(staleness))


def of_formulas(batch: int, samples: int, cycles_s: Sequence[float], gather_s: float) -> Statistics:
    """Oyama's distributions for workers with these cycles."""
    total = oyama.Distribution(0, (1.0,), batch)
    for cycle_s in cycles_s:
        total += oyama.effective_batch(1, batch, cycle_s, gather_s)
    rates = [1 / cycle_s for cycle_s in cycles_s]
    late: Counter[int] = Counter()
    for worker, rate in enumerate(rates):
        found = oyama.server_staleness(cycles_s, worker)
        for value, p in zip(found.values, found.probabilities, strict=True):
            late[value] += p * rate / sum(rates)  # type: ignore[assignment]
    epoch_s = samples / (batch * sum(rates))
    return Statistics(epoch_s, dict(zip(total.values, total.probabilities, strict=True)), dict(late))


def arrivals_of(spans: Spans, workers: int) -> list[list[float]]:
    """When each simulated worker's pushes had arrived."""
    found: list[list[float]] = [[] for _ in range(workers)]
    for span in spans.spans:
        if span.name == "push" and span.kind == "communicate":
            found[span.rank].append(span.ended)
    return found


def distance(a: Mapping[int, float], b: Mapping[int, float]) -> float:
    """Half the sum of the differences: 0 alike, 1 nothing in common."""
    return 0.5 * sum(abs(a.get(x, 0.0) - b.get(x, 0.0)) for x in {*a, *b})


def _mean(shares: Mapping[int, float]) -> float:
    return sum(x * p for x, p in shares.items())


def _shares(counted: Counter[int]) -> dict[int, float]:
    return {x: n / counted.total() for x, n in sorted(counted.items())}


# -- the simulated server against the formulas -------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A simulated system: workers of ``compute_s``, the last ``slow`` of them ``factor`` times slower."""

    name: str
    workers: int
    compute_s: float
    slow: int = 0
    factor: float = 1.0
    late: str = ""

    @property
    def stragglers(self) -> list[str]:
        """As `simulate` takes them."""
        slow = [f"slow(workers={self.slow}, factor={self.factor})"] if self.slow else []
        return slow + ([self.late] if self.late else [])


CASES = (
    Case("2 equal workers", 2, 0.010),
    Case("8 equal workers", 8, 0.010),
    Case("16 equal workers, the server saturated", 16, 0.0005),
    Case("4 workers, one 1.7 times slower", 4, 0.010, 1, 1.7),
    Case("8 workers, two 3.3 times slower", 8, 0.010, 2, 3.3),
    Case("8 workers, lognormal steps (sigma 0.3)", 8, 0.010, late="lognormal(sigma=0.3)"),
)
#: Of a worker in the simulated cases.
BATCH, STEPS = 32, 400


def simulated_case(case: Case, *, steps: int = STEPS) -> tuple[Statistics, Statistics]:
    """The simulated server's statistics, and the formulas'."""
    cluster = load("ethernet_1g")
    # Fewer samples than a batch are taken as a batch, so that all steps are whole.
    task = mh.Task(
        model="perceptron(hidden=8)", data="digits(limit=50)", batch_size=BATCH * case.workers, steps=steps, seed=1
    )
    plan = mh.Plan(strategy="asynchronous(servers=1)", workers=case.workers)
    found = verbs.simulate(
        task,
        plan,
        cluster,
        compute_s=case.compute_s,
        stragglers=case.stragglers or None,
        sizes=True,
        evaluate="never",
        trace="/dev/null",
    )
    assert found.trace is not None
    arrivals = arrivals_of(found.trace, case.workers)
    service_s = 2 * cluster.link(cluster.level(case.workers)).seconds(4 * found.summary.parameters)
    own = [case.compute_s * (case.factor if w >= case.workers - case.slow else 1.0) for w in range(case.workers)]
    cycles_s = [max(c + service_s, case.workers * service_s) for c in own]
    gather_s = GATHERS * min(cycles_s)
    samples = 100_000
    return of_arrivals(arrivals, BATCH, samples, gather_s), of_formulas(BATCH, samples, cycles_s, gather_s)


# -- real runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """A real task on two workers."""

    name: str
    model: str
    batch: int  # of one worker
    data: str = "auto(limit=12000)"
    optimizer: str = "sgd(lr=0.02)"
    epochs: int = 2


SETUPS = (
    Setup("perceptron(50), 50 samples", "perceptron(hidden=50)", 50, epochs=4),
    Setup("perceptron(50), 200 samples", "perceptron(hidden=50)", 200, epochs=8),
    Setup(
        "perceptron(300), 100 samples, momentum", "perceptron(hidden=300)", 100, optimizer="sgd(lr=0.01, momentum=0.9)"
    ),
    Setup("cnn, 50 samples", "cnn", 50, "auto(limit=4000)", epochs=1),
)


def job(member: Member, options: dict[str, Any]) -> dict[str, Any]:
    """A worker's part of a real run: training as ever, and when its steps ended."""
    task, plan = member.live
    run = prepare(member, task, plan, Options(**options))
    step, ends = run.worker.step, list[float]()

    def timed(batch: Batch) -> Any:
        loss = step(batch)
        ends.append(time.perf_counter())
        return loss

    run.worker.step = timed  # type: ignore[method-assign]
    with logged(run) as metrics:
        train(run, metrics, member)
    return {"ends": ends, "staleness": [list(pair) for pair in run.worker.staleness.items()]}


def asked(setup: Setup) -> tuple[mh.Task, mh.Plan]:
    """What is run and predicted."""
    task = mh.Task(
        model=setup.model,
        data=setup.data,
        batch_size=2 * setup.batch,
        epochs=setup.epochs,
        optimizer=setup.optimizer,
    )
    plan = mh.Plan(strategy="asynchronous(servers=1)", workers=2, threads=1, transport="shared")
    return task, verbs.resolved(task, plan).plan


def predicted(setup: Setup, gather_s: float | None) -> tuple[Statistics, float]:
    """In virtual time, and the time within which an update would gather."""
    task, plan = asked(setup)
    cluster: Cluster = calibration.cached() or load("laptop")
    cost = profile(task, plan, cluster, fresh=True)
    sigma = float(np.std(np.log(cost.factors[cost.factors > 0])))
    compute_s = cost.compute_s + cost.rest_s + cost.update_s  # whoever pushes does the server's work himself
    found = verbs.simulate(
        task,
        mh.Plan(strategy="asynchronous(servers=1)", workers=2, threads=1),
        cluster,
        compute_s=compute_s * float(np.mean(cost.factors)),
        stragglers=[f"lognormal(sigma={max(min(sigma, 2.0), 1e-3):.4f})"],
        sizes=True,
        evaluate="never",
        trace="/dev/null",
    )
    assert found.trace is not None
    gather_s = gather_s or GATHERS * found.summary.wall_s / found.summary.steps
    samples = round(found.summary.steps / found.summary.epochs * task.batch_size)
    return of_arrivals(arrivals_of(found.trace, 2), setup.batch, samples, gather_s), gather_s


def measured(setup: Setup, gather_s: float) -> tuple[Statistics, dict[int, float]]:
    """A real run's, by the ends of its steps; and its staleness as the servers counted it."""
    task, plan = asked(setup)
    assert isinstance(plan.mesh, Mesh)
    options = {"evaluate": "never", "checkpoint": "end", "progress": False}
    with team(plan.transport, 2, threads=1, allocator=plan.allocator, live=(task, plan)) as crew:  # type: ignore[arg-type]
        found = crew.run(JOB, options)
    counted: Counter[int] = Counter()
    for each in found:
        counted.update({int(by): int(times) for by, times in each["staleness"]})
    ends = [each["ends"][5:] for each in found]  # without the warm-up
    samples = round(len(found[0]["ends"]) / setup.epochs * task.batch_size)
    return of_arrivals(ends, setup.batch, samples, gather_s), _shares(counted)


# -- report ------------------------------------------------------------------------------------------------------------

HEAD = ("", "epoch s", "formula", "%", "batch", "formula", "%", "distance", "staleness", "formula", "%", "distance")


def _row(name: str, is_: Statistics, said: Statistics, staleness: Mapping[int, float] | None = None) -> list[str]:
    late = is_.staleness if staleness is None else staleness
    cells = [name]
    for i, (a, b) in enumerate(zip((*is_.means[:2], _mean(late)), said.means, strict=True)):
        cells += [f"{a:.4g}", f"{b:.4g}", f"{100 * (b / a - 1):+.1f}" if a else "–"]
        if i == 1:
            cells.append(f"{distance(is_.batch, said.batch):.3f}")
    return [*cells, f"{distance(late, said.staleness):.3f}"]


def of_the_simulation() -> Iterator[str]:
    """The simulated server against the formulas."""
    yield from ("### The simulated server against Oyama's formulas", "")
    yield from scores.table(HEAD, [_row(case.name, *simulated_case(case)) for case in CASES])


def of_runs(repeats: int) -> Iterator[str]:
    """Real runs against predictions of them."""
    rows, errors = [], ([], [], [])  # type: ignore[var-annotated]
    for setup in SETUPS:
        gather_s: float | None = None
        pairs = []
        for _ in range(repeats):
            said, gather_s = predicted(setup, gather_s)
            pairs.append((*measured(setup, gather_s), said))
        middle = sorted(pairs, key=lambda pair: pair[0].epoch_s)[len(pairs) // 2]
        rows.append(_row(setup.name, middle[0], middle[2], middle[1]))
        for i in range(3):
            ratios = [said.means[i] / (_mean(late) if i == 2 else is_.means[i]) for is_, late, said in pairs]
            errors[i].append(100 * abs(statistics.median(ratios) - 1))  # a run and what was said of it, a second before
    yield from ("", "### Real runs of two workers against predictions", "")
    yield from scores.table([x.replace("formula", "predicted") for x in HEAD], rows)
    yield ""
    for name, found, most in zip(("epoch time", "effective batch", "staleness"), errors, TARGETS, strict=True):
        mean = statistics.fmean(found)
        missed = "" if mean <= most else "**missed**: "
        yield f"- {name}: {missed}{mean:.1f} % in the mean of {len(found)} tasks, target {most:g} %."


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; with ``--write`` also into the page."""
    parser = argparse.ArgumentParser(prog="python -m validation.asynchronous", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the report into docs/validation.md")
    parser.add_argument("--no-runs", action="store_true", help="only simulations against formulas")
    parser.add_argument("--repeats", type=int, default=5, help="of each real run")
    said = parser.parse_args(arguments)
    lines = list(of_the_simulation())
    if not said.no_runs:
        lines += of_runs(said.repeats)
    print("\n".join(lines))
    if said.write:
        page.write("asynchronous", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
