"""PipeDream's stage as a replica: it updates after every backward, and stashes the weights that are still needed.

See `strategy` for the rule and the paper. The newest weights lie in the pieces, where the optimizer, checkpoints and
evaluation find them. Where a backward comes after later updates, its forward runs on a copy of the weights, made once
for a version, and the backward on the same copy: the model's parameters are pointed there for as long as that takes.
Gradients always go to the pieces.

*Guarantee*: the version a micro-batch's backward uses is that of its forward; `StashingReplica.log` says which.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyhands.contract import Batch, Piece, Ready, is_finite
from manyhands.errors import NonFiniteLoss
from manyhands.partition.pipeline.pipedream import Used, used
from manyhands.partition.pipeline.replica import PipelineReplica
from manyhands.partition.pipeline.schedule import Action, Schedule
from manyhands.partition.pipeline.strategy import PipeDream
from manyhands.partition.update import Span


class Visit(NamedTuple):
    """What is logged of a micro-batch at a stage: versions are numbers of updates since the run began."""

    stage: int
    micro_batch: int
    forward: int  # the version that its forward has used
    backward: int  # and its backward
    newest: int  # the stage's own then, to which its update was added

    @property
    def staleness(self) -> int:
        """How many updates its gradient lacks."""
        return self.newest - self.backward


class Stash:
    """Versions of a stage's weights by their numbers, of which the newest lies in the pieces."""

    def __init__(self, pieces: Sequence[Piece], spans: Sequence[Sequence[Span]]) -> None:
        self.newest = self.at = 0  # ``at``: the version that the model's parameters are now
        self._pieces, self._spans = pieces, [s for group in spans for s in group]
        self._each = [len(group) for group in spans]
        self._own = self._here = [s.parameter.data for s in self._spans]
        self._kept: dict[int, list[Tensor]] = {}  # flat copies, one a piece
        self._spare: list[list[Tensor]] = []
        self._views: dict[int, list[Tensor]] = {}  # the parameters in a copy, by its address

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self) -> None:
        """Copy the newest version, unless there is a copy."""
        if self.newest not in self._kept:
            flats = self._spare.pop() if self._spare else [torch.empty_like(p.flat) for p in self._pieces]
            for flat, piece in zip(flats, self._pieces, strict=True):
                flat.copy_(piece.flat)
            self._kept[self.newest] = flats

    def use(self, version: int) -> None:
        """The model's parameters become those of ``version``: the copy where there is one."""
        assert version in self._kept or version == self.newest, f"version {version} is gone"
        self._point(self._of(self._kept[version]) if version in self._kept else self._own)
        self.at = version

    def use_own(self) -> None:
        """The model's parameters are those in the pieces again: the newest, whatever becomes of them."""
        self._point(self._own)
        self.at = self.newest

    def _point(self, values: list[Tensor]) -> None:
        if values is not self._here:
            for span, value in zip(self._spans, values, strict=True):
                span.parameter.data = value
            self._here = values

    def drop(self, version: int) -> None:
        """Nobody needs the copy of ``version`` any more."""
        self._spare.append(self._kept.pop(version))

    def _of(self, flats: Sequence[Tensor]) -> list[Tensor]:
        key = flats[0].data_ptr()
        if key not in self._views:
            of_spans = (flat for flat, n in zip(flats, self._each, strict=True) for _ in range(n))
            self._views[key] = [
                flat[s.start : s.stop].as_strided(s.parameter.shape, s.parameter.stride(), s.start)
                for flat, s in zip(of_spans, self._spans, strict=True)
            ]
        return self._views[key]


