"""The one form of data: samples by number, and many of them at once.

An item is ``(inputs, target)``, each any pytree (dict, list, tuple, named tuple) of tensors. A step asks for `rows`, by
a tensor of sample numbers, and gets the same pytrees with a leading dim for the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import default_collate

from manyhands.errors import BadInput


@runtime_checkable
class Dataset(Protocol):
    """Numbered samples. `Arrays` and `Collated` are the two kinds; your own with these methods is taken as it is."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...

    def rows(self, indices: Tensor) -> tuple[Any, Any]:
        """Samples ``indices`` (int64, one dim) as one batch; no numbers give a batch of no rows."""
        ...


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """A pytree with ``function`` applied to each tensor; anything that is no tensor is a `BadInput`."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {k: map_tensors(function, v) for k, v in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(function, v) for v in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(map_tensors(function, v) for v in tree)
    raise BadInput(
        f"a sample holds a {type(tree).__name__}; inputs and target are tensors, or dicts, lists or tuples of tensors."
    )


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a pytree, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, tree)
    return found


class Arrays:
    """Samples in memory: pytrees of tensors whose first dim is the sample.

    `rows` is on the path of every step: one ``index_select`` for each tensor.
    """

    def __init__(self, inputs: Any, target: Any) -> None:
        lengths = [t.shape[0] if t.dim() else None for t in (*tensors(inputs), *tensors(target))]
        if not lengths or None in lengths or len(set(lengths)) != 1:
            raise BadInput(
                f"inputs and target hold {', '.join(map(str, lengths)) or 'no'} samples; every tensor must have one "
                "row for each sample."
            )
        self.inputs, self.target = (map_tensors(Tensor.contiguous, tree) for tree in (inputs, target))
        self._length = int(lengths[0] or 0)
        self._plain = isinstance(inputs, Tensor) and isinstance(target, Tensor)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int, /) -> tuple[Any, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return map_tensors(lambda t: t[index], self.inputs), map_tensors(lambda t: t[index], self.target)

    def rows(self, indices: Tensor) -> tuple[Any, Any]:
        """Samples ``indices`` as one batch, copied."""
        if self._plain:
            return self.inputs.index_select(0, indices), self.target.index_select(0, indices)
        take: Callable[[Tensor], Tensor] = lambda t: t.index_select(0, indices)  # noqa: E731
        return map_tensors(take, self.inputs), map_tensors(take, self.target)


class Collated:
    """Any map-style torch data set, or sequence, of ``(inputs, target)`` items, joined by torch's ``default_collate``.

    Items are fetched in the worker's own process, one after the other; a set that offers ``__getitems__`` is asked
    once for a whole batch.
    """

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int, /) -> tuple[Any, Any]:
        inputs, target = self.items[index]
        return inputs, target

    def rows(self, indices: Tensor) -> tuple[Any, Any]:
        """Samples ``indices`` as one batch."""
        numbers = indices.tolist()
        if not numbers:
            inputs, target = self.rows(torch.tensor([0]))
            return map_tensors(lambda t: t[:0], inputs), map_tensors(lambda t: t[:0], target)
        at_once = getattr(self.items, "__getitems__", None)
        inputs, target = default_collate(at_once(numbers) if at_once else [self.items[i] for i in numbers])
        return inputs, target


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set as training and test samples, and what a model must know of it.

    ``inputs`` is the shape of one sample (of a sparse one, were it dense), None when a sample is not a single tensor;
    ``classes`` is None when the target is not a class or nobody said how many there are; ``test`` is None when there is
    nothing to test on.
    """

    train: Dataset
    test: Dataset | None
    inputs: tuple[int, ...] | None
    classes: int | None
    name: str
    source: str  # one line that says where it came from
