"""What a plan's cost is asked for: everything but the plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from manyhands.cluster import Cluster
from manyhands.data import Splits
from manyhands.task import Task


@dataclass(frozen=True, eq=False)
class Given:
    """A task, with its model and data as they were built from it, on a cluster.

    ``model`` is as its factory made it, and stays so.
    """

    task: Task
    cluster: Cluster
    model: torch.nn.Module
    splits: Splits
    #: The cluster is this machine, so that what is measured here holds there.
    here: bool
    #: Where workers that are started for a measurement find the data.
    data_dir: str | None = None
