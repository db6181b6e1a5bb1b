"""ardm-course: every command on tiny things, its exit codes, and what it must not import."""
import io
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch

from ardm_course import ablations, cli, recipes
from ardm_course.ardm import ARDM, ARDMConfig, generate
from ardm_course.audio import load_audio
from ardm_course.corpus import decode, load_corpus
from ardm_course.data_build import write_rows
from ardm_course.locdit import HeadConfig
from ardm_course.report import KINDS, row_problems
from ardm_course.training import TrainConfig
from ardm_course.transformer import TransformerConfig
from ardm_course.tts import TTS
from ardm_course.vocoder import MelCodec

COURSE = [sys.executable, "-c", "import sys; from ardm_course.cli import main; sys.exit(main())"]
TINY = ARDMConfig(backbone=TransformerConfig(32, 1, 2, 2, 64), head=HeadConfig(cond_dim=32, width=32, layers=1, heads=2, hidden=64))


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    "Nothing is written outside the test's folder, and thread counts are put back."
    monkeypatch.setenv("ARDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tmp_path):
    "A checkpoint with random weights that ends early."
    torch.manual_seed(0)
    model = ARDM(replace(TINY, codec=MelCodec().to_dict()))
    torch.nn.init.constant_(model.stop[-1].bias, 5.0)
    TTS(model).save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def corpus(tmp_path):
    "Six sentences of the phrases corpus as a folder in hub layout."
    rows = load_corpus("phrases", "dev").select(range(6)).to_list()
    for split, part in {"train": rows[:4], "dev": rows[4:5], "test": rows[5:]}.items():
        write_rows(tmp_path / "small" / f"{split}.parquet", part, 24000)
    return str(tmp_path / "small")


# ---- starting, helping, failing

def test_help_is_fast_and_imports_nothing_heavy():
    code = "import sys; from ardm_course.cli import main\ntry: main(['--help'])\nfinally: print([m for m in ('torch', 'numpy', 'datasets') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.rstrip().endswith("[]") and "ardm-course COMMAND --help" in out.stdout


@pytest.mark.parametrize("words", [[], ["doctor"], ["data"], ["data", "build"], ["data", "check"], ["data", "info"], ["train"], ["speak"], ["serve"],
                                   ["evaluate"], ["resynthesise"], ["bench"], ["bench", "train"], ["bench", "generate"], ["bench", "original"], ["bench", "stream"], ["compare"], ["compare", "recipes"], ["compare", "option"], ["compare", "systems"]])
def test_every_command_has_a_help_text(words, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([*words, "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and "usage: ardm-course" in text and "==SUPPRESS==" not in text


@pytest.mark.parametrize("words", [[], ["sing"], ["data"], ["speak", "Hello."], ["train", "toy", "--steps", "0"], ["bench", "generate", "--repeats", "x"], ["bench", "stream", "--ratio", "4"], ["bench", "stream", "--ratio", "0:3"],
                                   ["serve", "--port", "-1"], ["evaluate", "a", "--sentences", "b", "--corpus", "c"], ["resynthesise", "a"], ["resynthesise", "a", "--out", "b", "--limit", "0"]])
def test_wrong_words_are_refused(words, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(words)
    assert exit.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["speak", "Hello.", "--checkpoint", "absent", "--out", "a.wav"], ["train", "absent"], ["data", "info", "absent"],
                                   ["data", "build", "absent"], ["bench", "train", "absent"], ["bench", "generate", "absent"], ["bench", "stream", "absent", "--fast"],
                                   ["evaluate", "absent"], ["serve", "absent"], ["resynthesise", "absent", "--codec", "griffin-lim", "--out", "out"],
                                   ["resynthesise", "absent.wav", "--codec", "griffin-lim", "--out", "out"],
                                   ["resynthesise", "librivox", "--codec", "absent", "--out", "out"]])
def test_errors_are_one_line(words, capsys):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("ardm-course: ") and error.count("\n") == 1 and "absent" in error


def test_a_mistake_of_ours_is_not_hidden(monkeypatch):
    monkeypatch.setattr(recipes, "train", lambda *_, **__: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["train", "toy"])


def test_interrupt_is_clean(monkeypatch, capsys):
    def stopped(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr(recipes, "train", stopped)
    assert cli.main(["train", "toy"]) == 130
    printed = capsys.readouterr()
    assert printed.err == "Stopped.\n" and "goes on from the last checkpoint" in printed.out


def test_a_reader_that_leaves_is_no_error():
    process = subprocess.Popen([*COURSE, "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait() in (0, 1) and b"Traceback" not in process.stderr.read() and not process.stderr.close()


# ---- data

def test_doctor(capsys):
    assert cli.main(["doctor"]) in (0, 1) and "python" in capsys.readouterr().out


def test_info_and_check(corpus, capsys):
    assert cli.main(["data", "info", corpus]) == 0
    assert "rows                   4" in capsys.readouterr().out
    assert cli.main(["data", "check", corpus]) == 0 and "Nothing to mend" in capsys.readouterr().out


def test_check_finds_broken_audio(tmp_path, capsys):
    rows = load_corpus("phrases", "dev").select(range(2)).to_list()
    rows[1]["audio"]["bytes"] = b"no sound"
    write_rows(tmp_path / "broken" / "train.parquet", rows, 24000)
    assert cli.main(["data", "check", str(tmp_path / "broken")]) == 1
    printed = capsys.readouterr().out
    assert rows[1]["id"] in printed and rows[0]["id"] not in printed and "1 to mend" in printed


def test_check_compares_checksums(tmp_path, monkeypatch, capsys):
    from ardm_course.data_build import write_checksums
    monkeypatch.setenv("ARDM_DATA", str(tmp_path))
    assert cli.main(["data", "check"]) == 2 and "SHA256SUMS" in capsys.readouterr().err
    for name in ("kept", "changed", "lost"):
        (tmp_path / "corpus" / name).mkdir(parents=True)
        (tmp_path / "corpus" / name / "test.parquet").write_text(name)
    write_checksums(tmp_path)
    assert cli.main(["data", "check"]) == 0
    (tmp_path / "corpus" / "changed" / "test.parquet").write_text("other")
    (tmp_path / "corpus" / "lost" / "test.parquet").unlink()
    capsys.readouterr()
    assert cli.main(["data", "check"]) == 1
    assert capsys.readouterr().out.splitlines() == ["corpus/changed/test.parquet has changed", "corpus/lost/test.parquet is missing", "2 to mend."]


def test_build_goes_where_train_looks(monkeypatch, tmp_path, capsys):
    from ardm_course import data_build
    made = []
    monkeypatch.setattr(data_build, "build", lambda *given: made.append(given))
    assert cli.main(["data", "build", "open", "--hours", "2", "--workers", "2"]) == 0
    assert made == [("open", tmp_path / "cache" / "corpora" / "open", 2.0, 0, 2, None)] and "open" in capsys.readouterr().out


# ---- train and speak

def test_train_resume_and_speak(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(recipes.RECIPES, "tiny", recipes.Recipe(corpus, TINY, TrainConfig(steps=4, batch_frames=300, warmup=1, log_every=1, validate_every=2), teacher=None))
    assert cli.main(["train", "tiny", "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "valid_loss" in printed and "runs/train-tiny" in printed
    first = json.loads((tmp_path / "runs/train-tiny/log.jsonl").read_text().splitlines()[-1])["step"]
    assert cli.main(["train", "tiny"]) == 0  # goes on where it was
    rows = [json.loads(line) for line in (tmp_path / "runs/train-tiny/log.jsonl").read_text().splitlines()]
    assert first == 2 and [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert cli.main(["speak", "Good morning.", "--checkpoint", "runs/train-tiny/model", "--steps", "2", "--threshold", "0", "--out", "hello.wav"]) == 0
    assert (tmp_path / "hello.wav").stat().st_size > 1000


def test_speak(tiny, tmp_path, monkeypatch, capsys):
    for name in ("a.wav", "b.wav"):
        assert cli.main(["speak", "Hello there.", "--checkpoint", tiny, "--steps", "2", "--out", name]) == 0
    printed = capsys.readouterr().out
    assert "real-time factor" in printed and "ended by: stop head" in printed
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello there."))
    assert cli.main(["speak", "-", "--checkpoint", tiny, "--steps", "2", "--out", "c.wav"]) == 0
    assert (tmp_path / "c.wav").read_bytes() == (tmp_path / "a.wav").read_bytes()
    assert cli.main(["speak", "...", "--checkpoint", tiny, "--out", "d.wav"]) == 2 and not (tmp_path / "d.wav").exists()
    assert cli.main(["speak", "Hello.", "--checkpoint", tiny, "--voice", "Ada", "--out", "d.wav"]) == 2 and "Ada" in capsys.readouterr().err


# ---- evaluate

@pytest.fixture
def judges(monkeypatch):
    "Recognisers that hear every text but its last word; no other judge."
    from ardm_course import evaluation
    heard = []
    def measure(samples, recognisers=("moonshine", "whisper")):
        heard.append(samples)
        texts = [sample.text for sample in samples]
        return {"text": texts, "moonshine": [text.rsplit(" ", 1)[0] for text in texts], "whisper": None, "similarity": None, "mos": None}
    monkeypatch.setattr(evaluation, "measure", measure)
    monkeypatch.setattr(evaluation, "evaluate", lambda samples, *_: evaluation.summarise(measure(samples)))
    return heard


def checked(path):
    "The content of an evaluation whose rows fit the report's schema."
    data = json.loads(path.read_text())
    assert set(data["rows"]) == set(KINDS) and not [problem for row in [*data["rows"].values(), *data["seeds"]] for problem in row_problems(row)]
    return data


def test_evaluate_a_corpus(tiny, corpus, judges, tmp_path, capsys):
    pytest.importorskip("jiwer")
    assert cli.main(["evaluate", tiny, "--corpus", corpus, "--split", "train", "--limit", "3", "--seeds", "2", "--steps", "2", "--json", "e.json"]) == 0
    data = checked(tmp_path / "e.json")
    assert {kind: row["n"] for kind, row in data["rows"].items()} == {"real": 3, "resynthesised": 3, "griffin-lim": 0, "generated": 6, "released": 0}
    assert [row["n"] for row in data["seeds"]] == [3, 3] and [sample["seed"] for sample in data["samples"]] == [0, 0, 0, 1, 1, 1]
    assert 0 < data["rows"]["generated"]["wer_moonshine"] < 1 and data["rows"]["generated"]["wer_whisper"] is None
    assert data["stop_reasons"] == {"stop head": 6} and data["real_is"].startswith("recordings")
    assert data["command"] == f"ardm-course evaluate {tiny} --corpus {corpus} --split train --limit 3 --seeds 2"
    assert all(sample.reference_wav is not None for sample in judges[-1]) and "real-time factor" in capsys.readouterr().out


def test_who_goes_on_from_a_recording_hears_another_of_the_same_voice(tmp_path, corpus, judges):
    pytest.importorskip("jiwer")
    model = ARDM(replace(TINY, codec=MelCodec().to_dict(), voice="4001"))
    torch.nn.init.constant_(model.stop[-1].bias, 5.0)
    TTS(model).save_pretrained(tmp_path / "goes-on")
    real, voices = {"One.": torch.zeros(1), "Two.": torch.ones(2), "Three.": torch.ones(3)}, {"One.": "a", "Two.": "b", "Three.": "a"}
    tts = TTS.from_pretrained(tmp_path / "goes-on")
    prompts = [cli.manner(tts, text, real, voices).get("prompt") for text in real]
    assert [prompt and (prompt.text, len(prompt.wav)) for prompt in prompts] == [("Three.", 3), None, ("One.", 1)]
    spoken = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TTS, "__call__", lambda self, text, call=TTS.__call__, **options: spoken.append((text, options["prompt"].text)) or call(self, text, **options))
        assert cli.main(["evaluate", str(tmp_path / "goes-on"), "--corpus", corpus, "--split", "train", "--limit", "3", "--seeds", "1", "--steps", "2"]) == 0
    assert len(spoken) == 3 and all(text != before for text, before in spoken)
    assert [len(sample.reference_wav) for sample in judges[-1]] == [len(decode(row)) for row in load_corpus(corpus, "train").select(range(3))] # judged against the voice that was to speak


def test_a_voice_with_one_recording_is_heard_in_the_training_part():
    rows = {row["text_normalized"]: row for row in load_corpus("stories", "test")}
    real, voices = {text: decode(row) for text, row in rows.items()}, {text: row["speaker_id"] for text, row in rows.items()}
    more, whose = cli.with_second_recordings(real, voices, "stories")
    counts = [list(part.values()).count("3001") for part in (voices, whose)]
    assert counts == [1, 2] and set(more) == set(whose) and list(whose.values()).count("4001") == list(voices.values()).count("4001") > 1
    assert all(torch.equal(more[text], wav) for text, wav in real.items()) and min(map(len, more.values())) > 24000
    assert cli.with_second_recordings(real, voices, "absent") == (real, voices) and cli.with_second_recordings({}, {}, "stories") == ({}, {})


def test_evaluate_sentences_without_a_synthesiser(tiny, judges, tmp_path, monkeypatch):
    pytest.importorskip("jiwer")
    from ardm_course import text
    monkeypatch.setattr(text, "has_g2p", lambda: False)
    (tmp_path / "lines.txt").write_text("Good morning to you.\n\nGood night to all.\n")
    assert cli.main(["evaluate", tiny, "--sentences", "lines.txt", "--seeds", "1", "--steps", "2", "--json", "e.json"]) == 0
    data = checked(tmp_path / "e.json")
    assert data["real_is"] is None and data["rows"]["real"]["n"] == 0 and data["rows"]["resynthesised"]["wer_moonshine"] is None
    assert data["rows"]["generated"]["n"] == 2


def test_evaluate_sentences_with_a_synthesiser(tiny, judges, tmp_path):
    pytest.importorskip("hibari")
    pytest.importorskip("jiwer")
    assert cli.main(["evaluate", tiny, "--limit", "1", "--seeds", "1", "--steps", "2", "--json", "e.json"]) == 0
    data = checked(tmp_path / "e.json")
    assert data["sentences"] == "unseen.txt" and data["rows"]["real"]["n"] == data["rows"]["resynthesised"]["n"] == 1 and "hibari" in data["real_is"]


@pytest.mark.parametrize("content, message", [(None, "lines.txt"), ("\n \n", "no sentence")])
def test_evaluate_needs_sentences(content, message, tiny, tmp_path, capsys):
    if content is not None:
        (tmp_path / "lines.txt").write_text(content)
    assert cli.main(["evaluate", tiny, "--sentences", "lines.txt"]) == 2 and message in capsys.readouterr().err


# ---- resynthesise

class Blocks(torch.nn.Module):
    "A codec that loses nothing: a latent is 40 ms of samples. Its stream holds back a few latents, as a decoder that looks ahead does."
    sample_rate, frame_rate, dim, ahead = 16000, 25.0, 640, 5

    def encode(self, wav): return wav.unfold(1, 640, 640)

    def decode(self, latents): return latents.flatten(1)

    def stream(self):
        self.kept = torch.zeros(1, 0, 640)
        return self

    def push(self, latents):
        assert latents.shape[1] <= 4
        self.kept = torch.cat([self.kept, latents], 1)
        return self.kept[:, :max(0, self.kept.shape[1] - self.ahead)].flatten(1)

    def finish(self): return self.kept.flatten(1)


@pytest.fixture
def codecs(monkeypatch):
    "Two codecs without checkpoints."
    wavevae = pytest.importorskip("ardm_course.wavevae")
    monkeypatch.setattr(wavevae, "load_codec", lambda name: {"blocks": Blocks, "mel": MelCodec}[name.split("/")[-1]]())


def test_resynthesise_a_corpus(corpus, codecs, judges, tmp_path, capsys):
    pytest.importorskip("jiwer")
    words = ["resynthesise", corpus, "--split", "train", "--limit", "2", "--codec", "a/blocks", "--codec", "mel", "--out", "back", "--json", "back.json"]
    assert cli.main(words) == 0
    printed, data = capsys.readouterr().out, json.loads((tmp_path / "back.json").read_text())
    assert list(data["rows"]) == ["input", "a-blocks", "mel"] and "PESQ" in printed and "0 left out" in printed
    for label, row in data["rows"].items():
        assert row["n"] == 2 and 0 < row["wer_moonshine"] < 1 and row["wer_whisper"] is None and row["similarity"] is None
        assert set(row["intervals"]) >= {"wer_moonshine", "mos", "pesq", "stoi", "log_mel_db"}
        assert (row["rtf_decode"] is None) == (label == "input") == (row["log_mel_db"] == 0)
    assert data["rows"]["a-blocks"]["first_chunk_needs_ms"] == 320 and data["rows"]["a-blocks"]["first_chunk_ms"] > 0  # 8 latents, of which 5 wait
    assert data["codecs"]["a-blocks"] == {"sample_rate": 16000, "frame_rate": 25, "dim": 640, "parameters": 0}
    assert data["seed"] == 0 and data["device"] == "cpu" and data["environment"]["threads"] and data["with_text"] == 2
    for sample in data["samples"]:
        for label, rate in (("input", 24000), ("a-blocks", 16000), ("mel", 24000)):
            assert len(load_audio(f"back/{label}/{sample['name']}.wav", rate)) == pytest.approx(sample["seconds"] * rate, abs=1)
        assert sample["a-blocks"]["log_mel_low_db"] < 0.1 < sample["mel"]["log_mel_low_db"] < 1 and sample["mel"]["moonshine"] in sample["text"]
        assert sample["a-blocks"]["log_mel_db"] > 3  # above 8 kHz nothing is left


def test_resynthesise_whatever_lies_in_a_folder(codecs, judges, tmp_path, capsys):
    pytest.importorskip("jiwer")
    tone = 0.3 * torch.sin(torch.arange(24000) * 0.1)
    folder = tmp_path / "sounds"
    (folder / "deep").mkdir(parents=True)
    soundfile.write(folder / "stereo.wav", torch.stack([tone, -0.5 * tone], 1).numpy(), 44100)
    soundfile.write(folder / "deep" / "slow.flac", tone[:8000].numpy(), 8000)
    soundfile.write(folder / "one.wav", tone[5:6].numpy(), 24000)
    soundfile.write(folder / "same.wav", tone.numpy(), 24000)
    soundfile.write(folder / "same.flac", tone.numpy(), 24000)
    (folder / "broken.wav").write_bytes(b"RIFF no sound")
    (folder / "notes.md").write_text("not a sound")
    (folder / "stereo.normalized.txt").write_text("One lamp here.\n")
    (folder / "stereo.txt").write_text("1 lamp")
    (folder / "one.txt").write_text("...")
    assert cli.main(["resynthesise", str(folder), "--codec", "blocks", "--out", "back", "--json", "back.json"]) == 0
    printed, data = capsys.readouterr().out, json.loads((tmp_path / "back.json").read_text())
    assert [sample["name"] for sample in data["samples"]] == ["deep/slow", "one", "same", "same.wav", "stereo"]
    assert list(data["skipped"]) == ["broken"] and "left out: broken" in printed and "1 left out" in printed
    assert [sample["text"] for sample in data["samples"]] == [None, None, None, None, "One lamp here."] and data["with_text"] == 1
    assert data["rows"]["blocks"]["n"] == 5 and data["rows"]["blocks"]["wer_moonshine"] == pytest.approx(1 / 3)
    assert data["samples"][0]["seconds"] == 1 and (tmp_path / "back/blocks/deep/slow.wav").exists()
    assert len(load_audio("back/blocks/one.wav", 16000)) == 1 and data["samples"][1]["blocks"]["pesq"] is None


def test_resynthesise_one_file_with_a_list_of_texts(codecs, judges, tmp_path):
    pytest.importorskip("jiwer")
    soundfile.write(tmp_path / "tone.wav", (0.3 * torch.sin(torch.arange(12000) * 0.1)).numpy(), 24000)
    words = ["resynthesise", "tone.wav", "--codec", "blocks", "--out", "back", "--json", "back.json"]
    assert cli.main(words) == 0
    assert json.loads((tmp_path / "back.json").read_text())["rows"]["blocks"]["wer_moonshine"] is None
    (tmp_path / "texts.txt").write_text("other|Nobody says this.\n\ntone|Nobody says that.\n")
    assert cli.main([*words, "--texts", "texts.txt"]) == 0
    assert json.loads((tmp_path / "back.json").read_text())["rows"]["blocks"]["wer_moonshine"] == pytest.approx(1 / 3)
    (tmp_path / "texts.txt").write_text("tone without a bar\n")
    assert cli.main([*words, "--texts", "texts.txt"]) == 2


@pytest.mark.parametrize("words, message", [(["empty"], "no sound file"), (["broken"], "None of the 1"), (["gone.wav"], "does not exist"), (["good", "--speakers", "Ada"], "do not say who"),
                                            (["stories", "--speakers", "Ada"], "is by Ada"), (["good", "--codec", "blocks"], "Name each codec once"), (["good", "--codec", "input/"], "is taken")])
def test_resynthesise_says_what_is_wrong(words, message, codecs, judges, tmp_path, capsys):
    for folder, content in {"empty": None, "broken": b"no sound", "good": None}.items():
        (tmp_path / folder).mkdir()
        if content: (tmp_path / folder / "a.wav").write_bytes(content)
    soundfile.write(tmp_path / "good" / "a.wav", torch.zeros(24000).numpy(), 24000)
    assert cli.main(["resynthesise", *words, "--codec", "blocks", "--out", "back"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "back").exists() and not judges


def test_resynthesise_silence_and_some_speakers(codecs, judges, tmp_path):
    rows = load_corpus("stories", "test")
    speaker = rows[0]["speaker_id"]
    assert cli.main(["resynthesise", "stories", "--speakers", speaker, "--codec", "mel", "--limit", "2", "--out", "back", "--json", "back.json"]) == 0
    names = {row["id"] for row in rows if row["speaker_id"] == speaker}
    assert {sample["name"] for sample in json.loads((tmp_path / "back.json").read_text())["samples"]} <= names
    soundfile.write(tmp_path / "silence.wav", torch.zeros(24000).numpy(), 24000)
    assert cli.main(["resynthesise", "silence.wav", "--codec", "mel", "--out", "back", "--json", "back.json"]) == 0
    row = json.loads((tmp_path / "back.json").read_text())["rows"]["mel"]
    assert row["pesq"] is row["stoi"] is row["wer_moonshine"] is None and row["log_mel_db"] < 0.1


# ---- bench

def test_bench_train(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(recipes.RECIPES, "tiny", recipes.Recipe("phrases", TINY, TrainConfig(batch_frames=400)))
    torch.set_num_threads(1)
    assert cli.main(["bench", "train", "tiny", "--repeats", "1", "--json", "t.json"]) == 0
    data = json.loads((tmp_path / "t.json").read_text())
    assert list(data["threads"]) == ["1"] and data["threads"]["1"]["audio_s_per_core_s"] > 0 and "per core-second" in capsys.readouterr().out


def test_bench_train_with_one_and_with_all_threads(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "training_speed", lambda name, threads, repeats: 100.0 * threads**0.5)
    torch.set_num_threads(4)
    assert cli.main(["bench", "train", "toy", "--json", "t.json"]) == 0
    found = json.loads((tmp_path / "t.json").read_text())["threads"]
    assert found == {"1": {"audio_s_per_s": 100, "audio_s_per_core_s": 100}, "4": {"audio_s_per_s": 200, "audio_s_per_core_s": 50}}
    assert torch.get_num_threads() == 4


def test_bench_generate(tiny, tmp_path, capsys):
    assert cli.main(["bench", "generate", tiny, "--repeats", "2", "--steps", "2", "--json", "g.json"]) == 0
    data = json.loads((tmp_path / "g.json").read_text())
    assert len(data["runs_s"]) == 2 and min(data[name] for name in ("rtf", "ms_per_patch", "first_audio_ms")) > 0
    assert min(data["uncached_over_cached"], data["guided_over_unguided"]) > 0 and "real-time factor" not in capsys.readouterr().err


@pytest.mark.parametrize("ratio", [[], ["--ratio", "12:3"]])
def test_bench_stream(tiny, ratio):
    assert cli.main(["bench", "stream", tiny, *ratio, "--steps", "1", "--fast", "--json", "s.json"]) == 0
    found = json.loads(open("s.json").read())
    assert found["sentences"] == 2 and found["minutes"] >= 0.1 and found["ratio"] == ([12, 3] if ratio else []) and found["environment"]
    assert {"first_audio_ms", "rtf", "stalls", "memory_growth_mb", "loudness_db_per_min", "rate_percent_per_min"} <= set(found)


def test_compare_systems(tiny, tmp_path, capsys):
    assert cli.main(["compare", "systems", tiny, "--count", "1", "--json", "s.json"]) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    assert list(found["rows"]) == ["recorded", "vocoder", tiny] and found["rows"][tiny]["rtf"] > 0 and "GFLOP" in capsys.readouterr().out
    assert found["command"] == f"ardm-course compare systems {tiny} --count 1 --seeds 1" and list(tmp_path.glob("s_*.ogg"))


def test_compare_an_option(tiny, tmp_path):
    assert cli.main(["compare", "option", tiny, "temperature", "0", "0.5", "--count", "1", "--json", "o.json"]) == 0
    found = json.loads((tmp_path / "o.json").read_text())
    assert list(found["rows"]) == ["0", "0.5"] and found["command"].startswith(f"ardm-course compare option {tiny} temperature 0 0.5")


def test_rows_of_one_and_of_several_trainings_are_printed(capsys):
    from ardm_course.ablations import mean_of_runs
    one = {"n": 40, "wer_moonshine": 0.2, "mos": None, "intervals": {"wer_moonshine": [0.1, 0.3], "mos": None}}
    cli.print_rows({"one": one, "three": mean_of_runs([one | {"wer_moonshine": rate} for rate in (0.2, 0.3, 0.4)])})
    first, second = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert first[:5] == ["one", "40", "20.0", "[10.0,", "30.0]"] and second[:5] == ["three", "40", "30.0", "[20.0,", "40.0]"] and second[-1] == "-"


def test_compare_recipes(monkeypatch, tmp_path):
    "What the command line gives reaches the comparison; an unknown recipe is refused before the first is trained."
    asked = []
    monkeypatch.setattr(ablations, "compare_recipes", lambda *args, **changes: asked.append((args, changes)) or {"rows": {}})
    assert cli.main(["compare", "recipes", "toy", "nothing"]) == 2 and not asked
    assert cli.main(["compare", "recipes", "toy", "toy-unaligned", "--seeds", "3", "--listen", "2", "--minutes", "1.5", "--json", "r.json"]) == 0
    assert asked == [((("toy", "toy-unaligned"), Path("runs/compare"), 40, Path("r.json"), 3), {"listen": 2, "minutes": 1.5})]


def test_random_speech_looks_like_speech_data():
    data = cli.RandomSpeech(recipes.RECIPES["toy"], count=3)
    assert len(data) == len(data.lengths) == 3
    assert all(item.patches.shape == (-(-length // 8), 8, 80) and item.teacher.shape == (-(-length // 8), 4, 384) for item, length in zip(data.items, data.lengths))


def test_without_cache_draws_the_same(tiny):
    tts = TTS.from_pretrained(tiny)
    tokens = torch.tensor(tts.tokenizer.encode("Good morning."))
    options = lambda: {"guidance": 2.0, "steps": 3, "generator": torch.Generator().manual_seed(1)}
    cached = torch.stack([drawn.patch for drawn in generate(tts.model, tokens, threshold=2, most=5, **options())])
    assert torch.allclose(cli.generate_without_cache(tts.model, tokens, 5, **options()), cached, atol=1e-4)


def test_a_missing_package_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ardm_course.core", None)  # as if torch, which core imports, were not there
    assert cli.main(["doctor"]) == 2
    assert "is missing" in capsys.readouterr().err


def test_resynthesise_with_disturbed_latents(codecs, judges, tmp_path):
    "Noise on the latents is a version of its own, the same for the same seed, and further from the input than no noise."
    soundfile.write(tmp_path / "tone.wav", (0.3 * torch.sin(torch.arange(12000) * 0.1)).numpy(), 24000)
    distances = []
    for seed in ("0", "0", "1"):
        assert cli.main(["resynthesise", "tone.wav", "--codec", "mel", "--noise", "0.5", "--seed", seed, "--out", "back", "--json", "back.json"]) == 0
        rows = json.loads((tmp_path / "back.json").read_text())["rows"]
        distances.append(rows["mel+0.5"]["log_mel_db"])
    assert distances[0] == distances[1] != distances[2] and distances[0] > rows["mel"]["log_mel_db"]
