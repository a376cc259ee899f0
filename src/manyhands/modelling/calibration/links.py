"""α and β of a transport, fitted to its curve of messages: what a cluster file says where a formula is all one has.

    t = α + βn      by least squares of the relative error, weights 1 / t²

Approximation, and the reason for curves: transports change their algorithms with the size.
"""

from __future__ import annotations

import numpy as np

from manyhands.cluster import Figure, Link
from manyhands.cluster.measured import Curve
from manyhands.modelling.calibration.repeating import WIDEST, digits


def alpha_beta(curve: Curve) -> tuple[float, float, float]:
    """Seconds, seconds a byte, and the mean relative error of the fit; neither is below 0."""
    sizes, seconds = np.array(curve.sizes_B, float), np.array(curve.seconds)
    floor = float(seconds.min())
    if len(sizes) < 2:
        return floor, 0.0, 0.0
    matrix = np.stack([1 / seconds, sizes / seconds], axis=1)
    scale = np.abs(matrix).max(axis=0)
    alpha, beta = np.linalg.lstsq(matrix / scale, np.ones(len(sizes)), rcond=None)[0] / scale
    if alpha <= 0:
        alpha = floor
    if beta <= 0:
        beta = max(seconds[-1] - seconds[0], 0.0) / (sizes[-1] - sizes[0])
    error = float(np.mean(np.abs(alpha + beta * sizes - seconds) / seconds))
    return float(alpha), float(beta), error


def link(curve: Curve, source: str) -> Link:
    """Two workers of this machine, over the curve's transport."""
    alpha, beta, error = alpha_beta(curve)
    spread = min(round(error, 3), WIDEST)
    return Link(
        kind=f"memory, by transport {curve.transport}",
        latency=Figure(digits(max(alpha, 1e-8) * 1e6), "us", f"{source}, fitted to {curve.operation}", spread),
        bandwidth=Figure(digits(1e-9 / max(beta, 1e-13)), "GB/s", f"{source}, fitted to {curve.operation}", spread),
    )
