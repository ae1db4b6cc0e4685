"""A real browser, driven through the WebDriver protocol (https://www.w3.org/TR/webdriver2/)."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium")
needs_browser = pytest.mark.skipif(
    DRIVER is None or BROWSER is None,
    reason="chromium and chromedriver (packages chromium, chromium-driver) are missing",
)
OPTIONS = (
    "--headless",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,900",
)


class Browser:
    """One window."""

    def __init__(self, client: httpx.Client, session: str) -> None:
        self._client, self._session = client, session

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = self._client.request(method, f"/session/{self._session}{path}", json=body)
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    def open(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        """What a script returns."""
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def complaints(self) -> list[str]:
        """Warnings and errors of the console since the last call."""
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser that keeps everything in a folder, which goes with it."""
    # Not in that of the test: Chromium puts a unix socket into it, whose path must fit into 107 bytes.
    with tempfile.TemporaryDirectory(prefix="tri-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield from _browser(folder)


def _browser(folder: str) -> Iterator[Browser]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert DRIVER is not None
    driver = subprocess.Popen(
        [DRIVER, f"--port={port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": folder, "HOME": folder},
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            give_up = time.monotonic() + 20
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/status").json()["value"]["ready"]:
                        break
                assert time.monotonic() < give_up, "chromedriver does not answer"
                time.sleep(0.05)
            wanted = {
                "goog:chromeOptions": {"binary": BROWSER, "args": [*OPTIONS, f"--user-data-dir={folder}/profile"]},
                "goog:loggingPrefs": {"browser": "WARNING"},
            }
            answer = client.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
            assert "sessionId" in answer, answer
            window = Browser(client, answer["sessionId"])
            try:
                yield window
            finally:
                window.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait()
