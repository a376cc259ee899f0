"""Say during backward which gradients are final, in runs worth sending (Li et al. 2020, arXiv:2006.15704, §3.2.3).

Backward reaches the last layers first, so buckets are cut from the end of the flat gradient and announced in that
order on every worker, even where backward happens to finish them in another: exchanges match by order.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from manyhands.contract import BUCKET_B, Piece, Ready
from manyhands.partition.update import Span


def cut_into_buckets(
    pieces: Sequence[Piece], spans: Sequence[Sequence[Span]], bucket_B: int = BUCKET_B
) -> list[tuple[int, int, int]]:
    """Buckets ``(piece, lo, hi)`` of at least ``bucket_B`` that end at parameter bounds; last parameters first."""
    result = []
    for i in reversed(range(len(pieces))):
        hi, itemsize = pieces[i].flat.numel(), pieces[i].flat.element_size()
        for s in reversed(spans[i]):
            if (hi - s.start) * itemsize >= bucket_B or s.start == 0:
                result.append((i, s.start, hi))
                hi = s.start
    return result


def runs(pieces: Sequence[Piece], spans: Sequence[Sequence[Span]], bucket_B: int = BUCKET_B) -> int:
    """How many buckets there are; 1 where all gradients together are no more than one should have."""
    if sum(piece.grad.nbytes for piece in pieces) <= bucket_B:
        return 1
    return len(cut_into_buckets(pieces, spans, bucket_B))


class Announcer:
    """Counts the gradients of each bucket while backward runs, and announces full buckets."""

    def __init__(self, pieces: Sequence[Piece], spans: Sequence[Sequence[Span]], bucket_B: int = BUCKET_B) -> None:
        self._buckets = cut_into_buckets(pieces, spans, bucket_B)
        self._bucket_of = {
            id(s.parameter): b
            for b, (i, lo, hi) in enumerate(self._buckets)
            for s in spans[i]
            if lo <= s.start and s.stop <= hi
        }
        self._parameters_in = [0] * len(self._buckets)
        for b in self._bucket_of.values():
            self._parameters_in[b] += 1
        self._ready: Ready | None = None
        self._waiting: list[int] = []
        self._done = 0
        self._about: tuple[Tensor, float] | None = None
        for group in spans:
            for s in group:
                s.parameter.register_post_accumulate_grad_hook(self._passed)  # type: ignore[no-untyped-call]

    def begin(self, ready: Ready) -> None:
        """A step begins; nothing is announced before `last_pass`."""
        self._ready, self._done, self._about = ready, 0, None
        self._waiting = list(self._parameters_in)

    def last_pass(self, loss: Tensor, count: float) -> None:
        """The backward that is about to start makes gradients final."""
        self._about = (loss, count)

    def _passed(self, parameter: Tensor) -> None:
        if self._about is None:
            return
        self._waiting[self._bucket_of[id(parameter)]] -= 1
        while self._done < len(self._buckets) and self._waiting[self._done] == 0:
            self._announce()

    def finish(self, loss: Tensor, count: float) -> None:
        """Announce what backward did not reach (unused parameters, an empty share)."""
        self._about = (loss, count)
        while self._done < len(self._buckets):
            self._announce()
        self._about = None

    def _announce(self) -> None:
        assert self._ready is not None
        assert self._about is not None
        i, lo, hi = self._buckets[self._done]
        self._done += 1
        self._ready(i, lo, hi, *self._about)
