"""Rules for every test: nothing is left behind, nothing is drawn by chance, GPU tests ask for a GPU."""

import os
import signal

import pytest
from hypothesis import settings

from tests import balance, guards

guards.mark_session()
os.environ["PYTHONFAULTHANDLER"] = "1"  # in the processes that tests start; pytest sees to its own

# A shell starts background jobs with Ctrl-C ignored, and what a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every run, and no limit on one example's time: the machine may be busy.
settings.register_profile("manyhands", derandomize=True, deadline=None)
settings.load_profile("manyhands")


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """Fail a test that leaks: see `tests.guards`. Being automatic it starts first and so ends last."""
    before = guards.Snapshot.take()
    yield
    found = guards.leaks(before)
    if found:
        guards.clean_up(before)
        pytest.fail("the test left behind:\n  " + "\n  ".join(found), pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def standing_teams():
    """The worker teams that `manyhands.testing` keeps are no test's leak; they end with the session."""
    from manyhands import testing

    make = testing.team

    def make_standing(*args, **kwargs):
        with guards.standing():
            return make(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testing, "team", make_standing)
        yield
    testing.close_standing()


@pytest.fixture(scope="session", autouse=True)
def workers_know_what_tests_import():
    """The server that workers are forked from imports pytest and Hypothesis once, or each worker takes 0.2 s for them.

    They import the test file that holds their function.
    """
    from multiprocessing import forkserver

    preload = forkserver.set_forkserver_preload
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forkserver, "set_forkserver_preload", lambda names: preload([*names, "pytest", "hypothesis"]))
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> balance.ByGroup | None:
    """Tests run side by side file by file, but for those over MPI: see `tests.balance`."""
    return balance.ByGroup(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; side by side, put the long files first."""
    if hasattr(config, "workerinput"):  # one of xdist's processes
        balance.put_in_order(items)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
