"""Who did what when, as a file for chrome://tracing and Perfetto: one row a worker.

The file is the Trace Event Format's JSON (Google, 2016): complete events, ``ts`` and ``dur`` in µs. Of a real run
`recorder` fills it, of a simulated one `simulation.trace`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from manyhands.errors import BadInput

#: More make a file that no viewer opens (100 bytes each).
MOST = 1_000_000
#: What a worker may be at, each in a colour of the viewer's.
COLOURS = {
    "compute": "good",
    "update": "olive",
    "communicate": "thread_state_running",
    "wait": "terrible",
    "strategy": "grey",  # the rest of a step: a strategy's own arithmetic, and what it does at a server
    "evaluate": "rail_idle",
    "checkpoint": "rail_load",
}


class Span(NamedTuple):
    """Part of a worker's time, in seconds."""

    rank: int
    kind: str
    name: str
    begun: float
    ended: float
    step: int | None


def write(
    file: Path, spans: Iterable[Span], workers: Iterable[int], *, title: str = "", said: Mapping[str, Any] | None = None
) -> None:
    """The file; ``said`` stands beside the events. Raises `BadInput` where it cannot be written."""
    try:
        with open(file, "w", encoding="utf-8") as out:
            out.write('{"displayTimeUnit": "ms",\n"otherData": ' + json.dumps(dict(said or {})))
            out.write(',\n"traceEvents": [\n')
            for i, event in enumerate(_events(spans, workers, title)):
                out.write((",\n" if i else "") + json.dumps(event))
            out.write("\n]}\n")
    except OSError as e:
        raise BadInput(f"--trace {file} cannot be written: {e.strerror or e}.") from None


def check_writable(file: Path) -> None:
    """Before a run that is to end with it: raises `BadInput` where there is no such place."""
    if file.is_dir():
        raise BadInput(f"--trace {file} is a folder: name a file in it, e.g. {file / 'trace.json'}.")
    if not file.absolute().parent.is_dir():
        raise BadInput(f"--trace {file}: there is no folder {file.absolute().parent}. Make it, or name another file.")
    try:
        open(file, "a").close()
    except OSError as e:
        raise BadInput(f"--trace {file} cannot be written: {e.strerror or e}. Name another file.") from None


def _events(spans: Iterable[Span], workers: Iterable[int], title: str) -> Iterator[dict[str, Any]]:
    if title:
        yield {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": title}}
    for rank in workers:
        yield {"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": {"name": f"worker {rank}"}}
    for span in spans:
        yield {
            "ph": "X",
            "pid": 0,
            "tid": span.rank,
            "name": span.name if span.kind != "wait" else f"wait: {span.name}",
            "cat": span.kind,
            "cname": COLOURS[span.kind],
            "ts": span.begun * 1e6,
            "dur": (span.ended - span.begun) * 1e6,
            "args": {"step": span.step},
        }
