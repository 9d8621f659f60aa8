"""A headless Chromium, spoken to over a pipe in the DevTools protocol: no driver and no package is needed.

with Browser() as browser: browser.open(path); browser.run("1 + 1"). FileNotFoundError where no Chromium is found.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 120.0  # seconds for an answer, on a machine that may be busy


def chromium() -> str | None:
    """Where a Chromium is, None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page. errors: what the console complained of since the last `open`; requests: what the page asked for."""

    def __init__(self) -> None:
        program = chromium()
        if program is None:
            raise FileNotFoundError(f"no Chromium: install one of {', '.join(NAMES)}")
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_us, self.out = os.pipe()
        self.into, from_them = os.pipe()
        command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command += ["--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={self.profile.name}", "about:blank"]

        def numbered() -> None:  # in the child: the protocol reads from 3 and writes to 4
            high = [fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (to_us, from_them)]
            for number, one in zip((3, 4), high, strict=True):
                os.dup2(one, number)

        quiet: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, close_fds=False, preexec_fn=numbered, **quiet)
        os.close(to_us)
        os.close(from_them)
        self.number, self.buffer, self.session = 0, b"", ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.loaded = False
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(one["targetId"] for one in targets if one["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(Exception):
            self.session = ""
            self.send("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.into)
        self.profile.cleanup()

    def open(self, path: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> float:
        """Load a file; seconds from the start of the navigation to the end of the page's load event, as it has them."""
        media = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=media)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.errors, self.requests, self.loaded = [], [], False
        self.send("Page.navigate", url=path.resolve().as_uri())
        until = time.monotonic() + PATIENCE
        while not self.loaded and time.monotonic() < until:
            self._take(self._message(until))
        timing = "(() => { const t = performance.getEntriesByType('navigation')[0]; return t.loadEventEnd / 1000 })()"
        return float(self.run(timing))

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", "the script failed"))
        return found["result"].get("value")

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """A screenshot as PNG; whole: of the page, not only of what is in view."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's result. Events that come meanwhile are noted."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + PATIENCE
        while True:
            answer = self._message(until)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._take(answer)

    def _take(self, event: dict[str, Any]) -> None:
        kind, told = event.get("method"), event.get("params", {})
        if kind == "Page.loadEventFired":
            self.loaded = True
        elif kind == "Runtime.exceptionThrown":
            self.errors.append(str(told["exceptionDetails"].get("exception", {}).get("description", told)))
        elif kind == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.errors.append(str(told["args"]))
        elif kind == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(told["entry"]["text"])
        elif kind == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])

    def _message(self, until: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.into], [], [], max(0.0, until - time.monotonic()))
            read = os.read(self.into, 1 << 20) if ready else b""
            if not read:
                raise TimeoutError("the browser does not answer")
            self.buffer += read
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)
