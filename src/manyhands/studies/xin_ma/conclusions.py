"""The slides' four conclusions, each judged by a rule that was fixed before the runs.

A conclusion is judged for each network and loss. It is *supported* if all say so, *not supported* if at least one
contradicts and none supports, and *undecided* where they differ or the intervals are too wide. Accuracy repeats bit for
bit with its seeds, so two runs of the study give the same verdicts on it; the rule on time asks for a ratio beyond a
margin by its whole interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from manyhands.studies.analysis import Outcome, Verdict
from manyhands.studies.fits import Estimate, PowerLaw, SlopeFit, power_law
from manyhands.studies.xin_ma import design
from manyhands.studies.xin_ma.design import LARGE, SMALL
from manyhands.studies.xin_ma.reading import Trial, of, per_doubling, ratio_of, settings, with_accuracy

#: A gain in accuracy for each doubling of the nodes up to which it is "little": a quarter of a point.
LITTLE = 0.0025
#: A ratio of times counts from here on, and from so many repeats.
MARGIN, LEAST = 1.1, 3
#: How near to −1 the exponent of the variance over nodes must lie, with its interval.
NEAR = 0.15


@dataclass(frozen=True)
class Finding:
    """What one network and loss say to a conclusion."""

    setting: str
    outcome: Outcome
    says: str


@dataclass(frozen=True)
class Judged:
    """A verdict and the findings it rests on."""

    verdict: Verdict
    findings: tuple[Finding, ...]
    parts: str = ""  # where it is made of several claims: how each came out

    @property
    def brief(self) -> str:
        """The outcome in a sentence, by how many networks and losses say what."""
        counts = {o: sum(f.outcome == o for f in self.findings) for o in get_args(Outcome)}
        words = {"supported": "for", "not supported": "against", "undecided": "neither"}
        said = self.parts or ", ".join(f"{n} {words[o]}" for o, n in counts.items() if n)
        return f"{self.verdict.claim}: {self.verdict.outcome}{f' ({said})' if len(self.findings) > 1 else ''}."


def conclusions(found: Sequence[Trial]) -> tuple[Judged, ...]:
    """All four."""
    return (larger_batch(found), many_nodes_at_large_batch(found), many_nodes_at_small_batch(found), smoothing(found))


def larger_batch(found: Sequence[Trial]) -> Judged:
    """(a)."""
    findings, beside = [], []
    for setting in settings(found, design.SAMPLES):
        fit = per_doubling((t.batch, y) for t, y in with_accuracy(of(found, design.SAMPLES, setting=setting)))
        findings.append(Finding(setting, _sign(fit), f"{setting}: {_points(fit)} per doubling of the batch"))
        same = per_doubling((t.batch, y) for t, y in with_accuracy(of(found, design.UPDATES, setting=setting)))
        beside.append(f"{setting} {_points(same)}")
    why = _joined(findings)
    if beside:
        why += f"\nWith as many updates instead of as many samples: {'; '.join(beside)}."
    return _judged(
        findings,
        "(a) A larger batch helps convergence",
        why,
        "Slope of test accuracy on log₂ of the batch (50 … 200) after as many epochs, over seeds: supported if its "
        "95 % interval lies above 0, contradicted if below.",
    )


def many_nodes_at_large_batch(found: Sequence[Trial]) -> Judged:
    """(b)."""
    findings = []
    for setting in settings(found, design.ACCURACY_NODES):
        large, small = (_gain(found, setting, batch) for batch in (LARGE, SMALL))
        outcome: Outcome = "undecided"
        if large is not None and large.slope.high is not None and large.slope.low is not None:
            outcome = "supported" if large.slope.high < LITTLE else outcome
            outcome = "not supported" if large.slope.low > LITTLE else outcome
        says = f"{setting}: {_points(large)} per doubling of the nodes, against {_points(small)} at batch {SMALL}"
        findings.append(Finding(setting, outcome, says))
    return _judged(
        findings,
        f"(b) At a large batch ({LARGE}) more nodes bring little",
        _joined(findings),
        "Slope of test accuracy on log₂ of the nodes (1 … 8) after as many updates, over seeds: supported if its 95 % "
        f"interval lies below {100 * LITTLE:g} points, a loss included, contradicted if above.",
    )


def many_nodes_at_small_batch(found: Sequence[Trial]) -> Judged:
    """(c): two claims, which must both hold."""
    helps = []
    for setting in settings(found, design.ACCURACY_NODES):
        fit = _gain(found, setting, SMALL)
        helps.append(Finding(setting, _sign(fit), f"Help, {setting}: {_points(fit)} per doubling of the nodes"))
    overheads = []
    for setting in settings(found, design.TIME_BATCH):
        ratio, quiet = overhead_ratio(found, setting)
        if ratio is not None:
            says = f"Overhead, {setting}: {ratio} times the share of a step that it takes at batch {LARGE}"
            outcome = _beyond_one(ratio) if quiet else "undecided"
            overheads.append(Finding(setting, outcome, says + ("" if quiet else ", from runs that were disturbed")))
    findings = [*helps, *overheads]
    verdict = Verdict(
        f"(c) At a small batch ({SMALL}) more nodes help, with more overhead",
        both(combined(helps), combined(overheads)),
        _joined(findings),
        "Help: the slope of (b) at the small batch lies above 0. Overhead: the share of communication and waiting in a "
        f"step of two nodes, batch {SMALL} over batch {LARGE}, lies beyond {MARGIN:g} by its whole interval (Student's "
        f"on logarithms, {LEAST} repeats or more that nothing disturbed). Both must be supported; one that is "
        "contradicted is enough against.",
    )
    return Judged(verdict, tuple(findings), f"help {combined(helps)}, overhead {combined(overheads)}")


def smoothing(found: Sequence[Trial]) -> Judged:
    """(d)."""
    findings = []
    for setting in settings(found, design.NOISE):
        fit = variance_law(found, setting, "U1")
        outcome: Outcome = "undecided"
        if fit is None:
            says = "too few points"
        else:
            low, high = fit.exponent.low, fit.exponent.high
            if low is not None and high is not None:
                near = low >= -1 - NEAR and high <= -1 + NEAR
                outcome = "supported" if near else "not supported" if low > -0.5 else outcome
            says = f"the variance of an update goes as nodes to the power of {fit.exponent}"
        findings.append(Finding(setting, outcome, f"{setting}: {says}"))
    return _judged(
        findings,
        "(d) More nodes smooth the gradient",
        _joined(findings) + _beside(found),
        f"Exponent of the variance of U1's update over 1 … 8 nodes, batch {SMALL} a node, after three trainings: "
        f"supported if its 95 % interval lies within −1 ± {NEAR}, contradicted if above −0.5.",
    )


def _judged(findings: Sequence[Finding], claim: str, why: str, rule: str) -> Judged:
    return Judged(Verdict(claim, combined(findings), why, rule), tuple(findings))


def variance_law(found: Sequence[Trial], setting: str, variant: str) -> PowerLaw | None:
    """How the variance of an update falls with the nodes."""
    fit = power_law(variances(found, setting, variant))
    return fit if isinstance(fit, PowerLaw) else None


def variances(found: Sequence[Trial], setting: str, variant: str) -> list[tuple[int, float]]:
    """(nodes, variance of one update); one node is the same under every variant."""
    cells = of(found, design.NOISE, setting=setting)
    chosen = [t for t in cells if t.variant == variant or t.nodes == 1]
    return sorted((t.nodes, t.row.noise["variance"]) for t in chosen if t.row.noise is not None)


def overhead_ratio(found: Sequence[Trial], setting: str) -> tuple[Estimate | None, bool]:
    """Of two nodes, the overhead's share at the small batch over that at the large one, repeat by repeat.

    From runs that no other work disturbed, if there are `LEAST` pairs of them; else from all, and False.
    """
    cells = [t for t in of(found, design.TIME_BATCH, setting=setting, nodes=2) if not t.oversubscribed]
    small = {t.row.repeat: t for t in cells if t.batch == SMALL and t.overhead > 0}
    large = {t.row.repeat: t for t in cells if t.batch == LARGE and t.overhead > 0}
    both_of = [(small[r], large[r]) for r in sorted(small.keys() & large.keys())]
    quiet = [pair for pair in both_of if not any(t.row.noisy for t in pair)]
    chosen = quiet if len(quiet) >= LEAST else both_of
    return (ratio_of([(a.overhead, b.overhead) for a, b in chosen]) if chosen else None), chosen is quiet


def both(one: Outcome, other: Outcome) -> Outcome:
    """Of a claim with two halves."""
    if "not supported" in (one, other):
        return "not supported"
    return "supported" if one == other == "supported" else "undecided"


def _beyond_one(ratio: Estimate) -> Outcome:
    if ratio.low is None or ratio.high is None:
        return "undecided"
    return "supported" if ratio.low > MARGIN else "not supported" if ratio.high < 1 / MARGIN else "undecided"


def combined(findings: Iterable[Finding]) -> Outcome:
    """One outcome of several: see the file's head."""
    outcomes = {f.outcome for f in findings}
    if outcomes == {"supported"}:
        return "supported"
    return "not supported" if "not supported" in outcomes and "supported" not in outcomes else "undecided"


