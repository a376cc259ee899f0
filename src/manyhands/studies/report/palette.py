"""How series differ: by colour (Okabe and Ito 2008, safe for colour-blind readers), and always by something else too.

Every colour has a name. A drawing carries both, the colour for itself alone and the name as a class by which a page
gives it another colour in the dark (see style.css).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manyhands.studies.analysis import Series

#: Name → colour on white.
COLOURS = {
    "c1": "#0072b2",
    "c2": "#d55e00",
    "c3": "#009e73",
    "c4": "#b0568d",
    "c5": "#56b4e9",
    "c6": "#e69f00",
    "ink": "#1f2328",
    "soft": "#59636e",
    "ideal": "#7d8590",
    "grid": "#e4e7eb",
    "paper": "#ffffff",
}
_SERIES = ("c1", "c2", "c3", "c4", "c5", "c6", "ink")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_HATCHES = ("", "////", "\\\\\\\\", "----", "||||", "xxxx", "++++")
#: Lengths of stroke and gap.
_DASHES = {
    "ideal": (6.0, 4.0),
    "fit": (1.5, 2.5),
    "published": (7.0, 2.5, 1.5, 2.5),
    "simulated": (4.0, 3.0),
    "computed": (9.0, 3.0),
}


@dataclass(frozen=True)
class Style:
    """The looks of one series."""

    label: str
    colour: str  # a name
    marker: str
    hollow: bool
    hatch: str
    dash: tuple[float, ...]  # () is a solid line
    marked: bool = True  # whether it has points of its own

    @property
    def measured(self) -> bool:
        """Whether it was."""
        return not self.dash


def styles(series: Sequence[Series]) -> list[Style]:
    """For each series. What is not measured has the colour of the measured series that it belongs to."""
    measured = [s for s in series if s.role == "measured"]
    colours = {id(s): _SERIES[i % len(_SERIES)] for i, s in enumerate(measured)}
    spare = len(measured)
    found = []
    beside: dict[str, int] = {}
    for s in series:
        nth = beside[s.role] = beside.get(s.role, -1) + 1
        if s.role == "ideal":
            colour = "ideal"
        elif s.role == "measured":
            colour = colours[id(s)]
        elif (kin := _kin(s, measured, nth)) is not None:
            colour = colours[id(kin)]
        elif s.role == "published":
            colour = "soft"
        else:
            colour, spare = _SERIES[spare % len(_SERIES)], spare + 1
        label = s.name if s.role == "measured" or s.role in s.name.lower() else f"{s.name} ({s.role})"
        found.append(
            Style(
                label,
                colour,
                _MARKERS[nth % len(_MARKERS)],
                nth >= len(_MARKERS) or s.role == "simulated",
                _HATCHES[nth % len(_HATCHES)],
                _DASHES.get(s.role, ()),
                s.role in ("measured", "simulated"),
            )
        )
    return found


def _kin(series: Series, measured: Sequence[Series], nth: int) -> Series | None:
    """The measured series whose name is the longest in this one's, else, for a fit, the one in the same place."""
    named = [m for m in measured if m.name and m.name in series.name]
    if named:
        return max(named, key=lambda m: len(m.name))
    return measured[nth] if series.role == "fit" and nth < len(measured) else None
