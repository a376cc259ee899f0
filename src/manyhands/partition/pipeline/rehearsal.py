"""A cut tried before anything is started: stages one after the other on a few samples, beside the model they are of.

A traced stage has a forward's operations and nothing else (see `cut`), so without ``torch.no_grad()``, say, it would
train another model without a word. Here both do two micro-batches in training mode, from the same random numbers,
stages as the runtime does them: on copies of what they are given, backward from what comes back. Two, since the first
may not tell: a running mean that is 0 can be multiplied by anything.

*Guarantee*: a cut that passes has, on these samples, the model's outputs, gradients (and of the same parameters),
buffers and use of random numbers; nothing of the model is changed by that.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.errors import BadInput
from manyhands.partition.pipeline.cut import Cut
from manyhands.partition.pipeline.keeping import kept
from manyhands.partition.pipeline.passing import tensors_of
from manyhands.partition.pipeline.replica import refuse_untrainable
from manyhands.partition.pipeline.schedule import Schedule

_PASSES = 2
_NUMBERS = 4096  # of a gradient that are compared


def rehearse(model: nn.Module, into: Cut, schedule: Schedule, sample: Any) -> None:
    """Raise `BadInput` unless every rank has something to train and the stages do on ``sample`` what ``model`` does.

    ``sample``: inputs of a micro-batch. Takes four forwards and backwards on it.
    """
    for rank in range(schedule.ranks):
        mine = schedule.stages_of(rank)
        if not any(p.requires_grad for s in mine for p in into.stages[s].parameters()):
            refuse_untrainable(mine)
    whole, cut = _seen(model, [model], sample), _seen(model, into.stages, sample, into.at)
    _refuse_shared(model, into, whole)
    differing = _difference(whole, cut)
    if differing and not _difference(whole, _seen(model, [model], sample)):  # else it differs from itself
        raise BadInput(
            f"{type(model).__name__} cut before {', '.join(into.at[1:])} would train another model, found on a sample: "
            f"{differing[0]}{f' and {len(differing) - 1} more' if len(differing) > 1 else ''}. A forward with a cut in "
            "it is taken apart into its operations, and what is not one is lost: torch.no_grad(), autocast, a buffer "
            "or attribute that counts, an in-place change that is seen by another name, random numbers of Python's. "
            "Make what does so a module of its own, without a cut in it, or cut elsewhere."
        )


@dataclass(frozen=True)
class _Seen:
    """What passes have made of a model."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]  # some of them, see `_some`
    buffers: dict[str, Tensor]
    changed: list[str]  # names of the buffers that are no longer what they were
    drawn: tuple[Tensor, Any]


def _seen(model: nn.Module, modules: Sequence[nn.Module], sample: Any, names: Sequence[str] = ("",)) -> _Seen:
    with kept(model):
        for module in (model, *modules):
            module.train()
        before = {name: b.clone() for name, b in model.named_buffers()}
        for p in model.parameters():
            p.grad = None
        outputs = [x for _ in range(_PASSES) for x in _pass(model, modules, sample, names)]
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        changed = [name for name, b in buffers.items() if not _alike(b, before.get(name))]
        gradients = {name: None if p.grad is None else _some(p.grad) for name, p in model.named_parameters()}
        return _Seen(outputs, gradients, buffers, changed, (torch.get_rng_state(), random.getstate()))


def _pass(model: nn.Module, modules: Sequence[nn.Module], sample: Any, names: Sequence[str]) -> list[Tensor]:
    """Forward and backward through all; the last one's outputs. Gradients are added to the parameters'."""
    held: list[tuple[str, list[Tensor], list[Tensor]]] = []
    given, leaves = _mapped(Tensor.clone, sample), list[Tensor]()
    for at, (module, name) in enumerate(zip(modules, names, strict=True)):
        which = type(model).__name__ + (f", stage {at} from {name}," if len(modules) > 1 else "")
        with _blamed(which):
            outputs = module(given)
        if at < len(modules) - 1:
            tensors_of(outputs)
        held.append((which, leaves, _tensors(outputs)))
        handed = _mapped(lambda x: x.detach().requires_grad_(x.requires_grad), outputs)
        given, leaves = _mapped(Tensor.clone, handed), _tensors(handed)
    results = held[-1][2]
    generator = torch.Generator().manual_seed(0)  # not ones: what is normalised has no gradient of its sum
    gradients = [torch.randn(x.shape, generator=generator).to(x) for x in results if x.requires_grad]
    for which, leaves, made in reversed(held):
        ends = [x for x in made if x.requires_grad]
        with _blamed(which):
            if ends:
                torch.autograd.backward(ends, gradients)
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves if x.requires_grad]
    return [x.detach() for x in results]


@contextlib.contextmanager
def _blamed(which: str) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        raise BadInput(f"{which} on a sample failed: {type(e).__name__}: {e}") from e


def _some(gradient: Tensor) -> Tensor:
    """Its norm and some thousand of its numbers: all, of both, would take the memory of two models."""
    flat = gradient.flatten()
    return torch.cat([flat.norm()[None].to(flat), flat[:: -(-max(flat.numel(), 1) // _NUMBERS)]])


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _mapped(do: Any, tree: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: do(x) if isinstance(x, Tensor) else x, tree)


def _difference(whole: _Seen, cut: _Seen) -> list[str]:
    """What is not the same, in words."""
    found = []
    if len(whole.outputs) != len(cut.outputs) or not all(map(_alike, whole.outputs, cut.outputs)):
        found.append("its outputs are others")
    for name, gradient in whole.gradients.items():
        # No gradient at all is zero here: a stage that nothing came back from is told so.
        a, b = (g if g is not None and g.count_nonzero() else None for g in (gradient, cut.gradients[name]))
        if (a is None) != (b is None):
            found.append(f"{name} would {'not ' if b is None else ''}be trained")
        elif not _alike(a, b):
            found.append(f"the gradient of {name} is another")
    found += [
        f"buffer {name} is another afterwards"
        for name, b in whole.buffers.items()
        if not _alike(b, cut.buffers.get(name))
    ]
    if not torch.equal(whole.drawn[0], cut.drawn[0]) or whole.drawn[1] != cut.drawn[1]:
        found.append("other random numbers are drawn")
    return found


def _refuse_shared(model: nn.Module, into: Cut, seen: _Seen) -> None:
    """Raise `BadInput` for a buffer that one stage changes and another has, too: each would have a copy of its own."""
    for name in seen.changed:
        buffer = model.get_buffer(name)
        users = [k for k, stage in enumerate(into.stages) if any(b is buffer for b in stage.buffers())]
        if len(users) > 1:
            raise BadInput(
                f"{type(model).__name__} cannot be cut before {', '.join(into.at[1:])}: the forward changes buffer "
                f"{name}, which stages {' and '.join(map(str, users))} use, each on a worker of its own. Cut so that "
                "all that use it are in one stage."
            )


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal but for rounding: opened transformers give torch's masks to other kernels, see `opening`."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    largest = float(a.detach().abs().nan_to_num(0, 0, 0).max()) if a.numel() else 0.0
    off = min(1e3 * torch.finfo(a.dtype).eps, 0.1)
    return torch.allclose(a, b, rtol=off, atol=off * largest, equal_nan=True)
