"""Steering against closed forms: a mixture of two Gaussians in one dim, tilted by exp(x), whose mean and log Z are known.

p = 0.6 N(-1.5, 0.5^2) + 0.4 N(1.5, 0.4^2),  r(x) = x,  lam = 1
component k has mean mu_k + s_k^2 and log weight log w_k + mu_k + s_k^2 / 2 under the tilt, so
log Z = log(0.6 e^(-1.5 + 0.125) + 0.4 e^(1.5 + 0.08)) = 0.7389,  mean = 1.4491,  std = 0.8577;  untilted mean -0.3
"""

import math

import pytest
import torch
from torch import Tensor

from flowrl.config import ConfigError, build
from flowrl.samplers import DDIM, GLASS, ODE, FlowSDE, t_max_of, time_grid
from flowrl.samplers.flow import eps_from, score_from, x0_from
from flowrl.samplers.steering import FK, STEERS, BestOfN, Doob, FlowMap, Guidance, Paths, Rollover, Twisted, ZeroOrder
from flowrl.samplers.steering import guidance as guidance_module
from flowrl.samplers.steering.guidance import through_denoiser
from flowrl.samplers.steering.loop import History, Model, Outcome, advance, gather
from flowrl.samplers.steering.particles import (
    POTENTIALS,
    Past,
    Weights,
    checkpoint_nodes,
    ess,
    log_mean_exp,
    multinomial,
    proposal_weight,
    stratified,
    systematic,
)
from flowrl.samplers.steering.search import neighbours
from flowrl.samplers.steering.tilt import auto_strength, doob_shift, langevin_shift, tilt, tilted_x0, untilted
from tests.oracles import Mixture, gaussian, mixture

DATA = mixture([0.6, 0.4], [-1.5, 1.5], [0.5, 0.4])
MEAN, STD, LOG_Z = 1.4491, 0.8577, 0.7389


class MixtureModel(Model):
    """The exact velocity of a mixture in one dim as P populations. reward: of x0 (P, N); x by default."""

    decodes = False

    def __init__(self, steps: int, prompts: int = 1, seed: int = 0, data: Mixture = DATA, reward=None):
        grid = time_grid(steps)
        super().__init__([float(t) for t in grid], float(t_max_of(grid)), [f"prompt {p}" for p in range(prompts)])
        self.data, self.generator = data, torch.Generator().manual_seed(seed)
        self.of_x0 = reward or (lambda x0: x0)
        self.batch_size = 10**9

    def draw_start(self, n):
        return torch.randn(len(self.prompts), n, 1, generator=self.generator), None

    def draw_noise(self, like):
        return torch.randn(like.shape, generator=self.generator)

    def draw_uniform(self, n):
        return torch.rand(len(self.prompts), n, generator=self.generator, dtype=torch.float64)

    def predict(self, state, node):
        return self.predict_at(state, self.t[node])

    def predict_at(self, x, t):
        return self.data.velocity(x.flatten(0, 1), t).reshape(x.shape).float()

    def score(self, x0):
        return self.of_x0(x0[..., 0])

    def score_noisy(self, x, t):
        return log_h(x, t)[..., 0].float()


class ExactMap(MixtureModel):
    """The same with its flow map in closed form, X = F_0^-1(F_t(x)): trajectories of the ODE in one dim never cross."""

    def flow_map(self, x, v, t, steps):
        z = torch.linspace(-6, 6, 20001, dtype=torch.float64)
        table = self.cdf(z, 0.0)
        with torch.no_grad():
            level = self.cdf(x.double(), t)
            at = torch.searchsorted(table, level.flatten()).clamp(1, len(z) - 1).reshape(level.shape)
            end = z[at - 1] + (level - table[at - 1]) / (table[at] - table[at - 1]).clamp(min=1e-300) * (z[at] - z[at - 1])
        # One step of Newton's iteration: the gradient of the root is that of the last step.
        density = self.data.log_prob(end.reshape(-1, 1)).exp().reshape(end.shape)
        return (end - (self.cdf(end, 0.0) - self.cdf(x.double(), t)) / density).float()

    def cdf(self, x, t):
        m, S = self.data.marginal(t)
        return (self.data.weights * torch.special.ndtr((x[..., None] - m[:, 0]) / S.sqrt())).sum(-1)


