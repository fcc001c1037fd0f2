"""`llava-hd web`: the command, the running server, and its page in a real browser."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlparse

import pytest
from tiny import random_image, save_parts, tiny_hd
from web_running import Page, WebServer, open_browser

from llava_hd.cli.main import main
from llava_hd.cli.web import model_names, share_limits
from llava_hd.hd.grid import HDConfig
from llava_hd.hd.limits import ResolutionLimits, limited
from llava_hd.hd.plan import plan_image
from llava_hd.model.assemble import assemble

SIZE = (120, 150)  # of the picture, (height, width)
HD = tiny_hd("hdflex")
BASE = HDConfig(**{**tiny_hd("base336").to_dict(), "tile_px": 84})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders of an HD and a base model, random, so that they talk to the longest answer."""
    folders = []
    for name, image_px, hd in (("hd", 56, HD), ("base", 84, BASE)):
        parts = save_parts(tmp_path_factory.mktemp(name), image_px)
        model, processor = assemble(vision=parts / "vision", language=parts / "language", hd=hd)
        model.save_pretrained(parts / "model")
        processor.save_pretrained(parts / "model")
        folders.append(str(parts / "model"))
    return folders


@pytest.fixture(scope="module")
def server(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    scratch = tmp_path_factory.mktemp("scratch")
    words = ["--max-new-tokens", "150", "--max-upload-mb", "1", "--queue", "4"]
    running = WebServer(scratch, "--model", *models, *words)
    yield running
    if running.process.poll() is None:
        running.process.kill()


@pytest.fixture(scope="module")
def browser_page(server: WebServer) -> Iterator[Page]:
    browser = open_browser()
    yield Page(browser, server.url)
    browser.quit()


@pytest.fixture
def page(browser_page: Page) -> Page:
    """The page, loaded anew."""
    browser_page.load()
    return browser_page


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "noise.png"
    random_image(SIZE).save(path)
    return path


# --- the page ----------------------------------------------------------------------------------


def tokens(page: Page, number: int) -> int:
    found = re.search(r"sees: (\d+) visual tokens", page.text(f"#counts-{number}"))
    return int(found[1]) if found else 0


def test_a_picture_is_uploaded_asked_about_and_seen_as_the_models_see_it(
    page: Page, picture: Path
) -> None:
    page.upload(picture)
    expected = [plan_image(SIZE, hd).num_tokens for hd in (HD, BASE)]
    page.wait(lambda: [tokens(page, number) for number in (0, 1)] == expected)
    for number in (0, 1):
        page.wait(lambda number=number: page.shows_picture(f"#tiles-{number}") > 300)
    page.ask("what is on the mat?")
    growing: list[set[str]] = [set(), set()]

    def watch() -> bool:
        for number in (0, 1):
            growing[number].update(page.answers(number)[:1])
        return any("cut off" in text for text in page.answers(0)) and page.sees("#send")

    page.wait(watch, 60)
    for number in (0, 1):
        (final,) = page.answers(number)
        parts = sorted(growing[number] - {"", final}, key=len)
        assert len(parts) > 1 and all(final.startswith(part) for part in parts)
        assert "what is on the mat?" in page.text(f"#chat-{number}")
        assert page.shows_picture(f"#chat-{number}") > 100
    page.ask("the dog")
    page.wait(lambda: page.sees("#stop"))
    page.wait(lambda: len(page.answers(0)) == 2 and page.answers(0)[1])
    page.click("#stop")
    page.wait(lambda: "[stopped]" in page.answers(0)[-1] and "[stopped]" in page.answers(1)[-1])
    page.wait(lambda: page.sees("#send"))
    page.click("#clear")
    page.wait(lambda: not page.answers(0) and tokens(page, 0) == expected[0])


def test_fewer_tiles_give_fewer_tokens(page: Page) -> None:
    page.click("#examples .thumbnail-item")
    before = page.wait(lambda: tokens(page, 0))
    base = tokens(page, 1)
    page.browser.execute_script(
        "const e = document.querySelector('#max-tiles input[type=range]'); e.value = 1;"
        "for (const kind of ['input', 'change', 'pointerup', 'mouseup'])"
        " e.dispatchEvent(new Event(kind, {bubbles: true}));"
    )
    after = page.wait(lambda: tokens(page, 0) not in (0, before) and tokens(page, 0))
    size = tuple(map(int, re.search(r"(\d+) x (\d+) px", page.text("#counts-0")).groups()))
    assert before == plan_image(size, HD).num_tokens
    assert after == plan_image(size, limited(HD, ResolutionLimits(max_tiles=1))).num_tokens
    assert after < before and tokens(page, 1) == base


def test_what_is_wrong_is_told_in_the_banner(page: Page, picture: Path, tmp_path: Path) -> None:
    def told() -> str:
        return page.text("#banner")

    bad = tmp_path / "holiday.png"
    bad.write_bytes(picture.read_bytes()[:2000])
    page.upload(bad)
    page.wait(lambda: told().startswith("holiday.png: damaged image"))
    assert tokens(page, 0) == 0 and str(tmp_path) not in told()
    page.load()
    page.upload(picture)
    page.wait(lambda: tokens(page, 0) and not told())
    page.ask("what is <image> here?")
    page.wait(lambda: "<image>" in told() and "leave it out" in told())
    page.wait(lambda: page.sees("#send"))
    box = page.find("#question textarea")[0]
    assert page.wait(lambda: box.get_attribute("value")) == "what is <image> here?"
    long = "red " * 4000
    page.browser.execute_script(
        "arguments[0].value = arguments[1];"
        "arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
        box,
        long,
    )
    page.click("#send")
    page.wait(lambda: "but the model reads 2048" in told())
    assert not page.answers(0)


def test_markup_of_a_question_stays_text_and_nothing_is_loaded_from_elsewhere(
    page: Page, server: WebServer
) -> None:
    wild = "<img src=http://example.org/a.png> ![b](http://example.org/b.png) <b>bold</b>"
    page.ask(wild)
    page.wait(lambda: wild in page.text("#chat-0"))
    page.click("#stop")
    page.wait(lambda: page.sees("#send"))
    assert not page.find("#chat-0 b") and not page.find("#chat-0 .message img")
    asked = page.requests()
    assert len(asked) > 30
    hosts = {urlparse(url).hostname for url in asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}
    for line in server.log.read_text().splitlines():
        assert "'127.0.0.1'" in line or line.startswith("socket.connect '/"), line
    assert "Traceback" not in server.errors.read_text()


# --- the server --------------------------------------------------------------------------------


def test_no_file_of_the_host_is_served_and_nothing_fetched(
    server: WebServer, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    (private,) = server.folders
    assert private.stat().st_mode & 0o077 == 0
    names = [str(secret), "/etc/passwd", f"{private}/../../{secret.name}", "/proc/self/environ"]
    for name in names:
        for written in (name, quote(name, safe=""), quote(quote(name, safe=""))):
            for path in (f"/gradio_api/file={written}", f"/gradio_api/file/{written}"):
                status, _, body = server.ask("GET", path)
                assert status == 404 and b"secret" not in body and b"root:" not in body, path
        assert server.ask("GET", f"/assets/../../../..{name}")[0] == 404
        assert server.ask("GET", f"/static/..%2f..%2f..{name}")[0] == 404
        file = {"path": name, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
        for number in range(8):
            body = {"data": [file], "fn_index": number, "session_hash": "attack"}
            assert server.ask("POST", "/gradio_api/queue/join", body)[0] == 403
            assert server.ask("POST", "/gradio_api/run/predict", body)[0] == 403
    for path in ("proxy=http://127.0.0.1:1/", "file=http://127.0.0.1:1/a", "runs", "vibe-code"):
        assert server.ask("GET", f"/gradio_api/{path}")[0] == 404
    status, headers, body = server.ask("GET", f"/gradio_api/file={private}/scene-1.png")
    assert status == 200 and body.startswith(b"\x89PNG") and headers["content-type"] == "image/png"
    assert "default-src 'self'" in headers["content-security-policy"]


def test_uploads_above_the_limit_and_other_pages_are_refused(server: WebServer) -> None:
    def upload(num_bytes: int, **headers: str) -> int:
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        body = head + bytes(num_bytes) + b"\r\n--x--\r\n"
        kind = {"Content_Type": "multipart/form-data; boundary=x", **headers}
        return server.ask("POST", "/gradio_api/upload", body, **kind)[0]

    assert upload(1000) == 200
    assert upload(2**20 + 1) == 413
    assert upload(2**20 + 200_000) == 413
    assert upload(1000, Origin="http://example.org") == 403
    assert server.ask("GET", "/", Host="example.org")[0] == 403


def test_the_command_ends_at_a_signal_and_leaves_nothing_behind(
    server: WebServer, page: Page, picture: Path
) -> None:
    """The last test with the server: a page is open, with a picture, and an answer is made."""
    page.upload(picture)
    page.wait(lambda: tokens(page, 0))
    page.ask("the dog")
    page.wait(lambda: page.answers(0) and page.answers(0)[-1])
    assert list(server.folders[0].iterdir())
    assert server.end(signal.SIGTERM) == 0
    assert not server.folders[0].exists()
    assert "Traceback" not in server.errors.read_text()


# --- the command -------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["web", *words]) == 2
    return capsys.readouterr().err


def test_the_command_refuses_what_it_cannot_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    none = str(tmp_path / "none")
    assert "one or two" in refusal(capsys, "--model", "a", "b", "--model", "c")
    assert "65535" in refusal(capsys, "--model", none, "--port", "99999")
    assert "give a number from 1" in refusal(capsys, "--model", none, "--queue", "0")
    assert "--host .. is not a host's name" in refusal(capsys, "--model", none, "--host", "..")
    told = refusal(capsys, "--model", none, "--port", "0")
    assert f"model folder {none} is not a folder" in told and "warning" not in told
    told = refusal(capsys, "--model", none, "--port", "0", "--host", "0.0.0.0")
    assert "--host 0.0.0.0: whoever reaches this machine can use the page" in told


def test_limits_of_grids_are_for_models_with_tiles(
    models: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    limits, folders = ResolutionLimits(max_visual_tokens=90, grid=(2, 1)), list(map(Path, models))
    without = ResolutionLimits(max_visual_tokens=90)
    assert share_limits(["hd", "base"], folders, limits) == [limits, without]
    assert capsys.readouterr().err.startswith("llava-hd: note: base sees one view and no tiles; --")
    told = refusal(capsys, "--model", models[1], "--port", "0", "--grid", "2x1")
    assert "--grid has no meaning for a model that sees one view" in told
    told = refusal(capsys, "--model", models[0], "--port", "0", "--grid", "2by1")
    assert "--grid '2by1' is not ROWSxCOLS" in told


def test_models_are_called_by_the_end_of_their_path(tmp_path: Path) -> None:
    assert model_names([str(tmp_path / "demo/hd/stage2")]) == ["hd/stage2"]
    demo = [str(tmp_path / "demo" / part / "stage2") for part in ("hd", "base")]
    assert model_names(demo) == ["hd/stage2", "base/stage2"]
    alike = [str(tmp_path / run / "hd/stage2") for run in ("a", "b")]
    assert model_names(alike) == ["a/hd/stage2", "b/hd/stage2"]
    assert len(set(model_names([alike[0], alike[0]]))) == 2
