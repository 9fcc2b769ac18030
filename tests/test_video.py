"""Consistency, flicker and motion of clips: flow on shifted textures, VBench's formulas by hand, what a frozen clip gets."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from flowrl.batch import Prompt, Samples
from flowrl.reward_models import RewardError, load_reward, score
from flowrl.reward_models import motion as m
from flowrl.reward_models.video import consistency, reduced

PAIRED = (
    "subject_consistency features=pixels",
    "background_consistency features=pixels",
    "temporal_flicker",
    "motion_smoothness",
)


def texture(dx: float = 0.0, dy: float = 0.0, height: int = 48, width: int = 64, seed: int = 0) -> torch.Tensor:
    """(3, H, W): waves of random direction, moved by (dx, dy) pixels."""
    g = torch.Generator().manual_seed(seed)
    k, phase, size = torch.rand(40, 2, generator=g) * 0.6 - 0.3, torch.rand(40, 3, generator=g), torch.rand(40, 3, generator=g)
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    wave = k[:, 0, None, None, None] * (x - dx) + k[:, 1, None, None, None] * (y - dy) + 2 * math.pi * phase[:, :, None, None]
    return (0.5 + 0.25 * (wave.sin() * size[:, :, None, None]).sum(0) / 40**0.5).clamp(0, 1)


def moving(step: tuple[float, float] = (2.0, 0.5), frames: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.stack([texture(step[0] * i, step[1] * i, seed=seed) for i in range(frames)])


def made(*clips: torch.Tensor, fps: float | None = 8, **columns: object) -> Samples:
    n = len(clips)
    prompts = [Prompt("water", dict(columns)) for _ in clips]
    return Samples(prompts, list(range(n)), torch.arange(n), torch.zeros(n, 1), torch.stack(clips), fps=fps)


def still(clip: torch.Tensor) -> torch.Tensor:
    return clip[:1].expand_as(clip)


ORDER = torch.tensor([0, 5, 2, 7, 4, 1, 6, 3, 8])


# ------------------------------------------------------------------------------------------------ flow


@pytest.mark.parametrize("shift", [(0.5, -0.3), (2.0, 1.5), (-4.0, 3.0), (7.0, 2.0)])
def test_the_flow_finds_the_shift_of_a_texture(shift):
    """In pixels, (x, y): a(x) = b(x + u). Median error of a tenth of a pixel or so, no run-aways where it leaves the frame."""
    u = m.lucas_kanade(texture()[None], texture(*shift)[None])
    error = (u - torch.tensor(shift).view(1, 2, 1, 1)).norm(dim=1)
    assert float(error.median()) < 0.15 and float(error.max()) < 4


def test_the_flow_of_equal_pictures_is_zero_and_of_a_plain_one_finite():
    assert float(m.lucas_kanade(texture()[None], texture()[None]).abs().max()) < 1e-4
    plain = torch.full((1, 3, 20, 20), 0.5)
    assert m.lucas_kanade(plain, plain).abs().max() == 0
    assert m.lucas_kanade(plain, plain * 0.5).isfinite().all()


def test_warping_is_reading_at_shifted_places():
    """By whole pixels: columns 1 ... of a row, the last one repeated."""
    row = torch.arange(5.0).view(1, 1, 1, 5).expand(1, 1, 3, 5)
    u = torch.zeros(1, 2, 3, 5)
    u[:, 0] = 1
    torch.testing.assert_close(m.warp(row, u)[0, 0, 0], torch.tensor([1.0, 2, 3, 4, 4]))
    u[:, 0] = 0.5
    torch.testing.assert_close(m.warp(row, u)[0, 0, 0], torch.tensor([0.5, 1.5, 2.5, 3.5, 4]))


def test_raft_is_torchvisions_with_the_weights_of_a_file(tmp_path):
    from torchvision.models.optical_flow import raft_large, raft_small

    torch.manual_seed(0)
    a, b = torch.rand(2, 1, 3, 128, 136)
    torch.save(raft_large(weights=None).state_dict(), tmp_path / "large.pth")
    assert m.Raft(tmp_path / "large.pth").network.update_block.hidden_state_size == 128
    network = raft_small(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "raft.pth")
    flow = m.load_flow("raft", tmp_path / "raft.pth")
    with torch.no_grad():
        torch.testing.assert_close(flow(a, b), network(a * 2 - 1, b * 2 - 1)[-1])
        enlarged = [F.interpolate(x[..., :64, :72], (128, 144), mode="bilinear") for x in (a, b)]
        halved = F.avg_pool2d(flow(*enlarged), 2) / 2
        torch.testing.assert_close(flow(a[..., :64, :72], b[..., :64, :72]), halved, rtol=1e-4, atol=1e-5)
    torch.save({"some.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth lacks"):
        m.load_flow("raft", tmp_path / "other.pth")


def test_unknown_flows_are_named():
    for spec, message in (
        ("raft", "wants weights"),
        ("farneback", "choose lucas_kanade, raft"),
        ("no.such:thing", "cannot be imported"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reward("dynamic_degree", flow=spec)
    with pytest.raises(ValueError, match="no such file"):
        load_reward("dynamic_degree", flow="raft", weights="/no/such/file")
    assert m.load_flow("flowrl.reward_models.motion:lucas_kanade") is m.lucas_kanade


# ------------------------------------------------------------------------------------------------ formulas


def test_flicker_by_hand():
    """Frames of 0, 0.5, 0.2: differences 0.5 and 0.3, mean 0.4."""
    clip = torch.tensor([0.0, 0.5, 0.2]).view(1, 3, 1, 1, 1).expand(1, 3, 3, 4, 4)
    torch.testing.assert_close(m.flicker(clip), torch.tensor([0.6]))


def test_consistency_by_hand():
    """Features (1, 0), (0.6, 0.8), (-1, 0): with the frame before 0.6 and 0 (for -0.6), with the first 0.6 and 0 (for -1):
    (0.6 + 0) / 2 = 0.3."""

    class Features:
        def pictures(self, images):
            return torch.tensor([[2.0, 0.0], [0.6, 0.8], [-3.0, 0.0]])[: len(images)]

    torch.testing.assert_close(consistency(Features(), torch.zeros(1, 3, 3, 4, 4)), torch.tensor([0.3]))


def test_degree_by_hand():
    """u is 3 pixels between the first two of 9 frames, 2 between the next, then 1, at 48 pixels: 6 / 256 of which are 1.125.
    k = round(9 / 4) = 2, the second largest: 2 / 1.125. At 16 frames a second every other frame is seen: 5 frames, k = 1."""
    speeds = [3.0, 2.0, 1, 1, 1, 1, 1, 1]

    def flow(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.full((2, *a.shape[-2:]), speeds[i] / 2**0.5) for i in range(len(a))])

    clips = torch.zeros(1, 9, 3, 48, 64)
    torch.testing.assert_close(m.degree(clips, flow, fps=8), torch.tensor([2 / 1.125]))
    torch.testing.assert_close(m.degree(clips, flow, fps=16), torch.tensor([3 / 1.125]))


def test_the_fastest_twentieth_counts():
    """100 of 2,000 pixels move by 2, the others do not: their mean is 2. With 50 it is 1."""
    for count, mean in ((100, 2.0), (50, 1.0)):
        u = torch.zeros(1, 2, 40 * 50)
        u[0, 0, :count] = 2
        found = m.degree(torch.zeros(1, 2, 3, 40, 50), lambda a, b, u=u: u.view(1, 2, 40, 50), fps=8)
        torch.testing.assert_close(found, torch.tensor([mean / (40 * 6 / 256)]))


def test_the_soft_step_is_vbenchs_own_in_the_limit():
    clips = made(moving((0.3, 0)), moving((0.8, 0)), moving((2, 1)))
    speed = m.degree(clips.images, m.lucas_kanade, 8)
    assert (speed > 1).tolist() == [False, False, True]
    hard = load_reward("dynamic_degree", softness=0, held=False)
    assert hard(clips).tolist() == [0, 0, 1] and not hard.traits.differentiable
    torch.testing.assert_close(load_reward("dynamic_degree", held=False)(clips), ((speed - 1) / 0.25).sigmoid())


def test_smoothness_sees_what_jumps_and_not_what_moves():
    """At an even pace 1 but for what enters the frame; with one frame out of place, a line is broken in three of seven places."""
    clip = moving()
    jump = clip.clone()
    jump[4] = texture(2 * 4 + 5, 0.5 * 4)
    smooth, broken, mixed = m.smoothness(torch.stack([clip, jump, clip[ORDER]]), m.lucas_kanade).tolist()
    assert smooth > 0.985 and broken < smooth - 0.005 and mixed < broken
    assert float(m.smoothness(still(clip)[None], m.lucas_kanade)) == pytest.approx(1, abs=1e-6)


def test_noise_is_no_motion_unless_asked_for():
    clip = moving()
    noisy = (still(clip) + 0.1 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    samples = made(clip, noisy, still(clip))
    moves, noise, frozen = load_reward("dynamic_degree")(samples).tolist()
    assert moves > 0.9 and noise < 0.2 and frozen == pytest.approx(torch.tensor(-4.0).sigmoid().item(), abs=1e-3)
    assert float(load_reward("dynamic_degree", held=False)(samples)[1]) > 0.9


# ------------------------------------------------------------------------------------------------ rewards


@pytest.mark.parametrize("spec", PAIRED)
def test_a_frozen_clip_is_best_alone_and_does_not_win_by_default(spec):
    clip = moving()
    samples = made(clip, still(clip))
    moves, frozen = load_reward(spec, moves="none")(samples).tolist()
    assert frozen == pytest.approx(1, abs=1e-5) and moves < frozen
    moves, frozen = load_reward(spec)(samples).tolist()
    assert frozen < 0.05 < 0.85 < moves


@pytest.mark.parametrize("spec", PAIRED)
def test_prompts_that_ask_for_stillness_are_not_held_to_motion(spec):
    clip = still(moving())
    asked = [{"static": True}, {"include": [{"shape": "circle", "moves": "still"}]}]
    assert [float(load_reward(spec)(made(clip, **columns))) > 0.99 for columns in asked] == [True, True]
    held = [{"static": False}, {"include": [{"moves": "still"}, {"moves": "left"}]}, {"include": []}, {"include": "still"}]
    assert [float(load_reward(spec)(made(clip, **columns))) < 0.05 for columns in held] == [True] * 4


def test_reversed_in_time():
    """Flicker and smoothness are those of the clip; consistency, which looks at the first frame, need not be."""
    clip = moving()
    for spec in PAIRED[2:]:
        forth, back = load_reward(spec, moves="none")(made(clip, clip.flip(0)))
        torch.testing.assert_close(forth, back, rtol=0, atol=1e-4)


def test_permuted_frames_flicker_and_are_not_smooth():
    clip = moving()
    for spec in PAIRED[2:]:
        right, mixed = load_reward(spec, moves="none")(made(clip, clip[ORDER]))
        assert right > mixed + 0.01


def test_scales_are_vbenchs():
    """0.6 flicker of the hand case, which VBench's table maps to (0.6 - 0.6293) / (1 - 0.6293) < 0: 0; 0.9 to 0.7302."""
    clips = [torch.tensor(values).view(3, 1, 1, 1).expand(3, 3, 4, 4) for values in ([0.0, 0.5, 0.2], [0.0, 0.1, 0.2])]
    found = load_reward("temporal_flicker", moves="none", scaled=True)(made(*clips))
    torch.testing.assert_close(found, torch.tensor([0, (0.9 - 0.6293) / (1 - 0.6293)]))
    assert load_reward("motion_smoothness", scaled=True).traits.range[1] == pytest.approx((1 - 0.706) / (0.9975 - 0.706))


