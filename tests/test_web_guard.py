"""cli/web_guard.py: what the page lets in, asked as a server would ask it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the server's library is not installed (extra web)")

from llava_hd.cli.listening import LOOPBACK_NAMES
from llava_hd.cli.web_guard import API, MAX_CALL_BYTES, Guard, is_inside, named_files

JOIN = f"{API}/queue/join"


class Inner:
    """The application behind the guard: notes what reaches it, and reads the body."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes, bool]] = []

    async def __call__(self, scope, receive, send) -> None:
        body, whole = b"", True
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                whole = False
                break
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        self.seen.append((scope["path"], body, whole))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


class Asked:
    """A guard before an `Inner`, and what it answers."""

    def __init__(self, folder: Path, names=LOOPBACK_NAMES) -> None:
        self.inner = Inner()
        self.guard = Guard(self.inner, folder, max_upload_bytes=1000, names=names)

    def __call__(self, method: str, path: str, body: bytes = b"", **headers: str) -> int:
        sent: list[dict] = []
        given = {"host": "127.0.0.1:7860", **{k.replace("_", "-"): v for k, v in headers.items()}}
        chunks = [body[start : start + 400] for start in range(0, len(body), 400)] or [b""]

        async def receive():
            chunk = chunks.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}

        async def send(message):
            sent.append(message)

        raw = [(name.encode(), value.encode()) for name, value in given.items()]
        scope = {"type": "http", "method": method, "path": path, "headers": raw}
        asyncio.run(self.guard(scope, receive, send))
        self.headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "private" / "sha").mkdir(parents=True)
    (tmp_path / "private" / "sha" / "cat.png").write_bytes(b"cat")
    (tmp_path / "private_evil").mkdir()  # a sibling whose name begins alike
    (tmp_path / "private_evil" / "secret").write_text("secret")
    return tmp_path / "private"


def test_what_a_browser_needs_passes_and_may_load_nothing_from_elsewhere(folder: Path) -> None:
    ask = Asked(folder)
    needed = ("/", "/config", "/theme.css", "/assets/index.js", f"{API}/queue/data", "/favicon.ico")
    for path in (*needed, f"{API}/heartbeat/abc"):
        assert ask("GET", path) == 200
        policy = ask.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "unsafe-eval" not in policy
        assert not [word for word in policy.split() if "http" in word or "*" in word]
    assert ask("GET", f"{API}/file={folder}/sha/cat.png") == 200
    body = json.dumps({"data": ["a question"], "session_hash": "x"}).encode()
    assert ask("POST", JOIN, body, origin="http://127.0.0.1:7860") == 200
    assert ask.inner.seen[-1] == (JOIN, body, True)


@pytest.mark.parametrize(
    "path",
    [
        f"{API}/proxy=http://127.0.0.1/",
        f"{API}/file=http://127.0.0.1:22/",
        f"{API}/file=https://example.org/a.png",
        f"{API}/file/etc/passwd",
        f"{API}/run/answer",
        f"{API}/call/answer",
        f"{API}/api/answer",
        f"{API}/component_server",
        f"{API}/dev/reload",
        f"{API}/vibe-code",
        f"{API}/runs",
        f"{API}/custom_component/a/client/b/c",
        "/monitoring",
        "/login",
        "/docs",
        "/gradio_api",
        "/assets",
    ],
)
def test_gradios_other_routes_are_not_there(folder: Path, path: str) -> None:
    ask = Asked(folder)
    assert ask("GET", path) == 404
    assert ask("POST", path, b"{}") == 404
    assert not ask.inner.seen


def traversals(folder: Path) -> list[str]:
    up = "../" * 12
    return [
        "/etc/passwd",
        "//etc/passwd",
        "file:///etc/passwd",
        "etc/passwd",
        f"{up}etc/passwd",
        f"{folder}/../private_evil/secret",
        f"{folder}_evil/secret",
        f"{folder}/sha/../../private_evil/secret",
        f"{folder}/{up}etc/passwd",
        f"{folder}/..%2f..%2fetc/passwd",
        f"{folder}/%2e%2e/private_evil/secret",
        f"{folder}/..;/private_evil/secret",
        f"{folder}\\..\\private_evil\\secret",
        f"{folder}/sha/cat.png\0.html",
        f"{folder}/\uff0e\uff0e/private_evil/secret",
        f"{folder}/\u2025/private_evil/secret",
        f"{folder}/link/secret",
        f"{folder}/shortcut",
        f"{folder}/sha",
        f"{folder}",
        "/proc/self/environ",
        "/dev/stdin",
        "~/.bashrc",
        "",
        ".",
        "a" * 5000,
    ]


