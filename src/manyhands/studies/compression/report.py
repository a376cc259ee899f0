"""What the study says: a table of schemes, and learning against bytes and against time on a link of `LINK`.

    a step on the link = compute + update + payloads + rounds · latency + sent bytes / bandwidth

Computing, updating, making and reading payloads are measured in the run (means of worker 0), sent bytes are counted,
the rest is the link's as the planner prices it. So these curves are computed, and drawn apart from what was measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manyhands.cluster import Figure, Link
from manyhands.studies.analysis import Analysis, Chart, Listing, Point, Role, Series
from manyhands.studies.charting import slug
from manyhands.studies.compression.settings import SETTINGS
from manyhands.studies.curves import Scale, crossing, mean_curve, scale_of
from manyhands.studies.findings import trust, wrong
from manyhands.studies.grid import Study
from manyhands.studies.row import Row
from manyhands.studies.summary import Line
from manyhands.studies.table import NONE, in_bytes, in_ms

LINK = Link(
    kind="Ethernet, TCP",
    latency=Figure(50, "us", "assumed: TCP through one switch"),
    bandwidth=Figure(100, "Mbit/s", "IEEE 802.3"),
)
LINK_NAME = "100 Mbit/s"
#: Within these of dense exchange a scheme counts as exact enough: shares of right answers, and of the test loss.
POINTS, LOSS_SHARE = 0.005, 0.01
#: Schemes that are drawn together; the dense exchange is in each.
FAMILIES = {
    "sparsifiers": ("strom", "strom_adaptive", "top_k", "random_k", "dgc", "entropy"),
    "quantizers of a few bits": ("one_bit", "sign_sgd", "terngrad", "qsgd", "two_bit"),
    "bytes, halves and low rank": ("int8", "float16", "bfloat16", "flexpoint", "powersgd"),
}


@dataclass(frozen=True)
class Run:
    """One scheme on one task."""

    compress: str
    optimizer: str
    line: Line
    curve: tuple[tuple[int, float], ...]  # steps, and accuracy or loss
    rounds: int

    @property
    def scheme(self) -> str:
        """Without its options."""
        return self.compress.partition("(")[0]

    @property
    def sent_B(self) -> float:
        """Of one step."""
        return self.line.sent_B_per_step or 0.0

    @property
    def last(self) -> float:
        """At the end."""
        return self.curve[-1][1]

    @property
    def here_s(self) -> float:
        """Of a step, what is spent computing, updating and compressing."""
        parts = self.line.parts_s
        return (parts.compute + parts.update if parts is not None else 0.0) + (self.line.compression_s or 0.0)

    def on(self, link: Link) -> float:
        """Seconds of a step over it."""
        return self.here_s + self.rounds * link.latency.si + self.sent_B / link.bandwidth_Bps()


def analyse(study: Study, rows: Sequence[Row], lines: Sequence[Line]) -> Analysis:
    """See the file's head."""
    sentences, charts, tables = list[str](), list[Chart](), list[Listing]()
    for task, of_task in _by_task(lines).items():
        scale = _scale(of_task, rows)
        if scale is None:
            continue
        runs = _runs(of_task, rows, scale)
        dense = [run for run in runs if run.compress == "none"]
        if not dense:
            continue
        sentences += _sentences(task, runs, dense, scale)
        tables.append(_listing(task, runs, dense, scale))
        for family, names in FAMILIES.items():
            shown = [run for run in runs if run in dense[:1] or run.scheme in names]
            if len(shown) > 1:
                charts += [_against_bytes(task, family, shown, scale), _against_time(task, family, shown, scale)]
    return Analysis(
        tuple([*sentences, *wrong(lines)][:5]), tuple(charts), notes=tuple(trust(lines)), tables=tuple(tables)
    )


