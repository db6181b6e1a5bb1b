"""Faults, seeds, pictures, players, widgets and the doctor of ardm_course.core."""
import base64
import configparser
import errno
import io
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from ardm_course import core
from ardm_course.core import CourseError, atomic_write


def pixels(bundle):
    "The picture of one output as an array [height, width, 3]."
    from PIL import Image
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).convert("RGB"))


# ---- errors, seeds, devices, folders

def test_course_error_is_a_value_error():
    with pytest.raises(ValueError, match="Do this"):
        raise CourseError("It is wrong. Do this.")


def test_seed_starts_all_generators():
    import random
    draws = []
    for _ in range(2):
        generator = core.seed_everything(5)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item(), torch.rand((), generator=generator).item()))
    assert draws[0] == draws[1]
    core.seed_everything(6)
    assert torch.rand(()).item() != draws[0][2]


def test_generator_is_independent_of_the_global_state():
    first = core.seed_everything(1)
    torch.rand(10)
    assert torch.equal(torch.rand(4, generator=first), torch.rand(4, generator=core.seed_everything(1)))


def test_pick_device():
    assert core.pick_device("cpu") == torch.device("cpu")
    assert core.pick_device().type in ("cuda", "mps", "cpu")
    with pytest.raises(CourseError, match="Choose one of"):
        core.pick_device("tpu")


def test_environment_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("ARDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ARDM_DATA", str(tmp_path))
    assert core.cache_dir() == tmp_path / "cache" and core.data_dir() == tmp_path
    monkeypatch.setenv("ARDM_DATA", str(tmp_path / "absent"))
    with pytest.raises(CourseError, match="Set ARDM_DATA"):
        core.data_dir()
    for value, fast in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("ARDM_FAST", value)
        assert core.fast_mode() is fast


# ---- atomic_write

def test_write_makes_folders_and_keeps_the_suffix(tmp_path):
    target = tmp_path / "a" / "b" / "sound.wav"
    with atomic_write(target) as draft:
        assert draft.suffix == ".wav" and draft.parent == target.parent and draft != target
        draft.write_text("new")
    assert target.read_text() == "new" and os.listdir(target.parent) == ["sound.wav"]


@pytest.mark.parametrize("code, advice", [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EACCES, "may not write"),
                                          (errno.EPERM, "may not write"), (errno.EROFS, "may not write")])
@pytest.mark.parametrize("where", ["body", "fsync", "replace", "mkdir"])
def test_disk_faults_keep_the_old_file(tmp_path, monkeypatch, code, advice, where):
    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    if where == "mkdir":
        monkeypatch.setattr(Path, "mkdir", fail)
    elif where != "body":
        monkeypatch.setattr(os, where, fail)
    with pytest.raises(CourseError, match=advice):
        with atomic_write(target) as draft:
            draft.write_text("half")
            if where == "body":
                fail()
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), RuntimeError("mine"), OSError(errno.ENOENT, "another file is missing")])
def test_other_errors_pass_through(tmp_path, fault):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(type(fault)) as caught:
        with atomic_write(target) as draft:
            draft.write_text("half")
            raise fault
    assert caught.value is fault
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_real_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CourseError, match="may not write"):
            with atomic_write(tmp_path / "file.txt") as draft:
                draft.write_text("new")
    finally:
        tmp_path.chmod(0o700)


