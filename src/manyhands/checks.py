"""What counts as a number where a person wrote it: True is not 1, and infinity is not a length."""

from __future__ import annotations

import math
from typing import Any

from manyhands.errors import BadInput


def is_whole(value: object, at_least: int) -> bool:
    """Whether ``value`` is a whole number from ``at_least``; True and False are not numbers here."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def is_positive(value: object) -> bool:
    """Whether ``value`` is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def whole(what: str, value: Any, *, at_least: int = 1) -> int:
    """``value`` if it is a whole number of at least ``at_least``; else `BadInput` that calls it ``what``."""
    if not is_whole(value, at_least):
        raise BadInput(f"{what}={value!r}: it must be a whole number of at least {at_least}.")
    return int(value)
