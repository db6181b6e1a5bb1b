"""The cascade: frozen tokens, a language model whose cache changes nothing, a flow that padding does not reach, two phases that survive a kill."""
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from ardm_course import recipes
from ardm_course.ardm import Utterance
from ardm_course.cascade import (CascadeConfig, flow_errors, inside, lm_loss, sequences, shown, side_by_side, speak_tokens, text_positions)
from ardm_course.core import CourseError, seed_everything
from ardm_course.locdit import HeadConfig
from ardm_course.text import TextTokenizer
from ardm_course.training import Callback, TrainConfig, Trainer
from ardm_course.transformer import KVCache, TransformerConfig
from ardm_course.neural import pack
from ardm_course.tts import TTS, load_model, save_model
from ardm_course.vocoder import MelCodec, MelCodecConfig

TINY = CascadeConfig(backbone=TransformerConfig(32, 2, 2, 2, 48), head=HeadConfig(width=32, layers=2, heads=2, hidden=48, cond_dropout=0.2),
                     reader=24, phones=5, tokenizer_steps=3, tokens_per_patch=2.8, codec=MelCodec(MelCodecConfig(iterations=2)).to_dict())


@pytest.fixture
def model():
    seed_everything(0)
    made = TINY.build().eval()
    for block in made.flow.blocks: torch.nn.init.normal_(block.modulation.weight, std=0.1)  # zero at first: attention would do nothing
    return made


def speech(text, patches, seed):
    g = torch.Generator().manual_seed(seed)
    return Utterance(torch.randint(2, 40, (text,), generator=g), torch.randn(patches, 8, 80, generator=g), 0, F.one_hot(torch.randint(5, (patches, 4), generator=g), 5).float())


DATA = [speech(9, 4, 0), speech(6, 2, 1), speech(12, 5, 2), speech(5, 3, 3)]


def test_same_seed_same_speech(model):
    say = lambda seed, **options: torch.cat([d.patch for d in model.draw(DATA[0].tokens, generator=torch.Generator().manual_seed(seed), steps=2, **options)])
    assert torch.equal(say(0), say(0)) and not torch.equal(say(0)[:8], say(1)[:8])
    assert not torch.equal(say(0), say(0, guidance=1.0)) and not torch.equal(say(0), say(0, temperature=0.5))


def test_a_cached_step_equals_the_full_pass(model):
    ids = sequences(model.lm, side_by_side(DATA[:1]), torch.arange(16)[None])
    positions = text_positions(torch.tensor([9]), ids.shape[1], 0.7)
    whole, cache = model.lm(ids, positions), KVCache(TINY.backbone, capacity=ids.shape[1])
    steps = [model.lm(ids[:, :11], positions[:, :11], cache)] + [model.lm(ids[:, k:k + 1], positions[:, k:k + 1], cache) for k in range(11, ids.shape[1])]
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)


