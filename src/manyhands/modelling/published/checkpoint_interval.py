"""How often to write a checkpoint: δ seconds to write one, M seconds between failures in the mean.

    Young   τ = √(2δM)
    Daly    τ = √(2δM)·(1 + ⅓√(δ/2M) + ⅑·δ/2M) − δ  for δ < 2M,  else M
    time    T_w = M·e^(R/M)·(e^((τ+δ)/M) − 1)·T_s/τ          R: restart; failures are exponential

J. W. Young 1974, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 530-531; J. T. Daly
2006, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 303-312.
"""

from __future__ import annotations

import math

from manyhands.catalogue import Reference


def young_s(write_s: float, failure_s: float) -> float:
    """Seconds of work between two checkpoints, first order."""
    return math.sqrt(2 * write_s * failure_s)


def daly_s(write_s: float, failure_s: float) -> float:
    """Seconds of work between two checkpoints, higher order."""
    if write_s >= 2 * failure_s:
        return failure_s
    share = write_s / (2 * failure_s)
    return young_s(write_s, failure_s) * (1 + math.sqrt(share) / 3 + share / 9) - write_s


def wall_s(work_s: float, interval_s: float, write_s: float, restart_s: float, failure_s: float) -> float:
    """Expected seconds until ``work_s`` is done, writing every ``interval_s`` of work."""
    again = math.expm1((interval_s + write_s) / failure_s)
    return failure_s * math.exp(restart_s / failure_s) * again * work_s / interval_s


vars(daly_s)["paper"] = Reference(
    "J. T. Daly",
    "A higher order estimate of the optimum checkpoint interval for restart dumps",
    2006,
    "FGCS 22(3), 303-312",
)
