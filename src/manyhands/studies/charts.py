"""Charts of speed and of what it costs, shared by analyses: from contenders to figures as data. Pure; `report` draws.

Each builder takes what `contenders` made of a study's lines and rows, and gives a chart for each task of the study that
can carry it, or none. A title says the finding, computed from the same numbers as the points; a note says how to read
the chart. What uses more cores than there are stands in no chart of speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from manyhands.studies import fits
from manyhands.studies.analysis import Chart, Point, Series
from manyhands.studies.charting import ALIKE, MOST_BARS, a_chart_each, left_out, of_group, slug, titled
from manyhands.studies.contenders import Contender, task_of
from manyhands.studies.grid import PER_WORKER
from manyhands.studies.summary import counted, paired_s
from manyhands.studies.table import in_bytes

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_PARTS = (("compute", "computing"), ("communicate", "communicating"), ("wait", "waiting"), ("update", "updating"))


def speed_up(found: Sequence[Contender]) -> tuple[Chart, ...]:
    """Samples a second against workers, over those of one worker of the same strategy; the ideal beside them."""
    return a_chart_each(found, _speed_up)


def _speed_up(group: str, plans: Sequence[Contender]) -> Chart | None:
    series: dict[str, list[tuple[Contender, Point]]] = {}
    for each in plans:
        gained = speed_up_of(each)
        if gained is None or each.oversubscribed:
            continue
        kind = _without_workers(each, plans)
        series.setdefault(kind, []).append((each, Point(each.workers, gained.value, gained.low, gained.high)))
    series = {k: v for k, v in series.items() if any(not each.alone for each, _ in v)}
    if not series:
        return None
    many = [(each, p) for points in series.values() for each, p in points if not each.alone]
    most = max(each.workers for each, _ in many)
    ideal = Series("ideal", tuple(Point(w, w) for w in _counts(1, most)), "ideal")
    weak = any(PER_WORKER in task_of(each) for each in plans)
    return Chart(
        slug("speed-up", group),
        _gains(many) + of_group(group),
        "workers",
        "speed-up, samples/s over those of one worker",
        (
            *(
                Series(kind, tuple(p for _, p in sorted(points, key=lambda x: x[0].workers)))
                for kind, points in series.items()
            ),
            ideal,
        ),
        note=(
            "Above 1 is faster than one worker, on the ideal line every worker counts in full. Medians over runs, each "
            "against the base's run of the same seed and round; bars are 95 % bootstrap intervals, which for few runs "
            "are no wider than the runs lie apart. "
            + ("The batch grows with the workers (weak scaling). " if weak else "The batch is the same for all. ")
            + "Plans of more workers × threads than cores are left out."
        ),
    )


def speed_up_of(of: Contender) -> fits.Estimate | None:
    """Against each line's base, the median over runs, as in the table."""
    found = fits.bootstrap(speed_ups_of(of))
    return None if isinstance(found, fits.CannotFit) else found


def speed_ups_of(of: Contender) -> list[float]:
    """Against each line's base, a ratio for each run that both have; none where there is no claim about speed."""
    ratios = []
    for line in of.lines:
        if line.base is None or line.measured is None or line.base.measured is None or line.oversubscribed:
            continue
        if not of.alone and line.base.threads != line.threads:
            continue  # more workers would not be all that makes the difference
        larger = line.measured.global_batch / line.base.measured.global_batch
        ratios += [larger * theirs / mine for mine, theirs in paired_s(line, line.base)]
    return ratios


def _gains(many: Sequence[tuple[Contender, Point]]) -> str:
    best, top = max(many, key=lambda x: x[1].y)
    if top.y < 1 - ALIKE:
        text = f"No plan is as fast as one worker: {_workers(best)} of {best.strategy} reach {top.y:.2f}× its speed"
    elif top.y <= 1 + ALIKE:
        text = f"No plan is faster than one worker: {_workers(best)} of {best.strategy} are as fast ({top.y:.2f}×)"
    else:
        text = f"{_workers(best).capitalize()} of {best.strategy} do {top.y:.2f}× the work of one"
    same = [(each, p) for each, p in many if each.workers == best.workers and each.strategy != best.strategy]
    if same:
        worst, least = min(same, key=lambda x: x[1].y)
        if least.y < top.y * (1 - ALIKE):
            text += f", of {worst.strategy} {least.y:.2f}×"
    return text


def parts(found: Sequence[Contender]) -> tuple[Chart, ...]:
    """Where the time of a step goes, plan by plan."""
    return a_chart_each(found, _parts)


