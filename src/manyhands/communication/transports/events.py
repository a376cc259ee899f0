"""What ranks of one process wait for: a meeting, a message, or their own time passing.

Pure bookkeeping: nothing here blocks. An event knows when it is due, whom it misses and how to say itself in "rank 0
waits in …"; how a rank lets time pass until then is its world's business (`inprocess.World`).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Operation(NamedTuple):
    """What is priced: one collective or message. Ranks are those of the world, also inside a group."""

    name: (
        str  # all_reduce, reduce_scatter, all_gather, all_to_all, broadcast, barrier, send; allocate and split are free
    )
    payload_B: int  # n of the reference algorithms' table: the bytes of one rank's tensor
    size: int  # how many ranks take part
    ranks: tuple[int, ...]  # who they are; of a send, source and destination
    source: int | None = None  # sender or root
    destination: int | None = None  # receiver of a send; whose place a pull or a push is about
    common: bool = False  # the tensor is memory that all these ranks see as one copy
    purpose: str = "step"  # what it is counted as


class Event(Protocol):
    """Something a rank waits for; its text completes "rank 0 waits in …"."""

    cost_s: float  # how much of the wait is the operation itself rather than waiting for peers (virtual time only)

    def due(self) -> float | None:
        """When it has happened on the world's clock, or None while it has not."""

    def missing(self) -> str:
        """Who has to do something before it can happen."""

    def give_up(self, rank: int) -> None:
        """``rank`` waits no longer."""


class Meeting:
    """One collective under way: who has come, and what each has brought."""

    def __init__(self, group: Group, operation: Operation, terms: tuple[object, ...], number: int) -> None:
        self.group = group
        self.operation = operation
        self.terms = terms
        self.number = number
        self.first = -1  # world rank of the first to come, for the message about a mismatch
        self.offers: dict[int, Any] = {}
        self.results: Any = None
        self.at: float | None = None
        self.raised: Exception | None = None  # by moving the data: every rank raises it, and the group goes on
        self.error: str | None = None  # the ranks do not agree on what they do: this group has come to its end
        self.cost_s = 0.0

    def __str__(self) -> str:
        return f"{self.operation.name} #{self.number}{self.group.label}"

    def due(self) -> float | None:
        """When the last rank has come and the data has moved."""
        return self.at

    def missing(self) -> str:
        """The ranks that have not come."""
        members = self.group.members
        return name_ranks([r for i, r in enumerate(members) if i not in self.offers] or members)

    def give_up(self, rank: int) -> None:
        """Nobody may complete this meeting any more: it would write into memory whose owner has gone."""
        self.error = self.error or f"{self}: rank {rank} has given up waiting for {self.missing()}"


class Message(NamedTuple):
    """A tensor on its way; the order of the fields is the order in which a receiver from anyone takes them."""

    at: float
    source: int
    tensor: Tensor


class Receive:
    """A rank waiting for a message of ``tag`` from ``frm`` (None: anyone)."""

    cost_s = 0.0

    def __init__(self, group: Group, rank: int, frm: int | None, tag: int) -> None:
        self.group, self.rank, self.frm, self.tag = group, rank, frm, tag

    def __str__(self) -> str:
        frm = "anyone" if self.frm is None else f"rank {self.group.members[self.frm]}"
        return f"recv(from {frm}, tag {self.tag}){self.group.label}"

    def _candidates(self) -> list[Message]:
        box = self.group.mailboxes[self.rank]
        sources = range(len(self.group.members)) if self.frm is None else (self.frm,)
        return [box[s, self.tag][0] for s in sources if box.get((s, self.tag))]

    def due(self) -> float | None:
        """The earliest arrival of a matching message."""
        return min((m.at for m in self._candidates()), default=None)

    def missing(self) -> str:
        """The sender."""
        members = self.group.members
        return "a message from anyone" if self.frm is None else f"a message from rank {members[self.frm]}"

    def give_up(self, rank: int) -> None:
        """A later receive may still take the message."""

    def take(self) -> Message:
        """The first matching message: by arrival, then by rank of the sender."""
        message = min(self._candidates(), key=lambda m: m[:2])
        self.group.mailboxes[self.rank][message.source, self.tag].popleft()
        return message


@dataclass
class Elapsed:
    """A rank's own time passing, in ``doing``."""

    at: float
    doing: str
    cost_s: float

    def __str__(self) -> str:
        return self.doing

    def due(self) -> float | None:
        """Always known."""
        return self.at

    def missing(self) -> str:
        """Nobody."""
        return "nobody"

    def give_up(self, rank: int) -> None:
        """Cannot happen: it is due from the start."""


