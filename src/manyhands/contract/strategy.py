"""How replicas agree: `Strategy` describes it, `Worker` is one rank's live state of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.communication.communicator import Communicator
from manyhands.contract.replica import Batch, Replica
from manyhands.errors import Problem
from manyhands.grammar import format_description

#: One flat tensor per piece of the replica, in the replica's order.
Parameters = tuple[Tensor, ...]


@dataclass(frozen=True)
class Traffic:
    """Payload bytes and messages that one rank sends at its exchanges, under the operations' reference algorithms.

    An exchange happens in the steps ``first``, ``first + every``, … (the first step is 1; ``first`` 0 means ``every``:
    at the end of each period). Exchanges of other periods are ``also``; traffics add up.

        Traffic(100, 2, every=16).sent_B_in(steps=40) == 200
    """

    sent_B: int = 0
    messages: int = 0
    every: int = 1
    first: int = 0
    also: tuple[Traffic, ...] = ()

    def __add__(self, other: Traffic) -> Traffic:
        parts = [*self._parts(), *other._parts()]
        periods = dict.fromkeys((part.every, part._first) for part in parts if part.sent_B or part.messages)
        joined = [
            Traffic(sum(p.sent_B for p in same), sum(p.messages for p in same), every, first)
            for every, first in periods
            for same in [[p for p in parts if (p.every, p._first) == (every, first)]]
        ]
        return replace(joined[0], also=tuple(joined[1:])) if joined else Traffic()

    @property
    def sent_B_per_step(self) -> float:
        """The mean over a long run."""
        return sum(part.sent_B / part.every for part in self._parts())

    def sent_B_in(self, steps: int, *, after: int = 0) -> int:
        """Bytes of the ``steps`` steps that follow the first ``after`` ones."""
        return sum(part.sent_B * part._exchanges(steps, after) for part in self._parts())

    def messages_in(self, steps: int, *, after: int = 0) -> int:
        """Messages of those steps."""
        return sum(part.messages * part._exchanges(steps, after) for part in self._parts())

    @property
    def _first(self) -> int:
        return self.first or self.every

    def _parts(self) -> tuple[Traffic, ...]:
        return (replace(self, also=()), *self.also)

    def _exchanges(self, steps: int, after: int) -> int:
        """How many of the steps ``after + 1 … after + steps`` are ``first + i · every``."""
        up_to = [max(0, (last - self._first) // self.every + 1) for last in (after + steps, after)]
        return up_to[0] - up_to[1]


@dataclass(frozen=True)
class Setting:
    """What a strategy may ask of the plan it stands in, to check itself before anything starts."""

    workers: int  # replicas of the model: those that have batches of their own
    transport: str
    shares_memory: bool
    elementwise: bool  # the optimizer updates element by element, so that an update may be cut anywhere
    stateless: bool  # the optimizer keeps no state between steps (plain SGD)
    clip: bool = False  # gradients are clipped by their global norm
    served: bool = True  # a parameter server can apply the optimizer
    one_sided: bool = False  # workers reach memory of each other's

    @property
    def servers_in_memory(self) -> bool:
        """Whether a parameter server is memory, common or reached one-sidedly, and needs no rank."""
        return self.shares_memory or self.one_sided


@dataclass(frozen=True)
class Strategy(ABC):
    """Description of a strategy: comparable, printable (`str` parses back), enumerable."""

    name: ClassVar[str]
    paper: ClassVar[Reference]
    #: Promise 2: after every step all workers hold bit-identical parameters.
    identical: ClassVar[bool] = False
    #: Every worker computes on the whole global batch rather than on a share of it.
    whole_batch: ClassVar[bool] = False
    #: It can do with a model that is cut, of which a worker holds some pieces alone and some along with others.
    bears_cuts: ClassVar[bool] = False
    #: It can do with stages: its workers meet others of the same stage alone, so what others hold is not its business.
    #: `start` gets that group.
    bears_stages: ClassVar[bool] = False
    #: It knows what to do with a piece of which only some rows have a gradient (see `Piece`); else pieces are dense.
    sparse: ClassVar[bool] = False
    #: The result is a function of task and plan: no race decides, and a resume is exact bit for bit.
    deterministic: ClassVar[bool] = True
    #: On shared and gloo the others go on when a worker (but 0) of one host is killed: who waits for it is told, and at
    #: the next `meet` membership shrinks. One that dies in that meeting, or in what it was called for, ends the run.
    survives: ClassVar[bool] = False
    #: Promise 1 for one worker: it is the user's optimizer and nothing else. False where a second rule works on top.
    plain_alone: ClassVar[bool] = True
    #: In every step all workers average their gradients and update with the mean, so that what they pass through
    #: together (dense layers that are cut along the data axis) may take part in the step.
    averages_gradients: ClassVar[bool] = False
    #: Its update is part of the cut (see `partition.cut_strategies`): what is on a rank updates within its own forward
    #: and backward, so that nothing is left to exchange or to update behind them.
    updates_within: ClassVar[bool] = False
    #: Where the network is cut it follows a schedule. Else messages go as they come: there are no micro-batches, and
    #: the order of what a step exchanges, and so its time, is known only when it is over.
    scheduled: ClassVar[bool] = True
    #: On servers a worker's step is its own whatever the others do, but for waiting: it can be measured by itself.
    by_itself: ClassVar[bool] = False
    #: Servers only add what is pushed to them, which costs them next to nothing.
    servers_add: ClassVar[bool] = False
    #: Why nothing is compressed, where there is no option ``compress``; completes "compress=top_k with hogwild: …".
    uncompressed: ClassVar[str] = "a worker sends there what others need as it is."
    #: What makes this strategy diverge where lock-step would not; completes "…, or with ssp, a smaller staleness=".
    steadier: ClassVar[str] = ""

    def __str__(self) -> str:
        return format_description(self.name, self)

    @property
    def servers_update(self) -> bool:
        """Whether servers apply the user's optimizer to what is pushed, and so must know it; a push costs an update."""
        return False

    @abstractmethod
    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """Payload per rank and step for one piece of ``numel`` elements; pure."""

    def traffic_of(self, shapes: Sequence[tuple[int, ...]], size: int, itemsize: int = 4) -> Traffic:
        """`traffic` for a piece of tensors of these ``shapes``, where more than their number of elements matters."""
        return self.traffic(sum(map(math.prod, shapes)), size, itemsize)

    @abstractmethod
    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's live worker. Collective over ``comm``."""

    def exact(self, setting: Setting) -> bool:
        """Promise 1: N workers equal one worker on the joined batch, up to summation order."""
        return False

    def problems(self, setting: Setting) -> list[Problem]:
        """What cannot work in this setting; found when the plan is made."""
        return []

    def server_ranks(self, *, in_memory: bool) -> int:
        """How many ranks beyond the workers' it wants, to serve; reached by ``comm.servers``.

        ``in_memory``: servers are memory here, see `Setting.servers_in_memory`.
        """
        return 0

    def resolve(self, setting: Setting) -> Strategy:
        """The same strategy with every ``auto`` decided."""
        return self

    @property
    def sends_at_most(self) -> bool:
        """`traffic` is a bound: what is really sent depends on who is late, or has anything to send."""
        return False

    #: Whether all ranks send the like to others and receive the like, so that one of them can be measured alone.
    alike: ClassVar[bool] = False

    @property
    def lockstep(self) -> bool:
        """All workers exchange in every step: what stops one stops all in that very step."""
        return True

    @property
    def parameters(self) -> Literal["common", "own"]:
        """``common``: workers hold equal parameters whenever they compute and each element has one writer, so one
        copy in shared memory serves all. ``own``: every worker has a copy of its own.
        """
        return "own"


