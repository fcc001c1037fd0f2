"""What the ranks of a run do together, and how a fault that all share is told once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ..hd.errors import LlavaHDError
from .loader_workers import is_dead_worker
from .zero import World, gather_objects

T = TypeVar("T")

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


def on_main(world: World, work: Callable[[], T]) -> T:
    """Do something on rank 0; every rank gets its result, or stops by its error. A collective."""
    done: tuple[T | None, Exception | None] = (None, None)
    if world.is_main:
        try:
            done = work(), None
        except (LlavaHDError, OSError) as error:
            done = None, error
    result, fault = gather_objects(done)[0]
    if fault is not None:
        raise _own_or_told(fault, world.is_main)
    return result  # type: ignore[return-value]  # None only where work returns None


def on_all(world: World, work: Callable[[], T]) -> T:
    """Do something on every rank; if it fails on any, all stop, and the first of them tells why.
    A collective at its end: work may hold collectives only where no rank fails alone."""
    mine, result = None, None
    try:
        result = work()
    except (LlavaHDError, OSError) as error:
        mine = error
    faults = gather_objects(mine)
    failed = [rank for rank, fault in enumerate(faults) if fault is not None]
    if failed:
        raise _own_or_told(faults[failed[0]], world.rank == failed[0])
    return result  # type: ignore[return-value]


def _own_or_told(fault: Exception | None, own: bool) -> Exception:
    if own and fault is not None:
        return fault
    return StoppedByPeer(type(fault) if isinstance(fault, LlavaHDError) else LlavaHDError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def lost_peers(world: World, where: Callable[[], str]) -> Iterator[None]:
    """Say in a line `where` this rank stood (step, records, tiles) when a collective failed, or one
    of its loader processes died: torch tells that by a signal, wherever the rank is just then."""
    try:
        yield
    except LlavaHDError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if any(is_dead_worker(one) for one in _chain(error)):
            raise LlavaHDError(
                f"rank {world.rank}, {where()}: a loader process died, perhaps out of memory; "
                "lower data.num_workers and go on with --resume auto"
            ) from error
        if (
            not isinstance(error, RuntimeError)
            or world.size == 1
            or not any(word in text.lower() for word in LOST_PEER)
        ):
            raise
        raise LlavaHDError(
            f"rank {world.rank}, {where()}: lost contact with another rank ({text:.200}); go on "
            "with --resume auto"
        ) from error
