"""Where a communicator's parameter server lies: on ranks, in common memory, or in memory that workers reach."""

from __future__ import annotations

import torch

from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.compressor import Compressor
from manyhands.consistency.parameter_server.common_store import CommonStore
from manyhands.consistency.parameter_server.remote_store import RemoteStore
from manyhands.consistency.parameter_server.store import Store
from manyhands.consistency.parameter_server.window_store import WindowStore
from manyhands.contract import Replica


def opened(
    replica: Replica,
    comm: Communicator,
    servers: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scaled: bool = False,
    compressor: Compressor | None = None,
) -> Store:
    """The servers of ``comm``, which cut each piece into so many shards; see `Store`. Collective."""
    kind = RemoteStore if comm.servers is not None else WindowStore if comm.one_sided else CommonStore
    return kind(replica, comm, servers, optimizer=optimizer, scaled=scaled, compressor=compressor)
