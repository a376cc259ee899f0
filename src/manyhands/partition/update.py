"""The optimizer, asked for by bounds: any torch optimizer that works element by element can update a slice.

Workers that share an update each ask for a slice ``[lo, hi)`` of a piece and hold optimizer state only for it, so that
all workers together hold one copy (Rajbhandari et al. 2020, ZeRO stage 1, arXiv:1910.02054).

A slice is presented to a clone of the user's optimizer as one tensor per model parameter it touches; hyper-parameters
are read from the user's own optimizer at every update, so that learning-rate schedules work on that one. Plain SGD
with or without momentum is done on whole runs of parameters with the same operations in the same order as
``torch.optim.SGD`` (equal bit for bit; about 30 µs less per update).

Guarantee: identical to calling ``optimizer.step()`` on the whole parameters, for element-by-element optimizers.
A parameter whose gradient nobody has computed so far is skipped, as torch skips ``grad=None``.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyhands.contract import Piece, StateSlice
from manyhands.errors import BadInput

#: Ends of keys: a value as JSON (its tensors follow, numbered), one that cannot be stored, a number of an older file.
PACKED, LOST, _NUMBER = ":packed", ":lost", ":number"


@dataclass(eq=False)
class Span:
    """Where a model parameter lies in its piece: elements ``[start, stop)`` of ``flat``, in memory order."""

    name: str
    parameter: torch.nn.Parameter
    start: int
    stop: int
    unused: bool = False  # no worker has had a gradient for it yet

    def within(self, lo: int, hi: int) -> tuple[int, int]:
        """The part of it in ``[lo, hi)``, in the piece's elements; empty if lo ≥ hi."""
        return max(lo, self.start), min(hi, self.stop)


