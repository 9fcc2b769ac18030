"""Supervised fine-tuning on the best samples: which those are, the loss, runs on samples and on data."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flowrl.batch import Noised, Prompt, Samples
from flowrl.policy import Policy
from flowrl.tiny import models, random_spec, render_batch, sample_scene
from flowrl.train.objectives import SFT
from tests.objectives import Fixed, finite_difference, make_noised, short_run


def samples(group):
    n = len(group)
    return Samples([Prompt("a")] * n, list(range(n)), torch.tensor(group), torch.zeros(n, 2))


def test_value_by_hand():
    """Latents 1, noise 0: target -1. v = 1, 0: m = 4, 1, times the weights 1 and 3."""
    noised = Noised(torch.ones(2, 1), torch.zeros(2, 1), torch.full((2,), 0.5))
    loss = SFT().loss(Fixed(torch.tensor([[1.0], [0.0]])), noised, torch.tensor([1.0, 3.0]))
    assert loss.values.tolist() == [4, 3] and loss.penalty is None


def test_the_pull_by_hand():
    """v = 1, 0 and v_ref = 3, 1: a pull of 0.5 x (4, 1), whatever the weights."""
    noised = Noised(torch.ones(2, 1), torch.zeros(2, 1), torch.full((2,), 0.5))
    loss = SFT(kl=0.5).loss(Fixed(torch.tensor([[1.0], [0.0]]), torch.tensor([[3.0], [1.0]])), noised, torch.tensor([1.0, 3.0]))
    assert loss.values.tolist() == [4, 3] and loss.penalty is not None and loss.penalty.tolist() == [2, 0.5]
    assert SFT(kl=0.5).needs.reference and not SFT().needs.reference


def test_the_best_of_each_group():
    """Groups 5 and 3 have a best one, group 8 has no difference; where groups are interleaved rows stay in their order."""
    of = samples([5, 3, 5, 8, 8, 3, 3])
    A = torch.tensor([1.0, -1.2, -1.0, 0.0, 1e-9, 0.5, 0.7])
    rows, weights = SFT().choose(of, A)
    assert rows.tolist() == [0, 6] and weights.tolist() == [1, 1]
    rows, weights = SFT(keep=2, weighted=True).choose(of, A)
    assert rows.tolist() == [0, 5, 6] and weights.tolist() == pytest.approx([1, 0.5, 0.7])
    rows, weights = SFT().choose(of, torch.zeros(7))
    assert rows.tolist() == [] and len(weights) == 0


def test_which_is_best_depends_on_the_order_of_advantages_alone():
    of, A = samples([0, 0, 0, 1, 1, 1]), torch.tensor([-1.0, 0.2, 0.8, 1.1, -0.6, -0.5])
    assert SFT().choose(of, A)[0].tolist() == SFT().choose(of, 10 * A)[0].tolist() == [2, 3]


def test_gradient_against_finite_differences():
    noised = make_noised(batch=2)
    exact, numeric = finite_difference(
        lambda v: SFT().loss(Fixed(v), noised, torch.tensor([1.0, 0.3])).values, torch.randn_like(noised.x0)
    )
    torch.testing.assert_close(exact, numeric, rtol=1e-2, atol=1e-3)


def test_bad_options():
    with pytest.raises(ValueError, match="keep=0"):
        SFT(keep=0)


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_a_run(recipe, tmp_path, name):
    """Two prompts x 2: the better one of each."""
    _, rows = short_run(recipe, tmp_path, "objective=sft", "times.count=2", name=name)
    assert [row["rows"] for row in rows] == [2, 2]


def test_few_steps_draw_short_latents():
    """What SFT repeats where nothing holds it: own latents of `tiny-sd3` for 32 training captions, mixed as in its training,
    deviate .964 times as much as those of four true scenes of each caption by 8 Euler steps (channels by themselves .91 to .96),
    and .983 times by 20 steps from the same noise. Other captions and noise: .950 to .969, and .971 to .991. Eight steps of the
    second order: 1.006."""
    policy, rng = Policy.load("tiny-sd3"), np.random.default_rng(0)
    specs = [random_spec(rng, "train", models.KIND_WEIGHTS) for _ in range(32)]
    pixels = torch.from_numpy(render_batch([sample_scene(spec, rng) for spec in specs for _ in range(4)], rng))
    with torch.no_grad():
        true = models.whiten(policy.pipe.vae, policy.pipe.vae.encode(2 * pixels - 1).latent_dist.mean)

    def share(steps: int, solver: str = "euler") -> tuple[float, list[float]]:
        prompts = [spec["prompt"] for spec in specs]
        own = policy.rollout(prompts, range(32), num_inference_steps=steps, solver=solver).latents.float()
        return float(own.std() / true.std()), (own.std((0, 2, 3)) / true.std((0, 2, 3))).tolist()

    (few, channels), (many, _), (second_order, _) = share(8), share(20), share(8, "dpmpp2m")
    assert true.std().item() == pytest.approx(1.0, abs=0.01)
    assert few == pytest.approx(0.964, abs=0.008) and many == pytest.approx(0.983, abs=0.008)
    assert second_order == pytest.approx(1.0, abs=0.015)
    assert channels == pytest.approx([0.943, 0.928, 0.956, 0.910], abs=0.015)


def test_a_step_in_which_nothing_is_best_changes_nothing(recipe, tmp_path):
    flat: list[bool] = []
    from tests.objectives import weights_of

    trainer, _ = short_run(
        recipe, tmp_path, "objective=sft", "rewards.brightness=null", "rewards.r=1", "times.count=1", steps=1,
        rewards={"r": lambda images, prompts: torch.zeros(4) if flat else images[:, 0, 0, 0]},
    )  # fmt: skip
    before = weights_of(trainer.policy)
    flat.append(True)
    metrics = trainer.step()
    assert metrics["rows"] == 0 and metrics["grad_norm"] == 0
    assert all(torch.equal(before[key], value) for key, value in weights_of(trainer.policy).items())


def test_of_data_the_preferred_pictures(recipe, tmp_path):
    """Of pairs, the preferred one; of pictures with captions, every one; no reward is asked for."""
    pairs, captioned = tmp_path / "pairs", tmp_path / "captioned"
    captioned.mkdir(parents=True)
    for name in ("chosen", "rejected"):
        (pairs / name).mkdir(parents=True)
    prompts = ["a red circle", "a blue square"]
    for i, prompt in enumerate(prompts):
        for where, level in ((pairs / "chosen", 200), (pairs / "rejected", 20), (captioned, 90)):
            Image.new("RGB", (32, 32), (level, 40 * i, 0)).save(where / f"{i}.png")
        (captioned / f"{i}.txt").write_text(prompt)
    (pairs / "prompts").mkdir()
    for i, prompt in enumerate(prompts):
        (pairs / "prompts" / f"{i}.txt").write_text(prompt)
    for data in (pairs, captioned):
        trainer, (first,) = short_run(
            recipe, tmp_path / f"of-{data.name}", "objective=sft", f"data={data}", "rewards={}", "times.count=1",
            "batch_size=2" if data is captioned else "batch_size=4", steps=1,
        )  # fmt: skip
        assert first["rows"] == 2 and "reward" not in first, json.dumps(first)
        assert trainer.data is not None and trainer.data.rows == (2 if data is pairs else 1)
