"""Names of images: which are refused by their text, and the file that a name stands for.

Images stay below one root folder: absolute names, `..` and links that leave it are refused.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath

from ..hd.errors import DataError


def path_fault(name: str) -> str | None:
    """Why an image name is refused by its text alone; None when it is a plain relative path."""
    if not name.strip():
        return "is empty"
    if not PurePosixPath(name).name:
        return "names no file"
    if "\0" in name:
        return "holds a NUL character"
    if has_lone_surrogate(name):
        return "holds half of a character (a lone surrogate)"
    if name.startswith(("/", "\\")) or name[1:2] == ":":
        return "is an absolute path"
    if ".." in name.replace("\\", "/").split("/"):
        return "leaves the image folder by '..'"
    return None


def has_lone_surrogate(text: str) -> bool:
    """JSON may hold half of a UTF-16 pair (`"\\ud800"`), which no file name or tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def image_path(root: str | Path, name: str) -> Path:
    """The file of an image name, links followed; DataError if it is missing or leaves the root."""
    fault = path_fault(name)
    if fault:
        raise DataError(f"image {name!r} {fault}; give a path below the image folder")
    top = os.path.realpath(root)
    path = os.path.realpath(Path(root) / name)
    if os.path.commonpath([top, path]) != top:
        raise DataError(
            f"image {name!r} is a link that leaves {root}; copy the file into the image folder"
        )
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        raise DataError(
            f"image {name!r} is not below {root} ({error.strerror}); "
            "check data.images, or drop the record"
        ) from None
    if not stat.S_ISREG(mode):
        raise DataError(f"image {name!r} below {root} is not a regular file; give an image file")
    return Path(path)
