"""How large a batch is worth its samples: the gradient noise scale, and the critical batch of whole trainings.

    noise scale      E|G_B|² = |G|² + tr(Σ)/B,      B_simple = tr(Σ)/|G|²
    critical batch   (S/S_min − 1) (E/E_min − 1) = 1,      B_crit = E_min/S_min

G_B: gradient of a batch of B samples, G: the true one, Σ: covariance of one sample's gradient; S: steps and E: samples
until a target is reached, S_min with the largest batches and E_min with the smallest. McCandlish et al. 2018, sections
2.2 and 2.3 and appendix A.1.

With E = B S, the second law is the first with other names:  S = S_min + E_min/B = S_min (1 + B_crit/B), since then
S/S_min − 1 = B_crit/B and E/E_min − 1 = B/B_crit. Both are fitted by least squares in relative residuals: gradients'
norms and steps spread in proportion to what they are, and a miss of 1 % in S is one of 1 % in E.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from manyhands.studies.fits.estimate import DRAWS, Array, CannotFit, Estimate, interval, short
from manyhands.studies.fits.points import FAR_FOR_NOISE, ROUNDING, Groups, follows, gathered, percent

_NOISE, _CRITICAL = "The gradient noise scale", "The critical batch"
#: Reweighting settles in a few rounds; weights depend on the fit only through its shape.
_ROUNDS = 20
#: Steps × batch may differ from samples by this much: the last batch of an epoch is smaller.
_PARTIAL = 0.05


@dataclass(frozen=True)
class NoiseScale:
    """Signal and noise of a gradient. ``scale`` is in samples; the others are squares of the gradient's unit."""

    signal: Estimate  # |G|²
    noise: Estimate  # tr(Σ), of one sample
    scale: Estimate  # B_simple
    batches: tuple[float, ...]
    miss: float  # typical, as a share

    def predict(self, batch: float) -> float:
        """Mean squared norm of the gradient of ``batch`` samples."""
        return self.signal.value + self.noise.value / batch

    def sentence(self) -> str:
        """What it says, with how well it fits."""
        return (
            f"The gradient noise scale is {self.scale} samples, from batches of {_listed(self.batches)}, off by "
            f"{percent(self.miss)} typically; a batch of that size has as much noise as signal, and larger ones gain "
            "ever less."
        )


@dataclass(frozen=True)
class CriticalBatch:
    """Fewest steps, fewest samples, and the batch that costs twice either."""

    steps: Estimate  # S_min
    samples: Estimate  # E_min
    batch: Estimate  # B_crit, in samples
    batches: tuple[float, ...]
    miss: float  # typical, as a share

    def predict(self, batch: float) -> float:
        """Steps until the target is reached."""
        return self.steps.value + self.samples.value / batch

    def sentence(self) -> str:
        """What it says, with how well it fits."""
        return (
            f"The critical batch is {self.batch} samples, from batches of {_listed(self.batches)}, off by "
            f"{percent(self.miss)} of their steps typically; at that size the target takes twice the "
            f"{short(self.steps.value)} steps and twice the {short(self.samples.value)} samples that it takes at least."
        )


def noise_scale(points: Iterable[tuple[float, float]], *, draws: int = DRAWS, seed: int = 0) -> NoiseScale | CannotFit:
    """The gradient noise scale from points (batch, mean squared norm of gradients at one state of the model).

    At least three distinct batches: two unknowns, one to contradict. The batches must be drawn independently; a batch
    that is most of the data set has less noise than the law says. The interval draws within each batch size.
    """
    groups = gathered(_NOISE, points, x="batch", y="squared norm", unknowns=2)
    if isinstance(groups, CannotFit):
        return groups
    signal, noise = _lines(groups, groups.means[None, :])[0].tolist()
    impossible = _impossible(signal, noise)
    if impossible:
        return impossible
    miss = follows(_NOISE, groups, signal + noise / groups.x, x="batch", far=FAR_FOR_NOISE)
    if isinstance(miss, CannotFit):
        return miss
    of_signal, of_noise, scale = _with_ratio(groups, signal, noise, draws, seed)
    return NoiseScale(of_signal, of_noise, scale, tuple(groups.x.tolist()), miss)


