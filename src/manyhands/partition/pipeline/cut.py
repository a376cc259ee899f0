"""Where a pipeline cuts a model: into contiguous stages, by measured cost or at modules that the user names.

Two kinds of models can be cut without a change: a `chain`, and anything whose forward `torch.fx` can trace (`traced`).
Tracing keeps operations alone (`tracing`). So a chain is not traced where its own boundaries do, and of other models
only the forwards around a cut are: modules without one stay as they are. `rehearsal` finds what is lost there.

The stages hold the model's own modules and parameters, so training them trains the model.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from manyhands.checks import whole
from manyhands.errors import BadInput, UnknownName
from manyhands.partition.pipeline.balancing import balance
from manyhands.partition.pipeline.chain import Chain, is_chain
from manyhands.partition.pipeline.parts import Parts, refuse_tied
from manyhands.partition.pipeline.timing import measured
from manyhands.partition.pipeline.traced import Traced

_INSIDE = "A cut lies between modules of a chain or of a forward that torch.fx can trace."


@dataclass(frozen=True)
class Cut:
    """A model as stages. Prints what went where."""

    stages: tuple[nn.Module, ...]
    #: The names of the modules with which stages begin.
    at: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"stage {k} from {name}: {sum(p.numel() for p in stage.parameters()):,} parameters"
            for k, (name, stage) in enumerate(zip(self.at, self.stages, strict=True))
        ]
        return "\n".join(lines)


def cut(model: nn.Module, at: str | Sequence[str]) -> Cut:
    """``model`` cut before the modules named in ``at``: ``"block2, head"`` makes three stages.

    Raises `BadInput` where the model cannot be cut, has no such module, or stages would share parameters.
    """
    names = [x for x in (n.strip() for n in at.split(",")) if x] if isinstance(at, str) else list(at)
    parts = _parts_from(model, names)
    starts = [0]
    for name in names:
        start = parts.starts.get(name)
        if start is None:
            parts.refuse_inside(name)
            raise UnknownName("module to cut before", name, parts.starts, also=_INSIDE)
        if start <= starts[-1]:
            raise BadInput(
                f'cut="{", ".join(names)}": {name} {"begins the model" if start == 0 else "does not come after"}'
                f"{'' if start == 0 else ' what is named before it'}. Name modules in order, without the first."
            )
        starts.append(start)
    bounds = list(itertools.pairwise([*starts, len(parts)]))
    tied = parts.tied()
    for start in starts[1:]:
        crossing = [t for t in tied if t.first < start <= t.last]
        if crossing:
            refuse_tied(model, crossing)
    return Cut(tuple(parts.module(lo, hi) for lo, hi in bounds), tuple(parts.names[s] for s in starts))


def cut_points(model: nn.Module, stages: int, sample: Any) -> list[str]:
    """Where to cut ``model`` into ``stages``, so that the slowest takes as little time as it can.

    Each part's forward and backward are timed on ``sample``, the inputs of one micro-batch; parameters, gradients,
    buffers and random numbers stay as they were. Equal times are divided by parameters. Every stage has something to
    train. Timings differ from run to run and from worker to worker: let one find the points, and all cut there.
    """
    whole("pipeline: stages", stages)
    parts = _parts(model, lambda parts: parts.most_stages() >= stages)
    if parts.most_stages() < stages:
        learning = sum(parts.trains())
        if learning >= stages:
            refuse_tied(model, parts.tied())
        raise BadInput(
            f"{type(model).__name__} into {stages} stages: it has {len(parts)} parts that can be told apart "
            f"({', '.join(parts.names)}), {learning} of them with trainable parameters. A stage needs one such at "
            f"least. Ask for {learning} stages or fewer."
            + "".join(f" {parts.why_one_part(name)}" for name in parts.closed)
        )
    costs = measured(parts, sample)
    parameters = [sum(p.numel() for p in its) for its in parts.parameters]
    starts = balance(costs, parameters, stages, parts.forbidden(), parts.trains())
    return [parts.names[start] for start in starts[1:]]


def _parts(model: nn.Module, enough: Callable[[Parts], bool]) -> Parts:
    """Those of the chain that a model is, if they are ``enough``; otherwise those that tracing finds."""
    if not (is_chain(model) or type(model) is nn.TransformerEncoder):
        return Traced(model)
    chain = Chain(model)
    if not enough(chain) and any(map(_may_be_opened, chain.modules)):
        with contextlib.suppress(BadInput):
            return Traced(model)
    return chain


def _parts_from(model: nn.Module, names: Sequence[str]) -> Parts:
    """Parts that begin with ``names``, where there are such; with as little traced as that takes."""

    def begin(parts: Parts) -> bool:
        return all(name in parts.starts for name in names)

    if not is_chain(model):
        with contextlib.suppress(BadInput):
            parts = Traced(model, names)
            if begin(parts):
                return parts
    return _parts(model, begin)


def _may_be_opened(module: nn.Module) -> bool:
    """Whether it is a container of the user's, with a forward of its own."""
    of_others = type(module).__module__.startswith(("torch.", "manyhands.partition."))
    return not of_others and next(module.children(), None) is not None
