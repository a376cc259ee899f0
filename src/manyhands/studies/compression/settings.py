"""The setting of each compressor that was found best on three tasks, as `benchmarks/compressed_accuracy.py` measures.

A threshold is in units of a gradient, so it is the task's. What sends late goes with plain SGD on images: under
momentum 0.9 what comes late is multiplied by ten, and one_bit, random_k and low thresholds of strom lose points or
diverge there. `dgc` has its momentum inside; `sign_sgd` has steps of one size, so its learning rate is the size. Each
is held against dense exchange with the same optimizer, or with its like.
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
    against: str = ""  # the optimizer of the dense run that it is held against
    fewer: float | None = None  # times less traffic that is asked for


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


_SGD = "sgd(lr=0.05, momentum=0.9)"
_PLAIN = "sgd(lr=0.1)"
_ADAM = "adamw(lr=0.001)"
_SLOW = "sgd(lr=0.1, momentum=0.9)"


def _each(optimizer: str, *texts: str) -> tuple[Setting, ...]:
    return tuple(Setting(text, optimizer, optimizer) for text in texts)


SETTINGS: Mapping[str, Settings] = {
    "cnn": Settings(
        {"model": "cnn", "data": "mnist", "batch_size": 100, "epochs": 1},
        (Setting("none", _SGD), Setting("none", _PLAIN)),
        (
            Setting("strom(threshold=0.1)", _PLAIN, _PLAIN, fewer=50),
            *_each(
                _PLAIN,
                *("strom_adaptive(threshold=0.1)", "random_k(ratio=0.1)", "one_bit"),
                *("two_bit(threshold=0.05)", "terngrad", "entropy(of='strom(threshold=0.1)')"),
            ),
            *_each(_SGD, "top_k", "qsgd", "int8", "float16", "bfloat16", "flexpoint", "powersgd"),
            Setting("dgc(ratio=0.01)", "sgd(lr=0.05)", _SGD),
            Setting("sign_sgd", "sgd(lr=0.001)", _SGD),
        ),
    ),
    "gpt": Settings(
        {"model": "gpt(layers=2, width=64)", "data": "tinyshakespeare", "batch_size": 16, "steps": 300},
        (Setting("none", _ADAM), Setting("none", _SLOW)),
        (
            *_each(_SLOW, "powersgd", "top_k(ratio=0.1)", "entropy(of='top_k(ratio=0.1)')"),
            *_each(
                _ADAM,
                *("strom(threshold=0.01)", "strom_adaptive(threshold=0.01)", "random_k(ratio=0.1)", "one_bit"),
                *("terngrad", "qsgd(bucket=64)", "two_bit(threshold=0.01)", "int8", "float16", "bfloat16", "flexpoint"),
            ),
            Setting("dgc(ratio=0.05)", "sgd(lr=0.1)", _SLOW),
            Setting("sign_sgd", "sgd(lr=0.001)", _ADAM),
        ),
        by_loss=True,
    ),
    "perceptron": Settings(
        {"model": "perceptron(hidden=(1000, 200))", "data": "mnist", "batch_size": 100, "epochs": 1},
        (Setting("none", _PLAIN),),
        (
            Setting("strom(threshold=0.02)", _PLAIN, _PLAIN, fewer=300),
            Setting("entropy(of='strom(threshold=0.02)')", _PLAIN, _PLAIN, fewer=300),
        ),
    ),
}
