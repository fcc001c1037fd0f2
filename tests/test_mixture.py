"""The whole mixture: the same for the same seed, nested fractions, counts, recipes, the command."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from mixture_files import GQA, write_annotations, write_recipe
from tiny import random_image
from train_data import tiny_config

from llava_hd.cli.main import main
from llava_hd.hd.errors import UsageError
from llava_hd.hd.grid import PRESETS
from llava_hd.train.data_check import check_data
from llava_hd.train.data_check_report import is_clean, report_of
from llava_hd.train.data_check_tokens import CheckSettings
from llava_hd.train.mixture import sample, summary_path, write_mixture
from llava_hd.train.mixture_fields import Conversation
from llava_hd.train.mixture_kinds import KINDS, PAPER, RELEASED
from llava_hd.train.mixture_recipe import (
    Source,
    load_mixture,
    mixture_from,
    mixture_names,
)
from llava_hd.train.records import check_images, read_records
from llava_hd.train.run import train

COUNTS = {
    "llava_instruct": 2,
    "sharegpt": 2,
    "vqav2": 2,
    "gqa": 2,
    "okvqa": 2,
    "ocrvqa": 2,
    "aokvqa": 3,
    "textcaps": 2,
    "refcoco": 2,
    "vg": 1,
}


def build(folder: Path, name: str = "mix.json", **head: Any) -> bytes:
    sources = write_annotations(folder / "in")
    write_mixture(mixture_from({"sources": sources, **head}), folder / "in", folder / name)
    return (folder / name).read_bytes()


def large_gqa(folder: Path, images: int = 200) -> list[dict[str, Any]]:
    """A source of that many images beside a small one."""
    sources = [s for s in write_annotations(folder) if s["name"] in ("gqa", "textcaps")]
    questions = {f"{i:05d}": {**GQA["33"], "imageId": f"i{i}"} for i in range(images)}
    (folder / "gqa.json").write_text(json.dumps(questions), encoding="utf-8")
    return sources


def test_the_mixture_is_llava_json_in_the_order_of_the_recipe(tmp_path: Path) -> None:
    build(tmp_path)
    records = read_records([tmp_path / "mix.json"])
    names = [str(record.id).partition("/")[0] for record in records]
    assert names == [name for name, count in COUNTS.items() for _ in range(count)]
    assert len({record.id for record in records}) == len(records)
    for record in records:
        texts = [turn.text for turn in record.turns]
        assert "".join(texts).count("<image>") == len(record.images)
        assert not record.images or texts[0].startswith("<image>\n")
    assert [len(r.images) for r in records if "sharegpt" in str(r.id)] == [0, 0]


def test_the_summary_counts_sources_and_folders_and_knows_the_file(tmp_path: Path) -> None:
    data = build(tmp_path, seed=4)
    summary = json.loads((tmp_path / "mix.summary.json").read_text())
    assert {one["name"]: one["written"] for one in summary["sources"]} == COUNTS
    assert summary["sha256"] == hashlib.sha256(data).hexdigest()
    assert (summary["records"], summary["seed"], summary["fraction"]) == (20, 4, 1.0)
    assert summary["folders"] == {
        "": 2, "coco": 11, "gqa": 2, "ocr_vqa": 2, "textvqa": 2, "vg": 1
    }  # fmt: skip
    assert summary["paper"]["records"] == 664_000 and summary["released"]["records"] == 665_298
    assert all(one["differs"] for one in summary["sources"])
    assert summary["missing_sources"] == []


def test_the_order_of_files_keys_and_records_does_not_matter(tmp_path: Path) -> None:
    first = build(tmp_path)
    sources = write_annotations(tmp_path / "in")
    shuffle = random.Random(0).shuffle
    for path in sorted((tmp_path / "in").glob("*.json")):
        path.write_text(json.dumps(mixed(json.loads(path.read_text()), path.name, shuffle)))
    recipe = mixture_from({"sources": sources})
    write_mixture(recipe, tmp_path / "in", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == first


def mixed(value: Any, name: str, shuffle: Any) -> Any:
    """Records, and the keys of every object, in another order."""
    if isinstance(value, dict):
        keys = list(value)
        shuffle(keys)
        ordered = ("questions", "answers") if name == "dataset.json" else ("answers", "choices")
        kept = (*ordered, "conversations", "bbox")
        return {k: value[k] if k in kept else mixed(value[k], name, shuffle) for k in keys}
    if isinstance(value, list):
        value = [mixed(item, name, shuffle) for item in value]
        if name == "dataset.json" or (value and isinstance(value[0], dict)):
            shuffle(value)
    return value


def test_another_seed_draws_otherwise(tmp_path: Path) -> None:
    assert build(tmp_path) == build(tmp_path) != build(tmp_path, seed=1)


def test_a_smaller_fraction_is_a_part_of_a_larger_one_in_every_source(tmp_path: Path) -> None:
    sources = large_gqa(tmp_path / "in")
    lines: dict[float, list[str]] = {}
    for fraction in (0.1, 0.3, 0.5, 1.0):
        recipe = mixture_from({"sources": sources, "fraction": fraction, "seed": 3})
        summary = write_mixture(recipe, tmp_path / "in", tmp_path / "mix.json")
        lines[fraction] = (tmp_path / "mix.json").read_text().replace(",\n", "\n").splitlines()
        gqa, textcaps = summary.sources
        assert (gqa.written, gqa.paper) == (round(200 * fraction), round(72_000 * fraction))
        assert textcaps.written == {0.1: 0, 0.3: 1, 0.5: 1, 1.0: 2}[fraction]
    for small, large in ((0.1, 0.3), (0.3, 0.5), (0.5, 1.0)):
        remaining = iter(lines[large])
        assert all(line in remaining for line in lines[small])  # the same order, too


def test_a_count_is_drawn_evenly_and_nested(tmp_path: Path) -> None:
    items = [Conversation(f"{i:04d}", None, ()) for i in range(1000)]
    source = Source("gqa", "gqa", {}, None, count=300)
    chosen = sample(items, source, 0, 1.0)
    assert len(chosen) == 300 and chosen == sorted(chosen, key=lambda one: one.key)
    below = sum(one.key < "0500" for one in chosen)
    assert 120 <= below <= 180
    assert {one.key for one in sample(items, source, 0, 0.5)} < {one.key for one in chosen}
    assert sample(items, source, 1, 1.0) != chosen
    with_one_more = sample([Conversation("", None, ()), *items], source, 0, 1.0)
    assert len({one.key for one in with_one_more} ^ {one.key for one in chosen}) <= 2


def test_the_same_record_twice_is_written_once(tmp_path: Path) -> None:
    sources = write_annotations(tmp_path / "in")[:1]
    sources[0]["files"]["records"] = ["instruct.json", "instruct.json"]
    recipe = mixture_from({"sources": sources})
    summary = write_mixture(recipe, tmp_path / "in", tmp_path / "mix.json")
    assert summary.records == 2
    assert summary.sources[0].skipped == {"conversation: there twice": 2}


def test_only_a_difference_beyond_rounding_is_flagged(tmp_path: Path) -> None:
    # 0.001 of the paper's 9,000 of OKVQA, whose rounding is then one conversation.
    for images, differs in ((9000, False), (10_000, False), (11_000, True), (7_000, True)):
        [source, _] = large_gqa(tmp_path / "in", images)
        recipe = mixture_from({"sources": [{**source, "name": "okvqa"}], "fraction": 0.001})
        summary = write_mixture(recipe, tmp_path / "in", tmp_path / "mix.json")
        [count] = summary.sources
        assert (count.written, count.paper, count.differs) == (images // 1000, 9, differs)


def test_the_papers_table_and_the_released_file_are_those_that_were_published() -> None:
    assert sum(PAPER.values()) == 664_000
    assert sum(RELEASED.values()) == 665_298


def test_the_shipped_recipe_has_every_source_of_the_paper() -> None:
    assert "llava-665k" in mixture_names()
    recipe = load_mixture("llava-665k")
    assert [source.name for source in recipe.sources] == list(PAPER)
    assert {source.kind for source in recipe.sources} == set(KINDS)
    assert (recipe.seed, recipe.fraction) == (0, 1.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sede": 1}, "sede is not a setting; did you mean 'seed'?"),
        ({"seed": "x"}, "seed must be a whole number, not 'x'"),
        ({"fraction": 1.5}, "fraction must be above 0 and at most 1, not 1.5"),
        ({"kind": "gqqa"}, "sources[0].kind 'gqqa' is unknown; did you mean 'gqa'?"),
        ({"kind": None}, "sources[0].kind must be text, not None"),
        ({"images": "../x"}, "sources[0].images '../x' leaves the image folder"),
        ({"count": 0}, "sources[0].count must be 1 or more"),
        ({"image": "x"}, "sources[0].image is not a setting; did you mean 'images'?"),
        ({"files": {}}, "sources[0].files.questions is missing"),
        ({"files": {"question": "a"}}, "files.question is not a file of it; did you mean"),
        ({"files": {"questions": 3}}, "sources[0].files.questions must be a path"),
        ({"options": {"promt": ""}}, "sources[0].options.promt is not a setting; did you mean"),
        ({"options": {"prompt_on": "each"}}, "options.prompt_on 'each' is unknown; there is first"),
        ({"options": {"capitalise": 1}}, "options.capitalise must be true or false, not 1"),
    ],
)
def test_a_recipe_is_read_strictly(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    source = {"kind": "gqa", "files": {"questions": "gqa.json"}}
    head: dict[str, Any] = {"sources": [source]}
    (head if set(change) & {"sede", "seed", "fraction"} else source).update(change)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(head), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_mixture(str(path))
    assert str(caught.value).startswith("mine.yaml: ") and said in str(caught.value)


def test_two_sources_of_one_name_and_an_unknown_recipe_are_refused() -> None:
    source = {"kind": "gqa", "files": {"questions": "gqa.json"}}
    with pytest.raises(UsageError, match=r"sources\[1\]\.name 'gqa' is there twice"):
        mixture_from({"sources": [source, source]})
    with pytest.raises(UsageError, match="did you mean 'llava-665k'"):
        load_mixture("llava-655k")


# --- the command -------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["data", "mix", *(str(word) for word in words)])
    done = capsys.readouterr()
    return code, done.out, done.err


def test_the_command_writes_the_mixture_and_tells_its_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    recipe = write_recipe(tmp_path / "r.yaml", write_annotations(tmp_path / "in"), seed=5)
    out = tmp_path / "mix.json"
    words = [recipe, "--annotations", tmp_path / "in", "--out", out]
    code, printed, _ = run(capsys, *words)
    assert code == 0
    for part in ("vqav2", "differs by -82,998", "664,000", "20 records", "364,100", "seed 5",
                 "sharegpt: left out 1 x conversation: turns out of order"):  # fmt: skip
        assert part in printed, part
    first = out.read_bytes()
    code, printed, _ = run(capsys, *words, "--json", "--seed", 6, "--fraction", 0.5)
    summary = json.loads(printed)
    assert (code, summary["seed"], summary["fraction"]) == (0, 6, 0.5)
    assert summary == json.loads(summary_path(out).read_text())
    assert run(capsys, *words)[0] == 0 and out.read_bytes() == first


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["llava-665k", "--annotations", "none"], 2, "no such file; fetch it"),
        (["missing.yaml"], 2, "the shipped ones are llava-665k"),
        (["{recipe}", "--fraction", "0"], 2, "fraction must be above 0"),
        (["{recipe}", "--fractoin", "1"], 2, "did you mean '--fraction'"),
        (["{recipe}", "--out", "none/mix.json"], 2, "--out none/mix.json: cannot be written"),
        (["{recipe}", "--out", "gqa.json"], 2, "would overwrite gqa.json; give another file"),
        (["{recipe}", "--fraction", "0.01"], 3, "the mixture holds no record"),
        (["{broken}"], 3, "record '201': question is missing; it has 'quest'"),
    ],
)
def test_bad_usage_and_bad_data_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    said: str,
) -> None:
    sources = write_annotations(tmp_path / "in")
    monkeypatch.chdir(tmp_path / "in")
    bad = {"201": {"imageId": "n42", "quest": "Is the cup red?", "answer": "no"}}
    (tmp_path / "in" / "bad.json").write_text(json.dumps(bad))
    write_recipe(tmp_path / "r.yaml", sources)
    broken = [{"kind": "gqa", "files": {"questions": "bad.json"}}]
    write_recipe(tmp_path / "b.yaml", broken)
    given = {"{recipe}": str(tmp_path / "r.yaml"), "{broken}": str(tmp_path / "b.yaml")}
    before = sorted(path.name for path in Path.cwd().iterdir())
    got, out, err = run(capsys, *(given.get(word, word) for word in words))
    assert (got, out) == (code, "")
    assert said in err and err.strip().count("\n") == 0
    assert sorted(path.name for path in Path.cwd().iterdir()) == before


def test_ctrl_c_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_hd.train.mixture._count", interrupted)
    recipe = write_recipe(tmp_path / "r.yaml", write_annotations(tmp_path / "in"))
    out = tmp_path / "out" / "mix.json"
    out.parent.mkdir()
    code, _, err = run(capsys, recipe, "--annotations", tmp_path / "in", "--out", out)
    assert (code, "nothing was written" in err) == (75, True)
    assert not list(out.parent.iterdir())


def test_the_mixture_is_clean_and_trains(tmp_path: Path, parts: Path) -> None:
    build(tmp_path)
    records = read_records([tmp_path / "mix.json"])
    for number, name in enumerate({name for record in records for name in record.images}):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        random_image((40, 60), seed=number).save(path, format="PNG")
    assert check_images(records, tmp_path / "images") == 13
    (tmp_path / "mix.json").rename(tmp_path / "data.json")
    settings = CheckSettings(PRESETS["hdflex"])
    checked = check_data([tmp_path / "data.json"], tmp_path / "images", settings)
    assert is_clean(checked) and checked.num_values == 20
    for found in report_of(checked, settings)["duplicates"].values():
        assert found["records"] == 0
    given = {"stage": "pretrain", "data__template": "vicuna_v1", "data__batching": "modality"}
    train(tiny_config(tmp_path, parts, tmp_path / "run", max_steps=2, **given))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(json.loads(line)["loss"] > 0 for line in lines)
