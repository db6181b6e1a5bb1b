"""Paths, targets, conversions, times, loss and the exact mixture, checked against algebra, counting and torchcfm."""
import math

import pytest
import torch

from ardm_course.core import CourseError
from ardm_course.flow import (KINDS, PATHS, GaussianMixture, convert, exact_predictor, expand, expectations, flow_loss,
                              interpolate, noise_like, sample_times, target)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(shape=(16, 8, 80), seed=0, dtype=torch.float64):
    g = generator(seed)
    return torch.randn(shape, generator=g, dtype=dtype), torch.randn(shape, generator=g, dtype=dtype)


@pytest.mark.parametrize("name", PATHS)
def test_path_ends_and_derivatives(name):
    path = PATHS[name]
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(path.alpha(ends), 1 - ends)
    torch.testing.assert_close(path.sigma(ends), ends)
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64).requires_grad_()
    for value, slope in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        exact, = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(slope(t), exact)
    t = t.detach()
    assert (path.alpha(t).diff() < 0).all() and (path.sigma(t).diff() > 0).all()


@pytest.mark.parametrize("name", PATHS)
def test_ends_of_the_way_are_data_and_noise(name):
    x0, x1 = pair()
    torch.testing.assert_close(interpolate(PATHS[name], x0, x1, torch.zeros(16, dtype=torch.float64)), x0)
    torch.testing.assert_close(interpolate(PATHS[name], x0, x1, torch.ones(16, dtype=torch.float64)), x1)


def test_cosine_path_keeps_variance():
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    torch.testing.assert_close(PATHS["cosine"].alpha(t) ** 2 + PATHS["cosine"].sigma(t) ** 2, torch.ones_like(t))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("shape, times", [((6, 2), (6,)), ((6, 8, 80), (6,)), ((6, 5, 8, 80), (6, 5)), ((6, 8, 80), ())])
def test_times_broadcast_over_examples(name, shape, times):
    "Each example (or patch) has its own time, also when sizes coincide."
    x0, x1 = pair(shape)
    t = torch.rand(times, generator=generator(1), dtype=torch.float64)
    xt = interpolate(PATHS[name], x0, x1, t)
    assert xt.shape == x0.shape
    index = tuple(size - 1 for size in times)
    torch.testing.assert_close(xt[index], interpolate(PATHS[name], x0[index], x1[index], t[index]))
    assert expand(t, x0).dim() == x0.dim()


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_conversions_round_trip(name, kind):
    path, (x0, x1) = PATHS[name], pair()
    t = sample_times(16, "uniform", generator=generator(2)).double() * 0.9 + 0.05
    xt = interpolate(path, x0, x1, t)
    for found, truth in zip(convert(path, target(path, kind, x0, x1, t), kind, xt, t), (x0, x1, target(path, "v", x0, x1, t))):
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PATHS)
def test_velocity_is_readable_at_both_ends(name):
    path, (x0, x1) = PATHS[name], pair()
    for end in (0.0, 1.0):
        t = torch.full((16,), end, dtype=torch.float64)
        xt = interpolate(path, x0, x1, t)
        found = convert(path, target(path, "v", x0, x1, t), "v", xt, t)
        torch.testing.assert_close(found[0], x0)
        torch.testing.assert_close(found[1], x1)


@pytest.mark.parametrize("name", PATHS)
def test_velocity_is_the_derivative_of_the_path(name):
    x0, x1 = pair((4, 3))
    t, h = torch.full((4,), 0.37, dtype=torch.float64), 1e-6
    slope = (interpolate(PATHS[name], x0, x1, t + h) - interpolate(PATHS[name], x0, x1, t - h)) / (2 * h)
    torch.testing.assert_close(target(PATHS[name], "v", x0, x1, t), slope, rtol=0, atol=1e-7)


def test_unknown_names_are_refused_with_advice():
    x0, x1 = pair((4, 2))
    with pytest.raises(CourseError, match="Use one of v, x0, eps"):
        target(PATHS["linear"], "noise", x0, x1, torch.rand(4))
    with pytest.raises(CourseError, match="Use one of"):
        convert(PATHS["linear"], x0, "noise", x0, torch.rand(4))
    with pytest.raises(CourseError, match="uniform"):
        sample_times(4, "log-norm")


