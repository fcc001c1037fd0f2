"""`llava-hd data check`: every injected fault is found, lengths are those of training."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from tiny import random_image, tiny_hd
from train_data import tiny_config, write_data

from llava_hd.cli.data_check import check_settings
from llava_hd.cli.main import main
from llava_hd.hd.errors import UsageError
from llava_hd.hd.grid import PRESETS
from llava_hd.hd.image import image_size, load_image
from llava_hd.hd.plan import plan_image
from llava_hd.model.assemble import assemble
from llava_hd.train.data_check import Checked, check_data
from llava_hd.train.data_check_report import is_clean, report_of
from llava_hd.train.data_check_tokens import CheckSettings, load_tokenizer
from llava_hd.train.dataset import RecordReader
from llava_hd.train.recipe import config_yaml
from llava_hd.train.records import read_records


def talk(question: str, answer: str = "a mat", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **more}


def settings(parts: Path | None = None, **more: Any) -> CheckSettings:
    tokenizer = None if parts is None else str(parts / "language")
    return CheckSettings(tiny_hd("hdflex"), tokenizer=tokenizer, **more)


def reasons(checked: Checked, kind: str) -> list[tuple[str, str]]:
    return [(fault.where, fault.reason) for fault in checked.faults if fault.kind == kind]


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """One good record, and one fault of each kind: 3 bad images, 3 bad records, 1 bad file."""
    images = tmp_path / "images"
    images.mkdir()
    random_image((60, 90)).save(images / "good.png")
    (images / "cut.png").write_bytes((images / "good.png").read_bytes()[:200])
    (images / "text.jpg").write_text("no image")
    records = [
        talk("<image>\nis the cat in there?", id="r0", image="good.png"),
        talk("<image>\nwhat is it?", id="r1", image="cut.png"),
        talk("<image>\nand now?", id="r2", image="cut.png"),
        talk("<image>\nwhat?", id="r3", image="text.jpg"),
        talk("<image>\nwhere?", id="r4", image="none.png"),
        talk("no tag", id="r5", image="good.png"),
        {"id": "r6", "conversation": []},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    lines = [json.dumps(talk("hello", id="j0")), '{"id": ', json.dumps(talk("hi", id="j2"))]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "broken.json").write_text('[{"id": 1},')
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_every_fault_is_found_and_nothing_stops_at_the_first(bad: Path, workers: int) -> None:
    files = [bad / name for name in ("data.json", "data.jsonl", "broken.json")]
    told: dict[str, tuple[int, int]] = {}

    def done(what: str, count: int, total: int) -> None:
        told[what] = (count, total)

    checked = check_data(files, bad / "images", settings(), workers, done)
    assert told["images"] == (4, 4) and told["records"] == (7, 7)
    assert checked.num_values == 10
    [(where, reason)] = reasons(checked, "file")
    assert where.endswith("broken.json") and "the JSON ends too early" in reason
    assert [(where.rpartition("/")[2], reason) for where, reason in reasons(checked, "record")] == [
        ("data.json: record 5 (id 'r5')", "conversations: 0 <image> tags in the human turns but 1 "
         "images in image; write one tag per image"),
        ("data.json: record 6 (id 'r6')",
         "conversations is missing; it has 'conversation', rename that to 'conversations'"),
        ("data.jsonl", "line 2, column 8: the JSON ends too early; is the file cut off?"),
    ]  # fmt: skip
    found = reasons(checked, "image")
    assert ["r1" in where or "r4" in where or "r3" in where for where, _ in found] == [True] * 3
    assert "2 uses" in found[0][0] and "damaged image" in found[0][1]
    assert "not below" in found[1][1] and "not an image" in found[2][1]
    assert [measured is None for measured in checked.measures] == [
        False, True, True, True, True, False, False
    ]  # fmt: skip


def test_lengths_are_those_of_training(tmp_path: Path, parts: Path) -> None:
    write_data(tmp_path, num_records=8)
    given = settings(parts)
    checked = check_data([tmp_path / "data.json"], tmp_path / "images", given)
    assert is_clean(checked)
    records = read_records([tmp_path / "data.json"])
    _, processor = assemble(
        vision=parts / "vision", language=parts / "language", hd=given.hd, template=given.template
    )
    read = RecordReader(records, tmp_path / "images", processor, None, 10_000)
    for index, (record, found) in enumerate(zip(records, checked.measures, strict=True)):
        assert found is not None and found.reason is None
        assert found.tokens == len(read(index).ids)
        sizes = [image_size(load_image(tmp_path / "images" / name)) for name in record.images]
        assert found.visual == sum(plan_image(size, given.hd).num_tokens for size in sizes)


def test_the_estimate_counts_four_characters_a_token_and_visual_tokens_exactly(
    tmp_path: Path,
) -> None:
    random_image((60, 90)).save(tmp_path / "a.png")
    question, answer = "<image>\n" + "q" * 100, "a" * 60
    (tmp_path / "d.json").write_text(json.dumps([talk(question, answer, image="a.png")]))
    plain = settings(template="plain")
    [found] = check_data([tmp_path / "d.json"], tmp_path, plain).measures
    visual = plan_image((60, 90), plain.hd).num_tokens
    assert found is not None and (found.visual, found.tokens) == (visual, visual + 15)
    [found] = check_data([tmp_path / "d.json"], tmp_path, settings()).measures
    # 155 of the system text, "USER: ", newline and question, "ASSISTANT:", answer.
    characters = 155 + 6 + 101 + 10 + 60
    assert found is not None and found.tokens == visual + -(-characters // 4)


def test_the_limit_tells_cut_samples_from_those_that_cannot_be_trained_on(
    tmp_path: Path, parts: Path
) -> None:
    random_image((60, 90)).save(tmp_path / "a.png")
    records = [
        talk("is it?", "Yes", id=0),
        talk("is it?", "the mat is red " * 200, id=1),  # cut, but something is learned
        talk("the mat is red " * 200, "Yes", id=2),  # the answer is cut off whole
        talk("<image>\nis it?", "Yes", id=3, image="a.png"),
    ]
    (tmp_path / "d.json").write_text(json.dumps(records))
    wide = [talk("<image>\n" * 4 + "is it?", id=4, image=["a.png"] * 4)]  # they do not fit
    (tmp_path / "wide.json").write_text(json.dumps(wide))
    given = settings(parts, max_length=300)
    files = [tmp_path / "d.json", tmp_path / "wide.json"]
    checked = check_data(files, tmp_path, given)
    found = dict(reasons(checked, "sample"))
    assert [where[-len("(id 2)") :] for where in found] == ["(id 2)", "(id 4)"]
    first, second = found.values()
    assert "cuts every answer off" in first and "its visual tokens reach place" in second
    report = report_of(checked, given)
    assert report["limit"] == {"max_length": 300, "cut": 3, "share": 3 / 5}
    assert report["bad_samples"] == 2 and not is_clean(checked)


def test_duplicates_text_and_tiles_are_counted(tmp_path: Path) -> None:
    for name, size in (("a.png", (50, 50)), ("b.png", (50, 50)), ("c.png", (56, 112))):
        random_image(size).save(tmp_path / name)
    records = [
        talk("<image>\nwho?", id="x", image="a.png"),
        talk("who?\n<image>", id="y", image="a.png"),  # the same question, its tag elsewhere
        talk("<image>\nwhat?", id="x", image="a.png"),
        talk("<image>\nwho?", id="z", image="b.png"),
        talk("<image>\nwho?", image="c.png"),
        talk("who?", id="t"),
        talk("who?", id="u"),  # two texts alone are no duplicates
    ]
    (tmp_path / "d.json").write_text(json.dumps(records))
    given = settings()
    report = report_of(check_data([tmp_path / "d.json"], tmp_path, given), given)
    same_id, same_question = report["duplicates"].values()
    assert (same_id["records"], same_id["groups"]) == (1, 1)
    assert [where[-8:] for where in same_id["examples"][0]] == ["(id 'x')"] * 2
    assert (same_question["records"], same_question["groups"]) == (1, 1)
    assert report["text_only"] == {"records": 2, "share": 2 / 7}
    assert report["tiles"] == {"1x1": 2, "1x2": 1}
    assert report["image_width_px"]["max"] == 112 and report["image_height_px"]["min"] == 50


def test_a_tokenizer_that_is_not_there_and_a_limit_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="max_length must be 1 or more"):
        CheckSettings(PRESETS["hdflex"], max_length=0)


# --- the command -------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["data", "check", *(str(word) for word in words)])
    done = capsys.readouterr()
    return code, done.out, done.err


def test_a_clean_data_set_gives_a_report_and_code_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path)
    words = [tmp_path / "data.json", "--images", tmp_path / "images", "--workers", 0]
    words += ["--out", tmp_path / "out", "--tokenizer", "shipped:lm", "--max-length", 4096]
    code, printed, _ = run(capsys, *words)
    assert code == 0
    assert "12 records" in printed and "nothing is bad" in printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.json", "report.html", "token_lengths.png"}
    assert image_size(load_image(tmp_path / "out" / "token_lengths.png"))[1] > 500
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/png" in page and "counted by the tokenizer" in page
    assert not re.search(r"<script|(src|href|url\()\W*https?:|@import", page)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["records"], report["faults"], report["tokens_are"]) == (12, [], "exact")
    assert sum(report["tiles"].values()) == report["images"]


def test_a_bad_data_set_gives_a_report_and_code_3(
    bad: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [bad / "data.json", bad / "data.jsonl", bad / "broken.json"]
    words = [*files, "--images", bad / "images", "--out", bad / "out", "--workers", 0]
    code, printed, _ = run(capsys, *words)
    assert (code, "7 faults" in printed) == (3, True)
    assert "cut.png: damaged image" in printed and "estimated" in printed
    code, printed, _ = run(capsys, *words, "--json")
    report = json.loads(printed)
    kinds = [fault["kind"] for fault in report["faults"]]
    assert code == 3 and sorted(kinds) == ["file"] + ["image"] * 3 + ["record"] * 3
    assert report == json.loads((bad / "out" / "report.json").read_text())
    page = (bad / "out" / "report.html").read_text()
    assert "none.png" in page and "no tokenizer was given" in page


def test_nothing_but_faults_is_a_report_as_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d.json").write_text("[1]")
    words = [tmp_path / "d.json", "--images", tmp_path, "--out", tmp_path / "o", "--workers", 0]
    code, printed, _ = run(capsys, *words)
    assert (code, "is a number, not an object" in printed) == (3, True)
    assert (tmp_path / "o" / "report.html").is_file()


def test_a_recipe_gives_geometry_limit_template_and_tokenizer(tmp_path: Path, parts: Path) -> None:
    def options(**given: Any) -> Namespace:
        names = ("recipe", "preset", "tokenizer", "max_length")
        return Namespace(**{name: given.get(name) for name in names})

    data = write_data(tmp_path)
    config = tiny_config(data, parts, tmp_path / "run", stage="pretrain", max_length=777)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config_yaml(config))
    found = check_settings(options(recipe=str(recipe)))
    expected = settings(parts, max_length=777, template="plain")
    assert found == expected
    assert check_settings(options(recipe=str(recipe), max_length=5)).max_length == 5
    assert check_settings(options()) == CheckSettings(PRESETS["hdflex"])
    shipped = check_settings(options(recipe="vicuna-7b-hd448", tokenizer="shipped:lm"))
    assert (shipped.hd, shipped.max_length) == (PRESETS["hd448"], 4096)
    assert str(shipped.tokenizer).endswith("shipped/lm")
    with pytest.raises(UsageError, match="--preset has no place"):
        check_settings(options(recipe="vicuna-7b-hd448", preset="hd448"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{d}"], "--images is missing"),
        (["none.json", "--images", "{i}"], "none.json: no such file"),
        (["{d}", "--images", "none"], "--images none is not a folder"),
        (["{d}", "--images", "{i}", "--preset", "hd44"], "did you mean 'hd448'"),
        (["{d}", "--images", "{i}", "--workers", "-1"], "--workers"),
        (["{d}", "--images", "{i}", "--recipe", "vicuna-7b-hd449"], "did you mean"),
        (["{d}", "--images", "{i}", "--tokenizer", "none"], "none is not a folder"),
        (["{d}", "--images", "{i}", "--out", "{d}"], "is a file"),
    ],
)
def test_bad_usage_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write_data(tmp_path, num_records=2)
    monkeypatch.chdir(tmp_path)
    given = {"{d}": "data.json", "{i}": "images"}
    code, out, err = run(capsys, *(given.get(word, word) for word in words))
    [line] = [line for line in err.splitlines() if line.strip()]
    assert (code, out) == (2, "") and said in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "images"]


def test_ctrl_c_writes_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path, num_records=4)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_hd.train.data_check._measure_records", interrupted)
    words = [tmp_path / "data.json", "--images", tmp_path / "images", "--out", tmp_path / "o"]
    code, _, err = run(capsys, *words, "--workers", 1)
    assert (code, "no report was written" in err) == (75, True)
    assert not (tmp_path / "o").exists()
