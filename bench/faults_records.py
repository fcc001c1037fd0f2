"""Records that no run may train on, files that cannot be read at all, and odd ones that are fine.

A bad record is left out under `skip` and `text_only`; one whose words are good, but not an image
that it names, keeps these under `text_only`. A bad file stops the run under every policy. Here too
are the data sets on disk, of bad records and of bad images, each among as many good ones.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..hd.image import save_png
from .faults_images import FineImage, ImageFault, fine_images, pixels, write_content

Kind = Literal["array", "lines", "shard"]
KINDS: tuple[Kind, ...] = ("array", "lines", "shard")
Members = Mapping[str, bytes]  # of a sample in a shard: suffix -> content
GOOD, MISSING, STRAY = "good.png", "missing.png", "stray.png"  # images of the data set
MAX_LENGTH = 512  # tokens of a sample in these data sets
TAG = "<image>\n"
ANSWER = {"from": "gpt", "value": "Yes"}
QUESTION = {"from": "human", "value": "Is there a cat in the picture?"}


@dataclass(frozen=True)
class RecordFault:
    """A record that is none.

    content: in an array its value; in JSON lines the line, or its value; in a shard the members of
    its sample. says: words of the message. keeps_text: under text_only.
    """

    name: str
    kind: Kind
    content: Any
    says: str
    keeps_text: bool = False


@dataclass(frozen=True)
class FileFault:
    """A data file that stops every run. says: words of the message."""

    name: str
    file: str
    content: bytes
    says: str


def talk(name: str, turns: Any = None, image: Any = None, **more: Any) -> dict[str, Any]:
    """A record in LLaVA's form; with an image, its first question has a tag for it."""
    if turns is None:
        text = (TAG if image is not None else "") + QUESTION["value"]
        turns = [{**QUESTION, "value": text}, ANSWER]
    return {
        "id": name,
        **({} if image is None else {"image": image}),
        "conversations": turns,
    } | more


def chat(name: str, *messages: Any, **more: Any) -> dict[str, Any]:
    """A record in Hugging Face's form."""
    return {"id": name, "messages": list(messages), **more}


def record_faults() -> tuple[RecordFault, ...]:
    """All of them, by the kind of their file."""
    return (*_in_arrays(), *_in_lines(), *_in_shards())


def _in_arrays() -> tuple[RecordFault, ...]:
    two = {"from": "human", "value": TAG * 2 + "Which one is larger?"}
    forms: dict[str, tuple[Any, str]] = {
        "a list": ([1, 2], "is a list, not an object"),
        "nothing": (None, "is null, not an object"),
        "id is a list": ({**talk("x"), "id": ["x"]}, "id is a list"),
        "misspelt": ({"id": "m", "conversation": [QUESTION, ANSWER]}, "rename that to"),
        "no list of turns": (talk("n", "Is there a cat?"), "conversations is text"),
        "no turns": (talk("e", []), "conversations is empty"),
        "a turn of text": (talk("t", ["Hello", ANSWER]), "conversations[0] is text"),
        "no value": (talk("v", [{"from": "human"}, ANSWER]), "conversations[0].value is missing"),
        "value is a number": (talk("7", [QUESTION, {**ANSWER, "value": 7}]), "value is a number"),
        "unknown role": (talk("r", [QUESTION, {**ANSWER, "from": "bot"}]), "'bot' is unknown"),
        "roles swapped": (talk("s", [ANSWER, QUESTION]), "'human' is due"),
        "two questions": (talk("q", [QUESTION, QUESTION]), "'gpt' is due"),
        "no last answer": (talk("l", [QUESTION, ANSWER, QUESTION]), "end with an answer"),
        "empty answer": (talk("a", [QUESTION, {**ANSWER, "value": " \n"}]), "an empty answer"),
        "a tag too many": (talk("2", [two, ANSWER], GOOD), "2 <image> tags"),
        "no tag": (talk("0", [QUESTION, ANSWER], GOOD), "0 <image> tags"),
        "image is a number": (talk("i", None, 5), "image is a number"),
        "half a character": (talk("h", [QUESTION, {**ANSWER, "value": "\ud83d"}]), "half of a"),
        "nul in the name": (talk("z", None, "good\0.png"), "NUL character"),
        "absolute name": (talk("/", None, "/etc/hostname"), "an absolute path"),
        "name that climbs": (talk("..", None, "../" + STRAY), "leaves the image folder"),
    }
    names = {
        "missing image": (talk("g", None, MISSING), "No such file"),
        "link that leaves": (talk("k", None, STRAY), "a link that leaves"),
        # Eight views of some 100 tokens: more than MAX_LENGTH, which cuts no image.
        "too many images": (
            talk("8", [{**QUESTION, "value": TAG * 8 + "Which?"}, ANSWER], [GOOD] * 8),
            "beyond max_length",
        ),
    }
    long = {**QUESTION, "value": "Is it? " * MAX_LENGTH}
    return (
        *(RecordFault(n, "array", value, says) for n, (value, says) in forms.items()),
        *(RecordFault(n, "array", value, says, True) for n, (value, says) in names.items()),
        RecordFault(
            "nothing but an image", "array",
            talk("o", [{**QUESTION, "value": TAG}, ANSWER], MISSING), "No such file",
        ),
        RecordFault("no answer within", "array", talk("w", [long, ANSWER]), "no label is left"),
    )  # fmt: skip


