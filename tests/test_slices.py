"""Some frames of clips: exact values, exact or cut gradients, less memory; training on clips, with rewards of motion."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from flowrl import Policy
from flowrl.clips import read_clip
from flowrl.config import ConfigError, Recipe
from flowrl.reward_models import load_reward
from flowrl.reward_models.base import RewardError, Traits
from flowrl.slices import latent_frame
from flowrl.tiny.video import draw
from flowrl.train.predict import PolicyPredict
from tests.objectives import short_run
from tests.pipelines import CALL, tiny

FRAMES = 13  # of latent frames 0, 1 (1 to 4), 2 (5 to 8) and 3 (9 to 12)


def policy() -> Policy:
    return Policy(tiny("wan"), {**CALL["wan"], "num_frames": FRAMES})


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 16, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def gradient(one: Policy, z: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The frames, and the gradient (2, 16, 4, 4, 4) of the sum of their squares in the latents."""
    x = z.clone().requires_grad_()
    frames = one.decode(x, ["a", "b"], with_graph=True, **options)
    frames.square().sum().backward()
    assert x.grad is not None
    return frames.detach(), x.grad


def test_which_latent_frame_a_frame_comes_from():
    assert [latent_frame(frame, 4) for frame in range(10)] == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3]


@pytest.mark.parametrize("context", [None, 0, 1])
@pytest.mark.parametrize("wanted", [[0], [3, 7], [12]])
def test_frames_are_exact_to_the_bit(wanted, context):
    one, z = policy(), latents()
    with torch.no_grad():
        whole = one.decode(z, ["a", "b"])
        some = one.decode(z, ["a", "b"], frames=wanted, context=context)
    assert torch.equal(some, whole[:, wanted])
    frames, _ = gradient(one, z, frames=wanted, context=context)
    assert torch.equal(frames, whole[:, wanted])
    assert torch.equal(one.decode(z, ["a", "b"]), whole), "the autoencoder is left as it was"


def test_the_whole_gradient_is_that_of_the_whole_clip():
    """Of frames 3 and 7: the same as through all 13 frames, and none in latent frame 3, which comes later."""
    one, z = policy(), latents()
    x = z.clone().requires_grad_()
    one.decode(x, ["a", "b"], with_graph=True)[:, [3, 7]].square().sum().backward()
    _, found = gradient(one, z, frames=[3, 7])
    torch.testing.assert_close(found, x.grad, rtol=1e-4, atol=1e-6)
    assert found[:, :, :3].abs().amax((0, 1, 3, 4)).min() > 0 and not found[:, :, 3].any()


def test_context_cuts_what_a_frame_owes_to_earlier_latents():
    """Of frame 12: a gradient in its own latent frame, and in `context` before it."""
    one, z = policy(), latents()
    whole = gradient(one, z, frames=[12])[1]
    for context in (0, 1, 2):
        found = gradient(one, z, frames=[12], context=context)[1]
        reached = found.abs().amax((0, 1, 3, 4)) > 0
        assert reached.tolist() == [i >= 3 - context for i in range(4)]
        error = [(found - whole)[:, :, i].norm() / whole[:, :, i].norm() for i in range(3 - context, 4)]
        assert max(error) < (1e-5 if context == 2 else 0.7), error
    torch.testing.assert_close(gradient(one, z, frames=[12], context=3)[1], whole)


def test_context_keeps_the_direction_on_the_embedded_autoencoder():
    """Mean cosine with the whole gradient of a squared error, eight drawn clips. Frame 5 is the first of its latent frame."""
    one = Policy.load("tiny-wan")
    clips, target = (torch.from_numpy(draw(np.random.default_rng(seed), 8)[0]).transpose(1, 2) for seed in (0, 1))
    z = one.latents_of(clips)

    def of(frame: int, context: int | None) -> torch.Tensor:
        x = z.clone().requires_grad_()
        found = one.decode(x, [""] * 8, with_graph=True, frames=[frame], context=context)
        (found[:, 0] - target[:, frame]).square().sum().backward()
        assert x.grad is not None
        return x.grad.flatten(1)

    for frame, expected in {4: (0.979, 1.0), 5: (0.367, 0.978), 8: (0.945, 0.986)}.items():
        whole = of(frame, None)
        cosines = [torch.cosine_similarity(of(frame, context), whole).mean().item() for context in (0, 1)]
        assert cosines == pytest.approx(expected, abs=0.02), frame


