"""Demands as rewards of their own: the rules of CMO and T2I-CompBench by hand, in the embedded world, and what abstains."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowrl.batch import Prompt, Samples
from flowrl.reward_models import load_reward
from flowrl.reward_models.base import score_one
from flowrl.reward_models.concepts import beyond, number_score, placed, relation_score, size_score
from flowrl.reward_models.detectors import Box, Colors, Found
from flowrl.tiny import render, sample_scene, split
from flowrl.tiny.scenes import KINDS

LEFT, RIGHT, TOP, ALL = (0.0, 0.4, 0.2, 0.6), (0.7, 0.4, 0.9, 0.6), (0.4, 0.0, 0.6, 0.2), (0.0, 0.0, 1.0, 1.0)


def samples(images: torch.Tensor, columns: list[dict]) -> Samples:
    prompts = [Prompt(f"prompt {i}", c) for i, c in enumerate(columns)]
    return Samples(prompts, list(range(len(images))), torch.zeros(len(images), dtype=torch.int64), images, images)


# ------------------------------------------------------------------------------------------------ by hand


def test_numbers():
    """cmo: 1 / (|n - 3| + 1)^2 = 1/16, 1/4, 1, 1/4. compbench: half for any, half for all."""
    assert [number_score(n, 3) for n in (0, 2, 3, 4)] == [1 / 16, 1 / 4, 1, 1 / 4]
    assert [number_score(n, 3, "compbench") for n in (0, 2, 3, 4)] == [0, 0.5, 1, 0.5]


def test_sizes():
    """Areas 1, .04, .01: the second from the largest has rank 2, from the smallest 2 too."""
    small = (0.0, 0.0, 0.1, 0.1)
    assert [size_score(ALL, [LEFT, small], size) for size in ("huge", "tiny")] == [1, 1 / 9]
    assert [size_score(LEFT, [ALL, small], size) for size in ("huge", "tiny")] == [1 / 4, 1 / 4]
    assert size_score(LEFT, [], "tiny") == size_score(LEFT, [LEFT], "huge") == 1  # alone, or as large


def moved(box: Box, x: float = 0.0, y: float = 0.0) -> Box:
    return box[0] + x, box[1] + y, box[2] + x, box[3] + y


@pytest.mark.parametrize(
    ("a", "relation", "value"),
    [
        (moved(RIGHT, -0.2), "left of", 1.0),  # its right edge touches
        (moved(RIGHT, -0.185), "left of", 1.0),  # .015 over, of .02 allowed
        (moved(RIGHT, -0.17), "left of", 0.5),  # .03 over
        (moved(RIGHT, -0.4, 0.19), "left of", 1.0),  # still beside
        (moved(RIGHT, -0.4, 0.21), "left of", 0.5),  # below it, too
        (RIGHT, "left of", 0.0),
        (moved(RIGHT, 0.05), "left of", 0.0),
        (moved(RIGHT, 0.2), "right of", 1.0),
        (moved(RIGHT, 0.0, -0.3), "above", 1.0),
        (moved(RIGHT, 0.0, -0.3), "below", 0.0),
        (moved(RIGHT, 0.0, 0.1), "below", 0.5),
        ((0.75, 0.45, 0.8, 0.5), "inside", 1.0),
        ((0.75, 0.45, 0.8, 0.7), "inside", 0.0),  # .15 / .25 of it is inside
        (ALL, "inside", 0.0),
        (ALL, "outside", 0.0),
        (moved(RIGHT, -0.19), "outside", 1.0),  # .01 / .2 is shared
        (moved(RIGHT, -0.17), "outside", 0.0),  # .03 / .2
    ],
)
def test_cmo_relations(a, relation, value):
    assert beyond(a, RIGHT, relation) == value


@pytest.mark.parametrize(
    ("a", "relation", "aspect", "value"),
    [
        (LEFT, "left of", 1.0, 1.0),
        (LEFT, "right of", 1.0, 0.0),
        (moved(RIGHT, -0.3, -0.35), "left of", 1.0, 0.0),  # the way up is the longer one
        (moved(RIGHT, -0.3, -0.35), "above", 1.0, 1.0),
        (moved(RIGHT, -0.3, -0.35), "left of", 1.5, 1.0),  # in a wide picture it is the shorter one
        (moved(RIGHT, -0.1), "left of", 1.0, 0.3),  # overlap .02 / .06 = 1/3: .1 / (1/3)
        (moved(RIGHT, -0.18), "left of", 1.0, 1.0),  # .004 / .076 is below .1
        (moved(RIGHT, -0.5, 0.2), "near", 1.0, 1.0),  # the smaller way, .2, is below 150 / 512
        (moved(RIGHT, -0.5, 0.4), "next to", 1.0, 150 / 512 / 0.5),
    ],
)
def test_compbench_places(a, relation, aspect, value):
    assert placed(a, RIGHT, relation, aspect) == pytest.approx(value)


def test_relations_of_groups():
    """cmo: of two, one is left of the other: (1 + 0) / 2. compbench: (.9 + .5) / 4 + 1 / 2, in the wrong place (.8 + .5) / 4."""
    first, second = [Found("cat", LEFT, 0.9), Found("cat", moved(RIGHT, 0.05), 0.8)], [Found("dog", RIGHT, 0.5)]
    assert relation_score(first, second, "left of", "cmo") == 0.5
    assert relation_score(first, second, "left of", "compbench") == pytest.approx(0.85)
    assert relation_score(first[1:], second, "left of", "compbench") == pytest.approx(0.325)
    assert relation_score(first, [], "left of", "compbench") == pytest.approx(0.225)
    assert relation_score(first, [], "left of", "cmo") == relation_score([], second, "left of", "cmo") == 0


# ------------------------------------------------------------------------------------------------ as rewards


class Fixed:
    """Two dogs, of which the small one on the left is red, and a cat."""

    def detect(self, images, phrases):
        return [
            [Found("dog", (0.0, 0.4, 0.1, 0.5), 0.9, "red"), Found("dog", ALL, 0.8), Found("cat", RIGHT, 0.7)] for _ in phrases
        ]


def test_each_kind_sees_its_own_demands():
    """One of two dogs is red: 1/2; three dogs: 1/4; a huge cat of rank 2: 1/4; the dogs are (1 + 1/2) / 2 left of the cat."""
    columns = [
        {"include": [{"class": "dog", "count": 2, "color": "red"}]},
        {"include": [{"class": "dog", "count": 3}, {"class": "cat", "size": "huge"}]},
        {"include": [{"class": "cat"}, {"class": "dog", "count": 2, "position": ["left of", 0], "size": "tiny"}]},
        {},
    ]
    batch = samples(torch.zeros(4, 3, 8, 8), columns)
    options = {"detector": Fixed(), "color": lambda image, boxes, name: ["blue"] * len(boxes)}
    got = {kind: load_reward("concept", kind=kind, **options)(batch) for kind in ("number", "size", "attribute", "relation")}
    expected = {
        "number": [1, (1 / 4 + 1) / 2, 1],
        "size": [None, 1 / 4, 1],  # the best dog is the smaller one
        "attribute": [1 / 2, None, None],
        "relation": [None, None, 3 / 4],
    }
    for kind, values in expected.items():
        known = [value for value in [*values, None] if value is not None]
        assert got[kind].isnan().tolist() == [value is None for value in [*values, None]], kind
        assert got[kind][~got[kind].isnan()].tolist() == pytest.approx(known), kind
    loaded = load_reward("concept", kind="relation", rules="compbench", **options)
    assert loaded(batch)[2].item() == pytest.approx((0.9 + 0.7) / 4 + 0.5)


def test_colours_are_as_likely_as_clip_says():
    """A detector that names no colour: the probability of "red" among the ten, not whether it is the likeliest."""
    from flowrl.reward_models.detectors import ClipColors

    class Certain(ClipColors):
        def __init__(self):
            pass

        def probabilities(self, image, boxes, name):
            return torch.tensor([[0.3, 0.7] + [0.0] * 8]).repeat(len(boxes), 1)

    colors = Colors(Certain())
    found = [Found("dog", LEFT, 0.9), Found("dog", RIGHT, 0.8, "red")]
    assert colors.chances(torch.zeros(3, 8, 8), found, "dog", "red") == pytest.approx([0.3, 1.0])
    assert [f.color for f in colors(torch.zeros(3, 8, 8), found, ["dog"])] == ["orange", "red"]
    assert colors.chances(torch.zeros(3, 8, 8), found, "dog", "teal") == [0.0, 0.0]  # CLIP is not asked for what it cannot say


def test_in_the_embedded_world_what_is_drawn_is_met():
    """Drawn scenes of every kind of caption meet nearly all of their demands; those of another caption of the kind do not."""
    rng = np.random.default_rng(0)
    specs = [spec for kind in KINDS for spec in [s for s in split("test") if s["kind"] == kind][:8]]
    images = torch.stack([torch.from_numpy(render(sample_scene(spec, rng), rng)) for spec in specs])
    right = samples(images, specs)
    wrong = samples(images, [spec for i in range(0, len(specs), 8) for spec in specs[i + 1 : i + 8] + specs[i : i + 1]])
    for kind, threshold in (("number", 0.95), ("attribute", 0.95), ("relation", 0.7)):
        reward = load_reward("concept", kind=kind)
        met, not_met = score_one(kind, reward, right), score_one(kind, reward, wrong)
        assert bool(met.isnan().any()) == (kind != "number")  # every caption says how many, not every one a colour or a place
        assert float(met.nanmean()) > threshold and float(met.nanmean()) > float(not_met.nanmean()) + 0.15, kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "wants kind"),
        ({"kind": "depth"}, "kind='depth': the rules cmo know number, size, attribute, relation"),
        ({"kind": "attribute", "rules": "compbench"}, "kind='attribute': the rules compbench know number, relation"),
        ({"kind": "number", "rules": "geneval"}, "rules='geneval': choose cmo or compbench"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        load_reward("concept", **options)


@pytest.mark.parametrize(
    ("include", "message"),
    [
        ([{"class": "dog", "size": "big"}], "size of 'dog' is 'big', but huge or tiny"),
        ([{"class": "dog", "position": ["behind", 0]}], r"position \['behind', 0\] wants left of, .*, inside, outside, and"),
    ],
)
def test_malformed_columns_are_named(include, message):
    with pytest.raises(ValueError, match=message):
        load_reward("concept", kind="size", detector=Fixed())(samples(torch.zeros(1, 3, 8, 8), [{"include": include}]))
