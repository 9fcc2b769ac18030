"""DPO and what the methods of pairs share: hand arithmetic, gradients, safeguards, the pairs of a group, short runs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from flowrl.batch import Noised, Prompt, Samples
from flowrl.samplers.flow import eps_from
from flowrl.train.objectives import DPO
from flowrl.train.objectives.base import error
from flowrl.train.objectives.dpo import safe_scale
from flowrl.train.objectives.preference import PAIR_LOSSES, best_and_worst, implicit_accuracy, pair_loss
from tests.objectives import Fixed, finite_difference, make_noised, part_of, short_run

SIGNS = torch.tensor([1.0, -1.0])


def one_pair(t: float = 0.5) -> Noised:
    """A pair of one latent each whose target is 0."""
    return Noised(torch.ones(2, 1), torch.ones(2, 1), torch.full((2,), t), torch.zeros(2, dtype=torch.int64))


def test_value_by_hand():
    """Velocities .1 and .3 against a reference at .2, targets 0: m = .01 and .09, m_ref = .04, so h = .03 + .05 = .08. With beta
    50 u = 2 and the loss is -log sigmoid(2) = .126928. Weighting eps at t = 1/2 makes u a quarter of it: .474077."""
    predict = Fixed(torch.tensor([[0.1], [0.3]]), torch.full((2, 1), 0.2))
    loss = DPO(beta=50).loss(predict, one_pair(), SIGNS)
    assert loss.values.tolist() == pytest.approx([0.126928], abs=1e-6) and loss.penalty is None
    expected = {"margin": 0.08, "logit": 2.0, "implicit_accuracy": 1, "error_winner": 0.01, "error_loser": 0.09}
    for name, value in {**expected, "change_winner": -0.03, "change_loser": 0.05}.items():
        assert loss.metrics[name].tolist() == pytest.approx([value], abs=1e-6), name
    assert float(DPO(beta=50, weighting="eps").loss(predict, one_pair(), SIGNS).values) == pytest.approx(0.474077, abs=1e-6)
    kl = [float(DPO(beta=50, weighting="kl").loss(predict, one_pair(t), SIGNS).metrics["margin"]) for t in (0.5, 0.8, 0.1)]
    assert kl == pytest.approx([0.08, 0.02, 0.4], abs=1e-6)  # (1 - t) / t, at most 5
    assert float(DPO(beta=50, anchor=3.0).loss(predict, one_pair(), SIGNS).values) == pytest.approx(0.156928, abs=1e-6)


@pytest.mark.parametrize(
    ("loss_type", "start", "slope"),
    [("sigmoid", math.log(2), -0.5), ("hinge", 1, -1), ("ipo", 0.25, -1), ("linear", 0, -0.5), ("dmpo", 1.61446, -1.14878)],
)
def test_losses_of_the_margin(loss_type, start, slope):
    """Values and slopes at u = 0; dmpo: ln .5 / .99 / 2 + ln .5 / .01 / 2, and its slope is -logit(.99) / 4."""
    u = torch.zeros(1, requires_grad=True)
    loss = pair_loss(loss_type, u)
    (gradient,) = torch.autograd.grad(loss.sum(), u)
    assert float(loss.detach()) == pytest.approx(start, abs=1e-5) and float(gradient) == pytest.approx(slope, abs=1e-5)
    smoothed = pair_loss(loss_type, torch.tensor([0.3]), 0.2)
    up, down = (float(PAIR_LOSSES[loss_type](torch.tensor([v]))) for v in (0.3, -0.3))
    assert float(smoothed) == pytest.approx(0.8 * up + 0.2 * down, rel=1e-6)


def test_where_pairs_stop_to_teach():
    """Far beyond: hinge is flat, linear keeps its floor, dmpo turns at 99 % and pulls back."""
    for loss_type, u, slope in [("hinge", 1.5, 0.0), ("linear", 9.0, -1e-3), ("linear", -9.0, -0.999), ("dmpo", 4.59512, 0.0)]:
        at = torch.tensor([u], requires_grad=True)
        (gradient,) = torch.autograd.grad(pair_loss(loss_type, at).sum(), at)
        assert float(gradient) == pytest.approx(slope, abs=1e-5), (loss_type, u)


def test_weighting_eps_is_diffusion_dpo():
    """The same number from errors of the noise, mean (eps_hat - eps)^2, as Diffusion-DPO's code computes it."""
    noised = make_noised(6, t=[0.3, 0.3, 0.6, 0.6, 0.9, 0.9])
    torch.manual_seed(1)
    v, v_ref = torch.randn(6, 3, 2), torch.randn(6, 3, 2)
    ours = DPO(beta=10, weighting="eps").loss(Fixed(v, v_ref), noised, SIGNS.repeat(3)).values
    m, r = (error(eps_from(noised.x, w, noised.t), noised.noise) for w in (v, v_ref))
    D = (m[0::2] - r[0::2]) - (m[1::2] - r[1::2])
    assert torch.allclose(ours, -logsigmoid(-5 * D), atol=1e-5)


