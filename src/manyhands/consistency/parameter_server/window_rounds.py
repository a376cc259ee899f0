"""Rounds that lie in a window of rank 0: only those vectors travel that somebody needs (survey §VI-A).

    come      get the counts; a mean also its sum so far;   take g;   put the counts, and the row that took it
    complete  get the rows of the others;   end the round;   put the counts
    look      get the counts

Under a lock, as `Round` wants it. Moved a step: of a mean 2 n by each worker but the first and the last of a round, who
move n; under a rule n, and by whoever completes the round n for each other vector in it. Nothing by rank 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manyhands.communication.communicator import At, Communicator
from manyhands.consistency.parameter_server.common_rounds import CommonRounds
from manyhands.consistency.parameter_server.rounds import Round
from manyhands.consistency.parameter_server.shards import To
from manyhands.consistency.robust.aggregation import Aggregation

if TYPE_CHECKING:
    from manyhands.consistency.parameter_server.common_store import CommonStore
    from manyhands.consistency.parameter_server.window_store import WindowStore

#: Vectors begin at whole cache lines.
LINE_B = 64


def behind(end: int, copy: Tensor) -> tuple[int, int]:
    """Where something like ``copy`` begins and ends behind ``end``."""
    at = -(-end // LINE_B) * LINE_B
    return at, at + copy.nbytes


class WindowRound(Round):
    """See the file's head; the arguments are `Round`'s, and what is allocated are copies. Collective."""

    def __init__(self, *args: Any, comm: Communicator, **how: Any) -> None:
        super().__init__(*args, **how)
        self._comm, self._brought = comm, set[int]()  # rows that are right here, whatever is in the window
        self._counted: list[tuple[At, Tensor]] = []
        self._starts: list[int] = []
        end = 0
        for copy in (self.weight, torch.from_numpy(self.counts)):
            at, end = behind(end, copy)
            self._counted.append((at, copy))
        for rows in self.vectors:
            at, end = behind(end, rows)
            self._starts.append(at)
        self._window = comm.window(end if comm.rank == 0 else 0)

    def look(self) -> None:
        """Get the counts."""
        with self._comm.counting("service"):
            self._window.get(0, *self._counted)
        self._brought.clear()

    def leave(self) -> None:
        """Put the counts."""
        with self._comm.counting("service"):
            self._window.put(0, *self._counted)

    def _at(self, some: Set[int]) -> list[tuple[At, Tensor]]:
        return [
            (at + row * rows[row].nbytes, rows[row])
            for at, rows in zip(self._starts, self.vectors, strict=True)
            for row in sorted(some)
        ]

    def _get(self, some: Set[int]) -> None:
        with self._comm.counting("service"):
            self._window.get(0, *self._at(some))

    def take(self, vectors: Sequence[Tensor], weight: float, *, votes: bool) -> None:
        """See `Round.take`; the vectors of a round that this completes are not put."""
        row = {self.row(votes=votes)} if weight else set[int]()
        self._get(self.rows & row)
        super().take(vectors, weight, votes=votes)
        self._brought |= row
        if not self.complete:
            with self._comm.counting("service"):
                self._window.put(0, *self._at(row))

    def end(self, number: int) -> list[Tensor] | None:
        """See `Round.end`."""
        self._get(self.rows - self._brought)
        return super().end(number)


class WindowRounds(CommonRounds):
    """Rounds of ``store``, whose workers reach each other's memory; the round under way lies with rank 0."""

    _store: WindowStore
    round: WindowRound

    def _new_round(self, store: CommonStore, needed: int, rule: Aggregation) -> WindowRound:
        comm = store.comm
        return WindowRound(store.replica.pieces, needed, comm.size, rule, allocate=comm.allocate, comm=comm)

    @contextlib.contextmanager
    def _holding(self, to: To) -> Iterator[None]:
        with self._lock:
            self.round.look()
            if to is To.READ:
                yield
                return
            self._store.look_at_version()
            yield
            self.round.leave()
