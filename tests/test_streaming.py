"""Interleaved streaming: plans, tokens while the text arrives, generation that follows training, the runtime, and the virtual clock."""
import asyncio
import math
import random
import threading
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from ardm_course.ardm import ARDMConfig, Utterance, fold, mixed_layouts, read
from ardm_course.core import CourseError
from ardm_course.layout import Layout, Slot, interleave, rope_positions
from ardm_course.locdit import HeadConfig
from ardm_course.streaming import (Pace, Playback, Timeline, arrivals, arriving_tokens, draw_in_turns, ends_sentence, measure_long, measure_sentences, pieces_in_turns,
                                   play_out, room, say_in_turns, show_timeline, simulate, slope, stretches, trace, why_it_ends)
from ardm_course.text import END, TextConfig, TextTokenizer, has_g2p, normalise
from ardm_course.transformer import TransformerConfig
from ardm_course.tts import TTS, begin_with
from ardm_course.vocoder import MelCodec, MelCodecConfig
from ardm_course.voxcpm import VoxCPMConfig

RATIOS = [(4, 3), (5, 15), (5, 6), (1, 1), (12, 3), (2, 3)]
LIVE = {"steps": 2, "guidance": 1.5}
TEXT = "The old clock has stopped again. Who will mend it now?"


def shape(kind=ARDMConfig, **fields):
    small = dict(backbone=TransformerConfig(32, 2, 2, 2, 64), head=HeadConfig(width=32, cond_dim=32, layers=1, heads=2, hidden=64), interleave=(4, 3), tokens_per_patch=2.0,
                 codec=MelCodec(MelCodecConfig(iterations=2)).to_dict())
    return kind(**small | fields)


def make(config=None, stop=-9.0):
    torch.manual_seed(0)
    model = (config or shape()).build()
    for name, weight in model.head.named_parameters():
        if "modulation" in name or name.startswith("net.out"): torch.nn.init.normal_(weight, std=0.1)  # AdaLN-zero starts deaf
    torch.nn.init.constant_(model.stop[-1].bias, stop)
    return model.eval()


@pytest.fixture(scope="module")
def tts():
    return TTS(make(stop=4.0))


