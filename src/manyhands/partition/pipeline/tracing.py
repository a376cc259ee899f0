"""What `torch.fx` sees of a forward: its operations, the same in training and evaluation.

What is traced is operations, and the rest of a forward is lost: ``torch.no_grad()``, a buffer that counts, Python's own
state. Modules that cannot be traced, or do something else in training, are left whole. Transformers of torch's are
opened (see `opening`).
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import fx, nn

from manyhands.errors import BadInput
from manyhands.partition.pipeline.keeping import kept
from manyhands.partition.pipeline.opening import OPENED

CURE = (
    "A model that can be cut is an nn.Sequential, or has a forward of one argument without branches that depend on its "
    "values."
)


def trace(model: nn.Module, into: Sequence[str] | None) -> tuple[fx.Graph, dict[str, str]]:
    """The operations of a forward, the same in training and evaluation; and what modules are left whole, and why.

    What a forward does to buffers and attributes while it is traced is undone.
    """
    name = type(model).__name__
    fixed = {}
    parameters = list(inspect.signature(model.forward).parameters.values())
    for p in parameters[1:]:
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise BadInput(f"{name} cannot be cut: its forward takes {p.name} beside the inputs. {CURE}")
        if p.default is not p.empty:
            fixed[p.name] = p.default
    whole: dict[str, str] = {}  # what cannot be traced, or changes between training and evaluation: parts as they are
    while True:
        graphs = []
        tracer = _Tracer(whole, into)
        try:
            for mode in (False, True):
                tracer = _Tracer(whole, into)
                with kept(model), _len_noted():
                    model.train(mode)
                    graphs.append(_without_checks(tracer.trace(model, concrete_args=fixed or None)))
        except Exception as e:
            if tracer.failed:
                whole[tracer.failed] = str(e).partition("\n")[0]
                continue
            reason = str(e).partition("\n")[0]
            raise BadInput(f"{name} cannot be cut: torch.fx cannot trace its forward ({reason}). {CURE}") from e
        differing = _difference(*graphs)
        if differing is None:
            return graphs[1], whole
        if not differing[1]:
            raise BadInput(
                f"{name} cannot be cut: its forward does something else in training than in evaluation, outside of its "
                f"modules ({differing[0]}). Use a module for it, such as nn.Dropout for functional.dropout."
            )
        whole[differing[1]] = f"it does something else in training than in evaluation: {differing[0]}"


class _Tracer(fx.Tracer):
    """Takes some modules as they are, and notes in which module it came to grief."""

    def __init__(self, whole: Collection[str], into: Sequence[str] | None) -> None:
        super().__init__()
        self._whole, self._into = whole, into
        self.failed = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch's own, the layers of a cut, what was asked for, and what no cut lies in."""
        if self._into is not None and not any(name.startswith(f"{module_qualified_name}.") for name in self._into):
            return True
        if module_qualified_name in self._whole or type(m) in OPENED:
            return module_qualified_name in self._whole
        return type(m).__module__.startswith("manyhands.partition.") or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """As torch does it, but that its containers are opened; the innermost module that fails is the one to blame."""
        if type(m) in OPENED:
            forward = functools.partial(OPENED[type(m)], m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


@contextlib.contextmanager
def _len_noted() -> Iterator[None]:
    """``len`` of what is traced is an operation: Python wants a whole number of it, which torch.fx does not have."""
    plain = builtins.len

    def noted(x: Any) -> Any:
        return x.tracer.create_proxy("call_function", plain, (x,), {}) if isinstance(x, fx.Proxy) else plain(x)

    builtins.len = noted
    try:
        yield
    finally:
        builtins.len = plain


def _difference(evaluating: fx.Graph, training: fx.Graph) -> tuple[str, str] | None:
    """Where two graphs of one model part: what is done, and within which module ("": in the model's own forward)."""
    pairs = itertools.zip_longest(evaluating.nodes, training.nodes)
    for a, b in pairs:
        if a is None or b is None or _said(a) != _said(b):
            node = b if b is not None else a
            inside = list(node.meta.get("nn_module_stack", {}))
            return _name(node.target), inside[-1] if inside else ""
    return None


def _said(node: fx.Node) -> tuple[str, str, str, str]:
    return node.op, _name(node.target), str(node.args), str(node.kwargs)


def _name(target: Any) -> str:
    return str(getattr(target, "__name__", target))


def _without_checks(graph: fx.Graph) -> fx.Graph:
    """Arguments that were fixed are not asked for, and what checks that they have their defaults goes, too."""

    def erase(node: fx.Node) -> None:
        for user in list(node.users):
            erase(user)
        graph.erase_node(node)

    for argument in [n for n in graph.nodes if n.op == "placeholder"][1:]:
        erase(argument)
    return graph
