"""What the ranks of a run do together, and how a fault that all share is told once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..hd.errors import LlavaHDError
from .zero import World

# How torch and gloo say that another rank is gone or stuck.
LOST_PEER = ("connection closed", "connection reset", "timed out", "timeout", "gloo", "nccl")


class StoppedByPeer(LlavaHDError):
    """This rank stops because another one does, which tells the reason; carries its exit code."""

    def __init__(self, cause: type[LlavaHDError]) -> None:
        super().__init__("another rank has stopped the run and tells why")
        self.exit_code = cause.exit_code


@contextmanager
def said_once(world: World) -> Iterator[None]:
    """A fault inside is the same for all ranks: only the first of each machine tells it."""
    try:
        yield
    except StoppedByPeer:
        raise
    except LlavaHDError as error:
        if world.local_rank:
            raise StoppedByPeer(type(error)) from error
        raise


@contextmanager
def lost_peers(world: World, step: int, where: str) -> Iterator[None]:
    """Say where this rank stood when a collective failed: rank, step, records, tiles."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if world.size == 1 or not any(word in text.lower() for word in LOST_PEER):
            raise
        raise LlavaHDError(
            f"rank {world.rank}, step {step + 1}: lost contact with another rank ({text:.200}); "
            f"this one was {where}; resume with --resume auto"
        ) from error
