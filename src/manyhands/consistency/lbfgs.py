"""L-BFGS: a quasi-Newton direction from the last m displacements and what the gradient changed by along them.

    d = H g,   H ← (I − ρ s yᵀ) H (I − ρ y sᵀ) + ρ s sᵀ   for each pair, the oldest first,   ρ = 1 / yᵀs
    from H = γ I,   γ = sᵀy / yᵀy of the newest pair (1 where there is none)

s a displacement θ_{t+1} − θ_t, y = ∇f(θ_{t+1}) − ∇f(θ_t), g the gradient (Nocedal 1980; Nocedal & Wright 2006,
Numerical Optimization, algorithm 7.4 and equation 7.20). `two_loop` is that algorithm as it is printed. `combination`
is the same in terms of dot products alone (Chen, Wang & Zhou 2014, Large-scale L-BFGS using MapReduce, NeurIPS): d is a
combination of the pairs and g, so whoever holds a slice of all of them makes that slice of d, and only the products are
exchanged.

A step is θ ← θ − η d. H is positive definite, and d points uphill, as long as yᵀs > 0 for every pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: A pair counts if the cosine of s and y is above this: below it rounding decides about its sign, and 1 / yᵀs is vast.
LEAST_COSINE = 1e-8


def is_curved(sy: float, ss: float, yy: float) -> bool:
    """Whether a pair with these products (sᵀy, sᵀs, yᵀy) may be kept: the function curves upwards along s."""
    return sy > LEAST_COSINE * math.sqrt(ss * yy)


def two_loop(grad: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """``H · grad`` for pairs (s, y), oldest first; vectors of one dim. The reference for `combination`."""
    q, alphas = grad.clone(), []
    for s, y in reversed(pairs):
        alphas.append(s.dot(q) / y.dot(s))
        q -= alphas[-1] * y
    if pairs:
        s, y = pairs[-1]
        q *= s.dot(y) / y.dot(y)
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        q += (alpha - y.dot(q) / y.dot(s)) * s
    return q


def combination(products: Tensor) -> Tensor:
    """The coefficients c with ``H g = Σ_i c_i b_i``, for the vectors b = (s_1, …, s_k, y_1, …, y_k, g), oldest first.

    ``products``: b_iᵀb_j, of shape (2k + 1, 2k + 1), float64.
    """
    k = products.shape[0] // 2
    c = products.new_zeros(2 * k + 1)
    c[2 * k] = 1.0
    alphas = [products.new_zeros(())] * k
    for i in reversed(range(k)):
        alphas[i] = products[i].dot(c) / products[i, k + i]
        c[k + i] -= alphas[i]
    if k:
        c *= products[k - 1, 2 * k - 1] / products[2 * k - 1, 2 * k - 1]
    for i in range(k):
        c[i] += alphas[i] - products[k + i].dot(c) / products[i, k + i]
    return c


class History:
    """The last ``most`` pairs, as far as one worker holds them: its slice of every vector, and all products.

    Vectors are the rows of a matrix for each of ``widths`` (dtype and device as in ``like``): S, Y, then the newest
    displacement, what the gradient changed by along it, and the gradient. Memory: 2 · most + 3 slices.
    """

    def __init__(self, most: int, widths: Sequence[int], like: Sequence[Tensor]) -> None:
        self._most = most
        self.rows = [x.new_zeros(2 * most + 3, width) for x, width in zip(like, widths, strict=True)]
        self.products = torch.zeros(2 * most, 2 * most, dtype=torch.float64)  # of the pairs, over all slices
        self.kept = 0  # pairs, since the beginning

    @property
    def displacements(self) -> list[Tensor]:
        """The rows for θ_{t+1} − θ_t, to be written after each step."""
        return [rows[2 * self._most] for rows in self.rows]

    def look(self, gradients: Sequence[Tensor]) -> Tensor:
        """Take in slices of a new gradient; this slice's part in the products of the three newest vectors with all.

        Shape (3, 2 · most + 3), float64: the parts of all slices are to be added.
        """
        part = torch.zeros(3, 2 * self._most + 3, dtype=torch.float64)
        for rows, gradient in zip(self.rows, gradients, strict=True):
            torch.sub(gradient, rows[-1], out=rows[-2])
            rows[-1].copy_(gradient)
            part += (rows[-3:] @ rows.T).to(part)
        return part

    def direction(self, newest: Tensor) -> list[Tensor]:
        """Slices of H g, from the sums of what `look` gave; keeps the newest pair if it `is_curved`."""
        m = self._most
        if is_curved(float(newest[0, -2]), float(newest[0, -3]), float(newest[1, -2])):
            at = self.kept % m
            self.kept += 1
            newest[:, at], newest[:, m + at] = newest[:, 2 * m].clone(), newest[:, 2 * m + 1].clone()
            for row, products in ((at, newest[0, : 2 * m]), (m + at, newest[1, : 2 * m])):
                self.products[row] = self.products[:, row] = products
            for rows in self.rows:
                rows[at], rows[m + at] = rows[-3], rows[-2]
        order = [i % m for i in range(max(0, self.kept - m), self.kept)]
        chosen = [*order, *(m + i for i in order)]
        products = torch.empty(len(chosen) + 1, len(chosen) + 1, dtype=torch.float64)
        products[:-1, :-1] = self.products[chosen][:, chosen]
        products[-1, :-1] = products[:-1, -1] = newest[2, chosen]
        products[-1, -1] = newest[2, -1]
        c = torch.zeros(2 * m + 3, dtype=torch.float64)
        c[[*chosen, -1]] = combination(products)
        return [rows.T @ c.to(rows) for rows in self.rows]

    def clear(self) -> None:
        """As at the beginning."""
        self.kept = 0
        for x in (*self.rows, self.products):
            x.zero_()
