"""Gaussian layout rewards: the two kernels, the assignment, the penalty, and the embedded world's truth."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from flowrl.batch import Prompt, Samples
from flowrl.reward_models import RewardError, load_reward
from flowrl.reward_models.base import traits_of
from flowrl.reward_models.detectors import Found, TinyDetector, distinct, intersections, load_detector
from flowrl.reward_models.grounding import (
    GaussianLayout,
    Layout,
    Rule,
    Target,
    assign,
    coverage_reward,
    layout_parts,
    layout_score,
    point_reward,
    read_layout,
    relation_score,
)
from flowrl.reward_models.verify import TinyStrict
from flowrl.tiny.render import render_batch
from flowrl.tiny.scenes import SIZE, Object, Scene, sample_scene, split
from flowrl.tiny.verify import verify


def box(*corners: float) -> torch.Tensor:
    return torch.tensor(corners, dtype=torch.float64)


def samples(images: np.ndarray | torch.Tensor, columns: list[dict]) -> Samples:
    images = torch.as_tensor(images)
    prompts = [Prompt(f"prompt {i}", c) for i, c in enumerate(columns)]
    return Samples(prompts, list(range(len(images))), torch.zeros(len(images), dtype=torch.int64), images, images)


def layout_of(scene: Scene) -> list[dict]:
    """The layout column of a scene: where its objects are."""
    half = [(o, o.size / 2) for o in scene.objects]
    return [
        {"phrase": f"{o.color} {o.shape}", "box": [(o.cx - h) / SIZE, (o.cy - h) / SIZE, (o.cx + h) / SIZE, (o.cy + h) / SIZE]}
        for o, h in half
    ]


# ------------------------------------------------------------------------------------------------ kernels


def test_coverage_is_the_bhattacharyya_coefficient_of_two_gaussians():
    """Against the definition with matrices, and against the value worked out for these two boxes."""
    a, b = box(10, 20, 60, 90), box(30, 10, 100, 70)

    def gaussian(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        x0, y0, x1, y1 = x.tolist()
        return np.array([(x0 + x1) / 2, (y0 + y1) / 2]), np.diag([(0.5 * (x1 - x0)) ** 2, (0.5 * (y1 - y0)) ** 2])

    (mu, S), (nu, T) = gaussian(a), gaussian(b)
    mean = (S + T) / 2
    distance = (mu - nu) @ np.linalg.inv(mean) @ (mu - nu) / 8
    distance += 0.5 * np.log(np.linalg.det(mean) / np.sqrt(np.linalg.det(S) * np.linalg.det(T)))
    assert float(coverage_reward(a, b)) == pytest.approx(np.exp(-distance), abs=1e-12)
    assert float(coverage_reward(a, b)) == pytest.approx(0.8337727762721173, abs=1e-15)


def test_values_worth_knowing():
    """Half the size at the same centre 0.80, side by side exp(-1/2), a shift of half a width exp(-1/2), of a width exp(-2)."""
    unit = box(0, 0, 2, 2)
    assert float(coverage_reward(unit, unit)) == 1
    assert float(coverage_reward(box(0.5, 0.5, 1.5, 1.5), unit)) == pytest.approx(0.8)
    assert float(coverage_reward(box(2, 0, 4, 2), unit)) == pytest.approx(np.exp(-0.5))
    assert float(point_reward(box(1, 0, 3, 2), unit)) == pytest.approx(np.exp(-0.5))
    assert float(point_reward(box(2, 0, 4, 2), unit)) == pytest.approx(np.exp(-2))


def test_kernels_do_not_change_with_the_unit_and_coverage_is_symmetric():
    found = torch.rand(5, 4, dtype=torch.float64).sort(-1).values[:, [0, 1, 2, 3]]
    target = torch.rand(7, 4, dtype=torch.float64).sort(-1).values
    scale = torch.tensor([640, 480, 640, 480], dtype=torch.float64)
    for kernel in (point_reward, coverage_reward):
        pairs = kernel(found[:, None], target[None])
        assert pairs.shape == (5, 7) and (pairs > 0).all() and (pairs <= 1).all()
        torch.testing.assert_close(pairs, kernel(found[:, None] * scale, target[None] * scale))
    torch.testing.assert_close(coverage_reward(found[:, None], target[None]), coverage_reward(target[:, None], found[None]).T)


def test_kernels_rise_along_a_line_towards_the_target():
    target, steps = box(0.4, 0.4, 0.7, 0.6), torch.linspace(1, 0, 50, dtype=torch.float64)[:, None]
    moving = target + steps * box(0.5, -0.3, 0.5, -0.3)
    growing = torch.cat([target[:2] - steps * 0.4, target[2:] + steps * 0.4], dim=-1)
    for kernel, path in ((point_reward, moving), (coverage_reward, moving), (coverage_reward, growing)):
        values = kernel(path, target)
        assert (values.diff() > 0).all() and float(values[-1]) == 1


def test_variance_adapts_to_the_target_and_has_a_floor():
    """The same shift of 0.1 costs a large thing less; a degenerate box has a finite value."""
    shift = box(0.1, 0, 0.1, 0)
    large, small = box(0.1, 0.1, 0.9, 0.9), box(0.4, 0.4, 0.6, 0.6)
    assert point_reward(large + shift, large) > 0.95 and point_reward(small + shift, small) < 0.65
    flat = box(0.5, 0.5, 0.5, 0.5)
    assert float(coverage_reward(flat, flat, sigma_min=0.02)) == 1 and torch.isfinite(coverage_reward(flat, large))
    assert float(point_reward(flat + shift / 10, flat, sigma_min=0.02)) == pytest.approx(np.exp(-0.5 * (0.01 / 0.02) ** 2))


# ------------------------------------------------------------------------------------------------ assignment


def test_assignment_maximises_the_sum_within_classes():
    """Greedy takes 0.9 and is left with 0.1; the best sum is 0.8 + 0.7. What is not allowed is not paired, nor in the way."""
    values = np.array([[0.9, 0.8], [0.7, 0.1]])
    assert sorted(assign(values, np.ones((2, 2), bool))) == [(0, 1), (1, 0)]
    assert assign(values, np.array([[False, False], [False, True]])) == [(1, 1)]
    assert assign(np.zeros((0, 2)), np.zeros((0, 2), bool)) == []


def test_assignment_of_classes_at_once_is_the_assignment_of_each():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p, t = rng.integers(1, 6, 2)
        values, rows, columns = rng.random((p, t)), rng.integers(0, 2, p), rng.integers(0, 2, t)
        together = sum(values[i, j] for i, j in assign(values, rows[:, None] == columns[None]))
        apart = 0.0
        for c in (0, 1):
            block = values[np.ix_(rows == c, columns == c)]
            apart += sum(block[i, j] for i, j in assign(block, np.ones(block.shape, bool)))
        assert together == pytest.approx(apart)


PLACE, OTHER = (0.1, 0.1, 0.4, 0.4), (0.6, 0.6, 0.9, 0.9)


def test_all_there_is_1_and_what_is_missing_is_0():
    layout = Layout((Target("dog", PLACE), Target("cat", OTHER)))
    dog, cat = Found("dog", PLACE, 0.9), Found("cat", OTHER, 0.8)
    assert layout_score([cat, dog], layout, Rule()) == 1
    parts, surplus = layout_parts([dog], layout, Rule())
    assert parts.tolist() == [1, 0] and surplus == 0
    assert layout_score([dog], layout, Rule()) == 0.5 and layout_score([], layout, Rule()) == 0
    # The right things in each other's places: their names do not match.
    swapped = layout_score([Found("dog", OTHER, 0.9), Found("cat", PLACE, 0.8)], layout, Rule())
    assert swapped < 0.1


def test_one_thing_serves_one_target():
    layout = Layout((Target("dog", PLACE), Target("dog", (0.15, 0.1, 0.45, 0.4))))
    parts, _ = layout_parts([Found("dog", PLACE, 0.9)], layout, Rule())
    assert parts.tolist() == [1, 0]


def test_surplus_costs_by_its_share():
    """e / (T + e) of the weight 0.25: one duplicate of one target costs 1/8, two cost 1/6; weights turn it off."""
    layout = Layout((Target("dog", PLACE),))
    dog, second, third = (Found("dog", b, 0.9) for b in (PLACE, OTHER, (0.6, 0.1, 0.9, 0.4)))
    assert layout_score([dog, second], layout, Rule()) == pytest.approx(1 - 0.25 / 2)
    assert layout_score([dog, second, third], layout, Rule()) == pytest.approx(1 - 0.25 * 2 / 3)
    assert layout_score([dog, second, third], layout, Rule(surplus=0)) == 1
    # A detector may see one thing twice, under two phrases; that is no surplus. Weak detections are none either.
    again = Found("animal", (0.1, 0.1, 0.4, 0.41), 0.9)
    assert layout_score([dog, again, Found("dog", OTHER, 0.2)], layout, Rule()) == 1


def test_a_giant_box_that_covers_the_target_earns_little():
    layout = Layout((Target("dog", PLACE),))
    scores = [layout_score([Found("dog", (0, 0, 0.4 + s, 0.4 + s), 0.9)], layout, Rule()) for s in (0, 0.2, 0.4, 0.6)]
    assert scores == sorted(scores, reverse=True) and scores[-1] < 0.4


def test_the_gate_is_continuous_and_orders_failures():
    """worth: 0 at 0, `fallback` at the gate's lower end, 1 from its upper end on; strength: nothing below the gate."""
    rule, scores = Rule(), np.linspace(0, 1, 1001)
    worth, strength = rule.worth(scores), rule.strength(scores)
    assert rule.worth(np.array([0.0, 0.25, 0.5, 1.0])).tolist() == pytest.approx([0, 0.1, 1, 1])
    assert (np.diff(worth) >= 0).all() and np.diff(worth).max() < 0.005 and (worth[scores <= 0.5][1:] > 0).all()
    assert (strength[scores <= 0.25] == 0).all() and np.diff(strength).max() < 0.005
    layout = Layout((Target("dog", PLACE),))
    missing, hint, clear = (layout_score([Found("dog", PLACE, s)], layout, Rule()) for s in (0.0, 0.2, 0.9))
    assert missing == 0 and hint == pytest.approx(0.08) and clear == 1