def log_h(x: Tensor, t: float, data: Mixture = DATA) -> Tensor:
    """log E[exp(x0) | x_t = x], shaped like x: each component's posterior is Gaussian."""
    x = x.double()[..., None]
    mu, s2, (m, S) = data.means[:, 0], data.stds**2, data.marginal(t)
    posterior_mean, posterior_var = mu + (1 - t) * s2 / S * (x - m[:, 0]), s2 * t**2 / S
    log_joint = data.weights.log() - (x - m[:, 0]) ** 2 / (2 * S) - S.log() / 2
    return (log_joint.log_softmax(-1) + posterior_mean + posterior_var / 2).logsumexp(-1)


def grad_log_h(x: Tensor, t: float, data: Mixture = DATA) -> Tensor:
    with torch.enable_grad():
        x = x.detach().double().requires_grad_()
        return torch.autograd.grad(log_h(x, t, data).sum(), x)[0].float()


def walk(step, steps=60, n=20000, transition=None) -> tuple[float, float]:
    """Mean and std at the end of a walk whose step, (x, v, t, t_next, transition) -> (v, shift), is guided."""
    model = MixtureModel(steps)
    state = model.start(n)
    for i in range(steps):
        t, v = model.t[i], model.velocity(state, i)
        shift = None
        if t < 1:
            v, shift = step(state, v, t, model.t[i + 1], model.t_max)
        state = advance(model, state, v, i, transition or ODE(), shift)
    return float(state.mean()), float(state.std())


def moments(outcome: Outcome) -> tuple[float, float, float]:
    """Weighted mean and std, and log Z, averaged over populations."""
    w, x = outcome.log_weights.softmax(1), outcome.state[..., 0].double()
    mean = (w * x).sum(1)
    std = ((w * x**2).sum(1) - mean**2).sqrt()
    return float(mean.mean()), float(std.mean()), float(outcome.log_z.mean())


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_the_closed_form_of_the_tilt():
    x = torch.linspace(-8, 8, 100001, dtype=torch.float64)[:, None]
    tilted = (DATA.log_prob(x) + x[:, 0]).exp()
    z = torch.trapezoid(tilted, x[:, 0])
    mean = torch.trapezoid(tilted * x[:, 0], x[:, 0]) / z
    std = (torch.trapezoid(tilted * x[:, 0] ** 2, x[:, 0]) / z - mean**2).sqrt()
    assert (float(mean), float(std), float(z.log())) == pytest.approx((MEAN, STD, LOG_Z), abs=1e-4)


# ---------------------------------------------------------------------------------------- the tilt


def test_tilting_v_tilts_x0_eps_and_score():
    x, v, u = torch.randn(3, 2, 4, 5)
    for t in (0.2, 0.9):
        tilted = tilt(v, t, u)
        torch.testing.assert_close(x0_from(x, tilted, t), tilted_x0(x0_from(x, v, t), t, u))
        torch.testing.assert_close(eps_from(x, tilted, t), eps_from(x, v, t) - t * u)
        torch.testing.assert_close(score_from(x, tilted, t), score_from(x, v, t) + u)
        torch.testing.assert_close(tilted_x0(x, t, untilted(u, t)), x + u)


def test_the_exact_tilt_reaches_the_target_by_ode_and_sde():
    def step(x, v, t, t_next, t_max):
        return tilt(v, t, grad_log_h(x, t)), None

    assert walk(step, 100) == pytest.approx((MEAN, STD), abs=0.03)
    assert walk(step, 200, transition=FlowSDE(0.7)) == pytest.approx((MEAN, STD), abs=0.03)


@pytest.mark.parametrize(
    ("transition", "factor", "mean", "tolerance"),
    [
        (FlowSDE(math.sqrt(2)), doob_shift, MEAN, 0.03),  # memoryless: Doob's drift is the tilt
        (FlowSDE(0.7), doob_shift, 0.48, 0.05),  # not memoryless: far off
        (FlowSDE(0.7), langevin_shift, 0.09, 0.05),
    ],
)
def test_doobs_drift_needs_memoryless_noise_and_langevins_needs_weights(transition, factor, mean, tolerance):
    def step(x, v, t, t_next, t_max):
        return v, factor(transition.std(t, t_next, t_max), grad_log_h(x, t)) if t_next > 0 else None

    assert walk(step, 200, transition=transition)[0] == pytest.approx(mean, abs=tolerance)


