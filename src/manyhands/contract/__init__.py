"""What partition and consistency have in common: types, and how a tensor of any dtype is carried.

A *partition* makes a `Replica` (where the network is cut); a *consistency* strategy gets a replica and a communicator
and makes a `Worker` (when replicas agree). They never see each other.
"""

from manyhands.catalogue import Reference
from manyhands.contract.block import Block
from manyhands.contract.carrying import carried, put_down
from manyhands.contract.measurement import Measurement, Spread, StepParts
from manyhands.contract.replica import BUCKET_B, Batch, Piece, Ready, Replica, StateSlice
from manyhands.contract.strategy import Parameters, Setting, Strategy, Traffic, Worker
from manyhands.contract.tensors import is_finite, rows_of

__all__ = [
    "BUCKET_B",
    "Batch",
    "Block",
    "Measurement",
    "Parameters",
    "Piece",
    "Ready",
    "Reference",
    "Replica",
    "Setting",
    "Spread",
    "StateSlice",
    "StepParts",
    "Strategy",
    "Traffic",
    "Worker",
    "carried",
    "is_finite",
    "put_down",
    "rows_of",
]
