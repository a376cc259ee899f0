"""The nodes of an AMPNet graph: what each makes of a message that comes forward, and of a gradient that comes back.

A. L. Gaunt, M. A. Johnson, M. Riechert, D. Tarlow, R. Tomioka, D. Vytiniotis, S. Webster (2017), AMPNet: asynchronous
model-parallel training for dynamic neural networks, arXiv 1705.09786, section 4 (the intermediate representation).

The invariant of all of them: each message that has gone along an edge forward comes back along it once, with the same
state and the gradient of its payload, or with None where none is wanted. A node stores what it needs for that under the
state, and the message that comes back frees it. So when an instance's messages are back where they came from, nobody
holds anything of it.

A node is a description; what it holds for one run lies in a `Store`. Structural nodes use operations of torch alone,
so a graph may also be run with autograd's own graph through them (`Graph.forward`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from manyhands.errors import BadInput
from manyhands.partition.ampnet.message import Message, Payload, State

#: Messages by the port they leave through (forward: an out port, backward: an in port).
Sent = list[tuple[int, Message]]
#: The states that one message becomes messages of, from its own state and payload.
ToStates = Callable[[State, Payload], Sequence[State]]


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
class Transform(Node):
    """A module: called with the tensors of the payload, gives a tensor or a tuple of them.

    With trainable parameters it is AMPNet's *parameterised payload transform*, which gathers gradients and updates on
    its own; without, its plain one. Inputs and autograd's graph are stored until the gradient comes back.
    """

    module: nn.Module

    @property
    def learns(self) -> bool:
        """Whether it has trainable parameters."""
        return any(p.requires_grad for p in self.module.parameters())

    def forward(self, port: int, message: Message, store: Store) -> Sent:
        if not store.learning:
            return [(0, Message(_tuple(self.module(*self._given(message.payload))), message.state))]
        leaves = [x if x is None else x.detach().requires_grad_(x.requires_grad) for x in message.payload]
        with torch.enable_grad():
            made = _tuple(self.module(*self._given(leaves)))
        store.keep(message.state, (leaves, made))
        return [(0, Message(tuple(x.detach().requires_grad_(x.requires_grad) for x in made), message.state))]

    def _given(self, payload: Sequence[Tensor | None]) -> list[Tensor | None]:
        """A module that overwrites its input gets a copy: what it was sent may be stored elsewhere."""
        if any(getattr(m, "inplace", False) for m in self.module.modules()):
            return [x if x is None else x.clone() for x in payload]
        return list(payload)

    def backward(self, port: int, message: Message, store: Store) -> Sent:
        leaves, made = store.take(message.state)
        pairs = [(x, g) for x, g in zip(made, message.payload, strict=True) if g is not None and x.requires_grad]
        if pairs:
            torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
        return [(0, Message(tuple(None if x is None else x.grad for x in leaves), message.state))]

    def widths(self, before: Sequence[int | None]) -> list[int | None]:
        takes, gives = width_of(self.module)
        if takes is not None and before[0] is not None and takes != before[0]:
            raise ValueError(f"takes {takes} features and is sent {before[0]}")
        return [gives]

    def __str__(self) -> str:
        n = sum(p.numel() for p in self.module.parameters())
        return f"Transform({type(self.module).__name__}, {n:,} parameters)"


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
        parts = [_only(m) for m in come]
        store.keep(message.state, [x.shape[self.dim] for x in parts])
        return [(0, Message((_marked(torch.cat(parts, self.dim), parts),), message.state))]

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
            x = _only(message)
            parts = [(_marked(part, [x]),) for part in x.split_with_sizes(list(self.sizes), self.dim)]
        store.keep(message.state, [None if self.dim is None else part[0] for part in parts])
        return [(i, Message(part, message.state)) for i, part in enumerate(parts)]

    def backward(self, port: int, message: Message, store: Store) -> Sent:
        back = store.join(message.state, port, message, self.ways_out)
        if back is None:
            return []
        likes = store.take(message.state)
        if self.dim is None:
            return [(0, Message(tuple(g for m in back for g in m.payload), message.state))]
        return [(0, Message((_joined([m.payload[0] for m in back], likes, self.dim),), message.state))]

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
        return [(0, Message(_added([m.payload for m in back]), message.state))]

    def widths(self, before: Sequence[int | None]) -> list[int | None]:
        return [before[0]] * self.ways


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
            (0, Message(tuple(_marked(x[i : i + 1], [x]) for x in tensors), state)) for i, state in enumerate(states)
        ]

    def backward(self, port: int, message: Message, store: Store) -> Sent:
        before, i, states, tensors = store.held[message.state]
        back = store.join(before, i, message, len(states))
        if back is None:
            return []
        for state in states:
            store.take(state)
        gradients = [_joined([m.payload[k] for m in back], [x[:1]] * len(states), 0) for k, x in enumerate(tensors)]
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
        return [(0, Message(_added([m.payload for m in back]), before))]

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
        columns = [[_tensor(m.payload[k]) for m in come] for k in range(len(message.payload))]
        store.keep(state, ([m.state for m in come], [len(x) for x in columns[0]]))
        return [(0, Message(tuple(_marked(torch.cat(column), column) for column in columns), state))]

    def backward(self, port: int, message: Message, store: Store) -> Sent:
        states, sizes = store.take(message.state)
        columns = [[None] * len(states) if g is None else g.split_with_sizes(sizes) for g in message.payload]
        return [(0, Message(tuple(column[i] for column in columns), state)) for i, state in enumerate(states)]

    def widths(self, before: Sequence[int | None]) -> list[int | None]:
        return [None]


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


def width_of(module: nn.Module) -> tuple[int | None, int | None]:
    """How many features, the last dim, a module takes and gives; None: not known without trying."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return None, module.embedding_dim
    if type(module) is nn.Sequential and len(module):
        takes, gives = width_of(module[0])
        for part in list(module)[1:]:
            elementwise = isinstance(part, nn.ReLU | nn.Tanh | nn.Sigmoid | nn.GELU | nn.Dropout | nn.LayerNorm)
            gives = gives if elementwise else width_of(part)[1]
        return takes, gives
    return None, None


