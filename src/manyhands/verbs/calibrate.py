"""Calibrate: this machine measured, once, for the verbs that predict."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manyhands.modelling.calibration import Calibration


def calibrate(
    *,
    out: str | os.PathLike[str] | None = None,
    quick: bool = False,
    transports: Sequence[str] | None = None,
    progress: bool = True,
) -> Calibration:
    """Measure this machine, in two minutes (``quick``: 20 s and less of it), into a cluster file with tables.

        verbs.calibrate().path

    Curves of what operations of each of ``transports`` take (default: all that work here), memory and arithmetic of
    the host, operators of torch. The file goes to the user's cache, where `predict` finds it, or to ``out``. Nothing is
    written before all is measured. Leave the machine alone meanwhile: noise is measured again, then widens the spreads.

    Raises `BadInput` before anything is measured.
    """
    from rich.console import Console

    from manyhands.modelling import calibration

    console = Console(stderr=True) if progress else None
    return calibration.calibrate(out=out, quick=quick, wanted=transports, console=console)
