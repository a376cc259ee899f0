"""``limit=``: fewer training samples, the first of them."""

from __future__ import annotations

from manyhands.errors import BadInput


def limited(name: str, limit: int | None, available: int) -> int:
    """How many training samples are taken."""
    if limit is None:
        return available
    if type(limit) is not int or not 1 <= limit <= available:
        raise BadInput(f"data {name}: limit={limit!r}; it must be a whole number from 1 to {available:,}.")
    return limit
