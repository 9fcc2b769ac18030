"""What the tests share: one thread, no network, the CPU, and a small recipe for a tiny Stable Diffusion 3 on disk."""

import os

# Before torch is imported, and inherited by every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"  # models this small lose an order of magnitude to threads on a busy machine
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.pipelines import CALL, tiny

torch.set_num_threads(1)

PROMPTS = ["a red circle", "blue", "two green squares", "a cat"]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A Stable Diffusion 3 pipeline folder with random weights that draws 32 x 32 pictures."""
    folder = tmp_path_factory.mktemp("models") / "sd3"
    tiny("sd3").save_pretrained(folder)
    (folder / "flowrl.json").write_text(json.dumps({"call": CALL["sd3"]}))
    return folder


@pytest.fixture(scope="session")
def prompts(tmp_path_factory) -> Path:
    """A file of four prompts."""
    file = tmp_path_factory.mktemp("prompts") / "four.txt"
    file.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return file


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, model, prompts) -> Path:
    """A recipe whose step takes a tenth of a second: 2 prompts x 2 pictures, 3 denoising steps, 2 of them trained."""
    values = {
        "model": str(model),
        "prompts": str(prompts),
        "rewards": {"brightness": 1.0},
        "objective": {"name": "grpo"},
        "transition": {"name": "cps", "noise_level": 0.8},
        "steps": {"name": "all_but_last"},
        "num_inference_steps": 3,
        "prompts_per_step": 2,
        "num_generations": 2,
        "batch_size": 4,
        "lora_rank": 2,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "samples_steps": 0,
        "checkpointing_steps": 0,
        "report_to": "none",
    }
    file = tmp_path_factory.mktemp("recipes") / "fast.yaml"
    file.write_text(yaml.safe_dump(values))
    return file
