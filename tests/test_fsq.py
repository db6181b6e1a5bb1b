"""ardm_course.fsq: rounding that trains, the bottleneck, tokens, and parity with vector-quantize-pytorch."""
import itertools
import math

import pytest
import torch
from torch import nn
from vector_quantize_pytorch import FSQ as Peer

from ardm_course.core import CourseError, count_parameters
from ardm_course.fsq import FSQ, StoredWeights, TokenFSQ, bounded, round_ste
from ardm_course.neural import pack, unpack
from ardm_course.training import Callback, TrainConfig, Trainer, training_steps
from ardm_course.vocoder import MelCodec

LEVELS = [(3,) * 8, (8, 5, 5, 5), (8, 6, 5), (7, 5, 5, 5, 5), (4,) * 6, (19, 19), (16,), (5,), (3, 4, 5, 6, 7)]


def noise(*shape, seed=0, level=1.5, dtype=torch.float32):
    return level * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- rounding

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.1, 1.0, 30.0])
def test_round_ste_is_exactly_round(dtype, level):
    x = noise(20000, level=level).to(dtype)
    assert torch.equal(round_ste(x), x.round()) and round_ste(x).dtype == dtype


def test_round_ste_rounds_halves_as_torch_does():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert torch.equal(round_ste(x), torch.tensor([-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]))


def test_round_ste_passes_any_gradient_unchanged():
    x, weights = noise(5, 7).requires_grad_(), noise(5, 7, seed=1)
    (round_ste(x) * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_plain_rounding_has_no_gradient():
    x = noise(9).requires_grad_()
    x.round().sum().backward()
    assert not x.grad.any()


# ---- the bottleneck

@pytest.mark.parametrize("scale", [1, 2, 4, 9])
def test_a_scale_of_s_means_2s_plus_1_levels(scale):
    fsq = FSQ(6, 5, scale)
    with torch.no_grad(): fsq.down.weight.mul_(20)
    values = (scale * fsq.quantise(noise(4000, 6))).detach()
    assert torch.allclose(values, values.round(), atol=1e-5) and values.abs().max() <= scale + 1e-5
    assert len(values.round().unique()) == fsq.levels == 2 * scale + 1
    assert fsq.bits == pytest.approx(5 * math.log2(2 * scale + 1))


def test_published_size():
    fsq = FSQ(1024)
    assert (fsq.scale, fsq.levels, fsq.down.out_features) == (9, 19, 256)
    assert count_parameters(fsq) == 1024 * 256 + 256 + 256 * 1024 + 1024
    assert fsq.bits == pytest.approx(1087.5, abs=0.1)


def test_equals_the_formula_of_the_released_code():
    fsq, h = FSQ(12, 8), noise(3, 4, 12)
    hidden = torch.tanh(h @ fsq.down.weight.T + fsq.down.bias)
    wanted = torch.round(hidden * 9) / 9 @ fsq.up.weight.T + fsq.up.bias
    assert torch.allclose(fsq(h), wanted, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (3, 0), (), (7,), (2, 3, 4)])
def test_any_leading_shape(shape):
    fsq, tokens = FSQ(6, 4), TokenFSQ((5, 4, 3))
    assert fsq(noise(*shape, 6)).shape == (*shape, 6) and fsq.quantise(noise(*shape, 6)).shape == (*shape, 4)
    codes, indices = tokens(noise(*shape, 3))
    assert codes.shape == (*shape, 3) and indices.shape == shape and indices.dtype == torch.long
    assert torch.equal(tokens.decode(indices), codes)


def test_positions_do_not_see_each_other():
    fsq, h = FSQ(6, 4), noise(2, 5, 6)
    changed = h.clone()
    changed[0, 2] += 1
    same = (fsq(h) == fsq(changed)).all(-1)
    assert not same[0, 2] and same.sum() == 9
    assert torch.allclose(fsq(h)[1:, 3], fsq(h[1:, 3]), atol=1e-6)


