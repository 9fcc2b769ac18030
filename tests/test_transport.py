"""Optimal transport: plans as POT makes them, maps in closed form and learnt, rewards of the embedded encoder."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import ot
import pytest
import torch
from torch.nn import functional as F

from flowrl.batch import Prompt, Samples
from flowrl.reward_models import load_reward
from flowrl.reward_models.base import score_one, to_pil
from flowrl.reward_models.gaussians import frechet_distance, moments
from flowrl.reward_models.sinkhorn import balanced, partial, unbalanced, uniform
from flowrl.reward_models.transport import TransportMap, places, token_cost, token_plan
from flowrl.tiny import random_spec, render, sample_scene
from flowrl.train.rewards.loop import RewardTrainer, load_reward_recipe
from flowrl.train.rewards.transport import Game
from flowrl.train.rewards.transport import Transport as TransportTask

EPSILON = 0.05


@pytest.fixture(scope="module")
def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random costs in [0, 1] of 8 words and 60 patches, uniform weights."""
    return np.random.default_rng(0).random((8, 60)), np.full(8, 1 / 8), np.full(60, 1 / 60)


def batched(*arrays: np.ndarray, dtype=torch.float64) -> list[torch.Tensor]:
    return [torch.from_numpy(array)[None].to(dtype) for array in arrays]


# ------------------------------------------------------------------------------------------------ plans


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-7)])
def test_plans_are_those_of_pot(problem, dtype, atol):
    C, a, b = problem
    ours = batched(C, a, b, dtype=dtype)
    rho = EPSILON * 0.9 / (1 - 0.9)
    for plan, theirs in (
        (balanced(*ours, EPSILON), ot.sinkhorn(a, b, C, EPSILON, numItermax=10000, stopThr=1e-14)),
        (
            unbalanced(*ours, EPSILON, 0.9),
            ot.unbalanced.sinkhorn_unbalanced(a, b, C, EPSILON, rho, reg_type="entropy", numItermax=10000, stopThr=1e-14),
        ),
        (
            partial(*ours, EPSILON, 0.9, iterations=500),
            ot.partial.entropic_partial_wasserstein(a, b, C, EPSILON, m=0.9, numItermax=10000, stopThr=1e-15),
        ),
    ):
        assert plan.dtype == dtype
        torch.testing.assert_close(plan[0].double(), torch.from_numpy(theirs), rtol=0, atol=atol)


def test_the_papers_exponent_is_m_and_its_mass_is_not(problem):
    """rho = epsilon m / (1 - m) gives rho / (rho + epsilon) = m. Moved are 1.12 at m = 0.9, 2.44 at 0.5; partial moves m."""
    ours = batched(*problem)
    for m, moved in ((0.9, 1.12), (0.5, 2.44)):
        rho = EPSILON * m / (1 - m)
        assert rho / (rho + EPSILON) == pytest.approx(m, abs=1e-15)
        assert float(unbalanced(*ours, EPSILON, m).sum()) == pytest.approx(moved, abs=0.005)
        assert float(partial(*ours, EPSILON, m).sum()) == pytest.approx(m, abs=1e-12)


def test_partial_keeps_within_the_weights(problem):
    C, a, b = batched(*problem)
    plan = partial(C, a, b, EPSILON, 0.6, iterations=1000)
    assert (plan.sum(2) <= a + 1e-9).all() and (plan.sum(1) <= b + 1e-9).all()
    with pytest.raises(ValueError, match="mass=1.2"):
        partial(C, a, b, EPSILON, 1.2)