class StashingReplica(PipelineReplica):
    """`PipelineReplica` whose stage updates within `gradients`, once for every micro-batch."""

    def __init__(self, *arguments: Any, strategy: PipeDream, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._stage = next(iter(self.pipeline.stages))
        self._vertical_sync = strategy.vertical_sync
        self.pipeline.apart = self
        self._stash = Stash(self.pieces, self._spans)
        #: Of the last step.
        self.log: list[Visit] = []
        self.staleness: Counter[int] = Counter()
        self._alike = self._comm.over(frozenset({"data"}))  # the same stage of other replicas
        self._order: Schedule | None = None  # of the batch under way, and what it uses
        self._now = Used({}, {})
        self._begun = 0  # the newest version when the step began
        self._used_forward: dict[int, int] = {}  # of micro-batches under way: the version their forward has used
        self._weights: dict[int, float] = {}  # by micro-batch: this replica's part of it
        self._finite = True

    @property
    def updates(self) -> int:
        """How many this stage has had."""
        return self._stash.newest

    @updates.setter
    def updates(self, value: int) -> None:
        self._stash.newest = value

    def gradients(self, batch: Batch, ready: Ready | None = None) -> tuple[Tensor, float]:
        """All micro-batches of the batch forward and backward; the stages have updated when this returns. Collective.

        Unlike `contract.Replica.gradients` it leaves nothing in the pieces. Raises `NonFiniteLoss` on all ranks if a
        loss or a gradient was not finite; what was not finite has not been applied.
        """
        t0 = time.perf_counter()
        for piece in self.pieces:
            piece.grad.zero_()
        for parameter in self._left_out:
            parameter.grad = None
        self.log, self._finite, self._begun = [], True, self._stash.newest
        n = self._alike.size
        others = () if n == 1 or batch.total is None else (batch.total // n, -(-batch.total // n))
        with self._watch() if self.watching else contextlib.nullcontext():
            loss, self.count, _ = self._through(batch, others)
        self._stash.use_own()
        assert not len(self._stash), "at the end of a step nothing is under way"
        self.compute_s += time.perf_counter() - t0
        if not self._all_finite():
            raise NonFiniteLoss(self._comm.step)
        return torch.tensor(loss, dtype=torch.float64), self.count

    def _all_finite(self) -> bool:
        """Whether what was met was finite, at all stages of all replicas. Collective."""
        bad = torch.tensor([float(not self._finite)])
        with self._comm.counting("control"):
            self._comm.all_reduce(bad).wait()
        return not bad.item()

    # -- what the pipeline asks on the way -----------------------------------------------------------------------------

    def begin(self, order: Schedule) -> None:
        """See `runtime.Apart.begin`."""
        if order is not self._order:
            self._order, self._now = order, used(order, self._stage, vertical_sync=self._vertical_sync)
        self._weights.clear()

    @contextlib.contextmanager
    def around(self, action: Action) -> Iterator[None]:
        """See `runtime.Apart.around`: the weights that belong to a micro-batch, and after its backward the update."""
        i, stash = action.micro_batch, self._stash
        version = self._now.by[i]
        if action.kind == "F":
            if version in self._now.outlived and self._begun + version == stash.newest:
                stash.keep()
            stash.use(self._begun + version)
            self._used_forward[i] = stash.at
            yield
            if self._alike.size > 1 and self._stage == self.pipeline.schedule.stages - 1:
                self._part(i, 1.0 if self._sums() else 0.0)  # if there was no sample of it here
            return
        stash.use(self._begun + version)
        yield
        visit = Visit(self._stage, i, self._used_forward.pop(i), stash.at, stash.newest)
        self.log.append(visit)
        self.staleness[visit.staleness] += 1
        if stash.newest - self._begun in self._now.outlived:
            stash.keep()
        self._update_stage()
        if self._now.outlived.get(version) == i:
            stash.drop(self._begun + version)

    def objective(self, micro_batch: int, mean: Tensor, weight: float) -> Tensor:
        """See `runtime.Apart.objective`: such that gradients of all replicas add up to that of their joined mean."""
        if not math.isfinite(mean.item()):
            self._finite = False
            return mean * math.nan  # so that no stage applies anything of it
        return mean if self._alike.size == 1 else mean * self._part(micro_batch, weight)

    def _part(self, micro_batch: int, weight: float) -> float:
        """This replica's part of a micro-batch that all replicas divide. Collective among the last stages."""
        if micro_batch not in self._weights:
            t0 = time.perf_counter()
            of_all = torch.tensor([weight], dtype=torch.float64)
            with self._comm.counting("control"):
                self._alike.all_reduce(of_all).wait()
            self._weights[micro_batch] = weight / (of_all.item() or 1.0)
            self.pipeline.times.compute_s -= time.perf_counter() - t0  # it is asked within a forward
        return self._weights[micro_batch]

    def _update_stage(self) -> None:
        """The user's optimizer on this micro-batch's gradient, of all replicas; gradients begin anew."""
        if self._alike.size > 1:
            for piece in self.pieces:
                self._alike.all_reduce(piece.grad).wait()
        if self.watching:
            reached = self.reached()
            with self._comm.counting("control"):
                for seen in reached.values():
                    self._alike.all_reduce(seen).wait()
            self.settle(reached)
        if all(is_finite(piece.grad) for piece in self.pieces):
            for piece in self.pieces:
                self.apply(piece, 0, piece.flat.numel())
        else:
            self._finite = False
        self._stash.newest += 1
        for piece in self.pieces:
            piece.grad.zero_()
