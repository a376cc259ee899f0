"""Which study is meant: a built-in one, a file or a `Study`, cut to what a machine has and what is said of its task."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from manyhands.checks import is_whole
from manyhands.errors import BadInput, UnknownName
from manyhands.studies import studies
from manyhands.studies.grid import Study, Value, over, parse, with_alternatives

#: Analyses that read what their own study varies: of its task, only these can be said. Another task is another study.
SAYABLE = {"xin-ma": ("data",)}


def find(
    name_or_file: str | os.PathLike[str] | Study | None = None,
    *,
    workers: int | None = None,
    quick: bool = False,
    task: Mapping[str, Value] | None = None,
) -> Study:
    """The study of that name, or in that TOML file; without either the default one.

    ``workers``: at most so many. ``quick``: the preset's short form. ``task`` goes before what the study says of the
    task, key by key, also where a grid varies it.
    """
    if workers is not None and not is_whole(workers, 1):
        raise BadInput(f"workers={workers!r}: the largest number of workers is a whole number from 1.")
    study = _found(name_or_file, workers, quick=quick, task=task or {})
    if not task:
        return study
    sayable = SAYABLE.get(study.analysis)
    for key, value in task.items():
        if sayable is not None and key not in sayable:
            raise BadInput(
                f"{key}={value!r} for study {study.name}: its analysis {study.analysis} reads models, batches, lengths "
                f"and seeds that the study chooses itself. Of its task only {', '.join(sayable)} can be said; for a "
                "task of your own: manyhands study compare."
            )
    said = {f"task.{key}" for key in with_alternatives(task)}
    grids = (
        dataclasses.replace(grid, factors={k: v for k, v in grid.factors.items() if k not in said})
        for grid in study.grids
    )
    return dataclasses.replace(study, task=over(study.task, task), grids=tuple(grids))


def _found(
    name_or_file: str | os.PathLike[str] | Study | None,
    workers: int | None,
    *,
    quick: bool,
    task: Mapping[str, Value],
) -> Study:
    asked = "default" if name_or_file is None else name_or_file
    if isinstance(asked, str) and asked in studies:
        return _preset(asked, workers, quick=quick, task=task)
    if quick:
        raise BadInput(f"quick with {_called(asked)}: only built-in studies have a short form, e.g. default (--quick).")
    if isinstance(asked, Study):
        return _at_most(asked, workers)
    asked = os.fspath(asked)
    path = Path(asked)
    if not (asked.endswith(".toml") or path.is_file()):
        raise UnknownName("study", asked, studies, also="Your own is a TOML file: manyhands study my_study.toml.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not text in UTF-8"
        raise BadInput(f"study {asked} cannot be read ({reason}). A study is a TOML file.") from e
    return _at_most(parse(text, name=path.stem, where=asked), workers)


def _preset(name: str, workers: int | None, *, quick: bool, task: Mapping[str, Value]) -> Study:
    """A built-in study; one that has a parameter ``task`` plans with what is said of it."""
    preset = studies.load(name)
    offers = inspect.signature(preset).parameters
    if quick and "quick" not in offers:
        raise BadInput(f"study {name} has no short form. Leave out quick (--quick).")
    given = ({"quick": True} if quick else {}) | ({"task": task} if "task" in offers else {})
    made = preset(workers, **given)
    assert isinstance(made, Study)
    return made


def _called(asked: str | os.PathLike[str] | Study) -> str:
    return f"study {asked.name}" if isinstance(asked, Study) else os.fspath(asked)


def _at_most(study: Study, workers: int | None) -> Study:
    """Without the plans that have more workers."""
    if workers is None:
        return study
    grids = [
        dataclasses.replace(
            grid, factors={k: _up_to(v, workers) if k == "plan.workers" else v for k, v in grid.factors.items()}
        )
        if grid.measure != "simulate"
        else grid
        for grid in study.grids
    ]
    too_many = "workers" in study.plan and not _up_to([study.plan["workers"]], workers)  # where a grid says nothing
    kept = tuple(
        grid for grid in grids if all(grid.factors.values()) and ("plan.workers" in grid.factors or not too_many)
    )
    if not kept and (study.grids or too_many):
        raise BadInput(
            f"study {study.name} has no plan of at most {workers} worker{'s' * (workers > 1)}; give a larger number."
        )
    return dataclasses.replace(study, grids=kept)


def _up_to(values: Iterable[Value], most: int) -> tuple[Value, ...]:
    return tuple(v for v in values if not isinstance(v, int | float) or v <= most)
