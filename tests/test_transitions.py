"""The Gaussian steps: identities between samplers, exact variances, convergence to the data, densities, gradients."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flowrl.samplers import (
    CPS,
    DDIM,
    GLASS,
    ODE,
    TRANSITIONS,
    DanceSDE,
    FlowSDE,
    Gaussian,
    MatchedCPS,
    Memoryless,
    Transition,
    flow,
    t_max_of,
    time_grid,
)
from tests.oracles import TWO_MODES, gaussian, memory, mixture, propagate, simulate

DECAYING = [
    FlowSDE(1.2, decay="cosine", final_level=0.3),
    DanceSDE(0.5, decay="cosine"),
    CPS(0.8, decay="cosine"),
    MatchedCPS(1.0, decay="cosine", final_level=0.5),
    DDIM(1.0, decay="cosine", final_level=0.2),
]
STOCHASTIC = [
    FlowSDE(0.7), FlowSDE(1.2), DanceSDE(0.3), Memoryless(), CPS(0.8), MatchedCPS(0.7), MatchedCPS(1.4), DDIM(0.5), DDIM(1.0),
    *DECAYING,
]  # fmt: skip
SILENT = [ODE(), FlowSDE(0.0), DanceSDE(0.0), CPS(0.0), MatchedCPS(0.0), DDIM(0.0)]
STEPS = [(1.0, 0.9, 0.9), (0.9, 0.8, 0.9), (0.5, 0.3, 0.9), (0.1, 0.02, 0.9), (0.1, 0.0, 0.9)]


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors in many steps: threads that wait for each other cost minutes on a busy machine and gain nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(n: int = 3, shape: tuple[int, ...] = (4, 3, 2, 2), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(n)]


def generic_sde(x, v, t, t_next, g):
    """mean = x - h [v + g^2 / (2 t) (x + (1 - t) v)], std = g sqrt(h), in floats."""
    h = t - t_next
    return x - h * (v + g**2 / (2 * t) * (x + (1 - t) * v)), g * math.sqrt(h)


# -- identities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("transition", SILENT, ids=str)
def test_without_noise_every_transition_is_euler_to_the_bit(transition, step):
    x, v, z = draw()
    law = transition.transition(x, v, *step)
    t, t_next, _ = (torch.tensor(u) for u in step)
    assert transition.deterministic
    assert torch.equal(law.mean, x - (t - t_next) * v)
    assert torch.equal(law.sample(z), law.mean)
    assert float(law.std) == 0
    assert float(transition.velocity_jacobian(*step)) == -float(t - t_next)


def test_ode_is_the_euler_step_of_diffusers_to_the_bit():
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    x, v = draw(2)
    for timestep, t, t_next in zip(scheduler.timesteps, scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        ours = ODE().transition(x, v, t, t_next, t_max_of(scheduler.sigmas)).mean
        assert torch.equal(ours, scheduler.step(v, timestep, x).prev_sample)


def test_cps_at_a_right_angle_is_the_stochastic_sampling_of_diffusers():
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(8)
    x, v = draw(2)
    for timestep, t, t_next in zip(scheduler.timesteps, scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        torch.manual_seed(1)
        theirs = scheduler.step(v, timestep, x).prev_sample
        torch.manual_seed(1)
        ours = CPS(1.0).transition(x, v, t, t_next, t_max_of(scheduler.sigmas)).sample(torch.randn_like(x))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("t", "t_next", "t_max"), STEPS)
@pytest.mark.parametrize("a", [0.3, 0.7, 1.2])
def test_flow_sde_is_the_generic_sde_with_its_g(a, t, t_next, t_max):
    """g = a sqrt(t / (1 - t)); at t = 1 only this factor sees t_max = 0.9, so g^2 = a^2 / 0.1 and J stays -h."""
    x, v = draw(2)
    g = a * math.sqrt(t / (1 - min(t, t_max)))
    mean, std = generic_sde(x, v, t, t_next, g)
    law = FlowSDE(a).transition(x, v, t, t_next, t_max)
    torch.testing.assert_close(law.mean, mean, rtol=1e-5, atol=1e-5)
    assert float(law.std) == pytest.approx(std, rel=1e-5)


@pytest.mark.parametrize(("t", "t_next", "t_max"), STEPS)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_dance_sde_is_the_generic_sde_with_constant_g(eta, t, t_next, t_max):
    x, v = draw(2)
    mean, std = generic_sde(x, v, t, t_next, eta)
    law = DanceSDE(eta).transition(x, v, t, t_next, t_max)
    torch.testing.assert_close(law.mean, mean, rtol=1e-5, atol=1e-5)
    assert float(law.std) == pytest.approx(std, rel=1e-5)


@pytest.mark.parametrize(("t", "t_next", "t_max"), STEPS)
def test_memoryless_is_the_generic_sde_with_its_g(t, t_next, t_max):
    """g^2 = 2 t / (1 - t), where t = 1 sees t_max = 0.9: so it is FlowSDE(sqrt(2))."""
    x, v = draw(2)
    mean, std = generic_sde(x, v, t, t_next, math.sqrt(2 * t / (1 - min(t, t_max))))
    law, flow_sde = (s.transition(x, v, t, t_next, t_max) for s in (Memoryless(), FlowSDE(math.sqrt(2))))
    torch.testing.assert_close(law.mean, mean, rtol=1e-5, atol=1e-5)
    assert float(law.std) == pytest.approx(std, rel=1e-5)
    torch.testing.assert_close(law.mean, flow_sde.mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("t", "t_next", "t_max"), STEPS[1:])
def test_flow_sde_simplified(t, t_next, t_max):
    """mean = x (1 - a^2 h / (2 (1 - t))) - (1 + a^2 / 2) h v: the coefficient of v does not know t."""
    (x, v), a, h = draw(2), 0.7, t - t_next
    mean = x * (1 - a**2 * h / (2 * (1 - t))) - (1 + a**2 / 2) * h * v
    torch.testing.assert_close(FlowSDE(a).transition(x, v, t, t_next, t_max).mean, mean, rtol=1e-5, atol=1e-5)
    assert float(FlowSDE(a).velocity_jacobian(t, t_next, t_max)) == pytest.approx(-(1 + a**2 / 2) * h, rel=1e-5)


def test_flow_sde_by_hand():
    """x = 2, v = 1, t = 0.5, t_next = 0.25, a = 1: g^2 = 1, eps_hat = 2.5, removed = 0.25 / (2 * 0.5) = 0.25.

    mean = 2 - 0.25 - 0.625 = 1.125, std = 0.5, J = -0.25 - 0.25 * 0.5 = -0.375.
    """
    law = FlowSDE(1.0).transition(torch.tensor([[2.0]]), torch.tensor([[1.0]]), 0.5, 0.25, 0.9)
    assert law.mean.item() == 1.125
    assert law.std.item() == 0.5
    assert FlowSDE(1.0).velocity_jacobian(0.5, 0.25, 0.9).item() == -0.375


@pytest.mark.parametrize(("t", "t_next", "t_max"), STEPS)
@pytest.mark.parametrize("noise_level", [0.3, 0.8, 1.0])
def test_cps_as_in_the_paper(noise_level, t, t_next, t_max):
    x, v = draw(2)
    u = noise_level * math.pi / 2
    mean = (1 - t_next) * (x - t * v) + t_next * math.cos(u) * (x + (1 - t) * v)
    law = CPS(noise_level).transition(x, v, t, t_next, t_max)
    torch.testing.assert_close(law.mean, mean, rtol=1e-5, atol=1e-5)
    assert float(law.std) == pytest.approx(t_next * math.sin(u), abs=1e-7)


@pytest.mark.parametrize(("t", "t_next", "t_max"), STEPS)
@pytest.mark.parametrize("a", [0.3, 0.7, 1.4])
def test_matched_cps_keeps_the_noise_budget_with_its_own_std(a, t, t_next, t_max):
    """s^2 = t'^2 (1 - rho^(a^2)), mean (1 - t') x0_hat + sqrt(t'^2 - s^2) eps_hat; t' at t = 1, 0 at t' = 0."""
    x, v = draw(2)
    s = t_next * math.sqrt(1 - ((1 - t) * t_next / ((1 - t_next) * t)) ** (a**2))
    mean = (1 - t_next) * (x - t * v) + math.sqrt(t_next**2 - s**2) * (x + (1 - t) * v)
    law = MatchedCPS(a).transition(x, v, t, t_next, t_max)
    torch.testing.assert_close(law.mean, mean, rtol=1e-5, atol=1e-5)
    assert float(law.std) == pytest.approx(s, rel=1e-5, abs=1e-7)
    assert float(law.std) == pytest.approx(t_next if t == 1 else s)


@pytest.mark.parametrize(("t", "t_next", "t_max"), STEPS)
def test_matched_cps_reaches_ddim_and_cps(t, t_next, t_max):
    """rho^(2 / 2) = rho is DDIM(1); rho^infinity = 0 keeps none of the noise, as CPS at a right angle."""
    x, v = draw(2)
    for a, other in ((math.sqrt(2), DDIM(1.0)), (1e3, CPS(1.0))):
        ours, theirs = (s.transition(x, v, t, t_next, t_max) for s in (MatchedCPS(a), other))
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-5, atol=1e-5)
        assert float(ours.std) == pytest.approx(float(theirs.std), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("a", [0.4, 0.7, 1.4])
def test_matched_cps_with_small_steps_is_flow_sde(a):
    x, v = draw(2)
    h = 1e-4
    matched, sde = (s.transition(x, v, 0.6, 0.6 - h, 0.9) for s in (MatchedCPS(a), FlowSDE(a)))
    assert float(matched.std) == pytest.approx(float(sde.std), rel=10 * h)
    torch.testing.assert_close(matched.mean - x, sde.mean - x, rtol=0, atol=100 * h**2)


def test_matched_cps_solves_the_sde_of_known_data():
    """r of a whole step is the product of the r of its parts, as for the exact solution: here 0.9 -> 0.4 and four parts."""
    kept = lambda t, t_next: 1 - MatchedCPS(0.7).swap(*map(torch.tensor, (t, t_next, 0.9)))[0] / t_next  # noqa: E731
    nodes = [0.9, 0.8, 0.65, 0.5, 0.4]
    parts = math.prod(float(kept(t, t_next)) for t, t_next in pairwise(nodes))
    assert float(kept(0.9, 0.4)) == pytest.approx(parts, rel=1e-5)
    assert float(kept(0.9, 0.4)) == pytest.approx((0.1 * 0.4 / (0.6 * 0.9)) ** (0.49 / 2), rel=1e-5)


def test_matched_cps_keeps_its_digits_for_small_steps():
    """t = 0.5, h = 2^-20, 1 - rho = 4 h up to O(h^2): std = 0.5 sqrt(4 a^2 h) = a sqrt(h)."""
    h = 2.0**-20
    assert float(MatchedCPS(0.7).std(0.5, 0.5 - h, 0.9)) == pytest.approx(0.7 * math.sqrt(h), rel=1e-5)


@pytest.mark.parametrize(("t", "t_next", "t_max"), STEPS)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_as_in_the_paper(eta, t, t_next, t_max):
    x, v = draw(2)
    std = eta * t_next * math.sqrt(1 - t_next**2 * (1 - t) ** 2 / (t**2 * (1 - t_next) ** 2))
    mean = (1 - t_next) * (x - t * v) + math.sqrt(t_next**2 - std**2) * (x + (1 - t) * v)
    law = DDIM(eta).transition(x, v, t, t_next, t_max)
    torch.testing.assert_close(law.mean, mean, rtol=1e-5, atol=1e-5)
    assert float(law.std) == pytest.approx(std, abs=1e-7)


@pytest.mark.parametrize(("t", "t_next", "t_max"), STEPS[1:-1])
def test_ddim_at_eta_one_is_first_order_sde_dpm(t, t_next, t_max):
    """SDE-DPM++ 1 in lambda = log((1 - t) / t), k = exp(-(lambda' - lambda)):

    mean = (t' / t) k x + (1 - t') (1 - k^2) x0_hat, std = t' sqrt(1 - k^2).
    """
    x, v = draw(2)
    k = math.exp(math.log((1 - t) / t) - math.log((1 - t_next) / t_next))
    mean = t_next / t * k * x + (1 - t_next) * (1 - k**2) * (x - t * v)
    law = DDIM(1.0).transition(x, v, t, t_next, t_max)
    torch.testing.assert_close(law.mean, mean, rtol=1e-5, atol=1e-5)
    assert float(law.std) == pytest.approx(t_next * math.sqrt(1 - k**2), rel=1e-5)


def test_ddim_keeps_its_digits_for_small_steps():
    """t = 0.5, h = 2^-20: 1 - rho^2 = (1 + rho) h / (0.5 (0.5 + h)) = 8 h up to O(h^2), so std = 0.5 sqrt(8 h)."""
    h = 2.0**-20
    assert float(DDIM(1.0).std(0.5, 0.5 - h, 0.9)) == pytest.approx(0.5 * math.sqrt(8 * h), rel=1e-5)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim_with_small_steps_is_flow_sde_with_root_two_eta(eta):
    x, v = draw(2)
    h, a = 1e-4, math.sqrt(2) * eta
    ddim, sde = (s.transition(x, v, 0.6, 0.6 - h, 0.9) for s in (DDIM(eta), FlowSDE(a)))
    assert float(ddim.std) == pytest.approx(float(sde.std), rel=10 * h)
    torch.testing.assert_close(ddim.mean - x, sde.mean - x, rtol=0, atol=100 * h**2)


# -- noise levels that fall -------------------------------------------------------------------------------------------


def test_cosine_decay_by_hand():
    """level(t) = 0.2 + 0.6 (1 + cos(pi (1 - t))) / 2: 0.8 at 1, 0.5 at 1/2, 0.2 + 0.3 (1 - 1 / sqrt 2) = 0.2879 at 1/4."""
    level = CPS(0.8, decay="cosine", final_level=0.2).level(torch.tensor([1.0, 0.5, 0.25, 0.0]))
    assert torch.as_tensor(level).tolist() == pytest.approx([0.8, 0.5, 0.28787, 0.2], abs=1e-5)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("transition", DECAYING, ids=str)
def test_a_decaying_step_is_the_constant_one_at_its_level(transition, step):
    """Each transition reads the level at the start of the step and nowhere else."""
    x, v = draw(2)
    constant = type(transition)(float(transition.level(torch.tensor(step[0]))))
    ours, theirs = (s.transition(x, v, *step) for s in (transition, constant))
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-5, atol=1e-5)
    assert float(ours.std) == pytest.approx(float(theirs.std), rel=1e-4, abs=1e-7)


