"""One runtime for every schedule: a rank does its list of actions, receives before them and sends after them.

*Guarantee*: gradients, loss and count are those of one worker that takes the same micro-batches one after the other,
and so those of the whole batch up to summation order, whatever the schedule; micro-batches may differ in size and are
weighted by their samples. BatchNorm normalises within a micro-batch, as it does there.

With ``recompute`` a forward keeps its inputs only and is done again before its backward (T. Chen, B. Xu, C. Zhang,
C. Guestrin, 2016, Training deep nets with sublinear memory cost, arXiv 1604.06174): a third more compute. Random
numbers and buffers are as in the first pass, so results are the same bit for bit. A forward whose backward follows at
once is not done twice.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from manyhands.communication.communicator import Communicator
from manyhands.contract import rows_of
from manyhands.errors import BadInput, CommunicationError
from manyhands.partition.backward import backward, backward_from
from manyhands.partition.pipeline.handover import DTYPES, Form, Handover
from manyhands.partition.pipeline.later import Later, inputs_first
from manyhands.partition.pipeline.schedule import Action, Schedule

_DOING = {"F": "forward", "B": "backward", "I": "backward (inputs)", "W": "backward (weights)"}


@dataclass(frozen=True)
class Outcome:
    """What the last stage knows after a batch.

    ``loss`` is the batch's mean (or sum), 0-dim; ``count`` the weight with which it enters a mean over replicas. All
    stages' gradients are still to be divided by ``divisor``: 1, unless the loss counts for itself, which is known only
    when all micro-batches are through.
    """

    loss: Tensor
    count: float
    divisor: float


@dataclass
class Times:
    """Where the time of this rank's last batch went. The rest of ``batch_s`` is sending and receiving."""

    batch_s: float = 0.0
    compute_s: float = 0.0  # in forwards and backwards
    wait_s: float = 0.0  # for other stages


class Apart(Protocol):
    """Micro-batches that are batches of their own, such as PipeDream's: each with its mean and its update."""

    def begin(self, order: Schedule) -> None:
        """A batch begins, in this order."""

    def around(self, action: Action) -> AbstractContextManager[None]:
        """Entered before an action of this rank, left when what it has made is where it belongs."""

    def objective(self, micro_batch: int, mean: Tensor, weight: float) -> Tensor:
        """What is differentiated, of a micro-batch's own mean and its weight: samples, or what the loss counted."""


def measured_bubble(times: Sequence[Times]) -> float:
    """The part of all ranks' time in which they did not compute, to be compared with `schedule.bubble`."""
    whole = len(times) * max(t.batch_s for t in times)
    return 1 - sum(t.compute_s for t in times) / whole if whole else 0.0


@dataclass
class _Held:
    """What a stage keeps of a micro-batch between forward and backward."""

    given: Any  # what the module was called with, for doing it again
    inputs: list[Tensor]  # its tensors, in the order of the form
    form: Form | None  # of the inputs; None at the first stage
    outputs: list[Tensor] = field(default_factory=list)  # those that a gradient comes for; empty if to be redone
    rng: Tensor | None = None
    later: Later | None = None


