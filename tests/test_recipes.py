"""The recipes of large models take a step on small pipelines of the same classes: their options go together."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from PIL import Image

from flowrl import Policy, Trainer, load_recipe
from flowrl.config import recipe_names
from flowrl.reward_models import Traits, load_reward
from tests.pipelines import CALL, tiny
from tests.test_offline import write

FAMILIES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
    "black-forest-labs/FLUX.1-dev": "flux",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan",
    "hunyuanvideo-community/HunyuanVideo": "hunyuan",
}
LARGE = [name for name in recipe_names() if load_recipe(name).model in FAMILIES]
#: What makes a recipe small; how it samples, weighs and learns stays.
SMALLER = {
    "lora_rank": 2, "dtype": "float32", "autocast": None, "gradient_checkpointing": False, "height": 32, "width": 32,
    "max_steps": 1, "samples_steps": 0, "checkpointing_steps": 0, "report_to": "none",
}  # fmt: skip


class Stand:
    """In place of rewards that want a detector or a trained head: brightness with a map, and of noisy latents."""

    name, traits = "stand", Traits(differentiable=True)

    def __call__(self, samples):
        return self.map(samples).flatten(1).mean(1)

    def map(self, samples):
        return samples.images.float().mean(1)

    def noisy(self, x, t, prompts):
        return x.float().flatten(1).mean(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder that is both: two captioned pictures, and pairs of them."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("red", "blue"):
        Image.new("RGB", (32, 32), name).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} thing")
    write(folder / "pairs.jsonl", *({"prompt": p, "chosen": "red.png", "rejected": "blue.png"} for p in "ab"))
    return folder


def test_the_large_models_are_those_that_are_tested():
    others = {load_recipe(name).model for name in recipe_names()} - {*FAMILIES}
    assert all(model.startswith("tiny-") for model in others)


@pytest.mark.parametrize("name", LARGE)
def test_a_step(tmp_path, data, name):
    recipe = load_recipe(name)
    family, group = FAMILIES[recipe.model], math.prod(recipe.branches or [2])
    smaller = {**SMALLER, "prompts_per_step": 2, "num_generations": group, "batch_size": 2 * group // recipe.updates_per_step}
    if recipe.num_frames:
        smaller["num_frames"] = 5
    if recipe.data:
        smaller["data"] = str(data / "pairs.jsonl" if recipe.data.endswith(".parquet") else data)
    recipe = dataclasses.replace(recipe, **smaller, output_dir=str(tmp_path))
    rewards = {label: Stand() if label in ("process", "region_map") else load_reward("brightness") for label in recipe.rewards}
    prompts = None if recipe.data else ["a red circle", "blue"]
    policy = Policy(tiny(family), CALL[family])
    trainer = Trainer(recipe, policy=policy, rewards=rewards or None, prompts=prompts)
    before = {key: p.detach().clone() for key, p in policy.trainable().items()}
    metrics = trainer.step()
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert metrics["grad_norm"] > 0
    assert any(not torch.equal(before[key], p) for key, p in policy.trainable().items())