def test_at_the_start():
    """Policy = reference: ln 2 to the bit, accuracy 1/2, gradient of m_w: beta / 4, and the swapped pair's is its negative, to
    the bit."""
    noised, objective = make_noised(2, t=0.4), DPO(beta=8.0)
    torch.manual_seed(1)
    start = torch.randn(2, 3, 2)

    def gradient(rows):
        v = start.clone().requires_grad_()
        loss = objective.loss(Fixed(v[rows], start[rows]), part_of(noised, rows), SIGNS)
        assert torch.equal(loss.values.detach(), -logsigmoid(torch.zeros(1))) and float(loss.metrics["margin"]) == 0
        assert loss.metrics["implicit_accuracy"].tolist() == [0.5]
        loss.values.sum().backward()
        return v.grad

    plain, swapped = gradient(torch.tensor([0, 1])), gradient(torch.tensor([1, 0]))
    assert torch.equal(plain, -swapped) and plain.abs().max() > 0
    expected = 8.0 / 4 * SIGNS[:, None, None] * 2 * (start - noised.target) / 6
    assert torch.allclose(plain, expected, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "dmpo"])
def test_gradient_against_finite_differences(loss_type):
    noised = make_noised(4)
    torch.manual_seed(1)
    v, v_ref, A = torch.randn(4, 3, 2), torch.randn(4, 3, 2), torch.tensor([1.0, -1.0, 0.5, -0.5])
    objective = DPO(beta=0.7, loss_type=loss_type, label_smoothing=0.1, anchor=0.3, weighting="kl")
    by_graph, numeric = finite_difference(lambda w: objective.loss(Fixed(w, v_ref), noised, A).values, v)
    assert torch.allclose(by_graph, numeric, rtol=1e-3, atol=2e-4) and by_graph.abs().max() > 1e-2


def test_a_weighted_pair_counts_its_weight():
    noised = make_noised(4)
    torch.manual_seed(1)
    v, v_ref = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    plain, halved = (DPO(beta=1.0).loss(Fixed(v, v_ref), noised, w * SIGNS.repeat(2)).values for w in (1.0, 0.5))
    assert torch.allclose(halved, plain / 2)


def test_splitting_a_batch_changes_nothing():
    noised = make_noised(6)
    torch.manual_seed(1)
    v, v_ref, A = torch.randn(6, 3, 2), torch.randn(6, 3, 2), SIGNS.repeat(3)
    objective = DPO(beta=1.0, safeguard=0.5)
    whole = objective.loss(Fixed(v, v_ref), noised, A).values
    parts = [
        objective.loss(Fixed(v[rows], v_ref[rows]), part_of(noised, rows), A[rows]).values for rows in torch.arange(6).split(2)
    ]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)


# ------------------------------------------------------------------------------------------------ both errors rise


