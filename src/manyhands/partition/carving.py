"""The updates of a replica's pieces, by the bounds that strategies ask for, which may change from step to step.

State follows the bounds: what an update for new bounds overlaps moves into it, and what older ones keep becomes theirs.
What a checkpoint had waits for whoever asks for its elements.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from manyhands.contract import Piece, StateSlice
from manyhands.partition.rows import RowUpdate
from manyhands.partition.update import LOST, SliceUpdate, Span

log = logging.getLogger(__name__)


class Updates:
    """Of all pieces; these and their spans may still be put in when this is made."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, pieces: Sequence[Piece], spans: Sequence[Sequence[Span]]
    ) -> None:
        self._optimizer, self._pieces, self._spans = optimizer, pieces, spans
        self.slices: dict[tuple[int, int, int], SliceUpdate] = {}  # by piece and bounds
        self.rows: dict[int, RowUpdate] = {}  # by sparse piece
        self._saved: Sequence[StateSlice] = ()
        self._lost: set[tuple[str, str]] = set()  # optimizer state that no checkpoint can hold, named once

    def __call__(self, i: int, lo: int, hi: int) -> None:
        """Update elements ``[lo, hi)`` of piece ``i``; of a sparse one the rows that it has gradients of."""
        update = self.rows.get(i) or self.of(i, lo, hi)
        update()

    def of(self, i: int, lo: int, hi: int) -> SliceUpdate:
        """What updates elements ``[lo, hi)`` of dense piece ``i``, as long as no other bounds are asked for."""
        try:
            return self.slices[i, lo, hi]
        except KeyError:
            return self._carve(i, lo, hi)

    def _make(self, i: int, lo: int, hi: int) -> SliceUpdate:
        return SliceUpdate(self._optimizer, self._pieces[i].group, self._pieces[i], self._spans[i], lo, hi)

    def _carve(self, i: int, lo: int, hi: int) -> SliceUpdate:
        """An update for new bounds. State of older ones that overlap moves into it; what they keep becomes their own.

        Raises where the state of a parameter's elements cannot go on as one: some of them have had updates here and
        others have not (or another number of them), which no strategy means to do.
        """
        update = self._make(i, lo, hi)
        update.load(self._saved)
        old = {at: u for at, u in self.slices.items() if at[0] == i and at[1] < hi and lo < at[2]}
        states = {at: u.state() for at, u in old.items()}
        self._check_joins(i, lo, hi, list(old), [s for state in states.values() for s in state])
        for (_, a, b), state in states.items():
            update.load(state)
            del self.slices[i, a, b]
            for rest in ((a, lo), (hi, b)):
                if rest[0] < rest[1]:
                    kept = self.slices[i, rest[0], rest[1]] = self._make(i, *rest)
                    kept.load(state)
        self.slices[i, lo, hi] = update
        return update

    def _check_joins(
        self, i: int, lo: int, hi: int, old: Sequence[tuple[int, int, int]], state: Sequence[StateSlice]
    ) -> None:
        whole: dict[tuple[str, str], Tensor] = {}
        keeps = {s.parameter for s in state if s.lo >= 0}
        for s in self._spans[i]:
            start, stop = s.within(lo, hi)
            updated = sum(max(0, min(stop, b) - max(start, a)) for _, a, b in old)
            assert s.name not in keeps or updated in (0, stop - start) or start >= stop, (
                f"{s.name}: elements with optimizer state and elements without are to be updated as one slice"
            )
        for part in state:
            if part.lo == -1:
                first = whole.setdefault((part.parameter, part.key), part.values)
                assert torch.equal(first, part.values), (
                    f"{part.parameter}: slices of unlike {part.key} cannot be joined"
                )

    def state(self) -> list[StateSlice]:
        """The optimizer state that is here."""
        state = [x for update in self.rows.values() for x in update.state()]
        if not self.slices:  # none since `load`
            tables = {s.parameter for s in state}
            return [*(s for s in self._saved if s.parameter not in tables), *state]
        state += [x for update in self.slices.values() for x in update.state()]
        lost = {(s.parameter, s.key.removesuffix(LOST)) for s in state if s.key.endswith(LOST)} - self._lost
        if lost:
            self._lost |= lost
            said = ", ".join(f"{key} of {parameter}" for parameter, key in sorted(lost))
            log.warning("no checkpoint of this run can be taken up: it cannot hold the optimizer's %s", said)
        return state

    def load(self, state: Sequence[StateSlice]) -> None:
        """Take up a `state`, of which the slices that are asked for from here on will be used."""
        self._saved = tuple(state)
        self.slices.clear()
        for update in self.rows.values():
            update.load(state)
