"""The lmms-eval adapter: order, batches, until, text-only and many-image rows, losses, refusals."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from tiny import random_image, tiny_hd

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (Makefile, extra eval)")

from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.models.registry_v2 import ModelRegistryV2

from llava_hd.bench.lmms_adapter import LlavaHDAdapter, decoding, flat
from llava_hd.bench.lmms_manifest import manifest
from llava_hd.bench.lmms_options import parse_options
from llava_hd.hd.errors import DataError, UsageError
from llava_hd.hd.limits import ResolutionLimits
from llava_hd.model.assemble import assemble
from llava_hd.model.generate import answer, answer_batch
from llava_hd.model.processor import Processor
from llava_hd.model.scores import score_answers

TASK, SPLIT = "a_task", "test"


@pytest.fixture(scope="module")
def folder(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = assemble(
        vision=parts / "vision", language=parts / "language", hd=tiny_hd("hdflex")
    )
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


# Documents of three tile counts, one of text alone, one with three images, one image twice.
DOCS: list[dict[str, Any]] = [
    {"text": "what colour is the cat?", "images": [random_image((100, 90), 1)]},
    {"text": "the dog is", "images": []},
    {"text": "is the mat red?", "images": [random_image((33, 200), 2)]},
    {"text": "is there a dog?", "images": [random_image((100, 90), 1)]},
    {"text": "Yes", "images": [random_image((9, 9), 3)]},
    {"text": "are they red?", "images": [random_image((40, 40), seed) for seed in (4, 5, 6)]},
]


def adapter(folder: Path, **options: Any) -> LlavaHDAdapter:
    given = {"pretrained": str(folder), "device": "cpu", "batch_size": "4", **options}
    made = LlavaHDAdapter(**given)
    made.task_dict[TASK] = {SPLIT: DOCS}
    return made


def visuals(doc: dict[str, Any]) -> list[Any]:
    return [image.copy() for image in doc["images"]]


def instances(middle: Any, kind: str = "generate_until", task: str = TASK) -> list[Instance]:
    """One request a document; `middle(number)` is its second argument."""
    meta = {"task": task, "repeats": 1}
    return [
        Instance(
            kind,
            (doc["text"], middle(number), visuals, number, TASK, SPLIT),
            0,
            {**meta, "doc_id": number},
        )
        for number, doc in enumerate(DOCS)
    ]


GREEDY = {"max_new_tokens": 8, "temperature": 0, "do_sample": False}


@pytest.mark.parametrize("batch_size", ["1", 3, "16"])
def test_a_mixed_batch_answers_as_each_row_alone_and_in_order(
    folder: Path, batch_size: Any
) -> None:
    made = adapter(folder, batch_size=batch_size)
    found = made.generate_until(instances(lambda number: GREEDY))
    first = [doc["images"][len(doc["images"]) // 2] if doc["images"] else None for doc in DOCS]
    expected = [
        answer(made.model, made.processor, image, doc["text"], 8)
        for image, doc in zip(first, DOCS, strict=True)
    ]
    assert found == expected and any(found)


def test_rows_with_other_settings_keep_their_places(folder: Path) -> None:
    made = adapter(folder)
    long = made.generate_until(instances(lambda number: GREEDY))
    short = made.generate_until(
        instances(lambda number: {**GREEDY, "max_new_tokens": 2 if number % 2 else 8})
    )
    for number, (one, two) in enumerate(zip(long, short, strict=True)):
        assert one.startswith(two) and (one == two) == (number % 2 == 0)


def test_answers_end_before_the_first_until(folder: Path) -> None:
    made = adapter(folder, many_images="all")
    free = made.generate_until(instances(lambda number: GREEDY))
    stops = [text[2:4] for text in free]
    cut = made.generate_until(
        instances(lambda number: {**GREEDY, "until": ["nowhere in it", stops[number]]})
    )
    for text, stop, found in zip(free, stops, cut, strict=True):
        assert found == text[: text.index(stop)].rstrip()


def test_of_many_images_the_middle_one_is_taken_and_told_or_all(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = instances(lambda number: GREEDY)[-1:]
    made = adapter(folder)
    middle = made.generate_until(last)
    assert "the middle one is taken" in capsys.readouterr().out
    made.generate_until(last)
    assert "middle" not in capsys.readouterr().out
    everything = adapter(folder, many_images="all").generate_until(last)
    doc = DOCS[-1]
    assert middle == [answer(made.model, made.processor, doc["images"][1], doc["text"], 8)]
    assert everything != middle


def test_equal_images_of_a_batch_are_cut_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adapter(folder, batch_size=8)
    cuts = []
    cut = made.processor.cut
    monkeypatch.setattr(made.processor, "cut", lambda image: (cuts.append(image), cut(image))[1])
    made.generate_until(instances(lambda number: GREEDY))
    assert len(cuts) == 4  # five rows with an image, two of them with the same


def test_losses_are_those_of_the_continuations_in_order(folder: Path) -> None:
    made = adapter(folder, batch_size=4)
    words = ["red", "on the mat", "Yes", "No", "a dog", "green"]
    found = made.loglikelihood(instances(lambda number: f" {words[number]}", "loglikelihood"))
    pairs = [unwrap_generation_output(one)[0] for one in found]
    for doc, word, (loss, greedy) in zip(DOCS, words, pairs, strict=True):
        images = doc["images"][len(doc["images"]) // 2 :][:1]
        alone = score_answers(made.model, made.processor, [images], [doc["text"]], [word])[0]
        assert loss == pytest.approx(alone.mean_loss, abs=1e-4) and greedy == alone.greedy
        assert loss > 0
    called = made.loglikelihood(instances(lambda n: lambda doc: doc["text"], "loglikelihood"))
    assert unwrap_generation_output(called[4])[0][0] != pairs[4][0]


def test_what_is_not_greedy_decoding_is_refused() -> None:
    for settings in (
        {"do_sample": True},
        {"temperature": 0.7},
        {"num_beams": 4, "do_sample": False},
    ):
        with pytest.raises(UsageError, match="task t, row 1: asks for drawn"):
            decoding(settings, 9, "task t, row 1")
    cool = {"temperature": 0.2, "do_sample": False, "num_beams": 1, "image_aspect_ratio": "pad"}
    assert decoding(cool, 9, "").max_new_tokens == 9
    assert decoding({"until": "x", "max_new_tokens": 3}, 9, "").until == ("x",)
    assert decoding(None, 9, "").until == ()


def test_rows_that_cannot_be_asked_are_named(folder: Path) -> None:
    made = adapter(folder)

    def ask(text: Any, seen: Any) -> None:
        arguments = (text, GREEDY, lambda doc: seen, 3, TASK, SPLIT)
        meta = {"task": TASK, "doc_id": 3, "repeats": 1}
        made.generate_until([Instance("generate_until", arguments, 0, meta)])

    with pytest.raises(DataError, match=r"a_task, row 3: a visual is a str"):
        ask("what?", ["film.mp4"])
    with pytest.raises(DataError, match=r"row 3: 1 <image> tags in its text but 0 images"):
        ask("<image> what?", None)
    with pytest.raises(DataError, match=r"row 3: \d+ tokens of 0 images and text"):
        ask("the cat " * 3000, None)
    with pytest.raises(UsageError, match="row 0: tasks of several rounds"):
        made.generate_until_multi_round(instances(lambda number: GREEDY))
    assert flat([[1, [2]], 3, None]) == [1, 2, 3]


def test_options_are_checked_before_a_model_is_loaded() -> None:
    for given, message in (
        ({}, "pretrained=DIR is missing"),
        ({"pretrained": "x", "batchsize": 2}, "did you mean batch_size="),
        ({"pretrained": "x", "batch_size": "auto"}, "batch_size=auto: give a whole number"),
        ({"pretrained": "x", "batch_size": 0}, "give a number from 1"),
        ({"pretrained": "x", "dtype": "int8"}, "dtype=int8 is unknown"),
        ({"pretrained": "x", "prompts": "mine"}, "prompts=mine is unknown"),
        ({"pretrained": "x", "max_tiles": "few"}, "max_tiles=few: give a whole number"),
        ({"pretrained": "x", "max_tiles": 0}, "max_tiles must be a whole number from 1, not 0"),
        ({"pretrained": "x", "grid": "2by1"}, "grid '2by1' is not ROWSxCOLS"),
        ({"pretrained": "x", "grid": "1x2", "max_tiles": 3}, "grid 1x2 allows no other"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_options(given)
    assert parse_options({"pretrained": "x", "batch_size": "3"}).batch_size == 3


def test_the_manifest_leads_to_the_adapter_under_both_names() -> None:
    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("llava_hd") is LlavaHDAdapter
    assert registry.get_model_class("llava_1_5_hd") is LlavaHDAdapter


def test_the_entry_point_of_the_package_leads_to_the_manifest() -> None:
    setup = (Path(__file__).parent.parent / "setup.py").read_text(encoding="utf-8")
    line = re.search(r'"lmms_eval.models": \["(\w+) = (\S+)"\]', setup)
    assert line
    registry = ModelRegistryV2()
    point = EntryPoint(line[1], line[2], "lmms_eval.models")
    for found in registry._coerce_payload_to_manifests(point.load()):
        registry.register_manifest(found)
    assert registry.list_model_names() == ["llava_1_5_hd", "llava_hd"]


def test_resolution_is_limited_as_everywhere(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = adapter(folder, grid="3x3", max_new_tokens=4)
    assert "trained on grids of at most 6 tiles, used with at most 9" in capsys.readouterr().err
    limits = ResolutionLimits(grid=(3, 3))
    processor = Processor.from_pretrained(folder, limits)
    images, text = DOCS[0]["images"], DOCS[0]["text"]
    assert processor.cut(images[0]).plan.grid == (3, 3)
    [found, *_] = made.generate_until(instances(lambda number: {**GREEDY, "max_new_tokens": 4}))
    assert found == answer_batch(made.model, processor, images, [text], 4)[0]
    few = adapter(folder, max_visual_tokens="20")
    with pytest.raises(DataError, match=rf"{TASK}, row 0: an image of .* needs at least"):
        few.generate_until(instances(lambda number: GREEDY))