def test_the_losers_gradient_can_be_scaled():
    """The value stays, the winner's gradient stays, the loser's is a quarter."""
    noised = make_noised(2)
    torch.manual_seed(1)
    start, v_ref = torch.randn(2, 3, 2), torch.randn(2, 3, 2)
    values, gradients = [], []
    for scale in (1.0, 0.25):
        v = start.clone().requires_grad_()
        loss = DPO(beta=1.0, loser_scale=scale).loss(Fixed(v, v_ref), noised, SIGNS)
        loss.values.sum().backward()
        values.append(float(loss.values.detach()))
        gradients.append(v.grad)
    assert values[0] == values[1]
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.allclose(gradients[0][1] / 4, gradients[1][1], atol=1e-7) and gradients[1][1].abs().max() > 0


def test_safe_scale_by_hand():
    """Equal residuals: 1 - mu. Twice the loser: half of that. Opposed or at right angles: 1. Never above 1."""
    residual = torch.tensor([[1.0, 0], [1, 0], [1, 0], [2, 0], [1, 0], [-1, 0], [1, 0], [0, 1], [9, 0], [1, 0]])
    assert safe_scale(residual, 0.4).tolist() == pytest.approx([0.6, 0.3, 1, 1, 1])


def test_with_the_safeguard_no_step_hurts_the_winner():
    """One velocity for both pictures, a hundred random pairs: along the plain gradient the winner's error rises for some; with
    Diffusion-SDPO, to first order, for none, by at least mu |g_w|^2 (beta / 4)."""
    torch.manual_seed(0)
    rises = {None: 0, 0.0: 0, 0.3: 0}
    for seed in range(100):
        noised = make_noised(2, seed=seed, shape=(3,), t=0.5)
        start = torch.randn(1, 3)
        for mu in rises:
            v = start.clone().requires_grad_()
            pair = v.expand(2, 3)
            g_w = 2 * (start - noised.target[:1]) / 3
            DPO(beta=4.0, safeguard=mu).loss(Fixed(pair, pair.detach()), noised, SIGNS).values.sum().backward()
            change = -float((g_w * v.grad).sum())  # of m_w, along the step -grad
            rises[mu] += change > 1e-5
            if mu == 0.3:
                assert change <= -0.3 * float((g_w * g_w).sum()) + 1e-5
    assert rises[None] > 10 and rises[0.0] == 0 == rises[0.3]


# ------------------------------------------------------------------------------------------------ which pairs


def samples_of(group: list[int]) -> Samples:
    return Samples([Prompt("a")] * len(group), list(range(len(group))), torch.tensor(group), torch.zeros(len(group), 1))


def test_best_and_worst():
    """Of each group, wherever its rows stand; the better row first; ties are left out; weighted, half the gap."""
    samples, advantage = samples_of([7, 3, 7, 3, 7, 5, 5]), torch.tensor([0.1, -1.0, 0.5, 2.0, -0.5, 0.3, 0.3])
    rows, values = best_and_worst(samples, advantage)
    assert rows.tolist() == [2, 4, 3, 1] and values.tolist() == [1, -1, 1, -1]
    rows, values = best_and_worst(samples, advantage, weighted=True)
    assert rows.tolist() == [2, 4, 3, 1] and values.tolist() == pytest.approx([0.5, -0.5, 1.5, -1.5])
    rows, values = best_and_worst(samples, torch.zeros(7))
    assert rows.shape == values.shape == (0,) and rows.dtype == torch.int64
    assert DPO().choose(samples, advantage)[0].tolist() == [2, 4, 3, 1]


def test_pairs_are_those_of_any_increasing_reward_and_order():
    """Shift, scale and order inside a group change nothing but the numbers of the rows."""
    torch.manual_seed(0)
    samples, advantage = samples_of([0] * 5 + [1] * 5), torch.randn(10)
    rows, _ = best_and_worst(samples, advantage)
    assert torch.equal(rows, best_and_worst(samples, 3 * advantage + 7)[0])
    order = torch.cat([torch.randperm(5), 5 + torch.randperm(5)])
    assert torch.equal(order[best_and_worst(samples, advantage[order])[0]], rows)


