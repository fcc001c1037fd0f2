"""SIGKILL at random moments, half of them aimed into a save; ours and DeepSpeed's own checkpoints.

A run of a few steps that saves after each is killed, resumed by itself, killed again, …, until it
has come to its end; then the next one starts. Ours must resume after every kill and end with the
weights of the run that was never disturbed. Beside it the same runs with DeepSpeed's
`save_checkpoint` and `load_checkpoint`, as its documentation uses them.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..model.processor import Processor
from ..train import loop
from ..train.checkpoint_state import TrainerState
from ..train.config import TrainConfig
from ..train.output_lock import OutputLock
from ..train.prepare import prepare
from ..train.run import Silence, finish, start_loop, train
from ..train.stop import StopRequest
from ..train.zero import Engine, World, join_world
from .fault_lab import Lab, Ranks, losses_hex, run_ranks, start_ranks, weight_hash

STEPS = 8
RANKS = 2
SAVE_SECONDS = 0.25  # after the beginning of a save, in which a kill is aimed into it
KILLED = -9
MOST_STARTS = 1000  # of one run
Progress = Callable[[str], None]


@dataclass
class KillResult:
    """What came of the kills.

    lost: kills after which the run could not go on. runs: that came to their end or were lost;
    equal: of them, with the weights and losses of the undisturbed run. outcomes: what the start
    after a kill came to, where it was waited for.
    """

    who: str
    stage: int
    kills: int = 0
    aimed: int = 0  # of them, into a save
    lost: int = 0
    runs: int = 0
    equal: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """As values for the result file."""
        return {**self.__dict__, "outcomes": dict(self.outcomes), "failures": self.failures[:10]}


@dataclass(frozen=True)
class Undisturbed:
    """The run that was left alone: how long it took, its weights and losses."""

    seconds: float
    weights: str
    losses: list[str]

    def equals(self, folder: Path) -> bool:
        """Whether a finished run came to the same, to the last bit. (A folder that was gone on
        into in the middle has the losses of the later steps only.)"""
        if not (folder / "trainer_state.json").exists():
            return False
        found = losses_hex(folder)
        return weight_hash(folder) == self.weights and found == self.losses[-len(found) :]


def kill_both(
    lab: Lab, stage: int, kills: int, seed: int, rival: bool, progress: Progress
) -> list[KillResult]:
    """As many kills for ours and, with `rival`, for DeepSpeed's own checkpoints."""
    settings = {"zero__stage": stage, "max_steps": STEPS, "save_steps": 1}
    whole = lab.config(f"whole{stage}", **settings)
    began = time.monotonic()
    if run_ranks(whole, RANKS, lab.log) != [0] * RANKS:
        raise RuntimeError(f"the undisturbed run failed; see {lab.log}")
    folder = Path(whole.output_dir)
    seconds = time.monotonic() - began
    due = Undisturbed(seconds, weight_hash(folder), losses_hex(folder))

    def ours(run: int) -> Iterator[tuple[TrainConfig, Callable[[], object]]]:
        config = lab.config(f"ours{stage}-{run}", **settings, save_total_limit=2, resume="auto")
        while True:
            yield config, partial(train, config)

    def theirs(run: int) -> Iterator[tuple[TrainConfig, Callable[[], object]]]:
        shards = lab.folder / f"deepspeed{stage}-{run}"
        for start in range(MOST_STARTS):
            config = lab.config(f"{shards.name}-{start}", **settings)
            yield config, partial(_train_with_deepspeed, config, shards)

    results = []
    contestants = {"llava-hd": ours, "DeepSpeed": theirs} if rival else {"llava-hd": ours}
    for who, starts in contestants.items():
        result = KillResult(who, stage)
        rng, began = random.Random(seed), time.monotonic()
        while result.kills < kills:
            _one_run(result, starts(result.runs), due, lab, rng, kills, progress)
            result.runs += 1
        result.seconds = time.monotonic() - began
        results.append(result)
    return results


def _one_run(
    result: KillResult,
    starts: Iterator[tuple[TrainConfig, Callable[[], object]]],
    due: Undisturbed,
    lab: Lab,
    rng: random.Random,
    kills: int,
    progress: Progress,
) -> None:
    """Start, kill and start again until the run has come to its end, or cannot go on."""
    before = -1  # the step of the last save that is known to be whole
    for mine, (config, body) in enumerate(starts):  # so many kills has this run seen
        ranks, name = start_ranks(RANKS, body, lab.log), Path(config.output_dir).name
        spare = result.kills >= kills
        aimed = rng.random() < 0.5
        verdict = mine > 0 and (aimed or spare or result.who != "llava-hd")
        first = ranks.next_event(60.0) if verdict or aimed else None
        if verdict:
            result.outcomes[_outcome(first, before)] += 1
        if not spare:
            saved = _strike(ranks, aimed, first, due.seconds, rng)
            before = max(before, saved)
        codes = ranks.wait(120.0)
        if codes is not None and all(code == 0 for code in codes):
            if due.equals(Path(config.output_dir)):
                result.equal += 1
            else:
                result.failures.append(f"{name}: other weights after {mine} kills")
            return
        if codes is None or KILLED not in codes:
            result.lost += 1
            result.failures.append(f"{name}: exit codes {codes} after {mine} kills")
            return
        result.kills += 1
        result.aimed += aimed
        progress(f"{result.who}, ZeRO-{result.stage}: {result.kills} of {kills} kills")


def _outcome(first: str | None, before: int) -> str:
    """What a start after a kill came to, by the first step that it reads the samples of."""
    if first is None:
        return "could not start"
    if int(first.split()[0]) == 0 and before > 0:
        return "started over"
    return "went on"


def _strike(ranks: Ranks, aimed: bool, event: str | None, usual: float, rng: random.Random) -> int:
    """Kill the ranks at a random moment, or in a save; returns the last step that was saved for
    certain (-1: none that we know of)."""
    saved = -1
    if aimed:
        saves = rng.randrange(1, 4)
        while saves and event is not None:
            if event.endswith("saving"):
                saves -= 1
                saved = int(event.split()[0])  # that of the save before is whole
            event = ranks.next_event(60.0) if saves else None
        time.sleep(rng.uniform(0.0, SAVE_SECONDS))
    else:
        ranks.watch(rng.uniform(0.0, usual))
    ranks.kill(rng.sample(range(RANKS), RANKS), pause=rng.choice((0.0, 0.0, 0.02, 0.1)))
    return saved


def _train_with_deepspeed(config: TrainConfig, shards: Path) -> None:
    """The same run, saved and resumed by DeepSpeed's own functions, as its documentation does."""
    world = join_world(config.timeout_minutes)
    job = prepare(config, world.size, None)
    with StopRequest(announce=False) as stop:
        lock = OutputLock(Path(config.output_dir), print)
        steps = start_loop(job, world, Silence(), stop, lock)
        if shards.exists():
            path, client = steps.engine.load_checkpoint(str(shards))
            if path is not None:
                state = replace(job.state, step=client["step"])
                steps = replace(steps, job=replace(job, state=state))

        def save(
            engine: Engine,
            processor: Processor,
            state: TrainerState,
            output_dir: Path,
            world: World,
        ) -> Path:
            client = {"step": state.step}
            engine.save_checkpoint(str(shards), tag=f"step{state.step}", client_state=client)
            return shards

        loop.save_checkpoint = save  # this process exists for this run only
        steps.run()
        finish(steps)
