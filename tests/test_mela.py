"""MELA: two states for every patch whatever the layout, a voice from a crop, a table or a vector, and nothing leaks but what the crop tells."""
import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch.nn import functional as F

from ardm_course import mela
from ardm_course.ardm import ARDMConfig, SpeechData, Utterance, begin, embed, head_inputs, hear, read
from ardm_course.core import CourseError, count_parameters
from ardm_course.locdit import HeadConfig
from ardm_course.mela import (MELA, Memory, MELAConfig, Voices, crop_frames, hear_speaker, mix_voices, on_sphere, paper_shape, recorded_voices, slerp,
                              states_before, voice_vector)
from ardm_course.training import TrainConfig, Trainer, training_steps
from ardm_course.transformer import TransformerConfig, load_qwen2
from ardm_course.tts import TTS, Prompt, begin_with, draw, say
from ardm_course.vocoder import MelCodec, MelCodecConfig
from ardm_course.voxcpm import from_language


def ear(wav, rate):
    "A speaker encoder of 8 numbers: how loud each eighth of the spectrum is."
    return F.normalize(torch.fft.rfft(wav[:24000]).abs()[:8000].view(8, -1).mean(1).log1p(), dim=0)


@pytest.fixture(autouse=True)
def encoder(monkeypatch): monkeypatch.setitem(mela.SPEAKER_ENCODERS, "ear", ear)


VARIANTS = {"whole": {}, "no utterance encoder": {"crop": 0}, "no speaker embedding": {"speaker_dim": 0}, "the language model hears no voice": {"voice_heard": False},
            "plain positions": {"tokens_per_patch": 0.0}, "in turns": {"interleave": (2, 1), "interleaved_share": 1.0}}


def shape(**fields):
    small = dict(backbone=TransformerConfig(32, 2, 2, 2, 64), head=HeadConfig(path="cosine", solver="ddim", width=32, layers=1, heads=2, hidden=64), speakers=("anna", "ben"),
                 listener=TransformerConfig(16, 1, 2, 2, 32, causal=False), speaker_encoder="ear", speaker_dim=8, crop=16, tokens_per_patch=2.0)
    return MELAConfig(**small | fields)


def make(config=None):
    torch.manual_seed(0)
    model = (config or shape()).build()
    for name, weight in model.head.named_parameters():
        if "modulation" in name or name.startswith("net.out"): torch.nn.init.normal_(weight, std=0.1)  # AdaLN-zero starts deaf
    torch.nn.init.normal_(model.speaker.known)
    return model.eval()


def speech(tokens=6, patches=7, seed=0, speaker=0):
    g = torch.Generator().manual_seed(seed)
    return Utterance(torch.randint(2, 60, (tokens,), generator=g), torch.randn(patches, 8, 80, generator=g), speaker, voice=F.normalize(torch.rand(8, generator=g), dim=0))


@torch.no_grad()
def states_of(model, *utterances):
    batch = model.fold(list(utterances))
    return read(model, batch, batch.patches).split([len(u.patches) for u in utterances])


@torch.no_grad()
def vector_of(model, utterance):
    voices = model.fold([utterance]).speakers
    return model.speaker.vector(voices.speaker, voices.crop)[0]


# ---- states

