"""Train a PyTorch model with many workers under every parallel-training scheme, and know what each costs.

    import manyhands as mh

    task = mh.Task(model="perceptron(hidden=50)", data="digits", optimizer="sgd(lr=0.1)", batch_size=100, epochs=3)
    result = mh.train(task, mh.Plan(strategy=mh.Synchronous(), workers=2))

Importing this sets nothing, starts nothing and does not import torch: names are looked up when they are used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manyhands.communication.topology import Mesh as Mesh
    from manyhands.consistency.replica_average import ReplicaAverage as ReplicaAverage
    from manyhands.consistency.slice_own_batch import SliceOwnBatch as SliceOwnBatch
    from manyhands.consistency.slice_update import SliceUpdate as SliceUpdate
    from manyhands.consistency.synchronous import Synchronous as Synchronous
    from manyhands.contract import Measurement as Measurement
    from manyhands.errors import ManyhandsError as ManyhandsError
    from manyhands.plan import Plan as Plan
    from manyhands.task import Task as Task
    from manyhands.verbs.predict import predict as predict
    from manyhands.verbs.search import search as search
    from manyhands.verbs.simulate import simulate as simulate
    from manyhands.verbs.train import Result as Result
    from manyhands.verbs.train import train as train

_WHERE = {
    "Task": "manyhands.task",
    "Plan": "manyhands.plan",
    "train": "manyhands.verbs",
    "simulate": "manyhands.verbs",
    "predict": "manyhands.verbs",
    "search": "manyhands.verbs",
    "Result": "manyhands.verbs",
    "Mesh": "manyhands.communication.topology",
    "Measurement": "manyhands.contract",
    "ManyhandsError": "manyhands.errors",
    "Synchronous": "manyhands.consistency.synchronous",
    "ReplicaAverage": "manyhands.consistency.replica_average",
    "SliceUpdate": "manyhands.consistency.slice_update",
    "SliceOwnBatch": "manyhands.consistency.slice_own_batch",
}

__all__ = [
    "ManyhandsError",
    "Measurement",
    "Mesh",
    "Plan",
    "ReplicaAverage",
    "Result",
    "SliceOwnBatch",
    "SliceUpdate",
    "Synchronous",
    "Task",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'manyhands' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
