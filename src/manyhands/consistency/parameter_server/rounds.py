"""A round: gradients that were taken at one version of the shards become one update of them (survey §VI-A).

    ḡ = Σ_p n_p g_p / Σ_p n_p   over the first n to come,   or A(g_1, …, g_n) by a rule of `robust`

Workers that are aside (at an evaluation, or done) are not waited for: a round ends with min(n, all that are left). The
mean is kept as it is so far, which takes one vector; a rule needs all of them, n vectors. What a rule of `robust` does
about vectors that are not finite, and about too few, is what `robust.worker` does. A round is decided as a whole: which
gradients are in time and, by Krum's rule, which of them counts, is the same for all shards, so they lie on one server.

`Round` is the state and the arithmetic. It lies in memory given from outside: common memory under a lock
(`common_rounds`), a window (`window_rounds`), or a server rank's own (`server`; `remote_rounds` is its workers' end).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from manyhands.consistency.robust.aggregation import Aggregation, is_row_finite
from manyhands.contract import Piece
from manyhands.errors import DeadlineExceeded

#: What of ``counts`` is what: so many have come, with a vote, with a vector but no vote; workers that are aside; and
#: the number after that of the last round of each `Outcome` but the first.
CAME, VOTES, IDLE, ASIDE, FEW, SPOILT = range(6)

#: What somebody does who waits for it.
END_OF_A_ROUND = "backup_workers: for the end of the round"


class Outcome(IntEnum):
    """What became of a round: it was APPLIED, or nothing was, for want of votes or of finite ones."""

    APPLIED, FEW, SPOILT = range(3)


class Rounds(ABC):
    """One worker's end of rounds; a `Store` opens them (`Store.rounds`)."""

    @abstractmethod
    def bring(self, vectors: Sequence[Tensor], weight: float, *, votes: bool) -> tuple[int, Outcome]:
        """A gradient a piece, to the round whose parameters this worker has; then all shards are pulled.

        Returns how many rounds it came too late, and if in time (0) what became of the round, once that has ended.
        For ``weight`` and ``votes`` see `Round.take`.
        """

    @abstractmethod
    def aside(self, by: int) -> None:
        """Rounds do not wait for this worker from here on (1), or do again (−1)."""


class Round:
    """The round under way; ``needed`` of ``workers`` are waited for. Whoever calls has the memory to himself."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        needed: int,
        workers: int,
        rule: Aggregation,
        *,
        allocate: Callable[[int, torch.dtype], Tensor],
    ) -> None:
        self._needed, self._workers, self._rule = needed, workers, rule
        self._averages = rule.name == "mean"
        rows = 1 if self._averages else needed
        self.vectors = [allocate(rows * p.flat.numel(), p.flat.dtype).view(rows, -1) for p in pieces]
        self.weight = allocate(1, torch.float64)
        self.counts = allocate(6, torch.int64).numpy()

    def take(self, vectors: Sequence[Tensor], weight: float, *, votes: bool) -> None:
        """A worker comes; ``weight`` 0: with nothing. Without a vote (a sum over no samples) it counts in a mean."""
        self.counts[CAME] += 1
        if not weight:
            return
        so_far, row = float(self.weight), self.row(votes=votes)
        for mine, x in zip(self.vectors, vectors, strict=True):
            if self._averages and so_far:
                mine[row].lerp_(x, weight / (so_far + weight))
            else:
                mine[row].copy_(x)
        self.weight += weight
        self.counts[VOTES if votes else IDLE] += 1

    def row(self, *, votes: bool) -> int:
        """Where the next vector goes: the one mean, or votes from the first row on and others from the last back."""
        if self._averages:
            return 0
        return int(self.counts[VOTES]) if votes else self._needed - 1 - int(self.counts[IDLE])

    @property
    def rows(self) -> set[int]:
        """Those that hold what has been brought."""
        if self._averages:
            return {0} if self.weight else set()
        return {*range(self.counts[VOTES]), *range(self._needed - self.counts[IDLE], self._needed)}

    def aside(self, by: int) -> None:
        """So many workers more are not waited for."""
        self.counts[ASIDE] += by

    @property
    def complete(self) -> bool:
        """Whether all have come that are waited for."""
        came = int(self.counts[CAME])
        return came > 0 and came >= min(self._needed, self._workers - int(self.counts[ASIDE]))

    def end(self, number: int) -> list[Tensor] | None:
        """What the round comes to, in memory of the round, and None where nothing is to be applied; the next begins."""
        votes, idle, weight = int(self.counts[VOTES]), int(self.counts[IDLE]), float(self.weight)
        came = int(self.counts[CAME])
        self.counts[: IDLE + 1] = 0
        self.weight.zero_()
        if not weight:
            return None
        if self._averages:
            return [mean[0] for mean in self.vectors]
        finite = [p for p in range(votes) if is_row_finite(self.vectors, p)]
        failed = votes - len(finite)
        # Of those that are still there a liar may be the most: where others are done, a rule has nothing to go by.
        if votes < self._rule.fewest or came < self._needed:
            self.counts[FEW] = number + 1
            return None
        if failed > self._rule.bears(votes):
            self.counts[SPOILT] = number + 1
            return None
        parts = [rows[finite] if failed else rows[:votes] for rows in self.vectors]
        combined = self._rule.without(failed).combine(parts)
        if idle:  # sums over no samples: each adds only what L2 does, and they are averaged with the others
            empty = [rows[self._needed - idle :].sum(dim=0) for rows in self.vectors]
            combined = [(x * votes + other) / (votes + idle) for x, other in zip(combined, empty, strict=True)]
        return combined

    def outcome(self, number: int) -> Outcome:
        """Of a round that has ended, as long as none of its kind has come after it."""
        for outcome, at in ((Outcome.FEW, FEW), (Outcome.SPOILT, SPOILT)):
            if self.counts[at] == number + 1:
                return outcome
        return Outcome.APPLIED


def late_for_a_round(e: DeadlineExceeded, number: int, came: Sequence[int]) -> DeadlineExceeded:
    """``e`` of a wait for the end of round ``number``, naming who has not come; ``came`` are the workers' last rounds
    plus 1, of those aside `NEVER`.
    """
    behind = [str(p) for p, so_far in enumerate(came) if so_far <= number]
    return DeadlineExceeded(
        e.rank, f"rank{'s' if len(behind) > 1 else ''} {', '.join(behind)}", e.step, e.seconds, END_OF_A_ROUND
    )
