"""Made-up sparse problems, of which it is known how rarely two samples meet (see `sparsity`): HOGWILD's home ground.

A sample is what it touches: ``indices`` into one table of coordinates, and their values where these are not 1. All
samples have supports of one size, so that a batch is plain tensors. ``inputs`` is the shape that a sample would have
were it dense: ``(coordinates,)``.

The same arguments give the same numbers: they are drawn by NumPy's PCG64 from ``seed``, apart from torch's generators.
"""

from __future__ import annotations

import numpy as np
import torch

from manyhands.catalogue import Reference
from manyhands.checks import whole
from manyhands.data.dataset import Arrays, Splits
from manyhands.data.sparsity import delta
from manyhands.errors import BadInput

_HOGWILD = Reference(
    "F. Niu, B. Recht, C. Ré, S. J. Wright",
    "HOGWILD!: a lock-free approach to parallelizing stochastic gradient descent",
    2011,
    "NeurIPS 24, arXiv:1106.5730; section 2 names these problems, the numbers are made up here",
    survey="VI-A",
)


def sparse_logistic(
    *,
    samples: int = 20_000,
    features: int = 2_000,
    support: int = 10,
    noise: float = 0.0,
    test: int | None = None,
    seed: int = 0,
) -> Splits:
    """Two classes told apart by a hyperplane, seen through ``support`` of ``features`` coordinates at a time.

        target = [Σ_k w[index_k] · value_k > 0],   w and √support · value ~ N(0, 1)

    A fraction ``noise`` of the targets is drawn by lot instead. A sample is ``((indices, values), target)``; ``test``
    (a quarter as many) more are drawn alike.

    Features are dealt like cards, all of them before any comes again: ⌊features / support⌋ samples to a deal, between
    which no two share a feature. So Ω = support and Δ = ⌈samples / ⌊features / support⌋⌉ / samples (at most that where
    support does not divide features), and in a single deal all supports are disjoint.
    """
    what = "data sparse_logistic"
    whole(f"{what}: samples", samples)
    whole(f"{what}: features", features)
    whole(f"{what}: seed", seed, at_least=0)
    test = whole(f"{what}: test", max(1, samples // 4) if test is None else test)
    if whole(f"{what}: support", support) > features:
        raise BadInput(f"{what}: support={support}; a sample touches at most all features={features}.")
    _fraction(f"{what}: noise", noise)
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal(features, dtype=np.float32)

    def draw(n: int) -> Arrays:
        indices = _dealt(generator, n, features, support)
        values = generator.standard_normal((n, support), dtype=np.float32) / np.float32(support**0.5)
        target = (weight[indices] * values).sum(axis=1) > 0
        by_lot = generator.random(n) < noise
        target[by_lot] = generator.random(int(by_lot.sum())) < 0.5
        return Arrays((torch.from_numpy(indices), torch.from_numpy(values)), torch.from_numpy(target.astype(np.int64)))

    try:
        train, held_out = draw(samples), draw(test)
    except MemoryError:
        raise BadInput(
            f"{what}: {samples:,} + {test:,} samples of support {support} do not fit into memory. Take fewer."
        ) from None
    dealt = f"Ω = {support}, Δ = {delta(train.inputs[0]):.2g}"
    return Splits(
        train,
        held_out,
        inputs=(features,),
        classes=2,
        name="sparse_logistic",
        source=f"sparse_logistic: {samples:,} + {test:,} samples in {features:,} features, {dealt}, seed {seed}",
    )


def ratings(
    *,
    users: int = 300,
    items: int = 200,
    rank: int = 4,
    density: float = 0.2,
    noise: float = 0.1,
    test: int | None = None,
    seed: int = 0,
) -> Splits:
    """Some entries of a ``users`` × ``items`` matrix of low rank, to be completed by `factorisation`.

        target = Σ_k L[user, k] · R[item, k] + noise · z,   L and R ~ N(0, 1/√rank), so that targets vary about 1

    A sample is ``((user, users + item), target)``: rows of one table that holds L above R. A fraction ``density`` of
    the entries, all different, is there to train and ``test`` (a quarter as many) others to test. Ω = 2 rows, and Δ is
    the fullest row's or column's part of the entries.
    """
    what = "data ratings"
    whole(f"{what}: users", users)
    whole(f"{what}: items", items)
    whole(f"{what}: rank", rank)
    whole(f"{what}: seed", seed, at_least=0)
    _fraction(f"{what}: density", density)
    if type(noise) not in (int, float) or not 0 <= noise < float("inf"):
        raise BadInput(f"{what}: noise={noise!r}; it must be a finite number that is not negative.")
    entries = users * items
    samples = max(1, round(density * entries))
    test = whole(f"{what}: test", max(1, samples // 4) if test is None else test)
    if samples + test > entries:
        raise BadInput(
            f"{what}: {samples:,} entries to train and {test:,} to test of a matrix that has {entries:,}. Take a "
            "smaller density= or test=."
        )
    generator = np.random.default_rng(seed)
    size = np.float32(rank**-0.25)
    left = size * generator.standard_normal((users, rank), dtype=np.float32)
    right = size * generator.standard_normal((items, rank), dtype=np.float32)
    try:
        user, item = np.divmod(generator.choice(entries, samples + test, replace=False), items)
    except MemoryError:
        raise BadInput(f"{what}: {users:,} × {items:,} entries do not fit into memory. Take fewer.") from None
    target = (left[user] * right[item]).sum(axis=1)
    target += np.float32(noise) * generator.standard_normal(len(target), dtype=np.float32)
    rows, target = torch.from_numpy(np.stack([user, users + item], axis=1)), torch.from_numpy(target)
    train, held_out = Arrays(rows[:samples], target[:samples]), Arrays(rows[samples:], target[samples:])
    shape = f"{users:,} × {items:,} of rank {rank}"
    return Splits(
        train,
        held_out,
        inputs=(users + items,),
        classes=None,
        name="ratings",
        source=f"ratings: {samples:,} + {test:,} entries of {shape}, Ω = 2, Δ = {delta(train.inputs):.2g}, seed {seed}",
    )


vars(sparse_logistic)["paper"] = _HOGWILD
vars(ratings)["paper"] = _HOGWILD


def _dealt(generator: np.random.Generator, n: int, features: int, support: int) -> np.ndarray:
    """``(n, support)`` int64, each row sorted: shuffled decks of all features, cut into hands."""
    hands = features // support
    dealt = np.empty((n, support), dtype=np.int64)
    for at in range(0, n, hands):
        deck = generator.permutation(features)[: hands * support].reshape(hands, support)
        dealt[at : at + hands] = deck[: n - at]
    dealt.sort(axis=1)
    return dealt


def _fraction(what: str, value: object) -> None:
    if type(value) not in (int, float) or not 0 <= value <= 1:  # type: ignore[operator]
        raise BadInput(f"{what}={value!r}; it must be a number from 0 to 1.")
