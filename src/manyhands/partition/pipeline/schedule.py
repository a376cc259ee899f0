"""A pipeline schedule as data: what each rank computes, in which order; to print, read, prove and time it.

An action is a piece of compute of one stage on one micro-batch:

    F   forward                                   needs F of the stage before
    B   backward, whole                           needs F here, and B or I of the stage after
    I   backward, gradient of the inputs only     as B; what the stage before waits for
    W   backward, gradient of the weights only    needs I here; may come late (zero bubble)

A schedule lists compute only. What is sent follows from it: the outputs after each F, the gradients after each B or I.
Stage s lives on rank s mod p, so p ranks hold p stages, or a multiple of p (interleaved).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from manyhands.checks import whole
from manyhands.errors import BadInput

Kind = Literal["F", "B", "I", "W"]

#: One slot for each action, by which grids are drawn.
UNIT: Mapping[Kind, float] = {"F": 1, "B": 1, "I": 1, "W": 1}
#: A layer of products costs as much forward as for either of its gradients; for comparing split and whole backward.
PRODUCTS: Mapping[Kind, float] = {"F": 1, "B": 2, "I": 1, "W": 1}

_IDLE = "·"
_CELL = re.compile(r"(\d*)([FBIW])(\d+)")


class Action(NamedTuple):
    """One piece of compute; prints as ``2F0``: stage 2, forward, micro-batch 0."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"

    def __repr__(self) -> str:
        return str(self)


#: What actions cost, by their kind or one by one.
Costs = Mapping[Kind, float] | Callable[[Action], float]


class Timed(NamedTuple):
    """An action and when it runs."""

    action: Action
    start: float
    end: float


class _Fault(NamedTuple):
    """Where a schedule is wrong: the place in a rank's list (its length: something is missing), and why."""

    rank: int
    at: int
    why: str


