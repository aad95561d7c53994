"""The demo in a real headless Chromium: a person draws, watches, changes settings, reloads, uses a phone, tries mischief.

Skipped where there is no Chromium or no Playwright.
"""

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("gradio")
pytest.importorskip("playwright")
from demoing import OTHERS, Served, join, serving, write_model
from playwright import sync_api

from flowt2i.demo import Library, drawing
from flowt2i.description import Bucket
from flowt2i.errors import UserError

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
WATCH = """(id) => {
  window.lines = [];
  const place = document.getElementById(id);
  new MutationObserver(() => {
    const line = place.querySelector('.busy .line'), pictures = place.querySelectorAll('img').length;
    if (line && pictures && line.textContent !== window.lines.at(-1)) window.lines.push(line.textContent);
  }).observe(place, {childList: true, subtree: true, characterData: true, attributes: true});
}"""
PATIENCE = 60_000  # milliseconds; a busy machine is slow, a broken page never gets there

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("demo")
    library = Library([write_model(folder / "tiny"), write_model(folder / "other", seed=1, prompts=OTHERS)], device="cpu")
    pipeline = library.load("tiny")
    to_images = pipeline.to_images

    def slowly(z: Any) -> Any:  # so small a model would be done before the browser shows anything
        time.sleep(0.1)
        return to_images(z)

    pipeline.to_images = slowly  # type: ignore[method-assign]
    with serving(library) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


