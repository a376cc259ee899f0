"""What a plan says of its pipeline: which schedule, and where the model is cut.

one_f_one_b                     cut where the stages' measured costs are most alike
gpipe(cut="block2, head")       a new stage begins with each module named
interleaved(chunks=2)           what else a schedule takes
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from manyhands.calling import call
from manyhands.errors import BadInput, UnknownName
from manyhands.grammar import format_call, parse_call
from manyhands.partition.pipeline import schedules
from manyhands.partition.pipeline.schedule import Schedule

DEFAULT = "one_f_one_b"
#: Micro-batches a stage where the plan says none: the bubble is then at most a fifth.
MICRO_BATCHES = 4


@dataclass(frozen=True)
class Pipelining:
    """A schedule by name with its options, and the modules with which stages but the first begin (None: as it fits)."""

    schedule: str = DEFAULT
    options: tuple[tuple[str, Any], ...] = ()
    cut: tuple[str, ...] | None = None

    def __str__(self) -> str:
        said = dict(self.options) | ({} if self.cut is None else {"cut": ", ".join(self.cut)})
        return format_call(self.schedule, **said)

    def made(self, ranks: int, micro_batches: int) -> Schedule:
        """The schedule itself, validated."""
        builder = schedules.load(self.schedule)
        known = [*list(inspect.signature(builder).parameters)[2:], "cut"]
        for name, _ in self.options:
            if name not in known:
                raise UnknownName(f"option of pipeline schedule {self.schedule}", name, known)
        found = call("pipeline schedule", self.schedule, builder, (ranks, micro_batches), dict(self.options))
        assert isinstance(found, Schedule)
        return found.validate()

    def at(self, names: list[str]) -> Pipelining:
        """The same, cut there."""
        return replace(self, cut=tuple(names))


def parse(text: str | None) -> Pipelining:
    """Read a plan's ``pipeline``; None is the default. Raises `BadInput`."""
    if text is None:
        return Pipelining()
    said = parse_call(text, kind="pipeline")
    schedules.load(said.name)
    if said.name == "pipedream":
        raise BadInput(
            "pipeline=pipedream: it updates after every micro-batch, with weights kept for those under way, and that "
            f"is not part of this release. Use {', '.join(name for name in schedules if name != 'pipedream')}."
        )
    if said.args:
        raise BadInput(f"pipeline={text!r}: options are named, e.g. {said.name}(cut='block2').")
    options = dict(said.kwargs)
    cut = options.pop("cut", None)
    if cut is not None and not isinstance(cut, str):
        raise BadInput(f"pipeline={text!r}: cut names modules in one text, e.g. {said.name}(cut='block2, head').")
    names = None if cut is None else tuple(n for n in (name.strip() for name in cut.split(",")) if n)
    return Pipelining(said.name, tuple(options.items()), names)