@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "in turns"])
@pytest.mark.parametrize("given", [0, 3])
def test_one_step_at_a_time_equals_all_at_once(name, given):
    model, u = make(shape(**VARIANTS[name])), speech()
    with torch.no_grad():
        state, cache, positions = begin(model, u.tokens, vector_of(model, u), u.patches[:given], len(u.patches) - given)
        states = [state, *[hear(model, patch[None], positions[k:k + 1], cache) for k, patch in enumerate(u.patches[given:-1])]]
    torch.testing.assert_close(torch.cat(states), states_of(model, u)[0][given:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_any_layout_in_pieces_equals_the_whole(name):
    model = make(shape(**VARIANTS[name]))
    batch = model.fold([speech()])
    with torch.no_grad():
        x, heard = embed(model, batch.tokens, batch.speakers, batch.patches, batch.gather)
        whole = model.think(x, batch.positions, heard)
        for size in (1, 4):
            cache = model.memory(x.shape[1])
            parts = [model.think(*(part.split(size, 1)[k] for part in (x, batch.positions, heard)), cache) for k in range(-(-x.shape[1] // size))]
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)


def test_the_state_before_is_the_one_that_drew_the_previous_patch():
    for name in VARIANTS:
        states = states_of(make(shape(**VARIANTS[name])), speech())[0]
        assert torch.equal(states[1:, 32:64], states[:-1, :32]) and not states[0, 32:64].any(), name


def test_in_turns_the_neighbour_is_another_one():
    model, u = make(shape(**VARIANTS["in turns"])), speech(6, 7)
    batch = model.fold([u])
    apart = batch.state.diff()
    assert apart.max() > 1 and torch.equal(states_of(model, u)[0][1:, 32:64], states_of(model, u)[0][:-1, :32])


def test_states_before_by_hand():
    heard, states = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 0]]).bool(), torch.arange(1.0, 9)[None, :, None]
    memory = Memory(None, *torch.zeros(2, 1, 1, 1))
    assert states_before(states, heard, memory).flatten().tolist() == [0, 0, 2, 3, 3, 3, 6, 6] and memory.last.item() == 8 and memory.drew.item() == 6
    assert states_before(states[:, :2], heard[:, :2], memory).flatten().tolist() == [6, 6]  # it goes on


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_changes_nothing(name):
    model, several = make(shape(**VARIANTS[name])), [speech(4, 3), speech(9, 8, 1, 1), speech(2, 2, 2)]
    for alone, together in zip(several, states_of(model, *several)):
        torch.testing.assert_close(states_of(model, alone)[0], together, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_future_leaks_through_the_crop_alone(name):
    model, u = make(shape(**VARIANTS[name])), speech(6, 9)
    gap = lambda place: (states_of(model, u)[0] - states_of(model, replace(u, patches=u.patches.index_fill(0, torch.tensor(place), 0.0)))[0]).abs().amax(1)
    outside, inside = gap(7), gap(4)  # the middle of nine patches is in the crop of two
    assert outside[:8].max() < 1e-6 < outside[8]
    assert (inside[:5].max() > 1e-4) == bool(model.config.crop)


@pytest.mark.parametrize("name", VARIANTS)
def test_it_trains(name):
    model = make(shape(**VARIANTS[name])).train()
    losses = model(model.fold([speech(), speech(3, 4, 1, 1)]))
    losses["loss"].backward()
    silent = [key for key, weight in model.named_parameters() if weight.grad is None]
    assert losses["loss"].isfinite() and not silent


def test_it_learns():
    model = make(shape(patch_share=1.0, head=HeadConfig(path="cosine", solver="ddim", width=32, layers=1, heads=2, hidden=64, cond_dropout=0.0))).train()
    few, optimizer, losses = [replace(speech(4, 4, k), patches=torch.randn(4, 1, 1, generator=torch.Generator().manual_seed(k)).expand(4, 8, 80)) for k in range(2)], torch.optim.AdamW(model.parameters(), 3e-3), []
    torch.manual_seed(0)
    for _ in range(50):
        losses.append(model(model.fold(few))["flow"])
        optimizer.zero_grad(); losses[-1].backward(); optimizer.step()
    assert sum(losses[-8:]) < 0.75 * sum(losses[:8])


@pytest.mark.parametrize("wrong, words", [({"input_noise": 0.1}, "clean"), ({"speakers": ()}, "speakers"), ({"crop": 0, "speaker_dim": 0}, "speaker_dim")])
def test_configs_that_cannot_be(wrong, words):
    with pytest.raises(CourseError, match=words): shape(**wrong)


def test_what_is_heard_is_clean():
    model, u, heard = make().train(), speech(), []
    model.aggregator.register_forward_pre_hook(lambda part, inputs: heard.append(inputs[0]))
    model(model.fold([u]))
    assert torch.equal(heard[0], u.patches)


# ---- head

@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("target", ["v", "x0", "eps"])
@pytest.mark.parametrize("solver", ["euler", "ddim"])
def test_every_objective_trains_and_draws(path, target, solver):
    model = make(shape(head=HeadConfig(path=path, target=target, solver=solver, width=32, layers=1, heads=2, hidden=64)))
    batch = model.fold([speech()])
    x0, states, history = head_inputs(batch, read(model, batch, batch.patches))
    assert model.head.loss(x0, states, history).isfinite().all() and model.head.sample(states, history, steps=3).isfinite().all()


def test_one_network_read_three_ways_draws_the_same():
    model, drawn = make(), {}
    batch = model.fold([speech()])
    x0, states, history = head_inputs(batch, read(model, batch, batch.patches))
    net, grid = model.head.net.forward, None
    cosine, sine = lambda t: (t * math.pi / 2).cos(), lambda t: (t * math.pi / 2).sin()
    times = []
    model.head.net.modulations = lambda t, cond: (times.append(t), type(model.head.net).modulations(model.head.net, t, cond))[1]
    for target in ("v", "x0"):
        model.head.config.target, calls = target, iter(range(10))
        def forward(xt, *rest):
            v, t = net(xt, *rest), times[-1].view(10, -1)[next(calls), :, None, None]
            return v if target == "v" else cosine(t) * xt - sine(t) * v * 2 / math.pi
        model.head.net.forward = forward
        drawn[target] = model.head.sample(states, history, guidance=1.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn["v"], drawn["x0"], atol=1e-4, rtol=1e-3)


def test_one_ddim_step_to_the_end_is_the_clean_guess():
    model = make()
    batch = model.fold([speech()])
    _, states, history = head_inputs(batch, read(model, batch, batch.patches))
    with torch.no_grad():
        x1 = torch.randn(history.shape, generator=torch.Generator().manual_seed(0))
        token, past = model.head.token(states), model.head.net.past(history)
        v = model.head.net(x1, model.head.net.modulations(torch.ones(len(x1)), token), token, past)
    drawn = model.head.sample(states, history, guidance=1.0, steps=1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, -v * 2 / math.pi, atol=1e-5, rtol=1e-4)  # at t = 1: x0 = -2 v / pi; Euler would give x1 - v


def test_every_part_of_the_condition_counts():
    model, g = make(), torch.Generator().manual_seed(1)
    states, history = torch.randn(4, 96, generator=g), torch.randn(4, 8, 80, generator=g)
    sample = lambda states, history: model.head.sample(states, history, guidance=1.0, steps=2, generator=torch.Generator().manual_seed(0))
    plain = sample(states, history)
    for start in (0, 32, 64): assert (sample(states.index_fill(1, torch.arange(start, start + 32), 0.0), history) - plain).abs().max() > 1e-3
    assert (sample(states, 0 * history) - plain).abs().max() > 1e-3
    free = model.head.sample(states, history, guidance=0.0, steps=2, generator=torch.Generator().manual_seed(0))
    other = model.head.sample(states.flip(0), history, guidance=0.0, steps=2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(free, other)  # without a condition neither states nor voice are left


def test_old_and_new_frames_have_their_own_condition():
    net, now, before, voice = make().head.net, *torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(0))
    a, b = net.cond(torch.cat([now, before, voice], -1)).chunk(2, -1), net.cond(torch.cat([before, now, voice], -1)).chunk(2, -1)
    assert torch.equal(a[0], b[1]) and torch.equal(a[1], b[0]) and len(net.position) == len(net.cos) == 16


# ---- voices

@pytest.mark.parametrize("T, length", [(40, 8), (20, 16), (9, 12), (1, 3), (8, 96)])
def test_a_crop_is_one_stretch_and_at_most_half(T, length):
    frames = torch.arange(float(T))[:, None].expand(T, 80)
    torch.manual_seed(0)
    draws = torch.stack([crop_frames(frames, length) for _ in range(300)])[..., 0]
    size = min(length, max(1, T // 2))
    assert draws.shape == (300, length) and draws.min() == 0 and draws.max() == T - 1
    assert all(len(set(draw.tolist())) == size and draw.max() - draw.min() == size - 1 for draw in draws)
    assert torch.equal(crop_frames(frames, length, random=False), crop_frames(frames, length, random=False))


def test_crops_are_random_in_training_only():
    model, u = make(), speech(4, 40)
    crops = lambda: model.fold([u]).speakers.crop
    assert torch.equal(crops(), crops())
    model.train()
    assert not torch.equal(crops(), crops())
    torch.manual_seed(3); first = crops()
    torch.manual_seed(3)
    assert torch.equal(first, crops())  # the trainer's checkpoint holds this generator


def test_the_table_learns_in_training_only():
    model = make()
    model.speaker.known.zero_()
    read(model, model.fold([speech(speaker=1)]), model.fold([speech(speaker=1)]).patches)
    assert not model.speaker.known.any()
    model.train()
    for seed in range(30): model(model.fold([speech(seed=seed, speaker=1)]))
    assert not model.speaker.known[0].any() and model.speaker.known[1].any()
    mean = torch.stack([on_sphere(speech(seed=seed).voice) for seed in range(30)]).mean(0)
    assert F.cosine_similarity(model.speaker.known[1][:8], mean, dim=0) > 0.98


def test_a_voice_by_name_and_by_vector():
    model = make()
    one, vector = model.speaker(torch.tensor([1])), voice_vector(model, 1)
    torch.testing.assert_close(model.speaker(vector[None]), one)
    torch.testing.assert_close(torch.stack([part.norm() for part in vector.split(model.speaker.sizes)]), torch.tensor([8.0, 16.0]).sqrt())


def test_a_batch_moves_with_its_voices():
    batch = make().fold([speech(), speech(3, 4, 1, 1)]).to("meta")
    assert isinstance(batch.speakers, Voices) and {part.device.type for part in vars(batch.speakers).values()} == {"meta"}


def test_an_utterance_without_an_embedding_is_refused():
    with pytest.raises(CourseError, match="SpeechData"): make().fold([replace(speech(), voice=None)])
    make(shape(speaker_dim=0)).fold([replace(speech(), voice=None)])


@pytest.mark.parametrize("config, words", [({"speaker_encoder": "nobody"}, "no speaker encoder"), ({"speaker_dim": 9}, "speaker_dim=9")])
def test_encoders_that_do_not_fit(config, words):
    with pytest.raises(CourseError, match=words): hear_speaker(shape(**config), torch.randn(24000), 24000)


# ---- speaking

@pytest.fixture(scope="module")
def tts(): return TTS(make(shape(codec=MelCodec(MelCodecConfig(vocoder="vocoder")).to_dict())))


def tone(pitch=150, seconds=1.3):
    time = torch.arange(round(seconds * 24000)) / 24000
    return 0.3 * torch.sin(2 * math.pi * pitch * time) * (1 + 0.5 * torch.sin(2 * math.pi * 3 * time))


def first(tts, given): return next(draw(tts, "Hi.", given, steps=2)).patch


def test_a_recording_without_a_text_is_a_voice(tts):
    given = begin_with(tts, prompt=Prompt(tone(), 24000, ""))
    assert given.text == "" and not len(given.patches) and given.speaker.shape == (8 + 16,)
    a, b = first(tts, given), first(tts, begin_with(tts, prompt=Prompt(tone(400), 24000, "")))
    assert torch.equal(a, first(tts, given)) and not torch.allclose(a, b, atol=1e-4)
    assert not torch.allclose(a, first(tts, begin_with(tts, "anna")), atol=1e-4)


def test_a_recording_with_its_text_is_continued_in_its_voice(tts):
    plain, told = (begin_with(tts, prompt=Prompt(tone(), 24000, text)) for text in ("", "Hello there."))
    assert torch.equal(plain.speaker, told.speaker) and told.text == "Hello there." and len(told.patches) == math.ceil(1.3 / 0.16)


def test_the_voice_of_a_recording_is_the_mean_over_its_crops(tts):
    model, patches = tts.model, speech(patches=6).patches  # 48 frames: crops of 16 begin at 0, 8, 16, 24, 32
    vector, frames = model.voice_of(patches, tone(), 24000), patches.flatten(0, 1)
    with torch.no_grad(): heard = on_sphere(model.speaker.encoder(torch.stack([frames[k:k + 16] for k in range(0, 33, 8)]))).mean(0)
    torch.testing.assert_close(vector[8:], on_sphere(heard), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vector[:8], on_sphere(ear(tone(), 24000)), atol=1e-5, rtol=1e-4)
    assert model.voice_of(patches[:1], tone(), 24000).isfinite().all()  # shorter than a crop


@pytest.mark.parametrize("prompt, words", [(Prompt(tone(seconds=0.3), 24000, ""), "0.3 s"), (Prompt(tone()[None], 24000, ""), "one channel"), (Prompt(tone(), 24000, "..."), "no text")])
def test_prompts_that_cannot_be(tts, prompt, words):
    with pytest.raises(CourseError, match=words): tts("Hi.", prompt=prompt)


def test_only_a_system_that_clones_does_without_the_text():
    torch.manual_seed(0)
    plain = TTS(ARDMConfig(backbone=TransformerConfig(32, 1, 2, 2, 64), head=HeadConfig(cond_dim=32, width=32, layers=1, heads=2, hidden=64), codec=MelCodec(MelCodecConfig(vocoder="vocoder")).to_dict()).build())
    with pytest.raises(CourseError, match="no text"): plain("Hi.", prompt=Prompt(tone(), 24000, ""))
    assert begin_with(plain, prompt=Prompt(tone(), 24000, "Hello.")).speaker == 0


def test_an_unknown_voice_is_named(tts):
    with pytest.raises(CourseError, match="anna, ben"): tts("Hi.", voice="nobody")


def test_the_stream_equals_the_whole(tts):
    options = dict(prompt=Prompt(tone(), 24000, ""), steps=1, guidance=1.7, threshold=2.0)
    kept, tts.model.draw = tts.model.draw, lambda tokens, **rest: islice(type(tts.model).draw(tts.model, tokens, **rest), 4)
    try:
        with torch.no_grad(): whole, stream = tts("Hi.", **options).wav, torch.cat(list(tts.stream("Hi.", **options)))
    finally: tts.model.draw = kept
    assert len(whole) == 4 * 3840
    torch.testing.assert_close(stream, whole, atol=1e-5, rtol=1e-4)


def test_saved_and_loaded_it_speaks_alike(tts, tmp_path):
    tts.save_pretrained(tmp_path)
    again = TTS.from_pretrained(tmp_path)
    assert isinstance(again.model, MELA) and again.model.config == tts.model.config
    torch.testing.assert_close(first(again, begin_with(again, "ben")), first(tts, begin_with(tts, "ben")), atol=0.05, rtol=0.05)  # half precision
    assert not torch.allclose(first(again, begin_with(again, "anna")), first(again, begin_with(again, "ben")), atol=1e-4)


# ---- between voices

def test_slerp():
    a, b = (3 * F.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(k)), dim=-1) for k in (0, 1))
    angles = torch.stack([F.cosine_similarity(a, slerp(a, b, share / 10)).clamp(-1, 1).acos() for share in range(11)])
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, b, 0.3), slerp(b, a, 0.7))
    torch.testing.assert_close(slerp(a, b, 0.37).norm(dim=-1), torch.full((5,), 3.0))
    torch.testing.assert_close(angles.diff(dim=0), angles[-1].expand(10, 5) / 10, atol=2e-3, rtol=1e-2)  # constant speed
    torch.testing.assert_close(slerp(a, a.clone(), 0.4), a, atol=1e-3, rtol=1e-3)


