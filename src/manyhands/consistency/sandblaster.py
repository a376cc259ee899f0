"""Sandblaster L-BFGS: a batch in many small work units, and a quasi-Newton step that nobody holds whole (survey §VI-A).

    ḡ = Σ_u n_u g_u / Σ_u n_u       over the units u of the global batch, each taken by whoever is free
    θ ← θ − η (H ḡ + λ θ)           worker p on slice p;   H: see `lbfgs`

n_u samples of unit u and g_u their mean gradient, η the learning rate and λ the weight decay of the user's optimizer,
which has to be plain SGD: the rule itself is L-BFGS (Dean et al. 2012, section 4.2). A batch is cut into ``units``
parts a worker, P · ``units`` in all, so that a worker which is slower simply does fewer. Who finds none left does one
again that is not finished (a backup task, at most ``backups`` times a unit; 0: none); the first result counts, others
are dropped. See `work_units`. Worker p keeps slice p of the ``history`` last pairs of displacement and change of
gradient; dot products are made on slices and added up, 3 · (2 · history + 3) numbers a step, counted as ``control``.

No line search: the step length is η. It is for large batches, all data at best: from one small batch to the next the
gradient changes mostly because the samples do, H is then noise, and runs diverge at rates that are right for SGD.
The paper's servers go on while a replica dawdles; here each worker updates a slice, so a step ends when the last has
left its unit. Units bound that wait; a backup task bounds when a result is there, and costs its worker up to a unit's
time, so ``backups=0`` is faster where workers are equally fast. L2 that the loss brings is part of f. A limit on the
gradient's norm (clip) holds for the direction: clipped gradients would say nothing about curvature.

Payload per rank and step: ``units`` · n elements pulled (slice p of all units' gradients, in slices of multiples of 64
elements), and (P−1)/P · n for the all-gather of θ. Memory: P · ``units`` · n elements in common for the units'
gradients, so that they are added in the order of units; (2 · history + 3) · n/P a worker for the history.
Guarantee: P workers equal one up to summation order (an approximation of the user's optimizer, alone too); replicas
bit-identical, and results and resume exact bit for bit for a model that draws no random numbers. Buffers such as
BatchNorm's are those of the units that a worker happened to take, and a race.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from manyhands.checks import is_whole
from manyhands.communication.communicator import Communicator, reference_B
from manyhands.communication.reduction import reduce_into, slices
from manyhands.consistency.agreement import agree_on_unused, gather_weights
from manyhands.consistency.clipping import clip_
from manyhands.consistency.lbfgs import History
from manyhands.consistency.work_units import WorkUnits
from manyhands.contract import Batch, Reference, Replica, Setting, Strategy, Traffic, Worker, rows_of
from manyhands.errors import NonFiniteLoss, Problem


@dataclass(frozen=True)
class Sandblaster(Strategy):
    """L-BFGS on one batch in ``units`` work units a worker, with a ``history`` of so many pairs."""

    name: ClassVar[str] = "sandblaster"
    paper: ClassVar[Reference] = Reference(
        "Dean et al.", "Large scale distributed deep networks", 2012, "NeurIPS 25", survey="VI-A"
    )
    identical: ClassVar[bool] = True
    whole_batch: ClassVar[bool] = True
    plain_alone: ClassVar[bool] = False
    steadier: ClassVar[str] = "with sandblaster, larger batches or a smaller lr"
    uncompressed: ClassVar[str] = "L-BFGS compares gradients of one step with those of the step before."

    units: int = 4
    history: int = 10
    backups: int = 1

    def __post_init__(self) -> None:
        if not is_whole(self.units, 1):
            raise ValueError(f"units={self.units!r}: work units a worker, a whole number from 1")
        if not is_whole(self.history, 1):
            raise ValueError(f"history={self.history!r}: how many pairs are kept, a whole number from 1")
        if not is_whole(self.backups, 0):
            raise ValueError(f"backups={self.backups!r}: how often a unit may be done again, from 0")

    @property
    def parameters(self) -> Literal["common", "own"]:
        """One writer an element."""
        return "common"

    @property
    def sends_at_most(self) -> bool:
        """The last slices are smaller, and a batch of few samples has fewer units."""
        return True

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """A slice of every unit's gradient, and an all-gather of slices."""
        if size == 1:
            return Traffic()
        lo, hi = slices(numel, size)[0]
        pulled_B = size * self.units * (hi - lo) * itemsize
        gathered_B = reference_B("all_gather", numel * itemsize, size)
        return Traffic(pulled_B + gathered_B, messages=1 + (size - 1))

    def problems(self, setting: Setting) -> list[Problem]:
        """Units are taken from common memory, and the update is not the optimizer's."""
        found = []
        if setting.workers > 1 and not setting.shares_memory:
            found.append(
                Problem(
                    f"sandblaster on transport={setting.transport}",
                    "workers take units from, and leave gradients in, memory that all of them see.",
                    "Use transport=shared or threads; synchronous is the scheme for workers without common memory.",
                )
            )
        if not setting.stateless:
            found.append(
                Problem(
                    "sandblaster with an optimizer that has a rule or a momentum of its own",
                    "sandblaster brings its own update, L-BFGS.",
                    "optimizer=sgd(lr=…), without momentum, gives the step length.",
                )
            )
        return found

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        return SandblasterWorker(replica, comm, self)


