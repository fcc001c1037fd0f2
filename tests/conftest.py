"""Shared fixtures; tests need no network, no GPU and nothing outside the repository."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))  # `import tiny` under --import-mode=importlib


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny `vision` and `language` part."""
    from tiny import save_parts

    return save_parts(tmp_path_factory.mktemp("parts"))
