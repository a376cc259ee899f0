"""What an operation costs on a cluster: α + βn on its links, collectives by the best algorithm of their kind.

n bytes, p ranks, α seconds of latency and 1/β bytes per second of the link, 1/γ bytes per second reduced:

    all_reduce       min(⌈lg p⌉ (α + nβ + nγ),  2⌈lg p⌉ α + 2(p−1)/p nβ + (p−1)/p nγ)    doubling, Rabenseifner
    reduce_scatter   ⌈lg p⌉ α + (p−1)/p n (β + γ)                                        recursive halving
    all_gather       ⌈lg p⌉ α + (p−1)/p nβ                                               recursive doubling
    broadcast        min(⌈lg p⌉ (α + nβ),  2⌈lg p⌉ α + 2(p−1)/p nβ)                      binomial tree, van de Geijn
    all_to_all       (p−1) α + (p−1)/p nβ                                                pairwise
    barrier          ⌈lg p⌉ α                                                            dissemination
    send, pull, push α + nβ

Thakur, Rabenseifner & Gropp (2005), Optimization of collective communication operations in MPICH, IJHPCA 19(1). Ranks
fill nodes in their order. What crosses nodes of several devices goes in two levels: reduced and scattered within a
node, exchanged between nodes by all its devices at once (on their share of the port), gathered within. On common memory
of one node an all-gather is a barrier. A parameter server is a port of its own, which serves one message after the
other; so it is a queue.

Approximation: links are priced as if nobody else used them, but for the devices of a node that share a port.

On a machine that `manyhands calibrate` has measured, what one node does is read off the curves of the transport
(`curves`), where there are any. Closed forms then only carry a curve to another number of ranks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence

from manyhands.cluster import Cluster, Link
from manyhands.cluster.measured import COMMON_GATHER, REREAD, WOKEN, Curve
from manyhands.communication.communicator import LOOKING
from manyhands.communication.transports.events import Operation
from manyhands.simulation.curves import CURVE, EXTRAPOLATED, FORMULA, UNKNOWN, Curves, Priced, curves_of

#: Between a worker and memory that stands for a server.
SERVED = ("pull", "push")


class Prices:
    """Seconds of an operation; nothing costs anything before `begin`, so that setting up takes no time.

    ``transport``: whose measured curves are used, if the cluster has some; None: those of shared memory. A machine that
    was measured takes more workers than it has cores. ``here``: curves that go before those of the cluster, since they
    are newer, or of the very sizes.
    """

    def __init__(
        self, cluster: Cluster | None, workers: int, transport: str | None = None, here: Sequence[Curve] = ()
    ) -> None:
        self._cluster = cluster
        self._begun = False
        self._per_node = workers if cluster is None else cluster.devices_per_node
        self._gamma = 0.0
        self._links: dict[str, Link] = {}
        self._curves: Curves | None = None
        #: Seconds priced so far, by where the prices come from.
        self.sources = {CURVE: 0.0, EXTRAPOLATED: 0.0, FORMULA: 0.0}
        #: By how much those seconds may be off, all of them in one direction.
        self.spread_s = 0.0
        #: What an optimizer takes at a server, for each byte of gradient that is pushed to it.
        self.serving_s_per_B = 0.0
        #: How much later than a server's lock is given back who has waited for it goes on.
        self.woken_s = 0.0
        if cluster is not None and workers > 1:
            newer = {(curve.operation, curve.ranks) for curve in here}
            older = curves_of(cluster.measured, transport)
            measured = [*here, *(curve for curve in older if (curve.operation, curve.ranks) not in newer)]
            if measured:
                self._curves = Curves(measured, workers, self._per_node, self._form)
                self._per_node = max(self._per_node, workers)
                woken = self._curves.price(WOKEN, 0, 2)
                self.woken_s = 0.0 if woken is None else woken.seconds
            levels = ["between"] if not measured and cluster.nodes_for(workers) > 1 else []
            levels += ["within"] if min(workers, self._per_node) > 1 else []
            self._links = {level: cluster.link(level) for level in levels}
            memory, share = cluster.device.memory_bandwidth.si, cluster.device.memory_efficiency
            self._gamma = 3 / (memory * (1.0 if share is None else share.si))  # two numbers read, one written
        self._collective = functools.lru_cache(maxsize=256)(self._price)
        self._messages: dict[tuple[str, str, int], Priced] = {}  # by name, level and size
        self._to_servers = "between" if "between" in self._links else "within"

    def begin(self) -> None:
        """From here on time passes."""
        self._begun = True

    def __call__(self, operation: Operation) -> float:
        """Seconds from when the last rank has come."""
        if not self._links or not self._begun or operation.purpose in LOOKING:
            return 0.0
        if operation.name in SERVED:
            priced = self._message(operation, self._to_servers)
        elif operation.name == "send":
            a, b = operation.ranks
            level = "within" if a // self._per_node == b // self._per_node else "between"
            priced = self._message(operation, level)
        else:
            priced = self._collective(operation)
        seconds, spread_s, source = priced
        if operation.name == "push":
            seconds += self.serving_s_per_B * operation.payload_B
        self.sources[source] += seconds
        self.spread_s += spread_s
        return seconds

    def queue(self, operation: Operation) -> Hashable | None:
        """What the operation occupies: the server's port."""
        return operation.destination if operation.name in SERVED else None

    def _message(self, operation: Operation, level: str) -> Priced:
        name, n = operation.name, operation.payload_B
        try:
            return self._messages[name, level, n]
        except KeyError:
            priced = None if self._curves is None else self._curves.price(name, n, 2)
            return self._messages.setdefault((name, level, n), priced or _by_formula(self._links[level].seconds(n)))

    def _price(self, operation: Operation) -> Priced:
        priced = None
        if self._curves is not None:
            priced = self._curves.price(operation.name, operation.payload_B, operation.size, common=operation.common)
        return priced or _by_formula(self._closed(operation))

    def _form(self, name: str, n: float, ranks: int) -> float:
        """On one node, for `Curves`."""
        link = self._links["within"]
        if name == REREAD:
            return (ranks - 1) / ranks * n / link.bandwidth_Bps()
        if name in (*SERVED, "send"):
            return link.seconds(n)
        return _flat("barrier" if name == COMMON_GATHER else name, n, ranks, link, 1, self._gamma)

    def _closed(self, operation: Operation) -> float:
        name, n, gamma = operation.name, operation.payload_B, self._gamma
        nodes = {rank // self._per_node for rank in operation.ranks}
        p, m = operation.size, len(nodes)
        d = -(-p // m)
        if m == 1 and operation.common and name == "all_gather":
            name = "barrier"
        if m == 1 or d == 1:
            return _flat(name, n, p, self._links["between" if m > 1 else "within"], 1, gamma)
        within, between = self._links["within"], self._links["between"]
        if name == "all_to_all":
            return _flat(name, n, p, between, d, gamma)
        if name == "all_reduce":
            ends = _flat("reduce_scatter", n, d, within, 1, gamma) + _flat("all_gather", n, d, within, 1, gamma)
            return ends + _flat(name, n / d, m, between, d, gamma)
        part = n / d if name in ("reduce_scatter", "all_gather") else n
        return _flat(name, n, d, within, 1, gamma) + _flat(name, part, m, between, d if part < n else 1, gamma)


def _by_formula(seconds: float) -> Priced:
    return Priced(seconds, UNKNOWN * seconds, FORMULA)


def _flat(name: str, n: float, p: int, link: Link, users: int, gamma: float) -> float:
    """On one level, ``users`` devices of a node sending at once."""
    alpha, beta = link.latency.si, 1 / link.bandwidth_Bps(users)
    rounds, most = math.ceil(math.log2(p)) if p > 1 else 0, (p - 1) / p
    match name:
        case "all_reduce":
            doubling = rounds * (alpha + n * (beta + gamma))
            return min(doubling, 2 * rounds * alpha + most * n * (2 * beta + gamma))
        case "reduce_scatter":
            return rounds * alpha + most * n * (beta + gamma)
        case "all_gather":
            return rounds * alpha + most * n * beta
        case "broadcast":
            return min(rounds * (alpha + n * beta), 2 * rounds * alpha + 2 * most * n * beta)
        case "all_to_all":
            return (p - 1) * alpha + most * n * beta
        case _:
            return rounds * alpha