class SandblasterWorker(Worker):
    """Takes units until there are none left, then makes its slice of the step."""

    def __init__(self, replica: Replica, comm: Communicator, strategy: Sandblaster) -> None:
        super().__init__(replica, comm)
        most, pieces = comm.size * strategy.units, replica.pieces
        self._units = WorkUnits(
            most,
            comm.size,
            strategy.backups,
            allocate=lambda numel, dtype: comm.allocate(numel, dtype, common=True),
            lock=comm.locks(1)[0] if comm.size > 1 else contextlib.nullcontext(),
        )
        self._losses = comm.allocate(most, torch.float64, common=True)
        self._counts = comm.allocate(most, torch.float64, common=True)
        #: By piece: a row for each unit's gradient. One writer a row, the one whose result counts.
        self._results = [
            comm.allocate(most * p.flat.numel(), p.flat.dtype, common=True).view(most, -1).to(p.flat.device)
            for p in pieces
        ]
        self._bounds = [slices(p.flat.numel(), comm.size)[comm.rank] for p in pieces]
        self._history = History(strategy.history, [hi - lo for lo, hi in self._bounds], [p.flat for p in pieces])
        #: A sum over samples counts without any; then units are added up rather than averaged.
        self._sums = replica.share(Batch(None, None, 0, total=1)) > 0
        #: Units that this worker did, and of those the results that came second.
        self.done = self.dropped = 0

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        replica, comm, units = self.replica, self.comm, min(self._units.most, batch.count)
        finite = self._work(batch, units)
        if replica.watching:
            agree_on_unused(replica, comm)
        # Nobody leaves this before all have come, each with its results written down: now all units are there.
        gather_weights(comm, torch.zeros(()), 1.0 if finite else math.inf)
        loss = self._join(units)
        replica.add_l2(self._bounds)
        slices_of = [
            (p, p.flat[lo:hi], p.grad[lo:hi]) for p, (lo, hi) in zip(replica.pieces, self._bounds, strict=True)
        ]
        newest = self._history.look([grad for _, _, grad in slices_of])
        with comm.counting("control"):
            comm.all_reduce(newest).wait()
        if not bool(newest.isfinite().all()):
            raise NonFiniteLoss(comm.step, what="gradient")
        if comm.rank == 0:
            self._units.clear()  # all have added up; nobody begins again before the all-gather
        for (_, _, grad), direction in zip(slices_of, self._history.direction(newest), strict=True):
            grad.copy_(direction)
        clip_(replica, comm, self._bounds, sliced=True)
        for (piece, flat, _), moved, (lo, hi) in zip(slices_of, self._history.displacements, self._bounds, strict=True):
            moved.copy_(flat)
            replica.apply(piece, lo, hi)
            torch.sub(flat, moved, out=moved)
        for piece in replica.pieces:
            comm.all_gather(piece.flat).wait()
        return loss

    def _work(self, batch: Batch, units: int) -> bool:
        """Do units until there are none left; whether all losses were finite."""
        rank, replica = self.comm.rank, self.replica
        if rank < units:
            unit: int | None = self._units.own(rank)
        else:  # fewer samples than workers; whoever begins nothing has no gradients of the last step either
            replica.gradients(Batch(None, None, 0, batch.total))
            unit = self._units.take(units)
        while unit is not None:
            lo, hi = unit * batch.count // units, (unit + 1) * batch.count // units
            part = Batch(rows_of(batch.inputs, lo, hi), rows_of(batch.target, lo, hi), hi - lo, batch.total)
            loss, count = replica.gradients(part)
            self.done += 1
            if not math.isfinite(value := loss.item()):
                return False
            if self._units.finish(unit):
                self._losses[unit], self._counts[unit] = value, count
                for results, piece in zip(self._results, replica.pieces, strict=True):
                    results[unit].copy_(piece.grad)
            else:
                self.dropped += 1
            unit = self._units.take(units)
        return True

    def _join(self, units: int) -> Tensor:
        """This worker's slices of the joined gradient, into ``grad``; the joined loss. In the order of units."""
        counts = self._counts[:units].tolist()
        total = 1.0 if self._sums else sum(counts)
        factors = [count / total if total else 0.0 for count in counts]
        for results, piece, (lo, hi) in zip(self._results, self.replica.pieces, self._bounds, strict=True):
            own = results[:units, lo:hi]
            self.comm.access("pull", own)
            reduce_into(piece.grad[lo:hi], list(own), factors)
        self.replica.count = total
        return torch.tensor(sum(f * x for f, x in zip(factors, self._losses[:units].tolist(), strict=True)))

    def rebase(self) -> None:
        """Parameters are others: displacements from the old ones say nothing."""
        self._history.clear()

    def state_dict(self) -> dict[str, Any]:
        """This worker's slice of the history, and everybody's products."""
        history = self._history
        return {"rows": history.rows, "products": history.products, "kept": history.kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank."""
        for mine, x in zip(
            (*self._history.rows, self._history.products), (*state["rows"], state["products"]), strict=True
        ):
            mine.copy_(x)
        self._history.kept = state["kept"]
