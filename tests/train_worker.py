"""One rank of a training test: runs `train` for each configuration file it is given, in order."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from llava_hd.train.recipe import config_from
from llava_hd.train.run import train
from llava_hd.train.zero import leave_world

if __name__ == "__main__":
    for path in sys.argv[1:]:
        train(config_from(yaml.safe_load(Path(path).read_text(encoding="utf-8"))))
    leave_world()
