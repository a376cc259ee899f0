"""The roofline: an operator is bound by arithmetic or by memory, whichever takes longer.

    T = max(FLOPs/peak, bytes/B)          ridge: peak/B operations a byte

S. Williams, A. Waterman, D. Patterson 2009, "Roofline: An Insightful Visual Performance Model for Multicore
Architectures", CACM 52(4), 65-76. A bound: nothing is faster.
"""

from __future__ import annotations

from manyhands.catalogue import Reference


def seconds(flops: float, moved_B: float, *, peak_flops_per_s: float, memory_Bps: float) -> float:
    """The least an operator can take that does ``flops`` and moves ``moved_B`` bytes."""
    return max(flops / peak_flops_per_s, moved_B / memory_Bps)


def ridge(*, peak_flops_per_s: float, memory_Bps: float) -> float:
    """Operations a byte from which on arithmetic is the bound."""
    return peak_flops_per_s / memory_Bps


vars(seconds)["paper"] = Reference(
    "S. Williams, A. Waterman, D. Patterson",
    "Roofline: An Insightful Visual Performance Model for Multicore Architectures",
    2009,
    "CACM 52(4), 65-76",
)
