"""QSGD: values rounded by chance to ``levels`` steps of their bucket's norm (Alistarh et al. 2017).

    C(x)_i = ‖x‖ · sign(x_i) · ξ_i / s,   ξ_i = ⌊s |x_i| / ‖x‖⌋ or one more, so that E C(x) = x

‖x‖ is the two-norm of a bucket of ``bucket`` values, s = ``levels``. Two ways to write ξ down:

    fixed    a sign and ⌈log₂(s+1)⌉ bits a value
    elias    of the values that are not 0 the gap to the one before, the sign and ξ, gaps and ξ in Elias's gamma code:
             shorter where most are 0 (few levels, large buckets). The paper uses his omega code, which is shorter only
             for numbers above 15; here both halves of a codeword are kept apart (`bits`)

Payload: (1 + ⌈log₂(s+1)⌉) n/8 bytes and a value a bucket; with elias at most that, and 1 byte that says which it is.
Guarantee: unbiased; E ‖x − C(x)‖² ≤ min(d/s², √d/s) ‖x‖² for buckets of d. No feedback by default: it is for schemes
that err in the same direction again and again.

D. Alistarh, D. Grubic, J. Li, R. Tomioka & M. Vojnović (2017), QSGD: communication-efficient SGD via gradient
quantization and encoding, arXiv:1610.02132, lemma 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.checks import is_whole
from manyhands.communication.compression.bits import (
    Bytes,
    chunks,
    from_gamma,
    from_planes,
    gamma,
    planes,
    planes_B,
)
from manyhands.communication.compression.entries import LONGEST, check_indices
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.one_shot import OneShot, check_length, check_numbers
from manyhands.communication.compression.state import State
from manyhands.errors import DamagedPayload

FIXED, ELIAS = 0, 1
#: Binary digits of a level's fraction that chance decides by: with 255 levels they fit 31.
FRACTION = 23


@dataclass(frozen=True)
class QSGD(OneShot):
    """Unbiased stochastic rounding to ``levels`` steps a sign, per ``bucket``; ``coding``: fixed or elias."""

    name: ClassVar[str] = "qsgd"
    paper: ClassVar[Reference] = Reference(
        "Alistarh, Grubic, Li, Tomioka & Vojnović",
        "QSGD: communication-efficient SGD via gradient quantization and encoding",
        2017,
        "NeurIPS, arXiv:1610.02132",
        survey="VI-B",
    )
    unbiased: ClassVar[bool] = True
    longest: ClassVar[int | None] = LONGEST

    levels: int = 7
    bucket: int = 512
    coding: Literal["fixed", "elias"] = "fixed"
    seed: int = 0
    feedback: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.levels, 1) or self.levels > 255:
            raise ValueError(f"levels={self.levels!r}: it is a whole number from 1 to 255")
        if not is_whole(self.bucket, 1):
            raise ValueError(f"bucket={self.bucket!r}: it is a whole number of values from 1")
        if self.coding not in ("fixed", "elias"):
            raise ValueError(f"coding={self.coding!r}: it is fixed or elias")
        if not is_whole(self.seed, 0):
            raise ValueError(f"seed={self.seed!r}: it is a whole number from 0")

    @property
    def variable(self) -> bool:
        """With Elias's code."""
        return self.coding == "elias"

    @property
    def bits(self) -> int:
        """Of a level."""
        return math.ceil(math.log2(self.levels + 1))

    def variance(self, numel: int) -> float:
        """min(d/s², √d/s)."""
        d = min(self.bucket, numel)
        return min(d / self.levels**2, math.sqrt(d) / self.levels)

    @property
    def approaches(self) -> bool:
        """Drawn by chance, it may be farther off than nothing would be."""
        return False

    def payload_B(self, layout: Layout) -> int:
        """A sign and a level each, and a value a bucket."""
        return int(self.variable) + self._head_B(layout) + planes_B(layout.numel, 1 + self.bits)

    def _head_B(self, layout: Layout) -> int:
        return layout.itemsize * len(layout.blocks(self.bucket))

    def quantized(self, x: NDArray[Any], random: np.random.BitGenerator) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """Norms of the buckets, and ξ of every value.

        In whole numbers of 2^−23 of a level: to s·|x|/norm as many of them are added as chance says, less than a level,
        and whole levels are what is left of it.
        """
        level, norms = np.empty(x.size, np.uint8), []
        for part in chunks(x.size, self.bucket):
            values = x[part]
            starts = np.arange(0, values.size, self.bucket)
            with np.errstate(over="ignore"):
                squares = np.add.reduceat(np.square(values), starts)
            if not np.isfinite(squares).all():
                squares = np.add.reduceat(np.square(values, dtype=np.float64), starts)
            # Unbiased with any norm that no value is beyond. One so small that its factor would be infinite is 0; its
            # square has left the dtype's range long before.
            norm = np.nextafter(np.sqrt(squares).astype(x.dtype), x.dtype.type(np.inf))
            some = norm > 2.0 ** (FRACTION + 16) * np.finfo(x.dtype).tiny
            per_norm = np.where(some, self.levels * 2.0**FRACTION / np.where(some, norm, 1), 0).astype(x.dtype)
            scaled = np.abs(values)
            scaled *= np.repeat(per_norm, self.bucket)[: values.size]
            whole = scaled.astype(np.int32).view(np.uint32)
            drawn = random.random_raw((values.size + 1) // 2).view(np.uint32)[: values.size]
            drawn >>= np.uint32(32 - FRACTION)
            whole += drawn
            whole >>= np.uint32(FRACTION)
            # A value that is its bucket's norm rounds to s, and what the norm was rounded by must not make it more.
            if whole.max() > self.levels:
                np.minimum(whole, self.levels, out=whole)
            level[part] = whole
            norms.append(norm)
        return np.concatenate(norms), level

    def encode(self, x: Tensor, state: State) -> Tensor:
        """See `OneShot.encode`."""
        values = x.numpy()
        norms, level = self.quantized(values, state.random(self.seed).bit_generator)
        parts = [norms.view(np.uint8)]
        if self.coding == "elias":
            coded, fixed_B = elias(level, values < 0), planes_B(values.size, 1 + self.bits)
            if coded.size < fixed_B:
                return torch.from_numpy(np.concatenate([np.array([ELIAS], np.uint8), *parts, coded]))
            parts.insert(0, np.array([FIXED], np.uint8))
        return torch.from_numpy(np.concatenate([*parts, np.packbits(values < 0), planes(level, self.bits)]))

    def add_(self, out: Tensor, payload: Tensor, state: State, sign: int = 1) -> None:
        """See `OneShot.add_`."""
        layout, values, coded = state.layout, out.numpy(), payload.numpy()
        head = int(self.variable) + self._head_B(layout)
        if coded.size < head:
            raise DamagedPayload(f"qsgd: a payload of {coded.size} bytes; norms alone have {head}")
        norms = coded[int(self.variable) : head].view(values.dtype)
        check_numbers(norms, self.name)
        steps = norms * values.dtype.type(sign / self.levels)
        if self.variable and coded[0] == ELIAS:
            indices, signed = from_elias(coded[head:], values.size, self.levels)
            values[indices] += signed.astype(values.dtype) * steps[indices // self.bucket]
            return
        check_length(coded, self.payload_B(layout), self.name)
        bitmaps = coded[head:].reshape(1 + self.bits, -1)
        integer: np.dtype[Any] = np.dtype(np.int8 if self.levels < 128 else np.int16)
        for part in chunks(values.size, self.bucket):
            negative, *level_bits = bitmaps[:, part.start // 8 : -(-part.stop // 8)]
            size = part.stop - part.start
            whole = from_planes(np.concatenate(level_bits), size, self.bits)
            if self.levels < 2**self.bits - 1 and whole.max() > self.levels:
                raise DamagedPayload(f"qsgd: a level of {whole.max()} where there are {self.levels}")
            minus = -np.unpackbits(negative, count=size).astype(integer)  # 0 or −1, all bits of which are set
            level = ((whole.astype(integer) ^ minus) - minus).astype(values.dtype)
            level *= np.repeat(steps[part.start // self.bucket : -(-part.stop // self.bucket)], self.bucket)[:size]
            values[part] += level


def elias(level: NDArray[np.uint8], negative: NDArray[np.bool_]) -> Bytes:
    """How many levels are not 0 and how long their gaps' code is (4 bytes each), gaps, signs, levels."""
    indices = np.flatnonzero(level)
    gaps = gamma(np.diff(indices, prepend=-1))
    head = np.array([indices.size, gaps.size], np.uint32).view(np.uint8)
    return np.concatenate([head, gaps, np.packbits(negative[indices]), gamma(level[indices].astype(np.int64))])


def from_elias(coded: Bytes, numel: int, levels: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices, and levels with their signs."""
    if coded.size < 8:
        raise DamagedPayload(f"qsgd: {coded.size} bytes of Elias's code; its lengths have 8")
    count, gaps_B = coded[:8].view(np.uint32).tolist()
    signs_B = planes_B(count, 1)
    if count > numel or gaps_B + signs_B > coded.size - 8:
        raise DamagedPayload(f"qsgd: {count} levels in {coded.size} bytes, of a vector of {numel}")
    indices = np.cumsum(from_gamma(coded[8 : 8 + gaps_B], count)) - 1
    check_indices(indices, numel, "qsgd")
    negative = np.unpackbits(coded[8 + gaps_B :][:signs_B], count=count).view(np.bool_)
    level = from_gamma(coded[8 + gaps_B + signs_B :], count)
    if count and level.max() > levels:
        raise DamagedPayload(f"qsgd: a level of {level.max()} where there are {levels}")
    return indices, np.where(negative, -level, level)
