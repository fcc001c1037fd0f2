"""Files that appear whole (a reader sees the old one or the new one), and folders for them."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UsageError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write text as UTF-8, or bytes, flushed to the disk before the file takes its name."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_out(out: Path) -> None:
    """Refuse, with UsageError, an --out that is a file, lies in one or cannot be written."""
    for place in (out, *out.parents):
        if place.is_dir():
            if not os.access(place, os.W_OK | os.X_OK):
                raise UsageError(f"--out {out}: {place} cannot be written; give another folder")
            return
        if os.path.lexists(place):
            raise UsageError(f"--out {out}: {place} is a file; give a folder")
