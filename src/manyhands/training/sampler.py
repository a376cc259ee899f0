"""Which samples a worker takes at a step: one order of (seed, epoch), cut into batches, cut into shares.

    order(epoch)      = permutation of 0 … n-1, drawn from (seed, epoch) alone
    step's positions  = [p, min(p + B, n))             p = cursor.position, B = global batch
    rank's share      = the rank-th of ``workers`` contiguous parts; parts differ by at most one sample

The worker count cuts a batch but never changes it: every worker count sees the same samples in the same step. Nothing
is dropped or padded, so the last batch of an epoch may be short and a worker's share may be empty; shares are to be
weighted by their size. A `Cursor` is all that a checkpoint needs. As it counts samples and not steps, a run may resume
in the middle of an epoch, on another worker count and with another batch size, and still see every sample exactly once
per epoch (guarantee).

Cost: 8 bytes per sample and worker for the order, one ``torch.randperm`` an epoch, one slice a step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from manyhands.communication.topology import shares
from manyhands.errors import BadInput


class Cursor(NamedTuple):
    """Where a run stands: ``position`` samples of ``epoch`` are done, after ``step`` steps since the start.

    Always normal: at the end of an epoch it is the start of the next one.
    """

    epoch: int = 0
    position: int = 0
    step: int = 0


START = Cursor()

#: Steps cut at a time: torch makes many views in one call at half the price of one by one (0.5 µs against 0.9 µs).
BLOCK = 64


class Share(NamedTuple):
    """One worker's part of one step."""

    before: Cursor
    after: Cursor
    indices: Tensor  # int64, a view of the epoch's order: read it, do not write it
    global_count: int  # samples of the step over all workers


def batch_sizes(n: int, batch_size: int, steps: int | None = None) -> set[int]:
    """How many samples the batches of a run hold: of an epoch the last may have fewer.

    >>> sorted(batch_sizes(103, 25)), batch_sizes(103, 25, steps=4)
    ([3, 25], {25})
    """
    whole, rest = divmod(n, batch_size)
    some = {batch_size} if whole else set()
    return some | {rest} if rest and (steps is None or steps > whole) else some


def evaluation_shares(n: int, workers: int) -> list[tuple[int, int]]:
    """Bounds of each worker's part of an evaluation set, in the data's own order.

    Unpadded: every sample is counted once, so sums and counts over the workers give the exact metric.
    """
    _require(n >= 0 and workers >= 1, f"{n} evaluation samples over {workers} workers: at least 1 worker is needed.")
    return shares(n, workers)


def order(n: int, seed: int, epoch: int) -> Tensor:
    """The permutation of 0 … n-1 that (seed, epoch) stands for; torch's global generator is not touched.

    The seed's mixing is fixed for good (`_mixed`). The shuffle is ``torch.randperm`` on a CPU generator, which torch
    does not promise to keep between releases; a golden test watches it.
    """
    return torch.randperm(n, generator=torch.Generator().manual_seed(_mixed("order", seed, epoch)))


def worker_seed(seed: int, rank: int, epoch: int) -> int:
    """Seed of one worker's own random numbers (dropout, augmentation) in one epoch, for ``torch.manual_seed``.

    Guarantee: it depends on these three numbers alone, and different ranks of an epoch start different streams (the
    low 32 bits, all that torch's CPU and NumPy's legacy generators take, differ). Seeding at the start of each epoch
    makes a resume at an epoch's start exact without a stored generator state; a resume in mid-epoch needs that state.
    """
    return (_mixed("worker", seed, epoch) + rank) % 2**63


def _mixed(purpose: str, seed: int, epoch: int) -> int:
    """63 bits of SHA-256 over the text ``manyhands/purpose/seed/epoch``, least significant byte first.

    A hash, because torch's CPU generator reads only the low 32 bits of a seed (2.13: seeds 5 and 5 + 2**32 shuffle
    alike) and because seed + epoch would let epoch 1 of seed 0 repeat epoch 0 of seed 1.
    """
    digest = hashlib.sha256(f"manyhands/{purpose}/{seed}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Steps from an epoch's start to its end; the last may be short."""
    return -(-n // batch_size)


class Sampler:
    """One worker's view of the order; keeps the current epoch's permutation and nothing else.

    >>> sampler = Sampler(10, batch_size=4, workers=2, rank=0, seed=7)
    >>> [(len(share.indices), share.global_count) for share in sampler.batches(epochs=1)]
    [(2, 4), (2, 4), (1, 2)]
    """

    def __init__(self, n: int, *, batch_size: int, workers: int = 1, rank: int = 0, seed: int = 0) -> None:
        _require(n >= 1, "The data set is empty: training needs at least one sample.")
        _require(batch_size >= 1, f"batch_size={batch_size}: a global batch holds at least 1 sample.")
        _require(0 <= rank < workers, f"rank {rank} of {workers} workers: ranks go from 0 to workers - 1.")
        self.n, self.batch_size, self.workers, self.rank, self.seed = n, batch_size, workers, rank, seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    @property
    def largest(self) -> int:
        """Samples of the largest share of a full batch; the same on all workers."""
        return -(-min(self.batch_size, self.n) // self.workers)

    def batches(
        self, cursor: Cursor = START, *, epochs: int | None = None, steps: int | None = None
    ) -> Iterator[Share]:
        """This worker's shares from ``cursor`` on.

        ``epochs`` or ``steps`` is the length of the whole run, counted from its start and not from the cursor, so that
        a resumed run is given the same number as the one it continues.
        """
        if (epochs is None) == (steps is None):
            raise BadInput(f"epochs={epochs}, steps={steps}: exactly one of them says how long to train.")
        _check(cursor, self.n)
        return self._batches(cursor, epochs, steps)

    def _batches(self, before: Cursor, epochs: int | None, steps: int | None) -> Iterator[Share]:
        while epochs is None or before.epoch < epochs:
            epoch, position, step = before
            for indices, global_count in self._cut(self._samples(epoch)[position:]):
                if steps is not None and step >= steps:
                    return
                position += global_count
                step += 1
                after = Cursor(epoch, position, step) if position < self.n else Cursor(epoch + 1, 0, step)
                yield Share(before, after, indices, global_count)
                before = after

    def _cut(self, samples: Tensor) -> Iterator[tuple[Tensor, int]]:
        """The rest of an epoch as (this rank's share, global count) of each step."""
        size = min(self.batch_size, self.n)
        lo, hi = shares(size, self.workers)[self.rank]
        for start in range(0, len(samples), BLOCK * size):
            block = samples[start : start + BLOCK * size]
            steps, last = divmod(len(block), size)
            for indices in block[: steps * size].view(steps, size)[:, lo:hi].unbind():
                yield indices, size
            if last:
                lo, hi = shares(last, self.workers)[self.rank]
                yield block[steps * size + lo : steps * size + hi], last

    def _samples(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, order(self.n, self.seed, epoch)
        return self._order


def _check(cursor: Cursor, n: int) -> None:
    _require(min(cursor) >= 0, f"{cursor} is no place in a run: nothing in it may be negative.")
    _require(
        cursor.position < n,
        f"The checkpoint stands at sample {cursor.position} of epoch {cursor.epoch}, but the data set has {n} samples: "
        "it is another data set. Resume with the one the run began with.",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BadInput(message)
