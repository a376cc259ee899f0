"""This machine measured: `manyhands calibrate` writes a cluster file with tables, which predictions read.

knots         where to measure a curve: adaptively
stamps        clock stamps of all ranks to the time of an operation, from the last arrival
patterns      one round of an operation as a training step has it
collectives   the curves of a transport, inside its workers
probe         the host's state: a cache line's way between two cores
repeating     what was disturbed: again, then wider
host          memory, arithmetic, dispatch, jitter: the jobs; `hosting` makes figures of them
links         α and β fitted to a curve
keeping       the user's cache, and whether a calibration still holds
measuring     all of it, within its time; `telling` says how far it is
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manyhands.modelling.calibration.keeping import Found as Found
    from manyhands.modelling.calibration.keeping import cached as cached
    from manyhands.modelling.calibration.keeping import look as look
    from manyhands.modelling.calibration.keeping import stale as stale
    from manyhands.modelling.calibration.measuring import Calibration as Calibration
    from manyhands.modelling.calibration.measuring import calibrate as calibrate

__all__ = ["Calibration", "Found", "cached", "calibrate", "look", "stale"]


def __getattr__(name: str) -> Any:  # workers load a job and not the whole of it
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    where = "measuring" if name.lower().startswith("calibrat") else "keeping"
    return getattr(importlib.import_module(f"{__name__}.{where}"), name)
