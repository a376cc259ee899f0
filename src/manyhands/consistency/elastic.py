"""Elastic averaging SGD: a spring ties every worker to a centre, and the centre to the workers (survey §VI-A).

    x_p ← u(x_p, g_p) − α (x_p − c)                c ← c + α Σ_p (x_p − c)

both with the *old* x_p and c, in every k-th step; x_p ← u(x_p, g_p) in the others. x_p parameters of worker p, c the
centre, u the user's optimizer, g_p the gradient of its share, k = ``every`` (the paper's τ), α the stiffness (its ηρ).
Left out, α is 0.9/P as in the paper's experiments (β = Pα = 0.9). The sum Σ x_p + c is what the springs leave as it is.

    synchronous   all at once: one all-reduce, and every worker keeps the same centre
    round_robin   one after the other: the centre goes from worker to worker in rank order, each does
                  x_p ← … − α (x_p − c), c ← c + α (x_p − c) with it, hands it on and goes on training. A worker whose
                  loss is not finite lets it pass; the others are told when all next `meet`

``momentum`` δ > 0 makes it EAMSGD, Nesterov's momentum on each worker (with a user's optimizer that has none):

    v_p ← δ v_p − η g_p(x_p + δ v_p);   x_p ← x_p + v_p − α (x_p − c)

Zhang, Choromanska & LeCun 2015, Deep learning with elastic averaging SGD, NeurIPS, arXiv:1412.6651, algorithms 1 and 2.

Stability on a quadratic of curvature 1 at learning rate η: α ≤ (4 − 2η)/(4 − η) where workers come one by one, and
Pα ≤ (4 − 2η − 2α)/(2 − η) where they come together (the larger eigenvalue of mean and centre stays above −1). Both are
weakest as η → 0: α ≤ 1 and α ≤ 2/(P + 1) are necessary at any learning rate, and are what a plan is checked for.

``compress`` (all at once only) sends something shorter than the pulls α (x_p − c), with what was left out of them so
far: a worker goes back by its whole pull, the centre moves by what has arrived, and Σ x_p + c + Σ e_p is what stays as
it is (residuals e_p, `consistency.compressed`).

The consensus is the centre. Payload per rank in every k-th step: 2(P−1)/P · n elements together, n one by one;
compressed, what the compressor says, and at most that where it depends on the values.
Guarantee: none but for one worker, which is on no spring; an approximation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from manyhands.checks import is_positive, is_whole
from manyhands.communication.communicator import Communicator, Work
from manyhands.communication.compression.layout import Shape
from manyhands.consistency.compressed import Compressing, problems_of
from manyhands.consistency.independent import IndependentWorker
from manyhands.contract import Batch, Parameters, Reference, Replica, Setting, Strategy, Traffic, Worker
from manyhands.errors import Problem

#: β = Pα of the paper's experiments, where α is not given.
BETA = 0.9


def pull(x: Tensor, centre: Tensor, alpha: float) -> Tensor:
    """What the spring takes off a worker, and gives to the centre."""
    return alpha * (x - centre)


def stretch(xs: Sequence[Tensor], centre: Tensor, alpha: float) -> tuple[list[Tensor], Tensor]:
    """Workers and centre after all springs have pulled at once; no gradients."""
    pulls = [pull(x, centre, alpha) for x in xs]
    return [x - p for x, p in zip(xs, pulls, strict=True)], centre + sum(pulls)


def stable_alpha(lr: float, workers: int, *, together: bool) -> float:
    """The largest stable α on a quadratic of curvature 1 (see the file's head); ``lr`` from 0 to below 2."""
    if not together:
        return (4 - 2 * lr) / (4 - lr)
    return (4 - 2 * lr) / (workers * (2 - lr) + 2)


@dataclass(frozen=True)
class Elastic(Compressing, Strategy):
    """Workers on springs around a centre, which pull in every ``every``-th step; ``momentum`` > 0 is EAMSGD,
    ``compress`` what is sent of the pulls.
    """

    name: ClassVar[str] = "elastic"
    moves: ClassVar[str] = "differences of parameters are"
    bears_cuts: ClassVar[bool] = True
    paper: ClassVar[Reference] = Reference(
        "Zhang, Choromanska & LeCun",
        "Deep learning with elastic averaging SGD",
        2015,
        "arXiv:1412.6651",
        survey="VI-A",
    )
    steadier: ClassVar[str] = "with elastic, a smaller alpha= or every="

    alpha: float | None = None
    every: int = 4
    mode: Literal["synchronous", "round_robin"] = "synchronous"
    momentum: float = 0.0
    compress: str = "none"

    def __post_init__(self) -> None:
        self._read_compress()
        alpha, momentum = self.alpha, self.momentum
        if alpha is not None and not (_is_zero(alpha) or (is_positive(alpha) and alpha <= 1)):
            raise ValueError(
                f"alpha={alpha!r}: it is from 0 (workers on their own) to 1; stable is at most (4 − 2·lr)/(4 − lr), "
                "which is 1 at the smallest learning rate. Left out it is 0.9 divided by the workers"
            )
        if not is_whole(self.every, 1):
            raise ValueError(f"every={self.every!r}: it is a whole number from 1, the steps from one pull to the next")
        if self.mode not in ("synchronous", "round_robin"):
            raise ValueError(f"mode={self.mode!r}: it is synchronous or round_robin")
        if not (_is_zero(momentum) or (is_positive(momentum) and momentum < 1)):
            raise ValueError(f"momentum={momentum!r}: it is from 0 to below 1, or the velocity grows without bound")

    @property
    def lockstep(self) -> bool:
        """With every=1, all at once."""
        return self.every == 1 and self.mode == "synchronous"

    def stiffness(self, size: int) -> float:
        """α among so many workers."""
        return BETA / size if self.alpha is None else self.alpha

    @property
    def sends_at_most(self) -> bool:
        """Where a payload's length depends on the values."""
        return self.compressor.variable

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """In every ``every``-th step a (compressed) all-reduce of n elements, or the centre handed on."""
        return self.traffic_of(((numel,),), size, itemsize)

    def traffic_of(self, shapes: Sequence[Shape], size: int, itemsize: int = 4) -> Traffic:
        """See `traffic`."""
        if size == 1:
            return Traffic()
        if self.mode == "round_robin":
            return Traffic(sum(map(math.prod, shapes)) * itemsize, 1, every=self.every)
        return Traffic(*self.mean_B(shapes, size, itemsize), every=self.every)

    def exact(self, setting: Setting) -> bool:
        """Alone, and with no momentum but the user's optimizer's."""
        return setting.workers == 1 and self.momentum == 0

    def problems(self, setting: Setting) -> list[Problem]:
        """Springs too stiff for so many workers, momentum twice, and what compressors cannot."""
        found = []
        asked = f"compress={self.compress} with {self.name}"
        if self.compresses and self.mode == "round_robin":
            found.append(
                Problem(
                    f"{asked}(mode='round_robin')",
                    "the centre itself goes from worker to worker, and a compressed centre is another one.",
                    "Use mode='synchronous', where workers send how far they are from it.",
                )
            )
        elif self.compresses:
            found += problems_of(self.compressor, asked, setting, moves=self.moves)
        if self.mode == "synchronous" and setting.workers > 1:
            most = stable_alpha(0.0, setting.workers, together=True)
            if self.stiffness(setting.workers) > most:
                found.append(
                    Problem(
                        f"elastic(alpha={self.alpha}) with {setting.workers} workers",
                        f"when all pull at once, alpha is at most 2/(workers + 1) = {most:.3g}: beyond it the centre "
                        "oscillates with growing swings at any learning rate.",
                        f"Leave alpha out (0.9/workers = {BETA / setting.workers:.3g}), or use mode='round_robin'.",
                    )
                )
        if self.momentum and not setting.stateless:
            found.append(
                Problem(
                    f"elastic(momentum={self.momentum}) with an optimizer that has a state of its own",
                    "momentum= is Nesterov's on top of plain SGD (EAMSGD).",
                    "Use optimizer='sgd' without momentum, or leave momentum= of elastic out.",
                )
            )
        return found

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        made = RoundRobinWorker if self.mode == "round_robin" else ElasticWorker
        return made(replica, comm, self)


class ElasticWorker(IndependentWorker):
    """Own steps, and a pull now and then, all at once; every worker keeps the same centre."""

    def __init__(self, replica: Replica, comm: Communicator, strategy: Elastic) -> None:
        super().__init__(replica, comm)
        self._strategy = strategy
        self._alphas = [strategy.stiffness(group.size) for group in self.groups]
        flats = [piece.flat for piece in replica.pieces]
        # Memory that collectives work on without a copy.
        self._means = [
            group.allocate(flat.numel(), flat.dtype).to(flat.device)
            for flat, group in zip(flats, self.groups, strict=True)
            if comm.size > 1 and strategy.mode == "synchronous" and not strategy.compresses
        ]
        self._mean = self.compressed_mean(strategy.compressor) if strategy.compresses and comm.size > 1 else None
        self._centre: list[Tensor] = []  # made in the first step: a resume changes the parameters before it
        self._velocity = [flat.new_zeros(flat.shape) for flat in flats if strategy.momentum]

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        strategy, flats = self._strategy, [piece.flat for piece in self.replica.pieces]
        if not self._centre:
            self._centre = [flat.clone() for flat in flats]
        before = [flat.clone() for flat in flats if strategy.momentum]
        self._look_ahead()
        loss = self.own_gradient(batch)
        _put(before, flats)  # what the others see, and where a worker stands that goes no further
        pulls: list[Tensor] = []
        if self.comm.size > 1 and self.steps % strategy.every == 0:
            pulls = self._exchange(flats)
        if self.stands_still:
            return loss
        self._look_ahead()
        self.own_update()
        for velocity, flat, x in zip(self._velocity, flats, before, strict=False):
            velocity.copy_(flat).sub_(x)
        for flat, taken in zip(flats, pulls, strict=False):
            flat.sub_(taken)
        return loss

    def _look_ahead(self) -> None:
        for piece, velocity in zip(self.replica.pieces, self._velocity, strict=False):
            piece.flat.add_(velocity, alpha=self._strategy.momentum)

    def _exchange(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """What the springs take off this worker; the centre has moved."""
        weight = math.inf if self.stands_still else 1.0
        if self._mean is not None:
            pulls = [pull(x, c, alpha) for x, c, alpha in zip(flats, self._centre, self._alphas, strict=True)]
            arrived = [taken.clone() for taken in pulls]
            self._mean.average_(arrived, self.agreed_weights(arrived, weight))
            for centre, mean, group in zip(self._centre, arrived, self.groups, strict=True):
                centre.add_(mean, alpha=group.size)
            return pulls
        _put(flats, self._means)
        self.average_(self._means, weight)
        pulls = [pull(x, c, alpha) for x, c, alpha in zip(flats, self._centre, self._alphas, strict=True)]
        for centre, mean, alpha, group in zip(self._centre, self._means, self._alphas, self.groups, strict=True):
            centre.add_(mean.sub_(centre), alpha=alpha * group.size)
        return pulls

    def consensus(self) -> Parameters:
        """The centre; alone, this worker's parameters."""
        if self.comm.size == 1 or not self._centre:
            return Worker.consensus(self)
        return tuple(centre.clone() for centre in self._centre)

    def state_dict(self) -> dict[str, Any]:
        """Centre and velocity too; compressed, what has not been sent."""
        left = {} if self._mean is None else {"compression": self._mean.state_dict()}
        return {**super().state_dict(), "centre": self._centre, "velocity": self._velocity, **left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank."""
        super().load_state_dict(state)
        flats = [piece.flat for piece in self.replica.pieces]
        self._centre = [c.to(flat.device, copy=True) for c, flat in zip(state["centre"], flats, strict=False)]
        _put(state["velocity"], self._velocity)
        if self._mean is not None:
            self._mean.load_state_dict(state["compression"])


class RoundRobinWorker(ElasticWorker):
    """The centre goes round: from the last worker it returns to the first, while that one trains."""

    def __init__(self, replica: Replica, comm: Communicator, strategy: Elastic) -> None:
        super().__init__(replica, comm, strategy)
        self._away = False  # on the first worker: the last has yet to send it home
        self._returning: list[Work] = []  # on the last worker: on its way home

    def _exchange(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """What the spring takes off this worker; the centre has moved and gone on. Who stands still lets it pass."""
        self._bring_home()
        pulls = []
        for i, (x, centre, alpha, group) in enumerate(zip(flats, self._centre, self._alphas, self.groups, strict=True)):
            if group.rank > 0:
                group.recv(centre, group.rank - 1, tag=i)
            taken = pull(x, centre, 0.0 if self.stands_still else alpha)
            centre.add_(taken)
            work = group.send(centre, (group.rank + 1) % group.size, tag=i)
            pulls.append(taken)
            if group.rank == group.size - 1:
                self._returning.append(work)  # the first worker takes it when it needs it
            else:
                work.wait()
        self._away = True
        return pulls

    def _bring_home(self) -> None:
        """The centre is with the first worker, and nothing is on its way."""
        for i, (centre, group) in enumerate(zip(self._centre, self.groups, strict=False)):
            if self._away and group.rank == 0:
                group.recv(centre, group.size - 1, tag=i)
        for work in self._returning:
            work.wait()
        self._away, self._returning = False, []

    def meet(self) -> None:
        """See `contract.Worker.meet`."""
        self._bring_home()
        super().meet()

    def consensus(self) -> Parameters:
        """The first worker's centre; alone, this worker's parameters."""
        self._bring_home()
        centre = super().consensus()
        if self.comm.size > 1 and self._centre:
            with self.comm.counting("consensus"):
                for c, group in zip(centre, self.groups, strict=True):
                    group.broadcast(c).wait()
        return centre


def _is_zero(value: object) -> bool:
    return value == 0 and not isinstance(value, bool)


def _put(values: Sequence[Tensor], places: Sequence[Tensor]) -> None:
    """As many as there are."""
    for value, place in zip(values, places, strict=False):
        place.copy_(value)