def _write_often(path, letter):
    for _ in range(40):
        with atomic_write(path) as draft:
            draft.write_text(letter * 20000)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_never_mix(tmp_path):
    target = tmp_path / "file.txt"
    _write_often(target, "z")
    writers = [multiprocessing.get_context("fork").Process(target=_write_often, args=(target, letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        text = target.read_text()
        assert len(text) == 20000 and len(set(text)) == 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert os.listdir(tmp_path) == ["file.txt"]


# ---- pictures

def test_every_picture_has_alt_text_and_fits_a_screen():
    wav, layer = torch.linspace(-1, 1, 500), torch.nn.Linear(3, 4)
    with core._collect() as shown:
        core.show_wave(wav, 100, title="wave")
        core.show_mel(torch.zeros(20, 80), title="mel", limits=(-1, 1))
        core.show_curves({"a": [1, 2, 3], "b": (torch.arange(3), [3, 2, 1])}, "x (s)", "y (Hz)", title="curves", log=True)
        core.show_image(torch.eye(4), "columns", "rows", title="image")
        core.draw_flow(["a", ("b", "[B, T]")], title="flow")
        core.draw_modules(layer, title="modules")
        with core.panels(1, 2) as axes:
            core.show_wave(wav, 100, title="left", ax=axes[0])
            core.show_wave(wav, 100, title="right", ax=axes[1])
    alts = [metadata["image/png"]["alt"] for _, metadata in shown]
    assert alts[:4] == ["wave", "mel", "curves", "image"] and alts[6] == "left; right"
    assert alts[4].startswith("flow: a to b [B, T]") and alts[5].startswith("modules: Linear")
    for bundle, _ in shown:
        picture = pixels(bundle)
        assert picture.shape[1] == 700 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_a_failing_block_shows_nothing():
    with core._collect() as shown, pytest.raises(RuntimeError):
        with core.panels() as axes:
            raise RuntimeError("while drawing")
    assert not shown


def test_outside_a_notebook_showing_is_silent(capsys):
    core.show_curves({"a": [1, 2]}, "x", "y")
    core.play(torch.zeros(100), 8000)
    assert capsys.readouterr().out == ""


def test_flow_boxes_stay_on_the_page():
    steps = [("a rather long name", "[B, N, P, D]")] * 9 + ["x"] * 9
    boxes = [core._box(step) for step in steps]
    rows = core._balance(boxes, 684, 28)
    assert [box for row in rows for box in row] == boxes
    assert all(sum(box.width + 28 for box in row) - 28 <= 684 for row in rows)
    assert len(core._balance(boxes[-3:], 684, 28)) == 1


def test_module_lines_fold_and_sum():
    layers = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(5)), torch.nn.Linear(8, 2))
    model = torch.nn.ModuleDict({"layers": layers, "head": torch.nn.Linear(2, 3)})
    lines = list(core._branches(model, "", depth=2))
    assert [line.kind for line in lines] == ["ModuleDict", "Sequential", "5 × Linear  [8, 8]", "Linear  [2, 8]", "Linear  [3, 2]"]
    assert lines[0].parameters == core.count_parameters(model) == lines[1].parameters + lines[4].parameters
    assert lines[1].parameters == lines[2].parameters + lines[3].parameters


def test_shared_parameters_count_once():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert core.count_parameters(model) == 16


@pytest.mark.parametrize("n, text", [(0, "0"), (812, "812"), (1500, "1.5k"), (999_600, "1M"), (4_200_000, "4.2M"), (99_960_000, "100M"),
                                     (643_000_000, "643M"), (1_540_000_000, "1.5B"), (-2000, "-2k")])
def test_human(n, text):
    assert core.human(n) == text


# ---- players

def heard(bundle):
    "The sounds inside an HTML output, as (samples, rate)."
    import soundfile
    return [soundfile.read(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)\"", bundle["text/html"])]


@pytest.mark.parametrize("rate, media", [(24000, "audio/mpeg"), (16000, "audio/mpeg"), (6250, "audio/wav")])
def test_player_is_small_and_never_starts_itself(rate, media):
    wav = 0.3 * torch.sin(2 * torch.pi * 200 * torch.arange(rate) / rate)
    with core._collect() as shown:
        core.play(wav, rate, "listen for <the tone>")
    page = shown[0][0]["text/html"]
    assert media in page and "autoplay" not in page and "&lt;the tone&gt;" in page
    (samples, found), = heard(shown[0][0])
    assert found == rate and abs(len(samples) - rate) < 2400 and abs(2**0.5 * samples.std() - 0.3) < 0.02


def test_compare_keeps_the_relation_of_levels():
    tone = torch.sin(2 * torch.pi * 200 * torch.arange(8000) / 8000)
    with core._collect() as shown:
        core.compare({"loud": 2 * tone, "quiet": tone}, 8000)
    (loud, _), (quiet, _) = heard(shown[0][0])
    assert np.abs(loud).max() <= 1.0 and np.std(loud) / np.std(quiet) == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("wav", [torch.full((10,), float("nan")), torch.zeros(0), torch.zeros(2, 10)])
def test_what_cannot_be_played_says_so(wav):
    with pytest.raises(CourseError, match="shape"):
        core.play(wav, 8000, "broken")


# ---- explore

def test_static_grid_takes_least_middle_and_greatest():
    seen = []

    def draw(a, b):
        seen.append((a, b))
        core.show_curves({"": [a, b]}, "x", "y")

    with core._collect() as shown:
        core.explore(draw, a=(0, 10, 2), b=[1, 5, 7])
    assert sorted(seen) == [(0, 5), (6, 1), (6, 5), (6, 7), (10, 5)]  # the middle is drawn once
    (bundle, metadata), = shown
    assert pixels(bundle).shape[1] == 700
    assert metadata["image/png"]["alt"] == "pictures at a = 0, a = 6, a = 10; b = 1, b = 5, b = 7"


