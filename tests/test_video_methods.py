"""Methods of clips: T2V-Turbo's mixture of rewards, DOLLAR's latent reward, Euphonium's process reward of latent clips."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from flowrl import Policy, Trainer, load_recipe
from flowrl.config import recipe_names
from flowrl.reward_models import Traits, load_reward
from flowrl.reward_models.latent import LatentHead, LatentReward, at_once, block_features, middle_block, save_head
from flowrl.samplers import CPS
from flowrl.samplers.flow import x0_from
from flowrl.samplers.steering.euphonium import Euphonium, guided_rollout
from flowrl.tiny import video
from flowrl.train.objectives import Consistency, ReFL
from flowrl.train.predict import PolicyPredict
from flowrl.train.rewards.loop import RewardTrainer, load_reward_recipe
from tests.objectives import make_noised
from tests.pipelines import CALL, tiny

PROMPTS = ["a red circle", "blue"]


@pytest.fixture
def policy() -> Policy:
    return Policy(tiny("wan"), {**CALL["wan"], "num_inference_steps": 4})


@pytest.fixture
def folder(policy, tmp_path):
    """A latent reward of the policy's clips, with random weights, large enough to matter."""
    torch.manual_seed(0)
    block = middle_block(policy)
    samples = policy.rollout(["a star"] * 8, range(8))
    with torch.no_grad():
        features = block_features(policy, block, samples.latents.float(), torch.zeros(8), samples.texts)
    head = LatentHead(features.shape[1], hidden=32)
    head.fit_units(features, torch.randn(8))
    save_head(head, tmp_path / "latent", "nobody/nothing", block)
    return tmp_path / "latent"


def noised(policy: Policy):
    """A batch of clips, and the same noised at t = 0.6."""
    policy.snapshot("old")
    batch = policy.rollout(PROMPTS, [1, 2])
    point = make_noised(batch=2, t=0.6, shape=batch.latents.shape[1:])
    return batch, point


# ------------------------------------------------------------------------------------------------ T2V-Turbo's mixture


def light(images, prompts):
    return images.mean((1, 2, 3))


def motion(images, prompts):
    return (images[:, 1:] - images[:, :-1]).abs().mean((1, 2, 3, 4))


light.traits = Traits(differentiable=True)
motion.traits = Traits(needs=("clips",), differentiable=True)


def test_the_mixture_by_hand(policy):
    """Of 5 frames 3 are decoded, drawn by the batch; the reward of pictures sees the first and the last of them, that of clips
    all: L = distance - (1 (light_1 + light_3) / 2 + 2 (|f_2 - f_1| + |f_3 - f_2|) / 2)."""
    policy.add_lora(rank=2)
    batch, point = noised(policy)
    rewards = {"image": load_reward("frames", of=light, count=2), "video": load_reward(motion)}
    weights = torch.tensor([1.0, 2.0])

    def predict():
        return PolicyPredict(policy, batch, rewards=rewards, weights=weights)

    loss = Consistency(frames=3).loss(predict(), point, torch.zeros(2))
    guess = x0_from(point.x, predict()(point), point.t)
    shown = predict().pictures(guess, 3)
    whole = policy.decode(guess.detach(), PROMPTS)
    assert shown.shape == (2, 3, 3, 32, 32)
    kept = [int((whole[0] - frame).abs().flatten(1).mean(1).argmin()) for frame in shown[0].detach()]
    assert kept == sorted(set(kept)), "three different frames, in their order"
    image = (shown[:, 0].mean((1, 2, 3)) + shown[:, 2].mean((1, 2, 3))) / 2
    clip = ((shown[:, 1] - shown[:, 0]).abs().mean((1, 2, 3)) + (shown[:, 2] - shown[:, 1]).abs().mean((1, 2, 3))) / 2
    torch.testing.assert_close(loss.values, loss.metrics["consistency_loss"] - (image + 2 * clip), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss.metrics["predicted_reward"], (image + 2 * clip).detach(), atol=1e-5, rtol=1e-5)
    loss.values.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.trainable().values())


# ------------------------------------------------------------------------------------------------ DOLLAR's latent reward


def test_features_of_clips_pool_their_tokens(policy):
    """Two latent frames of 2 x 2 patches are 8 tokens: mean and maximum of what the block says of them."""
    x = policy.rollout(PROMPTS, [0, 1]).latents.float()
    block, seen = middle_block(policy), []
    module = policy.denoisers["transformer"].get_submodule(block.partition(".")[2])
    handle = module.register_forward_hook(lambda m, i, o: seen.append(o))
    features = block_features(policy, block, x, torch.full((2,), 0.4), PROMPTS)
    handle.remove()
    assert seen[0].shape[1] == 8
    torch.testing.assert_close(features, torch.cat([seen[0].mean(1), seen[0].amax(1)], 1))