def test_decay_spends_the_noise_early():
    """Std over the std of the constant level, for a Dance-SDE whose g falls from 0.4 to 0: 1 at t = 1, sin^2(pi t / 2) on."""
    t, t_next = torch.tensor([1.0, 0.75, 0.5, 0.25]), torch.tensor([0.75, 0.5, 0.25, 0.0])
    ratio = DanceSDE(0.4, decay="cosine").std(t, t_next, 0.75) / DanceSDE(0.4).std(t, t_next, 0.75)
    assert ratio.tolist() == pytest.approx([1, 0.85355, 0.5, 0.14645], abs=1e-5)


# -- one step from known data ------------------------------------------------------------------------------------------


def one_step_noise_variance(transition: Transition, t: float, t_next: float, t_max: float) -> tuple[float, float]:
    """(mean, variance) of x' given x0 = 1, for the perfect velocity v = (x - x0) / t and x = (1 - t) x0 + t eps.

    The mean of x' is affine in eps: a + b eps, so the variance is b^2 + std^2.
    """
    x0, eps = torch.ones(2, 1), torch.tensor([[0.0], [1.0]])
    x = flow.noised(x0, eps, t)
    law = transition.transition(x, flow.velocity_from_x0(x, x0, t), t, t_next, t_max)
    a, b = float(law.mean[0]), float(law.mean[1] - law.mean[0])
    return a, b**2 + float(law.std) ** 2


