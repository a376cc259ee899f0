"""The noise of the update that a plan applies: how much it varies from batch to batch at one place.

    u = θ_before − θ_after      with plain SGD of learning rate 1: the gradient that the strategy applies
    E|u|²                       its mean square over draws of the batch
    tr Cov u                    its variance, over all parameters together
    |E u|²                      the square of the true gradient: |mean u|² − tr Cov u / draws

By the strategies' own code on the simulated transport, from the same parameters at every draw, with the next batch of
the task's order each time, so that it works for every strategy. With workers that average (McCandlish et al. 2018,
arXiv:1812.06162, appendix A.1) tr Cov u = tr Σ / B, Σ the covariance of one sample's gradient and B the global batch.

The place is where plain training on one worker stands after the task's own steps or epochs, with its own optimizer and
schedule; ``steps`` of the task says how far on the way. That training takes batches of `PLACE_BATCH` whatever the
task's, so that cells of every batch and every number of workers are measured at the same place.

Approximations: an epoch's batches are drawn without replacement, which makes the variance smaller by up to the share of
the data that one batch is; and θ is rounded to its own digits, in float32 to some 6e-8 |θ|, which adds about
4e-15 |θ|² to the variance: nothing unless |u| is a millionth of |θ|. A strategy that remembers earlier steps remembers
those of earlier draws.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyhands import models, verbs
from manyhands.checks import is_whole
from manyhands.contract import Batch
from manyhands.errors import BadInput
from manyhands.plan import Plan
from manyhands.task import Task
from manyhands.training.member import Member
from manyhands.training.preparation import prepare
from manyhands.training.run import Options, Run
from manyhands.training.team import team

#: Batches. A variance from so many has a standard error of 18 % where one direction holds it all, and less the more
#: directions share it.
DRAWS = 64
#: Batch of the training that leads to the place.
PLACE_BATCH = 100

JOB = f"{__name__}:job"


@dataclass(frozen=True)
class Noise:
    """What varies, and by how much; squares are in the unit of the squared gradient, summed over all parameters."""

    batch: int  # samples of one step, over all workers
    workers: int
    draws: int
    parameters: int
    mean_square: float
    square_of_mean: float  # unbiased, so that it may be below 0 where noise drowns the gradient
    variance: float  # unbiased

    def as_dict(self) -> dict[str, float]:
        """Plain values only, ready for JSON."""
        return dataclasses.asdict(self)


def measure(task: Task, plan: Plan, *, draws: int = DRAWS, data_dir: str | os.PathLike[str] | None = None) -> Noise:
    """The noise of ``plan``'s update at the place where ``task`` leads.

    Raises `BadInput` where the plan cannot work, and for a live model, which every rank would share.
    """
    if not is_whole(draws, 2):
        raise BadInput(f"draws={draws!r}: a variance needs a whole number of draws from 2. E.g. draws={DRAWS}.")
    if isinstance(task.model, torch.nn.Module):
        raise BadInput("the noise of a live model: every worker makes its own. Name a factory, my_pkg.module:factory.")
    decided = verbs.resolved(task, plan).plan
    assert decided.workers is not None
    folder = None if data_dir is None else os.fspath(data_dir)
    place = _place(task, folder)

    def model(inputs: tuple[int, ...] | None = None, classes: int | None = None) -> torch.nn.Module:
        made = models.build(task.model, inputs=inputs, classes=classes)
        made.load_state_dict(place)
        return made

    measured = dataclasses.replace(
        task, model=model, optimizer="sgd(lr=1.0)", schedule=None, clip=None, seconds=None, target_accuracy=None
    )
    on = dataclasses.replace(decided, transport="simulated", device="cpu")
    with team("simulated", decided.workers, threads=decided.threads, live=(measured, on)) as crew:
        found = crew.run(JOB, draws, folder)[0]
    assert isinstance(found, Noise)
    return found


def _place(task: Task, data_dir: str | None) -> Mapping[str, Tensor]:
    said = dataclasses.replace(task, batch_size=PLACE_BATCH, seconds=None, target_accuracy=None)
    fields = tuple((f.name, getattr(said, f.name)) for f in dataclasses.fields(said))
    named = all(value is None or isinstance(value, str | int | float) for _, value in fields)
    return (_trained if named else _trained.__wrapped__)(fields, data_dir)


@functools.lru_cache(maxsize=1)  # the cells of a grid differ in the plan and follow each other
def _trained(fields: tuple[tuple[str, Any], ...], data_dir: str | None) -> Mapping[str, Tensor]:
    alone = Plan(workers=1, threads=1, transport="single", device="cpu")  # one thread: the same place everywhere
    return verbs.train(Task(**dict(fields)), alone, data_dir=data_dir, evaluate="never", progress=False).state


def job(member: Member, draws: int, data_dir: str | None) -> Noise | None:
    """One rank's part; rank 0 has the result."""
    task, plan = member.live
    run = prepare(member, task, plan, Options(data_dir=data_dir, evaluate="never", progress=False))
    comm, full = run.comm, min(run.sampler.batch_size, run.sampler.n)
    parameters = [piece.flat.clone() for piece in run.replica.pieces]
    buffers = [buffer.clone() for buffer in run.replica.buffers]
    moments = Moments(sum(flat.numel() for flat in parameters))
    for share in run.sampler.batches(steps=sys.maxsize):
        if share.global_count != full:  # an epoch's last batch, if it is short
            continue
        _restore(run, parameters, buffers)
        comm.step = share.before.step
        inputs, target = run.splits.train.rows(share.indices)
        run.worker.step(Batch(inputs, target, len(share.indices)))
        with comm.counting("consensus"):
            agreed = run.worker.consensus()
        moments.add(torch.cat([a.double() - b.double() for a, b in zip(parameters, agreed, strict=True)]))
        if moments.count == draws:
            break
    comm.step = None
    if comm.rank != 0:
        return None
    variance = moments.variance
    return Noise(
        batch=full,
        workers=comm.size,
        draws=draws,
        parameters=moments.mean.numel(),
        mean_square=moments.mean_square,
        square_of_mean=float(moments.mean.dot(moments.mean)) - variance / draws,
        variance=variance,
    )


def _restore(run: Run, parameters: list[Tensor], buffers: list[Tensor]) -> None:
    """Back to the place on every rank: memory that is common is written once, while nobody computes in it."""
    comm = run.comm
    with comm.counting("control"):
        comm.barrier()
        for piece, flat in zip(run.replica.pieces, parameters, strict=True):
            if comm.rank == 0 or not comm.is_common(piece.flat):
                piece.flat.copy_(flat)
        for buffer, value in zip(run.replica.buffers, buffers, strict=True):
            buffer.copy_(value)
        comm.barrier()
        run.worker.rebase()


class Moments:
    """Mean and total variance of vectors, one at a time and in float64 (Welford 1962, Technometrics 4(3))."""

    def __init__(self, numel: int) -> None:
        self.count = 0
        self.mean = torch.zeros(numel, dtype=torch.float64)
        self._around_mean = self._square = 0.0

    def add(self, vector: Tensor) -> None:
        """One more."""
        self.count += 1
        before = vector - self.mean
        self.mean += before / self.count
        self._around_mean += float(before.dot(vector - self.mean))
        self._square += float(vector.dot(vector))

    @property
    def variance(self) -> float:
        """Summed over the elements, unbiased."""
        return self._around_mean / (self.count - 1)

    @property
    def mean_square(self) -> float:
        """Of the vectors' length."""
        return self._square / self.count
