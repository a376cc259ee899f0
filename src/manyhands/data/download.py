"""One file over HTTPS: capped in length and time, checked before anybody can see it."""

from __future__ import annotations

import contextlib
import http.client
import os
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

_CHUNK = 1 << 18


class _StayOnHttps(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.startswith("https://"):
            raise OSError(f"{req.full_url} leads away from HTTPS, to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, timeout_s: float) -> Any:
    if not url.startswith("https://"):
        raise OSError(f"{url} is not HTTPS")
    return urllib.request.build_opener(_StayOnHttps).open(url, timeout=timeout_s)


def fetch(
    url: str,
    to: Path,
    *,
    cap_B: int,
    check: Callable[[bytes], object],
    timeout_s: float = 4.0,
    deadline_s: float = 120.0,
) -> None:
    """Put what ``url`` holds at ``to``, in one piece or not at all. Raises `OSError`, or what ``check`` raises.

    ``timeout_s`` bounds each wait for the network, ``deadline_s`` all of them; more than ``cap_B`` bytes are refused.
    """
    until = time.monotonic() + deadline_s
    parts: list[bytes] = []
    try:
        with contextlib.closing(_open(url, timeout_s)) as answer:
            while part := answer.read(_CHUNK):
                parts.append(part)
                if sum(map(len, parts)) > cap_B:
                    raise OSError(f"{url} sends more than {cap_B:,} bytes")
                if time.monotonic() > until:
                    raise TimeoutError(f"{url} took longer than {deadline_s:.0f} s")
    except http.client.HTTPException as e:  # cut short, or no HTTP at all; not an OSError by itself
        raise OSError(f"{url}: {type(e).__name__}") from e
    content = b"".join(parts)
    check(content)
    to.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=to.parent, prefix=f".{to.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(content)
        Path(beside).replace(to)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
