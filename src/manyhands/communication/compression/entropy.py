"""Lossless codes on top of another scheme: what it sends, in fewer bytes (Rice 1979; Huffman 1952).

    indices    ascending, so their gaps are small: a gap by Rice's code, whose parameter is fitted to their mean
    the rest   each byte of a word (exponents are alike, mantissas are not) by Huffman's code, where it pays

``of`` is the scheme: strom's indices shrink from 32 bits to about log₂(n/k) + 2.5, which is a further 2 to 3 times at a
density of 1/1000; floats lose their exponents' share, a tenth or two. Whether Huffman's code pays is tried on a sample
of each plane of bytes; if nothing gets shorter the payload goes as it is, behind one byte that says so.

Payload: at most that of ``of`` and 1 byte.
Guarantee: exactly what ``of`` promises: decoding gives its payload back bit for bit. Feedback is that of ``of``.

R. F. Rice (1979), Some practical universal noiseless coding techniques, JPL 79-22; D. A. Huffman (1952), A method for
the construction of minimum-redundancy codes; both codes on gradients: N. Strom (2015).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.communication.compression.bits import Bytes, best_rice, from_rice, rice
from manyhands.communication.compression.compressor import Compressor, compressor_from
from manyhands.communication.compression.entries import Sparsifier, check_indices
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.one_shot import Entries, OneShot
from manyhands.communication.compression.state import State
from manyhands.communication.compression.strom import SIGN, Strom
from manyhands.communication.compression.top_k import TopK
from manyhands.errors import DamagedPayload

RAW, GAPS, PLANES = 0, 1, 2
#: Set in the length of a plane that is coded; vectors are guarded to fewer bytes.
CODED = 1 << 31
#: Bytes of a plane on which Huffman's code is tried, and what it must save there.
SAMPLE, WORTH = 65_536, 0.03


@dataclass(frozen=True)
class Entropy(OneShot):
    """What the scheme ``of`` sends, without loss in fewer bytes: Rice's code for indices, Huffman's for the rest."""

    name: ClassVar[str] = "entropy"
    paper: ClassVar[Reference] = Reference(
        "Rice", "Some practical universal noiseless coding techniques", 1979, "JPL publication 79-22", survey="VI-B"
    )

    of: str = "strom"

    def __post_init__(self) -> None:
        inner = compressor_from(self.of)
        plain = isinstance(inner, OneShot) and type(inner).exchange is OneShot.exchange and inner.name != self.name
        if not plain or type(inner).aggregate is not Compressor.aggregate:
            raise ValueError(
                f"of={self.of!r}: it is a scheme whose payloads are gathered as they are: strom, top_k, one_bit, qsgd, "
                "two_bit, int8, flexpoint or none"
            )
        object.__setattr__(self, "of", str(inner))
        object.__setattr__(self, "feedback", inner.feedback)

    @cached_property
    def inner(self) -> OneShot:
        """The scheme whose payloads are coded."""
        inner = compressor_from(self.of)
        assert isinstance(inner, OneShot)
        return inner

    @property
    def variable(self) -> bool:
        """How well a payload can be coded depends on it."""
        return True

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        """As the scheme is."""
        return self.inner.unbiased

    @property
    def lossless(self) -> bool:  # type: ignore[override]
        """As the scheme is."""
        return self.inner.lossless

    @property
    def longest(self) -> int | None:  # type: ignore[override]
        """As the scheme says."""
        return self.inner.longest

    def contraction(self, numel: int) -> float:
        """That of the scheme."""
        return self.inner.contraction(numel)

    def variance(self, numel: int) -> float:
        """That of the scheme."""
        return self.inner.variance(numel)

    def payload_B(self, layout: Layout) -> int:
        """At most the scheme's, and a byte."""
        return self.inner.payload_B(layout) + 1

    def prepare(self, state: State) -> None:
        """See `Compressor.prepare`."""
        self.inner.prepare(state)

    def encode(self, x: Tensor, state: State) -> Tensor:
        """See `OneShot.encode`."""
        payload = self.inner.encode(x, state).numpy()
        if isinstance(self.inner, Strom):
            kind, coded = GAPS, _code_words(payload)
        elif isinstance(self.inner, TopK):
            k = payload.size // (4 + state.layout.itemsize)
            indices = payload[: 4 * k].view(np.uint32).astype(np.int64)
            gaps = _code_gaps(indices)
            values = code_planes(payload[4 * k :], state.layout.itemsize)
            kind, coded = GAPS, np.concatenate([np.array([gaps.size], np.uint32).view(np.uint8), gaps, values])
        else:
            kind, coded = PLANES, code_planes(payload, self._word(state))
        if coded.size >= payload.size:
            kind, coded = RAW, payload
        return torch.from_numpy(np.concatenate([np.array([kind], np.uint8), coded]))

    def _word(self, state: State) -> int:
        return state.layout.itemsize if self.inner.lossless else 1

    def entries(self, payload: Tensor, state: State) -> Entries | None:
        """See `OneShot.entries`."""
        return self.inner.entries(self._decoded(payload, state), state) if isinstance(self.inner, Sparsifier) else None

    def add_(self, out: Tensor, payload: Tensor, state: State, sign: int = 1) -> None:
        """See `OneShot.add_`."""
        self.inner.add_(out, self._decoded(payload, state), state, sign)

    def _decoded(self, payload: Tensor, state: State) -> Tensor:
        """The payload of the scheme itself."""
        coded = payload.numpy()
        if not coded.size or coded[0] > PLANES:
            raise DamagedPayload(f"entropy: a payload of {coded.size} bytes that does not say how it is coded")
        kind, coded = int(coded[0]), coded[1:]
        numel, most = state.layout.numel, self.inner.payload_B(state.layout)
        if kind == GAPS and isinstance(self.inner, Strom):
            coded = _decode_words(coded, numel)
        elif kind == GAPS:
            if coded.size < 4 or int(coded[:4].view(np.uint32)[0]) > coded.size - 4:
                raise DamagedPayload(f"entropy: {coded.size} bytes of gaps and values")
            at = 4 + int(coded[:4].view(np.uint32)[0])
            indices = _decode_gaps(coded[4:at], numel)
            values = decode_planes(coded[at:], state.layout.itemsize, most)
            coded = np.concatenate([indices.astype(np.int32).view(np.uint8), values])
        elif kind == PLANES:
            coded = decode_planes(coded, self._word(state), most)
        # An alignment that a view of words may rely on.
        return torch.from_numpy(np.array(coded))


