"""Which plan for a model and data of one's own: how much faster it is than one process, and whether it still learns.

The rules are those of `manyhands.studies.advice`; here stand the sentences, the table and the charts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from manyhands.studies import charts, learning_charts
from manyhands.studies.advice import Advice, Judged, advise, command
from manyhands.studies.analysis import Analysis, Chart, Listing, Point, Series
from manyhands.studies.charting import ALIKE, MOST_BARS, left_out, said, seconds, titled
from manyhands.studies.contenders import WIDE, Contender, Run, contenders, mean_of, ratio, useless
from manyhands.studies.findings import limits, trust, wrong
from manyhands.studies.fits import Estimate
from manyhands.studies.grid import Study
from manyhands.studies.row import Row
from manyhands.studies.summary import Line, counted
from manyhands.studies.table import NONE, disturbed, in_bytes, in_ms, percent


def analyse(study: Study, rows: Sequence[Row], lines: Sequence[Line]) -> Analysis:
    """See the file's head."""
    found = contenders(lines, rows)
    advice = advise(found)
    target = advice.target.value if advice.target is not None else None
    sentences = [recommendation(advice), *learning(advice), *_limits(advice), *trust(lines), *wrong(lines)]
    drawn = (
        *time_to_target(advice),
        *learning_charts.against_seconds(found, target=target),
        *charts.speed_up(found),
        *charts.parts(found),
        *learning_charts.against_samples(found, target=target),
        *learning_charts.against_batch(found),
        *charts.throughput(found),
        *charts.sent(found),
    )
    tables = (listing(advice, lines),) if lines else ()
    return Analysis(
        tuple(sentences[:5]),
        drawn,
        command=command(advice.use.plan) if advice.use is not None else "",
        notes=(*_method(advice), *sentences[5:]),
        tables=tables,
    )


# -- sentences ---------------------------------------------------------------------------------------------------------


def recommendation(advice: Advice) -> str:
    """What to use, why, and how sure that is."""
    use, alone, fastest = advice.use, advice.alone, advice.fastest
    if use is None:
        return f"No plan can be recommended: {_nothing(advice)}."
    if use is fastest and alone is None:
        return f"Use {use.plan.name}{_reaching(use, advice)}; {_no_single(advice)}."
    assert alone is not None
    if use is fastest:
        return (
            f"Use {use.plan.name}{_reaching(use, advice)}, {gained(use)} as the best single process "
            f"({alone.plan.name}{_taking(alone, advice)}), because {_because(use, alone)}{_doubt(use)}."
        )
    return f"Stay with one process ({_alone_name(alone.plan)}{_taking(alone, advice)}): {_why_stay(advice, alone)}."


def _reaching(use: Judged, advice: Advice) -> str:
    if advice.target is None:
        return f": {use.plan.samples_per_s:,.0f} samples a second"
    return f": it reaches {said(advice.target.value, advice.target.scale)} in {seconds(_mean(use.seconds))} of training"


def _taking(alone: Judged, advice: Advice) -> str:
    if advice.target is None:
        return f", {alone.plan.samples_per_s:,.0f} samples a second"
    return f", {seconds(_mean(alone.seconds))} to {said(advice.target.value, advice.target.scale)}"


def _alone_name(plan: Contender) -> str:
    return plan.name.removeprefix("one process with ").replace(" at ", ", ")


def gained(judged: Judged) -> str:
    """How many times as fast, with the interval where there is one of use."""
    gain = judged.gain
    assert gain is not None
    if gain.low is None or gain.high is None or useless(gain):
        return f"{gain.value:.2f}× as fast"
    return f"{gain.value:.2f}× [{gain.low:.2f} … {gain.high:.2f}, 95 % over {gain.over}] as fast"


def _doubt(judged: Judged) -> str:
    """What is said where there is no interval of use."""
    gain = judged.gain
    if gain is None or gain.low is None:
        return "; measured once, so that nobody knows how sure this is"
    return f"; its {gain.over} differ too much to bound that" if useless(gain) else ""


