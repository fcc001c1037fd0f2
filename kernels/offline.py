"""The kernels compiled for a chip that is not there, and what the machine code looks like.

Triton needs no GPU to compile: given argument types and a target it returns the code of every stage
down to the cubin, and its own `cuobjdump` reads registers, spills and instructions out of that.
What it cannot show: speed, races, wrong values. Not with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import attention_kernels, place_kernels, products
from .backend import Blocks, Table

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024}  # bytes that one program may have
SPILLS = ("STL", "LDL")


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched: types of its arguments, constants, blocks.

    product: it has a tensor-core product. scalars are taken to be multiples of 16, as the widths
    and strides of 7B and 13B are."""

    name: str
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    blocks: Blocks
    product: bool = True


@dataclass(frozen=True)
class Code:
    """What the compiled kernel needs: registers per thread, bytes of stack (more than 0 is a spill)
    and of shared memory, and counts of instructions by name."""

    name: str
    architecture: str
    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]
    ttir: str

    @property
    def spills(self) -> int:
        return sum(self.instructions[name] for name in SPILLS)


COUNTED = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", *SPILLS)


def variants(table: Table, dtype: str = "bf16") -> list[Variant]:
    """Every kernel with the blocks of a table, in the form that training launches it."""
    flat = f"*{dtype}"
    wide = {"PRECISION": "ieee", "EVEN_K": True, "EXACT": dtype == "fp32"}
    found = []
    for name, gelu, scatter in (("up", True, False), ("down", False, True)):
        blocks = table.blocks(name)
        tensors = dict.fromkeys(("x", "w", "bias", "pre", "out"), flat)
        tensors["w"] = _weight_type(blocks, dtype, [blocks.cols, blocks.inner])
        integers = _integers("R N K stride_x stride_w stride_pre stride_out")
        constants = {"GATHER": gelu, "SCATTER": scatter, "GELU": gelu, "SAVE": gelu, **wide}
        arguments = {**tensors, "rows": "*i64", "to": "*i64", **integers}
        kernel = products.linear_rows_kernel
        found.append(Variant(name, kernel, arguments, _tiles(constants, blocks), blocks))
    blocks = table.blocks("hidden_grad")
    arguments = {
        **dict.fromkeys(("dy", "pre", "dh"), flat),
        "w": _weight_type(blocks, dtype, [blocks.inner, blocks.cols]),
        "sums": "*fp32",
        **_integers("R N K stride_dy stride_w stride_pre stride_dh"),
    }
    constants = _tiles({"KEEP_GELU": True, **wide}, blocks)
    kernel = products.hidden_grad_kernel
    found.append(Variant("hidden_grad", kernel, arguments, constants, blocks))
    blocks = table.blocks("weight_grad")
    arguments = {
        "a": _weight_type(blocks, dtype, [blocks.inner, blocks.rows]),
        **dict.fromkeys(("b", "dw"), flat),
        "rows": "*i64",
        "sums": "*fp32",
        **_integers("R M N stride_a stride_b stride_dw"),
    }
    kernel = products.weight_grad_kernel
    for name, gather in (("weight_grad", False), ("weight_grad_gathered", True)):
        chosen = {"GATHER": gather, "SUMS": not gather, "PRECISION": "ieee"}
        found.append(Variant(name, kernel, arguments, _tiles(chosen, blocks), blocks))
    return found + _moving(table, flat, exact=dtype == "fp32") + _attention(table, flat)


def _moving(table: Table, flat: str, exact: bool) -> list[Variant]:
    """The kernels without a product."""
    found = []
    blocks = table.blocks("gelu_grad")
    arguments = {"dg": flat, "pre": flat, "sums": "*fp32"}
    arguments |= _integers("R N stride_dg stride_pre")
    constants = {"KEEP_GELU": True, "EXACT": exact, "BM": blocks.rows, "BN": blocks.cols}
    kernel = products.gelu_grad_kernel
    found.append(Variant("gelu_grad", kernel, arguments, constants, blocks, product=False))
    blocks = table.blocks("place")
    arguments = {"text": flat, "rows": flat, "row_end": flat, "source": "*i64", "out": flat}
    arguments |= _integers("H stride_text stride_rows stride_out")
    constants = {"HAS_END": True, "BLOCK": blocks.cols}
    kernel = place_kernels.place_kernel
    found.append(Variant("place", kernel, arguments, constants, blocks, product=False))
    arguments = {"text": flat, "row_end": flat, "source": "*i64", "to": "*i64", "out": flat}
    arguments |= _integers("H stride_text stride_out")
    kernel = place_kernels.fill_kernel
    found.append(Variant("fill", kernel, arguments, constants, blocks, product=False))
    tables = {"dout": flat, "order": "*i64", "starts": "*i64"}
    arguments = {**tables, "drows": flat, **_integers("H stride_dout stride_drows")}
    constants = {"BLOCK": blocks.cols}
    kernel = place_kernels.rows_grad_kernel
    found.append(Variant("rows_grad", kernel, arguments, constants, blocks, product=False))
    blocks = table.blocks("place_grad")
    arguments = {**tables, "sums": "*fp32", **_integers("H stride_dout")}
    constants = {"CHUNKS": blocks.rows, "BLOCK": blocks.cols}
    kernel = place_kernels.row_end_grad_kernel
    found.append(Variant("place_grad", kernel, arguments, constants, blocks, product=False))
    return found


