"""Lists of digits with an operator in front, to be reduced to one digit: the made-up task of the AMPNet paper.

A. L. Gaunt and others (2017), AMPNet, arXiv 1705.09786. The paper reduces lists of at most 10 tokens by one of four
operators, modulo 10. Which operators is ours, the generator too:

    10  mean, rounded down     11  max − min     12  x_1 − x_2 + x_3 − … modulo 10     13  length modulo 10

The operator is drawn uniformly, then the number of digits from 1 to ``longest`` − 1, then the digits.
"""

from __future__ import annotations

import numpy as np
import torch

from manyhands.catalogue import Reference
from manyhands.checks import whole
from manyhands.data.dataset import Arrays, Splits

OPERATORS = 4


def list_reduction(*, samples: int = 10_000, test: int = 1000, longest: int = 10, seed: int = 0) -> Splits:
    """Items ``({"token": (longest,), "length": ()}, digit)``, int64; what lies beyond the length is 0.

    The same arguments give the same lists: they are drawn by NumPy's PCG64 from ``seed``.
    """
    whole("data list_reduction: longest", longest, at_least=2)
    whole("data list_reduction: seed", seed, at_least=0)
    generator = np.random.default_rng(seed)
    train = _drawn(whole("data list_reduction: samples", samples), longest, generator)
    held_out = _drawn(whole("data list_reduction: test", test), longest, generator)
    return Splits(
        train,
        held_out,
        inputs=None,
        classes=10,
        name="list_reduction",
        source=f"list_reduction: {samples:,} + {test:,} lists of at most {longest} tokens, seed {seed}",
    )


vars(list_reduction)["paper"] = Reference(
    "A. L. Gaunt, M. A. Johnson, M. Riechert, D. Tarlow, R. Tomioka, D. Vytiniotis, S. Webster",
    "AMPNet: asynchronous model-parallel training for dynamic neural networks",
    2017,
    "arXiv 1705.09786",
)


def reduced(operator: int, digits: list[int]) -> int:
    """What a list comes to."""
    if operator == 0:
        return sum(digits) // len(digits)
    if operator == 1:
        return max(digits) - min(digits)
    if operator == 2:
        return (sum(digits[::2]) - sum(digits[1::2])) % 10
    return len(digits) % 10


def _drawn(n: int, longest: int, generator: np.random.Generator) -> Arrays:
    token = np.zeros((n, longest), dtype=np.int64)
    length = np.zeros(n, dtype=np.int64)
    target = np.zeros(n, dtype=np.int64)
    for i in range(n):
        operator = int(generator.integers(OPERATORS))
        digits = generator.integers(10, size=int(generator.integers(1, longest))).tolist()
        length[i] = 1 + len(digits)
        token[i, : length[i]] = [10 + operator, *digits]
        target[i] = reduced(operator, digits)
    return Arrays({"token": torch.from_numpy(token), "length": torch.from_numpy(length)}, torch.from_numpy(target))
