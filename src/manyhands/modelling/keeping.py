"""What a profile says, and where it is kept: for a day, in the user's cache, by everything that it depends on.

Of a task with live objects it is kept only while this process lives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manyhands.cluster.measured import Curve
from manyhands.communication import futex
from manyhands.communication.transports.events import Operation
from manyhands.data.places import cache
from manyhands.plan import Plan
from manyhands.task import Task
from manyhands.training.conclusion import versions
from manyhands.training.whole_file import replacing

#: A measurement holds for so long: the host's neighbours change.
FRESH_S = 24 * 3600.0
#: Of what a profile holds: to be counted up when a number comes to mean something else.
MEANING = 2


@dataclass(frozen=True)
class Profile:
    """What a step of each of ``ranks`` workers side by side takes, without its exchanges."""

    compute_s: float
    update_s: float
    rest_s: float
    #: Inside ``compute_s``: exchanges of a cut model, as they are priced.
    cut_s: float
    samples: float  # of the largest share
    elements: float  # that the optimizer goes over in a step
    steps: int
    #: (steps × ranks), of a step's computing over its median.
    factors: NDArray[np.float64]
    #: Relative, of the medians of the first and the second half.
    spread: float
    #: Operations of an average step and how often, those inside the model (``cut``) too.
    exchanges: tuple[tuple[Operation, float], ...]
    when: float
    #: Of a pipeline: (kind, stage, seconds) of its actions without ``cut_s``, see `fed`, and (boundary, bytes) of a
    #: micro-batch's hand-over.
    actions: tuple[tuple[str, int, float], ...] = ()
    hops: tuple[tuple[int, int], ...] = ()
    #: Of a plain synchronous step, since the plan's own has more than collectives.
    plain: bool = False
    #: Of the plan's transport, with knots at the sizes of its exchanges.
    curves: tuple[Curve, ...] = ()

    @property
    def sent_here_B(self) -> int:
        """Bytes that rank 0 hands over for a micro-batch; in a pipeline."""
        return next((n for boundary, n in self.hops if boundary == 0), 0)


_HERE: dict[str, Profile] = {}


def kept(task: Task, plan: Plan) -> Profile | None:
    """What was measured of ``plan`` within the last day, if anything."""
    key = _key(task, plan)
    found = _HERE.get(key) or _read(key)
    return found if found is not None and time.time() - found.when < FRESH_S else None


def keep(task: Task, plan: Plan, found: Profile) -> None:
    """A cache that cannot be written costs a quarter of a second the next time."""
    key = _key(task, plan)
    _HERE[key] = found
    if _lasting(task):
        table = dataclasses.asdict(found) | {"factors": found.factors.tolist()}
        with contextlib.suppress(OSError):
            _place(key).parent.mkdir(parents=True, exist_ok=True)
            with replacing(_place(key)) as file:
                json.dump(table, file)


def operation(said: Sequence[Any]) -> Operation:
    """As it has travelled."""
    return Operation._make([*said[:3], tuple(said[3]), *said[4:]])


def _key(task: Task, plan: Plan) -> str:
    """Of everything that a step's cost depends on; live objects by their identity."""
    parts = [getattr(task, name) for name in ("model", "data", "loss", "optimizer", "schedule")]
    said = [x if isinstance(x, str) or x is None else f"<{id(x)}>" for x in parts]
    table = {k: str(v) for k, v in plan.as_table().items() if k != "timeout_s"}
    every = [
        MEANING,
        *said,
        task.clip,
        task.batch_size,
        sorted(table.items()),
        sorted(versions().items()),
        futex.cores(),
    ]
    return hashlib.sha256(json.dumps(every, default=str).encode()).hexdigest()[:32]


def _lasting(task: Task) -> bool:
    """Whether the text of a task says all: a factory of the user's may be another one tomorrow."""
    parts = (getattr(task, name) for name in ("model", "data", "loss", "optimizer", "schedule"))
    return all(x is None or (isinstance(x, str) and ":" not in x) for x in parts)


def _read(key: str) -> Profile | None:
    try:
        table = json.loads(_place(key).read_bytes())
        exchanges = tuple((operation(said), float(n)) for said, n in table["exchanges"])
        made = {"factors": np.array(table["factors"]), "exchanges": exchanges}
        made |= {name: tuple(map(tuple, table[name])) for name in ("actions", "hops")}
        made["curves"] = tuple(_curve(each) for each in table["curves"])
        return Profile(**table | made)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _curve(table: dict[str, Any]) -> Curve:
    made: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in table.items()}
    return Curve(**made)


def _place(key: str) -> Path:
    return cache("profiles") / f"{key}.json"
