"""Gloo and NCCL: workers meet through torch.distributed's engines, on one host or many.

The engines' backends are used directly, each group with one of its own, and no default process group is made or
touched: the user's ``torch.distributed`` stays the user's, and a wait here costs no Python wrapper.

    all_reduce, broadcast, barrier            the engine's own, in the background
    reduce_scatter, all_gather, all_to_all    every rank sends every other its part: n·(P−1)/P bytes, no padding

The second line is direct exchange because gloo's own are slower: reduce_scatter of 28,938 and 1,000,000 floats, 2
ranks on 2 cores, torch 2.13, medians of 200 and 60, µs: exchange and sum in rank order 125 and 1142; all_to_all and
sum 138 and 1108; all_reduce 346 and 1690; reduce_scatter_tensor 295 and 2492. It also makes the sum `reduction`'s, in
rank order. Half precision is all-reduced by those two steps, summed in float32 and rounded once.

The weights of a mean ride behind the tensor, so that one collective does (`framing`).

Every rank starts and awaits operations of a group in the same order. A `Work` must be awaited; gloo forgets a message
whose `Work` is dropped.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from abc import abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, Literal, Self

import torch
import torch.distributed
from torch import Tensor

from manyhands.communication.communicator import Communicator, Received, Work, wrong_length
from manyhands.communication.reduction import coefficients, reduce_into, slices
from manyhands.communication.transports.engine import EngineCommunicator
from manyhands.communication.transports.framing import frame, unframe
from manyhands.communication.transports.launchers_word import LaunchersWord
from manyhands.errors import BadInput, CommunicationError, DeadlineExceeded, Deadlock, PeerLost

#: Tags from here on are ours, one after the other for successive exchanges; the user's lie below.
FIRST_OWN_TAG = 2**30

#: The last of those, which no exchange takes.
LAST_OWN_TAG = 2**31 - 1

#: Making the connections of a group on one host takes 10 ms for 2 ranks that have a core each. Every member connects to
#: every other, and where there are more members than cores they take turns, beside whatever else the host does: so much
#: for each, a hundred times what two need. Only who dies between coming and connecting costs the others all of it.
CONNECTED_S_PER_MEMBER = 1.5

#: Longer than any run: a deadline that is none, which gloo can still count in nanoseconds.
EVER = timedelta(days=10_000)

#: Untyped: its own type hints leave out the stores and the backends. ``import torch`` has imported it already.
dist: Any = torch.distributed

_HALF = (torch.float16, torch.bfloat16)


class TorchCommunicator(EngineCommunicator):
    """What gloo and NCCL share: all but how a backend is made and where tensors must lie."""

    overlaps: ClassVar[bool] = True

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        *,
        timeout_s: float = 60.0,
        one_host: bool = False,
        device: torch.device | None = None,
        within: tuple[TorchCommunicator, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(rank, size, timeout_s=timeout_s, within=within)
        self._store, self._one_host, self._device = store, one_host, device or torch.device("cpu")
        self._exchanges = self._splits = 0
        self._to_myself: dict[int, deque[Tensor]] = defaultdict(deque)
        # A backend left to the interpreter's end kills the process now and then ("terminate called without an active
        # exception", torch 2.13): it must go before.
        self._errors: list[str] = []
        self._backends = [self._meet()] if size > 1 else []
        self._hang_up = weakref.finalize(self, _hang_up, self._backends, self._errors)

    @classmethod
    def join_file(cls, path: str | os.PathLike[str], rank: int, size: int, *, timeout_s: float = 60.0) -> Self:
        """Meet through a file that does not exist yet, in a folder that all ranks (of one host) see: no store port."""
        folder = Path(path).absolute().parent
        # Without it the store tries for five minutes to open its file, holds the interpreter's lock all the while, and
        # its constructor takes no deadline (torch 2.13).
        if not folder.is_dir():
            raise BadInput(
                f"transport {cls.transport}: rank {rank} is to meet the others through the file {os.fspath(path)}, and "
                "there is no such folder. The file is made by the first to come, its folder is not: make it before."
            )
        device = cls._place(rank)
        store = dist.FileStore(os.fspath(path), size)
        store.set_timeout(timedelta(seconds=timeout_s))
        return cls(store, rank, size, timeout_s=timeout_s, one_host=True, device=device)

    @classmethod
    def join_launcher(cls, *, timeout_s: float = 60.0) -> Self:
        """Meet where torchrun (or whoever sets its variables) says, or through the store of an initialised group."""
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if dist.is_initialized():
            store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
        elif missing:
            raise BadInput(
                f"transport {cls.transport}: joining a launcher needs the variables that torchrun sets, and "
                f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set. "
                "Start it with: torchrun --nproc-per-node N SCRIPT."
            )
        else:
            try:
                store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
            except RuntimeError as e:
                rank = int(os.environ["RANK"])
                raise DeadlineExceeded(rank, "the launcher's store", None, timeout_s, "join") from e
        device = cls._place(int(os.environ.get("LOCAL_RANK", rank)))
        # A process may join again after it has closed: the ranks then meet under another name.
        round_ = store.add(f"manyhands/{cls.transport}/{rank}", 1)
        store = dist.PrefixStore(f"manyhands/{cls.transport}/{round_}", store)
        one_host = os.environ.get("LOCAL_WORLD_SIZE") == str(size)
        return cls(store, rank, size, timeout_s=timeout_s, one_host=one_host, device=device)

    @classmethod
    @abstractmethod
    def _place(cls, local_rank: int) -> torch.device:
        """Where the engine wants tensors; refuses if it is missing."""

    @abstractmethod
    def _connect(self) -> Any:
        """The engine's backend for this group."""

    def _meet(self) -> Any:
        t0 = time.perf_counter()
        try:
            self._store.set(f"here/{self.rank}", "")
            return self._connect()
        except RuntimeError as e:
            missing = [r for r in range(self.size) if not self._store.check([f"here/{r}"])]
            seconds = time.perf_counter() - t0
            raise (self._late("join", seconds, missing) if missing else self._translated(e, "join", seconds)) from e

    @property
    def _backend(self) -> Any:
        if not self._backends:
            raise CommunicationError(f"rank {self._names[self.rank]} has left this group: it was closed")
        return self._backends[0]

    # -- collectives -----------------------------------------------------------------------------------------------

    def _all_reduce(self, x: Tensor, weight: float | None) -> Work:
        here = x.to(self._device)
        if x.dtype in _HALF:
            works, reduce_slice = self._start_slices("all_reduce", here, weight)

            def second_half() -> None:
                reduce_slice()
                self._all_gather(here, slices(here.numel(), self.size)).wait()
                _bring_back(here, x)

            return _Pending(self, "all_reduce", works, second_half)
        if weight is None:
            with self._calling("all_reduce"):
                works = [self._backend.allreduce([here])] if x.numel() else []
            return _Pending(self, "all_reduce", works, lambda: _bring_back(here, x))
        framed = frame(here, weight, self.rank)
        with self._calling("all_reduce"):
            works = [self._backend.allreduce([framed])]

        def mean() -> None:
            only = unframe(framed, here)
            if only is not None:
                self._broadcast(here, only).wait()
            _bring_back(here, x)

        return _Pending(self, "all_reduce", works, mean)

    def _reduce_scatter(self, x: Tensor, weight: float | None) -> None:
        here = x.to(self._device)
        works, reduce_slice = self._start_slices("reduce_scatter", here, weight)
        _Pending(self, "reduce_scatter", works, reduce_slice).wait()
        lo, hi = slices(x.numel(), self.size)[self.rank]
        _bring_back(here[lo:hi], x[lo:hi])

    def _all_gather(self, x: Tensor, bounds: Sequence[tuple[int, int]]) -> Work:
        here = x.to(self._device)
        lo, hi = bounds[self.rank]
        works = self._exchange("all_gather", [here[lo:hi]] * self.size, [here[a:b] for a, b in bounds])
        return _Pending(self, "all_gather", works, lambda: _bring_back(here, x))

    def _all_to_all(self, x: Tensor) -> Tensor:
        here = x.to(self._device).view(self.size, -1) if x.numel() else x.view(self.size, 0)
        result = torch.empty_like(here)
        result[self.rank].copy_(here[self.rank])
        _Pending(self, "all_to_all", self._exchange("all_to_all", here.unbind(), result.unbind())).wait()
        return result.view(-1).to(x.device)

    def _broadcast(self, x: Tensor, root: int) -> Work:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        here = x.to(self._device)
        with self._calling("broadcast"):
            works = [self._backend.broadcast([here], options)] if x.numel() else []
        return _Pending(self, "broadcast", works, lambda: _bring_back(here, x))

    def _barrier(self) -> None:
        with self._calling("barrier"):
            works = [self._backend.barrier()]
        _Pending(self, "barrier", works).wait()

    def _start_slices(self, doing: str, x: Tensor, weight: float | None) -> tuple[list[Any], Callable[[], None]]:
        """Send every rank its slice of ``x``; what to do when they are there: ``x``'s own slice ← their sum or mean."""
        cuts = slices(x.numel(), self.size)
        mine = x[slice(*cuts[self.rank])]
        parts = [mine if p == self.rank else torch.empty_like(mine) for p in range(self.size)]
        works = self._exchange(doing, [x[lo:hi] for lo, hi in cuts], parts)
        if weight is None:
            return works, lambda: reduce_into(mine, parts)
        weights = torch.full((self.size,), weight, dtype=torch.float64, device=x.device)
        own = weights[:1].clone()
        works += self._exchange(doing, [own] * self.size, weights.view(-1, 1).unbind())
        return works, lambda: reduce_into(mine, parts, coefficients(weights.tolist()))

    def _exchange(self, doing: str, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> list[Any]:
        """Start sending ``outgoing[p]`` to, and receiving ``incoming[p]`` from, every other rank p."""
        self._exchanges += 1
        tag = FIRST_OWN_TAG + self._exchanges % (2**30 - 1)
        # Everybody begins with the rank after its own, so that not all talk to rank 0 first.
        others = [(self.rank + k) % self.size for k in range(1, self.size)]
        receive = [(incoming[p], p, tag) for p in others if incoming[p].numel()]
        with self._calling(doing):
            return self._start_messages([(outgoing[p], p, tag) for p in others if outgoing[p].numel()], receive)

    def _start_messages(
        self, send: Sequence[tuple[Tensor, int, int]], receive: Sequence[tuple[Tensor, int, int]]
    ) -> list[Any]:
        works = [self._backend.recv([x], frm, tag) for x, frm, tag in receive]
        return works + [self._backend.send([x], to, tag) for x, to, tag in send]

    # -- messages --------------------------------------------------------------------------------------------------

    def _send(self, x: Tensor, to: int, tag: int) -> Work:
        _check_tag(tag)
        if to == self.rank:  # the engines have no such connection
            self._to_myself[tag].append(x.clone())
            return _Pending(self, "send", [])
        with self._calling("send", to):
            works = [self._backend.send([x.to(self._device)], to, tag)]
        return _Pending(self, "send", works, peer=to)

    def _recv(self, like: Tensor, frm: int | None, tag: int) -> Received:
        _check_tag(tag)
        if frm == self.rank or (frm is None and (self.size == 1 or self._to_myself[tag])):
            if not self._to_myself[tag]:
                raise Deadlock(f"rank {self._names[self.rank]} waits for a message from itself that it never sent")
            message = self._to_myself[tag].popleft()
            if message.nbytes != like.nbytes:
                me = self._names[self.rank]
                raise wrong_length(me, me, tag, message.nbytes, like)
            like.copy_(message)
            return Received(self.rank, like)
        here = like.to(self._device)
        with self._calling("recv", frm):
            work = self._start_receive(here, frm, tag)
        _Pending(self, "recv", [work], lambda: _bring_back(here, like), peer=frm).wait()
        return Received(work._source_rank() if frm is None else frm, like)

    def _start_receive(self, here: Tensor, frm: int | None, tag: int) -> Any:
        return self._backend.recv_anysource([here], tag) if frm is None else self._backend.recv([here], frm, tag)

    # -- groups and ends -------------------------------------------------------------------------------------------

    def _split(self, color: int) -> TorchCommunicator:
        colors = torch.full((self.size,), color, dtype=torch.int64)
        if self.size > 1:
            self._all_gather(colors, [(r, r + 1) for r in range(self.size)]).wait()
        members = [r for r, c in enumerate(colors.tolist()) if c == color]
        self._splits += 1
        return self._group(dist.PrefixStore(f"{self._splits}/{color}", self._store), members)

    def _alone(self) -> TorchCommunicator:
        return self._group(self._store, [self.rank])  # it never asks the store

    def _group(self, store: Any, members: list[int], *, timeout_s: float | None = None) -> TorchCommunicator:
        return type(self)(
            store,
            members.index(self.rank),
            len(members),
            timeout_s=timeout_s or self.timeout_s,
            one_host=self._one_host,
            device=self._device,
            within=(self, members),
        )

    def fail(self) -> None:
        """Hang up, which the peers notice at once."""
        for group in self._made:
            group.fail()
        self._errors.append("fail")
        self.close()

    def close(self) -> None:
        """Hang up. A message or collective still under way is lost: barrier first."""
        super().close()
        self._hang_up()

    # -- waiting ---------------------------------------------------------------------------------------------------

    def _await(self, works: Sequence[Any], doing: str, peer: int | None) -> None:
        deadline = time.perf_counter() + self.timeout_s
        with self._calling(doing, peer):
            for work in works:
                left_s = deadline - time.perf_counter()
                work.wait(timedelta(seconds=max(left_s, 0.001)))  # 0 would mean for ever

    @contextmanager
    def _calling(self, doing: str, peer: int | None = None) -> Iterator[None]:
        """Account the time inside, and turn the engine's exceptions into ours."""
        t0 = time.perf_counter()
        try:
            with self._spending(doing):
                yield
        except RuntimeError as e:
            self._errors.append(doing)
            self.usable = False
            raise self._translated(e, doing, time.perf_counter() - t0, peer) from e

    def _translated(self, e: RuntimeError, doing: str, seconds: float, peer: int | None = None) -> CommunicationError:
        """The engine's phrase as an error of ours (the phrases: gloo/transport/tcp, c10d/ProcessGroup*.cpp)."""
        text = str(e).lower()
        me = f"rank {self._names[self.rank]}"
        if "pair closure" in text and len(self._errors) > 1:
            return CommunicationError(f"{me} cannot {doing}: this group ended when its {self._errors[0]} failed")
        if any(phrase in text for phrase in ("timed out", "timeout")):
            return self._late(doing, seconds, None if peer is None else [peer])
        if any(phrase in text for phrase in ("peer", "broken pipe", "connection", "socket", "aborted")):
            return self._lost(doing, peer)
        return CommunicationError(f"{me} failed in {doing}: {str(e).splitlines()[0]}")


class GlooCommunicator(TorchCommunicator):
    """CPU tensors over TCP; GPU tensors pass through the host. On one host it listens on loopback only.

    A message shorter than the tensor it is received into fills its beginning and nothing tells, a longer one ends the
    receiving process (gloo's own check, torch 2.13): a length sent ahead would double every message's latency.
    A dead peer is noticed in about 15 ms by whoever waits for it; a message awaited from anyone knows no peer, so
    that wait ends at its deadline. It breaks its own connections and every collective of its groups; messages between
    the others go on, and so do these in a group `without` it, if a launcher that started them here says so.
    """

    transport: ClassVar[str] = "gloo"
    _word: LaunchersWord | None = None  # the world's

    @classmethod
    def join_file(cls, path: str | os.PathLike[str], rank: int, size: int, *, timeout_s: float = 60.0) -> Self:
        """See `TorchCommunicator.join_file`; in the file's folder a launcher may say who has died."""
        comm = super().join_file(path, rank, size, timeout_s=timeout_s)
        comm._word = LaunchersWord(path)
        return comm

    @classmethod
    def _place(cls, local_rank: int) -> torch.device:
        return torch.device("cpu")

    _hearing: _Hearing | None = None

    def _listen(self, like: Tensor, frm: Collection[int], tag: int) -> Received:
        hearing = self._hearing = self._hearing or _Hearing()
        for peer in set(frm) - hearing.busy:
            there = torch.empty_like(like)
            with self._calling("listen", peer):
                hearing.wait_for(peer, self._backend.recv([there], peer, tag), there)
        with self._spending("recv"):
            peer, there, error = hearing.next()
        if error is not None:
            self._errors.append("listen")
            raise self._lost("listen", peer) from error
        like.copy_(there)
        return Received(peer, like)

    def close(self) -> None:
        """Hang up. A message or collective still under way is lost: barrier first."""
        if self._hearing is not None:
            if self._hearing.busy:
                # Only a wait that times out makes gloo end the others. A thread that waits in it yet when the
                # interpreter ends kills the process ("terminate called without an active exception", torch 2.13).
                peer = min(self._hearing.busy)
                with suppress(RuntimeError):
                    self._backend.recv([torch.empty(1)], peer, FIRST_OWN_TAG).wait(timedelta(milliseconds=1))
            self._hearing.end()
            self._hearing = None
        super().close()

    # -- going on without the lost ---------------------------------------------------------------------------------

    @property
    def _said(self) -> LaunchersWord | None:
        return self._world._word if isinstance(self._world, GlooCommunicator) else None

    def lost(self) -> list[int]:
        """Those that the launcher has named."""
        word = self._said
        return [] if word is None else [p for p in range(self.size) if word.gone(self._names[p])]

    def goes_on_without(self, rank: int) -> bool:
        """See `Communicator.goes_on_without`."""
        if self._said is None or not self._said.awaited(self._names[rank]):
            return False
        self._errors.clear()  # nothing is wrong with this group
        return True

    def agree_on_lost(self) -> list[int]:
        """All come to rank 0, which tells those who came who did not."""
        if self.size == 1 or self._said is None:
            return []
        missing = torch.zeros(self.size, dtype=torch.int64)
        if self.rank != 0:
            self._message("send", missing, 0, whom=0)
            self._message("recv", missing, 0, whom=None)  # rank 0 itself may wait for another
            return [p for p, is_missing in enumerate(missing.tolist()) if is_missing]
        for p in range(1, self.size):
            try:
                self._message("recv", torch.zeros_like(missing), p, whom=p)
            except PeerLost:
                if not self.goes_on_without(p):
                    raise
        lost = self.lost()
        missing.copy_(torch.tensor([p in lost for p in range(self.size)]))
        for p in range(1, self.size):
            if p not in lost:
                self._message("send", missing, p, whom=p)
        return lost

    def _message(self, doing: Literal["send", "recv"], x: Tensor, peer: int, *, whom: int | None) -> None:
        with self._calling("agree_on_lost", whom):
            work = getattr(self._backend, doing)([x], peer, LAST_OWN_TAG)
        _Pending(self, "agree_on_lost", [work], peer=whom).wait()

    def without(self, lost: Sequence[int]) -> Communicator:
        """A group with connections of its own.

        A member that dies before it is connected ends this in `PeerLost`, or after `CONNECTED_S_PER_MEMBER` times the
        number of members.
        """
        members = [p for p in range(self.size) if p not in lost]
        store = dist.PrefixStore("without", self._store)
        self._gather(store, members)
        group = self._group(store, members, timeout_s=min(self.timeout_s, CONNECTED_S_PER_MEMBER * len(members)))
        for backend in group._backends:
            backend._set_default_timeout(timedelta(seconds=self.timeout_s))
        group.timeout_s, group.context, group.servers = self.timeout_s, self.context, self.servers
        self._made.append(group)
        return group

    def _gather(self, store: Any, members: Sequence[int]) -> None:
        """Until all members are here: who waits for a connection is not told that its peer has died."""
        t0 = time.perf_counter()
        store.set(f"came/{self.rank}", "")
        missing = list(members)
        while missing := [p for p in missing if not store.check([f"came/{p}"])]:
            for p in set(missing) & set(self.lost()):
                raise self._lost("without", p)
            if time.perf_counter() - t0 > self.timeout_s:
                raise self._late("without", time.perf_counter() - t0, missing)
            time.sleep(0.001)

    def _connect(self) -> Any:
        gloo = dist.ProcessGroupGloo
        options = gloo._Options()
        # Elsewhere the interface of the host's name, or those that GLOO_SOCKET_IFNAME tells: with devices given, gloo
        # does not look for itself.
        told = os.environ.get("GLOO_SOCKET_IFNAME", "")
        if self._one_host:
            options._devices = [gloo.create_device(hostname="127.0.0.1")]
        elif told:
            options._devices = [gloo.create_device(interface=name) for name in told.split(",")]
        else:
            options._devices = [gloo.create_default_device()]
        options._timeout = timedelta(seconds=self.timeout_s)
        return gloo(self._store, self.rank, self.size, options)


class _Hearing:
    """Waits for messages of many peers at once, and knows whose connection has broken.

    Gloo does not tell one who waits for anyone that a peer has died, and cannot be asked whether a message is there.
    So a thread a peer waits for the next message of that peer alone.
    """

    def __init__(self) -> None:
        self.busy: set[int] = set()  # peers for whose message somebody waits
        self._awaited: dict[int, SimpleQueue[tuple[Any, Tensor] | None]] = {}  # by peer: what its thread is to wait for
        self._heard: SimpleQueue[tuple[int, Tensor, RuntimeError | None]] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def wait_for(self, peer: int, work: Any, there: Tensor) -> None:
        """``work`` ends when the peer's next message is ``there``."""
        self.busy.add(peer)
        if peer not in self._awaited:
            self._awaited[peer] = SimpleQueue()
            self._threads.append(threading.Thread(target=self._listen, args=(peer,), daemon=True))
            self._threads[-1].start()
        self._awaited[peer].put((work, there))

    def next(self) -> tuple[int, Tensor, RuntimeError | None]:
        """The next message of any, or why there will be none of that peer."""
        peer, there, error = self._heard.get()
        self.busy.discard(peer)
        return peer, there, error

    def end(self) -> None:
        """Let the threads go, once what they wait for has ended."""
        for awaited in self._awaited.values():
            awaited.put(None)
        for thread in self._threads:
            thread.join(1.0)

    def _listen(self, peer: int) -> None:
        while (awaited := self._awaited[peer].get()) is not None:
            work, there = awaited
            error = None
            try:
                work.wait(EVER)
            except RuntimeError as e:
                error = e
            del work, awaited  # they would keep the group's connections open
            self._heard.put((peer, there, error))


class NcclCommunicator(TorchCommunicator):
    """One GPU a rank; NCCL opens its own listeners on the interface it picks (NCCL_SOCKET_IFNAME).

    It has no tags, so messages between two ranks are received in the order they were sent, and none can be awaited
    from anyone. Waiting blocks the CPU thread, the price of a deadline. Untested where this was written.
    """

    transport: ClassVar[str] = "nccl"

    @classmethod
    def _place(cls, local_rank: int) -> torch.device:
        if not (torch.cuda.is_available() and dist.is_nccl_available()):
            raise BadInput("transport nccl: it needs a CUDA build of torch and one GPU a rank. Without: gloo.")
        if local_rank >= torch.cuda.device_count():
            raise BadInput(
                f"transport nccl: rank {local_rank} of this host has no GPU of its own, there are "
                f"{torch.cuda.device_count()}. NCCL takes one rank a GPU; several share one over gloo."
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)

    def _connect(self) -> Any:
        nccl = dist.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = timedelta(seconds=self.timeout_s)
        return nccl(self._store, self.rank, self.size, options)

    def _allocate(self, numel: int, dtype: torch.dtype, common: bool) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=self._device)

    def _start_messages(
        self, send: Sequence[tuple[Tensor, int, int]], receive: Sequence[tuple[Tensor, int, int]]
    ) -> list[Any]:
        # NCCL runs one after the other what is not grouped: two ranks that both receive first would wait for ever.
        self._backend._start_coalescing()
        super()._start_messages(send, receive)
        return [self._backend._end_coalescing()]

    def _start_receive(self, here: Tensor, frm: int | None, tag: int) -> Any:
        if frm is None:
            raise BadInput("transport nccl: it cannot receive from anyone. Name the sender, or take gloo or mpi.")
        return super()._start_receive(here, frm, tag)


class _Pending:
    """Operations of the engine under way, and what remains to be done when they have ended."""

    def __init__(
        self,
        comm: TorchCommunicator,
        doing: str,
        works: Sequence[Any],
        then: Callable[[], None] | None = None,
        *,
        peer: int | None = None,
    ) -> None:
        self._comm, self._doing, self._works, self._then, self._peer = comm, doing, works, then, peer

    def wait(self) -> None:
        works, then = self._works, self._then
        self._works, self._then = (), None
        self._comm._await(works, self._doing, self._peer)
        if then is not None:
            then()


def _hang_up(backends: list[Any], errors: list[str]) -> None:
    """End a group's connections; without ``abort``, what will never end is waited for until its deadline."""
    for backend in backends:
        if errors:
            backend.abort()
    backends.clear()


def _bring_back(here: Tensor, x: Tensor) -> None:
    """Copy the result to where the caller's tensor lies, if the engine worked on another device."""
    if here.device != x.device:
        x.copy_(here)


def _check_tag(tag: int) -> None:
    if not 0 <= tag < FIRST_OWN_TAG:
        raise BadInput(f"tag {tag}: a tag is a whole number from 0 to {FIRST_OWN_TAG - 1}.")