def _because(use: Judged, alone: Judged) -> str:
    """Time to a target is samples to it over samples a second; which of the two makes the difference."""
    speed = ratio(use.plan.speeds, alone.plan.speeds, noisy=use.plan.noisy | alone.plan.noisy)
    fewer = ratio(alone.samples, use.samples)
    reasons = []
    if speed is not None and abs(math.log(speed.value)) > math.log(1 + ALIKE):
        reasons.append(f"it trains on {speed.value:.2f}× as many samples a second")
    if fewer is not None and abs(math.log(fewer.value)) > math.log(1 + ALIKE):
        reasons.append(f"it needs {1 / fewer.value:.2f}× as many samples")
    return " and ".join(reasons) or "both speed and learning gain a little"


def _why_stay(advice: Advice, alone: Judged) -> str:
    fastest = advice.fastest
    if fastest is None or fastest.gain is None:
        return _nothing(advice)
    gain = fastest.gain
    said = f"the best plan of several workers that learns as much, {fastest.plan.name}, is {gained(fastest)}"
    if gain.high is not None and gain.high < 1:
        part = charts.overhead(fastest.plan)
        why = f", as communication and waiting are {100 * part:.0f} % of its step" if part >= 0.1 else ""
        return f"{said}, surely slower{why}"
    if gain.low is None:
        return said + (", too little for one run" if gain.value > 1 else "") + _doubt(fastest)
    if useless(gain):
        return said + _doubt(fastest)
    if gain.low > 1 and gain.value > 1 + ALIKE:
        return f"{said}, but not with every seed"
    more = "; more repeats could show one (--repeats)" if gain.value > 1 + ALIKE else ""
    return f"{said}, no difference that these runs can show{more}"


def _nothing(advice: Advice) -> str:
    """Why there is nothing among the plans of several workers."""
    many = [each for each in advice.judged if not each.plan.alone]
    if not many:
        return "none was measured" if not advice.judged else "no plan of several workers was measured"
    over = [each for each in many if each.plan.oversubscribed]
    less = [each for each in many if each.learns == "less" and each not in over]
    late = [each for each in many if not each.reached and each not in over and each not in less]
    reasons = []
    if less:
        reasons.append(f"{_count(less)} of several workers learn{'s' if len(less) == 1 else ''} less than one process")
    if late:
        reasons.append(f"{_count(late)} did not reach the target in every run")
    if over:
        reasons.append(f"{_count(over)} would need more cores than there are")
    return ", ".join(reasons) or "no time was measured"


def _count(plans: Sequence[Judged]) -> str:
    return counted(len(plans), "plan")


def _no_single(advice: Advice) -> str:
    if not any(each.plan.alone for each in advice.judged):
        return "there is no single process to compare it with"
    return "no single process got there in every run, so that no speed-up can be stated"


def learning(advice: Advice) -> list[str]:
    """Whether what is advised still learns, and who does not."""
    if not advice.judged:
        return []
    if advice.scale is None:
        return ["Whether it still learns is not known: the task has no test set, or was not evaluated."]
    found = []
    use, alone, scale = advice.use, advice.alone, advice.scale
    if use is not None and alone is not None and use is not alone and use.mean_final is not None:
        found.append(
            f"It still learns: {_final(use, advice)} at the end against {_final(alone, advice)} of the single process"
        )
    less = [each for each in advice.judged if each.learns == "less"]
    many = [each for each in advice.judged if not each.plan.alone]
    if less:
        worst = (min if scale == "test_accuracy" else max)(less, key=lambda j: j.mean_final or 0.0)
        found.append(
            f"{counted(len(less), 'plan')} of {len(advice.judged)} learn{'s' if len(less) == 1 else ''} less than one "
            f"process, least {worst.plan.name} ({_final(worst, advice)})"
        )
    elif many:
        found.append("no plan learns less than one process")
    text = "; ".join(found)
    return [f"{text[:1].upper()}{text[1:]}."] if text else []