class SliceUpdate:
    """Updates elements ``[lo, hi)`` of one piece with the optimizer of one parameter group."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, group: int, piece: Piece, spans: Sequence[Span], lo: int, hi: int
    ) -> None:
        self.piece, self.lo, self.hi = piece, lo, hi
        self._master = optimizer
        self._group = group
        self._spans = [s for s in spans if s.within(lo, hi)[0] < s.within(lo, hi)[1]]
        self._flat, self._grad = piece.flat[lo:hi], piece.grad[lo:hi]
        self._some_unused = any(s.unused for s in self._spans)
        self._plain = _is_plain_sgd(optimizer, group)
        self._momentum: Tensor | None = None
        self._warm: set[str] = set()  # parameters whose momentum exists
        self._clone: torch.optim.Optimizer | None = None
        self._parts: list[torch.nn.Parameter] = []
        if not self._plain:
            self._make_clone()

    def __call__(self, gradients: Sequence[Tensor] | None = None) -> None:
        """One update, by the piece's gradient; or by ``gradients`` of its parameters, all of them whole, in order."""
        if self._some_unused:
            self._some_unused = any(s.unused for s in self._spans)
        if gradients is None and self.piece.entries is not None and self._takes_entries():
            self._sgd_of(self.piece.entries)
            return
        self.piece.entries = None  # an optimizer may write to gradients
        if self._plain:
            self._sgd(gradients)
        else:
            self._generic(gradients)

    # -- plain SGD -------------------------------------------------------------------------------------------------

    def _takes_entries(self) -> bool:
        """Whether what has no gradient stays as it is, and all is updated at once."""
        group, whole = self._master.param_groups[self._group], self._flat.numel() == self.piece.flat.numel()
        return self._plain and whole and group["momentum"] == group["weight_decay"] == 0 and not self._some_unused

    def _sgd_of(self, entries: Tensor) -> None:
        lr = self._master.param_groups[self._group]["lr"]
        self._flat[entries] = self._flat[entries].add_(self._grad[entries], alpha=-lr)

    def _sgd(self, gradients: Sequence[Tensor] | None) -> None:
        group = self._master.param_groups[self._group]
        lr, momentum = group["lr"], group["momentum"]
        if momentum == 0 and group["weight_decay"] == 0 and not self._some_unused:
            if gradients is None:
                self._flat.add_(self._grad, alpha=-lr)
                return
            for s, gradient in zip(self._spans, gradients, strict=True):
                s.parameter.data.add_(gradient, alpha=-lr)
            return
        if gradients is not None:
            for s, gradient in zip(self._spans, gradients, strict=True):
                _shaped(self.piece.grad[s.start : s.stop], s.parameter).copy_(gradient)
        if momentum != 0 and self._momentum is None:
            self._momentum = torch.zeros_like(self._flat)
        for start, stop, warm in self._runs():
            flat, grad = self.piece.flat[start:stop], self.piece.grad[start:stop]
            if group["weight_decay"] != 0:
                grad = grad.add(flat, alpha=group["weight_decay"])
            if self._momentum is not None and momentum != 0:
                buffer = self._momentum[start - self.lo : stop - self.lo]
                if warm:
                    buffer.mul_(momentum).add_(grad, alpha=1 - group["dampening"])
                else:
                    buffer.copy_(grad)
                grad = grad.add(buffer, alpha=momentum) if group["nesterov"] else buffer
            flat.add_(grad, alpha=-lr)
        if momentum != 0:
            self._warm.update(s.name for s in self._spans if not s.unused)

    def _runs(self) -> list[tuple[int, int, bool]]:
        """Maximal ranges of used parameters that are alike in having momentum or not."""
        runs: list[tuple[int, int, bool]] = []
        for s in self._spans:
            if s.unused:
                continue
            (start, stop), warm = s.within(self.lo, self.hi), s.name in self._warm
            if runs and runs[-1][1] == start and runs[-1][2] == warm:
                runs[-1] = (runs[-1][0], stop, warm)
            else:
                runs.append((start, stop, warm))
        return runs

    # -- any other optimizer ---------------------------------------------------------------------------------------

    def _make_clone(self) -> None:
        # copy.copy would lose what Optimizer.__getstate__ leaves out: LBFGS's _params, a subclass's own attributes.
        clone = object.__new__(type(self._master))
        clone.__dict__.update(self._master.__dict__)
        clone.__dict__.pop("step", None)  # a schedule's wrapper around the user's own optimizer's step
        clone.state = defaultdict(dict)
        for s in self._spans:
            start, stop = s.within(self.lo, self.hi)
            whole = (start, stop) == (s.start, s.stop)
            view = self.piece.flat[start:stop]
            # A whole parameter keeps its shape: optimizers that are not element by element look at it.
            part = torch.nn.Parameter(_shaped(view, s.parameter) if whole else view)
            self._parts.append(part)
            for key, value in self._master.state.get(s.parameter, {}).items():
                clone.state[part][key] = _cut(value, s, start, stop, part)
        clone.param_groups = [{**self._master.param_groups[self._group], "params": self._parts}]
        if isinstance(clone, torch.optim.LBFGS):
            clone._params = self._parts
        self._clone = clone

    def _generic(self, gradients: Sequence[Tensor] | None) -> None:
        assert self._clone is not None
        own = self._clone.param_groups[0]
        for key, value in self._master.param_groups[self._group].items():
            if key != "params":
                own[key] = value
        for i, (s, part) in enumerate(zip(self._spans, self._parts, strict=True)):
            if s.unused:
                part.grad = None
            elif gradients is not None:
                part.grad = gradients[i]
            elif part.grad is None:
                start, stop = s.within(self.lo, self.hi)
                grad = self.piece.grad[start:stop]
                part.grad = _shaped(grad, s.parameter) if part.shape == s.parameter.shape else grad
        # Optimizers like LBFGS want a closure; the gradient of this step has been computed already, once.
        self._clone.step(_no_closure)

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> list[StateSlice]:
        """What this slice's updates have accumulated, per parameter."""
        result = []
        if self._plain:
            for s in self._spans:
                if s.name in self._warm and self._momentum is not None:
                    start, stop = s.within(self.lo, self.hi)
                    values = self._momentum[start - self.lo : stop - self.lo]
                    result.append(StateSlice(s.name, "momentum_buffer", start - s.start, stop - s.start, values))
                elif not s.unused:
                    # Nothing to keep but that it takes part: weight decay goes on after a resume, gradient or not.
                    result.append(StateSlice(s.name, "used", -1, -1, torch.ones(())))
            return result
        assert self._clone is not None
        for s, part in zip(self._spans, self._parts, strict=True):
            start, stop = s.within(self.lo, self.hi)
            for key, value in self._clone.state.get(part, {}).items():
                if isinstance(value, Tensor) and value.shape == part.shape and value.dim() > 0:
                    values = _in_memory_order(value, part)
                    result.append(StateSlice(s.name, key, start - s.start, stop - s.start, values))
                elif isinstance(value, Tensor) and value.dim() == 0:
                    result.append(StateSlice(s.name, key, -1, -1, value))
                else:
                    result.extend(StateSlice(s.name, k, -1, -1, x) for k, x in _packed(key, value).items())
        return result

    def load(self, state: Sequence[StateSlice]) -> None:
        """Take what belongs to this slice out of ``state`` (any cover of the parameters)."""
        by_name = defaultdict(list)
        for piece in state:
            by_name[piece.parameter].append(piece)
        for i, s in enumerate(self._spans):
            start, stop = s.within(self.lo, self.hi)
            if by_name[s.name]:
                s.unused = False
            packed = {saved.key: saved.values for saved in by_name[s.name]}
            for saved in by_name[s.name]:
                if saved.key.endswith(LOST):
                    raise BadInput(
                        f"The optimizer's {saved.key.removesuffix(LOST)} of parameter {s.name} could not be stored, so "
                        "that an exact resume is not possible. State of tensors, numbers, text, lists, tuples and "
                        "dicts can be."
                    )
                if saved.lo == -1 or PACKED in saved.key:
                    if not self._plain:
                        self._load_whole(i, saved.key, packed)
                    continue
                lo, hi = max(start, s.start + saved.lo), min(stop, s.start + saved.hi)
                if lo >= hi:
                    continue
                values = saved.values.reshape(-1)[lo - s.start - saved.lo : hi - s.start - saved.lo]
                self._load_values(i, s, saved.key, lo - start, hi - start, values)

    def _load_whole(self, i: int, key: str, values: Mapping[str, Tensor]) -> None:
        assert self._clone is not None
        state = self._clone.state[self._parts[i]]
        if key.endswith(PACKED):
            state[key.removesuffix(PACKED)] = _unpacked(key, values, self._parts[i].device)
        elif key.endswith(_NUMBER):
            state[key.removesuffix(_NUMBER)] = values[key].item()
        elif PACKED not in key:
            state[key] = values[key].clone()

    def _load_values(self, i: int, s: Span, key: str, lo: int, hi: int, values: Tensor) -> None:
        start, _ = s.within(self.lo, self.hi)
        if self._plain:
            if self._momentum is None:
                self._momentum = torch.zeros_like(self._flat)
            self._momentum[start - self.lo + lo : start - self.lo + hi].copy_(values)
            self._warm.add(s.name)
            return
        assert self._clone is not None
        part = self._parts[i]
        state = self._clone.state[part]
        if key not in state:
            state[key] = torch.zeros_like(part, dtype=values.dtype, memory_format=torch.preserve_format)
        _in_memory_order(state[key], part)[lo:hi] = values


