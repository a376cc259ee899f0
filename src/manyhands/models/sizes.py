"""The sizes that a model is built for, checked once, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from manyhands.checks import whole
from manyhands.errors import BadInput


def sample_shape(model: str, inputs: Any) -> tuple[int, ...]:
    """``inputs`` as a tuple of positive sizes, the shape of one sample."""
    if isinstance(inputs, str) or not isinstance(inputs, Sequence) or not inputs:
        raise BadInput(f"model {model}: inputs={inputs!r} is not the shape of a sample; e.g. inputs=(1, 28, 28).")
    return tuple(whole(f"model {model}: a size in inputs", n) for n in inputs)