@pytest.mark.parametrize(("t", "t_next", "t_max"), STEPS)
@pytest.mark.parametrize("transition", [FlowSDE(0.7), FlowSDE(1.4), DanceSDE(0.3), DanceSDE(1.0), Memoryless()], ids=str)
def test_sde_step_from_known_data_has_the_predicted_excess_variance(transition, t, t_next, t_max):
    """Var[x' | x0] = t'^2 + h^2 / t^2 (g^2 t + g^4 / 4); Dance 0.3 at t = 0.1, t' = 0: sqrt(0.009 + 0.002) = 0.105."""
    a = math.sqrt(2) if transition == Memoryless() else transition.noise_level
    g2 = a**2 if isinstance(transition, DanceSDE) else a**2 * t / (1 - min(t, t_max))
    mean, variance = one_step_noise_variance(transition, t, t_next, t_max)
    assert mean == pytest.approx(1 - t_next, abs=1e-5)
    assert variance == pytest.approx(t_next**2 + (t - t_next) ** 2 / t**2 * (g2 * t + g2**2 / 4), rel=1e-4)
    if transition == DanceSDE(0.3) and t_next == 0.0:
        assert math.sqrt(variance) == pytest.approx(0.105, abs=5e-4)


@pytest.mark.parametrize(("t", "t_next", "t_max"), STEPS)
@pytest.mark.parametrize(
    "transition", [ODE(), CPS(0.3), CPS(1.0), MatchedCPS(0.7), MatchedCPS(3.0), DDIM(0.5), DDIM(1.0), *DECAYING[2:]], ids=str
)
def test_cps_and_ddim_steps_from_known_data_are_exact(transition, t, t_next, t_max):
    mean, variance = one_step_noise_variance(transition, t, t_next, t_max)
    assert mean == pytest.approx(1 - t_next, abs=1e-5)
    assert variance == pytest.approx(t_next**2, rel=1e-4, abs=1e-10)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("transition", [*STOCHASTIC, ODE()], ids=str)
