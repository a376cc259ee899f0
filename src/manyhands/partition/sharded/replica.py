"""A worker's model of which gradients, or parameters too, are shared out unit by unit; see the package's head.

Units are gathered and scattered in one order, the same on all ranks: forward as a watched forward pass of one sample
had it, backward the other way round. A rank that needs a later unit passes through those in between, so a branch that a
batch does not take, and a share without samples, cost the same exchanges and nobody waits for what does not come.

In backward a unit is due when the first gradient reaches one of its parameters, or when autograd unpacks one that it
has saved in forward, instead of which it has kept a note. Autograd goes through a graph in the opposite order of its
making, so all of the units before are done by then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.communication.communicator import Communicator
from manyhands.contract import BUCKET_B, Batch, Piece, rows_of
from manyhands.errors import BadInput
from manyhands.partition.backward import backward
from manyhands.partition.conjugate import told
from manyhands.partition.data import DataReplica, LastPass, arguments
from manyhands.partition.sharded.units import exchanged_B, units_of
from manyhands.partition.sharded.vector import Vector
from manyhands.partition.update import Span


@dataclass(frozen=True)
class _Note:
    """Instead of a tensor that autograd saves: where in a unit's parameters it lies."""

    vector: Vector
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int


class ShardedReplica(DataReplica):
    """`DataReplica` of this rank's slice of each parameter, along the data axis; wants all workers in every step.

    ``model`` has the same parameters on all ranks; each keeps its elements of them and gives back the others' memory.
    ``stage`` 2 or 3; ``sample``: inputs and target of one sample, with which the model is watched once. Where memory is
    shared there is one copy of the parameters, in which each rank updates its slice: gathering then moves nothing.
    Every worker returns the loss of all. Parameters that are not trained stay whole.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[..., Any] | None,
        comm: Communicator,
        *,
        stage: int,
        sample: tuple[Any, Any],
        unit_B: int = BUCKET_B,
        **options: Any,
    ) -> None:
        self._stage, self._group = stage, comm.over(frozenset({"data"}))
        self.units = units_of(model, arguments(*sample, loss), evaluated=loss is not None, unit_B=unit_B)
        self._packs = stage == 3 and not self._group.shares_memory
        self._vectors: list[list[Vector]] = [[] for _ in range(len(self.units.units) + 1)]  # of each unit; the kept
        self._phase = ""  # forward, backward, or neither
        self._at = 0  # the unit that is here
        self._live: dict[int, Vector] = {}  # by address of their memory, those that are here for a while
        super().__init__(model, optimizer, loss, comm, **options)
        self._memory = [self._room(self._vectors[:-1]), self._room(self._vectors[:-1])]  # gradients, in turn
        self._kept_memory = self._room(self._vectors[-1:])
        self._turn = 0
        model.register_forward_pre_hook(lambda *_: self._answer() if not self._phase else None)
        model.register_forward_hook(lambda *_: self._end() if self._phase == "answer" else None)
        modules = dict(model.named_modules())
        for k, unit in enumerate(self.units.units):
            for path in unit.modules:
                modules[path].register_forward_pre_hook(lambda *_, k=k: self._enter(k))
            for vector in self._vectors[k]:
                for m in vector.members:
                    m.parameter.register_hook(functools.partial(self._arrives, k))  # type: ignore[no-untyped-call]

    def _lay_out(self, common: bool, sparse: Mapping[int, nn.Module]) -> None:
        names: dict[int, list[str]] = {}  # several, if modules share it
        for name, p in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
        unit_of = {name: k for k, unit in enumerate(self.units.units) for name in unit.parameters}
        last = len(self.units.units)
        axes = frozenset(self._comm.mesh) - {"data"}
        chunks: dict[tuple[int, int, torch.dtype, torch.device], list[nn.Parameter]] = {}
        for g, group in enumerate(self.optimizer.param_groups):
            for p in group["params"]:
                if p.requires_grad:
                    unit = unit_of.get(names.get(id(p), [""])[0], last)
                    chunks.setdefault((unit, g, p.dtype, p.device), []).append(p)
        for (unit, g, dtype, device), parameters in sorted(chunks.items(), key=lambda item: item[0][:2]):
            numel = sum(p.numel() for p in parameters)
            home = None
            if self._stage == 2 or self._group.shares_memory:
                home = self._allocate(self._group, numel, dtype, device, common=True)
            whole_state = [self._initial_state(p) for p in parameters]
            vector = Vector(unit, parameters, self._group, home=home, held=self._stage == 2 or unit == last)
            self._vectors[unit].append(vector)
            spans: list[Span] = []
            for m, state in zip(vector.members, whole_state, strict=True):
                for key, value in state.items():
                    self.optimizer.state[m.parameter][key] = m.block.take(value)
                own = m.part.numel()
                start = spans[-1].stop if spans else 0
                own_names = names.get(id(m.parameter), [f"group{g}.{len(spans)}"])
                spans.append(Span(own_names[0], m.parameter, start, start + own))
                self.blocks |= dict.fromkeys(own_names, m.block)
            self._index[id(vector.part)] = len(self.pieces)
            self._unsettled.add(len(self.pieces))
            called, bounds = f"unit{unit}.group{g}.{str(dtype)[6:]}", [(s.start, s.stop) for s in spans]
            self.pieces.append(Piece(vector.part, vector.grad, axes, name=called, group=g, spans=bounds))
            self._spans.append(spans)

    def _initial_state(self, p: nn.Parameter) -> dict[str, Tensor]:
        """What the optimizer has for the elements of a parameter before the first step (Adagrad does)."""
        state = self.optimizer.state.get(p, {})
        return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == p.shape and v.dim()}

    def _room(self, units: list[list[Vector]]) -> dict[tuple[torch.dtype, torch.device], Tensor]:
        """Memory for the gradients of any one of these, that collectives work on."""
        most: dict[tuple[torch.dtype, torch.device], int] = {}
        for vectors in units:
            need: dict[tuple[torch.dtype, torch.device], int] = {}
            for v in vectors:
                need[v.dtype, v.device] = need.get((v.dtype, v.device), 0) + v.numel
            for kind, numel in need.items():
                most[kind] = max(most.get(kind, 0), numel)
        return {
            (dtype, device): self._allocate(self._group, numel, dtype, device, common=False)
            for (dtype, device), numel in most.items()
        }

    def sent_B(self) -> int:
        """Payload of the cut in a step: `units.exchanged_B`."""
        *units, kept = ([v.nbytes for v in vectors] for vectors in self._vectors)
        flat = [n for unit in units for n in unit]
        return exchanged_B(self._stage, flat, kept, self._group.size, self._micro_batches)

    # -- a step ----------------------------------------------------------------------------------------------------

    def _passes(self, batch: Batch, last_pass: LastPass) -> tuple[Tensor, float]:
        mine, m = torch.zeros(2, dtype=torch.float64), self._micro_batches
        self._begin()
        try:
            for v, memory in self._placed(self._vectors[-1], self._kept_memory):
                v.receive(memory)
            for k in range(m):  # as many on every rank
                mine += self._pass(batch, k * batch.count // m, (k + 1) * batch.count // m)
            for v, memory in self._placed(self._vectors[-1], self._kept_memory):
                v.scatter(memory)
        finally:
            self._end()
        total, counted = told(mine.tolist(), self._group).sum(0).tolist()
        if self._sums():  # a mean over workers comes of all this, and a sum is to be the sum of them
            return torch.tensor(total / self._group.size, dtype=torch.float64), 1.0
        for piece in self.pieces:
            piece.grad.div_(counted or 1.0)
        return torch.tensor(total / (counted or 1.0), dtype=torch.float64), float(mine[1])

    def _pass(self, batch: Batch, lo: int, hi: int) -> Tensor:
        """Forward and backward of some samples, also of none; their total of the loss, and what it counted."""
        self._phase, self._at = "forward", -1
        found, objective = torch.zeros(2, dtype=torch.float64), None
        if lo < hi:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                objective, counted = self._total(rows_of(batch.inputs, lo, hi), rows_of(batch.target, lo, hi), hi - lo)
            found = torch.tensor([float(objective.detach()), counted], dtype=torch.float64)
        self._through_forward()
        self._phase = "backward"
        if objective is not None:
            backward(objective)
            del objective  # and with it what autograd has saved
        self._back_to(-1)
        return found

    def _total(self, inputs: Any, target: Any, rows: int) -> tuple[Tensor, float]:
        result = self._forward(inputs, target)
        if isinstance(result, Tensor):
            return result * rows, float(rows)
        total, counted = result
        if counted is None:
            self._summed(total)  # refuses a sum that does not say so
        return total, float(rows if counted is None else counted)

    def reached(self) -> dict[int, Tensor]:
        """See `contract.Replica.reached`; of all workers, as each parameter is updated by several. Collective."""
        seen = super().reached()
        with self._group.counting("control"):
            for workers in seen.values():
                self._group.all_reduce(workers).wait()
        return seen

    # -- units come and go -----------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Parameters are those of now; what is needed throughout is gathered. Collective."""
        for vectors in self._vectors:
            for v in vectors:
                v.begin()
        for v in self._vectors[-1]:
            v.gather()
        self._phase, self._at = "forward", -1

    def _answer(self) -> None:
        """Somebody calls the model: an evaluation. Collective."""
        self._begin()
        self._phase = "answer"

    def _end(self) -> None:
        if self._phase == "answer":
            self._through_forward()
        self._phase = ""
        self._live.clear()
        for vectors in self._vectors:
            for v in vectors:
                v.end()

    def _enter(self, k: int) -> None:
        """The forward pass has come to unit k; in backward it is computed anew."""
        if self._phase == "backward":
            self._back_to(k)
        elif self._phase:
            if k < self._at:
                raise BadInput(
                    f"shard={self._stage}: {self.units.units[k].modules[0]} is called again after "
                    f"{self.units.units[self._at].modules[0]}, which it was not for the first sample of the training "
                    "set. Parameters are gathered in one order; a model whose order depends on the data trains with "
                    "shard=1."
                )
            self._on_to(k)

    def _on_to(self, k: int) -> None:
        while self._at < k:
            if self._at >= 0:
                self._let_go(self._at)
            self._at += 1
            if self._at < len(self.units.units):
                self._gather(self._at)

    def _through_forward(self) -> None:
        """What has not been needed is passed through as well; then no unit is here."""
        self._on_to(len(self.units.units))

    def _back_to(self, k: int) -> None:
        """Units after k are done, and it is here, with memory for its gradients; -1: all are done."""
        while self._at > k:
            if self._at < len(self.units.units):
                for v, memory in self._placed(self._vectors[self._at], self._memory[self._turn]):
                    v.scatter(memory)
                self._let_go(self._at)
                self._turn ^= 1  # the others may be reading this one until they have come to the next
            self._at -= 1
            if self._at >= 0:
                self._gather(self._at)
                for v, memory in self._placed(self._vectors[self._at], self._memory[self._turn]):
                    v.receive(memory)

    def _arrives(self, k: int, _: Tensor) -> None:
        """A gradient is going to be added to one of unit k's parameters."""
        if self._phase == "backward":
            if k > self._at:
                self._refuse_late(k)
            self._back_to(k)

    def _refuse_late(self, k: int) -> None:
        raise BadInput(
            f"shard={self._stage}: backward comes back to {self.units.units[k].modules[0]} when modules before it have "
            "their gradients already. Gradients are summed in one order; such a model trains with shard=1."
        )

    def _gather(self, k: int) -> None:
        for v in self._vectors[k]:
            v.gather()
            if self._packs and v.whole is not None:
                self._live[v.whole.untyped_storage().data_ptr()] = v

    def _let_go(self, k: int) -> None:
        for v in self._vectors[k]:
            v.let_go()
        self._live.clear()

    @staticmethod
    def _placed(
        vectors: list[Vector], memory: Mapping[tuple[torch.dtype, torch.device], Tensor]
    ) -> list[tuple[Vector, Tensor]]:
        """Each with its part of the memory for gradients."""
        result, used = [], dict.fromkeys(memory, 0)
        for v in vectors:
            at = used[v.dtype, v.device]
            used[v.dtype, v.device] += v.numel
            result.append((v, memory[v.dtype, v.device][at : at + v.numel]))
        return result

    def _pack(self, x: Tensor) -> Tensor | _Note:
        if not self._live or x.layout is not torch.strided:
            return x
        vector = self._live.get(x.untyped_storage().data_ptr())
        if vector is None or x.dtype != vector.dtype:
            return x
        return _Note(vector, x.shape, x.stride(), int(x.storage_offset()))

    def _unpack(self, kept: Tensor | _Note) -> Tensor:
        if not isinstance(kept, _Note):
            return kept
        v = kept.vector
        if self._phase == "backward":
            self._back_to(v.unit)
        if v.whole is None:
            self._refuse_late(v.unit)
        assert v.whole is not None
        return v.whole.as_strided(kept.shape, kept.strides, kept.offset)