class Worker(ABC):
    """One rank's live state of a strategy."""

    def __init__(self, replica: Replica, comm: Communicator) -> None:
        self.replica = replica
        self.comm = comm
        self.ranks = list(range(comm.size))  # of the workers that are left, as they were numbered at the start

    @abstractmethod
    def step(self, batch: Batch) -> Tensor:
        """One training step on this worker's share; returns the local loss (0-dim). May communicate.

        Calls ``replica.gradients`` exactly once; workers that update alike settle what it has reached. A loss that is
        not finite raises `NonFiniteLoss` on all workers: at once in lock-step strategies, in the others when they next
        exchange or `meet`.
        """

    @property
    def stands_still(self) -> bool:
        """Whether this worker has met a loss that is not finite and waits for the others to be told."""
        return False

    def meet(self) -> None:
        """Workers that go their own ways come together: raises on all of them what has stopped one. Collective.

        The loop calls it before every evaluation, checkpoint and end; so does a worker itself that must stop, and the
        two are one. Nothing to do where every step is a meeting.
        """
        return

    def leave_out_the_lost(self) -> None:
        """The beginning of a `meet`: where the others go on without a worker that was killed (see
        `Strategy.survives`), they are from here on a group of their own. Collective.
        """
        lost = self.comm.agree_on_lost()
        if lost:
            self.ranks = [rank for p, rank in enumerate(self.ranks) if p not in lost]
            self.regroup(self.comm.without(lost))

    def consensus(self) -> Parameters:
        """What `finish` would agree on now; for evaluation, export and checkpoints. Collective, counted apart."""
        return tuple(piece.flat for piece in self.replica.pieces)

    def finish(self) -> None:
        """Adopt the consensus. Collective."""
        for piece, agreed in zip(self.replica.pieces, self.consensus(), strict=True):
            if piece.flat.data_ptr() != agreed.data_ptr():
                piece.flat.copy_(agreed)

    @property
    def staleness(self) -> Mapping[int, int]:
        """How often a gradient was taken at parameters that lacked so many updates (under ssp: steps) of others."""
        return {}

    def regroup(self, comm: Communicator) -> None:
        """Some workers are gone; ``comm`` is the group of the others. What all have in common goes on as it is.

        Called where `Strategy.survives` holds, by `leave_out_the_lost`.
        """
        self.comm = comm

    def rebase(self) -> None:
        """The replica's parameters have been replaced by everybody's: what is derived from them (a centre, what a
        server keeps) follows. Collective; `load_state_dict` comes after it, if the workers are the same.
        """
        return

    def state_dict(self) -> dict[str, Any]:
        """Everything of this rank that an exact resume needs beyond parameters and optimizer: tensors and numbers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but was given {sorted(state)}")