def some_tokens(count, seed=0):
    return torch.randint(3, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def noise(): return torch.Generator().manual_seed(0)


# ---- plans

def test_every_token_and_patch_once_and_in_order():
    draw = random.Random(0)
    for _ in range(500):
        text, patches, n, m, prompt, speaker = draw.randint(0, 40), draw.randint(1, 60), draw.randint(1, 9), draw.randint(1, 9), draw.randint(0, 8), draw.random() < 0.5
        layout = Layout.interleaved(text, patches, (n, m), prompt, speaker)
        spoken = [slot for slot in layout.slots if slot in (Slot.PROMPT, Slot.SPEECH)]
        assert layout.slots.count(Slot.TEXT) == text and spoken == [Slot.PROMPT] * prompt + [Slot.SPEECH] * patches
        assert layout.slots.count(Slot.TURN) == 1 and layout.slots[-1] == Slot.SPEECH and layout.where(Slot.SPEAKER) == [0] * speaker
        assert not set(layout.predicting) & set(layout.where(Slot.FILL)) and len(layout.predicting) == patches


def test_without_fillers_it_is_the_offline_sequence():
    for ratio in RATIOS:
        kept = [slot for slot in Layout.interleaved(20, 70, ratio, 4, True).slots if slot != Slot.FILL]
        assert sorted(kept) == sorted(Layout.offline(20, 70, 4, True).slots)


@pytest.mark.parametrize("ratio", RATIOS)
def test_training_lays_out_what_a_generator_can_make(ratio):
    for text in range(0, 26):
        for patches in range(1, 80, 3):
            layout = Layout.interleaved(text, patches, ratio)
            online = tuple(islice(interleave(iter(range(text)), ratio), len(layout.slots)))
            assert layout.slots == online if patches > text // ratio[0] * ratio[1] else layout == Layout.offline(text, patches)


def test_a_plan_pulls_no_token_too_early():
    pulled = []
    plan = interleave((pulled.append(k) or k for k in range(9)), (4, 3))
    for slot, there in zip(islice(plan, 18), [4] * 8 + [8] * 8 + [9] * 2): assert len(pulled) == there, slot


def test_positions_of_a_part_are_those_of_the_whole():
    layout = Layout.interleaved(13, 20, (4, 3), 2, True)
    for end in range(1, len(layout.slots)):
        for rate in (0.0, 2.5): assert torch.equal(rope_positions(Layout(layout.slots[:end]), rate), rope_positions(layout, rate)[:end])


def test_patches_stand_at_their_text_in_both_layouts():
    for layout in (Layout.offline(24, 20), Layout.interleaved(24, 20, (4, 3))):
        at = rope_positions(layout, 2.5)
        assert at[layout.where(Slot.TEXT)].tolist() == list(range(24)) and at[layout.where(Slot.SPEECH)].tolist() == [(k + 0.5) * 2.5 for k in range(20)]


# ---- both layouts in one model

def utterances(count=40):
    g = torch.Generator().manual_seed(1)
    return [Utterance(torch.tensor(some_tokens(9, k)), torch.randn(12, 8, 80, generator=g)) for k in range(count)]


@pytest.mark.parametrize("share,least,most", [(0.0, 0, 0), (0.5, 8, 32), (1.0, 40, 40)])
def test_a_share_of_the_utterances_is_interleaved(share, least, most):
    model = make(shape(interleaved_share=share)).train()
    torch.manual_seed(0)
    turned = sum(Slot.FILL in layout.slots for layout in mixed_layouts(model, utterances()))
    assert least <= turned <= most


def test_validation_sees_the_same_layouts_every_time_and_moves_no_random_numbers():
    model = make(shape(interleaved_share=0.5))
    before = torch.random.get_rng_state()
    first, second = mixed_layouts(model, utterances()), mixed_layouts(model, utterances())
    assert first == second and len({Slot.FILL in layout.slots for layout in first}) == 2 and torch.equal(before, torch.random.get_rng_state())


def test_without_a_ratio_nothing_changes():
    model = make(shape(interleave=())).train()
    before = torch.random.get_rng_state()
    batch, plain = model.fold(utterances(3)), fold(utterances(3), config=model.config)
    assert torch.equal(batch.gather, plain.gather) and torch.equal(before, torch.random.get_rng_state())


def test_fills_are_embedded_and_learn():
    model = make(shape(interleaved_share=1.0)).train()
    model(model.fold(utterances(3)))["loss"].backward()
    assert model.special.weight.grad[Slot.FILL].any() and model.special.weight.grad[Slot.TURN].any()


def states(model, u, layout):
    batch = fold([u], [layout], model.config)
    with torch.no_grad(): return read(model, batch, batch.patches)


def test_the_future_does_not_leak():
    model, u = make(), utterances(1)[0]
    layout = Layout.interleaved(9, 12, (4, 3))
    changed = replace(u, patches=u.patches.index_fill(0, torch.tensor(5), 0.0))
    gap = (states(model, u, layout) - states(model, changed, layout)).abs().amax(1)
    assert gap[:6].max() < 1e-6 < gap[6:].min()
    other = replace(u, tokens=u.tokens.index_fill(0, torch.tensor(6), 60))  # in the second block: unseen by the first three patches
    gap = (states(model, u, layout) - states(model, other, layout)).abs().amax(1)
    assert gap[:3].max() < 1e-6 < gap[3:].min()


# ---- generation

CONFIGS = {"ardm": shape(), "5:15": shape(interleave=(5, 15)), "1:1": shape(interleave=(1, 1)), "plain positions": shape(tokens_per_patch=0.0), "a voice": shape(speakers=("a", "b")),
           "voxcpm": shape(VoxCPMConfig, head=HeadConfig(latent_dim=80, patch=8, width=32, layers=1, heads=2, hidden=64), encoder=TransformerConfig(32, 1, 2, 2, 64, causal=False), grid=8, residual_layers=1)}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("prompt", [0, 4])
def test_generation_follows_the_training_layout(name, prompt):
    model, tokens = make(CONFIGS[name]), some_tokens(11)
    given = torch.randn(prompt, 8, 80, generator=noise())
    drawn = list(draw_in_turns(model, iter(tokens), speaker=1 if name == "a voice" else 0, prompt=given, generator=noise(), **LIVE))
    patches = torch.stack([d.patch for d in drawn])
    layout = Layout.interleaved(len(tokens), len(patches), model.config.interleave, prompt, bool(model.config.speakers))
    batch = fold([Utterance(torch.tensor(tokens), torch.cat([given, patches]), 1 if name == "a voice" else 0)], [layout], model.config)
    with torch.no_grad(): stops = torch.sigmoid(model.stop_logit(read(model, batch, batch.patches)))
    torch.testing.assert_close(torch.tensor([d.stop for d in drawn]), stops, atol=1e-5, rtol=1e-4)
    assert drawn[-1].reason == "length limit" and all(d.reason is None for d in drawn[:-1])


def test_the_states_are_those_of_teacher_forcing(monkeypatch):
    model, tokens, seen = make(), some_tokens(11), []
    sample = model.head.sample
    monkeypatch.setattr(model.head, "sample", lambda state, previous, **options: (seen.append((state, previous)), sample(state, previous, **options))[1])
    patches = torch.stack([d.patch for d in draw_in_turns(model, tokens, generator=noise(), **LIVE)])
    layout = Layout.interleaved(len(tokens), len(patches), (4, 3))
    torch.testing.assert_close(torch.cat([state for state, _ in seen]), states(model, Utterance(torch.tensor(tokens), patches), layout), atol=1e-5, rtol=1e-4)
    assert not seen[0][1].any() and all(torch.equal(previous[0], patch) for (_, previous), patch in zip(seen[1:], patches))


def test_a_stalled_text_changes_nothing():
    model, tokens, asked = make(), some_tokens(11), []
    def slow():
        for token in tokens:
            asked.append(token)
            yield token
    counts, drawn = [], []
    for d in draw_in_turns(model, slow(), generator=noise(), **LIVE):
        drawn.append(d.patch)
        counts.append(len(asked))
    assert counts[:7] == [4, 4, 4, 8, 8, 8, 11]
    assert torch.equal(torch.stack(drawn), torch.stack([d.patch for d in draw_in_turns(model, tokens, generator=noise(), **LIVE)]))


def test_nothing_ends_before_the_text_does():
    drawn = list(draw_in_turns(make(stop=20.0), some_tokens(11), generator=noise(), **LIVE))
    assert len(drawn) == 2 * 3 + 1 and drawn[-1].reason == "stop head" and drawn[0].stop > 0.9 and drawn[0].reason is None
    assert why_it_ends(1.0, 0.5, None, 5) is None and why_it_ends(0.5, 0.5, 3, 5) is None and why_it_ends(0.0, 0.5, 15, 5) == "length limit"


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_longest_piece_fits_its_room(ratio):
    model = make(shape(interleave=ratio, speakers=("a",)))
    drawn = list(draw_in_turns(model, some_tokens(17), threshold=2.0, longest=17, generator=noise(), steps=1, guidance=1.0))
    assert drawn[-1].reason == "length limit"
    used = len(Layout.interleaved(17, len(drawn), ratio, 0, True).slots)
    assert used - 1 <= room(ratio, 17) <= used + 1


def test_gradients_are_on_when_a_generator_is_dropped():
    drawn = draw_in_turns(make(), some_tokens(11), generator=noise(), **LIVE)
    next(drawn)
    assert torch.is_grad_enabled()
    drawn.close()


# ---- words to tokens

TEXTS = ["On March 5, 2024 at 9:15 p.m. Dr. Smith paid $5 million for 3/4 of the 12 km road.", "He came on the 5th of March and left.", "No. 5 is alive.", "wait -- what ... is this (really) a test?",
         "The U.S. has 50 states; J. R. R. Tolkien wrote many books.", "It costs $5.20 or 3,000 yen -- maybe 20% more, i.e. a lot.", "Call 555-1234 now, please.", "My brother lives in Oslo, and I read the book you read.",
         "Mr. Jones and Mrs. Jones went to St. Louis.", "a/b testing is 50/50 & fun", "She said \"yes\" to the offer.", "one", "It's a well-known fact, isn't it?"]


@pytest.mark.parametrize("kind", ["characters", "phonemes"])
def test_tokens_word_by_word_are_those_of_the_whole(kind):
    if kind == "phonemes" and not has_g2p(): pytest.skip("hibari-tts is not installed")
    tokenizer = TextTokenizer(TextConfig(kind))
    for text in TEXTS: assert list(arriving_tokens(tokenizer, text.split(), longest=400)) == tokenizer.encode(text), text


def test_stretches_can_be_read_alone():
    for text in TEXTS: assert " ".join(normalise(part) for part, _ in stretches(text.split())) == normalise(text), text


@pytest.mark.parametrize("word,ends", [("end.", True), ("really?", True), ('"Yes!"', True), ("Dr.", False), ("etc.", False), ("J.", False), ("3.", False), ("p.m.", False), ("well,", False), ("No.", False), ("word", False)])
def test_where_a_sentence_ends(word, ends):
    assert ends_sentence(word) is ends


def test_a_sentence_is_spoken_before_the_next_one_begins():
    tokens = arriving_tokens(TextTokenizer(), iter(["Hello", "there."]))
    assert list(islice(tokens, 13)) == TextTokenizer().encode("Hello there.")  # nothing was asked for after the full stop
    def one():
        yield "Stop."
        raise AssertionError("asked for more")
    assert list(islice(arriving_tokens(TextTokenizer(), one()), 6)) == TextTokenizer().encode("Stop.")


@pytest.mark.parametrize("words", [["word"] * 90, ["a" * 400, "b"], ["comma,"] * 60, ["Short."] * 5 + ["word"] * 60])
def test_pieces_keep_their_limit(words):
    tokens, lengths, length = list(arriving_tokens(TextTokenizer(), words, longest=40)), [], 0
    for token in tokens:
        length += 1
        if token == END: lengths, length = [*lengths, length], 0
    assert length == 0 and max(lengths) <= 40 and len(lengths) > 1


def test_an_item_may_hold_several_words_and_empty_text_is_silent(tts):
    tokenizer = TextTokenizer()
    assert list(arriving_tokens(tokenizer, ["The old  clock", "", "stopped."])) == tokenizer.encode("The old clock stopped.")
    assert list(tts.stream(iter([]))) == []


def test_marks_alone_are_passed_over_behind_words():
    for text in ("He left. ...", "He left . . .", "He left. -- \" \""): assert list(arriving_tokens(TextTokenizer(), text.split())) == TextTokenizer().encode("He left."), text
    with pytest.raises(CourseError, match="no English word"): list(arriving_tokens(TextTokenizer(), ["...", "--"]))


# ---- runtime

def test_streamed_is_what_is_decoded_as_a_whole():
    tts = TTS(make(shape(codec=MelCodec(MelCodecConfig(vocoder="vocoder")).to_dict()), stop=4.0))  # Griffin-Lim is another one in a stream
    text = "Hello there. Who is it?"
    whole = say_in_turns(tts, text, **LIVE)
    streamed = list(tts.stream(iter(text.split()), **LIVE))
    torch.testing.assert_close(torch.cat(streamed), whole.wav, atol=1e-4, rtol=0)
    assert len(streamed) > 4


def test_every_piece_begins_anew(tts):
    one, two = TEXT.split(". ")
    alone = [list(piece) for part in (one + ".", two) for piece in pieces_in_turns(tts, part, begin_with(tts), **LIVE)]
    together = [list(piece) for piece in pieces_in_turns(tts, TEXT, begin_with(tts), **LIVE)]
    assert len(together) == 2 and all(torch.equal(a.patch, b.patch) for x, y in zip(alone, together) for a, b in zip(x, y))


def test_nothing_is_drawn_that_nobody_asked_for(tts, monkeypatch):
    drawn, asked = [], []
    sample = tts.model.head.sample
    monkeypatch.setattr(tts.model.head, "sample", lambda *args, **options: (drawn.append(1), sample(*args, **options))[1])
    def words():
        for word in TEXT.split() * 50:
            asked.append(word)
            yield word
    sounds = tts.stream(words(), **LIVE)
    assert not drawn and not asked
    next(sounds), next(sounds)
    at_two = len(drawn), len(asked)
    assert at_two[0] < 6 and at_two[1] < 12
    sounds.close()
    assert (len(drawn), len(asked)) == at_two


def test_an_error_in_the_text_arrives_at_the_listener(tts):
    def broken():
        yield from ["The", "old", "clock", "stopped."]
        raise OSError("the line is cut")
    with pytest.raises(OSError, match="the line is cut"): list(tts.stream(broken(), **LIVE))
    with pytest.raises(CourseError, match="no English word"): list(tts.stream(iter(["你好"]), **LIVE))


def test_an_offline_model_streams_sentence_by_sentence(tts):
    plain = TTS(make(shape(interleave=()), stop=4.0))
    assert len(list(plain.stream(TEXT.split(), **LIVE))) > 2
    assert torch.equal(torch.cat(asyncio.run(listen(plain, TEXT))), torch.cat(list(plain.stream(TEXT.split(), **LIVE))))


async def typed(text, told=None):
    try:
        for word in text.split():
            await asyncio.sleep(0)
            yield word
    finally:
        if told is not None: told.append("the source was closed")


async def listen(tts, text, enough=None, told=None, source=None):
    heard, sounds = [], tts.stream(source or typed(text, told), **LIVE)
    async for sound in sounds:
        heard.append(sound)
        if len(heard) == enough: break
    await sounds.aclose()
    return heard


def test_asynchronous_text_gives_the_same_sound_and_leaves_no_thread(tts):
    threads = threading.active_count()
    assert torch.equal(torch.cat(asyncio.run(listen(tts, TEXT))), torch.cat(list(tts.stream(TEXT, **LIVE))))
    assert threading.active_count() == threads


@pytest.mark.parametrize("enough", [1, 3])
def test_hanging_up_ends_the_thread_and_the_source(tts, enough):
    told, threads = [], threading.active_count()
    heard = asyncio.run(listen(tts, TEXT * 20, enough, told))
    assert len(heard) == enough and told == ["the source was closed"] and threading.active_count() == threads


def test_hanging_up_while_the_text_is_stalled(tts):
    async def stalled():
        yield "Hello there my friend who"
        await asyncio.Event().wait()  # for ever
    async def go():
        sounds, threads = tts.stream(stalled(), **LIVE), threading.active_count()
        waiting = asyncio.ensure_future(collect(sounds))
        while threading.active_count() == threads: await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError): await waiting
        await sounds.aclose()
        assert threading.active_count() == threads
    async def collect(sounds): return [sound async for sound in sounds]
    asyncio.run(asyncio.wait_for(go(), 30))


