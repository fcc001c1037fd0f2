"""Small annotation files in each public format, written for the tests, and a recipe of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

SHAREGPT = [
    {
        "id": "talk_0",
        "conversations": [
            {"from": "gpt", "value": "I greet you first."},
            {"from": "human", "value": "Name a prime."},
            {"from": "gpt", "value": "Seven."},
            {"from": "human", "value": "And the next?"},
        ],
    },
    {"id": "talk_1", "conversations": []},
    {
        "id": "talk_2",
        "conversations": [
            {"from": "human", "value": "One?"},
            {"from": "human", "value": "Two?"},
            {"from": "gpt", "value": "Three."},
        ],
    },
    {
        "id": "talk_3",
        "conversations": [
            {"from": "user", "value": "Hello there"},
            {"from": "bard", "value": "Hello"},
        ],
    },
    {
        "id": "talk_4",
        "conversations": [
            {"from": "system", "value": "Be kind"},
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hi"},
        ],
    },
    {
        "id": "talk_5",
        "conversations": [
            {"from": "human", "value": "What is <image> for?"},
            {"from": "gpt", "value": "A tag"},
        ],
    },
    {
        "id": "talk_6",
        "conversations": [{"from": "human", "value": "Well?"}, {"from": "gpt", "value": "  "}],
    },
]


def llava() -> list[dict[str, Any]]:
    """Two records of one image with one id, as in LLaVA-Instruct; the tag at either end."""
    return [
        {
            "id": "000000000009",
            "image": "000000000009.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat lies on the tray?"},
                {"from": "gpt", "value": "A loaf."},
                {"from": "human", "value": "Is it cut?"},
                {"from": "gpt", "value": "Not yet."},
            ],
        },
        {
            "id": "000000000009",
            "image": "000000000009.jpg",
            "conversations": [
                {"from": "human", "value": "Tell of this picture.\n<image>"},
                {"from": "gpt", "value": "A tray with a loaf stands by a window."},
            ],
        },
    ]


def vqa_questions() -> dict[str, Any]:
    """Three questions about image 9 and one about image 25, out of order."""
    rows = [
        (9, 9002, "Is it day?"),
        (25, 25000, "How many boats?"),
        (9, 9000, "What is on the tray?"),
        (9, 9010, "Who sits there?"),
    ]
    questions = [{"image_id": i, "question_id": q, "question": text} for i, q, text in rows]
    return {"info": {}, "task_type": "Open-Ended", "questions": questions}


def vqa_annotations() -> dict[str, Any]:
    rows = [(9, 9000, "loaf"), (9, 9002, "yes"), (25, 25000, "2"), (9, 9010, " ")]
    return {
        "info": {},
        "annotations": [
            {
                "question_id": question,
                "image_id": image,
                "multiple_choice_answer": answer,
                "answer_type": "other",
                "answers": [{"answer": "else", "answer_id": 1}],
            }
            for image, question, answer in rows
        ],
    }


def okvqa() -> tuple[dict[str, Any], dict[str, Any]]:
    """No chosen answer: the most frequent one, on a tie the first."""
    questions = [
        {"image_id": 7, "question_id": 70, "question": "What bread is it?"},
        {"image_id": 8, "question_id": 80, "question": "Which sport?"},
    ]
    given = {70: ["rye", "wheat", "wheat"], 80: ["rowing", "sailing", "sailing", "rowing"]}
    annotations = [
        {
            "image_id": question // 10,
            "question_id": question,
            "answers": [{"answer": text, "raw_answer": text} for text in answers],
        }
        for question, answers in given.items()
    ]
    return {"questions": questions}, {"annotations": annotations}


GQA = {
    "201": {
        "imageId": "n42",
        "question": "Is the cup red?",
        "answer": "no",
        "semantic": [{"a": 1}],
    },
    "199": {"imageId": "n42", "question": "What is left of it?", "answer": "spoon"},
    "33": {"imageId": "2407", "question": "What is he wearing?", "answer": "hat"},
}
OCRVQA = {
    "0316": {"questions": ["Who wrote it?", "What is it about?"],
             "answers": ["A. Writer", "Tea"], "split": 1, "title": "T", "imageURL": "u"},
    "0999": {"questions": ["Who wrote it?"], "answers": ["B. Writer"], "split": 3},
    "B001": {"questions": ["Is it a novel?"], "answers": ["yes"], "split": 1},
}  # fmt: skip
AOKVQA = [
    {"image_id": 11, "question_id": "qb", "question": "What flies?",
     "choices": ["kite", "hen", "ball"], "correct_choice_idx": 1},
    {"image_id": 11, "question_id": "qa", "question": "Who is tall?",
     "choices": ["he", "she"], "correct_choice_idx": 0},
]  # fmt: skip
TEXTCAPS = {
    "dataset_name": "textcaps",
    "data": [
        {"image_id": "aa01", "caption_str": "A sign says stop.", "reference_strs": ["x"]},
        {"image_id": "aa01", "caption_str": "A red sign.", "reference_strs": ["x"]},
        {"image_id": "bb02", "caption_str": "A bottle of juice.", "reference_strs": ["x"]},
    ],
}
OCR = {
    "data": [
        {"image_id": "aa01", "ocr_tokens": ["STOP", "4"]},
        {"image_id": "bb02", "ocr_tokens": []},
    ]
}


def refcoco(expressions: int = 11) -> dict[str, Any]:
    """Expressions of one image 200 px high and 400 px wide; the k-th box begins at (10k, 0)."""
    images = [
        {
            "file_name": "COCO_train2014_000000000030.jpg",
            "height": 200,
            "width": 400,
            "id": k,
            "caption": f"thing {k}",
            "dataset_name": "refcoco",
        }
        for k in range(expressions)
    ]
    boxes = [
        {"id": k, "image_id": k, "bbox": [10.0 * k, 0.0, 100.0, 50.0]} for k in range(expressions)
    ]
    return {"images": images, "annotations": boxes}


def vg(regions: int = 13) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(region_descriptions, image_data): image 1 with regions, image 2 with none usable."""
    described = [
        {"region_id": k, "image_id": 1, "phrase": f"part  {k}\n",
         "x": 10 * k, "y": 5, "width": 20, "height": 500}
        for k in range(regions)
    ]  # fmt: skip
    nothing = [{"region_id": 99, "image_id": 2, "phrase": "out", "x": 700, "y": 0,
                "width": 5, "height": 5}]  # fmt: skip
    images = [
        {"image_id": i, "width": 300, "height": 100, "url": f"https://x/VG_100K{end}/{i}.jpg"}
        for i, end in ((1, "_2"), (2, ""))
    ]
    return [{"id": 1, "regions": described}, {"id": 2, "regions": nothing}], images


