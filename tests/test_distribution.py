"""Rewards of sets: influence against exact leave-one-out, outliers, duplicates, references, halves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flowrl.batch import Prompt, Samples
from flowrl.reward_models import distribution as D
from flowrl.reward_models import load_reward
from flowrl.reward_models.backbones import resized
from flowrl.reward_models.base import score_one, to_pil
from flowrl.reward_models.features import VisionBackbone, embed, load_features
from flowrl.reward_models.gaussians import Gaussian, bures_map, frechet_distance, mixture, moments, shrunk


def rows(n: int, d: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, d, generator=g, dtype=torch.float64) @ torch.diag(torch.linspace(0.5, 1.5, d).double())
    ) * scale + shift


def pictures(n: int, seed: int = 0, low: float = 0.2, high: float = 0.8) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.interpolate(low + (high - low) * torch.rand(n, 3, 8, 8, generator=g), (32, 32))


def made(images: torch.Tensor, references: torch.Tensor | None = None, groups: int = 1) -> Samples:
    n = len(images)
    group = torch.arange(n) // (n // groups)
    if references is not None:
        references = references.expand(n, *references.shape)
    prompts = [Prompt(f"prompt {g}") for g in group.tolist()]
    return Samples(prompts, list(range(n)), group, torch.zeros(n, 1), images, references=references)


# ------------------------------------------------------------------------------------------------ Frechet


def test_distance_in_closed_form():
    """Diagonal: |dm|^2 + sum (s - s')^2 = 4 + (1 - 2)^2 + (3 - 1)^2 = 9."""
    a = Gaussian(torch.tensor([0.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 9.0])).double())
    b = Gaussian(torch.tensor([2.0, 0.0]).double(), torch.diag(torch.tensor([4.0, 1.0])).double())
    assert float(frechet_distance(a, b)) == pytest.approx(9)
    assert float(frechet_distance(a, a)) == pytest.approx(0, abs=1e-12)


def test_the_bures_map_pushes_one_covariance_onto_the_other():
    S, S_to = moments(rows(50, 6)).covariance, moments(rows(50, 6, seed=1, scale=2)).covariance
    A = bures_map(S, S_to)
    torch.testing.assert_close(A @ S @ A, S_to)
    torch.testing.assert_close(A, A.T)
    assert torch.linalg.eigvalsh(A).min() > 0  # the gradient of a convex function: optimal


