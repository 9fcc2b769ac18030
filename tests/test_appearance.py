"""What is measured in pictures, by hand: each statistic of a picture made for it."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.train.appearance import STATISTICS, described, distance, diversity, frames, statistics


def measured(image: torch.Tensor) -> dict[str, float]:
    """The statistics of one picture (3, H, W)."""
    return dict(zip(STATISTICS, statistics(image.unsqueeze(0))[0].tolist(), strict=True))


def grey(value: float, size: int = 8) -> torch.Tensor:
    return torch.full((3, size, size), value)


def test_a_flat_picture():
    """Grey of 0.5: nothing but its brightness. Luma weights sum to 1."""
    assert measured(grey(0.5)) == pytest.approx(
        {"brightness": 0.5, "dark": 0, "edges": 0, "colours": 0, "saturation": 0, "high_frequency": 0}, abs=1e-6
    )


def test_half_black_half_white():
    """8 x 8, left half black: half of it dark, one edge in each of 7 x 7 pairs' rows (1 of 7 columns), one bit of colour."""
    image = grey(1.0)
    image[:, :, :4] = 0
    found = measured(image)
    assert found["dark"] == 0.5 and found["brightness"] == pytest.approx(0.5)
    assert found["edges"] == pytest.approx(1 / 7)
    assert found["colours"] == pytest.approx(1)
    assert found["saturation"] == 0
    # 6 x 6 inner pixels: two columns beside the edge miss their 3 x 3 mean by 1/3, four by 0: sqrt(2 / 6 / 9)
    assert found["high_frequency"] == pytest.approx(math.sqrt(1 / 27))


def test_pure_red_is_saturated_and_as_bright_as_its_luma():
    image = grey(0.0)
    image[0] = 1
    assert measured(image)["saturation"] == 1
    assert measured(image)["brightness"] == pytest.approx(0.2126)


def test_a_chessboard_is_all_edges_and_high_frequency():
    """Of 3 x 3 pixels around one, 5 are as it is and 4 are not: it misses the mean by 4/9."""
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    found = measured(((x + y) % 2).float().expand(3, 8, 8))
    assert found["edges"] == 1
    assert found["high_frequency"] == pytest.approx(4 / 9)


def test_sixteen_colours_in_equal_shares_are_four_bits():
    """Four reds times four greens, each a level of its own."""
    levels = torch.tensor([0.1, 0.3, 0.6, 0.9]).repeat_interleave(2)
    image = torch.stack([levels.expand(8, 8), levels.unsqueeze(1).expand(8, 8), torch.zeros(8, 8)])
    assert measured(image)["colours"] == pytest.approx(4)


def test_chunks_and_clips():
    """In chunks as in one piece; a clip's statistics are the mean over its first, middle and last frame."""
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, parts = described(images, chunk=5), described(images, chunk=2)
    torch.testing.assert_close(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1]) and whole[1].shape == (5, 3 * 64)
    clip = images.unsqueeze(0)
    assert torch.equal(frames(clip), images[[0, 2, 4]].unsqueeze(0))
    assert frames(clip[:, :2]).shape[1] == 2 and frames(images).shape == (5, 1, 3, 16, 16)
    looks, thumbnails = described(clip)
    torch.testing.assert_close(looks, statistics(images[[0, 2, 4]]).mean(0, keepdim=True))
    assert thumbnails.shape == (1, 3 * 3 * 64)


def test_distance_is_the_root_mean_square_over_pairs():
    """0, 1, 3: differences 1, 3, 2, mean square (1 + 9 + 4) / 3."""
    assert float(distance(torch.tensor([[0.0], [1.0], [3.0]]))) == pytest.approx(math.sqrt(14 / 3))
    assert float(distance(torch.zeros(1, 4))) == 0


def test_diversity_within_and_between_prompts():
    """Two prompts, of 0 and 2, and of 10 and 10: within (2 + 0) / 2, between their means 9. Members need not lie side by side."""
    within, between = diversity(torch.tensor([[0.0], [10.0], [2.0], [10.0]]), torch.tensor([7, 4, 7, 4]))
    assert within == pytest.approx(1) and between == pytest.approx(9)
