"""The whole of a calibration: the host, the curves of each transport, the operators, in blocks with a probe between.

Time is what is given out: each block gets its part of what is left, a block that was disturbed is done again as long as
the time for that lasts, and the whole ends when it is said to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.util
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from manyhands.cluster import Cluster
from manyhands.cluster.measured import TRANSPORTS, Curve, Measured, OperatorTime
from manyhands.communication import futex, transports
from manyhands.errors import BadInput, CommunicationError, UnknownName, WorkerFailed
from manyhands.modelling.calibration import keeping, patterns, repeating
from manyhands.modelling.calibration.hosting import Host, host_in
from manyhands.modelling.calibration.knots import LEAST_B, MOST_B
from manyhands.modelling.calibration.probe import Probe, flipped, usual
from manyhands.modelling.calibration.repeating import Try
from manyhands.modelling.calibration.telling import Telling
from manyhands.training import environment
from manyhands.training.conclusion import versions
from manyhands.training.team import Team, team
from manyhands.training.team.mpiexec import mpiexec

JOB = "manyhands.modelling.calibration.collectives:curves"
#: Seconds of the whole, and of them for the operators; ``quick`` has no table of operators.
TOTAL_S, OPERATORS_S, QUICK_S = 112.0, 40.0, 17.0
#: Of the time for curves, what is kept for doing blocks again.
AGAIN = 0.15
#: Of a block, also when time has run out: two knots would be no curve.
LEAST_S = 0.15
#: How long the workers of a transport take to start, by experience; processes of mpiexec load torch themselves.
START_S = {"mpi": 8.0}
#: All that can be measured on the processor.
MEASURED = TRANSPORTS[:4]
RANKS, QUICK_RANKS = (2, 4, 8), (2,)
MOST_QUICK_B = 16 * 2**20
#: Any one wait; a job may take so much longer than its budget.
TIMEOUT_S, GRACE_S = 30.0, 60.0
#: Load by others, of a core, beyond which the machine is not called quiet.
BUSY = 0.5


@dataclass(frozen=True)
class Calibration:
    """What was measured, where it was written, and how long it took."""

    cluster: Cluster
    path: Path
    took_s: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; the tables are in the file."""
        measured = self.cluster.measured
        assert measured is not None
        return {
            "path": str(self.path),
            "took_s": self.took_s,
            "when": measured.when,
            "host": dict(measured.host),
            "curves": [
                {"transport": c.transport, "operation": c.operation, "ranks": c.ranks, "knots": len(c.sizes_B)}
                for c in measured.curves
            ],
            "operators": len(measured.operators),
            "notes": list(measured.notes),
            "versions": dict(self.cluster.versions),
        }


def calibrate(
    *,
    out: str | os.PathLike[str] | None = None,
    quick: bool = False,
    wanted: Sequence[str] | None = None,
    total_s: float | None = None,
    console: Console | None = None,
) -> Calibration:
    """Measure this machine and write the file; see `verbs.calibrate`. ``total_s`` holds as far as the least allows."""
    if (started := environment.launched()) is not None and started.size > 1:
        raise BadInput(
            f"calibrate under {started.launcher} with {started.size} ranks: it measures one machine and starts its own "
            "workers. Run it without a launcher, on each kind of machine."
        )
    names, missing = _transports(wanted)
    path = keeping.place() if out is None else Path(out)
    keeping.check_writable(path)
    began = time.monotonic()
    whole_s = total_s if total_s is not None else QUICK_S if quick else TOTAL_S
    run = _Run(began, whole_s, quick, missing)
    with Telling(console, whole_s) as telling, run.probe:
        run.telling = telling
        host = run.host(names[0] if names else "threads")
        curves = run.curves(names)
        operators = () if quick else run.operators()
        measured = run.measured(host, curves, operators)
    cluster = host.cluster(measured, versions() | {"kernel": str(measured.host["kernel"])})
    keeping.keep(cluster, path)
    return Calibration(cluster, path, time.monotonic() - began)


