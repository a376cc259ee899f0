"""Backup workers: in each round the first n gradients count and late ones are dropped (survey §VI-A).

    round r:   every worker computes g at θ_r;   the first n = P − b to arrive make ḡ = Σ n_p g_p / Σ n_p;
               θ_{r+1} ← u(θ_r, ḡ);   a gradient that was computed at an older θ is thrown away

b = ``backups``. Synchronous in what is computed (no gradient is ever stale), but nobody waits for the b slowest, whose
samples of that round are lost. Abadi et al. (2016) found 3 of 53 workers best: each one more computes in vain, too.

``aggregate`` may put a rule of `robust` in the mean's place: ``backup_workers(backups=1, aggregate=krum(f=1))`` bears
one worker that sends anything, among the n that are in time. The server sees all gradients anyway, so unlike
`synchronous` it costs no payload, only memory on the server for n gradients; and it is the server that must not lie.
Each worker has one voice. A gradient that is not finite is left out as one of the f; where there are more than the rule
bears, all stop. A round with fewer votes than the rule needs (a last small batch) changes nothing. Strategies that
apply each gradient as it comes (`asynchronous`, `downpour`) have nothing to compare it with, so no such option.

A round is decided as a whole, so there is one server: memory under a lock (over MPI a window), or over gloo one rank.

Payload per rank and step: n pushed (also when it comes too late: that shows on arrival) and n pulled.
Approximation for b > 0: which samples count is a race; and under a robust rule. b = 0 equals one worker on the joined
batch up to summation order. A worker that ends earlier is not waited for: the rounds then take what there is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from manyhands.checks import is_whole
from manyhands.communication.communicator import Communicator
from manyhands.consistency.parameter_server.opening import opened
from manyhands.consistency.parameter_server.rounds import Outcome
from manyhands.consistency.parameter_server.strategy import OnServers
from manyhands.consistency.parameter_server.worker import ServedWorker
from manyhands.consistency.robust.aggregation import Aggregation, aggregation_from, is_row_finite, too_few
from manyhands.contract import Batch, Reference, Replica, Setting, Worker
from manyhands.errors import Problem

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BackupWorkers(OnServers):
    """Synchronous rounds that do not wait for the ``backups`` slowest; ``aggregate`` says what joins the others."""

    name: ClassVar[str] = "backup_workers"
    paper: ClassVar[Reference] = Reference(
        "Chen, Pan, Monga, Bengio & Jozefowicz",
        "Revisiting distributed synchronous SGD",
        2016,
        "arXiv:1604.00981",
        survey="VI-A",
    )
    uncompressed: ClassVar[str] = "who comes too late would lose what it had left over, too."

    backups: int = 1
    aggregate: str = "mean"

    def __post_init__(self) -> None:
        if not is_whole(self.backups, 0):
            raise ValueError(f"backups={self.backups!r}: how many workers are not waited for, from 0")
        if self.aggregate != "mean":
            object.__setattr__(self, "aggregate", str(self.rule))  # equal rules, equal text

    @property
    def rule(self) -> Aggregation:
        """What ``aggregate`` says."""
        return aggregation_from(self.aggregate)

    def waited_for(self, workers: int) -> int:
        """How many gradients end a round."""
        return max(1, workers - self.backups)

    def exact(self, setting: Setting) -> bool:
        """If everybody is waited for, the mean taken, and nobody's own gradient clipped."""
        return setting.workers == 1 or (self.backups == 0 and self.aggregate == "mean" and not setting.clip)

    def problems(self, setting: Setting) -> list[Problem]:
        """Somebody has to be waited for, and enough for a vote."""
        found = super().problems(setting)
        if setting.workers > 1 and self.backups >= setting.workers:
            found.append(
                Problem(
                    f"{self} with {setting.workers} workers",
                    "a round needs at least one gradient that is waited for.",
                    f"At most backups={setting.workers - 1}; the paper's best was 3 of 53.",
                )
            )
        elif self.aggregate != "mean":
            n, rule = self.waited_for(setting.workers), self.rule
            whose = f"{n} of {setting.workers} worker{'s' if setting.workers > 1 else ''} waited for"
            found += too_few(rule, n, whose, f"workers={rule.fewest + self.backups} or more, or fewer backups")
        return found

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        return BackupWorkersWorker(replica, comm, self)


class BackupWorkersWorker(ServedWorker):
    """Brings a gradient to the round under way, and waits for the round's end if it was in time."""

    def __init__(self, replica: Replica, comm: Communicator, strategy: BackupWorkers) -> None:
        super().__init__(replica, comm, opened(replica, comm, strategy.shards, optimizer=replica.optimizer))
        self.rule = strategy.rule
        self.rounds = self.store.rounds(strategy.waited_for(comm.size), self.rule)
        self._robust = strategy.aggregate != "mean"
        self._warned: set[str] = set()
        #: Gradients of this worker that were in time, and that were not.
        self.in_time = self.late = 0

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        loss, usable, wrong = self.own_gradient(batch)
        replica = self.replica
        gradients = [piece.grad for piece in replica.pieces]
        if usable and self._robust and not wrong and not is_row_finite([g[None] for g in gradients], 0):
            wrong = "gradient"
        if wrong and not self._robust:
            self.diverge(wrong)
        if wrong == "loss":  # whatever its gradient is, it says nothing
            for gradient in gradients:
                gradient.fill_(math.nan)
        if not usable and replica.count:  # a sum over no samples is 0, and counts
            replica.add_l2([(0, g.numel()) for g in gradients])
        late, outcome = self.rounds.bring(gradients, replica.count, votes=usable)
        self.late += bool(late)
        self.in_time += not late
        if wrong:
            if outcome is Outcome.SPOILT:
                self.diverge(wrong)
            self._warn_once(wrong, f"worker {self.comm.rank} has no finite {wrong} and is left out of {self.rule}")
            replica.count = 0.0  # its loss says nothing, as that of a worker without samples
            return torch.zeros(())
        if outcome is Outcome.FEW and self.comm.rank == 0:
            self._warn_once(
                "few", f"too few workers were left in a round, or had samples, for {self.rule}: it changed nothing"
            )
        return loss

    def _warn_once(self, key: str, what: str) -> None:
        if key not in self._warned:
            log.warning("step %s: %s (said once)", self.comm.step, what)
        self._warned.add(key)

    def meet(self) -> None:
        """Rounds do not wait for a worker that is here: it may have come to its end before the others."""
        self.rounds.aside(1)
        super().meet()
        self.rounds.aside(-1)
        with self.comm.counting("control"):
            self.comm.barrier()  # nobody brings a gradient to a round that counts another as aside

    def state_dict(self) -> dict[str, Any]:
        """Between rounds there is nothing beyond what the server keeps: a round under way is begun anew."""
        return super().state_dict() | {"in_time": self.in_time, "late": self.late}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank. Collective."""
        super().load_state_dict(state)
        self.in_time, self.late = state["in_time"], state["late"]
