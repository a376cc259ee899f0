"""The universal scalability law: throughput that rises, peaks and falls.

    X(p) = λ p / (1 + σ (p − 1) + κ p (p − 1)),        peak at p* = √((1 − σ)/κ)

p: workers; X: throughput, in any unit; λ: that of one worker, in the same unit; σ: contention, the share that workers
queue for; κ: coherency, what each pair of workers costs each other. κ = 0 is Amdahl's law with s = σ. Gunther 1993,
where κ = 0 is the rule, and 2007, chapters 4 to 6.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from manyhands.studies.fits.estimate import DRAWS, Array, CannotFit, Estimate, interval, short
from manyhands.studies.fits.points import ROUNDING, follows, gathered, percent

_LAW = "The universal scalability law"
#: Gauss-Newton takes some ten rounds from its start; more only where rounding is all that is left to gain.
_ROUNDS = 60


@dataclass(frozen=True)
class UniversalFit:
    """The universal scalability law with the parameters that fit best."""

    alone: Estimate  # λ
    contention: Estimate  # σ
    coherency: Estimate  # κ
    peak: Estimate  # p*: infinite where throughput never falls, 1 where it falls from the start
    workers: tuple[float, ...]  # the counts that it was fitted to
    miss: float  # typical, as a share

    def predict(self, workers: float) -> float:
        """Throughput, in the unit of the points."""
        parameters = np.array([self.alone.value, self.contention.value, self.coherency.value])
        return float(_throughput(parameters, np.array([workers]))[0])

    def sentence(self) -> str:
        """What it says, with how well it fits."""
        if self.peak.value == math.inf:
            peak = "throughput never falls"
        elif self.peak.value > self.workers[-1]:
            peak = f"throughput would peak at {self.peak} workers, beyond the {self.workers[-1]:g} that were measured"
        else:
            peak = f"throughput peaks at {self.peak} workers"
        return (
            f"By the universal scalability law, contention {self.contention} and coherency {self.coherency} explain "
            f"the throughput with {self.workers[0]:g} to {self.workers[-1]:g} workers, off by {percent(self.miss)} "
            f"typically; one worker alone does {short(self.alone.value)}, and {peak}."
        )


def usl(points: Iterable[tuple[float, float]], *, draws: int = DRAWS, seed: int = 0) -> UniversalFit | CannotFit:
    """The universal scalability law from points (workers, throughput), several for a count where it was repeated.

    Least squares in X by Gauss-Newton with Marquardt's damping, λ > 0, σ ≥ 0, κ ≥ 0; from the start where the law is
    linear:  p/X = 1/λ + σ/λ (p − 1) + κ/λ p (p − 1). At least four distinct counts: three unknowns, one to contradict.
    The interval draws within each count. Beyond the counts that were measured, the peak is an extrapolation.
    """
    groups = gathered(_LAW, points, x="worker count", y="throughput", unknowns=3, least=1)
    if isinstance(groups, CannotFit):
        return groups
    best = _least_squares(groups.x, groups.means[None, :], groups.counts)
    miss = follows(_LAW, groups, _throughput(best, groups.x)[0], x="worker count")
    if isinstance(miss, CannotFit):
        return miss
    means = groups.redrawn(draws, seed)
    drawn = None if means is None else _least_squares(groups.x, means, groups.counts)
    alone, contention, coherency = (
        interval(float(best[0, i]), None if drawn is None else drawn[:, i]) for i in range(3)
    )
    peak = interval(float(_peak(best)[0]), None if drawn is None else _peak(drawn))
    return UniversalFit(alone, contention, coherency, peak, tuple(groups.x.tolist()), miss)


def _throughput(parameters: Array, p: Array) -> Array:
    λ, σ, κ = (parameters[..., i, None] for i in range(3))
    return np.asarray(λ * p / (1 + σ * (p - 1) + κ * p * (p - 1)))


def _peak(parameters: Array) -> Array:
    """Where the derivative vanishes: 1 − σ = κ p². At least one worker; infinite if κ = 0 and σ < 1."""
    σ, κ = parameters[:, 1], parameters[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(σ >= 1, 1.0, np.maximum(np.sqrt(np.maximum(1 - σ, 0) / κ), 1.0))


def _least_squares(p: Array, x: Array, counts: Array) -> Array:
    """(λ, σ, κ) for each row of throughputs ``x``, weighted by ``counts``."""
    unit = x.max(axis=-1, keepdims=True)
    x = x / unit
    parameters = _start(p, x, counts)
    cost = _cost(parameters, p, x, counts)
    damping = np.full(len(x), 1e-3)
    for _ in range(_ROUNDS):
        trial = _step(parameters, p, x, counts, damping)
        after = _cost(trial, p, x, counts)
        better = after < cost
        parameters = np.where(better[:, None], trial, parameters)
        cost = np.where(better, after, cost)
        damping = np.clip(np.where(better, damping / 10, damping * 10), 1e-12, 1e12)
        if not better.any() and damping.min() > 1e3:  # even a step of a thousandth of Gauss-Newton's gains nothing
            break
    parameters[:, 0] *= unit[:, 0]
    reach = p[-1] - 1
    parameters[:, 1:] *= parameters[:, 1:] * np.array([reach, reach * p[-1]]) > ROUNDING
    return parameters


def _start(p: Array, x: Array, counts: Array) -> Array:
    """The linear form, its residual p/X weighted by X²/p so that it counts as X's own."""
    columns = np.stack([np.ones_like(p), p - 1, p * (p - 1)], axis=-1)
    size = columns.max(axis=0)
    weights = x**2 / p * np.sqrt(counts)
    solved = np.linalg.pinv(columns / size * weights[..., None]) @ (p / x * weights)[..., None]
    a, b, c = np.moveaxis(solved[..., 0] / size, -1, 0)
    possible = a > 0
    λ = np.where(possible, 1 / np.where(possible, a, 1.0), x[:, 0] / p[0])
    return np.stack([λ, np.maximum(b * λ, 0), np.maximum(c * λ, 0)], axis=-1)


def _cost(parameters: Array, p: Array, x: Array, counts: Array) -> Array:
    return np.asarray((x - _throughput(parameters, p)) ** 2 @ counts)


def _step(parameters: Array, p: Array, x: Array, counts: Array, damping: Array) -> Array:
    """One damped Gauss-Newton step; a parameter that lies at 0 and would go below stays there."""
    fitted = _throughput(parameters, p)
    by_σ = -(fitted**2) * (p - 1) / (parameters[:, :1] * p)
    jacobian = np.stack([fitted / parameters[:, :1], by_σ, by_σ * p], axis=-1)
    downhill = np.einsum("dki,dk->di", jacobian, (x - fitted) * counts)
    free = (parameters > 0) | (downhill > 0)
    size = np.sqrt(np.einsum("dki,k->di", jacobian**2, counts))
    scaled = jacobian * (free / size)[:, None, :]
    normal = np.einsum("dki,dkj,k->dij", scaled, scaled, counts) + damping[:, None, None] * np.eye(3)
    step = np.linalg.solve(normal, (downhill * free / size)[..., None])[..., 0] / size
    after = np.maximum(parameters + step, 0.0)
    after[:, 0] = np.maximum(after[:, 0], parameters[:, 0] / 10)  # λ stays above 0
    return np.asarray(after)
