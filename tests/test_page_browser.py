"""The page in a real browser, with the real command: type, hear before the text has ended, see it grow, stop, download."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
import wave
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
pytest.importorskip("websockets", reason="websockets is not installed: pip install websockets")
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 120  # seconds; an idle machine needs a twentieth of it
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium, or install Google Chrome")

# The real server on a free port; the system is a stand-in that beeps once a word, so that the test is about the page.
SERVER = '''
import sys, time
from types import SimpleNamespace
import torch
from ardm_course.core import CourseError
from ardm_course.page import Limits, Studio, serve

class Beeper:
    def __init__(self, name): self.name, self.codec = name, SimpleNamespace(sample_rate=24000)
    def stream(self, words, **options):
        times = torch.arange(12000) / 24000
        for count, word in enumerate(words):
            if word == "unspeakable": raise CourseError("This word cannot be spoken. Leave it out.")
            if word == "broken": raise RuntimeError("a secret")
            if self.name == "slow": time.sleep(0.7)  # slower than its sound: every chunk stalls
            yield 0.3 * torch.sin(2 * torch.pi * (400 + 100 * (count % 6)) * times)

serve(Studio({"beeper": ["anna", "ben"], "slow": []}, load=Beeper), port=0, limits=Limits(text=200, idle=20))
'''


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    "The address that the command prints."
    folder = tmp_path_factory.mktemp("page")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    with open(folder / "errors.txt", "w") as errors:
        server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    try:
        line = server.stdout.readline()
        assert "http://127.0.0.1:" in line, (folder / "errors.txt").read_text()
        yield line.split()[-1]
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio"]
        browser = playwright.chromium.launch(executable_path=BROWSER, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    "The page, ready; it fails the test if anything goes wrong in it, or if it asks for anything outside the server."
    page, wrong = browser.new_page(viewport={"width": 1000, "height": 900}), []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") and "willReadFrequently" not in message.text else None)  # that one is about the tests' own look at pixels
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(f"asked for {request.url[:100]}") if not request.url.startswith((address, "data:", "blob:")) else None)
    page.goto(address)
    page.wait_for_selector("#speak:enabled")
    yield page
    page.close()
    assert not wrong, wrong


def wait(page, condition):
    "Until a JavaScript expression is true (the page's policy forbids what wait_for_function does)."
    deadline = time.monotonic() + WAIT
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"never: {condition}; the page says {page.inner_text('#status')!r} and {page.inner_text('#error')!r}"
        page.wait_for_timeout(50)


def say(page, text, live=False):
    page.set_checked("#live", live)
    page.fill("#text", text)
    page.click("#speak")


def test_sound_begins_before_the_text_has_ended(page):
    page.locator("#text").press_sequentially("good morn")  # a word is finished, and nobody pressed a button
    wait(page, "last && last.chunks.length === 1 && context.currentTime > last.chunks[0].at")  # it sounds
    assert page.evaluate("[job !== null, last.ended, last.words.length]") == [True, None, 1]
    page.locator("#text").press_sequentially("ing to you")
    page.keyboard.press("Control+Enter")  # the end of the text
    wait(page, "last.done")
    assert page.evaluate("last.words.map(w => w.word)") == ["good", "morning", "to", "you"]
    assert page.evaluate("[last.samples, last.chunks[0].plays < last.ended]") == [48000, True]
    page.locator("#text").press_sequentially(" again and")  # goes on behind what was spoken
    wait(page, "job && last.chunks.length === 1")
    assert page.evaluate("last.words.map(w => w.word)") == ["again"]
    page.keyboard.press("Escape")
    wait(page, "job === null")


def test_chunks_follow_each_other_to_the_sample(page):
    say(page, "one two three four five six")
    wait(page, "last.done")
    assert page.evaluate("last.stalls") == 0 and page.evaluate("last.chunks.length") == 6
    assert page.evaluate("last.chunks.slice(1).every((c, i) => Math.abs(c.at - last.chunks[i].at - last.chunks[i].length / last.rate) < 1e-9)")
    assert page.evaluate("context.sampleRate") == 24000
    wait(page, "job === null && context.currentTime > last.next")


def test_a_stall_is_counted_and_leaves_a_gap(page):
    page.select_option("#system", "slow")
    say(page, "one two three")
    wait(page, "last.done")
    assert page.evaluate("last.stalls") == 2 and page.evaluate("last.chunks[1].at > last.chunks[0].at + 0.5")


def test_the_picture_grows(page):
    def coloured(): return page.evaluate("""() => { const c = document.getElementById("view"), d = c.getContext("2d").getImageData(62, 130, c.width - 70, c.height - 160).data;
        let n = 0; for (let i = 0; i < d.length; i += 4) n += d[i + 2] > d[i] + 20 || d[i + 1] > d[i] + 20; return n; }""")
    assert coloured() == 0
    page.locator("#text").press_sequentially("one two ")
    wait(page, "last && last.chunks.length === 2")
    page.wait_for_timeout(200)
    first = coloured()
    page.locator("#text").press_sequentially("three four five six ")
    wait(page, "last.chunks.length === 6")
    page.wait_for_timeout(200)
    assert coloured() > first > 0
    loudest = page.evaluate("""() => { const p = last.chunks[1].picture, d = p.getContext("2d").getImageData(20, 0, 1, p.height).data;
        let best = 0; for (let row = 0; row < p.height; row++) if (d[4 * row] + d[4 * row + 1] > d[4 * best] + d[4 * best + 1]) best = row; return p.height - 1 - best; }""")
    assert 18 <= loudest <= 22  # 500 Hz is 607 mel of 3266 (at 12 kHz): row 17.8 of 96, and its neighbours
    page.keyboard.press("Control+Enter")
    wait(page, "last.done")
    assert "6 words, 3.0 seconds of sound" in page.get_attribute("#view", "aria-label")


def test_stop_is_heard_at_once_and_frees_the_server(page):
    page.select_option("#system", "slow")
    say(page, " ".join(["word"] * 30))
    wait(page, "last.chunks.length >= 1")
    page.click("#stop")
    assert page.evaluate("job") is None and page.inner_text("#status") == "Stopped."
    page.select_option("#system", "beeper")
    say(page, "next")
    wait(page, "last.done")
    assert page.evaluate("last.samples") == 12000


def test_download_and_play_again(page, tmp_path):
    say(page, "one two")
    wait(page, "last.done && !document.getElementById('save').disabled")
    with page.expect_download() as found: page.click("#save")
    found.value.save_as(tmp_path / "speech.wav")
    with wave.open(str(tmp_path / "speech.wav")) as sound:
        assert (sound.getnchannels(), sound.getsampwidth(), sound.getframerate(), sound.getnframes()) == (1, 2, 24000, 24000)
        assert max(sound.readframes(24000)) > 0
    page.click("#again")
    assert page.evaluate("replay !== null")
    wait(page, "replay.buffer.length === 24000 && !document.getElementById('stop').disabled")
    page.click("#stop")
    assert page.evaluate("replay") is None


@pytest.mark.parametrize("text, said", [("", "no word in the box"), ("   ", "no word in the box"), ("unspeakable", "cannot be spoken"), ("broken", "Something broke in the server"), ("long " * 50, "longer than 200")])
def test_errors_are_shown_and_gone_with_the_next_text(page, text, said):
    say(page, text)
    wait(page, f"document.getElementById('error').textContent.includes({json.dumps(said)})")
    assert page.locator("#error").is_visible() and "secret" not in page.inner_text("body") and page.evaluate("job") is None
    say(page, "better")
    wait(page, "last && last.done && last.samples === 12000")
    assert not page.locator("#error").is_visible()


def test_words_that_were_sent_cannot_be_taken_back(page):
    page.locator("#text").press_sequentially("good morning ")
    wait(page, "last && last.chunks.length === 2")
    page.fill("#text", "bad morning ")
    assert "Words that were sent" in page.inner_text("#error")
    page.keyboard.press("Escape")


def test_choices_follow_the_system(page):
    assert page.eval_on_selector_all("#voice option", "all => all.map(o => o.value)") == ["anna", "ben"]
    page.select_option("#system", "slow")
    assert page.eval_on_selector_all("#voice option", "all => all.map(o => [o.value, o.text])") == [["", "its own"]]
    page.fill("#steps", "16")
    assert page.inner_text("#steps-shown") == "16"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_everything_has_a_name(page, width, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    for control in page.locator("input, select, textarea, button").all():
        assert control.evaluate("c => (c.labels && c.labels.length ? c.labels[0].textContent : c.textContent).trim()"), control.evaluate("c => c.outerHTML")
    assert page.evaluate("document.activeElement.id") == "text"
    order = []
    for _ in range(7):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
    assert order == ["system", "voice", "guidance", "steps", "seed", "live", "speak"]


def test_another_page_of_the_browser_may_not_come_in(browser, address):
    page = browser.new_page()
    page.goto("data:text/html,<title>elsewhere</title>")
    found = page.evaluate("""address => new Promise(done => { const s = new WebSocket(address.replace("http", "ws") + "/speak");
        s.onopen = () => done("open"); s.onclose = () => done("refused"); })""", address)
    page.close()
    assert found == "refused"


def test_a_server_that_goes_is_said(browser, tmp_path):
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        page = browser.new_page()
        page.goto(server.stdout.readline().split()[-1])
        page.wait_for_selector("#speak:enabled")
    finally:
        server.terminate()
        server.wait(30)
    wait(page, "document.getElementById('error').textContent.includes('connection to the server is gone')")
    assert page.is_disabled("#speak")
    page.close()
