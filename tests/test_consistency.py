"""Consistency distillation with rewards (T2V-Turbo): a step of the teacher changes no guess, and the guess is rewarded."""

from __future__ import annotations

import pytest
import torch

from flowrl.batch import Noised
from flowrl.train.objectives import Consistency
from flowrl.train.objectives.consistency import following
from flowrl.train.predict import PolicyPredict
from tests.objectives import Fixed, finite_difference, make_noised, short_run

GRID = (1.0, 0.75, 0.5, 0.25, 0.0)


def nothing(x0):
    return 0.0 * x0.flatten(1).sum(1)


def mean(x0):
    return x0.flatten(1).mean(1)


def test_arithmetic():
    """At t = 0.75, s = 0.5, one latent of value x: the guess is x - 0.75 v, the teacher steps to x - 0.25 v_ref, where the slow
    copy guesses x - 0.25 v_ref - 0.5 v_old. With v = 2, v_ref = 1, v_old = 3 they differ by -1.5 + 0.25 + 1.5 = 0.25."""
    noised = make_noised(batch=2, t=0.75)
    shape = noised.x0.shape
    given = Fixed(torch.full(shape, 2.0), torch.full(shape, 1.0), torch.full(shape, 3.0), grid=GRID, reward=mean)
    loss = Consistency(c=1e-3).loss(given, noised, torch.zeros(2))
    assert loss.metrics["consistency_loss"].tolist() == pytest.approx([0.249002] * 2, rel=1e-4)  # sqrt(0.25^2 + 1e-6) - 1e-3
    r = mean(noised.x) - 1.5
    torch.testing.assert_close(loss.values, loss.metrics["consistency_loss"] - r)
    capped = Consistency(cap=float(r.min()) - 1).loss(given, noised, torch.zeros(2))
    torch.testing.assert_close(capped.values, capped.metrics["consistency_loss"])
    assert loss.penalty is None and Consistency().needs.old and Consistency().needs.reference


def test_an_exact_model_of_one_picture_is_consistent_everywhere():
    """v = (x - x0) / t leads from every state to x0: distance 0 at every time, on the grid or off it, and no gradient."""
    noised = make_noised(batch=4, t=[1.0, 0.6, 0.25, 0.05])
    exact = Fixed(*[lambda at: (at.x - noised.x0) / at.t.reshape(-1, 1, 1)] * 3, grid=GRID, reward=nothing)
    assert Consistency().loss(exact, noised, torch.zeros(4)).metrics["consistency_loss"].abs().max() < 1e-6


def test_the_last_step_is_anchored_at_the_teachers_picture():
    """After the last time comes 0, where a guess is the state itself: the slow copy has no say. Grids that end before 0 too."""
    assert following(GRID, torch.tensor([1.0, 0.8, 0.75, 0.25, 0.1])).tolist() == [0.75, 0.75, 0.5, 0.0, 0.0]
    assert following((0.8, 0.4, 0.03), torch.tensor([0.8, 0.4, 0.03])).tolist() == pytest.approx([0.4, 0.0, 0.0])
    noised = make_noised(batch=2, t=0.25)
    v, v_ref = torch.randn_like(noised.x0), torch.randn_like(noised.x0)
    found = []
    for v_old in (torch.zeros_like(v), torch.full_like(v, 9.0)):
        loss = Consistency().loss(Fixed(v, v_ref, v_old, grid=GRID, reward=nothing), noised, torch.zeros(2))
        found.append(loss.values)
    assert torch.equal(*found)
    distance = ((0.25 * (v - v_ref)).square() + 1e-6).sqrt() - 1e-3
    torch.testing.assert_close(found[0], distance.flatten(1).mean(1))


def test_gradient_against_differences():
    noised = make_noised(batch=2, t=0.5)
    torch.manual_seed(1)
    v, v_ref, v_old = (torch.randn_like(noised.x0) for _ in range(3))

    def loss(w):
        given = Fixed(w, v_ref, v_old, grid=GRID, reward=lambda x0: x0.sin().flatten(1).mean(1))
        return Consistency(c=0.5).loss(given, noised, torch.zeros(2)).total

    analytic, numeric = finite_difference(loss, v)
    torch.testing.assert_close(analytic, numeric, atol=1e-4, rtol=1e-3)