def source(kind: str, name: str, files: dict[str, str], **more: Any) -> dict[str, Any]:
    return {"kind": kind, "name": name, "files": files, **more}


def write_annotations(folder: Path) -> list[dict[str, Any]]:
    """All files below `folder`; the sources of a recipe that reads them."""
    regions, image_data = vg()
    ok_questions, ok_annotations = okvqa()
    contents = {
        "instruct.json": llava(),
        "share.json": SHAREGPT,
        "v2_q.json": vqa_questions(),
        "v2_a.json": vqa_annotations(),
        "ok_q.json": ok_questions,
        "ok_a.json": ok_annotations,
        "gqa.json": GQA,
        "dataset.json": OCRVQA,
        "aokvqa.json": AOKVQA,
        "textcaps.json": TEXTCAPS,
        "ocr.json": OCR,
        "refcoco.json": refcoco(),
        "regions.json": regions,
        "image_data.json": image_data,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    coco = {"images": "coco/train2017"}
    questions = {"questions": "v2_q.json", "annotations": "v2_a.json"}
    return [
        source("llava", "llava_instruct", {"records": "instruct.json"}, **coco),
        source("sharegpt", "sharegpt", {"records": "share.json"}),
        source("vqa", "vqav2", questions, **coco),
        source("gqa", "gqa", {"questions": "gqa.json"}, images="gqa/images"),
        source("vqa", "okvqa", {"questions": "ok_q.json", "annotations": "ok_a.json"}, **coco),
        source("ocrvqa", "ocrvqa", {"dataset": "dataset.json"}, images="ocr_vqa/images"),
        source("aokvqa", "aokvqa", {"questions": "aokvqa.json"}, **coco),
        source(
            "textcaps", "textcaps", {"captions": "textcaps.json"}, images="textvqa/train_images"
        ),
        source("refcoco", "refcoco", {"expressions": "refcoco.json"}, **coco),
        source("vg", "vg", {"regions": "regions.json", "images": "image_data.json"}, images="vg"),
    ]


def write_recipe(path: Path, sources: list[dict[str, Any]], **more: Any) -> Path:
    path.write_text(yaml.safe_dump({"sources": sources, **more}), encoding="utf-8")
    return path