def test_clips_are_read_a_few_at_a_time():
    """4 M numbers in one go: 64 pictures of 64 x 64 x 4, 18 clips of Wan at 416 x 240 x 33, one of 1280 x 720 x 81."""
    shapes = {(4, 64, 64): 64, (16, 9, 30, 52): 18, (16, 21, 90, 160): 1}
    assert {shape: at_once(torch.empty(0).new_empty(1, *shape, device="meta")) for shape in shapes} == shapes


@pytest.mark.parametrize("objective", [Consistency(), ReFL()], ids=["consistency", "refl"])
def test_its_gradient_needs_no_decoder(policy, folder, objective, monkeypatch):
    """The loss is that of the objective with r = R_phi(x0_hat, y) at t = 0, and reaches the adapters; nothing is decoded."""
    policy.add_lora(rank=2)
    for parameter in policy.trainable().values():
        parameter.data.add_(0.02)
    reward = LatentReward(folder, policy=Policy(tiny("wan"), policy.call))
    batch, point = noised(policy)
    if isinstance(objective, ReFL):
        batch = policy.rollout(PROMPTS, [1, 2], record=[2])
        point = batch.steps[0]
    monkeypatch.setattr(policy.pipe.vae, "decode", None)
    predict = PolicyPredict(policy, batch, rewards={"latent": reward})
    loss = objective.loss(predict, point, torch.zeros(2))
    x, t = (point.x, point.t) if isinstance(objective, Consistency) else (point.x, torch.full((2,), point.t))
    guess = x0_from(x, predict(point), t)
    r = reward.noisy(guess, torch.zeros(2), PROMPTS)
    torch.testing.assert_close(loss.values - loss.metrics.get("consistency_loss", 0), -r, atol=1e-5, rtol=1e-5)
    loss.values.sum().backward()
    assert all(p.grad is None for p in reward.policy.pipe.transformer.parameters())
    assert sum(float(p.grad.abs().sum()) for p in policy.trainable().values() if p.grad is not None) > 0


def test_the_gradient_is_that_of_the_reward(folder):
    """Along a random direction, against central differences of R_phi itself."""
    reward = LatentReward(folder, policy=Policy(tiny("wan"), {**CALL["wan"], "num_inference_steps": 4}))
    x = reward.policy.rollout(PROMPTS, [1, 2]).latents.float().requires_grad_()
    t, direction = torch.tensor([0.0, 0.7]), torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(reward.noisy(x, t, PROMPTS).sum(), x)
    with torch.no_grad():
        up, down = (reward.noisy(x + sign * 1e-2 * direction, t, PROMPTS) for sign in (1, -1))
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), (up - down) / 2e-2, rtol=0.05, atol=1e-3)


def test_it_is_trained_on_clips_at_the_runs_size(tmp_path, prompts):
    """A model whose own size is another: `call` says the run's, travels with the reward, and its latents fit; without, they do
    not."""
    pipe = tiny("wan")
    pipe.save_pretrained(tmp_path / "wan")
    call = {**CALL["wan"], "num_frames": 9}
    task = {"name": "latent", "reward": "brightness", "model": str(tmp_path / "wan"), "prompts": str(prompts), "call": call}
    task |= {"eval_prompts": str(prompts), "num_inference_steps": 2, "pool": 8, "refresh_samples": 8, "eval_samples": 8}
    task |= {"hidden": 8, "rollout_batch_size": 4}
    values = {"task": task, "max_steps": 2, "batch_size": 8, "eval_steps": 0, "checkpointing_steps": 0, "report_to": "none"}
    RewardTrainer(load_reward_recipe({**values, "output_dir": str(tmp_path / "reward")})).train()
    card = json.loads((tmp_path / "reward" / "reward.json").read_text())
    assert card["call"] == call and card["imitates"] == "brightness"
    reward = load_reward(tmp_path / "reward", dtype="bfloat16")
    drawn = Policy(tiny("wan"), {**call, "num_inference_steps": 2}).rollout(PROMPTS, [0, 1])
    assert drawn.latents.shape[2] == 3 and reward(drawn).shape == (2,) and reward.policy.pipe.transformer.dtype == torch.bfloat16
    shorter = Policy(tiny("wan"), {**CALL["wan"], "num_inference_steps": 2}).rollout(PROMPTS, [0, 1])
    with pytest.raises(ValueError, match="do not fit this call"):
        reward(shorter)
    with pytest.raises(ValueError, match="latent: dtype='int8': choose float32 or bfloat16"):
        load_reward(tmp_path / "reward", dtype="int8")


