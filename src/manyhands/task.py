"""What to learn: model, data, loss, optimizer, schedule, clip, batch size, length, seed. Nothing about hardware."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manyhands.checks import is_positive, is_whole
from manyhands.errors import BadInput, InvalidPlan, Problem, UnknownName

#: What a task consists of when nothing is said: small, quick, and enough to see the loss fall.
DEFAULT_EPOCHS = 1
#: torch keeps a seed in a signed word of 64 bits.
LARGEST_SEED = 2**63 - 1
#: How text says that there is no loss (the model returns its own) or no schedule.
NONE = "none"


@dataclass(frozen=True, eq=False)
class Task:
    """What to learn. Everything that is text can be printed, stored and resumed from a file.

    ``model``, ``data``, ``loss``, ``optimizer`` and ``schedule`` are text in the one grammar (``cnn``,
    ``perceptron(hidden=50)``, ``my_pkg.module:factory``), an importable callable, or, for model and data, a live
    object. ``loss=None``: the model returns its own loss. ``batch_size`` is the global batch: the samples that all
    workers together consume in a step. Give ``epochs`` or ``steps``; training ends earlier when it has taken
    ``seconds`` (evaluation not counted), or when an evaluation finds ``target_accuracy``.

        Task(model="perceptron(hidden=50)", data="mnist", optimizer="sgd(lr=0.1)", batch_size=100, epochs=3)
    """

    model: Any = "perceptron"
    data: Any = "auto"
    loss: Any = "cross_entropy"
    optimizer: Any = "sgd(lr=0.1)"
    schedule: Any = None
    clip: float | None = None
    batch_size: int = 100
    epochs: int | None = None
    steps: int | None = None
    seconds: float | None = None
    target_accuracy: float | None = None
    seed: int = 0

    def problems(self) -> list[Problem]:
        """What is wrong with the numbers; names are looked up when the task is resolved."""
        found = []
        for name, at_least in (("batch_size", 1), ("epochs", 1), ("steps", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is None and name in ("epochs", "steps"):
                continue
            if not is_whole(value, at_least):
                found.append(
                    Problem(
                        f"{name}={value!r}",
                        f"{name} is a whole number from {at_least}.",
                        f"E.g. {name}={max(at_least, 10)}.",
                    )
                )
        if is_whole(self.seed, LARGEST_SEED + 1):
            found.append(Problem(f"seed={self.seed}", f"torch takes seeds up to {LARGEST_SEED}.", "E.g. seed=1."))
        if self.epochs is not None and self.steps is not None:
            found.append(
                Problem(
                    f"epochs={self.epochs} and steps={self.steps}",
                    "the length of a run is said once.",
                    "Give one of them.",
                )
            )
        if self.seconds is not None and not is_positive(self.seconds):
            found.append(
                Problem(f"seconds={self.seconds!r}", "a time to train is a positive number.", "E.g. seconds=60.")
            )
        if self.target_accuracy is not None and not (is_positive(self.target_accuracy) and self.target_accuracy <= 1):
            found.append(
                Problem(
                    f"target_accuracy={self.target_accuracy!r}",
                    "an accuracy is a share of right answers, above 0 and at most 1.",
                    "E.g. target_accuracy=0.97.",
                )
            )
        if self.clip is not None and not is_positive(self.clip):
            found.append(
                Problem(f"clip={self.clip!r}", "the limit of the gradient norm is a positive number.", "E.g. clip=1.0.")
            )
        return found

    def check(self) -> None:
        """Raise `InvalidPlan` if `problems` finds any."""
        if found := self.problems():
            raise InvalidPlan(found)

    @property
    def length(self) -> dict[str, int | None]:
        """``epochs`` and ``steps`` with the default filled in, as the sampler takes them."""
        if self.epochs is None and self.steps is None:
            return {"epochs": DEFAULT_EPOCHS, "steps": None}
        return {"epochs": self.epochs, "steps": self.steps}

    def as_table(self) -> dict[str, Any]:
        """The fields as TOML can hold them; a live object is named in angle brackets and cannot be read back.

        ``loss=None`` is written as ``none``: what is left out means the default.
        """
        table = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        table["loss"] = NONE if self.loss is None else self.loss
        return {k: v if isinstance(v, str | int | float) else described(v) for k, v in table.items() if v is not None}


def described(value: Any) -> str:
    """How a part of a task is called in messages and files: its text, ``module:name``, or ``<Type>``."""
    if isinstance(value, str):
        return value
    if isinstance(value, functools.partial):
        inner = ", ".join([*map(repr, value.args), *(f"{k}={v!r}" for k, v in value.keywords.items())])
        return f"{described(value.func)}({inner})"
    name = getattr(value, "__qualname__", None)
    if callable(value) and name is not None and "<" not in name:
        return f"{value.__module__}:{name}"
    return f"<{getattr(value, 'name', None) or type(value).__name__}>"


def from_table(kind: type[Any], table: Mapping[str, Any], where: str) -> Any:
    """A `Task` or `Plan` from one table of a TOML file; unknown keys are refused with the nearest name."""
    names = [f.name for f in dataclasses.fields(kind)]
    for key, value in table.items():
        if key not in names:
            raise UnknownName(f"key in {where}", key, names)
        if isinstance(value, str) and value.startswith("<"):
            raise BadInput(
                f"{where} says {key} = {value}: that run was given a live object, which a file cannot hold. "
                "Name it as my_pkg.module:factory, or start from Python with the object."
            )
    return kind(**{k: None if k in ("loss", "schedule") and v == NONE else v for k, v in table.items()})
