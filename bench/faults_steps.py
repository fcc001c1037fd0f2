"""Odd steps: any mix of images over ranks and passes; losses and gradients that are not finite."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..hd.image import from_array
from ..model.llava_hd import LlavaHD
from ..model.packing import PackedBatch, Sample, pack
from ..model.processor import Processor
from ..model.prompt import IMAGE_TAG, Turn
from ..train.config import TrainConfig
from ..train.optimizer import build_optimizer, freeze
from ..train.run import build_model, train
from ..train.zero import all_sum, join_world, start_engine
from .fault_lab import Lab, losses, start_ranks, weight_hash

Progress = Callable[[str], None]
RANKS, PASSES = 2, 3
HANG_SECONDS = 60.0
TEXTS = ("is there a cat", "what is in the picture, and what is not", "describe it")


def fuzz_modalities(
    lab: Lab, stage: int, count: int, seed: int, progress: Progress
) -> dict[str, Any]:
    """`count` steps, each with its own random assignment of {0–3 images, text only, nothing} to
    2 ranks x 3 passes, in one process group. Counts the steps that all ranks finished."""
    config = lab.config(f"fuzz{stage}", zero__stage=stage, timeout_minutes=HANG_SECONDS / 60)

    def work() -> None:
        world = join_world(config.timeout_minutes)
        model, processor = build_model(config, None)
        freeze(model, config.stage)
        engine = start_engine(
            model.train(), build_optimizer(model, config.optimizer), config, world
        )
        for step in range(count):
            rng = random.Random(f"{seed}/{step}")
            kinds = [[rng.choice(KINDS) for _ in range(PASSES)] for _ in range(RANKS)]
            batches = [_batch(processor, kind, rng.random()) for kind in kinds[world.rank]]
            units = int(all_sum(torch.tensor(sum(batch.loss_units for batch in batches))))
            for number, batch in enumerate(batches, start=1):
                output = engine(batch)
                engine.set_gradient_accumulation_boundary(number == PASSES)
                engine.backward(output.loss_sum * world.size / max(1, units), scale_wrt_gas=False)
                engine.step()
            if world.is_main and (step + 1) % 10 == 0:
                (lab.folder / f"fuzz{stage}.txt").write_text(str(step + 1), encoding="utf-8")

    codes = start_ranks(RANKS, work, lab.log).wait(HANG_SECONDS + 4.0 * count)
    done = lab.folder / f"fuzz{stage}.txt"
    steps = int(done.read_text(encoding="utf-8")) if done.exists() else 0
    progress(f"modalities: ZeRO-{stage}, {steps} of {count}")
    return {
        "stage": stage,
        "assignments": count,
        "finished": steps,
        "hangs": int(codes != [0] * RANKS),
    }


KINDS = ("nothing", "text", "one", "two", "three", "text and one")


def _batch(processor: Processor, kind: str, draw: float) -> PackedBatch:
    """A pack of that kind with images of random sizes."""
    rng = np.random.default_rng(int(draw * 2**32))
    images = {"one": (1,), "two": (2,), "three": (1, 2), "text": (0,), "text and one": (0, 1)}
    samples: list[Sample] = []
    for count in images.get(kind, ()):
        pictures = [
            from_array(rng.integers(0, 256, (*rng.integers(8, 200, 2), 3), dtype=np.uint8))
            for _ in range(count)
        ]
        text = f"{IMAGE_TAG}\n" * count + TEXTS[int(rng.integers(len(TEXTS)))]
        turns = [Turn("human", text), Turn("gpt", "a cat")]
        samples.append(processor.conversation(turns, pictures))
    return pack(samples, processor.config)


@dataclass(frozen=True)
class NanCase:
    """Where something was made not finite, how often, and what came of it."""

    what: str
    ranks: str
    often: str
    stage: int
    precision: str
    skipped: int
    due: int
    stopped: bool
    ok: bool

    def row(self) -> dict[str, Any]:
        return dict(self.__dict__)


STEPS, BAD_STEP = 9, 2


def not_finite(lab: Lab, quick: bool, progress: Progress) -> list[NanCase]:
    """In the loss, in a gradient, in the features of a tile; on one rank, on all; once, forever."""
    cases = []
    for number, (what, who, often, stage, precision) in enumerate(
        (a, b, c, d, e)
        for a in ("loss", "gradient", "tile")
        for b in ("one", "all")
        for c in ("once", "forever")
        for d in (2, 3)
        for e in ("fp32", "bf16")
    ):
        if quick and number % 19:
            continue
        name = f"nan-{what}-{who}-{often}-{stage}-{precision}"
        settings = {"zero__stage": stage, "precision": precision, "max_steps": STEPS}
        settings["data__batching"] = "plain"  # two passes a step on every rank
        config = lab.config(name, **settings)

        body = partial(_train_poisoned, config, what, who, often)
        codes = start_ranks(RANKS, body, lab.log).wait(180.0)
        folder = Path(config.output_dir)
        lines = (folder / "nonfinite.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        named = all(
            one["records"] for line in records for passes in line["ranks"] for one in passes
        )
        due = 1 if often == "once" else config.nonfinite_limit
        stopped = codes == [1] * RANKS
        right_end = stopped if often == "forever" else codes == [0] * RANKS
        steps_due = list(range(BAD_STEP + 1, BAD_STEP + 1 + due))
        fine = right_end and named and [line["step"] for line in records] == steps_due
        if often == "once":
            fine = fine and all(math.isfinite(x) for x in losses(folder)[BAD_STEP + 1 :])
            fine = fine and bool(weight_hash(folder))
        cases.append(NanCase(what, who, often, stage, precision, len(records), due, stopped, fine))
        progress(f"not finite: {len(cases)}")
    return cases


def _train_poisoned(config: TrainConfig, what: str, who: str, often: str) -> None:
    if who == "all" or os.environ["RANK"] == "1":
        _poison(what, often)
    train(config)


def _poison(what: str, often: str) -> None:
    """Make something of step BAD_STEP (and of all later ones) NaN in this rank's model."""
    real, passes = LlavaHD.forward, 0

    def forward(self: LlavaHD, batch: PackedBatch) -> Any:
        nonlocal passes
        step, passes = passes // 2, passes + 1  # two passes a step
        bad = step == BAD_STEP or (often == "forever" and step > BAD_STEP)
        if bad and what == "tile":
            handle = self.vision.register_forward_hook(lambda module, inputs, x: x * math.nan)
            try:
                return real(self, batch)
            finally:
                handle.remove()
        output = real(self, batch)
        if bad and what == "loss":
            return type(output)(output.loss_sum * math.nan, *_rest(output))
        if bad:
            return type(output)(_NanGradient.apply(output.loss_sum), *_rest(output))
        return output

    LlavaHD.forward = forward  # type: ignore[method-assign]  # this process is for this run only


def _rest(output: Any) -> tuple[Any, ...]:
    return output.num_label_tokens, output.loss_units


class _NanGradient(torch.autograd.Function):
    """A finite value whose gradient is not."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * math.nan
