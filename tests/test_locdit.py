"Diffusion head: what it may depend on, what zero init promises, drawing, guidance, dropout, objectives, published sizes."
import pytest
import torch
from torch import nn

from ardm_course import locdit
from ardm_course.core import CourseError, count_parameters, seed_everything
from ardm_course.flow import KINDS, PATHS, interpolate, noise_like, target
from ardm_course.locdit import DiTBlock, FlowHead, HeadConfig, LocDiT, modulations, precondition, prepare, sample_patches, time_features
from ardm_course.sampling import guide, sample, time_grid

SMALL = dict(latent_dim=5, patch=3, cond_dim=7, width=16, layers=2, heads=2, hidden=24)


def inputs(count=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=g) for shape in ((count, 3, 5), (count, 7), (count, 3, 5)))


def awake(seed=0, **fields):
    "A head whose zero layers have ordinary weights, in evaluation mode."
    seed_everything(seed)
    head = FlowHead(HeadConfig(**SMALL | fields)).eval()
    for layer in [*(block.modulation for block in head.net.blocks), head.net.out]:
        layer.reset_parameters()
    nn.init.normal_(head.net.null)
    return head


def predict(head, xt, t, cond, history):
    net = head.net
    token = net.cond(cond)
    return net(xt, modulations(net, t, token), token, net.past(history) if head.config.history else None)


def draw(head, cond, history, seed=3, **options):
    return head.sample(cond, history, generator=torch.Generator().manual_seed(seed), **options)


# --- preconditioning
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("time", [0.02, 0.3, 0.7, 0.98])
def test_what_the_line_leaves_has_size_one_and_no_slope(path, time):
    spread = torch.tensor([8.0, 1.0, 0.3, 0.1, 0.03])
    head, g = FlowHead(HeadConfig(**SMALL, path=path, spread=tuple(spread.tolist()))), torch.Generator().manual_seed(0)
    x0, x1, t = spread * torch.randn(20000, 3, 5, generator=g), torch.randn(20000, 3, 5, generator=g), torch.full((20000,), time)
    xt, v = interpolate(head.path, x0, x1, t), target(head.path, "v", x0, x1, t)
    seen, line = [], precondition(head, torch.zeros_like, xt, t)
    rest = precondition(head, lambda x: seen.append(x) or torch.ones_like(x), xt, t) - line
    left = ((v - line) / rest).flatten(0, 1)
    torch.testing.assert_close(left.std(0), torch.ones(5), atol=0.02, rtol=0)
    torch.testing.assert_close(seen[0].flatten(0, 1).std(0), torch.ones(5), atol=0.02, rtol=0)
    torch.testing.assert_close((seen[0].flatten(0, 1) * left).mean(0), torch.zeros(5), atol=0.02, rtol=0)


def test_a_new_preconditioned_head_draws_its_spread():
    "It knows nothing but the line, so it draws Gaussian numbers of the right sizes."
    spread = torch.tensor([4.0, 1.0, 0.3, 0.1, 0.03])
    head = FlowHead(HeadConfig(**SMALL, spread=tuple(spread.tolist()), solver="dpm2")).eval()
    drawn = draw(head, torch.zeros(500, 7), torch.zeros(500, 3, 5), guidance=2, steps=250)
    torch.testing.assert_close(drawn.flatten(0, 1).std(0) / spread, torch.ones(5), atol=0.06, rtol=0)


@pytest.mark.parametrize("wrong", [{"spread": (1.0,) * 4}, {"spread": (1.0,) * 5, "target": "x0"}])
def test_a_spread_that_does_not_fit(wrong):
    with pytest.raises(CourseError, match="spread wants"): FlowHead(HeadConfig(**SMALL | wrong))


# --- zero init

@pytest.mark.parametrize("history", [True, False])
def test_a_new_head_predicts_zero(history):
    seed_everything(0)
    head, (x0, cond, past) = FlowHead(HeadConfig(**SMALL, history=history)), inputs()
    assert not predict(head, x0, torch.rand(6), cond, past).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_a_new_heads_loss_is_the_power_of_its_target(path, kind):
    seed_everything(0)
    head, (x0, cond, past) = FlowHead(HeadConfig(**SMALL, path=path, target=kind)).eval(), inputs()
    times = torch.linspace(0.1, 0.9, 6)
    seed_everything(1)
    loss = head.loss(x0, cond, past, times=times)
    seed_everything(1)
    wanted = target(PATHS[path], kind, x0, torch.randn_like(x0), times)
    torch.testing.assert_close(loss, wanted.square().mean((1, 2)))


