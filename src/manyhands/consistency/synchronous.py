"""Synchronous data-parallel SGD: all gradients are averaged before anybody updates (survey §VI-A, §V-A).

    θ ← u(θ, ḡ),   ḡ = Σ_p n_p g_p / Σ_p n_p

θ parameters, u the optimizer, g_p the mean gradient of worker p over its n_p samples. Two ways to share the update:

    sharded      reduce-scatter ḡ; worker p updates slice p and keeps optimizer state for it alone; all-gather θ
                 (ZeRO stage 1, Rajbhandari et al. 2020, arXiv:1910.02054; U3 of the 2018 course project's family).
                 On shared memory θ exists once and the all-gather is a barrier.
    replicated   all-reduce ḡ; every worker updates everything. Where exchanges go on beside backward, gradients of
                 more than one bucket leave as they become final (Li et al. 2020, arXiv:2006.15704); they count as one
                 all-reduce a piece, and once more, as they are, under the purpose ``buckets``.

``aggregate`` may put a rule of `robust` in the mean's place: ``synchronous(aggregate=krum(f=1))`` bears one worker that
sends anything. Everybody then gathers all gradients and updates everything; see `robust.worker`.

``compress`` sends something shorter than the gradient: ``synchronous(compress=top_k(ratio=0.01))``, which is also what
a plan's ``compress`` comes to; see `compressed`. Of a table with sparse gradients (`partition.rows`) the rows that were
looked up are then sent as they are, see `compression.table_rows`.

Micro-batches (gradient accumulation, *bunch mode* in Färber & Asanović 1997) are the replica's business: one exchange
per step however many.

Payload per rank and step: 2(P−1)/P · n elements either way; (P−1) · n under a robust rule; compressed, what the
compressor says, and at most that where it depends on the values.
Guarantee: N workers equal one worker on the joined batch up to summation order (under a robust rule: an approximation,
each worker counting alike; compressed: an approximation unless nothing is lost); replicas bit-identical.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from manyhands.communication.communicator import Communicator, Work, reference_B
from manyhands.communication.compression.layout import Shape
from manyhands.consistency.agreement import agree_on_unused, weight_of
from manyhands.consistency.clipping import clip_
from manyhands.consistency.compressed import CompressedWorker, Compressing, problems_of
from manyhands.consistency.robust.aggregation import Aggregation, aggregation_from, too_few
from manyhands.consistency.robust.worker import RobustWorker
from manyhands.contract import Batch, Reference, Replica, Setting, Strategy, Traffic, Worker
from manyhands.errors import NonFiniteLoss, Problem, Vetoed


@dataclass(frozen=True)
class Synchronous(Compressing, Strategy):
    """All workers exchange gradients at every step; ``update`` says who applies them, ``aggregate`` what joins them,
    ``compress`` what is sent in their place.
    """

    name: ClassVar[str] = "synchronous"
    paper: ClassVar[Reference] = Reference(
        "Chen, Pan, Monga, Bengio & Jozefowicz",
        "Revisiting distributed synchronous SGD",
        2016,
        "arXiv:1604.00981",
        survey="VI-A",
    )
    identical: ClassVar[bool] = True

    update: Literal["auto", "sharded", "replicated"] = "auto"
    aggregate: str = "mean"
    compress: str = "none"

    def __post_init__(self) -> None:
        if self.update not in ("auto", "sharded", "replicated"):
            raise ValueError(f"update={self.update!r}: it is auto, sharded or replicated")
        if self.aggregate != "mean":
            object.__setattr__(self, "aggregate", str(self.rule))  # equal rules, equal text
        self._read_compress()

    @property
    def bears_cuts(self) -> bool:  # type: ignore[override]
        """A mean is taken element by element; a rule compares whole vectors."""
        return self.aggregate == "mean"

    @property
    def averages_gradients(self) -> bool:  # type: ignore[override]
        """Unless a rule stands in the mean's place."""
        return self.aggregate == "mean"

    @property
    def rule(self) -> Aggregation:
        """What ``aggregate`` says."""
        return aggregation_from(self.aggregate)

    @property
    def sparse(self) -> bool:  # type: ignore[override]
        """Compressed, unless the scheme's momentum is to reach all rows."""
        return self.compresses and not self.compressor.replaces_optimizer

    @property
    def plain_alone(self) -> bool:  # type: ignore[override]
        """Alone nothing is sent, so nothing is compressed; some schemes have a momentum of their own."""
        return not self.compressor.replaces_optimizer

    @property
    def sends_at_most(self) -> bool:
        """Where a payload's length depends on the values."""
        return self.compressor.variable

    @property
    def parameters(self) -> Literal["common", "own"]:
        """One copy serves all when each element is updated by one worker."""
        alone = self.update == "replicated" or self.aggregate != "mean" or self.compress != "none"
        return "own" if alone else "common"

    def traffic_of(self, shapes: Sequence[Shape], size: int, itemsize: int = 4) -> Traffic:
        """See `traffic`; compressed, what the compressor sends for tensors of these shapes."""
        if self.compress == "none":
            return super().traffic_of(shapes, size, itemsize)
        return Traffic(*self.mean_B(shapes, size, itemsize))

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """2(P−1)/P · n elements, as reduce-scatter and all-gather or as all-reduce; (P−1) · n under a robust rule."""
        if self.compress != "none":
            return self.traffic_of(((numel,),), size, itemsize)
        n_B = numel * itemsize
        if self.aggregate != "mean":
            return Traffic(reference_B("all_gather", size * n_B, size), size - 1)
        if self.update == "replicated":
            return Traffic(reference_B("all_reduce", n_B, size), 2 * (size - 1))
        return Traffic(reference_B("reduce_scatter", n_B, size) + reference_B("all_gather", n_B, size), 2 * (size - 1))

    def exact(self, setting: Setting) -> bool:
        """The mean always; a robust rule of one vector is that vector, and what is alone sends nothing."""
        if setting.workers == 1:
            return self.plain_alone
        return self.aggregate == "mean" and self.compressor.lossless

    def problems(self, setting: Setting) -> list[Problem]:
        """A whole-tensor optimizer cannot be asked for a slice, nor a few workers for a vote."""
        if self.compress != "none":
            return self._problems_of_compressor(setting)
        if self.aggregate != "mean":
            return self._problems_of_rule(setting)
        if self.update == "sharded" and not setting.elementwise and setting.workers > 1:
            return [
                Problem(
                    "synchronous(update='sharded') with an optimizer that looks at whole tensors",
                    "a slice can be updated alone only if the optimizer works element by element.",
                    "Use update='replicated', or an optimizer such as sgd, adam, adamw, adagrad or rmsprop.",
                )
            ]
        return []

    def _problems_of_compressor(self, setting: Setting) -> list[Problem]:
        found, said = [], f"compress={self.compress}"
        if self.aggregate != "mean":
            found.append(
                Problem(
                    f"{said} with aggregate={self.aggregate}",
                    "a rule compares workers' gradients, and of those only something shorter would be there.",
                    "Leave one of them out.",
                )
            )
        if self.update == "sharded":
            found.append(
                Problem(
                    f"{said} with update='sharded'",
                    "what is sent stands for whole gradients, so everybody updates everything.",
                    "Leave update (and shard) out, or compress.",
                )
            )
        if self.compressor.replaces_optimizer and not setting.stateless:
            found.append(
                Problem(
                    f"{said} with an optimizer that keeps state",
                    "momentum is part of the scheme, so the optimizer has none of its own.",
                    "Use plain SGD, e.g. optimizer=sgd(lr=0.1), and the scheme's momentum=.",
                )
            )
        return found + problems_of(self.compressor, said, setting)

    def _problems_of_rule(self, setting: Setting) -> list[Problem]:
        rule, workers = self.rule, setting.workers
        found = too_few(
            rule, workers, f"{workers} worker{'s' if workers > 1 else ''}", f"workers={rule.fewest} or more"
        )
        if self.update == "sharded":
            found.append(
                Problem(
                    f"update='sharded' with aggregate={rule}",
                    "a worker that decides a slice for all others could lie to them; everybody applies the rule.",
                    "Leave update (and shard) out, or use aggregate=mean.",
                )
            )
        return found

    def resolve(self, setting: Setting) -> Synchronous:
        """Sharded where memory is shared and the optimizer allows it; replicated elsewhere (it can overlap)."""
        if self.update != "auto":
            return self
        plain = self.aggregate == "mean" and self.compress == "none"
        sharded = setting.elementwise and setting.shares_memory and plain
        return replace(self, update="sharded" if sharded else "replicated")

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        if self.aggregate != "mean":
            return RobustWorker(replica, comm, self.rule)
        if self.compress != "none":
            return CompressedWorker(replica, comm, self.compressor)
        return ShardedWorker(replica, comm) if self.update == "sharded" else ReplicatedWorker(replica, comm)


