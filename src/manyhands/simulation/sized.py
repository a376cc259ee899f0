"""Tensors that have a size and no numbers: what thousands of simulated workers compute with.

torch's meta device is that, too, but an operation there takes 10 to 300 µs, most being worked out in Python; here it
takes less than 1. Elementwise operations give back something of the same size, in-place ones the thing itself, slices
and views what torch would, as far as strategies use them. Whoever asks for a number gets `NoNumbers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from manyhands.errors import ManyhandsError

_META = torch.device("meta")
_REDUCTIONS = frozenset({"sum", "mean", "norm", "dot", "max", "min", "amax", "amin", "prod", "linalg_vector_norm"})


class NoNumbers(ManyhandsError):
    """A number was asked for where there are sizes only."""


class Sized:
    """Behaves as a strided tensor of ``shape`` and ``dtype`` on the meta device, as far as strategies go."""

    __slots__ = ("_base", "dtype", "nbytes", "shape")

    device = _META
    is_meta = True
    requires_grad = False
    layout = torch.strided
    grad = None

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, base: Sized | None = None) -> None:
        self.shape, self.dtype = shape, dtype
        self.nbytes = (shape[0] if len(shape) == 1 else math.prod(shape)) * dtype.itemsize
        self._base = base  # of what this is a view; None: of nothing

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """For `isinstance`."""
        return Tensor

    # -- what is known -------------------------------------------------------------------------------------------------

    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def dim(self) -> int:
        """How many dims."""
        return len(self.shape)

    def element_size(self) -> int:
        """Bytes of one."""
        return self.dtype.itemsize

    def size(self, dim: int | None = None) -> Any:
        """As torch's."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def is_contiguous(self) -> bool:
        """Always."""
        return True

    def is_floating_point(self) -> bool:
        """By dtype."""
        return self.dtype.is_floating_point

    def untyped_storage(self) -> Sized:
        """What all views of it have in common."""
        return self if self._base is None else self._base

    @property
    def _cdata(self) -> int:
        """By which storages are told apart, as torch's are."""
        return id(self)

    def data_ptr(self) -> int:
        """Of the storage."""
        return id(self.untyped_storage())

    # -- parts and shapes ----------------------------------------------------------------------------------------------

    def __getitem__(self, at: Any) -> Sized:
        shape = self.shape
        first = shape[0]
        if type(at) is slice:
            if at.stop == first and at.start == 0 and at.step is None:
                return self  # a view of everything
            lo, hi, step = at.indices(first)
            rows = hi - lo if step == 1 else -(-(hi - lo) // step)
            return Sized((rows if rows > 0 else 0, *shape[1:]), self.dtype, self.untyped_storage())
        if isinstance(at, int):
            if not -first <= at < first:
                raise IndexError(at)
            return Sized(shape[1:], self.dtype, self.untyped_storage())
        if isinstance(at, Tensor) and not at.dtype.is_floating_point and at.dtype is not torch.bool:
            return Sized((*at.shape, *shape[1:]), self.dtype)
        raise NoNumbers(f"an index of type {type(at).__name__}")

    def __setitem__(self, at: Any, value: Any) -> None:
        return

    def view(self, *shape: Any) -> Sized:
        """Another shape, or dtype, of the same elements."""
        if len(shape) == 1 and isinstance(shape[0], torch.dtype):
            dtype = shape[0]
            last = self.shape[-1] * self.dtype.itemsize // dtype.itemsize
            return Sized((*self.shape[:-1], last), dtype, self.untyped_storage())
        wanted = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        if wanted == (-1,) and len(self.shape) == 1:
            return self
        if -1 in wanted:
            known = -math.prod(wanted)
            wanted = tuple(self.numel() // known if n == -1 else n for n in wanted)
        return Sized(wanted, self.dtype, self.untyped_storage())

    reshape = view

    def flatten(self) -> Sized:
        """One dim."""
        return self.view(-1)

    def to(self, *what: Any, **_: Any) -> Sized:
        """Another dtype; everything is on one device."""
        dtype = next((w for w in what if isinstance(w, torch.dtype)), self.dtype)
        return self if dtype is self.dtype else Sized(self.shape, dtype)

    def detach(self) -> Sized:
        """Itself."""
        return self

    def unbind(self) -> list[Sized]:
        """Rows."""
        return [Sized(self.shape[1:], self.dtype, self.untyped_storage())] * self.shape[0]

    def split(self, sizes: Sequence[int]) -> list[Sized]:
        """Parts of the first dim."""
        return [Sized((n, *self.shape[1:]), self.dtype, self.untyped_storage()) for n in sizes]

    # -- arithmetic ----------------------------------------------------------------------------------------------------

    def copy_(self, other: Any) -> Sized:
        """Itself."""
        return self

    def add_(self, other: Any, *, alpha: float = 1) -> Sized:
        """Itself."""
        return self

    def mul_(self, other: Any) -> Sized:
        """Itself."""
        return self

    def new_empty(self, numel: int, *, dtype: torch.dtype | None = None) -> Sized:
        """One dim, elsewhere."""
        return Sized((numel,), dtype or self.dtype)

    def clone(self, **_: Any) -> Sized:
        """Elsewhere."""
        return Sized(self.shape, self.dtype)

    def _like(self, *_: Any) -> Sized:
        return Sized(self.shape, self.dtype)

    def _itself(self, *_: Any) -> Sized:
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = __pow__ = _like
    __iadd__ = __isub__ = __imul__ = __itruediv__ = _itself

    def __getattr__(self, name: str) -> Callable[..., Sized]:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _REDUCTIONS:
            return lambda *_, **__: Sized((), self.dtype)
        if name in ("item", "tolist", "numpy", "cpu", "any", "all", "nonzero", "isfinite"):
            raise NoNumbers(name)
        if name.endswith("_"):
            return lambda *_, **__: self
        return self._like

    def __float__(self) -> float:
        raise NoNumbers("float")

    def __bool__(self) -> bool:
        raise NoNumbers("bool")

    __int__ = __index__ = __float__

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """``torch.add(x, y)`` and the like, and methods of real tensors that are given sizes."""
        name, out = func.__name__, (kwargs or {}).get("out")
        if out is not None:
            return out
        first = args[0]
        if type(first) is cls:
            return getattr(first, name)(*args[1:], **(kwargs or {}))
        if isinstance(first, Tensor):
            if name.endswith("_") or name == "__setitem__":
                return first
            return next(a for a in args if type(a) is cls)._like()
        if name.startswith("_foreach_"):
            return None if name.endswith("_") else [x._like() for x in first]
        if name in ("cat", "stack"):
            n = sum(x.numel() for x in first)
            return Sized((n,) if name == "cat" else (len(first), *first[0].shape), first[0].dtype)
        raise NoNumbers(name)


def empty(numel: int, dtype: torch.dtype) -> Tensor:
    """What stands for a tensor of one dim."""
    return cast(Tensor, Sized((numel,), dtype))


def zeros(numel: int, dtype: torch.dtype) -> Tensor:
    """Payload has a size only; counters, and float64, in which workers agree on things, are numbers."""
    payload = dtype.is_floating_point and dtype is not torch.float64
    return empty(numel, dtype) if payload else torch.zeros(numel, dtype=dtype)
