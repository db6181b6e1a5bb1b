"""ardm_course.neural: pitch, pulses, the source-filter head, streaming in any pieces, released weights, and what must be refused."""
import json
import math

import pytest
import torch

from ardm_course.audio import LogMel, MelConfig
from ardm_course.core import CourseError, data_dir
from ardm_course.neural import (Corrections, FrameStream, LOWEST, OCTAVES, PITCHES, CausalConv1d, ConvNeXt, NeuralVocoder, SourceFilter, SourceStream, VocoderConfig, band_shapes,
                                config_from_dict, draw_filters, draw_source, f0_track, find_checkpoint, first_dip, heard_pitch, load_vocoder, mel_channels, pitch_loss,
                                pack, pitch_of, pitch_step, pulses, read_released, source_loss, unpack, whole_features, with_past, write_released)
from ardm_course.vocoder import MelCodec, MelCodecConfig

released = pytest.mark.skipif(not (data_dir() / "checkpoints" / "vocoder" / "config.json").is_file(), reason="the released vocoder is not here")
SMALL = VocoderConfig(width=16, layers=2, fine_width=12, fine_layers=1)


def noise(*shape, seed=0, scale=0.1):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tone(pitch, seconds=0.5, rate=24000):
    time = torch.arange(int(rate * seconds)) / rate
    return 0.1 * sum(torch.cos(2 * math.pi * k * pitch * time) / k for k in range(1, 6))


def voice(seconds=1.0):
    "Something with harmonics that glide and pause, [T]."
    time = torch.arange(int(24000 * seconds)) / 24000
    phase = 2 * math.pi * (140 * time + 12 * torch.sin(3 * time))
    return 0.05 * sum(torch.cos(k * phase) / k for k in range(1, 40)) * (torch.sin(9 * time) > -0.5) + noise(len(time), scale=1e-3)


def cuts(total, seed, largest=9):
    "Random sizes, zeros among them, that sum to `total`."
    draw, sizes = torch.Generator().manual_seed(seed), []
    while sum(sizes) < total: sizes.append(min(int(torch.randint(0, largest + 1, (1,), generator=draw)), total - sum(sizes)))
    return sizes


def small(seed=0, **fields):
    torch.manual_seed(seed)
    return NeuralVocoder(VocoderConfig(**{**vars(SMALL), **fields})).eval()


@torch.no_grad()
def streamed(vocoder, mel, sizes):
    stream = vocoder.stream()
    return [stream.push(piece) for piece in mel.split(sizes, 1)] + [stream.finish()]


@pytest.fixture(scope="module")
def mel(): return LogMel()(voice())[None]


# ---- pitch

@pytest.mark.parametrize("rate", [16000, 24000, 22050])
@pytest.mark.parametrize("pitch", [70.0, 123.4, 220.0, 450.0])
def test_yin_finds_the_pitch_of_tones(pitch, rate):
    track = f0_track(tone(pitch, rate=rate), rate)
    assert (track[5:-7] / pitch - 1).abs().max() < 3e-3
    assert abs(len(track) - 52) <= 2 # every 10 ms


def test_yin_follows_a_glide():
    hz = torch.linspace(120, 240, 48000)
    track = f0_track(0.1 * sum(torch.cos(2 * math.pi * k * (hz / 24000).cumsum(0)) / k for k in (1, 2, 3)), 24000)
    place = (torch.arange(len(track)) * 240).clamp(max=47999)
    assert ((track - hz[place])[10:-10].abs() < 3).all()


def test_yin_equals_its_definition():
    wav = tone(180.0, rate=16000) + noise(8000, scale=0.02)
    track, padded = f0_track(wav, 16000), torch.nn.functional.pad(wav, (256, 1000)).double()
    for k in (10, 25):
        frame = padded[160 * k :]
        difference = torch.stack([(frame[:512] - frame[lag : lag + 512]).square().sum() for lag in range(1, 269)])
        curve = difference / (difference.cumsum(0) / torch.arange(1, 269))
        assert torch.allclose(first_dip(curve[None], 32, 0.3, torch.ones(1)), track[k : k + 1], rtol=1e-4)