def test_a_listener_who_does_not_listen_holds_the_thread_back(tts):
    asked = []
    async def endless():
        while True:
            asked.append(1)
            yield "again. "
    async def go():
        sounds = tts.stream(endless(), ahead=2, **LIVE)
        await anext(sounds)
        before = -1
        while before != len(asked):  # until nothing moves any more
            before = len(asked)
            await asyncio.sleep(0.3)
        await sounds.aclose()
    asyncio.run(asyncio.wait_for(go(), 30))
    assert len(asked) < 12


def test_errors_of_the_thread_arrive_in_the_loop(tts):
    async def broken():
        yield "Hello there my friend."
        raise OSError("the line is cut")
    with pytest.raises(OSError, match="the line is cut"): asyncio.run(listen(tts, "", source=broken()))
    async def unreadable(): yield "你好"
    with pytest.raises(CourseError, match="no English word"): asyncio.run(listen(tts, "", source=unreadable()))


# ---- the virtual clock

class FalseClock:
    "Time that moves only when somebody works or sleeps."
    def __init__(self): self.now = 100.0
    def __call__(self): return self.now
    def sleep(self, seconds): self.now += seconds


class FalseSpeaker:
    "Streams by the real plan; a patch takes its time on the false clock and becomes its sound at once."
    def __init__(self, clock, ratio, patches, cost):
        self.clock, self.ratio, self.patches, self.cost, self.codec = clock, ratio, patches, cost, SimpleNamespace(sample_rate=1000)

    def stream(self, words):
        tokens = arriving_tokens(TextTokenizer(), words)
        plan, left = interleave(tokens, self.ratio or (10**6, 1)), self.patches
        while left:
            if next(plan) != Slot.SPEECH: continue
            self.clock.sleep(self.cost)
            left -= 1
            yield torch.zeros(160)


