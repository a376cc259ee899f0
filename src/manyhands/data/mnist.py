"""MNIST: 60,000 + 10,000 handwritten digits of 28×28 pixels.

Y. LeCun, C. Cortes, C. J. C. Burges; CC BY-SA 3.0. It is not part of the package: the four files are looked for where
`places` says (folder ``mnist``) and else fetched into the cache. Wherever they come from, their content must have the
sums below.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from manyhands.catalogue import Reference
from manyhands.data.dataset import Arrays, Splits
from manyhands.data.download import fetch
from manyhands.data.idx import IdxFile
from manyhands.data.limits import limited
from manyhands.data.places import cache, holding, searched
from manyhands.errors import BadInput

log = logging.getLogger(__name__)

#: Sums of the decompressed files; the training images' MD5 is the published 6bbc9ace898e44ae57da46a324031adb.
FILES = (
    IdxFile(
        "train-images-idx3-ubyte",
        (60000, 28, 28),
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    IdxFile("train-labels-idx1-ubyte", (60000,), "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    IdxFile(
        "t10k-images-idx3-ubyte",
        (10000, 28, 28),
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    IdxFile("t10k-labels-idx1-ubyte", (10000,), "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
)
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
MEAN, DEVIATION = 0.1307, 0.3081  # of all training pixels, as every MNIST example has them


def mnist(*, folder: Path | None = None, limit: int | None = None, normalize: bool = False) -> Splits:
    """28×28 digits in 10 classes; pixels as float32 from 0 to 1, no further scaling unless ``normalize=True``.

    ``normalize=True`` gives (x − 0.1307) / 0.3081. ``limit`` keeps only the first so many of the training samples.
    """
    place = at_hand(folder) or _download(folder)
    train = limited("mnist", limit, FILES[0].shape[0])
    images, labels, test_images, test_labels = (f.elements(_file(place, f)) for f in FILES)
    return Splits(
        _arrays(images[:train], labels[:train], normalize),
        _arrays(test_images, test_labels, normalize),
        inputs=(1, 28, 28),
        classes=10,
        name="mnist",
        source=f"mnist: {train:,} + 10,000 images of 28×28 pixels from {place}",
    )


vars(mnist)["paper"] = Reference(
    "Y. LeCun, L. Bottou, Y. Bengio, P. Haffner",
    "Gradient-based learning applied to document recognition",
    1998,
    "Proceedings of the IEEE 86(11), 2278-2324",
)


def _arrays(images: NDArray[np.uint8], labels: NDArray[np.uint8], normalize: bool) -> Arrays:
    x = torch.from_numpy(images.astype(np.float32)).unsqueeze(1).div_(255)
    if normalize:
        x.sub_(MEAN).div_(DEVIATION)
    return Arrays(x, torch.from_numpy(labels.astype(np.int64)))


def places(folder: Path | None = None) -> Iterator[Path]:
    """Folders that may hold the files, best first."""
    return searched("mnist", folder)


def at_hand(folder: Path | None = None) -> Path | None:
    """The first place that has all four files, or None. Their content is not looked at."""
    return holding("mnist", folder, lambda place: all(_file(place, f).is_file() for f in FILES))


def _file(place: Path, file: IdxFile) -> Path:
    plain = place / file.name
    return plain if plain.is_file() else place / f"{file.name}.gz"


def _download(folder: Path | None) -> Path:
    place, reason = cache("mnist"), ""
    for mirror in MIRRORS:
        try:
            for file in FILES:
                target = place / f"{file.name}.gz"
                if not target.is_file():
                    url = f"{mirror}{file.name}.gz"
                    log.info("fetching %s", url)
                    fetch(url, target, cap_B=file.file_cap_B, check=partial(file.decode, where=url))
            return place
        except (OSError, BadInput) as e:
            reason = reason or str(e)
    looked = ", ".join(map(str, places(folder)))
    names = ", ".join(f"{f.name}.gz" for f in FILES)
    raise BadInput(
        f"MNIST is not at hand and could not be downloaded ({reason}). Looked in: {looked}. Put the four files {names} "
        "into a folder and name it with --data-dir FOLDER or MANYHANDS_DATA=FOLDER; or take --data digits, "
        "which needs no file."
    )