def _gain(found: Sequence[Trial], setting: str, batch: int) -> SlopeFit | None:
    cells = of(found, design.ACCURACY_NODES, setting=setting, batch=batch)
    return per_doubling((t.nodes, y) for t, y in with_accuracy(cells))


def _sign(fit: SlopeFit | None) -> Outcome:
    if fit is None or fit.slope.low is None or fit.slope.high is None:
        return "undecided"
    return "supported" if fit.slope.low > 0 else "not supported" if fit.slope.high < 0 else "undecided"


def _points(fit: SlopeFit | None) -> str:
    """A slope of accuracy in percentage points."""
    if fit is None or fit.slope.low is None or fit.slope.high is None:
        return "no slope (too few runs)"
    value, low, high = (f"{100 * x:+.2f}".replace("-", "−") for x in (fit.slope.value, fit.slope.low, fit.slope.high))
    return f"{value} points [{low} … {high}]"


def _joined(findings: Sequence[Finding]) -> str:
    """A finding a line."""
    return "\n".join(f"{f.says}." for f in findings) or "There are no runs for this."


def _beside(found: Sequence[Trial]) -> str:
    """What the other variants do, for the first setting."""
    names = settings(found, design.NOISE)
    if not names:
        return ""
    laws = {v: variance_law(found, names[0], v) for v in ("U1s", "U2", "U2b", "sharded")}
    said = [f"{v} {law.exponent.value:+.2f}".replace("-", "−") for v, law in laws.items() if law is not None]
    return f"\nExponents of the other variants ({names[0]}): {', '.join(said)}." if said else ""