def test_yin_agrees_with_librosas():
    librosa = pytest.importorskip("librosa")
    wav = voice()
    theirs = torch.from_numpy(librosa.yin(wav.numpy(), fmin=60, fmax=500, sr=24000, frame_length=2048, hop_length=240, trough_threshold=0.3)).float()
    ours = f0_track(wav, 24000)
    count = min(len(ours), len(theirs))
    ours, theirs = ours[:count], theirs[:count]
    close = (ours / theirs).log2().abs()[(ours > 0)] < 50 / 1200
    assert close.float().mean() > 0.8 # librosa's frames are longer, so they lag in glides and pauses


def test_yin_hears_no_pitch_where_there_is_none():
    assert not f0_track(torch.zeros(24000), 24000).any()
    assert (f0_track(noise(24000), 24000) > 0).float().mean() < 0.1
    for length in (0, 1, 100): assert f0_track(torch.zeros(length), 24000).isfinite().all()


def test_pitch_steps_go_there_and_back():
    f0 = 60 * 2 ** (torch.rand(50, generator=torch.Generator().manual_seed(0)) * 3)
    step = pitch_step(f0)
    assert torch.allclose(LOWEST * 2 ** ((step + 0.5) * OCTAVES / PITCHES), f0, rtol=1e-5)
    logits = -0.5 * (torch.arange(PITCHES) - step[:, None]).square()
    assert (pitch_of(logits) / f0).log2().abs().max() < 0.01
    assert pitch_of(torch.zeros(2, 3, PITCHES)).shape == (2, 3)


def test_far_peaks_do_not_pull():
    at = lambda hz: (-0.5 * (torch.arange(PITCHES) - pitch_step(torch.tensor(hz))).square()).exp()
    assert abs(pitch_of((0.4 * at(110.0) + 0.6 * at(220.0)).log()) - 220) < 1


def test_pitch_loss_counts_voiced_frames_only():
    logits, f0 = noise(2, 5, PITCHES, scale=1.0), torch.tensor([[0.0, 100, 200, 0, 30], [300, 0, 600, 400, 0]])
    loss = pitch_loss(logits, f0)
    voiced = (f0 > LOWEST) & (f0 < 540)
    assert torch.allclose(loss, pitch_loss(logits[voiced], f0[voiced]))
    assert pitch_loss(logits, torch.zeros(2, 5)) == 0
    best = -0.5 * (torch.arange(PITCHES) - pitch_step(f0)[..., None]).square()
    assert pitch_loss(best, f0) < loss # the entropy of the bell is the least there is
    logits.requires_grad_()
    pitch_loss(logits, f0).backward()
    assert (logits.grad.abs().sum(-1) > 0).equal(voiced)


def test_a_voice_is_a_question_of_its_own():
    logits, f0 = noise(2, 5, PITCHES + 1, scale=1.0), torch.tensor([[0.0, 100, 200, 0, 300], [300, 0, 500, 400, 0]])
    yes = torch.nn.functional.binary_cross_entropy_with_logits(logits[..., -1], (f0 > 0).float())
    assert torch.allclose(source_loss(logits, f0), pitch_loss(logits[..., :-1], f0) + yes)
    heard = heard_pitch(logits)
    assert torch.equal(heard > 0, logits[..., -1] > 0) and torch.equal(heard[heard > 0], pitch_of(logits[..., :-1])[heard > 0])


# ---- pulses

def explicit(f0, rate, hop):
    before = torch.cat([f0[:, :1], f0[:, :-1]], 1).double()[..., None]
    hz = (before + (f0[..., None] - before) * torch.arange(1, hop + 1) / hop).flatten(1)
    phase, fit = (hz / rate).cumsum(1), rate / 2 / hz # the highest harmonic below half the rate fades in
    wave = sum(torch.cos(2 * math.pi * k * phase) * (fit - k).clamp(0, 1) for k in range(1, int(fit.max()) + 1))
    return wave / (fit / 2).sqrt()


