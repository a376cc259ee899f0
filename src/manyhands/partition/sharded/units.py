"""Which parameters are gathered together and when they are needed, found by watching a forward pass of one sample.

A *unit* is modules that follow each other in the forward pass and the parameters that are used inside of them and
nowhere else. One unit at a time is needed, so all others may be elsewhere. What does not fit this is kept through the
step: parameters that several units use (tied embeddings), of modules that are called more than once, or of a module
around others that are units.

Watching what is used, instead of going by the tree of modules, finds a weight that another module reads directly
(an embedding's used as the output layer, what torch's attention does with its projection).
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from manyhands.communication.communicator import reference_B
from manyhands.contract import BUCKET_B

#: The largest unit is this part of the model, so that what is gathered beside the slices stays small; but not smaller
#: than a bucket, below which an exchange takes as long for less.
PARTS = 16

_WATCHING = threading.Lock()  # the random numbers drawn meanwhile are put back, where workers may be threads


@dataclass(frozen=True)
class Unit:
    """Modules, by path, of which entering any is when the parameters, by name, are needed."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Units:
    """In the order of the forward pass, and what is needed throughout."""

    units: tuple[Unit, ...]
    kept: tuple[str, ...]

    def __str__(self) -> str:
        count = len(self.units)
        throughout = f", {len(self.kept)} parameters kept through a step" if self.kept else ""
        return f"{count} unit{'' if count == 1 else 's'} gathered in turn{throughout}"


def exchanged_B(stage: int, units_B: Sequence[int], kept_B: Sequence[int], size: int, passes: int = 1) -> int:
    """What a rank sends in a step of so many passes (micro-batches), by the bytes of what is gathered at once.

    >>> exchanged_B(3, [300, 600], [], 3) == 3 * 2 * 900 // 3
    True
    """
    gathers = 1 if stage == 2 else 2 * passes
    gathered = [reference_B("all_gather", n, size) for n in units_B]
    scattered = [reference_B("reduce_scatter", n, size) for n in units_B]
    kept = sum(reference_B("all_gather", n, size) + reference_B("reduce_scatter", n, size) for n in kept_B)
    return gathers * sum(gathered) + passes * sum(scattered) + kept


def units_of(model: nn.Module, given: Sequence[Any], *, evaluated: bool = True, unit_B: int = BUCKET_B) -> Units:
    """Of a model that is called with ``given``, a batch of one sample; it is left as it is.

    ``evaluated``: it is called so in evaluation, too, where its modules may go another way. ``unit_B``: how large a
    unit may be in any case.
    """
    size = {name: p.nbytes for name, p in model.named_parameters() if p.requires_grad}
    with _WATCHING:
        seen = [_watched(model, given, training) for training in (True, *([False] if evaluated else []))]
    once = {path for path in dict(model.named_modules()) if all(len(s.entered.get(path, ())) == 1 for s in seen)}
    within = {
        name: functools.reduce(frozenset.__and__, (s.within[name] for s in seen if name in s.within)) & once
        for name in size
        if any(name in s.within for s in seen)
    }
    limit = max(unit_B, sum(size.values()) // PARTS)
    found = sorted(_largest(model, "", list(within), within, once, size, limit), key=lambda u: seen[0].begins(u[0]))
    made: list[tuple[list[str], list[str]]] = []
    ends = [0] * len(seen)
    for path, names in found:
        if any(s.begins(path) < end for s, end in zip(seen, ends, strict=True)):
            continue  # it lies in another, or comes in another order in evaluation
        ends = [s.ends(path) for s in seen]
        if made and sum(size[n] for n in [*made[-1][1], *names]) <= limit:
            made[-1][0].append(path)
            made[-1][1].extend(names)
        else:
            made.append(([path], list(names)))
    placed = {name for _, names in made for name in names}
    units = tuple(Unit(tuple(paths), tuple(names)) for paths, names in made)
    return Units(units, tuple(name for name in size if name not in placed))


def _largest(
    model: nn.Module,
    path: str,
    names: list[str],
    within: dict[str, frozenset[str]],
    once: set[str],
    size: dict[str, int],
    limit: int,
) -> Iterator[tuple[str, list[str]]]:
    """The largest modules from ``path`` on down that are within the limit, with those of ``names`` used inside only.

    A module with nothing in it to divide is one however large it is.
    """
    inner = {below: [n for n in names if below in within[n]] for below in _entered_below(model, path, once)}
    inner = {below: theirs for below, theirs in inner.items() if theirs}
    if path in once and (not inner or sum(size[n] for n in names) <= limit):
        yield path, names
        return
    for below, theirs in inner.items():
        yield from _largest(model, below, theirs, within, once, size, limit)


def _entered_below(model: nn.Module, path: str, once: set[str]) -> Iterator[str]:
    """The nearest modules below ``path`` that are entered: a list of modules is not, what it holds is."""
    for name, _ in model.get_submodule(path).named_children():
        below = f"{path}.{name}".lstrip(".")
        if below in once:
            yield below
        else:
            yield from _entered_below(model, below, once)


# -- watching ----------------------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """By module when it was entered and left, and by parameter the modules in which every use of it lies."""

    entered: dict[str, list[int]] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    within: dict[str, frozenset[str]] = field(default_factory=dict)

    def begins(self, path: str) -> int:
        return self.entered[path][0]

    def ends(self, path: str) -> int:
        return self.left[path]


class _Uses(TorchFunctionMode):
    """Calls ``used`` with each argument of what makes a tensor; a size or dtype that is asked for needs no values."""

    def __init__(self, used: Callable[[Any], None]) -> None:
        super().__init__()
        self._used = used

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) for x in tree_leaves(result)):
            for x in tree_leaves([args, kwargs]):
                self._used(x)
        return result


def _watched(model: nn.Module, given: Sequence[Any], training: bool) -> _Seen:
    parameters = {id(p): p for p in model.parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    double = copy.deepcopy(model, dict(parameters))  # buffers of its own, the parameters themselves
    seen, inside, time = _Seen(), list[str](), 0

    def enter(path: str) -> None:
        nonlocal time
        time += 1
        seen.entered.setdefault(path, []).append(time)
        inside.append(path)

    def leave(path: str) -> None:
        nonlocal time
        time += 1
        seen.left[path] = time
        inside.pop()

    def used(x: Any) -> None:
        name = names.get(id(x))
        if name is not None:
            seen.within[name] = seen.within.get(name, frozenset(inside)) & frozenset(inside)

    double.train(training)
    for path, module in double.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # one sample has no variance
        module.register_forward_pre_hook(lambda *_, path=path: enter(path))
        module.register_forward_hook(lambda *_, path=path: leave(path))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _Uses(used):
        torch.manual_seed(0)
        device = next((p.device for p in parameters.values()), None)
        double(*tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tuple(given)))
    return seen