def test_taking_one_row_back_is_leaving_it_out():
    x = rows(9, 4)
    for i in (0, 5):
        kept = moments(torch.cat([x[:i], x[i + 1 :]]))
        for ours, theirs in zip(D.without(moments(x), x[i], len(x)), kept, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_moments_of_a_mixture():
    x, y = rows(300, 3), rows(100, 3, seed=1, shift=2)
    population = [torch.cat([x, y]).mean(0), torch.cov(torch.cat([x, y]).T, correction=0)]
    old, new = (Gaussian(z.mean(0), torch.cov(z.T, correction=0)) for z in (x, y))
    for ours, theirs in zip(mixture(old, new, 0.25), population, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shrinkage", [0.0, 0.2])
def test_influence_is_leave_one_out_to_first_order(shrinkage):
    """Same ranking and same size; a wrong mean term or a wrong shrinkage term breaks it."""
    x, reference = rows(300, 6), moments(rows(500, 6, seed=1, scale=1.3, shift=0.3))
    exact = D.frechet_leave_one_out(x, reference, shrinkage)
    first = D.frechet_influence(x, moments(x), reference, shrinkage)
    assert float(torch.corrcoef(torch.stack([exact, first]))[0, 1]) > 0.999
    assert float((exact - exact.mean()).norm() / first.norm()) == pytest.approx(1, abs=0.03)


def test_a_planted_outlier_is_the_worst_and_the_others_help():
    x, reference = rows(40, 4), moments(rows(2000, 4, seed=1))
    x[7] += 6
    for r in (D.frechet_leave_one_out(x, reference), D.frechet_influence(x, moments(x), reference)):
        assert int(r.argmin()) == 7 and float(r[7]) < -5
        assert float(torch.cat([r[:7], r[8:]]).mean()) > 0


def test_fewer_samples_than_dimensions():
    x, reference = rows(8, 32), moments(rows(16, 32, seed=1))
    assert torch.linalg.matrix_rank(moments(x).covariance) < 32
    r = D.frechet_influence(x, moments(x), reference, 0.1)
    assert r.isfinite().all() and float(r.abs().max()) < 1e3
    exact = D.frechet_leave_one_out(x, reference, 0.1)
    assert float(torch.corrcoef(torch.stack([exact, r]))[0, 1]) > 0.9


# ------------------------------------------------------------------------------------------------ MMD


@pytest.mark.parametrize(("kernel", "scale"), [(D.polynomial, 5.0), (D.rbf, 2.0)])
def test_mmd_leave_one_out_is_exact(kernel, scale):
    x, r = rows(12, 5), rows(30, 5, seed=1, shift=0.5)

    def distance(z):
        return D.mmd(kernel(z, z, scale), kernel(z, r, scale), kernel(r, r, scale))

    brute = torch.stack([11 * (distance(torch.cat([x[:i], x[i + 1 :]])) - distance(x)) for i in range(12)])
    torch.testing.assert_close(D.mmd_leave_one_out(kernel(x, x, scale), kernel(x, r, scale)), brute)


def test_mmd_is_unbiased():
    """Equal distributions: zero on average, below zero half of the time (a biased estimate is never below)."""
    values = []
    for seed in range(200):
        x, r = rows(10, 3, seed=seed), rows(10, 3, seed=1000 + seed)
        values.append(float(D.mmd(*(D.rbf(a, b, 2.0) for a, b in ((x, x), (x, r), (r, r))))))
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(200)
    assert 60 < sum(v < 0 for v in values) < 160


# ------------------------------------------------------------------------------------------------ Vendi


def test_vendi_counts():
    assert float(D.vendi_score(torch.eye(5))) == pytest.approx(5)
    assert float(D.vendi_score(torch.ones(5, 5))) == pytest.approx(1)


def test_near_duplicates_take_away_and_distinct_samples_add():
    g = torch.Generator().manual_seed(0)
    one, two, three = torch.eye(3, 16)
    x = torch.cat([one + 0.02 * torch.randn(6, 16, generator=g), two[None], three[None]])
    r = D.vendi_leave_one_out(x)
    assert (r[:6] < -0.05).all() and (r[6:] > 0.3).all()
    brute = [D.vendi_score((z := torch.nn.functional.normalize(x.double(), dim=-1)) @ z.T)]
    z = torch.cat([z[:3], z[4:]])
    assert float(r[3]) == pytest.approx(float(brute[0] - D.vendi_score(z @ z.T)))


# ------------------------------------------------------------------------------------------------ halves


def test_better_half_finds_the_set_that_is_closest():
    """Pairs: one near +-1, one far. Alone each near one is off-centre; only the set tells which are better."""
    x = torch.tensor([[1.0], [5.0], [-4.0], [-1.0], [1.1], [9.0], [-1.1], [-7.0]]).double()
    group = torch.arange(4).repeat_interleave(2)
    reference = Gaussian(torch.zeros(1).double(), torch.full((1, 1), 1.5).double())
    plus = D.better_half(x, group, lambda z: frechet_distance(moments(z), reference))
    assert plus.tolist() == [True, False, False, True, True, False, True, False]


def test_better_half_takes_half_of_each_group_and_leaves_broken_ones_out():
    x, group = rows(11, 2), torch.tensor([0] * 4 + [1] * 5 + [2] * 2)
    x[10] = torch.nan
    reference = moments(rows(100, 2, seed=1))

    def distance(z):
        return frechet_distance(shrunk(moments(z), 0.1), reference)

    plus = D.better_half(x, group, distance)
    assert [int(plus[group == g].sum()) for g in range(3)] == [2, 2, 0] and not plus[10]
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    minus = ~plus & x.isfinite().all(1)
    assert distance(x[plus]) < distance(x[minus])
    assert distance(x[order][D.better_half(x[order], group[order], distance)]) < distance(x[minus])


# ------------------------------------------------------------------------------------------------ as rewards


SPECS = {"frechet": {"shrinkage": 0.2}, "mmd": {}, "vendi": {}}


@pytest.mark.parametrize("name", SPECS)
def test_order_does_not_matter_and_nan_stays_with_its_sample(name):
    reward = load_reward(name, features="pixels", **SPECS[name])
    samples = made(pictures(8), pictures(6, seed=1), groups=2)
    r = score_one(name, reward, samples)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(score_one(name, reward, samples.select(order)), r[order])
    images = torch.cat([pictures(8), torch.full((1, 3, 32, 32), torch.nan)])
    broken = made(images, pictures(6, seed=1), groups=1)
    broken.group = torch.tensor([0] * 4 + [1] * 5)
    with_nan = score_one(name, reward, broken)
    assert with_nan[8].isnan()
    torch.testing.assert_close(with_nan[:8], r)
    assert score_one(name, reward, samples.select([0])).isnan().all()  # a set of one says nothing


def test_a_picture_unlike_the_references_scores_worst():
    images = pictures(12)
    images[5] = 1 - images[5] * torch.tensor([0.0, 1.0, 1.0])[:, None, None]
    assert int(load_reward("frechet", features="pixels")(made(images, pictures(24, seed=1))).argmin()) == 5


@pytest.mark.parametrize("options", [{"name": "frechet"}, {"name": "mmd"}, {"name": "mmd", "kernel": "polynomial"}])
def test_where_there_are_too_many_one_more_is_bad(options):
    """References half dark, half bright; the batch has nine dark pictures and three bright ones."""
    compared = torch.cat([pictures(12, seed=3, low=0.0, high=0.4), pictures(12, seed=4, low=0.6, high=1.0)])
    images = torch.cat([pictures(9, low=0.0, high=0.4), pictures(3, seed=1, low=0.6, high=1.0)])
    r = load_reward(options, features="pixels")(made(images, compared))
    assert float(r[:9].max()) < float(r[9:].min())


def test_references_from_everywhere_agree(tmp_path):
    """The loop's, a folder of the same pictures, and their stored moments."""
    compared = (pictures(10, seed=1) * 255).round() / 255
    for i, image in enumerate(to_pil(compared)):
        image.save(tmp_path / f"{i}.png")
    samples = made(pictures(8), compared)
    r = load_reward("frechet", features="pixels")(samples)
    torch.testing.assert_close(load_reward("frechet", features="pixels", references=tmp_path)(samples), r)
    stored = moments(embed(load_features("pixels"), compared))
    save_file({"mean": stored.mean, "covariance": stored.covariance}, tmp_path / "stats.safetensors")
    torch.testing.assert_close(load_reward("frechet", features="pixels", references=tmp_path / "stats.safetensors")(samples), r)
    with pytest.raises(ValueError, match="see pictures only"):
        load_reward("mmd", features="pixels", references="prompts.txt")
    with pytest.raises(ValueError, match="there are no pictures"):
        load_reward("mmd", features="pixels", references=tmp_path / "none")
    with pytest.raises(ValueError, match="mmd: references=none.txt: there is no such file"):
        load_reward("mmd", references="none.txt")


def test_moments_of_earlier_batches_are_kept_and_resumed():
    """A batch that lacks what the past has too much of is better than one that repeats it."""
    dark, bright = pictures(12, low=0.0, high=0.4), pictures(12, seed=2, low=0.6, high=1.0)
    compared = torch.cat([pictures(20, seed=3, low=0.0, high=0.4), pictures(20, seed=4, low=0.6, high=1.0)])
    reward = load_reward("frechet", features="pixels", shrinkage=0.2, decay=0.9)
    mixed = made(torch.cat([dark[:6], bright[:6]]), compared)
    alone = reward(mixed)
    metrics = reward.update(made(dark, compared), lambda x: x)
    assert metrics["distance"] > 1
    after = reward(mixed)
    assert float(after[6:].mean() - after[:6].mean()) > float(alone[6:].mean() - alone[:6].mean()) + 0.1
    again = load_reward("frechet", features="pixels", shrinkage=0.2, decay=0.9)
    again.load_state_dict({name: value.clone() for name, value in reward.state_dict().items()})
    assert torch.equal(again(mixed), after)
    reward.update(mixed, lambda x: x)
    again.update(mixed, lambda x: x)
    assert torch.equal(again.past.covariance, reward.past.covariance)


def test_processes_keep_one_past():
    """Averaged sums of two processes with different numbers of samples are the moments of all."""
    one, two = pictures(5), pictures(9, seed=1)
    compared = pictures(10, seed=2)
    parts: list[torch.Tensor] = []
    for images in (one, two):
        load_reward("frechet", features="pixels", decay=0.5).update(made(images, compared), lambda x: parts.append(x) or x)
    reward = load_reward("frechet", features="pixels", decay=0.5)
    reward.update(made(one, compared), lambda x: torch.stack(parts).mean(0))
    whole = load_reward("frechet", features="pixels", decay=0.5)
    whole.update(made(torch.cat([one, two]), compared), lambda x: x)
    torch.testing.assert_close(reward.past.mean, whole.past.mean)
    torch.testing.assert_close(reward.past.covariance, whole.past.covariance)


# ------------------------------------------------------------------------------------------------ features


def test_a_vision_transformer_with_class_token(tmp_path):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path)
    BitImageProcessor(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]).save_pretrained(tmp_path)
    features = load_features(str(tmp_path))
    assert isinstance(features, VisionBackbone) and features.dim == 16 and features.grid == (2, 2)
    images = pictures(3).requires_grad_()
    states = features.model(pixel_values=(resized(images, (28, 28)) - features.mean) / features.std).last_hidden_state
    torch.testing.assert_close(features.pictures(images), states[:, 0])
    torch.testing.assert_close(features.patches(images), states[:, 1:])
    assert features.shared(features.patches(images), "patches").shape == (3, 4, 16)
    features.pictures(images).sum().backward()
    assert images.grad.abs().sum() > 0
    clip = pictures(6).unflatten(0, (2, 3))
    torch.testing.assert_close(embed(features, clip)[1], embed(features, clip[1]).mean(0))
    with pytest.raises(ValueError, match="no encoder there"):
        load_features(str(tmp_path / "none"))


def test_pixels_keep_what_a_picture_looks_like():
    image = Image.fromarray(np.full((40, 40, 3), 51, np.uint8))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    features = load_features("pixels")
    torch.testing.assert_close(embed(features, pixels), torch.full((1, features.dim), 0.2))
    assert features.patches(pixels).shape == (1, 16, features.dim)
