"""The site and the slides in a real browser, opened from a folder: no failed request, no console error, search, sound, slides that fit."""
import json
import os
from pathlib import Path

import pytest

from ardm_course import site

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"there is no {CHROMIUM}: apt-get install chromium, or set CHROMIUM")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    "A page that fails the test if anything goes wrong in it, or if it asks for anything outside the folder."
    page, wrong = browser.new_page(viewport={"width": 1280, "height": 800}), []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url[:100]}"))
    page.on("request", lambda request: wrong.append(f"asked for {request.url[:100]}")
            if not request.url.startswith(("file:", "data:", "blob:")) else None)
    yield page
    page.close()
    assert not wrong, wrong


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    return site.make_docs(tmp_path_factory.mktemp("docs"), ["07_flow"]).parent


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    "A deck of 07_flow with the title, every section head and every figure on it, whatever the notebook's tags are."
    folder, notebook = tmp_path_factory.mktemp("checkout"), json.loads((site.checkout() / "nbs" / "07_flow.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        picture = any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        cell["metadata"]["tags"] = ["subslide", "hide-input"] if picture else ["slide"] if text.startswith(("# ", "## ")) else []
    (folder / "nbs").mkdir()
    (folder / "nbs" / "07_flow.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    (folder / "nbs" / "index.ipynb").write_text(json.dumps({**notebook, "cells": []}), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "checkout", lambda: folder)
        return site.make_slides(folder / "slides").parent


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("address", ["index.html", "07_flow.html", "api/flow.html"])
def test_page(page, docs, address, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.goto((docs / address).as_uri())
    assert page.locator("main h1").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    assert page.locator("#search").is_visible() == (width > 960), "the menu is open on a wide screen only"


def test_search(page, docs):
    page.goto((docs / "index.html").as_uri())
    page.keyboard.press("/")
    page.keyboard.type("flow_loss")
    first = page.locator("#found a").first
    assert first.inner_text().startswith("flow_loss")
    first.click()
    page.wait_for_url("**/api/flow.html#flow_loss")
    assert page.locator("h2#flow_loss").is_visible()
    page.fill("#search", "zyzzyva")
    assert page.locator("#found").inner_text() == "Nothing found."


def test_sound_and_formulas(page, docs):
    page.goto((docs / "07_flow.html").as_uri())
    page.wait_for_function("[...document.querySelectorAll('audio')].every(player => player.duration > 0)")
    assert page.locator("audio").count() > 0
    assert page.evaluate("document.querySelector('math').getBoundingClientRect().width") > 3


def test_dark(browser, docs):
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto((docs / "07_flow.html").as_uri())
    red = page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
    context.close()
    assert red < 64


def test_slides_fit(page, slides):
    page.goto((slides / "index.html").as_uri())
    page.click("main a[href='07_flow.html']")
    page.wait_for_function("window.Reveal && Reveal.isReady()")
    count = page.evaluate("Reveal.getTotalSlides()")
    assert count > 15
    for number in range(count):
        page.wait_for_timeout(50)
        top, bottom = page.evaluate("(box => [box.top, box.bottom])(Reveal.getCurrentSlide().getBoundingClientRect())")
        assert top > -5 and bottom < 805, f"slide {number + 1} of {count} does not fit: from {top} to {bottom}"
        page.keyboard.press("Space")
    assert page.evaluate("Reveal.isLastSlide()")
