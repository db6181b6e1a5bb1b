"""The full system: every switch alone and all together keep the promises of the parts, and every system of the course trains, saves, speaks and streams."""
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch.nn import functional as F

from ardm_course import mela
from ardm_course.ardm import ARDMConfig, Utterance, begin, embed, fold, head_inputs, hear, read
from ardm_course.core import CourseError, count_parameters
from ardm_course.full import NAMES, OFF, Full, FullConfig, Memory, conditions, cost, ladder, sizes
from ardm_course.layout import Layout, Slot
from ardm_course.locdit import HeadConfig
from ardm_course.mela import MELAConfig, VoiceEmbedding, mix_voices, voice_vector
from ardm_course.neural import digest_of, find_checkpoint
from ardm_course.repa import TimeAlignment
from ardm_course.streaming import draw_in_turns, read_on, say_in_turns
from ardm_course.transformer import TransformerConfig
from ardm_course.tts import TTS, Prompt, begin_with, encode_prompt, load_model, save_model
from ardm_course.vocoder import MelCodec, MelCodecConfig
from ardm_course.voxcpm import VoxCPMConfig


def ear(wav, rate):
    "A speaker encoder of 8 numbers: how loud each eighth of the spectrum is."
    return F.normalize(torch.fft.rfft(wav[:24000]).abs()[:8000].view(8, -1).mean(1).log1p(), dim=0)


@pytest.fixture(autouse=True)
def encoder(monkeypatch): monkeypatch.setitem(mela.SPEAKER_ENCODERS, "ear", ear)


MEL = MelCodec(MelCodecConfig(vocoder="griffin-lim")).to_dict()
PLAIN = dict(backbone=TransformerConfig(32, 1, 2, 2, 64), speakers=("anna", "ben"), tokens_per_patch=2.0, codec=MEL)
HEAD = HeadConfig(width=32, layers=1, heads=2, hidden=64)
SMALL = PLAIN | dict(head=HEAD, encoder=TransformerConfig(32, 1, 2, 2, 64, causal=False), grid=8, residual_layers=1)
VOICE = dict(listener=TransformerConfig(16, 1, 2, 2, 32, causal=False), speaker_encoder="ear", speaker_dim=8, crop=16)
WHOLE = FullConfig(**SMALL, **VOICE, interleave=(4, 1))
SWITCHES = {"whole": WHOLE, **{f"no {name}": replace(WHOLE, **{name: off}) for name, off in OFF.items()}, "no voice": replace(WHOLE, speaker_dim=0, crop=0),
            "no name": replace(WHOLE, speaker_dim=0, crop=0, speakers=()), "everything off": replace(WHOLE, **OFF)}
SYSTEMS = {"ardm": ARDMConfig(**PLAIN, head=replace(HEAD, cond_dim=32)), "voxcpm": VoxCPMConfig(**SMALL), "mela": MELAConfig(**PLAIN, **VOICE, head=replace(HEAD, path="cosine", solver="ddim")), **SWITCHES}


def make(config=WHOLE):
    torch.manual_seed(0)
    model = config.build()
    for name, weight in model.head.named_parameters():
        if "modulation" in name or name.startswith("net.out"): torch.nn.init.normal_(weight, std=0.1)  # AdaLN-zero starts deaf
    if isinstance(model.speaker, VoiceEmbedding): torch.nn.init.normal_(model.speaker.known)
    return model.eval()


def speech(tokens=13, patches=7, seed=0, speaker=0):
    g = torch.Generator().manual_seed(seed)
    return Utterance(torch.randint(2, 60, (tokens,), generator=g), torch.randn(patches, 8, 80, generator=g), speaker, torch.randn(patches, 4, 5, generator=g), F.normalize(torch.rand(8, generator=g), dim=0))


def voice(model, utterance):  # what `speaker` embeds for an utterance that is folded alone
    if not model.clones: return utterance.speaker
    heard = model.fold([utterance]).speakers
    return model.speaker.vector(heard.speaker, heard.crop)[0].detach()


@torch.no_grad()
def states_of(model, *utterances):
    batch = model.fold(list(utterances))
    return read(model, batch, batch.patches).split([len(u.patches) for u in utterances])


