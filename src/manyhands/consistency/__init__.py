"""When replicas agree (survey §VI-A): a strategy describes it, its worker does it.

`strategies` is the table of contents: a new strategy is one file, one line here and a row in the contract test.
"""

from manyhands.catalogue import Catalogue

strategies = Catalogue(
    "strategy",
    {
        "synchronous": "manyhands.consistency.synchronous:Synchronous",
        "sandblaster": "manyhands.consistency.sandblaster:Sandblaster",
        "backup_workers": "manyhands.consistency.backup_workers:BackupWorkers",
        "ssp": "manyhands.consistency.ssp:StaleSynchronous",
        "asynchronous": "manyhands.consistency.asynchronous:Asynchronous",
        "downpour": "manyhands.consistency.downpour:Downpour",
        "hogwild": "manyhands.consistency.hogwild:Hogwild",
        "local": "manyhands.consistency.local:Local",
        "parallel_sgd": "manyhands.consistency.parallel_sgd:ParallelSGD",
        "diloco": "manyhands.consistency.diloco:DiLoCo",
        "elastic": "manyhands.consistency.elastic:Elastic",
        "replica_average": "manyhands.consistency.replica_average:ReplicaAverage",
        "slice_update": "manyhands.consistency.slice_update:SliceUpdate",
        "slice_own_batch": "manyhands.consistency.slice_own_batch:SliceOwnBatch",
        "gossip": "manyhands.consistency.gossip:Gossip",
        "push_sum": "manyhands.consistency.push_sum:PushSum",
        "asynchronous_gossip": "manyhands.consistency.asynchronous_gossip:AsynchronousGossip",
    },
)