def test_a_new_block_is_the_identity_and_its_gates_learn_first():
    seed_everything(0)
    block, net = DiTBlock(HeadConfig(**SMALL)), LocDiT(HeadConfig(**SMALL))
    x, signal = torch.randn(2, 7, 16), torch.randn(2, 1, 16)
    y = block(x, block.modulation(signal), (net.cos, net.sin))
    assert torch.equal(y, x)
    y.square().sum().backward()
    scale1, shift1, gate1, scale2, shift2, gate2 = block.modulation.weight.grad.chunk(6)
    assert gate1.any() and gate2.any()
    assert not any(part.any() for part in (scale1, shift1, scale2, shift2))


def test_tokens_that_nobody_reads_are_not_computed_to_the_end():
    seed_everything(0)
    block, net = DiTBlock(HeadConfig(**SMALL)), LocDiT(HeadConfig(**SMALL))
    torch.nn.init.normal_(block.modulation.weight)
    x, modulation, seen = torch.randn(2, 7, 16), block.modulation(torch.randn(2, 1, 16)), []
    block.feed_forward.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    rope = (net.cos, net.sin)
    torch.testing.assert_close(block(x, modulation, rope, keep=3), block(x, modulation, rope)[:, -3:])
    assert seen == [3, 7]


def test_output_layer_learns_from_the_first_step():
    seed_everything(0)
    head, (x0, cond, past) = FlowHead(HeadConfig(**SMALL)), inputs()
    head.loss(x0, cond, past).mean().backward()
    assert head.net.out.weight.grad.any()


# --- what a patch depends on

@pytest.mark.parametrize("guidance", [1, 2.0])
def test_patches_do_not_see_each_other(guidance):
    head, (x0, cond, past) = awake(), inputs()
    xt, t = torch.randn(6, 3, 5), torch.rand(6)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    together = predict(head, xt, t, cond, past)
    torch.testing.assert_close(predict(head, xt[order], t[order], cond[order], past[order]), together[order])
    torch.testing.assert_close(predict(head, xt[2:3], t[2:3], cond[2:3], past[2:3]), together[2:3])
    other_cond, other_past = cond.clone(), past.clone()
    other_cond[1] += 1
    other_past[4] += 1
    change = (draw(head, other_cond, other_past, guidance=guidance) - draw(head, cond, past, guidance=guidance)).abs().amax((1, 2))
    assert (change > 1e-3).tolist() == [False, True, False, False, True, False]


def test_losses_of_patches_are_independent():
    head, (x0, cond, past) = awake(), inputs()
    times, other = torch.rand(6), x0.clone()
    other[3] *= 2
    losses = []
    for data in (x0, other):
        seed_everything(2)
        losses.append(head.loss(data, cond, past, times=times))
    assert (losses[0] != losses[1]).tolist() == [False, False, False, True, False, False]


def test_every_frame_of_a_patch_sees_every_other():
    head, (xt, cond, past) = awake(), inputs(1)
    answer = lambda xt, past: predict(head, xt, torch.tensor([0.5]), cond, past)
    for frame in range(3):
        changed = xt.clone()
        changed[:, frame] += 1
        assert ((answer(changed, past) - answer(xt, past)).abs().amax((0, 2)) > 1e-5).all()
    backwards = answer(xt, past.flip(1))
    assert not torch.allclose(backwards, answer(xt, past), atol=1e-4)  # the order of the history matters


def test_without_history_the_history_is_ignored():
    head, (x0, cond, past) = awake(history=False), inputs()
    assert torch.equal(draw(head, cond, past), draw(head, cond, torch.zeros_like(past)))
    assert head.net.length == 4 and awake().net.length == 7
    seed_everything(1)
    loss = head.loss(x0, cond, past)
    seed_everything(1)
    assert torch.equal(loss, head.loss(x0, cond, 5 * past))
    loss.mean().backward()
    assert head.net.past.weight.grad is None


def test_with_history_the_history_counts_even_without_condition():
    head, (_, cond, past) = awake(), inputs()
    assert not torch.allclose(draw(head, cond, past), draw(head, cond, -past), atol=1e-3)
    free = draw(head, cond, past, guidance=0.0)  # the null branch alone
    assert torch.allclose(free, draw(head, -cond, past, guidance=0.0))
    assert not torch.allclose(free, draw(head, cond, -past, guidance=0.0), atol=1e-3)


@pytest.mark.parametrize("history", [True, False])
def test_gradient_reaches_condition_history_and_data(history):
    head = awake(history=history)
    x0, cond, past = (x.requires_grad_() for x in inputs())
    head.loss(x0, cond, past).mean().backward()
    assert (cond.grad.abs().sum(1) > 0).all() and x0.grad.any()
    assert (past.grad is not None and bool(past.grad.any())) == history


# --- drawing

