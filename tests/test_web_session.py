"""cli/web_session.py and cli/web_tab.py: the page's conversations, without a page."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny import random_image, save_parts, tiny_hd

from llava_hd.bench.faults_images import encoded
from llava_hd.cli.web_events import tile_count
from llava_hd.cli.web_pictures import Picture, fitting_presets, read_picture
from llava_hd.cli.web_session import Entrant, Hall
from llava_hd.cli.web_tab import Geometry, Tab, WebLimits
from llava_hd.hd.errors import DataError, LlavaHDError, UsageError
from llava_hd.hd.grid import HDConfig
from llava_hd.hd.limits import ResolutionLimits
from llava_hd.hd.plan import plan_image
from llava_hd.model.assemble import assemble
from llava_hd.model.chat import ContextFull
from llava_hd.model.generate import answer
from llava_hd.model.prompt import SampleError

LIMITS = WebLimits(max_new_tokens=12, max_tabs=3, max_caches=1, waiting=2, seconds_kept=0.0)


@pytest.fixture(scope="module")
def entrants(tmp_path_factory: pytest.TempPathFactory) -> tuple[Entrant, Entrant]:
    """An HD model, and a base model with one view of 84 px."""
    found = []
    for name, image_px, hd in (
        ("hd", 56, tiny_hd("hdflex")),
        ("base", 84, HDConfig(**{**tiny_hd("base336").to_dict(), "tile_px": 84})),
    ):
        parts = save_parts(tmp_path_factory.mktemp(name), image_px)
        model, processor = assemble(vision=parts / "vision", language=parts / "language", hd=hd)
        found.append(Entrant(name, model.eval(), processor))
    return found[0], found[1]


@pytest.fixture
def hall(entrants, tmp_path: Path) -> Hall:
    return Hall(entrants, tmp_path, LIMITS)


@pytest.fixture
def tab(hall: Hall) -> Tab:
    return hall.enter("page")


def picture(hall: Hall, seed: int = 0, size: tuple[int, int] = (60, 90)) -> Picture:
    path = hall.folder / f"given-{seed}.png"
    random_image(size, seed).save(path)
    return read_picture(path, "given.png", hall.limits.images, hall.folder)


def ask(tab: Tab, question: str) -> int:
    """Ask to the end; how often there was something to show."""
    tab.expect(question)
    return sum(1 for _ in tab.answer())


def texts(tab: Tab, number: int) -> list[str]:
    return [m.text if m.picture is None else "<picture>" for m in tab.messages(number)]


def test_each_model_answers_as_when_it_is_asked_alone(hall: Hall, tab: Tab) -> None:
    given = picture(hall)
    tab.place(given)
    assert ask(tab, "  what is on the mat? ") > 3
    for number, entrant in enumerate(hall.entrants):
        alone = answer(entrant.model, entrant.processor, given.image, "what is on the mat?", 12)
        assert texts(tab, number) == ["<picture>", "what is on the mat?", alone]
        assert tab.messages(number)[-1].note == "cut off at the longest answer"


def test_an_answer_grows_while_it_is_made(hall: Hall, tab: Tab) -> None:
    tab.place(picture(hall))
    tab.expect("the dog")
    seen: list[list[list[str]]] = [[texts(tab, n) for n in (0, 1)] for _ in tab.answer()]
    for number in (0, 1):
        said = [shown[number][-1] for shown in seen]
        assert all(shown[number][:2] == ["<picture>", "the dog"] for shown in seen)
        assert said[0] == "" and said[-1] == texts(tab, number)[-1]
        assert all(later.startswith(earlier) for earlier, later in pairwise(said))
        assert len(set(said)) > 3


def test_a_picture_is_given_once_and_another_one_with_the_next_question(
    hall: Hall, tab: Tab
) -> None:
    tab.place(picture(hall, 1))
    for question in ("the dog", "the cat"):
        ask(tab, question)
    tab.place(picture(hall, 2))
    ask(tab, "red")
    tab.place(None)
    ask(tab, "green")
    shown = [text for text in texts(tab, 0) if text in ("<picture>", "the dog", "the cat", "red")]
    assert shown == ["<picture>", "the dog", "the cat", "<picture>", "red"]
    pictures = [m.picture for m in tab.messages(0) if m.picture]
    assert len(set(pictures)) == 2 and all(path.is_file() for path in pictures)


def test_a_picture_that_is_changed_while_an_answer_is_made_is_not_shown_with_it(
    hall: Hall, tab: Tab
) -> None:
    first = picture(hall, 1)
    tab.place(first)
    tab.expect("the dog")
    running = tab.answer()
    next(running)
    tab.place(picture(hall, 2))
    for _ in running:
        assert [m.picture for m in tab.messages(0) if m.picture] == [first.thumbnail]
    assert first.thumbnail.is_file()


def test_stop_keeps_what_was_said_and_the_conversation_goes_on(hall: Hall, tab: Tab) -> None:
    tab.expect("the dog")
    running = tab.answer()
    for _ in range(5):
        next(running)
    said = texts(tab, 0)[-1]
    tab.stop()
    assert not list(running) or texts(tab, 0)[-1] == said
    assert said and texts(tab, 0) == ["the dog", said]
    assert tab.messages(0)[-1].note == "stopped"
    ask(tab, "the cat")
    assert len(tab.messages(0)) == 4 and tab.messages(0)[-1].note != "stopped"


def test_a_question_that_is_stopped_before_its_turn_is_given_back(tab: Tab) -> None:
    tab.expect("the dog")
    tab.stop()
    assert list(tab.answer()) == []
    assert tab.give_up() == "the dog" and tab.give_up() == ""
    assert tab.messages(0) == []


def test_a_page_that_is_closed_in_the_middle_frees_the_models(hall: Hall, tab: Tab) -> None:
    tab.place(picture(hall))
    tab.seen()
    tab.expect("the dog")
    running = tab.answer()
    for _ in range(3):
        next(running)
    hall.leave("page")
    list(running)
    kept = {path.name for path in hall.folder.iterdir()}
    assert kept == {"given-0.png"}
    other = hall.enter("other")
    assert ask(other, "the dog") > 1
    abandoned = hall.enter("third")
    abandoned.expect("the cat")
    running = abandoned.answer()
    next(running)
    running.close()  # what Gradio does when the connection is gone
    assert ask(abandoned, "the cat") > 1


def test_one_answer_at_a_time_in_a_page(tab: Tab) -> None:
    tab.expect("the dog")
    running = tab.answer()
    next(running)
    for act in (tab.clear, lambda: tab.set_geometry(Geometry("hd448")), lambda: tab.expect("x")):
        with pytest.raises(UsageError, match="an answer is being made"):
            act()
    assert len(list(running)) > 1
    tab.clear()
    assert tab.messages(0) == tab.messages(1) == []


def test_no_more_questions_wait_than_may(hall: Hall) -> None:
    first, second, third = (hall.enter(key) for key in ("a", "b", "c"))
    first.expect("the dog")
    second.expect("the cat")
    with pytest.raises(UsageError, match="busy: 2 questions wait already"):
        third.expect("red")
    running = first.answer()
    next(running)
    assert first.is_answering and not first.is_expecting
    third.expect("red")
    list(running)
    second.give_up()
    assert ask(first, "green") > 1


def test_what_cannot_be_asked_changes_nothing(hall: Hall, tab: Tab) -> None:
    tab.place(picture(hall))
    ask(tab, "the dog")
    before = [texts(tab, number) for number in (0, 1)]
    for question, says in (
        ("  ", "empty"),
        ("x" * 20_001, "20001 characters"),
        ("half \ud83d", "half of a character"),
    ):
        with pytest.raises(UsageError, match=says):
            tab.expect(question)
    tab.expect("what is <image> here?")
    with pytest.raises(SampleError, match="<image>"):
        list(tab.answer())
    assert tab.give_up() == "what is <image> here?"
    tab.expect("the mat is red " * 900)
    with pytest.raises(ContextFull, match="the model reads 2048"):
        list(tab.answer())
    tab.give_up()
    assert [texts(tab, number) for number in (0, 1)] == before
    assert ask(tab, "the cat") > 1


def test_a_geometry_begins_anew_and_is_noted_where_it_was_not_trained(hall: Hall, tab: Tab) -> None:
    given = picture(hall, size=(160, 160))
    tab.place(given)
    ask(tab, "the dog")
    first = [plan for plan, _ in tab.seen()]
    files = [path for _, path in tab.seen()]
    tab.set_geometry(Geometry("hdflex", 2))
    assert tab.messages(0) == [] and given.thumbnail.is_file()
    plans = [plan for plan, _ in tab.seen()]
    assert plans[0].num_tiles <= 3 < first[0].num_tiles and plans[1] == first[1]
    assert plans[0] == plan_image((160, 160), tab.geometries[0])
    assert not any(path.exists() for path in files)
    assert tab.note(0) == tab.note(1) == ""
    tab.set_geometry(Geometry(max_tiles=9))
    assert "trained on grids of at most 6 tiles" in tab.note(0) and tab.note(1) == ""
    ask(tab, "the dog")
    read = tab.chats[0].history[0].images[0].cut.plan
    assert read == plan_image((160, 160), tab.geometries[0]) and read.num_tiles > 7
    with pytest.raises(UsageError, match="unknown"):
        tab.set_geometry(Geometry("hd9"))
    assert len(tab.messages(0)) == 3


def test_a_page_begins_within_the_limits_of_the_command(entrants, tmp_path: Path) -> None:
    hd, base = entrants
    larger = replace(hd, processor=hd.processor.limited(ResolutionLimits(grid=(3, 3))))
    assert larger.is_limited and not hd.is_limited
    tab = Hall((larger, base), tmp_path, LIMITS).enter("page")
    tab.place(picture(tab.hall, size=(160, 160)))
    (plan, _), (view, _) = tab.seen()
    assert plan.grid == (3, 3) and view.num_tiles == 1
    assert "trained on grids of at most 6 tiles" in tab.note(0) and tab.note(1) == ""
    tab.set_geometry(Geometry("hd448"))
    assert tab.seen()[0][0].grid == (2, 2) and tab.note(0) == ""
    tab.set_geometry(Geometry())
    assert tab.seen()[0][0].grid == (3, 3)


def test_the_page_that_was_quiet_longest_makes_room(hall: Hall) -> None:
    tabs = {key: hall.enter(key) for key in ("a", "b", "c")}
    tabs["a"].place(picture(hall))
    assert hall.find("a") is tabs["a"]  # so b is the quietest
    hall.enter("d")
    with pytest.raises(UsageError, match="reload it"):
        hall.find("b")
    assert tabs["b"].left and not tabs["a"].left
    hall.enter("a")  # the page is loaded again: it begins empty
    assert tabs["a"].left and hall.find("a").picture is None
    assert not [path for path in hall.folder.iterdir() if path.name != "given-0.png"]
    hall.close()
    with pytest.raises(UsageError):
        hall.find("a")


def test_what_was_read_is_kept_for_the_last_pages_alone(hall: Hall) -> None:
    """max_caches is 1 here: the page that was asked last reads on, another one reads again."""

    def kept(tab: Tab) -> int:
        assert tab.chats[0].usage is not None
        return tab.chats[0].usage.kept_tokens

    first, second = hall.enter("a"), hall.enter("b")
    for key, question in (("a", "the dog"), ("a", "the cat")):
        ask(hall.find(key), question)
    assert kept(first) > 20
    ask(hall.find("b"), "the dog")
    before = texts(first, 0)
    ask(hall.find("a"), "red")
    assert kept(first) == 0 and texts(first, 0)[: len(before)] == before
    ask(hall.find("a"), "green")
    assert kept(first) > 20 and second.chats[0].usage is not None


def test_a_picture_of_every_format_can_be_asked_about(hall: Hall, tab: Tab) -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        path = hall.folder / "given"
        path.write_bytes(encoded(kind))
        tab.place(read_picture(path, f"a.{kind}", hall.limits.images, hall.folder))
        tab.clear()
        ask(tab, "red")
        assert len(tab.messages(0)) == 3


def test_memory_that_runs_out_gives_the_question_back_and_the_talk_goes_on(
    hall: Hall, tab: Tab, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(tab, "red")
    other = hall.enter("other")
    ask(other, "green")

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(hall.entrants[1].model.language.causal_lm, "forward", full)
        tab.expect("the dog")
        with pytest.raises(LlavaHDError, match=r"not enough memory .*; clear it"):
            list(tab.answer())
    assert all(chat._kept is None for chat in (*tab.chats, *other.chats))
    assert tab.give_up() == "the dog" and not tab.is_answering
    ask(tab, "the dog")
    assert texts(tab, 1)[-2] == "the dog"


def test_a_picture_with_too_many_tokens_is_refused_by_name(entrants, tmp_path: Path) -> None:
    narrow = entrants[0].processor.limited(ResolutionLimits(max_visual_tokens=30))
    hall = Hall([replace(entrants[0], processor=narrow)], tmp_path, LIMITS)
    tab = hall.enter("page")
    fits = picture(hall, 0, (60, 90))
    tab.place(fits)
    with pytest.raises(DataError, match=r"^given.png: an image of 56x56 px needs at least"):
        tab.place(picture(hall, 1, (56, 56)))
    assert tab.picture is fits
    tab.place(None)
    before = tab.geometries
    assert before[0].max_visual_tokens == 30
    for preset in fitting_presets(before[0]):
        tab.set_geometry(Geometry(preset))
        assert tab.geometries[0].max_visual_tokens == 30
    tab.set_geometry(Geometry())
    tab.place(fits)
    with pytest.raises(DataError, match=r"given\.png: .* needs at least"):
        tab.set_geometry(Geometry("hd448"))  # 2x2 alone
    assert tab.geometry == Geometry() and tab.picture is fits and tab.geometries == before


@pytest.mark.parametrize(("value", "count"), [(None, None), (0, None), (0.0, None), (3.0, 3)])
def test_the_control_of_tiles_may_be_empty(value: float | None, count: int | None) -> None:
    assert tile_count(value) == count


@pytest.mark.parametrize("value", [float("nan"), 2.5, "x", []])
def test_what_is_no_number_of_tiles_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="is not a whole number"):
        tile_count(value)
