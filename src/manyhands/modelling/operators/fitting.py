"""Between measured points: what has few parameters is fitted, what is left is interpolated.

    t(x) = f(x) · exp(Σ wᵢ rᵢ / Σ wᵢ),    rᵢ = log(tᵢ / f(xᵢ)),    wᵢ = |x − xᵢ|⁻²

f is a sum of costs, each a coefficient that is not negative times a quantity (operations, bytes, one): the roofline
with a sum where the classical one has the larger of the two, since neither hides all of the other and a sum has one
best fit. The rest is Shepard's inverse-distance weighting (Shepard 1968, "A two-dimensional interpolation function for
irregularly-spaced data", equation 1): exact at every point, between the smallest and the largest of its neighbours, and
far from all of them the fit with their mean correction.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

#: Neighbours that are asked.
NEAREST = 8
#: Points this near are the same.
SAME = 1e-9


def nonnegative(quantities: Numbers, values: Numbers, scale: Numbers | None = None) -> Numbers:
    """Coefficients c ≥ 0 with the least Σ ((Q·c − v) / scale)², ``(n, k), (n,) → (k,)``; exact, for a few quantities.

    ``scale`` is ``values`` where nothing is given, so that relative errors count. The best is the best without bounds
    on those that are not zero in it, so all choices of these are tried.
    """
    scale = values if scale is None else scale
    largest = np.maximum(np.abs(quantities).max(axis=0), 1e-300)
    rows, wanted = quantities / largest / scale[:, None], values / scale
    best, least = np.zeros(quantities.shape[1]), float(wanted @ wanted)
    for chosen in itertools.product((False, True), repeat=quantities.shape[1]):
        if not any(chosen):
            continue
        some = np.linalg.lstsq(rows[:, chosen], wanted, rcond=None)[0]
        left = rows[:, chosen] @ some - wanted
        if (some >= 0).all() and left @ left < least:
            best, least = np.zeros(quantities.shape[1]), float(left @ left)
            best[list(chosen)] = some
    scaled: Numbers = best / largest
    return scaled


def inverse_distance(distances: Numbers, values: Numbers) -> Numbers:
    """The mean of the nearest values, near ones counting more: ``(m, n), (n,) → (m,)``; nan where none is near at all.

    A point at distance zero has its own value, several there their mean. An infinite distance keeps a point out.
    """
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :NEAREST]
    near = np.take_along_axis(distances, nearest, axis=1)
    with np.errstate(invalid="ignore"):
        here = near <= SAME
        weights = 1.0 / np.square(np.maximum(near, SAME))
        weights = np.where(here.any(axis=1, keepdims=True), here.astype(float), weights)
        mean: Numbers = (weights * values[nearest]).sum(axis=1) / weights.sum(axis=1)
    return mean
