"""The comparison of two models as report.json and report.html; its sections serve other reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hd.errors import DataError
from ..hd.grid import HDConfig
from ..hd.image import image_size, load_image
from ..hd.plan import plan_image
from ..hd.preview import draw_plan
from .charts import bar_chart, difference_chart
from .compare import MEAN, METRICS, Comparison, is_right, matched
from .contestants import Contestant, interval, run_facts, show_p, verdict, warnings_of
from .files import find_image, json_text, write_whole
from .pope import PARSERS, score_table
from .pope_data import Answered
from .report import (
    Block,
    Card,
    CardAnswer,
    Cards,
    Facts,
    Note,
    Picture,
    Pictures,
    Section,
    Table,
    picture,
    render,
)

if TYPE_CHECKING:
    from PIL.Image import Image

CARDS_PER_SIDE = 8
GALLERY_IMAGES = 2
GALLERY_PX = 560
CARD_PX = 192

Pair = tuple[Answered, Answered]  # one question as A and as B answer it
Pairs = tuple[Sequence[Pair], Sequence[Pair]]  # only B right, only A right


def write_comparison(
    out: Path, a: Contestant, b: Contestant, comparison: Comparison, images: Path | None
) -> None:
    """Write report.json and report.html into `out`; `images` is their folder, if it is known.

    Both are made before either is written.
    """
    values = json_text(comparison_json(a, b, comparison))
    page = render(
        f"POPE: {a.name} and {b.name}",
        comparison_sections(a, b, comparison, images),
        f"{comparison.num_questions} questions about {comparison.num_images} images, "
        "answered by both models and compared question by question",
    )
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "report.json", values)
    write_whole(out / "report.html", page)


def comparison_json(a: Contestant, b: Contestant, comparison: Comparison) -> dict[str, Any]:
    """JSON-able: both sides with their scores by both parsers, paired statistics, warnings."""

    def side(contestant: Contestant) -> dict[str, Any]:
        return {
            "name": contestant.name,
            "answers": str(contestant.answers),
            "run": contestant.run.to_dict() if contestant.run else None,
            "scores": score_table(contestant.answered),
        }

    return {
        "a": side(a),
        "b": side(b),
        "comparison": comparison.to_dict(),
        "warnings": warnings_of(a, b, comparison),
    }


@dataclass
class Album:
    """The images of the questions, as far as they can be shown.

    folder: None when it is not known. faults: why, by name, for those that were asked for in vain.
    """

    folder: Path | None
    faults: dict[str, str] = field(default_factory=dict)

    def load(self, name: str) -> Image | None:
        """The image, or None: a report is not to fail on a picture that only adorns it."""
        if self.folder is None or name in self.faults:
            return None
        try:
            path = find_image(self.folder, name)
            if path is not None:
                return load_image(path)
            self.faults[name] = f"{self.folder / name}: no such file"
        except DataError as error:
            self.faults[name] = str(error)
        return None

    def notes(self) -> list[Note]:
        """How many images are not shown, and why the first is not."""
        if not self.faults:
            return []
        number = "1 image is" if len(self.faults) == 1 else f"{len(self.faults)} images are"
        first = next(iter(self.faults.values()))
        return [Note(f"{number} missing, damaged or refused and not shown: {first}", "warning")]


def comparison_sections(
    a: Contestant, b: Contestant, comparison: Comparison, images: Path | None
) -> list[Section]:
    """Verdict and scores, differences, examples, what each model sees, how it was measured."""
    examples = discordant(a, b, comparison.parser)
    album = Album(images)
    sections = [
        _scores_section(a, b, comparison),
        _difference_section(a, b, comparison),
        _examples_section(a, b, comparison.parser, examples, album),
    ]
    gallery = _gallery_section(a, b, examples, album)
    return [*sections, *([gallery] if gallery else []), _method_section(a, b, comparison)]


def _scores_section(a: Contestant, b: Contestant, comparison: Comparison) -> Section:
    splits = list(comparison.difference)
    clear = comparison.difference[MEAN]["f1"].clear
    notes = [Note(verdict(a.name, b.name, comparison), "good" if clear else "plain")]
    notes += [Note(warning, "warning") for warning in warnings_of(a, b, comparison)]
    chart = bar_chart(
        "F1 by split, with 95 % intervals",
        splits,
        {
            a.name: [comparison.a[split]["f1"] for split in splits],
            b.name: [comparison.b[split]["f1"] for split in splits],
        },
    )
    rows: list[list[str]] = []
    strong: list[int] = []
    for split in splits:
        for name, figures in ((a.name, comparison.a), (b.name, comparison.b)):
            if split == MEAN:
                strong.append(len(rows))
            values = figures[split]
            rows.append(
                [
                    split if name == a.name else "",
                    name,
                    *(f"{values[metric].value:.4f}" for metric in METRICS),
                ]
            )
    columns = ["split", "model", *(_label(metric) for metric in METRICS)]
    table = Table(columns, rows, f"Scores by the {comparison.parser} parser.", strong)
    return Section("Scores", "", [*notes, chart, table])


def _difference_section(a: Contestant, b: Contestant, comparison: Comparison) -> Section:
    rows = [
        (f"{split}, {_label(metric)}", comparison.difference[split][metric])
        for split in comparison.difference
        for metric in ("f1", "accuracy")
    ]
    chart = difference_chart(
        f"{b.name} minus {a.name}", rows, f"difference (right of 0: {b.name} is higher)"
    )
    differences = Table(
        ["split", "F1", "p", "accuracy", "p"],
        [
            [
                split,
                interval(figures["f1"], signed=True),
                show_p(figures["f1"].p),
                interval(figures["accuracy"], signed=True),
                show_p(figures["accuracy"].p),
            ]
            for split, figures in comparison.difference.items()
        ],
        "Differences with 95 % intervals, and p against no difference: bootstrap over images.",
        [len(comparison.difference) - 1],
    )
    tests = Table(
        ["split", f"only {a.name} right", f"only {b.name} right", "p"],
        [
            [split, str(test.only_a), str(test.only_b), show_p(test.p)]
            for split, test in comparison.mcnemar.items()
        ],
        "McNemar's exact test on the questions that exactly one model has right; it takes "
        "questions as independent.",
        [len(comparison.mcnemar) - 1],
    )
    return Section("Differences, paired", "", [chart, differences, tests])


def _label(metric: str) -> str:
    return {"f1": "F1", "yes_ratio": "yes ratio"}.get(metric, metric)


def discordant(a: Contestant, b: Contestant, parser: str) -> tuple[list[Pair], list[Pair]]:
    """The questions that only B has right, and those that only A has right.

    Splits take turns, in the order of the questions, and a question that several splits ask
    appears once.
    """
    only_a: list[Pair] = []
    only_b: list[Pair] = []
    read = PARSERS[parser]
    for x, y in zip(a.answered, matched(a.answered, b.answered), strict=True):
        if is_right(x, read) != is_right(y, read):
            (only_a if is_right(x, read) else only_b).append((x, y))
    return _taking_turns(only_b), _taking_turns(only_a)


def _taking_turns(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with the splits in turn; equal questions about equal images once."""
    place: dict[str, int] = {}
    ranked, seen = [], set()
    for pair in pairs:
        item = pair[0]
        if (item.image, item.question) not in seen:
            seen.add((item.image, item.question))
            place[item.split] = place.get(item.split, 0) + 1
            ranked.append((place[item.split], pair))
    return [pair for _, pair in sorted(ranked, key=lambda entry: entry[0])]


