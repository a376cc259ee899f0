"""Tiny Shakespeare: 1,115,394 characters of his plays, 65 different ones, the usual text for character models.

Public domain; collected by A. Karpathy. It is not part of the package: ``input.txt`` is looked for where `places` says
(folder ``tinyshakespeare``) and else fetched into the cache. Wherever it comes from, it must have the sum below.
"""

from __future__ import annotations

import hashlib
import logging
from functools import partial
from pathlib import Path

import numpy as np
import torch

from manyhands.catalogue import Reference
from manyhands.data.dataset import Splits
from manyhands.data.download import fetch
from manyhands.data.places import cache, holding, searched
from manyhands.data.text import split
from manyhands.errors import BadInput, DamagedFile

log = logging.getLogger(__name__)

NAME = "tinyshakespeare"
FILE = "input.txt"
LENGTH_B = 1_115_394
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
MIRRORS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
)


def tinyshakespeare(*, length: int = 64, limit: int | None = None, folder: Path | None = None) -> Splits:
    """Shakespeare in windows of ``length`` characters, each to predict the next; 90 % to train, the rest to test.

    A sample is ``(inputs, target)``, int64 ``(length,)`` each: numbers of characters in the text's sorted vocabulary,
    the target one character further. Windows do not overlap. ``limit`` keeps only that many of the training windows.
    """
    path = (holding(NAME, folder, lambda place: (place / FILE).is_file()) or _download(folder)) / FILE
    with path.open("rb") as f:
        text = _checked(f.read(LENGTH_B + 1), where=str(path))
    vocabulary, numbers = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    train, test = split(NAME, torch.from_numpy(numbers.astype(np.int64)), length=length, limit=limit)
    return Splits(
        train,
        test,
        inputs=(length,),
        classes=len(vocabulary),
        name=NAME,
        source=f"{NAME}: {len(train):,} + {len(test):,} windows of {length} characters from {path.parent}",
    )


vars(tinyshakespeare)["paper"] = Reference(
    "A. Karpathy", "The unreasonable effectiveness of recurrent neural networks", 2015, "github.com/karpathy/char-rnn"
)


def _checked(text: bytes, *, where: str) -> bytes:
    found = hashlib.sha256(text).hexdigest()
    if found != SHA256:
        length = f"more than {LENGTH_B:,}" if len(text) > LENGTH_B else f"{len(text):,}"
        raise DamagedFile(
            f"{where} is not Tiny Shakespeare, or damaged: it has {length} bytes of {LENGTH_B:,}. SHA-256: found "
            f"{found}, expected {SHA256}. Delete the file and get {FILE} of {NAME} again."
        )
    return text


def _download(folder: Path | None) -> Path:
    place, reason = cache(NAME), ""
    for url in MIRRORS:
        try:
            log.info("fetching %s", url)
            fetch(url, place / FILE, cap_B=LENGTH_B, check=partial(_checked, where=url))
            return place
        except (OSError, BadInput) as e:
            reason = reason or str(e)
    raise BadInput(
        f"Tiny Shakespeare is not at hand and could not be downloaded ({reason}). Looked in: "
        f"{', '.join(map(str, searched(NAME, folder)))}. Put {FILE} into a folder and name it with "
        "--data-dir FOLDER or MANYHANDS_DATA=FOLDER; or take --data markov, which needs no file."
    )