def test_implicit_accuracy_halves_ties():
    assert implicit_accuracy(torch.tensor([-2.0, 0.0, 3.0])).tolist() == [0, 0.5, 1]


# ------------------------------------------------------------------------------------------------ runs

ONLINE = ["num_generations=3", "batch_size=6", "times.count=2", "learning_rate=1e-2"]


@pytest.mark.parametrize(("name", "guided"), [("sd15", False), ("sd3", True), ("wan", False)])
def test_a_run_of_each_family(recipe, tmp_path, name, guided):
    """The first step is at ln 2 with margin 0; best and worst of two groups of three: 4 rows; later the margin is not 0."""
    options = ["objective.name=dpo", "objective.beta=100", *ONLINE]
    trainer, rows = short_run(recipe, tmp_path, *options, name=name, guided=guided)
    assert rows[0]["policy_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["margin"] == 0 and rows[0]["implicit_accuracy"] == 0.5 and rows[1]["margin"] != 0
    assert rows[0]["rows"] == rows[1]["rows"] == 4
    assert "old" not in trainer.copies and "reward" in rows[0]


def test_a_pair_shares_its_noise_and_time(recipe, tmp_path):
    """And the winner is the brighter of its group."""
    trainer, _ = short_run(recipe, tmp_path, "objective=dpo", *ONLINE, steps=1)
    batches = list(trainer.rollout(1))
    brightness = torch.cat([trainer.policy.decode(batch) for batch in batches]).flatten(1).mean(1)
    ((batch, values),) = trainer.chosen(batches, brightness)
    assert values.tolist() == [1, -1, 1, -1] and batch.group[0] == batch.group[1] != batch.group[2]
    bright = trainer.policy.decode(batch).flatten(1).mean(1)
    assert bright[0] > bright[1] and bright[2] > bright[3]
    points = [point for point, _ in trainer.points(batch)]
    assert len(points) == 2
    for point in points:
        assert torch.equal(point.noise[0], point.noise[1]) and not torch.equal(point.noise[1], point.noise[2])
        assert point.t[0] == point.t[1] and not torch.equal(point.x0[0], point.x0[1])


def test_references(recipe, tmp_path):
    """reference_weights: a slow copy that is the policy itself (it keeps nothing of its own) leaves every step at ln 2; the
    averaged weights do not."""
    margins = {}
    for weights in ("old", "ema"):
        options = ["objective=dpo", "objective.beta=100", f"reference_weights={weights}", "old_decay=[0, 0, 0]", *ONLINE]
        _, rows = short_run(recipe, tmp_path / weights, *options)
        margins[weights] = rows[1]["margin"]
    assert margins["old"] == 0 and margins["ema"] != 0


def test_a_step_without_pairs_changes_nothing(recipe, tmp_path):
    """All rewards equal: no pair, no gradient; it is counted."""
    flat = []
    rewards = {"r": lambda images, prompts: [0.0] * len(images) if flat else images[:, 0].flatten(1).mean(1)}
    trainer, _ = short_run(recipe, tmp_path, "objective=dpo", *ONLINE, steps=1, rewards=rewards)
    before = {key: p.detach().clone() for key, p in trainer.policy.trainable().items()}
    flat.append(True)
    metrics = trainer.step()
    assert metrics["rows"] == 0 and metrics["grad_norm"] == 0
    assert all(torch.equal(before[key], p) for key, p in trainer.policy.trainable().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "beta=0: must be positive"),
        ({"loss_type": "robust"}, "loss_type='robust': choose one of sigmoid"),
        ({"weighting": "snr"}, "weighting='snr': choose one of constant"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5: must lie in \[0, 0.5\)"),
        ({"safeguard": 1.5}, r"safeguard=1.5: must lie in \[0, 1\]"),
        ({"loser_scale": -1}, "loser_scale=-1: must be zero or positive"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DPO(**options)
