"""ardm_course.audio: parity with its peers, odd lengths, and every kind of bad file."""
import io
import math

import numpy as np
import pytest
import soundfile
import torch

from ardm_course import audio
from ardm_course.audio import LogMel, MelConfig, load_audio, mel_filterbank, reflect, resample, save_audio, set_level, stft, trim_silence
from ardm_course.core import CourseError

torchaudio = audio.import_torchaudio()
needs_torchaudio = pytest.mark.skipif(torchaudio is None, reason="torchaudio is not installed")
RATES = [(8000, 24000), (16000, 24000), (22050, 24000), (44100, 24000), (48000, 24000), (24000, 16000), (24000, 44100)]


def noise(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encoded(samples, rate=24000, kind="WAV", subtype="PCM_16"):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, subtype, format=kind)
    return buffer.getvalue()


# ---- parity

@needs_torchaudio
@pytest.mark.parametrize("old, new", RATES)
def test_resample_equals_torchaudio(old, new):
    wav = noise(2, old // 3)
    theirs = torchaudio.functional.resample(wav, old, new, lowpass_filter_width=24, rolloff=0.95)
    assert torch.allclose(resample(wav, old, new), theirs, atol=1e-5)


@pytest.mark.parametrize("old, new", RATES)
def test_resample_agrees_with_scipy_and_with_the_ideal(old, new):
    signal = pytest.importorskip("scipy.signal")
    tones = lambda rate: sum(np.sin(2 * np.pi * f * np.arange(rate // 2) / rate + f) * 0.2 for f in (110, 440, 1000, 3000))
    ours = resample(torch.from_numpy(tones(old)).float(), old, new).numpy()
    theirs = signal.resample_poly(tones(old), new, old)
    inside = slice(new // 20, -new // 20)
    assert abs(ours - theirs[: len(ours)])[inside].max() < 2e-3
    assert abs(ours[: new // 2] - tones(new))[inside].max() < 2e-4


def test_resample_suppresses_what_the_new_rate_cannot_hold():
    time = torch.arange(24000) / 48000
    for hertz in (12100, 14000, 20000):
        assert resample(torch.sin(2 * math.pi * hertz * time), 48000, 24000)[200:-200].abs().max() < 0.02


@needs_torchaudio
def test_log_mel_equals_torchaudio():
    wav, config = noise(12345), MelConfig()
    transform = torchaudio.transforms.MelSpectrogram(24000, 1920, hop_length=480, f_min=0, f_max=12000, n_mels=80, power=1, center=False)
    theirs = transform(reflect(wav, 720)).clamp(min=config.floor).log().T
    assert torch.allclose(LogMel(config)(wav), theirs, atol=1e-3)


def test_filterbank_and_log_mel_equal_librosa():
    librosa = pytest.importorskip("librosa")
    wav = noise(12345)
    theirs = librosa.filters.mel(sr=24000, n_fft=1920, n_mels=80, fmin=0, fmax=12000, htk=True, norm=None)
    assert np.allclose(mel_filterbank(MelConfig()).numpy(), theirs, atol=1e-5)
    spectrum = abs(librosa.stft(reflect(wav, 720).numpy(), n_fft=1920, hop_length=480, center=False))
    assert np.allclose(LogMel()(wav).numpy(), np.log(np.maximum(theirs @ spectrum, 1e-4)).T, atol=1e-3)


def test_stft_equals_torch_on_the_padded_signal():
    wav = noise(3, 9999)
    theirs = torch.stft(reflect(wav, 720), 1920, 480, window=torch.hann_window(1920), center=False, return_complex=True)
    assert torch.allclose(stft(wav, 1920, 480), theirs, atol=1e-4)


# ---- lengths and shapes

@pytest.mark.parametrize("length", [1, 2, 479, 480, 481, 720, 721, 1920, 24000, 24479])
def test_frames_are_whole_hops(length):
    assert LogMel()(noise(length)).shape == (length // 480, 80)
    assert LogMel()(noise(2, length)).shape == (2, length // 480, 80)


@pytest.mark.parametrize("length", [721, 1000, 5000])
def test_reflect_equals_torch_where_torch_can(length):
    wav = noise(2, length)
    assert torch.equal(reflect(wav, 720), torch.nn.functional.pad(wav, (720, 720), mode="reflect"))


def test_reflect_serves_signals_shorter_than_the_padding():
    assert reflect(torch.tensor([5.0]), 3).tolist() == [5.0] * 7
    assert reflect(torch.tensor([0.0, 1.0]), 3).tolist() == [1, 0, 1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("length", [0, 1, 7, 999, 16000])
@pytest.mark.parametrize("old, new", [(16000, 24000), (48000, 24000), (44100, 24000)])
def test_resampled_length_is_rounded_up(length, old, new):
    assert resample(torch.zeros(length), old, new).shape == (-(-length * new // old),)
    assert resample(torch.zeros(2, length), old, new).shape == (2, -(-length * new // old))


def test_a_frame_does_not_depend_on_its_batch_or_on_distant_sound():
    wav = noise(2, 24000)
    both = LogMel()(wav)
    assert torch.allclose(both[0], LogMel()(wav[0]), atol=1e-5)
    assert torch.allclose(both[0, :20], LogMel()(wav[0, : 21 * 480 + 720])[:20], atol=1e-3)


def test_silence_sits_on_the_floor_and_has_a_finite_gradient():
    wav = torch.zeros(4800, requires_grad=True)
    mel = LogMel()(wav)
    mel.sum().backward()
    assert torch.allclose(mel, torch.tensor(math.log(1e-4))) and wav.grad.isfinite().all()


def test_kernels_made_in_inference_mode_serve_training():
    audio.sinc_kernel.cache_clear()
    with torch.inference_mode(): resample(torch.zeros(100), 16000, 24000)
    wav = noise(100).requires_grad_()
    resample(wav, 16000, 24000).sum().backward()
    assert wav.grad.isfinite().all()


# ---- files

@pytest.mark.parametrize("kind, subtype", [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "OPUS"), ("OGG", "VORBIS")])
def test_load_whole_and_refuse_half(kind, subtype):
    wav = noise(24000)
    data = encoded(wav.numpy(), 24000, kind, subtype)
    assert load_audio(data).shape == wav.shape
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(CourseError, match="truncated|damaged"): load_audio(data[: int(len(data) * share)])


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_load_resamples_and_averages_stereo(rate, tmp_path):
    time = np.arange(rate) / rate
    left = 0.5 * np.sin(2 * np.pi * 440 * time)
    path = tmp_path / "stereo.wav"
    path.write_bytes(encoded(np.stack([left, np.zeros_like(left)], 1), rate))
    wav = load_audio(path)
    ideal = 0.25 * torch.sin(2 * math.pi * 440 * torch.arange(24000) / 24000)
    assert wav.shape == (24000,) and wav.dtype == torch.float32
    assert (wav - ideal)[500:-500].abs().max() < 1e-3


def test_load_takes_paths_bytes_and_open_files(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(noise(480).numpy()))
    with open(path, "rb") as file: opened = load_audio(file)
    assert torch.equal(load_audio(path), opened) and torch.equal(load_audio(str(path)), load_audio(path.read_bytes()))


@pytest.mark.parametrize("samples, message", [(np.zeros(0), "no samples"), (np.array([0.0, np.nan]), "NaN"), (np.array([0.0, np.inf]), "NaN")])
def test_load_refuses_empty_and_not_finite(samples, message):
    with pytest.raises(CourseError, match=message): load_audio(encoded(samples, subtype="FLOAT"))


def test_load_refuses_missing_folders_and_rubbish(tmp_path):
    for source, message in ((tmp_path / "none.wav", "no audio file"), (tmp_path, "cannot be read"), (b"rubbish", "not a readable"), (b"", "not a readable")):
        with pytest.raises(CourseError, match=message): load_audio(source)


def test_a_streamed_wav_header_is_no_damage():
    data = bytearray(encoded(noise(480).numpy()))
    start = data.index(b"data") + 4
    data[start : start + 4] = b"\xff" * 4
    assert load_audio(bytes(data)).shape == (480,)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_save_and_load(suffix, tmp_path):
    wav = torch.sin(torch.arange(24000) / 20) * 1.5 # beyond full scale: clipped
    save_audio(tmp_path / f"a{suffix}", wav, 24000)
    again = load_audio(tmp_path / f"a{suffix}")
    assert again.shape == wav.shape and [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]
    assert (again - wav.clamp(-1, 1)).abs().mean() < (0.05 if suffix == ".ogg" else 1e-4)


def test_save_refuses_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    wav = torch.zeros(480)
    for path, wav, rate in ((tmp_path / "a.mp9", wav, 24000), (tmp_path / "a.ogg", wav, 44100), (tmp_path / "a.wav", wav[None], 24000),
                            (tmp_path / "a.wav", wav / 0, 24000), (tmp_path / "file" / "a.wav", wav, 24000)):
        with pytest.raises(CourseError): save_audio(path, wav, rate)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_save_into_a_folder_closed_to_you(tmp_path, monkeypatch):
    def refuse(*_, **__): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("pathlib.Path.write_bytes", refuse)
    with pytest.raises(CourseError, match="may not write"): save_audio(tmp_path / "a.wav", torch.zeros(480), 24000)
    assert not list(tmp_path.iterdir())


def test_rates_without_a_ratio():
    for old, new in ((0, 24000), (16000, -1), (23993, 24000)):
        with pytest.raises(CourseError): resample(torch.zeros(10), old, new)


# ---- level and silence

def test_set_level():
    assert set_level(noise(24000)).square().mean().sqrt().item() == pytest.approx(0.07, rel=1e-4)
    spiky = torch.zeros(24000)
    spiky[5] = 0.1
    assert set_level(spiky).abs().max().item() == pytest.approx(0.95)
    assert not set_level(torch.zeros(10)).any()


@pytest.mark.parametrize("length", [1, 239, 240, 24001])
def test_trim_silence_never_loses_sound(length):
    wav = torch.cat([torch.zeros(12000), 0.1 + noise(length).abs(), torch.zeros(12000)])
    trimmed = trim_silence(wav, 24000)
    assert trimmed.sum().item() == pytest.approx(wav.sum().item(), rel=1e-5)
    assert len(trimmed) <= length + round(0.15 * 24000) + 480
    assert torch.equal(trim_silence(torch.zeros(length), 24000), torch.zeros(length))


def test_import_torchaudio_is_none_when_absent(monkeypatch):
    import builtins
    real = builtins.__import__
    def absent(name, *rest, **named):
        if name == "torchaudio": raise ImportError(name)
        return real(name, *rest, **named)
    monkeypatch.setattr(builtins, "__import__", absent)
    assert audio.import_torchaudio.__wrapped__() is None
