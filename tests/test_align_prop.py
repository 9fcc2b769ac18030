"""AlignProp: the sampler's chain, cut off at a random step, once or for each step."""

from __future__ import annotations

import pytest
import torch

from flowrl.train.objectives import AlignProp, DRaFT
from flowrl.train.objectives.align_prop import CUTS
from flowrl.train.objectives.climb import unroll
from tests.objectives import Fixed, make_nodes, short_run
from tests.test_draft import linear, total


def test_a_cut_prefix_is_draft():
    """Detaching the first two of four velocities by hand gives the gradient of the last two: no weights lie behind the noise."""
    (first, second), _ = make_nodes(linear(0.4), [0, 2])
    by_hand, late = (torch.tensor(0.4, requires_grad=True) for _ in range(2))
    x0 = unroll(Fixed(linear(by_hand)), first, linear(by_hand)(first), constant=[True, True, False, False])
    (-total(x0)).sum().backward()
    AlignProp().loss(Fixed(linear(late), reward=total), second, torch.zeros(2)).values.sum().backward()
    assert float(late.grad) == pytest.approx(float(by_hand.grad), rel=1e-5)
    draft = torch.tensor(0.4, requires_grad=True)
    DRaFT().loss(Fixed(linear(draft), reward=total), second, torch.zeros(2)).values.sum().backward()
    assert float(late.grad) == pytest.approx(float(draft.grad), rel=1e-6)


def test_a_gap_is_skipped_along_the_linear_part():
    """v = a x, quarters, the second velocity a constant c: x2 = x0 (1 - a/4) - c/4, ends at x2 (1 - a/4)^2. By hand
    dx4/da = -x0/4 (1 - a/4)^2 - x2/2 (1 - a/4): the first step's gradient has not passed the factor (1 - a/4) of the second."""
    (step,), _ = make_nodes(linear(0.4), [0])
    a = torch.tensor(0.4, requires_grad=True)
    x0 = unroll(Fixed(linear(a)), step, linear(a)(step), constant=[False, True, False, False])
    (gradient,) = torch.autograd.grad(total(x0).sum(), a)
    x, keep = step.x, 0.9
    x2 = x * keep - 0.1 * (x * keep)
    assert float(gradient) == pytest.approx(float((-x / 4 * keep**2 - x2 / 2 * keep).sum()), rel=1e-5)


def test_how_often_each_step_is_kept():
    """Of n = 4 steps, step i with probability (i + 1) / 5, the last always. 3000 draws: deviation below 0.01."""
    rng = torch.Generator().manual_seed(0)
    kept = torch.tensor([[not cut for cut in CUTS["each"](4, 0, rng)] for _ in range(3000)]).float().mean(0)
    torch.testing.assert_close(kept, torch.tensor([0.2, 0.4, 0.6, 1.0]), atol=0.04, rtol=0)
    assert CUTS["each"](4, 3, rng) == [False] and CUTS["once"](4, 1, rng) == [False] * 3


def test_the_target_is_the_cap():
    """Below it |target - r| and max(0, target - r) are the same."""
    (step,), _ = make_nodes(linear(0.4), [2])
    values = AlignProp(cap=10.0).loss(Fixed(linear(torch.tensor(0.4)), reward=total), step, torch.zeros(2)).values
    torch.testing.assert_close(values, (10 - total(step.x) * 0.81).abs())
    with pytest.raises(ValueError, match="cut='twice': choose one of once, each"):
        AlignProp(cut="twice")


@pytest.mark.parametrize(("name", "cut"), [("sd15", "once"), ("sd3", "each"), ("wan", "once")])
def test_runs(recipe, tmp_path, name, cut):
    """The cut moves with the update; what is climbed is the picture that was drawn, wherever the cut is."""
    options = ["objective=align_prop", f"objective.cut={cut}", "steps={name: late, kind: normal, size: 2, std: 1.0}"]
    trainer, rows = short_run(recipe, tmp_path, *options, name=name)
    for row in rows:
        assert row["predicted_reward"] == pytest.approx(row["reward"], abs=0.03 if name == "sd15" else 1e-4)
    cuts = {trainer.schedule.steps(3, 0, update)[0] for update in range(20)}
    assert cuts == {0, 1, 2}
