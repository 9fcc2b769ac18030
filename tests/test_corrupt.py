"""Pictures that are wrong on purpose: what, where, how much, and what the exact reader says of them."""

import numpy as np
import pytest
import torch

from flowrl.tiny import Object, Scene, random_spec, render, sample_scene
from flowrl.tiny.corrupt import KINDS, artifact_rate, corrupt, unknown

SCENE = Scene((Object("square", "blue", 20, 20, 20), Object("ring", "red", 46, 44, 20)))


def many(kind: str, count: int = 60, strength: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    pairs = [corrupt(sample_scene(random_spec(rng), rng), kind, strength, rng) for _ in range(count)]
    images, masks = zip(*pairs, strict=True)
    return np.stack(images), np.stack(masks)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_hurts_a_small_known_place(kind):
    images, masks = many(kind)
    assert images.shape == (60, 3, 64, 64) and images.dtype == np.float32 and masks.dtype == bool
    assert images.min() >= 0 and images.max() <= 1 and np.isfinite(images).all()
    share = masks.mean((1, 2))
    assert (share > 0).mean() > 0.95  # a double may lie outside the picture
    assert share.max() < 0.5 and share.mean() < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_outside_the_mask_the_picture_is_the_clean_one(kind):
    """The clean twin is drawn by the same seed: the same colours, and no artifact."""
    image, mask = corrupt(SCENE, kind, 1.0, np.random.default_rng(5))
    twin = [corrupt(SCENE, other, 1.0, np.random.default_rng(5)) for other in ("hole", "crumbs", "stretch")]
    clean = np.median(np.stack([t[0] for t in twin]), 0)
    far = ~(mask | np.any([t[1] for t in twin], 0))
    assert far.mean() > 0.5
    assert np.abs(image - clean)[:, far].max() < 0.13


@pytest.mark.parametrize("kind", ["bleed", "hole", "blur", "crumbs"])
def test_strength_is_damage(kind):
    def damage(strength: float) -> float:
        return float(np.mean([corrupt(SCENE, kind, strength, np.random.default_rng(seed))[1].mean() for seed in range(20)]))

    assert damage(1.0) > 1.2 * damage(0.1)


def test_the_same_seed_gives_the_same_picture():
    for kind in KINDS:
        a, b = (corrupt(SCENE, kind, 0.5, np.random.default_rng(3)) for _ in range(2))
        assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])


def test_the_exact_reader_finds_most_broken_forms_and_no_clean_scene():
    rng = np.random.default_rng(1)
    clean = np.stack([render(sample_scene(random_spec(rng), rng), rng) for _ in range(100)])
    assert artifact_rate(clean) == 0.0
    assert artifact_rate(torch.from_numpy(clean[:10])) == 0.0
    for kind in ("bleed", "stretch", "tear", "merge", "blob"):
        assert artifact_rate(many(kind)[0]) > 0.5, kind
    # What it cannot see is why a detector is trained: it reads forms and colours, not surfaces.
    assert artifact_rate(many("texture")[0]) < 0.1
    assert unknown(many("tear")[0]).shape == (60,)


def test_options_are_checked():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="unknown artifact 'ugly'; known are bleed"):
        corrupt(SCENE, "ugly", 0.5, rng)
    with pytest.raises(ValueError, match="strength=0"):
        corrupt(SCENE, "melt", 0, rng)
