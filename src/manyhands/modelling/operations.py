"""What a training step computes and moves, operator by operator, without running it.

A model's forward, loss and backward are traced once on fake tensors, which have shapes and no contents (torch's
FakeTensorMode): no memory is taken, nothing is computed, the model is left as it was, and one that no machine here
could hold is traced as well as a small one. Each operator that torch would run is recorded with its shapes, phase and
module:

    operations   matrix products, convolutions, attention, recurrent layers: 2 a multiplication and addition, by
                 torch's own formulas (torch.utils.flop_counter), masks not taken off; all else one for each element of
                 its largest operand; copies, views and lookups none
    bytes        each operand once, each result once: the least that must move. A view moves nothing.

Counted is what leads to a gradient: the first layer's input has none. The optimizer's part is `update`.

A model whose course depends on values (``if x.sum() > 0``, ``.item()``) cannot be traced. It is then run once on its
batch with hooks on its layers, and what was found says at which operator tracing ended (`Operations.untraced`). Layers
known by name are counted then, backward as twice their forward, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from manyhands.errors import BadInput
from manyhands.partition.data import arguments

Phase = Literal["forward", "backward", "update"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """One operator as torch would run it."""

    name: str  # as torch names it: addmm, convolution_backward …
    phase: Phase
    module: str  # of the user's model, by its name; of backward, the module whose gradient it is
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    dtype: str  # of the first result: float32 …
    flops: int
    read_B: int
    written_B: int
    #: Arguments that are no tensors, in torch's order: strides, paddings …
    options: tuple[Any, ...] = ()
    #: Parameters that it reads or, backward, whose gradient it makes.
    parameters: tuple[str, ...] = ()
    #: The order of dims in memory of each operand and, after ``>``, result: ``0231`` is channels-last, nothing
    #: contiguous. Empty: all are contiguous.
    layout: str = ""

    @property
    def moved_B(self) -> int:
        """Read and written."""
        return self.read_B + self.written_B


@dataclass(frozen=True)
class Operations:
    """A whole step, in the order in which torch runs it."""

    each: tuple[Operation, ...]
    #: Bytes of each parameter by name.
    parameter_B: Mapping[str, int] = field(default_factory=dict)
    #: Where tracing ended and what was done instead; empty: everything was traced.
    untraced: str = ""
    #: What runs and moves nothing: operators that give views, and calls of modules.
    views: int = 0
    calls: int = 0

    def __iter__(self) -> Iterator[Operation]:
        return iter(self.each)

    def __len__(self) -> int:
        return len(self.each)

    def flops(self, phase: Phase | None = None) -> int:
        """Operations of a phase, or of all."""
        return sum(x.flops for x in self.each if phase in (None, x.phase))

    def moved_B(self, phase: Phase | None = None) -> int:
        """Bytes of a phase, or of all."""
        return sum(x.moved_B for x in self.each if phase in (None, x.phase))

    def by(self, key: Callable[[Operation], str]) -> dict[str, tuple[int, int]]:
        """Operations and bytes by name, module, phase …, in the order of the first of each."""
        found: dict[str, tuple[int, int]] = {}
        for x in self.each:
            flops, moved = found.get(key(x), (0, 0))
            found[key(x)] = flops + x.flops, moved + x.moved_B
        return found


def count(model: nn.Module, inputs: Any, target: Any, loss: Callable[..., Any] | None = None) -> Operations:
    """What forward, loss and backward of one batch take.

    ``inputs`` and ``target`` are a batch as data sets give it, any pytrees of tensors, on any device, ``meta`` too.
    ``loss`` is as in a task: it may return a mean or ``(total, count)``; None: the model returns its own. The model is
    taken in the mode it is in (training or evaluation) and not changed.
    """
    if any(map(is_lazy, [*model.parameters(), *model.buffers()])):
        raise BadInput("the model has lazy modules, which have no shapes yet: pass a batch through it, then count.")
    try:
        return _traced(model, inputs, target, loss)
    except _Untraceable as e:
        return _hooked(model, arguments(inputs, target, loss), e)


def update(parameter_B: Mapping[str, int], *, state: int = 0, dtype: str = "float32") -> Operation:
    """An optimizer's update as one operator: parameters and gradients read, parameters written, ``state`` tensors both.

    0 is plain SGD, 1 momentum, 2 Adam. Two operations an element, and three for each tensor of state.
    """
    size_B = sum(parameter_B.values())
    itemsize = getattr(torch, dtype).itemsize
    shape = (size_B // itemsize,)
    read, written = (2 + state) * size_B, (1 + state) * size_B
    return Operation("update", "update", "", (shape,), (shape,), dtype, (2 + 3 * state) * shape[0], read, written)


# -- tracing -----------------------------------------------------------------------------------------------------------


class _Untraceable(Exception):
    """Raised inside: tracing ended at or after an operator."""

    def __init__(self, where: str, module: str, cause: Exception) -> None:
        self.where, self.module, self.cause = where, module, cause
        super().__init__(where)


def _traced(model: nn.Module, inputs: Any, target: Any, loss: Callable[..., Any] | None) -> Operations:
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # a model may keep tensors that are neither parameter nor buffer
    recorder = Recorder()
    try:
        with fake:
            state: dict[str, Tensor] = {}
            by_tensor: dict[int, Tensor] = {}
            for name, tensor in [*_named(model.named_parameters), *_named(model.named_buffers)]:
                state[name] = by_tensor.setdefault(id(tensor), fake.from_tensor(tensor))
            batch, goal = (pytree.tree_map_only(Tensor, fake.from_tensor, x) for x in (inputs, target))
            recorder.parameters = {storage(state[name]): name for name, _ in model.named_parameters()}
            with torch.enable_grad(), recorder, naming(model, recorder):
                total = _total(torch.func.functional_call(model, state, arguments(batch, goal, loss)), goal, loss)
                recorder.phase = "backward"
                if total.requires_grad:
                    total.backward()  # type: ignore[no-untyped-call]
    except Exception as e:
        culprit = getattr(e, "func", None)  # what depends on values names itself
        raise _Untraceable(f"at {culprit}" if culprit is not None else f"after {recorder.last}", recorder.at, e) from e
    return Operations(tuple(recorder.operations), _sizes(model), views=recorder.views, calls=recorder.calls)


def _named(named: Callable[..., Iterator[tuple[str, Tensor]]]) -> Iterator[tuple[str, Tensor]]:
    return named(remove_duplicate=False)  # tied tensors have several names and are one


def _sizes(model: nn.Module) -> dict[str, int]:
    return {name: p.numel() * p.element_size() for name, p in model.named_parameters()}


def _total(outputs: Any, target: Any, loss: Callable[..., Any] | None) -> Tensor:
    returned = getattr(outputs, "loss", outputs) if loss is None else loss(outputs, target)
    total: Tensor = returned[0] if isinstance(returned, tuple) else returned
    return total


class Recorder(TorchDispatchMode):
    """Sees every operator below autograd, forward and backward, of fake tensors or of real ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase: Phase = "forward"
        self.operations: list[Operation] = []
        self.parameters: dict[int, str] = {}
        self.last, self.modules = "the first operator", [""]
        self.views = self.calls = 0
        self._forward: dict[int, tuple[str, tuple[str, ...]]] = {}  # by autograd's number of the operator

    @property
    def at(self) -> str:
        """The module that is running."""
        return self.modules[-1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if func.namespace != "prim":
            self.last = f"{func.namespace}.{name}"
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim" or _moves_nothing(func, name):
            self.views += func.namespace != "prim"
            return out
        self.record(func, name, args, kwargs or {}, out)
        return out

    def record(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """Keep what has run."""
        operands = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        results = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        if not results:
            return
        read = [] if name in _FILLS else [x for x in operands if not (name == "copy_" and x is operands[0])]
        module, parameters = self._owner(operands)
        options = tuple(x for x in args if not any(isinstance(y, Tensor) for y in pytree.tree_leaves(x)))
        self.operations.append(
            Operation(
                name.rstrip("_"),
                self.phase,
                module,
                tuple(tuple(x.shape) for x in operands),
                tuple(tuple(x.shape) for x in results),
                str(results[0].dtype).removeprefix("torch."),
                _flops(func._overloadpacket, name, args, kwargs, out, operands, results),
                sum(map(_bytes, read)),
                sum(map(_bytes, results)),
                options,
                parameters,
                _layout(operands, results),
            )
        )

    def _owner(self, operands: list[Tensor]) -> tuple[str, tuple[str, ...]]:
        """Forward: the module that runs, and the parameters read. Backward: those of the operator that it undoes."""
        number = _autograd_number(self.phase)
        if self.phase == "backward":
            return self._forward.get(number, ("", ()))
        read = tuple(dict.fromkeys(self.parameters[s] for x in operands if (s := storage(x)) in self.parameters))
        # What autograd does not see (batch norm counts its batches) finds the number of the operator before it.
        if read or number not in self._forward:
            self._forward[number] = self.at, read
        return self.at, read


@contextmanager
def naming(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """While inside, the recorder knows the name of the module that runs."""

    def enters(name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            recorder.modules.append(name)
            recorder.calls += 1

        return enter

    def leaves(*_: Any) -> None:
        recorder.modules.pop()

    handles = []
    for name, module in model.named_modules():
        handles += [module.register_forward_pre_hook(enters(name)), module.register_forward_hook(leaves)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _autograd_number(phase: Phase) -> int:
    """Autograd numbers its nodes; forward, the node of the operator that runs is the newest.

    Both functions are torch's own business and may go; without them operators of backward belong to no module.
    """
    if phase == "forward":
        newest = getattr(torch.autograd, "_get_sequence_nr", None)
        return newest() - 1 if newest is not None else -1
    current = getattr(torch._C, "_current_autograd_node", None)
    node = current() if current is not None else None
    return node._sequence_nr() if node is not None else -2


# -- what an operator costs --------------------------------------------------------------------------------------------

#: They allocate, or look at memory in another way.
_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "detach",
    "lift_fresh",
}
#: They write and read nothing.
_FILLS = {"zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "fill_",
          "zero_", "arange", "scalar_tensor"}  # fmt: skip
#: They move and compute nothing.
_MOVES = {"copy_", "clone", "_to_copy", "cat", "stack", "embedding", "index", "index_select", "gather", "contiguous",
          "constant_pad_nd", "repeat", "roll", "flip", "tril", "triu", "slice_backward", "select_backward"}  # fmt: skip

#: Of operators that torch's own table leaves out.
_ATTENTION, _ATTENTION_BACKWARD = (f"_scaled_dot_product_flash_attention_for_cpu{x}" for x in ("", "_backward"))


def _moves_nothing(func: Any, name: str) -> bool:
    """A view: what it returns lies where its operand lies, and is not written to."""
    if name in _FREE:
        return True
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _flops(
    packet: Any, name: str, args: Any, kwargs: Any, out: Any, operands: list[Tensor], results: list[Tensor]
) -> int:
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    if name == _ATTENTION:
        return int(sdpa_flop_count(*(x.shape for x in operands[:3])))  # type: ignore[no-untyped-call]
    if name == _ATTENTION_BACKWARD:
        return int(sdpa_backward_flop_count(*(x.shape for x in operands[:4])))  # type: ignore[no-untyped-call]
    if name in ("mkldnn_rnn_layer", "mkldnn_rnn_layer_backward"):
        steps, n = operands[0].shape[:2]
        products = 2 * steps * n * (operands[1].numel() + operands[2].numel())
        return products if name == "mkldnn_rnn_layer" else 2 * products
    if name in _FILLS or name in _MOVES:
        return 0
    return max(x.numel() for x in (*operands, *results))


def _bytes(x: Tensor) -> int:
    """What of ``x`` lies in memory: an expanded tensor is no larger than what it was expanded from."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) if x.layout == torch.strided else 0


def _layout(operands: list[Tensor], results: list[Tensor]) -> str:
    said = ">".join(",".join(map(_order, some)) for some in (operands, results))
    return said if said.strip(",>") else ""


def _order(x: Tensor) -> str:
    if x.layout != torch.strided or x.is_contiguous():
        return ""
    return "".join(map(str, sorted(range(x.dim()), key=lambda d: -x.stride()[d])))


def storage(x: Tensor) -> int:
    """By which it is told whether two tensors lie in the same memory."""
    return int(x.untyped_storage()._cdata) if x.layout == torch.strided else 0


# -- hooks, where tracing ends -----------------------------------------------------------------------------------------


def _hooked(model: nn.Module, arguments: tuple[Any, ...], why: _Untraceable) -> Operations:
    """One real forward without gradients; layers are counted by their kind."""
    found: list[Operation] = []

    def hook(name: str) -> Callable[..., None]:
        def count_layer(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            found.append(_layer(name, module, args, out))

        return count_layer

    where = f" in module {why.module!r}" if why.module else ""
    reason = f"{type(why.cause).__name__}: {str(why.cause).strip().splitlines()[0] if str(why.cause).strip() else ''}"
    layers = [(name, m) for name, m in model.named_modules() if not list(m.children()) and not _is_container(m)]
    handles = [module.register_forward_hook(hook(name)) for name, module in layers]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(*arguments)
    except Exception as e:
        raise BadInput(
            f"the model's operations cannot be counted: tracing ended {why.where}{where} ({reason}), and "
            f"run on the batch it raises {type(e).__name__}: {e}. It has to run on the batch that is given."
        ) from e
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(buffers[name])
    backward = [_backward(x) for x in reversed(found)]
    said = (
        f"tracing ended {why.where}{where} ({reason}); counted by hooks on its layers instead: forward of "
        "layers known by name, backward as twice that, functional operators and the loss not at all"
    )
    return Operations((*found, *backward), _sizes(model), said)


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict | nn.Identity | nn.Flatten)


def _layer(name: str, module: nn.Module, args: tuple[Any, ...], out: Any) -> Operation:
    operands = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
    results = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
    parameters = list(module.named_parameters(recurse=False))
    weights = [p for _, p in parameters]
    first = results[0] if results else operands[0]
    return Operation(
        type(module).__name__.lower(),
        "forward",
        name,
        tuple(tuple(x.shape) for x in (*operands, *weights)),
        tuple(tuple(x.shape) for x in results),
        str(first.dtype).removeprefix("torch."),
        _layer_flops(module, operands, first),
        sum(map(_bytes, (*operands, *weights))),
        sum(map(_bytes, results)),
        (),
        tuple(f"{name}.{k}" if name else k for k, _ in parameters),
    )


def _layer_flops(module: nn.Module, operands: list[Tensor], out: Tensor) -> int:
    if isinstance(module, nn.Linear):
        return 2 * out.numel() * module.in_features
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return 2 * out.numel() * module.in_channels // module.groups * math.prod(module.kernel_size)
    if isinstance(module, nn.RNNBase):
        features = operands[0].shape[-1]
        return 2 * operands[0].numel() // features * sum(p.numel() for p in module.parameters() if p.dim() == 2)
    if isinstance(module, nn.Embedding):
        return 0
    return max([x.numel() for x in operands] + [out.numel()])


def _backward(x: Operation) -> Operation:
    return Operation(
        f"{x.name}_backward", "backward", x.module, (*x.results, *x.operands), x.operands, x.dtype, 2 * x.flops,
        x.read_B + x.written_B, x.read_B, (), x.parameters,
    )  # fmt: skip