def _examples_section(
    a: Contestant,
    b: Contestant,
    parser: str,
    examples: Pairs,
    album: Album,
) -> Section:
    blocks: list[Block] = []
    for winner, pairs in ((b, examples[0]), (a, examples[1])):
        cards = [
            Card(
                question=x.question,
                label=x.label,
                remark=x.split,
                picture=_picture_of(x, album),
                answers=[
                    CardAnswer(side.name, item.text, is_right(item, PARSERS[parser]))
                    for side, item in ((a, x), (b, y))
                ],
            )
            for x, y in pairs[:CARDS_PER_SIDE]
        ]
        shown = f"the first {len(cards)} of {len(pairs)} questions" if pairs else "no question"
        caption = f"Only {winner.name} is right: {shown}."
        blocks.append(Cards(cards, caption))
    blocks += album.notes()
    intro = (
        "Questions that exactly one model answers right: the first of each split in turn, not "
        "chosen by hand; a question that several splits ask is shown once."
    )
    return Section("Where the two differ", intro, blocks)


def _picture_of(item: Answered, album: Album) -> Picture | None:
    image = album.load(item.image)
    return None if image is None else picture(image, item.image, max_px=CARD_PX)


def _gallery_section(
    a: Contestant,
    b: Contestant,
    examples: Pairs,
    album: Album,
) -> Section | None:
    """What each model sees of the first example images; None when that is not known."""
    geometries = [
        (side.name, HDConfig.from_dict(side.run.model["hd"]))
        for side in (a, b)
        if side.run is not None and side.run.model.get("hd")
    ]
    cards = [pair[0].image for pairs in examples for pair in pairs[:CARDS_PER_SIDE]]
    loaded = ((name, album.load(name)) for name in dict.fromkeys(cards))  # one by one: may be large
    found = ((name, image) for name, image in loaded if image is not None)
    shown = list(islice(found, GALLERY_IMAGES))
    if not geometries or not shown:
        return None
    if len(geometries) == 2 and geometries[0][1] == geometries[1][1]:
        geometries = [("both models", geometries[0][1])]
    pictures = [
        sight(image, config, f"{name} as seen by {model}")
        for name, image in shown
        for model, config in geometries
    ]
    intro = "Yellow lines part the tiles, the green frame holds the patches that become tokens."
    return Section("What the models see", intro, [Pictures(pictures)])


def sight(image: Image, config: HDConfig, caption: str) -> Picture:
    """The picture of hd/preview.py: an image under the tiles and patches of a geometry."""
    plan = plan_image(image_size(image), config)
    tiles = "1 tile" if plan.num_tiles == 1 else f"{plan.num_tiles} tiles"
    text = f"{caption}: {tiles}, {plan.num_tokens} visual tokens"
    return picture(draw_plan(image, plan), caption, text, max_px=GALLERY_PX)


def _method_section(a: Contestant, b: Contestant, comparison: Comparison) -> Section:
    pairs = [
        ("parser", f"{comparison.parser} (bench/pope.py)"),
        ("questions, images", f"{comparison.num_questions}, {comparison.num_images}"),
        (
            "intervals",
            f"95 %, percentile bootstrap over images, {comparison.resamples} resamples, "
            f"seed {comparison.seed}; the same resamples for both models and all splits",
        ),
        ("tests", "bootstrap p, two-sided; McNemar's exact test on the discordant questions"),
    ]
    for side in (a, b):
        pairs += [(f"{side.name}: {name}", value) for name, value in run_facts(side)]
    return Section("How this was measured", "", [Facts(pairs)])
