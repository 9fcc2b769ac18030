"""The identities of the flow, and the proof that diffusion models are the same flow in other coordinates."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from flowrl.samplers import CPS, DDIM, flow
from flowrl.samplers.transitions import TRANSITIONS
from tests.oracles import gaussian, mixture


def draw(*shape: int, seed: int = 0, n: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(n)]


def test_identities_by_hand():
    """x0 = 2, eps = -1, t = 0.25:  x = 0.75 * 2 - 0.25 = 1.25,  v = -3.

    x0_hat = 1.25 + 0.75 = 2,  eps_hat = 1.25 - 2.25 = -1,  score = 1 / 0.25 = 4.
    """
    x0, eps, t = torch.tensor([[2.0]]), torch.tensor([[-1.0]]), 0.25
    x, v = flow.noised(x0, eps, t), eps - x0
    assert x.item() == 1.25
    assert flow.x0_from(x, v, t).item() == 2.0
    assert flow.eps_from(x, v, t).item() == -1.0
    assert flow.score_from(x, v, t).item() == 4.0
    assert flow.velocity_from_x0(x, x0, t).item() == -3.0
    assert flow.velocity_from_eps(x, eps, t).item() == -3.0


def test_noised_at_the_ends_is_exactly_data_and_noise():
    x0, eps = draw(3, 4)
    assert torch.equal(flow.noised(x0, eps, 0.0), x0)
    assert torch.equal(flow.noised(x0, eps, 1.0), eps)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9, 1.0])
def test_score_is_the_gradient_of_the_log_density(t):
    data = mixture([0.3, 0.5, 0.2], [[-1.0, 0.0], [1.0, 1.5], [0.5, -2.0]], [0.2, 0.5, 0.3])
    x = draw(16, 2)[0].double().requires_grad_()
    (gradient,) = torch.autograd.grad(data.log_prob(x, t).sum(), x)
    score = flow.score_from(x.detach(), data.velocity(x.detach(), t), t)
    torch.testing.assert_close(score.double(), gradient, rtol=1e-4, atol=1e-4)


def test_mixture_velocity_is_the_conditional_mean():
    """The oracle itself, against regression by counting: the mean of eps - x0 over draws that land near x at t."""
    data, t, n = mixture([0.3, 0.7], [-1.0, 1.5], [0.4, 0.3]), 0.6, 500_000
    x0 = data.sample(n, seed=1)
    eps = torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = (1 - t) * x0 + t * eps
    for at in (-0.8, 0.0, 0.7):
        near = ((x - at).abs() < 0.03).squeeze(1)
        targets = (eps - x0)[near]
        error = targets.std() / near.sum() ** 0.5
        assert abs(targets.mean() - data.velocity(torch.tensor([[at]]), t)) < 4 * error + 0.01
        density = near.double().mean() / 0.06
        assert density == pytest.approx(data.log_prob(torch.tensor([[at]]), t).exp().item(), rel=0.04)


# -- times -------------------------------------------------------------------------------------------------------------


def test_expand_shapes():
    x = torch.zeros(4, 3, 2, 2)
    assert flow.expand(0.5, x).shape == ()
    assert flow.expand(torch.tensor([0.5]), x).shape == ()
    assert flow.expand(torch.rand(4), x).shape == (4, 1, 1, 1)
    assert flow.expand(torch.rand(4, 1, 1, 1), x).shape == (4, 1, 1, 1)
    assert flow.expand(torch.tensor(0.5, dtype=torch.float64), x).dtype == torch.float32


@pytest.mark.parametrize("shape", [(3,), (2, 2), (1, 4)])
def test_expand_refuses_times_that_are_not_one_per_sample(shape):
    with pytest.raises(ValueError, match=r"one per sample with shape \(4,\)"):
        flow.expand(torch.rand(shape), torch.zeros(4, 3, 2, 2))


def test_low_precision_is_computed_and_returned_in_fp32():
    x, v = (u.bfloat16() for u in draw(2, 3, 4, 4))
    for f in (flow.x0_from, flow.eps_from, flow.score_from, flow.velocity_from_x0, flow.velocity_from_eps, flow.noised):
        out = f(x, v, 0.3)
        assert out.dtype == torch.float32
        assert torch.equal(out, f(x.float(), v.float(), 0.3))
    assert flow.renoise(x, v, 0.3, 0.5).dtype == torch.float32
    assert flow.vp_velocity(x, v, 0.3, "v_prediction").dtype == torch.float32


# -- re-noising --------------------------------------------------------------------------------------------------------


def test_renoise_from_data_is_noising():
    x0, z = draw(3, 4)
    torch.testing.assert_close(flow.renoise(x0, z, 0.0, 0.7), flow.noised(x0, z, 0.7))


def test_renoise_by_hand():
    """t_next = 0.5, t = 0.75: c = 0.25 / 0.5 = 0.5, std = sqrt(0.5625 - 0.25 * 0.25) = sqrt(0.5)."""
    x, z = torch.tensor([[4.0]]), torch.tensor([[3.0]])
    assert flow.renoise(x, z, 0.5, 0.75).item() == pytest.approx(2 + 3 * 0.5**0.5, rel=1e-6)


@pytest.mark.parametrize(("t_next", "t"), [(0.0, 0.2), (0.3, 0.31), (0.4, 0.9), (0.5, 1.0)])
def test_renoise_carries_the_marginal_up(t_next, t):
    """N(1.5, 0.6^2) at t_next becomes the marginal at t: mean c m', variance c^2 S' + std^2."""
    data = gaussian(1.5, 0.6)
    (m_next, S_next), (m, S) = data.marginal(t_next), data.marginal(t)
    c = flow.renoise(torch.ones(1, 1), torch.zeros(1, 1), t_next, t).item()
    std = flow.renoise(torch.zeros(1, 1), torch.ones(1, 1), t_next, t).item()
    assert c * m_next.item() == pytest.approx(m.item(), abs=1e-6)
    assert c**2 * S_next.item() + std**2 == pytest.approx(S.item(), rel=1e-5)


def test_renoise_keeps_its_digits_for_small_steps():
    """From 0.5 up by h = 2^-20: std^2 = h (t + c t') / (1 - t') = h (1 + O(h)) / 0.5, here 1.907e-6."""
    h = 2.0**-20
    std = flow.renoise(torch.zeros(1, 1), torch.ones(1, 1), 0.5, 0.5 + h).item()
    assert std**2 == pytest.approx(2 * h, rel=1e-5)


# -- diffusion models --------------------------------------------------------------------------------------------------


def test_vp_coordinates():
    """abar = 0.64: sqrt(abar) = 0.8, sqrt(1 - abar) = 0.6, c = 1.4, t = 0.6 / 1.4."""
    t = flow.vp_time(0.64)
    assert t.item() == pytest.approx(0.6 / 1.4)
    assert flow.vp_scale(t).item() == pytest.approx(1.4)
    x0, eps = draw(3, 4)
    torch.testing.assert_close(flow.vp_scale(t) * flow.noised(x0, eps, t), 0.8 * x0 + 0.6 * eps)
    assert flow.vp_time(torch.tensor([1.0, 0.0])).tolist() == [0.0, 1.0]
    assert flow.vp_scale(torch.tensor([0.0, 1.0])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_vp_velocity_of_a_perfect_model_is_eps_minus_x0(prediction_type):
    x0, eps = draw(4, 3, 2)
    abar = torch.tensor([0.005, 0.3, 0.64, 0.99])
    signal, noise = abar.sqrt().reshape(-1, 1, 1), (1 - abar).sqrt().reshape(-1, 1, 1)
    m = {"epsilon": eps, "v_prediction": signal * eps - noise * x0, "sample": x0}[prediction_type]
    v = flow.vp_velocity(signal * x0 + noise * eps, m, flow.vp_time(abar), prediction_type)
    torch.testing.assert_close(v, eps - x0, rtol=1e-4, atol=1e-4)


def test_vp_velocity_at_zero_terminal_snr():
    """abar = 0: x = eps and a v-model says -x0, so v = c (m + (2 - 1) x) = eps - x0 without a pole."""
    x0, eps = draw(2, 3)
    torch.testing.assert_close(flow.vp_velocity(eps, -x0, 1.0, "v_prediction"), eps - x0)


def test_vp_velocity_names_the_prediction_types():
    with pytest.raises(ValueError, match="'epsilon', 'v_prediction' or 'sample'"):
        flow.vp_velocity(torch.zeros(1, 1), torch.zeros(1, 1), 0.5, "eps")


def stable_diffusion(prediction_type: str, set_alpha_to_one: bool, steps: int = 10) -> Any:
    scheduler: Any = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=set_alpha_to_one,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_flow_ddim_is_the_ddim_of_the_literature(eta, prediction_type, set_alpha_to_one):
    """Every step of diffusers' DDIM, last one included, equals c' (mean + std z) of the flow step at x / c."""
    scheduler = stable_diffusion(prediction_type, set_alpha_to_one)
    gap = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    x, m, z = draw(2, 4, 8, 8, n=3)
    stds = []
    for timestep in scheduler.timesteps.tolist():
        expected = scheduler.step(m, timestep, x, eta=eta, variance_noise=z).prev_sample
        previous = timestep - gap
        abar = scheduler.alphas_cumprod[timestep]
        abar_next = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
        t, t_next = flow.vp_time(abar), flow.vp_time(abar_next)
        v = flow.vp_velocity(x, m, t, prediction_type)
        law = DDIM(eta).transition(x / flow.vp_scale(t), v, t, t_next, t_max=0.99).scaled(flow.vp_scale(t_next))
        torch.testing.assert_close(law.sample(z), expected, rtol=1e-4, atol=5e-5)
        variance = (1 - abar_next) / (1 - abar) * (1 - abar / abar_next)
        assert float(law.std) == pytest.approx(eta * float(variance.sqrt()), rel=1e-4, abs=1e-7)
        stds.append(float(law.std))
    assert (max(stds) > 0.2) == (eta > 0)
    assert (stds[-1] == 0) == (eta == 0 or set_alpha_to_one)


@pytest.mark.parametrize("name", sorted(TRANSITIONS))
def test_scaling_shifts_the_log_density_by_log_c(name):
    """log p(c x') = log p(x') - log c per dim, so ratios of policies are the same in both coordinates."""
    x, v, z = draw(3, 4, 2, 2, n=3)
    law = TRANSITIONS[name]().transition(x, v, 0.6, 0.5, 0.9)
    if name == "ode":
        with pytest.raises(ValueError, match="deterministic"):
            law.scaled(1.3).log_prob(z)
        return
    x_next, c = law.sample(z), flow.vp_scale(0.5)
    expected = law.log_prob(x_next) - c.log()
    torch.testing.assert_close(law.scaled(c).log_prob(c * x_next), expected, rtol=1e-5, atol=1e-5)


def test_scaled_takes_one_factor_per_sample():
    x, v = draw(3, 4, 2, 2)
    law = CPS().transition(x, v, torch.tensor([0.9, 0.6, 0.3]), torch.tensor([0.8, 0.5, 0.2]), 0.9)
    c = torch.tensor([1.0, 2.0, 3.0])
    scaled = law.scaled(c)
    assert torch.equal(scaled.mean[1], 2 * law.mean[1])
    assert scaled.std.flatten().tolist() == pytest.approx((c * law.std.flatten()).tolist())