def test_trembling_boxes_lower_the_reward_monotonically():
    """Mean over 200 draws of a detector's noise, stronger and stronger."""
    layout = Layout((Target("dog", PLACE), Target("dog", OTHER)))
    noise = np.random.default_rng(0).standard_normal((200, 2, 4))

    def mean(strength: float) -> float:
        scores = []
        for n in noise:
            moved = np.array([PLACE, OTHER]) + strength * n
            found = [Found("dog", tuple(np.sort(b.reshape(2, 2), 0).ravel()), 0.9) for b in moved]
            scores.append(layout_score(found, layout, Rule()))
        return float(np.mean(scores))

    means = [mean(s) for s in (0, 0.02, 0.05, 0.1, 0.2, 0.4)]
    assert means[0] == 1 and all(a > b for a, b in pairwise(means)) and means[1] > 0.95


# ------------------------------------------------------------------------------------------------ relations


def test_relations_are_smooth_and_flip_where_geneval_does():
    a, b = (0.0, 0.0, 2.0, 2.0), (10.0, 0.0, 12.0, 2.0)
    # The way between the centres is 10, shortened by a tenth of 2 + 2: u = 0.96.
    assert relation_score(a, b, "left of") == pytest.approx(1 / (1 + np.exp(-4.6)))
    assert relation_score(a, b, "right of") < 1e-6
    assert relation_score(a, b, "above") == pytest.approx(1 / (1 + np.exp(5)))
    around = [
        (10 * np.cos(x) - 1, 10 * np.sin(x) - 1, 10 * np.cos(x) + 1, 10 * np.sin(x) + 1) for x in np.linspace(0, np.pi / 2, 60)
    ]
    values = [relation_score(p, (-1, -1, 1, 1), "right of") for p in around]
    assert all(x >= y for x, y in pairwise(values)) and values[0] > 0.98 and values[-1] < 0.01
    assert relation_score(a, a, "left of") < 0.01


