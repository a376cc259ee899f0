"""How long payloads take to make and to read, measured in this process.

- `measured`: seconds a value, to encode and to decode, once for each description: a table for simulations, whose ranks
  are too many to run their exchanges, and which also send payloads in other ways than by a mean of all. On one thread,
  over a normally distributed vector of 512 × 512 values (`rehearsal.sample`); or they are given (`Coding`).
- `exchange_s`: one exchange of all ranks, on tensors of a model's own shapes. What a call costs whatever its length is
  in there, which is most of it for a small model, so this is by what ``compress=auto`` chooses. Schemes whose workers
  make a payload together (PowerSGD, random-k) have it as their table, too: an exchange of two, half of it for making
  and half for reading. Of halves making is an exchange, too: nobody reads a payload there, with its checks, but takes
  the sum over; whoever gets a payload by itself does both.

Approximation of the table: time grows with the number of values. What a vector costs that fits no cache, or hardly has
a value, is not known.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhands.communication.compression.compressor import Compressor
from manyhands.communication.compression.layout import Layout, Shape
from manyhands.communication.compression.meter import FIRST
from manyhands.communication.compression.one_shot import OneShot
from manyhands.communication.compression.rehearsal import sample, takes_sums
from manyhands.simulation.folded import FoldedCommunicator

SIDE = 512
#: Values of the vector that is exchanged, at most; seconds for a figure.
SAMPLE, BUDGET_S = SIDE * SIDE, 0.02


@dataclass(frozen=True)
class Coding:
    """Seconds a value, to ``encode_s`` it into a payload and to ``decode_s`` it out of one; None: measured here."""

    encode_s: float | None = None
    decode_s: float | None = None

    def seconds(self, compressor: Compressor, numel: int, encoded: float, decoded: float) -> float:
        """Of so many vectors of ``numel`` values each."""
        if not numel or not (encoded or decoded):
            return 0.0
        encode_s, decode_s = self.encode_s, self.decode_s
        if encode_s is None or decode_s is None:
            here = measured(compressor)
            encode_s, decode_s = (here[i] if s is None else s for i, s in enumerate((encode_s, decode_s)))
        return numel * (encoded * encode_s + decoded * decode_s)


@functools.lru_cache(maxsize=64)
def measured(compressor: Compressor) -> tuple[float, float]:
    """Seconds a value, here and now: to encode, to decode."""
    layout = Layout(((SIDE, SIDE),))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if not isinstance(compressor, OneShot):
            half_s = exchange_s(compressor, layout, 2) / layout.numel / 2
            return half_s, half_s
        if takes_sums(compressor, layout):
            return _of_sums(compressor, layout)
        x = sample(compressor, layout.numel)
        state = Compressor.start(compressor, layout, 0, 2)
        payload = compressor.encode(x.clone(), state)
        out = torch.zeros(layout.numel)
        encode_s = _median_s(lambda x: compressor.encode(x, state), x)
        return encode_s / layout.numel, _median_s(lambda _: compressor.add_(out, payload, state), x) / layout.numel
    finally:
        torch.set_num_threads(threads)


def _of_sums(compressor: OneShot, layout: Layout) -> tuple[float, float]:
    """Of halves, which the transport adds up: to make a payload and take over what stands there, and to read one."""
    state = Compressor.start(compressor, layout, 0, 2)
    x, comm = sample(compressor, layout.numel), FoldedCommunicator(2, lambda _: 0.0, alike=True)
    payload = compressor.encode(x.clone(), state)
    sum_s = _median_s(lambda x: compressor.exchange(x, x, comm, state), x)
    return sum_s / layout.numel, _median_s(lambda _: compressor.decode(payload, state), x) / layout.numel


def exchange_s(compressor: Compressor, layout: Layout, size: int, budget_s: float = BUDGET_S) -> float:
    """Processor time that a rank of ``size`` spends on an exchange of such a vector, communication left out.

    It takes place, on a communicator that moves nothing, so it knows what tensors and slices cost beside their values.
    Longer vectors than `SAMPLE` are taken by the element.
    """
    part = part_of(layout)
    comm = FoldedCommunicator(size, lambda _: 0.0, alike=True)
    state = compressor.start(part, 0, size)
    state.exchanges = FIRST + 1  # none of these is looked at
    gradient = 1e-3 * torch.randn(part.numel, generator=torch.Generator().manual_seed(0), dtype=part.dtype)
    took_s = _median_s(lambda x: compressor.aggregate(x, comm, state), gradient, budget_s)
    return took_s * layout.numel / max(part.numel, 1)


def payload_s(compressor: Compressor, layout: Layout, budget_s: float = BUDGET_S) -> tuple[float, float]:
    """Seconds a value to make a payload of such a vector, and to read one; of schemes whose payloads stand alone."""
    assert isinstance(compressor, OneShot)
    part = part_of(layout)
    state = Compressor.start(compressor, part, 0, 2)
    x = sample(compressor, part.numel)
    payload = compressor.encode(x.clone(), state)
    encode_s = _median_s(lambda x: compressor.encode(x, state), x, budget_s / 2)
    decode_s = _median_s(lambda _: compressor.decode(payload, state), x, budget_s / 2)
    return encode_s / max(part.numel, 1), decode_s / max(part.numel, 1)


def part_of(layout: Layout) -> Layout:
    """Some of the tensors, of `SAMPLE` values at most, the largest first; a larger one in part, by rows."""
    shapes, left = list[Shape](), SAMPLE
    for shape in sorted(layout.shapes, key=math.prod, reverse=True):
        numel = math.prod(shape)
        row = numel // shape[0] if shape and numel else 1
        if numel > left:
            rows = left // row
            shape = (rows, *shape[1:]) if rows and len(shape) > 0 else (left,)
        if 0 < math.prod(shape) <= left:
            shapes.append(shape)
            left -= math.prod(shape)
    return Layout(shapes, layout.dtype)


def _median_s(work: Callable[[Tensor], object], given: Tensor, budget_s: float = BUDGET_S) -> float:
    """Processor time of ``work`` on a copy of ``given``; the first one warms up."""
    times, x, ends_at = list[float](), given.clone(), math.inf
    while len(times) < 3 or (time.perf_counter() < ends_at and len(times) < 50):
        x.copy_(given)
        began = time.thread_time()
        work(x)
        times.append(time.thread_time() - began)
        if len(times) == 1:
            ends_at = time.perf_counter() + budget_s
    return statistics.median(times[1:])
