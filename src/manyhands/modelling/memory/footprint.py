"""What each worker of a plan holds at its peak, in parts, before anything is started.

    parameters, gradients, optimizer   exact, by dtype and by what is cut or shared out: `training.outline`
    activations                        what is live in forward, backward or evaluation (`liveness`); in a pipeline in
                                       the order of its schedule, so by the micro-batches in flight
    buffers                            of strategy and transport: centres, residuals, rows, frames, gathered units,
                                       stashed weights, what stages hand over (`rehearsal`, `timeline`)
    temporaries                        of the update
    mapped                             common memory beyond these: a worker reads in others' slots
    data                               the set in memory
    process                            interpreter, torch and the code of the kernels that run (`process`), measured
    allocator                          what malloc keeps beyond what is live (`heap`)

Two totals: ``tensors_B`` is what a device's memory must hold; ``resident_B`` is what a run's ``peak_memory_B`` will
say, the largest resident set on its way: loading, building, training with its evaluations.

Not seen: memory of NumPy's (compressors), of checkpoints while they are written, of an AMPNet graph's messages. A
network that a scheme cuts along the data axis is taken as if it were whole.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from manyhands.communication.topology import Mesh, shares
from manyhands.communication.transports.shared import STAGING_B
from manyhands.contract import Strategy
from manyhands.data import Splits
from manyhands.data.dataset import Arrays, tensors
from manyhands.modelling.memory import rehearsal, tracing
from manyhands.modelling.memory.liveness import peak_B
from manyhands.modelling.memory.parts import Footprint, Memory
from manyhands.modelling.memory.process import LARGE_B, Loaded, Process, loaded, process
from manyhands.modelling.memory.timeline import Held, replayed
from manyhands.modelling.memory.tracing import Traced
from manyhands.models import losses
from manyhands.partition.data import arguments
from manyhands.partition.pipeline import description as pipeline
from manyhands.partition.pipeline.pipedream import used
from manyhands.partition.pipeline.schedule import Action, Schedule, in_flight_of_stage
from manyhands.partition.pipeline.strategy import PipeDream
from manyhands.partition.sharded.units import units_of
from manyhands.partition.tensor import axis_of
from manyhands.plan import Plan
from manyhands.task import Task
from manyhands.training.outline import Part, outline

#: Where what workers exchange lies in memory that all of them see.
_COMMON = ("shared", "threads", "simulated")


def footprint(
    task: Task,
    plan: Plan,
    model: nn.Module,
    splits: Splits,
    *,
    evaluate: str | int = "epoch",
    data_dir: Path | None = None,
    measured: Process | None = None,
    data: Loaded | None = None,
) -> Memory:
    """Of a plan that is decided, for ``model`` as its factory made it, which is left as it is.

    ``evaluate`` as in `verbs.train`. ``measured`` and ``data``: of a worker's process and of the data set; by default
    of this machine, which are looked up or measured (two seconds each, once).
    """
    mesh, strategy = plan.mesh, plan.strategy
    assert isinstance(mesh, Mesh)
    assert isinstance(strategy, Strategy)
    look = _Look(task, plan, model, splits, mesh, strategy)
    parts = outline(task, plan, (), model, splits, ranks=look.ranks).parts
    traced = tracing.traced(task, plan, model, splits, rows=look.rows, evaluated=evaluate != "never")
    operators = {name for each in traced.learning for name in each.operators}
    adaptive = look.update.kept > 1
    base = measured or process(plan.transport, mesh.size)
    large = max(peak_B((*each.forward, *each.backward)) for each in traced.learning) >= LARGE_B
    process_B = base.running_B(operators, adaptive=adaptive, large=large)
    held = data or _data(task, splits, plan, data_dir)
    return Memory(tuple(look.of(part, traced, process_B, base.started_B or process_B, held) for part in parts))


_UNITS: weakref.WeakKeyDictionary[nn.Module, tuple[int, int]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Look:
    task: Task
    plan: Plan
    model: nn.Module
    splits: Splits
    mesh: Mesh
    strategy: Strategy

    # -- what the plan says --------------------------------------------------------------------------------------------

    @property
    def ranks(self) -> list[int]:
        """One of those that differ in their place along the data axis alone: the first, whose share is largest."""
        return [r for r in range(self.mesh.size) if self.mesh.coordinates(r).get("data", 0) == 0]

    @property
    def replicas(self) -> int:
        return self.mesh["data"]

    @functools.cached_property
    def rows(self) -> int:
        """Samples of a step."""
        whole = self.strategy.whole_batch or axis_of(self.plan.tensor) == "data"
        size = min(self.task.batch_size, len(self.splits.train))
        return size if whole else max(shares(size, self.replicas)[0][1], 1)

    @functools.cached_property
    def pipelined(self) -> bool:
        return self.mesh["pipeline"] > 1

    @functools.cached_property
    def schedule(self) -> Schedule | None:
        if not self.pipelined and not isinstance(self.strategy, PipeDream):
            return None
        assert self.plan.micro_batches is not None
        said = pipeline.parse(self.plan.pipeline, self.strategy)
        return said.made(self.mesh["pipeline"], self.plan.micro_batches)

    @functools.cached_property
    def common(self) -> bool:
        """Whether workers see each other's memory, and there is somebody to see it."""
        return self.plan.transport in _COMMON and self.mesh.size > 1

    @functools.cached_property
    def update(self) -> rehearsal.Update:
        return rehearsal.update(self.task.optimizer)

    @property
    def sharded(self) -> int:
        return (self.plan.shard or 0) if (self.plan.shard or 0) > 1 and self.replicas > 1 else 0

    # -- a worker ------------------------------------------------------------------------------------------------------

    def of(self, part: Part, traced: Traced, process_B: int, started_B: int, data: Loaded) -> Footprint:
        """One worker, of which `outline` has told what it has."""
        found = replayed(self._held(part, traced))
        mapped_B = self._mapped_B(part, traced)
        stands_B = part.parameters_B + part.gradients_B + self._beside_B(part)
        tuned = self.plan.allocator == "tuned"
        trained_B = stands_B + mapped_B + (found.reached_B if tuned else found.live_B)
        phases = {
            "training": process_B + data.kept_B + trained_B,
            "building": process_B + data.kept_B + self._building_B(part),
            "loading": started_B + data.peak_B,
        }
        phase = max(phases, key=lambda name: phases[name])
        parts = {k: found.parts_B.get(k, 0) for k in ("optimizer", "activations", "buffers", "temporaries")}
        return Footprint(
            rank=part.rank,
            parameters_B=part.parameters_B,
            gradients_B=part.gradients_B,
            optimizer_B=parts["optimizer"],
            activations_B=parts["activations"],
            buffers_B=parts["buffers"] + self._beside_B(part),
            temporaries_B=parts["temporaries"],
            mapped_B=mapped_B,
            data_B=data.kept_B,
            process_B=process_B,
            allocator_B=max(found.reached_B - found.live_B, 0) if tuned else 0,
            resident_B=phases[phase],
            phase=phase,
        )

    def _held(self, part: Part, traced: Traced) -> Held:
        plan, strategy, schedule = self.plan, self.strategy, self.schedule
        learnt = self._learnt_B(part)
        own_B = sum(learnt.values())
        stages = {s: traced.learning[s] for s in part.stages} if self.pipelined else {0: traced.learning[0]}
        if schedule is None:
            m = max(min(plan.micro_batches or 1, self.rows), 1)
            actions = [Action(kind, 0, i) for i in range(m) for kind in ("F", "B")]
        else:
            actions = list(schedule.rows[schedule.stage_rank(part.stages[0])])
        alone = self.replicas == 1
        copies = rehearsal.copies(strategy, self.replicas) if _keeps(strategy) and not alone else rehearsal.Copies()
        ends = part.stages[0] == 0 if self.pipelined else True
        replicated = _replicates(strategy)
        framed = plan.transport == "gloo" and replicated and not alone and not self.sharded
        return Held(
            batch_B=traced.batch_B if ends else 0,
            actions=actions,
            stages=stages,
            learnt_B=learnt,
            update=self.update,
            updated=part.optimizer_B / (own_B * self.update.kept) if self.update.kept and own_B else self._updated(),
            recompute=plan.recompute,
            by_message=self.pipelined and not self.common,
            kept_B=int(copies.kept * own_B),
            taken_B=int(copies.taken * own_B) + self._taken_B(own_B, framed=framed),
            framed=framed and schedule is None,
            gathered_B=self._gathered_B(),
            whole_B=sum(self._units_B) if self.sharded == 3 and not self.common else 0,
            stashed=self._stashed(part),
            agreed_B=int(copies.agreed * own_B),
            carried_B=own_B if copies.agreed and plan.transport == "gloo" else 0,
            answers=[(*a.forward, *a.backward) for a in (traced.answering[s] for s in part.stages if traced.answering)],
            chunk_B=traced.chunk_B,
        )

    def _learnt_B(self, part: Part) -> dict[str, int]:
        """Of the parameters that it trains, how large they are here."""
        sizes = {n: p.nbytes for n, p in self.model.named_parameters() if p.requires_grad and n in part.holds}
        whole = sum(sizes.values())
        return {n: size * part.gradients_B // whole for n, size in sizes.items()} if whole else sizes

    def _updated(self) -> float:
        """Of what it holds, the part that it updates."""
        shared = self.strategy.parameters == "common" and self.strategy.lockstep and not self.sharded
        return 1 / self.replicas if shared else 1.0

    def _taken_B(self, own_B: int, *, framed: bool) -> int:
        """What the transport takes for an exchange of gradients, or parameters, of so many bytes."""
        if self.replicas == 1 or self.common or self.sharded:
            return 0
        p = self.replicas
        if self.strategy.parameters == "common":  # reduce-scatter: everybody's slice for this worker
            return own_B * (p - 1) // p if self.plan.transport == "gloo" else own_B // p
        if self.plan.transport != "gloo" or (framed and self.schedule is None):
            return 0
        return own_B

    def _stashed(self, part: Part) -> int:
        if not isinstance(self.strategy, PipeDream) or self.schedule is None:
            return 0
        return len(used(self.schedule, part.stages[0], vertical_sync=self.strategy.vertical_sync).outlived)

    # -- common memory, and what is gathered ---------------------------------------------------------------------------

    @functools.cached_property
    def _units_B(self) -> tuple[int, int]:
        """Of a model whose units come and go: the largest, and what is kept throughout."""
        if self.model not in _UNITS:
            _UNITS[self.model] = self._watched_units_B()
        return _UNITS[self.model]

    def _watched_units_B(self) -> tuple[int, int]:
        sizes = {n: p.nbytes for n, p in self.model.named_parameters() if p.requires_grad}
        given = arguments(*self.splits.train.rows(torch.tensor([0])), losses.build(self.task.loss))
        units = units_of(self.model, given, evaluated=self.task.loss is not None)
        largest = max((sum(sizes[n] for n in unit.parameters) for unit in units.units), default=0)
        return largest, sum(sizes[n] for n in units.kept)

    def _gathered_B(self) -> int:
        """Parameters that are whole for a while, and the slices of their gradients that come from others."""
        if not self.sharded or self.common:
            return 0
        largest, kept = self._units_B
        others = largest * (self.replicas - 1) // self.replicas
        return others + (largest + kept if self.sharded == 3 else 0)

    def _beside_B(self, part: Part) -> int:
        """Tensors that stand from the beginning to the end: room for a unit's gradients, slots of hand-overs, buffers
        of the model's own.
        """
        found_B = sum(b.nbytes for b in self.model.buffers())
        if self.sharded:
            largest, kept = self._units_B
            found_B += 2 * largest + kept
        return found_B

    def _mapped_B(self, part: Part, traced: Traced) -> int:
        """Of the memory that all workers of a host see, what is not a worker's own and yet in its resident set."""
        if not self.common:
            return 0
        p, own_B = self.replicas, part.gradients_B
        found_B = own_B * (p - 1) // p if p > 1 else 0  # the slices of others that it adds, of gradients or parameters
        if self.sharded:
            largest, kept = self._units_B
            found_B = (2 * largest + kept) * (p - 1) // p
            whole_B = sum(x.nbytes for x in self.model.parameters())
            found_B += whole_B - part.parameters_B  # there is one copy, and this worker reads all of it
        elif not self.strategy.lockstep and p > 1:
            found_B += min(own_B, STAGING_B) * (1 if own_B <= STAGING_B else 2) * (2 * p - 1) // p
        if self.schedule is not None and self.pipelined:
            for stage in part.stages:
                for boundary in (stage, stage + 1):
                    if 0 < boundary < self.schedule.stages:
                        slots = in_flight_of_stage(self.schedule, boundary - 1)
                        found_B += slots * traced.learning[boundary].inputs_B
        return found_B

    def _building_B(self, part: Part) -> int:
        """The model as its factory makes it, beside the vectors that its parameters are laid into."""
        whole_B = sum(x.nbytes for x in (*self.model.parameters(), *self.model.buffers()))
        laid_B = part.parameters_B + (0 if self.plan.transport in _COMMON else part.gradients_B)
        if self.sharded and self.common:
            laid_B = whole_B
        return whole_B + laid_B


def _keeps(strategy: Strategy) -> bool:
    """Whether it may have copies of its own: plain averaging of gradients has none."""
    plain = strategy.averages_gradients and getattr(strategy, "compress", "none") == "none"
    return not plain and not isinstance(strategy, PipeDream)


def _replicates(strategy: Strategy) -> bool:
    """Whether gradients leave as they become final."""
    return strategy.averages_gradients and strategy.parameters == "own" and not _keeps(strategy)


def _data(task: Task, splits: Splits, plan: Plan, folder: Path | None) -> Loaded:
    """Of text as a worker loads it; of what is given, its tensors."""
    order_B = 8 * len(splits.train)  # of an epoch
    copies = plan.workers or 1 if plan.transport in ("threads", "simulated") else 1
    if isinstance(task.data, str):
        found = loaded(task.data, folder)
        return Loaded(copies * (found.kept_B + order_B), copies * found.peak_B)
    kept_B = sum(
        sum(x.nbytes for x in (*tensors(part.inputs), *tensors(part.target)))
        for part in (splits.train, splits.test)
        if isinstance(part, Arrays)
    )
    return Loaded(kept_B + order_B, kept_B)