def test_mixed_voices(tts):
    ends, prompt = [begin_with(tts, name) for name in ("anna", "ben")], Prompt(tone(), 24000, "These words are not said.")
    torch.testing.assert_close(mix_voices(tts, "anna", "ben", 0.0).speaker, voice_vector(tts.model, 0), atol=1e-4, rtol=1e-4)
    patches = [first(tts, mix_voices(tts, "anna", "ben", share)) for share in (0.0, 0.5, 1.0)]
    for patch, end in zip(patches[::2], ends): torch.testing.assert_close(patch, first(tts, end), atol=1e-3, rtol=1e-3)
    assert (patches[1] - patches[0]).abs().max() > 1e-3 < (patches[1] - patches[2]).abs().max()
    mixed = mix_voices(tts, prompt, "ben", 0.5)
    assert mixed.text == "" and not len(mixed.patches) and mixed.speaker.isfinite().all()
    assert say(tts, "Hi.", mixed, steps=1, threshold=-1.0).wav.isfinite().all()


# ---- data

class Rows(list):
    "Rows that FeatureCache and SpeechData read."
    def __getitem__(self, k): return [row[k] for row in self] if isinstance(k, str) else list.__getitem__(self, k)


class Latents:
    ids, lengths = ["a", "b", "c"], [30, 30, 20]
    def __getitem__(self, place): return torch.full((self.lengths[place], 80), float(place))


