"""Tests that run side by side are shared out by groups."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import balance

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("nodeid", "group"),
    [
        ("tests/a.py::test_x[elastic(every=2)-mpi-3]", balance.MPI),
        ("tests/a.py::test_x[mpi]", balance.MPI),
        ("tests/communication/test_windows.py::test_x", balance.MPI),
        ("tests/a.py::test_mpi_is_said[gloo]", "tests/a.py"),
        ("tests/a.py::test_x[impi]", "tests/a.py"),
    ],
)
def test_a_test_goes_with_its_file_or_with_mpi(nodeid, group):
    assert balance.group(nodeid) == group


def test_groups_stand_together_the_long_ones_first_and_keep_their_order():
    said = ["b.py::1", "a.py::1[mpi]", "a.py::2", "c.py::1", f"{balance.LONGEST[-1]}::1", "c.py::2", "b.py::2[mpi]"]
    items = [SimpleNamespace(nodeid=nodeid) for nodeid in said]
    balance.put_in_order(items)
    found = [balance.group(item.nodeid) for item in items]
    assert [items[i].nodeid for i in range(2)] == ["a.py::1[mpi]", "b.py::2[mpi]"]
    assert found[2:] == [balance.LONGEST[-1], "c.py", "c.py", "a.py", "b.py"]


def test_every_file_that_is_named_is_there():
    assert all((ROOT / name).is_file() for name in (*balance.OVER_MPI, *balance.LONGEST) if name != balance.MPI)
