"""The shipped block sizes compiled for chips that are not here."""

import re
from dataclasses import replace

import pytest
import triton
import triton.language as tl

from llava_hd.kernels.backend import PRODUCTS, SHIPPED, Blocks, load_table
from llava_hd.kernels.offline import (
    SHARED_LIMIT,
    Variant,
    compile_variant,
    facts,
    narrow_strides,
    variants,
)

ARCHITECTURES = sorted(path.stem for path in SHIPPED.glob("*.json"))
CASES = [
    (architecture, dtype, variant.name)
    for architecture in ARCHITECTURES
    for dtype in ("bf16", "fp16")
    for variant in variants(load_table(architecture), dtype)
    if dtype == "bf16" or variant.name in (*PRODUCTS, "attention_forward_128")
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))  # a machine's own table is not shipped


def test_there_is_a_table_for_hopper_and_for_ampere() -> None:
    assert ARCHITECTURES == ["sm_80", "sm_90"]


@pytest.mark.parametrize(("architecture", "dtype", "name"), CASES)
def test_shipped_blocks_compile_fit_and_spill_nothing(
    architecture: str, dtype: str, name: str
) -> None:
    table = load_table(architecture)
    (variant,) = [v for v in variants(table, dtype) if v.name == name]
    code = compile_variant(variant, architecture)
    assert code.spills == 0 and code.stack == 0, facts(code)
    assert 0 < code.registers <= 255
    assert code.shared <= SHARED_LIMIT[architecture]
    assert narrow_strides(code) == []
    if variant.product:
        instruction = "HGMMA" if architecture == "sm_90" else "HMMA"
        assert code.instructions[instruction] > 0
        if variant.blocks.stages > 1:  # loads run ahead of the products
            assert code.instructions["LDGSTS"] > 0
        assert (code.instructions["UTMALDG"] > 0) == variant.blocks.tma


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_also_compile_without_tensor_descriptors(name: str) -> None:
    """What a matrix that is not aligned takes on Hopper."""
    table = load_table("sm_90")
    entries = {
        product: replace(table.entries[product], blocks=replace(table.blocks(product), tma=False))
        for product in PRODUCTS
    }
    table = replace(table, entries={**table.entries, **entries})
    (variant,) = [v for v in variants(table) if v.name == name]
    code = compile_variant(variant, "sm_90")
    assert code.spills == 0 and code.shared <= SHARED_LIMIT["sm_90"]
    assert code.instructions["UTMALDG"] == 0 < code.instructions["LDGSTS"]


def test_every_launched_form_is_compiled() -> None:
    """The two uses of weight_grad, and attention causal and full."""
    names = {variant.name for variant in variants(load_table("sm_80"))}
    assert {"weight_grad", "weight_grad_gathered"} <= names
    for kind in ("forward", "query_grad", "key_grad"):
        for width in (64, 128, 256):
            assert {f"attention_{kind}_{width}", f"attention_{kind}_{width}_full"} <= names


@triton.jit
def narrow_kernel(x, out, stride_x, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    tl.store(out + row.to(tl.int64) * stride_x + c, tl.load(x + row * stride_x + c))


@triton.jit
def spilling_kernel(x, out, stride_x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    square = tl.load(x + i[:, None] * stride_x.to(tl.int64) + i[None, :])
    first = tl.dot(square, square)  # two sums in fp32 are more than a thread's registers hold
    second = first
    for _ in range(3):
        second = tl.dot(square, first.to(tl.bfloat16), second)
        first = tl.dot(square, second.to(tl.bfloat16), first)
    tl.store(out + i[:, None] * stride_x.to(tl.int64) + i[None, :], first + second)


@pytest.mark.parametrize(
    ("kernel", "block", "narrow", "spills"),
    [(narrow_kernel, 64, True, False), (spilling_kernel, 128, False, True)],
)
def test_the_checks_see_what_they_look_for(kernel, block, narrow, spills) -> None:  # type: ignore[no-untyped-def]
    arguments = {"x": "*bf16", "out": "*bf16", "stride_x": "i32"}
    variant = Variant("probe", kernel, arguments, {"BLOCK": block}, Blocks(block, block))
    code = compile_variant(variant, "sm_90")
    assert bool(narrow_strides(code)) == narrow
    assert (code.spills > 0) == spills


def test_the_fused_kernels_hold_their_gelu() -> None:
    """A dead epilogue would also spill nothing: exponentials and a division must be there."""
    for variant in variants(load_table("sm_90")):
        if variant.name in ("up", "hidden_grad", "gelu_grad"):
            ttir = compile_variant(variant, "sm_90").ttir
            assert re.search(r"math\.exp", ttir), variant.name
