"""Where the files of a data set may lie, when they are not part of the package.

In the folder given (``--data-dir``), in ``$MANYHANDS_DATA`` and in the user's cache ``~/.cache/manyhands``, each itself
or its folder with the data set's name. What is fetched goes into the cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from manyhands.errors import BadInput


def cache(name: str) -> Path:
    """Where downloads of data set ``name`` are kept."""
    return Path.home() / ".cache" / "manyhands" / name


def searched(name: str, folder: Path | None = None) -> Iterator[Path]:
    """Folders that may hold the files, best first."""
    stated = os.environ.get("MANYHANDS_DATA")
    for root in (folder, Path(stated) if stated else None, cache(name).parent):
        if root is not None:
            yield from (root, root / name)


def holding(name: str, folder: Path | None, complete: Callable[[Path], bool]) -> Path | None:
    """The first of `searched` that is ``complete``, or None."""
    if folder is not None and not folder.is_dir():
        raise BadInput(f"the data folder {folder} does not exist; name one that does (--data-dir FOLDER).")
    return next((place for place in searched(name, folder) if complete(place)), None)
