"""PipeDream: 1F1B that is never drained; each stage updates after each of its backwards.

D. Narayanan, A. Harlap, A. Phanishayee and others (2019), PipeDream: generalized pipeline parallelism for DNN training,
SOSP, arXiv 1806.03377.

The order is 1F1B's over as many mini-batches as there are, one after the other: no flush, so no bubble but at the very
start and end. *Approximation*: the forward of a mini-batch at stage k uses weights that lack the updates of the
p − 1 − k mini-batches before it. With weight stashing its backward uses the same weights again, which takes as many
versions as there are mini-batches in flight: p − k.
"""

from __future__ import annotations

from manyhands.catalogue import Reference
from manyhands.partition.pipeline.one_f_one_b import one_f_one_b
from manyhands.partition.pipeline.schedule import Schedule, sizes


def pipedream(ranks: int, micro_batches: int) -> Schedule:
    """PipeDream's order on ``ranks`` stages over ``micro_batches`` mini-batches, each with an update of its own."""
    sizes("pipedream", ranks, micro_batches)
    return one_f_one_b(ranks, micro_batches)


def versions(schedule: Schedule) -> dict[tuple[int, int], int]:
    """(stage, mini-batch) → how many updates the stage has had when that mini-batch's forward begins."""
    result = {}
    for row in schedule.rows:
        updates = 0
        for a in row:
            if a.kind == "F":
                result[a.stage, a.micro_batch] = updates
            else:
                updates += a.kind == "B"
    return result


def staleness(ranks: int, stage: int) -> int:
    """The closed form: how many updates a forward at ``stage`` lacks once the pipeline is full."""
    return ranks - 1 - stage


vars(pipedream)["paper"] = Reference(
    "D. Narayanan, A. Harlap, A. Phanishayee, V. Seshadri, N. R. Devanur, G. R. Ganger, P. B. Gibbons, M. Zaharia",
    "PipeDream: generalized pipeline parallelism for DNN training",
    2019,
    "SOSP, arXiv 1806.03377",
    survey="V-C",
)
