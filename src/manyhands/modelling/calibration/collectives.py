"""The curves of one pattern on one transport, measured inside its workers: the job that a team runs.

Every rank gathers everybody's stamps and so knows what all know: which size comes next, how many rounds, and when the
time is up, with no word between them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from manyhands.cluster.measured import REREAD
from manyhands.communication import futex
from manyhands.communication.communicator import Communicator
from manyhands.modelling.calibration import stamps
from manyhands.modelling.calibration.knots import FEWEST, MOST, expected_s, first_sizes, next_size
from manyhands.modelling.calibration.patterns import OWN_READ, PATTERNS, Pattern, Round, computing
from manyhands.training.member import Member

#: Rounds of a knot; so many more go before, which touch new memory and wake who sleeps.
FEWEST_ROUNDS, MOST_ROUNDS, WARM = 5, 60, 2
#: And so many before the first, in which processes load what they need.
FIRST_WARM = 10
#: What a round is taken to take before one was measured.
FIRST_S = 0.001
#: Sizes up to this one are measured whatever time it takes: a curve of less says nothing of a model.
ALWAYS_B = 2**18
#: Of larger ones none whose fewest rounds would take more of what is left of the time.
PART = 0.5
ITEM_B = 4


def curves(member: Member, ranks: int, name: str, budget_s: float, most_B: int, few: bool) -> dict[str, Any] | None:
    """What the first ``ranks`` members find of pattern ``name``, told by rank 0; the others leave at once.

    ``sizes_B``, by series ``seconds`` and ``spread``, and ``noise``, the mean spread.
    """
    comm = member.comm
    torch.set_num_threads(max(1, futex.cores() // ranks))
    group = comm if ranks == comm.size else comm.split(int(comm.rank < ranks))
    comm.barrier()  # all have joined their group: the first to leave closes its connections
    try:
        if comm.rank >= ranks:
            return None
        found = _Curves(group, PATTERNS[name], budget_s, most_B, few).measured()
        return found if comm.rank == 0 else None
    finally:
        if group is not comm:
            group.close()


def meter(
    comm: Communicator, name: str, sizes: Sequence[int], budget_s: float, compute_s: float
) -> Callable[[], dict[str, Any]]:
    """What pattern ``name`` takes at these sizes whenever it is called, by all ranks of ``comm`` together, as `curves`
    tells it; they compute for so long before each round. Collective.
    """
    made = _Curves(comm, PATTERNS[name], budget_s, max(sizes), few=False, compute_s=compute_s)
    return functools.partial(made.at, sizes)


class _Curves:
    def __init__(
        self,
        comm: Communicator,
        pattern: Pattern,
        budget_s: float,
        most_B: int,
        few: bool,
        compute_s: float = 0.0,
    ) -> None:
        self._comm, self._pattern, self._budget_s, self._few = comm, pattern, budget_s, few
        self._most_B = most_B if pattern.sized else 0
        floats = -(-most_B // ITEM_B // comm.size) * comm.size  # equal chunks for everybody
        self._round: Round = pattern.make(comm, floats if pattern.sized else 0, computing(compute_s))
        self._rounds_s: dict[int, float] = {}
        self._found: dict[int, list[tuple[float, float]]] = {}  # by size, of each series
        self._confirmed: set[int] = set()
        self._began = self._clock_of_all()

    def _gathered(self, mine: list[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
        everyone = torch.zeros(self._comm.size * len(mine), dtype=torch.float64)
        bounds = [(p * len(mine), (p + 1) * len(mine)) for p in range(self._comm.size)]
        everyone[slice(*bounds[self._comm.rank])] = torch.tensor(mine, dtype=torch.float64)
        self._comm.all_gather(everyone, bounds).wait()
        return everyone.view(self._comm.size, -1).numpy()

    def _clock_of_all(self) -> float:
        return float(self._gathered([time.perf_counter()]).max())

    @property
    def _left_s(self) -> float:
        return self._budget_s - (self._ended - self._began)

    def measured(self) -> dict[str, Any]:
        self._ended = self._began
        if not self._pattern.sized:
            self._knot(0, rounds=MOST_ROUNDS)
            return self._told()
        fewest, most = (4, 8) if self._few else (FEWEST, MOST)
        for size in first_sizes(self._most_B, few=self._few):
            if size > ALWAYS_B:
                fitting = [n for n in (size, size // 4) if self._least_s(n) <= PART * self._left_s]
                if size not in fitting:
                    for smaller in fitting:
                        self._knot(smaller, fewest=fewest)
                    break
            self._knot(size, fewest=fewest)
        while self._left_s > 0:
            knots = {n: (sum(m for m, _ in each), max(s for _, s in each)) for n, each in self._found.items()}
            following = next_size(knots, self._confirmed, fewest=fewest, most=most)
            if following is None or self._least_s(following) > self._left_s:
                break
            self._knot(following, fewest=fewest)
        return self._told()

    def at(self, sizes: Sequence[int]) -> dict[str, Any]:
        """At these sizes and no others, anew."""
        self._found.clear()
        self._began = self._ended = self._clock_of_all()
        for size in sizes:
            self._knot(size, fewest=len(sizes))
        return self._told()

    def _least_s(self, size_B: int) -> float:
        return expected_s(self._rounds_s, size_B) * (FEWEST_ROUNDS + WARM)

    def _knot(self, size_B: int, *, fewest: int = FEWEST, rounds: int | None = None) -> None:
        n = -(-size_B // ITEM_B // self._comm.size) * self._comm.size
        if rounds is None:
            share_s = self._left_s / max(fewest - len(self._found), 2)
            each_s = expected_s(self._rounds_s, size_B) or FIRST_S
            rounds = min(max(int(share_s / each_s) - WARM, FEWEST_ROUNDS), MOST_ROUNDS)
        warm = WARM if self._found else FIRST_WARM
        taken = [self._round(n) for _ in range(warm + rounds)][warm:]
        all_stamps = self._gathered([stamp for one in taken for stamp in one])
        by_rank = all_stamps.reshape(self._comm.size, rounds, -1)
        self._ended = float(np.nanmax(by_rank))
        self._rounds_s[size_B] = (self._ended - float(np.nanmin(by_rank))) / rounds
        found = [
            stamps.median_and_spread(self._times(series)(by_rank[:, :, 2 * i], by_rank[:, :, 2 * i + 1]))
            for i, series in enumerate(self._pattern.series)
        ]
        if size_B in self._found:  # again; what disturbs makes it slower
            found = [_lower(*pair) for pair in zip(self._found[size_B], found, strict=True)]
            self._confirmed.add(size_B)
        self._found[size_B] = found

    def _times(self, series: str) -> Any:
        return stamps.own if series in self._pattern.alone else self._pattern.times

    def _told(self) -> dict[str, Any]:
        sizes = sorted(self._found)
        series = {
            name: {"seconds": [self._found[n][i][0] for n in sizes], "spread": [self._found[n][i][1] for n in sizes]}
            for i, name in enumerate(self._pattern.series)
        }
        noise = float(np.mean([each[0][1] for each in self._found.values()]))
        if OWN_READ in series:
            theirs, ours = series[REREAD], series.pop(OWN_READ)
            more = [max(a - b, 0.0) for a, b in zip(theirs["seconds"], ours["seconds"], strict=True)]
            # A small difference of two medians is as uncertain as they are.
            theirs["spread"] = [
                (s * a + t * b) / m if m else 0.0
                for m, a, s, b, t in zip(
                    more, theirs["seconds"], theirs["spread"], ours["seconds"], ours["spread"], strict=True
                )
            ]
            theirs["seconds"] = more
        return {"sizes_B": sizes, "series": series, "noise": noise}


def _lower(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    """The lower of two medians; its spread reaches half-way to the other at least."""
    (low, spread), (high, _) = sorted((a, b))
    return low, max(spread, (high - low) / 2 / low) if low else spread
