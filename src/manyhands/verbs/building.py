"""Loss, optimizer, model and data as the user described them: built here, and whose fault it is where that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from manyhands.data import Splits
from manyhands.errors import FactoryFailed, ManyhandsError
from manyhands.models.factory import settle
from manyhands.task import Task, described
from manyhands.training.member import own_traceback


@contextlib.contextmanager
def the_users(what: str, spec: object) -> Iterator[None]:
    """Inside, an exception that is none of ours comes from what the user described as ``spec``."""
    try:
        yield
    except ManyhandsError:
        raise
    except Exception as e:
        raise FactoryFailed(f"{what} {described(spec)}", f"{type(e).__name__}: {e}", own_traceback(e)) from e


def built(task: Task, data_dir: Path | None) -> tuple[torch.nn.Module, Splits]:
    """The model and the data, here: bad data or a bad factory is found before anything is written or
    started. The model will hold the result; torch's generator stays where it was.
    """
    from manyhands import data, models

    generator = torch.get_rng_state()
    try:
        with the_users("data", task.data):
            splits = data.load(task.data, folder=data_dir)
        with the_users("model", task.model):
            model = models.build(task.model, inputs=splits.inputs, classes=splits.classes)
            settle(model, lambda: splits.train.rows(torch.tensor([0])), name=described(task.model))
        return model, splits
    finally:
        torch.set_rng_state(generator)
