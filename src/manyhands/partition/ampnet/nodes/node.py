"""What a node of an AMPNet graph is, and what it holds of the instances that are on their way.

A node says what it makes of a message that comes forward and of a gradient that comes back. The invariant of all nodes:
each message that has gone along an edge forward comes back along it once, with the same state and the gradient of its
payload, or with None where none is wanted. A node stores what it needs for that under the state, and the message that
comes back frees it. So when an instance's messages are back where they came from, nobody holds anything of it.

A node is a description; what it holds for one run lies in a `Store`. Structural nodes use operations of torch alone,
so a graph may also be run with autograd's own graph through them (`Graph.forward`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from manyhands.errors import BadInput
from manyhands.partition.ampnet.message import Message

#: Messages by the port they leave through (forward: an out port, backward: an in port).
Sent = list[tuple[int, Message]]


@dataclass
class Store:
    """What one node holds: for gradients that will come back, and of joins that wait for more."""

    learning: bool = True
    held: dict[Hashable, Any] = field(default_factory=dict)
    joining: dict[Hashable, dict[int, Message]] = field(default_factory=dict)

    def keep(self, state: Hashable, what: Any) -> None:
        """Hold ``what`` until the gradient of ``state`` comes back; nothing is held where none will."""
        if not self.learning:
            return
        if state in self.held:
            raise BadInput(
                f"two messages of {state} are on their way at once: a loop or a branch must change the state."
            )
        self.held[state] = what

    def take(self, state: Hashable) -> Any:
        """What was held, which is then free."""
        if state not in self.held:
            raise BadInput(f"a gradient of {state} came back for which nothing is held.")
        return self.held.pop(state)

    def join(self, state: Hashable, port: int, message: Message, ways: int) -> list[Message] | None:
        """All ``ways`` messages in order of their ports once the last of them has come, until then None."""
        waiting = self.joining.setdefault(state, {})
        if port in waiting:
            raise BadInput(f"two messages of {state} came for the same place of a join.")
        waiting[port] = message
        if len(waiting) < ways:
            return None
        del self.joining[state]
        return [waiting[i] for i in range(ways)]

    @property
    def empty(self) -> bool:
        """Whether nothing of any instance is left."""
        return not self.held and not self.joining

    def left(self) -> str:
        """The first thing that is left, for messages."""
        if self.joining:
            state, come = next(iter(self.joining.items()))
            return f"has {len(come)} messages of {state} and waits for the others"
        return f"waits for the gradient of {next(iter(self.held))}"


class Node(ABC):
    """A description. Ports are numbered from 0; ``ways_in`` and ``ways_out`` say how many there are."""

    #: Whether what leaves has another state than what came, so that a loop may lead through it.
    changes_state: ClassVar[bool] = False

    @property
    def ways_in(self) -> int:
        """Ports that messages come in by."""
        return 1

    @property
    def ways_out(self) -> int:
        """Ports that messages leave by."""
        return 1

    @abstractmethod
    def forward(self, port: int, message: Message, store: Store) -> Sent:
        """What leaves, by out port, when ``message`` has come in by ``port``."""

    @abstractmethod
    def backward(self, port: int, message: Message, store: Store) -> Sent:
        """What goes back, by in port, when the gradient ``message`` has come back by out port ``port``."""

    def widths(self, before: Sequence[int | None]) -> list[int | None]:
        """The last dim of what leaves each port, from that of what comes in by each; None: not known.

        Raises ValueError where they do not fit.
        """
        return [None] * self.ways_out

    def __str__(self) -> str:
        return type(self).__name__
