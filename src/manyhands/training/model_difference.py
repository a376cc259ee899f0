"""Is this the model that the checkpoint was written by? A table of the tensors that say no."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from manyhands.errors import BadInput

#: A tensor, or the shape and dtype of one.
Signature = Tensor | tuple[Sequence[int], torch.dtype]

#: What fits a terminal with the message around it.
ROWS, NAME_WIDTH = 20, 60


def difference_table(expected: Mapping[str, Signature], found: Mapping[str, Signature]) -> str | None:
    """The tensors that are missing, extra or of another shape or dtype, at most 20 of them; None if none is.

    >>> print(difference_table({"fc.weight": ((10, 50), torch.float32)}, {"fc.weight": ((10, 20), torch.float32)}))
    tensor     this model        checkpoint
    fc.weight  float32 [10, 50]  float32 [10, 20]
    """
    ours = {name: _text(signature) for name, signature in expected.items()}
    theirs = {name: _text(signature) for name, signature in found.items()}
    names = [*ours, *(name for name in theirs if name not in ours)]
    rows = [(name, ours.get(name, "-"), theirs.get(name, "-")) for name in names if ours.get(name) != theirs.get(name)]
    if not rows:
        return None
    shown = [("tensor", "this model", "checkpoint"), *((_short(name), a, b) for name, a, b in rows[:ROWS])]
    name_width, our_width = (max(len(row[i]) for row in shown) for i in (0, 1))
    lines = [f"{name:<{name_width}}  {a:<{our_width}}  {b}" for name, a, b in shown]
    if len(rows) > ROWS:
        lines.append(f"… and {len(rows) - ROWS} more")
    return "\n".join(lines)


def check_same_model(expected: Mapping[str, Signature], found: Mapping[str, Signature], *, source: object) -> None:
    """Raise `BadInput` with the table, unless the checkpoint at ``source`` holds just the ``expected`` tensors."""
    table = difference_table(expected, found)
    if table is not None:
        raise BadInput(
            f"The checkpoint {source} belongs to another model: names, shapes and dtypes have to agree.\n{table}\n"
            "Resume with the model it was written by, or start without --resume."
        )


def _text(signature: Signature) -> str:
    shape, dtype = (signature.shape, signature.dtype) if isinstance(signature, Tensor) else signature
    return f"{dtype}".removeprefix("torch.") + f" {list(shape)}"


def _short(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH // 2 - 1]}…{name[-NAME_WIDTH // 2 :]}"
