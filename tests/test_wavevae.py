"""ardm_course.wavevae: parts against trusted peers, a stream that equals the whole, latents that can be drawn, recipes and files."""
import math
from dataclasses import replace

import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn
from torch.nn import functional as F

from ardm_course import wavevae
from ardm_course.core import CourseError, count_parameters
from ardm_course.audio import LogMel, MelConfig
from ardm_course.neural import CausalConv1d, VocoderConfig, write_released
from ardm_course.vocoder import Codec, MelCodec
from ardm_course.wavevae import (CODEC_RECIPES, HELD_OUT, SHAPES, CausalConvTranspose1d, Residual, Resize, Snake, VAEConfig, WaveVAE, begin_linear, codec_recipe,
                                 draw_latent, fit_forgiveness, hearing, load_codec, load_codec_model, measured, name_latents, plain, rebuild, reconstruct)

VOICE = VocoderConfig(MelConfig(16000, 640, 160, 20, 0.0, 8000.0), 16, 1, 2, 16, 1)
SMALL = VAEConfig(16000, VOICE, (16, 24), (2,), 6, (24, 20), (2,)) # speaks with a vocoder
CONVOLUTIONS = VAEConfig(16000, None, (4, 8, 8, 12), (2, 4, 5), 5, (12, 8, 8, 4), (5, 4, 2)) # makes samples itself


def noise(*shape, seed=0, scale=0.1):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(config):
    torch.manual_seed(0)
    return WaveVAE(config).eval()


@pytest.fixture(scope="module", params=[SMALL, CONVOLUTIONS], ids=["mel", "samples"])
def vae(request):
    return made(request.param)


@pytest.fixture(autouse=True)
def repeatable():
    torch.manual_seed(0)


# ---- parts

def test_snake_is_its_formula_and_survives_rate_zero():
    snake = Snake(3)
    snake.rate.data = torch.tensor([[0.5], [2.0], [0.0]])
    x = noise(2, 3, 40, scale=3.0)
    y = snake(x)
    assert torch.allclose(y[:, 0], x[:, 0] + (0.5 * x[:, 0]).sin() ** 2 / 0.5, atol=1e-5) and torch.equal(y[:, 2], x[:, 2])
    assert (Snake(1)(torch.linspace(-9, 9, 999)[None, None]).diff() >= -1e-5).all() # it never decreases


@pytest.mark.parametrize("stride", [1, 2, 5, 8])
def test_transposed_convolution_is_torchs_without_the_tail(stride):
    layer, x = CausalConvTranspose1d(3, 2, stride), noise(2, 3, 11)
    theirs = F.conv_transpose1d(x, layer.weight, layer.bias, stride)
    assert torch.allclose(layer(x), theirs[..., : 11 * stride], atol=1e-5)
    later = x.clone()
    later[..., 6:] = 1.0
    assert torch.allclose(layer(later)[..., : 6 * stride], layer(x)[..., : 6 * stride], atol=1e-5) # no future


@pytest.mark.parametrize("build", [lambda: Residual(6, 9), lambda: Resize(6, 4, 3), lambda: Resize(6, 4, 3, up=True), lambda: CausalConvTranspose1d(6, 4, 3)])
def test_parts_with_memory_equal_the_whole(build):
    layer, x, memory = build(), noise(2, 6, 24, scale=1.0), {}
    pieces = [layer(piece, memory) for piece in x.split([3, 6, 3, 12], 2)]
    assert torch.allclose(torch.cat(pieces, 2), layer(x), atol=1e-5)


def test_receptive_field_of_three_units():
    step = Resize(4, 4, 1, up=True)
    step.step = CausalConv1d(4, 4, 1)
    x = noise(1, 4, 120, scale=1.0).requires_grad_()
    step(x)[0, :, 100].sum().backward()
    reached = x.grad[0].abs().sum(0).nonzero()[:, 0]
    assert reached.min() == 100 - 6 * (1 + 3 + 9) and reached.max() == 100


