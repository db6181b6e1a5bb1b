"""ardm_course.vocoder: exact inversion, Griffin-Lim, the mel codec, and streaming without lost samples or clicks."""
import json
import math

import pytest
import torch

from ardm_course.audio import LogMel, MelConfig, import_torchaudio, mel_filterbank, stft
from ardm_course.core import CourseError
from ardm_course.vocoder import (MelCodec, MelCodecConfig, alternate, equalise, griffin_lim, istft, mel_griffin_lim, mel_to_magnitude,
                                 noise_spectrum, overlap_add, window_power)

torchaudio = import_torchaudio()


def noise(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def voice(seconds=1.0, pitch=140.0):
    "Something with harmonics that glide and pause, [1, T]."
    time = torch.arange(int(24000 * seconds)) / 24000
    phase = 2 * math.pi * (pitch * time + 12 * torch.sin(3 * time))
    wave = sum(torch.cos(k * phase) / k for k in range(1, 40))
    return (0.05 * wave * (torch.sin(9 * time) > -0.5) + 1e-3 * noise(len(time)))[None]


def mel_error(codec, wav, latents):
    "Mean distance of the mel of `wav` from what it was made of, in dB."
    return 8.686 * (codec.analysis(wav) - codec.restore(latents)).abs().mean().item()


@pytest.fixture(scope="module")
def codec():
    codec = MelCodec(MelCodecConfig(iterations=16))
    return codec.fit_statistics([codec.encode(voice())])


# ---- the exact inverse

@pytest.mark.parametrize("n_fft, hop", [(1920, 480), (1024, 256), (512, 128), (400, 100)])
@pytest.mark.parametrize("rest", [0, 1, 99])
@pytest.mark.parametrize("frames", [1, 2, 3, 50])
def test_istft_is_the_exact_inverse(n_fft, hop, rest, frames):
    wav = noise(2, frames * hop + rest)
    assert torch.allclose(istft(stft(wav, n_fft, hop), n_fft, hop, wav.shape[1]), wav, atol=1e-5)
    assert istft(stft(wav, n_fft, hop), n_fft, hop).shape == (2, frames * hop)


def test_istft_of_nothing():
    assert istft(stft(torch.zeros(2, 479), 1920, 480), 1920, 480).shape == (2, 0)


def test_istft_equals_torch_inside():
    wav = noise(1, 24000)
    window = torch.hann_window(1920)
    centred = torch.stft(wav, 1920, 480, window=window, center=True, return_complex=True)
    theirs = torch.istft(centred, 1920, 480, window=window, center=True)
    assert torch.allclose(istft(stft(wav, 1920, 480), 1920, 480), theirs, atol=1e-5)


def test_overlap_add_equals_fold():
    frames = noise(3, 7, 1920)
    theirs = torch.nn.functional.fold(frames.transpose(1, 2), (1, 6 * 480 + 1920), (1, 1920), stride=(1, 480))[:, 0, 0]
    assert torch.allclose(overlap_add(frames, 480), theirs, atol=1e-6)
    assert torch.allclose(window_power(9, 1920, 480)[1440:-1440], torch.tensor(1.5))


# ---- Griffin-Lim

def convergence(wav, magnitude):
    return ((stft(wav, 1920, 480).abs() - magnitude).norm() / magnitude.norm()).item()


def test_griffin_lim_improves_is_repeatable_and_treats_rows_alike():
    magnitude = stft(voice(), 1920, 480).abs()
    errors = [convergence(griffin_lim(magnitude, 1920, 480, rounds), magnitude) for rounds in (1, 8, 32)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.2
    both = griffin_lim(torch.cat([2 * magnitude, magnitude]), 1920, 480, 8)
    assert torch.allclose(both[1:], griffin_lim(magnitude, 1920, 480, 8), atol=1e-5) and both.shape == (2, 24000)


@pytest.mark.skipif(torchaudio is None, reason="torchaudio is not installed")
def test_griffin_lim_is_as_good_as_torchaudios():
    wav, window = voice(), torch.hann_window(1920)
    torch.manual_seed(0)
    centred = torch.stft(wav, 1920, 480, window=window, return_complex=True).abs()
    theirs = torchaudio.functional.griffinlim(centred, window, 1920, 480, 1920, 1.0, 32, 0.99, None, True)
    their_error = ((torch.stft(theirs, 1920, 480, window=window, return_complex=True).abs() - centred).norm() / centred.norm()).item()
    magnitude = stft(wav, 1920, 480).abs()
    assert convergence(griffin_lim(magnitude, 1920, 480), magnitude) < 1.5 * their_error


def test_pseudo_inverse_is_positive_and_nearly_right():
    mel = LogMel()(voice())
    magnitude = mel_to_magnitude(mel, MelConfig())
    assert magnitude.min() >= 0 and magnitude.shape == (1, 961, 50)
    again = (mel_filterbank(MelConfig()) @ magnitude).clamp(min=1e-4).log().transpose(1, 2)
    assert (again - mel).abs().mean() < 0.3


def test_equalise_keeps_phases_and_corrects_the_mel():
    bank = mel_filterbank(MelConfig())
    spread = bank / bank.sum(0).clamp(min=1e-3)
    start, wanted = noise_spectrum(10, 1920, 480), LogMel()(voice())[:, :10].exp()
    spectrum = start
    for _ in range(20): spectrum = equalise(spectrum, wanted, bank, spread)
    inside = spectrum.abs() > 1e-3
    assert torch.allclose((spectrum / spectrum.abs())[inside], (start / start.abs())[inside], atol=1e-4)
    assert ((spectrum.abs() @ bank.T).log() - wanted.log()).abs().mean() < 0.05


def test_the_mel_rule_beats_the_pseudo_inverse():
    log_mel = LogMel()
    mel = log_mel(voice())
    textbook = griffin_lim(mel_to_magnitude(mel, MelConfig()), 1920, 480)
    grown = istft(mel_griffin_lim(mel, log_mel.bank, 480).transpose(1, 2), 1920, 480)
    assert (log_mel(grown) - mel).abs().mean() < 0.6 * (log_mel(textbook) - mel).abs().mean()


def test_alternate_leaves_the_past_alone_and_joins_it():
    wav = voice()
    spectrum = stft(wav, 1920, 480).transpose(1, 2)
    keep = lambda guess: spectrum[:, 3:].abs() * guess / guess.abs().clamp(min=1e-9)
    start = noise_spectrum(47, 1920, 480)
    joined = alternate(start, keep, 1920, 480, 16, 0.9, past=spectrum[:, :3])
    assert joined.shape == start.shape
    with_past = torch.cat([spectrum[:, :3], joined], 1).transpose(1, 2)
    assert torch.allclose(istft(with_past, 1920, 480)[:, :480], wav[:, :480], atol=1e-4) # only the past reaches these


# ---- the codec

def test_codec_shapes_and_rates(codec):
    assert (codec.sample_rate, codec.frame_rate, codec.dim) == (24000, 50.0, 80)
    for length in (1, 479, 480, 5000):
        latents = codec.encode(noise(3, length))
        assert latents.shape == (3, length // 480, 80)
        assert codec.decode(latents).shape == (3, length // 480 * 480)


def test_decode_returns_sound_with_these_latents(codec):
    latents = codec.encode(voice())
    wav = codec.decode(latents)
    assert mel_error(codec, wav, latents) < 2.0 and wav.isfinite().all()
    assert torch.equal(codec.decode(latents), wav)
    assert torch.allclose(codec.decode(torch.cat([-latents, latents]))[1:], wav, atol=1e-4)


def test_statistics_normalise_and_survive_json(codec):
    latents = codec.encode(voice())
    assert latents.mean().abs() < 1e-3 and (latents.std(1, correction=0) - 1).abs().max() < 0.05
    again = MelCodec.from_dict(json.loads(json.dumps(codec.to_dict())))
    assert again.config == codec.config and torch.equal(again.encode(voice()), latents)
    again.fit_statistics([again.encode(voice())]) # fitting what is fitted changes nothing
    assert torch.allclose(again.mean, codec.mean, atol=1e-4)
    assert {"mean", "std"} <= set(codec.state_dict())


def test_statistics_of_constant_bins_stay_finite():
    codec = MelCodec()
    codec.fit_statistics([codec.encode(torch.zeros(1, 4800))])
    assert codec.std.min() > 0 and codec.encode(voice()).isfinite().all()


def test_silence_decodes_to_silence(codec):
    assert codec.decode(codec.encode(torch.zeros(1, 4800))).abs().max() < 1e-3


def test_codec_refuses_what_it_cannot_do(codec):
    for bad in (float("nan"), float("inf")):
        with pytest.raises(CourseError, match="NaN"): codec.decode(torch.full((1, 4, 80), bad))
        with pytest.raises(CourseError, match="NaN"): codec.stream().push(torch.full((1, 4, 80), bad))
    with pytest.raises(CourseError, match="vocoder"): MelCodec(MelCodecConfig(vocoder="wavenet"))
    with pytest.raises(CourseError, match="no latents"): MelCodec().fit_statistics([])
    with pytest.raises(CourseError, match="not the sound"): MelCodec().fit_statistics([voice()[0]])


def test_another_rate():
    mel = MelConfig(sample_rate=16000, n_fft=1280, hop=320, high=8000.0, mels=64)
    codec = MelCodec(MelCodecConfig(mel, iterations=4))
    latents = codec.encode(noise(1, 16000))
    assert latents.shape == (1, 50, 64) and codec.decode(latents).shape == (1, 16000)
    assert sum(part.shape[1] for part in (codec.stream().push(latents),)) == 46 * 320


# ---- streaming

@pytest.mark.parametrize("sizes", [[8] * 6 + [2], [50], [1] * 12, [3, 1, 0, 20, 2], [1], [2], [0, 0, 5]])
def test_stream_returns_every_sample_once(codec, sizes):
    latents = codec.encode(voice())[:, : sum(sizes)]
    stream, heard = codec.stream(), 0
    for number, part in enumerate(latents.split(sizes, 1)):
        heard += stream.push(part).shape[1]
        assert heard == max(sum(sizes[: number + 1]) - 4, 0) * 480 # four frames are held back, never more
    rest = stream.finish()
    assert heard + rest.shape[1] == sum(sizes) * 480 and rest.shape[0] == 1


def test_stream_of_nothing(codec):
    assert codec.stream().finish().shape == (1, 0)


def test_stream_serves_a_batch(codec):
    latents = codec.encode(torch.cat([voice(), voice(pitch=210.0)]))
    stream = codec.stream()
    parts = [stream.push(part) for part in latents.split(8, 1)] + [stream.finish()]
    assert torch.cat(parts, 1).shape == (2, 24000)


def test_stream_says_the_same_as_offline_without_clicks(codec):
    latents = codec.encode(voice(2.0))
    stream = codec.stream()
    parts = [stream.push(part) for part in latents.split(8, 1)] + [stream.finish()]
    streamed, offline = torch.cat(parts, 1), codec.decode(latents)
    glued = torch.cat([codec.decode(part) for part in latents.split(8, 1)], 1)
    assert mel_error(codec, streamed, latents) < 1.5 * mel_error(codec, offline, latents)

    def jump(wav, seams): return (wav[0].diff().abs()[seams - 1].mean() / wav[0].diff().square().mean().sqrt()).item()
    seams = torch.tensor([part.shape[1] for part in parts]).cumsum(0)[:-2]
    assert jump(streamed, seams) < 1.5 < jump(glued, torch.arange(8 * 480, 48000, 8 * 480))
