"""Matrices of parameters of which half is enough per commit."""

import itertools

import pytest


def halved(*axes):
    """All combinations, every second one slow. Each value of two axes stays, and of more axes each pair of values.

    (Where each axis has two values or more.) A value that is a tuple is several parameters.
    """
    cases = []
    for numbered in itertools.product(*map(enumerate, axes)):
        marks = [pytest.mark.slow] if sum(i for i, _ in numbered) % 2 else []
        values = (value if isinstance(value, tuple) else (value,) for _, value in numbered)
        cases.append(pytest.param(*itertools.chain.from_iterable(values), marks=marks))
    return cases