@pytest.mark.parametrize("spec", ["dynamic_degree", *PAIRED])
def test_gradients_are_those_of_finite_differences(spec):
    """Along a smooth direction, in fp32: within 5 % where the value is smooth, the maximum over pixels being a kink."""
    clip = moving((1.1, 0.3), frames=4)
    direction = moving((0.7, -0.4), frames=4, seed=1) - 0.5
    clip.requires_grad_()
    reward = load_reward(spec)
    assert reward.traits.differentiable
    reward(made(clip)).sum().backward()
    slope = float((clip.grad * direction).sum())
    step = 2e-3
    with torch.no_grad():
        ends = [float(reward(made(clip.detach() + sign * step * direction))) for sign in (1, -1)]
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=0.1, abs=2e-3)
    assert float(clip.grad.abs().sum()) > 0


def test_a_gate_that_abstains_abstains_and_one_out_of_range_is_refused():
    def odd(images, prompts, **columns):
        return [None, 0.5]

    odd.traits = load_reward("dynamic_degree").traits
    clip = moving()
    found = load_reward("temporal_flicker", moves=odd)(made(clip, clip))
    assert found.isnan().tolist() == [True, False]
    assert float(found[1]) == pytest.approx(0.5 * float(m.flicker(clip[None])))
    with pytest.raises(ValueError, match=r"moves=jpeg_size has values in "):
        load_reward("temporal_flicker", moves="jpeg_size")


