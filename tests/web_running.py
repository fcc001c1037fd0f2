"""`llava-hd web` in a process of its own, and a real browser to look at it with."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio_client", reason="gradio is not installed (extra web)")
pytest.importorskip("selenium", reason="selenium, which drives the browser, is not installed")

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

# Notes where the process connects to, and which names it looks up, before it runs the command.
WATCHED = """
import sys
log = open(sys.argv[1], "a", buffering=1)
def hook(event, args):
    if event in ("socket.connect", "socket.sendto"):
        log.write(f"{event} {args[1]!r}\\n")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        log.write(f"{event} {args[0]!r}\\n")
sys.addaudithook(hook)
from llava_hd.cli.main import main
sys.exit(main(sys.argv[2:]))
"""
TALKS = 20.0  # seconds that a page is waited for


class WebServer:
    """The command with some words more, from its first line to its end."""

    def __init__(self, scratch: Path, *words: str) -> None:
        self.log = scratch / "connections.log"
        self.errors = scratch / "stderr.log"
        command = [sys.executable, "-c", WATCHED, str(self.log), "web", "--port", "0", *words]
        with self.errors.open("w") as stderr:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=_environment(scratch)
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, self.errors.read_text()
        self.url, self.port = found[0], int(found[1])
        self.folders = list(scratch.glob("llava-hd-web-*"))

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to one request."""
        raw = json.dumps(body).encode() if isinstance(body, dict) else body
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if isinstance(body, dict):
            given["Content-Type"] = "application/json"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, raw, given)
        reply = connection.getresponse()
        found = reply.read()
        connection.close()
        return reply.status, {k.lower(): v for k, v in reply.getheaders()}, found


def _environment(scratch: Path) -> dict[str, str]:
    """The tests' environment, its temporary folder the scratch, with what would open Gradio."""
    hostile = {"GRADIO_ALLOWED_PATHS": "/", "GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0"}
    return {**os.environ, **hostile, "TMPDIR": str(scratch), "GRADIO_ANALYTICS_ENABLED": "True"}


def open_browser() -> webdriver.Chrome:
    """Headless Chromium that resolves no name and reports all its requests; skips without one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium with its driver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in (
        "headless=new",
        "no-sandbox",  # CI runs as root in a container
        "disable-dev-shm-usage",
        "disable-gpu",
        "disable-background-networking",
        "window-size=1280,940",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


class Page:
    """What a person does with the page, and sees."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser, self.url = browser, url

    def load(self) -> None:
        self.browser.get(self.url)
        self.wait(lambda: self.find("#question textarea") and self.find("#upload input[type=file]"))
        self.wait(lambda: "Upload a picture" in self.text("#counts-0"))

    def wait(self, true: Callable[[], Any], seconds: float = TALKS) -> Any:
        """What `true` gives as soon as it is true; AssertionError with the page's text."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := true():
                return found
            time.sleep(0.03)
        raise AssertionError(f"not within {seconds} s; the page says: {self.text('body')}")

    def find(self, selector: str) -> list[Any]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def sees(self, selector: str) -> bool:
        """Whether such an element is there and visible."""
        return any(element.is_displayed() for element in self.find(selector))

    def text(self, selector: str) -> str:
        """The visible text of the first such element; empty where there is none."""
        script = "const e = document.querySelector(arguments[0]); return e ? e.innerText : '';"
        return str(self.browser.execute_script(script, selector))

    def upload(self, path: Path) -> None:
        self.find("#upload input[type=file]")[0].send_keys(str(path))

    def take_away(self) -> None:
        self.click("#upload [aria-label='Remove Image'], #upload [title='Clear']")

    def ask(self, question: str) -> None:
        box = self.find("#question textarea")[0]
        script = "arguments[0].focus()"
        self.browser.execute_script(script, box)
        box.send_keys(question, Keys.ENTER)

    def click(self, selector: str) -> None:
        self.browser.execute_script("arguments[0].click()", self.find(selector)[0])

    def answers(self, number: int) -> list[str]:
        """What a model's chat shows of its answers."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText.trim())"
        selector = f"#chat-{number} [data-testid=bot]"
        return list(self.browser.execute_script(script, selector))

    def shows_picture(self, selector: str) -> int:
        """The width of the picture below the selector, in its own pixels; 0 before it is there."""
        script = "const e = document.querySelector(arguments[0]); return e ? e.naturalWidth : 0;"
        return int(self.browser.execute_script(script, f"{selector} img"))

    def requests(self) -> list[str]:
        """Addresses of all requests since this was asked last."""
        found = []
        for entry in self.browser.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.append(message["params"]["request"]["url"])
        return found