def _final(judged: Judged, advice: Advice) -> str:
    assert advice.scale is not None
    if judged.mean_final is None:
        return "never evaluated"
    return said(judged.mean_final, advice.scale)


def _limits(advice: Advice) -> list[str]:
    shown = advice.use if advice.parallel else advice.fastest
    return limits(shown.plan) if shown is not None else []


def _method(advice: Advice) -> list[str]:
    found = []
    if advice.target is not None:
        found.append(f"Target: {said(advice.target.value, advice.target.scale)}, {advice.target.why}.")
    else:
        found.append("There is no target to reach, so that plans are compared by samples a second alone.")
    if at_once := [each for each in advice.judged if _at_once(each)]:
        found.append(
            f"{counted(len(at_once), 'plan')} had reached the target when first evaluated, so that the time is an "
            "upper bound there; a higher target tells them better apart."
        )
    able = [each for each in advice.judged if not each.plan.alone and each.gain is not None]
    if len(able) > 1 and any(each.gain is not None and each.gain.low is not None for each in able):
        found.append(
            f"The interval of the gain is Student's over runs of the same seed and round, or over the means of three "
            f"seeds and more, widened as the plan was chosen as the fastest of {len(able)}."
        )
    return found


def _at_once(judged: Judged) -> bool:
    """Whether a run had reached the target at its first record."""
    firsts = {run: row.history[0]["samples"] for run, row in judged.plan.rows.items() if row.history}
    return any(judged.samples.get(run) == samples for run, samples in firsts.items())


# -- the table ---------------------------------------------------------------------------------------------------------


def listing(advice: Advice, lines: Sequence[Line]) -> Listing:
    """Every plan with its costs and what it learns, the fastest to the target first."""
    head = (
        "plan",
        "step, ms",
        "compute + communicate + wait + update, ms",
        "speed-up",
        "samples to target",
        "time to target",
        "gain",
        "sent/step",
        "memory",
        "accuracy" if advice.scale != "test_loss" else "test loss",
        "remark",
    )
    ordered = sorted(
        advice.judged, key=lambda j: (j.plan.oversubscribed, not j.reached, -(j.gain.value if j.gain else 0.0))
    )
    body = [_listed(each, advice) for each in ordered]
    body += [
        (line.name, *[NONE] * (len(head) - 2), line.status)
        for line in lines
        if line.status != "done" and line.cell.measure == "train"
    ]
    alone = advice.alone.plan.name if advice.alone is not None else None
    note = (
        f"Speed-up and gain are against the best single process, {alone}: in samples a second, and in time to the "
        if alone is not None
        else "There is no single process to compare with. "
    )
    if alone is not None:
        note += "target. " if advice.target is not None else "target, which there is none of. "
    if advice.target is not None:
        note += f"Target: {said(advice.target.value, advice.target.scale)}, {advice.target.why}. "
    note += (
        "In brackets 95 % intervals by Student's t over the means of three seeds and more, else over runs, those of "
        "gain widened for picking the best of plans; [?]: the runs are too few or differ too much, the ends would lie "
        f"more than {WIDE} times apart. Disturbed runs count in no ratio where two others remain. Parts of a step are "
        "means over worker 0's steps. Memory is the largest worker's, sent/step the payload of one worker."
    )
    return Listing("Every plan against one process", head, tuple(body), note)


