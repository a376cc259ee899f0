"""Simulate: the strategy's own code in virtual time, on a cluster one need not have."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manyhands.errors import BadInput
from manyhands.plan import Plan
from manyhands.plan.compressing import AUTO
from manyhands.task import Task
from manyhands.verbs.building import built
from manyhands.verbs.deciding import log, resolved_on, with_compressor

if TYPE_CHECKING:
    from manyhands.cluster import Cluster
    from manyhands.simulation.failures import Failures
    from manyhands.simulation.running import Simulation
    from manyhands.simulation.stragglers import Stragglers

#: What is simulated on when nobody says: servers of 16 cores, as many as one asks for.
DEFAULT_CLUSTER = "ethernet_10g"


def simulate(
    task: Task,
    plan: Plan | None = None,
    cluster: Cluster | str | os.PathLike[str] = DEFAULT_CLUSTER,
    *,
    stragglers: Sequence[Stragglers | str] | Stragglers | str | None = None,
    failures: Failures | str | None = None,
    compute_s: float | None = None,
    update_s: float | None = None,
    sizes: bool = False,
    evaluate: str | int = "epoch",
    trace: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> Simulation:
    """Train ``task`` by ``plan`` in virtual time, in this process, on a cluster one need not have.

        trace = mh.simulate(mh.Task(data="digits"), mh.Plan(strategy="ssp", workers=64), "ethernet_1g",
                            stragglers="lognormal(sigma=0.3)")
        trace.summary.step_s.median, trace.history[-1]["test_accuracy"]

    The strategy's own code runs, on real gradients; or, with ``sizes``, on replicas that have no numbers, which is for
    thousands of workers and tells times and traffic only. ``cluster`` is a ready one's name, a file or a `Cluster`.
    A step of a worker takes ``compute_s`` and its optimizer ``update_s``, else what it takes here, measured for a
    quarter of a second. ``stragglers`` stretch that (`simulation.stragglers`), ``failures`` interrupt it
    (`simulation.failures`). ``trace`` writes who did what when, for Perfetto. Deterministic: the same seed and the same
    given costs, the same result bit for bit.

    Raises `BadInput` before anything is computed, and what training raises.
    """
    from manyhands.cluster import Cluster, load
    from manyhands.simulation import running
    from manyhands.simulation.failures import failures_from

    options = running.Options(
        running.kinds(stragglers),
        None if failures is None else failures_from(failures),
        compute_s,
        update_s,
        sizes,
        evaluate,
        trace is not None,
    )
    options.check()
    on = cluster if isinstance(cluster, Cluster) else load(cluster)
    asked = plan or Plan()
    decided = resolved_on(on, task, asked)
    model, splits = built(task, None if data_dir is None else Path(data_dir))
    if asked.compress == AUTO:
        decided = with_compressor(task, asked, decided, model, on=on)
    for note in decided.notes:
        log.warning("%s", note)
    if sizes and (task.seconds is not None or task.target_accuracy is not None):
        raise BadInput(
            "sizes only with seconds or target_accuracy: without numbers a run has the length that it is given. Say "
            "steps or epochs."
        )
    done = running.simulated(task, decided.plan, on, options, model, splits)
    if trace is not None:
        assert done.trace is not None
        done.trace.write(Path(trace))
    return done