def noise_scale_of_two(one: tuple[float, float], other: tuple[float, float]) -> NoiseScale | CannotFit:
    """The gradient noise scale from two points (batch, mean squared norm), in either order, without an interval.

        |G|²  = (B |G_B|² − b |G_b|²) / (B − b)
        tr(Σ) = (|G_b|² − |G_B|²) / (1/b − 1/B)

    McCandlish et al. 2018, appendix A.1. Both are unbiased; their ratio is not, so average each over steps first. With
    P workers, b is the batch of one and B = P b that of all together, and both norms are at hand.
    """
    groups = gathered(_NOISE, [one, other], x="batch", y="squared norm", unknowns=1)
    if isinstance(groups, CannotFit):
        return groups
    (small, large), (of_small, of_large) = groups.x.tolist(), groups.means.tolist()
    signal = (large * of_large - small * of_small) / (large - small)
    noise = (of_small - of_large) / (1 / small - 1 / large)
    return _impossible(signal, noise) or NoiseScale(
        Estimate(signal), Estimate(noise), Estimate(noise / signal), (small, large), 0.0
    )


def critical_batch(
    points: Iterable[tuple[float, float, float]], *, draws: int = DRAWS, seed: int = 0
) -> CriticalBatch | CannotFit:
    """The critical batch from points (batch, steps, samples), both until the same target was first reached.

    At least three distinct batches, each with the learning rate that suits it: with one rate for all, the law is not
    expected to hold. The interval draws within each batch size.
    """
    found = [(float(batch), float(steps), float(samples)) for batch, steps, samples in points]
    groups = gathered(_CRITICAL, [each[:2] for each in found], x="batch", y="number of steps", unknowns=2)
    if isinstance(groups, CannotFit):
        return groups
    for batch, steps, samples in found:
        if not abs(samples - batch * steps) <= _PARTIAL * batch * steps:
            return CannotFit(
                _CRITICAL, f"samples must be batch × steps, and {batch:g} × {steps:g} is not nearly {samples:g}."
            )
    steps_min, samples_min = _lines(groups, groups.means[None, :])[0].tolist()
    if steps_min <= ROUNDING * groups.means.min():
        return CannotFit(
            _CRITICAL,
            f"steps fall as fast as the batch grows up to {groups.x[-1]:g}, so the critical one is larger; larger "
            "batches are needed.",
        )
    if samples_min <= ROUNDING * groups.means.min() * groups.x[0]:
        return CannotFit(
            _CRITICAL,
            f"steps do not fall from a batch of {groups.x[0]:g} on, so the critical one is smaller; smaller batches "
            "are needed.",
        )
    miss = follows(_CRITICAL, groups, steps_min + samples_min / groups.x, x="batch", far=FAR_FOR_NOISE)
    if isinstance(miss, CannotFit):
        return miss
    of_steps, of_samples, batch_ = _with_ratio(groups, steps_min, samples_min, draws, seed)
    return CriticalBatch(of_steps, of_samples, batch_, tuple(groups.x.tolist()), miss)


def _impossible(signal: float, noise: float) -> CannotFit | None:
    total = abs(signal) + abs(noise)
    if noise <= ROUNDING * total:
        return CannotFit(
            _NOISE,
            "the squared norm does not fall as the batch grows, so no noise is seen; smaller batches are needed.",
        )
    if signal <= ROUNDING * total:
        return CannotFit(
            _NOISE,
            "the squared norm falls as fast as the batch grows, so no signal is seen; larger batches or more "
            "measurements are needed.",
        )
    return None


def _lines(groups: Groups, means: Array) -> Array:
    """(a, b) of a + b/B for each row of ``means``, by least squares in relative residuals.

    The weights are 1/fitted² and not 1/measured², which would favour what happened to be measured low.
    """
    x = 1 / groups.x
    fitted = np.broadcast_to(means, means.shape)
    for _ in range(_ROUNDS):
        weights = groups.counts / fitted**2
        weights = weights / weights.sum(-1, keepdims=True)
        middle = (weights * x).sum(-1, keepdims=True)
        b = (weights * (x - middle) * means).sum(-1) / (weights * (x - middle) ** 2).sum(-1)
        a = (weights * means).sum(-1) - b * middle[:, 0]
        fitted = np.maximum(a[:, None] + b[:, None] * x, means / 10)  # a bad draw's line may cross 0
    return np.stack([a, b], axis=-1)


def _with_ratio(groups: Groups, a: float, b: float, draws: int, seed: int) -> tuple[Estimate, Estimate, Estimate]:
    """Intervals of a, b and b/a. A draw without an a above 0 has an infinite ratio."""
    means = groups.redrawn(draws, seed)
    if means is None:
        return Estimate(a), Estimate(b), Estimate(b / a)
    of_a, of_b = np.maximum(_lines(groups, means), 0.0).T
    ratio = np.divide(of_b, of_a, out=np.full_like(of_a, math.inf), where=of_a > 0)
    return interval(a, of_a), interval(b, of_b), interval(b / a, ratio)


def _listed(batches: tuple[float, ...]) -> str:
    return f"{batches[0]:g} to {batches[-1]:g}"
