"""How many multiplications a convolution needs by Winograd's minimal filtering, and what its transforms move.

    F(m×m, r×r): a tile of m×m outputs takes (m+r−1)² multiplications for a pair of channels, not m²·r²
    F(2×2, 3×3): 2.25 times fewer; F(4×4, 3×3): 4 times fewer

A. Lavin, S. Gray 2016, "Fast Algorithms for Convolutional Neural Networks", CVPR, sections 4 and 5. Unit stride, square
kernels. Fused with its transforms it moves what a direct one moves; as three passes it also writes and reads the
transformed input and output, (m+r−1)²/m² as large, and the transformed weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from manyhands.catalogue import Reference


@dataclass(frozen=True)
class Convolution:
    """Outputs (n, c_out, height, width) of a square kernel over ``c_in`` channels, unit stride."""

    n: int
    c_in: int
    c_out: int
    height: int
    width: int
    kernel: int

    @property
    def pixels(self) -> int:
        """Of the outputs, all images."""
        return self.n * self.height * self.width


def direct_multiplications(conv: Convolution) -> int:
    """n·c_in·c_out·h·w·r²."""
    return conv.pixels * conv.c_in * conv.c_out * conv.kernel**2


def multiplications(conv: Convolution, tile: int = 4) -> int:
    """n·c_in·c_out·⌈h/m⌉⌈w/m⌉·(m+r−1)², transforms not counted; tiles that stick out count whole."""
    return _tiles(conv, tile) * conv.c_in * conv.c_out * (tile + conv.kernel - 1) ** 2


def transformed(conv: Convolution, tile: int = 4) -> tuple[int, int, int]:
    """Elements of the transformed input, output and weights."""
    points = (tile + conv.kernel - 1) ** 2
    tiles = _tiles(conv, tile)
    return tiles * points * conv.c_in, tiles * points * conv.c_out, points * conv.c_in * conv.c_out


def _tiles(conv: Convolution, tile: int) -> int:
    return conv.n * math.ceil(conv.height / tile) * math.ceil(conv.width / tile)


vars(multiplications)["paper"] = Reference(
    "A. Lavin, S. Gray",
    "Fast Algorithms for Convolutional Neural Networks",
    2016,
    "CVPR, arXiv:1509.09308",
    survey="IV",
)
