"""The guards themselves: a leak of each kind is found, and what is permitted is not."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch.distributed

from tests import guards
from tests.guards import Snapshot, leaks

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]


@pytest.fixture
def before():
    return Snapshot.take()


def test_a_clean_test_has_no_leaks(before):
    assert leaks(before, grace_s=0) == []


def test_a_child_process_is_found(before):
    child = subprocess.Popen(SLEEP)
    try:
        assert f"process {child.pid}: {' '.join(SLEEP)}" in leaks(before, grace_s=0)
    finally:
        child.kill()
        child.wait()
    assert leaks(before) == []


def test_an_orphan_is_found(before):
    """Its parent is dead and somebody else has adopted it, but it carries the session's mark."""
    forget = f"import subprocess as s; print(s.Popen({SLEEP}, stdout=s.DEVNULL, stderr=s.DEVNULL).pid)"
    orphan = int(subprocess.run([sys.executable, "-S", "-c", forget], capture_output=True, check=True).stdout)
    assert any(found.startswith(f"process {orphan}:") for found in leaks(before, grace_s=0))
    guards.clean_up(before)
    assert leaks(before) == []


def test_a_child_without_the_mark_is_found_by_descent(before):
    child = subprocess.Popen(SLEEP, env={})
    try:
        assert any(found.startswith(f"process {child.pid}:") for found in leaks(before, grace_s=0))
    finally:
        child.kill()
        child.wait()


def test_a_dead_child_that_nobody_waited_for_is_buried(before):
    child = os.posix_spawn(sys.executable, [sys.executable, "-S", "-c", ""], os.environ)
    deadline = time.monotonic() + 10
    while leaks(before, grace_s=0) and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(ChildProcessError):
        os.waitpid(child, 0)


def test_a_thread_is_found(before):
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="forgotten")
    thread.start()
    try:
        assert leaks(before, grace_s=0) == ["thread 'forgotten'"]
    finally:
        stop.set()
        thread.join()
    assert leaks(before, grace_s=0) == []


@pytest.mark.parametrize(("host", "named"), [("127.0.0.1", "loopback"), ("0.0.0.0", "00000000")])
def test_a_listening_socket_is_found_with_its_address(before, host, named):
    with socket.create_server((host, 0)) as server:
        port = server.getsockname()[1]
        assert leaks(before, grace_s=0) == [f"socket listening on {named} port {port} (tcp)"]
    assert leaks(before, grace_s=0) == []


def test_a_socket_that_does_not_listen_is_no_leak(before):
    with socket.socket():
        assert leaks(before, grace_s=0) == []


def test_an_entry_of_dev_shm_is_found(before):
    path = Path("/dev/shm") / f"manyhands-guard-{os.getpid()}"
    path.touch()
    try:
        assert leaks(before, grace_s=0) == [f"shared memory {path}"]
    finally:
        path.unlink()
    assert leaks(before, grace_s=0) == []


def test_a_teams_temporary_folder_is_found(before):
    folder = Path(tempfile.mkdtemp(prefix=f"manyhands-{os.getpid()}-"))
    try:
        assert leaks(before, grace_s=0) == [f"temporary folder {folder.name}"]
    finally:
        folder.rmdir()
    assert leaks(before, grace_s=0) == []


def test_the_folder_of_a_dead_launcher_is_found_and_that_of_a_stranger_is_not(before):
    dead = subprocess.Popen([sys.executable, "-S", "-c", ""])
    dead.wait()
    folders = [Path(tempfile.mkdtemp(prefix=f"manyhands-{pid}-")) for pid in (dead.pid, 1)]
    try:
        assert leaks(before, grace_s=0) == [f"temporary folder {folders[0].name}"]
    finally:
        for folder in folders:
            folder.rmdir()


def test_a_memfd_is_found(before):
    fd = os.memfd_create("forgotten")
    try:
        (found,) = leaks(before, grace_s=0)
        assert found.startswith("memory file /memfd:forgotten (inode ")
    finally:
        os.close(fd)
    assert leaks(before, grace_s=0) == []


def test_each_change_of_the_environment_is_found_and_undone(before, monkeypatch):
    monkeypatch.setenv("MANYHANDS_GUARDS_NEW", "1")
    monkeypatch.setenv("HOME", "elsewhere")
    monkeypatch.delenv("PATH")
    found = leaks(before, grace_s=0)
    assert [line.partition(":")[0].removeprefix("environment variable ") for line in found] == [
        "HOME",
        "MANYHANDS_GUARDS_NEW",
        "PATH",
    ]
    guards.clean_up(before)
    assert leaks(before, grace_s=0) == []


def test_a_process_group_is_found(before, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert leaks(before, grace_s=0) == ["an initialised torch.distributed process group"]


def test_what_ends_within_the_grace_is_no_leak(before):
    thread = threading.Thread(target=time.sleep, args=(0.1,))
    thread.start()
    assert leaks(before, grace_s=5) == []
    thread.join()


def test_what_is_standing_is_no_leak(before):
    stop = threading.Event()
    with guards.standing():
        thread = threading.Thread(target=stop.wait)
        thread.start()
        child = subprocess.Popen(SLEEP)
        fd = os.memfd_create("standing")
        server = socket.create_server(("127.0.0.1", 0))
        folder = Path(tempfile.mkdtemp(prefix=f"manyhands-{os.getpid()}-"))
    try:
        assert leaks(before, grace_s=0) == []
    finally:
        folder.rmdir()
        stop.set()
        thread.join()
        child.kill()
        child.wait()
        os.close(fd)
        server.close()


def test_a_permitted_process_is_no_leak(before):
    child = subprocess.Popen(SLEEP)
    try:
        guards.permit(child.pid)
        assert leaks(before, grace_s=0) == []
    finally:
        child.kill()
        child.wait()


def test_pytest_reports_the_test_that_leaks(pytester, monkeypatch):
    """The fixture end to end: the leaking test is in error, it is told what it left, the next one is clean."""
    pytester.makeconftest("from tests.conftest import leaves_nothing_behind")
    pytester.makepyfile(
        """
        import os, sys

        def test_leaks():
            os.posix_spawn(sys.executable, [sys.executable, "-S", "-c", "import time; time.sleep(60)"], os.environ)
            os.environ["MANYHANDS_GUARDS_LEFT"] = "1"

        def test_clean():
            assert "MANYHANDS_GUARDS_LEFT" not in os.environ
        """
    )
    monkeypatch.setattr(guards.leaks, "__kwdefaults__", {"grace_s": 0.1})
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*the test left behind:", "*process *time.sleep(60)", "*MANYHANDS_GUARDS_LEFT*"])