class Visitor:
    """A page on which everything that goes wrong is noted."""

    def __init__(self, browser: Any, served: Served, **context: Any):
        self.context = browser.new_context(**({"viewport": {"width": 1100, "height": 900}} | context))
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.boards: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.wrong.append(request.url) if not request.url.startswith((served.url, "data:", "blob:")) else None)
        self.page.on("response", lambda answer: self.wrong.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
        self.page.goto(served.url)
        self.page.wait_for_selector("#go")

    def set(self, what: str, value: float) -> None:
        field = self.page.locator(f"#{what} input[type=number]")
        field.fill(str(value))
        field.blur()

    def prompt(self, text: str) -> None:
        self.page.fill("#prompt textarea", text)

    def draw(self, button: str = "go", board: str = "drawn") -> list[str]:
        """Press a button and wait for the end; the successive lines of the board (as a MutationObserver in the page sees them)."""
        self.page.evaluate(WATCH, board)
        self.page.evaluate("id => document.querySelector(`#${id} .done`)?.classList.remove('done')", board)  # of the drawing before
        self.page.click(f"#{button}")
        self.page.wait_for_selector(f"#{board} .board.done")
        return self.page.evaluate("window.lines")

    def close(self) -> None:
        self.context.close()
        assert not self.wrong


def test_a_person_draws_watches_and_comes_back(browser: Any, served: Served) -> None:
    visitor = Visitor(browser, served)
    page = visitor.page
    visitor.prompt("a red circle, drawn by a person")
    visitor.set("steps", 24)
    visitor.set("num", 2)
    often = visitor.draw()
    assert len(often) >= 3 and all(re.fullmatch(r"step \d+ of 24, about \d+ s left", line) for line in often)
    assert page.locator("#drawn figure.finished img").count() == 2
    assert page.locator("#drawn img").first.evaluate("image => image.naturalWidth") == 32
    assert "2 pictures in" in page.inner_text("#drawn .line") and "24 euler steps" in page.inner_text("#drawn .line")

    visitor.set("every", 12)  # fewer updates
    assert 1 <= len(visitor.draw()) <= 3 < len(often)

    before = page.input_value("#seed input")
    page.click("#new-seed")
    page.wait_for_function("before => document.querySelector('#seed input').value !== before", arg=before)

    cells = page.locator("#gallery .cells figure")
    assert cells.count() == 2  # the same pictures twice are kept once
    page.reload()
    page.wait_for_selector("#gallery .cells figure")
    assert cells.count() == 2 and page.locator("#drawn figure").count() == 0
    cells.first.get_by_text("Use", exact=True).click()
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('by a person')")
    assert page.input_value("#steps input[type=number]") == "24"
    visitor.set("num", 1)
    visitor.draw()  # still works after the reload
    visitor.close()


def test_settings_are_copied_as_a_request_that_draws_the_same(browser: Any, served: Served) -> None:
    visitor = Visitor(browser, served, permissions=["clipboard-read", "clipboard-write"])
    visitor.set("steps", 3)
    visitor.set("num", 1)
    visitor.draw()
    visitor.page.click("#gallery .copy")
    visitor.page.wait_for_selector("#gallery .copy:has-text('Copied')")
    wanted = json.loads(visitor.page.evaluate("navigator.clipboard.readText()"))
    shown = visitor.page.locator("#drawn figure.finished img").get_attribute("src").split(",")[1]
    answer = visitor.context.request.post(f"{served.url}/api/generate", data=wanted).json()
    assert answer["images"][0]["png"] == shown
    visitor.close()


def test_two_models_are_compared_and_steps_too(browser: Any, served: Served) -> None:
    visitor = Visitor(browser, served)
    visitor.set("steps", 4)
    visitor.set("num", 1)
    visitor.page.get_by_role("tab", name="Compare").click()
    visitor.draw("go-compare", "compared")
    titles = visitor.page.locator("#compared h3").all_inner_texts()
    assert titles[0].startswith("A · tiny: 4 euler") and titles[1].startswith("B · other")
    visitor.page.get_by_role("tab", name="Steps").click()
    visitor.draw("go-sweep", "swept")
    assert visitor.page.locator("#swept h3").all_inner_texts() == ["1 step", "2 steps", "4 steps", "8 steps", "16 steps", "50 steps"]
    visitor.close()


def test_choosing_another_model_and_an_example(browser: Any, served: Served) -> None:
    visitor = Visitor(browser, served)
    page = visitor.page
    page.click("#model input")
    page.get_by_role("option", name="other").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a green star'")  # an example gives way to the other model's
    page.locator("#chips .chip", has_text="a pink cross").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a pink cross'")
    visitor.set("steps", 2)
    visitor.set("num", 1)
    visitor.draw()
    assert '"model": "other"' in page.locator("#drawn figure.finished").get_attribute("data-settings")
    visitor.close()


def start_and_stop(visitor: Visitor, served: Served, monkeypatch: pytest.MonkeyPatch, seconds: float, every: int) -> None:
    """Stop a drawing of which each evaluation takes `seconds`: else it may be done before the press."""
    pipeline = served.library.load("tiny")
    field = pipeline.field
    monkeypatch.setattr(pipeline, "field", lambda *given: time.sleep(seconds) or field(*given))
    visitor.set("steps", 200)
    visitor.set("num", 8)
    visitor.set("every", every)
    visitor.page.click("#go")
    visitor.page.wait_for_selector("#drawn .board.busy img")
    visitor.page.click("#go-stop")
    visitor.page.wait_for_selector("#drawn .board.halted")


def test_stop(browser: Any, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    visitor = Visitor(browser, served)
    start_and_stop(visitor, served, monkeypatch, seconds=0.02, every=1)
    visitor.set("steps", 1)
    visitor.draw()
    visitor.close()


def test_mischief_in_a_prompt_is_text(browser: Any, served: Served) -> None:
    visitor = Visitor(browser, served)
    evil = "<script>window.hacked=1;alert(1)</script><img src=x onerror='window.hacked=1'>\"'> ${window.hacked=1} {{window.hacked}} @children"
    visitor.set("steps", 1)
    visitor.set("num", 1)
    visitor.prompt(evil)
    visitor.draw()
    assert visitor.page.locator("#drawn img").get_attribute("alt") == evil
    assert visitor.page.inner_text("#gallery figcaption") == evil
    visitor.page.reload()
    visitor.page.wait_for_selector("#gallery figcaption")
    visitor.page.get_by_text("Use", exact=True).click()
    visitor.page.wait_for_function("document.querySelector('#prompt textarea').value.includes('hacked')")
    assert visitor.page.evaluate("window.hacked") is None
    visitor.close()


def test_stop_between_two_updates(browser: Any, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    visitor = Visitor(browser, served)
    start_and_stop(visitor, served, monkeypatch, seconds=0.1, every=50)
    until = time.monotonic() + 15
    while drawing._turn.locked() and time.monotonic() < until:
        time.sleep(0.1)
    assert not drawing._turn.locked()
    visitor.page.wait_for_timeout(1500)
    assert visitor.page.locator("#drawn .board.halted").count() == 1  # no late update takes it away
    visitor.close()


def test_a_mistake_is_told_in_words(browser: Any, served: Served) -> None:
    visitor = Visitor(browser, served)
    visitor.prompt("   ")
    visitor.page.click("#go")
    visitor.page.get_by_text("Say what the picture should show.").wait_for()
    visitor.prompt("دائرة حمراء")
    visitor.set("steps", 1)
    visitor.draw()
    visitor.close()


def test_a_message_is_text(browser: Any, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> Any:
        raise UserError("it isn't <b>there</b>: ${1 + 1} {{x}} & more")

    monkeypatch.setattr(served.library, "load", gone)
    visitor = Visitor(browser, served)
    visitor.page.click("#go")
    visitor.page.get_by_text("it isn't <b>there</b>: ${1 + 1} {{x}} & more").wait_for()
    visitor.close()


def test_a_full_queue_is_told_in_words(browser: Any, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    release, pipeline = threading.Event(), served.library.load("tiny")
    monkeypatch.setattr(pipeline, "sample", lambda *_, **__: release.wait(60) and 1 / 0)
    visitor = Visitor(browser, served)
    with httpx.Client(timeout=60) as crowd:
        try:
            while join(served, crowd, "crowd").status_code == 200:
                pass
            visitor.page.click("#go")
            visitor.page.get_by_text(re.compile("queue is full|too busy|currently busy", re.IGNORECASE)).first.wait_for()
        finally:
            release.set()
    waited = time.monotonic()
    while len(served.blocks._queue) and time.monotonic() < waited + 60:  # those who waited are answered
        time.sleep(0.05)
    monkeypatch.undo()
    assert all(wrong.startswith("503") for wrong in visitor.wrong)
    visitor.wrong.clear()
    visitor.set("steps", 1)
    visitor.draw()
    visitor.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_in_light_and_dark(browser: Any, served: Served, scheme: str, tmp_path: Path) -> None:
    visitor = Visitor(browser, served, viewport={"width": 375, "height": 740}, is_mobile=True, has_touch=True, color_scheme=scheme)
    page = visitor.page
    visitor.set("steps", 2)
    visitor.draw()
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    button, steps = page.locator("#go").bounding_box(), page.locator("#steps").bounding_box()
    assert button["y"] + button["height"] < 740 and button["height"] >= 36 and steps["y"] > button["y"]  # to be reached without scrolling, by a thumb
    dark = "document.body.classList.contains('dark')"
    assert page.evaluate(dark) == (scheme == "dark")
    page.click(".theme")
    assert page.evaluate(dark) == (scheme == "light")
    page.reload()
    page.wait_for_selector("#go")
    page.wait_for_function(f"{dark} === {json.dumps(scheme == 'light')}")  # the choice is remembered
    visitor.close()


def test_a_shape_is_chosen_drawn_and_used_again(browser: Any, tmp_path: Path) -> None:
    buckets = tuple(Bucket(width=w, height=h, train=n, heldout=0) for w, h, n in ((24, 40, 1), (32, 32, 5), (40, 24, 2)))
    library = Library([write_model(tmp_path / "square"), write_model(tmp_path / "wide", buckets=buckets)], device="cpu")
    sizes = "images => images.map(image => [image.naturalWidth, image.naturalHeight])"
    with serving(library) as served:
        visitor = Visitor(browser, served)
        page, shape = visitor.page, visitor.page.locator("#shape input")
        assert not shape.is_visible()  # a model of one shape has nothing to choose
        choose(page, "model", "wide")
        shape.wait_for(state="visible")
        assert shape.input_value() == "32x32"
        choose(page, "shape", "40x24")
        visitor.set("num", 2)
        visitor.draw()
        assert page.locator("#drawn img").evaluate_all(sizes) == [[40, 24]] * 2
        choose(page, "shape", "24x40")
        visitor.draw()
        assert page.locator("#drawn img").evaluate_all(sizes) == [[24, 40]] * 2
        page.locator("#gallery .cells figure").last.get_by_text("Use", exact=True).click()  # of the first drawing
        page.wait_for_function("document.querySelector('#shape input').value === '40x24'")
        visitor.close()


def choose(page: Any, name: str, value: str) -> None:
    """Take `value` from a list."""
    page.click(f"#{name} input")
    page.get_by_role("option", name=value, exact=True).click()
