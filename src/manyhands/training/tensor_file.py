"""Write a safetensors file in a stream: hashed as it goes, forced to disk, every failure an OSError.

The format (github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header length, a JSON header
``{name: {dtype, shape, data_offsets}}`` padded with spaces to 8 bytes, then the tensors without gaps. The library's own
writer is not used because it hands back no hash of what it *meant* to write (which is what a read-back is compared
with), wraps a full disk in an error of its own, and refuses views that overlap. Reading is left to the library.

Cost: one tensor's contiguous copy at a time, where it is not contiguous on the CPU already.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from manyhands.errors import BadInput

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

#: Bytes handed to the kernel and to the hash at a time: large enough that call overhead vanishes, small beside a cache.
CHUNK_B = 1 << 20


@dataclass(frozen=True)
class FileSum:
    """What a file must hold."""

    size_B: int
    sha256: str


def check_storable(tensors: Mapping[str, Tensor]) -> None:
    """Refuse, by name, what the format cannot hold; before anything is written."""
    for name, tensor in tensors.items():
        kind = f"{tensor.dtype}".removeprefix("torch.")
        if tensor.dtype not in DTYPES:
            raise BadInput(f"Tensor {name!r} is {kind}, which safetensors cannot hold. Store it in another dtype.")
        if tensor.layout is not torch.strided or tensor.is_meta:
            where = "on the meta device" if tensor.is_meta else f"{tensor.layout}".removeprefix("torch.")
            raise BadInput(f"Tensor {name!r} is {where}: a checkpoint holds dense tensors with values.")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileSum:
    """Write ``tensors`` (checked by `check_storable`) and force them to disk; returns the sum of what was meant."""
    # Widest dtype first keeps every tensor aligned, as the library's own writer does.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return write_bytes(path, [memoryview(start), *(_bytes(tensors[name]) for name in names)])


def write_bytes(path: Path, parts: Iterable[memoryview]) -> FileSum:
    """Write ``parts`` end to end into the new file ``path`` and force it to disk."""
    digest, size_B = hashlib.sha256(), 0
    with open(path, "xb", buffering=CHUNK_B) as file:
        for part in parts:
            for lo in range(0, len(part), CHUNK_B):
                chunk = part[lo : lo + CHUNK_B]
                digest.update(chunk)
                file.write(chunk)
                size_B += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileSum(size_B, digest.hexdigest())


def read_sum(path: Path) -> FileSum:
    """The sum of what the regular file ``path`` holds now; a link is not followed."""
    digest, size_B = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    with open(descriptor, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_B):
            digest.update(chunk)
            size_B += len(chunk)
    return FileSum(size_B, digest.hexdigest())


def _bytes(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data
