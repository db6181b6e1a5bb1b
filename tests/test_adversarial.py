"""ardm_course.adversarial: distances and judges against formulas and peers, gradients that stay apart, data, and a guard."""
import json
import math
import random
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ardm_course.adversarial import (BLOCK, MEL_SCALES, RATE, SPEEDS, AdversaryConfig, CodecData, CodecTraining, Judges, PeriodJudge, StopIfDiverging,
                                     WindowJudge, elsewhere, feature_loss, fool_loss, frozen, held_out_sounds, judge_loss, multi_scale_mel, pitch_at, scale_bank,
                                     sound_and_pitch, stack, validation, vary)
from ardm_course.audio import reflect
from ardm_course.core import CourseError, count_parameters, seed_everything
from ardm_course.corpus import decode, load_corpus
from ardm_course.neural import NeuralVocoder, VocoderConfig, f0_track
from ardm_course.training import TrainConfig, Trainer, last_checkpoint, read_log

SMALL = AdversaryConfig(periods=(2, 3), period_widths=(4, 4), windows=(128,), window_width=4, begin=0)


def noise(*shape, seed=0, level=0.1):
    return level * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hum(hz=120.0, seconds=1.0):
    "Twenty harmonics of one pitch, [T] at 24 kHz."
    time = torch.arange(int(RATE * seconds)) / RATE
    return sum(0.05 * torch.cos(2 * math.pi * hz * k * time) for k in range(1, 21))


class Gain(nn.Module):
    "The smallest codec: a filter of five taps; it remembers what it was told about the pitch."
    sample_rate = RATE

    def __init__(self, begin=0.5):
        super().__init__()
        self.taps, self.told = nn.Parameter(begin * F.one_hot(torch.tensor(2), 5).float()), []

    def reconstruct(self, wav, known, f0):
        self.told.append(known is not None)
        return F.conv1d(wav[:, None], self.taps[None, None], padding=2)[:, 0], {} if f0 is None else {"pitch": 0.1 * self.taps.square().sum()}