def test_row_scaling_cancels_where_rows_are_normalised(problem):
    """Why word weights are row sums: fused with attention and normalised by row, as published, the row duals do nothing."""
    C, a, b = batched(*problem)
    attention = torch.rand(8, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = partial(C, a, b, EPSILON, 0.5)[0]
    scaled = plan * torch.linspace(0.01, 10, 8).double()[:, None]
    fused = [F.normalize(attention * p, p=1, dim=1) for p in (plan, scaled)]
    torch.testing.assert_close(*fused)


def test_padded_words_get_nothing_and_change_nothing(problem):
    C, a, b = batched(*problem)
    padded = torch.cat([C, torch.rand(1, 3, 60, dtype=torch.float64)], 1)
    weights = uniform(torch.tensor([[True] * 8 + [False] * 3]))
    for solve in (balanced, lambda *x: unbalanced(*x, 0.9), lambda *x: partial(*x, 0.9)):
        plan = solve(padded, weights, b, EPSILON)
        assert (plan[:, 8:] == 0).all()
        torch.testing.assert_close(plan[:, :8], solve(C, a, b, EPSILON), rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------------------------------------ words and patches


def test_a_word_that_fits_nowhere_counts_less():
    """Balanced, each of three words has a third of the mass; partially, the one that fits no patch gives up most of its own."""
    S = torch.full((1, 3, 16), 0.1)
    S[0, 0, :8] = S[0, 1, 8:] = 0.9
    mask = torch.ones(1, 3, dtype=torch.bool)
    full = token_plan(S, mask, places(4, 4), mass=1.0, eta=0)[0].sum(1)
    part = token_plan(S, mask, places(4, 4), mass=0.7, eta=0)[0].sum(1)
    torch.testing.assert_close(full, torch.full((3,), 1 / 3), rtol=0, atol=1e-4)
    assert float(part[2]) < 0.05 and float(part[:2].min()) > 0.3


def test_a_word_is_held_to_one_place():
    """One word fits the left column and, as well, a single patch at the right: the prior charges the latter for the distance."""
    S = torch.zeros(1, 2, 16)
    S[0, 0, [0, 4, 8, 12, 7]] = 0.9
    S[0, 1] = 0.5
    mask, far = torch.ones(1, 2, dtype=torch.bool), 7
    without, held = (token_plan(S, mask, places(4, 4), mass=0.2, eta=eta)[0, 0] for eta in (0.0, 0.5))
    assert float(held[far]) < 0.3 * float(without[far]) and float(held[4]) > 0.8 * float(without[4])


def test_costs_lie_between_zero_and_one_whatever_the_scale():
    S = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    mask = torch.tensor([[True, True, True], [True, True, False]])
    C = token_cost(S, mask, (0.2, torch.rand(2, 3, 8) * 100))
    assert float(C[0].min()) == float(C[1, :2].min()) == 0 and float(C[0].max()) == float(C[1, :2].max()) == 1
    torch.testing.assert_close(token_cost(0.1 * S + 0.3, mask), token_cost(S, mask))


def test_order_of_the_patches_and_of_the_words_does_not_matter():
    g = torch.Generator().manual_seed(0)
    S, mask, where = torch.rand(1, 5, 16, generator=g), torch.ones(1, 5, dtype=torch.bool), places(4, 4)
    words, patches = torch.randperm(5, generator=g), torch.randperm(16, generator=g)
    plan = token_plan(S, mask, where)
    again = token_plan(S[:, words][:, :, patches], mask, where[patches])
    torch.testing.assert_close(again, plan[:, words][:, :, patches], rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------------ maps


def cloud(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g) + shift


def test_the_gaussian_map_carries_mean_and_covariance():
    y, x = cloud(400, 5, 0), cloud(300, 5, 1, shift=2)
    moved = TransportMap("gaussian", 5).fit(y, x, shrinkage=0)(y)
    for ours, theirs in zip(moments(moved), moments(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    shifted = TransportMap("mean_shift", 5).fit(y, x)(y)
    torch.testing.assert_close(shifted.mean(0), x.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cov(shifted.T), torch.cov(y.T), rtol=1e-3, atol=1e-3)


def test_a_neural_map_learns_what_moments_do_not_hold():
    """A Gaussian onto two far modes: of the gaussian map's points 37 % fall in between, where there is nothing. Few remain."""
    g = torch.Generator().manual_seed(0)
    y = torch.randn(1024, 2, generator=g)
    x = 0.3 * torch.randn(1024, 2, generator=g)
    x[:, 0] += 2 * (torch.randint(2, (1024,), generator=g) * 2 - 1)
    torch.manual_seed(0)
    task = TransportTask(kind="neural", inner=5)
    task.recipe = SimpleNamespace(batch_size=256, seed=0)  # type: ignore[assignment]
    task.y, task.x = y, x
    task.game = Game(TransportMap("neural", 2, 64).fit(y, x))

    def between() -> float:
        return float((task.game.transport(y)[:, 0].abs() < 1).float().mean())

    start = between()
    optimizer = torch.optim.Adam(task.game.parameters(), 1e-3, betas=(0.5, 0.9))
    for step in range(900):
        task.loss(task.batch(step))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert start > 0.35
    assert between() < 0.12
    assert float((task.game.transport(y)[:, 0] > 0).float().mean()) == pytest.approx(0.5, abs=0.1)


def test_turns_train_one_network_each():
    task = TransportTask(kind="neural", inner=2)
    task.recipe = SimpleNamespace(batch_size=8, seed=0)  # type: ignore[assignment]
    task.y, task.x = cloud(16, 3, 0), cloud(16, 3, 1)
    torch.manual_seed(0)
    task.game = Game(TransportMap("neural", 3, 8).fit(task.y, task.x))
    torch.nn.init.normal_(task.game.critic[-1].weight)
    turns = []
    for step in range(6):
        task.game.zero_grad(set_to_none=True)
        task.loss(task.batch(step))[0].backward()
        reached = [any(p.grad is not None for p in net.parameters()) for net in (task.game.transport, task.game.critic)]
        assert sum(reached) == 1
        turns.append(reached.index(True))
    assert turns == [0, 0, 1, 0, 0, 1]


# ------------------------------------------------------------------------------------------------ training and rewards


def scenes(n: int) -> tuple[torch.Tensor, list[str]]:
    rng = np.random.default_rng(3)
    specs = [random_spec(rng, "test") for _ in range(n)]
    return torch.from_numpy(np.stack([render(sample_scene(s, rng), rng) for s in specs])), [s["prompt"] for s in specs]


def made(images: torch.Tensor, prompts: list[str]) -> Samples:
    n = len(prompts)
    return Samples([Prompt(p) for p in prompts], list(range(n)), torch.arange(n), torch.zeros(n, 1), images)


def recipe(folder, **task):
    return load_reward_recipe(
        {"task": {"name": "transport", **task}, "batch_size": 32, "max_steps": 1, "report_to": "none", "output_dir": str(folder)}
    )


def test_trained_saved_and_loaded(tmp_path):
    """One command makes the folder; its reward is the cosine with the carried text, and carried texts lie where pictures do."""
    trainer = RewardTrainer(recipe(tmp_path / "run", count=200, held_out=64))
    folder = trainer.train()
    assert trainer.held_out["frechet"].value < 0.5 * trainer.held_out["frechet_of_texts"].value
    assert trainer.held_out["accuracy"].value > 0.85
    reward = load_reward(folder)
    images, prompts = scenes(6)
    task = trainer.task
    with torch.no_grad():
        y = task.game.transport(F.normalize(task.encoder.texts(prompts), dim=-1))
        expected = F.cosine_similarity(y, task.encoder.pictures(images))
    torch.testing.assert_close(score_one("transport", reward, made(images, prompts)), expected)
    (folder / "reward.json").write_text(json.dumps({"reward": "transport"}))
    with pytest.raises(ValueError, match="holds no transport map"):
        load_reward(folder)


def test_pairs_from_a_file(tmp_path):
    images, prompts = scenes(40)
    for i, picture in enumerate(to_pil(images)):
        picture.save(tmp_path / f"{i}.png")
    rows = [{"prompt": prompt, "image": f"{i}.png"} for i, prompt in enumerate(prompts)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TransportTask(kind="mean_shift", pairs=str(tmp_path / "pairs.jsonl"), held_out=8)
    task.prepare(recipe(tmp_path / "run"), torch.device("cpu"))
    assert task.y.shape == (32, 64) and len(task.test_prompts) == 8
    torch.testing.assert_close(task.x[3], F.normalize(task.encoder.pictures((images[3:4] * 255).round() / 255), dim=-1)[0])
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a circle"}\n')
    with pytest.raises(ValueError, match='wants an "image"'):
        TransportTask(pairs=str(tmp_path / "bad.jsonl")).prepare(recipe(tmp_path / "run"), torch.device("cpu"))


@pytest.mark.parametrize("name", ["transport", "token_transport"])
def test_own_pictures_score_above_others(name):
    reward = load_reward(name)
    images, prompts = scenes(40)
    own = score_one(name, reward, made(images, prompts))
    other = score_one(name, reward, made(images.roll(1, 0), prompts))
    assert float((own > other).float().mean()) > (0.85 if name == "transport" else 0.6)
    assert own.isfinite().all() and float(own.abs().max()) <= 1
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(score_one(name, reward, made(images, prompts).select(order)), own[order], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["transport", "token_transport"])
def test_gradients_reach_the_pixels(name):
    images, prompts = scenes(2)
    images.requires_grad_()
    load_reward(name)(made(images, prompts)).sum().backward()
    assert images.grad is not None and float(images.grad.abs().sum()) > 0


def test_clips_are_scored_frame_by_frame_and_no_words_abstain():
    reward = load_reward("token_transport")
    images, prompts = scenes(4)
    single = score_one("r", reward, made(images, prompts[:1] * 4))
    clip = score_one("r", reward, made(images[None], prompts[:1]))
    torch.testing.assert_close(clip, single.mean()[None], rtol=1e-4, atol=1e-5)
    assert score_one("r", reward, made(images[:2], ["", prompts[0]])).isnan().tolist() == [True, False]


def test_the_map_that_ships_was_fitted_to_the_encoder_that_ships():
    reward = load_reward("tiny_transport")
    images, prompts = scenes(200)
    with torch.no_grad():
        y = F.normalize(reward.backbone.texts(prompts), dim=-1)
        x = F.normalize(reward.backbone.pictures(images), dim=-1)
        target = moments(x)
        gap, left = (float(frechet_distance(moments(z), target)) for z in (y, F.normalize(reward.map(y), dim=-1)))
    assert left < 0.5 * gap
