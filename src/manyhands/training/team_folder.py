"""The temporary folder in which the workers of a team meet, and which no way to die leaves behind for good.

The launcher holds a lock on a file in it, and the kernel takes the lock back with the process, whatever ends that.
Workers whose launcher is gone remove the folder (`member`). Where they were killed along with it, the next folder that
is made sweeps those whose lock is free. A process id would not do: another process may bear it by then, and those of
another container that shares the folder for temporary files are not seen from here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "manyhands-"
OWNER = "owner"


class TeamFolder:
    """A new folder at ``path``, this process's until it is closed."""

    def __init__(self) -> None:
        for abandoned in _abandoned(Path(tempfile.gettempdir())):
            shutil.rmtree(abandoned, ignore_errors=True)
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        # It gets its name when it is locked: who sweeps meanwhile finds no file, and leaves the folder alone.
        coming = self.path / f".{OWNER}"
        self._lock = os.open(coming, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody can sweep it either
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            coming.rename(self.path / OWNER)

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _abandoned(place: Path) -> Iterator[Path]:
    """Folders of this user's whose owners are gone; each is this process's while it is looked at."""
    ours: list[Path] = []
    with contextlib.suppress(OSError), os.scandir(place) as found:
        ours = [Path(entry.path) for entry in found if entry.name.startswith(PREFIX) and _is_ours(entry)]
    for folder in ours:
        with contextlib.suppress(OSError):
            lock = os.open(folder / OWNER, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield folder
            finally:
                os.close(lock)


def _is_ours(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.geteuid()
