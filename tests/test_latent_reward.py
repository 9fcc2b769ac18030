"""The reward on latents: features of a block, the pool's pairs, its loss, refreshment, and guidance that climbs it."""

import copy
import math

import pytest
import torch

from flowrl.batch import Prompt, Samples
from flowrl.config import ConfigError
from flowrl.policy import Policy
from flowrl.reward_models import RewardError, load_reward
from flowrl.reward_models.base import LearningReward, ProcessReward
from flowrl.reward_models.latent import (
    LatentHead,
    LatentReward,
    Pool,
    block_features,
    latent_loss,
    middle_block,
    noisy_examples,
    save_head,
    spearman,
)
from flowrl.samplers.steering import Guidance, steer
from flowrl.train.rewards.latent import Latent, pair_accuracy
from flowrl.train.rewards.loop import RewardTrainer, load_reward_recipe
from tests.pipelines import CALL, tiny


@pytest.fixture(scope="module")
def policy(model) -> Policy:
    return Policy.load(model, num_inference_steps=4)


@pytest.fixture
def folder(model, policy, tmp_path):
    torch.manual_seed(0)
    block, given = middle_block(policy), samples(policy, 64, 99)
    with torch.no_grad():
        features = block_features(policy, block, given.latents, torch.zeros(64), given.texts)
    head = LatentHead(features.shape[1], hidden=32)
    head.fit_units(features, torch.randn(64))
    save_head(head, tmp_path / "mine", str(model), block)
    return tmp_path / "mine"


