"""Backup workers: in each round the first n gradients count and late ones are dropped (survey §VI-A).

    round r:   every worker computes g at θ_r;   the first n = P − b to arrive make ḡ = Σ n_p g_p / Σ n_p;
               θ_{r+1} ← u(θ_r, ḡ);   a gradient that was computed at an older θ is thrown away

b = ``backups``. Synchronous in what is computed (no gradient is ever stale), but nobody waits for the b slowest, whose
samples of that round are lost. Abadi et al. (2016) found 3 of 53 workers best: each one more computes in vain, too.

Payload per rank and step: n pushed (also when it comes too late: that shows on arrival) and n pulled.
Approximation for b > 0: which samples count is a race. b = 0 equals one worker on the joined batch up to summation
order. A worker that ends earlier is not waited for: the rounds then take what there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from manyhands.checks import is_whole
from manyhands.communication.communicator import Communicator
from manyhands.consistency.parameter_server import store
from manyhands.consistency.parameter_server.worker import ServedWorker, server_problems
from manyhands.contract import Batch, Reference, Replica, Setting, Strategy, Traffic, Worker
from manyhands.errors import Problem


@dataclass(frozen=True)
class BackupWorkers(Strategy):
    """Synchronous rounds that do not wait for the ``backups`` slowest workers."""

    name: ClassVar[str] = "backup_workers"
    paper: ClassVar[Reference] = Reference(
        "Chen, Pan, Monga, Bengio & Jozefowicz",
        "Revisiting distributed synchronous SGD",
        2016,
        "arXiv:1604.00981",
        survey="VI-A",
    )
    deterministic: ClassVar[bool] = False

    backups: int = 1

    def __post_init__(self) -> None:
        if not is_whole(self.backups, 0):
            raise ValueError(f"backups={self.backups!r}: how many workers are not waited for, from 0")

    @property
    def lockstep(self) -> bool:
        """Not all workers take part in a round."""
        return False

    @property
    def sends_at_most(self) -> bool:
        """A worker whose share is empty has nothing to push."""
        return True

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """A push and a pull."""
        return store.traffic(numel, size, itemsize, 1) + store.traffic(numel, size, itemsize, 1)

    def exact(self, setting: Setting) -> bool:
        """If everybody is waited for, and nobody's own gradient clipped."""
        return setting.workers == 1 or (self.backups == 0 and not setting.clip)

    def problems(self, setting: Setting) -> list[Problem]:
        """Somebody has to be waited for."""
        found = server_problems(self.name, setting, ranks=False)
        if setting.workers > 1 and self.backups >= setting.workers:
            found.append(
                Problem(
                    f"{self} with {setting.workers} workers",
                    "a round needs at least one gradient that is waited for.",
                    f"At most backups={setting.workers - 1}; the paper's best was 3 of 53.",
                )
            )
        return found

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        return BackupWorkersWorker(replica, comm, self.backups)


class BackupWorkersWorker(ServedWorker):
    """Brings a gradient to the round under way, and waits for the round's end if it was in time."""

    def __init__(self, replica: Replica, comm: Communicator, backups: int) -> None:
        self._common = store.CommonStore(replica, comm, 1, optimizer=replica.optimizer)
        super().__init__(replica, comm, self._common)
        self._needed = comm.size - backups if comm.size > 1 else 1
        self._means = [comm.allocate(p.flat.numel(), p.flat.dtype, common=True) for p in replica.pieces]
        self._weight = comm.allocate(1, torch.float64, common=True)
        # The round under way, how many gradients it has, and how many workers do not come to it any more.
        self._round = store.counters(comm, 3)
        (self._lock,) = comm.locks(1)
        self._ended = comm.board()  # a worker's: the last round that it has ended, plus 1
        self._own_round = 0
        #: Gradients of this worker that were in time, and that were not.
        self.in_time = self.late = 0

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        loss, usable = self.gradients(batch)
        weight = self.replica.count if usable else 0.0
        if usable:
            for piece in self.replica.pieces:
                self.comm.access("push", piece.grad)
        with self._lock:
            in_time = int(self._round[0]) == self._own_round
            if in_time:
                self._bring(weight)
                self._end_round_if_complete()
        if in_time:
            self.in_time += 1
            self._ended.wait_for_one(self._own_round + 1, "backup_workers: for the end of the round")
        else:
            self.late += 1
        with self._lock:
            self._own_round = int(self._round[0])
            self.store.pull()
        return loss

    def _bring(self, weight: float) -> None:
        """Take this worker's gradient into the round's mean. Under the lock, as is what follows."""
        if weight:
            so_far = float(self._weight)
            for mean, piece in zip(self._means, self.replica.pieces, strict=True):
                if so_far:
                    mean.lerp_(piece.grad, weight / (so_far + weight))
                else:
                    mean.copy_(piece.grad)
            self._weight += weight
        self._round[1] += 1

    def _end_round_if_complete(self) -> None:
        """Whoever completes the round applies it, and opens the next."""
        there, gone = int(self._round[1]), int(self._round[2])
        if not there or there < min(self._needed, self.comm.size - gone):
            return
        if float(self._weight):
            self._common.receive(self._means)
        self._weight.zero_()
        self._round[0] += 1
        self._round[1] = 0
        self._ended.post(int(self._round[0]))

    def meet(self) -> None:
        """Rounds do not wait for a worker that is here: it may have come to its end before the others."""
        with self._lock:
            self._round[2] += 1
            self._end_round_if_complete()
        super().meet()
        with self._lock:
            self._round[2] -= 1
        with self.comm.counting("control"):
            self.comm.barrier()  # nobody brings a gradient to a round that counts another as gone

    def state_dict(self) -> dict[str, Any]:
        """Between rounds there is nothing beyond what the server keeps: a round under way is begun anew."""
        return super().state_dict() | {"in_time": self.in_time, "late": self.late}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank. Collective."""
        super().load_state_dict(state)
        self.in_time, self.late = state["in_time"], state["late"]
