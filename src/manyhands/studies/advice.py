"""Which plan to use: a target that one process reaches, what each plan took to reach it, and a choice.

    target       the task's own target_accuracy; else what every run of one process had at its end, less one point
                 (of several batches: at the one with which one process learns best)
    time         seconds of training until the target, interpolated between evaluations
    gain         time of the best single process / time of the plan, run by run, with Student's 95 % interval, widened
                 for as many plans as could have been the fastest (`contenders.mean_of`)
    it learns    its final accuracy is one process's, better, or less by no more than chance makes it (one point at
                 least, `charting.margin`), or, with three seeds and more, not significantly less; where the task says
                 a target: every run reached it

The plan with the largest gain wins, if its interval lies above 1. With three seeds and more that is an interval over
the seeds' means; with fewer it is over runs, and each seed's own mean must lie above 1 too. Where each plan ran once
there is no interval, and a gain must be beyond what noise makes of equal plans (`charting.NOISY`). A task without
accuracy goes by its test loss, and one without a test set by samples per second; the advice then says that nobody knows
what is learned.

Nothing that uses more cores than there are is advised.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from manyhands.studies.charting import ALIKE, LOSS_SHARE, NOISY, POINT, no_worse, tested
from manyhands.studies.contenders import SEEDS, Contender, Ratio, Run, by_seed, by_task, mean_of, ratio, task_of
from manyhands.studies.curves import Scale, last, reached_at, scale_of
from manyhands.task import DEFAULT_EPOCHS, Task

Learning = Literal["as much", "less", "unknown"]


@dataclass(frozen=True)
class Target:
    """What has been learned enough."""

    value: float
    scale: Scale
    told: bool  # by the task
    batch: int | None = None  # with which one process learns best

    @property
    def why(self) -> str:
        """Where it comes from."""
        if self.told:
            return "the task's target_accuracy"
        less = "one point" if self.scale == "test_accuracy" else f"{100 * LOSS_SHARE:.0f} %"
        return f"what every run of one process at batch {self.batch} had at its end, less {less}"


@dataclass(frozen=True)
class Judged:
    """A contender against the target and against the best single process."""

    plan: Contender
    samples: Mapping[Run, float] = field(default_factory=dict)  # to the target, of the runs that reached it
    seconds: Mapping[Run, float] = field(default_factory=dict)
    final: Mapping[Run, float] = field(default_factory=dict)  # accuracy or loss at the end
    learns: Learning = "unknown"
    reached: bool = True  # by every run, where there is a target
    gain: Ratio | None = None  # in time to the target, without one in samples/s; None: no claim about speed

    @property
    def mean_final(self) -> float | None:
        """Over its runs."""
        return statistics.fmean(self.final.values()) if self.final else None


@dataclass(frozen=True)
class Advice:
    """What to use, and why."""

    target: Target | None
    scale: Scale | None
    judged: tuple[Judged, ...]
    alone: Judged | None  # the best single process
    fastest: Judged | None = None  # of the plans of several workers that learn, by gain
    use: Judged | None = None  # what is advised: `fastest` or `alone`, None if neither is there

    @property
    def parallel(self) -> bool:
        """Whether several workers are advised."""
        return self.use is not None and not self.use.plan.alone


def advise(found: Sequence[Contender]) -> Advice:
    """See the file's head."""
    scale = _scale(found)
    target = _target(found, scale)
    judged = [_against_target(each, target, scale) for each in found]
    standard = _standard(judged, scale)
    judged = [replace(each, learns=_learns(each, standard, target, scale)) for each in judged]
    alone = _best_alone(judged)
    plans = sum(_able(each) and not each.plan.alone for each in judged)
    judged = [_compared(each, alone, target, plans) for each in judged]
    alone = next((each for each in judged if alone is not None and each.plan is alone.plan), None)
    able = [each for each in judged if not each.plan.alone and _able(each)]
    fastest = max(able, key=lambda j: _rank(j, target), default=None)
    return Advice(target, scale, tuple(judged), alone, fastest, _chosen(alone, fastest))


def _chosen(alone: Judged | None, fastest: Judged | None) -> Judged | None:
    if alone is None or fastest is None:
        return fastest or alone
    gain = fastest.gain
    if gain is None:
        return alone
    surely = gain.value >= NOISY if gain.low is None else gain.surely_more and gain.value > 1 + ALIKE
    return fastest if surely else alone


def _rank(judged: Judged, target: Target | None) -> float:
    if judged.gain is not None:
        return judged.gain.value
    # Only where no single process got there.
    return -statistics.fmean(judged.seconds.values()) if target is not None else judged.plan.samples_per_s


def _able(judged: Judged) -> bool:
    """Whether it may be advised at all."""
    return judged.learns != "less" and judged.reached and not judged.plan.oversubscribed and judged.plan.step_s > 0


# -- the target --------------------------------------------------------------------------------------------------------


def _scale(found: Sequence[Contender]) -> Scale | None:
    if found and all(each.accuracies for each in found):
        return "test_accuracy"
    return scale_of(row for each in found for row in each.rows.values())


def _finals(of: Contender, scale: Scale | None) -> dict[Run, float]:
    if scale == "test_accuracy":
        return of.accuracies
    if scale is None:
        return {}
    found = {run: last(row.history, scale) for run, row in of.rows.items()}
    return {run: value for run, value in found.items() if value is not None}