def test_point_data_is_reached_exactly_if_the_last_step_is_deterministic(transition, num_steps):
    point = gaussian([0.7, -1.1], 0.0)
    x = simulate(transition, point.velocity, time_grid(num_steps), n=50, seed=0, dims=2)
    torch.testing.assert_close(x, point.means.float().expand(50, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("transition", [FlowSDE(0.7), DanceSDE(0.3)], ids=str)
def test_sde_last_step_would_leave_noise_in_the_picture(transition):
    """At least g^2 t + g^4 / 4 at t = 0.1: a std of 0.078 (Flow 0.7, g^2 = 0.49 / 9) and 0.105 (Dance 0.3)."""
    point = gaussian(0.7, 0.0)
    g2 = {FlowSDE(0.7): 0.49 / 9, DanceSDE(0.3): 0.09}[transition]
    _, variance = propagate(transition, point, time_grid(10), last_step=transition)
    assert g2 * 0.1 + g2**2 / 4 <= variance < 1.2 * (g2 * 0.1 + g2**2 / 4)
    assert propagate(transition, point, time_grid(10))[1] < 1e-9


# -- Gaussian data: the law of the samples, without sampling -----------------------------------------------------------

DATA = gaussian(1.5, 0.6)


def variance_error(transition: Transition, num_steps: int, shift: float = 1.0) -> float:
    """Relative error of the variance of the samples; the mean must be right for any transition and number of steps."""
    mean, variance = propagate(transition, DATA, time_grid(num_steps, shift))
    assert mean == pytest.approx(1.5, abs=1e-4)
    return variance / 0.36 - 1


def test_propagate_agrees_with_simulation():
    """The closed form against samples: 40000 draws, standard errors 0.5 / 200 (mean) and 0.7 % (variance)."""
    for transition in (DDIM(1.0), CPS(0.8), FlowSDE(0.7)):
        mean, variance = propagate(transition, DATA, time_grid(10))
        x = simulate(transition, DATA.velocity, time_grid(10), n=40_000, seed=0)
        assert x.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / 40_000))
        assert x.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / 40_000))


LINEAR = [
    ODE(), DanceSDE(0.3), DanceSDE(1.0), DDIM(0.5), DDIM(1.0), MatchedCPS(0.7), MatchedCPS(1.4), DECAYING[1], *DECAYING[3:],
]  # fmt: skip


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("transition", LINEAR, ids=str)
def test_error_on_gaussian_data_is_proportional_to_the_step(transition, shift):
    """Four times the steps, a quarter of the error (3 to 4.6 while higher orders fade), and little of it at the end."""
    few, many = variance_error(transition, 120, shift), variance_error(transition, 480, shift)
    assert 3.0 < few / many < 4.6
    assert abs(many) < 0.03


@pytest.mark.parametrize("transition", [FlowSDE(1.4), Memoryless(), DECAYING[0]], ids=str)
def test_flow_sde_error_is_proportional_to_the_step_if_its_noise_level_is_large(transition):
    """1.4, sqrt(2), and from 1.2 down, on a shifted grid, where no sign change hides the order."""
    few, many = variance_error(transition, 120, 3.0), variance_error(transition, 480, 3.0)
    assert 3.0 < few / many < 4.6
    assert abs(many) < 0.01


@pytest.mark.parametrize("a", [0.5, 0.7, 1.0])
def test_flow_sde_forgets_its_first_step_as_h_to_the_a_squared(a):
    """At t = 1 the step has g^2 h = a^2 whatever h is, and adds a^4 / 4 to a variance of 1. Later steps contract it by

    prod_k (1 - a^2 / (2 k))^2 ~ h^(a^2). Measured as the difference to a start from the exact marginal at grid[1]:
    300 -> 3000 steps must divide it by 10^(a^2): 1.8 for a = 0.5, 3.1 for 0.7, 10 for 1.
    """
    left = []
    for num_steps in (300, 3000):
        grid = time_grid(num_steps)
        left.append(propagate(FlowSDE(a), DATA, grid)[1] - propagate(FlowSDE(a), DATA, grid[1:])[1])
    assert left[0] > 0
    assert math.log10(left[0] / left[1]) == pytest.approx(a**2, abs=0.03)


def test_flow_sde_with_usual_settings_is_within_a_few_percent():
    assert abs(variance_error(FlowSDE(0.7), 10)) < 0.1
    assert abs(variance_error(FlowSDE(0.7), 40)) < 0.01


@pytest.mark.parametrize("noise_level", [0.3, 0.8, 1.0])
def test_cps_does_not_preserve_the_marginals(noise_level):
    """With h -> 0 the law at each t settles where a step leaves it unchanged. With S = (1 - t)^2 s^2 + t^2, c = cos u:

    x' - m = (1 - (1 - c) t^2 / S) (x - m) + t sin u z, hence Var / S = (1 + c) / (2 - (1 - c) t^2 / S), which is 1 at
    t = 1 and (1 + c) / 2 at t = 0: 0.946, 0.655, 0.5 for noise levels 0.3, 0.8, 1. More steps come closer to this.
    """
    limit = (math.cos(noise_level * math.pi / 2) - 1) / 2
    few, many, most = (variance_error(CPS(noise_level), n) for n in (20, 200, 5000))
    assert abs(few - limit) > abs(many - limit) > abs(most - limit)
    assert most == pytest.approx(limit, abs=0.003)
    assert abs(most) > 100 * abs(variance_error(DanceSDE(1.0), 5000))


