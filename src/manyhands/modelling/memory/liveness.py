"""Which blocks of memory a training step has at each moment, without running it.

Forward, loss, backward and evaluation are traced on fake tensors, as `modelling.operations` does. Each storage that an
operator makes is a block that comes, and goes when the last tensor on it and the last note of autograd's have gone;
views and tensors changed in place are no blocks of their own. Gradients add up in tensors that are there already, as in
training, so what an operator makes of a parameter's gradient is a block for a moment.

    (block, bytes)   positive: it comes, negative: it goes; 0: the gradient of the parameter of that name is final

A model whose course depends on values cannot be traced so; it is then run once on its batch, and watched in the same
way. Approximation: what an operator takes for itself between its operands and its results is in no trace; of the
operators that take much, `hidden` says how much.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from manyhands.modelling.memory.hidden import hidden_B

Event = tuple[Hashable, int]
Blocks = tuple[Event, ...]


def peak_B(events: Iterable[Event]) -> int:
    """The most bytes that are there at once."""
    return max(itertools.accumulate(size for _, size in events), default=0)


def left_B(events: Iterable[Event]) -> int:
    """What is there at the end."""
    return sum(size for _, size in events)


@dataclass(frozen=True)
class Pass:
    """A batch or micro-batch through a model or stage; a block of the one half may go in the other."""

    forward: Blocks
    backward: Blocks = ()
    inputs_B: int = 0
    outputs_B: int = 0
    returned_B: int = 0  # gradients of the outputs, that come from the next stage
    #: By name as torch has them: which kernels run.
    operators: frozenset[str] = frozenset()

    @property
    def kept_B(self) -> int:
        """What stands between forward and backward: the activations."""
        return left_B(self.forward)


class Watch(TorchDispatchMode):
    """Writes down storages as they come and go, those in ``known`` excepted; ``gradients`` are told by their names."""

    def __init__(self, known: Iterable[Tensor] = (), gradients: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.operators: set[str] = set()
        self.looking = True
        self._number = itertools.count()
        self._seen: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = ""
        for name, tensor in (gradients or {}).items():
            self._seen[tensor.untyped_storage()] = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators.add(func._overloadpacket.__name__)
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor) and x.layout is torch.strided:
                self._note(x)
        if taken_B := hidden_B(func, args, out):
            self.events += [(number := next(self._number), taken_B), (number, -taken_B)]
        if func is torch.ops.aten.add_.Tensor and (name := self._seen.get(args[0].untyped_storage(), "")):
            self.events.append((name, 0))
        return out

    def _note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = ""
        if self.looking and (size := storage.nbytes()):
            self.events.append((number := next(self._number), size))
            weakref.finalize(storage, self.events.append, (number, -size)).atexit = False

    def cut(self) -> Blocks:
        """What has happened since the last cut."""
        events = tuple(self.events)
        self.events.clear()
        return events


def passes(
    stages: Sequence[nn.Module],
    inputs: Any,
    target: Any,
    loss: Callable[..., Any] | None,
    *,
    learning: bool = True,
    precision: str = "float32",
) -> list[Pass]:
    """Of each stage in a row (a whole model is one) on a batch, whose outputs the last one takes to the loss.

    ``loss`` None: the model returns its own. ``learning``: forward and backward; else forward alone, as an evaluation
    does it. The modules are left as they are.
    """
    modes = [(m, m.training) for stage in stages for m in stage.modules()]
    for module, _ in modes:
        module.training = learning
    batch = inputs, target, loss, learning, precision
    try:
        with torch.random.fork_rng(devices=[]):
            try:
                with FakeTensorMode(allow_non_fake_inputs=True) as fake:
                    return _passes(stages, *batch, fake.from_tensor)
            except Exception:  # its course may depend on values: run it
                return _passes(stages, *batch, _copied)
    finally:
        for module, training in modes:
            module.training = training


def _copied(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def _passes(
    stages: Sequence[nn.Module],
    inputs: Any,
    target: Any,
    loss: Callable[..., Any] | None,
    learning: bool,
    precision: str,
    take: Callable[[Tensor], Tensor],
) -> list[Pass]:
    value, goal = (pytree.tree_map_only(Tensor, take, x) for x in (inputs, target))
    found = []
    for k, stage in enumerate(stages):
        last = k + 1 == len(stages)
        state = _state(stage, take)
        gradients = {name: x.grad for name, x in state.items() if x.grad is not None}
        given = (value, goal) if loss is None and goal is not None else (value,)
        watch = Watch(_tensors((state, value, goal)), gradients)
        with watch, torch.set_grad_enabled(learning), _autocast(precision, learning):
            out: Any = torch.func.functional_call(stage, state, given)
            if last:
                out = _total(out, goal, loss)
        forward = watch.cut()
        ends = [x for x in _tensors(out) if x.requires_grad]
        handed = pytree.tree_map_only(Tensor, _handed, out)
        outside = [torch.ones_like(x) for x in ends]
        sizes = [_size_B(tree) for tree in (value, out, [] if last else outside)]
        with watch:
            if ends:
                torch.autograd.backward(ends, outside)
        del out, ends
        found.append(Pass(forward, watch.cut(), sizes[0], sizes[1], sizes[2], frozenset(watch.operators)))
        value = handed
    return found


def _state(stage: nn.Module, take: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Parameters, with gradients that are to be added to, and buffers; what has several names is one tensor."""
    state: dict[str, Tensor] = {}
    made: dict[int, Tensor] = {}
    for named in (stage.named_parameters, stage.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if id(tensor) not in made:
                made[id(tensor)] = take(tensor)
            mine = state[name] = made[id(tensor)]
            if mine.requires_grad and mine.grad is None:
                mine.grad = torch.zeros_like(mine)
    return state


def _handed(x: Tensor) -> Tensor:
    """What the next stage is given: elsewhere, and the beginning of its own graph."""
    return torch.empty_like(x).requires_grad_(x.requires_grad)


def _size_B(tree: Any) -> int:
    return sum(x.nbytes for x in _tensors(tree))


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


@contextlib.contextmanager
def _autocast(precision: str, learning: bool) -> Iterator[None]:
    if precision == "bfloat16" and learning:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
    else:
        yield


def _total(outputs: Any, target: Any, loss: Callable[..., Any] | None) -> Any:
    returned = getattr(outputs, "loss", outputs) if loss is None else loss(outputs, target)
    return returned[0] if isinstance(returned, tuple) else returned
