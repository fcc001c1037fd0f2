"""The shape of the house: arrows between rooms, doors for foreign libraries, no packages."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARROWS = {
    "hd": set(),
    "kernels": set(),
    "model": {"hd", "kernels"},
    "train": {"model", "hd"},
    "bench": {"hd", "kernels", "model", "train"},
    "cli": {"hd", "kernels", "model", "train", "bench"},
}
# Library -> the rooms, or the one file, that may import it.
DOORS = {
    "triton": {"kernels", "bench"},
    "PIL": {"hd"},
    "numba": {"hd/resample.py"},
    "transformers": {"model"},
    "tokenizers": {"model"},
    "huggingface_hub": {"model"},
    "safetensors": {"model", "train/zero_state.py"},
    "peft": {"model"},
    "liger_kernel": {"model/fused.py"},
    "bitsandbytes": {"model"},
    "deepspeed": {"train"},
    "pyarrow": {"train/sources_parquet.py"},
    "openai": {"train/generate_client.py"},
    "lmms_eval": {"bench/lmms_adapter.py", "bench/lmms_manifest.py"},
    "starlette": {"cli"},
    "uvicorn": {"cli"},
    "jsonargparse": {"cli"},
    "rich": {"cli"},
    "gradio": {"cli/web_page.py", "cli/web_events.py"},
}
WITHOUT_TORCH = ["hd/errors.py", "hd/grid.py", "hd/plan.py", "train/config.py", "model/config.py"]


def sources() -> list[Path]:
    return [path for room in ARROWS for path in sorted((ROOT / room).glob("*.py"))]


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import that runs; those for type checking alone are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def test_there_are_sources_in_every_room() -> None:
    assert {path.parent.name for path in sources()} == set(ARROWS)


@pytest.mark.parametrize("path", sources(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_follow_the_arrows_and_use_the_doors(path: Path) -> None:
    room = path.parent.name
    for level, module in imports(path):
        first = module.split(".")[0]
        assert not (level == 0 and first == "llava_hd"), f"{module}: imports inside are relative"
        if level == 2:
            assert first in ARROWS[room], f"{room} may not import {first}"
        elif level == 0 and first in DOORS:
            doors = DOORS[first] & {room, f"{room}/{path.name}"}
            assert doors, f"{first} is not imported in {room}/{path.name}"


def test_no_root_folder_is_a_regular_package() -> None:
    assert not [str(p) for room in [*ARROWS, "tests"] for p in (ROOT / room).rglob("__init__.py")]


def test_rooms_are_flat() -> None:
    nested = [p for room in ARROWS for p in (ROOT / room).rglob("*.py") if p.parent.name != room]
    assert not nested


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformers_imports_a_model_class_from_the_root() -> None:
    assert "ok" in run("from transformers import LlamaForCausalLM; print('ok')")


@pytest.mark.parametrize("path", WITHOUT_TORCH)
def test_configuration_modules_do_not_import_torch(path: str) -> None:
    module = "llava_hd." + path.removesuffix(".py").replace("/", ".")
    assert "False" in run(f"import sys, {module}; print('torch' in sys.modules)")


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from llava_hd.cli.main import main; main(['--help']); "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert run(code).endswith("False False\n")


def test_no_pickle_and_no_remote_code() -> None:
    for path in sources():
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code" not in text, path
        unsafe = [line for line in text.splitlines() if "torch.load(" in line]
        assert all("weights_only=True" in line for line in unsafe), path
        assert "yaml.load(" not in text, path


def tree_of_readme() -> dict[str, set[str]]:
    """Room -> the files that README's tree names below it."""
    named: dict[str, set[str]] = {}
    room = ""
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if top := re.match(r"(\w+)/ ", line):
            room = top[1]
        elif line.startswith("  ") and room:
            named.setdefault(room, set()).update(re.findall(r"\b(\w+\.py)\b", line))
    return named


def test_readmes_tree_names_every_source_file_and_no_other() -> None:
    tree = tree_of_readme()
    for room in ARROWS:
        assert tree[room] == {path.name for path in sources() if path.parent.name == room}, room