def test_cps_that_decays_to_nothing_preserves_them_in_the_limit():
    """-29, -18, -3.7, -1.4, -0.6 % of the variance at 10, 20, 200, 1000, 5000 steps; down to half the level -10 % stay."""
    decaying = CPS(0.8, decay="cosine")
    errors = [variance_error(decaying, n) for n in (20, 200, 1000, 5000)]
    assert errors == pytest.approx([-0.1755, -0.0368, -0.0144, -0.0059], abs=0.002)
    assert variance_error(CPS(0.8, decay="cosine", final_level=0.4), 5000) < -0.09


@pytest.mark.parametrize("t", [0.9, 0.6, 0.3])
def test_memoryless_is_the_noising_process_run_backwards(t):
    """d E[x0 | x_t] / d x_t along the SDE from t is the flow's own Cov(x0, x_t) / Var(x_t) = (1 - t) s^2 / S.

    0.0442, 0.3448, 0.9459 at these times; a weaker noise remembers more of x_t: 0.34, 0.73, 1.10 for a = 0.7.
    """
    grid = time_grid(1000)
    grid = grid[grid <= t + 1e-6]
    S = (1 - t) ** 2 * 0.36 + t**2
    for transition in (Memoryless(), DDIM(1.0), MatchedCPS(math.sqrt(2))):
        assert memory(transition, DATA, grid) == pytest.approx((1 - t) * 0.36 / S, abs=2e-3)
    for transition in (FlowSDE(0.7), DanceSDE(0.3), MatchedCPS(0.7), DDIM(0.5), ODE()):
        assert memory(transition, DATA, grid) > (1 - t) * 0.36 / S + 0.15


def test_less_noise_costs_less_spread_at_usual_numbers_of_steps():
    """At 10 steps the budget-keeping samplers lose variance in the order of their noise; at 40 MatchedCPS(0.7) lost < 9 %."""
    errors = [variance_error(s, 10) for s in (ODE(), MatchedCPS(0.7), DDIM(1.0), CPS(0.8))]
    assert 0 > errors[0] > errors[1] > errors[2] > errors[3]
    assert -0.09 < variance_error(MatchedCPS(0.7), 40) < 0
    assert abs(variance_error(Memoryless(), 40)) < 0.02


# -- mixtures, by sampling ---------------------------------------------------------------------------------------------


MIXED = [FlowSDE(0.7), DanceSDE(0.5), Memoryless(), MatchedCPS(0.7), DDIM(1.0), FlowSDE(1.0, decay="cosine")]


@pytest.mark.parametrize("transition", MIXED, ids=str)
def test_mixture_in_one_dim(transition):
    """Weights 0.3 at -2, 0.7 at 1: mean 0.1, variance 0.16 + 0.3 * 0.7 * 9 = 2.05, std 1.432.

    10000 draws: standard errors 0.014 (mean), 0.0046 (weight), 0.008 (std), 0.005 (width of the smaller mode).
    """
    data = mixture([0.3, 0.7], [-2.0, 1.0], [0.4, 0.4])
    x = simulate(transition, data.velocity, time_grid(100), n=10_000, seed=4)
    assert data.mean().item() == pytest.approx(0.1)
    assert data.cov().item() == pytest.approx(2.05)
    assert x.mean().item() == pytest.approx(0.1, abs=0.05)
    assert x.std().item() == pytest.approx(math.sqrt(2.05), abs=0.03)
    weights = data.responsibilities(x).mean(0)
    assert weights[0].item() == pytest.approx(0.3, abs=0.015)
    for k, at in enumerate((-2.0, 1.0)):
        near = x[data.responsibilities(x).argmax(1) == k]
        assert near.mean().item() == pytest.approx(at, abs=0.03)
        assert near.std().item() == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("transition", [FlowSDE(0.7), DanceSDE(0.5)], ids=str)
def test_mixture_in_two_dims(transition):
    data = mixture([0.5, 0.3, 0.2], [[0.0, 1.5], [1.5, -1.0], [-1.5, -1.0]], [0.3, 0.5, 0.4])
    x = simulate(transition, data.velocity, time_grid(60), n=8_000, seed=5, dims=2).double()
    torch.testing.assert_close(x.mean(0), data.mean(), rtol=0, atol=0.06)
    torch.testing.assert_close(x.T.cov(), data.cov(), rtol=0, atol=0.06)
    torch.testing.assert_close(data.responsibilities(x).mean(0), data.weights, rtol=0, atol=0.02)
    entropy = -data.log_prob(data.sample(10_000, seed=6)).mean()
    assert -data.log_prob(x).mean().item() == pytest.approx(entropy.item(), abs=0.06)


def test_cps_loses_spread_on_a_mixture():
    """150 steps of noise level 1 leave the modes 0.29 wide instead of 0.4 (limit 0.4 / sqrt(2) = 0.283)."""
    data = mixture([0.3, 0.7], [-2.0, 1.0], [0.4, 0.4])
    x = simulate(CPS(1.0), data.velocity, time_grid(150), n=3_000, seed=4)
    width = x[data.responsibilities(x).argmax(1) == 1].std().item()
    assert 0.25 < width < 0.32


# -- GLASS: a step that draws x0 -----------------------------------------------------------------------------------------


