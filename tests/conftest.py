"""Shared fixtures; tests need no network, no GPU and nothing outside the repository."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest

# A busy machine is no failure: timed assertions do not belong in the suite.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))  # `import tiny` under --import-mode=importlib
# Helpers whose asserts show both sides where they fail.
pytest.register_assert_rewrite(
    "estimate_data", "generate_command", "kernel_checks", "processes", "train_runs", "web_running"
)


# Triton decides at import whether its kernels are interpreted, so those tests run in a process of
# their own: `make test` starts it second, with TRITON_INTERPRET=1 and nothing else collected.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Interpreted tests with the interpreter, all others without it."""
    name = collection_path.name
    if name.startswith("test_") and name.endswith("_interpreted.py") != INTERPRETED:
        return True
    return None


# Files with minutes of whole runs go first, so that no worker has one of them left at the end.
LONGEST = (
    "test_faults.py",
    "test_estimate_memory.py",
    "test_train.py",
    "test_run_guards.py",
    "test_train_command.py",
    "test_feature_cache.py",
    "test_lora_train.py",
    "test_demo.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; everything else as it stands."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny `vision` and `language` part."""
    from tiny import save_parts

    return save_parts(tmp_path_factory.mktemp("parts"))
