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
from ardm_course.tts import TTS, arriving_pieces, config_from_dict, split_text
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
