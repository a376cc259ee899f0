"""Room for text without a font: how wide a text is at most, and numbers as axes and tables show them.

Charts are lettered by the reader's browser in its own font, so no file tells how wide a word will be. The widths here
are those of DejaVu Sans, the widest of the usual sans-serif fonts: what fits in it fits in the others.
"""

from __future__ import annotations

import math
import unicodedata

#: Of the font's size. DejaVu Sans 2.37, rounded up, by groups of letters that are about as wide.
_WIDTHS = {
    0.29: "ijl'",
    0.40: ' ,.:;|!I()[]ftr-/\\"`',
    0.56: "Jsczkvxy?_*",
    0.65: "abdeghnopqu0123456789FLTPYESZ$#",
    0.72: "ABCKRVXw",
    0.80: "DGHNOQU&~",
    0.84: "+=<>^×÷±−",
    1.00: "mMW%@…",
}
_WIDTH = {letter: width for width, letters in _WIDTHS.items() for letter in letters}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def text_width(text: str, size: float) -> float:
    """At most so wide, in the unit of ``size``."""
    wide = (_WIDTH.get(x) or (1.0 if unicodedata.east_asian_width(x) in "WF" else 0.68) for x in text)
    return size * sum(wide)


def shortened(text: str, size: float, room: float) -> str:
    """``text``, or its two ends about an ellipsis where there is no room for more.

    >>> shortened("replica_average(period=4)", 10, 80)
    'replica…iod=4)'
    """
    if text_width(text, size) <= room:
        return text
    kept = len(text) - 1
    while kept > 2 and text_width(_ends(text, kept), size) > room:
        kept -= 1
    return _ends(text, kept)


def _ends(text: str, kept: int) -> str:
    last = kept // 2
    return f"{text[: kept - last]}…{text[len(text) - last :]}"


def number(value: float, digits: int = 4) -> str:
    """So many significant digits at most, thousands apart; a power of ten where that is shorter.

    >>> number(1234.56), number(0.000012), number(3.0), number(2.5e9)
    ('1,235', '1.2×10⁻⁵', '3', '2.5×10⁹')
    """
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e7:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        shown = f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    elif abs(value) >= 10**digits:
        shown = f"{value:,.0f}"
    else:
        shown = f"{value:,.{digits}g}" if value else "0"
    return shown.replace("-", "−")