def _transports(wanted: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Those to measure, and a note for each that is not here; one that was asked for and is not here is an error."""
    for name in wanted or ():
        if name not in MEASURED:
            also = f"Those that can be measured: {', '.join(MEASURED)}."
            if name in transports:
                raise BadInput(f"calibrate transport {name}: it has no curve to measure on processor cores. {also}")
            raise UnknownName("transport", name, MEASURED)
        if (why := not_here(name)) is not None:
            raise BadInput(f"calibrate transport {name}: {why}.")
    names = [name for name in MEASURED if (wanted is None or name in wanted) and not_here(name) is None]
    missing = [f"{n}: {not_here(n)}" for n in MEASURED if wanted is None and n not in names]
    return names, missing


def not_here(name: str) -> str | None:
    """Why a transport cannot run on this machine; None: it can."""
    if name == "shared" and not environment.shared_memory_works():
        return "it is for Linux on x86-64"
    if name == "gloo":
        import torch

        if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
            return "this torch is built without it"
    if name == "mpi":
        if importlib.util.find_spec("mpi4py") is None:
            return "mpi4py is not installed: pip install 'manyhands[mpi]'"
        try:
            mpiexec(1)
        except BadInput:
            return "there is no mpiexec: pip install 'manyhands[mpi]'"
    return None


class _Run:
    """A calibration under way."""

    telling: Telling

    def __init__(self, began: float, whole_s: float, quick: bool, notes: Sequence[str]) -> None:
        self._began, self._whole_s, self._quick = began, whole_s, quick
        self.probe = Probe()
        self._cores = futex.cores()
        self._load = _load()
        self._operators_s = 0.0 if quick else OPERATORS_S * whole_s / TOTAL_S
        self._again_s = AGAIN * (whole_s - self._operators_s)
        self._notes = list(notes)
        self._again = 0
        self._disturbed: list[str] = []
        self._last_s: float | None = None
        if self._load > BUSY:
            self._notes.append(
                f"other programs used the machine (load {self._load:.1f}, cores {self._cores}, before it began): "
                "all is slower and less sure than on a quiet one"
            )

    @property
    def _at_s(self) -> float:
        return time.monotonic() - self._began

    def _say(self, text: str) -> None:
        self.telling.say(text, self._at_s)

    # -- the host ------------------------------------------------------------------------------------------------------

    def host(self, transport: str) -> Host:
        """Its own figures, by a team with a process a core."""
        where = "shared" if environment.shared_memory_works() else "gloo" if transport != "threads" else transport
        with team(where, self._cores, threads=1, timeout_s=TIMEOUT_S) as crew:
            before = self.probe.seconds()
            found = host_in(crew, quick=self._quick, say=self._say)
            after = self.probe.seconds()
            if flipped(before, after) and self._again_s > 0:
                began = self._at_s
                found = host_in(crew, quick=self._quick, say=self._say)
                self._again_s -= self._at_s - began
                self._again += 1
        self._last_s = self.probe.seconds()
        return found

    # -- transports ----------------------------------------------------------------------------------------------------

    def curves(self, names: Sequence[str]) -> list[Curve]:
        """Of all transports; one that fails is a note."""
        blocks = {name: self._blocks(name) for name in names}
        found: list[Curve] = []
        for i, name in enumerate(names):
            try:
                ranks = max(ranks for ranks, _, _ in blocks[name])
                with team(name, ranks, threads=1, timeout_s=TIMEOUT_S) as crew:
                    while blocks[name]:
                        left_s = self._left_s(names[i + 1 :])
                        weights = sum(w for each in blocks.values() for _, _, w in each)
                        size, pattern, weight = blocks[name].pop(0)
                        found += self._block(crew, name, size, pattern, max(left_s * weight / weights, LEAST_S))
            except (WorkerFailed, CommunicationError) as e:
                self._notes.append(f"{name} could not be measured any further: {str(e).splitlines()[0]}")
                blocks[name].clear()
        return found

    def _left_s(self, to_start: Sequence[str]) -> float:
        starting = sum(START_S.get(name, 1.0) for name in to_start)
        return self._whole_s - self._at_s - self._operators_s - max(self._again_s, 0.0) - starting

    def _blocks(self, name: str) -> list[tuple[int, str, float]]:
        """Ranks, pattern and weight."""
        kind = transports.load(name)
        found = []
        for ranks in self._ranks():
            for pattern in patterns.patterns_of(
                shares_memory=kind.shares_memory, one_sided=kind.one_sided, ranks=ranks
            ):
                weight = 2.0 if ranks <= self._cores else 1.0  # what fits the machine is used most
                found.append((ranks, pattern, weight * {"barrier": 0.2, "sharded": 1.5}.get(pattern, 1.0)))
        return found

    def _ranks(self) -> list[int]:
        if self._quick:
            return list(QUICK_RANKS)
        doubled = [2**i for i in range(4, 7) if 2**i <= self._cores]
        return [*RANKS, *doubled]

    def _most_B(self, ranks: int) -> int:
        """Four tensors a rank, in a quarter of the memory."""
        most = MOST_QUICK_B if self._quick else MOST_B
        memory_B = environment.memory_B() or 2**33
        return max(min(most, memory_B // 16 // ranks // LEAST_B * LEAST_B), 2**16)

    def _block(self, crew: Team, name: str, ranks: int, pattern: str, budget_s: float) -> list[Curve]:
        tries: list[Try] = []
        while True:
            before, began = self._last_s, self._at_s
            found = crew.run(
                JOB, ranks, pattern, budget_s, self._most_B(ranks), self._quick, deadline_s=budget_s + GRACE_S
            )[0]
            self._last_s = self.probe.seconds()
            tries.append(Try(found, before, self._last_s, ranks > self._cores))
            if len(tries) > 1:
                self._again_s -= self._at_s - began
                self._again += 1
            if tries[-1].calm or len(tries) >= repeating.TRIES or self._again_s < budget_s:
                break
        if not repeating.best(tries).calm:
            self._disturbed.append(f"{name} {pattern} on {ranks}")
        curves = repeating.settled(tries, name, ranks)
        self._say(f"{name}, {ranks} ranks: {pattern}  {_in_short(curves[0])}")
        return curves

    # -- operators -----------------------------------------------------------------------------------------------------

    def operators(self) -> tuple[OperatorTime, ...]:
        """One thread on each core; one alone; all threads for one."""
        from manyhands.modelling.operators import measure

        cores = self._cores
        kinds = [(1, cores, 0.5), (1, 1, 0.25), (cores, 1, 0.25)] if cores > 1 else [(1, 1, 1.0)]
        whole_s = max(self._whole_s - self._at_s, self._operators_s / 4)
        found: list[OperatorTime] = []
        for threads, co_runners, part in kinds:
            try:
                found += measure(whole_s * part, threads, co_runners)
            except (WorkerFailed, CommunicationError) as e:
                self._notes.append(f"operators could not be measured any further: {str(e).splitlines()[0]}")
                break
            self._say(f"operators, {co_runners} processes of {threads} threads: {len(found)}")
        # To four digits, as curves are; an outlier's spread says no more than that nobody knows.
        return tuple(
            dataclasses.replace(
                o, seconds=repeating.digits(o.seconds), spread=repeating.digits(min(o.spread, repeating.WIDEST), 2)
            )
            for o in found
        )

    # -- the result ----------------------------------------------------------------------------------------------------

    def measured(self, host: Host, curves: Sequence[Curve], operators: tuple[OperatorTime, ...]) -> Measured:
        """All of it, with what a reader is to know."""
        seen = self.probe.seen_s
        state = usual(seen)
        table: dict[str, Any] = {**keeping.machine(), **host.table(), "allocator": "tuned"}
        table |= {"load_before": round(self._load, 2), "load_after": round(_load(), 2), "repeated_blocks": self._again}
        if state is not None:
            table["probe_us"] = {
                name: round(value * 1e6, 3)
                for name, value in (("least", min(seen)), ("median", state), ("most", max(seen)))
            }
            elsewhere = [c for c in curves if any(flipped(state, p) for p in c.probe_s)]
            if elsewhere:
                self._notes.append(
                    f"the host changed its state: {len(elsewhere)} of {len(curves)} curves were measured while a cache "
                    f"line took a time other than the usual {state * 1e6:.2f} us (each curve has its probes)"
                )
        else:
            self._notes.append("no probe of the host's state: two processes share no memory here, or never ran at once")
        if self._disturbed:
            self._notes.append(
                f"noisy although repeated, so their spread is wider: {len(self._disturbed)} blocks, "
                f"{', '.join(self._disturbed[:6])}{' …' if len(self._disturbed) > 6 else ''}"
            )
        if self._quick:
            self._notes.append("quick: few knots, two ranks, no table of operators")
        when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return Measured(when=when, curves=tuple(curves), operators=operators, host=table, notes=tuple(self._notes))


def _load() -> float:
    with contextlib.suppress(OSError, AttributeError):
        return os.getloadavg()[0]
    return 0.0


def _in_short(curve: Curve) -> str:
    low, high = curve.seconds[0], curve.seconds[-1]
    spread = sorted(curve.spread)[len(curve.spread) // 2]
    if len(curve.seconds) == 1:
        return f"{low * 1e6:.1f} us ±{100 * spread:.2g} %"
    return f"{low * 1e6:.1f} us … {high * 1e3:.2f} ms at {len(curve.sizes_B)} sizes ±{100 * spread:.2g} %"
