"""How the benchmarks here measure: candidates that stand side by side and take turns, medians, spread, paired ratios.

The host changes its mood within tens of seconds (a cache line travels between two cores in 0.24 or 0.89 µs, depending
on where the virtual cores sit), so figures taken one after the other compare moods. Here every candidate is started
first and stays, blocked on a pipe and not spinning; a *round* gives each of them one short burst, the order rotated by
one from round to round. A ratio is taken within a round; its median and its p10 – p90 are over rounds.

Before and after each round two pinned processes play ping-pong with a cache line for about 1 ms, and the share of CPU
time that went to processes of others is read from /proc. A round is *steady* if the ping-pong changed by less than
half and others took less than a tenth; if at least five rounds were, only those count.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from mmap import mmap
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, Literal, NamedTuple

#: A round counts as steady below these (the two moods of the host lie a factor 3.5 apart).
SAME_MOOD, OTHERS = 1.5, 0.10
ENOUGH_STEADY = 5
#: Between two bursts: OpenMP's threads spin for some milliseconds after their last work before they sleep.
PAUSE_S = 0.01

# -- bursts ------------------------------------------------------------------------------------------------------------


class Burst(NamedTuple):
    """Seconds per step of one burst on one rank."""

    median_s: float
    mean_s: float


def burst(step: Callable[[], object], steps: int, warm: int, start_at: float) -> Burst:
    """Time ``steps`` calls after ``warm`` others; ranks begin together at ``start_at`` of the common clock."""
    clock = time.perf_counter
    while clock() < start_at:
        pass
    for _ in range(warm):
        step()
    stamps = [clock()]
    for _ in range(steps):
        step()
        stamps.append(clock())
    each = [b - a for a, b in itertools.pairwise(stamps)]
    return Burst(statistics.median(each), (stamps[-1] - stamps[0]) / steps)


#: ``(steps, warm) → a burst per rank``
Candidate = Callable[[int, int], list[Burst]]


class Group:
    """Processes of our own, one a rank: ``make(rank, *arguments)`` runs in each and returns what a step is."""

    def __init__(self, ranks: int, make: Callable[..., Callable[[], object]], *arguments: Any) -> None:
        context = forkserver()
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_stand, args=(theirs, make, rank, *arguments), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        self._answers()

    def __call__(self, steps: int, warm: int) -> list[Burst]:
        """One burst on all ranks."""
        start_at = time.perf_counter() + 0.002
        for connection in self._connections:
            connection.send((steps, warm, start_at))
        return self._answers()

    def _answers(self) -> list[Any]:
        answers = []
        for connection in self._connections:
            try:
                answer = connection.recv()
            except EOFError:
                answer = RuntimeError("a benchmark process ended unexpectedly; its message stands above")
            if isinstance(answer, BaseException):
                self.close()
                raise answer
            answers.append(answer)
        return answers

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(2.0)
            if process.exitcode is None:
                process.kill()
                process.join()


def _stand(connection: Connection, make: Callable[..., Callable[[], object]], rank: int, *arguments: Any) -> None:
    try:
        step = make(rank, *arguments)
        connection.send(None)
        while True:
            connection.send(burst(step, *connection.recv()))
    except EOFError:
        return
    except Exception as e:
        with contextlib.suppress(OSError):
            connection.send(RuntimeError(f"rank {rank} of {make.__name__}: {type(e).__name__}: {e}"))


def forkserver() -> Any:
    """Processes fork from a server that has imported torch and used nothing of it: fresh, in 0.1 s instead of 2."""
    context = multiprocessing.get_context("forkserver")
    # The list of training/team/forkserver.py: whoever comes first starts the one server.
    context.set_forkserver_preload(["torch", "manyhands.training.loop", "manyhands.training.member"])
    return context


# -- the state of the host ---------------------------------------------------------------------------------------------


class PingPong:
    """A cache line sent to and fro between two cores; nothing where there is only one."""

    TURNS = 1500

    def __init__(self) -> None:
        self._group: Group | None = None
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > 1:
            fd = os.memfd_create("ping-pong")
            os.ftruncate(fd, 4096)
            self._group = Group(2, _ping_pong, cores[:2], DupFd(fd), DupFd(fd))
            os.close(fd)

    def __call__(self) -> float | None:
        """Seconds for one way, the interpreter's loop included."""
        return self._group(self.TURNS, 100)[0].median_s / 2 if self._group else None

    def close(self) -> None:
        """End the two processes."""
        if self._group:
            self._group.close()