def test_times_have_the_stated_distribution():
    times = sample_times(200_000, mean=-0.4, generator=generator(3))
    logits = torch.logit(times.double())
    assert abs(logits.mean() + 0.4) < 0.01 and abs(logits.std() - 1) < 0.01
    assert 0 < times.min() and times.max() < 1
    uniform = sample_times((200, 1000), "uniform", generator=generator(4))
    assert uniform.shape == (200, 1000) and abs(uniform.mean() - 0.5) < 0.005 and abs(uniform.var() - 1 / 12) < 0.002


def test_one_time_keeps_its_shape():
    "VoxCPM squeezes its times, so a batch of one loses its axis; ours keeps it."
    assert sample_times(1).shape == (1,) and sample_times((1, 1)).shape == (1, 1)


def test_same_seed_same_draws():
    x = torch.zeros(3, 5)
    assert torch.equal(noise_like(x, generator(5)), noise_like(x, generator(5)))
    assert torch.equal(sample_times(7, generator=generator(6)), sample_times(7, generator=generator(6)))
    assert noise_like(x.double(), generator()).dtype == torch.float64


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_by_hand(name, kind):
    x0, _ = pair((5, 8, 80), dtype=torch.float32)
    seen = {}

    def predict(xt, t):
        seen.update(xt=xt, t=t)
        return 0.5 * xt

    times = torch.linspace(0.1, 0.9, 5)
    loss = flow_loss(predict, x0, PATHS[name], kind, generator(7), times)
    x1 = noise_like(x0, generator(7))  # with given times, the noise is the first thing drawn
    assert loss.shape == (5,) and torch.equal(seen["t"], times)
    torch.testing.assert_close(seen["xt"], interpolate(PATHS[name], x0, x1, times))
    wanted = target(PATHS[name], kind, x0, x1, times)
    torch.testing.assert_close(loss, ((0.5 * seen["xt"] - wanted) ** 2).flatten(1).mean(1))


def test_loss_is_zero_for_an_oracle_and_reaches_the_gradient():
    x0, _ = pair((5, 2), dtype=torch.float32)
    assert flow_loss(lambda xt, t: x0, x0, PATHS["linear"], "x0", generator()).abs().max() == 0
    scale = torch.ones((), requires_grad=True)
    flow_loss(lambda xt, t: scale * xt, x0, PATHS["linear"], "v", generator()).mean().backward()
    assert scale.grad.isfinite() and scale.grad != 0


def test_loss_accepts_half_precision_answers():
    x0, _ = pair((5, 2), dtype=torch.float32)
    assert flow_loss(lambda xt, t: xt.bfloat16(), x0, PATHS["linear"], "v", generator()).dtype == torch.float32


MIXTURE = GaussianMixture(torch.tensor([[1.0, 1.0], [-1.0, 0.4], [0.2, -1.2]]), 0.3, torch.tensor([3.0, 2.0, 1.0]))


def test_mixture_samples_have_its_moments():
    x = MIXTURE.sample(200_000, generator(8))
    share = torch.tensor([3.0, 2.0, 1.0]) / 6
    mean = share @ MIXTURE.means
    variance = share @ (MIXTURE.means - mean) ** 2 + 0.3**2
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.01)
    torch.testing.assert_close(x.var(0), variance, rtol=0, atol=0.01)


