"""What charts and sentences of an analysis share: when figures are alike, how they are said, and names of charts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from manyhands.studies.analysis import Chart
from manyhands.studies.contenders import Contender, by_task
from manyhands.studies.curves import Scale, better
from manyhands.studies.summary import Line, counted

#: A ratio nearer to 1 than this is no difference on an ordinary machine.
ALIKE = 0.03
#: Runs of one plan differ by less on an ordinary machine: the slowest's median step over the fastest's.
NOISY = 1.25
#: Accuracies nearer to each other than this are alike, whatever the test set; a small one makes it more, see `margin`.
POINT = 0.01
#: How many samples test sets hold that come by name; a measurement does not say.
TESTED = {"digits": 360, "mnist": 10_000}
#: The same for a test loss, as a share of it. Own judgement: its spread between seeds is of this size.
LOSS_SHARE = 0.02
#: More bars than this cannot be read.
MOST_BARS = 16


def tested(of: Line) -> int | None:
    """Samples of the test set, where that is known."""
    return TESTED.get(of.measured.data.partition("(")[0]) if of.measured is not None else None


def margin(a: float, b: float, samples: int | None) -> float:
    """By how much accuracies differ by chance: two standard errors of a difference of two shares, a point at least.

    An upper bound, as both are shares of the same test set. Of 360 samples and 95 % it is 3.2 points.
    """
    if samples is None:
        return POINT
    return max(POINT, 2 * math.sqrt(sum(share * (1 - share) for share in (a, b)) / samples))


def alike(a: float, b: float, scale: Scale, samples: int | None = None) -> bool:
    """Whether two results of training, on so many test samples, differ by less than chance makes them."""
    bound = margin(a, b, samples) if scale == "test_accuracy" else LOSS_SHARE * max(abs(a), abs(b))
    return abs(a - b) <= bound * (1 + 1e-9)  # 0.95 − 0.94 is a little more than 0.01


def no_worse(a: float, b: float, scale: Scale, samples: int | None = None) -> bool:
    """Whether ``a`` is as good as ``b``, or alike."""
    return better(scale, a, b) or alike(a, b, scale, samples)


def said(value: float, scale: Scale) -> str:
    """An accuracy or a loss in a sentence."""
    return f"{100 * value:.1f} % right" if scale == "test_accuracy" else f"a test loss of {value:.3g}"


def seconds(value: float) -> str:
    """Two or three digits and the unit."""
    return f"{1e3 * value:.0f} ms" if value < 0.1 else f"{value:.2f} s" if value < 10 else f"{value:,.0f} s"


def a_chart_each(
    found: Iterable[Contender], build: Callable[[str, Sequence[Contender]], Chart | None]
) -> tuple[Chart, ...]:
    """One of each task that can carry it."""
    made = (build(group, plans) for group, plans in by_task(found).items())
    return tuple(chart for chart in made if chart is not None)


def of_group(group: str) -> str:
    """The end of a title, where a study has several tasks."""
    return f" ({group})" if group else ""


def left_out(plans: int, which: str) -> str:
    """The end of a note, where there are more plans than bars that can be read."""
    return f" {counted(plans, f'{which} plan')} {'is' if plans == 1 else 'are'} left out." if plans else ""


def titled(text: str) -> str:
    """With a capital, but for a name of code such as slice_update."""
    return text if "_" in text.partition(" ")[0] else text[:1].upper() + text[1:]


def slug(*words: str) -> str:
    """A chart's name, which becomes that of a file."""
    return re.sub(r"[^A-Za-z0-9]+", "-", " ".join(words)).strip("-").lower()


def of_each_strategy(plans: Sequence[Contender], key: Callable[[Contender], Any]) -> list[Contender]:
    """The first by ``key`` of one process, then of each strategy."""
    kinds: dict[str, list[Contender]] = {}
    for each in plans:
        kinds.setdefault("" if each.alone else each.strategy, []).append(each)
    return [max(kinds[kind], key=key) for kind in sorted(kinds, key=bool)]