def _ping_pong(rank: int, cores: Sequence[int], *fds: Any) -> Callable[[], None]:
    os.sched_setaffinity(0, {cores[rank]})
    words = memoryview(mmap(fds[rank].detach(), 4096)).cast("Q")
    turn = 0

    def ping() -> None:
        nonlocal turn
        turn += 1
        words[0] = turn
        while words[8] < turn:
            pass

    def pong() -> None:
        nonlocal turn
        turn += 1
        while words[0] < turn:
            pass
        words[8] = turn

    return pong if rank else ping


class CpuTime(NamedTuple):
    """Clock ticks of all cores so far: in all, not idle, and spent by this program and its descendants."""

    total: int
    busy: int
    own: int

    @classmethod
    def now(cls) -> CpuTime:
        """Read /proc."""
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        idle = ticks[3] + ticks[4]
        parents: dict[int, int] = {}
        spent: dict[int, int] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                pid = int(stat.parent.name)
                parents[pid], spent[pid] = int(fields[1]), sum(map(int, fields[11:15]))  # ended children, too
        own = sum(t for pid, t in spent.items() if _descends(pid, os.getpid(), parents))
        return cls(sum(ticks), sum(ticks) - idle, own)


def _descends(pid: int, ancestor: int, parents: Mapping[int, int]) -> bool:
    while pid not in (0, ancestor):
        pid = parents.get(pid, 0)
    return pid == ancestor


def others(before: CpuTime, after: CpuTime) -> float:
    """The share of all cores that processes of others (and the hypervisor) took in between."""
    total = after.total - before.total
    return max(0.0, (after.busy - before.busy) - (after.own - before.own)) / total if total else 0.0


# -- rounds ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One burst of every candidate, and the host around it."""

    seconds: dict[str, float]
    ping_pong_s: tuple[float | None, float | None]
    others: float

    @property
    def steady(self) -> bool:
        """Whether the host stayed as it was and was ours."""
        before, after = self.ping_pong_s
        same = before is None or after is None or max(before, after) < SAME_MOOD * min(before, after)
        return same and self.others < OTHERS


class Spread(NamedTuple):
    """Median and the range that holds four fifths."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        ordered = sorted(values)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])


@dataclass(frozen=True)
class Rounds:
    """All rounds of one row of a benchmark."""

    every: list[Round]

    @property
    def used(self) -> list[Round]:
        """The steady rounds if there are enough of them, else all."""
        steady = [r for r in self.every if r.steady]
        return steady if len(steady) >= min(ENOUGH_STEADY, len(self.every)) else self.every

    def seconds(self, name: str) -> Spread:
        """Of one candidate."""
        return Spread.of([r.seconds[name] for r in self.used])

    def of(self, formula: Callable[[dict[str, float]], float]) -> Spread:
        """Of a figure made of the candidates' seconds within a round."""
        return Spread.of([formula(r.seconds) for r in self.used])

    def ratio(self, over: str, under: str) -> Spread:
        """One candidate's seconds over another's, within each round."""
        return self.of(lambda s: s[over] / s[under])

    def fastest(self, names: Sequence[str]) -> str:
        """The candidate with the smallest median."""
        return min(names, key=lambda name: self.seconds(name).median)


def slowest_median(ranks: Sequence[Burst]) -> float:
    """What a burst counts as by default: the median step of the slowest rank."""
    return max(b.median_s for b in ranks)


def slowest_mean(ranks: Sequence[Burst]) -> float:
    """For more ranks than cores: their single steps mean little, their sum does."""
    return max(b.mean_s for b in ranks)


def mean_median(ranks: Sequence[Burst]) -> float:
    """For copies that have nothing to do with each other."""
    return statistics.fmean(b.median_s for b in ranks)


