"""A calibrated cluster, made up."""

import dataclasses

from manyhands.cluster import load
from manyhands.cluster.measured import Curve, Measured, OperatorTime

SIZES = (64, 4096, 1 << 20)


def curve(transport="shared", operation="all_reduce", ranks=2, seconds=(1e-5, 2e-5, 4e-4), spread=0.02, **more):
    sizes = more.pop("sizes_B", SIZES[: len(seconds)])
    return Curve(
        transport=transport,
        operation=operation,
        ranks=ranks,
        sizes_B=sizes,
        seconds=seconds,
        spread=(spread,) * len(seconds),
        **more,
    )


OPERATOR = OperatorTime(
    name="addmm",
    phase="forward",
    operands=((50,), (64, 784), (784, 50)),
    results=((64, 50),),
    options='(1, "a]")',
    dtype="float32",
    flops=10035200,
    moved_B=370376,
    threads=1,
    co_runners=2,
    seconds=8.75e-05,
    spread=0.01,
)


def calibrated(*curves, operators=(), host=None, notes=()):
    """A node of sixteen cores, with tables."""
    measured = Measured(
        when="2026-11-21T19:00:00Z", curves=curves, operators=tuple(operators), host=host or {"cores": 2}, notes=notes
    )
    base = load("ethernet_10g")
    return dataclasses.replace(base, links={"within": base.link("within")}, measured=measured)
