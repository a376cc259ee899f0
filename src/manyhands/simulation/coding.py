"""How long payloads take to make and to read: a number of nanoseconds a value, for each compressor.

They are given, or measured in this process, once for each description: one thread, medians over a normally distributed
vector of 512 × 512 values (`rehearsal.sample`). Schemes whose workers make a payload together (PowerSGD, random-k) are
measured whole, as an exchange of two in which nothing is sent, half of it for making and half for reading.

Approximation: time grows with the number of values. What a vector costs that fits no cache, or hardly has a value, is
not known.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from manyhands.communication.compression.compressor import Compressor, Layout, OneShot
from manyhands.communication.compression.rehearsal import sample
from manyhands.simulation.folded import FoldedCommunicator

SIDE = 512
ROUNDS = 7


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
    x = sample(compressor, layout.numel)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if isinstance(compressor, OneShot):
            state = Compressor.start(compressor, layout, 0, 2)
            payload = compressor.encode(x.clone(), state)
            out = torch.zeros(layout.numel)
            encode_s = _median_s(lambda: compressor.encode(x.clone(), state))
            return encode_s / layout.numel, _median_s(lambda: compressor.add_(out, payload, state)) / layout.numel
        state = compressor.start(layout, 0, 2)
        comm = FoldedCommunicator(2, lambda _: 0.0, alike=True)
        both_s = _median_s(lambda: compressor.aggregate(x.clone(), comm, state))
        return both_s / layout.numel / 2, both_s / layout.numel / 2
    finally:
        torch.set_num_threads(threads)


def _median_s(work: Callable[[], object]) -> float:
    work()
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))