def in_layout(config, share): return replace(config, interleaved_share=share)


# ---- one config

@pytest.mark.parametrize("name", OFF)
def test_a_part_is_one_field(name):
    off = replace(WHOLE, **{name: OFF[name]})
    assert {key for key, was in vars(WHOLE).items() if getattr(off, key) != was} <= {name, "head"}
    assert replace(off, **{name: getattr(WHOLE, name)}) == WHOLE  # and back on
    assert getattr(FullConfig(), name) != OFF[name]  # the default has every part


def test_the_condition_is_as_wide_as_what_the_head_reads():
    for name, config in SWITCHES.items():
        model = make(config)
        states, width = states_of(model, speech())[0], config.head.cond_dim
        assert width == 32 * (1 + bool(config.residual_layers) + config.voiced) == states.shape[1] - 32, name
        outside = torch.cat([states[:, :width], states[:, width:] + 1], -1)
        with torch.no_grad(): assert torch.equal(model.head.token(states), model.head.token(outside)) and not torch.equal(model.head.token(states), model.head.token(states + 1)), name


def test_everything_off_is_the_plain_ardm():
    ours, theirs = make(SWITCHES["everything off"]), make(replace(SYSTEMS["ardm"], head=replace(SYSTEMS["ardm"].head, history=False)))
    theirs.load_state_dict(ours.state_dict())
    batch, token = ours.fold([speech(), speech(5, 4, 1, 1)]), speech().tokens
    with torch.no_grad():
        for name, value in theirs(theirs.fold([replace(u, teacher=None) for u in (speech(), speech(5, 4, 1, 1))])).items():
            torch.manual_seed(1); mine = ours(batch)[name]
            torch.manual_seed(1); yours = theirs(batch)[name]
            assert torch.equal(mine, yours), name
        drawn = [list(model.draw(token, speaker=1, most=3, threshold=2.0, steps=2, generator=torch.Generator().manual_seed(0))) for model in (ours, theirs)]
    assert all(torch.equal(a.patch, b.patch) and a.stop == b.stop for a, b in zip(*drawn)) and batch.teacher is None


def test_without_voice_it_is_voxcpm():
    ours, theirs = make(SWITCHES["no voice"]), make(SYSTEMS["voxcpm"])
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(states_of(make(in_layout(SWITCHES["no voice"], 0.0)), speech())[0], states_of(theirs, speech())[0], atol=0, rtol=0)


@pytest.mark.parametrize("wrong, words", [({"apart": True, "time_token": True}, "two tokens"), ({"speakers": ()}, "at least one name")])
def test_configs_that_cannot_be(wrong, words):
    with pytest.raises(CourseError, match=words): replace(WHOLE, **wrong).build()


def test_version_2_without_a_voice():
    model = make(replace(SWITCHES["no voice"], apart=True, time_token=True, concat=True))
    assert model(model.fold([speech()]))["loss"].isfinite()


# ---- states

def test_conditions():
    states, told = torch.randn(2, 5, 9), torch.randn(2, 1, 3)
    both = conditions(states, told)
    assert torch.equal(both[..., :6], states[..., :6]) and torch.equal(both[..., 9:], states[..., 6:]) and torch.equal(both[..., 6:9], told.expand(2, 5, 3))
    assert conditions(states[..., :6], told).shape == (2, 5, 9)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("given", [0, 3])
def test_one_step_at_a_time_equals_all_at_once(name, given):
    model, u = make(in_layout(SWITCHES[name], 0.0)), speech()
    state, cache, positions = begin(model, u.tokens, voice(model, u), u.patches[:given], len(u.patches) - given)
    states = [state]
    for k, patch in enumerate(u.patches[given:-1]):
        with torch.no_grad(): states.append(hear(model, patch[None], positions[k:k + 1], cache))
    torch.testing.assert_close(torch.cat(states), states_of(model, u)[0][given:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name, config in SWITCHES.items() if config.interleave])