def test_guidance_one_is_the_conditional_sample():
    head, (_, cond, past) = awake(), inputs()
    x1 = torch.randn(past.shape, generator=torch.Generator().manual_seed(3))
    by_hand = sample(lambda xt, t: predict(head, xt, t, cond, past), x1, head.path, "v", "euler", time_grid(10))
    torch.testing.assert_close(draw(head, cond, past, guidance=1), by_hand)
    torch.testing.assert_close(draw(head, cond, past, guidance=1.0 + 1e-7), by_hand, atol=1e-4, rtol=1e-4)  # both ways meet


@pytest.mark.parametrize("kind,path", [("v", "linear"), ("x0", "linear"), ("v", "cosine"), ("x0", "cosine")])
def test_guided_sample_by_hand(kind, path):
    head, (_, cond, past) = awake(target=kind, path=path), inputs()
    net = head.net

    def both(xt, t):
        null = net.null.expand(len(xt), -1)
        free = net(xt, modulations(net, t, null), null, net.past(past))
        return guide(predict(head, xt, t, cond, past), free, 2.5)

    x1 = torch.randn(past.shape, generator=torch.Generator().manual_seed(3))
    by_hand = sample(both, x1, head.path, kind, "euler", time_grid(4))
    torch.testing.assert_close(draw(head, cond, past, guidance=2.5, steps=4), by_hand, atol=1e-5, rtol=1e-4)


def test_the_null_token_is_not_the_zero_condition():
    head, (_, cond, past) = awake(), inputs()
    zero, null = draw(head, 0 * cond, past, guidance=1), draw(head, cond, past, guidance=0.0)
    assert not torch.allclose(zero, null, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_prepare_is_the_modulations_one_by_one(steps):
    head, (_, cond, _) = awake(), inputs()
    token, grid = head.net.cond(cond), time_grid(steps)
    ready = prepare(head.net, grid, token)
    assert len(ready) == steps
    for t, at_once in zip(grid, ready):
        for one, other in zip(modulations(head.net, t.expand(6), token), at_once, strict=True):
            assert other.shape == (6, 1, 96)
            torch.testing.assert_close(other, one)


def test_sampling_is_decided_by_its_generator():
    head, (_, cond, past) = awake(), inputs()
    first = draw(head, cond, past)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(draw(head, cond, past), first)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator was left alone
    assert not torch.allclose(draw(head, cond, past, seed=4), first, atol=1e-2)
    one, two = sample_patches(head, cond, past), sample_patches(head, cond, past)
    assert not torch.equal(one, two)
    assert first.shape == past.shape and first.isfinite().all() and not first.requires_grad


def test_starting_noise_is_the_generators():
    seed_everything(0)
    head, (_, cond, past) = FlowHead(HeadConfig(**SMALL)).eval(), inputs()
    drawn = draw(head, cond, past)  # a new head has no velocity: the noise stays
    assert torch.equal(drawn, noise_like(past, torch.Generator().manual_seed(3)))


def test_sampling_in_training_mode_hides_nothing():
    head, (_, cond, past) = awake(cond_dropout=1.0), inputs()
    assert torch.equal(draw(head.train(), cond, past), draw(head.eval(), cond, past))


def test_half_precision_and_autocast():
    head, (_, cond, past) = awake(), inputs()
    full = draw(head, cond, past)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = draw(head, cond, past)
    half = draw(head.bfloat16(), cond.bfloat16(), past.bfloat16())
    assert half.dtype == torch.bfloat16
    for rough in (mixed, half):
        assert (rough.float() - full).abs().max() < 0.1 * full.abs().max()


@pytest.mark.parametrize("path", PATHS)
def test_an_eps_head_starts_just_below_pure_noise(path):
    head, (_, cond, past) = awake(target="eps", path=path), inputs()
    x1 = torch.randn(past.shape, generator=torch.Generator().manual_seed(3))
    by_hand = sample(lambda xt, t: predict(head, xt, t, cond, past), x1, head.path, "eps", "euler", time_grid(10).clamp(max=0.99))
    torch.testing.assert_close(draw(head, cond, past, guidance=1), by_hand, atol=1e-4, rtol=1e-4)


# --- training

def hidden_rows(head, count, monkeypatch):
    seen = []
    real = locdit.modulations
    monkeypatch.setattr(locdit, "modulations", lambda net, t, token: seen.append(token) or real(net, t, token))
    x0, cond, past = inputs(count)
    head.loss(x0, cond, past)
    return (seen[0] == head.net.null).all(1)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_condition_dropout_rate(rate, monkeypatch):
    seed_everything(0)
    hidden = hidden_rows(awake(cond_dropout=rate).train(), 4000, monkeypatch).float().mean().item()
    assert abs(hidden - rate) <= 4 * (rate * (1 - rate) / 4000) ** 0.5


def test_no_dropout_in_evaluation(monkeypatch):
    assert not hidden_rows(awake(cond_dropout=1.0), 100, monkeypatch).any()


def test_a_hidden_condition_gets_no_gradient_and_null_does():
    head, (x0, cond, past) = awake(cond_dropout=1.0).train(), inputs()
    cond.requires_grad_()
    head.loss(x0, cond, past).mean().backward()
    assert not cond.grad.any() and head.net.null.grad.any()


@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_every_objective_trains(path, kind, history):
    seed_everything(0)
    head, (x0, cond, past) = FlowHead(HeadConfig(**SMALL, path=path, target=kind, history=history)), inputs(32)
    optimizer, times = torch.optim.AdamW(head.parameters(), 1e-2), torch.linspace(0.05, 0.95, 32)

    def loss():
        torch.manual_seed(7)  # the same noise and coins each time
        return head.loss(x0, cond, past, times=times).mean()

    before = loss().item()
    for _ in range(15):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.9 * before
    assert all(p.isfinite().all() for p in head.parameters())
    if kind != "eps":
        assert draw(head.eval(), cond, past, steps=3).isfinite().all()


def test_a_head_draws_and_does_not_average():
    "Two possible patches, no hint which: the draws are one or the other, never the mean."
    seed_everything(0)
    head = FlowHead(HeadConfig(latent_dim=2, patch=2, cond_dim=1, width=32, layers=1, heads=2, hidden=64, history=False))
    optimizer = torch.optim.AdamW(head.parameters(), 5e-3)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, 2 - step / 125)
        sign = torch.randint(2, (128, 1, 1)) * 2.0 - 1
        optimizer.zero_grad()
        head.loss(sign.expand(-1, 2, 2), torch.zeros(128, 1), torch.zeros(128, 2, 2)).mean().backward()
        optimizer.step()
    drawn = draw(head.eval(), torch.zeros(300, 1), torch.zeros(300, 2, 2), guidance=1, steps=20)
    near = (drawn.abs() - 1).abs().amax((1, 2)) < 0.5
    assert near.float().mean() > 0.9
    assert 0.35 < (drawn.mean((1, 2)) > 0).float().mean() < 0.65


