"""SOAR: where corrections are asked and what they want, hand arithmetic, gradients, short runs."""

from __future__ import annotations

import pytest
import torch

from flowrl.batch import Noised
from flowrl.train.objectives import SOAR
from flowrl.train.objectives.soar import SMALLEST
from tests.objectives import Fixed, finite_difference, make_noised, part_of, short_run


def column(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None]


def test_a_right_step_is_corrected_to_the_path_itself():
    """Where v is the path's velocity, z' lies on the path at s' and the target is noise - x0: nothing to correct."""
    noised, u = make_noised(5), torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    state, target = SOAR(steps=10).correction(noised, noised.target, u)
    assert torch.allclose(target, noised.target, atol=1e-4)
    assert torch.allclose(state.x, (1 - column(state.t)) * noised.x0 + column(state.t) * noised.noise, atol=1e-5)
    s1 = noised.t - 0.1
    assert torch.allclose(state.t, (s1 + (1 - s1) * u).clamp(min=SMALLEST), atol=1e-6)


def test_the_target_leads_back_to_the_picture():
    """From wherever a wrong velocity led, z' - s' target = x0; the target is off the path's velocity by
    (1 - a) (s1 - t) (v - target) / s'."""
    noised, u = make_noised(4), torch.tensor([0.1, 0.4, 0.7, 0.99])
    torch.manual_seed(1)
    v = noised.target + torch.randn(4, 3, 2)
    state, target = SOAR(steps=10).correction(noised, v, u)
    assert torch.allclose(state.x - column(state.t) * target, noised.x0, atol=1e-5)
    s1 = (noised.t - 0.1).clamp(min=0)
    a = (state.t - s1) / (1 - s1)
    off = column((1 - a) * (s1 - noised.t) / state.t) * (v - noised.target)
    assert torch.allclose(target - noised.target, off, atol=1e-4) and off.abs().max() > 1e-2


@pytest.mark.parametrize(("steps", "share"), [(8, 0.630), (40, 0.892)])
def test_the_exact_flow_is_pulled_towards_less_of_the_picture(steps, share):
    """Data N(0, 1), t = 3/4, s' = s1: E[x0 | x_t] = 2/5 x_t and v = 4/5 x_t, so that the step ends at z = (1 - 4 / (5 K)) x_t,
    which knows of x0 no more than x_t did. The correction wants E[x0 | z] = 2/5 z / (1 - 4 / (5 K)); the flow has
    (1 - s1) z / ((1 - s1)^2 + s1^2) there. K = 8: .444 for .706, K = 40: .408 for .457."""
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 4_000_000, 1)
    noised = Noised(x0, noise, torch.full((4_000_000,), 0.75))
    state, target = SOAR(steps=steps).correction(noised, 0.8 * noised.x, torch.zeros(4_000_000))
    wanted = (state.x * (state.x - state.t[:, None] * target)).mean() / state.x.square().mean()
    s = 0.75 - 1 / steps
    exact = (1 - s) / ((1 - s) ** 2 + s**2)
    assert float(wanted / exact) == pytest.approx(share, abs=0.005)


def test_small_times_do_not_blow_up():
    noised = make_noised(2, t=0.01)
    state, target = SOAR().correction(noised, torch.zeros(2, 3, 2), torch.zeros(2))
    assert state.t.tolist() == pytest.approx([SMALLEST] * 2) and target.abs().max() < 1e2


def test_value_by_hand():
    """x0 = 0, noise = 1, t = 1/2, K = 4, v = 2 wherever it is asked: base (2 - 1)^2 = 1. z = 1/2 - 1/4 * 2 = 0, s1 = 1/4. With
    s' = 5/8 (u = 1/2), a = 1/2: z' = 1/2, target .8, correction 1.44. L = (1 + 2 * 1.44) / 3 with one correction of weight 2."""
    noised = Noised(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([0.5]))
    predict = Fixed(torch.full((1, 1), 2.0))
    predict.noise = lambda like: torch.zeros_like(like)  # the median: u = 1/2
    loss = SOAR(corrections=1, weight=2.0, steps=4).loss(predict, noised, torch.tensor([3.0]))
    assert loss.values.tolist() == pytest.approx([3 * (1 + 2 * 1.44) / 3], rel=1e-5)
    assert loss.metrics["correction"].tolist() == pytest.approx([1.44]) and loss.metrics["error"].tolist() == [1]
    assert loss.metrics["off_path"].tolist() == pytest.approx([0.04])
    many = SOAR(corrections=3, weight=1.0, steps=4).loss(predict, noised, torch.ones(1))
    assert many.values.tolist() == pytest.approx([(1 + 3 * 1.44) / 4], rel=1e-5)
    assert predict.asked == ["policy"] * 6


def test_without_corrections_it_is_supervised_training():
    noised = make_noised(4)
    v = torch.randn(4, 3, 2)
    loss = SOAR(corrections=0).loss(Fixed(v), noised, torch.ones(4))
    assert torch.allclose(loss.values, (v - noised.target).square().flatten(1).mean(1)) and "correction" not in loss.metrics


def test_gradient_against_finite_differences():
    """Of a velocity that depends on where it is asked: through the network at z', not through the step that led there."""
    noised, A = make_noised(4), torch.tensor([1.0, 0.5, 2.0, 1.0])
    torch.manual_seed(1)
    start, z = torch.randn(1, 3, 2), torch.randn(4, 1)

    def value(w):
        if torch.is_grad_enabled():
            predict = Fixed(lambda at: w * at.x)
            predict.noise = lambda like: z
            return SOAR(corrections=1, steps=5).loss(predict, noised, A).values
        state, target = SOAR(steps=5).correction(noised, start * noised.x, torch.special.ndtr(z[:, 0]))
        base = (w * noised.x - noised.target).square().flatten(1).mean(1)
        return A * (base + (w * state.x - target).square().flatten(1).mean(1)) / 2

    by_graph, numeric = finite_difference(value, start)
    assert torch.allclose(by_graph, numeric, rtol=1e-3, atol=2e-3) and by_graph.abs().max() > 1e-2


def test_splitting_a_batch_changes_nothing():
    noised, v = make_noised(6), torch.randn(6, 3, 2)
    z = torch.randn(6, 1)

    def loss(rows):
        predict = Fixed(v[rows])
        predict.noise = lambda like: z[rows]
        return SOAR().loss(predict, part_of(noised, rows), torch.ones(len(rows))).values

    parts = [loss(rows) for rows in torch.arange(6).split(2)]
    assert torch.allclose(loss(torch.arange(6)), torch.cat(parts), atol=1e-6)


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_a_run_of_each_family(recipe, tmp_path, name):
    """On its own samples: the better of each group of two."""
    options = ["objective=soar", "times=logit_normal", "times.count=2", "learning_rate=1e-2"]
    _, rows = short_run(recipe, tmp_path, *options, name=name)
    assert rows[0]["rows"] == 2 and rows[0]["correction"] > 0 and rows[0]["off_path"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 0}, "steps=0: must be positive"), ({"corrections": -1}, "corrections=-1: must be zero or positive")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SOAR(**options)