def test_in_turns_too(name):
    model, u = make(in_layout(SWITCHES[name], 1.0)), speech(13, 7)
    drawn, sample, place = [], model.head.sample, iter(u.patches)
    model.head.sample = lambda state, history, **options: (drawn.append(state), next(place)[None])[1]
    list(islice(draw_in_turns(model, u.tokens.tolist(), voice(model, u), threshold=2.0), 7))
    model.head.sample = sample
    torch.testing.assert_close(torch.cat(drawn), states_of(model, u)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_padding_changes_nothing(name, share):
    model, several = make(in_layout(SWITCHES[name], share)), [speech(4, 3), speech(17, 8, 1, int(name != "no name")), speech(2, 1, 2)]
    for alone, together in zip(several, states_of(model, *several)): torch.testing.assert_close(states_of(model, alone)[0], together, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_future_does_not_leak(name, share):
    model, u = make(in_layout(SWITCHES[name], share)), speech()
    batch = model.fold([u])  # the voice of both: a crop may tell of any patch, and is given at generation, too
    with torch.no_grad(): gap = (read(model, batch, batch.patches) - read(model, batch, batch.patches.index_fill(0, torch.tensor(4), 0.0))).abs().amax(1)
    assert gap[:5].max() < 1e-6 < gap[5:].max()


def test_in_turns_text_to_come_does_not_leak():
    model, u = make(in_layout(WHOLE, 1.0)), speech(13, 7)
    batch, other = model.fold([u]), model.fold([replace(u, tokens=torch.cat([u.tokens[:8], 61 - u.tokens[8:]]))])
    with torch.no_grad(): gap = (read(model, batch, batch.patches) - read(model, other, other.patches)).abs().amax(1)
    assert gap[:2].max() < 1e-6 < gap[2:].min()  # 4 tokens, a patch, 4 tokens, a patch; the third patch has heard more


# ---- what every part does

def test_the_stop_head_reads_the_plan_and_the_alignment_the_state_before_the_grid():
    model = make()
    model.alignment = TimeAlignment(32, 5)
    batch = model.fold([speech()])
    def taught(loss):
        model.zero_grad()
        model(batch)[loss].backward()
        return {name for name, part in model.named_children() if any(p.grad is not None and p.grad.any() for p in part.parameters())}
    assert taught("stop") >= {"backbone", "aggregator", "speaker", "grid", "stop"} and not taught("stop") & {"residual", "head", "alignment"}
    assert taught("alignment") >= {"backbone", "aggregator", "speaker", "alignment"} and not taught("alignment") & {"residual", "head", "grid", "stop"}
    assert taught("flow") >= {"backbone", "aggregator", "speaker", "grid", "residual", "head"}
    x, _ = embed(model, batch.tokens, batch.speakers, batch.patches, batch.gather)
    with torch.no_grad(): torch.testing.assert_close(model.aligned(read(model, batch, batch.patches)), model.backbone(x, batch.positions)[0, batch.state], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_the_alignment_is_a_switch(weight):
    model = make(replace(WHOLE, alignment_weight=weight))
    model.alignment = TimeAlignment(32, 5)
    assert ("alignment" in model(model.fold([speech()]))) == bool(weight)


@pytest.mark.parametrize("history", [True, False])
def test_the_history_is_a_switch(history):
    model = make(replace(WHOLE, history=history))
    state = states_of(model, speech())[0][:1]
    drawn = [model.head.sample(state, past, steps=2, generator=torch.Generator().manual_seed(0)) for past in (torch.zeros(1, 8, 80), torch.ones(1, 8, 80))]
    assert torch.equal(*drawn) != history


@pytest.mark.parametrize("name", SWITCHES)
def test_another_voice_is_another_condition(name):
    model, u = make(in_layout(SWITCHES[name], 0.0)), speech()
    a, b = states_of(model, u)[0], states_of(model, replace(u, voice=-u.voice, speaker=int(name != "no name")))[0]
    if not model.config.speakers: assert torch.equal(a, b)
    elif not model.clones or model.config.speaker_dim: assert not torch.allclose(a, b, atol=1e-4)
    if model.clones and model.config.speaker_dim: assert not torch.allclose(a[:, -64:-32], b[:, -64:-32], atol=1e-4)  # in the head's own slice


def test_the_head_listens_to_the_voice():
    model, history = make(), torch.zeros(1, 8, 80)
    state = states_of(model, speech())[0][:1]
    other = torch.cat([state[:, :64], state[:, 64:96] + 1, state[:, 96:]], -1)
    drawn = [model.head.sample(one, history, steps=2, generator=torch.Generator().manual_seed(0)) for one in (state, other)]
    assert not torch.allclose(*drawn, atol=1e-4)


def test_a_missing_speaker_embedding_is_told():
    with pytest.raises(CourseError, match="speaker embedding of every utterance"): make().fold([replace(speech(), voice=None)])


# ---- every system, one after the other

@pytest.mark.parametrize("name", SYSTEMS)
def test_it_trains_saves_speaks_and_streams(name, tmp_path):
    model = make(SYSTEMS[name]).train()
    model.alignment = TimeAlignment(32, 5)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = model(model.fold([speech(), speech(5, 4, 1, int(name != "no name"))]))
    losses["loss"].backward()
    optimizer.step()
    assert all(value.isfinite() for value in losses.values()) and all(p.isfinite().all() for p in model.parameters())
    missing = {key.split(".")[0] for key, p in model.named_parameters() if p.grad is None}
    unused = {"alignment": not model.config.alignment_weight, "head": not model.config.head.history}  # the layer that reads the previous patch
    assert missing == {part for part, idle in unused.items() if idle}

    save_model(model.eval(), tmp_path)
    tts = TTS.from_pretrained(tmp_path)
    assert type(tts.model) is type(model) and tts.model.config == model.config and "alignment" not in sizes(tts.model)
    spoken = tts("Hi to you.", voice=model.config.speakers and "ben" or None, steps=1, threshold=-1.0)
    assert torch.isfinite(spoken.wav).all() and spoken.stop_reason == "stop head" and len(spoken.latents) == 16
    streamed = torch.cat(list(tts.stream(iter("Hi to you.".split()), voice=model.config.speakers and "ben" or None, steps=1, threshold=-1.0)))
    assert torch.isfinite(streamed).all() and len(streamed)


@pytest.fixture(scope="module")
def tts():
    mela.SPEAKER_ENCODERS["ear"] = ear
    head = replace(HEAD, latent_dim=128, patch=4)
    return TTS(make(replace(WHOLE, head=head, codec={"checkpoint": "wavevae", "sha256": digest_of(find_checkpoint("wavevae"))})))


def tone(seconds=1.3, height=150):
    time = torch.arange(round(seconds * 24000)) / 24000
    return 0.3 * torch.sin(2 * torch.pi * height * time) * (1 + 0.5 * torch.sin(2 * torch.pi * 3 * time))


@pytest.mark.parametrize("prompt", [None, Prompt(tone(), 24000, ""), Prompt(tone(), 24000, "Oh my.")], ids=["a name", "a voice", "a beginning"])
def test_streamed_equals_offline_of_the_same_layout(tts, prompt):
    options = {"steps": 1, "threshold": 0.6, "seed": 3}
    text = "The tea is hot now."
    whole = say_in_turns(tts, text, begin_with(tts, "ben" if prompt is None else None, prompt), **options)
    streamed = torch.cat(list(tts.stream(iter(text.split()), voice="ben" if prompt is None else None, prompt=prompt, **options)))
    assert len(streamed) == len(whole.wav)
    torch.testing.assert_close(streamed, whole.wav, atol=1e-4, rtol=1e-4)


# ---- both ways to a voice

def test_a_recording_without_its_text_is_a_voice(tts):
    given = begin_with(tts, prompt=Prompt(tone(), 24000, ""))
    assert given.speaker.shape == (24,) and given.text == "" and given.patches.shape == (0, 4, 128)


def test_a_recording_with_its_text_is_gone_on_from_in_its_voice(tts):
    alone, begun = (begin_with(tts, prompt=Prompt(tone(), 24000, text)) for text in ("", "Oh my."))
    assert torch.equal(alone.speaker, begun.speaker) and begun.text == "Oh my." and torch.equal(begun.patches, encode_prompt(tts, Prompt(tone(), 24000, "Oh my.")))


def test_without_embeddings_a_recording_needs_its_text(tts):
    deaf = TTS(make(replace(tts.model.config, speaker_dim=0, crop=0)))
    with pytest.raises(CourseError, match="no text"): begin_with(deaf, prompt=Prompt(tone(), 24000, ""))
    assert begin_with(deaf, prompt=Prompt(tone(), 24000, "Oh my.")).speaker == 0


@pytest.mark.parametrize("off, size", [({"speaker_dim": 0}, 16), ({"crop": 0}, 8)])
def test_one_embedding_is_enough(tts, off, size):
    half = TTS(make(replace(tts.model.config, **off)))
    assert begin_with(half, prompt=Prompt(tone(), 24000, "")).speaker.shape == (size,)


def test_voices_mix(tts):
    mixed = mix_voices(tts, "anna", Prompt(tone(height=220), 24000, ""), 0.5)
    ends = [voice_vector(tts.model, begin_with(tts, "anna").speaker), begin_with(tts, prompt=Prompt(tone(height=220), 24000, "")).speaker]
    assert mixed.speaker.shape == (24,) and all(not torch.allclose(mixed.speaker, end, atol=1e-3) for end in ends)


# ---- prices

def test_sizes_are_the_whole():
    for name, config in SWITCHES.items(): assert sum(sizes(model := make(config)).values()) == count_parameters(model), name
    assert set(sizes(make())) == set(NAMES.values()) - {"alignment"}


def test_the_size_of_every_part():
    found, H, W, D, P = sizes(make()), 32, 32, 80, 8
    block = lambda width, hidden: 4 * width * width + 3 * width * hidden + 2 * width  # queries, keys, values, output; SwiGLU; two norms
    assert found["language model"] == found["residual model"] == block(32, 64) + 32
    assert found["grid"] == H * 8 + 8 + 8 * H + H and found["embeddings"] == (len(Slot) + WHOLE.vocabulary) * H and found["stop head"] == H * H + H + H + 1
    assert found["patch encoder"] == (D * W + W) + W + (block(32, 64) + 32) + (W * H + H) + P * D * H
    assert found["voice"] == (D * 16 + 16) + (block(16, 32) + 16) + (16 * 16 + 16) + (24 * H + H)
    assert sizes(make(replace(WHOLE, residual_layers=0)))["head"] == found["head"] - H * W == sizes(make(SWITCHES["no voice"]))["head"]


def test_the_ladder_climbs_one_field_at_a_time():
    rungs = list(ladder(WHOLE).values())
    assert rungs[0] == SWITCHES["everything off"] and rungs[-1] == WHOLE
    for name, below, above in zip(OFF, rungs, rungs[1:]): assert replace(above, **{name: OFF[name]}) == below and below != above


def test_the_cost_of_the_residual_model_is_two_operations_per_parameter():
    tokens, patches = torch.arange(2, 22), 10
    costs = [cost(make(config), tokens, patches, 50.0, repeats=1, steps=1) for config in (WHOLE, replace(WHOLE, residual_layers=0))]
    matrices = 4 * 32 * 32 + 3 * 32 * 64  # of one block
    positions, wider = 1 + 20 + 1 + patches - 1, 32 * 32 * patches  # the last patch is not heard; the head's condition is wider
    spoken = (costs[0].gflop - costs[1].gflop) * 1e9 * patches * 8 / 50
    assert 0.999 < spoken / (2 * (matrices * positions + wider)) < 1.15  # a counter may know of attention, too
    assert costs[0].parameters == count_parameters(make()) and costs[0].ms > 0


def test_the_cost_leaves_the_alignment_out():
    model = make()
    model.alignment = TimeAlignment(32, 5)
    assert cost(model, torch.arange(2, 6), 2, 50.0, repeats=1, steps=1).parameters == count_parameters(make())


def test_more_steps_and_guidance_cost_more():
    tokens, found = torch.arange(2, 12), {}
    for name, options in {"two steps": {"steps": 2}, "four steps": {"steps": 4}, "no guidance": {"steps": 2, "guidance": 1.0}}.items(): found[name] = cost(make(), tokens, 3, 50.0, repeats=1, **options).gflop
    assert found["no guidance"] < found["two steps"] < found["four steps"] < 2 * found["two steps"]
