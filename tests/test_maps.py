"""Region maps: the published rule and ours by hand, and the maps of drawn scenes."""

from __future__ import annotations

import pytest
import torch

from flowrl.batch import Prompt, Samples, concatenate
from flowrl.reward_models import load_reward
from flowrl.reward_models.base import MapReward, score_one
from flowrl.reward_models.detectors import Found
from flowrl.reward_models.geneval import Clause, Spec
from flowrl.reward_models.maps import box_scores, region_map, to_grid
from flowrl.tiny.render import render_batch
from flowrl.tiny.scenes import Object, Scene

LEFT, RIGHT, ALL = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)


def test_the_published_rule_by_hand():
    """Left: max(.5, (.6 + 1) / 2) = .8; right: max(.5, (-1 + 1) / 2) = .5, though it is as bad as can be; g = .5: times .75."""
    M = region_map([LEFT, RIGHT], [0.6, -1.0], 0.5, (2, 4), "max")
    torch.testing.assert_close(M, torch.tensor([[0.6, 0.6, 0.375, 0.375]] * 2))


def test_the_other_rule_does_not_hide_a_bad_object():
    """Alone, or inside a good one; without a box it is 1/2. The published rule shows neither."""
    torch.testing.assert_close(region_map([LEFT, RIGHT], [0.6, -1.0], 1.0, (1, 4)), torch.tensor([[0.8, 0.8, 0.0, 0.0]]))
    nested = [ALL, RIGHT], [1.0, -0.5], 1.0, (1, 4)
    torch.testing.assert_close(region_map(*nested), torch.tensor([[1.0, 1.0, 0.25, 0.25]]))
    torch.testing.assert_close(region_map(*nested, "max"), torch.ones(1, 4))
    torch.testing.assert_close(region_map([LEFT], [0.2], 1.0, (1, 4)), torch.tensor([[0.6, 0.6, 0.5, 0.5]]))
    backwards = region_map(*(list(reversed(x)) for x in nested[:2]), *nested[2:])
    torch.testing.assert_close(backwards, region_map(*nested))


def test_the_whole_scales_the_map_and_scores_have_bounds():
    assert region_map([ALL], [1.0], -1.0, (2, 2)).tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ValueError, match=r"lie in \[-1, 1\]"):
        region_map([ALL], [1.2], 0.0, (2, 2))
    with pytest.raises(ValueError, match=r"lie in \[-1, 1\]"):
        region_map([ALL], [1.0], float("nan"), (2, 2))


def test_the_grid_keeps_the_mean_and_the_place():
    M = region_map([(0.0, 0.5, 0.25, 1.0)], [1.0], 1.0, (64, 64))[None]
    grid = to_grid(M, (8, 8))
    assert grid.shape == (1, 8, 8) and float(grid.mean()) == pytest.approx(float(M.mean()))
    assert float(grid[0, 7, 0]) == 1 and float(grid[0, 0, 0]) == float(grid[0, 7, 7]) == 0.5
    assert to_grid(M, (5, 7)).shape == (1, 5, 7)


def test_scores_of_boxes():
    """One red circle asked for: the best red one is right; the second, the blue, the excluded and the unknown are wrong."""
    spec = Spec((Clause("circle", 1, "red"),), (Clause("star", 1),))
    found = [
        Found("circle", LEFT, 0.7, "red"),
        Found("circle", LEFT, 0.9, "red"),
        Found("circle", LEFT, 0.95, "blue"),
        Found("star", LEFT, 0.8, "red"),
        Found("unknown", LEFT, 0.4, "red"),
    ]
    assert box_scores(found, spec) == [-0.7, 0.9, -0.95, -0.8, -1.0]


def scene(*objects: Object) -> Scene:
    return Scene(objects)


CIRCLE, STAR = Object("circle", "red", 16, 32, 22), Object("star", "blue", 46, 32, 22)
ASKS = {"include": [{"shape": "circle", "color": "red", "count": 1}, {"shape": "star", "color": "blue", "count": 1}]}


def made(*scenes: Scene, columns=ASKS) -> Samples:
    n = len(scenes)
    images = torch.from_numpy(render_batch(scenes))
    return Samples([Prompt("p", columns)] * n, list(range(n)), torch.zeros(n, dtype=torch.int64), torch.zeros(n, 1), images)


def test_maps_of_scenes():
    """A right scene is bright on both objects; a wrong colour is dark where it is, and not so under the published rule."""
    wrong = Object("star", "green", 46, 32, 22)
    samples = made(scene(CIRCLE, STAR), scene(CIRCLE, wrong), scene(CIRCLE))
    reward = load_reward("region_map")
    assert isinstance(reward, MapReward)
    M = reward.map(samples)
    assert M.shape == (3, 64, 64)
    at_circle, at_star, nowhere = M[:, 32, 16], M[:, 32, 46], M[:, 2, 2]
    assert float(at_circle[0]) > 0.85 and float(at_star[0]) > 0.85 and float(nowhere[0]) == 0.5
    assert float(at_star[1]) < 0.1 < 0.6 < float(at_circle[1]) and float(at_circle[1]) < float(at_circle[0])
    assert float(at_star[2]) == float(nowhere[2]) < 0.5  # what is absent has no place: it costs everywhere
    published = load_reward("region_map", rule="max").map(samples)
    assert float(published[1, 32, 46]) == float(published[1, 2, 2])
    r = score_one("region_map", reward, samples)
    torch.testing.assert_close(r, M.mean((1, 2)))
    assert float(r[0]) > float(r[1]) > float(r[2]) > 0
    torch.testing.assert_close(score_one("region_map", reward, samples.select([2, 0])), r[[2, 0]])


def test_it_abstains_without_a_specification():
    assert score_one("region_map", load_reward("region_map"), made(scene(CIRCLE), columns={})).isnan().all()
    with pytest.raises(ValueError, match="rule='mean'"):
        load_reward("region_map", rule="mean")


def test_colours_are_asked_for_where_the_detector_does_not_tell_them():
    class Blind:
        def detect(self, images, phrases):
            return [[Found("circle", LEFT, 1.0), Found("star", RIGHT, 1.0)] for _ in phrases]

    def color(image, boxes, name):
        return ["red" for _ in boxes]

    M = load_reward("region_map", detector=Blind(), color=color).map(made(scene(CIRCLE)))
    assert float(M[0, 0, 0]) == pytest.approx(0.75) and float(M[0, 0, 63]) == 0


def test_joined_batches_keep_their_maps():
    """Maps, and what else belongs to single samples; where one part has none, the whole has none."""

    def part(first: int, maps: bool = True) -> Samples:
        rows = torch.arange(first, first + 2)
        return Samples(
            [Prompt("a")] * 2, rows.tolist(), rows, rows.float()[:, None],
            maps=rows.float()[:, None, None] if maps else None, start=rows, each=rows.float()[:, None],
        )  # fmt: skip

    whole = concatenate([part(0), part(2)])
    for values in (whole.maps, whole.start, whole.each, whole.latents):
        assert values is not None and values.flatten().tolist() == [0, 1, 2, 3]
    mixed = concatenate([part(0), part(2, maps=False)])
    assert mixed.maps is None and mixed.start is not None
