"""SRUM: maps as weights of places, of every kind of latents; the loop brings a reward's map to the latents; refusals."""

from __future__ import annotations

import pytest
import torch

from flowrl.batch import Noised
from flowrl.config import ConfigError, load_recipe
from flowrl.reward_models.maps import latent_grid
from flowrl.train import Trainer
from flowrl.train.objectives import SRUM
from flowrl.train.objectives.srum import over_latents
from tests.objectives import Fixed, finite_difference, short_run


def noised(maps: torch.Tensor, *shape: int) -> Noised:
    """Latents (B, *shape) with target 0 and maps (B, h, w)."""
    ones = torch.ones(len(maps), *shape)
    return Noised(ones, ones, torch.full((len(maps),), 0.5), map=maps)


def test_value_by_hand():
    """Two places, errors 1 and 4, map (1, .5): (1 + 2) / 2 = 1.5, and lambda times 2.5. Divided by the map's mean over the batch,
    .625 with a second map of (.5, .5): 2.4 and 2 for them. A picture without a map counts nothing."""
    maps = torch.tensor([[[1.0, 0.5]], [[0.5, 0.5]], [[torch.nan, torch.nan]]])
    predict = Fixed(torch.tensor([[[[1.0, 2.0]]]] * 3))
    plain = SRUM(consistency=0.5, normalize=False).loss(predict, noised(maps, 1, 1, 2), torch.zeros(3))
    assert plain.values.tolist() == pytest.approx([1.5 + 1.25, 1.25 + 1.25, 0])
    scaled = SRUM(consistency=0).loss(predict, noised(maps, 1, 1, 2), torch.zeros(3))
    assert scaled.values.tolist() == pytest.approx([1.5 / 0.625, 2, 0])
    assert plain.metrics["known"].tolist() == [1, 1, 0] and plain.metrics["map"].tolist() == [0.75, 0.5, 0]
    reference = Fixed(torch.tensor([[[[1.0, 2.0]]]] * 3), torch.tensor([[[[1.0, 4.0]]]] * 3))
    held = SRUM(kl=1.5).loss(reference, noised(maps, 1, 1, 2), torch.zeros(3))
    assert held.penalty is not None and held.penalty.tolist() == [3, 3, 3]  # 1.5 x (0 + 4) / 2, known or not


def test_a_map_of_ones_is_supervised_training():
    v = torch.randn(2, 4, 3, 3)
    loss = SRUM(consistency=0.5).loss(Fixed(v), noised(torch.ones(2, 3, 3), 4, 3, 3), torch.zeros(2))
    assert torch.allclose(loss.values, 1.5 * v.square().flatten(1).mean(1), rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 2, 3), (4, 5, 2, 3), (6, 4)], ids=["picture", "clip", "packed"])
def test_only_good_places_have_a_gradient(shape):
    """A map that is 1 in the first of two rows: of three columns, five frames, or six tokens row by row."""
    maps = torch.tensor([[[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]])
    v = torch.randn(1, *shape, requires_grad=True)
    SRUM(consistency=0).loss(Fixed(v), noised(maps, *shape), torch.zeros(1)).values.sum().backward()
    good, bad = (v.grad[0, :3], v.grad[0, 3:]) if len(shape) == 2 else (v.grad[..., 0, :], v.grad[..., 1, :])
    assert (good != 0).all() and (bad == 0).all()
    assert (over_latents(maps, v) * torch.ones_like(v)).mean() == 0.5


def test_gradient_against_finite_differences():
    maps, v = torch.rand(2, 2, 3), torch.randn(2, 4, 2, 3)
    by_graph, numeric = finite_difference(lambda w: SRUM().loss(Fixed(w), noised(maps, 4, 2, 3), torch.zeros(2)).values, v)
    assert torch.allclose(by_graph, numeric, atol=1e-4)


def test_the_grid_of_latents():
    assert latent_grid(torch.zeros(1, 4, 8, 6), (64, 48)) == (8, 6)
    assert latent_grid(torch.zeros(1, 16, 5, 4, 4), (32, 32)) == (4, 4)
    assert latent_grid(torch.zeros(1, 64 * 83, 16), (1024, 1328)) == (64, 83)
    with pytest.raises(ValueError, match="7 packed latents are no grid of pictures of 64 x 64 pixels"):
        latent_grid(torch.zeros(1, 7, 4), (64, 64))


class LeftIsGood:
    """A reward whose map says that the left half is good."""

    name = "left"

    def map(self, samples):
        maps = torch.zeros(len(samples), *samples.images.shape[-2:])
        maps[..., : maps.shape[-1] // 2] = 1
        return maps

    def __call__(self, samples):
        return samples.images.flatten(1).mean(1)


@pytest.mark.parametrize(("name", "size"), [("sd15", (16, 16)), ("flux", (8, 8)), ("wan", (4, 4))])
def test_a_run_of_each_family(recipe, tmp_path, name, size):
    """The map of the pictures' pixels reaches the loss on the latents' own grid."""
    options = ["objective=srum", "times=uniform", "times.count=2", "learning_rate=1e-2"]
    trainer, rows = short_run(recipe, tmp_path, *options, name=name, rewards={"left": LeftIsGood()})
    assert rows[0]["map"] == 0.5 and rows[0]["known"] == 1 and rows[1]["policy_loss"] > 0
    batches, *_ = trainer.collect(_clock())
    (point, _), *_ = trainer.points(batches[0])
    assert point.map.shape[1:] == size
    assert (point.map[..., : size[1] // 2] == 1).all() and (point.map[..., size[1] // 2 :] == 0).all()


def _clock():
    from flowrl.train.trainer import _Clock

    return _Clock()


def test_refusals(recipe, tmp_path):
    """Before any weight is loaded: no reward with a map; data, which has none. And options."""
    base = ["objective=srum", f"output_dir={tmp_path}/run", f"model={tmp_path}/nowhere"]
    with pytest.raises(ConfigError, match=r"srum weighs each place .* add one, as in rewards\.region_map=1"):
        Trainer(load_recipe(recipe, base))
    with pytest.raises(ConfigError, match="data=tiny-scenes: this objective learns from its own samples"):
        Trainer(load_recipe(recipe, [*base, "data=tiny-scenes", "rewards.region_map=1"]))
    with pytest.raises(ValueError, match="consistency=-1: must be zero or positive"):
        SRUM(consistency=-1)