def _packed(key: str, value: Any) -> dict[str, Tensor]:
    """A state that is no tensor of its parameter's shape (numbers, LBFGS's lists of steps) as tensors by key."""
    tensors: list[Tensor] = []
    try:
        text = json.dumps(_jsonable(value, tensors)).encode()
    except (TypeError, RecursionError):
        return {f"{key}{LOST}": torch.ones(())}
    return {
        f"{key}{PACKED}": torch.frombuffer(bytearray(text), dtype=torch.uint8),
        **{f"{key}{PACKED}.{n}": x for n, x in enumerate(tensors)},
    }


def _jsonable(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_jsonable(v, tensors) for v in value]
    if type(value) is tuple:
        return {"tuple": [_jsonable(v, tensors) for v in value]}
    if type(value) is dict and all(type(k) in (bool, int, float, str) or k is None for k in value):
        return {"dict": [[k, _jsonable(v, tensors)] for k, v in value.items()]}
    raise TypeError(type(value).__name__)


def _unpacked(key: str, values: Mapping[str, Tensor], device: torch.device) -> Any:
    def made(value: Any) -> Any:
        if isinstance(value, list):
            return [made(v) for v in value]
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            x = values[f"{key}.{value['tensor']}"].clone()
            return x.to(device) if x.dim() else x
        if "tuple" in value:
            return tuple(made(v) for v in value["tuple"])
        return {k: made(v) for k, v in value["dict"]}

    return made(json.loads(bytes(values[key].tolist())))


def _no_closure() -> Any:
    return torch.zeros(())


def _is_plain_sgd(optimizer: torch.optim.Optimizer, group: int) -> bool:
    if (
        type(optimizer) is not torch.optim.SGD
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
    ):
        return False
    g: dict[str, Any] = optimizer.param_groups[group]
    return not (g["maximize"] or g["differentiable"] or g.get("fused") or isinstance(g["lr"], Tensor))


def strides_of(parameter: Tensor) -> tuple[int, ...]:
    """The strides its view into a flat vector gets: its own where they fill memory densely, else contiguous ones."""
    dense = sorted((st, n) for st, n in zip(parameter.stride(), parameter.shape, strict=True) if n > 1)
    expected = 1
    for stride, extent in dense:
        if stride != expected:
            return torch.empty(parameter.shape, device="meta").stride()
        expected *= extent
    return parameter.stride()


def _shaped(flat: Tensor, parameter: Tensor) -> Tensor:
    return flat.as_strided(parameter.shape, strides_of(parameter), flat.storage_offset())


def _in_memory_order(value: Tensor, like: Tensor) -> Tensor:
    """``value`` as one dim in the memory order of ``like``; a view where their strides agree."""
    if value.stride() == like.stride():
        return value.as_strided((value.numel(),), (1,), value.storage_offset())
    flat = torch.empty(value.numel(), dtype=value.dtype, device=value.device)
    flat.as_strided(like.shape, strides_of(like)).copy_(value)
    return flat


def _cut(value: Any, span: Span, start: int, stop: int, part: Tensor) -> Any:
    """The part of an optimizer's initial state (Adagrad has one) that belongs to a slice of its parameter."""
    if not isinstance(value, Tensor) or value.shape != span.parameter.shape or value.dim() == 0:
        return copy.copy(value) if not isinstance(value, Tensor) else value.clone()
    flat = torch.empty(value.numel(), dtype=value.dtype, device=value.device)
    flat.as_strided(value.shape, strides_of(span.parameter)).copy_(value)
    piece = flat[start - span.start : stop - span.start].clone()
    return _shaped(piece, span.parameter) if part.shape == span.parameter.shape else piece
