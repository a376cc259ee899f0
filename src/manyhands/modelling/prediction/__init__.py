"""What a plan will cost, before it is run."""

from manyhands.modelling.prediction.computed import SOURCES, Computed, Source, as_measured, computing
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
    "computing",
    "predicted",
    "with_memory",
]
