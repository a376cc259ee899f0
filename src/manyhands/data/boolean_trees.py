"""Boolean expressions as binary trees, each of a shape of its own, to be told whether they are true: made up.

    leaves: 0 false, 1 true      operators: 2 and, 3 or, 4 exclusive or, 5 not both

The number of leaves is drawn uniformly from 2 to ``leaves``; a tree of n leaves has uniformly 1 … n − 1 of them on its
left; operators and leaves are drawn uniformly. A place in the tree is its number in a heap: the root is 1, the children
of i are 2i and 2i + 1.
"""

from __future__ import annotations

import numpy as np
import torch

from manyhands.checks import whole
from manyhands.data.dataset import Arrays, Splits
from manyhands.errors import BadInput

OPERATORS = (
    lambda a, b: a and b,
    lambda a, b: a or b,
    lambda a, b: a != b,
    lambda a, b: not (a and b),
)
_DEEPEST = 62  # the numbers of places are whole numbers of 64 bits


def boolean_trees(*, samples: int = 10_000, test: int = 1000, leaves: int = 8, seed: int = 0) -> Splits:
    """Items ``({"token": (2·leaves − 1,), "place": (2·leaves − 1,)}, 0 or 1)``, int64; place 0 is none.

    Places of a tree are in rising order. The same arguments give the same trees: they are drawn by NumPy's PCG64.
    """
    whole("data boolean_trees: leaves", leaves, at_least=2)
    whole("data boolean_trees: seed", seed, at_least=0)
    if leaves > _DEEPEST:
        raise BadInput(
            f"data boolean_trees: leaves={leaves}; a tree as deep as that has places beyond 64 bits. At most 62."
        )
    generator = np.random.default_rng(seed)
    train = _drawn(whole("data boolean_trees: samples", samples), leaves, generator)
    held_out = _drawn(whole("data boolean_trees: test", test), leaves, generator)
    return Splits(
        train,
        held_out,
        inputs=None,
        classes=2,
        name="boolean_trees",
        source=f"boolean_trees: {samples:,} + {test:,} expressions of at most {leaves} leaves, seed {seed}",
    )


def value(tokens: dict[int, int], place: int = 1) -> bool:
    """What the expression at a place comes to, from the token at each place."""
    token = tokens[place]
    if token < 2:
        return bool(token)
    return bool(OPERATORS[token - 2](value(tokens, 2 * place), value(tokens, 2 * place + 1)))


def _drawn(n: int, leaves: int, generator: np.random.Generator) -> Arrays:
    token = np.zeros((n, 2 * leaves - 1), dtype=np.int64)
    place = np.zeros((n, 2 * leaves - 1), dtype=np.int64)
    target = np.zeros(n, dtype=np.int64)
    for i in range(n):
        tokens = _tree(int(generator.integers(2, leaves + 1)), generator)
        at = sorted(tokens)
        place[i, : len(at)] = at
        token[i, : len(at)] = [tokens[p] for p in at]
        target[i] = value(tokens)
    return Arrays({"token": torch.from_numpy(token), "place": torch.from_numpy(place)}, torch.from_numpy(target))


def _tree(leaves: int, generator: np.random.Generator) -> dict[int, int]:
    """The token at each place."""
    tokens = {}
    ahead = [(1, leaves)]
    while ahead:
        place, n = ahead.pop()
        if n == 1:
            tokens[place] = int(generator.integers(2))
            continue
        tokens[place] = 2 + int(generator.integers(len(OPERATORS)))
        left = int(generator.integers(1, n))
        ahead += [(2 * place, left), (2 * place + 1, n - left)]
    return tokens
