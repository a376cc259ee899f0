"""The digits that come with the package: 1,797 real scans of 8×8 pixels.

E. Alpaydin and C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, CC BY 4.0
(see ``NOTICE`` beside this file). These are the 1,797 scans of its test part, by 13 writers, as scikit-learn ships
them: each pixel counts the black ones among 4×4 of the original bitmap, 0 … 16.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from manyhands.catalogue import Reference
from manyhands.data.dataset import Arrays, Splits
from manyhands.data.limits import limited
from manyhands.grammar import PARSING

TRAIN = 1437  # the first four fifths, in the file's order


def digits(*, limit: int | None = None) -> Splits:
    """8×8 digits in 10 classes: the first 1,437 to train, the last 360 to test; pixels scaled to 0 … 1.

    ``limit`` keeps only that many of the training samples.
    """
    # An array's header is the text of a dict.
    with PARSING, np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
        images, labels = stored["images"], stored["labels"]
    x = torch.from_numpy(images).unsqueeze(1).to(torch.float32).div_(16)
    y = torch.from_numpy(labels).to(torch.int64)
    train = limited("digits", limit, TRAIN)
    return Splits(
        Arrays(x[:train].clone(), y[:train].clone()),
        Arrays(x[TRAIN:].clone(), y[TRAIN:].clone()),
        inputs=(1, 8, 8),
        classes=10,
        name="digits",
        source=f"digits: {train:,} + 360 scans of 8×8 pixels that come with manyhands (UCI, CC BY 4.0)",
    )


vars(digits)["paper"] = Reference(
    "E. Alpaydin, C. Kaynak", "Cascading classifiers", 1998, "Kybernetika 34(4), 369-374; data: UCI, CC BY 4.0"
)
