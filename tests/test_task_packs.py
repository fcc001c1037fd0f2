"""`llava-hd eval pack`: every benchmark's files to a pack, what is in it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import WRITERS, write_json, write_lines

from llava_hd.bench.pack_kinds import KINDS
from llava_hd.bench.task_packs import write_pack
from llava_hd.cli.main import main
from llava_hd.hd.errors import DataError, UsageError

TASKS = {
    "pope": {f"pope_{split}": 18 for split in ("random", "popular", "adversarial")},
    "mme": {"mme": 4},
    "gqa": {"gqa": 1},
    "vqav2": {"vqav2_val": 1},
    "textvqa": {"textvqa_val": 1},
    "vizwiz": {"vizwiz_vqa_val": 1},
    "scienceqa": {"scienceqa": 2, "scienceqa_img": 1},
    "mmbench": {"mmbench_en_dev": 2},
    "mmbench_cn": {"mmbench_cn_dev": 2},
    "seedbench": {"seedbench": 1, "seedbench_ppl": 1},
    "llava_in_the_wild": {"llava_in_the_wild": 1},
    "mmvet": {"mmvet": 1},
    "choices": {"choices": 3, "choices_ppl": 3},
}


def rows(pack: Path, task: str) -> list[dict[str, Any]]:
    lines = (pack / f"{task}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_holds_the_questions_and_the_images_that_they_name(
    kind: str, tmp_path: Path
) -> None:
    annotations, images = WRITERS[kind](tmp_path / "source")
    summary = write_pack(kind, annotations, images, tmp_path / "pack")
    assert summary.tasks == {f"llava_hd_{name}": count for name, count in TASKS[kind].items()}
    named = set()
    for task, count in TASKS[kind].items():
        found = rows(tmp_path / "pack", task)
        assert len(found) == count
        named |= {name for row in found for name in row["images"]}
        yaml = (tmp_path / "pack" / f"{task}.yaml").read_text()
        assert f"task: llava_hd_{task}\n" in yaml and f"test: {task}.jsonl\n" in yaml
    written = [path for path in (tmp_path / "pack" / "images").rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path / "pack" / "images").as_posix() for path in written} == named
    assert summary.images == len(named)
    assert summary.image_bytes == sum(path.stat().st_size for path in written)
    assert str(tmp_path) not in "".join(
        path.read_text() for path in (tmp_path / "pack").glob("*.*")
    )


def test_fields_are_those_of_lmms_evals_tasks(tmp_path: Path) -> None:
    def packed(kind: str) -> list[dict[str, Any]]:
        annotations, images = WRITERS[kind](tmp_path / kind)
        write_pack(kind, annotations, images, tmp_path / "packs" / kind)
        return rows(tmp_path / "packs" / kind, next(iter(TASKS[kind])))

    assert packed("pope")[1] == {
        "question_id": "2",
        "question": "Is there a random boat in the image?",
        "answer": "no",
        "category": "random",
        "images": ["photo_0.png"],
    }
    assert [row["answer"] for row in packed("mme")] == ["Yes", "No"] * 2
    assert packed("scienceqa")[1]["images"] == []
    two = packed("mmbench")
    assert two[0]["images"] == two[1]["images"] == ["1.jpg"]  # the second names the first's image
    assert two[0]["hint"] == "nan" and two[0]["C"] == "nan" and two[1]["L2-category"] == "coarse"
    assert packed("mmvet")[0]["capability"] == "ocr,math"
    assert packed("vizwiz")[0]["answers"] == ["unanswerable"] * 10
    assert [row["answer"] for row in packed("choices")] == [0, 1, 2]


def test_a_limit_holds_for_each_split(tmp_path: Path) -> None:
    annotations, images = WRITERS["pope"](tmp_path / "source")
    summary = write_pack("pope", annotations, images, tmp_path / "pack", limit=2)
    assert set(summary.tasks.values()) == {2} and summary.images == 1


def test_nothing_is_written_when_something_is_wrong(tmp_path: Path) -> None:
    annotations, images = WRITERS["pope"](tmp_path / "source")
    assert images is not None
    out = tmp_path / "pack"
    (images / "photo_2.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"coco_pope_random\.json:13: .*photo_2\.png: not an image"):
        write_pack("pope", annotations, images, out)
    (images / "photo_2.png").unlink()
    with pytest.raises(DataError, match=r"photo_2\.png: no such image; check --images"):
        write_pack("pope", annotations, images, out)
    with pytest.raises(UsageError, match="--images DIR is missing"):
        write_pack("pope", annotations, None, out)
    with pytest.raises(UsageError, match=r"none\.json: no such file"):
        write_pack("gqa", [tmp_path / "none.json"], images, out)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(UsageError, match="not empty"):
        write_pack("pope", annotations, images, out)


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "a/../../b.png", "C:\\a.png", ""])
def test_an_image_outside_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    row = {"question_id": 1, "question": "?", "choices": ["a"], "answer": 0, "image": name}
    (tmp_path / "images").mkdir()
    (tmp_path / "a.png").touch()
    file = write_lines(tmp_path / "q.jsonl", [row])
    if name == "":
        write_pack("choices", [file], tmp_path / "images", tmp_path / "pack")  # text alone
        return
    with pytest.raises(DataError, match=r"q\.jsonl: line 1: image"):
        write_pack("choices", [file], tmp_path / "images", tmp_path / "pack")


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("gqa", [], "is a list, not an object of records"),
        ("gqa", {"1": {"question": "?"}}, "record '1': answer is missing"),
        ("gqa", {"1": 7}, "record '1': is a whole number, not an object"),
        ("gqa", {}, "no questions of gqa"),
        ("textvqa", {"rows": []}, "data is missing"),
        ("vizwiz", {}, "is an object, not a list"),
        ("seedbench", {"questions": [7]}, r"questions\[0\]: is a whole number"),
        ("vqav2", {"annotations": [{"question_id": 1}]}, "0 questions and 1 annotations"),
    ],
)
def test_files_of_another_kind_are_named(
    kind: str, value: Any, message: str, tmp_path: Path
) -> None:
    file = write_json(tmp_path / "file.json", value)
    with pytest.raises(DataError, match=message) as caught:
        write_pack(kind, [file], tmp_path, tmp_path / "pack")
    assert kind == "vqav2" or "file.json" in str(caught.value)


WRONG: tuple[Any, ...] = (None, 7, True, "x", "", [7], {"a": 1})


def changed(value: Any) -> Iterator[Any]:
    """The value with each of its parts exchanged for something else, one at a time."""
    yield from WRONG
    if isinstance(value, dict):
        for name, part in value.items():
            yield {key: x for key, x in value.items() if key != name}
            yield from ({**value, name: other} for other in changed(part))
    elif isinstance(value, list) and value:
        yield from ([other, *value[1:]] for other in changed(value[0]))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("mme", "pope")])
def test_a_damaged_file_is_an_error_in_one_line_or_a_pack_of_texts(
    kind: str, tmp_path: Path
) -> None:
    annotations, _ = WRITERS[kind](tmp_path / "source")
    refused = 0
    for file in [p for a in annotations for p in (a.iterdir() if a.is_dir() else [a])]:
        whole = file.read_text(encoding="utf-8")
        for text in damaged(file, whole):
            file.write_text(text, encoding="utf-8")
            try:
                documents = KINDS[kind].read(annotations)
            except (DataError, UsageError) as error:
                refused += 1
                assert "\n" not in str(error) and str(file.parent) in str(error), str(error)
            else:
                assert all(isinstance(d.fields["question"], str) for d in documents)
                assert all(isinstance(p.name, str) for d in documents for p in d.pictures)
        file.write_text(whole, encoding="utf-8")
    assert refused > 20


def damaged(file: Path, whole: str) -> Iterator[str]:
    """Texts of a file with something else in one place."""
    if file.suffix == ".json":
        yield from map(json.dumps, changed(json.loads(whole)))
    elif file.suffix == ".jsonl":
        first, _, rest = whole.partition("\n")
        yield from (f"{json.dumps(other)}\n{rest}" for other in changed(json.loads(first)))
    else:
        rows = [line.split("\t") for line in whole.splitlines()]
        for place in range(len(rows[1])):
            for other in ("", "x", "1\t2", '"'):
                row = [other if n == place else cell for n, cell in enumerate(rows[1])]
                yield "\n".join("\t".join(cells) for cells in [rows[0], row, *rows[2:]])
            yield "\n".join("\t".join(c for n, c in enumerate(r) if n != place) for r in rows)
            yield "\n".join("\t".join(cells) for cells in [*rows[:-1], rows[-1][:place]])


@pytest.mark.parametrize("kind", ["textvqa", "vizwiz", "seedbench", "choices", "mmbench", "vqav2"])
def test_a_question_that_stands_twice_is_refused(kind: str, tmp_path: Path) -> None:
    annotations, images = WRITERS[kind](tmp_path / "source")
    text = annotations[0].read_text(encoding="utf-8")
    if annotations[0].suffix == ".json":
        value = json.loads(text)
        rows = (
            value
            if isinstance(value, list)
            else value["data" if kind == "textvqa" else "questions"]
        )
        rows.append(rows[0])
        text = json.dumps(value)
    else:
        text += text.splitlines(keepends=True)[1]
    annotations[0].write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="stands twice"):
        write_pack(kind, annotations, images, tmp_path / "pack")


def test_a_tables_text_may_hold_every_kind_of_line_break(tmp_path: Path) -> None:
    annotations, images = WRITERS["mmbench"](tmp_path / "source")
    text = annotations[0].read_text(encoding="utf-8")
    annotations[0].write_text(
        text.replace("What?", "What\u2028\x85is?").replace("Where?", '"Where\nis it?"'), "utf-8"
    )
    write_pack("mmbench", annotations, images, tmp_path / "pack")
    found = [row["question"] for row in rows(tmp_path / "pack", "mmbench_en_dev")]
    assert found == ["What\u2028\x85is?", "Where\nis it?"]


def test_the_command_tells_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations, images = WRITERS["choices"](tmp_path / "source")
    words = ["eval", "pack", "choices", "--annotations", *map(str, annotations)]
    words += ["--images", str(images)]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    assert "llava_hd_choices: 3 questions" in shown and "--include_path" in shown
    assert main([*words, "--out", str(tmp_path / "b"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tasks"] == {"llava_hd_choices": 3, "llava_hd_choices_ppl": 3}
    assert main(["eval", "pack", "popo", *words[3:], "--out", str(tmp_path / "c")]) == 2
    assert "did you mean 'pope'" in capsys.readouterr().err
