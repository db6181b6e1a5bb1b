"""TTS: checkpoints travel, faults are one clear sentence, the same seed is the same speech."""
import errno
import json
import os
from pathlib import Path

import pytest
import torch

import ardm_course
from ardm_course.ardm import ARDM, ARDMConfig
from ardm_course.core import CourseError
from ardm_course.locdit import HeadConfig
from ardm_course.transformer import TransformerConfig
from ardm_course.neural import digest_of, find_checkpoint
from ardm_course.tts import (TTS, Prompt, arriving_pieces, codec_of, config_from_dict, encode_prompt, split_text,
                             story_prompt)
from ardm_course.vocoder import MelCodec


@pytest.fixture(scope="module")
def tts():
    torch.manual_seed(0)
    config = ARDMConfig(backbone=TransformerConfig(48, 1, 2, 2, 96), head=HeadConfig(cond_dim=48, width=48, layers=1, heads=2, hidden=96),
                        speakers=("anna", "ben"), codec=MelCodec().to_dict(), tokens_per_patch=3.0)
    model = ARDM(config)
    torch.nn.init.normal_(model.head.net.out.weight, std=0.02)
    return TTS(model)


@pytest.fixture
def folder(tts, tmp_path):
    tts.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


FAST = {"steps": 1, "guidance": 1.0, "threshold": -1.0}


def test_round_trip(tts, folder):
    back = TTS.from_pretrained(folder)
    assert back.model.config == tts.model.config
    for name, weight in tts.model.state_dict().items():
        torch.testing.assert_close(back.model.state_dict()[name], weight.half().float())


def test_alignment_is_not_saved(tts, tmp_path):
    tts.model.alignment = torch.nn.Linear(48, 4)
    tts.save_pretrained(tmp_path)
    tts.model.alignment = None
    TTS.from_pretrained(tmp_path)


def test_same_seed_same_speech(tts):
    a, b, c = (tts("Hello.", seed=seed, **FAST) for seed in (0, 0, 1))
    assert torch.equal(a.wav, b.wav) and not torch.equal(a.wav, c.wav)
    assert a.stop_reason == "stop head" and a.sample_rate == 24000 and a.timings["audio_s"] == len(a.wav) / 24000


def test_stream_has_the_length_of_the_whole(tts):
    whole = tts("Hello there.", **FAST)
    assert len(torch.cat(list(tts.stream("Hello there.", **FAST)))) == len(whole.wav)


def test_save_speech(tts, tmp_path):
    tts("Hi.", **FAST).save(tmp_path / "out.wav")
    assert (tmp_path / "out.wav").stat().st_size > 1000


@pytest.mark.parametrize("text", ["", "   ", "?!...", "x" * 5000, "\u2603\u2604"])
def test_texts_that_cannot_be_spoken(tts, text):
    with pytest.raises(CourseError):
        tts(text)


def test_digits_and_unknown_symbols_are_read(tts):
    with pytest.warns(UserWarning):
        assert len(tts("Room 42 \u2603.", **FAST).wav) > 0


def test_long_text_is_spoken_in_pieces(tts):
    text = " ".join(f"This is sentence number {i}." for i in range(12))
    assert len(split_text(text)) > 2 and " ".join(split_text(text)) == text
    assert tts(text, **FAST).timings["audio_s"] > 0.32 * len(split_text(text))


def test_arriving_words():
    assert list(arriving_pieces(["One", "two.", "Three"])) == ["One two.", "Three"]
    assert list(arriving_pieces([])) == []


def test_voices(tts):
    assert tts("Hi.", voice="ben", **FAST).wav.shape == tts("Hi.", voice="anna", **FAST).wav.shape
    with pytest.raises(CourseError, match="anna, ben"):
        tts("Hi.", voice="carol")


def test_unknown_name_lists_what_there_is():
    with pytest.raises(CourseError, match="Released ones"):
        TTS.from_pretrained("no-such-checkpoint")


def cut(folder): (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:3000])
def remove(folder): (folder / "model.safetensors").unlink()
def garble(folder): (folder / "config.json").write_text("{")
def another_shape(folder): change(folder, lambda c: c["backbone"].update(width=96))
def another_version(folder): change(folder, lambda c: c.update(colour="blue"))


