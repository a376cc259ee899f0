"""Where instances come in to a graph, and where their outputs come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from manyhands.partition.ampnet.message import Message, State
from manyhands.partition.ampnet.nodes.node import Node, Sent, Store


@dataclass(frozen=True, eq=False)
class Source(Node):
    """Where instances come in: ``pick(inputs) → (tensors, counters)`` of an instance's rows of the batch's inputs.

    Sends one message an instance, with the counters in its state; when it is back, that part of the instance is over.
    """

    pick: Callable[[Any], tuple[tuple[Tensor, ...], dict[str, int]]]

    @property
    def ways_in(self) -> int:
        return 0

    def begin(self, key: int, inputs: Any) -> Message:
        """The message of instance ``key``."""
        payload, counters = self.pick(inputs)
        return Message(tuple(payload), State.of(key, **counters))

    def forward(self, port: int, message: Message, store: Store) -> Sent:
        raise AssertionError("nothing leads to a source")

    def backward(self, port: int, message: Message, store: Store) -> Sent:
        return []


@dataclass(frozen=True, eq=False)
class Loss(Node):
    """Where an instance's output comes to, once: the runtime compares it with the target and sends back the gradient.

    The loss itself is the task's.
    """

    @property
    def ways_out(self) -> int:
        return 0

    def forward(self, port: int, message: Message, store: Store) -> Sent:
        raise AssertionError("the runtime takes what comes to the loss")

    def backward(self, port: int, message: Message, store: Store) -> Sent:
        raise AssertionError("gradients begin at the loss")
