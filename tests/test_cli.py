"""ardm-course: every command on tiny things, its exit codes, and what it must not import."""
import io
import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from ardm_course import cli, recipes
from ardm_course.ardm import ARDM, ARDMConfig, generate
from ardm_course.corpus import load_corpus
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


@pytest.mark.parametrize("words", [[], ["doctor"], ["data"], ["data", "build"], ["data", "check"], ["data", "info"], ["train"], ["speak"],
                                   ["evaluate"], ["bench"], ["bench", "train"], ["bench", "generate"]])
def test_every_command_has_a_help_text(words, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([*words, "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and "usage: ardm-course" in text and "==SUPPRESS==" not in text


@pytest.mark.parametrize("words", [[], ["sing"], ["data"], ["speak", "Hello."], ["train", "toy", "--steps", "0"], ["bench", "generate", "--repeats", "x"],
                                   ["evaluate", "a", "--sentences", "b", "--corpus", "c"]])
def test_wrong_words_are_refused(words, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(words)
    assert exit.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["speak", "Hello.", "--checkpoint", "absent", "--out", "a.wav"], ["train", "absent"], ["data", "info", "absent"],
                                   ["data", "build", "absent"], ["bench", "train", "absent"], ["bench", "generate", "absent"],
                                   ["evaluate", "absent"]])
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
    assert {kind: row["n"] for kind, row in data["rows"].items()} == {"real": 3, "resynthesised": 3, "generated": 6, "released": 0}
    assert [row["n"] for row in data["seeds"]] == [3, 3] and [sample["seed"] for sample in data["samples"]] == [0, 0, 0, 1, 1, 1]
    assert 0 < data["rows"]["generated"]["wer_moonshine"] < 1 and data["rows"]["generated"]["wer_whisper"] is None
    assert data["stop_reasons"] == {"stop head": 6} and data["real_is"].startswith("recordings")
    assert all(sample.reference_wav is not None for sample in judges[-1]) and "real-time factor" in capsys.readouterr().out


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