def change(folder: Path, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage", [cut, remove, garble, another_shape, another_version])
def test_damaged_checkpoints(folder, damage):
    damage(folder)
    with pytest.raises(CourseError):
        TTS.from_pretrained(folder)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_no_space_or_no_permission_keeps_the_old_file(tts, folder, monkeypatch, code):
    before = (folder / "config.json").read_bytes()
    def refuse(*args): raise OSError(code, os.strerror(code))
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CourseError):
        tts.save_pretrained(folder)
    assert (folder / "config.json").read_bytes() == before


def test_push_uses_the_hub_api(tts, monkeypatch):
    import huggingface_hub.hub_mixin as mixin
    calls = []
    class Api:
        def __init__(self, *args, **options): pass
        def create_repo(self, repo_id, **options): return type("Url", (), {"repo_id": repo_id})
        def upload_folder(self, folder_path, **options): calls.append(sorted(p.name for p in Path(folder_path).iterdir()))
    monkeypatch.setattr(mixin, "HfApi", Api)
    tts.push_to_hub("someone/something")
    assert {"config.json", "model.safetensors"} <= set(calls[0])


def test_config_from_dict_is_exact():
    config = ARDMConfig(speakers=("a",))
    from dataclasses import asdict
    assert config_from_dict(ARDMConfig, json.loads(json.dumps(asdict(config)))) == config


def test_lazy_top_level():
    assert ardm_course.TTS is TTS
    with pytest.raises(AttributeError):
        ardm_course.nothing


def test_a_system_that_this_version_lacks(folder):
    config = json.loads((folder / "config.json").read_text())
    for name in ("future.FutureConfig", "ardm.Nothing", "", 7):
        (folder / "config.json").write_text(json.dumps({**config, "system": name}))
        with pytest.raises(CourseError, match="no system"): TTS.from_pretrained(folder)


def test_checkpoints_of_before_name_no_system(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["system"], config["voice"]
    (folder / "config.json").write_text(json.dumps(config))
    assert isinstance(TTS.from_pretrained(folder).model, ARDM)


def test_latents_of_a_codec_that_was_trained_again():
    digest = digest_of(find_checkpoint("wavevae"))
    assert codec_of({"checkpoint": "wavevae", "sha256": digest}).dim == 128
    with pytest.raises(CourseError, match="trained again"): codec_of({"checkpoint": "wavevae", "sha256": "0" * 64})
    with pytest.raises(CourseError, match="its own vocoder"): codec_of({"checkpoint": "wavevae", "sha256": digest}, "griffin-lim")


def spoken(seconds=2.0, rate=24000): return Prompt(0.1 * torch.sin(torch.arange(round(seconds * rate)) * 0.05), rate, "Hello.")


def test_a_prompt_ends_where_speech_begins(tts):
    for seconds in (0.5, 1.234, 2.0):
        prompt = spoken(seconds)
        patches = encode_prompt(tts, prompt)
        whole = 8 * 480
        padded = torch.cat([torch.zeros(-len(prompt.wav) % whole), prompt.wav])
        assert len(patches) == len(padded) // whole
        torch.testing.assert_close(patches.flatten(0, 1), tts.codec.encode(padded[None])[0])


@pytest.mark.parametrize("prompt, reason", (
    (Prompt(torch.zeros(2, 48000), 24000, "Hello."), "one channel"), (Prompt(torch.full((48000,), float("nan")), 24000, "Hello."), "finite"),
    (Prompt(torch.zeros(100), 24000, "Hello."), "lasts"), (Prompt(torch.zeros(24000 * 60), 24000, "Hello."), "lasts"), (Prompt(torch.zeros(48000), 24000, " ?! "), "no text")))
def test_what_cannot_be_a_prompt(tts, prompt, reason):
    with pytest.raises(CourseError, match=reason): tts("Hello.", prompt=prompt, **FAST)


def test_stream_goes_on_from_a_prompt_as_the_whole_does(tts):
    whole, prompt = tts("Good morning to you.", prompt=spoken(), **FAST), spoken()
    streamed = torch.cat(list(tts.stream("Good morning to you.", prompt=prompt, **FAST)))
    assert len(streamed) == len(whole.wav) == len(whole.latents) * 480


def test_voices_of_the_corpus_stories():
    prompt = story_prompt("4002")
    assert prompt.rate == 24000 and 1 < len(prompt.wav) / 24000 < 8 and prompt.text
    with pytest.raises(CourseError, match="4001"): story_prompt("nobody")
