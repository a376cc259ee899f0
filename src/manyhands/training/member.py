"""A worker process: join the group, do the jobs the launcher sends, report how they end, and never outlive it.

Started by `team` through multiprocessing's forkserver, or by ``mpiexec`` as ``python -m manyhands.training.member``.
A job is ``module:function`` plus arguments that can travel as text and tensors; the function is called as
``function(member, *arguments)``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

from manyhands.catalogue import import_object
from manyhands.communication.communicator import Communicator
from manyhands.errors import ManyhandsError, PeerLost
from manyhands.training.allocator import Allocator, tune
from manyhands.training.wire import decode, encode, family

#: Exit status of a worker whose launcher has gone.
ABANDONED = 71
#: Files of ours through which every call of a user's code goes.
_PASSING = (
    "training/member.py",
    "training/team/threads.py",
    "verbs/building.py",
    "verbs/deciding.py",
    "calling.py",
    "data/loading.py",
    "models/factory.py",
)


@dataclass
class Member:
    """What a job sees of its place in the team."""

    comm: Communicator
    live: Any = None  # objects handed over when the worker was started
    report: Callable[[Any], None] = field(default=lambda _: None)  # send a value to the launcher at any time
    allocator: str = "plain"  # what this process really runs with


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know before it can join; plain values only."""

    transport: str
    rank: int
    size: int
    threads: int
    timeout_s: float
    allocator: Allocator
    rendezvous: str = ""  # in the team's temporary folder: gloo's file, or the socket of those under mpiexec
    control_offset: int = 0  # in the memory file, for shared
    folder: str = "."
    environment: Mapping[str, str] | None = None  # the launcher's; None: this process has it already


def serve(setup: Setup, connection: Connection, memory_fd: int = -1, live: Any = None) -> None:
    """Be worker ``setup.rank`` until the launcher says so or is gone."""
    prepare_process(setup, connection)
    allocator = "tuned" if setup.allocator == "tuned" and tune() else "plain"
    comm: Communicator | None = None
    try:
        import torch

        torch.set_num_threads(setup.threads)
        comm = join(setup, memory_fd)
        member = Member(comm, live, lambda value: connection.send_bytes(encode(["report", value])), allocator)
        connection.send_bytes(encode(["ready"]))
    except BaseException as e:
        with contextlib.suppress(OSError):
            connection.send_bytes(encode(failure(setup.rank, None, e)))
        raise SystemExit(1) from None
    mark: int | None = None
    while True:
        try:
            job = decode(connection.recv_bytes())
        except EOFError:
            break
        if job[0] == "end":
            break
        _, path, arguments = job
        comm.step = None
        try:
            # Memory of the job before goes back now, when all are here, and not at its end, where the first to be
            # done would wait for the last.
            if mark is None:
                mark = comm.mark()
            else:
                comm.release(mark)
            connection.send_bytes(encode(["result", import_object(path, kind="job")(member, *arguments)]))
        except BaseException as e:
            comm.fail()
            with contextlib.suppress(OSError):  # a launcher that has gone needs no report
                connection.send_bytes(encode(failure(setup.rank, comm.step, e)))
            break
    comm.close()
    connection.close()


def prepare_process(setup: Setup, connection: Connection) -> None:
    """Folder, environment, signals, and a watch on the launcher."""
    faulthandler.enable()
    if setup.environment is not None:
        # A fork server keeps the environment of the day it was started; a factory of the user's reads today's.
        for name in os.environ.keys() - setup.environment.keys():
            del os.environ[name]
        os.environ.update(setup.environment)
    os.chdir(setup.folder)
    sys.path[:0] = [p for p in (setup.folder,) if p not in sys.path]
    # Ctrl-C reaches the whole terminal group; the launcher decides what happens, so that it happens once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(
        target=_watch, args=(connection.fileno(), setup.rendezvous), daemon=True, name="launcher-watch"
    ).start()


def _watch(fd: int, rendezvous: str) -> None:
    """Block until the other end of ``fd`` is closed, then end this process: nobody is left to work for.

    Nor to remove the team's folder, if the launcher was killed.
    """
    poll = select.poll()
    poll.register(fd, 0)
    while True:
        for _, event in poll.poll():
            if event & select.POLLNVAL:
                return
            if event & (select.POLLHUP | select.POLLERR):
                # A worker that was told to end closes by itself within a moment.
                time.sleep(1.0)
                if rendezvous:
                    shutil.rmtree(Path(rendezvous).parent, ignore_errors=True)
                os._exit(ABANDONED)


def join(setup: Setup, memory_fd: int) -> Communicator:
    """This rank's communicator on a transport between processes."""
    if setup.transport == "shared":
        from manyhands.communication.segment import Segment
        from manyhands.communication.transports.shared import SharedCommunicator

        segment = Segment(memory_fd)
        return SharedCommunicator(segment, setup.control_offset, setup.rank, setup.size, timeout_s=setup.timeout_s)
    if setup.transport == "mpi":
        from manyhands.communication.transports.mpi import MpiCommunicator

        return MpiCommunicator.join(timeout_s=setup.timeout_s)
    from manyhands.communication.transports import torch_distributed

    kind = torch_distributed.NcclCommunicator if setup.transport == "nccl" else torch_distributed.GlooCommunicator
    return kind.join_file(setup.rendezvous, setup.rank, setup.size, timeout_s=setup.timeout_s)


def failure(rank: int, step: int | None, error: BaseException) -> list[Any]:
    """An exception as a message: whether a peer caused it, what it says, and where it came from."""
    return [
        "failed",
        {
            "rank": rank,
            "step": step,
            "peer_lost": isinstance(error, PeerLost),
            "reason": f"{type(error).__name__}: {error}" if not isinstance(error, ManyhandsError) else str(error),
            "kind": family(error),
            "details": error.details() if isinstance(error, ManyhandsError) else {},
            "traceback": own_traceback(error),
        },
    ]


def own_traceback(error: BaseException) -> str:
    """The traceback of ``error`` without the frames of those who only pass the call on: they are ours."""
    passing = {str(Path(__file__).parent.parent / name) for name in _PASSING}
    frames = traceback.TracebackException.from_exception(error)
    frames.stack = traceback.StackSummary.from_list([f for f in frames.stack if f.filename not in passing])
    return "".join(frames.format())


def main(folder: str) -> None:
    """A worker started by ``mpiexec``: the folder holds the socket, its key and the setup."""
    from mpi4py import MPI

    place = Path(folder)
    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    connection = Client(str(place / "socket"), "AF_UNIX", authkey=(place / "key").read_bytes())
    connection.send_bytes(encode(["hello", rank, os.getpid()]))
    values = decode((place / "setup").read_bytes())
    setup = Setup(**{**values, "rank": rank, "size": size})
    serve(setup, connection)


if __name__ == "__main__":
    main(sys.argv[1])