def _attention(table: Table, flat: str) -> list[Variant]:
    """Causal and full attention at head dimensions 64, 128 and 256, and the tower's."""
    found = []
    kinds = {
        "forward": attention_kernels.forward_kernel,
        "query_grad": attention_kernels.query_grad_kernel,
        "key_grad": attention_kernels.key_grad_kernel,
    }
    for width in (64, 128, 256):
        for kind, kernel in kinds.items():
            for causal in (True, False):
                name = f"attention_{kind}_{width}"
                blocks = table.blocks(name)
                name += "" if causal else "_full"
                found.append(_attention_variant(name, kernel, flat, blocks, width, causal))
    blocks = table.blocks("attention_tower_64")
    kernel = attention_kernels.forward_kernel
    found.append(_attention_variant("attention_tower_64", kernel, flat, blocks, 64, False, True))
    for name, kernel in (
        ("first_query", attention_kernels.first_query_kernel),
        ("delta", attention_kernels.delta_kernel),
    ):
        plain = Blocks(blocks.rows, blocks.cols)
        variant = _attention_variant(f"attention_{name}", kernel, flat, plain, 128, True)
        found.append(replace(variant, product=False))
    return found


def _attention_variant(
    name: str, kernel: Any, flat: str, blocks: Blocks, width: int, causal: bool, tower: bool = False
) -> Variant:
    """Groups of four query heads over a key head, none in the tower."""
    kinds = {
        **dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), flat),
        **dict.fromkeys(("lse", "delta"), "*fp32"),
        **dict.fromkeys(("cu_q", "cu_k", "schedule"), "*i32"),
        **dict.fromkeys(("scale", "scale2"), "fp32"),
    }
    arguments = {}
    for argument in kernel.arg_names:
        if argument in kinds:
            arguments[argument] = kinds[argument]
        elif argument.startswith("stride_") or argument == "T":
            arguments[argument] = "i32"
    constants: dict[str, Any] = {
        "GROUP": 4 if causal else 1,
        "CAUSAL": causal,
        "FIRST_APART": not causal,
    }
    constants |= {"D": width, "FULL_D": True, "BD": width, "PRECISION": None}
    constants |= {"BM": blocks.rows, "BN": blocks.cols}
    return Variant(name, kernel, arguments, constants, blocks)


def _weight_type(blocks: Blocks, dtype: str, shape: list[int]) -> str:
    return f"tensordesc<{dtype}[{shape[0]},{shape[1]}]>" if blocks.tma else f"*{dtype}"


def _integers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "i32")


def _tiles(constants: dict[str, Any], blocks: Blocks) -> dict[str, Any]:
    shape = {"BM": blocks.rows, "BN": blocks.cols, "BK": blocks.inner, "GROUP": blocks.group}
    return {**constants, "TMA": blocks.tma, **shape}


def compile_variant(variant: Variant, architecture: str) -> Code:
    """The machine code of a variant for "sm_80", "sm_90", ...; about two seconds.

    Raises what Triton raises where it does not compile.
    """
    fn = variant.kernel
    signature = {name: variant.arguments.get(name, "constexpr") for name in fn.arg_names}
    constants = {name: variant.constants[name] for name, kind in signature.items()
                 if kind == "constexpr"}  # fmt: skip
    aligned = [name for name, kind in signature.items() if kind[0] in "*i" and name not in "RT"]
    hints = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    kernel = triton.compile(
        ASTSource(fn, signature, constants, hints),
        target=GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32),
        options={"num_warps": variant.blocks.warps, "num_stages": variant.blocks.stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage, text = (_dump(flag, cubin) for flag in ("-res-usage", "-sass"))
    return Code(
        name=variant.name,
        architecture=architecture,
        registers=_number(r"REG:(\d+)", usage),
        stack=_number(r"STACK:(\d+)", usage),
        shared=kernel.metadata.shared,
        instructions={op: len(re.findall(rf"\b{op}\b", text)) for op in COUNTED},
        ttir=kernel.asm["ttir"],
    )


def _dump(flag: str, cubin: Path) -> str:
    return subprocess.run(
        [TOOLS / "cuobjdump", flag, cubin], check=True, capture_output=True, text=True
    ).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"cuobjdump printed no {pattern!r}")
    return int(found[1])


def narrow_strides(code: Code) -> list[str]:
    """The lines in which a stride is used before it was widened to 64 bits; [] is the proof that no
    row's offset can overflow 32 bits."""
    uses = [line.strip() for line in code.ttir.splitlines() if re.search(r"%stride_\w+\b", line)]
    return [line for line in uses if not line.startswith("tt.func") and "arith.extsi" not in line]


def facts(code: Code) -> dict[str, Any]:
    """The figures of a compiled kernel, for printing and JSON."""
    values = asdict(code)
    del values["ttir"]
    return {**values, **values.pop("instructions"), "spills": code.spills}
