"""A table made ready for look-ups: by key, and by operator for what lies between.

Where an operator stands among others of its name is told by logarithms of its operations, its bytes, the rows of its
result and the operations for each element of the result (a product's inner dim, a convolution's window). Another
layout, dtype, phase or other options put a point further away.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from manyhands.cluster.measured import OperatorTime
from manyhands.modelling.operations import Operation, Shape
from manyhands.modelling.operators.fitting import Numbers, inverse_distance, nonnegative

Key = tuple[str, str, tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...], str, str, str]

#: The phase of rows that say how quick the machine was, see `gauge`.
GAUGE = "gauge"
#: What a difference in these counts, in units of log e: dtype, layout, options, phase.
APART = np.array([2.0, 2.0, 2.0, 0.5])
#: Of a name with fewer points an error cannot be told from themselves.
FEWEST = 3
#: Relative error taken where there are fewer, and of the one fit for all names.
FEW, UNKNOWN = 0.3, 0.6


def key(x: Operation | OperatorTime) -> Key:
    """By which an operator is the same as another."""
    options = x.options if isinstance(x.options, str) else said(x.options)
    return x.name, x.phase, x.operands, x.results, options, x.dtype, x.layout


def anonymous(x: Operation) -> Operation:
    """Without the names of a model's: the same layers of a network are then one.

    And without a recurrent layer's workspace, of which a fake tensor does not know how large it is.
    """
    x = replace(x, module="", parameters=(), options=tuple(map(str, x.options)))
    if x.name == "mkldnn_rnn_layer":
        results = x.results[:-1]
        return replace(x, results=results, written_B=_size_B(results, x.dtype))
    if x.name == "mkldnn_rnn_layer_backward":
        operands = x.operands[:-1]
        return replace(x, operands=operands, read_B=_size_B(operands, x.dtype))
    return x


def _size_B(shapes: Sequence[Shape], dtype: str) -> int:
    itemsize: int = getattr(torch, dtype).itemsize
    return itemsize * sum(map(math.prod, shapes))


def said(options: Sequence[object]) -> str:
    """Options as a table has them."""
    return ", ".join(map(str, options))


def quantities(x: Operation | OperatorTime) -> tuple[float, float, float, float]:
    """Of what an operator's time is a sum: itself, operations, bytes, and of an update the tensors."""
    return 1.0, float(x.flops), float(x.moved_B), float(len(x.operands)) if x.phase == "update" else 0.0


def position(x: Operation | OperatorTime) -> tuple[float, float, float, float]:
    """Where it stands among those of its name."""
    result = x.results[0] if x.results else (len(x.operands),)
    rows, elements = (result[0] if result else 1), math.prod(result)
    return (
        math.log1p(x.flops),
        math.log1p(x.moved_B),
        math.log1p(rows),
        math.log1p(x.flops / max(elements, 1)),
    )


class _Name:
    """All that was measured of one operator."""

    def __init__(self, rows: Sequence[OperatorTime]) -> None:
        seconds = np.array([x.seconds for x in rows])
        sums = np.array([quantities(x) for x in rows])
        self._coefficients = nonnegative(sums, seconds)
        if not self._coefficients.any():
            self._coefficients[0] = float(np.median(seconds))
        self._corrections = np.log(seconds / (sums @ self._coefficients))
        self._positions = np.array([position(x) for x in rows])
        self._codes: list[dict[str, int]] = [{} for _ in APART]
        self._tags = np.array([self._coded(x, learn=True) for x in rows])
        #: Mean relative error of each of its points, told from the others.
        self.error = FEW
        if len(rows) >= FEWEST:
            apart = np.sqrt(_squares(self._positions, self._positions, self._tags, self._tags))
            np.fill_diagonal(apart, np.inf)
            left = inverse_distance(apart, self._corrections) - self._corrections
            self.error = float(np.mean(np.abs(np.expm1(left))))

    def seconds(self, x: Operation) -> float:
        """Of one that was not measured."""
        at, tags = np.array([position(x)]), np.array([self._coded(x)])
        apart = np.sqrt(_squares(at, self._positions, tags, self._tags))
        correction = float(inverse_distance(apart, self._corrections)[0])
        return float(np.dot(quantities(x), self._coefficients)) * math.exp(correction)

    def _coded(self, x: Operation | OperatorTime, *, learn: bool = False) -> list[int]:
        """Its dtype, layout, options and phase as numbers; −1: nobody else has this."""
        options = x.options if isinstance(x.options, str) else said(x.options)
        values = (x.dtype, x.layout, options, x.phase)
        if learn:
            return [codes.setdefault(v, len(codes)) for codes, v in zip(self._codes, values, strict=True)]
        return [codes.get(v, -1) for codes, v in zip(self._codes, values, strict=True)]


def _squares(at: Numbers, points: Numbers, tags: NDArray[np.int64], others: NDArray[np.int64]) -> Numbers:
    """Squared distances of ``(m, 4)`` from ``(n, 4)``."""
    between = np.square(at[:, None] - points[None]).sum(axis=2)
    squares: Numbers = between + (tags[:, None] != others[None]) @ np.square(APART)
    return squares


class Table:
    """Rows of one number of threads and co-runners."""

    def __init__(self, rows: Iterable[OperatorTime]) -> None:
        by_name: dict[str, list[OperatorTime]] = defaultdict(list)
        self.host: dict[str, OperatorTime] = {}
        self._hits: dict[Key, OperatorTime] = {}
        for row in rows:
            if row.phase == "host":
                self.host[row.name] = row
            elif row.phase != GAUGE:
                by_name[row.name].append(row)
                self._hits[key(row)] = row
        self._rows, self._names = by_name, dict[str, _Name]()
        operators = [x for some in by_name.values() for x in some if x.phase != "update"]
        sums = np.array([quantities(x) for x in operators]).reshape(-1, 4)
        self._all = nonnegative(sums, np.array([x.seconds for x in operators])) if operators else None

    def hit(self, x: Operation) -> tuple[float, float] | None:
        """Seconds and relative error, if this very operator was measured."""
        row = self._hits.get(key(x))
        return None if row is None else (row.seconds, row.spread)

    def between(self, x: Operation) -> tuple[float, float] | None:
        """Seconds and relative error, if one of its name was."""
        if x.name not in self._rows:
            return None
        name = self._names.get(x.name)
        if name is None:
            name = self._names[x.name] = _Name(self._rows[x.name])
        return name.seconds(x), name.error

    def roof(self, x: Operation) -> tuple[float, float] | None:
        """Seconds and relative error by one roofline for all that was measured; None: nothing was."""
        return None if self._all is None else (float(np.dot(quantities(x), self._all)), UNKNOWN)