def test_presence_and_relation_from_metadata_without_boxes():
    layout = read_layout({"include": [{"class": "dog", "count": 2}, {"class": "cat", "position": ["right of", 0]}]})
    assert [t.phrase for t in layout.targets] == ["dog", "dog", "cat"] and layout.relations == (("right of", (2,), (0, 1)),)
    dogs = [Found("dog", (0.1, 0.1, 0.2, 0.2), 0.9), Found("dog", (0.1, 0.7, 0.2, 0.8), 0.9)]
    cat = Found("cat", (0.7, 0.4, 0.8, 0.5), 0.9)
    parts, _ = layout_parts([*dogs, cat], layout, Rule())
    assert parts[:3].tolist() == [1, 1, 1] and parts[3] > 0.95
    assert layout_parts([dogs[0], cat], layout, Rule())[0].tolist() == pytest.approx([1, 0, 1, float(parts[3]) / 2], abs=0.02)
    moved = Found("cat", (0.0, 0.4, 0.05, 0.5), 0.9)
    assert layout_parts([*dogs, moved], layout, Rule())[0][3] < 0.01


def test_angles_are_those_of_the_picture_not_of_its_shares():
    """In a picture four times as wide as high, a shift of (0.1, 0.25) of the sides is 0.4 to 0.25: right of, not below."""
    layout = Layout((Target("a"), Target("b")), (("right of", (0,), (1,)),))
    found = [Found("a", (0.6, 0.75, 0.6, 0.75), 0.9), Found("b", (0.5, 0.5, 0.5, 0.5), 0.9)]
    wide, square = (layout_parts(found, layout, Rule(), aspect)[0][2] for aspect in (4.0, 1.0))
    assert wide > 0.9 and square < 0.3