def test_data_brings_the_voice():
    rows = [{"id": name, "text_normalized": "Hi there.", "speaker_id": who} for name, who in (("a", "anna"), ("b", "ben"), ("c", "stranger"))]
    table = {name: F.normalize(torch.rand(8, generator=torch.Generator().manual_seed(k)), dim=0) for k, name in enumerate("abc")}
    data = SpeechData(rows, Latents(), shape(), vary=False, voice=table.get)
    assert [data[k].speaker for k in range(3)] == [0, 1, 0]  # a stranger of a validation split has a voice, but no name
    assert all(torch.equal(data[k].voice, table[name]) for k, name in enumerate("abc"))
    assert data[0].voice is not None and SpeechData(rows, Latents(), shape(), vary=False)[0].voice is None
    make().fold([data[k] for k in range(3)])


class Few:
    "Some utterances for the trainer."
    frame_rate = 50.0
    items = [speech(4, 3 + k, k, k % 2) for k in range(6)]
    lengths = [8 * len(item.patches) for item in items]
    def __len__(self): return len(self.items)
    def __getitem__(self, k): return self.items[k]


def test_a_resumed_training_draws_the_same_crops(tmp_path):
    plan = TrainConfig(steps=6, batch_frames=80, warmup=1, checkpoint_every=1, validate_every=100, log_every=1)
    def trainer(name):
        model = make()
        return Trainer(model, Few(), model.fold, plan, tmp_path / name)
    straight, left = trainer("a"), trainer("b")
    straight.fit()
    for _ in training_steps(left):
        if left.state.step == 3: break
    again = trainer("b")
    again.fit()
    for name, weight in straight.model.state_dict().items(): assert torch.equal(weight, again.model.state_dict()[name]), name
    assert not torch.equal(straight.model.speaker.known, make().speaker.known)