def _listed(judged: Judged, advice: Advice) -> tuple[str, ...]:
    plan = judged.plan
    p = plan.parts_s
    against = None
    if advice.alone is not None and not plan.oversubscribed:
        against = ratio(plan.speeds, advice.alone.plan.speeds, noisy=plan.noisy | advice.alone.plan.noisy)
    timed = advice.target is not None and judged.reached
    return (
        plan.name,
        in_ms(plan.step_s),
        " + ".join(in_ms(part) for part in (p.compute, p.communicate, p.wait, p.update)),
        _interval(against, "×"),
        _interval(_positive(judged.samples), digits=0) if timed else NONE if advice.target is None else "not reached",
        NONE if not timed or plan.oversubscribed else _duration(_positive(judged.seconds)),
        _interval(judged.gain, "×"),
        in_bytes(plan.sent_B_per_step),
        in_bytes(plan.peak_memory_B),
        NONE
        if judged.mean_final is None
        else percent(judged.mean_final)
        if advice.scale == "test_accuracy"
        else f"{judged.mean_final:.3g}",
        _remark(judged, advice),
    )


def _remark(judged: Judged, advice: Advice) -> str:
    found = []
    if advice.use is judged:
        found.append("recommended")
    if advice.alone is judged:
        found.append("best single process")
    if judged.plan.oversubscribed:
        found.append("oversubscribed: no speed")
    if judged.learns == "less":
        found.append("learns less")
    elif not judged.reached:
        found.append(f"target in {len(judged.seconds)} of {len(judged.plan.rows)} runs")
    if judged.plan.noisy:
        found.append(disturbed(len(judged.plan.noisy), len(judged.plan.rows)))
    if judged.plan.failures:
        found.append(f"{judged.plan.failures} failed")
    return ", ".join(found)


def _positive(values: Mapping[Run, float]) -> Estimate | None:
    """Of times and counts, which are above 0: the geometric mean."""
    return mean_of({run: v for run, v in values.items() if v > 0}, form=math.log, back=math.exp)


def _interval(found: Estimate | None, unit: str = "", *, digits: int = 2) -> str:
    if found is None:
        return NONE
    text = f"{found.value:,.{digits}f}{unit}"
    if found.low is None or found.high is None:
        return text
    if useless(found):
        return f"{text} [?]"
    if found.low == found.high:
        return text
    return f"{text} [{found.low:,.{digits}f} … {found.high:,.{digits}f}]"


def _duration(found: Estimate | None) -> str:
    if found is None:
        return NONE
    if found.low is None or found.high is None:
        return seconds(found.value)
    if useless(found):
        return f"{seconds(found.value)} [?]"
    return f"{seconds(found.value)} [{seconds(found.low)} … {seconds(found.high)}]"


def _mean(values: Mapping[Run, float]) -> float:
    found = _positive(values)
    return found.value if found is not None else statistics.fmean(values.values())


# -- the chart ---------------------------------------------------------------------------------------------------------


def time_to_target(advice: Advice) -> tuple[Chart, ...]:
    """Seconds of training until the target, plan by plan, the fastest first."""
    target = advice.target
    if target is None:
        return ()
    timed = [
        (each, _positive(each.seconds))
        for each in advice.judged
        if each.reached and not each.plan.oversubscribed and each.seconds
    ]
    shown = sorted(((j, e) for j, e in timed if e is not None), key=lambda x: x[1].value)
    if not shown:
        return ()
    first, time = shown[0]
    goal = said(target.value, target.scale)
    title = f"{first.plan.name} is at {goal} first, after {seconds(time.value)} of training"
    if advice.alone is not None and advice.alone is not first:
        title += f"; the best single process needs {seconds(_mean(advice.alone.seconds))}"
        title += "" if advice.use is first else ", no sure difference"
    missing = [each for each in advice.judged if not each.reached and not each.plan.oversubscribed]
    note = f"Target: {goal}, {target.why}. Geometric means over runs with Student's 95 % interval; lower is better."
    if missing:
        note += f" Left out: {counted(len(missing), 'plan')} that did not reach it in every run."
    points = tuple(Point(j.plan.name, e.value, e.low, e.high) for j, e in shown[:MOST_BARS])
    note += left_out(len(shown) - len(points), "slower")
    return (
        Chart(
            "time-to-target",
            titled(title),
            "plan",
            "training until the target, s",
            (Series("time to target", points),),
            "bars",
            note=note,
        ),
    )
