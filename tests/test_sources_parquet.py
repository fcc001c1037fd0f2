"""Parquet files: row groups read one by one, and every fault with file, row, column and remedy."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import STRUCT, contents
from tiny import random_image

from llava_hd.hd.errors import DataError, UsageError
from llava_hd.hd.grid import PRESETS
from llava_hd.hd.image import png_bytes
from llava_hd.train import sources_parquet
from llava_hd.train.data_check import check_data
from llava_hd.train.data_check_tokens import CheckSettings
from llava_hd.train.record import BadRecord
from llava_hd.train.sources import RecordSet, check_images, open_records
from llava_hd.train.sources_base import open_image

WORDS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A mat"}]
PLAIN = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


def write(path: Path, columns: dict[str, Any], rows_of_a_group: int = 2) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=rows_of_a_group)
    return path


def images(*cells: Any) -> pa.Array:
    return pa.array(cells, STRUCT)


def opened(path: Path, root: Path | None = None) -> RecordSet:
    return open_records([path], root)


def test_only_the_row_groups_that_are_asked_for_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [bytes([i]) * 1000 for i in range(10)]
    cells = images(*({"bytes": one, "path": f"{i}.png"} for i, one in enumerate(data)))
    records = opened(write(tmp_path / "a.parquet", {"conversations": [WORDS] * 10, "image": cells}))
    [source] = records.sources
    read: list[tuple[int, bool]] = []
    inner = sources_parquet._read

    def noted(reader: Any, path: Path, group: int, leaves: tuple[str, ...]) -> Any:
        read.append((group, "image.bytes" in leaves))
        return inner(reader, path, group, leaves)

    monkeypatch.setattr(sources_parquet, "_read", noted)
    assert contents(records, 7) == [data[7]] and contents(records, 6) == [data[6]]
    assert read == [(3, False), (3, True)]  # words and names, then bytes; once for both rows
    read.clear()
    assert [record.images for record in records] == [(f"{i}.png",) for i in range(10)]
    assert read == [(group, False) for group in (0, 1, 2, 4)]
    monkeypatch.setattr(sources_parquet, "KEPT_BYTES", 3000)
    assert [contents(records, i) for i in range(10)] == [[one] for one in data]
    assert sum(table.nbytes for table in source.groups._tables.values()) <= 3000


def test_bytes_may_be_missing_where_a_path_names_a_file(tmp_path: Path) -> None:
    picture = png_bytes(random_image((20, 30)))
    (tmp_path / "b.png").write_bytes(picture)
    cells = images(
        {"bytes": picture, "path": None},
        {"bytes": None, "path": "b.png"},
        {"bytes": None, "path": "/etc/passwd"},
        {"bytes": None, "path": None},
        {"bytes": b"no image", "path": "/home/me/c.png"},
    )
    path = write(tmp_path / "a.parquet", {"conversations": [WORDS] * 5, "image": cells})
    records = opened(path, tmp_path)
    assert check_images(records) == 5
    assert contents(records, 0) == contents(records, 1) == [picture]
    for row, reason in ((2, "is an absolute path"), (3, r"image\[0\] holds neither bytes nor")):
        with pytest.raises(DataError, match=reason):
            records.image(records[row], 0)
    with pytest.raises(DataError, match=r"image\[0\]: not an image"):
        open_image(records.locate(records[4], 0))
    assert [records[row].images for row in (0, 1, 4)] == [("row0-0",), ("b.png",), ("row4-0",)]


def test_a_column_may_be_missing_or_null(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"conversations": [PLAIN] * 3, "id": [1, None, 3]})
    assert [record.id for record in opened(path)] == [1, None, 3]
    cells = images(None, {"bytes": b"x", "path": None}, None)
    path = write(tmp_path / "b.parquet", {"conversations": [PLAIN, WORDS, PLAIN], "image": cells})
    records = opened(path)
    assert [records.has_image(i) for i in range(3)] == [False, True, False]
    assert check_images(records) == 1


COLUMNS = {
    "no conversation": (
        {"text": ["a"]},
        "no column conversations or messages among text",
        "rename",
    ),
    "a misspelt one": ({"conversation": [PLAIN]}, "no column", "did you mean 'conversation'"),
    "both": ({"conversations": [PLAIN], "messages": ["a"]}, "conversations and messages", "one of"),
    "images as numbers": (
        {"conversations": [PLAIN], "image": [3]},
        "column image is int64",
        "give names, bytes, or objects with bytes and path",
    ),
    "no row": ({"conversations": pa.array([], pa.string())}, "holds no row", "at least one"),
}


@pytest.mark.parametrize("fault", COLUMNS)
def test_a_schema_that_does_not_fit_names_the_column(tmp_path: Path, fault: str) -> None:
    columns, reason, remedy = COLUMNS[fault]
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError) as caught:
        opened(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and reason in message and remedy in message


ROWS = {
    "text for turns": ({"conversations": ["a", "b"]}, "conversations is text", "list of turns"),
    "other keys": (
        {"conversations": [[{"role": "a", "value": "b"}]] * 2},
        "conversations[0].from is missing",
        "add it",
    ),
    "a null turn": (
        {"conversations": [[{"from": "human", "value": None}]] * 2},
        "conversations[0].value is null",
        "give text",
    ),
    "a null row": ({"conversations": pa.array([PLAIN, None])}, "conversations is missing", "add"),
    "a tag too few": (
        {"conversations": [PLAIN] * 2, "image": ["a.png"] * 2},
        "0 <image> tags in the human turns but 1 images in image",
        "one tag per image",
    ),
    "a null image": (
        {"conversations": [PLAIN] * 2, "image": pa.array([[], [None]], pa.list_(STRUCT))},
        "image[0] is null",
        "give the image",
    ),
    "a hostile name": (
        {"conversations": [WORDS] * 2, "image": ["../../a.png"] * 2},
        "image '../../a.png' leaves the image folder",
        "below",
    ),
    "a wrong role": (
        {"messages": [[{"role": "tool", "content": "a"}]] * 2},
        "messages[0].role 'tool'",
        "'user'",
    ),
    "a wrong id": ({"id": [1.5, 2.5], "conversations": [PLAIN] * 2}, "id is a fraction", "text"),
}


@pytest.mark.parametrize("fault", ROWS)
def test_a_bad_row_is_named_with_column_and_remedy(tmp_path: Path, fault: str) -> None:
    columns, reason, remedy = ROWS[fault]
    path = write(tmp_path / "a.parquet", columns)
    records = opened(path, tmp_path)
    with pytest.raises(BadRecord) as caught:
        records[1]
    message = str(caught.value)
    assert message.startswith(f"{path}: row 1") and "\n" not in message
    assert reason in message and remedy in message


def test_damage_is_named_with_the_row_group(tmp_path: Path) -> None:
    words = [[{"from": "human", "value": f"{i}" * 300}, PLAIN[1]] for i in range(6)]
    table = pa.table({"conversations": words})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=2, compression="none", write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[data.index(b"2" * 300) + 50] ^= 1  # one bit of the second row group
    path.write_bytes(data)
    records = opened(path)
    assert records[0].turns[0].text == "0" * 300 and records[5].turns[0].text == "5" * 300
    with pytest.raises(BadRecord, match=r"row 2: row group 1 cannot be read .*fetch the file"):
        records[2]
    checked = check_data([path], None, CheckSettings(PRESETS["hdflex"]))
    assert [fault.kind for fault in checked.faults] == ["record", "record"]
    path.write_bytes(data[:-30])
    with pytest.raises(DataError, match="not a Parquet file, or a damaged one"):
        opened(path)


def test_a_file_that_changes_during_a_run_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"conversations": [PLAIN] * 4})
    records = pickle.loads(pickle.dumps(opened(path)))
    write(path, {"conversations": [PLAIN] * 5})
    with pytest.raises(DataError, match="was changed after it was opened"):
        records[0]


def test_a_row_group_too_large_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet", {"conversations": [PLAIN] * 4}, rows_of_a_group=4)
    monkeypatch.setattr(sources_parquet, "MAX_GROUP_BYTES", 100)
    with pytest.raises(BadRecord, match=r"row group 0 has \d+ bytes.*row_group_size"):
        opened(path)[0]


def test_without_pyarrow_one_line_tells_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet", {"conversations": [PLAIN]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'llava-hd\[data\]'"):
        opened(path)


def test_many_files_share_one_memory_and_few_stay_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = images(*({"bytes": bytes([i]) * 1000, "path": None} for i in range(4)))
    for number in range(5):
        write(tmp_path / f"{number}.parquet", {"conversations": [WORDS] * 4, "image": cells})
    monkeypatch.setattr(sources_parquet, "KEPT_BYTES", 5000)
    monkeypatch.setattr(sources_parquet, "OPEN_FILES", 2)
    records = open_records([tmp_path / "{0..4}.parquet"], None)
    assert [contents(records, i) for i in range(20)] == [[bytes([i % 4]) * 1000] for i in range(20)]
    [groups] = {source.groups for source in records.sources}
    assert sum(table.nbytes for table in groups._tables.values()) <= 5000
    assert len(groups._readers) == 2
    copied = pickle.loads(pickle.dumps(records))
    assert len({source.groups for source in copied.sources}) == 1
    assert contents(copied, 7) == contents(records, 7)