@pytest.mark.parametrize("rate, hop", [(24000, 120), (16000, 80), (8000, 33)])
def test_pulses_equal_the_sum_of_cosines(rate, hop):
    f0 = 80 + 300 * torch.rand(2, 20, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(pulses(f0, rate, hop)[0].double(), explicit(f0, rate, hop), atol=1e-4)


def test_pulses_are_equally_loud_at_every_pitch_and_finite_at_their_tops():
    for pitch in (60.0, 125.0, 250.0, 500.0): # 24000 / 125 is whole: samples fall on the very top
        wave, _ = pulses(torch.full((1, 400), pitch), 24000, 120)
        assert abs(wave.square().mean() - 1) < 0.05 and wave.isfinite().all()
        assert abs(wave.max() - math.sqrt(2 * 12000 / pitch)) < 0.5


@pytest.mark.parametrize("seed", range(6))
def test_pulses_go_on_where_they_ended(seed):
    f0 = 80 + 300 * torch.rand(3, 60, generator=torch.Generator().manual_seed(seed))
    whole, end = pulses(f0, 24000, 120)
    pieces, glide = [], None
    for piece in f0.split([size for size in cuts(60, seed) if size], 1):
        wave, glide = pulses(piece, 24000, 120, glide)
        pieces.append(wave)
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5)
    assert torch.allclose(glide[1], end[1], atol=1e-9) and glide[1].dtype == torch.float64


def test_pulses_fade_where_the_voice_stops():
    f0 = torch.tensor([[150.0, 150, 0, 0, 0, 200, 200]])
    wave, (hz, _) = pulses(f0, 24000, 120)
    assert not wave[:, 360:600].any() and wave[:, 240:300].any() and wave[:, 660:720].any() and hz == 200
    assert not pulses(torch.zeros(2, 4), 24000, 120)[0].any()
    first, end = pulses(f0[:, :3], 24000, 120)
    assert torch.allclose(torch.cat([first, pulses(f0[:, 3:], 24000, 120, end)[0]], 1), wave, atol=1e-5)


# ---- the head

def test_band_shapes_share_out_every_frequency():
    for rate, bins, bands in ((24000, 241, 80), (24000, 961, 80), (16000, 81, 20)):
        shapes = band_shapes(rate, bins, bands)
        assert shapes.shape == (bands, bins) and shapes.min() >= 0
        assert torch.allclose(shapes.sum(0), torch.ones(bins), atol=1e-5)
        assert ((shapes > 0).sum(0) <= 2).all()


def test_filters_are_gains():
    head, features = SourceFilter(8, 24000, 120), torch.zeros(1, 3, 8)
    tone_gain, breath = draw_filters(head, features)
    assert torch.allclose(tone_gain.abs(), torch.tensor(-3.5).exp(), rtol=1e-4) and torch.allclose(tone_gain.angle(), torch.zeros(1), atol=1e-5)
    assert torch.allclose(breath.abs(), torch.tensor(-4.5).exp(), rtol=1e-4) and not breath.imag.any()
    head.filters.bias.data.fill_(100.0)
    assert draw_filters(head, features).abs().max() < math.exp(5.01) # held, so that nobody is deafened


def test_the_noise_depends_on_the_place_only():
    head, f0 = SourceFilter(8, 24000, 120), torch.full((2, 10), 100.0)
    whole, _ = draw_source(head, f0, 0, None)
    later, _ = draw_source(head, f0[:, :4], 6, None)
    assert torch.equal(whole[1][:, 720:], later[1]) and torch.equal(whole[1][0], whole[1][1])
    far, _ = draw_source(head, f0, 10**6, None) # beyond the stored noise: it begins again
    assert far.isfinite().all()


@pytest.mark.parametrize("seed", range(8))
def test_head_streams_in_any_pieces(seed):
    torch.manual_seed(seed)
    head, features = SourceFilter(8, 24000, 120), noise(2, 8, 50, seed=seed, scale=1.0)
    with torch.no_grad():
        whole, logits = head(features)
        stream = SourceStream(head)
        parts = [stream.push(piece) for piece in features.split([size for size in cuts(50, seed) if size], 2)] + [stream.finish()]
    assert whole.shape == (2, 6000) and logits.shape == (2, 50, PITCHES + 1)
    assert (torch.cat(parts, 1) - whole).abs().max() < 0.02 * whole.std() # roundings of the pitch, times 100 harmonics
    assert SourceStream(head).finish().shape == (1, 0)