# ------------------------------------------------------------------------------------------------ detectors


def test_overlaps_and_duplicates():
    iou, within = intersections(np.array([[0, 0, 2, 2]]), np.array([[1, 1, 3, 3], [0, 0, 1, 1], [5, 5, 6, 6]]))
    assert iou.tolist() == [[pytest.approx(1 / 7), 0.25, 0]] and within.tolist() == [[0.25, 1, 0]]
    dog, nearly, inside = (
        Found("dog", (0, 0, 0.5, 0.5), 0.8),
        Found("dog", (0, 0, 0.5, 0.49), 0.9),
        Found("dog", (0, 0, 0.1, 0.1), 0.3),
    )
    cat, beside = Found("cat", (0, 0, 0.5, 0.5), 0.1), Found("dog", (0.3, 0, 0.8, 0.5), 0.2)
    assert distinct([dog, inside, cat, nearly, beside]) == [nearly, beside, cat] and distinct([]) == []


def test_tiny_detector_names_what_was_asked_for_and_what_was_not():
    scene = Scene((Object("circle", "red", 16, 16, 20), Object("square", "blue", 44, 40, 20)))
    images = torch.as_tensor(render_batch([scene]))
    (found,) = TinyDetector().detect(images, [["circle", "red square"]])
    strong = {f.phrase: f for f in found if f.score > 0.5}
    assert set(strong) == {"circle", "blue square"} and strong["circle"].color == "red"
    assert strong["circle"].box == pytest.approx((6 / 64, 6 / 64, 26 / 64, 26 / 64), abs=1 / 64)
    # Half right, so that failures have an order: the circle is red, the square a square.
    weak = [f for f in found if f.score <= 0.5]
    assert len(weak) == 2 and all(f.phrase == "red square" and 0.1 < f.score <= 0.2 for f in weak)
    with pytest.raises(ValueError, match="cannot look for 'dog'.*set detector to a model"):
        TinyDetector().detect(images, [["dog"]])


def test_detectors_of_your_own():
    class Mine:
        def detect(self, images, phrases):
            return [[Found(phrase, PLACE, 1.0) for phrase in wanted] for wanted in phrases]

    mine = Mine()
    assert load_detector(mine) is mine
    assert isinstance(load_detector("flowrl.reward_models.detectors:TinyDetector"), TinyDetector)
    reward = GaussianLayout(detector=mine)
    column = {"layout": [{"phrase": "a big dog", "box": PLACE}]}
    assert reward(samples(torch.zeros(1, 3, 8, 16), [column])).tolist() == [1]
    for wrong in ("nowhere:Detector", 3, "no/such-model-here"):
        with pytest.raises(ValueError, match="detector="):
            load_detector(wrong)


# ------------------------------------------------------------------------------------------------ the reward


