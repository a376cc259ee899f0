"""PipeDream's order: 1F1B over mini-batches each of which has an update of its own, at every stage after its backward.

D. Narayanan, A. Harlap, A. Phanishayee and others (2019), PipeDream: generalized pipeline parallelism for DNN training,
SOSP, arXiv 1806.03377, section 3.

    d mini-batches in flight, by default p: as many as there are stages
    bubble      none but while the pipeline fills and drains
    staleness   min(p − 1 − k, d − 1) updates at stage k: what a forward lacks of those of the mini-batches before it
    versions    min(p − k, d) of the weights at stage k: a backward uses those that its forward has used (stashing)

With *vertical sync* a mini-batch uses at every stage the version it has met at the first one: staleness d − 1
everywhere, and d versions. `strategy` is what trains with it.
"""

from __future__ import annotations

from typing import NamedTuple

from manyhands.catalogue import Reference
from manyhands.checks import whole
from manyhands.errors import BadInput
from manyhands.partition.pipeline.one_f_one_b import alternating
from manyhands.partition.pipeline.schedule import Schedule, schedule, sizes


def pipedream(ranks: int, micro_batches: int, *, in_flight: int | None = None) -> Schedule:
    """PipeDream's order on ``ranks`` stages over ``micro_batches`` mini-batches, each with an update of its own.

    ``in_flight``: how many are on their way at once, from 1 (one after the other) to as many as there are stages.
    """
    sizes("pipedream", ranks, micro_batches)
    if in_flight is None:
        in_flight = ranks
    whole("pipeline schedule pipedream: in_flight", in_flight)
    if in_flight > ranks:
        raise BadInput(
            f"pipedream with in_flight={in_flight} on {ranks} stages: as many as there are stages keep all of them "
            f"busy, and more would only be staler. Use in_flight={ranks} at most, or leave it out."
        )
    rows = [alternating(k, min(ranks - 1 - k, in_flight - 1, micro_batches), micro_batches) for k in range(ranks)]
    return schedule(rows)


def versions(schedule: Schedule, *, vertical_sync: bool = False) -> dict[tuple[int, int], int]:
    """(stage, mini-batch) → the version of the stage's weights that it uses: how many updates they have had."""
    result = {}
    for row in schedule.rows:
        updates = 0
        for a in row:
            if a.kind == "F":
                result[a.stage, a.micro_batch] = updates
            else:
                updates += a.kind == "B"
    if vertical_sync:
        return {(stage, i): result[0, i] for stage, i in result}
    return result


class Used(NamedTuple):
    """What one stage does with versions of its weights in a batch."""

    #: Mini-batch → the version it uses.
    by: dict[int, int]
    #: Version that is still used after the next one is there → the mini-batch that uses it last.
    outlived: dict[int, int]


def used(schedule: Schedule, stage: int, *, vertical_sync: bool = False) -> Used:
    """What ``stage`` has to keep. Backwards come in the order of forwards."""
    of_all = versions(schedule, vertical_sync=vertical_sync)
    order = [a.micro_batch for a in schedule.rows[schedule.stage_rank(stage)] if a.kind == "B" and a.stage == stage]
    by = {i: of_all[stage, i] for i in order}
    return Used(by, {by[i]: i for updates, i in enumerate(order) if by[i] < updates})


def staleness(ranks: int, stage: int, *, in_flight: int | None = None, vertical_sync: bool = False) -> int:
    """The closed form: how many updates a forward at ``stage`` lacks once the pipeline is full."""
    ahead = (ranks if in_flight is None else in_flight) - 1
    return min(ranks - 1 if vertical_sync else ranks - 1 - stage, ahead)


vars(pipedream)["paper"] = Reference(
    "D. Narayanan, A. Harlap, A. Phanishayee, V. Seshadri, N. R. Devanur, G. R. Ganger, P. B. Gibbons, M. Zaharia",
    "PipeDream: generalized pipeline parallelism for DNN training",
    2019,
    "SOSP, arXiv 1806.03377",
    survey="V-C",
)
