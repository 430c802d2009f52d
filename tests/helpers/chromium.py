"""A headless Chromium that says what a page did: messages, exceptions, requests, overflow, contrast, clipped marks.

It is driven over a pipe with the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/), so that
nothing listens on a port and nothing else is needed. Debian: `apt-get install --no-install-recommends chromium`.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAM = "chromium"
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
LIMIT_S = 60.0


def missing_chromium() -> bool:
    return shutil.which(PROGRAM) is None


@dataclass
class Seen:
    """What a page did in one window."""

    messages: list[str] = field(default_factory=list)
    """Of the console, exceptions and the browser's own complaints."""
    requests: list[str] = field(default_factory=list)
    """All but the page itself and data: addresses."""
    overflow_px: int = 0
    """By how much the page is wider than the window."""
    clipped: list[str] = field(default_factory=list)
    """Parts of drawings outside their viewBox."""
    faint: list[str] = field(default_factory=list)
    """Texts with less contrast than WCAG's AA asks for: 4.5 : 1, 3 : 1 for large ones."""
    drawings: int = 0
    """SVG images with at least one line, mark or bar in them."""
    empty_drawings: int = 0

    @property
    def faults(self) -> list[str]:
        wide = [f"{self.overflow_px} px wider than the window"] if self.overflow_px > 0 else []
        empty = [f"{self.empty_drawings} drawings without a mark"] if self.empty_drawings else []
        return [*self.messages, *self.requests, *wide, *self.clipped, *self.faint, *empty]


class Browser:
    def __init__(self, process: subprocess.Popen[bytes], sending: int, receiving: int) -> None:
        self._process = process
        self._sending = sending
        self._receiving = receiving
        self._waiting = b""
        self._number = 0
        self._events: list[dict[str, Any]] = []

    def look(self, page: Path, width: int, dark: bool, screenshot: Path | None = None, scale: float = 1.0) -> Seen:
        """Open a file in a new window of `width` pixels and tell what is seen. Raises AssertionError past 60 s."""
        target = self._ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self._ask("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        self._events.clear()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable", {}, session)
        metrics = {"width": width, "height": 800, "deviceScaleFactor": scale, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", metrics, session)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", {"features": [scheme]}, session)
        address = page.absolute().as_uri()
        self._ask("Page.navigate", {"url": address}, session)
        self._until("Page.loadEventFired", session)
        found = self._ask("Runtime.evaluate", {"expression": _LOOK, "returnByValue": True}, session)
        assert "exceptionDetails" not in found, found
        seen = Seen(**found["result"]["value"])
        seen.overflow_px -= width
        if screenshot is not None:
            taken = self._ask("Page.captureScreenshot", {"captureBeyondViewport": True}, session)
            screenshot.write_bytes(base64.b64decode(taken["data"]))
        self._collect(seen, session, address)
        self._ask("Target.closeTarget", {"targetId": target})
        return seen

    def _collect(self, seen: Seen, session: str, address: str) -> None:
        for event in self._events:
            if event.get("sessionId") != session:
                continue
            values = event["params"]
            match event["method"]:
                case "Runtime.consoleAPICalled":
                    said = " ".join(str(part.get("value", part.get("description"))) for part in values["args"])
                    seen.messages.append(f"console.{values['type']}: {said}")
                case "Runtime.exceptionThrown":
                    seen.messages.append(f"exception: {values['exceptionDetails']['text']}")
                case "Log.entryAdded":
                    seen.messages.append(f"{values['entry']['level']}: {values['entry']['text']}")
                case "Network.requestWillBeSent":
                    url = values["request"]["url"]
                    if url != address and not url.startswith("data:"):
                        seen.requests.append(f"request: {url}")

    def _ask(self, method: str, parameters: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        left = memoryview(json.dumps(message).encode() + b"\0")
        while left:
            left = left[os.write(self._sending, left) :]
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self._events.append(answer)

    def _until(self, method: str, session: str) -> None:
        while not any(event.get("method") == method and event.get("sessionId") == session for event in self._events):
            self._events.append(self._receive())

    def _receive(self) -> dict[str, Any]:
        deadline_s = time.monotonic() + LIMIT_S
        while b"\0" not in self._waiting:
            ready, _, _ = select.select([self._receiving], [], [], max(0.0, deadline_s - time.monotonic()))
            assert ready, f"chromium did not answer within {LIMIT_S:.0f} s"
            block = os.read(self._receiving, 1 << 20)
            assert block, f"chromium ended with {self._process.wait()}"
            self._waiting += block
        message, _, self._waiting = self._waiting.partition(b"\0")
        parsed: dict[str, Any] = json.loads(message)
        return parsed


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a browser with an empty profile, and end it with all its children."""
    with tempfile.TemporaryDirectory(prefix="gptscale-chromium-", ignore_cleanup_errors=True) as folder:
        # The browser reads commands from its descriptor 3 and writes answers to 4.
        theirs_in, sending = os.pipe()
        receiving, theirs_out = os.pipe()
        high_in, high_out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in (theirs_in, theirs_out))

        def place() -> None:
            os.dup2(high_in, 3)
            os.dup2(high_out, 4)

        process = subprocess.Popen(
            [PROGRAM, *_FLAGS, f"--user-data-dir={folder}/profile"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": folder},
            preexec_fn=place,
            pass_fds=(3, 4),
        )
        for end in (theirs_in, theirs_out, high_in, high_out):
            os.close(end)
        try:
            yield Browser(process, sending, receiving)
        finally:
            os.close(sending)  # the browser ends when its pipe does
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(receiving)


_LOOK = r"""
(() => {
  const numbers = text => (text.match(/[\d.]+/g) || []).map(Number);
  const light = rgb => {
    const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = numbers(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > 0.99) return colour.slice(0, 3);
    }
    return matchMedia('(prefers-color-scheme: dark)').matches ? [18, 18, 18] : [255, 255, 255];
  };
  const faint = new Set(), clipped = [];
  for (const element of document.querySelectorAll('body *')) {
    const text = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join(' ').trim();
    if (!text || !element.getClientRects().length || ['title', 'desc'].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const svg = element instanceof SVGElement;
    const ink = numbers(svg ? style.fill : style.color).slice(0, 3);
    const [a, b] = [light(ink), light(behind(element))].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < (large ? 3 : 4.5)) faint.add(`contrast ${contrast.toFixed(2)}: ${text.slice(0, 40)}`);
  }
  let drawings = 0, empty = 0;
  for (const svg of document.querySelectorAll('svg[role=img]')) {
    const box = svg.viewBox.baseVal;
    const marks = svg.querySelectorAll('path, circle, rect');
    marks.length ? drawings++ : empty++;
    for (const part of svg.querySelectorAll('path, circle, rect, line, text')) {
      const b = part.getBBox(), slack = 0.6;
      if (b.x < box.x - slack || b.y < box.y - slack || b.x + b.width > box.x + box.width + slack
          || b.y + b.height > box.y + box.height + slack)
        clipped.push(`outside ${svg.textContent.slice(0, 30)}: ${part.tagName} ${part.textContent.slice(0, 30)}`);
    }
  }
  return {overflow_px: document.scrollingElement.scrollWidth, clipped, faint: [...faint], drawings,
          empty_drawings: empty};
})()
"""
