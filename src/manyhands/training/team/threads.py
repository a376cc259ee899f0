"""Workers inside this process: the process itself, or threads of it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from manyhands import errors
from manyhands.catalogue import import_object
from manyhands.communication.communicator import Communicator
from manyhands.errors import WorkerFailed
from manyhands.training.allocator import Allocator, tune
from manyhands.training.member import Member, own_traceback
from manyhands.training.team.base import Report, Team


class SingleTeam(Team):
    """One worker: this very process."""

    def __init__(self, allocator: Allocator, threads: int, live: Any) -> None:
        super().__init__("single", 1)
        self._allocator, self._threads, self._live = allocator, threads, live

    def run(
        self,
        job: str,
        *arguments: Any,
        report: Report | None = None,
        deadline_s: float | None = None,
        may_lose: Collection[int] = (),
    ) -> list[Any]:
        """Call the job here; an exception that is none of ours becomes a `WorkerFailed` with it as its cause.

        ``deadline_s`` is not kept: the job runs on the caller's thread, which nobody could end.
        """
        import torch

        from manyhands.communication.transports.single import SingleCommunicator

        allocator = "tuned" if self._allocator == "tuned" and tune() else "plain"
        comm = SingleCommunicator()
        send = (lambda value: report(0, value)) if report else (lambda _: None)
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with torch.random.fork_rng(devices=[]):
                return [import_object(job, kind="job")(Member(comm, self._live, send, allocator), *arguments)]
        except errors.ManyhandsError:
            raise
        except Exception as e:
            raise WorkerFailed(0, comm.step, f"{type(e).__name__}: {e}", own_traceback(e)) from e
        finally:
            torch.set_num_threads(before)


class ThreadTeam(Team):
    """Workers as threads of this process, free running or taking turns on a virtual clock."""

    def __init__(self, transport: str, size: int, threads: int, timeout_s: float, live: Any) -> None:
        super().__init__(transport, size)
        self._threads, self._timeout_s, self._live = threads, timeout_s, live

    def run(
        self,
        job: str,
        *arguments: Any,
        report: Report | None = None,
        deadline_s: float | None = None,
        may_lose: Collection[int] = (),
    ) -> list[Any]:
        """Run the job on fresh threads; they are joined before this returns or raises.

        ``deadline_s`` is not kept: a thread cannot be ended from outside. The waits inside have their own deadlines.
        """
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
            with torch.random.fork_rng(devices=[]):
                return world.run(work)
        except WorkerFailed as e:
            if isinstance(e.__cause__, errors.ManyhandsError):
                raise e.__cause__ from None
            raise
        finally:
            torch.set_num_threads(before)