def test_auto_strength_is_the_spread_within_prompts():
    assert auto_strength(torch.tensor([[0.0, 2.0], [10.0, 12.0]]), 1.5) == pytest.approx(1.5 / math.sqrt(2))
    with pytest.raises(ValueError, match="tilt_strength"):
        auto_strength(torch.tensor([[1.0, 1.0], [2.0, 2.0]]))


# ---------------------------------------------------------------------------------------- weights


def test_ess_and_mean_weight_by_hand():
    log_weights = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -torch.inf, -torch.inf, -torch.inf], [5000.0, 5000.0, -1.0, -1.0]])
    torch.testing.assert_close(ess(log_weights), torch.tensor([4.0, 1.0, 2.0]))
    torch.testing.assert_close(log_mean_exp(log_weights), torch.tensor([0.0, -math.log(4), 5000 - math.log(2)]))


@pytest.mark.parametrize("scheme", [systematic, stratified, multinomial])
def test_resampling_is_unbiased(scheme):
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([[0.05, 0.4, 0.0, 0.3, 0.25], [0.2, 0.2, 0.2, 0.2, 0.2]])
    draws = 4000
    copies = torch.zeros(2, 5)
    for _ in range(draws):
        ancestors = scheme(weights, torch.rand(2, 1 if scheme is systematic else 5, generator=generator))
        count = torch.stack([row.bincount(minlength=5) for row in ancestors])
        copies += count
        if scheme is systematic:
            assert (count >= (5 * weights - 1e-5).floor()).all() and (count <= (5 * weights + 1e-5).ceil()).all()
    torch.testing.assert_close(copies / draws, 5 * weights, atol=0.08, rtol=0)


def test_positions_at_the_edges_stay_inside():
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    for u in (0.0, 1 - 1e-12):
        assert systematic(weights, torch.full((2, 1), u, dtype=torch.float64)).tolist() == [[0, 0, 0], [2, 2, 2]]


def test_potentials_by_hand():
    """lam r at three looks: 1, 3, 2. difference 1, 2, -1; max 1, 3, 3; sum 1, 4, 6."""
    expected = {"difference": [1, 2, -1], "max": [1, 3, 3], "sum": [1, 4, 6]}
    for name, potential in POTENTIALS.items():
        zero, low = torch.zeros(1, 1), torch.full((1, 1), -torch.inf)
        past, got = Past(zero, low, zero), []
        for value in (1.0, 3.0, 2.0):
            value = torch.full((1, 1), value)
            past.highest, past.total = torch.maximum(past.highest, value), past.total + value
            got.append(float(log_g := potential(value, past)))
            past.spent = past.spent + log_g
        assert got == expected[name]


