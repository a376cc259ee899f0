"""Workers forked from a server that has imported torch already: 0.06 s each once it is warm."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from manyhands.communication.transports.launchers_word import LaunchersWord
from manyhands.errors import BadInput, WorkerFailed
from manyhands.training.member import Setup, serve
from manyhands.training.team.processes import START_S, ProcessTeam, ended
from manyhands.training.team_folder import TeamFolder

#: How starting a process says that an object cannot go along: not found under its name, local, or of a kind (a lock, a
#: file, a process group). The first is pickle's own, known by its name, as no source here imports that module.
_CANNOT_GO_ALONG = ("PicklingError", "AttributeError", "TypeError", "NotImplementedError", "RuntimeError")
_GUARD = (
    "The task names something that is defined in the main script, so each worker ran that script again, and it did not "
    'get through. Put what shall run once under `if __name__ == "__main__":`, or move the factories into a module '
    "and name them as my_module:factory, or use transport='threads'."
)


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
        self._folder: TeamFolder | None = None
        self._word: LaunchersWord | None = None
        self._processes: list[Any] = []
        self._with_main = False
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["manyhands.training.team.preloaded"])
        try:
            for setup in self._rendezvous([dataclasses.replace(s, environment=dict(os.environ)) for s in setups]):
                ours, theirs = context.Pipe()
                self._connections.append(ours)
                try:
                    self._processes.append(self._started(context, setup, theirs, live))
                finally:
                    theirs.close()
            try:
                self._collect("ready", None, START_S)
            except WorkerFailed as e:
                if self._with_main and not e.traceback:  # it died before it was ours
                    raise BadInput(f"{e}. {_GUARD}") from None
                raise
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
        self._folder = TeamFolder()
        rendezvous = str(self._folder.path / "rendezvous")
        if self.transport == "gloo":
            self._word = LaunchersWord(rendezvous)
        return [dataclasses.replace(s, rendezvous=rendezvous) for s in setups]

    def _started(self, context: Any, setup: Setup, theirs: Any, live: Any) -> Any:
        if not self._with_main:
            try:
                with _main_module_hidden():
                    return self._start(context, setup, theirs, live)
            except Exception as e:
                if type(e).__name__ not in _CANNOT_GO_ALONG:
                    raise
                # Something of __main__ is among the live objects, so the worker must run the main script, too.
                _check_main(e)
                self._with_main = True
        try:
            return self._start(context, setup, theirs, live)
        except Exception as e:
            if type(e).__name__ not in _CANNOT_GO_ALONG:
                raise
            raise _cannot_be_handed(e) from None

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

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [p.pid for p in self._processes]

    def _alive(self, rank: int) -> str | None:
        if rank >= len(self._processes):
            return None
        code = self._processes[rank].exitcode
        return None if code is None else ended(code)

    def _lose(self, rank: int) -> bool:
        if self._segment is not None:
            self._segment.report_gone(rank)
        elif self._word is not None:
            self._word.say("gone", rank)
        else:
            return False
        return True

    def _fail(self, rank: int) -> None:
        if self._segment is not None:
            self._segment.report_failure(rank)
        elif self._word is not None:
            self._word.say("failed", rank)

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
            self._folder.close()


def _check_main(error: Exception) -> None:
    """Refuse what a worker could not find: it would run the main program again, and here there is none to run."""
    main = sys.modules["__main__"]
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # This is a worker, at the top level of the user's script once more. The launcher says what is wrong.
        raise SystemExit(1)
    file = getattr(main, "__file__", None)
    if getattr(main, "__spec__", None) is None and (file is None or not Path(file).is_file()):
        raise _cannot_be_handed(error) from None


def _cannot_be_handed(error: Exception) -> BadInput:
    return BadInput(
        f"the task or plan cannot be handed to another process ({type(error).__name__}: {error}). The rule: what "
        "workers get is importable, which what is defined in a notebook, on standard input or inside a function is "
        "not. Put the model and data factories into a module and name them as my_module:factory, or use "
        "transport='threads'."
    )


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
