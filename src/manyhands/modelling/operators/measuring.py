"""Fill a table: real training steps of a spread of networks, with times stamped inside them.

Everything is as in training: the replica that trains, gradients in one vector, weights that move, the tuned allocator,
in processes of their own (as many side by side as there are co-runners, each with its own networks). Steps with stamps
alternate with steps without, which say what the host needs (`overhead`) and how long updates take. All networks are
gone through several times, since the machine changes while one measures; how quick it is in each slot a few steps of
the first gauge say (`gauge`), and all times become those of the machine at its median.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from manyhands.cluster.measured import OperatorTime
from manyhands.errors import BadInput
from manyhands.modelling.operations import Operation
from manyhands.modelling.operators import gauge, overhead, updates
from manyhands.modelling.operators.networks import NETWORKS, Cell, Network, cells
from manyhands.modelling.operators.stamping import Stamps, excess_s, learn, seconds_of
from manyhands.modelling.operators.table import Key, anonymous, key, said
from manyhands.modelling.operators.trained import Training
from manyhands.training import environment
from manyhands.training.member import Member
from manyhands.training.team import team

#: Of each network. A machine's state lasts for seconds and changes all operators alike, by up to a half: what was
#: measured in one go would be off as a whole.
ROUNDS = 4
#: Slots whose pulses say together how quick the machine was in the middle one, 20 to 100 ms each.
NEIGHBOURS = 5
#: Steps before any is counted: the allocator and the convolutions' prepared kernels settle.
WARM_UP = 3
#: Of each kind in a slot, however short it is.
LEAST_STEPS = 1
#: What a worker may take longer than it was given, before it is ended.
GRACE_S = 60.0


#: Slot and seconds.
Timed = tuple[int, float]


@dataclass(frozen=True)
class Observed:
    """What one worker has seen of one network at one batch."""

    cell: Cell
    rows: tuple[OperatorTime, ...]
    #: Of steps without stamps, with what happens in them; see `overhead`.
    step: overhead.Step
    #: Medians of each round: gradients, update.
    rounds: tuple[tuple[float, float], ...]
    #: Of a gauge, its bursts, one a round.
    bursts: tuple[float, ...] = ()


def measure(
    budget_s: float = 40.0, threads: int = 1, co_runners: int = 1, networks: Sequence[Network] = NETWORKS
) -> tuple[OperatorTime, ...]:
    """A table for ``co_runners`` processes of ``threads`` threads each, in about ``budget_s`` seconds.

    Medians over all uses in all steps of all processes, ``spread`` being half the interquartile range relative to it.
    What a short budget leaves out is the last of the networks' batches. Nothing of this process is changed.
    """
    return table_of(observe(budget_s, threads, co_runners, networks))


def observe(
    budget_s: float, threads: int, co_runners: int, networks: Sequence[Network] = NETWORKS, *, rounds: int = ROUNDS
) -> list[Observed]:
    """As `measure`, each network and batch of each worker by itself."""
    if budget_s <= 0 or threads < 1 or co_runners < 1:
        raise BadInput(
            f"operator tables: budget_s={budget_s}, threads={threads}, co_runners={co_runners}; a time above 0 and "
            "whole numbers from 1, e.g. measure(40, threads=1, co_runners=2)."
        )
    transport = "shared" if environment.shared_memory_works() else "gloo"
    wanted = [dataclasses.asdict(x) for x in networks]
    with team(transport, co_runners, threads=threads) as workers:
        found = workers.run(f"{__name__}:work", budget_s, rounds, wanted, deadline_s=budget_s + GRACE_S)
    return observed(found, networks, threads, co_runners)


def observed(
    found: Sequence[Sequence[Mapping[str, Any]]], networks: Sequence[Network], threads: int, co_runners: int
) -> list[Observed]:
    """What workers have sent (`work`)."""
    todo = cells(networks)
    return [
        Observed(
            todo[i],
            tuple(OperatorTime(**row, threads=threads, co_runners=co_runners) for row in one["rows"]),
            tuple(one["step"]),
            tuple(one["rounds"]),
            tuple(one["bursts"]),
        )
        for worker in found
        for i, one in enumerate(worker)
    ]


def table_of(observed: Sequence[Observed]) -> tuple[OperatorTime, ...]:
    """One row for each operator, the median over networks and workers; what the host needs; the gauges' steps."""
    if not observed:
        return ()
    by_key: dict[Key, list[OperatorTime]] = defaultdict(list)
    for row in (row for one in observed for row in one.rows):
        by_key[key(row)].append(row)
    median = statistics.median
    rows = [
        dataclasses.replace(some[0], seconds=median(x.seconds for x in some), spread=median(x.spread for x in some))
        for some in by_key.values()
    ]
    counted = {"threads": rows[0].threads, "co_runners": rows[0].co_runners}
    steps: dict[Cell, list[float]] = defaultdict(list)
    for one in observed:
        steps[one.cell] += one.bursts
    gauges = [gauge.row(cell, median(each), _half_range(each), **counted) for cell, each in steps.items() if each]
    return (*rows, *overhead.fit([x.step for x in observed], **counted), *gauges)


