"""What a run tells: ``metrics.jsonl`` by the step, ``events.jsonl`` of faults and recoveries, ``summary.json`` at last.

Every line is one JSON object, valid JSON always: a NaN or an infinity is written as null, and ``nonfinite`` beside it
says which it was. `MetricsLog` hands each record to its sinks; the files are one sink, TensorBoard (when installed) is
another, and an adapter for another tracker is one more class with the four methods of `Sink`. Only rank 0 has sinks, so
the same lines may stand in every worker's loop.

A full disk does not stop training: lines wait in memory (up to a bound) until they can be written, and a sink that
raises is dropped with one warning. A crash loses at most the last `FLUSH_EVERY_S` of metrics and no event.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsFloat

from manyhands.errors import BadInput
from manyhands.training.whole_file import replacing

logger = logging.getLogger(__name__)

METRICS, EVENTS, SUMMARY, TENSORBOARD = "metrics.jsonl", "events.jsonl", "summary.json", "tensorboard"

#: Short enough that `tail -f` is worth watching, long enough that 10,000 steps a second cost two writes.
FLUSH_EVERY_S = 0.5
#: Lines kept while a disk is full: some 20 MB at 200 bytes each.
PENDING_LIMIT = 100_000
#: One point costs TensorBoard's writer some 50 µs, and the page shows about 1,000 of a curve.
POINT_EVERY_S = 0.1

Scalar = float | int | str | bool | None


class Sink(Protocol):
    """Where records go. A method may do nothing; whatever it raises costs the sink its place, not the run."""

    def metrics(self, step: int, values: Mapping[str, Scalar]) -> None:
        """Figures of one step: epoch, loss, lr, samples_per_s …"""

    def event(self, kind: str, values: Mapping[str, Any]) -> None:
        """A fault, a recovery, a checkpoint: rare, and wanted after a crash."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """The run's last word."""

    def close(self) -> None:
        """Nothing follows."""


class MetricsLog:
    """Hands a run's records to its sinks; on every rank but 0 it has none and does nothing.

    ``resumed_step`` is the step of the checkpoint that the run continues from; metrics after it are dropped, since
    those steps are done again. None starts ``metrics.jsonl`` anew. Events are kept either way: they are history.
    """

    def __init__(
        self, folder: Path, *, rank: int = 0, resumed_step: int | None = None, more: Sequence[Sink] = ()
    ) -> None:
        self._sinks: list[Sink] = []
        if rank == 0:
            try:
                files = JsonFiles(Path(folder), resumed_step=resumed_step)
            except OSError as e:
                raise BadInput(
                    f"The run's folder {folder} cannot be written: {e.strerror or e}. Choose another with --out."
                ) from e
            self._sinks = [files, *_tensorboard(Path(folder), resumed_step), *more]

    def metrics(self, step: int, values: Mapping[str, Scalar]) -> None:
        """Record figures of one step."""
        self._each(lambda sink: sink.metrics(step, values))

    def event(self, kind: str, /, **values: Any) -> None:
        """Record a fault, a recovery, a checkpoint …; handed to the system when this returns."""
        self._each(lambda sink: sink.event(kind, values))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record the run's last word."""
        self._each(lambda sink: sink.summary(values))

    def close(self) -> None:
        """Flush and close every sink. Further calls do nothing."""
        self._each(lambda sink: sink.close())
        self._sinks = []

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _each(self, record: Callable[[Sink], None]) -> None:
        working = []
        for sink in self._sinks:
            try:
                record(sink)
            except Exception as e:
                logger.warning("%s is given up, training goes on: %s: %s", type(sink).__name__, type(e).__name__, e)
                with contextlib.suppress(Exception):
                    sink.close()
            else:
                working.append(sink)
        self._sinks = working


class JsonFiles:
    """The run folder's own files."""

    def __init__(self, folder: Path, *, resumed_step: int | None) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if resumed_step is None:
            (folder / METRICS).unlink(missing_ok=True)
        else:
            forget_after(folder / METRICS, resumed_step)
        self._metrics, self._events = _Lines(folder / METRICS), _Lines(folder / EVENTS)
        self._flushed_at = time.monotonic()

    def metrics(self, step: int, values: Mapping[str, Scalar]) -> None:
        """One line; written out every `FLUSH_EVERY_S`."""
        self._metrics.add(json_text({"step": step, **values}))
        now = time.monotonic()
        if now - self._flushed_at >= FLUSH_EVERY_S:
            self._flushed_at = now
            self._metrics.flush()

    def event(self, kind: str, values: Mapping[str, Any]) -> None:
        """One line, written out at once, with the metrics that led up to it."""
        self._metrics.flush()
        self._events.add(json_text({"time_s": round(time.time(), 3), "event": kind, **values}))
        self._events.flush()

    def summary(self, values: Mapping[str, Any]) -> None:
        """The whole file, old or new."""
        self._metrics.flush()
        write_summary(self._folder, values)

    def close(self) -> None:
        """Write out what is pending."""
        self._metrics.close()
        self._events.close()


