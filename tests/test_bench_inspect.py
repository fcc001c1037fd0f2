"""`llava-hd bench inspect` and `bench tune` as a user calls them."""

import json
from pathlib import Path

import pytest

from llava_hd.cli.main import main
from llava_hd.kernels.backend import ELEMENTWISE, PRODUCTS


def test_inspect_prints_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "inspect", "--arch", "sm_90", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {*PRODUCTS, *ELEMENTWISE} <= {row["name"] for row in rows}
    assert all(row["spills"] == 0 and row["shared"] <= row["shared_limit"] for row in rows)


def test_inspect_refuses_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["bench", "inspect"]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


def test_a_kernel_that_spills_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine's own table with too large a tile for its warps."""
    from llava_hd.kernels.backend import load_shipped, table_path, table_values

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    values = table_values(load_shipped("sm_90"))
    values["hidden_grad"]["blocks"].update(rows=256, cols=256, warps=4)
    path = table_path("sm_90")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(values))
    assert main(["bench", "inspect", "--arch", "sm_90"]) == 1
    assert "hidden_grad for sm_90" in capsys.readouterr().err


def test_tune_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tune"]) == 2
    assert "finds none here" in capsys.readouterr().err


def test_tune_refuses_sizes_below_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tune", "--rows", "0"]) == 2
    assert "1 or more" in capsys.readouterr().err