@dataclass(frozen=True)
class Schedule:
    """``rows[r]`` is what rank r does, in order. Prints as a grid that `parse` reads back."""

    rows: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        """How many ranks take part."""
        return len(self.rows)

    @functools.cached_property
    def stages(self) -> int:
        """How many stages there are."""
        return 1 + max((a.stage for row in self.rows for a in row), default=-1)

    @functools.cached_property
    def micro_batches(self) -> int:
        """Into how many micro-batches a batch is divided."""
        return 1 + max((a.micro_batch for row in self.rows for a in row), default=-1)

    @functools.cached_property
    def splits_backward(self) -> bool:
        """Whether input and weight gradients are separate actions somewhere."""
        return any(a.kind == "I" for row in self.rows for a in row)

    def stage_rank(self, stage: int) -> int:
        """The rank that holds ``stage``."""
        return stage % self.ranks

    def stages_of(self, rank: int) -> range:
        """The stages that ``rank`` holds, in order."""
        return range(rank, self.stages, self.ranks)

    @functools.cached_property
    def _contents(self) -> list[frozenset[Action]]:
        return [frozenset(row) for row in self.rows]

    def without(self, micro_batches: Collection[int]) -> Schedule:
        """The same order with these micro-batches left out; what was valid stays so."""
        return Schedule(tuple(tuple(a for a in row if a.micro_batch not in micro_batches) for row in self.rows))

    def of(self, micro_batches: Sequence[int]) -> Schedule:
        """The same order for these alone, as if there were no others: the n-th of them is where micro-batch n was."""
        left = self.without(range(len(micro_batches), self.micro_batches))
        return Schedule(
            tuple(tuple(a._replace(micro_batch=micro_batches[a.micro_batch]) for a in row) for row in left.rows)
        )

    def __str__(self) -> str:
        times, stuck = simulate(self, UNIT)
        if stuck:
            return _listing(self)
        slots = round(max((t.end for row in times for t in row), default=0))
        table = []
        for row in times:
            cells = [_IDLE] * slots
            for t in row:
                cells[round(t.start)] = self._cell(t.action)
            table.append(cells)
        return _grid(table)

    def _cell(self, action: Action) -> str:
        return f"{action.kind}{action.micro_batch}" if self._one_stage_each else str(action)

    @functools.cached_property
    def _one_stage_each(self) -> bool:
        return all(a.stage == rank for rank, row in enumerate(self.rows) for a in row)

    def validate(self, in_flight: int | Sequence[int] | None = None) -> Schedule:
        """Raise `BadInput` with the grid and an arrow if it cannot be run; returns itself.

        Each stage does each micro-batch's F once and its B (or I and W) once, on the stage's own rank, in an order in
        which nobody waits for ever. ``in_flight``: how many micro-batches a rank (each rank, if there are several
        numbers) may hold between forward and backward.
        """
        fault = self._misplaced() or self._incomplete() or self._stuck() or self._too_many(in_flight)
        if fault is not None:
            raise BadInput(
                f"This pipeline schedule cannot be run: rank {fault.rank}, {fault.why}. Every stage does each "
                f"micro-batch's F once and then its B once (or I and W), when its neighbours have done theirs.\n"
                + _listing(self, fault)
            )
        return self

    def _misplaced(self) -> _Fault | None:
        seen: set[Action] = set()
        for rank, row in enumerate(self.rows):
            for at, a in enumerate(row):
                if self.stage_rank(a.stage) != rank:
                    return _Fault(rank, at, f"{a}: stage {a.stage} is on rank {self.stage_rank(a.stage)}")
                if a in seen:
                    return _Fault(rank, at, f"{a} is there a second time")
                if (a._replace(kind="B") in seen and a.kind in "IW") or (a.kind == "B" and _split(a) & seen):
                    return _Fault(rank, at, f"{a}: its backward is whole (B) or in two parts (I and W), not both")
                seen.add(a)
        return None

    def _incomplete(self) -> _Fault | None:
        if not self.stages:
            return _Fault(0, 0, "which has nothing to do") if self.rows else None
        for stage in range(max(self.stages, self.ranks)):
            rank = self.stage_rank(stage)
            row = set(self.rows[rank])
            for i in range(self.micro_batches):
                forward = Action("F", stage, i)
                if forward not in row:
                    return _Fault(rank, len(self.rows[rank]), f"{forward} is missing")
                missing = _split(forward) - row
                if missing and forward._replace(kind="B") not in row:
                    what = str(*missing) if len(missing) == 1 else str(forward._replace(kind="B"))
                    return _Fault(rank, len(self.rows[rank]), f"{what} is missing")
        return None

    def _stuck(self) -> _Fault | None:
        _, stuck = simulate(self, UNIT)
        if not stuck:
            return None
        done = {a for row, at in zip(self.rows, self._progress(stuck), strict=True) for a in row[:at]}
        rank, at = min(stuck.items(), key=lambda entry: entry[1])
        action = self.rows[rank][at]
        needed = " and ".join(str(d) for d in _needs(action, self) if d not in done)
        return _Fault(rank, at, f"{action} waits for ever: {needed} cannot come before it")

    def _progress(self, stuck: Mapping[int, int]) -> list[int]:
        return [stuck.get(rank, len(row)) for rank, row in enumerate(self.rows)]

    def _too_many(self, in_flight: int | Sequence[int] | None) -> _Fault | None:
        if in_flight is None:
            return None
        bounds = [in_flight] * self.ranks if isinstance(in_flight, int) else list(in_flight)
        for rank, (row, bound) in enumerate(zip(self.rows, bounds, strict=True)):
            for at, held in enumerate(_held(self, row)):
                if held > bound:
                    return _Fault(rank, at, f"{row[at]} makes {held} micro-batches in flight where {bound} are allowed")
        return None


def schedule(rows: Sequence[Sequence[Action]]) -> Schedule:
    """A `Schedule` of plain lists."""
    return Schedule(tuple(tuple(row) for row in rows))


def sizes(what: str, ranks: int, micro_batches: int) -> None:
    """Refuse numbers of ranks and micro-batches that no schedule has."""
    whole(f"pipeline schedule {what}: ranks", ranks)
    whole(f"pipeline schedule {what}: micro_batches", micro_batches)


def parse(text: str) -> Schedule:
    """The schedule that ``text`` draws: a line a rank, ``F0 F1 · B0 B1``, or ``2F0`` with the stage before the kind.

    Without a stage it is the rank's own. A label ``rank 0`` and dots are passed over. Raises `BadInput`; that what is
    read can also be run is `Schedule.validate`'s to say.
    """
    rows: list[tuple[Action, ...]] = []
    for number, line in enumerate(x for x in text.splitlines() if x.strip()):
        cells = re.sub(r"^\s*rank\s+\d+\s*:?", "", line).split()
        row = []
        for cell in cells:
            if set(cell) <= {_IDLE, ".", "-"}:
                continue
            match = _CELL.fullmatch(cell)
            if match is None:
                raise BadInput(
                    f"pipeline schedule, rank {number}: {cell!r} is no action. An action is a kind (F, B, I or W) "
                    "and a micro-batch, with the stage before it where a rank has several: F0, B3, 2F0."
                )
            stage, kind, micro_batch = match.groups()
            row.append(Action(_KINDS[kind], int(stage) if stage else number, int(micro_batch)))
        rows.append(tuple(row))
    return Schedule(tuple(rows))


