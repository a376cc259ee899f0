"""A pipeline's rank at work without its neighbours: it is handed examples of what they would send.

What comes from the stage before is what that stage makes of a micro-batch, computed once beforehand; what comes back
is ones; what it sends is copied, as into a slot. So a rank runs its own row of the schedule, action by action, as fast
as it can, and every action's time is noted, from the end of the one before to its own: with what it hands over and all
that Python does. What comes after a batch's last action, of PipeDream its update, is the action `END`. A pipeline's
step is made of that, without its waiting (see `partition.pipeline.schedule.makespan`).
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.contract import rows_of
from manyhands.partition.pipeline.handover import Form
from manyhands.partition.pipeline.replica import PipelineReplica
from manyhands.partition.pipeline.schedule import Action, Schedule
from manyhands.simulation.mirror import Spent

#: The kind of what a rank does once its row's last action has handed over, told with that action's stage.
END = "end"

#: ``(outputs, whether it is a tensor alone)`` of a stage.
Handed = tuple[list[Tensor], bool]


class FedHandover:
    """Stands in for `Handover` on one rank."""

    def __init__(self, schedule: Schedule, examples: dict[tuple[int, int], Handed]) -> None:
        self._schedule, self._examples = schedule, examples
        self._rank_of = schedule.stage_rank
        self._here: dict[tuple[int, int], list[Tensor]] = {}
        self._slots: dict[tuple[int, torch.Size], Tensor] = {}
        #: Bytes of a micro-batch that went over each boundary, forward and backward.
        self.sent_B: dict[int, int] = {}
        #: Told that a batch begins, that an action is over, and that the batch is.
        self.begun: Callable[[], None] = lambda: None
        self.over: Callable[[], None] = lambda: None
        self.ended: Callable[[], None] = lambda: None

    def begin(self, schedule: Schedule) -> None:
        """Nothing to prepare."""
        self.begun()

    def did(self, actions: int) -> None:
        """An action is over."""
        self.over()

    def finish(self, samples: int) -> None:
        """Nothing is under way."""
        self.ended()

    def send(self, stage: int, i: int, samples: int, tensors: Sequence[Tensor], form: Form) -> None:
        """See `Handover.send`: between stages of this rank it is handed on."""
        # The last batch of an epoch may be short, and it is a whole one that is told.
        self.sent_B[stage] = max(sum(t.nbytes for t in tensors), self.sent_B.get(stage, 0))
        if self._rank_of(stage + 1) == self._rank_of(stage):
            self._here[stage, i] = [t.detach() for t in tensors]
        else:
            self._put(stage, tensors)

    def receive(self, stage: int, i: int, samples: int) -> tuple[list[Tensor], Form]:
        """See `Handover.receive`."""
        kept = self._here.pop((stage - 1, i), None)
        tensors, alone = self._example(stage - 1, samples)
        given = tensors if kept is None else kept
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in given]
        return leaves, Form.of(leaves, [t.requires_grad for t in leaves], alone=alone)

    def send_gradients(self, stage: int, i: int, samples: int, gradients: Sequence[Any], form: Form) -> None:
        """See `Handover.send_gradients`."""
        if self._rank_of(stage - 1) != self._rank_of(stage):
            self._put(stage - 1, [g for g in gradients if g is not None])

    def _put(self, boundary: int, tensors: Sequence[Tensor]) -> None:
        for t in tensors:
            slot = self._slots.get((boundary, t.shape))
            if slot is None:
                slot = self._slots[boundary, t.shape] = torch.empty_like(t, requires_grad=False)
            slot.copy_(t.detach())

    def receive_gradients(self, stage: int, i: int, samples: int) -> list[Tensor]:
        """See `Handover.receive_gradients`."""
        return [torch.ones_like(t) for t in self._example(stage, samples)[0] if t.is_floating_point()]

    def _example(self, boundary: int, samples: int) -> Handed:
        """Of a short batch, at the end of an epoch, the first rows of a larger one's."""
        try:
            return self._examples[boundary, samples]
        except KeyError:
            most = max(n for b, n in self._examples if b == boundary)
            tensors, alone = self._examples[boundary, most]
            return [rows_of(t, 0, samples) for t in tensors], alone


class Actions:
    """How long each kind of action of each stage took, forwards that are done again in their backward.

    Without what a stage that is cut itself exchanges: ``mirrored`` has what those mirrors took so far.
    """

    def __init__(self, handover: FedHandover, mirrored: Spent) -> None:
        self._handover, self._mirrored = handover, mirrored
        self._seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
        self._kind, self._since = ("F", 0), 0.0
        self._mirrored_s = 0.0  # by then
        #: Of all actions so far.
        self.spent_s = 0.0
        handover.begun, handover.over, handover.ended = self._begun, self._over, self._ended

    def __call__(self, action: Action, began: float, ended: float) -> None:
        """This one has computed, as `Pipeline.observe` is told of it."""
        self._kind = action.kind, action.stage

    def _begun(self) -> None:
        self._since, self._mirrored_s = time.perf_counter(), self._mirrored.here_s

    def _over(self) -> None:
        since, mirrored_s = self._since, self._mirrored_s
        self._begun()
        took_s = self._since - since - (self._mirrored_s - mirrored_s)
        self._seconds[self._kind].append(took_s)
        self.spent_s += took_s

    def _ended(self) -> None:
        self._kind = END, self._kind[1]
        self._over()

    def clear(self) -> None:
        """Forget them."""
        self._seconds.clear()

    def sent_B(self) -> dict[int, int]:
        """Bytes of a micro-batch over each boundary after a stage of this rank."""
        return self._handover.sent_B

    def told(self) -> list[list[Any]]:
        """``[kind, stage, median seconds]``."""
        return [[kind, stage, statistics.median(each)] for (kind, stage), each in self._seconds.items()]


def feed(replica: PipelineReplica, every: Sequence[nn.Module], inputs: Any, count: int, *, mirrored: Spent) -> Actions:
    """Let ``replica`` run alone. ``every``: all stages of a model of its own; ``inputs``: a batch of ``count``."""
    schedule = replica.pipeline.schedule
    m = schedule.micro_batches
    sizes = {(k + 1) * count // m - k * count // m for k in range(m)} - {0}
    examples = {}
    with torch.no_grad():
        for samples in sizes:
            given = rows_of(inputs, 0, samples)
            for s, stage in enumerate(every[:-1]):
                given = stage(given)
                alone = isinstance(given, Tensor)
                examples[s, samples] = ([given] if alone else list(given)), alone
    handover = FedHandover(schedule, examples)
    replica.pipeline._handover = handover  # type: ignore[assignment]
    actions = Actions(handover, mirrored)
    replica.pipeline.observe = actions
    return actions
