"""The report: schema, missing measurements, escaping, pictures, and the page in a real browser."""
import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
import torch

from ardm_course import report
from ardm_course.ardm import ARDM, ARDMConfig
from ardm_course.core import CourseError
from ardm_course.evaluation import Sample
from ardm_course.locdit import HeadConfig
from ardm_course.report import Markup, Report, Take, tag
from ardm_course.text import TextTokenizer
from ardm_course.transformer import TransformerConfig, rope_table

NASTY = "<script>alert('x')</script> & \"quotes\" </style>"
ROW = {"n": 12, "wer_moonshine": 0.05, "wer_whisper": 0.125, "cer_moonshine": 0.02, "similarity": 0.9, "mos": 3.5,
       "intervals": {"wer_moonshine": [0.02, 0.09], "wer_whisper": [0.08, 0.2], "cer_moonshine": [0.01, 0.03], "similarity": None, "mos": [3.2, 3.8]}}


def tone(seconds=0.5, rate=24000):
    "A sound to play."
    return 0.3 * torch.sin(2 * math.pi * 440 * torch.arange(int(seconds * rate)) / rate)


def made(**changes):
    "A small report with everything in it."
    takes = [Take("The cat sat down.", kind, tone(0.4 + 0.1 * number), 24000, {"moonshine": heard, "whisper": "The cat sat down."}, "stop head")
             for number, (kind, heard) in enumerate(zip((kind for kind in report.KINDS if kind != "griffin-lim"), ("The cat sat down.", "The hat sat down.", "The cat down", "so the cat sat down")))]
    history = [{"step": step, "loss": 1 / step, "lr": 1e-3, "frames": step, "seconds": step} for step in range(1, 30)]
    history += [{"step": 20, "valid_loss": 0.2, "valid_flow": 0.1, "valid_flow_t0.1": 0.3}, {"step": 30, "valid_loss": 0.1, "valid_flow": 0.1, "valid_flow_t0.1": 0.2}]
    fields = dict(tier="toy", system="ditar", seed=0, device="cpu", rows={"real": ROW, "generated": ROW}, takes=takes, history=history,
                  timing={"total_s": 60.5, "train_s": 50.0, "steps": 30, "audio_s_per_s": 100.0}, rtf=0.2, first_audio_ms=150.0,
                  stop_reasons={"stop head": 11, "length limit": 1}, attention=report.figure_png(lambda ax: ax.plot([0, 1]), 3, 2), commands=["make run"])
    return Report(**{**fields, **changes})


