"""One data set in every format that is read, written by the formats' own libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds
from torch.utils.data import Dataset
from train_data import write_data

from llava_hd.train.sources import RecordSet

TAG = "<image>\n"
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ROWS_OF_A_GROUP = 5
SHARD_SAMPLES = 7
FORMATS = {
    "json": "data.json",
    "lines": "data.jsonl",
    "messages": "messages.jsonl",
    "parquet names": "names.parquet",
    "parquet bytes": "bytes.parquet",
    "parquet messages": "messages.parquet",
    "tar": "shard-{0000..0001}.tar",
    "tar messages": "talk-{0000..0001}.tar",
}


def image_names(record: dict[str, Any]) -> list[str]:
    names = record.get("image", [])
    return [names] if isinstance(names, str) else names


def as_messages(record: dict[str, Any]) -> dict[str, Any]:
    """A LLaVA record in Hugging Face's form, with typed parts in each user's message."""
    messages = []
    for turn in record["conversations"]:
        if turn["from"] == "gpt":
            messages.append({"role": "assistant", "content": turn["value"]})
            continue
        images = [{"type": "image"}] * turn["value"].count(TAG)
        words = {"type": "text", "text": turn["value"].replace(TAG, "")}
        messages.append({"role": "user", "content": [*images, words]})
    return {"id": record["id"], "messages": messages, "images": image_names(record)}


def write_formats(folder: Path, num_records: int = 12) -> Path:
    """`folder` with the files of FORMATS, and `folder/images`."""
    write_data(folder, num_records)
    records = json.loads((folder / "data.json").read_text())
    talks = [as_messages(record) for record in records]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "messages.jsonl").write_text("".join(json.dumps(t) + "\n" for t in talks))
    write_parquets(folder, records, talks)
    write_shards(folder, "shard", records, [image_names(r) for r in records])
    write_shards(folder, "talk", talks, [t["images"] for t in talks])
    return folder


def write_parquets(folder: Path, records: list[dict], talks: list[dict]) -> None:
    pictures = [[embedded(folder, n) for n in image_names(r)] for r in records]
    # Parquet has one type for a column: there each content is a list of parts.
    for talk in talks:
        for message in talk["messages"]:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
    common = {
        "id": [r["id"] for r in records],
        "conversations": [r["conversations"] for r in records],
    }
    names = [image_names(r) or None for r in records]
    tables = {
        "names": pa.table({**common, "image": names}),
        "bytes": pa.table({**common, "image": pa.array(pictures, pa.list_(STRUCT))}),
        "messages": pa.table(
            {
                "messages": [t["messages"] for t in talks],
                "images": pa.array(
                    [[p["bytes"] for p in c] for c in pictures], pa.list_(pa.binary())
                ),
            }
        ),
    }
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=ROWS_OF_A_GROUP)


def embedded(folder: Path, name: str) -> dict[str, Any]:
    return {"bytes": (folder / "images" / name).read_bytes(), "path": name}


def write_shards(folder: Path, name: str, records: list[dict], images: list[list[str]]) -> None:
    """As WebDataset's own writer lays them out."""
    for start in range(0, len(records), SHARD_SAMPLES):
        with wds.TarWriter(str(folder / f"{name}-{start // SHARD_SAMPLES:04d}.tar")) as shard:
            for number in range(start, min(start + SHARD_SAMPLES, len(records))):
                inside = {k: v for k, v in records[number].items() if k not in ("image", "images")}
                sample = {"__key__": f"{number:06d}", "json": inside}
                for k, image in enumerate(images[number]):
                    suffix = "png" if len(images[number]) == 1 else f"{k}.png"
                    sample[suffix] = (folder / "images" / image).read_bytes()
                shard.write(sample)


class Contents(Dataset):
    """Index -> words and image bytes of a record, for loader processes."""

    def __init__(self, records: RecordSet) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[int, list[str], list[bytes]]:
        record = self.records[index]
        return index, [turn.text for turn in record.turns], contents(self.records, index)


def contents(records: RecordSet, index: int) -> list[bytes]:
    """The bytes of a record's images, wherever they stand."""
    record = records[index]
    found = [records.image(record, k) for k in range(len(record.images))]
    return [one if isinstance(one, bytes) else one.read_bytes() for one in found]
