"""The null step: what a synchronous step on parameter servers costs when there is nothing to compute.

    T(n, W) = ℓ + W·c + n·max(1/B_worker, W/(S·B_server))

ℓ a step's fixed cost, c what one more worker costs the coordination, n the bytes that each worker fetches and sends
back. A sparse step moves its rows only, whatever the size of the table.

M. Abadi et al. 2016, "TensorFlow: A System for Large-Scale Machine Learning", OSDI, section 6.2 and figure 7 (not the
white paper of 2015). The measurements are the paper's: 16 servers, scalar 1.8 ms for 1 worker and 8.8 ms for 100;
dense 100 MB 147 and 613 ms; 1 GB 1.01 and 7.16 s; sparse 5 to 20 ms. The formula is the usual one for it, derived
here.

`backup_gain` is section 6.3's normalised speed-up: t(0)/t(b)·n/(n + b).
"""

from __future__ import annotations

from dataclasses import dataclass

from manyhands.catalogue import Reference


@dataclass(frozen=True)
class Service:
    """A set of parameter servers as its workers see it."""

    servers: int
    worker_Bps: float
    server_Bps: float
    step_s: float = 0.0
    per_worker_s: float = 0.0


def step_s(moved_B: float, workers: int, service: Service) -> float:
    """Seconds of a null step in which each worker moves ``moved_B`` bytes, parameters there and gradients back."""
    carried = max(1 / service.worker_Bps, workers / (service.servers * service.server_Bps))
    return service.step_s + workers * service.per_worker_s + moved_B * carried


def sparse_B(rows: int, row_B: float) -> float:
    """What a lookup of ``rows`` moves, there and back; how large the table is does not matter."""
    return 2 * rows * row_B


def backup_gain(step_s_without: float, step_s_with: float, needed: int, backups: int) -> float:
    """Speed-up by ``backups`` extra workers, divided by the machines they take."""
    return step_s_without / step_s_with * needed / (needed + backups)


vars(step_s)["paper"] = Reference(
    "M. Abadi et al.", "TensorFlow: A System for Large-Scale Machine Learning", 2016, "OSDI, 265-283", survey="VI-A"
)
