"""Several messages of one state and one message of it: `Concat`, `Split`, `Broadcast`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from manyhands.errors import BadInput
from manyhands.partition.ampnet.message import Message
from manyhands.partition.ampnet.nodes.node import Node, Sent, Store
from manyhands.partition.ampnet.nodes.payload import added, joined, marked, only


@dataclass(frozen=True, eq=False)
class Concat(Node):
    """Messages of one state, one from each port, become one: tensors joined along ``dim``; None: side by side."""

    ways: int = 2
    dim: int | None = None

    @property
    def ways_in(self) -> int:
        return self.ways

    def forward(self, port: int, message: Message, store: Store) -> Sent:
        come = store.join(message.state, port, message, self.ways)
        if come is None:
            return []
        if self.dim is None:
            store.keep(message.state, [len(m.payload) for m in come])
            return [(0, Message(tuple(x for m in come for x in m.payload), message.state))]
        parts = [only(m) for m in come]
        store.keep(message.state, [x.shape[self.dim] for x in parts])
        return [(0, Message((marked(torch.cat(parts, self.dim), parts),), message.state))]

    def backward(self, port: int, message: Message, store: Store) -> Sent:
        sizes = store.take(message.state)
        if self.dim is None:
            ends = [sum(sizes[: i + 1]) for i in range(self.ways)]
            parts = [message.payload[end - n : end] for n, end in zip(sizes, ends, strict=True)]
        else:
            (g,) = message.payload
            parts = [(None,)] * self.ways if g is None else [(x,) for x in g.split_with_sizes(sizes, self.dim)]
        return [(i, Message(part, message.state)) for i, part in enumerate(parts)]

    def widths(self, before: Sequence[int | None]) -> list[int | None]:
        if self.dim != -1 or None in before:
            return [None]
        return [sum(w for w in before if w is not None)]


@dataclass(frozen=True, eq=False)
class Split(Node):
    """A message becomes one for each port: its tensor cut into ``sizes`` along ``dim``; None: so many tensors each."""

    sizes: tuple[int, ...]
    dim: int | None = None

    @property
    def ways_out(self) -> int:
        return len(self.sizes)

    def forward(self, port: int, message: Message, store: Store) -> Sent:
        if self.dim is None:
            if len(message.payload) != sum(self.sizes):
                raise BadInput(f"a split into {self.sizes} tensors was sent {len(message.payload)}.")
            ends = [sum(self.sizes[: i + 1]) for i in range(self.ways_out)]
            parts = [message.payload[end - n : end] for n, end in zip(self.sizes, ends, strict=True)]
        else:
            x = only(message)
            parts = [(marked(part, [x]),) for part in x.split_with_sizes(list(self.sizes), self.dim)]
        store.keep(message.state, [None if self.dim is None else part[0] for part in parts])
        return [(i, Message(part, message.state)) for i, part in enumerate(parts)]

    def backward(self, port: int, message: Message, store: Store) -> Sent:
        back = store.join(message.state, port, message, self.ways_out)
        if back is None:
            return []
        likes = store.take(message.state)
        if self.dim is None:
            return [(0, Message(tuple(g for m in back for g in m.payload), message.state))]
        return [(0, Message((joined([m.payload[0] for m in back], likes, self.dim),), message.state))]

    def widths(self, before: Sequence[int | None]) -> list[int | None]:
        if self.dim != -1:
            return [None] * self.ways_out
        if before[0] is not None and before[0] != sum(self.sizes):
            raise ValueError(f"cuts {sum(self.sizes)} features and is sent {before[0]}")
        return list(self.sizes)


@dataclass(frozen=True, eq=False)
class Broadcast(Node):
    """A message goes to every port; their gradients are added in the order of the ports."""

    ways: int = 2

    @property
    def ways_out(self) -> int:
        return self.ways

    def forward(self, port: int, message: Message, store: Store) -> Sent:
        store.keep(message.state, None)
        return [(i, message) for i in range(self.ways)]

    def backward(self, port: int, message: Message, store: Store) -> Sent:
        back = store.join(message.state, port, message, self.ways)
        if back is None:
            return []
        store.take(message.state)
        return [(0, Message(added([m.payload for m in back]), message.state))]

    def widths(self, before: Sequence[int | None]) -> list[int | None]:
        return [before[0]] * self.ways