def test_time_features():
    t = torch.tensor([0.0, 0.25, 1.0])
    table = time_features(t)
    assert table.shape == (3, 256) and time_features(t, 8).shape == (3, 8)
    assert torch.equal(table[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    torch.testing.assert_close(table[1, [0, 128]], torch.tensor([250.0, 250.0]).cos().index_put((torch.tensor(1),), torch.tensor(250.0).sin()), atol=1e-3, rtol=0)
    torch.testing.assert_close(table.square().sum(1), torch.full((3,), 128.0))


# --- published shapes

def meta(**fields):
    with torch.device("meta"):
        return LocDiT(HeadConfig(**fields))


def test_parameter_count_of_our_default():
    net = LocDiT(HeadConfig())
    block = 192 * 4 * 192 + 3 * 192 * 512 + 2 * 192 + 6 * 192 * 193
    ends = 256 * 192 + 192 + 192 * 193 + 3 * 192 + 192 * (192 + 80 + 80) + 192 + 17 * 192 + 192 * 80 + 80 + 192
    assert count_parameters(net) == 3 * block + ends
    assert set(FlowHead(HeadConfig()).state_dict()) == {f"net.{name}" for name in net.state_dict()}  # angles are not saved


def test_voxcpm_blocks():
    "59.8 million in VoxCPM's LocDiT; ours adds AdaLN and gives every head its own keys and values."
    net = meta(latent_dim=64, patch=2, cond_dim=1024, width=1024, layers=4, heads=16, hidden=4096)
    adaln = sum(count_parameters(block.modulation) for block in net.blocks)
    ungrouped = 4 * 2 * 1024 * (1024 - 2 * 64)  # 16 heads of 64 instead of 2 groups
    assert adaln == 4 * 6 * 1024 * 1025
    assert count_parameters(net.blocks) - adaln - ungrouped == pytest.approx(59.8e6, rel=1e-3)
    assert net.length == 5  # the 5 tokens of each call


def test_mela_blocks():
    "185 million weights that work per token: 22 layers of 1024, feed-forward of 2 x 1024 without a gate."
    net = meta(patch=8, cond_dim=896, width=1024, layers=22, heads=16, hidden=2048)
    per_token = sum(count_parameters(block) - count_parameters(block.modulation) for block in net.blocks)
    gate = 22 * 1024 * 2048  # our feed-forward is gated: one matrix more
    assert per_token - gate == pytest.approx(184.5e6, rel=1e-3)
    assert net.length - 1 == 16  # MELA's frames: previous and noisy chunk
