"""Write a file that is old or new, never half of it: a sibling first, forced to disk, then renamed into place."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file to write, which takes the place of ``path`` at the end; an exception inside leaves the old one."""
    fresh = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        with open(fresh, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
