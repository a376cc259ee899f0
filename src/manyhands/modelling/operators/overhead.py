"""What running a step costs beside its operators: autograd's graph, the dispatcher, Python.

    T − Σ tᵢ = a + b·operators + c·views + d·calls of modules

T is the median step without stamps, tᵢ the medians of the stamped operators, as a table has them; least squares over
all steps, relative to T, with coefficients that are not negative. As rows of a table they have the phase ``host``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from manyhands.cluster.measured import OperatorTime
from manyhands.modelling.operators.fitting import nonnegative

PARTS = ("step", "operator", "view", "call")

#: Of one network at one batch: T, Σ tᵢ, operators, views, calls.
Step = tuple[float, float, int, int, int]


def fit(steps: Sequence[Step], *, threads: int, co_runners: int) -> tuple[OperatorTime, ...]:
    """One row for each part; ``spread`` is the mean error of a whole step with it, relative."""
    table = np.array(steps, dtype=float)
    whole, counts = table[:, 0], np.column_stack([np.ones(len(table)), table[:, 2:]])
    coefficients = nonnegative(counts, whole - table[:, 1], whole)
    error = float(np.mean(np.abs(table[:, 1] + counts @ coefficients - whole) / whole))
    return tuple(
        OperatorTime(
            name=name, phase="host", operands=(), results=(), options="", dtype="",
            threads=threads, co_runners=co_runners, seconds=float(c), spread=error,
        )
        for name, c in zip(PARTS, coefficients, strict=True)
    )  # fmt: skip


def seconds(rows: Mapping[str, OperatorTime], *, operators: int, views: int, calls: int) -> float:
    """Of a step with so many of each; 0 where nothing was measured."""
    counts = dict(zip(PARTS, (1, operators, views, calls), strict=True))
    return sum(row.seconds * counts[name] for name, row in rows.items())