def test_ranges_have_clean_values():
    assert core._values((0.0, 0.3, 0.1)) == [0.0, 0.1, 0.2, 0.3]
    assert core._values((1, 9, 4)) == [1, 5, 9] and all(isinstance(value, int) for value in core._values((1, 9, 4)))


def test_errors_inside_a_picture_reach_the_learner():
    with pytest.raises(ZeroDivisionError):
        core.explore(lambda k: core.show_curves({"": [1 / k]}, "x", "y"), k=[0, 1, 2])
    with pytest.raises(CourseError, match="drew nothing"):
        core.explore(lambda k: None, k=[0, 1, 2])


def test_slider_redraws():
    pytest.importorskip("ipywidgets")
    box = core._live(lambda k: core.show_curves({"": [k, 2]}, "x", "y", title=f"k is {k}"), {"k": (1, 5, 2)})
    hint, slider, output = box.children
    assert slider.value == 3 and "k is 3" in output.outputs[0]["data"]["text/plain"]
    slider.value = 5
    assert "k is 5" in output.outputs[0]["data"]["text/plain"] and len(output.outputs) == 1


@pytest.fixture
def speak():
    "A function that shows, plays and prints, and counts its runs."
    def speak(text, speed):
        speak.runs.append((text, speed))
        if not text:
            raise CourseError("There is nothing to say. Type a sentence.")
        core.play(torch.zeros(2400), 24000, text)
        core.show_curves({"": [1, speed]}, "x", "y", title=f"speed {speed}")
        print(f"said {len(text)} letters")
    speak.runs = []
    return speak


@pytest.mark.parametrize("button, speed", [("Speak", [1, 2, 4]), ("Speak", (1, 3, 1)), (None, "2")])  # text boxes alone have no grid either
def test_without_a_grid_the_page_keeps_one_whole_run(speak, button, speed, capsys):
    with core._collect() as shown:
        core.explore(lambda text, speed: speak(text, int(speed)), button=button, text="hello", speed=speed)
    assert speak.runs == [("hello", 2)] and capsys.readouterr().out == "said 5 letters\n"
    (player, _), (figure, _) = shown
    assert len(heard(player)) == 1 and pixels(figure).shape[1] == 700


def test_a_text_box_has_no_row_in_the_grid():
    with core._collect() as shown:
        core.explore(lambda text, k: (print(text), core.show_curves({text: [k]}, "x", "y")), text="words", k=[1, 2, 3])
    assert [metadata["image/png"]["alt"] for _, metadata in shown] == ["pictures at k = 1, k = 2, k = 3"]


def test_the_button_runs_and_nothing_else_does(speak):
    pytest.importorskip("ipywidgets")
    hint, text, speed, button, output = core._live(speak, {"text": "hello", "speed": [1, 2, 4]}, "Speak <now>").children
    assert button.description == "Speak <now>" and "&lt;now&gt;" in hint.value
    text.value, speed.value = "good morning", 4
    assert speak.runs == [] and output.outputs == ()
    button.click()
    player, figure, printed = output.outputs
    assert speak.runs == [("good morning", 4)] and len(heard(player["data"])) == 1 and printed["text"] == "said 12 letters\n"
    assert "speed 4" in figure["data"]["text/plain"] and not button.disabled and button.description == "Speak <now>"


def test_while_it_runs_the_button_says_so():
    pytest.importorskip("ipywidgets")
    seen = []
    box = core._live(lambda text: seen.append((box.children[-2].disabled, box.children[-2].description)), {"text": "a"}, "Go")
    box.children[-2].click()
    assert seen == [(True, "Working ...")] and not box.children[-2].disabled


def test_a_live_error_takes_the_place_of_the_result(speak):
    pytest.importorskip("ipywidgets")
    hint, text, speed, button, output = core._live(speak, {"text": "hello", "speed": [1, 2, 4]}, "Speak").children
    button.click()
    text.value = ""
    button.click()
    assert [(item["name"], item["text"]) for item in output.outputs] == [("stderr", "There is nothing to say. Type a sentence.\n")]
    assert not button.disabled
    assert core._outputs(lambda k: 1 / k, {"k": 0})[0]["text"] == "ZeroDivisionError: division by zero\n"


def test_small_pictures_have_few_ticks():
    with core._collect(width=3.0, dpi=77):
        with core.panels() as axes:
            core.show_wave(torch.zeros(720), 24000, ax=axes[0])
    assert len(axes[0].get_xticks()) <= 6


# ---- installing beside an installed PyTorch

