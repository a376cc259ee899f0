"""Nested state as plain JSON beside a flat dict of tensors, and back, types included.

    {"adam": {0: {"step": tensor, "betas": (0.9, inf)}}}
      → {"adam": {"$dict": [[0, {"step": {"$tensor": "adam/0/step"}, "betas": {"$tuple": [0.9, {"$float": "inf"}]}}]]}}
      +  {"adam/0/step": tensor}

JSON has no tuples, no infinities, and only text as keys; each of those is an object with one key that begins with "$".
A dict of the user's with such a key, or with a key that is not text, is written as a list of pairs, so nothing can be
mistaken. Every tensor, a 0-dim one too, goes to the flat dict; numbers stay numbers. Of dicts, lists, tuples, numbers
and NumPy scalars of other classes the plain value is kept. Whatever else is refused with its path: no pickle stands by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from manyhands.errors import BadInput

#: safetensors keeps this name for itself.
RESERVED = "__metadata__"


def encode(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Structure for ``json.dumps(…, allow_nan=False)``, and the tensors by path."""
    tensors: dict[str, Tensor] = {}
    try:
        return _encode(state, (), tensors), tensors
    except RecursionError:
        raise BadInput("The state to store contains itself, or is nested hundreds of levels deep.") from None


def _encode(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        key = "/".join(path).encode("utf-8", "backslashreplace").decode()
        while key in tensors or key == RESERVED:  # {"a/b": x, "a": {"b": y}}
            key += "'"
        tensors[key] = value
        return {"$tensor": key}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, list | tuple):
        items = [_encode(item, (*path, str(i)), tensors) for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(item, (*path, key), tensors) for key, item in value.items()}
        return {"$dict": [[_key(key, path), _encode(item, (*path, str(key)), tensors)] for key, item in value.items()]}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise BadInput(
        f"State {'/'.join(path) or 'given'} is a {kind}: a checkpoint holds "
        "tensors, numbers, text, True/False/None, lists, tuples and dicts. Turn it into those first."
    )


def _key(key: Any, path: tuple[str, ...]) -> Any:
    if isinstance(key, bool | str | int) or key is None:
        return key
    raise BadInput(f"State {'/'.join(path) or 'given'} has the key {key!r}: keys are text, whole numbers or None.")


def decode(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `encode` was given. A structure that `encode` never wrote raises KeyError, TypeError or ValueError."""
    if isinstance(structure, list):
        return [decode(item, tensors) for item in structure]
    if not isinstance(structure, dict):
        return structure
    match structure:
        case {"$tensor": key}:
            return tensors[key]
        case {"$float": text}:
            return float(text)
        case {"$tuple": items}:
            return tuple(decode(item, tensors) for item in items)
        case {"$dict": pairs}:
            return {key: decode(item, tensors) for key, item in pairs}
    return {key: decode(item, tensors) for key, item in structure.items()}