class Pipeline:
    """This rank's stages at work. All ranks of ``comm`` make one, with the same schedule and options.

    ``stages``: this rank's modules by stage number; each is called with what the one before returned, a tensor or a
    tuple of tensors. ``loss`` is needed where the last stage is. Gradients are added to the parameters' ``.grad``, in
    place where there is one. ``shares`` is into how many batches replicas divide one, by which a sum is scaled.
    ``autocast`` is entered around every forward.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        schedule: Schedule,
        comm: Communicator,
        loss: Callable[[Any, Any], Any] | None = None,
        *,
        recompute: bool = False,
        shares: int = 1,
        autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        _check(stages, schedule, comm, loss)
        self.stages, self.schedule, self.loss = dict(stages), schedule.validate(), loss
        #: None: gradients of all micro-batches add up to that of the batch.
        self.apart: Apart | None = None
        self.times = Times()
        #: Told of every action: when it began and when it had computed.
        self.observe: Callable[[Action, float, float], None] | None = None
        #: Most (stage, micro-batch) that were held at once so far.
        self.peak_in_flight = 0
        self._comm, self._recompute, self._shares, self._autocast = comm, recompute, shares, autocast
        self._handover = Handover(comm, schedule, keeps=schedule.splits_backward)
        self._last = schedule.stages - 1
        self._held: dict[tuple[int, int], _Held] = {}
        self._orders: dict[frozenset[int], Schedule] = {}  # by the micro-batches that have no samples
        self._at_once = _followed_at_once(schedule.rows[comm.rank])
        #: Whether a stage overwrites what it is given: a leaf, or what is to be done again. Its first forward tells.
        self._overwrites: dict[int, bool] = {}
        self._batch = _Batch(None, None, [], 0)

    def run(self, inputs: Any, target: Any, count: int, others: Collection[int] = ()) -> Outcome | None:
        """Forward and backward over one batch; the outcome where the last stage is, None elsewhere.

        ``inputs`` are looked at where the first stage is and ``target`` where the last is: pytrees of tensors whose
        leading dim is the sample, elsewhere None. ``count``, the number of samples, is the same on all ranks; 0 is
        allowed. The first batch with samples is collective over the group; every other rank must come for each.
        ``others``: how many samples other replicas have; only what is empty for all is left out, so that all do the
        same actions.
        """
        t0, waited = time.perf_counter(), self._comm.counters.wait_s
        self.times = Times()
        self._batch = _Batch(inputs, target, _divide(count, self.schedule.micro_batches), count)
        do = {"F": self._forward, "B": self._backward, "I": self._input_gradients, "W": self._weight_gradients}
        order = self._ordered({count, *others})
        self._handover.begin(order)
        if self.apart is not None:
            self.apart.begin(order)
        action: Action | None = None
        try:
            for done, action in enumerate(order.rows[self._comm.rank], 1):
                if self.apart is None:
                    do[action.kind](action.stage, action.micro_batch)
                    self._handover.did(done)
                    continue
                with self.apart.around(action):
                    do[action.kind](action.stage, action.micro_batch)
                    self._handover.did(done)
            action = None
            self._handover.finish(count)
        except CommunicationError as e:  # which stage and micro-batch it has met
            e.args = (f"{e} (pipeline: {_where(action)})",)
            raise
        except Exception as e:
            e.add_note(f"pipeline: {_where(action)}")
            raise
        assert not self._held, "a validated schedule holds nothing at its end"
        self.times.wait_s = self._comm.counters.wait_s - waited
        self.times.batch_s = time.perf_counter() - t0
        return self._batch.outcome() if self._last in self.stages else None

    def _ordered(self, counts: set[int]) -> Schedule:
        """The schedule without actions on micro-batches that have no samples, however many there are of ``counts``."""
        m = self.schedule.micro_batches
        if max(counts) >= m:
            return self.schedule
        empty = frozenset.intersection(*(_empty(count, m) for count in counts))
        if empty not in self._orders:
            self._orders[empty] = self.schedule.of([i for i in range(m) if i not in empty])
        return self._orders[empty]

    # -- actions -------------------------------------------------------------------------------------------------------

    def _forward(self, stage: int, i: int) -> None:
        lo, hi = self._batch.bounds[i]
        if lo == hi:  # another replica has some
            return
        if stage == 0:
            held = _Held(rows_of(self._batch.inputs, lo, hi), [], None)
        else:
            received, form = self._handover.receive(stage, i, hi - lo)
            held = _Held(received[0] if form.alone else tuple(received), received, form)
        self._held[stage, i] = held
        self.peak_in_flight = max(self.peak_in_flight, len(self._held))
        again = self._recompute and (stage, i) not in self._at_once
        t0 = time.perf_counter()
        if again:
            held.rng = _rng(held.given)
            with torch.no_grad():
                outputs, alone = self._compute(stage, i, held)
        else:
            outputs, alone = self._compute(stage, i, held)
        self._computed(Action("F", stage, i), t0)
        if stage == self._last:
            if not again:
                held.outputs = [x for x in outputs if x.requires_grad]
            return
        needs = [self._needs_gradient(stage, held, x) if again else x.requires_grad for x in outputs]
        if not again:
            held.outputs = [x for x, n in zip(outputs, needs, strict=True) if n]
        self._handover.send(stage, i, hi - lo, outputs, Form.of(outputs, needs, alone=alone))

    def _computed(self, action: Action, t0: float) -> None:
        now = time.perf_counter()
        self.times.compute_s += now - t0
        if self.observe is not None:
            self.observe(action, t0, now)

    def _compute(self, stage: int, i: int, held: _Held) -> tuple[list[Tensor], bool]:
        """The outputs of a stage, at the last one the objective; and whether it is a tensor alone."""
        given = held.given
        copies = []
        if self._overwrites.get(stage, True):
            given = torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, given)
            copies = [(t, t._version) for t in torch.utils._pytree.tree_leaves(given) if isinstance(t, Tensor)]
        with self._autocast():
            outputs = self.stages[stage](given)
            if stage not in self._overwrites:
                self._overwrites[stage] = any(t._version != version for t, version in copies)
            if stage == self._last:
                assert self.loss is not None
                return [
                    self._objective(i, self.loss(outputs, rows_of(self._batch.target, *self._batch.bounds[i])))
                ], True
        alone = isinstance(outputs, Tensor)
        handed = [outputs] if alone else outputs
        if not isinstance(handed, tuple | list) or not all(isinstance(x, Tensor) for x in handed):
            raise BadInput(
                f"Stage {stage} ({type(self.stages[stage]).__name__}) returned a {type(outputs).__name__}: stages hand "
                "over a tensor or a tuple of tensors. Cut where there is one."
            )
        for x in handed:
            if x.dtype not in DTYPES or x.layout is not torch.strided:
                raise BadInput(f"Stage {stage} returned {x.dtype} in {x.layout} layout, which no hand-over carries.")
        return list(handed), alone

    def _needs_gradient(self, stage: int, held: _Held, x: Tensor) -> bool:
        """Whether a gradient will be wanted of an output that was computed without a graph."""
        learns = any(p.requires_grad for p in self.stages[stage].parameters())
        return (x.is_floating_point() or x.is_complex()) and (learns or any(t.requires_grad for t in held.inputs))

    def _objective(self, i: int, result: Any) -> Tensor:
        """What this micro-batch adds to the objective; loss and count are added up once, in the first pass."""
        batch = self._batch
        lo, hi = batch.bounds[i]
        first = i not in batch.counted
        batch.counted.add(i)
        if isinstance(result, Tensor):
            objective = result * ((hi - lo) / batch.count)
            if first:
                batch.loss, batch.weight = batch.loss + objective.detach(), batch.weight + hi - lo
            return objective if self.apart is None else self.apart.objective(i, result, hi - lo)
        total: Tensor = result[0]
        if result[1] is None:
            if getattr(self.loss, "reduction", "mean") != "sum":
                raise BadInput(
                    "the loss returned (total, None), a sum over samples, but it has no reduction='sum'. Give it that "
                    "attribute (my_loss.reduction = 'sum'), or return a mean or (total, count)."
                )
            objective = total * self._shares
            if first:
                batch.loss, batch.weight = batch.loss + objective.detach(), 1.0
            return objective if self.apart is None else self.apart.objective(i, objective, 1.0)
        counted = float(result[1])
        if first:
            batch.counts_itself = True
            batch.loss, batch.weight = batch.loss + total.detach(), batch.weight + counted
        return total if self.apart is None else self.apart.objective(i, total / (counted or 1.0), counted)

    def _backward(self, stage: int, i: int) -> None:
        if (stage, i) not in self._held:
            return
        held, gradients = self._before_backward(stage, i)
        t0 = time.perf_counter()
        if held.outputs:
            if stage == self._last:
                backward(held.outputs[0])
            else:
                backward_from(tuple(held.outputs), tuple(gradients))
        held.outputs = []  # the graph ends here
        self._computed(Action("B", stage, i), t0)
        del self._held[stage, i]
        self._after_backward(stage, i, held, [x.grad for x in held.inputs])

    def _input_gradients(self, stage: int, i: int) -> None:
        held, gradients = self._before_backward(stage, i)
        t0 = time.perf_counter()
        wanted = [x for x in held.inputs if x.requires_grad]
        found, held.later = inputs_first(held.outputs, gradients or [None] * len(held.outputs), wanted)
        by_input = dict(zip(map(id, wanted), found, strict=True))
        held.outputs, held.given = [], None
        self._computed(Action("I", stage, i), t0)
        self._after_backward(stage, i, held, [by_input.get(id(x)) for x in held.inputs])
        held.inputs = []

    def _weight_gradients(self, stage: int, i: int) -> None:
        t0 = time.perf_counter()
        later = self._held.pop((stage, i)).later
        assert later is not None
        later.accumulate()
        self._computed(Action("W", stage, i), t0)

    def _before_backward(self, stage: int, i: int) -> tuple[_Held, list[Tensor]]:
        """What was held, with its graph, and the gradients of its outputs."""
        held = self._held[stage, i]
        if held.rng is not None:
            t0 = time.perf_counter()
            outputs = self._again(stage, i, held)
            held.outputs = [x for x in outputs if x.requires_grad]
            self._computed(Action("F", stage, i), t0)
        lo, hi = self._batch.bounds[i]
        return held, [] if stage == self._last else self._handover.receive_gradients(stage, i, hi - lo)

    def _after_backward(self, stage: int, i: int, held: _Held, gradients: Sequence[Tensor | None]) -> None:
        if held.form is not None:
            lo, hi = self._batch.bounds[i]
            self._handover.send_gradients(stage, i, hi - lo, gradients, held.form)

    def _again(self, stage: int, i: int, held: _Held) -> list[Tensor]:
        """The forward a second time, with its graph; random numbers and buffers afterwards as if it had not been."""
        now = _rng(held.given)
        buffers = [(b, b.clone()) for b in self.stages[stage].buffers()]
        assert held.rng is not None
        _set_rng(held.rng, held.given)
        try:
            outputs, _ = self._compute(stage, i, held)
        finally:
            _set_rng(now, held.given)
        for buffer, before in buffers:
            buffer.data.copy_(before)  # .data: the graph may hold the buffer, and must not take this for a change
        held.rng = None
        return outputs


@dataclass
class _Batch:
    """The batch under way."""

    inputs: Any
    target: Any
    bounds: list[tuple[int, int]]
    count: int
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    weight: float = 0.0
    counts_itself: bool = False
    counted: set[int] = field(default_factory=set)

    def outcome(self) -> Outcome:
        if self.counts_itself:
            divisor = self.weight or 1.0
            return Outcome(self.loss / divisor, self.weight, divisor)
        return Outcome(self.loss, float(self.weight), 1.0)


def _check(
    stages: Mapping[int, nn.Module], schedule: Schedule, comm: Communicator, loss: Callable[[Any, Any], Any] | None
) -> None:
    if schedule.ranks != comm.size:
        raise BadInput(f"a pipeline schedule for {schedule.ranks} ranks on {comm.size}: each has its own line in it.")
    wanted = list(schedule.stages_of(comm.rank))
    if sorted(stages) != wanted:
        raise BadInput(
            f"rank {comm.rank} of the pipeline was given stages {sorted(stages)}; of {schedule.stages} stages on "
            f"{schedule.ranks} ranks it holds {wanted}."
        )
    if loss is None and schedule.stages - 1 in stages:
        raise BadInput(
            "a pipeline without a loss: its last stage hands outputs to a loss. A model that returns its own loss "
            "cannot be cut; give the loss to the task and let the model return outputs."
        )


def _where(action: Action | None) -> str:
    if action is None:
        return "at the end of a batch"
    return f"in the {_DOING[action.kind]} of stage {action.stage}, micro-batch {action.micro_batch}"


def _divide(count: int, micro_batches: int) -> list[tuple[int, int]]:
    """Contiguous shares that differ by at most one sample; some are empty where there are too few samples."""
    return [(k * count // micro_batches, (k + 1) * count // micro_batches) for k in range(micro_batches)]


def _empty(count: int, micro_batches: int) -> frozenset[int]:
    return frozenset(k for k, (lo, hi) in enumerate(_divide(count, micro_batches)) if lo == hi)


def _followed_at_once(row: Sequence[Action]) -> set[tuple[int, int]]:
    """The (stage, micro-batch) whose backward comes right after the forward."""
    return {a[1:] for a, b in itertools.pairwise(row) if a.kind == "F" and b.kind in "BI" and a[1:] == b[1:]}


def _rng(near: Any) -> Tensor:
    """The state of the generator that a forward on ``near`` draws from."""
    device = _device(near)
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_rng(state: Tensor, near: Any) -> None:
    device = _device(near)
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _device(near: Any) -> torch.device:
    return next((x.device for x in torch.utils._pytree.tree_leaves(near) if isinstance(x, Tensor)), torch.device("cpu"))