def _in_lines() -> tuple[RecordFault, ...]:
    whole = json.dumps(talk("cut"))
    user, said = {"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes"}
    address = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    forms: dict[str, tuple[Any, str]] = {
        "half a line": (whole[: len(whole) // 2], "column"),
        "no json": ("<p>Service unavailable</p>", "not JSON"),
        "trailing comma": (whole[:-1] + ",}", "a comma stands before the closing bracket"),
        "not a number": (whole[:-1] + ', "score": NaN}', "NaN is not allowed"),
        "nul": (whole.replace("cat", "c\0t"), "not JSON"),
        "nested deeply": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        "thousands of digits": (whole[:-1] + f', "n": {"7" * 5000}}}', "thousands of digits"),
        "both forms": (
            {**talk("b"), **chat("b", user, said)}, "both conversations and messages",
        ),
        "role of a tool": (chat("t", {**user, "role": "tool"}, said), "'tool' is unknown"),
        "image by address": (
            chat("u", {**user, "content": [address]}, said), "addresses are not read",
        ),
        "image in an answer": (
            chat("y", user, {**said, "content": [{"type": "image"}]}, images=[GOOD]),
            "outside a user's message",
        ),
    }  # fmt: skip
    return tuple(RecordFault(n, "lines", value, says) for n, (value, says) in forms.items())


def _in_shards() -> tuple[RecordFault, ...]:
    asked = json.dumps(talk("s", [{**QUESTION, "value": TAG + "Is it?"}, ANSWER])).encode()
    return (
        RecordFault("no-record", "shard", {"png": b""}, "has no member"),
        RecordFault("not-utf8", "shard", {"json": b'{"id": "caf\xe9"}'}, "is not UTF-8"),
        RecordFault("not-json", "shard", {"json": asked[:-9], "png": b""}, "ends too early"),
        RecordFault(
            "no-order", "shard", {"json": asked, "1.png": b"", "3.png": b""}, "have no order"
        ),
        RecordFault("no-image", "shard", {"json": asked}, "but 0 images"),
        RecordFault("bad-image", "shard", {"json": asked, "png": b"\x89PNG"}, "not an image", True),
    )


def file_faults() -> tuple[FileFault, ...]:
    """Data files that no policy gets past."""
    good = [talk("a"), talk("b")]
    array, lines = json.dumps(good), "".join(json.dumps(one) + "\n" for one in good)
    shard = tar([("a", {"json": json.dumps(good[0]).encode()})])
    comma, inside = array[:-1] + ",]", json.dumps({"data": good})
    spread = json.dumps(good[0], indent=1)
    latin = array.replace("cat", "caf\u00e9").encode("latin-1")
    found: dict[str, tuple[str, bytes, str]] = {
        "empty": ("json", b"", "holds no record"),
        "blank": ("jsonl", b"\n \n", "holds no record"),
        "no records": ("json", b"[]", "holds no record"),
        "trailing comma": ("json", comma.encode(), "a comma stands before the closing bracket"),
        "cut off": ("json", array[:-9].encode(), "line 1, column"),
        "not utf-8": ("json", latin, "is not UTF-8"),
        "utf-16": ("json", array.encode("utf-16"), "is not UTF-8"),
        "compressed": ("jsonl", gzip.compress(lines.encode()), "is compressed (gzip)"),
        "an error page": ("json", b"<html>\n<body>404</body>\n</html>\n", "not JSON"),
        "inside an object": ("json", inside.encode(), "conversations is missing"),
        "one record over lines": ("json", spread.encode(), "put the records"),
        "shard cut off": ("tar", shard[:1024], "cut off"),
        "shard with a pickle": ("tar", tar([("a", {"pkl": b"x"})]), "is a pickle"),
    }  # fmt: skip
    return tuple(
        FileFault(name, f"{name.replace(' ', '-')}.{suffix}", content, says)
        for name, (suffix, content, says) in found.items()
    )


def fine_records() -> tuple[dict[str, Any], ...]:
    """Records that look odd and are none the worse for it, for an array or JSON lines."""
    user, said = {"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes"}
    image = {"type": "image"}
    return (
        talk("twice"),
        talk("twice"),
        {**talk("x"), "id": None},
        {**talk("x"), "id": 17},
        talk("more keys", model="gpt", score=0.5),
        talk("tags in an answer", [QUESTION, {**ANSWER, "value": "An <image> tag, </s>."}]),
        talk("other words", [{**QUESTION, "value": "Что это? 猫 🐈 \u2028 \0"}, ANSWER]),
        talk("long answer", [QUESTION, {**ANSWER, "value": "Yes, and no. " * MAX_LENGTH}]),
        talk("same image twice", [{**QUESTION, "value": TAG * 2 + "Same?"}, ANSWER], [GOOD, GOOD]),
        chat("other form", {**user, "content": [image, {"type": "text", "text": "Is it?"}]}, said,
             images=[GOOD]),
    )  # fmt: skip


def tar(samples: list[tuple[str, Members]]) -> bytes:
    """A shard: the members of each sample, one after another."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for key, members in samples:
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@dataclass(frozen=True)
class Due:
    """A fault of a data set: whether its text stays, words and place that its message names, and
    whether it is seen before training, when tokens are counted."""

    name: str
    says: str
    place: str
    keeps_text: bool
    early: bool = True


@dataclass
class FaultyData:
    """A data set on disk with `count` records, and its faults by their index."""

    path: Path
    images: Path
    count: int = 0
    due: dict[int, Due] = field(default_factory=dict)

    def settings(self, policy: str, allowed: int | None = None) -> dict[str, Any]:
        """Of a run on it. allowed: bad samples; all of its own by default."""
        number = len(self.due) if allowed is None else allowed
        return {
            "data__path": str(self.path),
            "data__images": str(self.images),
            "data__bad_samples": policy,
            "data__bad_sample_limit": max(0.0, number - 0.5) / self.count,
            "max_length": MAX_LENGTH,
        }


def write_image_data(folder: Path, faults: Sequence[ImageFault]) -> FaultyData:
    """An array whose records name these files, among as many good ones, odd ones first."""
    data = _data_set(folder, "images.json")
    odd = fine_images()
    files: list[ImageFault | FineImage] = [*faults, *odd]
    for file in files:
        write_content(data.images / file.file, file.content)
    records: list[Any] = [*faults, *(talk(one.name, None, one.file) for one in odd)]
    records = _with_good(records, 2 * len(faults))
    data.count = len(records)
    for index, one in enumerate(records):
        if isinstance(one, ImageFault):
            data.due[index] = Due(one.file, one.says, one.file, True, one.seen != "pixels")
            records[index] = talk(one.file, None, one.file)
    data.path.write_text(json.dumps(records), encoding="utf-8")
    return data


def write_record_data(folder: Path, kind: Kind) -> FaultyData:
    """A file of that kind with all its faults among as many good records, odd ones first."""
    faults = [fault for fault in record_faults() if fault.kind == kind]
    data = _data_set(folder, {"array": "d.json", "lines": "d.jsonl", "shard": "d.tar"}[kind])
    odd = () if kind == "shard" else fine_records()
    records = _with_good([*faults, *odd], 2 * len(faults))
    data.count = len(records)
    contents = [one.content if isinstance(one, RecordFault) else one for one in records]
    for index, one in enumerate(records):
        if isinstance(one, RecordFault):
            place = f"record {index}"
            if kind == "shard":
                place = f"sample '{index:02d}-{one.name}'"
            elif kind == "lines" and isinstance(one.content, str):
                place = f"line {2 * index + 1}"
            data.due[index] = Due(one.name, one.says, place, one.keeps_text)
    if kind == "array":
        data.path.write_text(json.dumps(contents), encoding="utf-8")
    elif kind == "lines":  # as an editor may leave it: a byte order mark, CRLF, empty lines
        lines = [c if isinstance(c, str) else json.dumps(c, ensure_ascii=False) for c in contents]
        data.path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    else:
        data.path.write_bytes(tar([_sample(index, one, data) for index, one in enumerate(records)]))
    return data


def _sample(index: int, one: Any, data: FaultyData) -> tuple[str, dict[str, bytes]]:
    """Key and members of a sample in a shard."""
    if isinstance(one, RecordFault):
        return f"{index:02d}-{one.name}", dict(one.content)
    members = {"json": json.dumps({**one, "image": None}).encode()}
    if "image" in one:
        members["png"] = (data.images / one["image"]).read_bytes()
    return f"{index:02d}-good", members


def _data_set(folder: Path, name: str) -> FaultyData:
    """The folder with the images that records share; several data sets may lie in one."""
    images = folder / "images"
    if not images.exists():
        images.mkdir(parents=True)
        save_png(pixels(), images / GOOD)
        save_png(pixels(), folder / STRAY)
        (images / STRAY).symlink_to(Path("..") / STRAY)
    return FaultyData(folder / name, images)


def _with_good(records: list[Any], count: int) -> list[Any]:
    """Filled up to `count` with ordinary records, with and without image, in a drawn order."""
    ordinary = (talk("with", [{**QUESTION, "value": TAG + "A cat?"}, ANSWER], GOOD), talk("text"))
    records = records + [ordinary[number % 2] for number in range(count - len(records))]
    random.Random(0).shuffle(records)
    return records