def _half_range(values: Sequence[float]) -> float:
    """Relative to their middle."""
    return (max(values) - min(values)) / 2 / statistics.median(values)


def work(member: Member, budget_s: float, rounds: int, networks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What one worker does; all go through the same cells in the same slots."""
    began, excess = time.perf_counter(), excess_s()
    torch.manual_seed(0)
    todo = cells([Network(**x) for x in networks])
    running: list[_Running] = []
    pulse, pulses = Training(gauge.GAUGES[0]), list[float]()
    for slot in range(rounds * len(todo)):
        at = slot % len(todo)
        if at == len(running):
            running.append(_Running(todo[at], excess))
        pulses.append(gauge.burst(pulse, 0.0))
        left_s = began + budget_s * (slot + 1) / (rounds * len(todo)) - time.perf_counter()
        over = slot > 0 and time.perf_counter() - began > budget_s
        given = torch.tensor([-1.0 if over else max(left_s, 0.0)], dtype=torch.float64)
        member.comm.broadcast(given).wait()  # rank 0's clock says it, so that all run side by side and end alike
        if given.item() < 0:
            break
        running[at].run_for(given.item(), slot)
    slower = smoothed(pulses)
    return [x.seen(slower) for x in running if x.ran and x.stamped]


def smoothed(pulses: Sequence[float]) -> list[float]:
    """In each slot now / median of all, by the median over its neighbours' pulses."""
    middle, reach = statistics.median(pulses), NEIGHBOURS // 2
    return [statistics.median(pulses[max(i - reach, 0) : i + reach + 1]) / middle for i in range(len(pulses))]


class _Running(Training):
    """A network that trains, with stamps in every other step."""

    def __init__(self, cell: Cell, excess: float) -> None:
        super().__init__(cell)
        self._excess, self._gauges = excess, cell in gauge.GAUGES
        self._course = learn(self.compute, self.model, self.gradients, self.loss)
        self._places = [anonymous(x) for x in self._course.operations]
        self._whole_update = updates.of(self.optimizer, [p.numel() for p in self.model.parameters()])
        for _ in range(WARM_UP):
            self.compute()
            self.update()
        # With the slot of each.
        self._bursts: list[Timed] = []
        self._taken: list[list[Timed]] = [[] for _ in self._places]
        self._updates: list[Timed] = []
        self._whole: list[Timed] = []  # of steps without stamps

    def run_for(self, seconds: float, slot: int) -> None:
        """Steps without and with stamps in turn."""
        end, steps = time.perf_counter() + seconds, 0
        while steps < LEAST_STEPS or time.perf_counter() < end:
            steps += 1
            self._whole.append((slot, self.compute()))
            self._updates.append((slot, self.update()))
            stamps = Stamps()
            with stamps:
                self.compute()
            self.update()
            if (took := seconds_of(self._course, stamps, self._excess)) is not None:
                for place, s in zip(self._taken, took, strict=True):
                    place.append((slot, s))
        if self._gauges:
            self._bursts.append((slot, gauge.burst(self, gauge.BURST_S)))

    @property
    def ran(self) -> int:
        """Steps without stamps."""
        return len(self._whole)

    @property
    def stamped(self) -> int:
        """Steps whose stamps are those of its operators: all, unless its course depends on values."""
        return len(self._taken[0])

    def seen(self, slower: Sequence[float]) -> dict[str, Any]:
        """As it travels: the fields of `Observed`. ``slower``: by slot, now / then."""
        course, median = self._course, statistics.median
        counts = (len(course.operations), course.views, course.calls)
        samples: dict[Operation, list[float]] = defaultdict(list)
        for operation, timed in zip(self._places, self._taken, strict=True):
            samples[operation] += _alike(timed, slower)
        stamped_s = sum(len(seconds) / self.stamped * median(seconds) for seconds in samples.values())
        whole, samples[self._whole_update] = _alike(self._whole, slower), _alike(self._updates, slower)
        return {
            "rows": [_row(x, seconds) for x, seconds in samples.items()],
            "step": (median(whole), stamped_s, *counts),
            "rounds": self._rounds(whole, samples[self._whole_update]),
            "bursts": _alike(self._bursts, slower),
        }

    def _rounds(self, whole: Sequence[float], updates: Sequence[float]) -> list[tuple[float, float]]:
        """Medians of the steps of each slot."""
        by_slot: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for (slot, _), *both in zip(self._whole, whole, updates, strict=True):
            by_slot[slot].append((both[0], both[1]))
        medians = ([statistics.median(part) for part in zip(*each, strict=True)] for each in by_slot.values())
        return [(gradients, update) for gradients, update in medians]


def _alike(timed: Sequence[Timed], slower: Sequence[float]) -> list[float]:
    return [seconds / slower[slot] for slot, seconds in timed]


def _row(x: Operation, seconds: Sequence[float]) -> dict[str, Any]:
    """The fields of `OperatorTime` but threads and co-runners."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
    return {
        "name": x.name, "phase": x.phase, "operands": x.operands, "results": x.results, "options": said(x.options),
        "dtype": x.dtype, "layout": x.layout, "flops": x.flops, "moved_B": x.moved_B,
        "seconds": middle, "spread": (high - low) / 2 / middle,
    }  # fmt: skip
