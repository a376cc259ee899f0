"""What a test may not leave behind, and how that is noticed.

`tests/conftest.py` takes a `Snapshot` before every test and asks `leaks` afterwards. Found are: processes (children,
their descendants and orphans of both), Python threads, listening TCP sockets, entries of /dev/shm, memfds, temporary
folders of worker teams, changed environment variables and an initialised process group of torch.distributed.

Worker pools that serve a whole session say so: what is started inside ``with standing():`` is no leak, and
``permit(pid)`` does the same for one process that is known only later.
"""

import contextlib
import gc
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker

#: Our processes carry this variable, so that an orphan is recognised too. Set once, before anything is started.
MARK = "MANYHANDS_TEST_SESSION"

#: Set by others while tests run: by pytest for every test, by torch when it first imports its compiler.
NOT_OURS = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}

#: How `manyhands.training.team` names the folder in which the workers of a team meet.
TEAM_FOLDER = re.compile(r"manyhands-(\d+)-")

_permitted_processes: set[int] = set()
_permitted: set[object] = set()


def mark_session() -> None:
    """Give this process and all that it will start a mark of their own."""
    os.environ[MARK] = f"{os.getpid()}-{time.monotonic_ns()}"


def permit(pid: int) -> None:
    """This process belongs to the session."""
    _permitted_processes.add(pid)


@contextlib.contextmanager
def standing() -> Iterator[None]:
    """What is started inside and still there at the end belongs to the session, not to the test that came first."""
    before = Snapshot.take()
    yield
    after = Snapshot.take()
    _permitted_processes.update(p for p in after.processes - before.processes if _is_ours(p))
    _permitted.update(after.threads - before.threads)
    _permitted.update(after.sockets - before.sockets)
    _permitted.update(after.memfds - before.memfds)
    _permitted.update(after.shm - before.shm)
    _permitted.update(after.folders - before.folders)


@dataclass(frozen=True)
class Snapshot:
    """What there is now. Takes a tenth of a millisecond where there are a hundred processes."""

    processes: frozenset[int]
    threads: frozenset[threading.Thread]
    sockets: frozenset[str]  # of this process, by inode
    memfds: frozenset[tuple[str, int]]  # of this process, by name and inode
    shm: frozenset[str]
    folders: frozenset[str]  # temporary ones of teams, whose names tell the launcher's process
    environment: dict[str, str]
    process_group: bool

    @classmethod
    def take(cls) -> "Snapshot":
        sockets, memfds = set(), set()
        for fd in _listdir("/proc/self/fd"):
            try:
                link = os.readlink(f"/proc/self/fd/{fd}")
                if link.startswith("socket:"):
                    sockets.add(link[len("socket:[") : -1])
                elif link.startswith("/memfd:"):
                    memfds.add((link.removesuffix(" (deleted)"), os.stat(f"/proc/self/fd/{fd}").st_ino))
            except OSError:  # closed since
                continue
        distributed = sys.modules.get("torch.distributed")
        return cls(
            processes=frozenset(int(name) for name in _listdir("/proc") if name.isdigit()),
            # A dummy is a thread that was started outside Python (autograd's) and merely passed through it.
            threads=frozenset(t for t in threading.enumerate() if not isinstance(t, threading._DummyThread)),
            sockets=frozenset(sockets),
            memfds=frozenset(memfds),
            shm=frozenset(_listdir("/dev/shm")),
            folders=frozenset(name for name in _listdir(tempfile.gettempdir()) if TEAM_FOLDER.match(name)),
            environment={k: v for k, v in os.environ.items() if k not in NOT_OURS},
            process_group=distributed is not None and distributed.is_available() and distributed.is_initialized(),
        )


def leaks(before: Snapshot, *, grace_s: float = 2.0) -> list[str]:
    """What is there now and was not before, in words. What is just ending gets ``grace_s`` to do so."""
    deadline = time.monotonic() + grace_s
    found = _leaks(before)
    if found and grace_s:
        gc.collect()  # what only a reference cycle keeps (an exception's frames) is not leaked
        while (found := _leaks(before)) and time.monotonic() < deadline:
            time.sleep(0.02)
    return found