def test_what_is_missing_is_named():
    clip = moving(frames=3)
    with pytest.raises(RewardError, match="needs clips"):
        score({"r": load_reward("temporal_flicker")}, pictures())
    with pytest.raises(RewardError, match="needs fps: it wants the frame rate"):
        score({"r": load_reward("temporal_flicker")}, made(clip, fps=None))
    score({"r": load_reward("temporal_flicker", moves="dynamic_degree fps=16")}, made(clip, fps=None))
    with pytest.raises(RewardError, match="3 frames or more, and these have 2"):
        score({"r": load_reward("motion_smoothness")}, made(clip[:2]))
    with pytest.raises(RewardError, match="fps=0 is no frame rate"):
        score({"r": load_reward("dynamic_degree")}, made(clip, fps=0))


def pictures() -> Samples:
    return Samples([Prompt("water")], [0], torch.arange(1), torch.zeros(1, 1), texture()[None])


def test_large_clips_are_reduced_and_small_ones_are_not():
    clips = torch.rand(2, 3, 3, 60, 90)
    assert reduced(clips, 128) is clips and reduced(clips, 30).shape == (2, 3, 3, 30, 45)
    torch.testing.assert_close(reduced(clips, 30), F.avg_pool2d(clips.flatten(0, 1), 2).view(2, 3, 3, 30, 45))
