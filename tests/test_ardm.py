"""The ARDM: training and inference agree, nothing leaks, batches fold without side effects."""
from dataclasses import replace

import pytest
import torch
from torch import nn

from ardm_course.ardm import ARDM, ARDMConfig, Utterance, begin, fold, generate, head_inputs, random_share, read, to_patches
from ardm_course.locdit import HeadConfig
from ardm_course.transformer import TransformerConfig

SMALL = ARDMConfig(backbone=TransformerConfig(64, 2, 4, 2, 128), head=HeadConfig(cond_dim=64, width=64, layers=2, hidden=128))


def speech(count=3, seed=0, voices=1):
    generator = torch.Generator().manual_seed(seed)
    return [Utterance(torch.randint(3, 90, (9 + i,), generator=generator), torch.randn(4 + i, 8, 80, generator=generator), i % voices) for i in range(count)]


def model_of(config, seed=0):
    torch.manual_seed(seed)
    model = ARDM(config).eval()
    nn.init.normal_(model.head.net.out.weight, std=0.1)
    for block in model.head.net.blocks:
        nn.init.normal_(block.modulation.weight, std=0.1)
    return model


CONFIGS = {"counting": SMALL, "following": replace(SMALL, tokens_per_patch=2.5), "voices": replace(SMALL, speakers=("a", "b")),
           "both": replace(SMALL, tokens_per_patch=2.5, speakers=("a", "b"))}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("prompt", [0, 2])
def test_cached_steps_equal_teacher_forcing(config, prompt):
    model, utterance = model_of(config), speech(2, voices=max(1, len(config.speakers)))[-1]
    with torch.no_grad():
        batch = fold([utterance], config=config)
        states = read(model, batch, batch.patches)
        state, cache, positions = begin(model, utterance.tokens, utterance.speaker, utterance.patches[:prompt], len(utterance.patches) - prompt)
        steps = [state]
        for i in range(prompt, len(utterance.patches) - 1):
            embedded = model.aggregator(utterance.patches[i:i + 1])[None]
            steps.append(model.backbone(embedded, positions[i - prompt:i - prompt + 1], cache)[:, -1])
    torch.testing.assert_close(torch.cat(steps), states[prompt:], atol=1e-4, rtol=1e-4)


def test_neighbours_and_padding_change_nothing():
    config = CONFIGS["both"]
    model, utterances = model_of(config), speech(3, voices=2)
    with torch.no_grad():
        together = fold(utterances, config=config)
        states = read(model, together, together.patches).split([len(u.patches) for u in utterances])
        for order in ([0], [2, 0], [1, 2, 0]):
            batch = fold([utterances[i] for i in order], config=config)
            parts = read(model, batch, batch.patches).split([len(utterances[i].patches) for i in order])
            for i, part in zip(order, parts):
                torch.testing.assert_close(part, states[i], atol=1e-4, rtol=1e-4)


def test_the_future_does_not_leak():
    model, batch = model_of(SMALL), fold(speech(2), config=SMALL)
    with torch.no_grad():
        before, changed = read(model, batch, batch.patches), batch.patches.clone()
        changed[2] += 1
        moved = (read(model, batch, changed) - before).abs().amax(1)
    assert moved[:3].max() == 0 and moved[3] > 0 and moved[4:].max() == 0  # the second utterance is another row


def test_fold_labels():
    batch = fold(speech(2), config=SMALL)
    assert batch.last.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 1]
    assert batch.previous.tolist() == [-1, 0, 1, 2, -1, 4, 5, 6, 7] and batch.target.tolist() == list(range(9))
    x0, cond, history = head_inputs(batch, torch.zeros(9, 64))
    assert history[0].abs().max() == 0 and torch.equal(history[1], x0[0]) and history[4].abs().max() == 0


def test_random_share_is_unbiased():
    torch.manual_seed(0)
    values = torch.randn(50)
    means = torch.stack([values[random_share(50, 0.3, values.device)].mean() for _ in range(4000)])
    assert abs(means.mean() - values.mean()) < 4 * means.std() / 4000**0.5
    assert len(random_share(2, 0.1, values.device)) == 1


def test_every_part_gets_a_gradient():
    config = CONFIGS["voices"]
    model = model_of(config).train()
    model(fold(speech(3, voices=2), config=config))["loss"].backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_stop_reasons_and_determinism():
    model, tokens = model_of(SMALL), speech(1)[0].tokens
    def run(**options): return list(generate(model, tokens, steps=2, generator=torch.Generator().manual_seed(1), **options))
    assert [d.reason for d in run(threshold=2.0, most=3)] == [None, None, "length limit"]
    assert [d.reason for d in run(threshold=-1.0, least=2)] == [None, "stop head"]
    assert len(run(threshold=2.0)) == 10 + len(tokens)
    assert torch.equal(run(most=4)[-1].patch, run(most=4)[-1].patch)


def test_a_dropped_generator_leaves_gradients_on():
    drawing = generate(model_of(SMALL), speech(1)[0].tokens, steps=1)
    next(drawing)
    assert torch.is_grad_enabled()


def test_patches_repeat_the_last_frame():
    frames = torch.arange(10.0)[:, None].expand(10, 80)
    patches = to_patches(frames)
    assert patches.shape == (2, 8, 80) and (patches[1, 2:] == 9).all()


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("target", ["v", "x0", "eps"])
def test_every_objective_trains_and_draws(path, target):
    config = replace(SMALL, head=replace(SMALL.head, path=path, target=target))
    model = model_of(config)
    assert torch.isfinite(model.train()(fold(speech(2), config=config))["loss"])
    if target != "eps":  # at t = 1 an eps prediction says nothing about the data; the sampler refuses it
        assert torch.isfinite(list(generate(model.eval(), speech(1)[0].tokens, steps=3, most=2))[-1].patch).all()