def test_proposal_weight_is_the_difference_of_two_log_densities():
    generator = torch.Generator().manual_seed(0)
    d, z = (torch.randn(2, 3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    std = torch.tensor(0.7, dtype=torch.float64)
    p, q = torch.distributions.Normal(0.0, std), torch.distributions.Normal(d, std)
    x = d + std * z
    torch.testing.assert_close(proposal_weight(d, z, std), (p.log_prob(x) - q.log_prob(x)).sum(2))


def test_every_particle_keeps_what_its_ancestor_had():
    """After resampling, state, velocity and memory of a particle must be those of one ancestor: the reward here is the state."""

    class Spy(MixtureModel):
        checked = 0

        def predict(self, state, node):
            self.state_seen = state
            return super().predict(state, node)

        def draw_noise(self, like):
            # `like` is the state that the step starts from; the velocity was taken at the same look, before resampling.
            self.checked += not torch.equal(like, self.state_seen)
            return super().draw_noise(like)

    model = Spy(20, prompts=3)
    outcome = FK(16, 3.0, transition=DDIM(1.0)).run(model)
    assert model.checked > 0, "nothing was resampled"
    # Telescoping: whatever was copied, potentials so far and the last one add up to lam r(x0) along each lineage.
    total_weight = outcome.log_weights
    assert total_weight.isfinite().all()
    direct = FK(16, 3.0, transition=DDIM(1.0), ess=0.0).run(MixtureModel(20, prompts=3))
    torch.testing.assert_close(direct.log_weights, 3.0 * direct.rewards.double(), rtol=1e-5, atol=1e-5)


def test_history_counts_surviving_ancestors():
    history = History()
    history.add(0.5, torch.tensor([2.0]), torch.tensor([[0, 0, 2, 3]]))
    history.add(0.2, torch.tensor([2.0]), torch.tensor([[1, 1, 0, 0]]))
    assert history.surviving(1, 4).tolist() == [1]
    assert gather(torch.tensor([[5.0, 6.0]]), torch.tensor([[1, 1]])).tolist() == [[6.0, 6.0]]


# ---------------------------------------------------------------------------------------- particles


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_fk_reaches_the_tilted_law_with_every_potential(potential):
    """With few looks: a sum of many potentials spends more than it is worth on the way and leaves no particle for the end."""
    method = FK(2000, 1.0, potential, checkpoints=2, transition=DDIM(1.0))
    mean, std, log_z = moments(method.run(MixtureModel(200, prompts=16)))
    assert mean == pytest.approx(MEAN, abs=0.03)
    assert std == pytest.approx(STD, abs=0.03)
    assert log_z == pytest.approx(LOG_Z, abs=0.03)


def test_fk_without_looks_is_importance_sampling_and_with_many_keeps_more_of_the_sample():
    sizes = []
    for checkpoints in (0, 8):
        outcome = FK(2000, 1.0, checkpoints=checkpoints, transition=DDIM(1.0)).run(MixtureModel(200, prompts=8))
        assert moments(outcome)[0] == pytest.approx(MEAN, abs=0.035)
        sizes.append(float(outcome.history.ess[-1].mean()) / 2000)
    assert sizes[0] == pytest.approx(0.39, abs=0.02)
    assert sizes[1] > 0.8


def test_fk_on_five_glass_steps():
    """No other transition does with five: its inner flow draws x0 given x_t, where they put its mean."""
    outcome = FK(2000, 1.0, transition=GLASS(8), t_from=1.0, t_to=0.0, checkpoints=5).run(MixtureModel(5, prompts=16))
    mean, std, log_z = moments(outcome)
    assert (mean, std, log_z) == pytest.approx((MEAN, STD, LOG_Z), abs=0.035)


def test_returned_sample_follows_the_tilted_law():
    outcome = FK(64, 1.0, transition=DDIM(1.0), returned="sample").run(MixtureModel(100, prompts=2000))
    x = gather(outcome.state[..., 0], outcome.chosen[:, None])
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.06)
    assert float(x.std()) == pytest.approx(STD, abs=0.06)


def test_twisted_smc_needs_no_resampling():
    outcome = Twisted(1000, 1.0, clip=1e9, ess=0.0).run(model := MixtureModel(100, prompts=16))
    mean, std, log_z = moments(outcome)
    assert mean == pytest.approx(MEAN, abs=0.04)
    assert std == pytest.approx(STD, abs=0.03)
    assert log_z == pytest.approx(LOG_Z, abs=0.03)
    assert float(outcome.history.ess[-1].mean()) / 1000 > 0.55
    assert model.counts.denoiser_calls == model.counts.denoiser_backwards == 16 * 1000 * 100


def test_twisted_smc_stays_exact_when_tempered_clipped_and_resampled():
    method = Twisted(1000, 1.0, tempering=0.04, clip=0.3, transition=DDIM(1.0))
    assert moments(method.run(MixtureModel(100, prompts=16)))[0] == pytest.approx(MEAN, abs=0.045)


def test_flow_map_weights_repair_the_langevin_drift():
    outcome = FlowMap(1000, 1.0, clip=1e9, ess=0.0).run(ExactMap(100, prompts=10))
    mean, _, log_z = moments(outcome)
    assert float(outcome.state.mean()) == pytest.approx(0.0, abs=0.05)  # the drift alone
    assert mean == pytest.approx(MEAN, abs=0.04)
    assert log_z == pytest.approx(LOG_Z, abs=0.04)
    assert float(outcome.history.ess[-1].mean()) / 1000 == pytest.approx(0.46, abs=0.02)


def test_the_denoiser_is_no_flow_map():
    assert moments(FlowMap(1000, 1.0, 1, clip=1e9, ess=0.0).run(MixtureModel(60, prompts=4)))[0] < 1.3
    assert moments(FlowMap(500, 1.0, 12, clip=1e9, ess=0.0).run(MixtureModel(60, prompts=10)))[0] > 1.37


# ---------------------------------------------------------------------------------------- guidance and children


def test_guidance_through_the_denoiser_is_too_strong():
    """It replaces log E[exp(r) | x] by r(E[x0 | x])."""
    outcome = Guidance("denoiser", 1.0, 20000, t_from=1.0).run(MixtureModel(200))
    assert float(outcome.state.mean()) == pytest.approx(1.544, abs=0.03)


def test_guidance_by_a_process_reward_is_the_exact_tilt_where_the_process_reward_is_log_h():
    outcome = Guidance("noisy", 1.0, 20000, t_from=1.0).run(MixtureModel(100))
    assert (float(outcome.state.mean()), float(outcome.state.std())) == pytest.approx((1.436, 0.859), abs=0.03)


@pytest.mark.parametrize("estimate", ["jacobian_free", "spsa"])
def test_guidance_on_x0_is_exact_for_unit_gaussian_data(estimate):
    """N(2, 1) tilted by exp(0.5 x) is N(2.5, 1)."""
    model = MixtureModel(100, data=gaussian(2.0, 1.0))
    outcome = Guidance(estimate, 0.5, 20000, t_from=1.0, draws=16).run(model)
    assert (float(outcome.state.mean()), float(outcome.state.std())) == pytest.approx((2.5, 1.0), abs=0.04)


def test_the_monte_carlo_estimate_of_u(monkeypatch):
    """At one state, 200,000 draws: grad log E[h(x')] of the ancestral step, against the closed form by finite differences."""
    monkeypatch.setattr(guidance_module, "rewards_of_draws", exact_rewards_of_draws)
    model, node = MixtureModel(60), 25
    state = torch.full((1, 1, 1), 0.3)
    _, u = guidance_module.doob(Guidance("doob", 1.0, draws=200_000), model, state, node, 1.0)

    def log_expectation(x):
        v = DATA.velocity(torch.tensor([[x]]), model.t[node]).float()
        law = DDIM(1.0).transition(torch.tensor([[x]]), v, model.t[node], model.t[node + 1], model.t_max)
        z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
        h = log_h(law.mean.double() + law.std.double() * z, model.t[node + 1])[0].exp()
        return torch.trapezoid(h * (-(z**2) / 2).exp(), z).log()

    exact = (log_expectation(0.31) - log_expectation(0.29)) / 0.02
    assert float(u) == pytest.approx(float(exact), rel=0.01)
    assert float(u) == pytest.approx(float(grad_log_h(state, model.t[node])), rel=0.05)  # up to the step's own error


def exact_rewards_of_draws(model, state, v, node, transition, z, look):
    """log h of each draw in closed form, in place of the look at x0."""
    law = transition.transition(model.flow(state, node), v, model.t[node], model.t[node + 1], model.t_max)
    return log_h((law.mean[:, :, None] + law.std * z)[..., 0], model.t[node + 1]).float()


@pytest.mark.parametrize(("child", "stated"), [("mean", 1.355), ("sample", 1.401)])
def test_doob_children_with_the_exact_h(child, stated, monkeypatch):
    """16 draws of 60 ancestral steps: a bias from few draws and from the steps, which is the same in both."""
    monkeypatch.setattr("flowrl.samplers.steering.children.rewards_of_draws", exact_rewards_of_draws)
    outcome = Doob(child, draws=16, tilt_strength=1.0, t_from=1.0, particles=20000, transition=DDIM(1.0)).run(MixtureModel(60))
    assert float(outcome.state.mean()) == pytest.approx(stated, abs=0.04)


def test_looking_at_children_through_the_parents_noise_is_far_too_strong():
    means = {}
    for look in ("child", "reuse"):
        method = Doob("sample", look, 16, 1.0, t_from=1.0, particles=5000, transition=DDIM(1.0))
        means[look] = float(method.run(model := MixtureModel(60)).state.mean())
        assert model.counts.denoiser_calls == 5000 * (60 + (59 * 16 if look == "child" else 0))
    assert means["child"] == pytest.approx(MEAN, abs=0.05)
    assert means["reuse"] == pytest.approx(2.33, abs=0.05)


# ---------------------------------------------------------------------------------------- search


def test_best_of_n_is_the_expected_maximum():
    """For x ~ N(0, 1) and N = 4, E[max] = 1.0294."""
    outcome = BestOfN(4).run(model := MixtureModel(100, prompts=20000, data=gaussian(0.0, 1.0)))
    assert float(gather(outcome.rewards, outcome.chosen[:, None]).mean()) == pytest.approx(1.0294, abs=0.02)
    assert model.counts.denoiser_calls == 20000 * 4 * 100
    assert model.counts.reward_calls == 20000 * 4


def test_neighbours_keep_length_and_angle():
    noise, draws = torch.randn(2, 3, 4, 5, 5), torch.randn(2, 3, 4, 5, 5)
    near = neighbours(noise, draws, 0.95)
    a, b = noise.flatten(2), near.flatten(2)
    torch.testing.assert_close(a.norm(dim=2), b.norm(dim=2))
    torch.testing.assert_close((a * b).sum(2) / (a.norm(dim=2) * b.norm(dim=2)), torch.full((2, 3), 0.95))


def test_zero_order_climbs_and_costs_rounds_times_particles():
    rewards = []
    for rounds in (1, 6):
        model = MixtureModel(20, prompts=500, data=gaussian(0.0, 1.0), reward=lambda x: -(x - 2).abs())
        outcome = ZeroOrder(rounds, 4, cosine=0.8).run(model)
        assert model.counts.denoiser_calls == 500 * rounds * 4 * 20
        rewards.append(float(gather(outcome.rewards, outcome.chosen[:, None]).mean()))
    assert rewards[1] > rewards[0] + 0.3


def test_paths_keep_the_law_without_choice_and_climb_with_it():
    """One child each and nothing to choose: renoising and the ODE bring the plain law back."""
    plain = Paths(1, 1, first=30, back=10, forward=5).run(MixtureModel(60, prompts=20000, data=gaussian(1.0, 1.0)))
    assert (float(plain.state.mean()), float(plain.state.std())) == pytest.approx((1.0, 1.0), abs=0.03)
    steered = Paths(2, 4, first=30, back=10, forward=5).run(model := MixtureModel(60, prompts=500, data=gaussian(1.0, 1.0)))
    assert float(gather(steered.rewards, steered.chosen[:, None]).mean()) > 3
    assert model.counts.denoiser_calls == 500 * 8 * (30 + 6 * 15)
    assert (steered.history.surviving(500, 2) <= 2).all()


def test_rollover_spends_at_most_its_budget_and_saves_what_it_can():
    outcome = Rollover(60, 4, DDIM(1.0)).run(model := MixtureModel(10, prompts=300))
    assert 300 * (4 + 9) < model.counts.denoiser_calls <= 300 * 60
    plain = BestOfN(1).run(MixtureModel(10, prompts=300))
    assert float(outcome.rewards.mean()) > float(plain.rewards.mean()) + 1
    with pytest.raises(ValueError, match="budget=12.*at least 13"):
        Rollover(12, 4).run(MixtureModel(10))


# ---------------------------------------------------------------------------------------- no strength, bad input


@pytest.mark.parametrize(
    "method",
    [
        FK(3, 0.0, transition=DDIM(1.0)),
        Twisted(3, 0.0, transition=DDIM(1.0)),
        FlowMap(3, 0.0, transition=DDIM(1.0)),
        Doob(tilt_strength=0.0, particles=3, transition=DDIM(1.0)),
        Guidance("denoiser", 0.0, 3, transition=DDIM(1.0)),
    ],
    ids=lambda method: type(method).__name__,
)
def test_without_strength_the_samples_are_the_plain_samplers(method):
    model = MixtureModel(12, prompts=2)
    plain = BestOfN(3, DDIM(1.0)).run(MixtureModel(12, prompts=2))
    assert torch.equal(method.run(model).state, plain.state)
    assert model.counts.denoiser_calls == 2 * 3 * 12
    assert model.counts.denoiser_backwards == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "fk", "tilt_strength": -1}, "tilt_strength=-1.0 must not be negative"),
        ({"name": "fk", "particles": 0}, "particles=0 must be positive"),
        ({"name": "fk", "transition": "ode"}, "deterministic"),
        ({"name": "fk", "transition": "cpss"}, "transition 'cpss' is unknown"),
        ({"name": "fk", "transition": {"name": "cps", "noise": 1}}, "unexpected keyword argument 'noise'"),
        ({"name": "fk", "t_from": 0.1}, "t_from=0.1, t_to=0.2"),
        ({"name": "fk", "ess": 2}, "ess=2.0"),
        ({"name": "fk", "potential": "difff"}, "potential='difff'"),
        ({"name": "fkk"}, "did you mean fk"),
        ({"name": "doob", "draws": 5}, "use 6"),
        ({"name": "doob", "transition": "glass"}, "no density"),
        ({"name": "guidance", "estimate": "dps"}, "estimate='dps'"),
        ({"name": "zero_order", "particles": 1}, "at least one neighbour"),
        ({"name": "paths", "back": 9}, "at most first=5"),
        ({"name": "flow_map", "map_steps": 0}, "map_steps=0 must be positive"),
    ],
    ids=str,
)
def test_bad_options_are_one_sentence(options, message):
    with pytest.raises(ConfigError) as error:
        build(options, STEERS, "steer")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_options_from_text():
    method = build({"name": "fk", "particles": "4", "tilt_strength": "2", "transition": "glass"}, STEERS, "steer")
    assert method == FK(4, 2.0, transition=GLASS())
    for name, cls in STEERS.items():
        assert isinstance(build({"name": name}, STEERS, "steer"), cls)