def test_the_target_carries_no_gradient_even_if_it_is_the_policys_own():
    """v = a x at t = 0.5 with the teacher's step to x' = x - v_ref / 4: d/da of the distance alone is -t x times its sign."""
    noised = make_noised(batch=2, t=0.5)
    a = torch.tensor(0.4, requires_grad=True)
    v_ref = torch.ones_like(noised.x0)
    given = Fixed(lambda at: a * at.x, v_ref, grid=GRID, reward=nothing)
    objective = Consistency(c=1e-6, target="policy")
    assert not objective.needs.old
    (gradient,) = torch.autograd.grad(objective.loss(given, noised, torch.zeros(2)).values.sum(), a)
    x, x_s = noised.x, noised.x - 0.25
    sign = ((1 - 0.5 * 0.4) * x - (1 - 0.25 * 0.4) * x_s).sign()
    assert float(gradient) == pytest.approx(float((-0.5 * x * sign).flatten(1).mean(1).sum()), rel=1e-4)


def test_one_step_learns_where_the_teachers_steps_lead():
    """Data N(0, 1), whose exact velocity is k(t) x with k = (2t - 1) / (t^2 + (1 - t)^2): Euler's steps from t multiply x by the
    product P(t) of 1 - k / 4. A model v = a_t x, one number for each time, learns 1 - t a_t = P(t) at all of them."""

    def k(t):
        return (2 * t - 1) / (t**2 + (1 - t) ** 2)

    times = torch.tensor(GRID[:-1])
    product = torch.stack([(1 - k(times[i:]) / 4).prod() for i in range(4)])
    a = torch.zeros(4, requires_grad=True)

    def student(at):
        return a[(4 * (1 - at.t)).round().long().clamp(max=3)].reshape(-1, 1, 1) * at.x  # at 0 nothing is left of it

    def teacher(at):
        return k(at.t).reshape(-1, 1, 1) * at.x

    optimizer = torch.optim.Adam([a], 0.05)
    for update in range(300):
        noised = make_noised(batch=64, seed=update, t=times.repeat(16))
        given = Fixed(student, teacher, grid=GRID, reward=nothing)
        loss = Consistency(c=1.0, target="policy").loss(given, noised, torch.zeros(64))
        optimizer.zero_grad()
        loss.values.mean().backward()
        optimizer.step()
    torch.testing.assert_close(1 - times * a.detach(), product, atol=0.02, rtol=0)
    assert (product - 1).abs().max() > 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"c": 0.0}, "c=0.0: must be positive"),
        ({"target": "ema"}, "choose one of old, policy"),
        ({"teacher_guidance": 0.0}, "teacher"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Consistency(**options)


# ------------------------------------------------------------------------------------------------ on real pipelines


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_runs(recipe, tmp_path, name):
    """Teacher, slow copy and policy start as one: the first distance is that of two guesses of one model. Clips: two frames."""
    options = ["objective=consistency", "times={name: grid, count: 2}", "old_decay=[0, 0.5, 0.5]"]
    options += ["objective.frames=2"] if name == "wan" else []
    trainer, rows = short_run(recipe, tmp_path, *options, name=name)
    assert "old" in trainer.policy.snapshots and all(row["consistency_loss"] > 0 for row in rows)
    assert 0 < rows[0]["predicted_reward"] < 1


def test_a_guided_teacher(recipe, tmp_path):
    """Its velocity is that of the pipeline's own guidance, v_neg + 4 (v - v_neg); the policy's stays unguided."""
    options = ["objective=consistency", "objective.teacher_guidance=4", "times={name: grid, count: 1}"]
    trainer, _ = short_run(recipe, tmp_path, *options, steps=1)
    policy = trainer.policy
    (batch,) = trainer.rollout(0)
    noised = next(trainer.points(batch))[0]
    predict = PolicyPredict(policy, batch)
    with torch.no_grad(), policy.using("reference"):
        plain = policy.velocity(batch.texts, noised.x, noised.t)
        empty = policy.velocity([""] * len(batch), noised.x, noised.t)
    guided = predict.reference(noised, guidance_scale=4.0)
    torch.testing.assert_close(guided, empty + 4 * (plain - empty), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(predict.reference(noised), plain)
    assert isinstance(noised, Noised) and not torch.allclose(guided, plain, atol=1e-3)
