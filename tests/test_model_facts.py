"""What a configuration tells before weights are loaded: clips or pictures, frames, rates, pictures to start from."""

from __future__ import annotations

import inspect
import json

import diffusers
import pytest

from flowrl.config import ConfigError
from flowrl.model_facts import ModelFacts
from flowrl.policy import Policy
from tests.pipelines import CALL, tiny


def facts(name: str, vae: str = "", **config: object) -> ModelFacts:
    """Of a pipeline class of diffusers and an autoencoder's configuration, without any weights."""
    parameters = inspect.signature(inspect.unwrap(getattr(diffusers, name).__call__)).parameters
    return ModelFacts(name, parameters, config, (vae, config))


@pytest.mark.parametrize("name", ["sd3", "wan", "wan_i2v", "ltx"])
def test_a_folder_says_what_the_loaded_pipeline_says(tmp_path, name):
    pipe = tiny(name)
    pipe.save_pretrained(tmp_path)
    call = {"num_frames": 9} if name != "sd3" else {}
    (tmp_path / "flowrl.json").write_text(json.dumps({"call": call, "fps": 12}))
    read, loaded = ModelFacts.read(tmp_path), Policy(pipe, CALL[name]).facts
    assert read is not None and (read.rate, read.num_frames) == (12, 9 if call else None)
    for fact in ("pipeline", "draws_clips", "stride", "conditions", "needed_conditions", "rate_argument"):
        assert getattr(read, fact) == getattr(loaded, fact), fact
    assert read.draws_clips == (name != "sd3") and read.needed_conditions == (("image",) if name == "wan_i2v" else ())


def test_what_is_not_there_is_not_known(tmp_path):
    assert ModelFacts.read(tmp_path) is None
    (tmp_path / "model_index.json").write_text('{"_class_name": ["pipeline_mine", "MyPipeline"]}')
    found = ModelFacts.read(tmp_path)
    assert found is not None and found.pipeline == "MyPipeline" and not found.parameters and not found.draws_clips
    found.check_frames(6)  # nobody knows
    (tmp_path / "flowrl.json").write_text('{"call": {}, "fps": -1}')
    with pytest.raises(ConfigError, match=r"flowrl\.json is not .*fps=-1: frames per second"):
        ModelFacts.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "call", "rate", "fps"),
    [
        ("WanPipeline", {}, None, 16),
        ("WanPipeline", {}, 8.0, 8),
        ("HunyuanVideoPipeline", {}, None, 24),
        ("HunyuanVideoFramepackPipeline", {}, None, 30),
        ("LTXPipeline", {}, None, 25),
        ("LTXPipeline", {"frame_rate": 30}, None, 30),
        ("LTXPipeline", {"frame_rate": 30}, 24.0, 30),
        ("StableDiffusion3Pipeline", {}, None, None),
    ],
)
def test_the_rate_of_clips(name, call, rate, fps):
    """The call's argument, else the model's own, else the argument's default, else what is usual; pictures have none."""
    known = facts(name)
    assert ModelFacts(name, known.parameters, rate=rate).fps(call) == fps


def test_the_rate_of_wans_latest():
    assert facts("WanPipeline", expand_timesteps=True).fps({}) == 24


def test_a_rate_is_told_to_the_pipeline_that_asks_for_it():
    policy = Policy(tiny("ltx"), CALL["ltx"], fps=30)
    assert policy.call["frame_rate"] == 30 and policy.fps == 30
    policy.set_fps(23.976)
    assert policy.call["frame_rate"] == 23.976 and policy.rollout(["a"], [0], num_inference_steps=2).fps == 23.976
    with pytest.raises(ValueError, match="fps=0: frames per second"):
        policy.set_fps(0)


@pytest.mark.parametrize(
    ("name", "vae", "config", "frames", "near"),
    [
        ("WanPipeline", "AutoencoderKLWan", {"scale_factor_temporal": 4}, 34, "33 and 37"),
        ("WanPipeline", "AutoencoderKLWan", {}, 4, "1 and 5"),
        ("LTXPipeline", "AutoencoderKLLTXVideo", {"spatio_temporal_scaling": [True, True, True, False]}, 100, "97 and 105"),
        ("MochiPipeline", "AutoencoderKLMochi", {"temporal_expansions": [1, 2, 3]}, 20, "19 and 25"),
        ("HunyuanVideoPipeline", "AutoencoderKLHunyuanVideo", {"temporal_compression_ratio": 4}, 60, "57 and 61"),
    ],
)
def test_frames_that_an_autoencoder_cannot_take(name, vae, config, frames, near):
    """Its first latent frame is one frame, each further one `stride` of them: 34 = 1 + 33, and 33 is no multiple of 4."""
    known = facts(name, vae, **config)
    with pytest.raises(ConfigError, match=rf"num_frames={frames}: {vae} takes \d k \+ 1 frames; the nearest are {near}$"):
        known.check_frames(frames)
    for allowed in map(int, near.split(" and ")):
        known.check_frames(allowed)


def test_the_strides_are_those_of_the_pipelines_themselves():
    for name, attribute in (("wan", "vae_scale_factor_temporal"), ("ltx", "vae_temporal_compression_ratio")):
        pipe = tiny(name)
        assert ModelFacts.of(pipe).stride == getattr(pipe, attribute)


def test_rates_of_pictures():
    with pytest.raises(ConfigError, match="fps=8: StableDiffusion3Pipeline draws pictures; leave it out"):
        facts("StableDiffusion3Pipeline").check_fps(8)
    facts("WanPipeline").check_fps(8)
    with pytest.raises(ValueError, match="fps=0: frames per second"):
        facts("WanPipeline").check_fps(0)


def test_frames_of_pictures_and_of_autoencoders_that_take_any():
    with pytest.raises(ConfigError, match="num_frames=5: StableDiffusion3Pipeline draws pictures"):
        facts("StableDiffusion3Pipeline").check_frames(5)
    with pytest.raises(ConfigError, match="num_frames=4.5: a whole number, 1 at least"):
        facts("WanPipeline").check_frames(4.5)
    facts("AnimateDiffPipeline", "AutoencoderKL").check_frames(6)
    with pytest.raises(ConfigError, match="the nearest are 5 and 9"):
        Policy(tiny("wan"), CALL["wan"]).rollout(["a"], [0], num_frames=6)
