"""Workers on this machine: start them, give them jobs, notice when one fails, leave nothing behind.

`team(transport, size)` is a context manager. A team stands until it is closed and runs one job after another; the
first worker that fails ends the job for all, and what the user sees is that worker's own traceback, once.

    single      the caller's own process
    threads     threads of the caller's process
    simulated   threads that take turns on a virtual clock
    shared      processes from multiprocessing's forkserver; an anonymous memory file, no port at all
    gloo, nccl  the same processes; they meet through a file in a private folder
    mpi         processes under the mpi wheel's own ``mpiexec``; they report over a private Unix socket
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, Listener, wait
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from manyhands import errors
from manyhands.catalogue import import_object
from manyhands.communication import futex, transports
from manyhands.communication.communicator import Communicator
from manyhands.errors import BadInput, UnknownName, WorkerFailed
from manyhands.training.allocator import Allocator, tune
from manyhands.training.member import Member, Setup, serve
from manyhands.training.wire import decode, encode

#: How long after the first failure the others may still say what they saw: the first report is not always the cause.
GRACE_S = 2.0
#: A worker imports torch and joins within this time, or something is wrong.
START_S = 120.0
#: A worker that has been asked to end does so within this time, or is made to.
END_S = 3.0

Report = Callable[[int, Any], None]


class Team(ABC):
    """``size`` workers that do jobs together."""

    def __init__(self, transport: str, size: int) -> None:
        self.transport, self.size = transport, size

    @abstractmethod
    def run(
        self, job: str, *arguments: Any, report: Report | None = None, deadline_s: float | None = None
    ) -> list[Any]:
        """Call ``module:function`` as ``function(member, *arguments)`` on every worker; results in rank order.

        ``report(rank, value)`` gets what workers report on the way. Raises `WorkerFailed` (or the worker's own
        `ManyhandsError`) when one fails; the team is closed then.
        """

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, empty where they are threads."""
        return []

    def close(self) -> None:
        """End the workers. Safe to call twice."""
        return

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def team(
    transport: str,
    size: int,
    *,
    threads: int = 0,
    timeout_s: float = 60.0,
    allocator: Allocator = "tuned",
    pin: bool = False,
    live: Any = None,
) -> Team:
    """A standing team; ``threads`` per worker (0 = cores / workers), ``live`` objects are given to process workers."""
    if transport not in transports:
        raise UnknownName("transport", transport, transports)
    threads = threads or max(1, futex.cores() // size)
    if transport == "single":
        if size != 1:
            raise BadInput(f"transport single with {size} workers: it has one worker. Try shared, gloo or threads.")
        return SingleTeam(allocator, threads, live)
    if transport in ("threads", "simulated"):
        return ThreadTeam(transport, size, threads, timeout_s, live)
    setups = [
        Setup(
            transport,
            r,
            size,
            threads,
            timeout_s,
            allocator,
            _cores(r, size, threads) if pin else (),
            folder=os.getcwd(),
        )
        for r in range(size)
    ]
    return MpiTeam(setups, live) if transport == "mpi" else ForkserverTeam(setups, live)


def _cores(rank: int, size: int, threads: int) -> tuple[int, ...]:
    """The cores of worker ``rank``; none (anywhere) when there are not enough for everybody."""
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if size * threads > len(available):
        return ()
    return tuple(available[rank * threads : (rank + 1) * threads])


class SingleTeam(Team):
    """One worker: this very process."""

    def __init__(self, allocator: Allocator, threads: int, live: Any) -> None:
        super().__init__("single", 1)
        self._allocator, self._threads, self._live = allocator, threads, live

    def run(
        self, job: str, *arguments: Any, report: Report | None = None, deadline_s: float | None = None
    ) -> list[Any]:
        """Call the job here; its exceptions pass through as they are."""
        import torch

        from manyhands.communication.transports.single import SingleCommunicator

        allocator = "tuned" if self._allocator == "tuned" and tune() else "plain"
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            send = (lambda value: report(0, value)) if report else (lambda _: None)
            return [
                import_object(job, kind="job")(Member(SingleCommunicator(), self._live, send, allocator), *arguments)
            ]
        finally:
            torch.set_num_threads(before)


class ThreadTeam(Team):
    """Workers as threads of this process, free running or taking turns on a virtual clock."""

    def __init__(self, transport: str, size: int, threads: int, timeout_s: float, live: Any) -> None:
        super().__init__(transport, size)
        self._threads, self._timeout_s, self._live = threads, timeout_s, live

    def run(
        self, job: str, *arguments: Any, report: Report | None = None, deadline_s: float | None = None
    ) -> list[Any]:
        """Run the job on fresh threads; they are joined before this returns or raises."""
        function = import_object(job, kind="job")

        def work(comm: Communicator) -> Any:
            send = (lambda value: report(comm.rank, value)) if report else (lambda _: None)
            return function(Member(comm, self._live, send), *arguments)

        import torch

        from manyhands.communication.transports.simulated import SimulatedWorld
        from manyhands.communication.transports.threads import ThreadsWorld

        simulated = self.transport == "simulated"
        world = SimulatedWorld(self.size) if simulated else ThreadsWorld(self.size, timeout_s=self._timeout_s)
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            return world.run(work)
        except WorkerFailed as e:
            if isinstance(e.__cause__, errors.ManyhandsError):
                raise e.__cause__ from None
            raise
        finally:
            torch.set_num_threads(before)


class ProcessTeam(Team):
    """What teams of processes share: one connection a worker, jobs, failures, an end."""

    def __init__(self, transport: str, size: int) -> None:
        super().__init__(transport, size)
        self._connections: list[Connection] = []
        self._closed = False

    def _fail(self, rank: int) -> None:
        """Tell the other workers that ``rank`` is gone, where there is a way to."""

    @abstractmethod
    def _alive(self, rank: int) -> str | None:
        """None while the worker runs, else how it ended."""

    def _step_of(self, rank: int) -> int | None:
        return None

    def _end(self, patience_s: float) -> None:
        """Wait so long for the workers to end, then make sure that none runs any more."""

    def run(
        self, job: str, *arguments: Any, report: Report | None = None, deadline_s: float | None = None
    ) -> list[Any]:
        """Send the job to all workers and collect what they answer."""
        if self._closed:
            raise BadInput("this team is closed; make a new one.")
        message = encode(["job", job, list(arguments)])
        try:
            for connection in self._connections:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.send_bytes(message)
            return self._collect("result", report, deadline_s)
        except BaseException:
            self.abandon()
            raise

    def _collect(self, wanted: str, report: Report | None, deadline_s: float | None) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[dict[str, Any]] = []
        ended: set[int] = set()
        end = time.monotonic() + deadline_s if deadline_s is not None else None
        while len(results) + len(ended) < self.size:
            open_ = {c: r for r, c in enumerate(self._connections) if r not in results and r not in ended}
            ready = wait(list(open_), timeout=0.2)
            for connection in ready:
                rank = open_[connection]  # type: ignore[index]
                try:
                    kind, *rest = decode(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    failures.append(self._death(rank))
                    ended.add(rank)
                    self._fail(rank)
                    continue
                if kind == wanted:
                    results[rank] = rest[0] if rest else None
                elif kind == "failed":
                    failures.append(rest[0])
                    ended.add(rank)
                    self._fail(rank)
                elif kind == "report" and report is not None:
                    report(rank, rest[0])
            for rank in range(self.size):
                if rank not in results and rank not in ended and self._connections[rank] not in ready:
                    how = self._alive(rank)
                    if how is not None and not self._connections[rank].poll(0):
                        failures.append(self._death(rank))
                        ended.add(rank)
                        self._fail(rank)
            now = time.monotonic()
            if failures:
                end = now + GRACE_S if end is None else min(end, now + GRACE_S)
            if end is not None and now > end:
                break
        if failures:
            raise_cause(failures)
        if len(results) < self.size:
            late = [r for r in range(self.size) if r not in results]
            raise errors.DeadlineExceeded(
                late[0], "its own job to end", self._step_of(late[0]), deadline_s or 0.0, "run"
            )
        return [results[r] for r in range(self.size)]

    def _death(self, rank: int) -> dict[str, Any]:
        how = None
        for _ in range(50):
            if (how := self._alive(rank)) is not None:
                break
            time.sleep(0.01)
        return {
            "rank": rank,
            "step": self._step_of(rank),
            "peer_lost": False,
            "reason": f"its process {how or 'closed its connection'}",
            "kind": "Killed",
            "details": {},
            "traceback": "",
        }

    def close(self) -> None:
        """Ask the workers to end, then see to it."""
        if not self._closed:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.send_bytes(encode(["end"]))
            self._leave(END_S)

    def abandon(self) -> None:
        """End the workers at once, whatever they are doing."""
        if not self._closed:
            self._leave(0.0)

    def _leave(self, patience_s: float) -> None:
        self._closed = True
        self._end(patience_s)
        for connection in self._connections:
            connection.close()


def ended(exitcode: int) -> str:
    """An exit status in words."""
    if exitcode < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-exitcode).name}"
    return f"exited with status {exitcode}"


