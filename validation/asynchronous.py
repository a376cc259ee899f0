"""Asynchronous SGD: the simulated server against Oyama's formulas, and both against real runs of two workers.

    python -m validation.asynchronous [--write] [--no-runs]

Three figures are compared, as Oyama et al. (2016) report them: the time of an epoch, the effective batch (samples that
arrive while the server waits for so long, here 2.5 of a worker's cycles), and the staleness of an update. Each is read
off the times at which gradients arrive, of all workers while all are at it. The distance of two distributions is half
the sum of what their probabilities differ by.

A prediction knows a worker's own steps beside the other's, without the server; what the store does under its lock; and
how late who waits for it is woken (`modelling.profile`, `visits`). The strategy's own code puts these together in
virtual time. Runs and what predicts them take turns of an eighth of a second in the same processes (`interleaved`), and
what is compared is a turn with itself; a task's error is the median over its turns. A busy machine tells nothing here:
both workers want a core of their own.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

import manyhands as mh
from manyhands import verbs
from manyhands.cluster import load
from manyhands.modelling import calibration, prediction
from manyhands.modelling.given import Given
from manyhands.modelling.published import oyama
from manyhands.simulation.trace import Spans
from manyhands.training.team import team
from validation import interleaved, page, scores

#: An update gathers what arrives within so many of a worker's cycles.
GATHERS = 2.5
#: Steps of a turn at least: a few times as many as an update gathers.
FEWEST = 16
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
    """A real task on two workers; ``new``: nothing of how it is predicted was looked for with it."""

    model: str
    batch: int  # of one worker
    optimizer: str = "sgd(lr=0.02)"
    data: str = "mnist"
    new: bool = True

    def __str__(self) -> str:
        return f"{self.model}, {self.batch} samples, {self.optimizer}"


SETUPS = (
    Setup("perceptron(hidden=50)", 50, new=False),
    Setup("perceptron(hidden=50)", 200, new=False),
    Setup("perceptron(hidden=300)", 100, "sgd(lr=0.01, momentum=0.9)", new=False),
    Setup("cnn", 50, new=False),
    Setup("logistic", 100),
    Setup("perceptron(hidden=100)", 25, "adam(lr=0.001)"),
    Setup("perceptron(hidden=200)", 400, "sgd(lr=0.01, momentum=0.9)"),
    Setup("perceptron(hidden=1000)", 200),
    Setup("cnn", 25, "adam(lr=0.001)"),
    Setup("gpt(layers=2, width=64)", 8, "sgd(lr=0.05)", "tinyshakespeare"),
)


def asked(setup: Setup) -> tuple[mh.Task, mh.Plan]:
    """What is run and predicted."""
    task = mh.Task(
        model=setup.model, data=setup.data, batch_size=2 * setup.batch, steps=1000, optimizer=setup.optimizer
    )
    plan = mh.Plan(strategy="asynchronous(servers=1)", workers=2, threads=1, transport="shared")
    return task, verbs.resolved(task, plan).plan


def measured_and_predicted(setup: Setup, turns: int) -> list[tuple[Statistics, Statistics]]:
    """Of each turn what its real steps say, and what is predicted from its profile and its prices."""
    task, plan = asked(setup)
    assert plan.workers is not None
    model, splits = verbs.built(task, None)
    given = Given(task, calibration.cached() or load("laptop"), model, splits, here=True)
    tables = {"task": task.as_table(), "plan": plan.as_table()}
    with team(plan.transport, plan.workers, threads=plan.threads) as crew:  # type: ignore[arg-type]
        found = interleaved.alternated(crew, plan, tables, turns, (), (), fewest=FEWEST)
    pairs = []
    for turn, (profile,) in enumerate(found.profiles):
        ends, spans = found.ends[:, turn], Spans()
        steps = interleaved.FIRST + ends.shape[1]
        computed = prediction.as_measured(plan, profile)
        prediction.predicted(given, plan, computed=computed, steps=steps, spans=spans)
        said = [each[interleaved.FIRST :] for each in arrivals_of(spans, plan.workers)]
        gather_s = GATHERS * (said[0][-1] - said[0][0]) / (len(said[0]) - 1)
        each = (of_arrivals(x, setup.batch, len(splits.train), gather_s) for x in (ends.tolist(), said))
        pairs.append((next(each), next(each)))
    return pairs


# -- report ------------------------------------------------------------------------------------------------------------

HEAD = ("", "epoch s", "formula", "%", "batch", "formula", "%", "distance", "staleness", "formula", "%", "distance")


def _row(name: str, is_: Statistics, said: Statistics) -> list[str]:
    cells = [name]
    for i, (a, b) in enumerate(zip(is_.means, said.means, strict=True)):
        cells += [f"{a:.4g}", f"{b:.4g}", f"{100 * (b / a - 1):+.1f}" if a else "–"]
        if i == 1:
            cells.append(f"{distance(is_.batch, said.batch):.3f}")
    return [*cells, f"{distance(is_.staleness, said.staleness):.3f}"]


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """The median over turns of what was said over what is; of turns in which there is something."""
    return statistics.median([a / b for a, b in pairs if b] or [1.0])


def of_the_simulation() -> Iterator[str]:
    """The simulated server against the formulas."""
    yield from ("### The simulated server against Oyama's formulas", "")
    yield from scores.table(HEAD, [_row(case.name, *simulated_case(case)) for case in CASES])


def of_runs(turns: int, only: str = "") -> Iterator[str]:
    """Real runs against predictions."""
    rows, errors = [], list[tuple[Setup, list[float]]]()
    for setup in SETUPS:
        if only not in str(setup):
            continue
        pairs = measured_and_predicted(setup, turns)
        middle = sorted(pairs, key=lambda pair: pair[0].epoch_s)[len(pairs) // 2]
        rows.append(_row(f"{setup}{' (new)' if setup.new else ''}", *middle))
        off = [100 * (_ratio([(said.means[i], is_.means[i]) for is_, said in pairs]) - 1) for i in range(3)]
        errors.append((setup, off))
        print(f"{setup}: {', '.join(f'{x:+.1f} %' for x in off)}", file=sys.stderr)
    yield from ("", "### Real runs of two workers against predictions", "")
    yield from scores.table([x.replace("formula", "predicted") for x in HEAD], rows)
    yield ""
    for i, (name, most) in enumerate(zip(("epoch time", "effective batch", "staleness"), TARGETS, strict=True)):
        found = [abs(off[i]) for _, off in errors]
        new = [abs(off[i]) for setup, off in errors if setup.new] or [0.0]
        missed = "" if statistics.fmean(found) <= most else "**missed**: "
        yield (
            f"- {name}: {missed}{statistics.fmean(found):.1f} % in the mean of {len(found)} tasks, {max(found):.1f} % "
            f"at most; {statistics.fmean(new):.1f} % in the mean of the {len(new)} new ones. Target {most:g} %."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; with ``--write`` also into the page."""
    parser = argparse.ArgumentParser(prog="python -m validation.asynchronous", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the report into docs/validation.md")
    parser.add_argument("--no-runs", action="store_true", help="only simulations against formulas")
    parser.add_argument("--turns", type=int, default=16, help="of each task, real and predicted")
    parser.add_argument("--only", default="", help="tasks whose text contains this")
    said = parser.parse_args(arguments)
    lines = list(of_the_simulation())
    if not said.no_runs:
        lines += of_runs(said.turns, said.only)
    print("\n".join(lines))
    if said.write:
        page.write("asynchronous", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
