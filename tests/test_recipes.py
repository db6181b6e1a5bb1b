"""Recipes: the toy tier and the LibriTTS path on a few rows; what is wrong is said before anything is computed."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ardm_course import neural, recipes
from ardm_course.ardm import Utterance
from ardm_course.audio import save_audio
from ardm_course.core import CourseError
from ardm_course.corpus import decode, load_corpus
from ardm_course.recipes import RECIPES, continued, corpus_sources, held_out, needs, prepare, recipe, speak_row, start_from, toy_shape, train
from ardm_course.training import read_log
from ardm_course.tts import TTS, load_model, save_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ARDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path):
    "A LibriTTS tree of two voices, as OpenSLR packs it."
    rows = load_corpus("stories", "dev")
    for subset in ("train-clean-100", "dev-clean", "test-clean"):
        for number in range(4):
            row, voice = rows[number], ("84", "174")[number % 2]
            stem = tmp_path / "LibriTTS" / subset / voice / "121550" / f"{voice}_121550_000001_{number:06d}"
            stem.parent.mkdir(parents=True, exist_ok=True)
            save_audio(stem.with_suffix(".wav"), decode(row)[:48000], 24000)
            stem.with_name(stem.name + ".normalized.txt").write_text(row["text_normalized"])
            stem.with_name(stem.name + ".original.txt").write_text(row["text_original"])
    return tmp_path / "LibriTTS"


def test_small_tier_on_a_libritts_tree(tree, tmp_path, monkeypatch):
    tiny = replace(recipe("small"), model=toy_shape(48, 1, 1), teacher=None)
    monkeypatch.setitem(RECIPES, "tiny", tiny)
    data = prepare(tiny, tree)
    assert data.config.speakers == ("174", "84") and len(data.train) == 4
    tts, history = train("tiny", tmp_path / "run", data=data, steps=2, warmup=1, batch_frames=400, validate_every=2, checkpoint_every=2)
    assert {"valid_flow_t0.1", "valid_flow_t0.9", "valid_stop"} <= set().union(*history)
    row = held_out(tiny, 1, tree)[0]
    spoken = speak_row(tts, row, steps=1, threshold=-1.0)
    assert len(spoken.generated.wav) and len(spoken.resynthesised) == len(spoken.real) // 480 * 480


def test_toy_recipe_prepares_its_teacher():
    chosen = replace(recipe("toy"), teacher="phones")
    data = prepare(chosen, limit=3)
    item = data.train[0]
    assert item.teacher.shape[:2] == (len(item.patches), 4) and data.config.tokens_per_patch > 1
    assert torch.equal(data.train[0].patches, item.patches)


def test_training_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", replace(recipe("toy-unaligned"), model=toy_shape(48, 1, 1)))
    options = {"warmup": 1, "batch_frames": 600, "minutes": None, "validate_every": 100, "checkpoint_every": 2, "log_every": 1}
    data = prepare(RECIPES["tiny"], limit=6)
    whole, _ = train("tiny", tmp_path / "whole", data=data, steps=4, **options)
    real = recipes.save_model
    monkeypatch.setattr(recipes, "save_model", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # trained, but killed before the result was written
        train("tiny", tmp_path / "parts", data=data, steps=4, **options)
    monkeypatch.setattr(recipes, "save_model", real)
    parts, _ = train("tiny", tmp_path / "parts", data=data, steps=4, **options)
    for (name, a), b in zip(whole.model.state_dict().items(), parts.model.state_dict().values()):
        assert torch.equal(a, b), name


def test_a_training_is_listened_to(tmp_path, monkeypatch):
    "With `listen`, every validation counts word errors, and listening changes nothing in the training."
    class Deaf:
        def many(self, wavs, rate): return ["the"] * len(list(wavs))
    monkeypatch.setattr(recipes, "load_recogniser", lambda name: Deaf())
    monkeypatch.setitem(RECIPES, "tiny", replace(recipe("toy-unaligned"), model=toy_shape(48, 1, 1)))
    options = {"warmup": 1, "batch_frames": 600, "minutes": None, "validate_every": 1, "checkpoint_every": 100}
    data = prepare(RECIPES["tiny"], limit=4)
    plain, _ = train("tiny", tmp_path / "plain", data=data, steps=2, **options)
    heard, history = train("tiny", tmp_path / "heard", data=data, listen=1, steps=2, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain.model.state_dict().values(), heard.model.state_dict().values()))
    assert [row["step"] for row in history if row.get("valid_wer", 0) > 0.5] == [1, 2]


def test_a_release_with_few_bits_was_trained_for_them(tmp_path, monkeypatch):
    monkeypatch.setattr(neural, "SMALL", 0)
    monkeypatch.setattr(recipes, "data_dir", lambda: tmp_path)
    options = {"warmup": 1, "batch_frames": 600, "minutes": None, "validate_every": 2, "decay_share": 1.0, "steps": 2}
    told = []

    class Watched(recipes.StoredWeights):
        def __init__(self, *bits):
            told.append(bits)
            super().__init__(*bits)
    monkeypatch.setattr(recipes, "StoredWeights", Watched)
    for bits in (3, 5):
        monkeypatch.setitem(RECIPES, f"tiny{bits}", replace(recipe("toy-unaligned"), model=toy_shape(48, 1, 1), bits=bits))
        train(f"tiny{bits}", tmp_path / f"run{bits}", data=prepare(RECIPES[f"tiny{bits}"], limit=4), **options)
        stored = load_file(recipes.release(f"tiny{bits}", tmp_path / f"run{bits}") / "model.safetensors")
        kept = {name.removesuffix(":shape"): shape[0].item() for name, shape in stored.items() if name.endswith(":shape")}
        assert {own for name, own in kept.items() if not name.startswith("head.")} == {bits}
        assert {own for name, own in kept.items() if name.startswith("head.")} == {recipes.HEAD_BITS}
    assert told == [(3, recipes.HEAD_BITS)] # the other needs no warning


def test_unknown_recipe_and_missing_corpus(monkeypatch):
    with pytest.raises(CourseError, match="toy"):
        recipe("toyy")
    with pytest.raises(CourseError, match="data build open"):
        corpus_sources(recipe("ditar-toy"))


def test_parameters_of_the_toys():
    from ardm_course.ardm import ARDM
    from ardm_course.core import count_parameters
    assert count_parameters(ARDM(recipe("toy").model)) < 4.5e6
    assert count_parameters(ARDM(recipe("ditar-toy").model)) < 10e6


def test_without_whisper_a_small_recogniser_teaches(monkeypatch):
    def missing(*args): raise CourseError("not installed")
    monkeypatch.setattr(recipes, "WhisperTeacher", missing)
    whole = recipes.train_recogniser
    monkeypatch.setattr(recipes, "train_recogniser", lambda rows, phones: whole(rows, phones, steps=3, count=6))
    item = prepare(recipe("toy"), limit=6).train[0]
    assert item.teacher.shape == (len(item.patches), 4, 128)


def test_a_training_starts_from_a_checkpoint(tmp_path, monkeypatch):
    "It begins with the checkpoint's weights, latents and positions; another shape is refused."
    monkeypatch.setitem(RECIPES, "tiny", replace(recipe("toy-unaligned"), model=toy_shape(48, 1, 1)))
    options = {"warmup": 1, "batch_frames": 600, "minutes": None, "validate_every": 100, "checkpoint_every": 100}
    data = prepare(RECIPES["tiny"], limit=4)
    first, _ = train("tiny", tmp_path / "first", data=data, steps=2, **options)
    start = tmp_path / "first" / "model"
    config = continued(replace(RECIPES["tiny"], model=replace(RECIPES["tiny"].model, history_noise=0.3)), start)
    assert config.codec == data.config.codec and config.tokens_per_patch == data.config.tokens_per_patch and config.history_noise == 0.3
    again = prepare(replace(RECIPES["tiny"], model=config), limit=4)
    assert torch.equal(again.train[0].patches, data.train[0].patches)
    assert not continued(replace(RECIPES["tiny"], codec="wavevae"), start).codec, "latents of another codec are not the recipe's"
    second, history = train("tiny", tmp_path / "second", data=again, start=start, steps=1, learning_rate=0.0, **options)
    assert all(torch.equal(a, b) for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values()))
    monkeypatch.setitem(RECIPES, "tiny", replace(RECIPES["tiny"], model=toy_shape(96, 1, 1)))
    with pytest.raises(CourseError, match="another shape"): train("tiny", tmp_path / "third", start=start, data=replace(again, config=toy_shape(96, 1, 1)), **options)


def test_latents_are_measured_for_the_head(tmp_path, monkeypatch):
    "A preconditioned head gets the sizes of its corpus; a training that goes on keeps those that its weights know."
    monkeypatch.setitem(RECIPES, "tiny", replace(recipe("toy-unaligned"), model=toy_shape(48, 1, 1), precondition=True))
    data = prepare(RECIPES["tiny"], limit=4)
    sizes = torch.cat([data.train.latents[index] for index in range(4)]).square().mean(0).sqrt()
    torch.testing.assert_close(torch.tensor(data.config.head.spread), sizes, rtol=0.01, atol=0)
    told = replace(data.config, head=replace(data.config.head, spread=(0.5,) * 80))
    save_model(told.build(), tmp_path)
    assert continued(RECIPES["tiny"], tmp_path).head.spread == (0.5,) * 80 == prepare(replace(RECIPES["tiny"], model=told), limit=4).config.head.spread
    assert not continued(replace(RECIPES["tiny"], codec="wavevae"), tmp_path).head.spread
    plain = toy_shape(48, 1, 1).build()
    assert {name.split(".")[0] for name in start_from(plain, tmp_path)} == {"head"}, "a head beside a line says something else"


def test_another_system_takes_what_fits(tmp_path):
    "A system that hears voices begins with a plain one's language model; what only it has stays new, and is named."
    torch.manual_seed(0)
    plain = toy_shape(48, 1, 1).build()
    save_model(plain, tmp_path)
    heard = recipes.MELAConfig(backbone=plain.config.backbone, head=plain.config.head, speakers=("a",)).build()
    fresh = {name: weight.clone() for name, weight in heard.state_dict().items()}
    new, now = start_from(heard, tmp_path), heard.state_dict()
    assert new and all(torch.equal(now[name], fresh[name]) for name in new) and any(name.startswith("speaker") for name in new)
    taken = set(now) - set(new)
    assert {"text.weight"} | {name for name in now if name.startswith("backbone.")} <= taken and all(torch.allclose(now[name], plain.state_dict()[name], atol=1e-2) for name in taken)


def test_two_checkpoints_give_what_each_has(tmp_path):
    "The first that has a weight in the model's shape gives it; the second fills what the first left."
    torch.manual_seed(0)
    speaker, painter = toy_shape(48, 1, 1), toy_shape(96, 1, 1)
    save_model(speaker.build(), tmp_path / "speaker")
    save_model(painter.build(), tmp_path / "painter")
    model = replace(speaker, head=replace(painter.head, cond_dim=48)).build()
    new, now = start_from(model, f"{tmp_path / 'speaker'}+{tmp_path / 'painter'}"), model.state_dict()
    first, second = (load_model(tmp_path / name).state_dict() for name in ("speaker", "painter"))
    assert torch.equal(now["text.weight"], first["text.weight"]) and new == ["head.net.cond.weight"]
    assert torch.equal(now["head.net.blocks.0.attention.qkv.weight"], second["head.net.blocks.0.attention.qkv.weight"])
    save_model(speaker.build(), tmp_path / "a+b")
    assert start_from(speaker.build(), tmp_path / "a+b") == [], "a folder with a + in its name is one checkpoint"
    with pytest.raises(CourseError, match="another shape"): start_from(replace(painter, backbone=replace(painter.backbone, layers=2)).build(), tmp_path / "speaker")


def test_what_a_training_needs():
    "Three times the forward pass is what forward and backward really cost, and the scaling is the recipe's."
    from torch.utils.flop_counter import FlopCounterMode
    torch.manual_seed(0)
    chosen, seconds = replace(recipe("toy"), model=toy_shape(96, 2, 1, patch_share=1.0)), 20 * 8 / 50
    u = Utterance(torch.randint(2, 90, (50,)), torch.randn(20, 8, 80), 0, torch.randn(20, 4, 384))
    found, model = needs(chosen, u, corpus_hours=2.0), chosen.model.build()
    with FlopCounterMode(display=False) as counter: model(model.fold([u]))["loss"].backward()
    assert found.operations == pytest.approx(counter.get_total_flops() / seconds / 1e9, rel=0.05)
    assert found.state_gb == pytest.approx(20 * sum(p.numel() for p in model.parameters()) / 1e9)
    assert found.speech_hours == pytest.approx(4000 * 2000 / 50 / 3600) and found.hours(1e9) == pytest.approx(found.operations * found.speech_hours)
    assert found.cache_gb == pytest.approx(2 * (160 * 80 + 80 * 384) / seconds * 7200 / 1e9) and found.kept_gb > 0


TWO = """
import sys
from dataclasses import replace
import torch
from ardm_course.recipes import RECIPES, prepare, recipe, toy_shape, train
torch.set_num_threads(1)
RECIPES["tiny"] = replace(recipe("toy-unaligned"), model=toy_shape(48, 1, 1))
train("tiny", sys.argv[1], data=prepare(RECIPES["tiny"], limit=8), steps=3, warmup=1, batch_frames=600, minutes=None, validate_every=3, checkpoint_every=2)
"""


def test_two_processes_train_what_one_trains(tmp_path):
    "Started twice by torchrun, as on two GPUs: one result in the folder, written once."
    (tmp_path / "two.py").write_text(TWO)
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "two.py"), str(tmp_path / "run")],
                          env=settings, text=True, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in read_log(tmp_path / "run" / "log.jsonl") if "valid_flow" in row] == [3]
    tts = TTS.from_pretrained(tmp_path / "run" / "model")
    assert len(tts("One two.", seed=0, steps=1, threshold=-1.0).wav)