class TensorBoard:
    """Numbers as scalars, events and the summary as text, in ``tensorboard/``.

    Of each figure at most one point every `POINT_EVERY_S`; ``metrics.jsonl`` has them all.
    """

    def __init__(self, folder: Path, *, resumed_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # 0.15 s, and only where it is installed

        purge_step = None if resumed_step is None else resumed_step + 1
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge_step)
        self._step = resumed_step or 0
        self._due: dict[str, float] = {}

    def metrics(self, step: int, values: Mapping[str, Scalar]) -> None:
        """Numbers only; text has no curve."""
        self._step = step
        now = time.monotonic()
        for name, value in values.items():
            if isinstance(value, int | float) and now >= self._due.get(name, 0.0):
                self._due[name] = now + POINT_EVERY_S
                self._writer.add_scalar(name, value, step)

    def event(self, kind: str, values: Mapping[str, Any]) -> None:
        """As text at the step it happened."""
        self._writer.add_text("events", f"{kind}: {json_text(values)}", self._step)
        self._writer.flush()

    def summary(self, values: Mapping[str, Any]) -> None:
        """As text at the last step."""
        self._writer.add_text("summary", json_text(values), self._step)

    def close(self) -> None:
        """Write out what is pending."""
        self._writer.close()


def _tensorboard(folder: Path, resumed_step: int | None) -> Iterator[Sink]:
    if importlib.util.find_spec("tensorboard") is None:
        return
    try:
        yield TensorBoard(folder / TENSORBOARD, resumed_step=resumed_step)
    except Exception as e:  # an installation that does not import, a folder that cannot be written
        logger.warning("TensorBoard is left out, training goes on: %s", e)


class _Lines:
    """Whole lines appended to a file; one write for many, and never half a line left behind."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending: list[str] = []
        self._failing = False
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._size_B = self._file.seek(0, os.SEEK_END)

    def add(self, line: str) -> None:
        self._pending.append(line)
        if len(self._pending) > PENDING_LIMIT:
            del self._pending[: PENDING_LIMIT // 2]
            logger.warning(
                "%s could not be written for long: its oldest %d lines are lost", self._path, PENDING_LIMIT // 2
            )

    def flush(self) -> None:
        if not self._pending:
            return
        data = memoryview(("\n".join(self._pending) + "\n").encode())
        written = 0
        try:
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as e:
            if not self._failing:
                logger.warning("%s cannot be written (%s); its lines wait in memory", self._path, e.strerror or e)
            self._failing = True
            self._file.truncate(self._size_B)
            return
        self._size_B += written
        self._failing = False
        self._pending.clear()

    def close(self) -> None:
        self.flush()
        self._file.close()
        if self._pending:
            logger.warning("%s could not be written: its last %d lines are lost", self._path, len(self._pending))


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of ``path`` that are about later steps than ``step``, and a last line cut short by a crash."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as old, replacing(path) as new:
        new.writelines(line for line in old if line.endswith("\n") and _step_of(line) <= step)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return math.inf


def write_summary(folder: Path, values: Mapping[str, Any]) -> Path:
    """``summary.json``, old or new but never half of it."""
    path = folder / SUMMARY
    with replacing(path) as file:
        file.write(json_text(values, indent=2) + "\n")
    return path


def read_summary(folder: Path) -> dict[str, Any] | None:
    """``summary.json`` as it was written, None where there is none that can be read."""
    try:
        values = json.loads((folder / SUMMARY).read_bytes())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def json_text(values: Mapping[str, Any], *, indent: int | None = None) -> str:
    """``values`` as valid JSON, what is not finite as null with its name under ``nonfinite``.

    >>> json_text({"step": 3, "loss": float("nan"), "lr": 0.1})
    '{"step": 3, "loss": null, "lr": 0.1, "nonfinite": {"loss": "nan"}}'
    """
    try:
        return json.dumps(values, allow_nan=False, indent=indent, default=_plain)
    except ValueError:
        nonfinite: dict[str, str] = {}
        finite = {key: _finite(value, key, nonfinite) for key, value in values.items()}
        return json.dumps({**finite, "nonfinite": nonfinite}, allow_nan=False, indent=indent, default=_plain)


def _finite(value: Any, path: str, nonfinite: dict[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item, f"{path}.{key}", nonfinite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{path}.{i}", nonfinite) for i, item in enumerate(value)]
    if not isinstance(value, str | int | float | None):
        value = _plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[path] = repr(float(value))
        return None
    return value


def _plain(value: Any) -> float | str:
    """A 0-dim tensor or a NumPy scalar as a number; a path, a strategy … as its text."""
    try:
        return float(value) if isinstance(value, SupportsFloat) else str(value)
    except (TypeError, ValueError, RuntimeError):
        return str(value)