def samples(policy: Policy, count: int, seed: int) -> Samples:
    """Latents of the right shape, and pictures that show their mean over the first channel."""
    shape = policy.rollout(["a"], [0], stop=1).latents.shape[1:]
    latents = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    images = latents[:, :1].mean((2, 3), keepdim=True).expand(-1, 3, -1, -1)
    return Samples([Prompt("a red circle")] * count, list(range(count)), torch.arange(count) // 4, latents, images)


def shown(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """The made-up pixel reward."""
    return images.flatten(1).mean(1)


@pytest.mark.parametrize("name", ["sd3", "flux", "sd15"])
def test_features_of_a_block_pool_its_tokens_and_end_the_pass(name):
    policy = Policy(tiny(name), {**CALL[name], "num_inference_steps": 3})
    block = {"sd15": "unet.mid_block"}.get(name) or middle_block(policy)
    x = policy.rollout(["a star", "two"], [0, 1]).latents.float()
    t, texts = torch.full((2,), 0.4), ["a star", "two"]
    features = block_features(policy, block, x, t, texts)
    assert features.dtype == torch.float32 and features.shape[0] == 2
    # As the whole pass has it, hooked by hand.
    part, _, path = block.partition(".")
    seen, ends = [], []
    handles = [
        policy.denoisers[part].get_submodule(path).register_forward_hook(lambda m, i, o: seen.append(o)),
        policy.denoisers[part].register_forward_hook(lambda m, i, o: ends.append(o)),
    ]
    with torch.no_grad():
        policy.velocity(texts, x, t)
        outputs = [s for s in (seen[0] if isinstance(seen[0], tuple) else seen) if s is not None]
        streams = [s if s.dim() == 3 else s.flatten(2).mT for s in outputs]
        torch.testing.assert_close(features, torch.cat([f for s in streams for f in (s.mean(1), s.amax(1))], 1))
        assert len(ends) == 1
        block_features(policy, block, x, t, texts)
        assert len(ends) == 1  # what lies behind the block did not run
    for handle in handles:
        handle.remove()
    other = block_features(policy, block, x, t, ["blue"] * 2)
    assert not torch.allclose(other, features)  # it reads the prompt
    assert policy.velocity(texts, x, t).shape == x.shape  # and leaves the policy whole


def test_blocks_are_named_and_unknown_ones_refused(policy):
    assert middle_block(policy) == "transformer.transformer_blocks.1"  # of two: not a run of layers inside a block
    assert middle_block(Policy.load("tiny-sd3")) == "transformer.transformer_blocks.4"
    with pytest.raises(ValueError, match="no such module"):
        block_features(policy, "transformer.nothing", torch.zeros(1), torch.zeros(1), ["a"])


def test_the_pool_forgets_the_oldest_and_pairs_within_groups():
    pool = Pool(6)
    t = torch.zeros(4)
    pool.add(torch.zeros(4, 1), t, torch.tensor([0.0, 1, math.nan, 3]), torch.tensor([5, 5, 6, 6]))
    assert pool.scores.tolist() == [0, 1, 3] and len(pool) == 3
    pool.add(torch.ones(4, 1), t, torch.tensor([4.0, 5, 6, 7]), torch.tensor([5, 5, 6, 6]))
    assert pool.scores.tolist() == [1, 3, 4, 5, 6, 7]  # the oldest went
    assert len(set(pool.group.tolist())) == 4  # group 5 of the second call is not group 5 of the first
    rows = pool.pairs(200, torch.Generator().manual_seed(0))
    a, b = rows[:200], rows[200:]
    whole = torch.isin(pool.scores[a], torch.tensor([4.0, 5, 6, 7]))
    assert (pool.group[a] == pool.group[b])[whole].all() and (a != b)[whole].all()
    assert set(a.tolist()) == set(range(6))


def test_views_share_time_and_noise_within_a_group(policy):
    block, given = middle_block(policy), samples(policy, 8, 0)
    same = given.latents.clone()
    same[1] = same[0]
    given.latents = same
    with torch.no_grad():
        features, t, scores, group = noisy_examples(policy, block, given, torch.arange(8.0), 3, torch.Generator().manual_seed(0))
    assert t[:8].eq(0).all() and (t[8:] > 0).all() and len(t.unique()) == 5
    assert scores.tolist() == [*range(8)] * 3 and len(group.unique()) == 6
    for start in (0, 8, 16):
        torch.testing.assert_close(features[start], features[start + 1])  # equal latents, equal noise
        assert (group[start : start + 4] == group[start]).all() and (t[start : start + 4] == t[start]).all()


def test_loss_by_hand():
    """Two of a pair score 1 and 0: offset .5 and scale .5 make targets +-1. The head says +-.5.

    Huber .5 x .5^2 = .125; ranking softplus(-1) = .31326, at weight .5.
    """
    head = LatentHead(1)
    head.offset.fill_(0.5)
    head.scale.fill_(0.5)
    head.forward = lambda features, t: features[:, 0]
    pool = Pool(4)
    pool.add(torch.tensor([[0.5], [-0.5]]), torch.zeros(2), torch.tensor([1.0, 0]), torch.zeros(2, dtype=torch.int64))
    loss, metrics = latent_loss(head, pool, torch.tensor([0, 1]), 0.5, "cpu")
    assert metrics["huber"] == pytest.approx(0.125)
    assert metrics["rank"] == pytest.approx(0.31326, abs=1e-5) and metrics["pair_accuracy"] == 1
    assert float(loss) == pytest.approx(0.125 + 0.5 * 0.31326, abs=1e-5)
    tie, metrics = latent_loss(head, pool, torch.tensor([0, 0]), 0.5, "cpu")
    assert metrics["rank"] == 0 and float(tie) == pytest.approx(0.125)


def test_units_are_those_of_the_pool():
    head = LatentHead(3)
    features = torch.randn(500, 3) * torch.tensor([1.0, 10, 0]) + 2
    head.fit_units(features, torch.tensor([0.0, 1] * 250))
    torch.testing.assert_close(head.mean, features.mean(0))
    assert float(head.offset) == 0.5 and float(head.scale) == pytest.approx(0.5, abs=1e-3)
    assert head.eval()(features, torch.zeros(500)).isfinite().all()  # a constant feature divides by no zero


def test_spearman_and_pairs_by_hand():
    a = torch.tensor([1.0, 2, 3, 4])
    assert spearman(a, torch.tensor([1.0, 8, 27, 64])) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    # Ranks 1 2.5 2.5 4 against 1 2 3 4: 4.5 / sqrt(5 x 4.5)
    assert spearman(a, torch.tensor([0.0, 1, 1, 2])) == pytest.approx(4.5 / math.sqrt(22.5))
    assert math.isnan(spearman(a, torch.zeros(4)))
    value, truth = torch.tensor([1.0, 2, 0, 5]), torch.tensor([0.0, 1, 1, 1])
    assert pair_accuracy(value, truth, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.5)  # 2 > 1 right, 0 > 1 wrong
    assert math.isnan(pair_accuracy(value, truth, torch.arange(4)))


def test_noisy_is_what_steering_asks_for(folder, policy):
    reward = load_reward(folder)
    assert isinstance(reward, ProcessReward) and isinstance(reward, LearningReward) and reward.traits.needs == ("latents",)
    given = samples(policy, 3, 1)
    x = given.latents.requires_grad_()
    one = reward.noisy(x, torch.full((3,), 0.3), given.texts)
    (gradient,) = torch.autograd.grad(one.sum(), x)
    assert gradient.abs().flatten(1).amax(1).min() > 0
    torch.testing.assert_close(reward(given), reward.noisy(x, torch.zeros(3), given.texts))
    assert reward.update(given, lambda value: value) == {}


def test_refreshing_learns_a_reward_of_the_latents(folder, policy):
    """Rank correlation on samples that are new each time, measured before they are learnt from, rises from chance."""
    options = {"of": shown, "policy": policy, "steps": 60, "learning_rate": 3e-3, "min_spearman": 0.4, "views": 2}
    reward = LatentReward(folder, **options)
    found = [reward.update(samples(policy, 64, seed), lambda value: value) for seed in range(8)]
    assert found[0]["spearman"] < 0.3 < 0.5 < found[-1]["spearman"]
    assert found[-1]["pool"] == 8 * 64 * 2
    assert not reward(samples(policy, 4, 9)).isnan().any()
    again = LatentReward(folder, **options)
    again.load_state_dict(copy.deepcopy(reward.state_dict()))
    for each in (reward, again):
        torch.manual_seed(0)  # of the dropout, which the loop seeds too
        each.update(samples(policy, 48, 10), lambda value: value)
    for ours, theirs in zip(reward.head.parameters(), again.head.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_below_the_trusted_correlation_it_abstains(folder, policy):
    reward = LatentReward(folder, of=shown, policy=policy, steps=0, min_spearman=0.95, every=2)
    fresh = samples(policy, 16, 0)
    assert reward(fresh).isfinite().all()
    assert reward.update(fresh, lambda value: value)["spearman"] < 0.95
    assert reward.update(fresh, lambda value: value) == {}  # every second call
    assert reward(fresh).isnan().all()
    with pytest.raises(RewardError, match="no true score"):
        reward.refresh(fresh, torch.full((16,), math.nan))


def test_guidance_climbs_it_inside_a_real_pipeline(folder, policy):
    reward = LatentReward(folder, policy=Policy.load(policy.pipe.config._name_or_path, num_inference_steps=4))
    plain = policy.rollout(["a red circle"], [0])
    guided = steer(policy, [Prompt("a red circle")], reward, Guidance("noisy", 100.0), [0]).samples
    with torch.no_grad():
        assert float(reward(guided)[0]) > float(reward(plain)[0])


def test_the_task_draws_refreshes_and_resumes(model, prompts, tmp_path):
    task = {"name": "latent", "reward": "brightness", "model": str(model), "prompts": str(prompts), "eval_prompts": str(prompts)}
    task |= {"num_inference_steps": 2, "pool": 16, "refresh_samples": 8, "refresh_steps": 4, "eval_samples": 8, "hidden": 16}
    values = {"task": task, "max_steps": 12, "batch_size": 8, "learning_rate": 1e-3, "eval_steps": 0, "report_to": "none"}
    values |= {"checkpointing_steps": 6, "checkpoints_total_limit": 5}
    whole = RewardTrainer(load_reward_recipe({**values, "output_dir": str(tmp_path / "whole")}))
    assert isinstance(whole.task, Latent)
    whole.train()
    assert sorted(whole.task.chunks) == [2, 3]  # 12 steps: two refreshments
    rest = RewardTrainer(
        load_reward_recipe(
            {**values, "output_dir": str(tmp_path / "rest"), "resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-6")}
        )
    )
    rest.train()
    for ours, theirs in zip(whole.trained.values(), rest.trained.values(), strict=True):
        assert torch.equal(ours, theirs)
    assert {"spearman/t0.0", "pair_accuracy/t0.8"} < set(whole.held_out)
    reward = load_reward(tmp_path / "whole")
    with torch.no_grad(), whole.averaged():
        expected = whole.task.head.eval().offset + whole.task.head.scale * whole.task._values(0.0)
        torch.testing.assert_close(reward(whole.task.held_out), expected, atol=1e-4, rtol=1e-4)


def test_pools_that_cannot_be_refreshed_in_whole_groups_are_refused(tmp_path):
    recipe = load_reward_recipe({"task": {"name": "latent", "refresh_samples": 250}, "output_dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match="whole groups of generations=4"):
        RewardTrainer(recipe)
