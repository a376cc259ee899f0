"""Text as samples: windows of characters, and for each character the one that follows.

    inputs[i] = c[i·T … i·T + T − 1],   target[i] = c[i·T + 1 … i·T + T],   T = length

Windows do not overlap, so that an epoch predicts every character once, but for the first and the last few that fill no
window: (n − 1) mod T of n. A sample is a window; all have T targets, so that a mean over samples is a mean over
characters, whoever has how many of them.
"""

from __future__ import annotations

from torch import Tensor

from manyhands.checks import whole
from manyhands.data.dataset import Arrays
from manyhands.data.limits import limited
from manyhands.errors import BadInput


def windows(text: Tensor, length: int) -> Arrays:
    """All windows of ``text`` (int64, one dim); ``(windows, length)`` inputs and as many targets."""
    n = (len(text) - 1) // length
    return Arrays(text[: n * length].view(n, length), text[1 : n * length + 1].view(n, length))


def split(name: str, text: Tensor, *, length: int, limit: int | None = None) -> tuple[Arrays, Arrays]:
    """Windows of the first nine tenths of ``text`` to train, of the rest to test.

    ``limit`` keeps only that many of the training windows. `BadInput` where a part is shorter than a window.
    """
    train, test = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    if whole(f"data {name}: length", length) >= len(test):
        raise BadInput(
            f"data {name}: length={length:,}; the text to test on has {len(test):,} characters, and a window and the "
            f"character after it must fit into it. E.g. length={max(1, min(64, len(test) - 1))}."
        )
    kept = limited(name, limit, (len(train) - 1) // length)
    return windows(train[: kept * length + 1], length), windows(test, length)
