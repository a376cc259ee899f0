"""Messages of several states and one message: `Ungroup`, `Flatmap`, and `Group`, which has the data decide how many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from manyhands.errors import BadInput
from manyhands.partition.ampnet.message import Message, Payload, State
from manyhands.partition.ampnet.nodes.node import Node, Sent, Store
from manyhands.partition.ampnet.nodes.payload import added, joined, marked, tensor

#: The states that one message becomes messages of, from its own state and payload.
ToStates = Callable[[State, Payload], Sequence[State]]


@dataclass(frozen=True, eq=False)
class Ungroup(Node):
    """A message becomes one for each row of its tensors (which keep their first dim), of the states ``to``."""

    to: ToStates
    changes_state: ClassVar[bool] = True

    def forward(self, port: int, message: Message, store: Store) -> Sent:
        states = _distinct(self.to(message.state, message.payload), message.state)
        tensors = [x for x in message.payload if x is not None]
        if len(tensors) != len(message.payload) or any(len(x) != len(states) for x in tensors):
            raise BadInput(f"{message.state}: {len(states)} states for tensors of {[len(x) for x in tensors]} rows.")
        for i, state in enumerate(states):
            store.keep(state, (message.state, i, states, tensors))
        return [
            (0, Message(tuple(marked(x[i : i + 1], [x]) for x in tensors), state)) for i, state in enumerate(states)
        ]

    def backward(self, port: int, message: Message, store: Store) -> Sent:
        before, i, states, tensors = store.held[message.state]
        back = store.join(before, i, message, len(states))
        if back is None:
            return []
        for state in states:
            store.take(state)
        gradients = [joined([m.payload[k] for m in back], [x[:1]] * len(states), 0) for k, x in enumerate(tensors)]
        return [(0, Message(tuple(gradients), before))]

    def widths(self, before: Sequence[int | None]) -> list[int | None]:
        return [None]


@dataclass(frozen=True, eq=False)
class Flatmap(Node):
    """A message goes on once for each of the states ``to``, the whole of it; gradients are added in their order."""

    to: ToStates
    changes_state: ClassVar[bool] = True

    def forward(self, port: int, message: Message, store: Store) -> Sent:
        states = _distinct(self.to(message.state, message.payload), message.state)
        for i, state in enumerate(states):
            store.keep(state, (message.state, i, states))
        return [(0, Message(message.payload, state)) for state in states]

    def backward(self, port: int, message: Message, store: Store) -> Sent:
        before, i, states = store.held[message.state]
        back = store.join(before, i, message, len(states))
        if back is None:
            return []
        for state in states:
            store.take(state)
        return [(0, Message(added([m.payload for m in back]), before))]

    def widths(self, before: Sequence[int | None]) -> list[int | None]:
        return [before[0]]


@dataclass(frozen=True, eq=False)
class Group(Node):
    """Messages of which ``by(state)`` is the same become one of that state: tensors joined along their first dim.

    In the order of ``place(state)``, which counts from 0; ``count`` of the common state says how many belong together.
    """

    by: Callable[[State], State]
    place: Callable[[State], int]
    count: Callable[[State], int]
    changes_state: ClassVar[bool] = True

    def forward(self, port: int, message: Message, store: Store) -> Sent:
        state = self.by(message.state)
        come = store.join(state, self.place(message.state), message, self.count(state))
        if come is None:
            return []
        columns = [[tensor(m.payload[k]) for m in come] for k in range(len(message.payload))]
        store.keep(state, ([m.state for m in come], [len(x) for x in columns[0]]))
        return [(0, Message(tuple(marked(torch.cat(column), column) for column in columns), state))]

    def backward(self, port: int, message: Message, store: Store) -> Sent:
        states, sizes = store.take(message.state)
        columns = [[None] * len(states) if g is None else g.split_with_sizes(sizes) for g in message.payload]
        return [(0, Message(tuple(column[i] for column in columns), state)) for i, state in enumerate(states)]

    def widths(self, before: Sequence[int | None]) -> list[int | None]:
        return [None]


def _distinct(states: Sequence[State], of: State) -> list[State]:
    made = list(states)
    if not made or len(set(made)) < len(made) or any(s.key != of.key for s in made):
        raise BadInput(f"{of} becomes {len(made)} states of its instance: there must be one or more, all different.")
    return made
