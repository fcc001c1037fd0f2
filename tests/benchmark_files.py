"""Small files in the formats of the benchmarks that `eval pack` reads, with images beside them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pope_files import OBJECTS, image_name, write_pope
from tiny import random_image

from llava_hd.hd.image import png_bytes, save_png

Written = tuple[list[Path], Path | None]  # --annotations, --images


def picture(folder: Path, name: str, seed: int = 0) -> str:
    path = folder / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix:
        save_png(random_image((40 + 10 * seed, 60), seed), path.with_suffix(".png"))
        path.with_suffix(".png").rename(path)
    else:
        path.write_bytes(png_bytes(random_image((40, 60), seed)))
    return name


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def pope(folder: Path) -> Written:
    for number in range(3):
        picture(folder, image_name(number), number)
    return write_pope(folder / "pope"), folder / "images"


def mme(folder: Path) -> Written:
    root = folder / "mme"
    for category in ("existence", "text_translation"):
        (root / category / "questions_answers_YN").mkdir(parents=True)
        (root / category / "images").mkdir()
        text = (
            "Is it a dog? Please answer yes or no.\tYes\nIs it red? Please answer yes or no.\tNo\n"
        )
        (root / category / "questions_answers_YN" / "1.txt").write_text(text)
        save_png(random_image((40, 40)), root / category / "images" / "1.png")
    (root / "readme.txt").write_text("about these files")
    return [root], root


def gqa(folder: Path) -> Written:
    image = picture(folder, "n1.jpg")
    question = {"question": "Is it red?", "answer": "yes", "imageId": image.removesuffix(".jpg")}
    return [write_json(folder / "q.json", {"201": question})], folder / "images"


def vqav2(folder: Path) -> Written:
    picture(folder, "COCO_val2014_000000000042.jpg")
    asked = [{"image_id": 42, "question": "What is it?", "question_id": 420}]
    given = [{"answer": "cat", "answer_confidence": "yes", "answer_id": i} for i in range(10)]
    told = [{"question_id": 420, "multiple_choice_answer": "cat", "answers": given}]
    questions = {"data_subtype": "val2014", "questions": asked}
    annotations = {"data_subtype": "val2014", "annotations": told}
    files = [write_json(folder / "q.json", questions), write_json(folder / "a.json", annotations)]
    return files, folder / "images"


def textvqa(folder: Path) -> Written:
    picture(folder, "ab.jpg")
    row = {"question_id": 1, "image_id": "ab", "question": "what brand?", "answers": ["x"] * 10}
    return [write_json(folder / "q.json", {"data": [row]})], folder / "images"


def vizwiz(folder: Path) -> Written:
    answers = [{"answer": "unanswerable", "answer_confidence": "no"}] * 10
    row = {"image": picture(folder, "v.jpg"), "question": "What is this?", "answers": answers}
    return [write_json(folder / "val.json", [row])], folder / "images"


def scienceqa(folder: Path) -> Written:
    picture(folder, "test/5/image.png")
    common = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "Look."}
    problems = {
        "5": {**common, "split": "test", "image": "image.png"},
        "6": {**common, "split": "test", "image": None, "hint": ""},
        "7": {**common, "split": "train", "image": None},
    }
    return [write_json(folder / "problems.json", problems)], folder / "images"


def mmbench(folder: Path) -> Written:
    image = base64.b64encode(png_bytes(random_image((40, 60)))).decode()
    head = ["index", "question", "hint", *"ABCD", "answer", "category", "image"]
    head += ["source", "split", "l2-category"]
    rows = [
        ["1", "What?", "", "cat", "dog", "", "", "A", "object", image, "s", "dev", "coarse"],
        ["2", "Where?", "A hint", "in", "on", "by", "", "C", "place", "1", "s", "dev", "coarse"],
    ]
    path = folder / "mmbench.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in [head, *rows]), encoding="utf-8")
    return [path], None


def seedbench(folder: Path) -> Written:
    choices = {f"choice_{letter}": f"{letter} thing" for letter in "abcd"}
    common = {"question": "What?", "answer": "B", "question_type_id": 1, **choices}
    questions = [
        {**common, "data_type": "image", "data_id": picture(folder, "1_2"), "question_id": "101"},
        {**common, "data_type": "video", "data_id": "film.webm", "question_id": "v1"},
    ]
    return [write_json(folder / "SEED-Bench.json", {"questions": questions})], folder / "images"


def llava_in_the_wild(folder: Path) -> Written:
    root = folder / "wild"
    root.mkdir(parents=True)
    image = picture(folder, "001.jpg")
    asked = {"question_id": 0, "image": image, "text": "Describe it.", "category": "detail"}
    write_lines(root / "questions.jsonl", [asked])
    write_lines(root / "context.jsonl", [{"id": "001", "image": image, "caption": "A pier."}])
    write_lines(root / "answers_gpt4.jsonl", [{"question_id": 0, "text": "It is a pier."}])
    return [root], folder / "images"


def mmvet(folder: Path) -> Written:
    row = {
        "imagename": picture(folder, "v1_0.png"),
        "question": "What is x?",
        "answer": "-1 <AND> -5",
        "capability": ["ocr", "math"],
    }
    return [write_json(folder / "mm-vet.json", {"v1_0": row})], folder / "images"


def choices(folder: Path) -> Written:
    rows = [
        {
            "question_id": number,
            "question": "Which is in the image?",
            "choices": list(OBJECTS[number : number + 3]),
            "answer": "ABC"[number],
            **({} if number == 1 else {"image": picture(folder, f"{number}.png", number)}),
        }
        for number in range(3)
    ]
    return [write_lines(folder / "own.jsonl", rows)], folder / "images"


WRITERS: dict[str, Callable[[Path], Written]] = {
    "pope": pope,
    "mme": mme,
    "gqa": gqa,
    "vqav2": vqav2,
    "textvqa": textvqa,
    "vizwiz": vizwiz,
    "scienceqa": scienceqa,
    "mmbench": mmbench,
    "mmbench_cn": mmbench,
    "seedbench": seedbench,
    "llava_in_the_wild": llava_in_the_wild,
    "mmvet": mmvet,
    "choices": choices,
}
