"""A chain as parts: an `nn.Sequential`, nested ones as their children, an `nn.TransformerEncoder` as its layers."""

from __future__ import annotations

from torch import nn

from manyhands.errors import BadInput
from manyhands.partition.pipeline.parts import Parts, in_mode


def is_chain(module: nn.Module) -> bool:
    """Whether ``module`` is no more than its children in a row."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and not hooked


class Chain(Parts):
    """The children of a sequential, nested ones in place of their parents."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names, self.starts = [], {}
        self.modules: list[nn.Module] = []
        self._walk(model, "")
        if not self.names:
            raise BadInput(f"{type(model).__name__} is empty; there is nothing to cut.")

    def _walk(self, module: nn.Module, prefix: str) -> None:
        for name, child in module._modules.items():
            if child is None:
                continue
            self.starts[prefix + name] = len(self.names)
            layers = isinstance(child, nn.ModuleList) and type(module) is nn.TransformerEncoder
            if (is_chain(child) or layers or type(child) is nn.TransformerEncoder) and len(child._modules):
                self._walk(child, f"{prefix}{name}.")
            else:
                self.names.append(prefix + name)
                self.modules.append(child)

    def module(self, lo: int, hi: int) -> nn.Module:
        """See `Parts.module`."""
        return in_mode(nn.Sequential(*self.modules[lo:hi]), self.model)
