"""How replicas agree: `Strategy` describes it, `Worker` is one rank's live state of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
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
    """Payload bytes and messages that one rank sends per step, under the operations' reference algorithms."""

    sent_B: int = 0
    messages: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent_B + other.sent_B, self.messages + other.messages)


@dataclass(frozen=True)
class Setting:
    """What a strategy may ask of the plan it stands in, to check itself before anything starts."""

    workers: int
    transport: str
    shares_memory: bool
    elementwise: bool  # the optimizer updates element by element, so that an update may be cut anywhere
    stateless: bool  # the optimizer keeps no state between steps (plain SGD)
    clip: bool = False  # gradients are clipped by their global norm


@dataclass(frozen=True)
class Strategy(ABC):
    """Description of a strategy: comparable, printable (`str` parses back), enumerable."""

    name: ClassVar[str]
    paper: ClassVar[Reference]
    #: Promise 2: after every step all workers hold bit-identical parameters.
    identical: ClassVar[bool] = False
    #: Every worker computes on the whole global batch rather than on a share of it.
    whole_batch: ClassVar[bool] = False

    def __str__(self) -> str:
        return format_description(self.name, self)

    @abstractmethod
    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """Payload per rank and step for one piece of ``numel`` elements; pure."""

    @abstractmethod
    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's live worker. Collective over ``comm``."""

    def exact(self, setting: Setting) -> bool:
        """Promise 1: N workers equal one worker on the joined batch, up to summation order."""
        return False

    def problems(self, setting: Setting) -> list[Problem]:
        """What cannot work in this setting; found when the plan is made."""
        return []

    def resolve(self, setting: Setting) -> Strategy:
        """The same strategy with every ``auto`` decided."""
        return self

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

    @abstractmethod
    def step(self, batch: Batch) -> Tensor:
        """One training step on this worker's share; returns the local loss (0-dim). May communicate.

        Calls ``replica.gradients`` exactly once; workers that update alike settle what it has reached.
        """

    def consensus(self) -> Parameters:
        """What `finish` would agree on now; for evaluation, export and checkpoints. Collective, counted apart."""
        return tuple(piece.flat for piece in self.replica.pieces)

    def finish(self) -> None:
        """Adopt the consensus. Collective."""
        for piece, agreed in zip(self.replica.pieces, self.consensus(), strict=True):
            if piece.flat.data_ptr() != agreed.data_ptr():
                piece.flat.copy_(agreed)

    def state_dict(self) -> dict[str, Any]:
        """Everything of this rank that an exact resume needs beyond parameters and optimizer: tensors and numbers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but was given {sorted(state)}")
