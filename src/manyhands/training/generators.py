"""The random number generators that a model may draw from, as values a checkpoint can hold.

torch's on the CPU, and on the worker's GPU where it has one; Python's ``random`` and NumPy's ``np.random``, which are
where a user's own augmentation draws. Workers that are threads share the last two, so those are left alone there.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def capture(device: str, *, own_process: bool) -> dict[str, Any]:
    """The state of all of them."""
    state: dict[str, Any] = {"torch": torch.get_rng_state().view(torch.uint8)}
    if device != "cpu":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if own_process:
        _, words, gauss = random.getstate()
        state["python"] = {"words": torch.tensor(words, dtype=torch.int64), "gauss": gauss}
        legacy = np.random.get_state(legacy=False)
        assert isinstance(legacy, dict)
        if legacy["bit_generator"] == "MT19937":  # a user may put another in its place
            state["numpy"] = {
                "words": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
                "position": int(legacy["state"]["pos"]),
                "has_gauss": int(legacy["has_gauss"]),
                "gauss": float(legacy["gauss"]),
            }
    return state


def restore(state: Mapping[str, Any], device: str, *, own_process: bool) -> None:
    """Go on drawing where `capture` was called; what was not captured stays as it is."""
    torch.set_rng_state(state["torch"])
    if device != "cpu" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if own_process and "python" in state:
        python = state["python"]
        random.setstate((3, tuple(python["words"].tolist()), python["gauss"]))
    if own_process and "numpy" in state:
        kept = state["numpy"]
        words = kept["words"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", words, kept["position"], kept["has_gauss"], kept["gauss"]))
