"""Grids, solvers and guidance, checked against algebra, convergence orders, diffusers and published loops."""
import math

import pytest
import torch

from ardm_course.core import CourseError
from ardm_course.flow import PATHS, GaussianMixture, convert, exact_predictor, interpolate
from ardm_course.sampling import (EPSS, GUIDANCE_OFFSET, SOLVERS, convert_guidance, ddim, dpm2, euler, euler_maruyama, guide,
                                  guided, heun, sample, time_grid, trajectory, zero_star_steps)

KINDS = ("v", "x0", "eps")
DETERMINISTIC = ("euler", "heun", "ddim", "dpm2")
MIXTURE = GaussianMixture(torch.tensor([[1.0, 1.0], [-1.0, 0.4], [0.2, -1.2]]), 0.4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def end(walk):
    *_, (_, x) = walk
    return x


# grids

@pytest.mark.parametrize("kind", ("linear", "cosine", "voxcpm", "epss"))
@pytest.mark.parametrize("steps", (5, 6, 7, 10, 12, 16))
def test_grids_fall_from_one_to_zero(kind, steps):
    grid = time_grid(steps, kind)
    assert grid.shape == (steps + 1,) and grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()


def test_published_grids():
    "Noise levels after k of 10 steps, recomputed from the formulas in the three repositories."
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    sway = lambda u, s: u + s * (torch.cos(math.pi / 2 * u) - 1 + u)
    torch.testing.assert_close(time_grid(10, "cosine").double(), 1 - sway(u, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(time_grid(10, "cosine").double(), 1 - (1 - torch.cos(math.pi / 2 * u)), rtol=0, atol=1e-6)
    torch.testing.assert_close(time_grid(10, "voxcpm").double(), sway(1 - u, 1), rtol=0, atol=1e-6)
    for steps, table in EPSS.items():
        assert len(table) == steps + 1
        pruned = torch.tensor(table, dtype=torch.float64) / 32
        torch.testing.assert_close(time_grid(steps, "epss").double(), 1 - sway(pruned, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", (2.0, 0, -3, "ten", None))
def test_a_grid_wants_a_count(steps):
    "A guidance scale in the place of a step count (VoxCPM V1, forward(sample_generate=True)) is refused."
    with pytest.raises(CourseError, match="whole number"):
        time_grid(steps)


def test_unknown_grids_and_tables_are_refused():
    with pytest.raises(CourseError, match="Use 'linear'"):
        time_grid(10, "karras")
    with pytest.raises(CourseError, match="5, 6, 7, 10, 12, 16"):
        time_grid(11, "epss")


# solvers

@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver, wanted", [("euler", 1), ("ddim", 1), ("heun", 2), ("dpm2", 2)])
def test_order_of_convergence(path, solver, wanted):
    "Slope of log error against log steps between two inner times."
    predict, start = exact_predictor(MIXTURE, PATHS[path]), noise(200, 2)
    walk = lambda name, steps: end(SOLVERS[name](predict, start, PATHS[path], "v", torch.linspace(0.8, 0.2, steps + 1, dtype=torch.float64)))
    truth = walk("heun", 1000)
    errors = [(walk(solver, steps) - truth).norm(dim=1).mean().item() for steps in (20, 40, 80)]
    slope = math.log(errors[0] / errors[2]) / math.log(4)
    assert wanted - 0.25 < slope < wanted + 0.6, f"{solver} on {path}: order {slope:.2f}"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_single_gaussian_reaches_the_exact_end(path, solver):
    "The flow to N(m, s) ends at m + s x1."
    mixture, x1 = GaussianMixture(torch.tensor([[0.7, -0.2]]), 0.5), noise(50, 2)
    x0 = sample(exact_predictor(mixture, PATHS[path]), x1, PATHS[path], "v", solver, time_grid(300, "linear"))
    torch.testing.assert_close(x0, mixture.means + 0.5 * x1, rtol=0, atol=0.01)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", ("ddim", "dpm2"))
@pytest.mark.parametrize("steps", (1, 2, 7))
def test_a_known_pair_is_exact_in_any_number_of_steps(path, solver, steps):
    "With a perfect guess of the data, splitting and mixing makes no error."
    x0, x1 = noise(4, 8, 80, seed=1), noise(4, 8, 80, seed=2)
    grid = time_grid(steps)
    for t, xt in trajectory(lambda xt, t: x0, x1, PATHS[path], "x0", solver, grid):
        torch.testing.assert_close(xt, interpolate(PATHS[path], x0, x1, torch.tensor(t, dtype=torch.float64)), rtol=0, atol=1e-6)


def test_straight_velocity_is_exact_for_euler():
    x0, x1 = noise(4, 8, 80, seed=1), noise(4, 8, 80, seed=2)
    torch.testing.assert_close(sample(lambda xt, t: x1 - x0, x1, PATHS["linear"], "v", "euler", time_grid(3)), x0)


def test_ddim_on_the_linear_path_is_euler():
    predict, start = exact_predictor(MIXTURE, PATHS["linear"]), noise(100, 2)
    for (_, a), (_, b) in zip(ddim(predict, start, PATHS["linear"], "v", time_grid(10)), euler(predict, start, PATHS["linear"], "v", time_grid(10))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_ddim_on_the_cosine_path_is_a_rotation():
    predict, path, x, grid = exact_predictor(MIXTURE, PATHS["cosine"]), PATHS["cosine"], noise(100, 2), time_grid(10)
    walk = ddim(predict, x, path, "v", grid)
    next(walk)
    for t, (t_next, xt) in zip(grid.tolist(), walk):
        turn = math.pi / 2 * (t_next - t)
        x = math.cos(turn) * x + math.sin(turn) * 2 / math.pi * predict(x, torch.full((100,), t, dtype=torch.float64))
        torch.testing.assert_close(x, xt, rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_every_kind_of_prediction_gives_the_same_walk(path, solver):
    start, grid = noise(50, 2), torch.linspace(0.98, 0.02, 12, dtype=torch.float64)
    walks = [end(SOLVERS[solver](exact_predictor(MIXTURE, PATHS[path], kind), start, PATHS[path], kind, grid)) for kind in KINDS]
    for walk in walks[1:]:
        torch.testing.assert_close(walk, walks[0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_ends_are_safe(path, solver, kind):
    "From t = 1 (noise predictions: from 0.98) down to exactly 0, on every solver, all numbers stay finite; also from a clamped grid."
    grid = time_grid(8).clamp(max=0.98) if kind == "eps" else time_grid(8)
    x = sample(exact_predictor(MIXTURE, PATHS[path], kind), noise(20, 2, dtype=torch.float32), PATHS[path], kind, solver, grid)
    assert x.isfinite().all() and x.shape == (20, 2) and x.dtype == torch.float32


@pytest.mark.parametrize("path", PATHS)
def test_a_noise_prediction_cannot_start_at_pure_noise(path):
    with pytest.raises(CourseError, match="Start lower"):
        trajectory(lambda xt, t: xt, noise(2, 2), PATHS[path], "eps")


def test_unknown_solver_is_refused():
    with pytest.raises(CourseError, match="Use one of euler, heun"):
        sample(lambda xt, t: xt, noise(2, 2), PATHS["linear"], "v", "rk45")


@pytest.mark.parametrize("solver, calls", [("euler", 10), ("ddim", 10), ("dpm2", 10), ("euler_maruyama", 10), ("heun", 19)])
def test_calls_and_their_arguments(solver, calls):
    "The network is asked at the grid times only, never at t = 0, with one time per row."
    seen = []

    def predict(xt, t):
        assert t.shape == (3,) and t.dtype == xt.dtype and (t == t[0]).all()
        seen.append(t[0].item())
        return xt

    grid = time_grid(10)
    points = list(trajectory(predict, noise(3, 8, 80, dtype=torch.float32), PATHS["linear"], "v", solver, grid))
    assert len(seen) == calls and set(seen) == set(grid[:-1].tolist())
    assert [t for t, _ in points] == grid.tolist()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_is_its_rows(solver):
    predict = exact_predictor(MIXTURE, PATHS["linear"])
    x1, options = noise(6, 2), {"noise": 0.0} if solver == "euler_maruyama" else {}
    together = sample(predict, x1, PATHS["linear"], "v", solver, **options)
    alone = torch.cat([sample(predict, row, PATHS["linear"], "v", solver, **options) for row in x1.split(1)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


def test_sample_keeps_the_input_and_no_gradient():
    x1 = noise(3, 2)
    before, weight = x1.clone(), torch.ones((), dtype=torch.float64, requires_grad=True)
    x0 = sample(lambda xt, t: weight * xt, x1, PATHS["linear"], "v")
    assert torch.equal(x1, before) and not x0.requires_grad
    assert end(trajectory(lambda xt, t: weight * xt, x1, PATHS["linear"], "v")).requires_grad  # for those who distil


# the stochastic solver

@pytest.mark.parametrize("path", PATHS)
def test_without_noise_euler_maruyama_is_euler(path):
    predict, x1 = exact_predictor(MIXTURE, PATHS[path]), noise(50, 2)
    torch.testing.assert_close(sample(predict, x1, PATHS[path], "v", "euler_maruyama", noise=0.0), sample(predict, x1, PATHS[path], "v", "euler"))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("amount", (1.0, 3.0))
def test_noise_keeps_the_distribution(path, amount):
    x1, truth = noise(5000, 2, dtype=torch.float32), MIXTURE.sample(100_000, generator(3))
    x0 = sample(exact_predictor(MIXTURE, PATHS[path]), x1, PATHS[path], "v", "euler_maruyama", time_grid(100), noise=amount, generator=generator(4))
    torch.testing.assert_close(x0.mean(0), truth.mean(0), rtol=0, atol=0.05)
    torch.testing.assert_close(x0.T.cov(), truth.T.cov(), rtol=0, atol=0.06)
    assert (x0 - sample(exact_predictor(MIXTURE, PATHS[path]), x1, PATHS[path], "v", "euler", time_grid(100))).norm(dim=1).mean() > 0.3


def test_same_seed_same_sample():
    walk = lambda seed: sample(exact_predictor(MIXTURE, PATHS["linear"]), noise(5, 2), PATHS["linear"], "v", "euler_maruyama", generator=generator(seed))
    assert torch.equal(walk(5), walk(5)) and not torch.equal(walk(5), walk(6))


# guidance

@pytest.mark.parametrize("zero_star", (False, True))
def test_scale_one_is_the_conditional_answer(zero_star):
    c, u = noise(3, 8, 80, seed=1), noise(3, 8, 80, seed=2)
    torch.testing.assert_close(guide(c, u, 1.0, zero_star), c)


def test_guidance_by_hand():
    c, u = noise(3, 8, 80, seed=1), noise(3, 8, 80, seed=2)
    torch.testing.assert_close(guide(c, u, 0.0), u)
    torch.testing.assert_close(guide(c, u, 2.5), u + 2.5 * (c - u))
    fit = torch.stack([(a * b).sum() / (b * b).sum() for a, b in zip(c, u)])[:, None, None]
    torch.testing.assert_close(guide(c, u, 2.5, zero_star=True), fit * u + 2.5 * (c - fit * u))
    torch.testing.assert_close(guide(c, -7 * u, 2.5, zero_star=True), guide(c, u, 2.5, zero_star=True))
    assert guide(c, 0 * u, 2.5, zero_star=True).isfinite().all()


@pytest.mark.parametrize("system", GUIDANCE_OFFSET)
def test_every_convention_gives_the_same_velocity(system):
    c, u = noise(2, 4, seed=1), noise(2, 4, seed=2)
    published = {"voxcpm": lambda g: u + g * (c - u), "vibevoice": lambda g: u + g * (c - u)}
    published |= {name: lambda g: (1 + g) * c - g * u for name in ("cosyvoice", "mela", "ditar")}
    published |= {name: lambda g: c + g * (c - u) for name in ("f5", "ming", "dots")}
    for value in (0.0, 0.7, 1.0, 2.0):
        torch.testing.assert_close(guide(c, u, convert_guidance(system, value)), published[system](value))


def test_converted_defaults():
    assert convert_guidance("cosyvoice", 0.7) == pytest.approx(1.7) and convert_guidance("dots", 1.2) == pytest.approx(2.2)
    assert convert_guidance("vibevoice", 1.3) == 1.3 and convert_guidance("ming", 2.0) == 3.0
    with pytest.raises(CourseError, match="Use one of"):
        convert_guidance("wavenet", 1.0)


def head(conditions):
    "A network with a condition per row, cut to the rows it is given: conditional ones first, nulls after."
    both = torch.cat([conditions, torch.zeros_like(conditions)])
    return lambda xt, t: torch.tanh(xt) * t.reshape(-1, *[1] * (xt.dim() - 1)) + both[:len(xt)]


@pytest.mark.parametrize("rows", (1, 2, 3))
@pytest.mark.parametrize("w", (0.0, 1.0, 2.0))
def test_guided_equals_two_calls_in_every_batch(rows, w):
    "The off branches of F5 and Ming (no doubling, but still split in two) as a test: w = 1 and w = 0, batch 1 included."
    conditions, xt, t = noise(rows, 8, 80, seed=3), noise(rows, 8, 80, seed=4), torch.full((rows,), 0.6, dtype=torch.float64)
    network, null = head(conditions), head(torch.zeros_like(conditions))
    answer = guided(network, w)(xt, t)
    assert answer.shape == xt.shape
    torch.testing.assert_close(answer, guide(network(xt, t), null(xt, t), w))


def test_guidance_of_one_runs_no_second_half():
    rows = []
    network = lambda xt, t: rows.append(len(xt)) or xt
    sample(guided(network, 1.0), noise(3, 2), PATHS["linear"], "v", grid=time_grid(4))
    sample(guided(network, 2.0), noise(3, 2), PATHS["linear"], "v", grid=time_grid(4))
    assert rows == [3] * 4 + [6] * 4


@pytest.mark.parametrize("zero_star", (False, True))
def test_guidance_commutes_with_what_the_network_predicts(zero_star):
    "Plain guidance is linear, so guiding v, x0 or eps is one thing; CFG-Zero* is defined on the velocity."
    path, xt, t = PATHS["linear"], noise(4, 8, 80), torch.full((4,), 0.6, dtype=torch.float64)
    c, u = noise(4, 8, 80, seed=1), noise(4, 8, 80, seed=2)
    v = guide(c, u, 2.0, zero_star)
    x0 = guide(convert(path, c, "v", xt, t)[0], convert(path, u, "v", xt, t)[0], 2.0, zero_star)
    same = torch.allclose(convert(path, v, "v", xt, t)[0], x0)
    assert same is not zero_star


@pytest.mark.parametrize("steps", (10, 25, 49))
def test_a_late_start_is_voxcpms_zero_velocity(steps):
    "VoxCPM's loop, written out: sway +1 grid, s*, the first steps with velocity zero."
    conditions, x1 = noise(2, 8, 64, seed=5), noise(2, 8, 64, seed=6)
    network, null = head(conditions), head(torch.zeros_like(conditions))
    clock = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    clock = clock + (torch.cos(math.pi / 2 * clock) - 1 + clock)
    x, still = x1, max(1, int(len(clock) * 0.04))
    for k in range(1, steps + 1):
        t = clock[k - 1].expand(2)
        if k > still:
            c, u = network(x, t), null(x, t)
            scale = (c * u).flatten(1).sum(1) / (u.flatten(1).square().sum(1) + 1e-8)
            u = u * scale[:, None, None]
            x = x - (clock[k - 1] - clock[k]) * (u + 2.0 * (c - u))
    assert zero_star_steps(steps) == still
    calls = []
    counted = lambda xt, t: calls.append(1) or network(xt, t)
    ours = sample(guided(counted, 2.0, zero_star=True), x1, PATHS["linear"], "v", "euler", time_grid(steps, "voxcpm")[zero_star_steps(steps):])
    assert len(calls) == steps - still
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


# parity with diffusers: same network outputs, step by step; its clocks are float32, hence the tolerance 1e-4

def smooth_network(xt, t):
    mix = torch.randn(xt.shape[-1], xt.shape[-1], generator=generator(7)) / xt.shape[-1] ** 0.5
    return torch.tanh(xt @ mix.to(xt)) + 0.3 * t.reshape(-1, *[1] * (xt.dim() - 1))


def cosine_betas(steps=1000):
    "Betas whose cumulative product is the cosine path: alpha bar = cos^2(pi t / 2)."
    t = torch.linspace(0, 0.995, steps + 1, dtype=torch.float64)
    bar = torch.cos(math.pi / 2 * t) ** 2
    return (1 - bar[1:] / bar[:-1]).numpy()


def cosine_time(alpha_bar):
    return 2 / math.pi * torch.acos(alpha_bar.double().sqrt())


DIFFUSERS_KIND = {"v": "v_prediction", "x0": "sample", "eps": "epsilon"}


def diffusers_walk(scheduler, times, x, kind, scale):
    "Run a scheduler on our network; `times` maps its steps to our clock, `scale` our prediction to theirs."
    for timestep, t in zip(scheduler.timesteps, times):
        answer = smooth_network(x, t.to(x).expand(len(x))) * (scale if kind == "v" else 1)
        x = scheduler.step(answer, timestep, x).prev_sample
    return x


@pytest.mark.parametrize("steps", (5, 10, 20))
@pytest.mark.parametrize("kind", KINDS)
def test_ddim_against_diffusers(kind, steps):
    library = pytest.importorskip("diffusers")
    scheduler = library.DDIMScheduler(trained_betas=cosine_betas(), clip_sample=False, prediction_type=DIFFUSERS_KIND[kind], timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    times = cosine_time(scheduler.alphas_cumprod[scheduler.timesteps])
    x1, grid = noise(4, 8, 16, dtype=torch.float32), torch.cat([times, torch.zeros(1, dtype=torch.float64)])
    theirs = diffusers_walk(scheduler, times, x1, kind, 2 / math.pi)  # their v is alpha eps - sigma x0
    torch.testing.assert_close(end(ddim(smooth_network, x1, PATHS["cosine"], kind, grid)), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", (5, 10, 20))
@pytest.mark.parametrize("kind", KINDS)
def test_dpm2_against_diffusers(kind, steps):
    library = pytest.importorskip("diffusers")
    scheduler = library.DPMSolverMultistepScheduler(trained_betas=cosine_betas(), prediction_type=DIFFUSERS_KIND[kind], solver_order=2,
                                                    algorithm_type="dpmsolver++", solver_type="midpoint", final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()  # sigma / alpha in our letters
    grid = 2 / math.pi * torch.atan(sigmas)
    x1 = noise(4, 8, 16, dtype=torch.float32)
    theirs = diffusers_walk(scheduler, grid[:-1], x1, kind, 2 / math.pi)
    torch.testing.assert_close(end(dpm2(smooth_network, x1, PATHS["cosine"], kind, grid)), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", (5, 10, 20))
def test_dpm2_on_the_linear_path_against_diffusers(steps):
    library = pytest.importorskip("diffusers")
    scheduler = library.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=2, final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    grid, x1 = scheduler.sigmas.double(), noise(4, 8, 16, dtype=torch.float32)
    theirs = diffusers_walk(scheduler, grid[:-1], x1, "v", 1.0)
    torch.testing.assert_close(end(dpm2(smooth_network, x1, PATHS["linear"], "v", grid)), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ("linear", "cosine", "voxcpm"))
def test_euler_against_diffusers(kind):
    library = pytest.importorskip("diffusers")
    scheduler = library.FlowMatchEulerDiscreteScheduler()
    grid, x1 = time_grid(10, kind), noise(4, 8, 16, dtype=torch.float32)
    scheduler.set_timesteps(sigmas=grid[:-1].tolist())
    theirs = diffusers_walk(scheduler, grid[:-1], x1, "v", 1.0)
    torch.testing.assert_close(end(euler(smooth_network, x1, PATHS["linear"], "v", grid)), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_heun_by_hand(path):
    "One step of the textbook method, then the plain last step."
    x1, grid = noise(4, 3), torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)
    ask = lambda x, t: smooth_network(x, torch.full((4,), t, dtype=torch.float64))
    first = x1 - 0.4 * (ask(x1, 0.9) + ask(x1 - 0.4 * ask(x1, 0.9), 0.5)) / 2
    torch.testing.assert_close(end(heun(smooth_network, x1, PATHS[path], "v", grid)), first - 0.5 * ask(first, 0.5))


def test_euler_maruyama_by_hand():
    x1, grid, path = noise(4, 3), torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64), PATHS["linear"]
    fresh = torch.randn(4, 3, generator=generator(8), dtype=torch.float64)
    ask = lambda x, t: smooth_network(x, torch.full((4,), t, dtype=torch.float64))
    guess = x1 + 0.1 * ask(x1, 0.9)  # x1 = xt + (1 - t) v on the linear path
    first = x1 - 0.4 * (ask(x1, 0.9) + 0.5 * 2.0 * guess) + math.sqrt(2.0 * 0.9 * 0.4) * fresh
    ours = end(euler_maruyama(smooth_network, x1, path, "v", grid, noise=2.0, generator=generator(8)))
    torch.testing.assert_close(ours, first - 0.5 * ask(first, 0.5))
