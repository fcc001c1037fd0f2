"""One rank that trains a configuration and measures by how much its memory grew at most.

Arguments: a configuration to warm up with, and then configurations to measure, as YAML. Each one's
growth is written to `<its output_dir>-rank<rank>.json`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import sys
from pathlib import Path

import yaml

from llava_hd.train.recipe import config_from
from llava_hd.train.run import train
from llava_hd.train.zero import leave_world


def memory(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def settle() -> None:
    """Give everything back that is free, and begin a new peak here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    warm_up, *measured = [
        config_from(yaml.safe_load(Path(name).read_text(encoding="utf-8"))) for name in sys.argv[1:]
    ]
    # Libraries, threads, process group and a first engine: none of that is the model's.
    train(warm_up)
    for config in measured:
        settle()
        before = memory("VmRSS")
        train(config)
        growth = {"before": before, "growth": memory("VmHWM") - before}
        file = Path(f"{config.output_dir}-rank{os.environ.get('RANK', '0')}.json")
        file.write_text(json.dumps(growth), encoding="utf-8")
    leave_world()
