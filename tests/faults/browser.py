"""A real Chromium that opens a page and tells what the page did: by WebDriver, over http, with the standard library.

    with Browser(folder) as browser: seen = browser.open(page)

Needs the programs chromium and chromedriver (packages `chromium chromium-driver` of Debian).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
LOOK = "return {canary: typeof canary, text: document.body.innerText, scripts: document.scripts.length}"


@dataclass(frozen=True)
class Seen:
    """What a page did: canary (the kind of that variable), its text, dialog, console lines, addresses asked for."""

    canary: str
    text: str
    scripts: int
    dialog: str
    console: list[str]
    requests: list[str]


def missing() -> str:
    """Why there is no browser, '' if there is one."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(absent)} not installed (Debian: apt install chromium chromium-driver)" if absent else ""


class Browser:
    """One headless Chromium with a profile of its own in folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Self:
        log = self.folder / "chromedriver.log"
        words = ["chromedriver", "--port=0", f"--log-path={self.folder / 'chromedriver.full.log'}"]
        with log.open("w") as file:
            self.driver = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        port = self._port(log)
        self.at = f"http://127.0.0.1:{port}"
        options = {"args": [*QUIET, f"--user-data-dir={self.folder / 'profile'}"], "binary": shutil.which("chromium")}
        wanted = {
            "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            "unhandledPromptBehavior": "ignore",
        }  # fmt: skip
        session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        self.at += f"/session/{session}"
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._ask("DELETE", "")
        self.driver.terminate()
        self.driver.wait(30)

    def open(self, page: Path) -> Seen:
        """Open a file, and what came of it."""
        self._ask("POST", "/url", {"url": "about:blank"})
        for kind in ("browser", "performance"):
            self._log(kind)
        self._ask("POST", "/url", {"url": page.resolve().as_uri()})
        time.sleep(0.3)  # what a page does by itself it does at once
        dialog = ""
        with contextlib.suppress(urllib.error.HTTPError):  # 404: no such alert
            dialog = str(self._ask("GET", "/alert/text"))
            self._ask("POST", "/alert/dismiss", {})
        found = self._ask("POST", "/execute/sync", {"script": LOOK, "args": []})
        events = [json.loads(line["message"])["message"] for line in self._log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        asked = [url for url in asked if url not in ("about:blank", page.resolve().as_uri())]
        asked = [url for url in asked if not url.startswith("data:image/")]  # a picture in the page itself
        return Seen(**found, dialog=dialog, console=[line["message"] for line in self._log("browser")], requests=asked)

    def _log(self, kind: str) -> list[dict[str, Any]]:
        return list(self._ask("POST", "/se/log", {"type": kind}))

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.at + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def _port(self, log: Path) -> int:
        until = time.monotonic() + 60
        while time.monotonic() < until and self.driver.poll() is None:
            for word in log.read_text().split("on port ")[1:]:
                digits = word.split(".")[0]
                if digits.isdecimal() and int(digits):
                    return int(digits)
            time.sleep(0.1)
        raise OSError(f"chromedriver does not start: {log.read_text()}")
