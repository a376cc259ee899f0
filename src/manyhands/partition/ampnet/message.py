"""What passes along the edges of an AMPNet graph: a payload, and the state that says what it belongs to.

A state is a small hashable record: the instance's key, and counters such as a position in a list or a place in a tree.
Nodes route, join and store by states alone, so that messages of many instances are on their way at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

#: Tensors that flow on. Going back: their gradients; None where there is none.
Payload = tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class State:
    """The instance's key, and counters by name, in the order of their names."""

    key: int
    counters: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, key: int, **counters: int) -> State:
        """``State.of(7, t=0)``."""
        return cls(key).put(**counters)

    def __getitem__(self, name: str) -> int:
        for at, value in self.counters:
            if at == name:
                return value
        raise KeyError(f"state {self} has no counter {name!r}")

    def __contains__(self, name: object) -> bool:
        return any(at == name for at, _ in self.counters)

    def put(self, **counters: int) -> State:
        """The same with these counters, which replace those of the same names."""
        return State(self.key, tuple(sorted((dict(self.counters) | counters).items())))

    def without(self, *names: str) -> State:
        """The same without these counters."""
        return State(self.key, tuple((at, value) for at, value in self.counters if at not in names))

    def __str__(self) -> str:
        return f"instance {self.key}" + (
            f" [{', '.join(f'{n}={v}' for n, v in self.counters)}]" if self.counters else ""
        )


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """A payload and its state. A tensor on its way forward that wants a gradient says so by ``requires_grad``."""

    payload: Payload
    state: State
