"""From a description to `Splits`: text, a factory, or data that is already there.

What a factory of the user's may give: `Splits`; ``(train, test)`` data sets; one data set (nothing to test on then); or
tensors ``(x, y)``. A data set is anything with ``__len__`` and ``__getitem__`` whose items are ``(inputs, target)``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from manyhands.calling import call as called
from manyhands.data import datasets, mnist
from manyhands.data.dataset import Arrays, Collated, Dataset, Splits
from manyhands.data.digits import TRAIN, digits
from manyhands.errors import BadInput, UnknownName
from manyhands.grammar import Call, parse_call

log = logging.getLogger(__name__)

#: The target that torch's losses leave out by default; no class.
IGNORED = -100

DataSpec = str | Callable[..., Any] | Splits | tuple[Any, Any] | Dataset

_WORKS = (
    "What works: manyhands.data.Splits; (train, test), each a data set of (inputs, target) items; one such data set; "
    "or tensors (x, y)."
)


def load(spec: DataSpec, *, folder: Path | None = None) -> Splits:
    """The data that ``spec`` describes.

        load("mnist(limit=6000)")
        load("auto")                      # MNIST if its files are at hand, else the embedded digits
        load((x, y))                      # tensors in memory, nothing to test on
        load((train_set, test_set))       # any map-style torch data sets

    ``folder`` (``--data-dir``) goes to a factory that takes one.
    """
    found: Any = spec
    name = "given"
    if isinstance(spec, str):
        call = parse_call(spec, kind="data")
        name = call.name
        factory = _factory(name)
        found = _call(name, factory, call, folder) if callable(factory) and not _is_dataset(factory) else factory
    elif callable(spec) and not _is_dataset(spec):
        name = getattr(spec, "__qualname__", type(spec).__name__)
        found = _call(name, spec, Call(name), folder)
    splits = _splits(found, name)
    log.info("data: %s", splits.source)
    return splits


def auto(*, folder: Path | None = None, limit: int | None = None) -> Splits:
    """MNIST if its files are at hand, never downloading; else the embedded digits. ``source`` says which and why.

    Where there are fewer than ``limit``, all are taken.
    """
    if mnist.at_hand(folder) is not None:
        return mnist.mnist(folder=folder, limit=limit)
    found = digits(limit=limit if limit is None else min(limit, TRAIN))
    return dataclasses.replace(found, source=f"{found.source}, because MNIST is not at hand")


def _factory(name: str) -> Any:
    if name == "auto":
        return auto
    if ":" not in name and name not in datasets:
        raise UnknownName("data set", name, [*datasets, "auto"], also="Your own is reached as my_pkg.module:factory.")
    return datasets.load(name)


def _call(name: str, factory: Callable[..., Any], call: Call, folder: Path | None) -> Any:
    said = dict(call.kwargs)
    if isinstance(said.get("folder"), str):  # a path in text: mnist(folder='data')
        said["folder"] = Path(said["folder"])
    return called("data", name, factory, call.args, said, offered={"folder": folder})


def _splits(found: Any, name: str) -> Splits:
    if isinstance(found, Splits):
        test = None if found.test is None else as_dataset(found.test, name)
        return dataclasses.replace(found, train=as_dataset(found.train, name), test=test)
    if isinstance(found, tuple) and len(found) == 2 and not _is_samples(found):
        train = as_dataset(found[0], name)
        test = None if found[1] is None else as_dataset(found[1], name)
    else:
        train, test = as_dataset(found, name), None
    counted = f"{len(train):,}" + (f" + {len(test):,}" if test is not None else "")
    return Splits(train, test, _shape(train), _classes(found, train, test), name, f"{name}: {counted} samples")


def as_dataset(found: Any, name: str = "given") -> Dataset:
    """``found`` as a `Dataset`; its first item is looked at, so that a wrong form is found before any work."""
    if isinstance(found, TensorDataset) and len(found.tensors) == 2:
        found = found.tensors
    if _is_samples(found):
        arrays = Arrays(_as_tensors(found[0]), _as_tensors(found[1]))
        if len(arrays) == 0:
            raise BadInput(f"data {name}: a data set is empty; there is nothing to learn from.")
        return arrays
    if not _is_dataset(found):
        raise BadInput(f"data {name} is a {_described(found)}, which is no data set. {_WORKS}")
    if len(found) == 0:
        raise BadInput(f"data {name}: a data set is empty; there is nothing to learn from.")
    if isinstance(found, Dataset):
        return found
    item = found[0]
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise BadInput(f"data {name}: an item is a {_described(item)}; an item is a pair (inputs, target). {_WORKS}")
    return Collated(found)


def _is_samples(found: Any) -> bool:
    """``(x, y)``, and not ``(train, test)``: y is a tensor, or x is a dict of them."""
    if not isinstance(found, tuple) or len(found) != 2:
        return False
    return isinstance(found[1], Tensor | np.ndarray) or isinstance(found[0], Tensor | np.ndarray | Mapping)


def _is_dataset(found: Any) -> bool:
    if isinstance(found, type | Mapping | str | Tensor | np.ndarray):
        return False
    return hasattr(found, "__len__") and hasattr(found, "__getitem__")


def _as_tensors(tree: Any) -> Any:
    """NumPy arrays as tensors; float64 ones in torch's default type, as torch reads Python's own numbers."""
    if isinstance(tree, np.ndarray):
        found = torch.from_numpy(np.ascontiguousarray(tree))
        return found.to(torch.get_default_dtype()) if found.dtype is torch.float64 else found
    if isinstance(tree, Mapping):
        return {k: _as_tensors(v) for k, v in tree.items()}
    if isinstance(tree, tuple) and not hasattr(tree, "_fields"):
        return tuple(_as_tensors(v) for v in tree)
    return [_as_tensors(v) for v in tree] if isinstance(tree, list) else tree


def _shape(dataset: Dataset) -> tuple[int, ...] | None:
    inputs, _ = dataset.rows(torch.tensor([0]))
    return tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else None


def _classes(found: Any, *parts: Dataset | None) -> int | None:
    """From whole-number targets in memory, or the ``classes`` that torchvision's sets carry."""
    named = getattr(found[0] if isinstance(found, tuple) else found, "classes", None)
    if isinstance(named, list | tuple):
        return len(named)
    highest = -1
    for part in parts:
        if part is None:
            continue
        target = part.target if isinstance(part, Arrays) else None
        if not isinstance(target, Tensor) or target.is_floating_point() or target.dtype is torch.bool:
            return None
        lowest = int(torch.where(target == IGNORED, 0, target).min())
        if lowest < 0:
            raise BadInput(
                f"data: a target is {lowest}; a whole-number target is a class, counted from 0 ({IGNORED} marks what "
                "is to be ignored). For regression give targets in floating point."
            )
        highest = max(highest, int(target.max()))
    return highest + 1 if highest >= 0 else None


def _described(found: Any) -> str:
    if isinstance(found, tuple | list):
        return f"{type(found).__name__} of {len(found)} ({', '.join(type(x).__name__ for x in found[:3])})"
    if isinstance(found, Tensor):
        return f"tensor of shape {tuple(found.shape)} without a target"
    return type(found).__name__
