"""Averaging what optimizers remember: momentum and moments become the workers' weighted mean, as parameters do.

    m ← Σ_p n_p m_p / Σ_p n_p

m_p worker p's momentum or moment, n_p what its shares have counted; state that a worker does not have yet is zero, as
it is when torch makes it. Numbers that belong to a parameter as a whole (Adam's step count) are taken from the first
worker that has some. deeplearning4j calls this ``saveUpdater``.

Payload per rank: 2(P−1)/P elements an element of state, counted under the purpose ``state``: what an optimizer keeps is
its own business, and no strategy can declare it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.contract import Replica, StateSlice

#: Messages carry 64-bit words, which every transport moves.
_WORD_B = 8


def average_state(replica: Replica, comm: Communicator, weight: float) -> None:
    """Give all workers that hold the same parameters the same optimizer state. Collective."""
    group = comm.over(frozenset({"data"}).intersection(*(piece.replicated_over for piece in replica.pieces)))
    mine = replica.optimizer_state()
    with comm.counting("state"):
        everybody = _told(group, [_described(s) for s in mine])
        vectors = _vectors(everybody)
        if not vectors:
            return
        held = {_place(s): s.values for s in mine if s.lo >= 0}
        averaged = []
        for dtype in dict.fromkeys(vectors.values()):
            places = [place for place, kind in vectors.items() if kind == dtype]
            averaged += _averaged(group, held, places, getattr(torch, dtype), weight, replica.pieces[0].flat.device)
    replica.load_optimizer_state([*_numbers(everybody), *averaged])


Place = tuple[str, str, int, int]


def _averaged(
    group: Communicator,
    held: Mapping[Place, Tensor],
    places: Sequence[Place],
    dtype: torch.dtype,
    weight: float,
    device: torch.device,
) -> list[StateSlice]:
    """One all-reduce of all ``places`` end to end; what this worker does not hold is zero."""
    lengths = [hi - lo for _, _, lo, hi in places]
    flat = torch.zeros(sum(lengths), dtype=dtype, device=device)
    ends = list(itertools.accumulate(lengths))
    parts = [flat[end - length : end] for length, end in zip(lengths, ends, strict=True)]
    for place, part in zip(places, parts, strict=True):
        if place in held:
            part.copy_(held[place].reshape(-1))
    group.all_reduce(flat, weight=weight).wait()
    return [StateSlice(*place, part) for place, part in zip(places, parts, strict=True)]


def _place(s: StateSlice) -> Place:
    return s.parameter, s.key, s.lo, s.hi


def _described(s: StateSlice) -> list[Any]:
    """What others must know of it; a number of the parameter as a whole with its value."""
    return [*_place(s), str(s.values.dtype).removeprefix("torch."), s.values.tolist() if s.lo < 0 else None]


def _vectors(everybody: Sequence[Sequence[Any]]) -> dict[Place, str]:
    """Where somebody holds a vector, with its dtype; in the same order on every worker."""
    return {
        (parameter, key, lo, hi): dtype for held in everybody for parameter, key, lo, hi, dtype, _ in held if lo >= 0
    }


def _numbers(everybody: Sequence[Sequence[Any]]) -> list[StateSlice]:
    """Of each parameter those of the first worker that has some."""
    found: dict[str, list[StateSlice]] = {}
    for held in everybody:
        own: dict[str, list[StateSlice]] = {}
        for parameter, key, lo, hi, dtype, value in held:
            if lo < 0:
                values = torch.tensor(value, dtype=getattr(torch, dtype))
                own.setdefault(parameter, []).append(StateSlice(parameter, key, lo, hi, values))
        found = own | found
    return [s for numbers in found.values() for s in numbers]


def _told(comm: Communicator, value: Any) -> list[Any]:
    """Everybody's ``value``, which JSON can write, in rank order. Collective."""
    data = json.dumps(value).encode()
    data += b" " * (-len(data) % _WORD_B)
    lengths = torch.zeros(comm.size, dtype=torch.int64)
    lengths[comm.rank] = len(data) // _WORD_B
    comm.all_gather(lengths, [(p, p + 1) for p in range(comm.size)]).wait()
    ends = lengths.cumsum(0).tolist()
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    words = torch.zeros(ends[-1], dtype=torch.int64)
    lo, hi = bounds[comm.rank]
    words[lo:hi] = torch.frombuffer(bytearray(data), dtype=torch.int64)
    comm.all_gather(words, bounds).wait()
    return [json.loads(words[lo:hi].numpy().tobytes()) for lo, hi in bounds]