def test_head_uses_the_pitch_it_is_told_and_is_silent_without():
    head, features = SourceFilter(8, 24000, 120), noise(1, 8, 200, scale=1.0)
    head.filters.weight.data.zero_()
    with torch.no_grad(): told, _ = head(features, torch.full((1, 200), 150.0))
    track = f0_track(told[0], 24000)[10:-10]
    assert ((track / 150 - 1).abs() < 0.01).float().mean() > 0.95
    head.filters.bias.data[-80:] = -30.0 # no breath
    with torch.no_grad(): assert head(features, torch.zeros(1, 200))[0].abs().max() < 1e-6


# ---- causal layers

@pytest.mark.parametrize("kernel, stride, dilation, groups", [(7, 1, 1, 1), (7, 1, 9, 4), (1, 1, 1, 1), (4, 2, 1, 1), (10, 5, 1, 2)])
def test_causal_convolution_streams_and_sees_no_future(kernel, stride, dilation, groups):
    layer, x = CausalConv1d(4, 8, kernel, stride, dilation, groups), noise(2, 4, 60)
    whole, memory = layer(x), {}
    pieces = [layer(piece, memory) for piece in x.split([stride * size for size in (1, 3, 1, 5)] + [60 - 10 * stride], 2)]
    assert whole.shape == (2, 8, 60 // stride) and torch.allclose(torch.cat(pieces, 2), whole, atol=1e-5)
    x[:, :, 30:] += 1
    assert torch.equal(layer(x)[:, :, : 30 // stride], whole[:, :, : 30 // stride])


def test_causal_convolution_equals_a_padded_one():
    layer = CausalConv1d(3, 5, 7)
    theirs = torch.nn.functional.conv1d(torch.nn.functional.pad(x := noise(1, 3, 20), (6, 0)), layer.weight, layer.bias)
    assert torch.equal(layer(x), theirs)


def test_memory_belongs_to_a_layer():
    one, two, memory = torch.nn.Identity(), torch.nn.Identity(), {}
    with_past(one, torch.ones(1, 2), 3, memory)
    assert with_past(two, torch.ones(1, 1), 3, memory).tolist() == [[0, 0, 0, 1]]
    assert with_past(one, torch.ones(1, 1), 3, memory).tolist() == [[0, 1, 1, 1]]


def test_convnext_begins_close_to_doing_nothing():
    x = noise(2, 16, 30, scale=1.0)
    assert (ConvNeXt(16)(x) - x).std() < 0.1 * x.std()


# ---- the vocoder

@pytest.mark.parametrize("frames", [0, 1, 2, 3, 17])
def test_every_number_of_frames(frames):
    with torch.no_grad(): assert small()(torch.zeros(2, frames, 80)).shape == (2, frames * 480)


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_stream_equals_whole_in_any_pieces(mel, ahead):
    vocoder = small(lookahead=ahead)
    with torch.no_grad(): whole = vocoder(mel)
    for seed in range(5):
        parts = streamed(vocoder, mel, cuts(mel.shape[1], seed, largest=(1, 3, 9, 20, 50)[seed]))
        joined = torch.cat(parts, 1)
        assert joined.shape == whole.shape and (joined - whole).abs().max() < 0.01 * whole.std()


def test_stream_waits_as_long_as_it_says(mel):
    for ahead, rounds in ((0, ()), (2, ()), (4, ()), (2, (1.0,)), (2, (1.5, 1.5))):
        stream, returned, late = small(lookahead=ahead, rounds=rounds).stream(), [], ahead + 1 + 4 * len(rounds)
        with torch.no_grad():
            for k in range(12): returned.append(stream.push(mel[:, k : k + 1]).shape[1] // 480)
        assert returned == [0] * late + [1] * (12 - late)


def test_corrections_bring_the_mel_closer_and_need_no_pieces(mel):
    vocoder = small(rounds=())
    with torch.no_grad(): draft = vocoder(mel)
    away = lambda wav: (vocoder.analysis(wav) - mel).abs().mean().item()
    errors = []
    for strengths in ((), (1.0,), (1.0, 1.0), (1.0,) * 4):
        with torch.no_grad(): errors.append(away(Corrections(vocoder.analysis.bank, 480, strengths).push(draft, mel, last=True)))
    assert all(later < 0.9 * before for before, later in zip(errors, errors[1:]))
    again = Corrections(vocoder.analysis.bank, 480, ())
    assert torch.equal(again.push(draft, mel, last=True), draft) # none: nothing changes


def test_a_frame_stream_that_changes_nothing_returns_the_sound():
    wav = torch.randn(2, 4800, generator=torch.Generator().manual_seed(0))
    stream, place, heard = FrameStream(480, 120, lambda spectra, controls: spectra), 0, []
    for size in (0, 120, 1000, 80, 3600):
        heard.append(stream.push(wav[:, place : place + size], torch.zeros(2, -(-(place + size) // 120) - -(-place // 120), 1)))
        place += size
    heard = torch.cat([*heard, stream.finish()], 1)
    assert heard.shape == wav.shape and torch.allclose(heard[:, 480:-480], wav[:, 480:-480], atol=1e-5)
    assert FrameStream(480, 120, lambda spectra, controls: spectra).finish().shape == (1, 0)


def test_stream_shorter_than_the_lookahead_and_of_nothing(mel):
    vocoder = small(lookahead=5)
    for frames in (1, 4):
        with torch.no_grad(): whole = vocoder(mel[:, 10 : 10 + frames])
        joined = torch.cat(streamed(vocoder, mel[:, 10 : 10 + frames], [1] * frames), 1)
        assert joined.shape == whole.shape and torch.allclose(joined, whole, atol=1e-4)
    assert vocoder.stream().finish().shape == (1, 0)


def test_stream_serves_a_batch(mel):
    vocoder, batch = small(), torch.cat([mel, mel.flip(1)])
    with torch.no_grad(): whole = vocoder(batch)
    assert (torch.cat(streamed(vocoder, batch, [8] * 6 + [2]), 1) - whole).abs().max() < 0.01 * whole.std()
    with torch.no_grad(): assert (whole[:1] - vocoder(mel)).abs().max() < 0.01 * whole.std()


def test_no_sample_depends_on_more_than_the_lookahead(mel):
    vocoder, other = small(lookahead=2), mel.clone()
    other[:, 30:] += 1.0
    with torch.no_grad(): one, two = vocoder(mel), vocoder(other)
    same = (30 - 2 - 1) * 480
    assert (one[:, :same] - two[:, :same]).abs().max() < 1e-4 < (one - two).abs().max()


def test_mel_channels_are_level_and_ripple(mel):
    channels = mel_channels(mel, MelConfig())
    assert channels.shape == (1, 120, mel.shape[1]) and channels[:, :80].min() >= -1e-5
    assert torch.allclose(mel_channels(mel + 1, MelConfig())[:, 80:], channels[:, 80:], atol=1e-5) # loudness leaves the ripple alone
    silence = torch.full((1, 4, 80), math.log(1e-4))
    assert mel_channels(silence, MelConfig()).abs().max() < 1e-5


def test_an_untrained_vocoder_follows_the_mel(mel):
    torch.manual_seed(0)
    vocoder = NeuralVocoder().eval()
    with torch.no_grad(): wav = vocoder(mel)
    loud, level = LogMel()(wav)[0].mean(1), mel[0].mean(1)
    assert torch.corrcoef(torch.stack([loud, level]))[0, 1] > 0.9


def test_training_reaches_every_weight():
    torch.manual_seed(0)
    vocoder, wav = NeuralVocoder(SMALL), torch.stack([voice(0.2), tone(200.0, 0.2)])
    known = torch.full((2, 40), 200.0)
    fake, losses = vocoder.reconstruct(wav, known, known)
    assert fake.shape == wav.shape and set(losses) == {"pitch"}
    ((LogMel()(fake) - LogMel()(wav)).abs().mean() + losses["pitch"]).backward()
    assert [name for name, p in vocoder.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()] == []
    assert vocoder.reconstruct(wav, None, None)[1] == {}


# ---- released weights

def test_release_round_trip(tmp_path):
    vocoder = small()
    write_released(vocoder, tmp_path / "new")
    again = read_released(tmp_path / "new", VocoderConfig, NeuralVocoder)
    assert again.config == vocoder.config and not again.training
    assert all(torch.equal(weights.half().float(), again.state_dict()[name]) for name, weights in vocoder.state_dict().items())
    assert find_checkpoint(tmp_path / "new") == tmp_path / "new"
    assert load_vocoder(tmp_path / "new").config == vocoder.config


def test_damaged_releases_say_so(tmp_path):
    write_released(small(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention": True}))
    with pytest.raises(CourseError, match="unknown field 'attention'"): load_vocoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "width": 24}))
    with pytest.raises(CourseError, match="do not fit"): load_vocoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CourseError, match="cannot be read"): load_vocoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CourseError, match="cannot be read"): load_vocoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CourseError, match="cannot be read"): load_vocoder(tmp_path)
    with pytest.raises(CourseError, match="no checkpoint 'nowhere'"): find_checkpoint("nowhere")


def test_nested_configs_come_back():
    config = VocoderConfig(mel=MelConfig(mels=64), lookahead=0)
    again = config_from_dict(VocoderConfig, json.loads(json.dumps({**vars(config), "mel": vars(config.mel)})))
    assert again == config


@released
def test_the_released_vocoder_is_a_codec_setting():
    codec = MelCodec(MelCodecConfig(vocoder="vocoder"))
    latents = codec.encode(voice()[None])
    with torch.no_grad(): wav = codec.decode(latents)
    assert wav.shape == (1, 24000) and wav.isfinite().all()
    assert 0.3 < wav.std() / voice().std() < 3
    again = MelCodec.from_dict(json.loads(json.dumps(codec.to_dict())))
    with torch.no_grad(): assert torch.equal(again.decode(latents), wav)


@released
def test_the_released_vocoder_streams_the_same_and_keeps_the_pitch(mel):
    vocoder = load_vocoder()
    with torch.no_grad(): whole = vocoder(mel)
    for seed in (0, 1):
        assert (torch.cat(streamed(vocoder, mel, cuts(mel.shape[1], seed)), 1) - whole).abs().max() < 5e-3 * whole.std()
    before, after = f0_track(voice(), 24000), f0_track(whole[0], 24000)
    both = (before > 0) & (after > 0)
    assert (1200 * (after[both] / before[both]).log2().abs()).median() < 60 # cents


@released
def test_the_released_vocoder_on_extremes():
    codec = MelCodec(MelCodecConfig(vocoder="vocoder"))
    with torch.no_grad():
        assert codec.decode(codec.encode(torch.zeros(1, 9600))).square().mean().sqrt() < 0.01 # silence
        for wav in (torch.sign(voice()), noise(24000), 1e-4 * voice()): # clipped, noise, very quiet
            back = codec.decode(codec.encode(wav[None]))
            assert back.isfinite().all() and back.square().mean().sqrt() < 4 * wav.square().mean().sqrt() + 0.01
        for length in (1, 479, 480, 961): assert codec.decode(codec.encode(torch.zeros(1, length))).shape == (1, length // 480 * 480)


@released
def test_what_the_released_vocoder_refuses():
    codec = MelCodec(MelCodecConfig(vocoder="vocoder"))
    with pytest.raises(CourseError, match="NaN"): codec.decode(torch.full((1, 4, 80), float("nan")))
    with pytest.raises(CourseError, match="NaN"): codec.stream().push(torch.full((1, 4, 80), float("inf")))
    for mel_config in (MelConfig(low=50.0), MelConfig(sample_rate=16000, n_fft=1280, hop=320, high=8000.0)):
        with pytest.raises(CourseError, match="other mel settings"): MelCodec(MelCodecConfig(mel_config, vocoder="vocoder"))


@released
def test_pitch_can_be_changed_and_words_kept():
    vocoder, wav = load_vocoder(), voice()
    with torch.no_grad():
        features = whole_features(vocoder, vocoder.analysis(wav)[None])
        heard = heard_pitch(vocoder.head.pitch(features.transpose(1, 2)))
        plain, higher = (vocoder.head(features, ratio * heard)[0][0] for ratio in (1.0, 1.3))
    before, after = f0_track(plain, 24000), f0_track(higher, 24000)
    both = (before > 0) & (after > 0)
    assert abs((after[both] / before[both]).median() / 1.3 - 1) < 0.1
    loud = [LogMel()(sound).mean(1) for sound in (plain, higher)]
    assert torch.corrcoef(torch.stack(loud))[0, 1] > 0.9 # the same frames are loud


@pytest.mark.parametrize("bits", (3, 5, 7, 8))
def test_packed_numbers_are_close(bits):
    weights = {"a.weight": torch.randn(300, 220) * torch.logspace(-6, 3, 300)[:, None], "b.weight": torch.randn(4, 5, 6), "tiny": torch.randn(1, 1),
               "scale": torch.randn(7), "zero": torch.zeros(3, 3), "seen": torch.tensor(12)}
    stored = pack(weights, bits)
    again = unpack(stored)
    assert set(again) == set(weights) and again["seen"] == 12
    for name, weight in weights.items():
        if name == "seen": continue
        assert again[name].shape == weight.shape
        if weight.ndim < 2: assert torch.equal(again[name], weight.half())
        else:
            columns, own = stored[f"{name}:columns"].float(), bits if name == "a.weight" else 8 # small matrices keep 8 bits
            assert stored[f"{name}:shape"][0] == own
            largest = (weight.flatten(1) / columns).abs().amax(1, keepdim=True) * columns # the most that a number of this row and column may be
            assert ((again[name] - weight).flatten(1).abs() <= largest * (0.5 / (2 ** (own - 1) - 1) + 1e-6) + 1e-9).all(), name


def test_small_columns_are_not_rounded_away():
    weight = torch.randn(40, 60) * torch.logspace(0, -3, 60) # a row's step alone would leave the last columns at 0
    apart = (unpack(pack({"w": weight}))["w"] - weight).norm(dim=0) / weight.norm(dim=0)
    assert apart.max() < 0.2


def test_packed_numbers_are_as_short_as_their_entropy():
    weight = torch.randn(300, 220)
    stored = pack({"w": weight}, 7)
    columns = stored["w:columns"].float()
    whole = (weight / columns / stored["w:step"][:, None]).round().int()
    shares = whole.flatten().unique(return_counts=True)[1].double() / whole.numel()
    assert torch.equal(whole * stored["w:step"][:, None] * columns, unpack(stored)["w"])
    assert 1 <= stored["w"].numel() * 8 / whole.numel() / float(-(shares * shares.log2()).sum()) < 1.02


def test_the_head_may_keep_more_bits_than_the_rest():
    torch.manual_seed(0)
    weights = {name: torch.randn(300, 300) for name in ("backbone.w", "head.w", "headless.w")} | {"head.small": torch.randn(30, 30)}
    stored = pack(weights, 3, 6)
    assert {name: int(stored[f"{name}:shape"][0]) for name in weights} == {"backbone.w": 3, "head.w": 6, "headless.w": 3, "head.small": 8}
    errors = {name: (weight - weights[name]).norm() / weights[name].norm() for name, weight in unpack(stored).items()}
    assert errors["head.w"] < 0.25 * errors["backbone.w"] and torch.equal(stored["backbone.w"], pack(weights, 3)["backbone.w"])


def test_bits_between_whole_ones():
    torch.manual_seed(0)
    weight, error, size = torch.randn(300, 2, 150), {}, {}
    for bits in (3, 3.5, 4):
        stored = pack({"w": weight}, bits)
        again = unpack(stored)["w"]
        assert again.shape == weight.shape
        error[bits], size[bits] = (again - weight).norm().item(), len(stored["w"])
    assert error[3] > 1.3 * error[3.5] > 1.3 * 1.2 * error[4] and size[3] < size[3.5] < size[4]


def test_half_precision_is_not_packed():
    weights = {"a": torch.randn(5, 5), "b": torch.randn(3)}
    stored = pack(weights, 16)
    assert all(torch.equal(stored[name], weights[name].half()) and unpack(stored)[name] is stored[name] for name in weights)
