"""Training in flex16+5, simulated on float32: a tensor is mantissas of 16 bits and one exponent (Köster et al. 2017).

    weights        at the start of a step, where they lie: what an update changed by less than half of κ is gone
    activations    what every module without children gives, in training
    gradients      with respect to these activations, and to parameters (of each backward, before they add up)

Each of these tensors has an exponent of its own, which Autoflex foresees from the maxima of its last writes; rule and
rounding are those of the compressor `flexpoint`, whose payload is what such hardware would store. Sums inside of an
operation, the optimizer's state, sums over workers and evaluations are float32's. What is not finite stays so.

Guarantee: |x − rounded x| ≤ κ/2 where nothing overflows. Workers that step together hold the same weights, so they
round them alike. Histories are part of a checkpoint: a resume is exact.

U. Köster et al. (2017), Flexpoint: an adaptive numerical format for efficient training of deep neural networks,
arXiv:1711.02213, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.communication.compression.flexpoint import Flexpoint
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.state import State
from manyhands.contract import is_finite


class Flex16:
    """The tensors of a model's training by name, each with what Autoflex keeps of it."""

    def __init__(self, model: nn.Module, scheme: Flexpoint | None = None) -> None:
        self._model, self._scheme = model, scheme or Flexpoint()
        self._states: dict[str, State] = {}

    @property
    def overflows(self) -> int:
        """Writes so far in which something did not fit and was cut to what does."""
        return sum(int(state.numbers["overflows"]) for state in self._states.values())

    def rounded(self, name: str, x: Tensor) -> Tensor:
        """A new tensor, ``x`` as it is after being written to the tensor ``name``; its exponent may then move."""
        if not x.numel() or not is_finite(x):
            return x.clone()
        values = x.detach().to("cpu", torch.float64 if x.dtype == torch.float64 else torch.float32).reshape(-1)
        state = self._state(name, Layout(((values.numel(),),), values.dtype))
        return self._scheme.decode(self._scheme.encode(values, state), state).view(x.shape).to(x)

    def _state(self, name: str, layout: Layout) -> State:
        if name not in self._states:
            self._states[name] = self._scheme.start(layout)
        state = self._states[name]
        state.layout = layout  # of activations the batch decides how many there are
        return state

    @contextmanager
    def training(self) -> Iterator[None]:
        """Round the weights, and inside whatever forwards and backwards write."""
        hooks: list[Any] = []
        with torch.no_grad():
            for name, p in self._model.named_parameters():
                p.copy_(self.rounded(name, p))
                if p.requires_grad:
                    hooks.append(p.register_hook(partial(self.rounded, f"gradient of {name}")))  # type: ignore[no-untyped-call]
        for name, module in self._model.named_modules():
            if not any(True for _ in module.children()):
                hooks.append(module.register_forward_hook(self._hook(f"output of {name}")))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def written(value: Any, at: str) -> Any:
            if isinstance(value, tuple):
                return tuple(written(v, f"{at}.{i}") for i, v in enumerate(value))
            if isinstance(value, Tensor) and value.is_floating_point():
                return _Written.apply(value, self, at)  # type: ignore[no-untyped-call]
            return value

        return lambda module, inputs, output: written(output, name)

    def state_dict(self) -> dict[str, Any]:
        """What Autoflex keeps of every tensor."""
        return {name: state.state_dict() for name, state in self._states.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict`."""
        self._states.clear()
        for name, kept in state.items():
            self._state(name, Layout(((1,),))).load_state_dict(kept)


class _Written(torch.autograd.Function):
    """Round an activation on its way forward, and the gradient with respect to it on its way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, format: Flex16, name: str) -> Tensor:
        ctx.format, ctx.name = format, name
        return format.rounded(name, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.format.rounded(f"gradient of {ctx.name}", gradient), None, None
