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

``compress`` sends something shorter than parameters: how far each has gone since all last agreed on a, and what was
left out of it so far (Basu, Data, Karakus & Diggavi 2019, Qsparse-local-SGD, arXiv:1906.02367;
`consistency.compressed`):

    θ_p ← a + (1/P) Σ_q C(s_q (θ_q − a) + e_q)

All end with the same bits. Thresholds are in units of what parameters have moved by, not of gradients. An average on
the way (the consensus between two meetings) is exact and changes nothing.

``switch=N`` is post-local SGD (Lin, Stich, Patel & Jaggi 2020, Don't use large mini-batches, use local SGD,
arXiv:1808.07217): N steps exactly as `synchronous` does them, then local ones. ``warmup=N``, from the same paper: in
the first N steps parameters meet after every one. Buffers such as BatchNorm's statistics follow the plan's ``buffers``
(`consistency.buffers`), here as everywhere.

Payload per rank: 2(P−1)/P · n elements in every k-th step, in each of the first N too; compressed, what the compressor
says, and at most that where it depends on the values.
Guarantee: for k = 1 and plain SGD, N workers equal one on the joined batch up to summation order; with momentum too if
state is averaged. Otherwise an approximation: workers see their own shares only between meetings. Compressed, what has
been sent and the residuals add up to what workers have done, up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from manyhands.checks import is_whole
from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.layout import Shape
from manyhands.consistency.compressed import Compressing, problems_of
from manyhands.consistency.independent import IndependentWorker
from manyhands.consistency.moments import average_state
from manyhands.consistency.synchronous import ReplicatedWorker
from manyhands.contract import Batch, Parameters, Reference, Replica, Setting, Strategy, Traffic, Worker
from manyhands.errors import Problem


@dataclass(frozen=True)
class Local(Compressing, Strategy):
    """Train alone for ``every`` steps, then average parameters; ``state``: what becomes of momentum and moments,
    ``compress``: what is sent instead of parameters.
    """

    name: ClassVar[str] = "local"
    moves: ClassVar[str] = "differences of parameters are"
    bears_cuts: ClassVar[bool] = True
    paper: ClassVar[Reference] = Reference(
        "Stich", "Local SGD converges fast and communicates little", 2019, "arXiv:1805.09767", survey="VI-A"
    )
    steadier: ClassVar[str] = "with local, a smaller every="

    every: int = 16
    state: Literal["local", "average", "reset"] = "local"
    warmup: int = 0
    switch: int = 0
    compress: str = "none"

    def __post_init__(self) -> None:
        self._read_compress()
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

        if self.switch and self.compresses:
            raise ValueError(
                f"switch={self.switch} and compress={self.compress}: what is left over of gradients, which the first "
                "steps exchange, would be added to what parameters have moved by; give warmup= instead of switch="
            )

    @property
    def lockstep(self) -> bool:
        """With every=1."""
        return self.every == 1

    @property
    def sends_at_most(self) -> bool:
        """Where a payload's length depends on the values."""
        return self.compressor.variable

    def meets(self, steps: int) -> bool:
        """Whether all workers hold the same parameters after so many steps."""
        first = max(self.warmup, self.switch)
        return steps <= first or (steps - first) % self.every == 0

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """2(P−1)/P · n elements a meeting; compressed, what the compressor sends for it."""
        return self.traffic_of(((numel,),), size, itemsize)

    def traffic_of(self, shapes: Sequence[Shape], size: int, itemsize: int = 4) -> Traffic:
        """See `traffic`."""
        sent_B, messages = self.mean_B(shapes, size, itemsize)
        first = max(self.warmup, self.switch)
        later = Traffic(sent_B, messages, every=self.every, first=first + self.every)
        if not first:
            return later
        # Of every step, and from the first after these on taken off again.
        return Traffic(sent_B, messages) + Traffic(-sent_B, -messages, first=first + 1) + later

    def exact(self, setting: Setting) -> bool:
        """In lock-step, if the update is stateless and clips nobody's own gradient."""
        sums = self.every == 1 and setting.stateless and not setting.clip
        return setting.workers == 1 or (sums and self.compressor.lossless)

    def problems(self, setting: Setting) -> list[Problem]:
        """State that is not element by element has no average; and what compressors cannot."""
        found = []
        if self.compresses:
            asked = f"compress={self.compress} with {self.name}"
            found = problems_of(self.compressor, asked, setting, moves=self.moves)
        if self.state != "average" or setting.elementwise or setting.workers == 1:
            return found
        return [
            *found,
            Problem(
                "local(state='average') with an optimizer that looks at whole tensors",
                "state can be averaged only if it is a number for each parameter element.",
                "Use state='local' or 'reset', or an optimizer such as sgd, adam, adamw, adagrad or rmsprop.",
            ),
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
        self._mean = self.compressed_mean(strategy.compressor) if strategy.compresses and comm.size > 1 else None
        self._agreed: list[Tensor] = []  # made in the first step: a resume changes the parameters before it

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        strategy = self._strategy
        if self.comm.size == 1:
            return self.own_step(batch)
        if self._mean is not None and not self._agreed:
            self._agreed = [piece.flat.detach().clone() for piece in self.replica.pieces]
        if self.steps < strategy.switch:
            self.steps, self.alike = self.steps + 1, True
            return self._synchronous.step(batch)
        if self.alike and self.steps > strategy.switch:
            self._begin_anew()
        loss = self.lock_step(batch) if strategy.lockstep else self.own_step(batch)
        if strategy.meets(self.steps):
            flats = [piece.flat for piece in self.replica.pieces]
            if self._mean is None:
                self.average_(flats, self.weight)
            else:
                self.average_changes_(self._agreed, self._mean, self.weight)
                for agreed, flat in zip(self._agreed, flats, strict=True):
                    agreed.copy_(flat)
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
        """The mean that a meeting now would come to, if all were sent."""
        return self.mean(self.seen)

    def state_dict(self) -> dict[str, Any]:
        """Compressed, also what all last agreed on, and what has not been sent since."""
        if self._mean is None:
            return super().state_dict()
        return {**super().state_dict(), "agreed": self._agreed, "compression": self._mean.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank."""
        super().load_state_dict(state)
        if self._mean is not None:
            self._agreed = [x.clone() for x in state["agreed"]]
            self._mean.load_state_dict(state["compression"])
