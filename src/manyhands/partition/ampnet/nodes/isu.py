"""Changes of state with a way back (`Isu`, an invertible state update), such as a loop's counter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from manyhands.errors import BadInput
from manyhands.partition.ampnet.message import Message, State
from manyhands.partition.ampnet.nodes.node import Node, Sent, Store


@dataclass(frozen=True)
class Add:
    """A change of state: a counter grows ``by`` so much. Its inverse is another."""

    name: str
    by: int = 1

    def __call__(self, state: State) -> State:
        return state.put(**{self.name: state[self.name] + self.by})

    @property
    def inverse(self) -> Add:
        """The way back."""
        return Add(self.name, -self.by)


@dataclass(frozen=True)
class Begin:
    """A change of state: a counter that was not there begins at ``value``."""

    name: str
    value: int = 0

    def __call__(self, state: State) -> State:
        if self.name in state:
            raise BadInput(f"counter {self.name!r} begins, but {state} has it already.")
        return state.put(**{self.name: self.value})

    @property
    def inverse(self) -> Drop:
        """The way back."""
        return Drop(self.name)


@dataclass(frozen=True)
class Drop:
    """A change of state: these counters go. What they were must be remembered, so it has no inverse of its own."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)

    def __call__(self, state: State) -> State:
        return state.without(*self.names)


@dataclass(frozen=True, eq=False)
class Isu(Node):
    """An invertible change of state. ``inverse=None``: that of ``change`` if it has one; else states are remembered."""

    change: Callable[[State], State]
    inverse: Callable[[State], State] | None = None
    changes_state: ClassVar[bool] = True

    @property
    def _back(self) -> Callable[[State], State] | None:
        return self.inverse or getattr(self.change, "inverse", None)

    def forward(self, port: int, message: Message, store: Store) -> Sent:
        after, back = self.change(message.state), self._back
        if back is None:
            store.keep(after, message.state)
        elif back(after) != message.state:
            raise BadInput(
                f"the inverse of a change of state takes {after} to {back(after)}, and it came from {message.state}."
            )
        return [(0, Message(message.payload, after))]

    def backward(self, port: int, message: Message, store: Store) -> Sent:
        before = store.take(message.state) if self._back is None else self._back(message.state)
        return [(0, Message(message.payload, before))]

    def widths(self, before: Sequence[int | None]) -> list[int | None]:
        return [before[0]]

    def __str__(self) -> str:
        return f"Isu({self.change})"
