"""Which tests go together to one of the processes that run them side by side, and which go first.

A file's tests stay together: they share their standing teams and what they have computed. The tests that name MPI form
one group more, for every process would otherwise start its own ranks, and each imports torch for four seconds. Groups
begin in the order of `LONGEST`, so that none of these is left for the end, when the other processes have nothing to do.
"""

import collections
import re

import pytest
from xdist.scheduler import LoadFileScheduling

MPI = "what runs over MPI"
#: Without the word in their names, these ask for the same standing ranks.
OVER_MPI = (
    *("tests/communication/test_mpi.py", "tests/communication/test_windows.py"),
    "tests/consistency/test_window_store.py",
)
#: Those that take seconds beyond what their number of tests tells, the longest first; the rest follows by that number.
LONGEST = (
    *("tests/consistency/test_contract.py", MPI, "tests/consistency/test_averaging.py"),
    *("tests/communication/test_contract.py", "tests/training/test_killed_workers.py", "tests/training/test_resume.py"),
    *("tests/consistency/test_robust.py", "tests/consistency/test_remote_store.py", "tests/training/test_accidents.py"),
    *("tests/studies/test_report_browser.py", "tests/partition/test_ampnet_runtime.py"),
    *("tests/partition/test_hybrid.py", "tests/training/test_cut_models.py", "tests/cli/test_from_outside.py"),
    *("tests/cli/test_commands.py", "tests/consistency/test_rounds.py", "tests/training/test_train.py"),
)


def group(nodeid: str) -> str:
    """The file of a test, or `MPI`."""
    file, _, name = nodeid.partition("::")
    return MPI if file in OVER_MPI or re.search(r"[\[-]mpi[\]-]", name) else file


def put_in_order(items: list[pytest.Item]) -> None:
    """Sort tests group by group, those of `LONGEST` first."""
    many = collections.Counter(group(item.nodeid) for item in items)
    first = {name: place for place, name in enumerate(LONGEST)}

    def place(item: pytest.Item) -> tuple[int, int, str]:
        name = group(item.nodeid)
        return first.get(name, len(LONGEST)), -many[name], name

    items.sort(key=place)


class ByGroup(LoadFileScheduling):
    """xdist's ``--dist loadfile`` with these groups, in the order in which they stand."""

    def __init__(self, config: pytest.Config, log: object) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)
