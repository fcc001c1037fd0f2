"""Many questions to a language model: workers, another try for what is invalid, nothing twice.

Workers take one task after the other. An invalid answer is asked for again, with another seed;
every answer is in the journal before the next request is sent, so a run that was stopped goes on.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from ..hd.errors import Interrupted, LlavaHDError, UsageError
from .generate_cost import Ledger, Prices, usage_of, worst
from .generate_journal import Fault, Journal
from .generate_request import Ask, Invalid, OpenClient, Refused, Request, Unanswered, Usage

FAILURES = 5  # requests in a row without an answer, or refused, after which a run stops
AGAIN = "start the same command again to go on"

Notify = Callable[[str], None]
Progress = Callable[[int, int, int, "float | None"], None]  # done, all, rejected, cost


class Task(Protocol):
    """Something to ask; `key` is its name in the journal."""

    @property
    def key(self) -> str: ...


class Work(Protocol):
    """What is asked, in this order, and what becomes of the answers.

    tries: how often a task is asked until its answer is valid.
    """

    @property
    def tasks(self) -> Sequence[Any]: ...

    @property
    def tries(self) -> int: ...

    def request(self, task: Any, attempt: int = 0) -> Request:
        """What is sent for the attempt, counted from 0."""

    def take(self, task: Any, text: str) -> dict[str, Any]:
        """The JSON-able record of an answer; raises Invalid."""


class _Run:
    """One run over the tasks that are not done yet."""

    def __init__(
        self, work: Work, journal: Journal, prices: Prices, progress: Progress, notify: Notify
    ) -> None:
        self.work, self.journal, self.progress, self.notify = work, journal, progress, notify
        self.ledger = Ledger(prices, journal.used)
        self.waiting = iter([task for task in work.tasks if not journal.is_done(task.key)])
        self.num_done = sum(journal.is_done(task.key) for task in work.tasks)
        self.num_rejected = len(journal.rejected(task.key for task in work.tasks))
        self.stop: Exception | None = None  # why nothing more is asked
        self.on_their_way = 0
        self.failed: list[str] = []  # without an answer: asked again by the next run
        self.refused: list[tuple[Task, str]] = []  # held back until another request succeeds
        self.failures = 0  # in a row

    async def work_off(self, ask: Ask) -> None:
        """One worker: tasks until there are no more, or the run stops."""
        for task in self.waiting:
            if self.stop is not None:
                return
            try:
                await self._task(task, ask)
            except LlavaHDError as error:
                self.stop = self.stop or error
            except BaseException as error:  # a full disk, a fault of ours: nobody may go on
                self.stop = self.stop or Interrupted(f"{type(error).__name__}; {AGAIN}")
                raise

    async def _task(self, task: Task, ask: Ask) -> None:
        while self.stop is None and not self.journal.is_done(task.key):
            if not await self._attempt(task, ask):
                return

    async def _attempt(self, task: Task, ask: Ask) -> bool:
        """Ask once; whether the task may be asked again at once."""
        request = self.work.request(task, self.journal.attempts(task.key))
        most, used = worst(request), Usage()
        if not await self.ledger.reserve(most):
            self.stop = self.stop or Interrupted(
                f"the next request might pass --max-cost {self.ledger.prices.most:g}; raise it and "
                "start again, or write what is there with --finish"
            )
            return False
        self.on_their_way += 1
        try:
            if self.stop is not None:  # while it waited for room
                return False
            reply = await ask(request)
            used, told = usage_of(request, reply)
            self._take(task, reply.text, reply.fault, used, told)
        except Unanswered as error:
            self.failed.append(str(error))
            self._count_failure(f"{error}; {FAILURES} requests in a row; {AGAIN}")
            return False
        except Refused as error:
            self.refused.append((task, str(error)))
            self._count_failure(
                f"the server refuses the requests ({error}); see --limit-field, --no-seed and "
                "--temperature null, or choose another model",
                UsageError,
            )
            return False
        finally:
            self.on_their_way -= 1
            await self.ledger.settle(most, used)
        return True

    def _take(self, task: Task, text: str, fault: str, used: Usage, told: bool) -> None:
        """Journal one answer."""
        self.failures = 0
        self.write_refusals()
        try:
            if fault:
                raise Invalid(fault)
            record = self.work.take(task, text)
        except Invalid as error:
            final = self.journal.attempts(task.key) + 1 >= self.work.tries
            # Half of a surrogate pair has no UTF-8.
            whole = text.encode("utf-8", "replace").decode("utf-8")
            self.journal.bad(task.key, Fault(str(error), whole, final), used, told)
            self.num_rejected += final
        else:
            self.journal.good(task.key, record, used, told)
        self.num_done += self.journal.is_done(task.key)
        self.tell()

    def write_refusals(self) -> None:
        """Another request was taken, so these were refused for what they are."""
        for task, reason in self.refused:
            fault = Fault(f"refused by the server ({reason})", "", final=True)
            self.journal.bad(task.key, fault, Usage(), told=True)
            self.num_done += 1
            self.num_rejected += 1
        self.refused = []

    def _count_failure(self, message: str, kind: type[LlavaHDError] = LlavaHDError) -> None:
        self.failures += 1
        if self.failures >= FAILURES and self.stop is None:
            self.stop = kind(message)

    def tell(self) -> None:
        """Show where the run stands."""
        cost = self.ledger.prices.cost(self.journal.used)
        self.progress(self.num_done, len(self.work.tasks), self.num_rejected, cost)

    def what_is_left(self) -> Exception | None:
        """The reason why the run is not complete, if it is not."""
        state = f"{self.num_done:,} of {len(self.work.tasks):,} are done"
        if isinstance(self.stop, Interrupted):
            return Interrupted(f"{state}; {self.stop}")
        if self.stop is not None:
            return type(self.stop)(f"{self.stop} ({state})")
        if self.refused and not self.journal.records:
            return UsageError(f"the server refuses the requests ({self.refused[0][1]}); {state}")
        self.write_refusals()
        if self.failed:
            return LlavaHDError(
                f"{len(self.failed):,} requests got no answer ({self.failed[-1]}); {state}; {AGAIN}"
            )
        return None


def ask_all(
    work: Work,
    journal: Journal,
    open_client: OpenClient,
    *,
    prices: Prices,
    concurrency: int,
    progress: Progress,
    notify: Notify,
) -> Exception | None:
    """Ask what the journal does not have. The reason why something is left, None where nothing is.

    SIGINT and SIGTERM let what is on its way come in, a second one does not.
    """
    run = _Run(work, journal, prices, progress, notify)
    run.tell()
    if run.num_done == len(work.tasks):
        return None
    asyncio.run(_all(run, open_client, concurrency))
    return run.what_is_left()


async def _all(run: _Run, open_client: OpenClient, concurrency: int) -> None:
    async with open_client() as ask:
        workers = [asyncio.create_task(run.work_off(ask)) for _ in range(concurrency)]
        with _signals(run, workers):
            ends = await asyncio.gather(*workers, return_exceptions=True)
    faults = [end for end in ends if isinstance(end, BaseException)]
    for fault in faults:
        if not isinstance(fault, asyncio.CancelledError):
            raise fault


@contextmanager
def _signals(run: _Run, workers: list[asyncio.Task[None]]) -> Iterator[None]:
    """The first signal stops asking, the second also stops waiting."""

    signals = 0

    def stop() -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            for worker in workers:
                worker.cancel()
            return
        run.stop = run.stop or Interrupted(AGAIN)
        run.notify(
            f"stopping; {run.on_their_way} answers are on their way, a second signal gives them up"
        )

    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
