"""Workers that break down: restarts, lost work, checkpoints, and how often one should write them.

All workers stop when one fails, and go on from the last checkpoint. Failures come as a Poisson process, each worker's
with mean time ``mtbf_s`` between two of them; a checkpoint is written after every ``every_s`` of work and takes
``checkpoint_s``, a restart ``restart_s``; failures strike during both, too. As a resume is exact, what is learned at a
point of the work is what it was: only the clock on the wall differs, so that this is a function of the run's own
virtual time, applied afterwards.

With M = mtbf / workers and δ = checkpoint_s the best interval is Daly's,

    τ = √(2δM) (1 + ⅓ √(δ/2M) + (1/9) δ/2M) − δ   for δ < 2M, else M

J. T. Daly (2006), A higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation
Computer Systems 22(3). The mean time that comes of an interval is a closed form, too (`published.checkpoint_interval`).
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from manyhands.calling import call
from manyhands.checks import is_positive
from manyhands.errors import BadInput
from manyhands.grammar import format_description, parse_call

#: Nobody waits for a job that gets nowhere: an attempt of τ + δ succeeds with e^{−(τ+δ)/M}.
HOPELESS = 1e-6


def daly_s(checkpoint_s: float, mtbf_s: float) -> float:
    """The interval of work between two checkpoints that loses least."""
    if checkpoint_s >= 2 * mtbf_s:
        return mtbf_s
    x = checkpoint_s / (2 * mtbf_s)
    return math.sqrt(2 * checkpoint_s * mtbf_s) * (1 + math.sqrt(x) / 3 + x / 9) - checkpoint_s


@dataclass(frozen=True)
class Failures:
    """All workers stop when one breaks down, once in ``mtbf_s`` each, and go on from the last checkpoint.

    A checkpoint is written after every ``every_s`` of work (0: Daly's interval) and takes ``checkpoint_s``, a restart
    ``restart_s``.
    """

    name: ClassVar[str] = "failures"

    mtbf_s: float = 365 * 86400.0  # of one worker
    checkpoint_s: float = 10.0
    restart_s: float = 60.0
    every_s: float = 0.0

    def __post_init__(self) -> None:
        if not is_positive(self.mtbf_s):
            raise ValueError(f"mtbf_s={self.mtbf_s!r}: the mean time between failures of a worker is a positive number")
        for key in ("checkpoint_s", "restart_s", "every_s"):
            value = getattr(self, key)
            if not (value == 0 or is_positive(value)):
                raise ValueError(f"{key}={value!r}: seconds, from 0")
        if not self.checkpoint_s and not self.every_s:
            raise ValueError("checkpoint_s=0 without every_s: the best interval would be none at all; give every_s")

    def __str__(self) -> str:
        return format_description(self.name, self)

    def interval_s(self, workers: int) -> float:
        """Work between two checkpoints."""
        return self.every_s or max(daly_s(self.checkpoint_s, self.mtbf_s / workers), 1e-9)


def failures_from(value: str | Failures) -> Failures:
    """From its text."""
    if isinstance(value, Failures):
        return value
    said = parse_call(value, kind="failures")
    if said.name != Failures.name:
        raise BadInput(f"failures {value!r}: the form is failures(mtbf_s=…, checkpoint_s=…, restart_s=…, every_s=…).")
    try:
        made = call("failures", said.name, Failures, said.args, said.kwargs)
    except ValueError as e:
        raise BadInput(f"failures {value}: {e}.") from None
    assert isinstance(made, Failures)
    return made


@dataclass(frozen=True)
class Wall:
    """When what was done: the work up to ``work_s[i]`` was safe at ``wall_s[i]``, both growing, from (0, 0) on."""

    work_s: list[float]
    wall_s: list[float]
    began_s: list[float]  # when the interval that ends at work_s[i] was begun for the last time
    failures: int
    lost_s: float  # work done more than once
    checkpoints_s: float
    restarts_s: float

    def at(self, work_s: float) -> float:
        """The clock on the wall when so much work was done for good."""
        i = min(max(bisect.bisect_left(self.work_s, work_s), 1), len(self.work_s) - 1)
        return self.began_s[i] + work_s - self.work_s[i - 1]

    @property
    def useful(self) -> float:
        """The part of the time that was work done for good."""
        return self.work_s[-1] / self.wall_s[-1] if self.wall_s[-1] else 1.0

    def as_dict(self) -> dict[str, float]:
        """For a summary."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[3:]}
        return {"wall_s": self.wall_s[-1], "useful": self.useful, **found}


def wall(work_s: float, failures: Failures, workers: int, seed: int) -> Wall:
    """``work_s`` of a run, with what breaks down on the way; deterministic by seed. No checkpoint follows the end."""
    mtbf_s, every_s = failures.mtbf_s / workers, failures.interval_s(workers)
    attempt = math.exp(-(min(every_s, work_s) + failures.checkpoint_s) / mtbf_s)
    if attempt < HOPELESS:
        raise BadInput(
            f"{failures} with {workers} workers: one of them fails every {mtbf_s:.3g} s, and an interval of "
            f"{every_s:.3g} s with its checkpoint is done without a failure {attempt:.1g} of the time. A job would not "
            "end. Use a shorter every_s, or workers that last longer."
        )
    generator = np.random.default_rng([seed, 0xFA11])
    now = done = lost = checkpoints = restarts = 0.0
    count = 0
    fails_at = float(generator.exponential(mtbf_s))
    works, walls, begun = [0.0], [0.0], [0.0]
    while done < work_s:
        part = min(every_s, work_s - done)
        saving = failures.checkpoint_s if done + part < work_s else 0.0
        began = now
        if fails_at < began + part + saving:
            count += 1
            lost += min(fails_at - began, part)
            now = fails_at
            while True:  # a restart may fail, too
                fails_at = now + float(generator.exponential(mtbf_s))
                if fails_at >= now + failures.restart_s:
                    break
                count += 1
                restarts += fails_at - now
                now = fails_at
            now += failures.restart_s
            restarts += failures.restart_s
            continue
        now = began + part + saving
        checkpoints += saving
        done += part
        works.append(done)
        walls.append(now)
        begun.append(began)
    return Wall(works, walls, begun, count, lost, checkpoints, restarts)
