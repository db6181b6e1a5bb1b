"""VoxCPM: every structure says step by step what it says at once, prompts go on without a seam, and bad endings are mended."""
import math
from dataclasses import replace
from itertools import chain, cycle, islice, repeat

import pytest
import torch

import ardm_course.fsq
from ardm_course.ardm import Drawn, Utterance, begin, embed, head_inputs, read
from ardm_course.core import CourseError, count_parameters
from ardm_course.locdit import HeadConfig
from ardm_course.neural import digest_of, find_checkpoint
from ardm_course.transformer import Transformer, TransformerConfig
from ardm_course.tts import TTS, Prompt, begin_with, context, draw, encode_prompt, load_model, save_model
from ardm_course.vocoder import MelCodec, MelCodecConfig
from ardm_course.voxcpm import Guard, LocEnc, VoxCPMConfig, collect_states, draw_guarded, ending, linear_probe, speak_safely, from_language, until_good

STRUCTURES = {"whole": {}, "no grid, no residual": {"grid": 0, "residual_layers": 0}, "deeper": {"grid": 0, "residual_layers": 0, "backbone": TransformerConfig(32, 3, 2, 2, 64)},
              "deaf residual": {"residual_hears": False}, "no residual": {"residual_layers": 0}}
VARIANTS = STRUCTURES | {"no grid": {"grid": 0}, "time in a token": {"time_token": True}, "token alone": {"flat": False},
                         "version 2": {"concat": True, "residual_rope": False, "flat": False, "time_token": True, "apart": True, "encoder": TransformerConfig(32, 1, 2, 2, 64, causal=False, head_dim=24)}}


def shape(**fields):
    small = dict(backbone=TransformerConfig(32, 1, 2, 2, 64), head=HeadConfig(latent_dim=128, patch=4, width=32, layers=1, heads=2, hidden=64),
                 encoder=TransformerConfig(32, 1, 2, 2, 64, causal=False), grid=8, residual_layers=1, tokens_per_patch=2.0)
    return VoxCPMConfig(**small | fields)


def make(config=None):
    torch.manual_seed(0)
    model = (config or shape()).build()
    for name, weight in model.head.named_parameters():
        if "modulation" in name or name.startswith("net.out"): torch.nn.init.normal_(weight, std=0.1)  # AdaLN-zero starts deaf
    return model.eval()


def speech(tokens=6, patches=7, seed=0, dim=128, patch=4):
    g = torch.Generator().manual_seed(seed)
    return Utterance(torch.randint(2, 60, (tokens,), generator=g), torch.randn(patches, patch, dim, generator=g))


def states_of(model, *utterances):
    batch = model.fold(list(utterances))
    with torch.no_grad(): return read(model, batch, batch.patches).split([len(u.patches) for u in utterances])


# ---- states

