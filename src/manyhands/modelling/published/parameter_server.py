"""W workers, S servers that hold a share each: whichever end is busier sets the pace.

    one way   max(n/B_worker, W·n/(S·B_server))

M. Li et al. 2014, "Scaling Distributed Machine Learning with the Parameter Server", OSDI. The formula is the usual
bound on its design, derived here: each worker's port carries n, each server's the W-fold of its share n/S.
"""

from __future__ import annotations

from manyhands.catalogue import Reference


def exchange_s(
    size_B: float,
    workers: int,
    servers: int,
    *,
    worker_Bps: float,
    server_Bps: float,
    latency_s: float = 0.0,
    both_ways: bool = True,
) -> float:
    """Seconds until every worker has pushed ``size_B`` bytes, and, ``both_ways``, has pulled as many afterwards."""
    one_way = latency_s + max(size_B / worker_Bps, workers * size_B / (servers * server_Bps))
    return 2 * one_way if both_ways else one_way


def enough_servers(workers: int, *, worker_Bps: float, server_Bps: float) -> int:
    """The fewest servers that leave the workers' own ports the bottleneck: ⌈W·B_worker/B_server⌉."""
    return max(1, int(-(-workers * worker_Bps // server_Bps)))


vars(exchange_s)["paper"] = Reference(
    "M. Li et al.", "Scaling Distributed Machine Learning with the Parameter Server", 2014, "OSDI", survey="VI-A"
)
