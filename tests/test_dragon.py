"""DRAGON: which samples make D+ and D-, what sets can say that samples cannot, the contrast, runs."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.batch import Prompt, Samples
from flowrl.reward_models.distribution import vendi_score
from flowrl.train.objectives import DPO, DRAGON, KTO
from flowrl.train.sets import DISTANCES, SetReward
from tests.objectives import Fixed, finite_difference, make_noised, short_run


class Levels:
    """Features of a picture: the mean of each colour, scaled to unit length by `embed`."""

    dim = 3

    def to(self, device):
        return self

    def pictures(self, images):
        return images.flatten(2).mean(2)


def samples(colours, group, references=None):
    """Pictures of one colour each; references (R, 3), the same for all."""
    n = len(group)
    images = torch.tensor(colours, dtype=torch.float32)[:, :, None, None].expand(n, 3, 4, 4)
    refs = None
    if references is not None:
        refs = torch.tensor(references, dtype=torch.float32)[None, :, :, None, None].expand(n, -1, 3, 4, 4)
    return Samples([Prompt("a")] * n, list(range(n)), torch.tensor(group), torch.zeros(n, 2), images, references=refs)


RED, GREEN, BLUE, PINK = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.1, 0.1)


def test_pairs_by_advantage():
    """Pairs are neighbours inside a group; the better one first; ties are left out, and so is the odd one of group 1."""
    of = samples([RED] * 9, [0, 0, 0, 0, 1, 1, 1, 2, 2])
    A = torch.tensor([1.0, -1.0, 0.2, 0.3, 0.5, 0.5, 2.0, -0.1, 0.1])
    rows, values = DRAGON().choose(of, A)
    assert rows.tolist() == [0, 1, 3, 2, 8, 7] and values.tolist() == [1, -1] * 3
    rows, values = DRAGON(surrogate="kto").choose(of, A)
    assert rows.tolist() == [0, 1, 3, 2, 4, 5, 8, 7] and values.tolist() == [1, -1, 1, -1, 0, 0, 1, -1]
    assert DRAGON().choose(samples([RED] * 2, [0, 1]), torch.ones(2))[0].tolist() == []


def test_pairs_by_diversity():
    """Two prompts: first members red and red. No single picture is better than another, but the set with two colours is: one
    of them is exchanged for its mate, and then the other has no reason to."""
    of = samples([RED, GREEN, RED, BLUE], [0, 0, 1, 1])
    reward = SetReward("vendi", Levels(), "samples")
    pairs, told = reward.ordered(torch.tensor([[0, 1], [2, 3]]), of)
    better = of.images[pairs[:, 0], :, 0, 0]
    assert told.all() and sorted(pairs.flatten().tolist()) == [0, 1, 2, 3]
    assert float(vendi_score(better @ better.T)) == pytest.approx(2)
    assert pairs.tolist() == [[1, 0], [2, 3]]


@pytest.mark.parametrize("kind", ["frechet", "mmd"])
def test_pairs_by_exemplars(kind):
    """Exemplars half red, half blue; every prompt drew a pink and a green or a blue and a green: greens lose, whichever came
    first. A set of all pinks would be no nearer to the exemplars than the mixed one that is found."""
    of = samples([PINK, GREEN, GREEN, PINK, BLUE, GREEN, GREEN, BLUE], [0, 0, 1, 1, 2, 2, 3, 3], [RED, BLUE, PINK, BLUE])
    reward = SetReward(kind, Levels(), "samples")
    pairs, _ = reward.ordered(torch.arange(8).reshape(4, 2), of)
    assert pairs[:, 0].tolist() == [0, 3, 4, 7]
    distance = DISTANCES[kind](reward.seen, of)
    x, _ = reward.seen.embedded(of)
    assert float(distance(x[[0, 3, 4, 7]])) < float(distance(x[[0, 3, 0, 3]])) < float(distance(x[[1, 2, 5, 6]]))


def test_a_feature_that_is_not_finite_makes_no_pair():
    of = samples([RED, GREEN, (math.nan, 0, 0), BLUE], [0, 0, 1, 1])
    pairs, told = SetReward("vendi", Levels(), "samples").ordered(torch.tensor([[0, 1], [2, 3]]), of)
    assert told.tolist() == [True, False] and len(pairs) == 2


@pytest.mark.parametrize("exchange", [0, 1])
def test_no_single_exchange_makes_the_set_better(exchange):
    """On random colours the result is a local optimum, and better than where it started."""
    torch.manual_seed(exchange)
    of = samples(torch.rand(16, 3).tolist(), [i // 4 for i in range(16)])
    reward = SetReward("vendi", Levels(), "samples")
    distance, (x, _) = DISTANCES["vendi"](reward.seen, of), reward.seen.embedded(of)
    pairs, _ = reward.ordered(torch.arange(16).reshape(8, 2), of)
    found = float(distance(x[pairs[:, 0]]))
    assert found < float(distance(x[::2]))
    for i in range(8):
        other = pairs[:, 0].clone()
        other[i] = pairs[i, 1]
        assert float(distance(x[other])) >= found - 1e-9


def test_the_contrast_is_that_of_dpo_and_kto():
    """At the reference: ln 2 for a pair; 1/2 for a sample of KTO, of which a tie counts 0."""
    noised = make_noised(t=0.5)
    v, v_ref = torch.randn_like(noised.x0), torch.randn_like(noised.x0)
    A = torch.tensor([1.0, -1.0, 1.0, -1.0])
    for surrogate, plain in (("dpo", DPO(beta=3.0)), ("kto", KTO(beta=3.0))):
        objective = DRAGON(surrogate=surrogate, beta=3.0)
        ours, theirs = (o.loss(Fixed(v, v_ref), noised, A).total for o in (objective, plain))
        assert torch.equal(ours, theirs)
    assert DRAGON().loss(Fixed(v_ref, v_ref), noised, A).values.tolist() == pytest.approx([math.log(2)] * 2)
    at = DRAGON(surrogate="kto").loss(Fixed(v_ref, v_ref), noised, torch.tensor([1.0, -1.0, 0.0, 0.0])).values
    assert at.tolist() == pytest.approx([0.5, 0.5, 0, 0])


def test_gradient_against_finite_differences():
    noised = make_noised(batch=2)
    v_ref, A = torch.randn_like(noised.x0), torch.tensor([1.0, -1.0])
    exact, numeric = finite_difference(
        lambda v: DRAGON(beta=1.5).loss(Fixed(v, v_ref), noised, A).values, torch.randn_like(noised.x0)
    )
    torch.testing.assert_close(exact, numeric, rtol=1e-2, atol=1e-4)


def test_what_is_refused():
    with pytest.raises(ValueError, match="choose one of instance, frechet"):
        DRAGON(better="fid")
    with pytest.raises(ValueError, match="features='nowhere': no encoder there"):
        DRAGON(better="mmd", features="nowhere")
    bare = samples([RED, GREEN], [0, 0])
    with pytest.raises(ValueError, match="set objective.exemplars to a folder"):
        SetReward("mmd", Levels(), "samples").ordered(torch.tensor([[0, 1]]), bare)
    bare.images = None
    with pytest.raises(ValueError, match="use objective.better=instance"):
        SetReward("vendi", Levels(), "samples").ordered(torch.tensor([[0, 1]]), bare)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sd15", ["objective.surrogate=kto"]),
        ("sd3", ["objective.better=mmd", "objective.features=pixels", "references={name: base, count: 2}"]),
        ("wan", ["objective.better=vendi", "objective.features=pixels"]),
    ],
)
def test_a_run(recipe, tmp_path, name, options):
    """Two prompts x two: every sample is in one of the sets."""
    _, (first, second) = short_run(
        recipe, tmp_path, "objective=dragon", *options, "times.count=2", "learning_rate=1e-2", name=name
    )
    assert first["rows"] == 4 and second["rows"] == 4
    assert first["policy_loss"] == pytest.approx(0.5 if name == "sd15" else math.log(2)) and first["implicit_accuracy"] == 0.5
    assert second["policy_loss"] != first["policy_loss"]