# ---- the noisy place

def test_price_equals_torch_distributions():
    mean, logvar = noise(3, 5, 7, scale=1.0), noise(3, 5, 7, seed=1, scale=1.0)
    named = torch.distributions.Normal(mean, (logvar / 2).exp())
    wanted = torch.distributions.kl_divergence(named, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    assert torch.allclose(draw_latent(SMALL, mean, logvar)[1], wanted, atol=1e-5)


def test_draw_has_the_named_mean_and_deviation_and_gradients():
    mean, logvar = torch.full((1, 2, 20000), 3.0, requires_grad=True), torch.full((1, 2, 20000), math.log(0.25), requires_grad=True)
    sample, _ = draw_latent(SMALL, mean, logvar)
    assert abs(sample.mean().item() - 3) < 0.02 and abs(sample.std().item() - 0.5) < 0.02
    sample.sum().backward()
    assert torch.equal(mean.grad, torch.ones_like(mean)) and logvar.grad.abs().max() > 0


def test_extreme_log_variances_stay_finite():
    for value in (-1e4, 1e4):
        sample, price = draw_latent(SMALL, torch.zeros(1, 2, 3), torch.full((1, 2, 3), value))
        assert sample.isfinite().all() and price.isfinite()


def test_sigma_vae_draws_one_deviation_per_sound_and_ignores_the_log_variance():
    config, mean = VAEConfig(noise="drawn"), noise(300, 4, 500, scale=1.0)
    sample, price = draw_latent(config, mean, torch.full_like(mean, float("nan")))
    deviation = (sample - mean).std((1, 2))
    assert abs(deviation.mean().item() - 0.5) < 0.06 and deviation.std() > 0.2
    halves = (sample - mean).view(300, 4, 2, 250).std((1, 3))
    assert torch.allclose(halves[:, 0], halves[:, 1], atol=0.2, rtol=0.2)
    assert torch.allclose(price, 0.5 * mean.square().sum(1).mean())


# ---- published shapes

def test_published_shapes():
    with torch.device("meta"): voxcpm, vibevoice = (WaveVAE(SHAPES[name]) for name in ("voxcpm", "vibevoice"))
    assert count_parameters(voxcpm) == 75_355_202 # AudioVAE of voxcpm 2.0.3
    assert (voxcpm.frame_rate, voxcpm.dim, voxcpm.config.hop, voxcpm.voice) == (25, 64, 640, None)
    assert (vibevoice.frame_rate, vibevoice.dim, vibevoice.config.noise) == (7.5, 64, "drawn")
    assert voxcpm.encode(torch.zeros(2, 1281, device="meta")).shape == (2, 3, 64)


def test_names_in_released_weights_are_kept():
    parts = {name.split(".")[0] for name in plain(made(VAEConfig())).state_dict()}
    assert parts == {"mean", "std", "enter", "downs", "mu", "logvar", "taps", "widen", "ups", "bend", "leave", "voice", "squeeze", "spread"}


# ---- the codec

@torch.no_grad()
@pytest.mark.parametrize("length", [1, 39, 40, 639, 640, 641, 1001, 4000])
def test_odd_lengths(vae, length):
    hop = vae.config.hop
    latents = vae.encode(noise(3, length))
    assert latents.shape == (3, -(-length // hop), vae.dim)
    assert vae.decode(latents).shape == (3, latents.shape[1] * hop) and vae.decode(latents).isfinite().all()


@torch.no_grad()
def test_nothing_comes_back_as_nothing(vae):
    latents = vae.encode(torch.zeros(3, 0))
    assert latents.shape == (3, 0, vae.dim) and vae.decode(latents).shape == (3, 0)
    stream = vae.stream()
    assert stream.push(latents).shape == (3, 0) and stream.finish().shape == (3, 0) and vae.stream().finish().shape == (1, 0)


@torch.no_grad()
def test_encoding_is_the_mean_and_sees_no_more_than_a_mel_frame(vae):
    wav, hop = noise(2, 12 * vae.config.hop), vae.config.hop
    ahead = (VOICE.mel.n_fft - VOICE.mel.hop) // 2 if vae.voice else 0
    latents = vae.encode(wav)
    assert isinstance(vae, Codec) and torch.equal(vae.encode(wav), latents)
    later = wav.clone()
    later[:, 6 * hop + ahead :] = 0.3
    assert torch.allclose(vae.encode(later)[:, :6], latents[:, :6], atol=1e-4) and not torch.allclose(vae.encode(later)[:, 6:], latents[:, 6:], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
def test_stream_equals_the_whole_for_any_pieces(vae, seed):
    latents, generator = noise(2, 17, vae.dim, scale=1.0), torch.Generator().manual_seed(seed)
    whole, stream, heard, place = vae.decode(latents), vae.stream(), [], 0
    while place < 17:
        size = int(torch.randint(0, 7, (1,), generator=generator)) # empty pieces too
        heard.append(stream.push(latents[:, place : place + size]))
        place += size
    heard.append(stream.finish())
    assert torch.cat(heard, 1).shape == whole.shape and torch.allclose(torch.cat(heard, 1), whole, atol=1e-5)


@torch.no_grad()
def test_two_streams_do_not_share_their_memory(vae):
    a, b = noise(1, 4, vae.dim, scale=1.0), noise(1, 4, vae.dim, seed=1, scale=1.0)
    first, second = vae.stream(), vae.stream()
    made = [torch.cat([first.push(a[:, :2]), second.push(b[:, :2])[:, :0], first.push(a[:, 2:]), first.finish()], 1)]
    assert torch.allclose(made[0], vae.decode(a), atol=1e-4)


@torch.no_grad()
def test_rows_of_a_batch_do_not_mix(vae):
    latents = noise(3, 6, vae.dim, scale=1.0)
    assert torch.allclose(vae.decode(latents)[1:2], vae.decode(latents[1:2]), atol=1e-4)


@torch.no_grad()
def test_silence_clipping_and_loud_sounds_stay_finite(vae):
    for wav in (torch.zeros(1, 3200), torch.ones(1, 3200), (100 * noise(1, 3200)).clamp(-1, 1), 1000 * noise(1, 3200)):
        assert vae.decode(vae.encode(wav)).isfinite().all()


def test_what_is_not_finite_is_refused(vae):
    for bad in (float("nan"), float("inf")):
        with pytest.raises(CourseError, match="NaN or infinity"): vae.decode(torch.full((1, 2, vae.dim), bad))
        with pytest.raises(CourseError, match="NaN or infinity"): vae.stream().push(torch.full((1, 2, vae.dim), bad))


@torch.no_grad()
def test_statistics_normalise_and_decode_undoes_them():
    vae, wav = made(SMALL), noise(2, 64000)
    before = vae.decode(vae.encode(wav))
    vae.fit_statistics([vae.encode(wav)])
    latents = vae.encode(wav)
    alive = vae.std > 0.1001 # a dimension that hardly moves is not blown up
    assert latents.mean((0, 1)).abs().max() < 1e-3 and (latents.std((0, 1), correction=0)[alive] - 1).abs().max() < 1e-2 and latents.std((0, 1)).max() < 1.01
    assert torch.allclose(vae.decode(latents), before, atol=1e-3)


# ---- a linear beginning

@torch.no_grad()
def test_it_begins_as_the_best_linear_codec():
    sounds = [noise(1600 * k, seed=k) * torch.linspace(0, 1, 1600 * k) for k in (2, 3, 5)]
    vae = begin_linear(made(SMALL), sounds)
    rows = torch.cat([LogMel(VOICE.mel)(wav).reshape(-1, 40) for wav in sounds])
    peer = PCA(6, svd_solver="full").fit(rows.double().numpy())
    wanted = torch.from_numpy(peer.inverse_transform(peer.transform(rows.double().numpy()))).float()
    found = torch.cat([rebuild(vae, name_latents(vae, vae.outline(wav[None]))[0].transpose(1, 2))[0].T.reshape(-1, 40) for wav in sounds])
    assert torch.allclose(found, wanted, atol=1e-3)
    means = torch.cat([name_latents(vae, vae.outline(wav[None]))[0][0].T for wav in sounds])
    assert torch.allclose(means.std(0, correction=0), torch.ones(6), atol=1e-3) and means.mean(0).abs().max() < 1e-3


def test_a_linear_beginning_hears_less_above_8_khz():
    vae = made(replace(SMALL, sample_rate=24000, vocoder=replace(VOICE, mel=MelConfig(24000, 960, 240, 20, 0.0, 12000.0))))
    heard, sounds = hearing(vae), [noise(48000, seed=seed) for seed in range(3)]
    assert heard[0] == 1 and heard[-1] < 1 and (heard.diff() <= 0).all() and torch.equal(hearing(made(SMALL)), torch.ones(20)), "16 kHz have nothing above 8"
    begin_linear(vae, sounds)
    weights = heard.repeat(2).double().numpy()
    rows = torch.cat([LogMel(vae.config.vocoder.mel)(wav).reshape(-1, 40) for wav in sounds]).double().numpy()
    peer = PCA(6, svd_solver="full").fit(rows * weights)
    wanted = torch.from_numpy(peer.inverse_transform(peer.transform(rows * weights)) / weights).float()
    found = torch.cat([rebuild(vae, name_latents(vae, vae.outline(wav[None]))[0].transpose(1, 2))[0].T.reshape(-1, 40) for wav in sounds])
    assert torch.allclose(found, wanted, atol=1e-3)


def test_a_linear_beginning_can_learn():
    vae = begin_linear(made(SMALL), [noise(16000)]).train()
    fake, losses = reconstruct(vae, noise(2, 3200), None, None)
    (fake.square().mean() + sum(losses.values())).backward()
    assert all(layer.parametrizations.weight.original0.grad.abs().max() > 0 for layer in (vae.mu, vae.logvar, vae.leave))


# ---- training

def test_every_parameter_gets_a_gradient(vae):
    wav = noise(2, 8 * vae.config.hop)
    f0 = torch.full((2, wav.shape[1] // 80), 150.0) if vae.voice else None
    fake, losses = reconstruct(vae.train(), wav, f0, f0)
    assert fake.shape == wav.shape and set(losses) == ({"kl"} if f0 is None else {"kl", "outline", "pitch"})
    vae.zero_grad()
    (fake.square().mean() + sum(losses.values())).backward()
    assert [name for name, weight in vae.named_parameters() if weight.grad is None] == []
    assert all(weight.grad.isfinite().all() for weight in vae.parameters())
    vae.eval()


def test_the_source_uses_a_known_pitch():
    vae, wav = made(SMALL), noise(1, 6400)
    sounds = [reconstruct(vae, wav, torch.full((1, 80), hz), None)[0] for hz in (100.0, 200.0)]
    assert not torch.allclose(*sounds, atol=1e-4) and set(reconstruct(vae, wav, None, None)[1]) == {"kl", "outline"}


def test_a_few_steps_make_it_better():
    vae, wav = made(CONVOLUTIONS).train(), (2 * math.pi * 200 * torch.arange(1600) / 16000).sin()[None] * 0.5
    optimizer, losses = torch.optim.Adam(vae.parameters(), 3e-3), []
    for _ in range(40):
        fake, further = reconstruct(vae, wav, None, None)
        loss = (fake - wav).square().mean() + 1e-4 * further["kl"]
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# ---- recipes and files

def test_recipes_build_what_they_name():
    assert {"vocoder", "wavevae", "sigma-vae"} <= set(CODEC_RECIPES)
    assert CODEC_RECIPES["sigma-vae"].build().config.noise == "drawn" and CODEC_RECIPES["wavevae"].build().config.noise == "learned"
    with pytest.raises(CourseError, match="Recipes: vocoder, wavevae"): codec_recipe("wavvae")


def test_held_out_voices_stay_out(monkeypatch):
    monkeypatch.setattr(wavevae, "built_corpus", lambda name: "stories") # instead of corpora that must be built first
    training, checked = wavevae.codec_corpora()
    assert checked and not {row["speaker_id"] for row in checked} & set(HELD_OUT)
    assert not set(training[2].unique("speaker_id")) & set(HELD_OUT)


def test_a_corpus_that_is_not_built_says_how(monkeypatch, tmp_path):
    monkeypatch.setenv("ARDM_CACHE", str(tmp_path))
    with pytest.raises(CourseError, match="ardm-course data build voices"): wavevae.built_corpus("voices")


@torch.no_grad()
def test_plain_changes_names_only():
    vae, latents = made(SMALL), noise(1, 5, 6, scale=1.0)
    before, wav = vae.decode(latents), noise(1, 2000)
    coded = vae.encode(wav)
    assert plain(vae) is vae and torch.allclose(vae.decode(latents), before, atol=1e-5) and torch.allclose(vae.encode(wav), coded, atol=1e-5)
    assert not any("parametrizations" in name for name in vae.state_dict())
    assert plain(vae) is vae # a second time there is nothing to do


@torch.no_grad()
@pytest.mark.parametrize("config", [SMALL, CONVOLUTIONS, VAEConfig(16000, VOICE, (8, 8), (2,), 4, (8, 8), (2,), noise="drawn")])
def test_save_and_load(tmp_path, config):
    vae = plain(made(config))
    vae.fit_statistics([vae.encode(noise(1, 16000))])
    write_released(vae, tmp_path)
    again, wav = load_codec(tmp_path), noise(1, 4000, seed=1)
    assert again.config == config and not again.training
    assert torch.allclose(again.encode(wav), vae.encode(wav), atol=0.05) and torch.allclose(again.std, vae.std, rtol=1e-2)


@torch.no_grad()
def test_latents_come_in_units_of_what_the_decoder_forgives():
    vae, sounds = made(SMALL), [noise(16000), noise(24000)]
    vae.logvar.bias.copy_(torch.linspace(-6, -2, 6))
    fit_forgiveness(vae, iter(sounds))
    latents = torch.cat([vae.encode(wav[None])[0] for wav in sounds])
    assert latents.mean(0).abs().max() < 1e-3 and abs(latents.square().mean() - 1) < 0.01
    forgiven = torch.cat([name_latents(vae, vae.outline(wav[None]))[1][0] for wav in sounds], 1).exp().mean(1).sqrt()
    assert (forgiven / vae.std).std() / (forgiven / vae.std).mean() < 1e-4 # the same noise on every dimension
    drawn = made(replace(SMALL, noise="drawn"))
    assert torch.equal(fit_forgiveness(drawn, sounds).std, drawn.std[:1].expand(6)) # one scale for all, as VibeVoice


def test_measured_gives_a_wavevae_statistics_and_leaves_a_vocoder_alone(tmp_path):
    from ardm_course.corpus import load_corpus
    rows = load_corpus("stories", "dev", streaming=False).select(range(3))
    vae = measured(plain(made(SMALL)), [rows, rows], tmp_path)
    assert vae.mean.abs().max() > 0 and torch.allclose(load_codec(tmp_path).mean, vae.mean, atol=1e-2, rtol=1e-2)
    other = nn.Linear(1, 1)
    assert measured(other, [rows], tmp_path / "none") is other and not (tmp_path / "none").exists()


def test_files_that_do_not_fit(tmp_path):
    write_released(plain(made(SMALL)), tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CourseError, match="damaged"): load_codec_model(tmp_path)
    (tmp_path / "config.json").write_text('{"sample_rate": 16000, "colour": 1}')
    with pytest.raises(CourseError, match="colour"): load_codec_model(tmp_path)
    (tmp_path / "config.json").write_text('{"dim": 7}')
    with pytest.raises(CourseError, match="do not fit"): load_codec_model(tmp_path)
    with pytest.raises(CourseError, match="no checkpoint"): load_codec("no-such-codec")


@torch.no_grad()
def test_codecs_by_name():
    assert isinstance(load_codec("griffin-lim"), MelCodec)
    codec = load_codec("wavevae")
    assert isinstance(codec, WaveVAE) and (codec.sample_rate, codec.frame_rate) == (24000, 25)
    wav = noise(1, 9600, scale=0.05)
    assert codec.decode(codec.encode(wav)).shape == (1, 9600)
    mel = load_codec("vocoder")
    assert isinstance(mel, MelCodec) and mel.decode(mel.encode(noise(1, 4800))).shape == (1, 4800)


# ---- from corpus to released checkpoint, tiny

def test_a_tiny_recipe_from_corpus_to_release(tmp_path, monkeypatch):
    from ardm_course.corpus import load_corpus
    rows = load_corpus("stories", "dev", streaming=False).select(range(6))
    tiny = replace(CODEC_RECIPES["wavevae"], build=lambda: WaveVAE(SMALL), frame=80, adversary=replace(CODEC_RECIPES["wavevae"].adversary, begin=1, periods=(2,), windows=(512,)))
    monkeypatch.setitem(CODEC_RECIPES, "tiny", tiny)
    monkeypatch.setattr(wavevae, "codec_corpora", lambda corpora: ([rows], [rows[0]]))
    monkeypatch.setenv("ARDM_CACHE", str(tmp_path / "cache"))
    codec = wavevae.train_codec("tiny", tmp_path / "run", steps=2, batch_frames=2 * 128, validate_every=2, checkpoint_every=2, log_every=1)
    assert isinstance(codec, WaveVAE) and codec.std.min() > 0 and (tmp_path / "run" / "model" / "model.safetensors").is_file()
    monkeypatch.setattr(wavevae, "data_dir", lambda: tmp_path)
    target = wavevae.release_codec("tiny", tmp_path / "run", "A test.")
    card = (target / "README.md").read_text()
    assert "- A test." in card and "2 steps" in card and "4005, 3004, 3008" in card and "Apache-2.0" in card and "Not measured yet" in card
    assert torch.allclose(load_codec(target).mean, codec.mean, atol=1e-2, rtol=1e-2) and (target / "log.jsonl").read_text().count("\n") >= 1


@pytest.mark.parametrize("config", [SMALL, CONVOLUTIONS], ids=["mel", "samples"])
@torch.no_grad()
def test_a_codec_goes_on_from_a_trained_one(config, tmp_path):
    trained, other = plain(made(config)), WaveVAE(config).eval()
    write_released(trained, tmp_path / "trained")
    wavevae.begin_trained(other, tmp_path / "trained")
    latents = noise(1, 3, config.dim, scale=1.0)
    assert torch.allclose(other.decode(latents), trained.decode(latents), atol=1e-3)
    write_released(plain(WaveVAE(replace(config, dim=config.dim + 1))), tmp_path / "wider")
    with pytest.raises(CourseError, match="another kind of codec"): wavevae.begin_trained(other, tmp_path / "wider")


def test_a_card_quotes_what_was_measured(tmp_path, monkeypatch):
    import json
    monkeypatch.setattr(wavevae, "data_dir", lambda: tmp_path)
    (tmp_path / "results").mkdir()
    row = {"n": 3, "wer_moonshine": 0.0125, "wer_whisper": 0.02, "mos": 3.456, "pesq": None}
    (tmp_path / "results" / "codecs-real.json").write_text(json.dumps({"rows": {"input": row, "griffin-lim": row, "wavevae": row, "vocoder": row}}))
    table = wavevae.codec_reached("wavevae").splitlines()
    assert len(table) == 5 and table[4] == "| real | wavevae | 3 | 1.2 % | 2.0 % | 3.46 | - |"
