"""Workers that are late now and then, or always: by how much a step's computing is stretched (survey §VI-A).

    lognormal(sigma=0.3)         every step anew: e^{σz − σ²/2}, z standard normal; what steps on shared hosts look like
    exponential()                every step anew; the mean of the largest of P is H_P = 1 + 1/2 + … + 1/P
    pareto(alpha=2.5)            every step anew, heavy tail: P(x > k x_m) = k^{−α}; rarely, but very late
    slow(workers=1, factor=3)    the last workers, always

The first three have mean 1, so that the cost of a step is the mean one. Several kinds multiply. Every worker draws from
a stream of its own, made of (seed, place in the list, rank): whoever asks in which order gets the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from manyhands.calling import described
from manyhands.checks import is_positive, is_whole
from manyhands.grammar import format_description
from manyhands.simulation.disturbances import stragglers

#: Factors drawn at a time.
BLOCK = 256


class Stragglers(ABC):
    """A description: comparable, printable, parseable."""

    name: ClassVar[str]

    def __str__(self) -> str:
        return format_description(self.name, self)

    @abstractmethod
    def draw(self, generator: np.random.Generator, n: int, *, rank: int, workers: int) -> NDArray[np.float64]:
        """The next ``n`` factors of a worker."""


@dataclass(frozen=True)
class Lognormal(Stragglers):
    """e^{σz − σ²/2}."""

    name: ClassVar[str] = "lognormal"
    sigma: float = 0.3

    def __post_init__(self) -> None:
        if not (is_positive(self.sigma) and self.sigma <= 5):
            raise ValueError(f"sigma={self.sigma!r}: the spread of the logarithm is a number above 0 and up to 5")

    def draw(self, generator: np.random.Generator, n: int, *, rank: int, workers: int) -> NDArray[np.float64]:
        """See `Stragglers.draw`."""
        return np.exp(self.sigma * generator.standard_normal(n) - self.sigma**2 / 2)


@dataclass(frozen=True)
class Exponential(Stragglers):
    """Mean 1."""

    name: ClassVar[str] = "exponential"

    def draw(self, generator: np.random.Generator, n: int, *, rank: int, workers: int) -> NDArray[np.float64]:
        """See `Stragglers.draw`."""
        return generator.standard_exponential(n)


@dataclass(frozen=True)
class Pareto(Stragglers):
    """x_m U^{−1/α} with x_m = (α − 1)/α, so that the mean is 1."""

    name: ClassVar[str] = "pareto"
    alpha: float = 2.5

    def __post_init__(self) -> None:
        if not (is_positive(self.alpha) and self.alpha > 1 and math.isfinite(self.alpha)):
            raise ValueError(f"alpha={self.alpha!r}: above 1, or there is no mean; 2 and less have no variance")

    def draw(self, generator: np.random.Generator, n: int, *, rank: int, workers: int) -> NDArray[np.float64]:
        """See `Stragglers.draw`."""
        return (generator.pareto(self.alpha, n) + 1) * ((self.alpha - 1) / self.alpha)


@dataclass(frozen=True)
class Slow(Stragglers):
    """The last ``workers`` take ``factor`` times as long."""

    name: ClassVar[str] = "slow"
    workers: int = 1
    factor: float = 2.0

    def __post_init__(self) -> None:
        if not is_whole(self.workers, 1):
            raise ValueError(f"workers={self.workers!r}: how many are slow, from 1")
        if not is_positive(self.factor):
            raise ValueError(f"factor={self.factor!r}: how many times as long they take, a positive number")

    def draw(self, generator: np.random.Generator, n: int, *, rank: int, workers: int) -> NDArray[np.float64]:
        """See `Stragglers.draw`."""
        return np.full(n, self.factor if rank >= workers - self.workers else 1.0)


def stragglers_from(value: str | Stragglers) -> Stragglers:
    """One kind from its text."""
    return described("stragglers", value, stragglers, Stragglers, "lognormal(sigma=0.3)")  # type: ignore[type-abstract]


class Recorded:
    """Factors as they were measured on workers side by side, in their order: what `Delays` draws, replayed.

    ``factors`` is (steps × workers that were measured); rows are moments, so that what slows down all of them at once
    still does. Workers beyond those have the columns of others, begun elsewhere.
    """

    kinds = ("recorded",)

    def __init__(self, factors: NDArray[np.float64], workers: int) -> None:
        self._factors, self.workers = factors, workers

    def of(self, rank: int) -> Iterator[float]:
        """One worker's, without end."""
        width = self._factors.shape[1]
        column = np.roll(self._factors[:, rank % width], self._shift(rank // width))
        while True:
            yield from column.tolist()

    def rows(self) -> Iterator[NDArray[np.float64]]:
        """All workers' factors of a step, without end; the same numbers as `of` gives."""
        width = self._factors.shape[1]
        blocks = -(-self.workers // width)
        turned = [np.roll(self._factors, self._shift(n), axis=0) for n in range(blocks)]
        table = np.concatenate(turned, axis=1)[:, : self.workers]
        while True:
            yield from table

    def _shift(self, block: int) -> int:
        """Blocks begin at places that the golden ratio spreads evenly."""
        return int(len(self._factors) * (block * 0.6180339887498949 % 1.0))


class Delays:
    """The factors of all workers, step by step; nothing is drawn where nobody is late."""

    def __init__(self, kinds: Sequence[Stragglers], workers: int, seed: int) -> None:
        self.kinds, self.workers, self._seed = tuple(kinds), workers, seed

    def of(self, rank: int) -> Iterator[float]:
        """One worker's, without end."""
        if not self.kinds:
            while True:
                yield 1.0
        draws = self._blocks(rank)
        while True:
            yield from next(draws).tolist()

    def rows(self) -> Iterator[NDArray[np.float64]]:
        """All workers' factors of a step, without end; the same numbers as `of` gives."""
        if not self.kinds:
            while True:
                yield np.ones(1)
        draws = [self._blocks(rank) for rank in range(self.workers)]
        while True:
            yield from np.stack([next(each) for each in draws], axis=1)

    def _blocks(self, rank: int) -> Iterator[NDArray[np.float64]]:
        generators = [np.random.default_rng([self._seed, place, rank]) for place in range(len(self.kinds))]
        while True:
            block = np.ones(BLOCK)
            for kind, generator in zip(self.kinds, generators, strict=True):
                block *= kind.draw(generator, BLOCK, rank=rank, workers=self.workers)
            yield block