def _target(found: Sequence[Contender], scale: Scale | None) -> Target | None:
    told = next((v for each in found if (v := task_of(each).get("target_accuracy")) is not None), None)
    if told is not None:
        return Target(float(told), "test_accuracy", told=True)
    if scale is None:
        return None
    groups = by_task(each for each in found if each.alone)
    ends = {
        group: [last(row.history, scale) for each in plans for row in each.rows.values()]
        for group, plans in groups.items()
    }
    known = {group: [v for v in values if v is not None] for group, values in ends.items() if None not in values}
    if not known:
        return None
    if scale == "test_accuracy":
        chosen = max(known, key=lambda g: statistics.fmean(known[g]))
        value = min(known[chosen]) - POINT
    else:
        chosen = min(known, key=lambda g: statistics.fmean(known[g]))
        value = max(known[chosen]) * (1 + LOSS_SHARE)
    return Target(value, scale, told=False, batch=groups[chosen][0].batch)


def _against_target(of: Contender, target: Target | None, scale: Scale | None) -> Judged:
    final = _finals(of, scale)
    if target is None:
        return Judged(of, final=final)
    samples, seconds = {}, {}
    for run, row in of.rows.items():
        at = reached_at(row.history, target.value, target.scale, "samples")
        after = reached_at(row.history, target.value, target.scale, "train_s")
        if at is not None and after is not None:
            samples[run], seconds[run] = at, after
    return Judged(of, samples, seconds, final, reached=len(samples) == len(of.rows))


# -- what is learned ---------------------------------------------------------------------------------------------------


def _standard(judged: Sequence[Judged], scale: Scale | None) -> Mapping[Run, float]:
    """The final values of the single process that learns best."""
    alone = [each for each in judged if each.plan.alone and each.final]
    if not alone or scale is None:
        return {}
    pick = max if scale == "test_accuracy" else min
    return pick(alone, key=lambda j: j.mean_final or 0.0).final


def _learns(judged: Judged, standard: Mapping[Run, float], target: Target | None, scale: Scale | None) -> Learning:
    if target is not None and target.told:
        return "as much" if judged.reached else "less"
    if scale is None or not judged.final or not standard:
        return "unknown"
    mean = statistics.fmean(judged.final.values())
    if no_worse(mean, statistics.fmean(standard.values()), scale, tested(judged.plan.lines[0])):
        return "as much"
    mine, theirs = by_seed(judged.final), by_seed(standard)
    apart = {(seed, 0): mine[seed] - theirs[seed] for seed in mine if seed in theirs}
    mean_apart = mean_of(apart)
    return "as much" if mean_apart is not None and len(apart) >= SEEDS and mean_apart.contains(0.0) else "less"


# -- speed -------------------------------------------------------------------------------------------------------------


def pace(judged: Judged, target: Target | None) -> Mapping[Run, float]:
    """What is ranked, the less the better: seconds to the target, or of a sample where there is no target."""
    if target is not None:
        return judged.seconds
    return {run: 1 / speed for run, speed in judged.plan.speeds.items()}


def _best_alone(judged: Sequence[Judged]) -> Judged | None:
    able = [each for each in judged if each.plan.alone and _able(each)]
    if not able:
        return None
    return min(
        able,
        key=lambda j: statistics.fmean(j.seconds.values()) if j.seconds else 1 / j.plan.samples_per_s,
    )


def _compared(judged: Judged, alone: Judged | None, target: Target | None, plans: int) -> Judged:
    if alone is None or judged.plan.oversubscribed or not judged.reached:
        return judged
    noisy = alone.plan.noisy | judged.plan.noisy
    gain = ratio(pace(alone, target), pace(judged, target), noisy=noisy, plans=plans)
    return replace(judged, gain=gain)


# -- the command -------------------------------------------------------------------------------------------------------

#: Of a task and of a plan, what `manyhands train` takes as it is, in the order in which it is said.
_TASK = ("loss", "schedule", "clip")
_PLAN = ("transport", "mesh", "shard", "micro_batches", "buffers", "precision", "device", "allocator")


def command(of: Contender) -> str:
    """What trains by this plan: the text of a shell.

    Without a seed, as several stood for one plan, unless the study has one that is not the default.
    """
    line = of.lines[0]
    task, plan, default = line.cell.task, line.cell.plan, Task()
    said: dict[str, object] = {key: task.get(key, getattr(default, key)) for key in ("model", "data", "optimizer")}
    said |= {key: task[key] for key in _TASK if key in task}
    said |= {"strategy": line.strategy, "workers": of.workers, "threads": of.threads}
    said |= {key: plan[key] for key in _PLAN if key in plan and plan[key] != "auto"}
    if "timeout_s" in plan:
        said["timeout"] = plan["timeout_s"]
    said["batch_size"] = of.batch
    if "steps" in task:
        said["steps"] = task["steps"]
    else:
        said["epochs"] = task.get("epochs", DEFAULT_EPOCHS)
    said |= {key: task[key] for key in ("seconds", "target_accuracy") if key in task}
    if len(of.lines) == 1 and task.get("seed"):
        said["seed"] = task["seed"]
    words = [word for key, value in said.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return shlex.join(["manyhands", "train", *words])
