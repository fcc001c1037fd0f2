"""One rank of the LoRA training tests: a few steps for each configuration file it is given.

The model, the adapter, what trains and the engine are made as a run makes them; the packs are
random. `result.json` beside the adapter folder tells losses and what became of the frozen weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import yaml

from llava_hd.train.zero import World, gathered_state, join_world, leave_world, start_engine

# isort: split
from llava_hd.hd.plan import plan_image
from llava_hd.model.assemble import assemble
from llava_hd.model.config import LlavaHDConfig
from llava_hd.model.llava_hd import LlavaHD
from llava_hd.model.packing import PackedBatch, Sample, pack
from llava_hd.train.config import TrainConfig
from llava_hd.train.lora import start_adapter
from llava_hd.train.optimizer import build_optimizer, freeze
from llava_hd.train.recipe import config_from

STEPS = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def start(config: TrainConfig, checkpoint: Path | None = None) -> LlavaHD:
    """The model of a run as its engine gets it."""
    source = config.model
    model, _ = assemble(
        vision=source.vision,
        language=source.language,
        hd=source.geometry,
        seed=config.seed,
        dtype=DTYPES[config.precision],
        attention=source.attention,
    )
    if config.lora is not None:
        start_adapter(model, config, checkpoint)
    freeze(model, config.stage, config.train_vision, config.vision_layers)
    if config.gradient_checkpointing:
        model.checkpoint_gradients()
    return model.train()


def packs_of(config: LlavaHDConfig, step: int, rank: int) -> PackedBatch:
    """Random words with labels; an image in every pack but those of rank 1 in odd steps."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    words = torch.randint(10, 300, (12,), generator=generator).tolist()
    if rank == 1 and step % 2:
        return pack([Sample(words, words, name="text")], config)
    plan = plan_image((40 + 20 * rank, 60), config.hd)
    shape = (plan.num_tiles, 3, config.hd.tile_px, config.hd.tile_px)
    tiles = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    ids = [*words[:6], *[config.image_token_id] * plan.num_tokens, *words[6:]]
    labels = [-100] * (len(ids) - 6) + words[6:]
    return pack([Sample(ids, labels, (plan,), (tiles,), "image")], config)


def seed_of(step: int, rank: int) -> int:
    """Dropout depends on the step and the rank alone."""
    return 1000 * step + rank


def train(config: TrainConfig, world: World) -> None:
    model = start(config)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    engine = start_engine(model, build_optimizer(model, config.optimizer), config, world)
    losses, norms = [], []
    for step in range(STEPS):
        torch.manual_seed(seed_of(step, world.rank))
        output = engine(packs_of(model.config, step, world.rank))
        loss = output.loss_sum / output.num_label_tokens
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm()))
    state = gathered_state(engine.module, list(engine.module.state_dict()), world)
    if world.is_main:
        same = {name: torch.equal(state[name], tensor) for name, tensor in frozen.items()}
        engine.module.save_pretrained(config.output_dir, state_dict=state)
        result = {"losses": losses, "norms": norms, "frozen": same}
        (Path(config.output_dir) / "result.json").write_text(json.dumps(result))
    engine.destroy()


if __name__ == "__main__":
    the_world = join_world(2.0)
    for path in sys.argv[1:]:
        train(config_from(yaml.safe_load(Path(path).read_text(encoding="utf-8"))), the_world)
    leave_world()
