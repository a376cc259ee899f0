"""What a person should notice in a study, in sentences computed from its lines."""

from __future__ import annotations

from collections.abc import Sequence

from manyhands.contract import StepParts
from manyhands.errors import BadInput
from manyhands.studies.contenders import Contender, counted
from manyhands.studies.fits import Estimate
from manyhands.studies.summary import Line
from manyhands.studies.table import percent

#: Below this a plan counts as slower than one worker; closer to 1 it is noise on an ordinary machine.
SLOWER = 0.97
#: Of the cores a plan uses, at least this share should come back as speed.
EFFICIENT = 0.5
#: Beyond linear by more than this is worth doubting.
SUPERLINEAR = 1.1
#: The slowest repeat's median step over the fastest's.
NOISY = 1.25
#: Accuracy below the base's; a point is some three standard errors of a test set of 10,000 at 95 %.
LEARNS_LESS = 0.01
#: Load average over cores. The study itself keeps all cores busy, which is 1.
BUSY = 1.5


def findings(lines: Sequence[Line]) -> list[str]:
    """How far the figures can be trusted, the fastest plan, then a sentence for each surprise."""
    return [*_disturbances(lines), *_fastest(lines), *(sentence for line in lines for sentence in _sentences(line))]


# -- sentences for the top of a report, at most one each ---------------------------------------------------------------


def fastest(lines: Sequence[Line]) -> list[str]:
    """The fastest plan that learns, against one worker and against one process with all threads."""
    return _fastest(lines)


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
    cores, load = max(line.cores for line in done), max(line.load_average for line in done)
    said = [_repeats(done)]
    if noisy:
        said.append(f"{noisy} of {runs} runs were disturbed by other work, also when repeated, so take times lightly")
    elif load > BUSY * cores:
        said.append(f"the machine had other work (load average up to {load:.1f} on {counted(cores, 'core')})")
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
    seeds = {line.cell.task.get("seed", 0) for line in done}
    least, most = min(line.repeats for line in done), max(line.repeats for line in done)
    if most == 1 and len(seeds) == 1:
        return "Every plan ran once, so that nothing tells a difference from noise"
    often = "once" if most == 1 else f"{most} times" if least == most else f"{least} to {most} times"
    return f"Every plan ran {often}" + (f" with each of {len(seeds)} seeds" if len(seeds) > 1 else "")


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


def _disturbances(lines: Sequence[Line]) -> list[str]:
    found = []
    load = max((line.load_average for line in lines), default=0.0)
    cores = max((line.cores for line in lines), default=1)
    if load > BUSY * cores:
        found.append(
            f"The machine had other work: load average up to {load:.1f} on {cores} core{'' if cores == 1 else 's'}. "
            "Take the times lightly."
        )
    noisy = [line for line in lines if _noise(line) > NOISY]
    if noisy:
        worst = max(noisy, key=_noise)
        found.append(
            f"{len(noisy)} of {len(lines)} cells are noisy, most of all {worst.name}: its slowest repeat took "
            f"{_noise(worst):.1f} times its fastest."
        )
    return found


def _fastest(lines: Sequence[Line]) -> list[str]:
    able = [line for line in lines if line.speed_up and line.base and not _learns_less(line)]
    best = max(able, key=lambda line: line.samples_per_s or 0.0, default=None)
    if best is None or best.base is None or len(able) == 1:
        return []
    if best.workers == 1:
        return [f"Nothing here is faster than one process with {_threads(best)}: {best.name}."]
    against = f"{best.speed_up:.2f}×{_interval(best.speed_up_interval)} one worker with {_threads(best.base)}"
    alone = [line for line in able if line.workers == 1 and line.base is best.base]
    single = max(alone, key=lambda line: line.samples_per_s or 0.0, default=best.base)
    if single.cores_used > best.base.cores_used and single.samples_per_s and best.samples_per_s:
        against += f" and {best.samples_per_s / single.samples_per_s:.2f}× one process with {_threads(single)}"
    right = f", {percent(best.accuracy)} right" if best.accuracy is not None else ""
    return [f"Fastest: {best.name}, {against}{right}."]


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
    if line.speed_up < SLOWER:
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


def _learns_less(line: Line) -> bool:
    if line.base is None or line.accuracy is None or line.base.accuracy is None:
        return False
    return line.accuracy < line.base.accuracy - LEARNS_LESS


def _interval(of: Estimate | None) -> str:
    return f" [{of.low:.2f} … {of.high:.2f}]" if of is not None and of.low is not None and of.high is not None else ""


def _threads(line: Line | None) -> str:
    threads = line.threads or 1 if line else 1
    return f"{threads} thread{'' if threads == 1 else 's'}"


def _noise(line: Line) -> float:
    medians = [step for _, step in line.medians_s]
    return max(medians) / min(medians) if len(medians) > 1 and min(medians) > 0 else 1.0