@pytest.mark.parametrize("name", PATHS)
def test_mixture_score_is_the_gradient_of_the_log_density(name):
    "E[x1 | xt] = - sigma * score, so the guess of the noise must equal an autograd gradient."
    path = PATHS[name]
    xt = torch.randn(200, 2, generator=generator(9), dtype=torch.float64).requires_grad_()
    t = torch.tensor(0.55, dtype=torch.float64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    variance = (alpha * 0.3) ** 2 + sigma**2
    distance = (xt[:, None] - alpha * MIXTURE.means.double()).square().sum(2)
    log_density = torch.logsumexp(MIXTURE.weights.double().log() - distance / (2 * variance), 1)
    score, = torch.autograd.grad(log_density.sum(), xt)
    x0, x1 = expectations(MIXTURE, path, xt.detach(), t)
    torch.testing.assert_close(x1, -sigma * score)
    torch.testing.assert_close(alpha * x0 + sigma * x1, xt.detach())  # the two guesses must add up to xt


@pytest.mark.parametrize("name", PATHS)
def test_single_gaussian_flow_is_a_scaling(name):
    "One Gaussian N(m, s): the flow maps x1 to m + s x1 exactly, so v is known along it."
    mixture, path = GaussianMixture(torch.tensor([[0.7, -0.2]], dtype=torch.float64), 0.5), PATHS[name]
    x1 = torch.randn(64, 2, generator=generator(10), dtype=torch.float64)
    t = torch.tensor(0.4, dtype=torch.float64)
    spread = lambda t: ((path.alpha(t) * 0.5) ** 2 + path.sigma(t) ** 2).sqrt()
    place = lambda t: path.alpha(t) * mixture.means + spread(t) * x1
    h = 1e-6
    v = exact_predictor(mixture, path)(place(t), t)
    torch.testing.assert_close(v, (place(t + h) - place(t - h)) / (2 * h), rtol=0, atol=1e-7)


def test_exact_answer_has_the_lowest_loss():
    "The mean velocity minimises the loss: every disturbance of it costs its own square."
    x0 = MIXTURE.sample(100_000, generator(11))
    exact = exact_predictor(MIXTURE, PATHS["linear"])
    floor = flow_loss(exact, x0, PATHS["linear"], "v", generator(12)).mean()
    for shift in (0.3, -0.5):
        loss = flow_loss(lambda xt, t: exact(xt, t) + shift * torch.cos(xt), x0, PATHS["linear"], "v", generator(12)).mean()
        assert loss > floor
    constant = flow_loss(lambda xt, t: exact(xt, t) + 0.3, x0, PATHS["linear"], "v", generator(12)).mean()
    assert abs(constant - floor - 0.09) < 0.01


def test_a_small_network_learns_the_exact_field():
    g = generator(13)
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2))
    model = lambda xt, t: layers(torch.cat([xt, t[:, None]], 1))
    optimizer = torch.optim.Adam(layers.parameters(), 1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=400)
    for _ in range(400):
        loss = flow_loss(model, MIXTURE.sample(256, g), PATHS["linear"], "v", g).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x0, t = MIXTURE.sample(2000, g), sample_times(2000, generator=g)
    xt = interpolate(PATHS["linear"], x0, noise_like(x0, g), t)
    truth = exact_predictor(MIXTURE, PATHS["linear"])(xt, t)
    with torch.no_grad():
        assert (model(xt, t) - truth).square().mean() / truth.square().mean() < 0.1


def test_parity_with_torchcfm():
    "torchcfm: t = 0 is noise, t = 1 is data, and its x0 and x1 are our x1 and x0. sigma = 0 gives our linear path."
    library = pytest.importorskip("torchcfm.conditional_flow_matching")
    matcher = library.ConditionalFlowMatcher(sigma=0.0)
    data, noise = pair((64, 8, 80), dtype=torch.float32)
    s, xt, velocity = matcher.sample_location_and_conditional_flow(noise, data, t=torch.rand(64, generator=generator(14)))
    torch.testing.assert_close(interpolate(PATHS["linear"], data, noise, 1 - s), xt, rtol=0, atol=1e-6)
    torch.testing.assert_close(target(PATHS["linear"], "v", data, noise, 1 - s), -velocity, rtol=0, atol=1e-6)


def test_parity_with_torchcfm_variance_preserving():
    "torchcfm's variance-preserving matcher walks sin(pi s / 2) data + cos(pi s / 2) noise: our cosine path on the other clock."
    library = pytest.importorskip("torchcfm.conditional_flow_matching")
    matcher = library.VariancePreservingConditionalFlowMatcher(sigma=0.0)
    data, noise = pair((64, 8, 80), dtype=torch.float32)
    s, xt, velocity = matcher.sample_location_and_conditional_flow(noise, data, t=torch.rand(64, generator=generator(15)))
    torch.testing.assert_close(interpolate(PATHS["cosine"], data, noise, 1 - s), xt, rtol=0, atol=1e-5)
    torch.testing.assert_close(target(PATHS["cosine"], "v", data, noise, 1 - s), -velocity, rtol=0, atol=1e-5)


def test_ddpm_v_is_the_cosine_velocity_up_to_a_factor():
    "VibeVoice's v-prediction: alpha eps - sigma x0 = v / (pi / 2)."
    x0, x1 = pair()
    t = torch.rand(16, generator=generator(16), dtype=torch.float64)
    path, wide = PATHS["cosine"], expand(t, x0)
    torch.testing.assert_close(math.pi / 2 * (path.alpha(wide) * x1 - path.sigma(wide) * x0), target(path, "v", x0, x1, t))
