"""What a worker of a real run does when: `manyhands train --trace FILE.json`.

Nothing is looked at that a run does not look at anyway. A run counts what its operations take and wait, and what
computing and updating take; a recorder puts itself between, so that each amount is a span as it is counted, on whatever
transport. Where none is wanted nothing is there. A span costs about a microsecond (benchmarks/tracing.py).

    communicate, wait       what `Counters` are told; of one operation waiting is drawn first, as it is told as a sum
    compute, update         the replica's `gradients` and `apply`; of a pipeline its actions, named as in a schedule
    strategy                what is left of a step: a strategy's own arithmetic, a server's work in shared memory
    evaluate, checkpoint    between steps; what is exchanged in them is drawn as such

Clocks are `time.perf_counter`, which is one for all processes of a Linux host. Workers on other hosts are aligned by a
barrier before the first step, so to within its duration. On a GPU compute is the time of the call.
"""

from __future__ import annotations

import contextlib
import math
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from manyhands.communication.communicator import Context, Counters, Tally
from manyhands.partition.pipeline.replica import PipelineReplica
from manyhands.training.gather import gather
from manyhands.training.run import Run
from manyhands.training.trace import MOST, Span, write

#: ``(begun, ended, …)``
Timed = tuple[Any, ...]

_clock = time.perf_counter


