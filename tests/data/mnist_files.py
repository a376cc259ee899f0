"""Where the real MNIST files are in development and CI, if anywhere; and small stand-ins for them."""

import gzip
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from manyhands.data.idx import IdxFile

_STATED = os.environ.get("MANYHANDS_DATA")
#: Folders that may hold the real files.
PLACES = [Path(_STATED)] if _STATED else []
PLACES.append(Path(__file__).parents[2].parent / "shared" / "data")

#: A folder that has ``mnist/`` with the real files, or None.
REAL = next((p for p in PLACES if (p / "mnist" / "train-images-idx3-ubyte.gz").is_file()), None)

needs_mnist = pytest.mark.skipif(
    REAL is None, reason="the MNIST files are neither in $MANYHANDS_DATA nor ../shared/data"
)


def small(name: str, shape: tuple[int, ...], seed: int) -> tuple[IdxFile, bytes]:
    """A small idx file of 10 classes at most, as it should be, and its content."""
    elements = np.random.default_rng(seed).integers(0, 10, shape, dtype=np.uint8)
    unsummed = IdxFile(name, shape, "")
    content = unsummed.header + elements.tobytes()
    return IdxFile(name, shape, hashlib.sha256(content).hexdigest()), content


def small_mnist() -> dict[IdxFile, bytes]:
    """Four stand-ins in MNIST's order: 30 training and 10 test samples, content by description."""
    names = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
    shapes: list[tuple[int, ...]] = [(30, 28, 28), (30,), (10, 28, 28), (10,)]
    return dict(small(n, s, i) for i, (n, s) in enumerate(zip(names, shapes, strict=True)))


def write(folder: Path, files: dict[IdxFile, bytes], *, packed: bool = True) -> None:
    """Put the files into ``folder`` as .gz, or plain."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        path = folder / (f"{file.name}.gz" if packed else file.name)
        path.write_bytes(gzip.compress(content) if packed else content)
