"""When replicas agree (survey §VI-A): a strategy describes it, its worker does it.

`strategies` is the table of contents: a new strategy is one file, one line here and a row in the contract test.
"""

from manyhands.catalogue import Catalogue

strategies = Catalogue(
    "strategy",
    {
        "synchronous": "manyhands.consistency.synchronous:Synchronous",
        "replica_average": "manyhands.consistency.replica_average:ReplicaAverage",
        "slice_update": "manyhands.consistency.slice_update:SliceUpdate",
        "slice_own_batch": "manyhands.consistency.slice_own_batch:SliceOwnBatch",
    },
)