class ShardedWorker(Worker):
    """Reduce-scatter, update a slice, all-gather."""

    def __init__(self, replica: Replica, comm: Communicator) -> None:
        super().__init__(replica, comm)
        self._pieces = [(piece, comm.over(piece.replicated_over)) for piece in replica.pieces]

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        replica = self.replica
        loss, count = replica.gradients(batch)
        if replica.watching:
            agree_on_unused(replica, self.comm)
        weight = weight_of(loss, count)
        try:
            bounds = [group.reduce_scatter(piece.grad, weight=weight) for piece, group in self._pieces]
        except Vetoed:
            raise NonFiniteLoss(self.comm.step) from None
        if replica.clip is not None:
            clip_(replica, self.comm, bounds, sliced=True)
        for (piece, _), (lo, hi) in zip(self._pieces, bounds, strict=True):
            replica.apply(piece, lo, hi)
        for piece, group in self._pieces:
            group.all_gather(piece.flat).wait()
        return loss


class ReplicatedWorker(Worker):
    """All-reduce (in buckets beside backward, where that goes on by itself) and update everything."""

    def __init__(self, replica: Replica, comm: Communicator) -> None:
        super().__init__(replica, comm)
        self._groups = [comm.over(piece.replicated_over) for piece in replica.pieces]
        self._overlap = replica.runs > 1 and all(group.overlaps and group.size > 1 for group in self._groups)

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        replica, works = self.replica, list[Work]()

        def exchange(i: int, lo: int, hi: int, loss: Tensor, count: float) -> None:
            grad = replica.pieces[i].grad[lo:hi]
            works.append(self._groups[i].all_reduce(grad, weight=weight_of(loss, count)))

        try:
            if self._overlap:
                with self.comm.counting("buckets"):
                    loss, _ = replica.gradients(batch, ready=exchange)
                self._count_pieces()
            else:
                loss, count = replica.gradients(batch)
            if replica.watching:
                agree_on_unused(replica, self.comm)
            if not self._overlap:
                for i, piece in enumerate(replica.pieces):
                    exchange(i, 0, piece.grad.numel(), loss, count)
            for work in works:
                work.wait()
        except Vetoed:
            raise NonFiniteLoss(self.comm.step) from None
        bounds = [(0, piece.flat.numel()) for piece in replica.pieces]
        if replica.clip is not None:
            clip_(replica, self.comm, bounds, sliced=False)
        for piece, (lo, hi) in zip(replica.pieces, bounds, strict=True):
            replica.apply(piece, lo, hi)
        return loss

    def _count_pieces(self) -> None:
        """Payload is what the plan declares, one all-reduce a piece; in how many buckets it left is counted apart."""
        comm = self.comm
        tally = comm.counters.tallies[comm.context.purpose]["all_reduce"]
        for piece, group in zip(self.replica.pieces, self._groups, strict=True):
            tally.calls += 1
            tally.messages += 2 * (group.size - 1)
            tally.sent_B += reference_B("all_reduce", piece.grad.nbytes, group.size)
