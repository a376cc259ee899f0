"""A pipeline's rank at work without its neighbours: it is handed examples of what they would send.

What comes from the stage before is what that stage makes of a micro-batch, computed once beforehand; what comes back
is ones; what it sends is copied, as into a slot. So a rank runs its own row of the schedule, action by action, as fast
as it can, and every action's time is noted, from the end of the one before to its own: with what it hands over and all
that Python does. A pipeline's step is made of that, without its waiting (see `partition.pipeline.schedule.makespan`).
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
        #: Told that a batch begins, and that an action is over.
        self.begun: Callable[[], None] = lambda: None
        self.over: Callable[[], None] = lambda: None

    def begin(self, schedule: Schedule) -> None:
        """Nothing to prepare."""
        self.begun()

    def did(self, actions: int) -> None:
        """An action is over."""
        self.over()

    def finish(self, samples: int) -> None:
        """Nothing is under way."""

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
    """How long each kind of action of each stage took, forwards that are done again in their backward."""

    def __init__(self, handover: FedHandover) -> None:
        self._handover = handover
        self._seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
        self._kind, self._since = ("F", 0), 0.0
        #: Of all actions so far, what they took beside computing.
        self.beside_s = 0.0
        handover.begun, handover.over = self._begun, self._over

    def __call__(self, action: Action, began: float, ended: float) -> None:
        """This one has computed, as `Pipeline.observe` is told of it."""
        self._kind = action.kind, action.stage
        self.beside_s -= ended - began

    def _begun(self) -> None:
        self._since = time.perf_counter()

    def _over(self) -> None:
        now = time.perf_counter()
        self._seconds[self._kind].append(now - self._since)
        self.beside_s += now - self._since
        self._since = now

    def clear(self) -> None:
        """Forget them."""
        self._seconds.clear()

    def sent_B(self) -> dict[int, int]:
        """Bytes of a micro-batch over each boundary after a stage of this rank."""
        return self._handover.sent_B

    def told(self) -> list[list[Any]]:
        """``[kind, stage, median seconds]``."""
        return [[kind, stage, statistics.median(each)] for (kind, stage), each in self._seconds.items()]


def feed(replica: PipelineReplica, every: Sequence[nn.Module], inputs: Any, count: int) -> Actions:
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
    actions = Actions(handover)
    replica.pipeline.observe = actions
    return actions