def _by_task(lines: Sequence[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        if line.measured is not None:
            found.setdefault(f"{line.measured.model} on {line.measured.data}", []).append(line)
    return found


def _scale(lines: Sequence[Line], rows: Sequence[Row]) -> Scale | None:
    """As the task is judged in `SETTINGS`."""
    cells = {line.cell.id for line in lines}
    found = scale_of(row for row in rows if row.cell in cells)
    by_loss = lines[0].cell.task.get("model") == SETTINGS["gpt"].task["model"]
    return "test_loss" if found is not None and by_loss else found


def _runs(lines: Sequence[Line], rows: Sequence[Row], scale: Scale) -> list[Run]:
    found = []
    for line in lines:
        histories = [row.history for row in rows if row.cell == line.cell.id and row.status == "done"]
        assert line.measured is not None
        curve = [(round(at.samples / line.measured.global_batch), at.value) for at in mean_curve(histories, scale)]
        compress = str(line.cell.plan.get("compress", "none"))
        if curve:
            run = Run(compress, str(line.cell.task.get("optimizer", "")), line, tuple(curve), _rounds(compress, line))
            found.append(run)
    return found


def _rounds(compress: str, line: Line) -> int:
    """How often all wait for a message in a step: the scheme's own collectives, and what they agree on before."""
    from manyhands.communication.compression.compressor import compressor_from
    from manyhands.communication.compression.layout import Layout

    assert line.measured is not None
    made, n = compressor_from(compress), line.measured.parameters
    own = made.rounds(Layout(((1, n),)), line.workers or 1, made.payload_B(Layout(((1, n),))))
    return len(own) + (made.name == "powersgd" and len(own) == 1) + (compress != "none") + made.variable


def _off(run: Run, dense: Sequence[Run], scale: Scale) -> tuple[float, bool]:
    """How far from the dense run of its optimizer (else the first), better being above 0, and whether that will do."""
    bases = {s.compress: s.base for s in SETTINGS["gpt" if scale == "test_loss" else "cnn"].schemes}
    own = bases.get(run.compress, run.optimizer)
    base = next((each for each in dense if each.optimizer == own), dense[0]).last
    off = run.last - base if scale == "test_accuracy" else 1 - run.last / base
    return off, off >= -(POINTS if scale == "test_accuracy" else LOSS_SHARE)


def _sentences(task: str, runs: Sequence[Run], dense: Sequence[Run], scale: Scale) -> list[str]:
    others = [run for run in runs if run.compress != "none"]
    if not others:
        return []
    good = [run for run in others if _off(run, dense, scale)[1]]
    bound = f"{len(good)} of {len(others)} schemes end within {_bound(scale)} of dense exchange"
    said = [f"{task}: {bound}, after equal samples."]
    if good:
        least = min(good, key=lambda run: run.sent_B)
        fewer = dense[0].sent_B / least.sent_B if least.sent_B else float("inf")
        quickest = min(good, key=lambda run: run.on(LINK))
        said.append(
            f"Of these {least.compress} sends least, {fewer:,.3g} times fewer bytes; on {LINK_NAME} a step of "
            f"{quickest.compress} is computed to be the quickest, {in_ms(quickest.on(LINK))} ms against "
            f"{in_ms(dense[0].on(LINK))} ms dense."
        )
    return said


def _listing(task: str, runs: Sequence[Run], dense: Sequence[Run], scale: Scale) -> Listing:
    unit = "accuracy, %" if scale == "test_accuracy" else "test loss"
    head = ("scheme", unit, "against dense", "sent/step", "fewer bytes", "error", f"ms a step on {LINK_NAME}")
    body = []
    for run in runs:
        off, good = _off(run, dense, scale)
        line = run.line
        body.append(
            (
                run.compress,
                f"{100 * run.last:.2f}" if scale == "test_accuracy" else f"{run.last:.4f}",
                f"{100 * off:+.2f}" + ("" if good else " (beyond)"),
                in_bytes(run.sent_B),
                f"{line.compression_ratio:,.4g}×" if line.compression_ratio else NONE,
                f"{line.compression_error:.3g}" if line.compression_error is not None else NONE,
                in_ms(run.on(LINK)),
            )
        )
    note = (
        f"Equal samples in equal order. Against dense: points, or per cent of the test loss, better being above 0. On "
        f"{LINK_NAME}: computed, see the figures."
    )
    return Listing(task, head, tuple(body), note)


def _against_bytes(task: str, family: str, runs: Sequence[Run], scale: Scale) -> Chart:
    chart, first = _chart(task, family, runs, scale, "bytes", {run.compress: run.sent_B / 1e6 for run in runs})
    title = f"{family.capitalize()}: {first} needs the fewest bytes to {_bound(scale)} of dense exchange ({task})"
    return dataclasses.replace(chart, title=title, x="sent by a worker, MB")


def _against_time(task: str, family: str, runs: Sequence[Run], scale: Scale) -> Chart:
    each = {run.compress: run.on(LINK) for run in runs}
    chart, first = _chart(task, family, runs, scale, "link", each, "computed")
    return dataclasses.replace(
        chart,
        title=f"{family.capitalize()}: on {LINK_NAME} {first} would be first at {_bound(scale)} of dense exchange "
        f"({task})",
        x=f"seconds on a link of {LINK_NAME}, computed",
        note="Computed, not measured: computing, updating and compressing as measured on shared memory, with "
        f"{LINK.latency} a round and {LINK.bandwidth} of the link. {chart.note}",
    )


def _bound(scale: Scale) -> str:
    return f"{100 * POINTS:g} points" if scale == "test_accuracy" else f"{100 * LOSS_SHARE:g} % of the test loss"


def _curve(run: Run, each: float) -> list[tuple[float, float]]:
    return [(step * each, value) for step, value in run.curve]


def _chart(
    task: str,
    family: str,
    runs: Sequence[Run],
    scale: Scale,
    what: str,
    each: Mapping[str, float],
    role: Role = "measured",
) -> tuple[Chart, str]:
    """With a step's cost under each scheme, and who is first near enough to dense exchange, which comes first."""
    unit = 100.0 if scale == "test_accuracy" else 1.0
    target = runs[0].last - POINTS if scale == "test_accuracy" else runs[0].last * (1 + LOSS_SHARE)
    reached = {run.compress: crossing(_curve(run, each[run.compress]), target, scale) for run in runs}
    series = tuple(
        Series(run.compress, tuple(Point(at, unit * y) for at, y in _curve(run, each[run.compress]) if at > 0), role)
        for run in runs
    )
    chart = Chart(
        slug(f"by {what}", family, task),
        family,
        what,
        "right answers in the test set, %" if scale == "test_accuracy" else "test loss",
        tuple(s for s in series if s.points),
        log_x=True,
        note="All end after equal samples; further left is cheaper.",
    )
    return chart, min((name for name, x in reached.items() if x is not None), key=lambda name: reached[name] or 0.0)
