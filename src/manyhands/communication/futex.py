"""Sleeping and waking on a word of shared memory (Linux futex), through ctypes: no compiler, no semaphore to leak.

`wait` sleeps only if the word still holds the value the caller saw, so a change between looking and sleeping is never
missed; `wake` rouses everyone asleep on the word. Words live in memory shared between processes, hence the
non-private futex operations. See Drepper, "Futexes Are Tricky" (2011).

Cost on one machine: about 1 µs for a call that does not sleep.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import sys

from manyhands.communication.quota import own_quota

_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine())
_WAIT, _WAKE = 0, 1
_EVERYONE = 2**31 - 1

#: x86-64 never reorders a store with an earlier store nor a load with an earlier load. The protocols here rely on
#: that plus `fence`; on weakly ordered processors they have not been proven, so the shared transport is refused.
AVAILABLE = sys.platform == "linux" and platform.machine() == "x86_64"

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


def _timespec(seconds: float) -> _Timespec:
    whole = int(seconds)
    return _Timespec(whole, int((seconds - whole) * 1e9))


if _libc is not None:
    _syscall = _libc.syscall
    _syscall.restype = ctypes.c_long
    _core = _libc.sched_getcpu
    _yield = _libc.sched_yield


def fence() -> int:
    """Full memory barrier: every store before it is visible before any load after it. Returns the current core.

    A ctypes call gives up the interpreter lock and takes it again; both pass through a locked instruction, which
    orders everything on x86-64. The C function called costs next to nothing and its answer is of use.
    """
    core: int = _core()
    return core


def give_way() -> int:
    """A `fence` that also lets another runnable process have the core."""
    _yield()
    return fence()


def leave_core(core: int) -> None:
    """Move this thread to another of the cores it may run on, now; it may run on all of them afterwards."""
    with contextlib.suppress(OSError):  # whoever changes our affinity meanwhile knows better: it was only a hint
        allowed = os.sched_getaffinity(0)
        if len(allowed) > 1:
            os.sched_setaffinity(0, allowed - {core})
            os.sched_setaffinity(0, allowed)


def wait(address: int, expected: int, seconds: float) -> None:
    """Sleep while the 32-bit word at ``address`` equals ``expected``, ``seconds`` at most."""
    _syscall(
        _SYS_FUTEX,
        ctypes.c_void_p(address),
        _WAIT,
        ctypes.c_uint32(expected & 0xFFFFFFFF),
        ctypes.byref(_timespec(seconds)),
        None,
        0,
    )


def wake(address: int) -> None:
    """Wake every process asleep on the word at ``address``."""
    _syscall(_SYS_FUTEX, ctypes.c_void_p(address), _WAKE, _EVERYONE, None, None, 0)


def affinity() -> int:
    """How many cores the system lets this process run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores() -> int:
    """How many cores this process can keep busy: those it may run on, or what a container's quota pays for.

    A part of a core counts as one: 1.5 cores are enough for two workers that wait now and then.
    """
    quota = own_quota()
    return affinity() if quota is None else max(1, min(affinity(), math.ceil(quota)))
