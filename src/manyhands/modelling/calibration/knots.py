"""Where to measure a curve: a few sizes first, then where a straight line in the logarithms is off.

    misfit of a knot = |ln (measured / what its two neighbours say by a straight line)|

Transports change their algorithms with the size, so no formula is trusted: a ring's α + βn fitted to fourteen published
curves is off by up to 21 %, straight lines between six knots by up to 24 % at the switches, and there the knots go.

Pure functions: every rank comes to the same next size without asking the others.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Collection, Mapping, Sequence

#: Bytes. Sizes are multiples of the least: whole floats for any usual number of ranks.
LEAST_B, MOST_B = 64, 64 * 2**20
#: A knot that its neighbours miss by more gets one more beside it.
TOLERANCE = 0.05
#: Neighbours that are no farther apart get nothing between them.
GAP = 1.5
#: A transport of a host takes no longer for a byte more (50 MB/s), and no less (5 GB/s), for what was not measured yet.
SLOW_S_PER_B, FAST_S_PER_B = 2e-8, 2e-10
#: Knots of a curve.
FEWEST, MOST = 16, 24


def first_sizes(most_B: int, *, few: bool = False) -> list[int]:
    """Sizes to begin with, each 16 times (``few``: 64 times) the one before, from `LEAST_B` up to ``most_B``."""
    factor = 64 if few else 16
    sizes = list(itertools.takewhile(lambda n: n < most_B, (LEAST_B * factor**i for i in itertools.count())))
    return [*sizes, most_B]


def misfit(sizes: Sequence[int], seconds: Sequence[float], i: int) -> float:
    """Of knot ``i``: its distance from the line through its neighbours; of the first, through the next two."""
    left, right = (1, 2) if i == 0 else (i - 1, i + 1)
    a, x, b = (math.log(sizes[j]) for j in (left, i, right))
    low, here, high = (math.log(max(seconds[j], 1e-12)) for j in (left, i, right))
    return abs(here - (low + (x - a) / (b - a) * (high - low)))


def next_size(
    knots: Mapping[int, tuple[float, float]],
    confirmed: Collection[int] = (),
    *,
    fewest: int = FEWEST,
    most: int = MOST,
) -> int | None:
    """The size to measure next, or None when the curve is good enough.

    ``knots``: seconds and their relative spread by size. A misfit within the spread is no misfit, and one that was
    measured only once is measured again before knots are spent on it (``confirmed``: those that were).
    """
    sizes = sorted(knots)
    if len(sizes) < 3:
        return None
    seconds = [knots[n][0] for n in sizes]
    misfits = sorted(((misfit(sizes, seconds, i), i) for i in range(1, len(sizes) - 1)), reverse=True)
    misfits.append((misfit(sizes, seconds, 0), 0))  # the end last: it is told from both of the next
    off = [i for found, i in misfits if found > TOLERANCE + 2 * knots[sizes[i]][1]]
    if (again := next((sizes[i] for i in off if sizes[i] not in confirmed), None)) is not None:
        return again  # a disturbed knot makes misfits of its neighbours, too
    for i in off if len(sizes) < most else ():
        if (middle := _widest(sizes[max(i - 1, 0) : i + 2])) is not None:
            return middle
    return _widest(sizes) if len(sizes) < fewest else None


def _widest(sizes: Sequence[int]) -> int | None:
    """The middle of the widest gap that is wide enough."""
    a, b = max(itertools.pairwise(sizes), key=lambda gap: gap[1] / gap[0])
    middle = round(math.sqrt(a * b) / LEAST_B) * LEAST_B
    return middle if b > GAP * a and a < middle < b else None


def expected_s(rounds: Mapping[int, float], size_B: int) -> float:
    """What a round at ``size_B`` will take, from the nearest size below that was measured; at most in proportion.

    As many bytes more as twice the last bytes cost, where two sizes tell.
    """
    sizes = sorted(rounds)
    if not sizes:
        return 0.0
    i = max(bisect.bisect_right(sizes, size_B) - 1, 0)
    nearest, slope = sizes[i], SLOW_S_PER_B
    if i:
        slope = max(2 * (rounds[nearest] - rounds[sizes[i - 1]]) / (nearest - sizes[i - 1]), FAST_S_PER_B)
    if not nearest:  # of no size
        return rounds[nearest]
    return rounds[nearest] + max(size_B - nearest, 0) * min(rounds[nearest] / nearest, slope, SLOW_S_PER_B)