@pytest.mark.parametrize("ratio", [(), (4, 3), (12, 3)])
@pytest.mark.parametrize("rate", [2.0, 7.0, 40.0])
def test_the_simulation_is_the_run_on_a_false_clock(ratio, rate):
    words, clock = "the old clock in the hall has stopped again and nobody knows".split(), FalseClock()
    real = trace(FalseSpeaker(clock, ratio, 60, 0.07), words, rate, clock, clock.sleep)
    guess = simulate([(times, 60) for times in arrivals(TextTokenizer(), words, rate)], ratio, Pace(patch=0.07))
    torch.testing.assert_close(torch.tensor(real.sounds), torch.tensor(guess.sounds), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.tensor(real.work), torch.tensor(guess.work), atol=1e-6, rtol=0)
    assert len(real.text) == len(words) and play_out(real.sounds).start == pytest.approx(play_out(guess.sounds).start)


def test_player():
    assert play_out([(0.3, 0.2), (0.4, 0.2)]) == Playback(0.3, pytest.approx(0.7), [], pytest.approx(0.1))
    late = play_out([(0.3, 0.2), (0.7, 0.2), (0.8, 0.1)])
    assert late.stalls == [(0.5, pytest.approx(0.2))] and late.margin == pytest.approx(-0.2) and late.end == pytest.approx(1.0)
    assert play_out([(0.3, 0.2), (0.7, 0.2)], reserve=0.2).stalls == [] and play_out([(0.3, 0.2)]).margin == math.inf


