"""Which path is chosen, and the tables of block sizes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_checks import only_some

from llava_hd.kernels import backend
from llava_hd.kernels.backend import (
    OPERATIONS,
    PRODUCTS,
    SHIPPED,
    SWITCH,
    architecture,
    choose,
    everywhere,
    load_shipped,
    load_table,
    parse_table,
    table_path,
    table_values,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv(SWITCH, raising=False)
    backend._table_for.cache_clear()


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, minor))
    return torch.device("cuda", 0)


def test_a_cpu_takes_torch_and_says_why() -> None:
    choice = choose("gelu_mlp", CPU, torch.float32, 100_000)
    assert choice.path == "torch" and "cpu" in choice.reason


def test_a_gpu_takes_triton_from_the_tables_first_row_on(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    gpu = on_a_gpu(monkeypatch, 9, 0)
    table = only_some(load_shipped("sm_90"), gelu_mlp=2048)
    monkeypatch.setattr(backend, "load_table", lambda name: table)
    few, many = (choose("gelu_mlp", gpu, torch.bfloat16, n) for n in (2047, 2048))
    assert few.path == "torch" and "2048" in few.reason
    assert many.path == "triton" and many.table == table


def test_shipped_tables_use_nothing_that_was_not_measured(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    gpu = on_a_gpu(monkeypatch, 9, 0)
    for name in ("sm_80", "sm_90"):
        table = load_shipped(name)
        used = [op for op in OPERATIONS if table.entries[op].from_rows is not None]
        assert not used or table.measured
    for operation in OPERATIONS:
        choice = choose(operation, gpu, torch.bfloat16, 10**6)
        assert choice.path == "torch" and "bench tune" in choice.reason
    assert "does not measure" in choose("attention_other", gpu, torch.bfloat16, 10**6).reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_types_that_the_kernels_do_not_serve_take_torch(monkeypatch, dtype) -> None:  # type: ignore[no-untyped-def]
    gpu = on_a_gpu(monkeypatch, 8, 0)
    choice = choose("gelu_mlp", gpu, dtype, 10_000)
    assert choice.path == "torch" and str(dtype) in choice.reason


def test_fp32_on_a_gpu_takes_the_librarys_products(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv(SWITCH, "triton")
    gpu = on_a_gpu(monkeypatch, 9, 0)
    wide, half = (choose("gelu_mlp", gpu, t, 10_000).table for t in (torch.float32, torch.float16))
    assert wide is not None and half is not None
    for name in PRODUCTS:
        assert not wide.uses(name, 10_000) and half.uses(name, 10_000)
    assert wide.uses("gelu_grad", 1)


def test_no_rows_take_torch(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv(SWITCH, "triton")
    assert choose("gelu_mlp", on_a_gpu(monkeypatch, 9, 0), torch.bfloat16, 0).path == "torch"


def test_the_switch_turns_every_kernel_off_and_on(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    gpu = on_a_gpu(monkeypatch, 9, 0)
    monkeypatch.setenv(SWITCH, "torch")
    assert choose("place_rows", gpu, torch.bfloat16, 10_000).path == "torch"
    monkeypatch.setenv(SWITCH, "triton")
    table = choose("place_rows", gpu, torch.bfloat16, 1).table
    assert table is not None and all(table.uses(name, 1) for name in (*OPERATIONS, *PRODUCTS))
    monkeypatch.setenv(SWITCH, "cuda")
    with pytest.raises(ValueError, match="give torch or triton"):
        choose("place_rows", gpu, torch.bfloat16, 1)


def test_a_missing_triton_is_said_with_the_remedy(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    choice = choose("gelu_mlp", on_a_gpu(monkeypatch, 9, 0), torch.bfloat16, 10_000)
    assert choice.path == "torch" and "pip install" in choice.reason


@pytest.mark.parametrize(
    ("capability", "name"),
    [((7, 5), None), ((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_90"),
     ((12, 0), "sm_80")],
)  # fmt: skip
def test_every_capability_has_a_table_or_none(capability, name) -> None:  # type: ignore[no-untyped-def]
    assert architecture(*capability) == name
    assert name is None or (SHIPPED / f"{name}.json").is_file()


def test_an_old_gpu_takes_torch(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    choice = choose("gelu_mlp", on_a_gpu(monkeypatch, 7, 0), torch.float16, 10_000)
    assert choice.path == "torch" and "7.0" in choice.reason


def test_a_table_survives_its_file() -> None:
    for path in SHIPPED.glob("*.json"):
        table = load_table(path.stem)
        again = parse_table(json.loads(json.dumps(table_values(table))), table.path)
        assert again == table and table.architecture == path.stem


def test_a_machines_own_table_is_read_before_the_shipped_one(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    own = replace(everywhere(load_table("sm_90")), measured="here")
    path = table_path("sm_90")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(table_values(own)))
    choice = choose("gelu_mlp", on_a_gpu(monkeypatch, 9, 0), torch.bfloat16, 1)
    assert choice.path == "triton" and "measured: here" in choice.reason


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "Expecting"), ("{}", "gelu_mlp"), ('{"gelu_mlp": {"from_rows": -1}}', "from_rows")],
)
def test_a_broken_table_is_named_with_the_remedy(text: str, message: str) -> None:
    path = table_path("sm_80")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match="bench tune") as caught:
        load_table("sm_80")
    assert str(path) in str(caught.value) and message in str(caught.value)
