"""The critic that learns: what it learns, when it pauses, that all processes hold the same one, and that it resumes."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn import functional as F

from flowrl.batch import Prompt, Samples
from flowrl.reward_models import load_reward
from flowrl.reward_models.adversarial import Adversarial, hinge
from flowrl.reward_models.base import LearningReward, score_one, to_pil
from tests.runs import SERVER, ranks


def pictures(n: int, seed: int, red: float = 0.0) -> torch.Tensor:
    """Smooth random pictures, those that pretend with a tinge of red."""
    images = F.interpolate(torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed)), (32, 32), mode="bilinear")
    images[:, 0] += red
    return images.clamp(0, 1)


def made(n: int = 8, seed: int = 0, red: float = 0.3) -> Samples:
    """n samples of n / 2 prompts, two references each."""
    group = torch.arange(n) // 2
    references = pictures(n, 100 + seed).unflatten(0, (-1, 2)).repeat_interleave(2, 0)
    prompts = [Prompt(f"prompt {g}") for g in group.tolist()]
    seeds = [seed * 1000 + i for i in range(n)]
    return Samples(prompts, seeds, group, torch.zeros(n, 1), pictures(n, seed, red), references=references)


def critic(**options) -> Adversarial:
    return load_reward("adversarial", **{"features": "pixels", "hidden": 32, "learning_rate": 3e-3, "patches": 4, **options})  # type: ignore[return-value]


def alone(x: torch.Tensor) -> torch.Tensor:
    return x


def test_hinge_by_hand():
    """1/2 (mean(relu(1 - 2), relu(1 - 0)) + mean(relu(1 + 0.5), relu(1 - 3))) = 1/2 (0.5 + 0.75)."""
    assert float(hinge(torch.tensor([2.0, 0.0]), torch.tensor([0.5, -3.0]))) == pytest.approx(0.625)


def test_it_learns_to_tell_samples_from_references():
    reward = critic(window=(1.0, 1.0))
    assert isinstance(reward, LearningReward)
    metrics = [reward.update(made(seed=s), alone) for s in range(12)]
    assert metrics[-1]["accuracy"] > 0.9 and metrics[-1]["score_real"] > metrics[-1]["score_fake"] + 0.3
    fresh = made(seed=50)
    real = made(seed=60, red=0.0)
    assert float(score_one("r", reward, real).mean() - score_one("r", reward, fresh).mean()) > 0.3
    fresh.images.requires_grad_()  # and its gradient takes the red away
    reward(fresh).sum().backward()
    red, others = fresh.images.grad[:, 0].mean(), fresh.images.grad[:, 1:].mean()
    assert float(red) < 0 and float(red) < float(others)


def test_the_score_is_the_heads_on_the_features_it_was_trained_on():
    """0.7 of the global feature and 0.3 of the mean patch, all of unit length; all patches where so many are asked for."""
    reward, samples = critic(patches=None), made()
    tokens = reward.tokens(samples.images, samples.seeds)
    assert tokens.shape == (8, 17, 192)
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(8, 17))
    whole = F.normalize(reward.features.pictures(samples.images), dim=-1)
    parts = F.normalize(reward.features.patches(samples.images), dim=-1)
    expected = 0.7 * reward.head(whole)[:, 0] + 0.3 * reward.head(parts)[..., 0].mean(1)
    torch.testing.assert_close(reward(samples), expected)
    learnt: list[torch.Tensor] = []
    reward._loss = lambda real, fake: learnt.append(fake) or sum(p.sum() for p in reward.head.parameters())  # type: ignore[method-assign]
    reward.update(samples, alone)
    torch.testing.assert_close(learnt[0], tokens)


def test_a_score_depends_on_its_own_sample_only():
    """Patches are drawn by each sample's seed: neither order nor batch mates matter; another seed looks elsewhere."""
    reward, samples = critic(), made()
    r = score_one("r", reward, samples)
    order = torch.tensor([5, 2, 7])
    torch.testing.assert_close(score_one("r", reward, samples.select(order)), r[order])
    assert torch.equal(score_one("r", reward, samples), r)
    samples.seeds = [seed + 1 for seed in samples.seeds]
    assert not torch.equal(score_one("r", reward, samples), r)
    samples.images[3] = torch.nan
    assert score_one("r", reward, samples).isnan().tolist() == [i == 3 for i in range(8)]


