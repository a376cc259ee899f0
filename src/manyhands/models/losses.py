"""Losses: what is made small, and how workers' shares of it are joined.

A loss is any callable ``(outputs, target)`` that returns one of

    mean              0-dim: a mean over the samples; workers are weighted by their samples
    (total, count)    total over what it counted (kept tokens, weighted samples …); workers are weighted by count
    (total, None)     a sum: the workers' totals and gradients are added, so that P workers equal the joined batch

and may carry ``reduction`` (``"mean"``, the default, or ``"sum"``, which a sum must say) and ``l2`` (λ). Those here
carry both.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyhands.calling import call
from manyhands.catalogue import Reference
from manyhands.errors import BadInput
from manyhands.grammar import parse_call
from manyhands.models import loss_functions

log = logging.getLogger(__name__)

Returned = Tensor | tuple[Tensor, Tensor | float | None]
Loss = Callable[[Any, Any], Returned]
Reduction = Literal["mean", "sum"]

_NOTHING_IGNORED = -(2**62)  # torch's default −100 drops such rows silently and would count them all the same


@dataclass(frozen=True)
class CrossEntropy:
    """−log softmax(outputs)[target], a mean over samples: ``(n, classes, …)`` and labels ``(n, …)`` or probabilities.

    Where a sample has many labels (characters of a text, pixels), it is a mean over them, too.

    With ``ignore_index`` rows that carry this label are left out, and the loss returns ``(total, kept)``: shares that
    keep different numbers of rows still join to the mean over all that were kept. Without it no label is special.
    """

    label_smoothing: float = 0.0
    ignore_index: int | None = None

    name: ClassVar[str] = "cross_entropy"
    paper: ClassVar[Reference] = Reference(
        "J. S. Bridle",
        "Probabilistic interpretation of feedforward classification network outputs, with relationships to statistical "
        "pattern recognition",
        1990,
        "Neurocomputing, NATO ASI Series F68, 227-236",
    )
    reduction: ClassVar[Reduction] = "mean"
    l2: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if type(self.label_smoothing) not in (int, float) or not 0 <= self.label_smoothing <= 1:
            raise BadInput(f"loss cross_entropy: label_smoothing={self.label_smoothing!r} lies outside 0 … 1.")

    def __call__(self, outputs: Tensor, target: Tensor) -> Returned:
        """The mean, or ``(total, kept)`` when rows may be ignored."""
        if self.ignore_index is None:
            return F.cross_entropy(outputs, target, ignore_index=_NOTHING_IGNORED, label_smoothing=self.label_smoothing)
        total = F.cross_entropy(
            outputs, target, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, reduction="sum"
        )
        return total, (target != self.ignore_index).sum()


@dataclass(frozen=True)
class SquaredError:
    """½ Σ (outputs − target)² over samples *and* outputs: the slides' sum loss J(w) = ½Σ(y−w'x)² + λ/2·‖w‖².

    A target of whole numbers is a class and is compared one-hot. Being a sum, its gradient grows with the batch, and
    with it the weight of the data against λ: a learning rate fits one global batch size.

    ``l2`` is λ. The term λ/2·‖w‖² belongs to the parameters and not to a share of a batch, so it is *not* in what
    ``__call__`` returns: this object only carries the number, and whoever applies the update adds its gradient λ·w
    exactly once, however many workers there are (P copies would give Pλ).
    """

    l2: float = 0.0

    name: ClassVar[str] = "squared_error"
    paper: ClassVar[Reference] = Reference(
        "Xin Ma",
        "Parallel Parameter Update for Deep Neural Network",
        2018,
        "CSE633 course slides, 3 May 2018",
    )
    reduction: ClassVar[Reduction] = "sum"

    def __post_init__(self) -> None:
        if type(self.l2) not in (int, float) or not 0 <= self.l2 < float("inf"):
            raise BadInput(f"loss squared_error: l2={self.l2!r}; it must be a finite number that is not negative.")

    def __call__(self, outputs: Tensor, target: Tensor) -> tuple[Tensor, None]:
        """``(total, None)``."""
        if not target.is_floating_point():
            target = F.one_hot(target.long(), outputs.shape[-1]).to(outputs.dtype)
        elif target.shape != outputs.shape and target.numel() == outputs.numel():
            target = target.reshape(outputs.shape)  # (n,) against (n, 1): left to broadcasting it would become (n, n)
        if target.shape != outputs.shape:
            raise BadInput(
                f"loss squared_error: outputs {tuple(outputs.shape)} and target {tuple(target.shape)} differ in shape. "
                "A target is either of the outputs' shape or a whole number for each sample."
            )
        return 0.5 * F.mse_loss(outputs, target, reduction="sum"), None


@dataclass(frozen=True)
class TorchSum:
    """A torch loss with ``reduction="sum"``, which returns a bare number: marked as the sum that it is."""

    loss: nn.Module
    reduction: ClassVar[Reduction] = "sum"
    l2: ClassVar[float] = 0.0

    def __call__(self, outputs: Any, target: Any) -> tuple[Tensor, None]:
        """``(total, None)``."""
        return self.loss(outputs, target), None


def build(spec: str | Loss | None) -> Loss | None:
    """The loss that ``spec`` describes; None means that the model returns its own loss.

    Text names one of ours or ``my_pkg.module:name``: a class, or a function that needs no argument or is written with
    options, is called and gives the loss; a function that takes ``(outputs, target)`` is the loss itself.
    """
    if spec is None:
        return None
    made: Any = _from_text(spec) if isinstance(spec, str) else spec() if isinstance(spec, type) else spec
    if not callable(made):
        raise BadInput(
            f"loss {spec!r} gave a {type(made).__name__}; the rule is: a loss is called with (outputs, target) and "
            "returns a 0-dim mean, (total, count), or (total, None) for a sum."
        )
    return _from_torch(made) if isinstance(made, nn.Module) else made


def _from_text(text: str) -> Any:
    said = parse_call(text, kind="loss")
    found = loss_functions.load(said.name)
    makes_one = isinstance(found, type) or bool(said.args or said.kwargs) or (callable(found) and not _required(found))
    return call("loss", said.name, found, said.args, said.kwargs) if makes_one else found


def _required(function: Callable[..., Any]) -> int:
    if isinstance(function, nn.Module):
        return 2
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 2
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def _from_torch(module: nn.Module) -> Loss:
    reduction = getattr(module, "reduction", "mean")
    if reduction == "sum":
        return TorchSum(module)
    if reduction == "none":
        raise BadInput(
            f"loss {module}: reduction='none' returns one number for each sample; take reduction='mean' or 'sum'."
        )
    if getattr(module, "weight", None) is not None:
        log.warning("%s weights classes but returns no count: workers are joined by their samples alone.", module)
    return module


def reduction(loss: Loss | None) -> Reduction:
    """Whether workers' gradients are averaged (by count) or added."""
    return "sum" if getattr(loss, "reduction", "mean") == "sum" else "mean"


def l2(loss: Loss | None) -> float:
    """λ of a loss, 0 where it has none."""
    return float(getattr(loss, "l2", 0.0))


@torch.no_grad()
def accuracy(outputs: Tensor, target: Tensor) -> Tensor:
    """How many predictions are right, 0-dim: ``(n, classes, …)`` against labels ``(n, …)`` or the same one-hot."""
    guess = outputs.argmax(dim=1)
    if target.is_floating_point():
        if target.shape != outputs.shape:
            raise BadInput(f"accuracy needs classes; a float target of shape {tuple(target.shape)} has none.")
        target = target.argmax(dim=1)
    return (guess == target).sum()
