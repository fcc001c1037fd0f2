"""The errors that a user can cause, each with the exit code of the `llava-hd` command.

They live on the ground floor so that every room may raise them. A message is one line that names
the file, the record or field, and the remedy; `cli/main.py` prints it and exits with the code.
"""


class LlavaHDError(Exception):
    """A run that failed (exit code 1)."""

    exit_code = 1


class UsageError(LlavaHDError):
    """Bad usage or configuration (exit code 2)."""

    exit_code = 2


class DataError(LlavaHDError):
    """Bad data: an image, a record, a question file, a checkpoint (exit code 3)."""

    exit_code = 3


class BatchItemError(DataError):
    """Bad data in one item of a batch; `number` is its place there, for callers that know names."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Interrupted(LlavaHDError):
    """Stopped before the end, but resumable (exit code 75)."""

    exit_code = 75
