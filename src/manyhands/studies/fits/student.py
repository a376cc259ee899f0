"""Student's t: how much wider an interval must be because its spread, too, comes from few cases (Student 1908)."""

from __future__ import annotations

import math

import numpy as np


def student_t(freedom: int, probability: float = 0.975) -> float:
    """The quantile of Student's t with ``freedom`` degrees, for ``probability`` from 0.5 to below 1.

    By halving the angle θ = atan(t/√ν) in which Abramowitz & Stegun (1964), 26.7.3 and 26.7.4, give the distribution
    as a finite sum: exact but for rounding.

        student_t(10)    # 2.228
    """
    assert freedom >= 1, freedom
    assert 0.5 <= probability < 1, probability
    odd = freedom % 2
    j = np.arange(1 + odd, freedom - 1, 2)
    factors = np.cumprod(np.concatenate([[1.0], j / (j + 1)])) if freedom > 1 else np.zeros(1)
    powers = np.arange(len(factors)) * 2 + odd

    def central(θ: float) -> float:
        """The probability of |t| below √ν tan θ."""
        inner = math.sin(θ) * float(factors @ math.cos(θ) ** powers)
        return 2 / math.pi * (θ + inner) if odd else inner

    low, high = 0.0, math.pi / 2
    for _ in range(60):  # a double has 53 bits
        middle = (low + high) / 2
        low, high = (middle, high) if central(middle) < 2 * probability - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)
