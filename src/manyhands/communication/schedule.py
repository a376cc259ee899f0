"""A communication schedule as data: what each rank sends and receives, round by round; to run, prove and print it.

A schedule is one rank's list of rounds; a round is what it sends and what it receives, slice by slice of one vector.
Within a round all sends leave before anything that arrives is put in its place. `collectives` makes schedules, `run`
does one rank's part over a `Communicator`, `validate` plays all ranks at once without any process.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator

#: One ``[lo, hi)`` for each rank, end to end: who holds which slice of the vector.
Bounds = Sequence[tuple[int, int]]
#: What becomes of a slice that arrived: it is added to what is there, or replaces it.
Then = Literal["add", "copy"]
Operation = Literal["all_reduce", "reduce_scatter", "all_gather", "reduce", "broadcast"]


class Send(NamedTuple):
    """Elements ``[lo, hi)`` go to rank ``to``."""

    to: int
    lo: int
    hi: int

    def __str__(self) -> str:
        return f"→{self.to}[{self.lo}:{self.hi}]"


class Receive(NamedTuple):
    """Elements ``[lo, hi)`` come from rank ``frm``; ``then`` says what becomes of them."""

    frm: int
    lo: int
    hi: int
    then: Then

    def __str__(self) -> str:
        return f"←{self.frm}{'+' if self.then == 'add' else ''}[{self.lo}:{self.hi}]"


class Round(NamedTuple):
    """What one rank does in one round; empty for a rank that sits it out."""

    sends: tuple[Send, ...] = ()
    receives: tuple[Receive, ...] = ()

    def __str__(self) -> str:
        return " ".join(str(action) for action in (*self.sends, *self.receives)) or "·"


#: One rank's rounds. All ranks' schedules of one operation have equally many.
Schedule = tuple[Round, ...]


class BadSchedule(AssertionError):
    """A schedule that does not deliver: our own mistake, hence an assertion. The message ends with the whole grid, an
    arrow at the fault.
    """


def mirror(schedule: Schedule) -> Schedule:
    """The schedule backwards: who sent receives (and copies), who received sends."""
    return tuple(
        Round(
            tuple(Send(r.frm, r.lo, r.hi) for r in reversed(receives)),
            tuple(Receive(s.to, s.lo, s.hi, "copy") for s in reversed(sends)),
        )
        for sends, receives in reversed(schedule)
    )


def span(bounds: Bounds) -> tuple[int, int]:
    """The bounds of the vector that ``bounds`` cut."""
    return bounds[0][0], bounds[-1][1]


def sent_elements(schedule: Schedule) -> int:
    """How many elements a rank sends by its schedule."""
    return sum(s.hi - s.lo for sends, _ in schedule for s in sends)


def run(schedule: Schedule, x: Tensor, comm: Communicator, *, tag: int = 0) -> None:
    """Do this rank's part on the contiguous tensor ``x``, in place. Needs scratch of the largest slice received.

    Every rank of ``comm`` must call it with its schedule of the same operation. The messages count as ``send``.
    """
    flat = x.view(-1)
    for sends, receives in schedule:
        under_way = [comm.send(flat[s.lo : s.hi], s.to, tag) for s in sends]
        arrived = [comm.recv(torch.empty_like(flat[r.lo : r.hi]), r.frm, tag).tensor for r in receives]
        for work in under_way:
            work.wait()  # only now may what was sent be written to
        for r, part in zip(receives, arrived, strict=True):
            if r.then == "add":
                flat[r.lo : r.hi].add_(part)
            else:
                flat[r.lo : r.hi].copy_(part)


def validate(schedules: Sequence[Schedule], operation: Operation, bounds: Bounds, root: int = 0) -> None:
    """Prove that the ranks' schedules do ``operation``: every contribution arrives where it belongs, exactly once.

    Plays all ranks without a process, on sets instead of numbers: ``held[r, e, c]`` counts how often rank c's
    contribution is contained in what rank r holds of segment e (segments lie between neighbouring slice bounds, so the
    cost does not depend on the vector's length). Each send must meet its receive in the same round, in the same
    order and of the same slice; with sends that do not block, this also rules out a deadlock. Raises `BadSchedule`.
    """
    size, (start, stop) = len(bounds), span(bounds)
    rounds = len(schedules[0])
    for rank, schedule in enumerate(schedules):
        if len(schedule) != rounds:
            raise BadSchedule(f"rank {rank} has {len(schedule)} rounds, rank 0 has {rounds}\n{grid(schedules)}")
    all_rounds = [r for schedule in schedules for r in schedule]
    cuts = {*bounds, *((s.lo, s.hi) for r in all_rounds for s in r.sends)}
    cuts |= {(a.lo, a.hi) for r in all_rounds for a in r.receives}
    edges = sorted({start, stop, *(edge for cut in cuts for edge in cut)})
    if (edges[0], edges[-1]) != (start, stop):
        raise BadSchedule(f"a slice lies outside of [{start}:{stop}]\n{grid(schedules)}")
    segment = {edge: i for i, edge in enumerate(edges)}
    held = torch.zeros(size, len(edges) - 1, size, dtype=torch.int64)
    for rank in range(size):
        held[rank, :, rank] = 1
    for k in range(rounds):
        before = held.clone()
        for rank, schedule in enumerate(schedules):
            peers = {*(s.to for s in schedule[k].sends), *(r.frm for r in schedule[k].receives)}
            if rank in peers or not peers <= set(range(size)):
                raise BadSchedule(f"round {k}: rank {rank} has no such peers\n{grid(schedules, at=(k, rank))}")
            for peer in range(size):
                sent = [(s.lo, s.hi) for s in schedules[peer][k].sends if s.to == rank]
                expected = [(r.lo, r.hi) for r in schedule[k].receives if r.frm == peer]
                if sent != expected:
                    raise BadSchedule(
                        f"round {k}: rank {peer} sends {sent} to rank {rank}, which expects {expected}\n"
                        + grid(schedules, at=(k, rank))
                    )
            for frm, lo, hi, then in schedule[k].receives:
                where = slice(segment[lo], segment[hi])
                held[rank, where] = before[frm, where] + (held[rank, where] if then == "add" else 0)
    for rank in range(size):
        for lo, hi, wanted in _wanted(operation, rank, bounds, root):
            counts = torch.zeros(size, dtype=torch.int64)
            counts[wanted] = 1
            for e in range(segment[lo], segment[hi]):
                if not torch.equal(held[rank, e], counts):
                    raise BadSchedule(
                        f"{operation}: rank {rank} ends with the contributions {held[rank, e].tolist()} (count of each "
                        f"rank) in [{edges[e]}:{edges[e + 1]}] instead of {counts.tolist()}\n"
                        + grid(schedules, at=(rounds, rank))
                    )


def _wanted(operation: Operation, rank: int, bounds: Bounds, root: int) -> list[tuple[int, int, list[int]]]:
    """Which contributions ``rank`` must end with, slice by slice; what is not listed may hold anything."""
    everyone, whole = list(range(len(bounds))), span(bounds)
    match operation:
        case "all_reduce":
            return [(*whole, everyone)]
        case "reduce_scatter":
            return [(*bounds[rank], everyone)]
        case "all_gather":
            return [(*b, [p]) for p, b in enumerate(bounds)]
        case "reduce":
            return [(*whole, everyone)] if rank == root else []
        case "broadcast":
            return [(*whole, [root])]


def grid(schedules: Sequence[Schedule], *, at: tuple[int, int] | None = None) -> str:
    """All ranks' schedules as a table, a line for each round; ``at=(round, rank)`` gets an arrow."""
    rounds = max((len(s) for s in schedules), default=0)
    table = [["round", *(f"rank {r}" for r in range(len(schedules)))]]
    for k in range(rounds + 1):
        cells = [str(s[k]) if k < len(s) else "" for s in schedules]
        if at is not None and at[0] == k:
            cells[at[1]] = f"⇒ {cells[at[1]]}"
        if k < rounds or any(cells):
            table.append([str(k) if k < rounds else "end", *cells])
    widths = [max(len(row[c]) for row in table) for c in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table)
