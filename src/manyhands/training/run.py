"""One rank's run under way, and how it is watched and kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from manyhands.communication.communicator import Communicator
from manyhands.contract import Worker
from manyhands.data import Splits
from manyhands.partition.data import DataReplica
from manyhands.plan import Plan
from manyhands.task import Task
from manyhands.training.model_difference import Signature
from manyhands.training.sampler import START, Cursor, Sampler


@dataclass(frozen=True)
class Options:
    """How a run is watched and kept; plain values that travel to workers."""

    out: str | None = None
    resume: bool = False
    data_dir: str | None = None
    evaluate: str | int = "epoch"  # epoch | end | never | every so many steps
    checkpoint: str | int = "epoch"  # epoch | end | every so many steps
    keep: int = 3
    progress: bool = True
    described: str = ""  # what plan.toml shall say
    data: list[Any] | None = None  # the launcher's `signature` of the data; None: rank 0's counts
    trace: str | None = None  # the file that shall tell who did what when


@dataclass
class Since:
    """This worker's training loss since the last record."""

    sums: bool  # the loss is a sum over samples; it is reported per sample, as in evaluation
    total: float = 0.0
    samples: float = 0

    def add(self, loss: float, count: float) -> None:
        """One more step: its loss, and the samples of a sum or what else the loss is a mean over."""
        self.total += loss if self.sums else loss * count
        self.samples += count

    def so_far(self) -> tuple[float, float]:
        """``(total, samples)``."""
        return self.total, float(self.samples)

    def begin(self, total: float = 0.0, samples: float = 0.0) -> None:
        """Count anew, or go on from what was."""
        self.total, self.samples = total, samples


@dataclass
class Run:
    """One rank's run under way."""

    task: Task
    plan: Plan
    options: Options
    comm: Communicator
    splits: Splits
    model: torch.nn.Module
    loss: Any
    replica: DataReplica
    worker: Worker
    schedule: Any
    sampler: Sampler
    since: Since
    ranks: list[int]  # of the workers that are left, as they were numbered at the start
    met: Communicator  # whom the worker meets, as far as the run has followed it
    whole: dict[str, Signature]  # the user's ``state_dict``, whatever part of it is here
    parameters: int  # elements of the user's model
    cursor: Cursor = START
    history: list[dict[str, Any]] = field(default_factory=list)
    trained_s: float = 0.0  # in steps, of the whole run; evaluations and checkpoints not counted
    cut_short: bool = False  # the newest record stands where the run ended, not where one was due
    resumed: dict[str, Any] | None = None  # which checkpoint was taken up, and which were not
    unsaved: str = ""  # why the newest checkpoint could not be written; on rank 0 only

    @property
    def at_full_length(self) -> bool:
        """Whether all epochs or steps are done."""
        epochs, steps = self.task.length["epochs"], self.task.length["steps"]
        return (epochs is not None and self.cursor.epoch >= epochs) or (steps is not None and self.cursor.step >= steps)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do. Between a resume and the first step the same on every rank."""
        seconds = self.task.seconds
        out_of_time = seconds is not None and self.trained_s >= seconds
        return self.at_full_length or out_of_time or self.reached_target

    @property
    def reached_target(self) -> bool:
        """Whether the newest accuracy is what was asked for. The same on every rank: it is everybody's."""
        target = self.task.target_accuracy
        found = self.history[-1]["test_accuracy"] if self.history else None
        return target is not None and found is not None and found >= target


def replicas(comm: Communicator) -> Communicator:
    """The ranks that hold the same part of the model as this one, each with batches of its own."""
    return comm.over(frozenset({"data"}))


def device_of(plan: Plan, comm: Communicator) -> str:
    """This rank's device; ranks beyond the GPUs share them in turn."""
    return f"cuda:{comm.rank % torch.cuda.device_count()}" if plan.device == "cuda" else "cpu"
