"""The recommended setting of each compressor on three tasks: the one place where they stand.

`benchmarks/compressed_accuracy.py` measures them, the study `compression` runs them, docs/compression.md tells what
came out. Recommended is the strongest compression that ends near dense exchange after equal samples, with the optimizer
that goes with it:

- A threshold is in units of a gradient, so it is the task's.
- What is sent late is multiplied by 1/(1 − momentum) afterwards. So schemes with feedback go with plain SGD of a larger
  rate, which on the images is as good; `dgc` has its momentum inside.
- Adam divides by the root of the mean square, and what is drawn by chance has a larger one: its steps are 1/√(1 + ω)
  as long, ω the variance that the scheme adds, so it wants the largest rate that dense exchange bears, or a larger one.
- Feedback and Adam do not go together here: what comes in spikes, or with the size of its neighbours, tells Adam the
  wrong sizes. These schemes take SGD, and are held against dense exchange with SGD.
- Votes have no size, so their learning rate is the size of a step; momentum after them averages votes, as Adam does.

Each is held against the dense run of its own kind of optimizer at the rate that is good for dense exchange.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from manyhands.studies.grid import Value


@dataclass(frozen=True)
class Setting:
    """A compressor as it is recommended, and the optimizer that goes with it."""

    compress: str
    optimizer: str
    against: str = ""  # the optimizer of the dense run that it is held against, where that is another
    fewer: float | None = None  # times less traffic that is asked for

    @property
    def base(self) -> str:
        """The optimizer of the dense run that it is held against."""
        return self.against or self.optimizer


@dataclass(frozen=True)
class Settings:
    """One task, dense runs, and every scheme."""

    task: Mapping[str, Value]
    dense: tuple[Setting, ...]
    schemes: tuple[Setting, ...]
    by_loss: bool = False  # judged by the test loss, else by accuracy

    @property
    def settings(self) -> tuple[Setting, ...]:
        """All of them, dense ones first."""
        return (*self.dense, *self.schemes)


def _each(optimizer: str, against: str, *texts: str) -> tuple[Setting, ...]:
    return tuple(Setting(text, optimizer, against) for text in texts)


_IMAGES, _PLAIN, _FAST = "sgd(lr=0.05, momentum=0.9)", "sgd(lr=0.3)", "sgd(lr=0.5)"
_WIDE = "sgd(lr=0.1, momentum=0.9)"
_TEXT, _TEXT_SGD = "adamw(lr=0.0045)", "sgd(lr=0.1, momentum=0.9)"

#: By task; of a task's dense runs the first is the best.
SETTINGS: Mapping[str, Settings] = {
    "cnn": Settings(
        {"model": "cnn", "data": "mnist", "batch_size": 100, "epochs": 1},
        (Setting("none", _IMAGES),),
        (
            Setting("strom(threshold=0.1)", _FAST, _IMAGES, fewer=50),
            *_each(
                _FAST,
                _IMAGES,
                *("strom_adaptive(threshold=0.1, most=0.1)", "two_bit(threshold=0.1)", "one_bit"),
                "entropy(of='strom(threshold=0.1)')",
            ),
            *_each(_PLAIN, _IMAGES, "random_k(ratio=0.05)", "sign_sgd(feedback=True)"),
            *_each(_IMAGES, _IMAGES, "top_k", "terngrad", "qsgd(coding='elias')", "powersgd(rank=1)"),
            *_each(_IMAGES, _IMAGES, "int8", "float16", "bfloat16", "flexpoint"),
            Setting("dgc(ratio=0.01)", "sgd(lr=0.05)", _IMAGES),
        ),
    ),
    "perceptron": Settings(
        {"model": "perceptron(hidden=(1000, 200))", "data": "mnist", "batch_size": 100, "epochs": 1},
        (Setting("none", _WIDE),),
        (
            Setting("strom(threshold=0.02)", _FAST, _WIDE, fewer=300),
            *_each(
                _FAST,
                _WIDE,
                *("strom_adaptive(threshold=0.02)", "two_bit(threshold=0.02)", "one_bit"),
                *("entropy(of='strom(threshold=0.02)')", "random_k(ratio=0.05)", "sign_sgd(feedback=True)"),
            ),
            *_each(_WIDE, _WIDE, "top_k", "terngrad", "qsgd(coding='elias')", "powersgd"),
            *_each(_WIDE, _WIDE, "int8", "float16", "bfloat16", "flexpoint"),
            Setting("dgc", "sgd(lr=0.1)", _WIDE),
        ),
    ),
    "gpt": Settings(
        {"model": "gpt(layers=2, width=64)", "data": "tinyshakespeare", "batch_size": 16, "steps": 300},
        (Setting("none", _TEXT), Setting("none", _TEXT_SGD)),
        (
            *_each(_TEXT, _TEXT, "terngrad", "qsgd(coding='elias')", "int8", "float16", "bfloat16", "flexpoint"),
            Setting("random_k(ratio=0.25, feedback=False)", "adamw(lr=0.0075)", _TEXT),
            Setting("sign_sgd", "sgd(lr=0.0015, momentum=0.9)", _TEXT),
            *_each(
                _FAST,
                _TEXT_SGD,
                *("strom(threshold=0.01)", "strom_adaptive(threshold=0.01)", "two_bit(threshold=0.01)", "one_bit"),
                "entropy(of='strom(threshold=0.01)')",
            ),
            Setting("top_k", "sgd(lr=0.2, momentum=0.5)", _TEXT_SGD),
            Setting("powersgd", _TEXT_SGD, _TEXT_SGD),
            Setting("dgc(ratio=0.01)", "sgd(lr=0.1)", _TEXT_SGD),
        ),
        by_loss=True,
    ),
}


def recommended(name: str) -> list[tuple[str, Setting]]:
    """Tasks' names, and the setting of one compressor on each; of ``none`` that of the best dense run."""
    each = ((task, (*of.schemes, of.dense[0])) for task, of in SETTINGS.items())
    return [(task, next(s for s in of if s.compress.partition("(")[0] == name)) for task, of in each]
