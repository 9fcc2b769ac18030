"""Trees of trajectories on real pipelines: shared states are computed once and change nothing but the cost."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline

from flowrl.policy import Policy
from flowrl.samplers import CPS, DDIM, Backward, FlowSDE
from flowrl.samplers.branching import branched_rollout, correlated, tree_seeds
from flowrl.samplers.scheduler import Unservable
from flowrl.train import GRPO
from flowrl.train.predict import PolicyPredict
from tests.pipelines import CALL, GUIDED, tiny

PROMPTS = ["a red circle"] * 3 + ["two green squares"] * 3
SEEDS = [1, 2, 3, 4, 5, 6]
INIT = [7, 7, 7, 8, 8, 8]
#: An image UNet, an unpacked transformer, two packed ones, two video models.
PIPELINES = ["sd15", "sd3", "flux", "qwenimage", "wan", "ltx"]


def make(name: str, guided: bool = False) -> Policy:
    return Policy(tiny(name), {**CALL[name], **(GUIDED[name] if guided else {}), "num_inference_steps": 6})


@pytest.mark.parametrize("name", PIPELINES)
def test_a_trajectory_in_parts_is_the_trajectory(name):
    """From the state at a node to the end, and the trunk up to it, are bit for bit what one call does."""
    policy = make(name)
    whole = policy.rollout(PROMPTS, SEEDS, transition=FlowSDE(0.7), stochastic=[2], keep_velocity=True)
    state, v, grid = policy.trunk(PROMPTS, SEEDS, 2)
    assert torch.equal(state, whole.steps[0].native) and torch.equal(v, whole.steps[0].v)
    assert len(grid.t) == 7
    rest = policy.rollout(PROMPTS, SEEDS, latents=whole.steps[0].native_next, start=3)
    assert torch.equal(rest.latents, whole.latents)
    first = policy.rollout(PROMPTS, SEEDS, stop=2)
    assert torch.equal(first.latents, state)
    assert torch.equal(policy.trunk(PROMPTS, SEEDS, 2, first.latents, start=2)[1], v)


@pytest.mark.parametrize("name", PIPELINES)
def test_shared_states_change_the_cost_only(name):
    """One SDE step from a shared state: the samples and log-probs of the plain rollout, a third of the states."""
    policy = make(name)
    how = {"transition": CPS(0.7), "init_seeds": INIT, "keep_velocity": True}
    plain = policy.rollout(PROMPTS, SEEDS, stochastic=[2, 3], **how)
    shared = branched_rollout(policy, PROMPTS, SEEDS, stochastic=[2, 3], **how)
    scale = plain.latents.abs().max()
    assert (plain.latents - shared.latents).abs().max() < 1e-3 * scale
    assert [len(step.native) for step in shared.steps] == [2, 6]
    for a, b in zip(plain.steps, shared.steps, strict=True):
        assert (a.t, a.t_next, a.index) == (b.t, b.t_next, b.index)
        assert (a.x - b.x).abs().max() < 1e-3 * scale and (a.x_next - b.x_next).abs().max() < 1e-3 * scale
        assert (a.log_prob - b.log_prob).abs().max() < 1e-4


@pytest.mark.parametrize(("name", "guided"), [("sd15", False), ("sd3", True), ("flux", False), ("wan", True)])
def test_one_training_forward_serves_a_group(name, guided, monkeypatch):
    """The ratio is exactly 1, the denoiser sees two states for six samples, and the gradient is that of six separate ones."""
    policy = make(name, guided)
    policy.add_lora(4)
    how = {"transition": FlowSDE(0.7), "init_seeds": INIT}
    shared = branched_rollout(policy, PROMPTS, SEEDS, stochastic=[2], **how)
    (step,) = shared.steps
    rows = []
    denoiser = next(iter(policy.denoisers.values()))
    hook = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs.get("hidden_states", args[0] if args else None))), with_kwargs=True
    )
    advantage = torch.tensor([1.0, -0.5, -0.5, 0.3, 0.7, -1.0])

    def gradient(step):
        loss = GRPO(epsilon=1.0).loss(PolicyPredict(policy, shared), step, advantage)
        loss.values.mean().backward()
        parameters = policy.trainable().values()
        found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        for p in parameters:
            p.grad = None
        return loss.metrics["ratio"], found

    ratio, of_shared = gradient(step)
    hook.remove()
    assert torch.equal(ratio, torch.ones(6))
    doubled = guided and name == "sd3"  # one call on both halves of guidance; Wan makes two calls
    assert set(rows) == {4 if doubled else 2}
    step.native, step.owner = step.per_sample(step.native), None
    _, separate = gradient(step)
    assert of_shared.norm() > 0
    assert (of_shared - separate).norm() < 1e-3 * separate.norm()


def test_trees():
    """[2, 2] on a group of four: one state, then two, then four; siblings share their noise until they part."""
    policy = make("sd3")
    prompts, members = ["a red circle"] * 4 + ["blue"] * 4, [0, 1, 2, 3] * 2
    init, noise = tree_seeds([(0, b // 4) for b in range(8)], members, [2, 2], 3)
    samples = branched_rollout(
        policy, prompts, range(8), init_seeds=init, noise_seeds=noise, transition=FlowSDE(0.7), stochastic=[1, 3, 4]
    )
    assert [len(step.native) for step in samples.steps] == [2, 4, 8]
    assert samples.steps[1].owner.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    following = samples.steps[0].native_next
    assert torch.equal(following[0], following[1]) and not torch.equal(following[1], following[2])
    assert len(samples.latents.flatten(1).unique(dim=0)) == 8


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan"])
def test_branch_sets_in_a_backward_window(name):
    """B2-DiffuRL: two starts with three branches each, that part where the trained last steps begin. The ODE trunk is shared."""
    policy = make(name)
    stochastic = Backward(size=2, every=5).steps(6, seed=0, update=5)
    assert stochastic == [2, 3, 4]
    init, _ = tree_seeds([(5,)] * 6, range(6), [3], 3)
    samples = branched_rollout(policy, ["blue"] * 6, SEEDS, init_seeds=init, transition=DDIM(1.0), stochastic=stochastic)
    assert [len(step.native) for step in samples.steps] == [2, 6, 6]
    trunk, _, _ = policy.trunk(["blue"] * 2, [init[0], init[3]], 2)
    assert torch.equal(samples.steps[0].native, trunk)
    assert len(samples.latents.flatten(1).unique(dim=0)) == 6
    for step in samples.steps:
        v = policy.velocity(samples.texts, step)
        assert torch.equal(step.gaussian(v).log_prob(step.x_next), step.log_prob)


def test_several_starts_in_a_group():
    """[3] in a group of six is two starts with three branches each; more splits than noisy steps are refused."""
    init, noise = tree_seeds([(5,)] * 6, range(6), [3], 2)
    assert init[:3] == init[:1] * 3 and init[3:] == init[3:4] * 3 and init[0] != init[3] and noise is None
    with pytest.raises(ValueError, match="split at 2 steps, of 1"):
        tree_seeds([(5,)] * 6, range(6), [3, 2], 1)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan"])
def test_stride(name):
    """After the stochastic step the ODE visits every second node: Euler steps by hand give the same latents."""
    policy = make(name)
    samples = branched_rollout(policy, PROMPTS, SEEDS, init_seeds=INIT, transition=FlowSDE(0.7), stochastic=[1], stride=2)
    state, grid = samples.steps[0].native_next, policy.grid()
    for node, following in ((2, 4), (4, 6)):
        _, v, _ = policy.trunk(PROMPTS, SEEDS, node, state, start=node)
        state = grid.ode_step(state, v, node, following)
    assert (samples.latents - state).abs().max() < 1e-4 * state.abs().max()


def test_correlated_noise_keeps_the_law():
    """Every branch's noise is N(0, 1), and two branches have correlation 1 / (1 + s^2): 0.2 for s = 2."""
    generator = torch.Generator().manual_seed(0)
    own, shared = torch.randn(2, 200_000, generator=generator), torch.randn(200_000, generator=generator)
    a, b = correlated(own, shared.expand(2, -1), 2.0)
    assert abs(float(a.mean())) < 0.01 and abs(float(a.var()) - 1) < 0.01
    assert abs(float((a * b).mean()) - 0.2) < 0.01