def test_no_file_outside_the_private_folder_is_served_or_read(folder: Path) -> None:
    (folder / "link").symlink_to(folder.parent / "private_evil")
    (folder / "shortcut").symlink_to("/etc/passwd")
    ask = Asked(folder)
    names = traversals(folder)
    assert len(names) >= 25
    for name in names:
        assert ask("GET", f"{API}/file={name}") == 404, name
        file = {"path": name, "meta": {"_type": "gradio.FileData"}}
        for data in ([file], [{"deep": [{"er": file}]}], {"data": file, "path": None}):
            assert ask("POST", JOIN, json.dumps({"data": data}).encode()) == 403, name
    assert not ask.inner.seen


def test_a_body_may_name_uploads_but_no_addresses(folder: Path) -> None:
    ask = Asked(folder)
    inside = {"path": str(folder / "sha" / "cat.png"), "meta": {"_type": "gradio.FileData"}}
    assert ask("POST", JOIN, json.dumps({"data": [inside]}).encode()) == 200
    for path in ("http://127.0.0.1:1/a.png", "https://example.org/a.png", "//example.org/a", 3, []):
        body = json.dumps({"data": [inside, {"path": path}]}).encode()
        assert ask("POST", JOIN, body) == 403
    assert ask("POST", JOIN, b"{not json") == 400
    assert ask("POST", JOIN, b"[" * 100_000) == 400
    assert len(ask.inner.seen) == 1


def test_only_the_page_itself_may_post_and_only_under_names_of_this_machine(folder: Path) -> None:
    ask = Asked(folder)
    for host in ("localhost", "LOCALHOST:7860", "127.0.0.1", "[::1]:7860"):
        assert ask("GET", "/", host=host) == 200
        assert ask("POST", JOIN, b"{}", host=host, origin=f"http://{host}") == 200
    for host in ("example.org", "localhost.example.org", "127.0.0.1.example.org:7860", ""):
        assert ask("GET", "/", host=host) == 403
    for origin in ("http://example.org", "null", "http://127.0.0.1:1", "http://127.0.0.1", ""):
        assert ask("POST", JOIN, b"{}", origin=origin) == 403
    open_to_all = Asked(folder, names=None)
    assert open_to_all("GET", "/", host="gpu.example.org") == 200
    assert open_to_all("POST", JOIN, b"{}", host="a.example", origin="http://b.example") == 403


def test_bodies_are_bounded_whatever_their_head_says(folder: Path) -> None:
    ask = Asked(folder)
    large = json.dumps({"data": ["x" * MAX_CALL_BYTES]}).encode()
    assert ask("POST", JOIN, large, content_length=str(len(large))) == 413
    assert ask("POST", JOIN, large) == 413
    assert ask("POST", JOIN, large, content_length="7") == 413
    assert ask("POST", JOIN, b"{}", content_length="-1") == 413
    upload = f"{API}/upload"
    assert ask("POST", upload, b"x", content_length="999999") == 413
    assert not ask.inner.seen
    ask("POST", upload, b"x" * 200_000, content_length="7")
    assert ask.inner.seen[-1][2] is False and len(ask.inner.seen[-1][1]) < 70_000
    ask("POST", upload, b"x" * 900)
    assert ask.inner.seen[-1] == (upload, b"x" * 900, True)


def test_other_methods_are_refused(folder: Path) -> None:
    ask = Asked(folder)
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert ask(method, "/") == 404
    assert ask("HEAD", "/") == 200


def test_inside_means_a_regular_file(folder: Path, tmp_path: Path) -> None:
    assert is_inside(str(folder / "sha" / "cat.png"), folder)
    assert not is_inside(str(folder / "sha" / "dog.png"), folder)
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    assert is_inside(str(linked / "sha" / "cat.png"), folder)
    assert is_inside(str(folder / "sha" / "cat.png"), linked)


def test_named_files_are_found_at_any_depth() -> None:
    deep: object = {"path": "found"}
    for _ in range(5000):
        deep = [deep]
    assert list(named_files({"a": deep, "path": None})) == ["found"]


def test_streams_of_open_pages_end_when_the_server_does(folder: Path) -> None:
    async def stream(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"alive", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"

    async def run() -> list[dict]:
        guard = Guard(stream, folder, 1000, None)
        sent: list[dict] = []

        async def send(message) -> None:
            sent.append(message)
            guard.ended.set()

        async def never():
            await asyncio.Event().wait()

        path = f"{API}/heartbeat/abc"
        scope = {"type": "http", "method": "GET", "path": path, "headers": []}
        await asyncio.wait_for(guard(scope, never, send), 5)
        return sent

    sent = asyncio.run(run())
    assert [message.get("more_body", False) for message in sent] == [False, True, False]
