"""What a person should notice in a study, in sentences computed from its lines and contenders."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from manyhands.contract import StepParts
from manyhands.errors import BadInput
from manyhands.studies.charting import ALIKE, NOISY, margin, tested
from manyhands.studies.contenders import Contender, Ratio, by_task, plan_of, ratio, useless
from manyhands.studies.fits import Estimate
from manyhands.studies.summary import Line, counted
from manyhands.studies.table import percent

#: Of the cores a plan uses, at least this share should come back as speed.
EFFICIENT = 0.5
#: Beyond linear by more than this is worth doubting.
SUPERLINEAR = 1.1


# -- sentences for the top of a report, at most one each ---------------------------------------------------------------


def fastest(found: Sequence[Contender]) -> list[str]:
    """Of each task the fastest plan of several workers that learns, run by run against the best single process."""
    return [sentence for plans in by_task(found).values() for sentence in _fastest(plans)]


def surprises(lines: Sequence[Line]) -> list[str]:
    """What is slower, or faster, or learns less than one would think, line by line."""
    return [sentence for line in lines for sentence in _sentences(line)]


def learning(lines: Sequence[Line]) -> list[str]:
    """Whether plans learn as much as one worker does."""
    known = [line for line in lines if line.accuracy is not None]
    if not known:
        return ["What was learned is not known: no run was evaluated."] if any(x.measured for x in lines) else []
    compared = [line for line in known if line.base is not None and line.base.accuracy is not None]
    less = [line for line in compared if _learns_less(line)]
    if less:
        worst = min(less, key=lambda x: (x.accuracy or 0.0) - (x.base.accuracy or 0.0 if x.base else 0.0))
        base = worst.base.accuracy if worst.base else None
        return [
            f"{counted(len(less), 'plan')} of {len(compared)} learn{'s' if len(less) == 1 else ''} less than one "
            f"worker, {worst.name} least: {percent(worst.accuracy)} right against {percent(base)}."
        ]
    low, high = (percent(pick(x.accuracy or 0.0 for x in known)) for pick in (min, max))
    if not compared:
        return [f"Between {low} and {high} are right at the end; there is no single worker to compare with."]
    right = f"{low} are right" if low == high else f"{low} to {high} are right"
    return [f"Every plan learns as much as one worker: {right} at the end."]


def limits(of: Contender) -> list[str]:
    """The largest part of its step, and the rest."""
    p = of.parts_s
    shares = {"computing": p.compute, "communicating and waiting": p.communicate + p.wait, "updating": p.update}
    total = sum(shares.values())
    if not total:
        return []
    (first, most), *rest = sorted(shares.items(), key=lambda x: -x[1])
    others = ", ".join(f"{name} {100 * part / total:.0f} %" for name, part in rest)
    return [f"What limits {of.name} is {first}, {100 * most / total:.0f} % of its step ({others})."]


def trust(lines: Sequence[Line]) -> list[str]:
    """How often plans were measured, and what disturbed them."""
    done = [line for line in lines if line.repeats]
    if not done:
        return []
    runs, noisy = sum(line.repeats for line in done), sum(line.noisy for line in done)
    cores = max(line.cores for line in done)
    said = [_repeats(done)]
    if noisy:
        said.append(f"{noisy} of {runs} runs were disturbed by other work, also when repeated, so take times lightly")
    worst = max(done, key=_noise)
    if _noise(worst) > NOISY:
        said.append(f"repeats differ by up to {_noise(worst):.1f}× ({worst.name})")
    over = [line for line in done if line.oversubscribed]
    if over:
        said.append(
            f"{counted(len(over), 'cell')} with more workers × threads than the {counted(cores, 'core')} count for no "
            "statement about speed"
        )
    return ["; ".join(said) + "."]


def _repeats(done: Sequence[Line]) -> str:
    plans: dict[str, list[int]] = {}  # the runs of each seed
    for line in done:
        plans.setdefault(plan_of(line), []).append(line.repeats)
    seeds = [len(runs) for runs in plans.values()]
    if max(seeds) == min(seeds):
        often = _times([each for runs in plans.values() for each in runs])
        if often == "once" and seeds[0] == 1:
            return "Every plan ran once, so that nothing tells a difference from noise"
        return f"Every plan ran {often}" + (f" with each of {seeds[0]} seeds" if seeds[0] > 1 else "")
    several = [each for each in seeds if each > 1]
    how_many = f"{several[0]}" if max(several) == min(several) else f"{min(several)} to {max(several)}"
    others = "" if len(several) == len(seeds) else ", the others with one"
    return (
        f"Every plan ran {_times([sum(runs) for runs in plans.values()])} in all, {len(several)} of {len(seeds)} plans "
        f"with {how_many} seeds{others}"
    )


def _times(runs: Sequence[int]) -> str:
    least, most = min(runs), max(runs)
    return "once" if most == 1 else f"{most} times" if least == most else f"{least} to {most} times"


def wrong(lines: Sequence[Line]) -> list[str]:
    """What was refused, and what failed; the first reason of each."""
    refused = [line for line in lines if line.status == "refused"]
    failed = [line for line in lines if line.failures and line.status != "refused"]
    said = []
    if refused:
        verb = "was" if len(refused) == 1 else "were"
        said.append(f"{counted(len(refused), 'plan')} {verb} refused ({_asked(refused[0])}: {_brief(refused[0])})")
    if failed:
        runs = sum(line.failures for line in failed)
        said.append(f"{counted(runs, 'run')} failed ({failed[0].name}: {_brief(failed[0])})")
    return ["; ".join(said) + "."] if said else []


def _brief(line: Line) -> str:
    """The first line of the reason, not too long, without its full stop."""
    first = line.reason.strip().splitlines()[0] if line.reason.strip() else "no reason is known"
    return (first if len(first) <= 160 else first[:159].rstrip() + "…").rstrip(".")


# -- in detail ---------------------------------------------------------------------------------------------------------


def _fastest(plans: Sequence[Contender]) -> list[str]:
    able = [each for each in plans if not each.oversubscribed and each.speeds and not _learns_less(*each.lines)]
    single = max((each for each in able if each.alone), key=lambda each: each.samples_per_s, default=None)
    many = sorted((each for each in able if not each.alone), key=lambda each: -each.samples_per_s)
    if single is None or len(able) == 1:
        return []
    if not many:
        return [f"Nothing here is faster than {single.name}."]
    best, others = many[0], many[1:]
    gain = _faster(best, single, plans=len(many))
    if gain is None:
        return []
    if useless(gain):
        told = f"{gain.value:.2f}× as many samples a second as {single.name} by {gain.over}"
        return [f"{best.name} took {told}, which differ too much to say more; more repeats (--repeats) tell."]
    if _alike(gain):
        return [f"{best.name} and {single.name} are alike: {_gained(gain)} in samples a second."]
    if gain.value < 1:
        return [f"Nothing here is faster than {single.name}: {best.name} is {_gained(gain)} as fast."]
    text = f"Fastest: {best.name}, {_gained(gain)} as fast as {single.name}"
    right = statistics.fmean(best.accuracies.values()) if best.accuracies else None
    text += f", {percent(right)} right" if right is not None else ""
    same = [each.name for each in others if (over := _faster(best, each)) is not None and _alike(over)]
    if same:
        text += f"; {same[0] if len(same) == 1 else counted(len(same), 'other plan')} "
        text += "is alike" if len(same) == 1 else "are alike"
    return [f"{text}."]


def _faster(of: Contender, to: Contender, *, plans: int = 1) -> Ratio | None:
    return ratio(of.speeds, to.speeds, noisy=of.noisy | to.noisy, plans=plans)


def _alike(gain: Ratio) -> bool:
    """Whether the runs show no difference; of one run each, whether it is one that noise makes of equal plans."""
    within = gain.contains(1.0)
    return abs(gain.value - 1) <= ALIKE if within is None else within


def _gained(gain: Ratio) -> str:
    return f"{gain.value:.2f}×{_interval(gain)}"


def _sentences(line: Line) -> list[str]:
    found = []
    if line.status == "refused":
        found.append(f"{_asked(line)} is refused: {line.reason}")
    elif line.failures:
        runs = line.failures + line.repeats
        found.append(f"{line.name} failed in {line.failures} of {runs} runs: {line.reason}")
    if _learns_less(line):
        base = line.base.accuracy if line.base else None
        found.append(f"{line.name} learns less: {percent(line.accuracy)} right against {percent(base)} of one worker.")
    if line.speed_up is None or line.efficiency is None or line.cores_used == 1:
        return found
    if line.speed_up < 1 - ALIKE:
        found.append(
            f"{line.name} is slower than one worker with {_threads(line.base)} ({line.speed_up:.2f}×): {_why(line)}."
        )
    elif line.efficiency < EFFICIENT:
        found.append(f"{line.name} gains only {line.speed_up:.2f}× from {line.cores_used} cores: {_why(line)}.")
    elif line.efficiency > SUPERLINEAR:
        found.append(
            f"{line.name} gains {line.speed_up:.2f}× from {line.cores_used} cores, more than there can be by dividing "
            "work: smaller shares fit the caches better, or the base was disturbed."
        )
    return found


def _asked(line: Line) -> str:
    table = {k.removeprefix("plan.").removeprefix("task."): v for k, v in _factors(line).items()}
    return ", ".join(f"{k}={v}" for k, v in table.items()) or line.name


def _factors(line: Line) -> dict[str, object]:
    tables = {"task": line.cell.task, "plan": line.cell.plan}
    return {f: tables[f.partition(".")[0]].get(f.partition(".")[2]) for f in line.cell.factors}


def _why(line: Line) -> str:
    """The largest reason that the parts of the step give."""
    if _whole_batch(line):
        return "every worker computes the whole batch, by design; only the update is divided"
    parts = line.parts_s or StepParts()
    total = parts.compute + parts.communicate + parts.wait + parts.update
    share = (parts.communicate + parts.wait) / total if total else 0.0
    if share >= 0.2:
        return f"communication and waiting are {100 * share:.0f} % of its step"
    alone = line.base.parts_s.compute if line.base and line.base.parts_s else 0.0
    if line.workers == 1:
        return "torch divides each operation over threads: too short for that, or the cores are not this study's alone"
    if alone and parts.compute > 0.75 * alone:
        return (
            f"computing a share takes {1e3 * parts.compute:.2g} ms where the whole takes {1e3 * alone:.2g} ms: too "
            "short to divide, or the cores are not this study's alone"
        )
    return "no part of the step stands out; the cores share caches and memory"


def _whole_batch(line: Line) -> bool:
    try:
        return bool(getattr(line.cell.make()[1].strategy, "whole_batch", False))
    except BadInput:
        return False


def _learns_less(*lines: Line) -> bool:
    """Whether accuracies are below those of the bases by more than chance makes them, in the mean over the lines."""
    known = [
        (line.accuracy, line.base.accuracy)
        for line in lines
        if line.accuracy is not None and line.base is not None and line.base.accuracy is not None
    ]
    if not known:
        return False
    mine, theirs = (statistics.fmean(values) for values in zip(*known, strict=True))
    return theirs - mine > margin(mine, theirs, tested(lines[0])) * (1 + 1e-9)  # 0.95 − 0.94 is a little more than 0.01


def _interval(of: Estimate | None) -> str:
    return f" [{of.low:.2f} … {of.high:.2f}]" if of is not None and of.low is not None and of.high is not None else ""


def _threads(line: Line | None) -> str:
    return counted(line.threads or 1 if line else 1, "thread")


def _noise(line: Line) -> float:
    """The slowest repeat over the fastest; of what is oversubscribed no time means anything."""
    medians = [step for _, step in line.medians_s]
    steady = line.oversubscribed or len(medians) < 2 or min(medians) <= 0
    return 1.0 if steady else max(medians) / min(medians)
