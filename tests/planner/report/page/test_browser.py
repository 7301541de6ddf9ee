"""The page of an answer in a real browser: nothing is asked for, nothing is complained about, all text fits.

Needs Chromium or Chrome, by whatever name or from Playwright; skips itself without one. It is spoken to over
two pipes, with the standard library alone, and started once.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from select import select
from time import monotonic
from typing import Any

import pytest

from planner.answers.read import Answer
from planner.report.page.answer import page_of
from planner.report.text.snippet import snippet

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 60
"""That an answer may take."""


def binary() -> str | None:
    """The browser that is here."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    home = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache" / "ms-playwright")
    return next((str(path) for path in sorted(home.glob("chromium-*/chrome-linux*/chrome"))), None)


class Browser:
    """A headless Chromium with one page, by the DevTools protocol."""

    def __init__(self, path: str, profile: Path) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
            "--no-first-run",
            "--disable-extensions",
            f"--user-data-dir={profile}",
        ]
        # Chromium reads from 3 and writes to 4; copies beyond them, so that neither is written over.
        read, write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_in, theirs_out))
        quiet = os.open(os.devnull, os.O_WRONLY)
        self.process = os.posix_spawn(
            path,
            [path, *options],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, read, 3),
                (os.POSIX_SPAWN_DUP2, write, 4),
                (os.POSIX_SPAWN_DUP2, quiet, 1),
                (os.POSIX_SPAWN_DUP2, quiet, 2),
            ],
        )
        for end in (theirs_in, theirs_out, read, write, quiet):
            os.close(end)
        self.ours_in, self.ours_out, self.rest, self.number = ours_in, ours_out, b"", 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def close(self) -> None:
        os.close(self.ours_out)
        os.close(self.ours_in)
        os.kill(self.process, signal.SIGTERM)
        os.waitpid(self.process, 0)

    def ask(self, method: str, **given: Any) -> dict[str, Any]:
        """One command's result."""
        self.number += 1
        number = self.number
        message = {"id": number, "method": method, "params": given}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.ours_out, json.dumps(message).encode() + b"\0")
        while (said := self._next()).get("id") != number:
            self.events.append(said)
        assert "error" not in said, said
        return said["result"]

    def wait(self, method: str) -> None:
        """Until an event of this name, seen or to come."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        end = monotonic() + SECONDS
        while b"\0" not in self.rest:
            assert select([self.ours_in], [], [], max(end - monotonic(), 0))[0], "the browser does not answer"
            data = os.read(self.ours_in, 1 << 20)
            assert data, "the browser has gone"
            self.rest += data
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    # What a test does.

    def open(self, path: Path, width: int, scheme: str = "light", media: str = "") -> None:
        """A page, so wide, in `light` or `dark`, on a screen or in print; forgets what was said before."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", media=media, features=features)
        self.events.clear()
        self.ask("Page.navigate", url=path.as_uri())
        self.wait("Page.loadEventFired")

    def run(self, script: str) -> Any:
        """What an expression gives."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=9)

    def complaints(self) -> list[str]:
        """Errors and warnings of the page since it was opened."""
        found = []
        for event in self.events:
            given = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(given["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded":
                found.append(str(given["entry"]))
            elif event["method"] == "Runtime.consoleAPICalled":
                found.append(str(given["args"]))
        return found

    def requests(self) -> list[str]:
        """What was asked for since the page was opened, itself included."""
        sent = (event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [each["request"]["url"] for each in sent]

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))

    def pdf(self) -> bytes:
        return base64.b64decode(self.ask("Page.printToPDF", printBackground=False)["data"])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = binary()
    if path is None:
        pytest.skip("needs Chromium or Chrome: e.g. apt-get install chromium")
    found = Browser(path, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


FITS = """
(() => {
  const found = [];
  for (const one of document.querySelectorAll("html, body, body *")) {
    if (one.closest("thead") && getComputedStyle(one.closest("thead")).position === "absolute") continue;
    const style = getComputedStyle(one);
    if (style.display === "none" || style.display === "inline" || one.closest("svg")) continue;
    if (one.scrollWidth > one.clientWidth) {
      found.push(`${one.tagName} ${one.className}: ${one.scrollWidth} > ${one.clientWidth}`);
    }
  }
  for (const text of document.querySelectorAll(".points text")) {
    const box = text.getBoundingClientRect();
    if (box.width && (box.left < 0 || box.right > document.documentElement.clientWidth)) {
      found.push(`text ${text.textContent}: ${box.left} to ${box.right}`);
    }
  }
  return found;
})()
"""
"""Elements whose text is wider than they are, and chart texts that leave the page."""

CONTRASTS = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => {
      part /= 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if (!/, 0\\)$|transparent/.test(color)) return color;
    }
    return "white";
  };
  const found = [];
  for (const one of document.querySelectorAll("body *")) {
    const said = [...one.childNodes].some((part) => part.nodeType === 3 && part.data.trim());
    if (!said || one.matches("script, title") || !one.getClientRects().length) continue;
    const style = getComputedStyle(one);
    const ink = one.closest("svg") ? style.fill : style.color;
    const [a, b] = [light(ink), light(behind(one))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) found.push(`${one.tagName} ${one.textContent.slice(0, 30)}`);
  }
  return found;
})()
"""
"""Texts that are hard to read: below a contrast of 4.5."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory, recommended, verified, tuned) -> dict[str, Path]:
    """A recommendation, what tuning found, and a recommendation that is out to do harm."""
    evil = type(recommended)(**poisoned(recommended.model_dump(mode="json")))
    long = evil.model_copy(update={"calibration": "x" * 3000})
    answers = {"recommended": Answer(recommended, verified), "tuned": Answer(tuned), "evil": Answer(long)}
    folder = tmp_path_factory.mktemp("pages")
    for name, answer in answers.items():
        (folder / f"{name}.html").write_text(page_of(answer), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in answers}


EVIL = "</script></style><img src=x onerror=hacked=1><script>hacked=1</script>"


def poisoned(value: Any) -> Any:
    """Hostile text after every text that may be anything: here those with a space."""
    if isinstance(value, dict):
        return {name: poisoned(one) for name, one in value.items()}
    if isinstance(value, list):
        return [poisoned(one) for one in value]
    return value + EVIL if isinstance(value, str) and " " in value else value


@pytest.mark.parametrize("name", ["recommended", "tuned", "evil"])
def test_a_page_is_quiet_and_fits_every_screen(name, browser, pages):
    for width in (360, 1200):
        for scheme in ("light", "dark"):
            browser.open(pages[name], width, scheme)
            assert browser.complaints() == []
            assert browser.requests() == [pages[name].as_uri()]
            assert browser.run(FITS) == []
            assert browser.run(CONTRASTS) == []
    assert browser.run("typeof hacked") == "undefined"
    dark = browser.run("getComputedStyle(document.body).backgroundColor")
    browser.open(pages[name], 1200, "light")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)" != dark


def test_the_check_of_fitting_can_fail(browser, tmp_path):
    path = tmp_path / "wide.html"
    path.write_text(
        "<body><div style='width: 50px; white-space: nowrap; color: #eee'>far too long to fit</div>"
    )
    browser.open(path, 360)
    assert browser.run(FITS)
    assert browser.run(CONTRASTS)


def test_a_phone_gets_the_narrow_chart_and_rows_as_blocks(browser, pages):
    script = "[...document.querySelectorAll('.points')].map((one) => [one.classList[1], one.clientWidth > 0])"
    for width, narrow in ((360, True), (1200, False)):
        browser.open(pages["recommended"], width)
        assert dict(browser.run(script)) == {"narrow": narrow, "wide": not narrow}
        shown = browser.run("getComputedStyle(document.querySelector('tbody tr')).display")
        assert shown == ("block" if narrow else "table-row")


def test_everything_can_be_done_with_the_keyboard(browser, pages):
    browser.open(pages["recommended"], 1200)
    browser.press("Tab")
    assert browser.run("document.activeElement.className") == "skip"
    assert browser.run(
        "document.activeElement.getBoundingClientRect().top >= 0 || "
        "document.activeElement.matches(':focus-visible')"
    )
    marks = "[...document.querySelectorAll('.points.wide .point')]"
    seen = set()
    for _ in range(browser.run(f"{marks}.length") + 60):
        browser.press("Tab")
        seen.add(browser.run(f"{marks}.indexOf(document.activeElement)"))
        if browser.run("document.activeElement.className") == "copy":
            break
    assert seen - {-1} == set(range(browser.run(f"{marks}.length")))
    assert browser.run(
        "(() => { const one = document.querySelectorAll('.points.wide .point')[2]; one.focus();"
        " return document.querySelector('.description').textContent === one.getAttribute('aria-label'); })()"
    )
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "none"  # a ring is drawn
    assert browser.run("document.querySelector('.description').textContent")


@pytest.mark.parametrize("clipboard", [True, False])
def test_the_program_can_be_copied(clipboard, browser, pages, recommended):
    browser.open(pages["recommended"], 1200)
    assert not browser.run("document.querySelector('.copy').hidden")
    found = "copied = text" if clipboard else "throw new Error('no clipboard here')"
    browser.run(f"navigator.clipboard.writeText = async (text) => {{ {found}; }}")
    browser.run("document.querySelector('.copy').click()")
    said = "document.querySelector('.copied').textContent"
    look = f"const look = () => {{ {said} ? done({said}) : setTimeout(look, 5); }}; look();"
    status = browser.run(f"new Promise((done) => {{ {look} }})")
    assert status in ("Copied", "Selected: copy it with your keyboard")
    copied = browser.run("copied" if clipboard else "getSelection().toString()")
    assert copied.strip() == snippet(recommended.config, recommended.workload)


def test_a_page_is_fit_for_print(browser, pages):
    browser.open(pages["recommended"], 720, "dark", "print")
    assert browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.run("document.querySelector('.points.wide').clientWidth > 0")
    assert browser.run("getComputedStyle(document.querySelector('tbody tr')).display") == "table-row"
    assert browser.run("getComputedStyle(document.querySelector('h1')).color") == "rgb(31, 35, 40)"
    assert browser.pdf().startswith(b"%PDF-")
    assert browser.run("[...document.querySelectorAll('details')].every((one) => one.open)")
