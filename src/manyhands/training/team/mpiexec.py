"""Workers under the mpi wheel's own ``mpiexec``: MPI moves the data, a private Unix socket the jobs."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

from manyhands.errors import BadInput, WorkerFailed
from manyhands.training.member import Setup
from manyhands.training.team.processes import START_S, ProcessTeam
from manyhands.training.team_folder import TeamFolder
from manyhands.training.wire import decode, encode


class MpiTeam(ProcessTeam):
    """Workers under ``mpiexec``; MPI moves the data, a private Unix socket the jobs."""

    def __init__(self, setups: Sequence[Setup], live: Any) -> None:
        super().__init__("mpi", len(setups))
        if live is not None:
            raise BadInput(
                "live objects cannot be handed to workers under mpiexec. Give model and data as text or as "
                "my_module:factory, or use another transport."
            )
        self._folder = TeamFolder()
        self._pids: dict[int, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        place = self._folder.path
        key = secrets.token_bytes(32)
        (place / "key").touch(mode=0o600)
        (place / "key").write_bytes(key)
        setup = setups[0]
        (place / "setup").write_bytes(encode({**setup.__dict__, "rank": 0, "rendezvous": str(place / "socket")}))
        try:
            with Listener(str(place / "socket"), "AF_UNIX", backlog=len(setups), authkey=key) as listener:
                self._process = subprocess.Popen(
                    [*mpiexec(len(setups)), sys.executable, "-m", "manyhands.training.member", str(place)],
                    stdin=subprocess.DEVNULL,
                    # All ranks are on this host: with these ways to move data (UCX's names) none of them listens. It
                    # warns of windows that workers which have failed cannot give back any more.
                    env={"UCX_LOG_LEVEL": "error", **os.environ, "UCX_TLS": "self,posix,sysv,cma"},
                    stdout=sys.stderr.fileno() if _has_fileno(sys.stderr) else None,
                    start_new_session=True,
                )
                self._accept(listener)
            self._collect("ready", None, START_S)
        except BaseException:
            self.abandon()
            raise

    def _accept(self, listener: Listener) -> None:
        by_rank: dict[int, Any] = {}
        listener._listener._socket.settimeout(1.0)  # type: ignore[attr-defined]
        end = time.monotonic() + START_S
        while len(by_rank) < self.size:
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > end:
                missing = sorted(set(range(self.size)) - set(by_rank))
                raise WorkerFailed(missing[0], None, f"mpiexec ended or stalled before ranks {missing} reported")
            try:
                connection = listener.accept()
            except TimeoutError:
                continue
            _, rank, pid = decode(connection.recv_bytes())
            by_rank[rank], self._pids[rank] = connection, pid
        self._connections = [by_rank[r] for r in range(self.size)]

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [self._pids[r] for r in sorted(self._pids)]

    def _alive(self, rank: int) -> str | None:
        pid = self._pids.get(rank)
        if pid is None:
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return "ended"
        return None

    def _end(self, patience_s: float) -> None:
        if self._process is not None:
            try:
                self._process.wait(patience_s)
            except subprocess.TimeoutExpired:
                for pid in self._pids.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGTERM)
                try:
                    self._process.wait(2.0)
                except subprocess.TimeoutExpired:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(self._process.pid, signal.SIGKILL)
                    self._process.wait()
        self._folder.close()


def _has_fileno(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True


def mpiexec(size: int) -> list[str]:
    """The command that starts ``size`` ranks here: the wheel's own ``mpiexec``, else the one on the path."""
    beside = Path(sys.executable).with_name("mpiexec")
    program = str(beside) if beside.exists() else shutil.which("mpiexec")
    if program is None:
        raise BadInput("transport mpi: there is no mpiexec. Install one with: pip install 'manyhands[mpi]'")
    return [program, "-n", str(size)]
