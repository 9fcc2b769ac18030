"""The ODE steps of a rollout at second order: on data with known velocity, and inside real pipelines."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from flowrl.config import ConfigError, Recipe, load_recipe
from flowrl.policy import Policy
from flowrl.samplers import CPS, flow, solvers, time_grid
from flowrl.samplers.branching import branched_rollout
from flowrl.samplers.solvers import DPMpp2M
from flowrl.train.trainer import parts
from tests.oracles import TWO_MODES, mixture
from tests.pipelines import CALL, tiny

PROMPTS = ["a red circle", "blue", "two green squares"]
SEEDS = [1, 2, 3]
QUANTILES = torch.special.ndtri(torch.linspace(0.0005, 0.9995, 500, dtype=torch.float64))[:, None]


def make(name: str, num_steps: int = 6) -> Policy:
    return Policy(tiny(name), {**CALL[name], "num_inference_steps": num_steps})


def sd3_grid(num_steps: int) -> torch.Tensor:
    """diffusers' own: the last step starts near t = 0.009, so the one before is many times longer in lambda than its elder."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    return scheduler.sigmas


def vp_grid(num_steps: int) -> torch.Tensor:
    """SD1.5's: from t = 0.94 to 0.03."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, set_alpha_to_one=False)
    scheduler.set_timesteps(num_steps)
    return flow.vp_time(torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.alphas_cumprod[:1]]))


def follow(data, grid: torch.Tensor, solver: DPMpp2M | None) -> torch.Tensor:
    """Quantiles of the noise carried along the ODE; Euler without a solver."""
    x = QUANTILES.float()
    times = grid.tolist()
    for t, t_next in pairwise(times):
        v = data.velocity(x, t)
        x = x - (t - t_next) * v.float() if solver is None else solver.step(x, v, t, t_next, last=t_next == times[-1])
    return x


def cdf(data, x: torch.Tensor, t: float) -> torch.Tensor:
    means, variances = data.marginal(t)
    return (data.weights * torch.special.ndtr((x - means[:, 0]) / variances.sqrt())).sum(1, keepdim=True)


def exact(data, t: float, t_end: float) -> torch.Tensor:
    """The end of the ODE: in one dim it keeps quantiles, F_t(x) = F_end(x_end). By bisection, fp64."""
    target, low, high = cdf(data, QUANTILES, t), torch.full_like(QUANTILES, -20), torch.full_like(QUANTILES, 20)
    for _ in range(60):
        middle = (low + high) / 2
        below = cdf(data, middle, t_end) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return middle


def errors(data, make_grid, num_steps: int) -> tuple[float, float]:
    """Root mean square distance to the end of the ODE: Euler's, and that of DPM-Solver++."""
    grid = make_grid(num_steps)
    end = exact(data, float(grid[0]), float(grid[-1]))
    euler, second = ((follow(data, grid, solver) - end).square().mean().sqrt().item() for solver in (None, DPMpp2M()))
    return euler, second


# ------------------------------------------------------------------------------------------------ the arithmetic


def test_second_order_step_as_in_the_paper():
    """x' = (t'/t) x - (1 - t') (exp(-h_l) - 1) D, D = x0_i + (x0_i - x0_{i-1}) / (2 r), r = h_l_before / h_l, where r >= 1."""
    torch.manual_seed(0)
    (x_before, v_before, x, v), (t_before, t, t_next) = torch.randn(4, 5, 3), (0.9, 0.6, 0.45)
    lam = {u: math.log((1 - u) / u) for u in (t_before, t, t_next)}
    h_l, r = lam[t_next] - lam[t], (lam[t] - lam[t_before]) / (lam[t_next] - lam[t])
    assert r > 1
    x0, x0_before = x - t * v, x_before - t_before * v_before
    D = x0 + (x0 - x0_before) / (2 * r)
    solver = DPMpp2M()
    solver.step(x_before, v_before, t_before, t, last=False)
    expected = t_next / t * x - (1 - t_next) * math.expm1(-h_l) * D
    torch.testing.assert_close(solver.step(x, v, t, t_next, last=False), expected, rtol=1e-5, atol=1e-5)