def glass(sampler: GLASS, data, grid: torch.Tensor, n: int, seed: int, dims: int = 1) -> torch.Tensor:
    """Samples, (n, dims). Every step of the grid is one of GLASS, the last one too."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dims, generator=generator)
    for t, t_next in pairwise(grid.tolist()):
        x = sampler.sample(data.velocity, x, t, t_next, torch.randn(n, dims, generator=generator))
    return x


def glass_variance_error(sampler: GLASS, num_steps: int) -> float:
    """As `variance_error`, without sampling: for Gaussian data x' = a + b x + c z, read off (x, z) = (0, 0), (1, 0), (0, 1)."""
    mean, variance, grid = 0.0, 1.0, time_grid(num_steps).tolist()
    x, z = torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor([[0.0], [0.0], [1.0]])
    for t, t_next in pairwise(grid):
        a, at_x, at_z = sampler.sample(DATA.velocity, x, t, t_next, z)[:, 0].tolist()
        mean, variance = a + (at_x - a) * mean, (at_x - a) ** 2 * variance + (at_z - a) ** 2
    assert mean == pytest.approx(1.5, abs=1e-4)
    return variance / 0.36 - 1


@pytest.mark.parametrize(("t", "t_next"), [(1.0, 0.9), (0.9, 0.8), (0.5, 0.1), (0.3, 0.0)])
@pytest.mark.parametrize("a", [0.0, 0.7, math.sqrt(2)])
def test_glass_with_one_inner_step_is_matched_cps(a, t, t_next):
    x, v, z = draw()
    ours = GLASS(1, a).sample(lambda x, t: v, x, t, t_next, z)
    torch.testing.assert_close(ours, MatchedCPS(a).transition(x, v, t, t_next, 0.9).sample(z), rtol=1e-5, atol=1e-5)


def test_glass_asks_for_the_velocity_at_the_state_first_and_at_cleaner_times_after():
    """4 calls with one time per sample; between x_t and x' the two views of x0 are worth a time below t."""
    x, _, z = draw()
    seen = []
    GLASS(4).sample(lambda x, t: seen.append((x, t)) or torch.zeros_like(x), x.bfloat16(), 0.7, torch.tensor(0.4), z)
    assert len(seen) == 4
    torch.testing.assert_close(seen[0][0], x.bfloat16().float())
    for state, t in seen:
        assert state.dtype == t.dtype == torch.float32
        assert t.shape == (4,)
    times = [float(t[0]) for _, t in seen]
    assert times[0] == pytest.approx(0.7)
    assert 0.4 < times[3] < times[2] < times[1] < times[0]


