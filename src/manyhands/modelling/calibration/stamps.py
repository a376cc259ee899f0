"""From clock stamps to the time of an operation: counted from the arrival of the last rank.

    t = median over ranks of (leaving − last arrival)

A rank's own time in a collective includes its waiting for peers, which is no price of the operation. Stamps are
``time.perf_counter``, which on Linux is one clock for all processes of a host.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Stamps = NDArray[np.float64]


def since_last_arrival(arrived: Stamps, left: Stamps) -> Stamps:
    """A time for each round, from stamps (ranks × rounds); a rank that needs nobody may leave before: 0."""
    taken: Stamps = np.median(np.maximum(left - arrived.max(axis=0), 0.0), axis=0)
    return taken


def of_pairs(arrived: Stamps, left: Stamps) -> Stamps:
    """Messages from rank 2k to 2k + 1: from when both are there until the receiver has it; median over the pairs."""
    both = np.maximum(arrived[0::2], arrived[1::2])
    taken: Stamps = np.median(np.maximum(left[1::2] - both, 0.0), axis=0)
    return taken


def own(arrived: Stamps, left: Stamps) -> Stamps:
    """What each rank does by itself; ranks whose stamps are no numbers took no part."""
    taken: Stamps = np.nanmedian(left - arrived, axis=0)
    return taken


def handed_over(left: Stamps, got: Stamps) -> Stamps:
    """From when a lock was given back until who waited for it has it; ``got`` is no number for who did not wait.

    The median over those who waited in a round; no number if nobody did.
    """
    since = np.where(left[:, None] <= got[None], got[None] - left[:, None], np.inf).min(axis=0)
    since[~np.isfinite(since)] = np.nan
    taken = np.full(left.shape[1], np.nan)
    some = np.isfinite(since).any(axis=0)
    taken[some] = np.nanmedian(since[:, some], axis=0)
    return taken


def median_and_spread(seconds: Stamps) -> tuple[float, float]:
    """The median, and its standard error relative to it, from the quartiles: a late round more does not count.

    The median of n normal values varies by 1.25 σ / √n, and their quartiles are 1.35 σ apart. What is no number did not
    happen.
    """
    seconds = seconds[np.isfinite(seconds)]
    if not len(seconds):
        return 0.0, 0.0
    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75))
    if not middle:
        return 0.0, 0.0
    return float(middle), float((high - low) / 1.35 * 1.25 / math.sqrt(len(seconds)) / middle)
