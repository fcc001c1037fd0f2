"""The settings of `data generate`, and the amounts of its three kinds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import urlsplit

from ..hd.errors import UsageError
from ..hd.grid import suggest
from .record_images import path_fault

Kind = Literal["conversation", "detail", "reasoning"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LimitField = Literal["max_tokens", "max_completion_tokens"]

TEMPERATURE_STEP = 0.2  # hotter by so much each time that an answer was invalid ...
TEMPERATURE_TOP = 1.0  # ... up to this, or the given one where that is higher


@dataclass(frozen=True)
class GenerateSettings:
    """What makes the answers; all of it must stay as it is when a run goes on.

    temperature: None leaves it to the server. max_tokens: of one answer. tries: how often an image
    is asked about until the answer is valid. send_seed: ask the server for repeatable answers.
    limit_field: the protocol's name of the limit. image_prefix: folder of the images below the
    trainer's image root.
    """

    model: str
    seed: int = 0
    temperature: float | None = 0.7
    max_tokens: int = 1024
    tries: int = 3
    send_seed: bool = True
    limit_field: LimitField = "max_tokens"
    image_prefix: str = ""

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise UsageError("model is empty; name the one that the endpoint serves")
        if self.seed < 0:
            raise UsageError(f"seed must be 0 or more, not {self.seed}")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise UsageError(f"temperature must be from 0 to 2, not {self.temperature:g}")
        for name, value in (("max_tokens", self.max_tokens), ("tries", self.tries)):
            if value < 1:
                raise UsageError(f"{name} must be 1 or more, not {value}")
        if self.limit_field not in get_args(LimitField):
            hint = suggest(self.limit_field, get_args(LimitField))
            raise UsageError(f"limit_field {self.limit_field!r} is unknown; {hint}")
        fault = path_fault(self.image_prefix) if self.image_prefix else None
        if fault:
            raise UsageError(
                f"image_prefix {self.image_prefix!r} {fault}; name a folder below the image root"
            )

    def hotness(self, attempt: int) -> float | None:
        """The temperature of the attempt, counted from 0."""
        if self.temperature is None:
            return None
        top = max(self.temperature, TEMPERATURE_TOP)
        return round(min(self.temperature + TEMPERATURE_STEP * attempt, top), 6)


def check_endpoint(url: str) -> str:
    """The address without a slash at its end. UsageError for what is none, or holds a secret: the
    address is written into files, so a key in it would be too."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        raise UsageError(
            "--endpoint is no address of a server; give one like http://localhost:8000/v1"
        )
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise UsageError(
            f"--endpoint at {host} holds a user name or a query; give the bare address, and the "
            "key in the environment variable of --key-env"
        )
    return url.rstrip("/")


@dataclass(frozen=True)
class Amount:
    """How many images of a kind: a number, or a share of all (exactly one is set)."""

    count: int | None = None
    share: float | None = None

    def of(self, images: int, kind: Kind) -> int:
        """The number out of so many images. UsageError where there are fewer."""
        if self.share is not None:
            return int(images * self.share + 0.5)
        count = self.count or 0
        if count > images:
            raise UsageError(
                f"--kinds {kind}={count}: there are only {images} images with annotations; ask for "
                "no more, or give more annotation files"
            )
        return count


def parse_kinds(text: str) -> dict[Kind, Amount]:
    """`conversation=58000,detail=0.2,reasoning=65%` -> amounts, in the order of KINDS.

    A whole number is a count; a number with a point, or per cent, is a share of the images.
    """
    found: dict[str, Amount] = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if name not in KINDS:
            raise UsageError(f"--kinds {name!r} is unknown; {suggest(name, KINDS)}")
        if name in found:
            raise UsageError(f"--kinds names {name} twice; give each kind once")
        if not equals:
            raise UsageError(f"--kinds {name} has no amount; write {name}=1000 or {name}=0.5")
        found[name] = _amount(name, value)
    return {kind: found[kind] for kind in KINDS if kind in found}


def _amount(name: str, text: str) -> Amount:
    remedy = "give a count such as 1000, or a share such as 0.5 or 50%"
    try:
        if text.endswith("%"):
            amount = Amount(share=float(text[:-1]) / 100)
        elif "." in text:
            amount = Amount(share=float(text))
        else:
            amount = Amount(count=int(text))
    except ValueError:
        raise UsageError(f"--kinds {name}={text} is no number; {remedy}") from None
    if amount.count is not None and amount.count < 1:
        raise UsageError(f"--kinds {name}={text} is below 1; {remedy}, or leave the kind out")
    share = amount.share
    if share is not None and not (math.isfinite(share) and 0 < share <= 1):
        raise UsageError(f"--kinds {name}={text} is no share above 0 and at most 1; {remedy}")
    return amount