def test_less_context_keeps_less_for_the_gradient():
    """Bytes that the graph holds: for frame 12 one latent frame of four, against all; for frame 0 no other is even decoded."""
    one, z = policy(), latents()

    def kept(**options) -> int:
        held: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = one.decode(z.clone().requires_grad_(), ["a", "b"], with_graph=True, **options)
        assert out.requires_grad
        return sum(held.values())

    whole, all_of_it, own, first = kept(), kept(frames=[12]), kept(frames=[12], context=0), kept(frames=[0])
    assert all_of_it == pytest.approx(whole, rel=0.05)
    assert own < 0.4 * whole and first < 0.25 * whole


def test_other_autoencoders_decode_whole_and_exact():
    one = Policy(tiny("ltx"), CALL["ltx"])
    z = one.rollout(["a"], [0], num_inference_steps=2).latents
    with torch.no_grad():
        assert torch.equal(one.decode(z, ["a"], frames=[1, 4], context=0), one.decode(z, ["a"])[:, [1, 4]])
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline draws pictures, not clips"):
        Policy(tiny("sd3"), CALL["sd3"]).decode(torch.zeros(1, 4, 16, 16), frames=[0])


# ------------------------------------------------------------------------------------------------ training on clips


def motion(images: torch.Tensor, prompts: list[str], **columns) -> torch.Tensor:
    """How much changes from frame to frame, (N,); with gradient."""
    return (images[:, 1:] - images[:, :-1]).abs().flatten(1).mean(1)


motion.traits = Traits(needs=("clips", "fps"), differentiable=True)
CLIPS = ["num_frames=9", "samples_steps=1"]


@pytest.mark.parametrize(
    "options",
    [
        ["objective=grpo"],
        ["objective=nft"],
        ["objective=dpo"],
        ["objective=refl", "steps={name: late, size: 2}", "objective.frames=2", "decode_context=0"],
    ],
    ids=lambda options: options[0].partition("=")[2],
)
def test_a_step_of_each_objective(recipe, tmp_path, options):
    """Untouched by what a sample is: rewards of frames and of motion; what is saved are the clips, at the pipeline's rate."""
    refl = options[0].endswith("refl")
    rewards = {"brightness": load_reward("brightness"), **({} if refl else {"motion": motion})}
    _, rows = short_run(recipe, tmp_path, *options, *CLIPS, name="wan", steps=1, rewards=rewards)
    assert ("rewards/motion/mean" in rows[0]) != refl
    place = tmp_path / "run" / "samples" / "step-000001"
    row = json.loads((place / "samples.jsonl").read_text().splitlines()[0])
    pixels, rate = read_clip(place / row["file"])
    assert pixels.shape == (9, 32, 32, 3) and rate == 16
    assert row["rewards"]["brightness"] == pytest.approx(pixels.mean() / 255, abs=2e-3)


def test_some_frames_have_no_rate():
    """A reward of motion is refused where it would see two frames out of five at a made-up rate."""
    one = Policy(tiny("wan"), CALL["wan"])
    batch = one.rollout(["a"], [0], num_inference_steps=2)
    assert batch.fps == 16
    predict = PolicyPredict(one, batch, rewards={"motion": load_reward(motion)})
    assert predict.rewards(batch.latents).shape == (1, 1)
    with pytest.raises(RewardError, match="'motion' needs fps: it wants the frame rate"):
        predict.rewards(batch.latents, frames=2)


def test_options_of_clips_are_checked():
    for options, message in (
        ({"fps": 0.0}, "fps=0.0: frames per second, more than 0"),
        ({"decode_context": -1}, "decode_context=-1: must not be negative"),
    ):
        with pytest.raises(ConfigError, match=message):
            Recipe(**options)
