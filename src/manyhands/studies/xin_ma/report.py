"""What the study's report says: five sentences, four verdicts, the figures."""

from __future__ import annotations

from collections.abc import Sequence

from manyhands.studies.analysis import Analysis, Verdict
from manyhands.studies.findings import findings
from manyhands.studies.grid import Study
from manyhands.studies.rows import Row
from manyhands.studies.summary import Line
from manyhands.studies.xin_ma import design
from manyhands.studies.xin_ma.conclusions import conclusions
from manyhands.studies.xin_ma.figures import figures, scale_sentence
from manyhands.studies.xin_ma.reading import of, settings, trials


def analyse(study: Study, rows: Sequence[Row], lines: Sequence[Line]) -> Analysis:
    """See the file's head."""
    found = trials(study, rows)
    verdicts = conclusions(found)
    scales = [scale_sentence(found, setting) for setting in settings(found, design.NOISE)]
    return Analysis(
        (_summary(verdicts), *(_short(v) for v in verdicts)),
        charts=figures(found),
        verdicts=verdicts,
        notes=(*_trained_out(found), *scales, *findings(lines)),
    )


def _summary(verdicts: Sequence[Verdict]) -> str:
    counts = {o: sum(v.outcome == o for v in verdicts) for o in ("supported", "not supported", "undecided")}
    said = [f"{n} {'is' if n == 1 else 'are'} {o}" for o, n in counts.items() if n]
    return f"Of the slides' {len(verdicts)} conclusions {', '.join(said)} by these runs."


def _short(verdict: Verdict) -> str:
    return f"{verdict.claim}: {verdict.outcome}. {verdict.why}"


def _trained_out(found: Sequence[object]) -> list[str]:
    said = []
    for t in of(found, design.LEARNING):  # type: ignore[arg-type]
        if t.accuracy is not None:
            said.append(f"Trained out under {t.variant} (seed {t.seed}), the CNN gets {100 * t.accuracy:.2f} % right.")
    return said
