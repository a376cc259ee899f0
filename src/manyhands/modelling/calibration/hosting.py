"""The host's figures as a cluster file has them, out of the jobs of `host`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from manyhands.cluster import Cluster, Device, Figure, Link, Node
from manyhands.cluster.measured import Measured
from manyhands.errors import CommunicationError
from manyhands.modelling.calibration import host as jobs
from manyhands.modelling.calibration import keeping, links
from manyhands.modelling.calibration.repeating import WIDEST, digits
from manyhands.modelling.calibration.stamps import median_and_spread
from manyhands.training import environment
from manyhands.training.team import Team

_JOBS = "manyhands.modelling.calibration.host"
#: Seconds of one measurement.
EACH_S, QUICK_EACH_S = 0.4, 0.15
_JITTER_S = 4  # times that
DEADLINE_S = 60.0
#: Whose messages `link.within` is fitted to, best first.
_LINKED = ("shared", "gloo", "mpi", "threads")

Rate = tuple[float, float]  # and its spread


@dataclass(frozen=True)
class Host:
    """Measured figures of one machine."""

    cores: int
    bandwidth_Bps: Mapping[int, Rate]  # of all together, by the number of processes
    products: Mapping[str, Mapping[int, Rate]]  # operations a second of all together, by dtype and processes
    dispatch_s: Rate
    jitter: Mapping[str, Any]

    def table(self) -> dict[str, Any]:
        """For the host table: what a cluster's figures have no place for."""
        processes = list(self.bandwidth_Bps)
        return {
            "bandwidth": {
                "processes": processes,
                "GBps": [digits(rate / 1e9) for rate, _ in self.bandwidth_Bps.values()],
            },
            "products_GFLOPs": {
                dtype: {str(n): digits(rate / 1e9) for n, (rate, _) in by_processes.items()}
                for dtype, by_processes in self.products.items()
            },
            "jitter": {
                name: [digits(x) for x in value] if isinstance(value, list) else digits(value)
                for name, value in self.jitter.items()
            },
        }

    def cluster(self, measured: Measured, versions: Mapping[str, str]) -> Cluster:
        """This machine: a device is a core. Its peak is that of all cores at work, its bandwidth that of one alone."""
        source = f"measured {measured.when[:10]}"
        name, cores, memory_B = keeping.processor(), self.cores, environment.memory_B() or 8 * 10**9

        def rate(value: Rate, unit: str, factor: float) -> Figure:
            return Figure(digits(value[0] / factor), unit, source, min(round(value[1], 4), WIDEST))

        peak = {
            dtype: rate((by_processes[cores][0] / cores, by_processes[cores][1]), "GFLOP/s", 1e9)
            for dtype, by_processes in self.products.items()
        }
        kernel = f"{source}: total memory over cores"
        return Cluster(
            name="this machine",
            about=f"{name}, cores: {cores}, measured by manyhands calibrate at {measured.when}",
            nodes=Figure(1, "count", "the machine that was measured"),
            device=Device(
                name=f"a core of {name}",
                kind="cpu",
                memory=Figure(digits(memory_B / cores / 1e9), "GB", kernel),
                memory_bandwidth=rate(self.bandwidth_Bps[1], "GB/s", 1e9),
                peak=peak,
                dispatch=rate(self.dispatch_s, "us", 1e-6),
                jitter=Figure(digits(min(self.jitter["deviation"], 10.0)), "ratio", f"{source}, middle 99 %"),
            ),
            node=Node(
                devices=Figure(cores, "count", "cores this process may use"),
                cores=Figure(cores, "count", "cores this process may use"),
                memory=Figure(digits(memory_B / 1e9), "GB", "as the system says"),
                memory_bandwidth=rate(self.bandwidth_Bps[cores], "GB/s", 1e9),
            ),
            links={"within": _link(measured, source)},
            versions=dict(versions),
            measured=measured,
        )


def _link(measured: Measured, source: str) -> Link:
    for transport in _LINKED:
        if (curve := measured.curve(transport, "send", 2)) is not None:
            return links.link(curve, source)
    why = "; ".join(measured.notes)
    raise CommunicationError(f"no transport could be measured here, so there is nothing to write. {why}")


def host_in(crew: Team, *, quick: bool, say: Callable[[str], None]) -> Host:
    """Measured by a team of one process a core."""
    each_s, cores = QUICK_EACH_S if quick else EACH_S, crew.size
    processes = sorted({1, *(2**i for i in range(1, 8) if 2**i < cores), cores})

    def run(job: str, *arguments: Any) -> list[Any]:
        return crew.run(f"{_JOBS}:{job}", *arguments, deadline_s=DEADLINE_S)

    bandwidth = {n: jobs.triad_Bps(run("bandwidth", n, jobs.TRIAD, each_s), jobs.TRIAD) for n in processes}
    say(f"memory: {bandwidth[1][0] / 1e9:.3g} GB/s for one process, {bandwidth[cores][0] / 1e9:.3g} for {cores}")
    products = {
        dtype: {n: jobs.product_flops(run("products", n, dtype, each_s), dtype) for n in sorted({1, cores})}
        for dtype in jobs.PRODUCTS
    }
    say(", ".join(f"{d} {by[cores][0] / cores / 1e9:.3g} GFLOP/s" for d, by in products.items()) + " a core")
    stretches = run("dispatch", each_s / 2)[0]
    dispatch = median_and_spread(np.array(stretches))
    jitter = jobs.jitter_of(run("jitter", _JITTER_S * each_s))
    say(f"dispatch {dispatch[0] * 1e6:.2f} us; jitter {100 * float(jitter['deviation']):.2g} %")  # type: ignore[arg-type]
    return Host(cores, bandwidth, products, dispatch, jitter)