class Elements(HTMLParser):
    "All start tags of a page, and whether every element is closed in order."
    def __init__(self, page):
        super().__init__()
        self.found, self.open = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes)))
        if name not in ("img", "meta"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def all(self, name):
        return [attributes for found, attributes in self.found if found == name]


# ---- folders and memory

def test_run_folders_are_new_and_sorted(tmp_path):
    first, second = report.run_folder("toy run/1", tmp_path), report.run_folder("toy run/1", tmp_path)
    assert first != second and first.is_dir() and re.fullmatch(r"\d{8}-\d{6}-toy-run-1", first.name)
    (tmp_path / "file").write_text("")
    with pytest.raises(CourseError, match="Choose another place"):
        report.run_folder("toy", tmp_path / "file")


def test_peak_memory_grows_with_use():
    before = report.peak_memory_mb()
    held = np.ones(int(before * 1e6) // 8 + 25_000_000)
    assert report.peak_memory_mb() > before and 10 < before < 1e6 and held[0] == 1


# ---- report.json

def test_json_has_the_schema(tmp_path):
    report.write_report(tmp_path, made())
    data = json.loads((tmp_path / "report.json").read_text())
    assert report.report_problems(data) == []
    assert list(data["rows"]) == ["real", "resynthesised", "griffin-lim", "generated", "released"]
    for row in data["rows"].values():
        assert {"n", "wer_moonshine", "wer_whisper", "cer_moonshine", "similarity", "mos", "intervals"} <= set(row)
    assert {"tier", "system", "seed", "device", "timing", "peak_memory_mb", "rtf", "first_audio_ms", "stop_reasons"} <= set(data)
    assert set(data["timing"]) == {"total_s", "train_s", "steps", "audio_s_per_s"}
    for sample in data["samples"]:
        wav, rate = soundfile.read(tmp_path / "wavs" / sample["file"])
        assert rate == 24000 and len(wav) / rate == pytest.approx(sample["seconds"]) and sample["heard"]


def test_what_was_not_measured_is_null(tmp_path):
    bare = Report("toy", "ditar", 0, "cpu", {"generated": {"n": 3, "wer_moonshine": float("nan"), "mos": np.float32("inf"), "intervals": {}}}, peak_memory_mb=None)
    report.write_report(tmp_path, bare)
    text = (tmp_path / "report.json").read_text()
    data = json.loads(text, parse_constant=pytest.fail)  # NaN would be a constant
    assert report.report_problems(data) == [] and data["rtf"] is None and data["timing"]["train_s"] is None and data["peak_memory_mb"] is None
    assert data["rows"]["generated"]["wer_moonshine"] is None and data["rows"]["released"] == report.full_row()
    page = (tmp_path / "report.html").read_text()
    assert page.count("not measured") > 25 and "nan" not in page.lower() and "None" not in page and "inf" not in re.sub(r"info\w*", "", page).split()


@pytest.mark.parametrize("path, value, message", [
    (["seed"], "0", "seed is '0'"), (["rtf"], "fast", "rtf is 'fast'"), (["rows"], [], "rows is"), (["tier"], ..., "tier is Ellipsis"),
    (["timing", "steps"], "many", "timing.steps"), (["timing", "train_s"], ..., "timing.train_s"), (["stop_reasons", "stop head"], 0.5, "stop_reasons.stop head"),
    (["rows", "released"], ..., "rows.released"), (["rows", "real", "n"], -1, "n is not a count"), (["rows", "real", "mos"], "good", "mos is 'good'"),
    (["rows", "real", "mos"], ..., "mos is 'absent'"), (["rows", "real", "intervals", "mos"], [4, 3], "interval of mos"),
    (["rows", "real", "intervals", "mos"], [1, 2, 3], "interval of mos"), (["rows", "released", "intervals", "mos"], [1, 2], "not measured but has an interval"),
    (["rows", "released", "mos"], 4.0, "mos is 4.0 over 0"), (["rows", "real", "wer_whisper"], True, "wer_whisper is True")])
def test_the_schema_notices(path, value, message):
    data = report.report_data(made())
    *way, last = path
    place = data
    for name in way:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    assert any(message in problem for problem in report.report_problems(data)), report.report_problems(data)


def test_an_impossible_figure_is_not_written(tmp_path):
    with pytest.raises(CourseError, match="mos is 3.5 over 0"):
        report.write_report(tmp_path / "new", made(rows={"real": {"n": 0, "mos": 3.5}}))
    assert not (tmp_path / "new").exists()


def test_writing_is_atomic(tmp_path, monkeypatch):
    report.write_report(tmp_path, made())
    before = (tmp_path / "report.html").read_text()
    monkeypatch.setattr(report, "page", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write_report(tmp_path, made(seed=1))
    assert (tmp_path / "report.html").read_text() == before
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.json", "wavs"]


def test_sound_files_have_different_names():
    takes = [Take(text, kind, tone(), 24000) for text in ("a", "b") for kind in ("real", "generated", "generated")]
    assert list(report.sound_files(takes)) == ["01-real.wav", "01-generated.wav", "01-generated-2.wav", "02-real.wav", "02-generated.wav", "02-generated-2.wav"]


def test_takes_of_uses_the_measured_transcripts():
    samples = [Sample("a b", tone(), 24000), Sample("c d", tone(), 24000)]
    answers = {"text": ["a b", "c d"], "moonshine": ["a", "c"], "whisper": None, "similarity": None, "mos": [3.0, 4.0]}
    first, second = report.takes_of("generated", samples, answers, ["stop head", "length limit"])
    assert first.heard == {"moonshine": "a"} and second.stop_reason == "length limit" and report.takes_of("real", samples, answers)[0].stop_reason is None


# ---- what was heard

@pytest.mark.parametrize("said, heard, kinds", [
    ("a b c", "a b c", "right right right"), ("a b c", "a c", "right missing right"), ("a b", "a x b", "right extra right"),
    ("a b c", "a x c", "right wrong right"), ("", "x", "extra"), ("x", "", "missing"), ("", "", ""), ("a b c d", "b c d e", "missing right right right extra")])
def test_marks(said, heard, kinds):
    assert " ".join(mark.kind for mark in report.mark_words(said.split(), heard.split())) == kinds


def test_marks_count_like_the_error_rate():
    jiwer = pytest.importorskip("jiwer")
    draw = np.random.default_rng(0)
    for _ in range(100):
        said, heard = (list(draw.choice(list("abc"), draw.integers(1, 9))) for _ in range(2))
        marks = report.mark_words(said, heard)
        output = jiwer.process_words(" ".join(said), " ".join(heard))
        assert sum(mark.kind != "right" for mark in marks) == output.substitutions + output.insertions + output.deletions
        assert [mark.word for mark in marks if mark.kind != "missing"] == heard
        assert [mark.meant or mark.word for mark in marks if mark.kind != "extra"] == said


def test_mistakes_are_shown_by_more_than_colour():
    page = report.transcript("the cat sat", "moonshine", "a cat sat down")
    assert '<mark title="said: the">a</mark>' in page and '<ins title="heard, not said">down</ins>' in page and "2 mistakes in 3 words" in page
    assert "every word right" in report.transcript("The cat!", "moonshine", "the cat") and "1 mistake in" in report.transcript("The cat", "m", "cat")


# ---- HTML

def test_tag_escapes_everything_but_markup():
    assert tag("p", NASTY, title=NASTY) == f'<p title="{report.html.escape(NASTY)}">{report.html.escape(NASTY)}</p>'
    assert tag("p", tag("b", "1 < 2"), class_="x", aria_label=None) == '<p class="x"><b>1 &lt; 2</b></p>'
    assert tag("img", alt="") == '<img alt="">' and isinstance(tag("p"), Markup)


def test_nothing_that_was_said_becomes_code():
    takes = [Take(NASTY, "generated", tone(), 24000, {NASTY: NASTY}, NASTY)]
    page = report.page(made(tier=NASTY, system=NASTY, device=NASTY, takes=takes, stop_reasons={NASTY: 1}, commands=[NASTY]))
    elements = Elements(page)
    assert "<script" not in page and page.count("</style>") == 1 and not elements.all("script")
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]


def test_page_is_self_contained_and_accessible():
    page = report.page(made())
    elements = Elements(page)
    addresses = [attributes[name] for _, attributes in elements.found for name in ("src", "href") if name in attributes]
    assert len(addresses) == 4 * 2 + 3 + 1 and all(address.startswith("data:") for address in addresses)
    assert "http" not in re.sub(r"data:[^\"]+|http-equiv", "", page) and "url(" not in page
    assert all(image.get("alt") for image in elements.all("img")) and all(audio.get("aria-label") for audio in elements.all("audio"))
    assert all(cell.get("scope") in ("row", "col") for cell in elements.all("th")) and elements.all("html") == [{"lang": "en"}]
    assert all("autoplay" not in audio and audio["controls"] == "" for audio in elements.all("audio"))
    assert "5.0" in page and "[2.0, 9.0]" in page and "prefers-color-scheme:dark" in page


def test_page_of_an_empty_report():
    Elements(report.page(Report("toy", "ditar", 0, "cpu", {})))


@pytest.mark.parametrize("rows, text", [({}, "were not measured"), ({"generated": ROW}, "5.0 % of the words"), ({"generated": ROW, "resynthesised": ROW}, "1.0 times as many"),
                                        ({"generated": ROW, "resynthesised": {**ROW, "wer_moonshine": 0.0}}, "against in resynthesised recordings (0.0 %)")])
def test_verdict(rows, text):
    assert text in report.verdict({kind: report.full_row(rows.get(kind)) for kind in report.KINDS})


# ---- sounds and pictures

@pytest.mark.parametrize("rate", [16000, 24000, 22050])
def test_players_and_spectrograms(rate):
    from PIL import Image
    take = Take("Hello.", "real", 3 * tone(0.5, rate), rate)
    source = Elements(report.sound_player(take, "hello")).all("audio")[0]["src"]
    wav, found = soundfile.read(io.BytesIO(base64.b64decode(source.split(",")[1])))
    assert found == rate and len(wav) == pytest.approx(len(take.wav), abs=0.06 * rate) and abs(wav).max() < 1
    assert Image.open(io.BytesIO(report.spectrogram_png(take.wav, rate))).size == (25, 80)


def test_loud_band_is_bright_and_low_bands_are_at_the_bottom():
    from PIL import Image
    pixels = np.asarray(Image.open(io.BytesIO(report.spectrogram_png(tone(), 24000))))  # palette indices
    assert pixels[:, 10].argmax() > 60 and pixels.max() > 200 and np.median(pixels) < 60


def test_curves_name_their_values():
    figures = report.curve_figures(made().history)
    assert len(figures) == 3 and "training from 1 to 0.0345; validation from 0.2 to 0.1" in figures[0] and "t = 0.1 from 0.3 to 0.2" in figures[2]
    assert report.curve_figures([]) == []


# ---- attention

@pytest.fixture(params=[(4, 4, (), 0.0), (4, 2, ("a", "b"), 2.0)], ids=["plain", "grouped-voices-follow"])
def model(request):
    heads, groups, voices, rate = request.param
    torch.manual_seed(0)
    config = ARDMConfig(backbone=TransformerConfig(32, 3, heads, groups, 64), head=HeadConfig(cond_dim=32, width=32, layers=1, heads=2, hidden=64), speakers=voices, tokens_per_patch=rate)
    return ARDM(config).eval()


def test_attention_weights_are_those_of_the_block(model):
    block, x, rope = model.backbone.blocks[1], torch.randn(1, 9, 32), rope_table(torch.arange(9), 8)
    weights, attention = report.attention_weights(block, x, rope), block.attention
    normed = block.attention_norm(x)
    v = attention.qkv(normed).view(1, 9, -1, attention.size).transpose(1, 2)[:, attention.heads + attention.groups:]
    y = weights @ v.repeat_interleave(attention.heads // attention.groups, 1)
    assert torch.allclose(attention.out(y.transpose(1, 2).reshape(1, 9, -1)), attention(normed, rope), atol=1e-5)
    assert torch.allclose(weights.sum(-1), torch.ones(4, 9)) and weights.triu(1).abs().max() == 0


def test_attention_maps_and_picture(model):
    from PIL import Image
    tokens = torch.tensor(TextTokenizer(model.config.text).encode("hello there"))
    patches = torch.randn(5, 8, 80)
    before = {name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()}
    maps = report.attention_maps(model, tokens, patches, speaker=0)
    assert maps.shape == (3, 4, 5, len(tokens)) and maps.min() >= 0 and maps.sum(-1).max() <= 1 + 1e-5 and not maps.requires_grad
    others = report.attention_maps(model, tokens, torch.cat([patches[:4], 9 + patches[4:]]))
    assert torch.allclose(maps, others)  # the last patch is drawn, never read
    assert Image.open(io.BytesIO(report.attention_picture(model, tokens, patches))).size[0] == 1200
    assert before == {name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()}


def test_clearest_head_follows_the_text():
    diagonal, stuck, blurred = torch.eye(6), torch.zeros(6, 6), torch.full((6, 6), 1 / 6)
    stuck[:, 0] = 1
    maps = torch.stack([torch.stack([stuck, blurred]), torch.stack([diagonal, diagonal.flip(0)])])
    assert report.clearest_head(maps) == (1, 0)
    assert report.clearest_head(maps[:, :, :1]) == (0, 0)  # one patch: nothing moves


# ---- a real browser

PROBE = """<iframe src="report.html" width="%d" height="2000"></iframe><pre id="found"></pre><script>
const wait = setInterval(() => {
  const inner = document.querySelector("iframe").contentDocument, audio = [...inner.querySelectorAll("audio")], images = [...inner.images]
  if (!images.length || !audio.every(a => a.readyState > 0 || a.error)) return
  clearInterval(wait)
  document.getElementById("found").textContent = JSON.stringify({
    bad: images.filter(i => !i.complete || !i.naturalWidth).length, images: images.length, errors: audio.filter(a => a.error).length,
    seconds: audio.map(a => a.duration), width: inner.documentElement.scrollWidth, shown: document.querySelector("iframe").clientWidth,
    loaded: inner.defaultView.performance.getEntriesByType("resource").map(e => e.name.slice(0, 5)).filter(n => n != "data:"),
    title: inner.title, scripts: inner.scripts.length})
}, 50)</script>"""


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(width, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    report.write_report(tmp_path, made(system=NASTY))
    (tmp_path / "probe.html").write_text(PROBE % width)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--disable-quic", "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--window-size=1400,2200",
             "--virtual-time-budget=20000", "--dump-dom"]
    out = subprocess.run([browser, *flags, (tmp_path / "probe.html").as_uri()], capture_output=True, text=True, timeout=120)
    found = json.loads(re.search(r'<pre id="found">(\{.*\})</pre>', out.stdout)[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert "CONSOLE" not in out.stderr, out.stderr  # nothing was refused, nothing failed
    assert found["bad"] == found["errors"] == found["scripts"] == 0 and found["images"] == 4 + 3 + 1 and found["loaded"] == []
    assert found["seconds"] == pytest.approx([0.4, 0.5, 0.6, 0.7], abs=0.08)
    assert found["width"] <= found["shown"] == width and NASTY in found["title"]