def test_simulator_network_and_vocoder():
    pieces = [([0.0] * 12, 4), ([0.0] * 12, 4)]
    plain = simulate(pieces, (12, 3), Pace(patch=0.1))
    assert [round(at, 6) for at, _ in plain.sounds] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8] and sum(length for _, length in plain.sounds) == pytest.approx(8 * 0.16)
    held = simulate(pieces, (12, 3), Pace(patch=0.1, held=0.22))
    assert held.sounds[0] == (pytest.approx(0.2), pytest.approx(0.1)) and sum(length for _, length in held.sounds) == pytest.approx(8 * 0.16)
    shaky = simulate(pieces, (12, 3), Pace(patch=0.01, delay=0.05, jitter=0.2), seed=3)
    times = [at for at, _ in shaky.sounds]
    assert times == sorted(times) and min(times) >= 0.06 and shaky == simulate(pieces, (12, 3), Pace(patch=0.01, delay=0.05, jitter=0.2), seed=3)


def test_timeline_is_drawn():
    from ardm_course.core import _collect
    with _collect() as shown: show_timeline(Timeline([0.0, 0.1], [(0.1, 0.2)], [(0.2, 0.1), (0.9, 0.1)]), "a test:")
    assert len(shown) == 1 and "a test" in shown[0][1]["image/png"]["alt"]


def test_measuring(tts):
    found = measure_sentences(tts, ["Hello there.", "The old clock stopped."], **LIVE)
    assert found["sentences"] == 2 and 0 < found["first_audio_ms"] <= found["first_audio_ms_worst"] and found["rtf"] > 0 and found["stalls"] >= 0
    long = measure_long(tts, ["Hello there.", "The old clock stopped."], minutes=0.1, window=2.0, **LIVE)
    assert long["minutes"] >= 0.1 and abs(long["memory_growth_mb"]) < 30 and len(long["windows"]["memory_mb"]) >= 3
    assert slope([1.0, 2.0, 3.0, 4.0], 3.0) == pytest.approx(1.0) and slope([5.0, 5.0], 1.0) == 0