_KINDS: dict[str, Kind] = {k: k for k in get_args(Kind)}


def simulate(
    schedule: Schedule, costs: Costs, hop_s: Callable[[Action, Action], float] | None = None
) -> tuple[list[list[Timed]], dict[int, int]]:
    """When each action runs if it costs what ``costs`` says and each starts when it can.

    ``hop_s``: what passes between the end of one and the beginning of another that needs it on another rank; nothing
    else costs anything. Also where each rank stands that can never go on (empty: all get to their ends).
    """
    cost = costs if callable(costs) else lambda action: costs[action.kind]
    ends: dict[Action, float] = {}
    times: list[list[Timed]] = [[] for _ in schedule.rows]
    moved = True
    while moved:
        moved = False
        for row, timed in zip(schedule.rows, times, strict=True):
            while len(timed) < len(row):
                action = row[len(timed)]
                needs = _needs(action, schedule)
                if not all(d in ends for d in needs):
                    break
                start = timed[-1].end if timed else 0.0
                for d in needs:
                    far = hop_s is not None and schedule.stage_rank(d.stage) != schedule.stage_rank(action.stage)
                    start = max(start, ends[d] + (hop_s(d, action) if far and hop_s is not None else 0.0))
                ends[action] = start + cost(action)
                timed.append(Timed(action, start, ends[action]))
                moved = True
    stuck = {r: len(t) for r, (t, row) in enumerate(zip(times, schedule.rows, strict=True)) if len(t) < len(row)}
    return times, stuck


def makespan(schedule: Schedule, costs: Costs = UNIT, hop_s: Callable[[Action, Action], float] | None = None) -> float:
    """How long a batch takes, in the unit of ``costs``; see `simulate`."""
    return max((t.end for row in simulate(schedule, costs, hop_s)[0] for t in row), default=0.0)


def bubble(schedule: Schedule, costs: Mapping[Kind, float] = UNIT) -> float:
    """The part of all ranks' time in which they have nothing to do, from 0 to 1."""
    times, _ = simulate(schedule, costs)
    whole_time = schedule.ranks * makespan(schedule, costs)
    busy = sum(t.end - t.start for row in times for t in row)
    return 1 - busy / whole_time if whole_time else 0.0


def in_flight(schedule: Schedule) -> list[int]:
    """By rank: how many (stage, micro-batch) are at most held between forward and the end of backward."""
    return [max(_held(schedule, row), default=0) for row in schedule.rows]


def in_flight_of_stage(schedule: Schedule, stage: int) -> int:
    """The same of one stage alone, but only until its input gradient is done (B or I)."""
    held = most = 0
    for a in schedule.rows[schedule.stage_rank(stage)]:
        if a.stage == stage and a.kind != "W":
            held += 1 if a.kind == "F" else -1
            most = max(most, held)
    return most


def _held(schedule: Schedule, row: Sequence[Action]) -> list[int]:
    """How many are held after each action: all that have had their F, and not yet their B (or W)."""
    held, result = 0, []
    for a in row:
        held += 1 if a.kind == "F" else -1 if a.kind in "BW" else 0
        result.append(held)
    return result


def _needs(action: Action, schedule: Schedule) -> list[Action]:
    """What must be done before, by whatever rank."""
    kind, stage, i = action
    if kind == "F":
        return [Action("F", stage - 1, i)] if stage else []
    if kind == "W":
        return [Action("I", stage, i)]
    needs = [Action("F", stage, i)]
    if stage + 1 < schedule.stages:
        after = Action("B", stage + 1, i)
        whole_there = after in schedule._contents[schedule.stage_rank(stage + 1)]
        needs.append(after if whole_there else after._replace(kind="I"))
    return needs


def _split(action: Action) -> set[Action]:
    return {action._replace(kind="I"), action._replace(kind="W")}


def _listing(schedule: Schedule, fault: _Fault | None = None) -> str:
    """Each rank's actions one after the other, whatever the time, with an arrow at a fault."""
    table = [[schedule._cell(a) for a in row] for row in schedule.rows]
    if fault is not None:
        row = table[fault.rank]
        row[fault.at : fault.at + 1] = ["⇒" + (row[fault.at] if fault.at < len(row) else "")]
    return _grid(table)


def _grid(table: Sequence[Sequence[str]]) -> str:
    width = max((len(cell) for row in table for cell in row), default=1)
    label = len(str(len(table) - 1))
    return "\n".join(
        f"rank {rank:<{label}}  {' '.join(cell.ljust(width) for cell in row)}".rstrip()
        for rank, row in enumerate(table)
    )