def test_steps_without_a_correction_are_eulers_to_the_bit():
    """The first step, the step after t = 1, the last one, and the first after a reset."""
    torch.manual_seed(0)
    x, v = torch.randn(2, 4, 3)
    euler = lambda t, t_next: x - (t - t_next) * v  # noqa: E731
    solver = DPMpp2M()
    assert torch.equal(solver.step(x + 1, v, 1.0, 0.8, last=False), (x + 1) - (1.0 - 0.8) * v)
    assert torch.equal(solver.step(x, v, 0.8, 0.5, last=False), euler(0.8, 0.5))
    assert not torch.equal(solver.step(x + 1, v, 0.5, 0.3, last=False), (x + 1) - (0.5 - 0.3) * v)
    assert torch.equal(solver.step(x, v, 0.3, 0.0, last=True), euler(0.3, 0.0))
    solver.reset()
    assert torch.equal(solver.step(x, v, 0.5, 0.3, last=False), euler(0.5, 0.3))


def test_it_is_diffusers_dpm_solver_where_steps_shrink():
    """DPMSolverMultistepScheduler on SD1.5's noise levels, on the part of the grid where lambda's steps do not grow."""
    torch.manual_seed(0)
    theirs = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    theirs.set_timesteps(30)
    t = flow.vp_time(1 / (1 + theirs.sigmas.double() ** 2)).tolist()
    lam = [math.log((1 - u) / u) for u in t[:-1]]
    shrinking = [i for i in range(1, 28) if lam[i + 1] - lam[i] <= lam[i] - lam[i - 1]]
    assert len(shrinking) >= 5
    i = shrinking[2]
    data = mixture([0.3, 0.7], [-2.0, 1.0], [0.4, 0.4])
    native, ours = QUANTILES.float() * 1.2, None
    solver = DPMpp2M()
    for k in (i - 1, i):
        x = native / flow.vp_scale(t[k])
        v = data.velocity(x, t[k]).float()
        ours = solver.step(x, v, t[k], t[k + 1], last=False) * flow.vp_scale(t[k + 1])
        theirs._step_index = k
        native = theirs.step(flow.eps_from(x, v, t[k]), theirs.timesteps[k], native).prev_sample
    torch.testing.assert_close(ours, native, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ order and size of the error


@pytest.mark.parametrize("data", [TWO_MODES, mixture([0.3, 0.7], [-2.0, 1.0], [0.4, 0.4])], ids=["first", "second"])
@pytest.mark.parametrize("make_grid", [time_grid, sd3_grid], ids=["even", "sd3"])
def test_error_falls_with_the_square_of_the_step(make_grid, data):
    """160 -> 320 steps: Euler's error is halved, that of DPM-Solver++ falls at least to a third."""
    (euler, second), (euler_finer, second_finer) = (errors(data, make_grid, n) for n in (160, 320))
    assert 1.7 < euler / euler_finer < 2.4
    assert second / second_finer > 3
    assert second < euler / 10


@pytest.mark.parametrize(
    "make_grid", [time_grid, lambda n: time_grid(n, 3.0), sd3_grid, vp_grid], ids=["even", "shift", "sd3", "sd15"]
)
@pytest.mark.parametrize("num_steps", [5, 10, 20])
def test_few_steps_are_no_worse_than_eulers_on_any_grid(make_grid, num_steps):
    """At 10 steps the error is 0.35 (even), 0.59 (shift 3), 0.60 (SD3), 0.65 (SD1.5) of Euler's."""
    euler, second = errors(TWO_MODES, make_grid, num_steps)
    assert second < euler
    if num_steps == 10 and make_grid is time_grid:
        assert second < 0.4 * euler


def test_the_papers_extrapolation_is_worse_than_euler_on_sd3s_grid(monkeypatch):
    """Why c is at most 1: the paper's ends 10 steps at 2.6 times Euler's error, ours at 0.6 times."""
    euler, capped = errors(TWO_MODES, sd3_grid, 10)
    monkeypatch.setattr(solvers, "min", lambda one, ratio: ratio, raising=False)
    assert errors(TWO_MODES, sd3_grid, 10)[1] > 2 * euler
    assert capped < 0.65 * euler


# ------------------------------------------------------------------------------------------------ in pipelines


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_a_rollout_takes_the_solvers_steps(name):
    """Step by step in flow coordinates, with the velocity asked for from outside: flow and diffusion models alike."""
    policy = make(name)
    start = policy.rollout(PROMPTS, SEEDS, transition=CPS(0.8), stochastic=[0]).steps[0].native
    rolled = policy.rollout(PROMPTS, SEEDS, solver="dpmpp2m", latents=start).latents
    grid, solver = policy.grid(), DPMpp2M()
    x = start / grid.scale(grid.t[0])
    for t, t_next in pairwise(grid.t):
        v = policy.velocity(PROMPTS, x, torch.full((3,), t)).detach()
        x = solver.step(x, v, t, t_next, last=t_next == grid.t[-1])
    assert (rolled - x * grid.scale(grid.t[-1])).abs().max() < 1e-3 * rolled.abs().max()


def test_euler_is_the_default_to_the_bit():
    policy = make("sd3")
    kwargs = {"transition": CPS(0.8), "stochastic": [0]}
    plain, named = policy.rollout(PROMPTS, SEEDS, **kwargs), policy.rollout(PROMPTS, SEEDS, solver="euler", **kwargs)
    assert torch.equal(plain.latents, named.latents)
    assert not torch.equal(plain.latents, policy.rollout(PROMPTS, SEEDS, solver="dpmpp2m", **kwargs).latents)


def test_a_stochastic_step_starts_the_history_anew():
    """With every second step stochastic no step has a past on its own piece of the ODE: all are Euler's, to the bit."""
    policy = make("sd3")
    kwargs = {"transition": CPS(0.8), "stochastic": [1, 3]}
    euler, second = (policy.rollout(PROMPTS, SEEDS, solver=s, **kwargs) for s in ("euler", "dpmpp2m"))
    assert torch.equal(euler.steps[1].native, second.steps[1].native)
    # Steps 4 and 5 form a piece, and the last step of the grid has no correction either.
    assert torch.equal(euler.latents, second.latents)


def test_a_trajectory_in_branches_and_in_one_piece_is_the_same():
    policy = make("sd3")
    kwargs = {"transition": CPS(0.8), "stochastic": [2], "solver": "dpmpp2m"}
    whole = policy.rollout(PROMPTS, SEEDS, **kwargs)
    branched = branched_rollout(policy, PROMPTS, SEEDS, init_seeds=SEEDS, **kwargs)
    assert (whole.latents - branched.latents).abs().max() < 1e-4 * whole.latents.abs().max()


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_recorded_steps_replay_as_ever(name):
    policy = make(name)
    samples = policy.rollout(PROMPTS, SEEDS, transition=CPS(0.8), stochastic=[2, 3], keep_velocity=True, solver="dpmpp2m")
    for step in samples.steps:
        v = policy.velocity(PROMPTS, step)
        assert torch.equal(v, step.v)
        assert torch.equal(step.gaussian(v).log_prob(step.x_next), step.log_prob)


# ------------------------------------------------------------------------------------------------ options


def test_the_recipe_reaches_the_rollout():
    assert Recipe().solver == "euler"
    assert load_recipe("quickstart", ["solver=dpmpp2m"]).solver == "dpmpp2m"
    with pytest.raises(ConfigError, match="solver='dpm': choose one of euler, dpmpp2m"):
        load_recipe("quickstart", ["solver=dpm"])
    with pytest.raises(ValueError, match="solver='heun' is unknown: use 'euler' or 'dpmpp2m'"):
        make("sd3").rollout(PROMPTS, SEEDS, solver="heun")


def test_a_noise_level_that_falls_is_an_option_of_the_recipe():
    recipe = load_recipe("tiny-grpo", ["transition.decay=cosine", "transition.final_level=0.2"])
    assert parts(recipe)[1] == CPS(0.7, decay="cosine", final_level=0.2)
    for overrides, message in (
        (["transition.decay=linear"], "transition.decay='linear': choose one of none, cosine"),
        (["transition.final_level=0.2"], "transition: CPS final_level=0.2 needs a decay that ends there"),
        (["transition.decay=cosine", "transition.final_level=0.9"], "cannot fall to final_level=0.9"),
        (["transition=memoryless", "transition.noise_level=1"], "unknown transition option 'noise_level'"),
    ):
        with pytest.raises(ConfigError, match=message):
            parts(load_recipe("tiny-grpo", overrides))


def test_glass_is_refused_in_training_in_one_line():
    with pytest.raises(ConfigError, match="glass has no density in closed form.*choose flow_sde") as error:
        parts(load_recipe("tiny-grpo", ["transition=glass", "transition.inner=3"]))
    assert "\n" not in str(error.value)
