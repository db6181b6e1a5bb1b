"""The notebooks as a learner meets them: JupyterLab in a real browser, sliders dragged, buttons pressed, sounds played."""
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install jupyterlab")
from playwright.sync_api import TimeoutError as BrowserTimeout
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
REAL = "01_audio"
WAIT = 150_000  # ms; an idle machine needs a tenth of it
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium, or install Google Chrome")

SOUND = '''import torch
from ardm_course.core import explore, play, show_wave

def tone(pitch, seconds=0.5):
    return 0.3 * torch.sin(2 * torch.pi * pitch * torch.arange(int(seconds * 24000)) / 24000)

play(tone(220), 24000, "a tone of 220 Hz")'''
SLIDERS = '''def look(pitch, seconds):
    wav = tone(pitch, seconds)
    show_wave(wav[:720], 24000, title=f"{pitch} Hz")
    play(wav, 24000, f"{pitch} Hz, {seconds} s")
    print(f"{len(wav)} samples")

explore(look, pitch=(100, 500, 50), seconds=[0.5, 1.0, 2.0])'''
BUTTON = '''def speak(text, pitch):
    look(pitch, seconds=len(text) / 10)

explore(speak, text="hello", pitch=[200, 300, 400], button="Speak")'''


def write_small(path):
    "A notebook of three code cells: a player, sliders with sound, a text box with a button."
    cells = [{"cell_type": "code", "id": f"cell{number}", "metadata": {}, "execution_count": None, "outputs": [], "source": source}
             for number, source in enumerate((SOUND, SLIDERS, BUTTON))]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))


def copy_real(path):
    "A notebook of the course without its saved outputs, and without the last cell, which would export the package."
    notebook = json.loads((ROOT / "nbs" / path.name).read_text(encoding="utf-8"))
    assert "nbdev_export" in "".join(notebook["cells"].pop()["source"])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    path.write_text(json.dumps(notebook))


def server_environment(home):
    "Settings of its own, so that nobody's JupyterLab habits change the test; cells off the screen stay in the page."
    for name, setting in (("notebook-extension/tracker", {"windowingMode": "none"}), ("apputils-extension/notification", {"fetchNews": "false"})):
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(setting))
    folders = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    lab = {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    kept = {name: value for name, value in os.environ.items() if name not in ("IN_TEST", "MPLBACKEND")}
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**kept, **folders, **lab, "PYTHONPATH": paths, "ARDM_FAST": "1", "OMP_NUM_THREADS": "1"}


def wait_for_server(server, address, token):
    "Return when the server answers."
    request = urllib.request.Request(f"{address}/api/status", headers={"Authorization": f"token {token}"})
    for _ in range(600):
        assert server.poll() is None, "JupyterLab ended before it answered"
        try:
            with urllib.request.urlopen(request, timeout=10):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError("JupyterLab did not answer within two minutes")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The address of a JupyterLab on a free loopback port, in a temporary folder, as a function of the notebook's name."
    home = tmp_path_factory.mktemp("lab")
    (work := home / "work").mkdir()
    write_small(work / "small.ipynb")
    copy_real(work / f"{REAL}.ipynb")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token, address = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={work}", "--LabApp.news_url=", "--expose-app-in-browser",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(home / "lab.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=server_environment(home), stdout=log, stderr=log)
    try:
        wait_for_server(server, address, token)
        yield lambda name: f"{address}/lab/tree/{name}.ipynb?reset&token={token}"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
                 "--disable-sync", "--mute-audio"]
        browser = playwright.chromium.launch(executable_path=BROWSER, args=flags)
        yield browser
        browser.close()


READY = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
DONE = """() => {
    const panel = window.jupyterapp.shell.currentWidget;
    const cells = panel.content.widgets.map(cell => cell.model).filter(m => m.type === 'code' && m.sharedModel.getSource().trim());
    const failed = cells.some(m => m.outputs.toJSON().some(o => o.output_type === 'error'));
    return failed || (panel.sessionContext.session?.kernel?.status === 'idle' && cells.every(m => m.executionCount > 0));
}"""
ERRORS = """() => window.jupyterapp.shell.currentWidget.content.widgets.map(cell => cell.model).filter(m => m.type === 'code')
    .flatMap(m => m.outputs.toJSON()).filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue)"""
PLAY = """async element => {
    await element.play();
    return {error: element.error && element.error.message, duration: element.duration};
}"""


