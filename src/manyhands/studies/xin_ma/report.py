"""What the study's report says: five sentences, four verdicts, the figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from manyhands.studies.analysis import Analysis, Outcome
from manyhands.studies.findings import trust, wrong
from manyhands.studies.grid import Study
from manyhands.studies.row import Row
from manyhands.studies.summary import Line
from manyhands.studies.xin_ma import design
from manyhands.studies.xin_ma.conclusions import conclusions
from manyhands.studies.xin_ma.figures import figures, scale_sentence
from manyhands.studies.xin_ma.reading import Trial, of, settings, trials, with_accuracy


def analyse(study: Study, rows: Sequence[Row], lines: Sequence[Line]) -> Analysis:
    """See the file's head."""
    found = trials(study, rows)
    judged = conclusions(found)
    scales = [scale_sentence(found, setting) for setting in settings(found, design.NOISE)]
    return Analysis(
        (_summary([j.verdict.outcome for j in judged]), *(j.brief for j in judged)),
        charts=figures(found),
        verdicts=tuple(j.verdict for j in judged),
        notes=(*_trained_out(found), *scales, *trust(lines), *wrong(lines)),
    )


def _summary(outcomes: Sequence[Outcome]) -> str:
    counts = {o: outcomes.count(o) for o in get_args(Outcome)}
    said = [f"{n} {'is' if n == 1 else 'are'} {o}" for o, n in counts.items() if n]
    return (
        f"Of the slides' {len(outcomes)} conclusions {', '.join(said)}, by networks and losses that say for or against."
    )


def _trained_out(found: Sequence[Trial]) -> list[str]:
    return [
        f"Trained out under {t.variant} (seed {t.seed}), the CNN gets {100 * accuracy:.2f} % right."
        for t, accuracy in with_accuracy(of(found, design.LEARNING))
    ]