def alternate(
    candidates: Mapping[str, Candidate],
    probe: Callable[[], float | None],
    *,
    rounds: int,
    burst_s: float,
    counts: Mapping[str, Callable[[Sequence[Burst]], float]] | None = None,
    least: int = 3,
) -> Rounds:
    """Give every candidate bursts of about ``burst_s`` seconds in turn; ``counts`` says how ranks make one figure."""
    length = {name: _length(c, burst_s, least) for name, c in candidates.items()}
    names = list(candidates)
    every = []
    for r in range(rounds):
        seconds = {}
        used, before = CpuTime.now(), probe()
        for name in names[r % len(names) :] + names[: r % len(names)]:
            time.sleep(PAUSE_S)
            ranks = candidates[name](length[name], max(1, length[name] // 10))
            seconds[name] = (counts or {}).get(name, slowest_median)(ranks)
        time.sleep(PAUSE_S)
        every.append(Round(seconds, (before, probe()), others(used, CpuTime.now())))
    return Rounds(every)


def _length(candidate: Candidate, burst_s: float, least: int) -> int:
    """Steps of about ``burst_s``; the candidate is warm afterwards (DDP rebuilds its buckets in the first steps)."""
    steps = least
    while True:
        each = slowest_mean(candidate(steps, 1))
        if each * steps >= 0.5 * burst_s or steps >= 10_000:
            return max(least, min(10_000, round(burst_s / each)))
        steps = min(10_000, max(2 * steps, round(0.7 * burst_s / each)))


# -- what comes out ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A figure that the issue asks for, and what it is."""

    what: str
    value: Spread
    sense: Literal["≥", "≤"]
    target: float
    unit: str = ""  # "", "µs", "%" …

    @property
    def reached(self) -> bool:
        """By the median."""
        return self.value.median >= self.target if self.sense == "≥" else self.value.median <= self.target

    def line(self) -> str:
        """For people."""
        value, p10, p90 = self.value
        unit = f" {self.unit}" if self.unit else ""
        spread = f"{p10:.3g} – {p90:.3g}"
        asked = f"target {self.sense} {self.target:g}{unit}  {'pass' if self.reached else 'MISS'}"
        return f"  {self.what:<52}{value:>9.3g}{unit:<3} {spread:>17}   {asked}"


@dataclass
class Report:
    """Rows and targets of one benchmark, printed as they come and written as JSON at the end."""

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=lambda: machine())

    def __post_init__(self) -> None:
        facts = self.machine
        print(f"{facts['processor']}, {facts['cores']} cores, {facts['system']}; load {facts['load']}")
        print(", ".join(f"{k} {v}" for k, v in facts["versions"].items()) + f"; commit {facts['commit']}")
        print(f"command: {facts['command']}")

    def row(self, title: str, rounds: Rounds, targets: Sequence[Target] = (), **facts: Any) -> None:
        """One row of candidates with what is asked of them."""
        self.heading(title)
        for name in rounds.every[0].seconds:
            median, p10, p90 = rounds.seconds(name)
            print(f"  {name:<52}{_time(median):>12} {_time(p10) + ' – ' + _time(p90):>25}")
        steady = sum(r.steady for r in rounds.every)
        pings = [s for r in rounds.used for s in r.ping_pong_s if s is not None]
        state = f"ping-pong {_time(statistics.median(pings))}, " if pings else ""
        took = statistics.median([r.others for r in rounds.used])
        print(f"  [{len(rounds.used)} of {len(rounds.every)} rounds count, {steady} steady; {state}others {took:.0%}]")
        self.rows.append(
            {
                "row": title,
                **facts,
                "seconds": {n: rounds.seconds(n)._asdict() for n in rounds.every[0].seconds},
                "rounds": [asdict(r) | {"steady": r.steady} for r in rounds.every],
            }
        )
        self.ask(title, targets)

    def heading(self, title: str) -> None:
        """A title above what follows."""
        print(f"\n{title}")

    def ask(self, row: str, targets: Sequence[Target]) -> None:
        """Targets of a row, printed and kept."""
        for t in targets:
            print(t.line(), flush=True)
            self.targets.append(Target(f"{row}: {t.what}", t.value, t.sense, t.target, t.unit))

    def note(self, text: str) -> None:
        """Something a reader of the figures must know."""
        print(f"  note: {text}")
        self.notes.append(text)

    def finish(self, path: Path | None) -> None:
        """Count the targets and write the JSON: to a file, or to ``<name>.json`` in a folder."""
        reached = sum(t.reached for t in self.targets)
        print(f"\n{self.name}: {reached} of {len(self.targets)} targets reached")
        if path is None:
            return
        if path.is_dir():
            path /= f"{self.name}.json"
        document = {
            "benchmark": self.name,
            "machine": self.machine,
            "load_after": _load(),
            "notes": self.notes,
            "rows": self.rows,
            "targets": [{**asdict(t), "value": t.value._asdict(), "reached": t.reached} for t in self.targets],
        }
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs" if seconds < 999.5e-6 else f"{seconds * 1e3:.4g} ms"


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")] if cpuinfo.exists() else []
    root = Path(__file__).resolve().parents[1]
    said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "load": _load(),
        "versions": {name: _version(name) for name in ("manyhands", "torch", "numpy", "mpi4py", "mpich")}
        | {"python": platform.python_version()},
        "commit": said.stdout.strip() or "unknown",
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _load() -> float:
    return round(os.getloadavg()[0], 2)


def arguments(description: str, **more: str) -> argparse.Namespace:
    """The options that all benchmarks share, and ``more`` of them: flag → help."""
    parser = argparse.ArgumentParser(description=description.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run: few and short bursts, figures mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there; a folder: one file each")
    parser.add_argument("--rounds", type=int, help="how often every candidate gets its turn")
    for flag, text in more.items():
        parser.add_argument(f"--{flag}", help=text)
    return parser.parse_args()