def clean_up(before: Snapshot) -> None:
    """End the processes and restore the environment that a leaking test left, for the tests after it."""
    for pid in _new_processes(before, Snapshot.take()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for name in os.environ.keys() - before.environment.keys() - NOT_OURS:
        del os.environ[name]
    os.environ.update(before.environment)


def _leaks(before: Snapshot) -> list[str]:
    now = Snapshot.take()
    found = [f"process {pid}: {_command(pid)}" for pid in _new_processes(before, now)]
    found += [f"thread {t.name!r}" for t in sorted(now.threads - before.threads - _permitted, key=lambda t: t.name)]
    found += [f"socket listening on {address}" for address in _listening(now.sockets - before.sockets - _permitted)]
    found += [
        f"shared memory /dev/shm/{name}"
        for name in sorted(now.shm - before.shm - _permitted)
        if not _used_by_strangers(f"/dev/shm/{name}")
    ]
    found += [
        f"temporary folder {name}" for name in sorted(now.folders - before.folders - _permitted) if _may_be_ours(name)
    ]
    found += [f"memory file {name} (inode {inode})" for name, inode in sorted(now.memfds - before.memfds - _permitted)]
    for name in sorted(before.environment.keys() | now.environment.keys()):
        was, is_ = before.environment.get(name), now.environment.get(name)
        if was != is_:
            found.append(f"environment variable {name}: was {was!r}, is {is_!r}")
    if now.process_group and not before.process_group:
        found.append("an initialised torch.distributed process group")
    return found


def _new_processes(before: Snapshot, now: Snapshot) -> list[int]:
    """Live processes of ours that are new and not permitted; dead ones that nobody waited for are buried here."""
    multiprocessing.active_children()  # buries multiprocessing's own
    python = {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}  # started once, for good
    found = []
    for pid in sorted(now.processes - before.processes - _permitted_processes - python):
        if not _is_ours(pid):
            continue
        if _status(pid)[0] == "Z":
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            continue
        found.append(pid)
    return found


def _is_ours(pid: int) -> bool:
    """Whether it carries this session's mark, or descends from this process."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            if f"{MARK}={os.environ.get(MARK)}".encode() in file.read().split(b"\0"):
                return True
    except OSError:
        pass
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = _status(pid)[1]
    return False


def _status(pid: int) -> tuple[str, int]:
    """State letter and parent; ``("", 0)`` when it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
        return state, int(parent)
    except OSError:
        return "", 0


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace").strip() or "?"
    except OSError:
        return "?"


def _listening(inodes: frozenset[str] | set[str]) -> list[str]:
    """The addresses of those of our sockets that listen. The tables are read only when there is a new socket."""
    found = []
    for table in ("tcp", "tcp6") if inodes else ():
        with contextlib.suppress(OSError), open(f"/proc/self/net/{table}") as file:
            for line in file:
                _, local, _, state, *rest = line.split()
                if state == "0A" and rest[5] in inodes:
                    address, port = local.split(":")
                    loopback = address in ("0100007F", "0" * 24 + "01000000")
                    found.append(f"{'loopback' if loopback else address} port {int(port, 16)} ({table})")
    return found


def _used_by_strangers(path: str) -> bool:
    """Whether a process of another session has it mapped: then it is not ours."""
    for name in _listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{name}/maps") as file:
                if any(line.rstrip().endswith(path) for line in file) and not _is_ours(int(name)):
                    return True
    return False


def _may_be_ours(folder: str) -> bool:
    """Unless the launcher that has made it lives in another session; of a dead one nobody can tell."""
    match = TEAM_FOLDER.match(folder)
    assert match is not None
    pid = int(match[1])
    return _status(pid)[0] in ("", "Z") or _is_ours(pid)


def _listdir(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
