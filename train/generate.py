"""`data generate`: instruction data in LLaVA's way, out of annotations and a text-only model.

asking.py asks; a valid answer becomes a record. The file at the end depends on the seed and the
answers, not on the order in which they came.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..hd.errors import LlavaHDError
from ..hd.files import write_whole
from .asking import Notify, Progress, ask_all
from .generate_cost import Prices
from .generate_journal import DATA, REJECTED, SUMMARY, Journal, write_array, write_lines
from .generate_plan import Work
from .generate_request import OpenClient


@dataclass(frozen=True)
class Summary:
    """A finished run. records: of data.json; requests and tokens: of all runs of the folder."""

    records: int
    rejected: int
    kinds: dict[str, int]
    invalid: dict[str, int]
    requests: int
    prompt_tokens: int
    answer_tokens: int
    requests_counted_by_rule: int
    cost: float | None
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dict(vars(self))


def generate(
    work: Work,
    out: Path,
    journal: Journal,
    open_client: OpenClient,
    *,
    prices: Prices,
    concurrency: int = 8,
    progress: Progress = lambda done, total, rejected, cost: None,
    notify: Notify = lambda text: None,
) -> Summary:
    """Ask what the journal does not have, then write data.json, rejected.jsonl and summary.json.

    SIGINT and SIGTERM let what is on its way come in, a second one does not. Raises Interrupted
    (also for the limit of the cost) and LlavaHDError; the same command goes on then.
    """
    reason = ask_all(
        work,
        journal,
        open_client,
        prices=prices,
        concurrency=concurrency,
        progress=progress,
        notify=notify,
    )
    if reason is not None:
        write_lines(out / REJECTED, journal.rejected(task.key for task in work.in_order()))
        raise reason
    return finish(work, out, journal, prices)


def finish(work: Work, out: Path, journal: Journal, prices: Prices) -> Summary:
    """Write what is answered. Raises LlavaHDError when that is nothing."""
    keys = [task.key for task in work.in_order()]
    answered = [task for task in work.in_order() if task.key in journal.records]
    rejected = journal.rejected(keys)
    write_lines(out / REJECTED, rejected)
    if not answered:
        why = next(iter(journal.reasons(keys)), "nothing was asked")
        raise LlavaHDError(
            f"{out}: no answer is valid ({why}); look into {REJECTED}, or try another model"
        )
    write_array(out / DATA, (journal.records[task.key] for task in answered))
    summary = Summary(
        records=len(answered),
        rejected=len(rejected),
        kinds=dict(Counter(task.kind for task in answered)),
        invalid=journal.reasons(keys),
        requests=journal.requests,
        prompt_tokens=journal.used.prompt_tokens,
        answer_tokens=journal.used.answer_tokens,
        requests_counted_by_rule=journal.estimated,
        cost=prices.cost(journal.used),
        sha256=sha256((out / DATA).read_bytes()).hexdigest(),
    )
    write_whole(out / SUMMARY, json.dumps(summary.to_dict(), indent=2, ensure_ascii=False) + "\n")
    return summary
