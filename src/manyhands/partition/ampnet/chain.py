"""A plain `nn.Sequential` as a graph: each part with parameters is a node, with what follows it and has none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from manyhands.errors import BadInput
from manyhands.partition.ampnet.graph import Graph
from manyhands.partition.ampnet.nodes import Loss, Node, Source, Transform


def graph_of(model: nn.Module) -> Graph:
    """``model`` if it is a graph, else the graph of a chain, which holds the model's own modules.

    Raises `BadInput` for what is neither.
    """
    if isinstance(model, Graph):
        return model
    if not _is_chain(model):
        raise BadInput(
            f"ampnet: {type(model).__name__} is neither an ampnet Graph nor a plain nn.Sequential, so there is nothing "
            "that says which parts send what to which. Let the model's factory return either, or use mesh=pipeline=2 "
            "with strategy=synchronous, which traces models."
        )
    nodes: dict[str, Node] = {"source": Source(whole_input)}
    for i, parts in enumerate(_parts(model)):
        nodes[f"part{i}"] = Transform(parts[0] if len(parts) == 1 else nn.Sequential(*parts))
    nodes["loss"] = Loss()
    names = list(nodes)
    return Graph(nodes, [f"{a} -> {b}" for a, b in itertools.pairwise(names)], batched=True)


def whole_input(inputs: Any) -> tuple[tuple[Tensor, ...], dict[str, int]]:
    """All of an instance's input, in one message."""
    return ((inputs,) if isinstance(inputs, Tensor) else tuple(inputs)), {}


def _is_chain(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    assert isinstance(module, nn.Sequential), "a chain is one"
    for child in module:  # not children(): it leaves out a module that comes again
        if _is_chain(child):
            yield from _leaves(child)
        else:
            yield child


def _parts(model: nn.Module) -> list[list[nn.Module]]:
    """Modules in order, cut before each that has parameters, but for the first."""
    parts: list[list[nn.Module]] = [[]]
    learns = False
    for module in _leaves(model):
        has = any(True for _ in module.parameters())
        if has and learns:
            parts.append([])
        learns = learns or has
        parts[-1].append(module)
    return parts