def test_padding_changes_nothing(model):
    batch, alone = side_by_side(DATA), [side_by_side([item]) for item in DATA]
    tokens = model.tokenizer(batch.mel, batch.lengths)[1]
    times, count = torch.full((1,), 0.4), []
    for k, one in enumerate(alone):
        T = one.mel.shape[1]
        assert torch.equal(model.tokenizer(one.mel, one.lengths)[1][0], tokens[k, :T // 2])
        mask, known = inside(batch.lengths, batch.mel.shape[1]), shown(batch.mel, torch.full((4,), 3))
        together = model.flow(batch.mel, times.expand(4), model.flow.condition(tokens, known, mask), mask)[k, :T]
        by_itself = model.flow(one.mel, times, model.flow.condition(tokens[k:k + 1, :T // 2], known[k:k + 1, :T], mask[k:k + 1, :T]), mask[k:k + 1, :T])[0]
        assert torch.allclose(together, by_itself, atol=1e-5)
        count.append(lm_loss(model.lm, one, tokens[k:k + 1, :T // 2]) * (T // 2 + 1))
    assert torch.allclose(lm_loss(model.lm, batch, tokens), sum(count) / (batch.lengths // 2 + 1).sum(), atol=1e-5)


def test_padding_has_no_loss(model):
    batch = side_by_side(DATA)
    tokens = model.tokenizer(batch.mel, batch.lengths)[1]
    errors = lambda: (seed_everything(0), flow_errors(model.flow, batch, tokens, times=torch.full((4,), 0.5)))[1]
    before = errors()
    batch.mel[1, 16:] = 100.0
    assert torch.allclose(errors(), before, atol=1e-5) and before.shape == (4,)


def test_tokens_round_trip(model):
    values, tokens = model.tokenizer(DATA[0].patches.view(1, -1, 80), torch.tensor([32]))
    assert tokens.shape == (1, 16) and 0 <= tokens.min() and tokens.max() < 729
    assert torch.equal(model.tokenizer.grid.decode(tokens), values)
    assert torch.equal(model.flow.grid.decode(tokens), values)


def test_two_phases(model):
    model.train()
    out = model(side_by_side(DATA))
    out["loss"].backward()
    assert out["flow"] == out["lm"] == 0 and out["loss"] == out["tokenizer"] and model.seen == 1
    assert all(w.grad is not None for w in model.tokenizer.parameters()) and not any(w.grad is not None for part in (model.lm, model.flow) for w in part.parameters())
    model.zero_grad(); model.seen.fill_(3)
    out = model(side_by_side(DATA))
    out["loss"].backward()
    assert out["tokenizer"] > 0 and not out["tokenizer"].requires_grad and torch.allclose(out["loss"], out["flow"] + out["lm"])
    assert not any(w.grad is not None for w in model.tokenizer.parameters()) and all(w.grad is not None for w in model.lm.parameters())
    assert out["frames"] == sum(8 * len(item.patches) for item in DATA)
    model.eval()(side_by_side(DATA))
    assert model.seen == 4


class Items(list): lengths = [8 * len(item.patches) for item in DATA]


class Kill(Callback):
    def after_step(self, trainer):
        if trainer.state.step == 5: raise KeyboardInterrupt


def test_a_killed_run_goes_on_in_its_phase(tmp_path):
    settings = TrainConfig(steps=7, warmup=1, batch_frames=80, learning_rate=1e-2, checkpoint_every=2, validate_every=100, log_every=1)
    def trainer(folder, *callbacks):
        seed_everything(0)
        made = TINY.build()
        return Trainer(made, Items(DATA), made.fold, settings, tmp_path / folder, callbacks=callbacks)
    whole = trainer("whole")
    whole.fit()
    with pytest.raises(KeyboardInterrupt): trainer("parts", Kill()).fit()
    parts = trainer("parts")
    parts.fit()
    a, b = (t.accelerator.unwrap_model(t.model).state_dict() for t in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a) and a["seen"] == 7


def test_the_frozen_tokenizer_does_not_move_at_all(model):
    model.train(); model.seen.fill_(3)
    optimizer, before = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1), [w.clone() for w in model.tokenizer.parameters()]
    for _ in range(2):
        optimizer.zero_grad(); model(side_by_side(DATA))["loss"].backward(); optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.tokenizer.parameters()))


def test_lengths_are_guarded(model):
    draw = lambda threshold: list(model.draw(torch.arange(2, 42), threshold=threshold, steps=1, generator=torch.Generator().manual_seed(0)))
    never, at_once = draw(2.0), draw(-1.0)
    assert (len(never), never[-1].reason) == (60, "length limit") and (len(at_once), at_once[-1].reason) == (5, "end token")
    assert all(d.patch.shape == (8, 80) and d.reason is None for d in never[:-1])
    made, end, reason = speak_tokens(model.lm, DATA[0].tokens, torch.zeros(0, dtype=torch.long), 3, 6, threshold=-1.0)
    assert len(made) == 3 and 0 < end < 1 and reason == "end token"


def test_it_goes_on_from_a_prompt(model):
    seed = lambda: torch.Generator().manual_seed(0)
    drawn = list(model.draw(DATA[2].tokens, prompt=DATA[1].patches, steps=2, generator=seed()))
    other = list(model.draw(DATA[2].tokens, prompt=DATA[1].patches + 1.0, steps=2, generator=seed()))
    assert drawn[-1].reason and not torch.equal(drawn[0].patch, other[0].patch)


def test_positions_follow_the_text():
    assert text_positions(torch.tensor([2, 3]), 5, 0.5).tolist() == [[0, 1, -0.25, 0.25, 0.75], [0, 1, 2, -0.25, 0.25]]
    assert text_positions(torch.tensor([2]), 4, 0.0).tolist() == [[0, 1, 2, 3]]


def test_saved_found_again_and_spoken(model, tmp_path):
    model.seen.fill_(9)
    save_model(model, tmp_path, bits=7)
    again = load_model(tmp_path)
    assert type(again).__name__ == "Cascade" and again.config == TINY and again.seen == 9
    speech = TTS.from_pretrained(tmp_path)("Yes.", steps=1)
    assert len(speech.wav) and speech.stop_reason in ("end token", "length limit")


def test_no_named_voices():
    with pytest.raises(CourseError, match="prompt"): replace(TINY, speakers=("amy",)).build()


def test_it_fits_the_repository():
    model = recipes.recipe("cascade-toy").model.build()
    assert sum(t.numel() * t.element_size() for t in pack(model.state_dict(), 7).values()) < 1.3e6


def test_the_recipe_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("ARDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(recipes.RECIPES, "tiny", replace(recipes.recipe("cascade-toy"), model=replace(TINY, phones=45, codec={})))
    data = recipes.prepare(recipes.RECIPES["tiny"], limit=3)
    tts, history = recipes.train("tiny", tmp_path / "run", data=data, steps=4, warmup=1, batch_frames=400, validate_every=4, checkpoint_every=4)
    assert {"valid_flow", "valid_lm", "valid_tokenizer", "valid_loss"} <= set().union(*history) and tts.model.seen == 4
    assert TextTokenizer(tts.model.config.text).vocabulary == tts.model.config.vocabulary
