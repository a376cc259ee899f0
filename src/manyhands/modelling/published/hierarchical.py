"""An all-reduce over nodes of several devices: reduce-scatter within, all-reduce between, all-gather within.

    T = Σ over levels from the inside: reduce-scatter + all-gather of what is left there;  outermost: all-reduce

n bytes enter the first level of p₁ ranks; n/p₁ enter the second, and so on, so that the slow outer link carries the
least. As in M. Cho, U. Finkler, D. Kung, H. Hunter 2019, "BlueConnect: Decomposing All-Reduce for Deep Learning on
Heterogeneous Network Hierarchy", SysML.
"""

from __future__ import annotations

from collections.abc import Sequence

from manyhands.catalogue import Reference
from manyhands.modelling.published.thakur import Hop, ring_all_gather_s, ring_reduce_scatter_s
from manyhands.modelling.published.thakur import all_reduce_s as flat_all_reduce_s


def all_reduce_s(size_B: float, levels: Sequence[tuple[int, Hop]], *, algorithm: str | None = "ring") -> float:
    """Seconds of an all-reduce of ``size_B`` bytes over Π pᵢ ranks; ``levels`` are (pᵢ, hop), innermost first.

    ``algorithm`` is that of the outermost level (`manyhands.modelling.published.thakur`); rings further in.
    """
    if not levels:
        return 0.0
    (ranks, hop), *outer = levels
    if not outer:
        return flat_all_reduce_s(size_B, ranks, hop, algorithm=algorithm)
    within = ring_reduce_scatter_s(size_B, ranks, hop) + ring_all_gather_s(size_B, ranks, hop)
    return within + all_reduce_s(size_B / ranks, outer, algorithm=algorithm)


vars(all_reduce_s)["paper"] = Reference(
    "M. Cho, U. Finkler, D. Kung, H. Hunter",
    "BlueConnect: Decomposing All-Reduce for Deep Learning on Heterogeneous Network Hierarchy",
    2019,
    "SysML",
    survey="VI-B",
)
