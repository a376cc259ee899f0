"""SIGTERM ends a run as Ctrl-C does: as a `KeyboardInterrupt`, through the same clean-up."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def terminating() -> Iterator[None]:
    """SIGTERM raises `KeyboardInterrupt` inside; without effect off the main thread, which alone gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
