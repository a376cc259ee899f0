"""A schedule that is written by hand: a line a rank, as every schedule prints itself."""

from __future__ import annotations

from pathlib import Path

from manyhands.errors import BadInput
from manyhands.partition.pipeline.schedule import Schedule, parse


def written(ranks: int, micro_batches: int, *, rows: str | None = None, file: str | None = None) -> Schedule:
    """The schedule that ``rows`` or the text in ``file`` draws, such as ``rows="F0 F1 B0 B1 / F0 B0 F1 B1"``.

    A row a rank, apart by ``/`` or lines; the form is that of `manyhands plan`, see `schedule.parse`. It says how many
    micro-batches there are.
    """
    text = text_of(rows, file)
    made = parse(text.replace("/", "\n"))
    if made.ranks != ranks:
        mesh = f"Say mesh=pipeline={made.ranks} (--mesh pipeline={made.ranks}), or write" if made.ranks > 1 else "Write"
        raise BadInput(
            f"pipeline=written: it has {made.ranks} row{'s' * (made.ranks != 1)} and the mesh {ranks} ranks of stages; "
            f"each has a row of its own. {mesh} {ranks} rows."
        )
    made.validate()
    if made.micro_batches != micro_batches:
        raise BadInput(
            f"pipeline=written: it has {made.micro_batches} micro-batches and the plan micro_batches={micro_batches}. "
            "Leave micro_batches out (--micro-batches); the schedule says how many."
        )
    return made


def text_of(rows: str | None, file: str | None) -> str:
    """What is drawn, wherever it stands; refuses neither, both and a file that cannot be read."""
    if (rows is None) == (file is None) or not isinstance(rows if file is None else file, str):
        raise BadInput(
            "pipeline=written wants either rows= or file=, a text, e.g. written(rows='F0 F1 B0 B1 / F0 B0 F1 B1') or "
            "written(file='schedule.txt'), with a row a rank."
        )
    if file is None:
        assert rows is not None
        return rows
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(
            f"pipeline=written(file={file!r}) cannot be read: {getattr(e, 'strerror', None) or e}."
        ) from None