def test_spread_in_a_rollout():
    """A small spread leaves branches nearly together, a large one parts them as independent noise does."""
    policy = make("sd3")

    def distance(spread):
        how = {"init_seeds": INIT, "transition": FlowSDE(0.7), "stochastic": [1], "spread": spread}
        first = branched_rollout(policy, PROMPTS, SEEDS, **how).steps[0].native_next[:3]
        return float((first[0] - first[1]).norm())

    near, far, independent = distance(0.1), distance(8.0), distance(None)
    assert near < 0.2 * independent
    assert 0.8 * independent < far < 1.2 * independent
    assert math.isfinite(near) and near > 0


def test_a_pipeline_that_edits_its_latents_is_refused():
    """Inpainting blends the known region in after each step, which a trajectory cut in parts would miss."""
    text = tiny("sd15")
    pipe = StableDiffusionInpaintPipeline(**text.components, requires_safety_checker=False)
    size = CALL["sd15"]["height"]
    call = {**CALL["sd15"], "num_inference_steps": 4, "image": torch.zeros(1, 3, size, size)}
    mask = torch.zeros(1, 1, size, size)
    mask[..., : size // 2] = 1
    policy = Policy(pipe, {**call, "mask_image": mask, "strength": 1.0})
    with pytest.raises(Unservable, match="edits its latents"):
        branched_rollout(policy, ["blue"] * 2, [1, 2], init_seeds=[3, 3], transition=FlowSDE(0.7), stochastic=[1])
