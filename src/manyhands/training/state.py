"""What an exact resume needs, gathered from all workers into one nested dict, and given back to them.

    origin      what run this is of: optimizer, schedule, seed, data; see `origin`
    cursor      epoch, position and step of the sampler
    optimizer   per parameter and key, whole tensors assembled from the workers' slices (so any worker count fits)
    schedule    the learning-rate schedule's own state
    groups      the hyper-parameters of each parameter group as the schedule left them
    ranks       per rank: random number generators, buffers, live state of the strategy and of a number format that is
                simulated, loss since the last record
    history     epoch records so far; the last is cut short where the run ended between two
    trained_s   time spent in steps so far, rank 0's

On the same number of workers a resume is exact bit for bit. On another number, parameters, optimizer and order of
samples are; per-rank state (random streams, residuals, own buffers) starts anew from the agreed values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.contract import Block, StateSlice, Strategy, Worker
from manyhands.training import generators
from manyhands.training.gather import gather
from manyhands.training.run import replicas
from manyhands.training.whole_model import block_of, described, differs


def collect(
    worker: Worker,
    strategy: Strategy,
    comm: Communicator,
    schedule: Any,
    *,
    device: str,
    since: tuple[float, float],
    shared: Mapping[str, Any],
) -> dict[str, Any] | None:
    """The whole state on rank 0, None elsewhere. Collective.

    ``since`` is this rank's loss since the last record; ``shared`` are entries that are the same for all ranks.
    """
    replica = worker.replica
    # Where all workers hold all of the same state, rank 0's is enough.
    holds = replicas(comm).rank == 0 or not (strategy.identical and strategy.parameters == "own")
    mine = {
        "blocks": {name: described(block) for name, block in replica.blocks.items()},
        "slices": [
            [s.parameter, s.key, s.lo, s.hi, s.values]
            for s in replica.optimizer_state()
            if holds or differs(s.parameter, replica.blocks)
        ],
        "generators": generators.capture(device, own_process=own_process(comm)),
        "buffers": [b.clone() for b in replica.buffers],
        "strategy": worker.state_dict(),
        "format": replica.format_state(),
        "since": list(since),
    }
    everybody = gather(comm, mine)
    if everybody is None:
        return None
    slices = [(StateSlice(*s), theirs) for s_of, theirs in _parts(everybody) for s in s_of]
    return {
        **shared,
        "workers": comm.size,
        "mesh": str(comm.mesh),
        "strategy": str(strategy),
        "optimizer": assemble(slices),
        "schedule": None if schedule is None else schedule.state_dict(),
        "groups": None if schedule is None else [hyperparameters(g) for g in schedule.optimizer.param_groups],
        "ranks": everybody,
    }


def own_process(comm: Communicator) -> bool:
    """Whether this rank has Python's and NumPy's generators to itself."""
    return comm.transport not in ("threads", "simulated")


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a schedule may have moved in a parameter group: a schedule's own state does not hold it."""
    return {k: v for k, v in group.items() if k != "params" and isinstance(v, Tensor | tuple | bool | int | float)}


def _parts(everybody: Sequence[dict[str, Any]]) -> list[tuple[list[Any], dict[str, Block]]]:
    """Every rank's slices, and the blocks of the parameters in whose elements they count."""
    return [
        (state.pop("slices"), {name: block_of(block) for name, block in state.pop("blocks").items()})
        for state in everybody
    ]


def assemble(slices: Sequence[tuple[StateSlice, Mapping[str, Block]]]) -> list[list[Any]]:
    """Whole state tensors ``[parameter, key, values]`` from slices that tile them; the first of equal ones counts.

    With each slice come the blocks of what its rank holds: of a parameter that is cut, elements count within the part.
    """
    whole: dict[tuple[str, str], Tensor] = {}
    parts: dict[tuple[str, str], list[tuple[StateSlice, Block | None]]] = {}
    for s, blocks in slices:
        if s.lo == -1:
            whole.setdefault((s.parameter, s.key), s.values)
        else:
            parts.setdefault((s.parameter, s.key), []).append((s, blocks.get(s.parameter)))
    for name, pieces in parts.items():
        numel = max(s.hi if block is None else math.prod(block.shape) for s, block in pieces)
        values = torch.zeros(numel, dtype=pieces[0][0].values.dtype)
        for s, block in reversed(pieces):
            if block is None:
                values[s.lo : s.hi] = s.values.reshape(-1)
            else:  # copies are left out
                places = block.places()[s.lo : min(s.hi, block.own)]
                values[places] = s.values.reshape(-1)[: len(places)]
        whole[name] = values
    return [[parameter, key, values] for (parameter, key), values in whole.items()]


def _slice(parameter: str, key: str, values: Tensor, blocks: Mapping[str, Block]) -> StateSlice:
    """What is here of a whole state tensor."""
    if not values.dim():
        return StateSlice(parameter, key, -1, -1, values)
    if parameter in blocks:
        values = values.view(-1)[blocks[parameter].places()]
    return StateSlice(parameter, key, 0, values.numel(), values)


def restore(
    state: dict[str, Any], worker: Worker, strategy: Strategy, comm: Communicator, schedule: Any, *, device: str
) -> tuple[float, float]:
    """Give a collected state back to this rank; parameters are the model's and are loaded apart.

    Returns this rank's loss since the last record.
    """
    replica = worker.replica
    replica.load_optimizer_state(
        [_slice(name, key, values, replica.blocks) for name, key, values in state["optimizer"]]
    )
    if schedule is not None and state["schedule"] is not None:
        schedule.load_state_dict(state["schedule"])
        for group, saved in zip(schedule.optimizer.param_groups, state["groups"], strict=True):
            for key, value in saved.items():
                if isinstance(group.get(key), Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value
    same_mesh = state["workers"] == comm.size and state.get("mesh", str(comm.mesh)) == str(comm.mesh)
    if same_mesh and state["strategy"] == str(strategy):
        mine = state["ranks"][comm.rank]
        generators.restore(mine["generators"], device, own_process=own_process(comm))
        for buffer, kept in zip(replica.buffers, mine["buffers"], strict=True):
            buffer.copy_(kept)
        worker.load_state_dict(mine["strategy"])
        replica.load_format_state(mine.get("format", {}))
    if same_mesh:
        total, counted = state["ranks"][comm.rank]["since"]
        return total, counted
    if comm.rank > 0:
        return 0.0, 0.0
    everybody = [each["since"] for each in state["ranks"]]
    return sum(total for total, _ in everybody), sum(counted for _, counted in everybody)