def test_speaker_embeddings_are_kept(monkeypatch):
    from ardm_course.corpus import load_corpus
    rows, calls = load_corpus("phrases", "test").select(range(2)), []
    monkeypatch.setitem(mela.SPEAKER_ENCODERS, "counting", lambda wav, rate: (calls.append(rate), ear(wav, rate))[1])
    heard = recorded_voices(rows, shape(speaker_encoder="counting"))
    assert heard(rows[1]["id"]).shape == (8,) and set(calls) <= {24000}
    calls.clear()
    torch.testing.assert_close(recorded_voices(rows, shape(speaker_encoder="counting"))(rows[0]["id"]), heard(rows[0]["id"]))
    assert not calls and recorded_voices(rows, shape(speaker_dim=0)) is None


# ---- the published shape

def test_the_published_shape():
    with torch.device("meta"): model = paper_shape().build()
    assert count_parameters(model.backbone) + count_parameters(model.text) == 494_032_768  # Qwen2-0.5B
    W, P = 1024, 8
    block = 4 * W * W + 3 * W * 1365 + 2 * W + 6 * W * (W + 1)
    net, H = model.head.net, 896
    assert len(net.blocks) == 22 and count_parameters(net.blocks) == 22 * block
    around = 2 * W + 2 * P * W + (256 * W + W) + (W * W + W) + 2 * (H * W + W) + 2 * (80 * W + W) + W + (80 * W + 80)  # null, places, time, conditions, frames, norm, out
    assert count_parameters(net) == 22 * block + around


def test_a_pretrained_language_model(tmp_path):
    pytest.importorskip("transformers")
    from ardm_course.audio import import_torchaudio
    import_torchaudio()
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    theirs = Qwen2ForCausalLM(Qwen2Config(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)).eval()
    theirs.save_pretrained(tmp_path)
    ours = from_language(shape(), load_qwen2(tmp_path)).eval()
    assert ours.config.vocabulary == 99 and ours.config.backbone.width == 64 and ours.config.head.cond_dim == 192 and shape().vocabulary != 99
    ids = torch.randint(99, (2, 11))
    with torch.no_grad(): torch.testing.assert_close(ours.backbone(ours.text(ids)), theirs.model(ids).last_hidden_state, atol=1e-5, rtol=1e-4)
    losses = ours.train()(ours.fold([speech()]))
    assert losses["loss"].isfinite()
