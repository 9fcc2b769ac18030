"""Steering inside real pipelines: bit for bit the plain rollout where there is nothing to steer, gradients, accounting."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from flowrl.batch import Prompt, Samples
from flowrl.policy import Policy
from flowrl.reward_models import load_reward
from flowrl.samplers import CPS, DDIM, GLASS, DanceSDE
from flowrl.samplers.scheduler import Unservable
from flowrl.samplers.steering import (
    FK,
    BestOfN,
    Doob,
    Euphonium,
    FlowMap,
    Guidance,
    Paths,
    PolicyModel,
    Rollover,
    Twisted,
    ZeroOrder,
    genealogy_picture,
    guided_rollout,
    steer,
    steer_each,
)
from flowrl.samplers.steering.guidance import through_denoiser
from flowrl.samplers.steering.pipeline import particle_seed
from tests.pipelines import CALL, GUIDED, tiny

PROMPTS = [Prompt("a red circle"), Prompt("two green squares")]
STEPS = 5


class Bright:
    """Mean of all pixels, differentiable."""

    name = "bright"

    def __call__(self, samples: Samples) -> torch.Tensor:
        assert samples.images is not None
        return samples.images.flatten(1).mean(1)


@pytest.fixture(scope="module", params=["sd3", "flux", "sd15"])
def policy(request) -> Policy:
    name = request.param
    return Policy(tiny(name), {**CALL[name], **(GUIDED[name] if name == "sd15" else {}), "num_inference_steps": STEPS})


@pytest.fixture(scope="module")
def sd3() -> Policy:
    return Policy(tiny("sd3"), {**CALL["sd3"], "num_inference_steps": STEPS})


@pytest.mark.parametrize(
    "method",
    [
        BestOfN(1, CPS(0.8)),
        FK(1, 5.0),
        Twisted(1, 0.0, transition=CPS(0.8)),
        FlowMap(1, 0.0, transition=CPS(0.8)),
        Doob(tilt_strength=0.0),
        Guidance("denoiser", 0.0, transition=CPS(0.8)),
        FK(3, 0.0),
    ],
    ids=lambda method: f"{type(method).__name__}-{method.particles}",
)
def test_one_particle_or_no_strength_is_the_plain_rollout_bit_for_bit(policy, method):
    n = method.particles
    result = steer(policy, PROMPTS, Bright(), method, [7], keep_particles=True)
    seeds = [particle_seed(7, j) for _ in PROMPTS for j in range(n)]
    plain = policy.rollout(
        [prompt for prompt in PROMPTS for _ in range(n)], seeds, transition=CPS(0.8), stochastic=list(range(STEPS - 1))
    )
    assert torch.equal(result.particles.latents, plain.latents)
    assert result.particles.seeds == seeds
    if n == 1:
        assert torch.equal(result.samples.latents, plain.latents)
        assert torch.equal(result.samples.images, policy.decode(plain))
        assert result.samples.seeds == [7, 7]


def test_best_of_one_is_the_ode_rollout(policy):
    result = steer(policy, PROMPTS, Bright(), BestOfN(1), [7])
    assert torch.equal(result.samples.latents, policy.rollout(PROMPTS, [7, 7]).latents)


def test_several_prompts_and_seeds_do_not_share_particles(sd3):
    together = steer(sd3, PROMPTS, Bright(), FK(4, 1000.0), [1, 2])
    assert [(prompt.text, seed) for prompt, seed in zip(together.samples.prompts, together.samples.seeds, strict=True)] == [
        (prompt.text, seed) for prompt in PROMPTS for seed in (1, 2)
    ]
    assert together.samples.group.tolist() == [0, 0, 1, 1]
    alone = steer(sd3, PROMPTS[1:], Bright(), FK(4, 1000.0), [2])
    for ours, theirs in zip(together.report.history.ancestors, alone.report.history.ancestors, strict=True):
        assert ours[3].tolist() == theirs[0].tolist()
    each = steer_each(sd3, PROMPTS, Bright(), FK(4, 1000.0), [1, 2])
    torch.testing.assert_close(each.samples.latents, together.samples.latents[[0, 3]], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="a seed for each prompt"):
        steer_each(sd3, PROMPTS, Bright(), FK(4), [1])
    torch.testing.assert_close(together.samples.latents[3:], alone.samples.latents, atol=1e-4, rtol=1e-4)


P, N, C, M, K = 2, 4, 2, 6, STEPS


@pytest.mark.parametrize(
    ("method", "denoiser", "backward", "reward"),
    [
        (BestOfN(N), N * K, 0, N),
        (FK(N, 5.0, checkpoints=C), N * K, 0, N * (C + 1)),
        (FK(N, 5.0, checkpoints=C, transition=GLASS(3)), N * K * 3, 0, N * (C + 1)),
        # The start costs a call that the search does not use: the pipeline hands out its noise with the model's answer.
        (ZeroOrder(2, N), 1 + 2 * N * K, 0, 2 * N),
        (Paths(2, 2, first=3, back=2, forward=1), 4 * 3 + 2 * 4 * 3, 0, 3 * 4),
        (Doob(look="reuse", draws=M, tilt_strength=5.0, t_from=1.0), K, 0, 1 + (K - 1) * M),
        (Guidance("denoiser", 5.0, t_from=0.99), K, K - 1, 1 + K - 1),
        (Guidance("jacobian_free", 5.0, t_from=0.99, inner=2), K, 0, 1 + (K - 1) * 2),
        (Guidance("spsa", 5.0, t_from=0.99, draws=3), K, 0, 1 + (K - 1) * 6),
        (FlowMap(N, 5.0, map_steps=2), 2 * N * K + N, 2 * N * K, N * (K + 1)),
        (Twisted(N, 5.0), N * K + N, N * K, N * (K + 1)),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else "",
)
def test_cost_is_what_the_method_says(sd3, method, denoiser, backward, reward):
    """Calls of the transformer, counted by itself, are the calls reported."""
    rows = []
    hook = sd3.pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(len(output[0])), with_kwargs=True
    )
    try:
        report = steer(sd3, PROMPTS, Bright(), method, [0]).report
    finally:
        hook.remove()
    assert sum(rows) == report.counts.denoiser_calls == P * denoiser
    assert report.counts.denoiser_backwards == P * backward
    assert report.counts.reward_calls == P * reward
    assert report.counts.decodes == P * reward + P


@pytest.mark.parametrize(
    "method",
    [
        BestOfN(8),
        ZeroOrder(3, 4),
        Rollover(40, 4),
        FK(8, 2000.0, transition="ddim"),
        Doob(draws=8, tilt_strength=2000.0, transition=DDIM(1.0), t_from=1.0),
        Guidance("denoiser", 500.0, t_from=0.99),
        Guidance("jacobian_free", 500.0, t_from=0.99),
        Twisted(4, 500.0),
    ],
    ids=lambda method: type(method).__name__,
)
def test_every_method_raises_its_reward(sd3, method):
    prompts, seeds = [PROMPTS[0]], list(range(6))
    plain = steer(sd3, prompts, Bright(), BestOfN(1), seeds).report.rewards.mean()
    report = steer(sd3, prompts, Bright(), method, seeds).report
    chosen = report.rewards.gather(1, report.chosen[:, None]).mean()
    assert chosen > plain + 5e-4


def test_default_strength_is_counted(sd3):
    report = steer(sd3, PROMPTS, Bright(), FK(2, checkpoints=0), [0]).report
    assert report.strength > 0
    assert report.counts.denoiser_calls == 2 * 4 * STEPS + 2 * 2 * STEPS
    assert dict(report.rows)["denoiser calls"] == "60"


def test_gradient_through_pipeline_decoder_and_reward(policy):
    """Along the gradient, lam r(x0_hat) rises by |u|^2 step, in every kind of coordinates."""
    model = PolicyModel(policy, PROMPTS, [3, 4], Bright())
    with torch.no_grad():
        state = model.start(1)
        node = 2
        for i in range(node):
            state = model.native(model.flow(state, i) - (model.t[i] - model.t[i + 1]) * model.velocity(state, i), i + 1)
        _, _, u = through_denoiser(model, state, node, 100.0)
        norm = u.flatten(1).norm(dim=1)
        assert (norm > 0).all()
        step = (1e-2 / norm).reshape(-1, 1, *[1] * (state.dim() - 2)) * u
        up, down = (
            through_denoiser(model, model.native(model.flow(state, node) + sign * step, node), node, 100.0)[1] for sign in (1, -1)
        )
    torch.testing.assert_close(((up - down) / 2e-2)[:, 0], norm, rtol=0.1, atol=1e-2)
    assert all(parameter.grad is None for parameter in policy.denoisers[next(iter(policy.denoisers))].parameters())


def test_decoding_with_graph_is_decoding(policy):
    samples = policy.rollout(PROMPTS, [0, 1])
    latents = samples.latents.clone().requires_grad_()
    images = policy.decode(latents, samples.texts, with_graph=True)
    assert torch.equal(images, policy.decode(samples))
    assert not policy.decode(samples).requires_grad
    images.mean().backward()
    assert latents.grad.abs().sum() > 0


def test_rewards_without_gradient_and_abstentions_are_one_line(sd3):
    with pytest.raises(ValueError, match="no gradient") as error:
        steer(sd3, PROMPTS, load_reward("jpeg_size"), Guidance("denoiser", 1.0, t_from=0.99), [0])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="'a red circle'"):
        steer(sd3, PROMPTS, load_reward("tiny_dense"), FK(2, 1.0), [0])  # no scene to verify
    with pytest.raises(ValueError, match="noisy"):
        steer(sd3, PROMPTS, Bright(), Guidance("noisy", 1.0, t_from=0.99), [0])


def test_a_multistep_scheduler_is_replaced_or_refused():
    pipe = tiny("sd15")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    policy = Policy(pipe, {**CALL["sd15"], "num_inference_steps": STEPS})
    assert steer(policy, PROMPTS[:1], Bright(), FK(2, 1.0), [0]).samples.images.shape == (1, 3, 32, 32)
    pipe = tiny("sd3")
    pipe.scheduler = DPMSolverMultistepScheduler(prediction_type="sample", beta_schedule="scaled_linear")
    pipe.scheduler.register_to_config(prediction_type="unknown")
    with pytest.raises(Unservable, match="DPMSolverMultistepScheduler"):
        Policy(pipe)


def test_genealogy_is_drawn(sd3, tmp_path):
    report = steer(sd3, PROMPTS, Bright(), FK(6, 2000.0, transition=DDIM(1.0)), [0]).report
    assert (report.surviving < 6).any()
    picture = Image.open(genealogy_picture(report, tmp_path / "genealogy.png")).convert("RGB")
    colours = {colour for _, colour in picture.getcolors(1 << 20)}
    assert {(70, 120, 180), (220, 90, 30), (215, 215, 215)} <= colours
    plain = steer(sd3, PROMPTS, Bright(), BestOfN(3), [0]).report
    assert genealogy_picture(plain, tmp_path / "plain.png").is_file()


# ---------------------------------------------------------------------------------------- Euphonium


def nothing(x, t, prompts):
    return 0.0 * x.flatten(1).sum(1)


def constant_slope(x, t, prompts):
    return 3.0 * x.flatten(1).sum(1)


def test_guided_rollout_without_reward_is_the_rollout_bit_for_bit(policy):
    arguments = {"transition": DanceSDE(0.3), "stochastic": [1, 2, 3], "keep_velocity": True}
    plain = policy.rollout(PROMPTS, [5, 6], **arguments)
    guided = guided_rollout(policy, PROMPTS, [5, 6], process_reward=nothing, guidance=Euphonium(last=1.0), **arguments)
    assert torch.equal(plain.latents, guided.latents)
    for ours, theirs in zip(guided.steps, plain.steps, strict=True):
        assert torch.equal(ours.native_next, theirs.native_next)
        assert torch.equal(ours.log_prob, theirs.log_prob)
        assert torch.equal(ours.v, theirs.v)


def test_guided_steps_move_by_half_the_variance_times_the_gradient_over_beta(sd3):
    """Slope 3 in every dim: x' moves by std^2 / 2 * 3 / beta on the guided steps; the log-prob is that of the unguided law."""
    arguments = {"transition": DanceSDE(0.3), "stochastic": [1, 3]}
    plain = sd3.rollout(PROMPTS, [5, 6], **arguments)
    guidance = Euphonium(beta=0.5, last=0.4)  # of five steps the last two: only step 3 of the stochastic ones
    guided = guided_rollout(sd3, PROMPTS, [5, 6], process_reward=constant_slope, guidance=guidance, **arguments)
    assert torch.equal(guided.steps[0].native_next, plain.steps[0].native_next)
    step, before = guided.steps[1], plain.steps[1]
    std = float(DanceSDE(0.3).std(step.t, step.t_next, step.t_max))
    torch.testing.assert_close(
        step.x_next - before.x_next, torch.full_like(step.x_next, std**2 / 2 * 3 / 0.5), rtol=1e-3, atol=1e-6
    )
    law = step.gaussian(sd3.velocity(guided.texts, step).detach())
    torch.testing.assert_close(step.log_prob, law.log_prob(step.x_next))
    with pytest.raises(ValueError, match="no gradient"):
        guided_rollout(
            sd3, PROMPTS, [5, 6], process_reward=lambda x, t, p: torch.zeros(2), guidance=Euphonium(last=1.0), **arguments
        )
    with pytest.raises(ValueError, match="beta"):
        Euphonium(beta=0)