def test_glass_with_one_time_per_sample():
    x, z = draw(2)
    t, t_next = torch.tensor([1.0, 0.9, 0.5, 0.1]), torch.tensor([0.9, 0.5, 0.1, 0.0])
    point = lambda x, t: TWO_MODES.velocity(x.reshape(-1, 1), t.repeat_interleave(12)).reshape(x.shape)  # noqa: E731
    together = GLASS(3).sample(point, x, t, t_next, z)
    for i in range(4):
        alone = GLASS(3).sample(point, x[i : i + 1], float(t[i]), float(t_next[i]), z[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="1 is noise, not 1000"):
        GLASS().sample(point, x, 900.0, 800.0, z)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_glass_reaches_point_data_exactly(num_steps):
    point = gaussian([0.7, -1.1], 0.0)
    x = glass(GLASS(3), point, time_grid(num_steps), n=50, seed=0, dims=2)
    torch.testing.assert_close(x, point.means.float().expand(50, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("a", [0.0, 0.7, math.sqrt(2), 3.0])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_glass_preserves_the_marginals_for_any_number_of_outer_steps(num_steps, a):
    """Twice the inner steps, a quarter of the error (3 to 4.6), and 0.4 % of it with 64. MatchedCPS is off by 60 to 100 %."""
    few, many = (glass_variance_error(GLASS(inner, a), num_steps) for inner in (64, 128))
    assert 3.0 < few / many < 4.6
    assert abs(few) < 0.004
    assert variance_error(MatchedCPS(a), num_steps) < -0.6


def test_glass_on_two_modes():
    """3 outer DDPM steps on data of mean -0.3 and std 1.541: 12, 24 and 48 calls give std 1.51, 1.53 and 1.54.

    Euler inside takes 80 inner steps to 1.531. 10 steps of DDIM or CPS give 1.40 to 1.42, 3 steps of DDIM 1.13.
    Standard errors: 0.011 (mean), 0.005 (std).
    """
    assert TWO_MODES.mean().item() == pytest.approx(-0.3)
    assert TWO_MODES.cov().sqrt().item() == pytest.approx(1.5408, abs=1e-4)
    found = {inner: glass(GLASS(inner), TWO_MODES, time_grid(3), n=20_000, seed=1) for inner in (1, 4, 8, 16)}
    for inner, std in ((1, 1.128), (4, 1.515), (8, 1.534), (16, 1.537)):
        assert found[inner].std().item() == pytest.approx(std, abs=0.015)
    assert found[8].mean().item() == pytest.approx(-0.305, abs=0.02)
    assert found[8].std().item() == pytest.approx(1.531, abs=0.015)
    weights = TWO_MODES.responsibilities(found[16]).mean(0)
    assert weights[0].item() == pytest.approx(0.6, abs=0.015)
    for transition in (DDIM(1.0), CPS(0.8)):
        assert 1.37 < simulate(transition, TWO_MODES.velocity, time_grid(10), n=20_000, seed=1).std().item() < 1.44


# -- densities and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True])
def test_log_prob_is_the_mean_of_the_normal_density(per_sample):
    mean, x_next = draw(2)
    std = torch.tensor([0.5, 0.1, 2.0, 1.0]).reshape(4, 1, 1, 1) if per_sample else 0.5
    expected = torch.distributions.Normal(mean, std).log_prob(x_next).mean(dim=(1, 2, 3))
    log_prob = Gaussian(mean, std).log_prob(x_next)
    assert log_prob.shape == (4,)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, expected)


def test_log_prob_by_hand():
    """mean 0, std 2, x' = (2, 4): -(1 + 4) / 4 - log 2 - log(2 pi) / 2 = -1.25 - 0.693147 - 0.918939 = -2.862086."""
    law = Gaussian(torch.zeros(1, 2), torch.tensor(2.0))
    assert law.log_prob(torch.tensor([[2.0, 4.0]])).item() == pytest.approx(-2.862086, abs=1e-6)


def test_kl_by_hand_and_against_torch():
    """Means 0 and (1, 3), std 2: (1 + 9) / 2 / 8 = 0.625."""
    a, b = Gaussian(torch.zeros(1, 2), 2.0), Gaussian(torch.tensor([[1.0, 3.0]]), torch.tensor(2.0))
    assert a.kl(b).item() == 0.625
    normal = [torch.distributions.Normal(law.mean, 2.0) for law in (a, b)]
    assert a.kl(b).item() == pytest.approx(torch.distributions.kl_divergence(*normal).mean().item())
    with pytest.raises(ValueError, match="one transition at the same times"):
        a.kl(Gaussian(b.mean, 2.1))


@pytest.mark.parametrize("step", STEPS[:-1])
@pytest.mark.parametrize("transition", STOCHASTIC, ids=str)
def test_kl_in_velocity_form(transition, step):
    """KL = J^2 mean(dv^2) / (2 std^2)."""
    x, v, v_ref = draw()
    kl = transition.transition(x, v, *step).kl(transition.transition(x, v_ref, *step))
    J, std = transition.velocity_jacobian(*step), transition.std(*step)
    torch.testing.assert_close(kl, J**2 * ((v - v_ref) ** 2).mean(dim=(1, 2, 3)) / (2 * std**2), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("step", STEPS[:-1])
@pytest.mark.parametrize("transition", STOCHASTIC, ids=str)
def test_gradient_of_log_prob_in_v(transition, step):
    """d log p / d v = J z / (std D) at x' = mean + std z, against autograd and a central difference.

    log p is quadratic in v, so the difference is exact for any width; width 1 keeps rounding small.
    """
    x, v, z = draw(shape=(2, 3))
    v.requires_grad_()
    law = transition.transition(x, v, *step)
    x_next = law.sample(z).detach()
    (autograd,) = torch.autograd.grad(law.log_prob(x_next).sum(), v)
    formula = transition.velocity_jacobian(*step) * z / (transition.std(*step) * 3)
    torch.testing.assert_close(autograd, formula, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        for i in range(3):
            e = torch.zeros(2, 3)
            e[:, i] = 1.0
            up, down = (transition.transition(x, v + d * e, *step).log_prob(x_next) for d in (0.5, -0.5))
            torch.testing.assert_close(up - down, formula[:, i], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("transition", [*STOCHASTIC, ODE()], ids=str)
def test_velocity_jacobian_is_the_derivative_of_the_mean(transition):
    x, v = draw(2, shape=(5, 1))
    t, t_next = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.1]), torch.tensor([0.9, 0.7, 0.1, 0.15, 0.0])
    v.requires_grad_()
    (J,) = torch.autograd.grad(transition.transition(x, v, t, t_next, 0.9).mean.sum(), v)
    torch.testing.assert_close(J[:, 0], transition.velocity_jacobian(t, t_next, 0.9), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transition", [ODE(), FlowSDE(0.0), CPS(0.8), DDIM(1.0)], ids=str)
def test_a_deterministic_step_has_no_density(transition):
    x, v, x_next = draw()
    law = transition.transition(x, v, 0.1, 0.0, 0.9)
    with pytest.raises(ValueError, match="leave it out of the trained steps"):
        law.log_prob(x_next)
    with pytest.raises(ValueError, match="leave it out of the trained steps"):
        law.kl(law)


def test_one_deterministic_sample_in_a_batch_is_noticed():
    x, v, x_next = draw()
    law = CPS(0.8).transition(x, v, 0.5, torch.tensor([0.4, 0.3, 0.0, 0.1]), 0.9)
    with pytest.raises(ValueError, match="deterministic"):
        law.log_prob(x_next)


# -- numerics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("num_steps", [1, 2, 10, 50, 1000])
@pytest.mark.parametrize("transition", [*STOCHASTIC, *SILENT, CPS(1.0)], ids=str)
def test_std_is_finite_on_whole_grids(transition, num_steps, shift):
    grid = time_grid(num_steps, shift)
    t, t_next, t_max = grid[:-1], grid[1:], t_max_of(grid)
    std, J = transition.std(t, t_next, t_max), transition.velocity_jacobian(t, t_next, t_max)
    assert std.shape == J.shape == (num_steps,)
    assert std.isfinite().all()
    assert J.isfinite().all()
    assert (J <= 0).all() or isinstance(transition, CPS)
    assert (std[:-1] > 0).all() if not transition.deterministic else (std == 0).all()
    if isinstance(transition, CPS | DDIM):
        assert std[-1] == 0


@pytest.mark.parametrize("transition", [*STOCHASTIC, ODE()], ids=str)
def test_one_time_per_sample_equals_shared_times_to_the_bit(transition):
    """Rows at t = 1, inside, and at t_next = 0; floats, scalar tensors and (B,) tensors give the same bits."""
    x, v, z = draw()
    t, t_next, t_max = [1.0, 0.9, 0.53, 0.1], [0.9, 0.53, 0.1, 0.0], 0.9
    batch = transition.transition(x, v, torch.tensor(t), torch.tensor(t_next), torch.full((4,), t_max))
    assert batch.std.shape == (4, 1, 1, 1)
    J = transition.velocity_jacobian(torch.tensor(t), torch.tensor(t_next), t_max)
    for i in range(4):
        rows = slice(i, i + 1)
        row = transition.transition(x[rows], v[rows], t[i], t_next[i], t_max)
        scalar = transition.transition(x[rows], v[rows], *map(torch.tensor, (t[i], t_next[i], t_max)))
        assert torch.equal(row.mean, batch.mean[rows])
        assert torch.equal(row.mean, scalar.mean)
        assert torch.equal(row.sample(z[rows]), batch.sample(z)[rows])
        assert batch.std[i].item() == row.std.item() == transition.std(t[i], t_next[i], t_max).item()
        assert J[i].item() == transition.velocity_jacobian(t[i], t_next[i], t_max).item()


@pytest.mark.parametrize("transition", [FlowSDE(0.7), DanceSDE(0.3), CPS(0.8), MatchedCPS(0.7), DDIM(0.5), DECAYING[3]], ids=str)
def test_replay_is_bitwise_equal(transition):
    """A state stored in bf16, its log-prob taken twice, also in smaller micro-batches: the ratio is exactly 1.

    Latents of real size and two threads, since then a reduction over a batch does depend on the size of the batch.
    """
    torch.set_num_threads(2)
    x, v, z = (u.bfloat16() for u in draw(shape=(2, 16, 64, 64)))
    step = (0.7, 0.6, 0.9)
    x_next = transition.transition(x, v, *step).sample(z).bfloat16()
    first = transition.transition(x, v, *step).log_prob(x_next)
    again = transition.transition(x.clone(), v.clone(), *step).log_prob(x_next.clone())
    assert torch.equal(first, again)
    for part in (slice(0, 1), slice(1, 2)):
        assert torch.equal(first[part], transition.transition(x[part], v[part], *step).log_prob(x_next[part]))


@pytest.mark.parametrize("transition", [*STOCHASTIC, ODE()], ids=str)
def test_low_precision_inputs_are_upcast_first(transition):
    x, v, z = (u.bfloat16() for u in draw())
    law = transition.transition(x, v, 0.7, 0.6, 0.9)
    upcast = transition.transition(x.float(), v.float(), 0.7, 0.6, 0.9)
    assert law.mean.dtype == law.std.dtype == law.sample(z).dtype == torch.float32
    assert torch.equal(law.mean, upcast.mean)
    assert torch.equal(law.sample(z), upcast.sample(z.float()))
    times = torch.tensor([0.7, 0.6, 0.9], dtype=torch.float64)
    assert transition.transition(x.double(), v.double(), *times).mean.dtype == torch.float32
    if not transition.deterministic:
        assert law.log_prob(x).dtype == torch.float32


def test_autocast_changes_nothing():
    x, v, z = draw()
    law = FlowSDE(0.7).transition(x, v, 0.7, 0.6, 0.9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = FlowSDE(0.7).transition(x, v, 0.7, 0.6, 0.9)
        log_prob = inside.log_prob(z)
    assert torch.equal(law.mean, inside.mean)
    assert torch.equal(law.log_prob(z), log_prob)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowSDE(-0.1), "FlowSDE noise_level=-0.1 must not be negative"),
        (lambda: FlowSDE(math.nan), "FlowSDE noise_level=nan"),
        (lambda: DanceSDE(-0.1), "DanceSDE noise_level=-0.1 must not be negative"),
        (lambda: CPS(1.1), r"CPS noise_level=1.1 must lie in \[0, 1\]"),
        (lambda: CPS(-0.1), r"CPS noise_level=-0.1 must lie in \[0, 1\]"),
        (lambda: DDIM(1.1), r"DDIM eta=1.1 must lie in \[0, 1\]"),
        (lambda: DDIM(-0.1), r"DDIM eta=-0.1 must lie in \[0, 1\]"),
        (lambda: MatchedCPS(-0.1), "MatchedCPS noise_level=-0.1 must not be negative: try 0.7, or 0 for the ODE"),
        (lambda: CPS(0.8, decay="linear"), "CPS decay='linear' is unknown: use 'none' or 'cosine'"),
        (lambda: CPS(0.8, final_level=0.2), "CPS final_level=0.2 needs a decay that ends there: decay=cosine"),
        (lambda: CPS(0.8, decay="cosine", final_level=0.9), r"noise_level=0.8 cannot fall to final_level=0.9.*\[0, 0.8\]"),
        (lambda: DDIM(0.8, decay="cosine", final_level=-0.1), r"eta=0.8 cannot fall to final_level=-0.1"),
        (lambda: GLASS(0), "GLASS inner=0 must be at least 1: try 4"),
        (lambda: GLASS(noise_level=-1.0), "GLASS noise_level=-1.0 must not be negative: try 1.41"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ((900.0, 800.0, 0.9), "1 is noise, not 1000"),
        ((0.8, 0.9, 0.9), "0 <= t_next < t <= 1"),
        ((0.8, 0.8, 0.9), "0 <= t_next < t <= 1"),
        ((torch.tensor([0.8, 0.7]), torch.tensor([0.7, -0.1]), 0.9), "0 <= t_next < t <= 1"),
        ((math.nan, 0.1, 0.9), "0 <= t_next < t <= 1"),
        ((1.0, 0.9, 1.0), "must be below 1"),
    ],
)
@pytest.mark.parametrize("transition", [ODE(), FlowSDE(), CPS()], ids=str)
def test_bad_times_are_refused(transition, times, message):
    x = torch.zeros(2, 3)
    for call in (lambda: transition.transition(x, x, *times), lambda: transition.std(*times)):
        with pytest.raises(ValueError, match=message):
            call()


def test_transitions_are_found_by_name():
    assert {name: cls().deterministic for name, cls in TRANSITIONS.items()} == {
        "ode": True,
        "flow_sde": False,
        "dance_sde": False,
        "memoryless": False,
        "cps": False,
        "matched_cps": False,
        "ddim": False,
    }
    assert TRANSITIONS["cps"](**{"noise_level": 0.5}) == CPS(0.5)


def test_a_transition_names_its_schedule_if_it_has_one():
    assert str(CPS(0.5)) == "CPS(noise_level=0.5)"
    assert str(DDIM(1.0, decay="cosine")) == "DDIM(eta=1.0, decay='cosine', final_level=0.0)"
    assert str(Memoryless()) == "Memoryless()"
