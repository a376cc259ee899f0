"""What a plan will cost, before it is run."""

from manyhands.modelling.prediction.computed import (
    SOURCES,
    Computed,
    Source,
    as_measured,
    brought_up,
    computing,
    is_cut,
)
from manyhands.modelling.prediction.running import asked_by
from manyhands.modelling.prediction.step import ERRORS, Prediction, predicted, with_memory

__all__ = [
    "ERRORS",
    "SOURCES",
    "Computed",
    "Prediction",
    "Source",
    "as_measured",
    "asked_by",
    "brought_up",
    "computing",
    "is_cut",
    "predicted",
    "with_memory",
]