@pytest.mark.parametrize("name", VARIANTS)
def test_one_step_at_a_time_equals_all_at_once(name):
    model, u = make(shape(**VARIANTS[name])), speech()
    for given in (0, 3):  # without and with a prompt
        state, cache, positions = begin(model, u.tokens, 0, u.patches[:given], len(u.patches) - given)
        states = [state]
        for k, patch in enumerate(u.patches[given:-1]):
            with torch.no_grad(): states.append(model.think(model.aggregator(patch[None])[None], positions[k:k + 1], torch.ones(1, 1, dtype=torch.bool), cache)[:, -1])
        torch.testing.assert_close(torch.cat(states), states_of(model, u)[0][given:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_changes_nothing(name):
    model, several = make(shape(**VARIANTS[name])), [speech(4, 3), speech(9, 8, 1), speech(2, 1, 2)]
    for alone, together in zip(several, states_of(model, *several)):
        torch.testing.assert_close(states_of(model, alone)[0], together, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_future_does_not_leak(name):
    model, u = make(shape(**VARIANTS[name])), speech()
    changed = replace(u, patches=u.patches.index_fill(0, torch.tensor(4), 0.0))
    gap = (states_of(model, u)[0] - states_of(model, changed)[0]).abs().amax(1)
    assert gap[:5].max() < 1e-6 < gap[5:].max()  # a later state may be rounded to the same


@pytest.mark.parametrize("name", VARIANTS)
def test_it_trains(name):
    model = make(shape(**VARIANTS[name])).train()
    losses = model(model.fold([speech(), speech(3, 4, 1)]))
    losses["loss"].backward()
    silent = [key for key, p in model.named_parameters() if p.grad is None and not key.startswith("speaker")]
    assert losses["loss"].isfinite() and not [key for key in silent if "special" not in key]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_head_learns_how_wide_its_condition_is(name):
    model = make(shape(**VARIANTS[name]))
    states, width = states_of(model, speech())[0], model.config.head.cond_dim
    assert width == 32 * (2 if model.config.residual_layers else 1) == states.shape[1] - 32
    moved = torch.cat([states[:, :width], 1 + states[:, width:]], -1)
    with torch.no_grad(): assert torch.equal(model.head.token(states), model.head.token(moved)) and not torch.equal(model.head.token(states), model.head.token(1 + states))


def test_text_passes_as_it_is_and_patches_are_rounded():
    model, u = make(), speech()
    batch = model.fold([u])
    x, heard = embed(model, batch.tokens, batch.speakers, batch.patches, batch.gather)
    with torch.no_grad(): told, planned = model.backbone(x, batch.positions), model.think(x, batch.positions, heard)[..., :32]
    assert torch.equal(planned[~heard], told[~heard]) and torch.equal(planned[heard], model.grid(told)[heard]) and int(heard.sum()) == len(u.patches) - 1


def flow_gradient(model):
    kept, batch = [], model.fold([speech()])
    model.zero_grad()
    torch.manual_seed(0)
    hook = model.backbone.register_forward_hook(lambda part, inputs, out: (out.retain_grad(), kept.append(out))[1])
    model(batch)["flow"].backward()
    hook.remove()
    return kept[0].grad[0, 7:]  # positions of the patches: 6 tokens, TURN


def test_the_gradient_passes_the_grid(monkeypatch):
    assert flow_gradient(make()).abs().sum(-1).min() > 0
    monkeypatch.setattr(ardm_course.fsq, "round_ste", torch.round)
    assert not flow_gradient(make()).any()


def test_the_stop_head_reads_the_plan_only():
    model = make()
    model(model.fold([speech()]))["stop"].backward()
    assert all(p.grad is None or not p.grad.any() for part in (model.residual, model.head) for p in part.parameters())
    assert model.grid.down.weight.grad.any() and model.backbone.blocks[0].attention.qkv.weight.grad.any()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_alignment_reads_the_states_before_the_grid(name):
    model, u = make(shape(**VARIANTS[name])), replace(speech(), teacher=torch.ones(7, 1, 3))
    batch, asked = model.fold([u]), []
    model.alignment = lambda states, teacher: (asked.append(states), states.square().mean())[1]
    model(batch)["alignment"].backward()
    x, _ = embed(model, batch.tokens, batch.speakers, batch.patches, batch.gather)
    with torch.no_grad(): torch.testing.assert_close(asked[0], model.backbone(x, batch.positions)[0, batch.state], atol=1e-6, rtol=1e-5)
    assert all(p.grad is None or not p.grad.any() for part in (model.grid, model.residual, model.head) if part is not None for p in part.parameters())
    assert model.backbone.blocks[0].attention.qkv.weight.grad.any() and model.aggregator.frames.weight.grad.any()


def test_a_deaf_residual_hears_no_patch_but_through_the_plan():
    model = make(shape(residual_hears=False))
    heard, x, y = torch.ones(1, 3, dtype=torch.bool), torch.randn(1, 3, 32), torch.randn(1, 3, 32)
    model.grid.forward = lambda told: torch.zeros_like(told)
    with torch.no_grad(): assert torch.equal(model.think(x, torch.arange(3), heard)[..., :64], model.think(y, torch.arange(3), heard)[..., :64])
    model.config.residual_hears = True
    with torch.no_grad(): assert not torch.equal(model.think(x, torch.arange(3), heard)[..., :64], model.think(y, torch.arange(3), heard)[..., :64])


# ---- parts

def test_locenc_knows_order_and_keeps_patches_apart():
    torch.manual_seed(0)
    encoder, patches = LocEnc(shape().encoder, 64, 32), torch.randn(5, 4, 64)
    with torch.no_grad():
        assert not torch.allclose(encoder(patches), encoder(patches.flip(1)), atol=1e-3)
        torch.testing.assert_close(encoder(patches), torch.cat([encoder(p[None]) for p in patches]), atol=1e-5, rtol=1e-4)
        assert encoder(patches[:0]).shape == (0, 32)


def test_locenc_is_a_transformer_over_reader_and_frames_in_this_order():
    torch.manual_seed(0)
    encoder, patches = LocEnc(shape().encoder, 64, 32), torch.randn(5, 4, 64)
    with torch.no_grad():
        tokens = torch.cat([encoder.reader.expand(5, 1, -1), encoder.frames(patches)], 1)
        torch.testing.assert_close(encoder(patches), encoder.out(encoder.net(tokens)[:, 0]), atol=1e-5, rtol=1e-4)


def test_the_flat_layer_adds_what_one_matrix_says_of_the_whole_patch():
    torch.manual_seed(0)
    both, patches = LocEnc(shape().encoder, 64, 32, 4), torch.randn(5, 4, 64)
    alone = LocEnc(shape().encoder, 64, 32)
    alone.load_state_dict({name: weight for name, weight in both.state_dict().items() if not name.startswith("flat")})
    with torch.no_grad(): torch.testing.assert_close(both(patches) - alone(patches), patches.flatten(1) @ both.flat.weight.T, atol=1e-5, rtol=1e-4)
    assert count_parameters(both) - count_parameters(alone) == 4 * 64 * 32 and VoxCPMConfig().flat and both(patches[:0]).shape == (0, 32)


def test_time_in_a_token():
    model = make(shape(time_token=True))
    state, history = torch.randn(2, 64), torch.randn(2, 4, 128)
    drawn = [model.head.sample(state, history, steps=2, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*drawn) and drawn[0].shape == (2, 4, 128) and not any("modulation" in name for name, _ in model.head.named_parameters())
    a, b = (model.head.net.modulations(torch.tensor([t, t]), torch.zeros(2, 32))[0] for t in (0.1, 0.9))
    assert a.shape == (2, 1, 32) and not torch.allclose(a, b)


def test_published_size():
    with torch.device("meta"):
        paper = VoxCPMConfig(vocabulary=73448, backbone=TransformerConfig(1024, 24, 16, 2, 4096), head=HeadConfig(latent_dim=64, patch=2, width=1024, layers=4, heads=16, hidden=4096),
                             encoder=TransformerConfig(1024, 4, 16, 2, 4096, causal=False), grid=256, residual_layers=6, flat=False, time_token=True).build()
    parts = [paper.text, paper.backbone, paper.residual, paper.aggregator.net, paper.head.net.net]
    assert [round(count_parameters(part) / 1e6, 1) for part in parts] == [75.2, 358.7, 89.7, 59.8, 59.8] and round(sum(map(count_parameters, parts)) / 1e6) == 643


def test_published_size_of_version_2():
    with torch.device("meta"):
        paper = VoxCPMConfig(vocabulary=73448, backbone=TransformerConfig(2048, 28, 16, 2, 6144), head=HeadConfig(latent_dim=64, patch=4, width=1024, layers=12, heads=16, hidden=4096),
                             encoder=TransformerConfig(1024, 12, 16, 2, 4096, causal=False, head_dim=128), grid=512, residual_layers=8, concat=True, residual_rope=False, flat=False,
                             time_token=True, apart=True).build()
    parts = {"text": (paper.text, 150), "TSLM": (paper.backbone, 1321), "RALM": (paper.residual, 377), "LocEnc": (paper.aggregator.net, 208), "LocDiT": (paper.head.net.net, 208)}
    for name, (part, millions) in parts.items(): assert count_parameters(part) / 1e6 == pytest.approx(millions, abs=0.6), name
    large = sum(count_parameters(part) for part, _ in parts.values())
    assert round(large / 1e9, 2) == 2.26
    H, W, grid = 2048, 1024, 512  # what else there is, by name
    others = {"join": 2 * H * H + H, "grid": 2 * H * grid + grid + H, "stop": H * H + H + H + 1, "LocEnc's ends": 64 * W + W + W + W * H + H, "two conditions": 2 * (H * W + W), "null": 2 * W,
              "time": 2 * (W * W + W), "patches in and out": 2 * (64 * W + W) + W * 64 + 64, "slots and a voice": 8 * H}
    assert count_parameters(paper) - large == sum(others.values())


@pytest.mark.parametrize("bias", [False, True])
def test_a_text_model_as_beginning(bias):
    torch.manual_seed(1)
    backbone, table = Transformer(TransformerConfig(48, 2, 4, 2, 96, 1e6, bias=bias, rope_factors=tuple(1 + k / 9 for k in range(6)))).eval(), torch.randn(70, 48)
    model = from_language(shape(residual_layers=1), (backbone, table)).eval()
    assert model.config.vocabulary == 70 and model.config.head.cond_dim == 96 and model.residual.config.width == 48 and len(model.residual.blocks) == 1
    x, u = torch.randn(1, 5, 48), speech()
    with torch.no_grad():
        assert torch.equal(model.backbone(x), backbone(x)) and torch.equal(model.text(torch.tensor([3, 69])), table[[3, 69]])
        state, _, _ = begin(model, u.tokens, 0, u.patches[:3], 1)
        torch.testing.assert_close(state[0], states_of(model, u)[0][3], atol=1e-5, rtol=1e-4)
    model.train()(model.fold([u]))["loss"].backward()
    assert model.backbone.blocks[0].attention.qkv.weight.grad.any() and not backbone.blocks[0].attention.qkv.weight.grad


@pytest.mark.parametrize("wrong", [{"residual_layers": 0, "time_token": True}, {"time_token": False}])
def test_three_tokens_need_what_they_carry(wrong):
    with pytest.raises(CourseError, match="apart"): shape(apart=True, **wrong)


def test_version_2_reads_plan_residual_and_time_apart():
    model = make(shape(time_token=True, apart=True))
    seen, net = [], model.head.net
    net.net.register_forward_hook(lambda part, inputs, out: seen.append(inputs[0]))
    states, history, t = torch.randn(2, 96), torch.randn(2, 4, 128), torch.tensor([0.3, 0.3])
    with torch.no_grad():
        token = model.head.token(states)
        net(torch.randn(2, 4, 128), net.modulations(t, token), token, net.past(history))
        plan, residual, time = seen[0][:, :3].unbind(1)
        torch.testing.assert_close(plan, net.cond.plan(states[:, :32]), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(residual, net.cond.residual(states[:, 32:64]), atol=1e-6, rtol=1e-5)
        assert seen[0].shape == (2, 11, 32) and torch.equal(time[0], time[1]) and not torch.equal(plan[0], plan[1])


def test_joined_by_one_matrix():
    model, u = make(shape(concat=True)), speech()
    batch, heard_by = model.fold([u]), []
    model.residual.register_forward_hook(lambda part, inputs, out: heard_by.append(inputs[0]))
    x, heard = embed(model, batch.tokens, batch.speakers, batch.patches, batch.gather)
    with torch.no_grad():
        planned = model.think(x, batch.positions, heard)[..., :32]
        torch.testing.assert_close(heard_by[0], torch.cat([planned, x * heard[..., None]], -1) @ model.join.weight.T + model.join.bias, atol=1e-5, rtol=1e-4)


def test_a_residual_without_positions_knows_order_only_by_what_it_may_see():
    model, x, heard = make(shape(residual_rope=False, residual_layers=1, grid=0)), torch.randn(1, 6, 32), torch.ones(1, 6, dtype=torch.bool)
    apart, seen = [0, 3, 1, 2, 4, 5], []
    model.backbone = torch.nn.Module()
    model.backbone.forward = lambda x, positions, cache: x
    with torch.no_grad():
        for order in ([*range(6)], apart): seen.append(model.think(x[:, order], torch.arange(6), heard)[0, -1, 32:64])
        torch.testing.assert_close(*seen, atol=1e-5, rtol=1e-4)
        model.config.residual_rope = True
        assert not torch.allclose(model.think(x[:, apart], torch.arange(6), heard)[0, -1, 32:64], seen[0], atol=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name, tmp_path):
    model = make(shape(**VARIANTS[name]))
    save_model(model, tmp_path)
    back = load_model(tmp_path)
    assert type(back) is type(model) and back.config == model.config and back.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(states_of(back, speech())[0], states_of(model, speech())[0], atol=0.2, rtol=0.2)


# ---- defects of other implementations

def test_one_state_of_the_head_per_patch():
    model, several = make(), [speech(30, 3), speech(20, 5, 1)]
    batch = model.fold(several)
    x0, cond, history = head_inputs(batch, read(model, batch, batch.patches))
    assert len(x0) == len(cond) == len(history) == 8


def test_guidance_is_no_number_of_steps(tts):
    calls, forward = [], tts.model.head.net.forward
    tts.model.head.net.forward = lambda xt, *rest: (calls.append(len(xt)), forward(xt, *rest))[1]
    next(draw(tts, "Hi.", steps=3, guidance=2.0))
    assert calls == [2, 2, 2]
    calls.clear()
    next(draw(tts, "Hi.", steps=2, guidance=1.0))
    del tts.model.head.net.forward
    assert calls == [1, 1]


# ---- prompts

@pytest.fixture(scope="module")
def tts():
    return TTS(make(shape(codec={"checkpoint": "wavevae", "sha256": digest_of(find_checkpoint("wavevae"))})))


def tone(seconds=1.0, rate=24000):
    time = torch.arange(round(seconds * rate)) / rate
    return 0.3 * torch.sin(2 * math.pi * 150 * time) * (1 + 0.5 * torch.sin(2 * math.pi * 3 * time))


PROMPT = Prompt(tone(1.3), 24000, "Hello there.")


@pytest.mark.parametrize("samples", [3840 * 6, 3840 * 6 + 1, 3840 * 6 - 1, 3840 * 5 + 960])
def test_silence_stands_before_a_prompt(tts, samples):
    wav = tone(2.0)[:samples]
    patches = encode_prompt(tts, Prompt(wav, 24000, "Hello."))
    missing = -samples % 3840
    assert patches.shape == ((samples + missing) // 3840, 4, 128)
    with torch.no_grad(): torch.testing.assert_close(patches.flatten(0, 1), tts.codec.encode(torch.cat([torch.zeros(missing), wav])[None])[0])


@pytest.mark.parametrize("prompt, words", [(Prompt(tone(0.3), 24000, "Hi."), "0.3 s"), (Prompt(tone(16), 24000, "Hi."), "16.0 s"), (Prompt(tone()[None], 24000, "Hi."), "one channel"),
                                           (Prompt(tone() * math.nan, 24000, "Hi."), "finite"), (Prompt(tone(), 24000, " ... "), "no text")])
def test_prompts_that_cannot_be(tts, prompt, words):
    with pytest.raises(CourseError, match=words): tts("Hi.", prompt=prompt)


def test_the_first_history_is_the_prompts_last_patch(tts):
    asked, sample = [], tts.model.head.sample
    tts.model.head.sample = lambda state, history, **options: (asked.append(history), sample(state, history, **options))[1]
    given = begin_with(tts, prompt=PROMPT)
    first = next(draw(tts, "Hi.", given, steps=1))
    next(draw(tts, "Hi.", steps=1))
    del tts.model.head.sample
    assert torch.equal(asked[0][0], given.patches[-1]) and not asked[1].any()
    assert not torch.allclose(first.patch, given.patches[-1], atol=0.05)  # no copy
    with torch.no_grad(): assert torch.isfinite(first.patch).all() and torch.is_grad_enabled() is False
    assert torch.is_grad_enabled()


def test_the_prompt_decides_what_comes(tts):
    other = Prompt(0.5 * PROMPT.wav.flip(0), 24000, PROMPT.text)
    a, b, c = (next(draw(tts, "Hi.", begin_with(tts, prompt=prompt), steps=2, seed=0)).patch for prompt in (PROMPT, PROMPT, other))
    assert torch.equal(a, b) and not torch.allclose(a, c, atol=1e-3)


def mel_tts():
    config = shape(head=HeadConfig(latent_dim=80, patch=8, width=32, layers=1, heads=2, hidden=64), codec=MelCodec(MelCodecConfig(vocoder="vocoder")).to_dict())
    return TTS(make(config))


@pytest.mark.parametrize("kind", ["wavevae", "mel"])
def test_a_stream_that_goes_on_equals_the_whole(tts, kind):
    tts, options = tts if kind == "wavevae" else mel_tts(), dict(prompt=PROMPT, steps=1, guidance=1.0, threshold=2.0)
    kept, tts.model.draw = tts.model.draw, lambda tokens, **rest: islice(type(tts.model).draw(tts.model, tokens, **rest), 7)  # longer than three patches
    try:
        with torch.no_grad(): whole = tts("Hi.", **options).wav
        stream = torch.cat(list(tts.stream("Hi.", **options)))
    finally: tts.model.draw = kept
    assert len(whole) == 7 * 3840
    torch.testing.assert_close(stream, whole, atol=1e-5, rtol=1e-4)


# ---- guard and retry

class Script(torch.nn.Module):
    "A stop head that answers what it was told to."
    def __init__(self, answers): super().__init__(); self.answers = iter(answers)
    def forward(self, states): return states.new_full((*states.shape[:-1], 1), 9.0 if next(self.answers) else -9.0)


@pytest.fixture
def scripted(tts):
    "Set what the stop head answers and which patches are drawn, one after the other over all attempts."
    kept, given = tts.model.stop, begin_with(tts, prompt=PROMPT)
    with torch.no_grad(): silence = tts.codec.encode(torch.zeros(1, 24000))[0, -4:]
    def script(answers, quiet_from=None):
        talk = cycle(given.patches[2:])
        patches = talk if quiet_from is None else chain(islice(talk, quiet_from), repeat(silence))
        tts.model.stop, tts.model.head.sample = Script(answers), lambda state, history, **options: next(patches)[None]
        return given
    yield script
    tts.model.stop = kept
    del tts.model.head.sample


TEXT = "The kettle is boiling."  # 23 tokens


def at(step): return [False] * (step - 1) + [True]


@pytest.mark.parametrize("answers, quiet_from, reason, seconds", [(at(8), None, "stop head", 1.28), (at(2), None, "too early", 0.32), (repeat(False), None, "length limit", 4.48), (repeat(False), 4, "silence", None),
                                                                 (at(16), 3, "silence", None)])
def test_the_guard_ends_a_generation(tts, scripted, answers, quiet_from, reason, seconds):
    drawn = list(draw_guarded(tts, TEXT, scripted(answers, quiet_from)))
    assert drawn[-1].reason == reason and all(d.reason is None for d in drawn[:-1])
    spoken = 0.16 * len(drawn)
    assert spoken == pytest.approx(seconds) if seconds else 0.16 * quiet_from + 1.3 < spoken < 0.16 * quiet_from + 2.2


def test_the_threshold_is_the_guards(tts, scripted):
    assert len(list(draw_guarded(tts, TEXT, scripted(repeat(True)), Guard(threshold=2.0, least=0.0, most=0.02)))) == math.ceil(1.46 / 0.16)


def test_bad_endings_are_drawn_again(tts, scripted):
    scripted(at(2) + at(2) + at(10))
    spoken = speak_safely(tts, TEXT, prompt=PROMPT)
    assert spoken.stop_reason == "stop head" and spoken.timings["retries"] == 2 and len(spoken.wav) == 10 * 3840 == 960 * len(spoken.latents)


def test_a_hopeless_case_is_told(tts, scripted):
    scripted(cycle(at(2)))
    spoken = speak_safely(tts, TEXT, prompt=PROMPT, retries=1)
    assert spoken.stop_reason == "too early" and spoken.timings["retries"] == 1


def test_every_piece_has_its_own_retries(tts, scripted):
    long = "The kettle is boiling and the tea is on the table of the old cook. " * 2
    scripted(at(2) + at(12) + at(2) + at(12))
    spoken = speak_safely(tts, long, prompt=PROMPT)
    assert spoken.timings["retries"] == 2 and len(spoken.wav) == 24 * 3840 + 3600


def test_the_same_seed_safely_spoken(tts):
    a, b = (speak_safely(tts, "Hi.", prompt=PROMPT, guard=Guard(threshold=-1.0, least=0.0), steps=1) for _ in range(2))
    plain = tts("Hi.", prompt=PROMPT, threshold=-1.0, steps=1)
    assert torch.equal(a.wav, b.wav) and torch.equal(a.wav, plain.wav)  # a good end at once is what the plain call says


@pytest.mark.parametrize("reason, seconds, quiet, said", [(None, 2.0, 0.0, None), ("stop head", 2.0, 0.0, "stop head"), ("stop head", 0.3, 0.0, "too early"), (None, 0.3, 0.0, None), (None, 4.0, 0.0, "length limit"),
                                                         ("stop head", 4.1, 0.0, "stop head"), ("length limit", 2.0, 0.0, "length limit"), ("stop head", 2.0, 1.5, "silence"), (None, 2.0, 1.4, None)])
def test_ending(reason, seconds, quiet, said): assert ending(reason, seconds, quiet, 20, Guard()) == said


@pytest.mark.parametrize("reasons, tried", [(["stop head"], [3]), (["silence", "stop head"], [3, 4]), (["too early"] * 9, [3, 4, 5])])
def test_until_good(reasons, tried):
    asked = []
    drawn, count = until_good(lambda seed: (asked.append(seed), [Drawn(torch.zeros(1, 1), 0.5, reasons[len(asked) - 1])])[1], 3, 2)
    assert asked == tried and count == len(tried) - 1 and drawn[-1].reason == reasons[len(tried) - 1]


# ---- probes

@pytest.mark.parametrize("name", VARIANTS)
def test_collected_states(name):
    model, several = make(shape(**VARIANTS[name])), [speech(), speech(3, 2, 1)]
    found = collect_states(model, several)
    assert list(found.parts) == ["LocEnc", "TSLM"] + ["FSQ"] * bool(model.config.grid) + ["RALM"] * bool(model.config.residual_layers)
    assert found.utterance.tolist() == [0] * 6 + [1] and found.patch.tolist() == [*range(6), 0] and all(len(part) == 7 for part in found.parts.values())
    with torch.no_grad(): torch.testing.assert_close(found.parts["LocEnc"][:6], model.aggregator(several[0].patches[:6]), atol=1e-5, rtol=1e-4)
    if "RALM" in found.parts: torch.testing.assert_close(found.parts["RALM"][:6], states_of(model, several[0])[0][1:, 32:64], atol=1e-5, rtol=1e-4)


def test_states_are_collected_in_one_pass():
    model, calls = make(), []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    found = collect_states(model, [speech()])
    assert len(calls) == 1
    torch.testing.assert_close(found.parts["TSLM"], model.aligned(states_of(model, speech())[0])[1:], atol=1e-5, rtol=1e-4)


def test_a_probe_finds_what_is_there_and_only_that():
    pytest.importorskip("sklearn")
    g = torch.Generator().manual_seed(0)
    labels, truth, centres = torch.randint(4, (300,), generator=g), torch.randint(4, (200,), generator=g), 3 * torch.randn(4, 12, generator=g)
    noise = lambda n: torch.randn(n, 12, generator=g)
    assert linear_probe(centres[labels] + noise(300), labels, centres[truth] + noise(200), truth) > 0.95
    assert linear_probe(noise(300), labels, noise(200), truth) < 0.45
