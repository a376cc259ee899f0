"""A study's tables, its own and an analysis's, in two forms: plain aligned text, and rich for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from manyhands.studies.analysis import Listing
from manyhands.studies.summary import Line, counted, family

_SHOWN = ("plan.strategy", "plan.workers", "plan.transport")  # factors that have their column anyway
_WORDS = ("strategy", "transport", "remark")  # columns of words, and so is the first
#: What a narrow terminal does without, the first first: here and in the table of `compare`.
_DISPENSABLE = (
    "compute + communicate + wait + update, ms",
    "sent/sample",
    "kept mass",
    "compressing, ms",
    "samples to target",
    "memory",
    "efficiency",
    "samples/s",
    "predicted ms",
    "sent/step",
    "step, ms",
    "time to target",
)
#: Columns where something was compressed.
COMPRESSION = ("fewer bytes", "error", "kept mass", "compressing, ms")
#: Where there is no figure.
NONE = "–"


@dataclass(frozen=True)
class Table:
    """Text by row and column, and the remarks that make it readable alone."""

    head: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]
    left: frozenset[int]  # columns of words; numbers stand on the right
    remarks: tuple[str, ...]
    title: str = ""

    def plain(self) -> str:
        """Aligned by spaces."""
        widths = [max(len(row[i]) for row in (self.head, *self.body)) for i in range(len(self.head))]

        def joined(row: Sequence[str]) -> str:
            cells = (
                x.ljust(w) if i in self.left else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True))
            )
            return "  ".join(cells).rstrip()

        title = [self.title, ""] if self.title else []
        return "\n".join([*title, joined(self.head), *(joined(row) for row in self.body), "", *self.remarks])

    def show(self, console: Console) -> None:
        """Drawn on a terminal, plain elsewhere (a file, a pipe)."""
        if not console.is_terminal:
            console.print(Text(self.plain()), soft_wrap=True)
            return
        if self.title:
            console.print(Text(self.title, style="bold"))
        shown = self._fitting(console.width)
        drawn = RichTable(box=None, header_style="bold", pad_edge=False)
        for i in shown:
            drawn.add_column(Text(self.head[i]), justify="left" if i in self.left else "right", overflow="fold")
        for row in self.body:
            drawn.add_row(*(Text(row[i]) for i in shown))
        console.print(drawn)
        hidden = [title for i, title in enumerate(self.head) if i not in shown]
        for remark in ("", *self.remarks, *([f"A wider terminal also shows {', '.join(hidden)}."] if hidden else [])):
            console.print(Text(remark, style="dim"))

    def _fitting(self, width: int) -> list[int]:
        """The columns that there is room for."""
        need = [max(len(row[i]) for row in (self.head, *self.body)) for i in range(len(self.head))]
        shown = list(range(len(self.head)))
        for title in _DISPENSABLE:
            if sum(need[i] + 1 for i in shown) > width and title in self.head:
                shown.remove(self.head.index(title))
        return shown


def listed(listing: Listing) -> Table:
    """A table of an analysis."""
    words = {i for i, title in enumerate(listing.head) if i == 0 or title in _WORDS}
    remarks = (listing.note,) if listing.note else ()
    return Table(listing.head, listing.body, frozenset(words), remarks, listing.title)


def table(lines: Sequence[Line]) -> Table:
    """A row for each line but those of noise, which have no times; factors without a column of their own get one."""
    lines = [line for line in lines if line.cell.measure == "train"]
    extra = _varying(lines)
    remarked = any(_remark(line) for line in lines)
    compressed = any(line.compression_s is not None for line in lines)
    predicted = any(line.predicted_step_s is not None for line in lines)
    head = (
        "strategy",
        "workers",
        *(factor.partition(".")[2] for factor in extra),
        "transport",
        "step ms [p10 … p90]",
        *(("predicted ms",) if predicted else ()),
        "samples/s",
        "speed-up",
        "efficiency",
        "accuracy",
        "sent/step",
        "sent/sample",
        *(COMPRESSION if compressed else ()),
        *(("remark",) if remarked else ()),
    )
    body = tuple(
        (
            line.strategy,
            str(line.workers or line.cell.plan.get("workers", NONE)),
            *(_factor(line, factor) for factor in extra),
            line.transport or str(line.cell.plan.get("transport", NONE)),
            _step(line),
            *((_predicted(line),) if predicted else ()),
            f"{line.samples_per_s:,.0f}" if line.samples_per_s is not None else NONE,
            f"{line.speed_up:.2f}×" if line.speed_up is not None else NONE,
            f"{100 * line.efficiency:.0f} %" if line.efficiency is not None else NONE,
            percent(line.accuracy),
            in_bytes(line.sent_B_per_step),
            in_bytes(line.sent_B_per_sample),
            *(_compression(line) if compressed else ()),
            *((_remark(line),) if remarked else ()),
        )
        for line in lines
    )
    words = {i for i, title in enumerate(head) if title in _WORDS}
    return Table(head, body, frozenset(words), _remarks(lines))


def _varying(lines: Sequence[Line]) -> list[str]:
    factors = dict.fromkeys(f for line in lines for f in line.cell.factors if f not in _SHOWN)
    return [f for f in factors if len({_factor(line, f) for line in lines}) > 1]


def _factor(line: Line, factor: str) -> str:
    kind, _, key = factor.partition(".")
    if factor == "plan.threads" and line.threads is not None:
        return str(line.threads)
    value = (line.cell.task if kind == "task" else line.cell.plan).get(key)
    return NONE if value is None else str(value)


def _step(line: Line) -> str:
    if line.step_s is None:
        return NONE
    s = line.step_s
    return f"{in_ms(s.median)} [{in_ms(s.p10)} … {in_ms(s.p90)}]"


def _compression(line: Line) -> tuple[str, ...]:
    """Its part of `COMPRESSION`."""
    ratio, error, kept, spent_s = (getattr(line, f"compression_{what}") for what in ("ratio", "error", "kept", "s"))
    return (
        f"{ratio:,.4g}×" if ratio is not None else NONE,
        f"{error:.3g}" if error is not None else NONE,
        f"{kept:.3g}" if kept is not None else NONE,
        in_ms(spent_s) if spent_s is not None else NONE,
    )


def _predicted(line: Line) -> str:
    if line.predicted_step_s is None:
        return NONE
    bar = "" if line.prediction_error is None else f" ± {100 * line.prediction_error:.0f} %"
    off = line.prediction_off
    return f"{in_ms(line.predicted_step_s)}{bar}" + ("" if off is None else f" ({100 * off:+.0f} %)")


def in_ms(seconds: float) -> str:
    """Three digits, without the unit."""
    ms = 1e3 * seconds
    if not ms:
        return "0"
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:,.0f}"


def percent(share: float | None) -> str:
    """To a tenth of a percent."""
    return NONE if share is None else f"{100 * share:.1f} %"


def in_bytes(count: float | None) -> str:
    """Three digits and a decimal unit.

    >>> in_bytes(115752), in_bytes(0), in_bytes(None)
    ('116 kB', '0 B', '–')
    """
    if count is None:
        return NONE
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _remark(line: Line) -> str:
    if line.status != "done":
        return line.status
    said = ["correctness only"] if line.oversubscribed else []
    if line.staleness_mean is not None:
        said.append(f"staleness {line.staleness_mean:.1f}, at most {line.staleness_max}")
    if line.noisy:
        said.append(disturbed(line.noisy, line.repeats))
    if line.failures:
        said.append(f"{line.failures} of {line.failures + line.repeats} failed")
    return ", ".join(said)


def disturbed(noisy: int, runs: int) -> str:
    """That other work kept cores busy about runs, also when they were repeated."""
    return f"{noisy} of {runs} disturbed"


def _remarks(lines: Sequence[Line]) -> tuple[str, ...]:
    repeats = max((line.repeats for line in lines), default=0)
    said = []
    if repeats:
        over = f"medians over {repeats} repeats that took turns" if repeats > 1 else "one run each"
        said.append(f"Times: {over}; warm-up left out. samples/s: global batch / step.")
    if any(line.predicted_step_s is not None for line in lines):
        said.append(
            "Predicted: the step as it was predicted before it was run, ± its error bar (and what it missed by)."
        )
    if any(line.noisy for line in lines):
        said.append(
            "Disturbed: cores were busy with other work, also when the run was repeated; a ratio leaves such runs out "
            "where two others remain."
        )
    compared = [line for line in lines if line.base is not None]
    if compared:
        turn = ", median of each round's ratio" if repeats > 1 else ""
        said.append(
            f"Speed-up: samples/s against {_bases(compared)}{turn}. Efficiency: speed-up / times as many cores."
        )
    if any(line.sent_B_per_step is not None for line in lines):
        said.append("sent/step: payload that one worker sends; sent/sample: all workers together.")
    if any(line.compression_s is not None for line in lines):
        said.append(
            "Fewer bytes: a dense exchange's over those sent. Of x, a gradient with what had not been sent before, and "
            "C(x), what stands for it: error ‖x − C(x)‖ / ‖x‖, kept mass ‖C(x)‖² / ‖x‖², in one step of 64."
        )
    if any(line.staleness_mean is not None for line in lines):
        said.append(
            "Staleness: updates of other workers (of ssp, steps) that a gradient's parameters did not have; mean."
        )
    if any(line.status == "done" and line.oversubscribed for line in lines):
        said.append(
            f"Correctness only: workers × threads are more than the {lines[0].cores} cores, so no speed-up is stated."
        )
    return tuple(said)


def _bases(lines: Sequence[Line]) -> str:
    bases = [line.base for line in lines if line.base is not None]
    threads = sorted({base.threads or 1 for base in bases})
    of_threads = counted(threads[0], "thread") if len(threads) == 1 else f"{' or '.join(map(str, threads))} threads"
    weak = any("batch_per_worker" in line.cell.task for line in lines)
    text = f"one worker (single, {of_threads}) of the same strategy at the same batch{' per worker' if weak else ''}"
    foreign = [line for line in lines if line.base is not None and family(line.base) != family(line)]
    if foreign:
        others = dict.fromkeys(f"{family(x)}: {x.base.strategy}'s" for x in foreign if x.base is not None)
        theirs = {x.base.strategy for x in foreign if x.base is not None}
        if len(others) > 2 and len(theirs) == 1:
            text += f" ({theirs.pop()}'s where there is none: one worker is plain SGD under each)"
        else:
            text += f" ({', '.join(others)}, having none of its own)"
    return text
