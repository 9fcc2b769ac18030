"""The tiny pipelines are what the other tests take them for: deterministic, sensitive to their inputs, reloadable."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict

from tests.pipelines import BUILDERS, CALL, DENOISER, GUIDED, reload, tiny

PROMPTS = ["a red circle", "two blue squares"]
every_pipeline = pytest.mark.parametrize("name", BUILDERS)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a tiny pipeline reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Models this small gain nothing from a second thread, and on a busy machine lose an order of magnitude to it.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def picture(pipe: DiffusionPipeline, name: str, prompts: list[str] = PROMPTS, **more: Any) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    settings = {"num_inference_steps": 2, "output_type": "pt", **CALL[name], **more}
    out = pipe(prompt=prompts, generator=generators, **settings)
    return out.images if hasattr(out, "images") else out.frames


def lora(targets: str = "to_q to_k to_v to_out.0") -> LoraConfig:
    # Random B as well as A, so that the adapter changes the picture; alpha differs from r, so that losing it shows.
    return LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=targets.split())


def change(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().mean().item()


@every_pipeline
def test_same_weights_and_picture_from_the_same_seed_whatever_ran_before(name: str) -> None:
    torch.manual_seed(123)
    first = picture(tiny(name), name)
    after = torch.random.get_rng_state()
    torch.rand(5)
    pipe = tiny(name)
    assert torch.equal(first, picture(pipe, name))
    assert torch.equal(first, picture(pipe, name)), "the second call of one pipeline differs from the first"
    assert change(first, picture(tiny(name, seed=1), name)) > 0.01
    torch.manual_seed(123)
    assert torch.equal(after, torch.random.get_rng_state()), "building or calling drew from the global generator"
    assert first.shape[0] == 2
    assert first.shape[-3:] == (3, 32, 32)


@every_pipeline
def test_a_picture_depends_on_prompt_seed_and_guidance(name: str) -> None:
    pipe = tiny(name)
    base = picture(pipe, name)
    assert 0.05 < base.std() < 0.4, "a picture without contrast, or one that is all black and white"
    assert change(base, picture(pipe, name, ["a blue square", "no circles at all"])) > 0.005
    assert change(base[:1], picture(pipe, name, ["x", PROMPTS[0]])[1:]) > 0.05
    guided = picture(pipe, name, **GUIDED[name])
    assert change(base, guided) > 0.01
    # Neither the batch nor a batch of two text lengths changes what one sample looks like.
    assert torch.allclose(base[:1], picture(pipe, name, PROMPTS[:1]), atol=1e-4)
    assert torch.allclose(guided[:1], picture(pipe, name, PROMPTS[:1], **GUIDED[name]), atol=1e-4)


@every_pipeline
def test_the_denoiser_heeds_time_state_and_text(name: str) -> None:
    pipe = tiny(name)
    denoiser = getattr(pipe, DENOISER[name])
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = denoiser.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    picture(pipe, name)
    handle.remove()
    args, kwargs = calls[0]
    inputs = {**dict(zip(("sample", "timestep"), args, strict=False)), **kwargs}  # only UNets take arguments by place
    state = "sample" if DENOISER[name] == "unet" else "hidden_states"
    with torch.no_grad():
        before = denoiser(**{**inputs, "return_dict": False})[0]
        for key in (state, "timestep", "encoder_hidden_states"):
            other = inputs[key] * 0.5 if key == "timestep" else inputs[key].flip(0)
            after = denoiser(**{**inputs, key: other, "return_dict": False})[0]
            least = 0.005 if key == "encoder_hidden_states" else 0.05  # HunyuanVideo's template makes captions much alike
            assert ((after - before).norm() / before.norm()) > least, key


@every_pipeline
def test_saved_and_reloaded_pipeline_draws_the_same_picture(name: str, tmp_path: Path) -> None:
    pipe = tiny(name)
    pipe.save_pretrained(tmp_path)
    again = reload(tmp_path)
    assert type(again) is type(pipe)
    own, reloaded = dict(pipe.scheduler.config), dict(again.scheduler.config)
    own.pop("_use_default_values", None)  # which keys were left to their defaults is not saved
    reloaded.pop("_use_default_values", None)
    assert reloaded == own
    for settings in ({}, GUIDED[name]):
        assert torch.equal(picture(pipe, name, **settings), picture(again, name, **settings))


@every_pipeline
def test_lora_round_trip_draws_the_same_picture(name: str, tmp_path: Path) -> None:
    pipe = tiny(name)
    plain = picture(pipe, name)
    role = DENOISER[name]
    denoiser = getattr(pipe, role)
    denoiser.add_adapter(lora())
    adapted = picture(pipe, name)
    assert change(plain, adapted) > 0.001
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(denoiser))
    type(pipe).save_lora_weights(tmp_path, **{f"{role}_lora_layers": layers}, **_collate_lora_metadata({role: denoiser}))
    fresh = tiny(name)
    fresh.load_lora_weights(tmp_path)
    assert torch.equal(adapted, picture(fresh, name))
    fresh.unload_lora_weights()
    # The same weights, but frozen now, and a CPU matmul picks its kernel by requires_grad too (SDXL: 1e-6 apart).
    assert torch.allclose(plain, picture(fresh, name), atol=1e-5)


def test_the_velocity_variant_differs_only_in_how_the_output_is_read() -> None:
    epsilon, velocity = tiny("sd15"), tiny("sd15", prediction="v")
    assert velocity.scheduler.config.prediction_type == "v_prediction"
    same = zip(epsilon.unet.parameters(), velocity.unet.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert change(picture(epsilon, "sd15"), picture(velocity, "sd15")) > 0.01


def test_qwen_prompt_starts_where_the_pipeline_expects_it() -> None:
    pipe = tiny("qwenimage")
    ids = pipe.tokenizer(pipe.prompt_template_encode.format("a red circle")).input_ids
    kept = pipe.tokenizer.decode(ids[pipe.prompt_template_encode_start_idx :])
    assert kept.startswith("a red circle<|im_end|>")
