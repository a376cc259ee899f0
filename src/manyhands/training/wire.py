"""Values between the launcher and its workers as bytes: JSON with tensors laid behind it. No pickle.

    message = length of header (8 bytes) | header (JSON) | tensors, one after the other

Numbers, text, None, booleans, lists, tuples, dicts with text keys and tensors travel; anything else is refused. An
error travels as the name of its class among ours (`family`) and what it says.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from manyhands import errors
from manyhands.errors import ManyhandsError

_TENSOR, _TUPLE = "__tensor__", "__tuple__"


def encode(value: Any) -> bytes:
    """``value`` as bytes; raises TypeError for what cannot travel."""
    bodies: list[bytes] = []
    header = json.dumps(_pack(value, bodies)).encode()
    return b"".join([len(header).to_bytes(8, "little"), header, *bodies])


def decode(data: bytes) -> Any:
    """What `encode` was given."""
    n = int.from_bytes(data[:8], "little")
    return _unpack(json.loads(data[8 : 8 + n]), memoryview(data)[8 + n :])


def _pack(value: Any, bodies: list[bytes]) -> Any:
    if isinstance(value, Tensor):
        body = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        at = sum(map(len, bodies))
        bodies.append(body)
        return {_TENSOR: [str(value.dtype).removeprefix("torch."), list(value.shape), at]}
    if isinstance(value, tuple):
        return {_TUPLE: [_pack(v, bodies) for v in value]}
    if isinstance(value, list):
        return [_pack(v, bodies) for v in value]
    if isinstance(value, dict):
        if not all(isinstance(k, str) for k in value):
            raise TypeError(f"only dicts with text keys travel between processes, got keys {list(value)[:5]}")
        return {k: _pack(v, bodies) for k, v in value.items()}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"a {type(value).__name__} cannot travel between processes; return numbers, text, lists or tensors")


def _unpack(value: Any, body: memoryview) -> Any:
    if isinstance(value, list):
        return [_unpack(v, body) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {_TENSOR}:
        name, shape, at = value[_TENSOR]
        dtype = getattr(torch, name)
        numel = 1
        for extent in shape:
            numel *= extent
        raw = bytearray(body[at : at + numel * dtype.itemsize])
        return torch.frombuffer(raw, dtype=dtype).reshape(shape) if numel else torch.empty(shape, dtype=dtype)
    if set(value) == {_TUPLE}:
        return tuple(_unpack(v, body) for v in value[_TUPLE])
    return {k: _unpack(v, body) for k, v in value.items()}


def family(error: BaseException) -> str | None:
    """The name of the class in `errors` that ``error`` is or descends from; None for what is none of ours.

    A class of the user's that is only *called* like one of ours is none of ours.
    """
    return next((c.__name__ for c in type(error).__mro__ if getattr(errors, c.__name__, None) is c), None)


def rebuilt(kind: str, message: str) -> ManyhandsError:
    """An error of that class that says ``message``, as it came from another process."""
    found: type[ManyhandsError] = getattr(errors, kind)
    made = found.__new__(found)
    Exception.__init__(made, message)
    return made