def test_gradient_is_that_of_the_bottleneck_without_rounding_for_the_same_output_side():
    fsq, h = FSQ(6, 4), noise(3, 6).requires_grad_()
    pull = noise(3, 6, seed=2)
    (fsq(h) * pull).sum().backward()
    through, h.grad = h.grad, None
    (fsq.up(torch.tanh(fsq.down(h))) * pull).sum().backward()  # linear after the rounding: the same slope
    assert torch.allclose(through, h.grad, atol=1e-6) and through.abs().min() > 0


def test_everything_before_and_after_gets_a_gradient():
    fsq = FSQ(6, 4)
    fsq(noise(3, 6)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in fsq.parameters())


def test_the_bottleneck_learns_its_way_down():
    torch.manual_seed(0)
    x = noise(512, 3, level=0.5)
    fsq, before = FSQ(3, 3), None
    optimiser = torch.optim.Adam(fsq.parameters(), lr=0.02)
    for _ in range(200):
        loss = (fsq(x) - x).square().mean()
        before = before or loss.item()
        optimiser.zero_grad(); loss.backward(); optimiser.step()
    assert loss < 0.05 * before


def test_state_dict_round_trip():
    one, two, h = FSQ(6, 4), FSQ(6, 4), noise(2, 6)
    assert set(one.state_dict()) == {"down.weight", "down.bias", "up.weight", "up.bias"} and not TokenFSQ().state_dict()
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(h), two(h))


# ---- tokens

@pytest.mark.parametrize("levels", LEVELS)
def test_every_token_survives(levels):
    tokens = TokenFSQ(levels)
    every = torch.arange(tokens.vocabulary)
    values = tokens.decode(every)
    assert tokens.vocabulary == math.prod(levels) and len(values.unique(dim=0)) == tokens.vocabulary
    assert values.min() == -1 and values.max() <= 1
    wanted = [sorted({value[place] for value in values.tolist()}) for place in range(len(levels))]
    assert [len(column) for column in wanted] == list(levels)
    codes, indices = tokens(30 * values)  # the tanh sends these to zero or to an end, so only tokens made of those come back
    ends = ((values == 0) | (values == values.amin(0)) | (values == values.amax(0))).all(-1)
    assert torch.equal(indices[ends], every[ends]) and torch.equal(codes[ends], values[ends])


@pytest.mark.parametrize("levels", LEVELS)
def test_numbers_between_the_edges_reach_every_level(levels):
    tokens = TokenFSQ(levels)
    inputs = torch.linspace(-9, 9, 5001)[:, None].expand(-1, len(levels))
    codes, indices = tokens(inputs)
    assert [len(column.unique()) for column in codes.T] == list(levels)
    assert (codes.diff(dim=0) >= 0).all() and torch.equal(tokens.decode(indices), codes)