class Recorder:
    """One worker's spans, the first ``most`` of them: some 150 bytes each."""

    def __init__(self, context: Context, most: int) -> None:
        self.left_out = 0
        self.began = 0.0
        self.doing = ""  # the operation under way
        #: (begun, ended, kind, name, step); tuples in a list, since to store them tighter takes longer than a span may.
        self.spans: list[tuple[float, float, str, str, int | None]] = []
        self._context, self._most = context, most

    @classmethod
    def of(cls, run: Run) -> Recorder:
        """Of a run that is about to take its first step, whose worker and replica it watches from here on. Collective.

        Takes the place of methods of these two objects, so that a run without a trace has nothing in its way.
        """
        comm, replica, worker = run.comm, run.replica, run.worker
        self = cls(comm.context, MOST // comm.size)
        with comm.counting("control"):
            comm.barrier()
        self.began = _clock()
        comm.context.counters = _Watched(self, comm.counters)
        if isinstance(replica, PipelineReplica):
            replica.pipeline.observe = lambda action, begun, ended: self.add("compute", str(action), begun, ended)
        else:
            replica.gradients = self._around(replica.gradients, "compute")  # type: ignore[method-assign]
        replica.apply = self._around(replica.apply, "update")  # type: ignore[method-assign]
        worker.step = self._around(worker.step, "strategy")  # type: ignore[method-assign]
        return self

    def add(self, kind: str, name: str, begun: float, ended: float) -> None:
        """One more."""
        if len(self.spans) < self._most:
            self.spans.append((begun, ended, kind, name, self._context.step))
        else:
            self.left_out += 1

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """What happens inside, but for what has a kind of its own."""
        begun = _clock()
        yield
        self.add(kind, kind, begun, _clock())

    def write(self, run: Run, file: Path) -> str:
        """All workers' spans into ``file``, by rank 0; returns why that could not be, or nothing. Collective.

        Its messages are counted as ``consensus``.
        """
        apart = list(flat(self.spans))
        names = list(dict.fromkeys((kind, name) for _, _, kind, name, _ in apart))
        places = {name: i for i, name in enumerate(names)}
        mine = {
            "rank": run.ranks[run.comm.rank],
            "host": _host(),
            "began": self.began,
            "names": [list(name) for name in names],
            "left_out": self.left_out,
            "times": torch.tensor([span[:2] for span in apart], dtype=torch.float64),
            "what": torch.tensor([places[k, n] for _, _, k, n, _ in apart], dtype=torch.int64),
            "steps": torch.tensor([-1 if step is None else step for *_, step in apart], dtype=torch.int64),
        }
        found = gather(run.comm, mine)
        if found is None:
            return ""
        first = found[0]
        shift = {each["rank"]: _shift(each, first) for each in found}
        start = min(each["began"] + shift[each["rank"]] for each in found)
        foreign = [each["rank"] for each in found if each["host"] != first["host"]]
        said = {
            "left_out": sum(each["left_out"] for each in found),
            "clock": "one for all workers"
            if not foreign
            else f"workers {', '.join(map(str, foreign))} are on other hosts, aligned by a barrier before step one",
        }
        plan, comm = run.plan, run.comm
        title = f"{plan.strategy}, {comm.size} worker{'s' * (comm.size > 1)} on {comm.transport}"
        try:
            spans = (span for each in found for span in _spans(each, shift[each["rank"]] - start))
            write(file, spans, (each["rank"] for each in found), title=title, said=said)
        except Exception as e:  # what was learned is worth more than who did what when
            return str(e)
        return ""

    def _around(self, call: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def around(*arguments: Any, **named: Any) -> Any:
            begun = _clock()
            try:
                return call(*arguments, **named)
            finally:
                self.add(kind, kind, begun, _clock())

        return around


class _Watched(Counters):
    """Counters that tell a recorder what is added to them, which has ended when it is added."""

    def __init__(self, recorder: Recorder, before: Counters) -> None:
        self._recorder = recorder
        self._wait_s, self._communicate_s = before.wait_s, before.communicate_s
        for name in vars(before).keys() - {"wait_s", "communicate_s"}:
            setattr(self, name, getattr(before, name))
        self.tallies = defaultdict(lambda: _Operations(recorder))
        for purpose, found in before.tallies.items():
            self.tallies[purpose].update(found)

    @property
    def wait_s(self) -> float:
        """See `Counters`."""
        return self._wait_s

    @wait_s.setter
    def wait_s(self, value: float) -> None:
        spent_s, self._wait_s = value - self._wait_s, value
        if spent_s > 0:
            ended, recorder = _clock(), self._recorder
            recorder.add("wait", recorder.doing or "others", ended - spent_s, ended)

    @property
    def communicate_s(self) -> float:
        """See `Counters`."""
        return self._communicate_s

    @communicate_s.setter
    def communicate_s(self, value: float) -> None:
        spent_s, self._communicate_s = value - self._communicate_s, value
        recorder, ended = self._recorder, _clock()
        begun = ended - spent_s
        spans = recorder.spans
        if spans and spans[-1][1] > begun and spans[-1][2] == "wait":  # told as a sum with this: it came first
            _, _, kind, name, step = spans[-1]
            spans[-1] = begun - (spans[-1][1] - spans[-1][0]), begun, kind, name, step
        if spent_s > 0:
            recorder.add("communicate", recorder.doing or "communicate", begun, ended)
        recorder.doing = ""


class _Operations(defaultdict[str, Tally]):
    """The tallies of a purpose; whoever counts an operation is about to do it."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(Tally)
        self._recorder = recorder

    def __getitem__(self, operation: str) -> Tally:
        self._recorder.doing = operation
        return super().__getitem__(operation)


def flat(spans: Iterable[Timed]) -> Iterator[Timed]:
    """``(begun, ended, …)`` of one worker, one thing at a time: what lies inside of another is cut out of that.

    >>> list(flat([(2.0, 3.0, "wait"), (1.0, 5.0, "compute")]))
    [(1.0, 2.0, 'compute'), (2.0, 3.0, 'wait'), (3.0, 5.0, 'compute')]
    """
    under: list[Timed] = []  # what is under way, the innermost last
    at = -math.inf

    def until(time: float) -> Iterator[Timed]:
        """Everything under way that ends by then, and of the innermost other what lies before."""
        nonlocal at
        while under and at < time:
            end = under[-1][1]
            if min(end, time) > at:
                yield at, min(end, time), *under[-1][2:]
                at = min(end, time)
            if end <= time:
                under.pop()

    for span in sorted(spans, key=lambda span: (span[0], -span[1])):
        yield from until(span[0])
        while under and under[-1][1] < span[1]:  # its clock was read twice; the later word counts
            under.pop()
        at = max(at, span[0])
        under.append(span)
    yield from until(math.inf)


def _spans(of: dict[str, Any], shift_s: float) -> Iterator[Span]:
    """What a worker sent, in seconds from the run's first step."""
    for (begun, ended), what, step in zip(*(of[k].tolist() for k in ("times", "what", "steps")), strict=True):
        kind, name = of["names"][what]
        yield Span(of["rank"], kind, name, begun + shift_s, ended + shift_s, None if step < 0 else step)


def _host() -> str:
    """What one clock belongs to."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


def _shift(of: dict[str, Any], first: dict[str, Any]) -> float:
    """From a worker's clock to the first one's."""
    return 0.0 if of["host"] == first["host"] else float(first["began"] - of["began"])
