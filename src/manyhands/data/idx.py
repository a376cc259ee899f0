"""Reading an idx file, plain or gzipped, of which the length and the SHA-256 of the content are known beforehand.

The sum is that of the *decompressed* content, so that a plain file and one packed again by another program are both
taken. No more is read or unpacked than a sound file can hold: a gzip bomb ends one byte after the expected length.

    idx: two zero bytes, type (8 = unsigned byte), number of dims d, d sizes (big-endian, 4 bytes each), the elements
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from manyhands.errors import DamagedFile

_GZIP = b"\x1f\x8b"
_PACKED_OVERHEAD = 1 << 16  # what gzip may add to content that does not shrink: 5 bytes in 16 KiB, and the file's name


@dataclass(frozen=True)
class IdxFile:
    """One idx file of unsigned bytes, as it should be."""

    name: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def header(self) -> bytes:
        """The first bytes: magic number and sizes."""
        return struct.pack(f">4B{len(self.shape)}I", 0, 0, 8, len(self.shape), *self.shape)

    @property
    def content_B(self) -> int:
        """Length of the decompressed content."""
        return len(self.header) + prod(self.shape)

    @property
    def file_cap_B(self) -> int:
        """No sound file, plain or packed, is longer."""
        return self.content_B + self.content_B // 1000 + _PACKED_OVERHEAD

    def elements(self, path: Path) -> NDArray[np.uint8]:
        """The elements in ``path``, read-only; `DamagedFile` if anything differs from what it should be."""
        with path.open("rb") as f:
            raw = f.read(self.file_cap_B + 1)
        return self.decode(raw, str(path))

    def decode(self, raw: bytes, where: str) -> NDArray[np.uint8]:
        """As `elements`, from the bytes of a file that ``where`` names in the message."""
        content, trouble = raw, ""
        if raw.startswith(_GZIP):
            unpack = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
            try:
                content = unpack.decompress(raw, self.content_B + 1)
            except zlib.error as e:
                content, trouble = b"", f"it cannot be unpacked ({e})"
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            trouble = trouble or self._difference(content)
            raise DamagedFile(
                f"{where} is damaged: {trouble}. SHA-256 of its content: found {found}, expected {self.sha256}. Delete "
                f"the file and get {self.name} again: a fresh copy, plain or as .gz, works."
            )
        return np.frombuffer(content, np.uint8, offset=len(self.header)).reshape(self.shape)

    def _difference(self, content: bytes) -> str:
        magic = self.header[:4]
        if content[:4] != magic:
            return f"it begins with {content[:4].hex() or 'nothing'}, such an idx file with {magic.hex()}"
        if len(content) < self.content_B:
            return f"it ends after {len(content):,} of {self.content_B:,} bytes"
        if len(content) > self.content_B:
            return f"it goes on after {self.content_B:,} bytes"
        return "some of its bytes differ"
