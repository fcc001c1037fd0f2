"""Tiny models of ours and their exports, for the tests of export and processor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tiny import save_parts, tiny_hd

from llava_hd.hd.grid import HDConfig
from llava_hd.model.assemble import assemble
from llava_hd.model.export import export_folder


def geometry(preset: str) -> tuple[HDConfig, int]:
    """A preset in small, with its tile; "base" is base336 with a tile of 84 px."""
    if preset == "base":
        return replace(tiny_hd("base336"), tile_px=84), 84
    return tiny_hd(preset), 56


def native(folder: Path, preset: str, **options: object) -> Path:
    """A random model folder of ours."""
    hd, tile_px = geometry(preset)
    tied = bool(options.pop("tied", False))
    parts = save_parts(folder.with_name(f"{folder.name}-parts"), image_px=tile_px, tied=tied)
    model, processor = assemble(
        vision=parts / "vision", language=parts / "language", hd=hd, **options
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def exported(folder: Path, out: Path, format: str) -> Path:
    """The export of a model folder."""
    export_folder(folder, out, format)
    return out