class _Handed:
    """A descriptor that goes along with a starting process.

    `DupFd` must be called while the process is being pickled: outside of that multiprocessing serves the descriptor
    from a thread and a socket of this process.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _as_it_is, (DupFd(self._fd),)


def _as_it_is(handle: Any) -> Any:
    return handle


class ForkserverTeam(ProcessTeam):
    """Workers forked from a server that has imported torch already: 0.06 s each once it is warm."""

    def __init__(self, setups: Sequence[Setup], live: Any) -> None:
        super().__init__(setups[0].transport, len(setups))
        self._segment: Any = None
        self._folder: str | None = None
        self._processes: list[Any] = []
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["torch", "torch._dynamo", "manyhands.training.loop", "manyhands.training.member"]
        )
        try:
            setups = self._rendezvous(setups)
            for setup in setups:
                ours, theirs = context.Pipe()
                self._connections.append(ours)
                start = functools.partial(self._start, context, setup, theirs)
                try:
                    with _main_module_hidden():
                        process = start(live)
                except Exception:
                    # Something of __main__ is among the live objects, so the worker must run the main script, too.
                    process = self._start_with_main(start, live)
                finally:
                    theirs.close()
                self._processes.append(process)
            self._collect("ready", None, START_S)
        except BaseException:
            self.abandon()
            raise

    def _rendezvous(self, setups: Sequence[Setup]) -> list[Setup]:
        if self.transport == "shared":
            from manyhands.communication.segment import Segment
            from manyhands.communication.transports.shared import SharedCommunicator

            self._segment = Segment.create()
            offset = self._segment.reserve(SharedCommunicator.control_B(self.size))
            self._control = offset
            return [dataclasses.replace(s, control_offset=offset) for s in setups]
        self._folder = tempfile.mkdtemp(prefix="manyhands-")
        return [dataclasses.replace(s, rendezvous=str(Path(self._folder) / "rendezvous")) for s in setups]

    def _start(self, context: Any, setup: Setup, theirs: Any, live: Any) -> Any:
        memory = _Handed(self._segment.fd) if self._segment is not None else None
        process = context.Process(
            target=_forked, args=(setup, theirs, memory, live), name=f"manyhands-worker-{setup.rank}", daemon=True
        )
        # The first start starts the fork server, and Ctrl-C goes to the whole terminal group: it is for this process.
        # (Starting the resource tracker unblocks the signal again, so that comes first.)
        resource_tracker.ensure_running()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return process

    def _start_with_main(self, start: Callable[[Any], Any], live: Any) -> Any:
        try:
            return start(live)
        except Exception as e:
            raise BadInput(
                f"the task or plan cannot be handed to another process ({type(e).__name__}: {e}). The rule: what "
                "workers get is importable. Put the model and data factories into a module and name them as "
                "my_module:factory, or use transport='threads'."
            ) from None

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [p.pid for p in self._processes]

    def _alive(self, rank: int) -> str | None:
        if rank >= len(self._processes):
            return None
        code = self._processes[rank].exitcode
        return None if code is None else ended(code)

    def _fail(self, rank: int) -> None:
        if self._segment is not None:
            self._segment.report_failure(rank)

    def _step_of(self, rank: int) -> int | None:
        if self._segment is None:
            return None
        from manyhands.communication.transports.shared import SharedCommunicator

        return SharedCommunicator.step_of(self._segment, self._control, rank, self.size)

    def _end(self, patience_s: float) -> None:
        end = time.monotonic() + patience_s
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        for process in self._processes:
            if process.exitcode is None:
                process.kill()
        for process in self._processes:
            process.join()
            process.close()
        self._processes = []
        if self._segment is not None:
            self._segment.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _forked(setup: Setup, connection: Connection, memory: Any, live: Any) -> None:
    serve(setup, connection, memory.detach() if memory is not None else -1, live)


@contextlib.contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Start a child without running the user's script in it (multiprocessing would, for the sake of ``__main__``).

    So a script needs no ``if __name__ == "__main__"`` as long as nothing it hands over is defined in it.
    """
    main = sys.modules["__main__"]
    blank = type(sys)("__main__")
    sys.modules["__main__"] = blank
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class MpiTeam(ProcessTeam):
    """Workers under ``mpiexec``; MPI moves the data, a private Unix socket the jobs."""

    def __init__(self, setups: Sequence[Setup], live: Any) -> None:
        super().__init__("mpi", len(setups))
        if live is not None:
            raise BadInput(
                "live objects cannot be handed to workers under mpiexec. Give model and data as text or as "
                "my_module:factory, or use another transport."
            )
        self._folder = tempfile.mkdtemp(prefix="manyhands-")
        self._pids: dict[int, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        place = Path(self._folder)
        key = secrets.token_bytes(32)
        (place / "key").touch(mode=0o600)
        (place / "key").write_bytes(key)
        setup = setups[0]
        (place / "setup").write_bytes(encode({**setup.__dict__, "cores": [], "rank": 0}))
        try:
            with Listener(str(place / "socket"), "AF_UNIX", backlog=len(setups), authkey=key) as listener:
                self._process = subprocess.Popen(
                    [*mpiexec(len(setups)), sys.executable, "-m", "manyhands.training.member", str(place)],
                    stdin=subprocess.DEVNULL,
                    # All ranks are on this host: with these ways to move data (UCX's names) none of them listens.
                    env={**os.environ, "UCX_TLS": "self,posix,sysv,cma"},
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
        shutil.rmtree(self._folder, ignore_errors=True)


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


def raise_cause(failures: Sequence[dict[str, Any]]) -> None:
    """Raise what went wrong first: a rank's own error rather than its peers' complaints about it."""
    own = [f for f in failures if not f["peer_lost"]]
    cause = (own or list(failures))[0]
    step = cause["step"]
    if step is None:
        # A killed worker cannot say where it was; its peers can.
        step = next((f["step"] for f in failures if f["step"] is not None), None)
    kind = getattr(errors, cause["kind"], None)
    if isinstance(kind, type) and issubclass(kind, errors.ManyhandsError) and not cause["peer_lost"]:
        rebuilt = kind.__new__(kind)
        Exception.__init__(rebuilt, cause["reason"])
        rebuilt.__dict__.update(cause["details"])
        raise rebuilt
    raise WorkerFailed(cause["rank"], step, cause["reason"], cause["traceback"])