def test_a_reward_that_abstains_names_the_prompt():
    model = MixtureModel(5, prompts=3, reward=lambda x: torch.where(torch.arange(3)[:, None] == 1, torch.nan, x))
    with pytest.raises(ValueError, match="'prompt 1'"):
        FK(2, 1.0).run(model)


def test_a_reward_without_gradient_is_refused_where_one_is_needed():
    for method in (Guidance("denoiser", 1.0), Guidance("jacobian_free", 1.0), Twisted(2, 1.0), FlowMap(2, 1.0)):
        with pytest.raises(ValueError, match="no gradient"):
            method.run(MixtureModel(5, reward=lambda x: x.detach()))
    for method in (Guidance("doob", 1.0), Guidance("spsa", 1.0)):
        method.run(MixtureModel(5, reward=lambda x: x.detach()))


def test_looks_are_spread_over_the_window():
    t = [1.0, 0.9, 0.8, 0.6, 0.5, 0.4, 0.2, 0.1, 0.0]
    assert checkpoint_nodes(t, 3, 0.8, 0.2) == [2, 4, 6]
    assert checkpoint_nodes(t, 99, 0.8, 0.2) == [2, 3, 4, 5, 6]
    assert checkpoint_nodes(t, 1, 0.8, 0.2) == [2]
    assert checkpoint_nodes(t, 0, 0.8, 0.2) == []


