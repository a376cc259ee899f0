"""HOGWILD!: workers write to one copy of the parameters, without locks (survey §VI-A).

    every worker, at any time:   g = ∇ at θ as it is being written by others;   θ ← u(θ, g), in place

Where gradients are sparse two workers seldom touch the same coordinate at once, little is overwritten, and convergence
is nearly that of one worker with P times the updates; where they are dense it often works and nothing is promised.
What the paper compares with is ``lock``:

    none           the scheme itself
    one            one lock about the whole step: gradients are never stale, and workers never parallel
    coordinate     a lock for each row of a sparse table, held from its reading to its writing, and for each dense
                   parameter (the paper's AIG)
    round_robin    gradients side by side, updates in the order of ranks (Langford, Smola & Zinkevich 2009)

The paper's back-off, step size times β after each epoch, is a learning-rate schedule and no part of the strategy:
``--schedule "step(step_size=K, gamma=0.9)"`` with β = 0.9 and K the steps of an epoch, samples over global batch.

Each worker keeps optimizer state of its own, so with momentum or Adam it averages its own gradients only. Parameters
are one copy, hence only for transports that share memory. Buffers such as BatchNorm's statistics are each worker's own
and follow the plan's ``buffers``.

Payload per rank and step: none. Approximation; results differ from run to run, and a resume is exact for parameters
and optimizer state but not for the race. One worker is plain SGD bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from manyhands.communication.communicator import Communicator, Lock
from manyhands.consistency.independent import IndependentWorker
from manyhands.contract import Batch, Parameters, Reference, Replica, Setting, Strategy, Traffic, Worker
from manyhands.errors import BadInput, Problem

#: Rows of a larger table share locks: row r has the lock r mod so many.
MOST_LOCKS = 4096


@dataclass(frozen=True)
class Hogwild(Strategy):
    """Updates in place; ``lock`` says what keeps them apart."""

    name: ClassVar[str] = "hogwild"
    paper: ClassVar[Reference] = Reference(
        "Niu, Recht, Ré & Wright",
        "HOGWILD!: a lock-free approach to parallelizing stochastic gradient descent",
        2011,
        "arXiv:1106.5730",
        survey="VI-A",
    )
    deterministic: ClassVar[bool] = False
    survives: ClassVar[bool] = True
    sparse: ClassVar[bool] = True
    steadier: ClassVar[str] = "with hogwild, fewer workers"
    uncompressed: ClassVar[str] = "workers write into one memory, and nothing is sent."

    lock: Literal["none", "one", "coordinate", "round_robin"] = "none"

    def __post_init__(self) -> None:
        if self.lock not in ("none", "one", "coordinate", "round_robin"):
            raise ValueError(f"lock={self.lock!r}: it is none, one, coordinate or round_robin")

    @property
    def parameters(self) -> Literal["common", "own"]:
        """One copy, which everybody writes."""
        return "common"

    @property
    def lockstep(self) -> bool:
        """Never."""
        return False

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """Nothing: memory is where it is."""
        return Traffic()

    def exact(self, setting: Setting) -> bool:
        """Only alone."""
        return setting.workers == 1

    def problems(self, setting: Setting) -> list[Problem]:
        """One copy of the parameters needs memory that all workers see."""
        if setting.shares_memory:
            return []
        return [
            Problem(
                f"hogwild on transport={setting.transport}",
                "all workers write to one copy of the parameters.",
                "Use transport=shared or threads; asynchronous is the scheme for workers without common memory.",
            )
        ]

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        if self.lock == "coordinate":
            return CoordinateLockedWorker(replica, comm)
        return HogwildWorker(replica, comm, self.lock)


class HogwildWorker(IndependentWorker):
    """An independent worker whose parameters happen to be everybody's."""

    def __init__(self, replica: Replica, comm: Communicator, lock: str) -> None:
        super().__init__(replica, comm)
        self._lock = comm.locks(1)[0] if lock == "one" else None
        self._turns = comm.board() if lock == "round_robin" else None
        self._turn = 0

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        if self._lock is not None:
            with self._lock:
                return self.own_step(batch)
        return self.own_step(batch)

    def own_update(self) -> None:
        """In the order of ranks where that is asked for."""
        if self._turns is None:
            super().own_update()
            return
        rank, size = self.comm.rank, self.comm.size
        turn = self._turn * size + rank  # turns of all workers, counted through
        self._turns.wait(turn, "hogwild: for its turn", rank=(rank - 1) % size)
        super().own_update()
        self._turns.post(turn + 1)
        self._turn += 1

    def consensus(self) -> Parameters:
        """The one copy, once everybody has stopped writing."""
        with self.comm.counting("consensus"):
            self.comm.barrier()
        return tuple(piece.flat for piece in self.replica.pieces)


class CoordinateLockedWorker(HogwildWorker):
    """Holds the locks of all that a step touches, taken in one order by everybody, so that nobody waits in a circle."""

    def __init__(self, replica: Replica, comm: Communicator) -> None:
        super().__init__(replica, comm, "coordinate")
        self._held = contextlib.ExitStack()
        self._tables_held: set[int] = set()
        self._dense: list[Lock] = []
        for i, piece in enumerate(replica.pieces):
            if piece.width:
                rows = piece.flat.numel() // piece.width
                replica.before_lookup(i, functools.partial(self._take_rows, comm.locks(min(rows, MOST_LOCKS))))
            else:
                self._dense += comm.locks(max(len(piece.spans), 1))

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        self._tables_held.clear()
        with self._held:
            for lock in self._dense:
                self._held.enter_context(lock)
            return self.own_step(batch)

    def _take_rows(self, locks: list[Lock], rows: Tensor) -> None:
        if id(locks) in self._tables_held:
            raise BadInput(
                "hogwild(lock='coordinate') with two lookups in one table in a step: rows are locked in one go, or two "
                "workers may wait for each other. Look all rows up at once, or use another lock."
            )
        self._tables_held.add(id(locks))
        for i in sorted(set((rows % len(locks)).tolist())):
            self._held.enter_context(locks[i])