def test_install_command_pins_what_is_there(monkeypatch):
    there = {"torch": "2.13.0+cu130", "torchaudio": "2.13.0"}

    def version(package):
        if package in there:
            return there[package]
        raise core.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(core.importlib.metadata, "version", version)
    command = core.install_command(Path("somewhere") / "course")
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[-2:] == ["torch==2.13.0+cu130", "torchaudio==2.13.0"] and command[-3] == str(Path("somewhere") / "course")
    there.clear()
    assert not any("torch" in word for word in core.install_command("course"))


def test_pip_would_leave_torch_alone(tmp_path):
    (tmp_path / "setup.py").write_text("from setuptools import setup; setup(name='needs-torch', version='1', install_requires=['torch>=2.11'])")
    options = ["--dry-run", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    command = [word for word in core.install_command(tmp_path) if word != "--quiet"] + options
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Would install needs" in done.stdout and "torch-" not in done.stdout.split("Would install")[1].replace("needs-torch-", "")


# ---- the doctor

def test_every_finding_has_a_mend(monkeypatch, tmp_path):
    monkeypatch.setenv("ARDM_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    findings = core.doctor()
    assert len({finding.name for finding in findings}) == len(findings)
    assert all(finding.mend and finding.found for finding in findings)
    assert os.listdir(tmp_path) == []  # its probes are gone


def test_doctor_finds_what_is_broken(monkeypatch, tmp_path, capsys):
    import soundfile

    def absent(package):
        raise core.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(core.importlib.metadata, "version", absent)
    monkeypatch.setattr(soundfile, "available_formats", lambda: {"WAV": ""})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(10**9, 10**9, 0))
    monkeypatch.setenv("ARDM_DATA", str(tmp_path / "absent"))
    monkeypatch.setenv("ARDM_CACHE", str(tmp_path))
    findings = core.doctor()
    broken = {finding.name for finding in findings if not finding.ok}
    assert broken == {finding.name for finding in findings} - {"python", "device"}
    core.print_doctor()
    printed = capsys.readouterr().out
    assert all(finding.mend in printed for finding in findings if not finding.ok)
    assert printed.splitlines()[-1].startswith("To mend: threads, torch")


def test_old_package_is_found(monkeypatch):
    monkeypatch.setattr(core.importlib.metadata, "version", lambda package: "2.9.1")
    with pytest.raises(CourseError, match="older than 2.11"):
        core._see_packages("torch", "2.11")
    assert core._see_packages("torch", "2.9") == "torch 2.9.1"


def test_a_torchaudio_for_another_torch_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(core.importlib.metadata, "version", lambda package: "2.13.0")
    (tmp_path / "libtorchaudio.so").write_text("this is not a library")
    file = namedtuple("file", "name locate")("libtorchaudio.so", lambda: tmp_path / "libtorchaudio.so")
    monkeypatch.setattr(core.importlib.metadata, "files", lambda package: [file])
    with pytest.raises(CourseError, match="torchaudio 2.13.0 was built for another torch"):
        core._see_torchaudio()
    monkeypatch.setattr(core.importlib.metadata, "files", lambda package: None)
    assert core._see_torchaudio() == "torchaudio 2.13.0"


def test_a_folder_that_is_not_the_data_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("ARDM_DATA", str(tmp_path))
    with pytest.raises(CourseError, match="not the course's data"):
        core._see_data()
    (tmp_path / "checkpoints").mkdir()
    assert core._see_data() == "checkpoints: enough to speak; the notebooks need a checkout"


@pytest.mark.parametrize("blocked", ["a file", "no parent"])
def test_a_closed_cache_is_found_and_mended(monkeypatch, tmp_path, blocked):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARDM_CACHE", str(tmp_path / "file" if blocked == "a file" else tmp_path / "file" / "cache"))
    cache, = (finding for finding in core.doctor() if finding.name == "cache")
    assert not cache.ok and "Set ARDM_CACHE" in cache.mend


def test_doctor_knows_every_requirement():
    settings = Path(__file__).parent.parent / "settings.ini"
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(settings, encoding="utf-8")
    wanted = {}
    for requirement in shlex.split(parser["DEFAULT"]["requirements"]):
        name, _, least = requirement.partition(">=")
        wanted[name] = least
    assert set(wanted) == set(core._NEEDED)
    assert all(least in ("", core._NEEDED[name]) for name, least in wanted.items())


# ---- weight of the import

def test_import_is_light():
    heavy = "matplotlib IPython ipywidgets datasets accelerate transformers fastcore nbdev torchaudio soundfile pandas"
    code = f"import sys, ardm_course, ardm_course.core; print([name for name in {heavy.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