def run_all(browser, address):
    "Open a notebook as a person does: wait for its kernel, then Run > Run All Cells, and wait for the last one and for a widget."
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.set_default_timeout(WAIT)
    page.goto(address)
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function(READY)
    page.click('.lm-MenuBar-itemLabel:text-is("Run")')
    page.click('.lm-Menu-itemLabel:text-is("Run All Cells")')
    page.wait_for_function(DONE)
    page.wait_for_selector(".widget-vbox img")
    return page


@pytest.fixture(scope="module")
def opened(lab, browser, tmp_path_factory):
    "Notebooks by name, run to their end once; a first timeout is tried again on a fresh page."
    pages, shots = {}, tmp_path_factory.mktemp("screenshots")

    def open_once(name):
        if name not in pages:
            try:
                pages[name] = run_all(browser, lab(name))
            except BrowserTimeout:
                browser.contexts[-1].pages[-1].screenshot(path=shots / f"{name}_timeout.png")
                pages[name] = run_all(browser, lab(name))
        return pages[name]

    open_once.shots = shots
    return open_once


def live(page, number):
    "The controls and the output of one `explore`."
    box = page.locator(".jp-OutputArea-output .widget-vbox").nth(number)
    box.scroll_into_view_if_needed()
    return box


def picture(box):
    return box.locator("img").first.get_attribute("src")


def wait_for_change(page, box, before):
    "Return the new picture as soon as it differs from the one before."
    page.wait_for_function("([box, before]) => { const img = box.querySelector('img'); return img && img.src !== before }",
                           arg=[box.element_handle(), before])
    return picture(box)


def drag(page, box, number, share):
    "Drag the handle of a slider with the mouse to a share of its track."
    handle, track = box.locator(".noUi-handle").nth(number).bounding_box(), box.locator(".noUi-target").nth(number).bounding_box()
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    page.mouse.move(track["x"] + share * track["width"], track["y"] + track["height"] / 2, steps=8)
    page.mouse.up()


def hear(page, audio):
    "Play a sound and wait until time passes in it; return its duration in seconds."
    audio.scroll_into_view_if_needed()
    state = audio.evaluate(PLAY)
    assert state["error"] is None
    page.wait_for_function("audio => audio.currentTime > 0", arg=audio.element_handle())
    return state["duration"]


def test_every_cell_runs_and_the_player_plays(opened):
    page = opened("small")
    assert page.evaluate(ERRORS) == []
    assert hear(page, page.locator("audio").first) == pytest.approx(0.5, abs=0.1)


def test_figure_and_sound_follow_the_sliders(opened):
    page = opened("small")
    box = live(page, 0)
    page.screenshot(path=opened.shots / "sliders.png")
    first = picture(box)
    assert hear(page, box.locator("audio")) == pytest.approx(1.0, abs=0.1)
    drag(page, box, 0, 0.9)
    second = wait_for_change(page, box, first)
    drag(page, box, 1, 1.0)
    box.locator("text=48000 samples").wait_for()
    assert hear(page, box.locator("audio")) == pytest.approx(2.0, abs=0.1)
    box.locator(".noUi-handle").first.focus()
    page.keyboard.press("ArrowLeft")
    assert wait_for_change(page, box, second) != first
    page.screenshot(path=opened.shots / "sliders_moved.png")


def test_a_text_and_a_button(opened):
    page = opened("small")
    box = live(page, 1)
    assert box.locator("img").count() == 0  # nothing runs before the button
    box.locator("input[type=text]").fill("a longer sentence")
    box.get_by_role("button", name="Speak").click()
    box.locator("text=40800 samples").wait_for()
    assert hear(page, box.locator("audio")) == pytest.approx(1.7, abs=0.1)
    page.screenshot(path=opened.shots / "button.png")


def test_an_error_is_shown_where_the_result_would_be(opened):
    page = opened("small")
    box = live(page, 1)
    box.locator("input[type=text]").fill("")
    box.get_by_role("button", name="Speak").click()
    box.locator("text=cannot be played").wait_for()
    page.screenshot(path=opened.shots / "error.png")


def test_a_notebook_of_the_course(opened):
    page = opened(REAL)
    assert page.evaluate(ERRORS) == []
    assert hear(page, page.locator("audio").first) > 0
    box = live(page, 0)
    page.screenshot(path=opened.shots / f"{REAL}.png")
    before = picture(box)
    drag(page, box, 0, 1.0)
    wait_for_change(page, box, before)
    page.screenshot(path=opened.shots / f"{REAL}_moved.png")
