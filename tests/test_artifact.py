"""The artifact detector: what its head computes, gradients, folders, and that it learns to find damage it has labels for."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from flowrl.batch import Prompt, Samples
from flowrl.config import ConfigError
from flowrl.pairs import load_picture
from flowrl.reward_models import load_reward
from flowrl.reward_models.artifact import TINY_KINDS, ArtifactDetector, ArtifactHead, features
from flowrl.reward_models.base import to_pil
from flowrl.reward_models.magic_mirror import Assessment, report
from flowrl.tiny import random_spec, render, sample_scene
from flowrl.tiny.corrupt import KINDS, LABELS, corrupt
from flowrl.train.rewards.artifact import Artifact, auc
from flowrl.train.rewards.contrastive import tiny_clip
from flowrl.train.rewards.loop import RewardTrainer, load_reward_recipe

LAYERS = (0, -1)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return tiny_clip(width=32, layers=2, text_width=32, text_layers=1, dim=16)


@pytest.fixture
def folder(backbone, tmp_path):
    torch.manual_seed(1)
    head = ArtifactHead(64, 2, backbone.grid, TINY_KINDS, hidden=16)
    head.save(tmp_path / "mine", ".", LAYERS)
    backbone.save(tmp_path / "mine", dtype=torch.float32)
    return tmp_path / "mine"


def samples(images: torch.Tensor) -> Samples:
    n = len(images)
    return Samples([Prompt("a star")] * n, list(range(n)), torch.arange(n), torch.zeros(n, 1), images)


def test_features_put_layers_side_by_side(backbone):
    images = torch.rand(2, 3, 64, 64)
    both = features(backbone, images, LAYERS)
    assert both.shape == (2, 64, 64)
    torch.testing.assert_close(both[..., :32], backbone.patches(images, 0))
    torch.testing.assert_close(both[..., 32:], backbone.patches(images, -1))


def test_a_patch_sees_its_neighbours_and_no_further():
    torch.manual_seed(0)
    head = ArtifactHead(8, 1, (7, 7), TINY_KINDS, hidden=8)
    states, pixels = torch.randn(1, 49, 8), torch.randn(1, 3, 28, 28)
    moved = states.clone()
    moved[0, 24] = torch.randn(8)  # the middle
    changed = (head(moved, pixels)[2] - head(states, pixels)[2])[0].abs() > 1e-6
    assert changed.nonzero().tolist() == [[i, j] for i in range(1, 6) for j in range(1, 6)]
    # The picture's logit is the smooth maximum of the patches', near 0 for patches at 0.
    damaged, _, where = head(states, pixels)
    torch.testing.assert_close(damaged, head.gain * where.flatten(1).logsumexp(1) + head.offset)
    assert abs(float(head.offset.detach()) + math.log(49)) < 1e-5


def test_scores_are_one_minus_the_probability_and_clips_take_their_worst_frame(folder):
    reward = load_reward(folder)
    images = torch.rand(6, 3, 64, 64)
    clean = reward(samples(images))
    torch.testing.assert_close(clean, 1 - reward.logits(images)[0].sigmoid())
    assert reward.map(samples(images)).shape == (6, 8, 8)
    clips = images.unflatten(0, (2, 3))
    torch.testing.assert_close(reward(samples(clips)), clean.view(2, 3).amin(1))
    assert reward.map(samples(clips)).shape == (2, 3, 8, 8)
    kinds = reward.kinds(samples(clips))
    assert list(kinds) == list(TINY_KINDS)
    torch.testing.assert_close(kinds["object"], reward.kinds(samples(images))["object"].view(2, 3).amax(1))


def test_gradients_reach_the_pixels_and_match_finite_differences(folder):
    reward = load_reward(folder)
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    reward(samples(images)).sum().backward()
    direction = images.grad.sign()
    step = 3e-4
    with torch.no_grad():
        difference = reward(samples(images + step * direction)) - reward(samples(images - step * direction))
    assert float(difference) / (2 * step) == pytest.approx(float(images.grad.abs().sum()), rel=0.05)


def test_assessments_go_into_the_report(folder, monkeypatch):
    reward = load_reward(folder)
    logits = (
        torch.tensor([-3.0, 3.0, 3.0]),
        torch.tensor([[3.0, 3, 3, 3], [-1, 2, -1, 3], [-3, -2, -1, -4]]),
        torch.zeros(3, 8, 8),
    )
    monkeypatch.setattr(reward, "logits", lambda images: logits)
    found = reward.assess(samples(torch.rand(3, 3, 64, 64)))
    # Clean whatever the kinds; all kinds above the threshold; or else the likeliest one.
    assert found == [Assessment(), Assessment.of("interaction", "other"), Assessment.of("object")]
    assert report(found).rates["artifact"] == pytest.approx(2 / 3)


def test_wrong_folders_are_named(tmp_path, folder):
    with pytest.raises(ValueError, match="holds no artifact detector"):
        ArtifactDetector(tmp_path)
    card = json.loads((folder / "reward.json").read_text())
    (folder / "reward.json").write_text(json.dumps({**card, "hidden": 24}))
    with pytest.raises(ValueError, match="holds no artifact detector"):
        ArtifactDetector(folder)


def test_auc_by_hand():
    """Positives 3, 1; negatives 2, 1: wins 2 + half a win of 4."""
    assert auc(torch.tensor([3.0, 1, 2, 1]), torch.tensor([1, 1, 0, 0])) == pytest.approx(2.5 / 4)


def test_an_auc_of_scores_that_are_none_is_none():
    """Not 0, which would say that every positive scores below every negative."""
    assert math.isnan(auc(torch.tensor([3.0, 1, torch.nan, 1]), torch.tensor([1, 1, 0, 0])))
    assert math.isnan(auc(torch.tensor([3.0, 1]), torch.tensor([1, 1])))


def test_training_learns_and_the_folder_says_the_same(backbone, tmp_path):
    backbone.save(tmp_path / "eyes")
    task = {"name": "artifact", "backbone": str(tmp_path / "eyes"), "layers": [0], "hidden": 32, "scenes": 200, "generated": 16}
    task |= {"held_out": 48}
    recipe = load_reward_recipe(
        {
            "task": task,
            "max_steps": 60,
            "batch_size": 32,
            "learning_rate": 3e-3,
            "eval_steps": 0,
            "checkpointing_steps": 0,
            "report_to": "none",
            "output_dir": str(tmp_path / "run"),
        }
    )
    trainer = RewardTrainer(recipe)
    task = trainer.task
    assert isinstance(task, Artifact)
    sources = [task.train.source.count(kind) for kind in KINDS]
    assert sources[KINDS.index("tear")] == 0 and min(n for i, n in enumerate(sources) if i != KINDS.index("tear")) >= 9
    for i, name in enumerate(task.train.source):
        if name in LABELS:
            assert task.train.kinds[i].tolist() == [float(kind == LABELS[name][0]) for kind in TINY_KINDS]
    assert {"clean", "tear"} < set(task.tests["scenes"].source)
    before = task.loss(torch.arange(200))[1]
    trainer.train()
    with trainer.averaged():
        after = task.loss(torch.arange(200))[1]
    assert after["binary"] < before["binary"] - 0.03 and after["map"] < before["map"] - 0.2
    reward = load_reward(tmp_path / "run")
    images = task.train.images[:8]
    with trainer.averaged(), torch.no_grad():
        expected = task.head.eval()(task.states[:8], task.encoder.pixels(images))[0]
    torch.testing.assert_close(reward(samples(images)), 1 - expected.sigmoid(), atol=0.02, rtol=0)
    assert "never trained on" in (tmp_path / "run" / "README.md").read_text()


@pytest.fixture
def pictures(tmp_path):
    """32 clean scenes of 48 x 64, 24 with a melted object and its mask, 8 with bleeding colours of which nobody says more."""
    rng = np.random.default_rng(0)
    for i in range(32):
        scene, kind = sample_scene(random_spec(rng), rng), "melt" if i < 24 else "bleed"
        image, mask = corrupt(scene, kind, 1.0, rng)
        named = tmp_path / "data" / "damaged" / ("object" if kind == "melt" else "")
        for place, pixels in (
            (tmp_path / "data" / "clean" / f"{i}.png", render(scene, rng)[:, :48]),
            (named / f"{kind}-{i}.png", image[:, :48]),
            (tmp_path / "data" / "masks" / f"{kind}-{i}.png", np.repeat(mask[None, :48], 3, 0).astype(np.float32)),
        ):
            if kind == "melt" or "masks" not in place.parts:
                place.parent.mkdir(parents=True, exist_ok=True)
                to_pil(torch.from_numpy(pixels)[None])[0].save(place)
    return tmp_path / "data"


def folder_recipe(pictures, tmp_path, **task):
    return load_reward_recipe(
        {
            "task": {"name": "artifact", "data": str(pictures), "layers": [0], "hidden": 32, **task},
            "max_steps": 40,
            "ema_decay": 0.8,
            "batch_size": 16,
            "learning_rate": 3e-3,
            "eval_steps": 0,
            "checkpointing_steps": 0,
            "report_to": "none",
            "output_dir": str(tmp_path / "run"),
        }
    )


def test_a_folder_of_sorted_pictures_is_learnt_from(pictures, tmp_path):
    """An eighth of either label is held out: 4 clean, 4 damaged; no picture is on both sides. What nobody said is not learnt."""
    trainer = RewardTrainer(folder_recipe(pictures, tmp_path, eval_share=0.125))
    task = trainer.task
    assert (len(task.train.source), task.train.damaged.sum(), len(task.tests["pictures"].source)) == (56, 28, 8)
    both = [part.images.flatten(1).double().sum(1) for part in (task.train, task.tests["pictures"])]
    assert not set(both[0].tolist()) & set(both[1].tolist())
    for i, source in enumerate(task.train.source):
        unsaid = source == "damaged"
        assert bool(task.train.kinds[i].isnan().all()) == unsaid == bool(task.cells[i].isnan().all())
        hurt = float(source == "object")
        assert unsaid or (task.train.kinds[i].tolist() == [hurt] and bool(task.cells[i].any()) == bool(hurt))
    before = task.loss(torch.arange(56))[1]
    trainer.train()
    with trainer.averaged():
        after = task.loss(torch.arange(56))[1]
    assert after["binary"] < before["binary"] - 0.03 and after["map"] < before["map"] - 0.1
    assert trainer.held_out["pictures/auc"].n == 8 and "kinds/object/auc" in trainer.held_out
    card = (tmp_path / "run" / "README.md").read_text()
    assert "56 pictures of `data`: 28 clean" in card and "8 more" in card and "tiny-sd3" not in card
    reward = load_reward(tmp_path / "run")
    picture = load_picture(pictures / "damaged" / "object" / "melt-0.png")[None]
    assert 0 < float(reward(samples(picture))) < 1 and reward.map(samples(picture)).shape == (1, 8, 8)
    assert reward.assess(samples(picture))[0] in (Assessment(), Assessment.of("object"))


def test_a_folder_without_kinds_or_masks_is_enough(pictures, tmp_path):
    for place in ("masks", "damaged/object"):
        shutil.rmtree(pictures / place)
    trainer = RewardTrainer(folder_recipe(pictures, tmp_path))
    loss, parts = trainer.task.loss(trainer.task.batch(0))
    assert loss.isfinite() and all(math.isfinite(value) for value in parts.values())
    trainer.module.eval()
    with torch.no_grad():
        assert set(trainer.task.evaluate()) == {"pictures/auc", "pictures/accuracy"}


def test_folders_that_cannot_be_learnt_from_are_refused(pictures, tmp_path):
    def refused(message, **task):
        with pytest.raises(ConfigError, match=message):
            RewardTrainer(folder_recipe(task.pop("data", pictures), tmp_path, **task))

    refused(r"task.data: there are no pictures .* in .*nothing/clean", data=tmp_path / "nothing")
    refused("task.eval_share=1.0: a share", eval_share=1)
    refused("has 32 clean pictures: too few to hold 32 out", eval_share=0.999)
    (pictures / "clean" / "33.png").write_bytes(b"\x89PNG rubbish")
    refused("33.png is no picture that can be read")
    (pictures / "damaged" / "object").rename(pictures / "damaged" / "ugly")
    refused("damaged/ugly: kinds are attributes, interaction, human, animal, object, other")
    assert not (tmp_path / "run" / "reward.json").exists()


def test_unknown_kinds_are_refused_before_anything_is_drawn(tmp_path):
    recipe = load_reward_recipe({"task": {"name": "artifact", "held_out_kind": "rip"}, "output_dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match="held_out_kind='rip'"):
        RewardTrainer(recipe)


def test_cells_are_damaged_where_a_twentieth_is():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :1, :4] = 1  # 4 of 64 pixels
    mask[..., 0, 8:11] = 1  # 3 of 64
    cells = F.adaptive_avg_pool2d(mask, (8, 8)).gt(0.05)
    assert cells[0, 0, 0, :2].tolist() == [True, False]