def test_reward_abstains_and_says_what_it_reads():
    reward = load_reward("layout", alpha=0.7)
    assert reward.alpha == 0.7 and traits_of(reward).range == (0, 1) and traits_of(reward).columns == ("layout", "include")
    include = {"include": [{"shape": "circle", "color": None, "count": 1}], "relation": None}
    blank = samples(torch.full((3, 3, 64, 64), 0.94), [{}, include, {"layout": None, "include": None}])
    assert reward(blank).isnan().tolist() == [True, False, True]
    assert [len(p) for p in reward.parts(blank)] == [0, 1, 0]
    with pytest.raises(RewardError, match="scores pictures"):
        reward(samples(torch.zeros(1, 2, 3, 8, 8), [include]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0}, "alpha=0"),
        ({"point": 0, "coverage": 0}, "give one"),
        ({"gate": (0.5, 0.2)}, "gate="),
        ({"surplus": -1}, "surplus=-1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianLayout(**options)


@pytest.mark.parametrize(
    "layout",
    [[{"box": PLACE}], [{"phrase": "dog", "box": [10, 10, 60, 60]}], [{"phrase": "dog", "box": [0.5, 0, 0.4, 1]}], ["dog"]],
)
def test_malformed_layouts_name_the_column(layout):
    with pytest.raises(ValueError, match="column layout"):
        read_layout({"layout": layout})


def test_entries_without_a_box_ask_for_presence():
    layout = read_layout({"layout": [{"phrase": "dog", "box": PLACE}, {"phrase": "cat", "count": 2}]})
    assert layout.targets == (Target("dog", PLACE), Target("cat"), Target("cat"))


def scenes(count: int, seed: int = 0) -> tuple[list[dict], list[Scene]]:
    rng = np.random.default_rng(seed)
    specs = [split("test")[i] for i in rng.integers(len(split("test")), size=count)]
    return specs, [sample_scene(spec, rng) for spec in specs]


def auc(good: torch.Tensor, bad: torch.Tensor) -> float:
    """Share of pairs in the right order, ties as half."""
    order = good[:, None] - bad[None]
    return float((order > 0).double().mean() + (order == 0).double().mean() / 2)


def test_on_rendered_truth_layouts_separate_right_from_wrong_places():
    """The picture of the layout against pictures of other scenes of the same caption: same things, other places."""
    specs, right = scenes(150)
    rng = np.random.default_rng(1)
    elsewhere = [sample_scene(spec, rng) for spec in specs]
    columns = [{"layout": layout_of(scene)} for scene in right]
    # The other scene's colours may differ where the caption leaves them open; here only places shall.
    elsewhere = [
        Scene(tuple(Object(a.shape, a.color, b.cx, b.cy, b.size) for a, b in zip(x.objects, y.objects, strict=True)))
        for x, y in zip(right, elsewhere, strict=True)
    ]
    reward = GaussianLayout()
    good = reward(samples(render_batch(right), columns))
    bad = reward(samples(render_batch(elsewhere), columns))
    assert good.min() > 0.9 and auc(good, bad) > 0.99
    order = torch.as_tensor(np.random.default_rng(2).permutation(150))
    mixed = samples(torch.as_tensor(render_batch(right))[order], [columns[i] for i in order])
    assert torch.equal(reward(mixed), good[order])


def test_on_rendered_truth_presence_agrees_with_the_exact_verifier():
    """Captions against the scenes of other captions, and of their own with one thing too few, or one too many."""
    specs, right = scenes(120)
    rng = np.random.default_rng(3)
    others = [right[i] for i in rng.permutation(120)]
    fewer = [Scene(s.objects[1:], s.background) for s in right]
    first = [{**spec["include"][0], "count": spec["include"][0]["count"] + 1} for spec in specs]
    more = [
        sample_scene({**spec, "include": [item, *spec["include"][1:]], "relation": None}, rng)
        for spec, item in zip(specs, first, strict=True)
    ]
    pictures = torch.as_tensor(render_batch([*right, *others, *fewer, *more]))
    strict = verify(pictures, specs * 4)[0]
    reward, seen = GaussianLayout(), samples(pictures, specs * 4)
    assert torch.equal(strict, TinyStrict()(seen)) and 100 < strict.sum() < 200
    scores = reward(seen)
    assert auc(scores[strict == 1], scores[strict == 0]) > 0.999
    # All parts more right than wrong, and no penalty: that is the verifier's verdict.
    parts = reward.parts(seen)
    mean = torch.stack([p.mean() for p in parts])
    verdict = torch.stack([p.min() > 0.5 for p in parts]) & (scores >= mean - 1e-6)
    assert torch.equal(verdict, strict == 1)
