"""A made-up classification set of any size and shape: Gaussian clusters.

    x = centre_k + noise · z,   z ~ N(0, 1) for each element,   centre_k a random direction of length 4

The centres lie about 4√2 apart whatever the shape, so that how well the classes can be told apart depends on ``noise``,
and how many samples that takes on the shape. By the best possible rule (the nearest centre), at ten classes of 8×8:
98 in 100 at noise 1, 84 at 1.5, 67 at 2 (measured on 20,000).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch

from manyhands.checks import whole
from manyhands.data.dataset import Arrays, Splits
from manyhands.errors import BadInput

_LENGTH = 4.0  # of a centre: neighbours at noise 1 are 5.7 standard deviations apart, an error of 0.2 % for each pair


def synthetic(
    *,
    samples: int = 2000,
    inputs: Sequence[int] = (1, 8, 8),
    classes: int = 10,
    noise: float = 1.0,
    test: int | None = None,
    seed: int = 0,
) -> Splits:
    """``samples`` to train and ``test`` (a quarter as many) more from the same clusters.

    The same arguments give the same numbers: they are drawn by NumPy's PCG64 from ``seed``, apart from torch's
    generators. Classes are as equal in size as can be, in random order.
    """
    if not isinstance(inputs, tuple | list) or not inputs:
        raise BadInput(f"data synthetic: inputs={inputs!r} is not the shape of a sample; e.g. inputs=(1, 8, 8).")
    whole("data synthetic: samples", samples)
    whole("data synthetic: classes", classes)
    whole("data synthetic: seed", seed, at_least=0)
    for i, n in enumerate(inputs):
        whole(f"data synthetic: inputs[{i}]", n)
    test = whole("data synthetic: test", max(1, samples // 4) if test is None else test)
    if type(noise) not in (int, float) or not 0 <= noise < float("inf"):
        raise BadInput(f"data synthetic: noise={noise!r}; it must be a finite number that is not negative.")
    generator = np.random.default_rng(seed)
    occurring = min(classes, max(samples, test))  # a thousand centres of large images would be most of the memory
    centres = generator.standard_normal((occurring, prod(inputs)), dtype=np.float32)
    centres *= np.float32(_LENGTH) / np.linalg.norm(centres, axis=1, keepdims=True)

    def draw(n: int) -> Arrays:
        labels = generator.permutation(np.arange(n, dtype=np.int64) % classes)
        x = generator.standard_normal((n, prod(inputs)), dtype=np.float32)
        x *= np.float32(noise)
        x += centres[labels]
        return Arrays(torch.from_numpy(x).view(n, *inputs), torch.from_numpy(labels))

    shape = "×".join(map(str, inputs))
    try:
        train, held_out = draw(samples), draw(test)
    except MemoryError:
        raise BadInput(
            f"data synthetic: {samples:,} + {test:,} samples of {shape} do not fit into memory. Take fewer or smaller."
        ) from None
    return Splits(
        train,
        held_out,
        inputs=tuple(inputs),
        classes=classes,
        name="synthetic",
        source=f"synthetic: {samples:,} + {test:,} samples of {shape} in {classes} Gaussian clusters, seed {seed}",
    )
