"""Local SGD: every worker trains alone for some steps, then parameters are averaged (survey §VI-A).

    θ_p ← u(θ_p, g_p)                       in every step
    θ_p ← Σ_q n_q θ_q / Σ_q n_q             after every k-th

θ_p parameters of worker p, u the optimizer, g_p the gradient of its share, n_p what its shares have counted since the
last meeting, k = ``every`` (Stich 2019, Local SGD converges fast and communicates little, arXiv:1805.09767).

What becomes of the optimizer's state (momentum, Adam's moments) at a meeting is ``state``:

    local     every worker keeps its own
    average   it is averaged as parameters are; numbers that belong to a parameter as a whole, such as Adam's step
              count, are the first worker's. What it costs depends on the optimizer (n elements for momentum, 2n for
              Adam) and is counted apart, under the purpose ``state``
    reset     it starts anew

``switch=N`` is post-local SGD (Lin, Stich, Patel & Jaggi 2020, Don't use large mini-batches, use local SGD,
arXiv:1808.07217): N steps exactly as `synchronous` does them, then local ones. ``warmup=N``, from the same paper: in
the first N steps parameters meet after every one. Buffers such as BatchNorm's statistics follow the plan's ``buffers``
(`consistency.buffers`), here as everywhere.

Payload per rank: 2(P−1)/P · n elements in every k-th step, in each of the first N too.
Guarantee: for k = 1 and plain SGD, N workers equal one on the joined batch up to summation order; with momentum too if
state is averaged. Otherwise an approximation: workers see their own shares only between meetings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from manyhands.checks import is_whole
from manyhands.communication.communicator import Communicator, reference_B
from manyhands.consistency.independent import IndependentWorker
from manyhands.consistency.moments import average_state
from manyhands.consistency.synchronous import ReplicatedWorker
from manyhands.contract import Batch, Parameters, Reference, Replica, Setting, Strategy, Traffic, Worker
from manyhands.errors import Problem


@dataclass(frozen=True)
class Local(Strategy):
    """Train alone for ``every`` steps, then average parameters; ``state``: what becomes of momentum and moments."""

    name: ClassVar[str] = "local"
    bears_cuts: ClassVar[bool] = True
    paper: ClassVar[Reference] = Reference(
        "Stich", "Local SGD converges fast and communicates little", 2019, "arXiv:1805.09767", survey="VI-A"
    )
    steadier: ClassVar[str] = "with local, a smaller every="

    every: int = 16
    state: Literal["local", "average", "reset"] = "local"
    warmup: int = 0
    switch: int = 0

    def __post_init__(self) -> None:
        if not is_whole(self.every, 1):
            raise ValueError(
                f"every={self.every!r}: it is a whole number from 1, the steps from one average to the next"
            )
        if self.state not in ("local", "average", "reset"):
            raise ValueError(f"state={self.state!r}: it is local, average or reset")
        for name in ("warmup", "switch"):
            if not is_whole(getattr(self, name), 0):
                raise ValueError(f"{name}={getattr(self, name)!r}: it is a whole number of first steps, 0 for none")
        if self.warmup and self.switch:
            raise ValueError(
                f"warmup={self.warmup} and switch={self.switch}: both say how the first steps are exchanged; give one"
            )

    @property
    def lockstep(self) -> bool:
        """With every=1."""
        return self.every == 1

    def meets(self, steps: int) -> bool:
        """Whether all workers hold the same parameters after so many steps."""
        first = max(self.warmup, self.switch)
        return steps <= first or (steps - first) % self.every == 0

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """2(P−1)/P · n elements a meeting."""
        sent_B, messages = reference_B("all_reduce", numel * itemsize, size), 2 * (size - 1)
        first = max(self.warmup, self.switch)
        later = Traffic(sent_B, messages, every=self.every, first=first + self.every)
        if not first:
            return later
        # Of every step, and from the first after these on taken off again.
        return Traffic(sent_B, messages) + Traffic(-sent_B, -messages, first=first + 1) + later

    def exact(self, setting: Setting) -> bool:
        """In lock-step, if the update is stateless and clips nobody's own gradient."""
        return setting.workers == 1 or (self.every == 1 and setting.stateless and not setting.clip)

    def problems(self, setting: Setting) -> list[Problem]:
        """State that is not element by element has no average."""
        if self.state != "average" or setting.elementwise or setting.workers == 1:
            return []
        return [
            Problem(
                "local(state='average') with an optimizer that looks at whole tensors",
                "state can be averaged only if it is a number for each parameter element.",
                "Use state='local' or 'reset', or an optimizer such as sgd, adam, adamw, adagrad or rmsprop.",
            )
        ]

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        return LocalWorker(replica, comm, self)


class LocalWorker(IndependentWorker):
    """Own steps, and a meeting now and then."""

    def __init__(self, replica: Replica, comm: Communicator, strategy: Local) -> None:
        super().__init__(replica, comm)
        self._strategy = strategy
        self._synchronous = ReplicatedWorker(replica, comm)

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        strategy = self._strategy
        if self.comm.size == 1:
            return self.own_step(batch)
        if self.steps < strategy.switch:
            self.steps, self.alike = self.steps + 1, True
            return self._synchronous.step(batch)
        if self.alike and self.steps > strategy.switch:
            self._begin_anew()
        loss = self.lock_step(batch) if strategy.lockstep else self.own_step(batch)
        if strategy.meets(self.steps):
            self.average_([piece.flat for piece in self.replica.pieces], self.weight)
            self.alike = True
        return loss

    def _begin_anew(self) -> None:
        """What a meeting means for the optimizer's state; done when the next step begins.

        A checkpoint at a meeting thereby holds all that was, and a resume does it again.
        """
        if self._strategy.state == "average":
            average_state(self.replica, self.comm, self.seen)
        elif self._strategy.state == "reset":
            self.replica.load_optimizer_state([])
        self.samples = 0.0

    def consensus(self) -> Parameters:
        """The mean that a meeting now would come to."""
        return self.mean(self.seen)