class Pieces:
    "A data set of fixed pieces, each a tenth of a second."
    def __init__(self, count=8, spoilt=()):
        self.lengths, self.spoilt = [10] * count, spoilt

    def __len__(self): return len(self.lengths)

    def __getitem__(self, index):
        wav = noise(2400, seed=index)
        return {"wav": wav * math.nan if index in self.spoilt else wav, "f0": torch.full((10,), 100.0 + index)}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("ARDM_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield load_corpus("stories", "train", streaming=False).select([0, 1, 3, 8])
    patch.undo()


# ---- the distance

@pytest.mark.parametrize("rate", [16000, 24000])
def test_every_filter_of_every_scale_sees_something(rate):
    for window, mels in MEL_SCALES:
        bank = scale_bank(rate, window, mels)
        assert bank.shape == (mels, window // 2 + 1) and bank.sum(1).min() > 0.1


@pytest.mark.parametrize("rate", [16000, 24000])
def test_multi_scale_mel_equals_torch_stft_with_librosas_filters(rate):
    librosa = pytest.importorskip("librosa")
    fake, real, total = noise(2, 4800, seed=1), noise(2, 4800, seed=2), 0
    for window, mels in MEL_SCALES:
        bank, pad = torch.from_numpy(librosa.filters.mel(sr=rate, n_fft=window, n_mels=mels, htk=True, norm=None)), (window - window // 4) // 2
        levels = [(bank @ torch.stft(reflect(wav, pad), window, window // 4, window=torch.hann_window(window), center=False, return_complex=True).abs())
                  .clamp(min=1e-5).log10() for wav in (fake, real)]
        total = total + (levels[0] - levels[1]).abs().mean()
    assert torch.allclose(multi_scale_mel(fake, real, rate), total, rtol=1e-4)


def test_one_scale_equals_auraloss():
    "Its frames are centred half a hop elsewhere, so the sounds are moved by that much; silent ends keep the paddings out."
    auraloss = pytest.importorskip("auraloss")
    edge, total = 4096, 0
    fake, real = (F.pad(noise(2, 4096, seed=seed), (edge, edge)) + 1e-3 for seed in (1, 2))
    for window, mels in MEL_SCALES:
        hop = window // 4
        loss = auraloss.freq.STFTLoss(window, hop, window, w_sc=0.0, w_log_mag=1.0, sample_rate=RATE, scale="mel", n_bins=mels)
        loss.fb = scale_bank(RATE, window, mels)[None]  # theirs are Slaney's, normalised by area
        moved = [F.pad(wav, (hop // 2, 0), value=1e-3)[:, None] for wav in (fake, real)]
        frames = moved[0].shape[-1] // hop + 1
        total = total + loss(*moved) / math.log(10) * frames / (fake.shape[-1] // hop)
    assert torch.allclose(multi_scale_mel(fake, real, RATE), total, rtol=2e-3)


def test_multi_scale_mel_is_a_distance():
    a, b, c = (noise(2, 3000, seed=seed) for seed in range(3))
    far = lambda x, y: multi_scale_mel(x, y, RATE).item()
    assert far(a, a) == 0 and far(a, b) == pytest.approx(far(b, a)) and far(a, c) <= far(a, b) + far(b, c)
    assert far(10 * a, a) == pytest.approx(len(MEL_SCALES), rel=1e-3)  # one per scale for a factor of ten


def test_multi_scale_mel_of_silence_and_gradients():
    silence = torch.zeros(1, 4800)
    assert multi_scale_mel(silence, silence, RATE) == 0
    fake = torch.zeros(1, 4800, requires_grad=True)
    multi_scale_mel(fake, noise(1, 4800), RATE).backward()
    assert fake.grad.isfinite().all()
    fake = noise(1, 4801, seed=1).requires_grad_()
    multi_scale_mel(fake, noise(1, 4801), RATE).backward()
    assert fake.grad.isfinite().all() and fake.grad.abs().sum() > 0
    assert multi_scale_mel(torch.full((1, 4800), math.nan), noise(1, 4800), RATE).isnan()


def test_a_delay_counts_little_and_both_wrong_sounds_count():
    wav, other = hum(120)[None], hum(170)[None]
    assert multi_scale_mel(wav[:, 24:], wav[:, :-24], RATE) < 0.5 * multi_scale_mel(other[:, 24:], wav[:, :-24], RATE)


def test_filters_made_in_inference_mode_can_be_trained_through():
    scale_bank.cache_clear()
    with torch.inference_mode(): multi_scale_mel(noise(1, 3000), noise(1, 3000, seed=1), 22050)
    fake = noise(1, 3000).requires_grad_()
    multi_scale_mel(fake, noise(1, 3000, seed=1), 22050).backward()
    assert fake.grad.abs().sum() > 0


# ---- judges

@pytest.mark.parametrize("period", [2, 3, 5, 7, 11])
@pytest.mark.parametrize("length", [1, 10, 2310, 2311])
def test_period_judge_folds(period, length):
    judge, wav, heard = PeriodJudge(period, (4, 4)), noise(2, length), []
    judge.layers[0].register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    assert judge(wav)[-1].shape[::3] == (2, period)
    count = -(-length // period)
    assert torch.equal(heard[0], torch.cat([wav, torch.zeros(2, count * period - length)], 1).reshape(2, 1, count, period))
    for column in range(min(period, length)): assert torch.equal(heard[0][:, 0, : len(wav[0, column::period]), column], wav[:, column::period])


def test_period_judge_compares_only_what_is_a_period_apart():
    judge, wav = PeriodJudge(7, (4, 4)), noise(1, 700).requires_grad_()
    judge(wav)[-1][0, 0, 5, 3].backward()
    assert {place % 7 for place in wav.grad[0].nonzero().flatten().tolist()} == {3}


def test_period_judges_of_hifigans_widths_have_its_parameters():
    widths, theirs = (32, 128, 512, 1024), 0
    shapes = [(1, 32, 5), (32, 128, 5), (128, 512, 5), (512, 1024, 5), (1024, 1024, 5), (1024, 1, 3)]  # as published, config v1
    for inputs, outputs, taps in shapes: theirs += inputs * outputs * taps + outputs + outputs  # weight, its norms, bias
    judges = [PeriodJudge(period, widths) for period in (2, 3, 5, 7, 11)]
    assert sum(map(count_parameters, judges)) == 5 * theirs and round(5 * theirs / 1e6) == 41
    assert [tuple(layer.stride) for layer in judges[0].layers] == [(3, 1)] * 4 + [(1, 1)] * 2


def test_judges_return_every_layer_and_verdicts_last():
    judges = Judges(AdversaryConfig())
    seen = judges(noise(2, 3000))
    assert len(seen) == 8 and all(len(views) == 6 and views[-1].shape[1] == 1 for views in seen)
    assert all(view.isfinite().all() for views in judges(torch.zeros(2, 3000)) for view in views)
    assert [views[-1].shape[2] for views in judges(noise(1, 512))][-3:] == [4, 2, 1]  # the shortest piece


def test_judges_treat_rows_alike():
    judges, wav = Judges(SMALL), noise(3, 1000)
    for together, alone in zip(judges(wav), judges(wav[1:2])):
        for a, b in zip(together, alone): assert torch.allclose(a[1:2], b, atol=1e-5)


def test_window_judge_hears_levels():
    judge, wav = WindowJudge(256, 4), noise(1, 4000).requires_grad_()
    judge(wav)[-1].sum().backward()
    assert wav.grad.isfinite().all() and wav.grad.abs().sum() > 0
    assert not torch.allclose(judge(wav)[-1], judge(3 * wav)[-1])


# ---- losses

def views(seed, shapes=((2, 4, 5), (2, 3, 3), (2, 1, 3))):
    return [[noise(*shape, seed=10 * seed + judge, level=1.0) for shape in shapes] for judge in range(2)]


def test_losses_equal_their_formulas():
    real, fake = views(1), views(2)
    assert torch.allclose(judge_loss(real, fake), sum(F.mse_loss(r[2], torch.ones(2, 1, 3)) + F.mse_loss(f[2], torch.zeros(2, 1, 3)) for r, f in zip(real, fake)))
    assert torch.allclose(fool_loss(fake), sum(F.mse_loss(f[2], torch.ones(2, 1, 3)) for f in fake))
    assert torch.allclose(feature_loss(real, fake), sum(F.l1_loss(f[layer], r[layer]) for r, f in zip(real, fake) for layer in (0, 1)))


def test_judges_who_know_and_judges_who_guess():
    always = lambda value: [[torch.zeros(1, 2), torch.full((1, 1, 7), value)] for _ in range(3)]
    assert judge_loss(always(1.0), always(0.0)) == 0 and fool_loss(always(1.0)) == 0
    assert judge_loss(always(0.5), always(0.5)) == pytest.approx(1.5) and fool_loss(always(0.5)) == pytest.approx(0.75)


def test_feature_loss_pulls_the_fakes_only():
    real, fake = ([[layer.requires_grad_() for layer in judge] for judge in views(seed)] for seed in (1, 2))
    feature_loss(real, fake).backward()
    assert all(layer.grad is None for judge in real for layer in judge)
    assert all((layer.grad is not None) == (number < 2) for judge in fake for number, layer in enumerate(judge))


# ---- two opponents, one optimiser

def test_frozen_gives_the_same_view_without_a_gradient_for_the_judges():
    judges, wav = Judges(SMALL), noise(2, 1000).requires_grad_()
    for a, b in zip(frozen(judges, wav), judges(wav)): assert all(map(torch.equal, a, b))
    fool_loss(frozen(judges, wav)).backward()
    assert all(weight.grad is None for weight in judges.parameters()) and wav.grad.abs().sum() > 0
    expected = wav.grad.clone()
    wav.grad = None
    fool_loss(judges(wav)).backward()
    assert torch.allclose(wav.grad, expected)


def test_every_weight_gets_the_gradient_of_its_own_loss():
    seed_everything(0)
    model, wav, f0 = CodecTraining(Gain(), SMALL), noise(5, 2400), torch.full((5, 10), 100.0)
    out = model({"wav": wav, "f0": f0})
    out["loss"].backward()
    fake, further = model.codec.reconstruct(wav, None, f0)
    heard = judge_loss(model.judges(wav[:2]), model.judges(fake[:2].detach()))  # a share of 0.4
    for weight, own in zip(model.judges.parameters(), torch.autograd.grad(heard, list(model.judges.parameters()))): assert torch.allclose(weight.grad, own, atol=1e-6)
    passed = model.judges(fake[:2])
    loss = 15 * multi_scale_mel(fake, wav, RATE) + 15 * further["pitch"] + fool_loss(passed) + 2 * feature_loss(model.judges(wav[:2]), passed)
    assert torch.allclose(model.codec.taps.grad, torch.autograd.grad(loss, model.codec.taps)[0], rtol=1e-4)
    assert out["frames"] == 50 and torch.allclose(out["loss"], loss + heard, rtol=1e-5)


def test_judges_begin_late_and_then_the_pitch_is_no_longer_told():
    model = CodecTraining(Gain(), AdversaryConfig(periods=(2,), period_widths=(4,), windows=(), begin=2))
    batch = {"wav": noise(2, 2400), "f0": torch.full((2, 10), 100.0)}
    out = [model(batch) for _ in range(4)]
    assert model.codec.told == [True, True, False, False] and [step["judge"] == 0 for step in out] == [True, True, False, False]
    model.eval()
    assert model(batch)["judge"] == 0 and int(model.seen) == 4  # no verdicts and no counting outside of training
    assert "seen" in model.state_dict()


def test_a_vocoder_learns_from_it():
    seed_everything(0)
    model = CodecTraining(NeuralVocoder(VocoderConfig(width=16, layers=1, fine_width=16, fine_layers=1)), SMALL)
    out = model({"wav": hum(120, 0.16)[None], "f0": torch.full((1, 32), 120.0)})
    out["loss"].backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
    assert set(out) == {"loss", "mel", "pitch", "judge", "fool", "feature", "frames"}


# ---- data

def test_pitch_between_frames():
    track = torch.tensor([100.0, 110, 0, 200, 104])
    at = lambda *places: pitch_at(track, torch.tensor(places)).tolist()
    assert at(0.0, 0.5, 1.0, 4.0) == pytest.approx([100, 105, 110, 104])
    assert at(1.4, 1.5, 2.4, 2.6) == pytest.approx([110, 0, 0, 200])  # into silence and out of it: the nearer frame
    assert at(3.4, 3.6) == pytest.approx([200, 104])  # no line across an octave
    assert at(-1.0, 9.0) == pytest.approx([100, 104]) and pitch_at(track, torch.zeros(0)).shape == (0,)


def test_sound_and_pitch():
    blocks = sound_and_pitch(hum(150)[: 24000 - 7])
    assert blocks.shape == (99, BLOCK + 1) and torch.equal(blocks[:, :BLOCK].flatten(), hum(150)[: 99 * BLOCK])
    assert (blocks[5:-5, BLOCK] - 150).abs().max() < 1.5
    assert sound_and_pitch(torch.zeros(480))[:, BLOCK].abs().sum() == 0 and sound_and_pitch(torch.zeros(1)).shape == (0, BLOCK + 1)


@pytest.mark.parametrize("seed", range(6))
def test_vary_keeps_sound_and_pitch_together(seed):
    random.seed(seed)
    wav, hz = vary(sound_and_pitch(hum(160, 2.5)), 24000, 100)
    assert wav.shape == (24000,) and hz.shape == (100,) and wav.abs().max() <= 1
    again = f0_track(wav, RATE)[6:95]
    assert ((again / hz[5:94]) - 1).abs().max() < 0.03
    assert any(abs(hz[50] / 160 - old / new) < 0.02 for old, new in SPEEDS)


def test_vary_pads_what_is_too_short_and_is_repeatable():
    blocks, found = sound_and_pitch(hum(160, 0.1)), []
    for _ in range(2):
        random.seed(3)  # no room, so no hiss
        found.append(vary(blocks, 24000, 100))
    assert torch.equal(found[0][0], found[1][0]) and found[0][0].shape == (24000,) and found[0][0][-2400:].abs().max() < 1e-3
    quiet, hz = vary(sound_and_pitch(torch.zeros(4800)), 2400, 10)
    assert quiet.abs().max() == 0 and hz.abs().max() == 0


def test_elsewhere_is_as_loud_causal_and_repeatable():
    click, found = torch.zeros(12000).index_fill(0, torch.tensor(6000), 0.5), []
    for _ in range(2):
        random.seed(1)
        found.append(elsewhere(click))
    assert torch.equal(*found) and found[0].shape == (12000,) and found[0].abs().argmax() == 6000
    level = lambda wav: wav.square().mean().sqrt()
    assert 1 <= level(found[0]) / level(click) < 1.05  # hiss is at most a tenth of it
    echoes = found[0][6200:].square().mean() / found[0][:5800].square().mean()  # after the click there is a room, before it only hiss
    assert echoes > 2
    assert elsewhere(torch.zeros(480)).abs().max() == 0


@pytest.mark.parametrize("rate, frame", [(24000, 120), (16000, 80)])
def test_codec_data(rows, rate, frame):
    data = CodecData([rows, rows.select([0])], rate, frame, seconds=0.32)
    assert len(data) == 5 == len(data.lengths) and set(data.lengths) == {64} and data.frame_rate == 200
    batch = stack([data[index] for index in range(5)])
    assert batch["wav"].shape == (5, 64 * frame) and batch["f0"].shape == (5, 64) and batch["wav"].isfinite().all()
    assert not torch.equal(data[0]["wav"], data[0]["wav"])  # another piece each time


def test_codec_data_without_rows():
    with pytest.raises(CourseError, match="no sound to learn from"): CodecData([], 24000, 120)


def test_held_out_sounds(rows):
    sounds = held_out_sounds(rows, 16000, 1920, 2.5)
    assert sounds.shape == (4, 40000 // 1920 * 1920)
    short = decode(rows[0], 16000)
    assert torch.equal(sounds[0, : len(short)], short[: sounds.shape[1]]) and sounds[0, len(short) :].abs().sum() == 0


# ---- training, guard, resume

PLAN = TrainConfig(steps=8, batch_frames=20, learning_rate=0.01, warmup=1, log_every=1, validate_every=4, checkpoint_every=4)


def trainer(folder, steps=8, data=None, callbacks=(), codec=None, **changes):
    seed_everything(0)
    model = CodecTraining(codec or Gain(), AdversaryConfig(**{**vars(SMALL), "begin": 3}))
    plan = TrainConfig(**{**vars(PLAN), "steps": steps, **changes})
    return Trainer(model, data or Pieces(), stack, plan, folder, callbacks=list(callbacks), validate=validation(noise(2, 2400, seed=99)))


def test_validation_measures_the_codec_alone():
    model, sounds = CodecTraining(Gain(1.0), SMALL).eval(), noise(2, 2400)
    assert validation(sounds)(model)["mel"].item() == pytest.approx(0, abs=1e-4)
    assert validation(sounds)(CodecTraining(Gain(0.1), SMALL).eval())["mel"].item() == pytest.approx(7, rel=1e-2)


def test_a_training_goes_down_and_logs_all_columns(tmp_path):
    run = trainer(tmp_path, steps=12)
    history = run.fit()
    steps = [row for row in history if "mel" in row]
    assert steps[-1]["mel"] < steps[0]["mel"] and {"mel", "pitch", "judge", "fool", "feature"} <= set(steps[0])
    assert [row["judge"] > 0 for row in steps] == [False] * 3 + [True] * 9 and int(run.model.seen) == 12


def test_resume_is_bit_identical(tmp_path):
    from ardm_course.training import training_steps
    whole = trainer(tmp_path / "whole")
    whole.fit()
    for step in training_steps(trainer(tmp_path / "cut")):
        if step.state.step == 6: break  # a kill, two steps after the checkpoint of step 4
    assert last_checkpoint(tmp_path / "cut").name == "00000004"
    again = trainer(tmp_path / "cut", codec=Gain(0.9))  # its own start is overwritten
    again.fit()
    for name, tensor in whole.model.state_dict().items(): assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert all(map(torch.equal, whole.ema.average, again.ema.average))
    strip = lambda path: [{name: value for name, value in row.items() if name != "seconds"} for row in read_log(path / "log.jsonl")]
    assert strip(tmp_path / "whole") == strip(tmp_path / "cut")


def test_resume_on_real_pieces_is_bit_identical(tmp_path, rows):
    from ardm_course.training import training_steps
    data = CodecData([rows], RATE, 240, seconds=0.1)
    trainer(tmp_path / "whole", data=data).fit()
    for step in training_steps(trainer(tmp_path / "cut", data=data)):
        if step.state.step == 5: break
    trainer(tmp_path / "cut", data=data).fit()
    whole, cut = (last_checkpoint(tmp_path / name) / "model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_nan_in_a_batch_stops_with_the_last_good_checkpoint(tmp_path):
    trainer(tmp_path, steps=4).fit()
    good = (last_checkpoint(tmp_path) / "model.safetensors").read_bytes()
    with pytest.raises(CourseError, match="last good checkpoint is .*00000004"): trainer(tmp_path, steps=12, data=Pieces(spoilt=range(8))).fit()
    assert (last_checkpoint(tmp_path) / "model.safetensors").read_bytes() == good


class Pretend:
    def __init__(self, folder, found):
        self.history, self.folder, self.state = [{"step": 1}] + [{"valid_mel": value} for value in found], folder, type("State", (), {"step": 500})


@pytest.mark.parametrize("found, stops", [([2.0], False), ([2.0, 1.0, 1.39], False), ([2.0, 1.0, 1.41], True), ([1.0, 1.5, 1.0], False), ([1.0, math.nan], True)])
def test_the_guard(tmp_path, found, stops):
    guard = StopIfDiverging()
    if not stops: return guard.after_validate(Pretend(tmp_path, found))
    with pytest.raises(CourseError, match="judges have won.*smaller adversarial weight"): guard.after_validate(Pretend(tmp_path, found))


def test_a_diverging_run_is_stopped_and_its_last_checkpoint_stays(tmp_path):
    "The held-out score is forced up from step 8 on: the checkpoint of step 8 must not be written."
    run = trainer(tmp_path, steps=16, callbacks=[StopIfDiverging()])
    run.callbacks[0].validate = lambda model: {"mel": 1.0 if run.state.step < 8 else 2.0}
    with pytest.raises(CourseError, match="At step 8 the held-out distance is 2.00, the best was 1.00.*00000004"): run.fit()
    assert last_checkpoint(tmp_path).name == "00000004"
    assert all("valid_mel" not in row or row["step"] < 8 for row in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()))


def test_weights_of_other_judges_are_refused(tmp_path):
    trainer(tmp_path, steps=4).fit()
    seed_everything(0)
    other = CodecTraining(Gain(), AdversaryConfig(periods=(5,), windows=()))
    with pytest.raises(CourseError, match="belongs to another model"): Trainer(other, Pieces(), stack, PLAN, tmp_path, callbacks=[]).fit()
    shutil.rmtree(tmp_path / "checkpoint")
