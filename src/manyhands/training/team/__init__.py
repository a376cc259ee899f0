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

import os
from typing import Any

from manyhands.communication import futex, transports
from manyhands.errors import BadInput, UnknownName
from manyhands.training.allocator import Allocator
from manyhands.training.member import Setup
from manyhands.training.team.base import Team
from manyhands.training.team.forkserver import ForkserverTeam
from manyhands.training.team.mpiexec import MpiTeam
from manyhands.training.team.threads import SingleTeam, ThreadTeam

__all__ = ["Team", "team"]


def team(
    transport: str,
    size: int,
    *,
    threads: int = 0,
    timeout_s: float = 60.0,
    allocator: Allocator = "tuned",
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
    folder = os.getcwd()
    setups = [Setup(transport, r, size, threads, timeout_s, allocator, folder=folder) for r in range(size)]
    return MpiTeam(setups, live) if transport == "mpi" else ForkserverTeam(setups, live)
