"""Tensors of any dtype as transports move them: floating point as it is, complex as pairs, the rest as int64."""

from __future__ import annotations

import torch
from torch import Tensor

from manyhands.errors import BadInput

#: What every transport moves as it is.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
)


def carried(x: Tensor, name: str = "a buffer") -> Tensor:
    """A new contiguous tensor with the values of ``x`` that every transport moves; `put_down` reverses it.

    Floating point exactly if it may be averaged: a complex number travels as its two parts, 8-bit floats as float32.
    """
    kind = str(x.dtype).removeprefix("torch.")
    if x.layout is not torch.strided or x.is_quantized:
        raise BadInput(f"{name} is {kind} in {x.layout} layout: what workers share is dense. Use to_dense().")
    if x.is_complex():
        return torch.view_as_real(x.detach().resolve_conj()).clone(memory_format=torch.contiguous_format)
    if x.dtype in _FLOATS:
        return x.detach().clone(memory_format=torch.contiguous_format)
    if kind.startswith("float8"):
        return x.detach().to(torch.float32).contiguous()
    if x.dtype in _WHOLE:
        return x.detach().to(torch.int64, copy=True).contiguous()
    raise BadInput(f"{name} is {kind}: workers share floating point, complex, whole numbers and truth values.")


def put_down(x: Tensor, like: Tensor) -> Tensor:
    """What was `carried`, in the dtype and shape of ``like``."""
    return torch.view_as_complex(x) if like.is_complex() else x.to(like.dtype).view(like.shape)