@pytest.mark.parametrize("count", range(3, 20))
def test_zero_stays_zero_and_ends_are_reached(count):
    levels = torch.tensor([count])
    inner = bounded(torch.tensor([[-40.0], [0.0], [40.0]]), levels)[:, 0]
    assert inner[1].abs() < 1e-6 and inner[0].round() == -(count // 2) and inner[2].round() == (count - 1) // 2


def test_the_first_number_is_the_lowest_digit():
    tokens = TokenFSQ((8, 5, 5, 5))
    assert tokens.places.tolist() == [1, 8, 40, 200]
    digits = itertools.product(range(5), range(5), range(5), range(8))
    assert torch.equal(tokens.decode(torch.arange(1000)), torch.tensor([[(a - 4) / 4, (b - 2) / 2, (c - 2) / 2, (d - 2) / 2] for d, c, b, a in digits]))


def test_tokens_move_to_a_device_and_to_half_precision():
    tokens, z = TokenFSQ((5, 4)), noise(100, 2)
    codes, indices = tokens(z.bfloat16())
    assert codes.dtype == torch.bfloat16 and indices.dtype == torch.long
    assert tokens(z.double())[0].dtype == torch.float64 and TokenFSQ((5, 4)).half().levels.dtype == torch.long
    assert TokenFSQ((5, 4)).to("meta").levels.is_meta


def test_agrees_with_the_bottleneck_but_for_a_thousandth():
    z = noise(50000, 4)
    differ = (TokenFSQ((19,) * 4)(z)[0] - round_ste(9 * torch.tanh(z)) / 9).abs()
    assert 0 < (differ > 0.01).float().mean() < 0.01 and differ.max() < 0.12


# ---- parity

@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parity_with_vector_quantize_pytorch(levels, dtype):
    "Its default bounding (preserve_symmetry False), no projections, one codebook: codes, tokens, gradients, and back."
    ours, peer = TokenFSQ(levels), Peer(list(levels))
    z = [noise(3, 500, len(levels), dtype=dtype).requires_grad_() for _ in range(2)]
    (codes, indices), (theirs, numbers) = ours(z[0]), peer(z[1])
    assert torch.equal(codes, theirs) and torch.equal(indices, numbers.long()) and codes.dtype == theirs.dtype == dtype
    pull = noise(*codes.shape, seed=5, dtype=dtype)
    (codes * pull).sum().backward()
    (theirs * pull).sum().backward()
    assert torch.equal(z[0].grad, z[1].grad)
    every = torch.arange(ours.vocabulary)
    assert torch.equal(ours.decode(every), peer.indices_to_codes(every)) and torch.equal(ours.decode(every), peer.implicit_codebook)
    assert torch.equal(peer.codes_to_indices(ours.decode(every)).long(), every)


def test_the_peers_symmetric_grid_is_another_one():
    z = noise(1000, 2)
    symmetric = Peer([4, 4], preserve_symmetry=True)(z[None])[0][0]
    assert symmetric.unique().numel() == 4 and not (symmetric == 0).any() and (TokenFSQ((4, 4))(z)[0] == 0).any()


def test_the_peer_refuses_two_levels_too():
    with pytest.raises(AssertionError): Peer([2, 2])


# ---- faults

@pytest.mark.parametrize("scale", [0, -1, 4.5, 0.9])
def test_scales_that_cannot_be(scale):
    with pytest.raises(CourseError, match="whole number"): FSQ(8, 4, scale)


@pytest.mark.parametrize("levels", [(), (2, 3), (3, 1), (0,)])
def test_levels_that_cannot_be(levels):
    with pytest.raises(CourseError, match="at least 3"): TokenFSQ(levels)


def test_more_combinations_than_numbers():
    with pytest.raises(CourseError, match="no token number"): TokenFSQ((19,) * 256)
    assert TokenFSQ((19,) * 14).vocabulary == 19**14  # still fits
    z = noise(100, 14)
    codes, indices = TokenFSQ((19,) * 14)(z)
    assert torch.equal(TokenFSQ((19,) * 14).decode(indices), codes)


def test_wrong_widths():
    with pytest.raises(CourseError, match="states of 8 numbers, not 4"): FSQ(8, 4)(noise(2, 3, 4))
    with pytest.raises(CourseError, match="8 levels for 7"): TokenFSQ()(noise(2, 3, 7))


@pytest.mark.parametrize("indices", [torch.tensor([-1]), torch.tensor([6561]), torch.tensor([1.0])])
def test_numbers_that_are_no_tokens(indices):
    with pytest.raises(CourseError, match="0 to 6560"): TokenFSQ().decode(indices)


def test_nan_is_refused_as_a_token_and_passed_on_by_the_bottleneck():
    z = noise(2, 3, 8)
    z[1, 2, 0] = math.nan
    with pytest.raises(CourseError, match="NaN has no token"): TokenFSQ()(z)
    assert FSQ(8, 4)(z).isnan().any(-1).nonzero().tolist() == [[1, 2]]
    assert TokenFSQ()(torch.full((8,), math.inf))[1] == 6560 and TokenFSQ()(torch.full((8,), -math.inf))[1] == 0


# ---- with the course's codec

def test_mel_frames_through_the_bottleneck_become_sound():
    codec, fsq = MelCodec(), FSQ(80, 16)
    wav = codec.decode(fsq(codec.encode(noise(1, 4800, level=0.1))).detach())
    assert wav.shape == (1, 4800) and wav.isfinite().all()


# ---- weights on a grid

class Wide(nn.Module):
    "Large matrices inside and outside a head, a small one, and what the loss was taken at."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.body, self.head = nn.Linear(4, 256), nn.Linear(256, 256), nn.Linear(256, 256)
        self.seen, self.validated, self.batches = [], [], []

    def forward(self, batch):
        self.batches.append(batch)
        (self.seen if self.training else self.validated).append({name: weight.detach().clone() for name, weight in self.named_parameters()})
        return {"loss": self.head(self.body(self.first(batch))).square().mean()}


class Inputs(list):
    lengths = property(lambda self: [1] * len(self))


class Exact(Callback):
    "The exact weights after every step."
    def before_fit(self, trainer):
        self.after = []
        self.copy(trainer)
    def after_step(self, trainer): self.copy(trainer)
    def copy(self, trainer): self.after.append({name: weight.detach().clone() for name, weight in trainer.model.named_parameters()})


def trainer_in(folder, callbacks, validate=None, **changes):
    settings = {"steps": 10, "batch_frames": 4, "decay_share": 0.5, "decay_batches": 2, "validate_every": 10, "learning_rate": 1e-2, "warmup": 1}
    return Trainer(Wide(), Inputs(noise(64, 4)), torch.stack, TrainConfig(**settings | changes), folder, callbacks, validate)


def run(folder, **changes):
    def validate(model):
        loss = model(torch.ones(2, 4))["loss"]
        model.batches.pop()
        return {"loss": loss}
    exact = Exact()
    trainer = trainer_in(folder, [StoredWeights(3, 5), exact], validate, **changes)
    trainer.fit()
    return trainer, trainer.model, exact.after


def test_only_the_decay_takes_its_loss_at_stored_weights(tmp_path):
    trainer, model, exact = run(tmp_path)
    assert len(model.seen) == 6 + 4 * 2 # steps at progress 0 to 0.5, then two batches each
    for number, seen in enumerate(model.seen):
        step = number if number < 6 else 6 + (number - 6) // 2
        wanted = exact[step] if step < 6 else {**exact[step], **{name: weight for name, weight in unpack(pack(exact[step], 3, 5)).items() if weight.ndim > 1}}
        for name in wanted: torch.testing.assert_close(seen[name], wanted[name], rtol=1e-6, atol=1e-9, msg=f"{name} at step {step}")
    assert not torch.equal(model.seen[-1]["body.weight"], exact[9]["body.weight"])


def test_the_gradient_is_that_at_the_rounded_weights(tmp_path):
    _, model, exact = run(tmp_path, decay_batches=1, clip=math.inf)
    twin = Wide()
    twin.load_state_dict(model.seen[-1])
    twin(model.batches[-1])["loss"].backward()
    for name, weight in twin.named_parameters(): torch.testing.assert_close(dict(model.named_parameters())[name].grad, weight.grad, msg=name)
    moved = (exact[-1]["body.weight"] - exact[-2]["body.weight"]).abs().max()
    assert 0 < moved < 0.1 * (exact[-2]["body.weight"] - model.seen[-1]["body.weight"]).abs().max() # a small step from the exact ones, not from the grid


def test_validation_and_the_end_hold_exact_weights(tmp_path):
    trainer, model, exact = run(tmp_path)
    for name, average in trainer.ema.state_dict().items(): assert torch.equal(model.validated[-1][name], average)
    for name, weight in model.named_parameters(): assert torch.equal(weight, exact[-1][name])
    model.train()
    model(torch.ones(1, 4)) # the hooks are gone
    assert torch.equal(model.seen[-1]["body.weight"], model.body.weight)


def test_a_resumed_run_is_the_run_that_did_not_stop(tmp_path):
    _, whole, _ = run(tmp_path / "whole")
    first = trainer_in(tmp_path / "parts", [StoredWeights(3, 5)], checkpoint_every=8)
    for trainer in training_steps(first):
        if trainer.state.step == 8: break
    _, again, _ = run(tmp_path / "parts", checkpoint_every=8)
    for name, weight in whole.named_parameters(): assert torch.equal(weight, dict(again.named_parameters())[name]), name


def test_weights_spread_over_processes_are_refused(tmp_path):
    trainer = Trainer(Wide(), Inputs(noise(4, 4)), torch.stack, TrainConfig(), tmp_path, [])
    trainer.model.body.weight.device_mesh = "two processes" # as FSDP marks them
    with pytest.raises(CourseError, match="FSDP"): StoredWeights(3).before_fit(trainer)
