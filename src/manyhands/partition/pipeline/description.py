"""What a plan says of its pipeline: which schedule, and where the model is cut.

one_f_one_b                     cut where the stages' measured costs are most alike
gpipe(cut="block2, head")       a new stage begins with each module named
interleaved(chunks=2)           what else a schedule takes
written(file="schedule.txt")    one written by hand; so is written(rows="F0 F1 B0 B1 / F0 B0 F1 B1")
my_pkg.module:order             one of your own: a function (ranks, micro_batches) that returns a `schedule.Schedule`
pipedream(cut="block2")         beside strategy=pipedream, whose order it is
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from manyhands.calling import call
from manyhands.contract import Strategy
from manyhands.errors import BadInput, UnknownName
from manyhands.grammar import format_call, parse_call
from manyhands.partition.pipeline import schedules
from manyhands.partition.pipeline.schedule import Schedule
from manyhands.partition.pipeline.schedule import parse as drawn
from manyhands.partition.pipeline.strategy import PipeDream
from manyhands.partition.pipeline.written import text_of

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
        said = {} if self.schedule == PipeDream.name else dict(self.options)  # pipedream's are the strategy's to say
        return format_call(self.schedule, **said, **({} if self.cut is None else {"cut": ", ".join(self.cut)}))

    @property
    def micro_batches(self) -> int | None:
        """How many it has, if it says so itself."""
        if self.schedule != "written":
            return None
        return drawn(str(dict(self.options)["rows"]).replace("/", "\n")).micro_batches

    def made(self, ranks: int, micro_batches: int) -> Schedule:
        """The schedule itself, validated."""
        builder = schedules.load(self.schedule)
        known = [*list(inspect.signature(builder).parameters)[2:], "cut"]
        for name, _ in self.options:
            if name not in known:
                raise UnknownName(f"option of pipeline schedule {self.schedule}", name, known)
        found = call("pipeline schedule", self.schedule, builder, (ranks, micro_batches), dict(self.options))
        if not isinstance(found, Schedule):
            raise BadInput(
                f"pipeline={self.schedule} returned a {type(found).__name__}; the rule is: a function of ranks and "
                "micro_batches that returns a manyhands.partition.pipeline.schedule.Schedule."
            )
        if found.ranks != ranks or found.micro_batches != micro_batches:
            raise BadInput(
                f"pipeline={self.schedule} was asked for {ranks} ranks and {micro_batches} micro-batches and is for "
                f"{found.ranks} and {found.micro_batches}."
            )
        return found.validate()

    def at(self, names: list[str]) -> Pipelining:
        """The same, cut there."""
        return replace(self, cut=tuple(names))


def parse(text: str | None, strategy: Strategy | str | None = None) -> Pipelining:
    """Read a plan's ``pipeline``, beside its ``strategy``; None is the default. Raises `BadInput`."""
    own = strategy if isinstance(strategy, PipeDream) else None
    if text is None:
        text = DEFAULT if own is None else own.name
    said = parse_call(text, kind="pipeline")
    schedules.load(said.name)
    if own is None and said.name == PipeDream.name:
        others = ", ".join(name for name in schedules if name != PipeDream.name)
        raise BadInput(
            f"pipeline={text!r}: PipeDream updates after every micro-batch, so it is a strategy that brings its own "
            f"order. Say strategy=pipedream (--strategy pipedream), or use {others}."
        )
    if own is not None and said.name != own.name:
        raise BadInput(
            f"pipeline={text!r} with strategy={own}: its order is its own. Leave pipeline out, or name the modules to "
            "cut before, e.g. pipeline=\"pipedream(cut='block2')\" (--pipeline)."
        )
    if said.args:
        raise BadInput(f"pipeline={text!r}: options are named, e.g. {said.name}(cut='block2').")
    options = dict(said.kwargs)
    cut = options.pop("cut", None)
    if cut is not None and not isinstance(cut, str):
        raise BadInput(f"pipeline={text!r}: cut names modules in one text, e.g. {said.name}(cut='block2, head').")
    if own is not None:
        if options:
            raise BadInput(
                f"pipeline={text!r}: {', '.join(options)} is said of the strategy, e.g. "
                "strategy='pipedream(in_flight=2)' (--strategy); here modules are named to cut before."
            )
        options = {} if own.in_flight is None else {"in_flight": own.in_flight}
    if said.name == "written":  # as it stands now: a file may change, and is not on every host
        text = text_of(options.pop("rows", None), options.pop("file", None))
        rows = [" ".join(row.split()) for row in text.replace("/", "\n").splitlines() if row.strip()]
        options = {"rows": " / ".join(rows), **options}
    names = None if cut is None else tuple(n for n in (name.strip() for name in cut.split(",")) if n)
    return Pipelining(said.name, tuple(options.items()), names)
