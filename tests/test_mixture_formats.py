"""Every public annotation format against conversations written down by hand."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mixture_files import AOKVQA, refcoco, vqa_annotations, write_annotations
from tiny import IMAGE_ID, tiny_tokenizer

from llava_hd.hd.errors import DataError, UsageError
from llava_hd.model.prompt import Turn, encode_question
from llava_hd.train.mixture import READERS, write_mixture
from llava_hd.train.mixture_fields import Conversation, Reading
from llava_hd.train.mixture_recipe import mixture_from
from llava_hd.train.mixture_regions import Picture, box_text

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
COCO = "coco/train2017/"
SIDES = ("human", "gpt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_annotations(tmp_path)
    return tmp_path


def read(
    folder: Path, name: str, seed: int = 0, **changes: Any
) -> tuple[dict[str, Conversation], Counter[str]]:
    """The conversations of one source by key, and what was left out."""
    [entry] = [one for one in write_annotations(folder / "fresh") if one["name"] == name]
    files = {**entry["files"], **changes.pop("files", {})}
    recipe = mixture_from({"sources": [{**entry, "files": files, "options": changes}]})
    source = recipe.sources[0]
    paths = {role: [folder / path for path in names] for role, names in source.files.items()}
    reading = Reading(source, paths, seed, Counter())
    found = READERS[source.kind](reading)
    assert len({one.key for one in found}) == len(found)
    return {one.key: one for one in found}, reading.skipped


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def test_llava_records_lose_their_tag_and_keep_their_rounds(folder: Path) -> None:
    found, skipped = read(folder, "llava_instruct")
    assert not skipped
    assert {one.image for one in found.values()} == {f"{COCO}000000000009.jpg"}
    assert {one.rounds for one in found.values()} == {
        (("What lies on the tray?", "A loaf."), ("Is it cut?", "Not yet.")),
        (("Tell of this picture.", "A tray with a loaf stands by a window."),),
    }


def test_invalid_sharegpt_conversations_are_left_out_by_reason(folder: Path) -> None:
    found, skipped = read(folder, "sharegpt")
    assert {one.rounds for one in found.values()} == {
        (("Name a prime.", "Seven."),),  # the greeting and the open question are cut off
        (("Hello there", "Hello"),),
    }
    assert all(one.image is None for one in found.values())
    assert skipped == {
        "conversation: no question with an answer": 1,
        "conversation: turns out of order": 1,
        "conversation: a turn of neither side": 1,
        "conversation: <image> in the text": 1,
        "conversation: empty text": 1,
    }


def test_rounds_whose_answer_begins_behind_the_limit_are_cut(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    rounds = [("the cat " * 5).strip(), "Yes"], [("x " * 30).strip(), "No"]
    turns = [Turn(side, text) for pair in rounds for side, text in zip(SIDES, pair, strict=True)]
    start = len(encode_question(tokenizer, turns[:3], [], "vicuna_v1", IMAGE_ID))
    long = [{"from": turn.role, "value": turn.text} for turn in turns]
    write(folder, "share.json", [{"id": 1, "conversations": long}])
    for limit, kept in ((start + 1, 2), (start, 1)):
        options = {"tokenizer": str(folder / "tokenizer"), "max_tokens": limit}
        [one] = read(folder, "sharegpt", **options)[0].values()
        assert one.rounds == tuple(tuple(pair) for pair in rounds[:kept])
    found, skipped = read(folder, "sharegpt", **{**options, "max_tokens": 20})
    assert not found and skipped == {"conversation: no answer within 20 tokens": 1}
    with pytest.raises(UsageError, match="max_tokens and tokenizer belong together"):
        read(folder, "sharegpt", max_tokens=400)


def test_vqa_merges_the_questions_of_an_image_in_the_order_of_their_ids(folder: Path) -> None:
    found, skipped = read(folder, "vqav2")
    nine, boats = f"{COCO}000000000009.jpg", f"{COCO}000000000025.jpg"
    assert found == {
        nine: Conversation(
            nine, nine, ((f"What is on the tray?{WORD}", "Loaf"), ("Is it day?", "Yes"))
        ),
        boats: Conversation(boats, boats, ((f"How many boats?{WORD}", "2"),)),
    }
    assert skipped == {"question: empty text": 1}


def test_the_prompt_may_stand_at_every_question_and_names_be_those_of_2014(folder: Path) -> None:
    found, _ = read(folder, "vqav2", prompt_on="every", coco_names=2014, capitalise=False)
    rounds = found[f"{COCO}COCO_train2014_000000000009.jpg"].rounds
    assert rounds == ((f"What is on the tray?{WORD}", "loaf"), (f"Is it day?{WORD}", "yes"))


def test_okvqa_takes_the_most_frequent_answer_and_the_first_of_equals(folder: Path) -> None:
    found, _ = read(folder, "okvqa")
    assert [one.rounds[0][1] for one in found.values()] == ["Wheat", "Rowing"]


def test_gqa_is_merged_by_image_id(folder: Path) -> None:
    found, _ = read(folder, "gqa")
    assert {key: one.rounds for key, one in found.items()} == {
        "gqa/images/n42.jpg": ((f"What is left of it?{WORD}", "Spoon"), ("Is the cup red?", "No")),
        "gqa/images/2407.jpg": ((f"What is he wearing?{WORD}", "Hat"),),
    }


def test_ocrvqa_takes_the_books_of_one_split(folder: Path) -> None:
    found, _ = read(folder, "ocrvqa")
    assert {key: one.rounds for key, one in found.items()} == {
        "ocr_vqa/images/0316.jpg": ((f"Who wrote it?{WORD}", "A. Writer"),
                                    ("What is it about?", "Tea")),
        "ocr_vqa/images/B001.jpg": ((f"Is it a novel?{WORD}", "Yes"),),
    }  # fmt: skip
    assert list(read(folder, "ocrvqa", split="test")[0]) == ["ocr_vqa/images/0999.jpg"]


def test_aokvqa_is_repeated_once_per_choice_with_the_answer_at_every_letter(folder: Path) -> None:
    found, _ = read(folder, "aokvqa")
    image = f"{COCO}000000000011.jpg"
    assert {key.removeprefix(image): one.rounds for key, one in found.items()} == {
        "#0": (
            (f"Who is tall?\nA. he\nB. she{LETTER}", "A"),
            ("What flies?\nA. kite\nB. hen\nC. ball", "B"),
        ),
        "#1": (
            (f"Who is tall?\nA. she\nB. he{LETTER}", "B"),
            ("What flies?\nA. hen\nB. ball\nC. kite", "A"),
        ),
        "#2": ((f"What flies?\nA. ball\nB. kite\nC. hen{LETTER}", "C"),),
    }
    same, _ = read(folder, "aokvqa", copies="same")
    assert [one.rounds[-1][1] for one in same.values()] == ["B", "B", "B"]


def test_textcaps_gives_one_caption_of_each_image_or_all(folder: Path) -> None:
    prompt = "Provide a one-sentence caption for the provided image."
    drawn = set()
    for seed in range(20):
        found, _ = read(folder, "textcaps", seed=seed)
        assert sorted(found) == [f"textvqa/train_images/{name}.jpg" for name in ("aa01", "bb02")]
        [(question, caption)] = found["textvqa/train_images/aa01.jpg"].rounds
        assert question == prompt
        drawn.add(caption)
    assert drawn == {"A sign says stop.", "A red sign."}
    found, _ = read(folder, "textcaps", captions="all", files={"ocr": "ocr.json"})
    rounds = found["textvqa/train_images/aa01.jpg"].rounds
    assert {question for question, _ in rounds} == {f"{prompt}\nReference OCR token: STOP, 4"}
    assert len(rounds) == 2
    assert found["textvqa/train_images/bb02.jpg"].rounds == ((prompt, "A bottle of juice."),)


@pytest.mark.parametrize("boxes", ["square", "image"])
def test_refcoco_is_cut_into_segments_of_at_most_nine_rounds(folder: Path, boxes: str) -> None:
    found, _ = read(folder, "refcoco", boxes=boxes)
    image = f"{COCO}000000000030.jpg"
    assert [len(found[f"{image}#{i}"].rounds) for i in range(len(found))] == [9, 2]
    # 200x400 px in a square of 400: 100 px above and below.
    top, bottom = ("0.25", "0.38") if boxes == "square" else ("0.00", "0.25")
    seen, forms = set(), set()
    for question, answer in (pair for one in found.values() for pair in one.rounds):
        described = re.fullmatch(r"Provide a short description for this region: (.*)", question)
        words, place = (answer, described[1]) if described else (question.split(": ")[1], answer)
        k = int(words.split()[1])
        left, right = f"{10 * k / 400:.2f}", f"{(10 * k + 100) / 400:.2f}"
        assert place == f"[{left}, {top}, {right}, {bottom}]"
        seen.add(k)
        forms.add(described is None)
    assert (seen, forms) == (set(range(11)), {True, False})


def test_the_form_of_a_region_is_drawn_by_the_seed(folder: Path) -> None:
    forms = set()
    for seed in range(8):
        found, _ = read(folder, "refcoco", seed=seed)
        rounds = [pair for one in found.values() for pair in one.rounds]
        words = sorted((q + a, q.startswith("Provide a short")) for q, a in rounds)
        forms.add(tuple(described for _, described in words))
        assert 1 <= sum(described for _, described in words) <= 10
    counts = {sum(form) for form in forms}
    assert len(counts) > 2  # taking turns would always give five or six of eleven


def test_an_expression_of_several_boxes_is_left_out(folder: Path) -> None:
    values = refcoco(3)
    values["annotations"].append({"image_id": 1, "bbox": [0, 0, 5, 5]})
    write(folder, "refcoco.json", values)
    found, skipped = read(folder, "refcoco")
    assert sum(len(one.rounds) for one in found.values()) == 2
    assert skipped == {"expression: of several boxes": 1}


def test_visual_genome_gives_ten_regions_cut_at_the_edges(folder: Path) -> None:
    found, skipped = read(folder, "vg", boxes="image")
    assert list(found) == ["vg/VG_100K_2/1.jpg"]
    rounds = found["vg/VG_100K_2/1.jpg"].rounds
    assert len(rounds) == 10
    for question, answer in rounds:
        described = question.startswith("Provide a short")
        words, place = (answer, question) if described else (question, answer)
        k = int(words.split()[-1])
        assert f"[{10 * k / 300:.2f}, 0.05, {(10 * k + 20) / 300:.2f}, 1.00]" in place
    assert skipped == {"region: no area in the image": 1, "image: no region": 1}


def test_a_box_of_a_tall_image_is_moved_right_by_half_the_padding() -> None:
    picture = Picture("x.jpg", height=100, width=50)
    assert box_text((0, 0, 50, 100), picture, True) == "[0.25, 0.00, 0.75, 1.00]"
    assert box_text((0, 0, 50, 100), picture, False) == "[0.00, 0.00, 1.00, 1.00]"


def without(values: Any, *keys: Any) -> Any:
    """A copy of JSON values with one entry taken away, or set where the last key is a pair."""
    copied = json.loads(json.dumps(values))
    inner = copied
    for key in keys[:-1]:
        inner = inner[key]
    if isinstance(keys[-1], tuple):
        inner[keys[-1][0]] = keys[-1][1]
    else:
        del inner[keys[-1]]
    return copied


@pytest.mark.parametrize(
    ("name", "file", "keys", "said"),
    [
        ("vqav2", "v2_q.json", ("questions",), "v2_q.json: questions is missing; "),
        ("vqav2", "v2_q.json", ("questions", 1, "question"), "questions[1]: question is missing"),
        ("vqav2", "v2_q.json", ("questions", 0, ("image_id", "9")),
         "questions[0]: image_id is text; give a whole number"),
        ("vqav2", "v2_a.json", ("annotations", 2), "questions[1]: question_id 25000 has no"),
        ("vqav2", "v2_q.json", ("questions", 1), "annotations[2]: question_id 25000 has no"),
        ("vqav2", "v2_q.json", ("questions", 0, ("question_id", 9000)),
         "questions[2]: question_id 9000 is asked twice"),
        ("refcoco", "refcoco.json", ("images", 2, ("width", 401)), "height and width differ"),
        ("gqa", "gqa.json", ("33", "answer"), "record '33': answer is missing"),
        ("gqa", "gqa.json", ("33", ("imageId", "../x")), "leaves the image folder"),
        ("ocrvqa", "dataset.json", ("0316", ("split", 4)), "record '0316': split is 4; give 1"),
        ("ocrvqa", "dataset.json", ("0316", "answers", 0), "answers are 1 for 2 questions"),
        ("aokvqa", "aokvqa.json", (0, ("correct_choice_idx", 3)), "give 0 to 2"),
        ("aokvqa", "aokvqa.json", (1, ("question_id", "qb")), "question_id qb is there twice"),
        ("textcaps", "textcaps.json", ("data", 0, ("caption_str", None)), "caption_str is null"),
        ("refcoco", "refcoco.json", ("annotations", 4), "images[4]: id 4 has no box"),
        ("refcoco", "refcoco.json", ("annotations", 4, "bbox", 0), "bbox has 3 values"),
        ("vg", "image_data.json", (0,), "record 0: id 1 is not in the image file"),
        ("vg", "regions.json", (0, "regions", 3, ("x", "left")), "record 0.regions[3]: x holds"),
        ("llava_instruct", "instruct.json", (1, "conversations", 1), "has 1 turns; end with"),
        ("llava_instruct", "instruct.json", (0, "image"), "record 0: conversations has not 0"),
    ],
)  # fmt: skip
def test_a_malformed_record_is_named_with_file_field_and_remedy(
    folder: Path, name: str, file: str, keys: tuple[Any, ...], said: str
) -> None:
    write(folder, file, without(json.loads((folder / file).read_text()), *keys))
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        read(folder, name)
    assert str(caught.value).count("\n") == 0
    assert "; " in str(caught.value)


def test_a_misspelt_field_is_answered_with_its_name(folder: Path) -> None:
    rows = without(AOKVQA, 0, "choices")
    write(folder, "aokvqa.json", [{**rows[0], "choises": []}])
    with pytest.raises(DataError, match="it has 'choises', rename that to 'choices'"):
        read(folder, "aokvqa")


def test_a_cut_off_file_and_one_of_another_kind_are_refused(folder: Path) -> None:
    (folder / "gqa.json").write_text('{"1": {"ques')
    with pytest.raises(DataError, match=r"gqa\.json: line 1, column \d+: not JSON"):
        read(folder, "gqa")
    write(folder, "gqa.json", [1])
    with pytest.raises(DataError, match="is a list, not an object of records by id"):
        read(folder, "gqa")
    write(folder, "aokvqa.json", vqa_annotations())
    with pytest.raises(DataError, match="is an object, not a list of records"):
        read(folder, "aokvqa")


def test_a_fault_leaves_no_file_behind(folder: Path) -> None:
    sources = write_annotations(folder / "in")
    (folder / "in" / "regions.json").write_text("[{}]")
    with pytest.raises(DataError, match="record 0: id is missing"):
        write_mixture(mixture_from({"sources": sources}), folder / "in", folder / "mix.json")
    assert not [path for path in folder.iterdir() if "mix" in path.name]
