"""Backward in two parts: the gradient of the inputs now, those of the weights when there is time for them.

P. Qi, X. Wan, G. Huang, M. Lin (2023), Zero bubble pipeline parallelism, arXiv 2401.10241: for y = x·W the two products
dx = dy·Wᵀ and dW = xᵀ·dy need only dy, so the second can wait.

The graph of a stage is walked once per micro-batch. A node from which an input can be reached lies *on the path*; one
on the path with an edge to weights that does not is a *fork* (``addmm``, whose other edge is the weight). The pass
for the inputs runs the path alone and keeps what flows into each fork; later each fork is run again from there
towards its weights only. Nothing is computed twice, except where an operation computes both products at once (custom
functions).

A weight that several forks use (tied within the stage) cannot be told apart this way: such a stage does all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge


class Later:
    """Weight gradients still to be computed. What they need is held until `accumulate`, which may be called once."""

    def __init__(self, forks: Sequence[_Fork]) -> None:
        self._forks = list(forks)

    def accumulate(self) -> None:
        """Add the gradients to the weights' ``.grad``, as ``backward`` does."""
        forks, self._forks = self._forks, []
        for fork in forks:
            edges = [GradientEdge(fork.node, i) for i, g in enumerate(fork.gradients) if g is not None]
            if edges:
                torch.autograd.backward(
                    edges, [g for g in fork.gradients if g is not None], inputs=list(fork.weights.values())
                )


class _Fork:
    """A node with edges to weights, and what flows into it."""

    def __init__(self, node: Node, weights: dict[int, Tensor]) -> None:
        self.node, self.weights = node, weights
        self.gradients: list[Tensor | None] = []

    def keep(self, gradients: tuple[Tensor | None, ...]) -> None:
        """Called by the pass for the inputs."""
        self.gradients = list(gradients)


def inputs_first(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> tuple[list[Tensor | None], Later]:
    """The gradients of ``inputs`` (leaves), and what is left to do for all other leaves of the graph.

    ``gradients``: those of the outputs; None for a 0-dim loss. Without inputs, and where weights are tied, everything
    is done now and added to ``.grad``.
    """
    forks = _forks(outputs, gradients, inputs) if inputs else None
    if forks is None:
        kept = [x.grad for x in inputs]
        for x in inputs:
            x.grad = None
        torch.autograd.backward(list(outputs), list(gradients))
        found = [x.grad for x in inputs]
        for x, before in zip(inputs, kept, strict=True):
            x.grad = before
        return found, Later([])
    hooks = [fork.node.register_prehook(fork.keep) for fork in forks if not fork.gradients]
    try:
        result = torch.autograd.grad(list(outputs), list(inputs), list(gradients), retain_graph=True, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return list(result), Later(forks)


def _forks(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> list[_Fork] | None:
    """All forks below ``outputs``; None if two of them lead to one weight."""
    ends = [get_gradient_edge(x).node for x in inputs]  # held: a node is known by its id
    targets = {id(node) for node in ends}
    roots = [o.grad_fn for o in outputs if o.grad_fn is not None]
    order = _children_first(roots)
    on_path: dict[int, bool] = {}
    weights: dict[int, dict[int, Tensor]] = {}  # by node that lies off the path: the leaves it leads to
    forks: list[_Fork] = []
    for node in order:
        children = [child for child, _ in node.next_functions if child is not None]
        on_path[id(node)] = id(node) in targets or any(on_path[id(c)] for c in children)
        below: dict[int, Tensor] = {}
        for child in children:
            if not on_path[id(child)]:
                below |= weights[id(child)]
        if on_path[id(node)]:
            if below:
                forks.append(_Fork(node, below))
        else:
            leaf: Any = getattr(node, "variable", None)
            weights[id(node)] = below if leaf is None else {id(leaf): leaf}
    for output, gradient in zip(outputs, gradients, strict=True):
        root = output.grad_fn
        if root is not None and not on_path[id(root)]:  # an output that does not depend on the inputs at all
            fork = _Fork(root, weights[id(root)])
            fork.gradients = [None] * output.output_nr + [torch.ones_like(output) if gradient is None else gradient]
            forks.append(fork)
    count = sum(len(f.weights) for f in forks)
    return forks if count == len({w for f in forks for w in f.weights}) else None


def _children_first(roots: Sequence[Node]) -> list[Node]:
    """Every node once, after all that it leads to."""
    order: list[Node] = []
    seen: set[int] = set()
    stack: list[tuple[Node, bool]] = [(r, False) for r in roots]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack += [(child, False) for child, _ in node.next_functions if child is not None and id(child) not in seen]
    return order
