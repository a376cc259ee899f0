"""Branches and their joins, by state alone: `Cond` and `Phi`. A loop is a branch that leads back to a join."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from manyhands.errors import BadInput
from manyhands.partition.ampnet.message import Message, State
from manyhands.partition.ampnet.nodes.node import Node, Sent, Store


@dataclass(frozen=True, eq=False)
class Cond(Node):
    """A branch: a message leaves by the port that ``choose(state)`` says, True being 1."""

    choose: Callable[[State], int]
    ways: int = 2

    @property
    def ways_out(self) -> int:
        return self.ways

    def forward(self, port: int, message: Message, store: Store) -> Sent:
        way = int(self.choose(message.state))
        if not 0 <= way < self.ways:
            raise BadInput(f"a branch of {self.ways} ways chose way {way} for {message.state}.")
        return [(way, message)]

    def backward(self, port: int, message: Message, store: Store) -> Sent:
        return [(0, message)]

    def widths(self, before: Sequence[int | None]) -> list[int | None]:
        return [before[0]] * self.ways


@dataclass(frozen=True, eq=False)
class Phi(Node):
    """A join of branches or of a loop: whatever comes goes on, and its gradient goes back the way it came."""

    ways: int = 2

    @property
    def ways_in(self) -> int:
        return self.ways

    def forward(self, port: int, message: Message, store: Store) -> Sent:
        store.keep(message.state, port)
        return [(0, message)]

    def backward(self, port: int, message: Message, store: Store) -> Sent:
        return [(store.take(message.state), message)]

    def widths(self, before: Sequence[int | None]) -> list[int | None]:
        known = {w for w in before if w is not None}
        if len(known) > 1:
            raise ValueError(f"joins branches of {' and '.join(map(str, sorted(known)))} features")
        return [known.pop() if known else None]
