"""DiLoCo: workers train alone for many steps, and what they moved by on the average is a gradient to a second
optimizer, which holds the centre (survey §VI-A).

    θ_p ← u(θ_p, g_p)                              in every step, H = ``inner`` of them from one meeting to the next
    Δ = c − Σ_p n_p θ_p / Σ_p n_p                  then
    v ← μ v + Δ;   c ← c − η (Δ + μ v);   θ_p ← c

θ_p parameters of worker p, u the user's optimizer, g_p the gradient of its share, n_p what its shares have counted
since the last meeting, c the centre, v its velocity, η = ``lr`` and μ = ``momentum`` of Nesterov's SGD (Douillard et
al. 2023, DiLoCo, arXiv:2311.08105, algorithm 1). The inner optimizer's state stays with its worker. With η = 1 and
μ = 0 the centre is the mean, and this is `local`. The paper trains language models with H = 500 steps of AdamW, η = 0.7
and μ = 0.9; the default H here is for runs of hundreds of steps rather than of 88,000.

``compress`` sends something shorter than parameters: θ_p − c and what was left out of it so far, see `local`. The outer
step is then along what has been sent: Δ = −(1/P) Σ_p C(s_p (θ_p − c) + e_p), the same bits on every worker.

The consensus is the centre as an outer step now would leave it: at a meeting the centre itself, between two of them
with what has been learned since, so that nothing of a period that is cut short is lost.

Payload per rank: 2(P−1)/P · n elements in every H-th step; compressed, what the compressor says, and at most that where
it depends on the values. Memory: the centre and its velocity, 2n.
Guarantee: none; an approximation, alone too (a second rule works on top of the user's optimizer).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from manyhands.checks import is_positive, is_whole
from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.layout import Shape
from manyhands.consistency.compressed import Compressing, problems_of
from manyhands.consistency.independent import IndependentWorker
from manyhands.contract import Batch, Parameters, Reference, Replica, Setting, Strategy, Traffic, Worker
from manyhands.errors import Problem


def outer_step(centre: Tensor, mean: Tensor, velocity: Tensor, lr: float, momentum: float) -> tuple[Tensor, Tensor]:
    """``(c, v)`` after one step of Nesterov's SGD whose gradient is how far the workers have gone from the centre."""
    delta = centre - mean
    velocity = momentum * velocity + delta
    return centre - lr * (delta + momentum * velocity), velocity


@dataclass(frozen=True)
class DiLoCo(Compressing, Strategy):
    """``inner`` steps alone, then one of Nesterov's SGD (``lr``, ``momentum``) along the average displacement;
    ``compress``: what is sent for that.
    """

    name: ClassVar[str] = "diloco"
    moves: ClassVar[str] = "differences of parameters are"
    bears_cuts: ClassVar[bool] = True
    paper: ClassVar[Reference] = Reference(
        "Douillard et al.",
        "DiLoCo: distributed low-communication training of language models",
        2023,
        "arXiv:2311.08105",
        survey="VI-A",
    )
    plain_alone: ClassVar[bool] = False
    steadier: ClassVar[str] = "with diloco, a smaller lr= or momentum="

    inner: int = 16
    lr: float = 0.7
    momentum: float = 0.9
    compress: str = "none"

    def __post_init__(self) -> None:
        self._read_compress()
        if not is_whole(self.inner, 1):
            raise ValueError(
                f"inner={self.inner!r}: it is a whole number from 1, the steps from one outer step to the next"
            )
        if not is_positive(self.lr):
            raise ValueError(f"lr={self.lr!r}: it is above 0; the outer learning rate, 1 takes the average as it is")
        if not (self.momentum == 0 or is_positive(self.momentum)) or self.momentum >= 1:
            raise ValueError(
                f"momentum={self.momentum!r}: it is from 0 to below 1, or the velocity grows without bound"
            )

    @property
    def lockstep(self) -> bool:
        """With inner=1."""
        return self.inner == 1

    @property
    def sends_at_most(self) -> bool:
        """Where a payload's length depends on the values."""
        return self.compressor.variable

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """In every ``inner``-th step an all-reduce of n elements, or what a compressor sends for it."""
        return self.traffic_of(((numel,),), size, itemsize)

    def traffic_of(self, shapes: Sequence[Shape], size: int, itemsize: int = 4) -> Traffic:
        """See `traffic`."""
        return Traffic(*self.mean_B(shapes, size, itemsize), every=self.inner)

    def problems(self, setting: Setting) -> list[Problem]:
        """What compressors cannot."""
        asked = f"compress={self.compress} with {self.name}"
        return problems_of(self.compressor, asked, setting, moves=self.moves) if self.compresses else []

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        return DiLoCoWorker(replica, comm, self)


class DiLoCoWorker(IndependentWorker):
    """Own steps, and an outer one now and then; every worker keeps the same centre."""

    def __init__(self, replica: Replica, comm: Communicator, strategy: DiLoCo) -> None:
        super().__init__(replica, comm)
        self._strategy = strategy
        self._centre: list[Tensor] = []  # made in the first step: a resume changes the parameters before it
        self._velocity: list[Tensor] = []
        self._mean = self.compressed_mean(strategy.compressor) if strategy.compresses and comm.size > 1 else None

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        pieces = self.replica.pieces
        if not self._centre:
            self._centre = [piece.flat.clone() for piece in pieces]
            self._velocity = [piece.flat.new_zeros(piece.flat.shape) for piece in pieces]
        loss = self.lock_step(batch) if self._strategy.lockstep else self.own_step(batch)
        if self.steps % self._strategy.inner == 0:
            if self._mean is None:
                self.average_([piece.flat for piece in pieces], self.weight)
            else:
                self.average_changes_(self._centre, self._mean, self.weight)
            made = self._outer_steps(tuple(piece.flat for piece in pieces))
            self._centre, self._velocity = [c for c, _ in made], [v for _, v in made]
            for piece, centre in zip(pieces, self._centre, strict=True):
                piece.flat.copy_(centre)
            self.samples, self.alike = 0.0, True
        return loss

    def _outer_steps(self, means: Parameters) -> list[tuple[Tensor, Tensor]]:
        lr, momentum = self._strategy.lr, self._strategy.momentum
        return [
            outer_step(c, mean, v, lr, momentum) for c, mean, v in zip(self._centre, means, self._velocity, strict=True)
        ]

    def consensus(self) -> Parameters:
        """The centre as an outer step now would leave it; see the file's head."""
        mean = self.mean(self.seen)
        return mean if self.alike or not self._centre else tuple(c for c, _ in self._outer_steps(mean))

    def state_dict(self) -> dict[str, Any]:
        """Centre and velocity too; compressed, what has not been sent."""
        left = {} if self._mean is None else {"compression": self._mean.state_dict()}
        return {**super().state_dict(), "centre": self._centre, "velocity": self._velocity, **left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank."""
        super().load_state_dict(state)
        devices = [piece.flat.device for piece in self.replica.pieces]
        self._centre = [x.to(d, copy=True) for x, d in zip(state["centre"], devices, strict=False)]
        self._velocity = [x.to(d, copy=True) for x, d in zip(state["velocity"], devices, strict=False)]
        if self._mean is not None:
            self._mean.load_state_dict(state["compression"])