def _parts(group: str, plans: Sequence[Contender]) -> Chart | None:
    able = [each for each in plans if not each.oversubscribed and _total_s(each) > 0]
    many = [each for each in able if not each.alone]
    if not able:
        return None
    shown = able[:MOST_BARS]
    if many:
        worst = max(many, key=overhead)
        title = (
            f"{worst.short} spends {_share(overhead(worst))} of its step communicating and waiting, the largest share"
        )
        least = min(many, key=overhead)
        if overhead(worst) < 0.1:
            title = f"Computing decides: no plan spends more than {_share(overhead(worst))} communicating and waiting"
        elif least is not worst:
            title += f"; {least.short} least, {_share(overhead(least))}"
    else:
        update = _share(shown[0].parts_s.update / _total_s(shown[0]))
        title = f"{shown[0].short} spends {update} of its step updating"
    return Chart(
        slug("step-parts", group),
        titled(title) + of_group(group),
        "plan",
        "time of a step, ms",
        tuple(
            Series(label, tuple(Point(each.short, 1e3 * getattr(each.parts_s, key)) for each in shown))
            for key, label in _PARTS
        ),
        kind="stack",
        note=(
            "Means over the steps of worker 0, medians over runs. Waiting is for slower workers, communicating is "
            "moving and adding what they send. Lower is faster"
            + (", as all compute the same batch." if not any(PER_WORKER in task_of(p) for p in plans) else ".")
            + left_out(len(able) - len(shown), "further")
        ),
    )


def overhead(of: Contender) -> float:
    """The share of a step that a process alone would not need."""
    total = _total_s(of)
    return (of.parts_s.communicate + of.parts_s.wait) / total if total else 0.0


def _total_s(of: Contender) -> float:
    parts = of.parts_s
    return parts.compute + parts.communicate + parts.wait + parts.update


def throughput(found: Sequence[Contender]) -> tuple[Chart, ...]:
    """Samples a second of every plan, the fastest first."""
    return a_chart_each(found, _throughput)


def _throughput(group: str, plans: Sequence[Contender]) -> Chart | None:
    shown = sorted((each for each in plans if not each.oversubscribed and each.speeds), key=lambda c: -c.samples_per_s)
    if len(shown) < 2:
        return None
    best, others = shown[0], shown[1:]
    alone = next((each for each in shown if each.alone), None)
    second = alone if alone is not None and alone is not best else others[0]
    speed, other = (f"{each.samples_per_s:,.0f}" for each in (best, second))
    title = f"{best.short} does most: {speed} samples a second, {second.short} {other}"
    points = []
    for each in shown[:MOST_BARS]:
        middle = fits.bootstrap(each.speeds.values())
        assert isinstance(middle, fits.Estimate)
        points.append(Point(each.short, middle.value, middle.low, middle.high))
    note = (
        "Global batch over the median step, medians over runs with 95 % bootstrap intervals; speed alone, whatever was "
        "learned." + left_out(len(shown) - len(points), "slower")
    )
    return Chart(
        slug("throughput", group),
        titled(title) + of_group(group),
        "plan",
        "samples/s",
        (Series("samples/s", tuple(points)),),
        "bars",
        note=note,
    )


def sent(found: Sequence[Contender]) -> tuple[Chart, ...]:
    """Bytes that a worker sends in a step, strategy by strategy at the same number of workers."""
    return a_chart_each(found, _sent)


def _sent(group: str, plans: Sequence[Contender]) -> Chart | None:
    many = [each for each in plans if not each.alone]
    if not many:
        return None
    most = max(each.workers for each in many)
    shown = list({each.strategy: each for each in reversed(many) if each.workers == most}.values())[::-1]
    top = max(each.sent_B_per_step for each in shown)
    if not top:
        return None
    unit, divisor = next((u, d) for u, d in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)) if top >= d or d == 1.0)
    high, low = max(shown, key=lambda c: c.sent_B_per_step), min(shown, key=lambda c: c.sent_B_per_step)
    each_of = f"in a step from each of {most} workers"
    if high.sent_B_per_step <= low.sent_B_per_step * (1 + ALIKE):
        named = high.strategy if len(shown) == 1 else "Every strategy"
        title = f"{named} sends {in_bytes(top)} {each_of}"
    else:
        title = f"{high.strategy} sends most, {in_bytes(top)} {each_of}; "
        title += f"{low.strategy} least, {in_bytes(low.sent_B_per_step)}"
    points = tuple(Point(each.strategy, each.sent_B_per_step / divisor) for each in shown)
    note = "Payload, counted as the reference algorithms send it: the same on every transport and at every batch."
    return Chart(
        slug("bytes-per-step", group),
        titled(title) + of_group(group),
        "strategy",
        f"sent by a worker in a step, {unit}",
        (Series("sent", points),),
        "bars",
        note=note,
    )


def _share(share: float) -> str:
    return f"{100 * share:.0f} %"


def _workers(of: Contender) -> str:
    return f"{_WORDS[of.workers]} workers" if of.workers < len(_WORDS) else counted(of.workers, "worker")


def _without_workers(of: Contender, plans: Iterable[Contender]) -> str:
    """What a series over workers is called: the strategy, and what else tells it from another with the same counts."""
    others = [each for each in plans if each.strategy == of.strategy and not each.alone]
    text = of.strategy
    if len({each.lines[0].transport for each in others}) > 1 and not of.alone:
        text += f" on {of.lines[0].transport}"
    if of.alone and of.threads > 1:
        text += f", {counted(of.threads, 'thread')}"
    return text


def _counts(low: int, high: int) -> list[int]:
    return list(range(low, high + 1)) if high <= 16 else sorted({low, *(2**i for i in range(high.bit_length())), high})
