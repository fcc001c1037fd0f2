"""One run to one output folder: a requeued job must not write beside one that still lives."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..hd.errors import UsageError


class OutputLock:
    """An advisory lock (flock) on a folder, held until `release` or the end of the process."""

    def __init__(
        self, folder: Path, say: Callable[[str], None], option: str = "output_dir"
    ) -> None:
        self.folder = folder
        self.say = say
        self.option = option  # what the user calls the folder
        self._handle: int | None = None

    def take(self) -> None:
        """Lock the folder if it exists and is not locked by us. Raises UsageError where another
        process holds it; a file system without locks is said, and gone on with."""
        if self._handle is not None or not self.folder.is_dir():
            return
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UsageError(
                f"{self.option} {self.folder}: another run is writing there; wait for its end, or "
                "give another folder"
            ) from None
        except OSError as error:
            self.say(
                f"{self.folder} cannot be locked ({error.strerror}); start no second run in it"
            )
        self._handle = handle

    def release(self) -> None:
        """Let other runs in."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


@contextmanager
def only_run(out: Path, say: Callable[[str], None]) -> Iterator[None]:
    """The folder of --out, made where it is missing, and locked; UsageError as of `take`. What was
    made and stays empty is taken away again."""
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    lock = OutputLock(out, say, "--out")
    lock.take()
    try:
        yield
    finally:
        lock.release()
        if made and not any(out.iterdir()):
            out.rmdir()