def _code_gaps(indices: np.ndarray) -> Bytes:
    """How many ascending indices there are and the code's parameter (4 bytes and 1), then the gaps."""
    gaps = np.diff(indices, prepend=-1) - 1
    r = best_rice(gaps)
    head = np.array([indices.size], np.uint32).view(np.uint8), np.array([r], np.uint8)
    return np.concatenate([*head, rice(gaps, r)])


def _decode_gaps(coded: Bytes, numel: int) -> np.ndarray:
    count = _count(coded, numel)
    indices = np.cumsum(from_rice(coded[5:], count, int(coded[4])) + 1) - 1
    check_indices(indices, numel, "entropy")
    return indices


def _count(coded: Bytes, numel: int) -> int:
    count = int(coded[:4].view(np.uint32)[0]) if coded.size >= 5 else numel + 1
    if count > numel:
        raise DamagedPayload(f"entropy: gaps in {coded.size} bytes, for a vector of {numel}")
    return count


def _code_words(payload: Bytes) -> Bytes:
    """Strom's words: signs, then gaps."""
    words = payload.view(np.uint32)
    return np.concatenate([_code_gaps((words & ~SIGN).astype(np.int64)), np.packbits(words >= SIGN)])


def _decode_words(coded: Bytes, numel: int) -> Bytes:
    count = _count(coded, numel)
    at = coded.size - -(-count // 8)
    if at < 5:
        raise DamagedPayload(f"entropy: {count} words in {coded.size} bytes")
    signs = np.unpackbits(coded[at:], count=count).astype(np.uint32) << np.uint32(31)
    return (_decode_gaps(coded[:at], numel).astype(np.uint32) | signs).view(np.uint8)


def code_planes(payload: Bytes, word: int) -> Bytes:
    """The first bytes of all words, then the second ones …; before each, 4 bytes: is it coded, and its length."""
    parts = []
    for plane in payload.reshape(-1, word).T:
        data = plane.tobytes()
        coded = b""
        if len(_huffman(data[:SAMPLE])) < (1 - WORTH) * len(data[:SAMPLE]):
            coded = _huffman(data)
        head = len(coded) | CODED if coded else len(data)
        parts += [np.array([head], np.uint32).view(np.uint8), np.frombuffer(coded or data, np.uint8)]
    return np.concatenate(parts)


def decode_planes(coded: Bytes, word: int, most_B: int) -> Bytes:
    """The payload of `code_planes`, of at most ``most_B`` bytes."""
    planes, at = list[Bytes](), 0
    for _ in range(word):
        head = (
            int(coded[at : at + 4].view(np.uint32)[0]) if at + 4 <= coded.size else 2 * CODED
        )  # too long for anything
        at, length = at + 4, head & ~CODED
        if at + length > coded.size:
            raise DamagedPayload(f"entropy: {word} planes in {coded.size} bytes")
        plane = coded[at : at + length]
        planes.append(_from_huffman(plane.tobytes(), most_B // word) if head & CODED else plane)
        at += length
    if at != coded.size or len({plane.size for plane in planes}) != 1:
        raise DamagedPayload("entropy: planes of bytes that do not fit each other")
    return np.ascontiguousarray(np.stack(planes, axis=1)).ravel()


def _huffman(data: bytes) -> bytes:
    coder = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data) + coder.flush()


def _from_huffman(coded: bytes, most_B: int) -> Bytes:
    decoder = zlib.decompressobj(-15)
    try:
        data = decoder.decompress(coded, most_B + 1)
    except zlib.error as e:
        raise DamagedPayload(f"entropy: {e}") from None
    if len(data) > most_B or not decoder.eof:
        raise DamagedPayload(f"entropy: a plane of more than {most_B} bytes, or of too few")
    return np.frombuffer(data, np.uint8)