def test_it_pauses_where_it_wins_and_hurries_where_it_loses():
    reward = critic(steps=6, window=(0.6, 0.9), replay=0)
    steps, accuracies = [], []
    for s in range(25):
        metrics = reward.update(made(16, seed=s, red=0.5), alone)
        steps.append(metrics["steps"])
        accuracies.append(metrics["accuracy"])
    for accuracy, taken in zip(accuracies, steps, strict=True):
        assert (taken == 0) == (accuracy >= 0.9)
        assert taken == 1 or accuracy < 0.6 or taken == 0
    assert max(steps) > 1 and steps[-1] == 0


def test_memory_keeps_the_whole_run_alike():
    """After 40 batches of 4 into 16 places, the ages of what is kept are spread over the run: their mean is about the middle."""
    ages = []
    for seed in range(12):
        reward = critic(replay=16, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for batch in range(40):
            reward._remember(torch.full((4, 1, 192), float(batch)).half(), generator)
        assert reward.memory.shape == (16, 1, 192) and reward.seen == 160
        ages.append(reward.memory[:, 0, 0].float())
    assert float(torch.cat(ages).mean()) == pytest.approx(19.5, abs=3)


def test_a_run_that_was_stopped_goes_on_to_the_bit():
    def go(reward, updates):
        return [reward.update(made(seed=s), alone) for s in updates]

    options = {"replay": 12, "window": (1.0, 1.0), "steps": 2}
    whole = critic(**options)
    straight = go(whole, range(6))
    first = critic(**options)
    go(first, range(3))
    again = critic(**options, seed=0)
    again.load_state_dict(first.state_dict())
    assert go(again, range(3, 6)) == straight[3:]
    a, b = whole.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert {"head.0.weight", "optimizer.0.exp_avg", "memory", "counts"} <= a.keys()


def test_squashed_and_from_a_folder(tmp_path):
    for i, picture in enumerate(to_pil(pictures(6, 7))):
        picture.save(tmp_path / f"{i}.png")
    reward = critic(references=str(tmp_path), squash="tanh", window=(1.0, 1.0))
    assert reward.traits.needs == ("images",) and reward.traits.range == (-1.0, 1.0)
    samples = made()
    samples.references = None
    for s in range(10):
        samples.images = pictures(8, s, 0.4)
        metrics = reward.update(samples, alone)
    assert metrics["accuracy"] > 0.85
    assert float(score_one("r", reward, samples).abs().max()) < 1
    with pytest.raises(ValueError, match="squash='relu'"):
        critic(squash="relu")
    with pytest.raises(ValueError, match="there are no pictures"):
        critic(references=str(tmp_path / "none"))


def test_clips_frame_by_frame():
    reward, samples = critic(patches=None), made()
    clips = made(4)
    clips.images = samples.images.unflatten(0, (4, 2))
    torch.testing.assert_close(reward(clips), reward(samples).unflatten(0, (4, 2)).mean(1))
    assert reward.update(clips, alone)["steps"] >= 0


def process(env: dict[str, str], together: bool, out: str) -> None:
    os.environ.update(env)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def reduce(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x / world

    torch.manual_seed(rank)
    reward = critic(window=(1.0, 1.0), steps=2)
    start = torch.cat([p.detach().flatten() for p in reward.head.parameters()])
    for s in range(3):
        metrics = reward.update(made(seed=10 * s + rank), reduce if together else alone)
    torch.save({"start": start, "head": torch.cat([p.detach().flatten() for p in reward.head.parameters()]), **metrics}, out)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("together", [True, False])
def test_two_processes_hold_one_critic(together, tmp_path):
    """They start alike and see other samples; averaged gradients keep them equal, to the bit. Without, they part."""
    outs = [str(tmp_path / f"{rank}.pt") for rank in range(2)]
    processes = [SERVER.Process(target=process, args=(env, together, out)) for env, out in zip(ranks(2), outs, strict=True)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(120)
        assert p.exitcode == 0
    a, b = (torch.load(out, weights_only=True) for out in outs)
    assert torch.equal(a["start"], b["start"]) and not torch.equal(a["start"], a["head"])
    assert torch.equal(a["head"], b["head"]) == together
    assert (a["accuracy"] == b["accuracy"] and a["score_fake"] == b["score_fake"]) == together
