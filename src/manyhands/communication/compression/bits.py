"""Numbers of few bits as bytes and back, on whole vectors: bit planes, and codes whose length varies.

A codeword of varying length says first how long it is. Here the halves that say so stand together, in unary, and the
rest behind them: the same length to the bit as codewords one after the other, but where each begins is found by one
scan instead of one by one.

    Elias gamma   v ≥ 1 by ⌊log₂ v⌋ zeros, a one and the ⌊log₂ v⌋ lower bits of v       (Elias 1975)
    Rice          v ≥ 0 by ⌊v / 2^r⌋ zeros, a one and the r lower bits of v             (Rice 1979; Golomb 1966)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manyhands.errors import DamagedPayload

Bytes = NDArray[np.uint8]
Whole = NDArray[np.int64]
#: Values that are gone through at a time, so that what is made of them stays in a core's own cache.
CHUNK = 2**16
#: More than this many bits of a number are a damaged payload: vectors have fewer elements.
MOST_BITS = 40


def chunks(numel: int, width: int = 8) -> list[slice]:
    """A vector's parts of about `CHUNK` values, each but the last a multiple of ``width`` and of 8 of them."""
    step = math.lcm(width, 8)
    step *= max(1, CHUNK // step)
    return [slice(lo, min(lo + step, numel)) for lo in range(0, numel, step)]


def planes(values: NDArray[Any], bits: int) -> Bytes:
    """Whole numbers from 0 of so many ``bits``, as one bitmap a bit, the lowest first."""
    return np.concatenate([np.packbits(values & (1 << j)) for j in range(bits)])


def planes_B(numel: int, bits: int) -> int:
    """Length of `planes`."""
    return bits * -(-numel // 8)


def from_planes(coded: Bytes, numel: int, bits: int) -> NDArray[np.uint8]:
    """The numbers of `planes`, of at most 8 bits."""
    result = np.zeros(numel, np.uint8)
    for plane in coded.reshape(bits, -1)[::-1]:
        result += result
        result |= np.unpackbits(plane, count=numel)
    return result


def signed_planes(plus: NDArray[np.bool_], minus: NDArray[np.bool_]) -> Bytes:
    """Two bitmaps, of what is +1 and what is −1."""
    return np.concatenate([np.packbits(plus), np.packbits(minus)])


def from_signed_planes(coded: Bytes, numel: int) -> NDArray[np.int8]:
    """−1, 0 and +1 of `signed_planes`."""
    plus, minus = (np.unpackbits(plane, count=numel).view(np.int8) for plane in coded.reshape(2, -1))
    return plus - minus


def add_chosen_(
    values: NDArray[Any], which: NDArray[np.uint8], one: NDArray[Any], zero: NDArray[Any], lengths: Whole
) -> None:
    """Add to each value of a run its ``one`` where a bit is set, else its ``zero``: both have a number a run.

    `numpy.where` has a branch that is guessed wrong every other time; here a mask of all bits chooses.
    """
    word = np.dtype(f"i{values.itemsize}")
    other = np.repeat(zero.view(word), lengths)
    apart = np.repeat(one.view(word) ^ zero.view(word), lengths)
    minus = np.negative(which.view(np.int8))  # 0 or −1, all bits of which are set
    for part in chunks(values.size):
        mask = minus[part].astype(word)
        mask &= apart[part]
        mask ^= other[part]
        values[part] += mask.view(values.dtype)


def gamma(values: Whole) -> Bytes:
    """Numbers from 1 in Elias gamma code."""
    lengths = np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1
    return np.packbits(np.concatenate([_unary(lengths), _remainders(values, lengths)]))


def from_gamma(coded: Bytes, count: int) -> Whole:
    """So many numbers of `gamma`."""
    flags = np.unpackbits(coded)
    lengths, at = _from_unary(flags, count)
    if lengths.size and lengths.max() > MOST_BITS:
        raise DamagedPayload(f"a number of {lengths.max()} bits")
    return (np.int64(1) << lengths) + _from_remainders(flags[at:], lengths)


def rice(values: Whole, r: int) -> Bytes:
    """Numbers from 0 in Rice's code."""
    return np.concatenate([np.packbits(_unary(values >> r)), planes(values & ((1 << r) - 1), r) if r else _none()])


def from_rice(coded: Bytes, count: int, r: int) -> Whole:
    """So many numbers of `rice`."""
    lower_B = planes_B(count, r)
    if not 0 <= r <= MOST_BITS or lower_B > coded.size:
        raise DamagedPayload(f"a code of {coded.size} bytes for {count} numbers with {r} lower bits each")
    upper, _ = _from_unary(np.unpackbits(coded[: coded.size - lower_B]), count)
    result = upper << r
    at, plane_B = coded.size - lower_B, planes_B(count, 1)
    for j in range(r):
        plane = np.unpackbits(coded[at + j * plane_B : at + (j + 1) * plane_B], count=count)
        result |= plane.astype(np.int64) << j
    return result


def best_rice(values: Whole) -> int:
    """The r that makes geometrically distributed numbers shortest: log₂ of ln 2 times their mean."""
    mean = float(values.mean()) if values.size else 0.0
    return max(0, round(float(np.log2(max(mean * np.log(2), 1.0)))))


def _unary(lengths: Whole) -> NDArray[np.uint8]:
    flags = np.zeros(int(lengths.sum()) + lengths.size, np.uint8)
    flags[np.cumsum(lengths + 1) - 1] = 1
    return flags


def _from_unary(flags: NDArray[np.uint8], count: int) -> tuple[Whole, int]:
    """So many lengths, and where the next thing begins."""
    ends = np.flatnonzero(flags)[:count]
    if ends.size < count:
        raise DamagedPayload(f"{ends.size} codewords; {count} were announced")
    return np.diff(ends, prepend=-1) - 1, int(ends[-1]) + 1 if count else 0


def _remainders(values: Whole, lengths: Whole) -> NDArray[np.uint8]:
    """The ``lengths`` lower bits of each value, the highest first."""
    begins = np.cumsum(lengths) - lengths
    flags = np.zeros(int(lengths.sum()), np.uint8)
    for j in range(int(lengths.max(initial=0))):
        longer = np.flatnonzero(lengths > j)
        left = lengths[longer] - 1 - j
        flags[begins[longer] + j] = (values[longer] >> left) & 1
    return flags


def _from_remainders(flags: NDArray[np.uint8], lengths: Whole) -> Whole:
    if flags.size < lengths.sum():
        raise DamagedPayload(f"{flags.size} bits; {lengths.sum()} were announced")
    begins = np.cumsum(lengths) - lengths
    values = np.zeros(lengths.size, np.int64)
    for j in range(int(lengths.max(initial=0))):
        longer = np.flatnonzero(lengths > j)
        values[longer] = (values[longer] << 1) | flags[begins[longer] + j]
    return values


def _none() -> Bytes:
    return np.zeros(0, np.uint8)
