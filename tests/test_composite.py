"""Ensembles, gates and trees by hand; what abstains is left out."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.reward_models import load_reward, load_rewards
from flowrl.reward_models.base import RewardError, Traits, parts_of, traits_of
from flowrl.reward_models.composite import Ensemble, Gate, Tree, combined
from tests.test_shaping import NAN, bright, samples


def fixed(*values: float | None, name: str = "fixed", **traits):
    """A reward with these values, whatever the pictures."""

    def function(images, prompts):
        return list(values)

    function.__name__, function.traits = name, Traits(**traits)
    return load_reward(function)


GIVEN = samples([0.1, 0.2, 0.3])
A = fixed(1.0, 2.0, None, name="a", range=(0.0, 2.0))
B = fixed(3.0, None, None, name="b", range=(0.0, 4.0), needs=("images", "references"), arity="group")


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        ("mean", [2.0, 2.0]),
        ("min", [1.0, 2.0]),
        ("mean_std", [2.0 - 0.5 * math.sqrt(2), 2.0]),
    ],  # sample deviation of (1, 3): sqrt 2
)
def test_ensembles(reduce, expected):
    ensemble = Ensemble([A, B], reduce, kappa=0.5)
    got = ensemble(GIVEN)
    assert got[:2].tolist() == pytest.approx(expected) and got[2].isnan()
    assert ensemble.traits.needs == ("images", "references") and ensemble.traits.arity == "group"
    assert ensemble.traits.range == ((0.0, 4.0) if reduce != "mean_std" else (-math.inf, math.inf))


def test_ensemble_members_on_different_scales():
    small, large = fixed(0.1, 0.2, 0.3), fixed(300.0, 200.0, 100.0)
    got = Ensemble([small, large], "mean", standardize=True)(GIVEN)
    torch.testing.assert_close(got, torch.zeros(3), atol=1e-5, rtol=0)  # they disagree exactly
    assert Ensemble([small, large], standardize=True).traits.arity == "batch"


def test_weights_of_an_ensemble():
    got = Ensemble({"a": {"name": A, "weight": 3.0}, "b": {"name": B}})(GIVEN)
    assert got[0] == pytest.approx((3 * 1.0 + 3.0) / 4) and got[1] == 2.0


def test_combined_ignores_what_abstains_wherever_it_stands():
    values = torch.tensor([[1.0, NAN, 5.0]])
    for reduce in ("mean", "min", "mean_std"):
        same = combined(torch.tensor([[1.0, 5.0]]), torch.ones(2), reduce)
        assert combined(values, torch.ones(3), reduce) == same


def test_gates():
    main, clean = fixed(0.8, 0.5, 0.5, range=(0.0, 1.0)), fixed(0.25, 1.0, None, range=(0.0, 1.0))
    assert Gate(main, clean, power=0.5)(GIVEN).tolist()[:2] == pytest.approx([0.4, 0.5])
    assert Gate(main, clean, "add", cost=2.0)(GIVEN).tolist()[:2] == pytest.approx([0.8 - 1.5, 0.5])
    assert Gate(main, clean, "threshold", at=0.5, otherwise=-1.0)(GIVEN).tolist()[:2] == [-1.0, 0.5]
    for how in ("multiply", "add", "threshold"):
        assert Gate(main, clean, how)(GIVEN)[2].isnan()  # who does not know whether it is clean abstains


def test_a_multiplying_gate_does_not_reward_what_it_holds_back():
    clean = fixed(0.0, 1.0, 1.0, range=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"gate: fixed may be negative .*shape it by a sigmoid .*how=add"):
        Gate(fixed(-1.0, 0.5, None), clean)
    with pytest.raises(RewardError, match=r"reward 'fixed' says that it lies above 0 and is -1"):
        Gate(fixed(-1.0, 0.5, None, range=(0.0, 1.0)), clean)(GIVEN)
    with pytest.raises(ValueError, match=r"gate: fixed has values in \[-inf, inf\], a gate's lie in \[0, 1\]"):
        Gate(A, fixed(1.0))


def test_trees():
    nodes = {"global": {"name": fixed(0.5, 0.5, 0.5), "weight": 1.0}, "subject": {"name": fixed(1.0, 0.25, None), "weight": 3.0}}
    assert Tree(nodes, "mean")(GIVEN).tolist() == pytest.approx([3.5 / 4, 1.25 / 4, 0.5])
    assert Tree(nodes, "sum")(GIVEN).tolist() == pytest.approx([3.5, 1.25, 0.5])
    assert Tree(nodes, "min")(GIVEN).tolist() == pytest.approx([0.5, 0.25, 0.5])
    assert Tree(nodes, "product")(GIVEN).tolist() == pytest.approx([0.5, 0.5 * 0.25**3, 0.5])
    assert Tree(nodes, "softmin", temperature=1e-3)(GIVEN).tolist() == pytest.approx([0.5, 0.25, 0.5])


def test_a_relation_of_what_is_absent_counts_nothing():
    nodes = {"present": {"name": fixed(1.0, 0.0, None)}, "relation": {"name": fixed(0.9, 0.9, 0.9)}}
    assert Tree(nodes, "sum", requires="present")(GIVEN).tolist() == pytest.approx([1.9, 0.0, 0.9])


def test_trees_of_trees_know_their_parts():
    tree = load_reward(
        "tree", of={"look": {"name": "tree", "of": {"bright": {"name": bright}, "jpeg_size": 0.0}}, "x": {"name": bright}}
    )
    assert [part.name for part in parts_of(tree)] == ["tree", "tree", "bright", "jpeg_size", "bright"]
    assert tree(samples([0.5, 0.2])).tolist() == pytest.approx([0.5, 0.2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ensemble([bright]), "at least two rewards"),
        (lambda: Ensemble([bright, bright], "median"), "reduce='median'"),
        (lambda: Ensemble({"brightness": -1, "jpeg_size": 1}), "must be positive"),
        (lambda: Gate(bright, bright, "divide"), "how='divide'"),
        (lambda: Tree({"brightness": 1}, requires="colour"), "requires='colour' is none of its nodes brightness"),
        (lambda: Tree({"brightnes": 1}), "brightnes: unknown reward 'brightnes'; did you mean brightness"),
        (lambda: Tree({"brightness": "much"}), "brightness: the weight 'much' is not a number"),
        (lambda: Tree({"brightness": math.inf}), "the weight inf is not a finite number"),
    ],
)
def test_what_cannot_be_combined(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_one_reward_twice_with_other_options():
    loaded = load_rewards({"a": {"name": "layout"}, "b": {"name": "layout", "alpha": 0.8, "weight": 2}, "brightness": 0.5})
    assert [(label, reward.name, getattr(reward, "alpha", None), weight) for label, (reward, weight) in loaded.items()] == [
        ("a", "layout", 0.5, 1.0), ("b", "layout", 0.8, 2.0), ("brightness", "brightness", None, 0.5)
    ]  # fmt: skip
    assert traits_of(load_reward("brightness shape='{cap: 0.5}'")).range[1] == 0.5