class Turns:
    """A lock: who has it, and who comes next, in the order of asking."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.queue: deque[tuple[int, int]] = deque()  # (group's index, world's rank); the first one has the lock
        self.free_at = 0.0  # when the last holder gave it back, on the world's clock

    def __str__(self) -> str:
        return self.label


class Turn:
    """A rank waiting for its turn with a lock."""

    cost_s = 0.0

    def __init__(self, turns: Turns, index: int, rank: int) -> None:
        self.turns, self.me = turns, (index, rank)

    def __str__(self) -> str:
        return str(self.turns)

    def due(self) -> float | None:
        """When the rank before gave the lock back."""
        return self.turns.free_at if self.turns.queue[0] == self.me else None

    def missing(self) -> str:
        """Who has it."""
        return f"{name_ranks([self.turns.queue[0][1]])}, which holds it"

    def give_up(self, rank: int) -> None:
        """Leave the queue."""
        self.turns.queue.remove(self.me)


class Counters:
    """A board: every rank's counter, the least and the most of them, and when one of them changed last."""

    def __init__(self, size: int) -> None:
        self.values = [0] * size
        self.least = self.most = 0
        self.changed_at = 0.0
        self._at = {0: size}  # how many counters stand at a value
        #: Waits under way for which a change of neither least nor most is enough.
        self.careful = 0
        #: Who waits, by rank of the world.
        self.waiting: set[int] = set()

    def post(self, index: int, value: int, at: float) -> bool:
        """Set one of them; whether some wait may be over by it."""
        before, self.values[index] = self.values[index], value
        self.changed_at = at
        standing = self._at
        standing[value] = standing.get(value, 0) + 1
        standing[before] -= 1
        changed = self.careful > 0
        if not standing[before]:
            del standing[before]
            if before == self.least:  # the one that was behind all others
                self.least = min(standing)
                changed = True
        if value > self.most:
            self.most = value
            changed = True
        return changed


class FarEnough:
    """A rank waiting until all counters of a board are at least ``least``, but that of ``me``; or that of ``only``.

    Whoever waits has as a rule come so far itself; then it is the least of all counters that decides, and neither
    asking nor posting takes longer the more ranks there are. It is due at the last change: whoever waits already is
    asked at every change that matters, and whoever comes later goes on at once.
    """

    cost_s = 0.0

    def __init__(
        self, counters: Counters, members: Sequence[int], least: int, doing: str, *, me: int, only: int | None = None
    ) -> None:
        self.counters, self.members, self.least, self.doing = counters, members, least, doing
        self._me, self._only = me, only
        self.careful = only is not None or counters.values[me] < least

    def __str__(self) -> str:
        return self.doing

    @property
    def among(self) -> Sequence[int]:
        """Whose counters are waited for."""
        return [p for p in range(len(self.members)) if p != self._me] if self._only is None else [self._only]

    def due(self) -> float | None:
        """When the last of them came so far."""
        counters, least = self.counters, self.least
        if self.careful:
            return counters.changed_at if all([counters.values[i] >= least for i in self.among]) else None
        return counters.changed_at if counters.least >= least else None

    def missing(self) -> str:
        """Who is behind."""
        return name_ranks([self.members[i] for i in self.among if self.counters.values[i] < self.least])

    def give_up(self, rank: int) -> None:
        """Nothing is promised to a rank that waits."""


class OneFarEnough(FarEnough):
    """A rank waiting until one of these counters is."""

    def __init__(self, counters: Counters, members: Sequence[int], least: int, doing: str, *, me: int) -> None:
        super().__init__(counters, members, least, doing, me=me)
        self.careful = False

    @property
    def among(self) -> Sequence[int]:
        """All."""
        return range(len(self.members))

    def due(self) -> float | None:
        """When the first of them came so far."""
        return self.counters.changed_at if self.counters.most >= self.least else None


class Group:
    """The ranks of one communicator and what lies between them."""

    def __init__(self, members: tuple[int, ...], label: str = "") -> None:
        self.members = members
        self.label = label
        self.meeting: Meeting | None = None
        self.held: dict[str, int] = defaultdict(int)  # meetings so far, by operation
        self.mailboxes: list[dict[tuple[int, int], deque[Message]]] = [defaultdict(deque) for _ in members]

    def join(self, index: int, operation: Operation, terms: tuple[object, ...], offer: object) -> Meeting:
        """Come to the meeting under way, or open one."""
        meeting = self.meeting
        me = self.members[index]
        if meeting is None:
            self.held[operation.name] += 1
            meeting = self.meeting = Meeting(self, operation, terms, self.held[operation.name])
            meeting.first = me
        elif meeting.error is None and meeting.terms != terms:
            meeting.error = (
                f"rank {me} called {describe(terms)}, but rank {meeting.first} is in {meeting}, called as "
                f"{describe(meeting.terms)}: all ranks of a group call the same collectives in the same order, with "
                "equal shapes and dtypes"
            )
        if meeting.error is None:
            meeting.offers[index] = offer
        return meeting


def name_ranks(ranks: Sequence[int]) -> str:
    """``rank 3`` or ``ranks 0, 2``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(str(r) for r in ranks)}"


def amount(numel: object, dtype: object) -> str:
    """``3 float32``."""
    return f"{numel} {str(dtype).removeprefix('torch.')}"


def describe(terms: tuple[object, ...]) -> str:
    """What a rank asked for: ``all_reduce(3 float32, weighted)``."""
    name, numel, dtype, detail = terms
    how = f"slices {detail}" if isinstance(detail, tuple) else str(detail)
    return f"{name}({', '.join(x for x in ('' if numel is None else amount(numel, dtype), how) if x)})"
