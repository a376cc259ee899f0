"""Payloads that go from one worker to whoever wants them, a server or a neighbour, rather than to all at once.

    payload = C(x + e);   e ← x + e − C(x + e)

x what a worker has to tell, e what it has not told so far, C a compressor; e is 0 without ``feedback``, and for who
keeps books himself of what he has not told (Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847). What all
workers do together (adding payloads up, drawing alike) is not there, so the scheme is one whose payload can be read by
itself: a `OneShot` without a momentum of its own.

Guarantee, with feedback: what has been told and e add up to all x, up to rounding.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.compressor import Compressor
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.one_shot import OneShot
from manyhands.communication.compression.rehearsal import typical_B
from manyhands.communication.compression.state import State


def travels(compressor: Compressor) -> bool:
    """Whether a payload means something to one who has no other."""
    return isinstance(compressor, OneShot) and not compressor.replaces_optimizer


def begun(compressor: OneShot, layout: Layout, rank: int, index: int, *, feedback: bool) -> State:
    """A worker's state before it has packed anything of its vector number ``index``."""
    state = Compressor.start(compressor, layout, rank, 2, index)
    if not feedback:
        state.tensors.pop("residual", None)
    return state


def pack_(x: Tensor, compressor: OneShot, comm: Communicator, state: State, *, copies: int = 1) -> Tensor:
    """The payload that is sent for ``x``, ``copies`` times; ``x`` becomes what it stands for.

    Where ``x`` has a size only, so has the payload: the `typical_B`.
    """
    counted, layout = comm.counters.compression, state.layout
    began = time.perf_counter()
    counted.dense_B += copies * x.nbytes
    if x.is_meta:
        payload = x.new_empty(typical_B(compressor, layout), dtype=torch.uint8)
    elif not layout.numel:
        payload = torch.empty(0, dtype=torch.uint8)
    else:
        given, residual = x.to(layout.dtype), state.tensors.get("residual")
        if residual is not None:
            given = residual.add_(given)
        before = given.clone() if state.is_looked_at() else None
        payload = compressor.encode(given, state)
        told = compressor.decode(payload, state)
        if residual is not None or before is not None:
            given.sub_(told)
        if before is not None:
            counted.looked(before, given)
        x.copy_(told)
        if residual is not None:
            compressor.trim(state)
    counted.sent_B += copies * payload.nbytes
    counted.coding_s += time.perf_counter() - began
    return payload


def unpacked(payload: Tensor, compressor: OneShot, layout: Layout) -> Tensor:
    """What somebody else's payload stands for."""
    return compressor.decode(payload, State(layout))