def _tuple(made: Any) -> tuple[Tensor, ...]:
    made = (made,) if isinstance(made, Tensor) else made
    if not isinstance(made, tuple | list) or not all(isinstance(x, Tensor) for x in made):
        raise BadInput(f"its module returned a {type(made).__name__}; nodes send on a tensor or a tuple of tensors.")
    return tuple(made)


def _tensor(x: Tensor | None) -> Tensor:
    assert x is not None, "what flows forward are tensors"
    return x


def _only(message: Message) -> Tensor:
    if len(message.payload) != 1:
        raise BadInput(f"{message.state}: it joins and cuts one tensor a message, and was sent {len(message.payload)}.")
    return _tensor(message.payload[0])


def _marked(x: Tensor, made_of: Sequence[Tensor]) -> Tensor:
    """``x``, which wants a gradient if anything that it was made of does; autograd itself says so where it looks on."""
    if not torch.is_grad_enabled() and any(y.requires_grad for y in made_of):
        return x.detach().requires_grad_()
    return x


def _joined(gradients: Sequence[Tensor | None], likes: Sequence[Tensor], dim: int) -> Tensor | None:
    """Gradients side by side, zero where there is none; None if there is none at all."""
    if all(g is None for g in gradients):
        return None
    return torch.cat(
        [torch.zeros_like(like) if g is None else g for g, like in zip(gradients, likes, strict=True)], dim
    )


def _added(payloads: Sequence[Payload]) -> Payload:
    result = []
    for column in zip(*payloads, strict=True):
        total: Tensor | None = None
        for g in column:
            total = g if total is None else total if g is None else total + g
        result.append(total)
    return tuple(result)


def _distinct(states: Sequence[State], of: State) -> list[State]:
    made = list(states)
    if not made or len(set(made)) < len(made) or any(s.key != of.key for s in made):
        raise BadInput(f"{of} becomes {len(made)} states of its instance: there must be one or more, all different.")
    return made
