"""Rounds in memory that all workers see: whoever comes last applies what all have brought (survey §VI-A).

    bring   lock;  g into the round;  if complete: apply, open the next, tell those who wait;  unlock;  wait;  pull

As in `common_store` there is no server process. The round's number is the version of the shards.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import Tensor

from manyhands.communication.board import NEVER
from manyhands.consistency.parameter_server.rounds import END_OF_A_ROUND, Outcome, Round, Rounds, late_for_a_round
from manyhands.consistency.parameter_server.shards import To
from manyhands.consistency.robust.aggregation import Aggregation
from manyhands.errors import DeadlineExceeded

if TYPE_CHECKING:
    from manyhands.consistency.parameter_server.common_store import CommonStore


class CommonRounds(Rounds):
    """Rounds of ``store``, for whose workers all memory is common."""

    def __init__(self, store: CommonStore, needed: int, rule: Aggregation) -> None:
        comm = store.comm
        self._store, self.round = store, self._new_round(store, needed, rule)
        (self._lock,) = comm.locks(1)
        self._ended = comm.board()  # a worker's: the last round that it has ended, plus 1
        self._came = comm.board()  # … that it has come to; for messages alone, and nobody waits for it

    def _new_round(self, store: CommonStore, needed: int, rule: Aggregation) -> Round:
        allocate = functools.partial(store.comm.allocate, common=True)
        return Round(store.replica.pieces, needed, store.comm.size, rule, allocate=allocate)

    def bring(self, vectors: Sequence[Tensor], weight: float, *, votes: bool) -> tuple[int, Outcome]:
        """See `Rounds.bring`."""
        store = self._store
        if weight:
            for x in vectors:
                store.comm.access("push", x)
        number = store.read[0]
        with self._holding(To.UPDATE):
            store.share_what_is_in_use()
            late = store.version - number
            if not late:
                self.round.take(vectors, weight, votes=votes)
                self._came.post(number + 1)
                self._finish()
        if not late:
            try:
                self._ended.wait_for_one(number + 1, END_OF_A_ROUND)
            except DeadlineExceeded as e:
                raise late_for_a_round(e, number, self._came.read()) from e
        with self._holding(To.READ):
            store.pull()
            return late, self.round.outcome(number)

    def aside(self, by: int) -> None:
        """See `Rounds.aside`."""
        with self._holding(To.UPDATE):
            self._came.post(NEVER if by > 0 else 0)
            self.round.aside(by)
            self._finish()

    def _holding(self, to: To) -> AbstractContextManager[object]:
        """Inside, the round under way is this worker's alone, READ or UPDATEd, and the shards stay as they are."""
        return self._lock

    def _finish(self) -> None:
        if self._store.finish(self.round):
            self._ended.post(self._store.version)
