"""A made-up text, of which it is known how well it can be predicted: each character depends on the two before it.

    P(c_t = k | c_{t−2} = i, c_{t−1} = j) = softmax_k(2·z_ijk),   z ~ N(0, 1)

Knowing this table one predicts with a loss of h nats a character, the mean of H(P(· | c_{t−2}, c_{t−1})) over the text,
and nothing is expected to do better; a model that sees one character only stays far above. So does every model at the
first target of a window, which has one character before it: the longer the windows, the less that counts.
"""

from __future__ import annotations

from bisect import bisect

import numpy as np
import torch

from manyhands.catalogue import Reference
from manyhands.checks import whole
from manyhands.data.dataset import Splits
from manyhands.data.text import split
from manyhands.errors import BadInput

_SHARPNESS = 2.0  # h is then 1.64 nats for 16 characters, as if 5 were equally likely, where one knows nothing: 2.77


def markov(
    *, characters: int = 100_000, length: int = 64, classes: int = 16, limit: int | None = None, seed: int = 0
) -> Splits:
    """A text of ``characters`` out of ``classes`` different ones, each drawn by the two before it; needs no file.

    Windows and split as of ``tinyshakespeare``. The same arguments give the same text: it is drawn by NumPy's PCG64
    from ``seed``, apart from torch's generators. ``source`` says the least loss that can be expected.
    """
    whole("data markov: characters", characters, at_least=20)
    whole("data markov: classes", classes, at_least=2)
    whole("data markov: seed", seed, at_least=0)
    generator = np.random.default_rng(seed)
    try:
        table = np.exp(_SHARPNESS * generator.standard_normal((classes, classes, classes)))
        table /= table.sum(axis=2, keepdims=True)
        text = _drawn(table, generator.random(characters))
    except MemoryError:
        raise BadInput(
            f"data markov: {characters:,} characters out of {classes:,} do not fit into memory. Take fewer."
        ) from None
    train, test = split("markov", torch.from_numpy(text), length=length, limit=limit)
    least = -(table * np.log(table)).sum(axis=2)[text[:-2], text[1:-1]].mean()
    return Splits(
        train,
        test,
        inputs=(length,),
        classes=classes,
        name="markov",
        source=f"markov: {len(train):,} + {len(test):,} windows of {length} characters out of {classes}, seed {seed}; "
        f"the least loss to be expected is {least:.3f}",
    )


vars(markov)["paper"] = Reference(
    "C. E. Shannon", "A mathematical theory of communication", 1948, "Bell System Technical Journal 27, 379-423"
)


def _drawn(table: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """One character for each number of ``uniform``; int64. Lists, because a character takes one at a time."""
    below = table.cumsum(axis=2)
    below[:, :, -1] = 1.0  # a sum of rounded shares may end short of it
    rows, text = below.tolist(), []
    before, last = 0, 0
    for u in uniform.tolist():
        before, last = last, bisect(rows[before][last], u)
        text.append(last)
    return np.array(text, dtype=np.int64)