def test_value_and_gradient_through_the_denoiser_by_finite_differences():
    model = MixtureModel(10, prompts=2, reward=lambda x: x**2)
    state = torch.randn(2, 3, 1, generator=torch.Generator().manual_seed(1))
    _, value, u = through_denoiser(model, state, 6, 2.0)
    step = 1e-2
    up, down = (through_denoiser(model, state + sign * step, 6, 2.0)[1] for sign in (1, -1))
    torch.testing.assert_close(u[..., 0], (up - down) / (2 * step), rtol=1e-2, atol=2e-2)
    assert value.shape == (2, 3)


def test_a_population_resamples_alike_whatever_its_batch_mates_weights():
    """One population is level at the first look, where its mate is not, and uneven at the second: its ancestors are those that it
    has alone, so its stream was not advanced by the mate's need."""

    class Streams:
        def __init__(self, seeds):
            self.own = [torch.Generator().manual_seed(seed) for seed in seeds]

        def draw_uniform(self, n):
            return torch.stack([torch.rand(n, generator=generator, dtype=torch.float64) for generator in self.own])

    level, uneven = torch.zeros(8).double(), torch.linspace(0, 6, 8).double()
    looks = [torch.stack([level, uneven]), torch.stack([uneven, level])]

    def ancestors(rows, seeds):
        weights, model = Weights.start(len(rows), 8, torch.device("cpu")), Streams(seeds)
        for look in looks:
            weights.log_weights = look[rows]
            found = weights.resample(model, 0.5, 0.5, "multinomial")
        return found

    together = ancestors([0, 1], [5, 6])
    assert together[0].tolist() == ancestors([0], [5])[0].tolist() != list(range(8))
    assert together[1].tolist() == list(range(8))