def test_it_learns_from_the_students_clips(policy, folder):
    """Fresh clips and what the pixel reward says of them: the rank correlation is measured first, and better after learning."""
    bright = load_reward("brightness")
    reward = LatentReward(folder, of=bright, policy=policy, steps=200, learning_rate=1e-2)
    samples = policy.rollout(["a red circle", "blue", "a star", "two"] * 4, range(16), group=torch.arange(16) % 4)
    samples.images = policy.decode(samples)
    first = reward.update(samples, lambda value: value)["spearman"]
    assert reward.update(samples, lambda value: value)["spearman"] > max(0.6, first)


# ------------------------------------------------------------------------------------------------ Euphonium


def test_rollouts_of_clips_lean_towards_the_process_reward(policy, folder):
    """The same noises with and without the lean: where a step leans, the process reward of where it leads is higher for every
    clip."""
    reward = LatentReward(folder, policy=Policy(tiny("wan"), policy.call))
    common = {"transition": CPS(0.8), "stochastic": [1, 2], "process_reward": reward.noisy}
    found = []
    for beta in (1e9, 0.2):
        guided = guided_rollout(policy, PROMPTS, [3, 4], guidance=Euphonium(beta=beta, last=1.0), **common)
        step = guided.steps[0]
        with torch.no_grad():
            found.append(reward.noisy(step.x_next, torch.full((2,), step.t_next), PROMPTS))
    plain = policy.rollout(PROMPTS, [3, 4], transition=CPS(0.8), stochastic=[1, 2])
    assert guided.latents.shape == plain.latents.shape and (found[1] > found[0]).all()


# ------------------------------------------------------------------------------------------------ recipes of the embedded model


@pytest.fixture(scope="module")
def small() -> Policy:
    """The embedded model of clips before its training, and smaller."""
    torch.manual_seed(0)
    arch = video.Architecture(vae_width=4, vae_widening=(1, 1, 1), layers=2, heads=2, head_dim=24, text_width=48, text_layers=1)
    pipe = video.make_pipeline(arch, video.make_vae(arch))
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.zero_()  # clips that are not all the same ground
        for parameter in pipe.transformer.parameters():
            parameter.mul_(2.0 if parameter.ndim > 1 else 1.0)
    return Policy(pipe, dict(video.CALL))


def stand_in(options: dict, policy: Policy, folder) -> object:
    """The reward that a recipe names, where it wants a folder: one made here."""
    own = {key: value for key, value in options.items() if key not in ("name", "weight", "folder", "every")}
    if options["name"] == "latent":
        block = middle_block(policy)
        samples = policy.rollout(["a red circle moving left"] * 4, range(4), num_inference_steps=2)
        with torch.no_grad():
            features = block_features(policy, block, samples.latents.float(), torch.zeros(4), samples.texts)
        head = LatentHead(features.shape[1], hidden=8)
        head.fit_units(features, torch.randn(4))
        save_head(head, folder, "tiny-wan", block)
        return LatentReward(folder, policy=policy, steps=2, **own)
    if options["name"] in ("video_text", "video_transport"):
        return load_reward("video_text", encoder="tiny_clip")
    if "encoder" in own:
        own["encoder"] = "tiny_clip"
    return load_reward(options["name"], **own)


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("tiny-video-")])
def test_a_step_of_each_recipe(name, small, tmp_path):
    overrides = ["prompts_per_step=6", "num_generations=2", "checks=false", "eval_steps=0", "lora_rank=2"]
    overrides += ["checkpointing_steps=0", "samples_steps=0", "report_to=none", f"output_dir={tmp_path / 'run'}", "autocast=null"]
    recipe = load_recipe(name, overrides)
    recipe.batch_size = 12 // recipe.updates_per_step
    copied = copy.deepcopy(small.pipe)
    policy = Policy(copied, dict(video.CALL))
    rewards = {}
    for label, value in recipe.rewards.items():
        options = value if isinstance(value, dict) else {"name": label}
        rewards[label] = stand_in({"name": label, **options}, Policy(copy.deepcopy(copied), dict(video.CALL)), tmp_path / label)
    trainer = Trainer(recipe, policy=policy, rewards=rewards or None)
    before = {key: p.detach().clone() for key, p in policy.trainable().items()}
    metrics = trainer.step()
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert metrics["grad_norm"] > 0 and any(not torch.equal(before[key], p) for key, p in policy.trainable().items())
