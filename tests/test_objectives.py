"""What holds for every objective alike: splits, permutations, opposite signals, values at the start, rewards on other scales."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowrl.batch import Loss, Noised, Prompt, Samples, Step
from flowrl.samplers import DanceSDE
from flowrl.train.advantages import advantages
from flowrl.train.objectives import OBJECTIVES
from tests.objectives import Fixed, make_nodes, make_noised, short_run

B = 6
H = 0.2  #: The length of the recorded steps.
#: Rows that belong together, by `Needs.unit`.
SIZES = {"sample": 1, "pair": 2, "group": 3}
#: Options without which a case would say less.
OPTIONS = {
    "branch_grpo": {"beta": 0.1}, "dense_dpo": {"clip": 0.0}, "euphonium": {"kl": 0.1}, "flow_dppo": {"beta": 0.1},
    "g2rpo": {"beta": 0.1}, "grpo": {"beta": 0.1}, "grpo_guard": {"beta": 0.1}, "b2diffurl": {"beta": 0.1},
    "consistency": {"kl": 0.1}, "draft": {"kl": 0.1}, "draft_lv": {"kl": 0.1}, "refl": {"kl": 0.1}, "sparse": {"kl": 0.1},
    "d3po": {"beta": 5.0}, "dpo": {"beta": 5.0}, "inpo": {"beta": 5.0}, "dragon": {"beta": 5.0}, "kto": {"beta": 5.0},
}  # fmt: skip


@dataclass
class Case:
    """An objective, six rows to ask it about, and what it is told about them.

    policy, reference, old: (B, 3, 2), each of which makes the velocity 0.3 x + that.
    """

    objective: object
    policy: Tensor
    reference: Tensor
    old: Tensor
    advantage: Tensor

    @property
    def size(self) -> int:
        return SIZES[self.objective.needs.unit]

    def loss(self, rows: Tensor | None = None, advantage: Tensor | None = None, process: float = 1.0) -> Loss:
        rows = torch.arange(B) if rows is None else rows
        advantage = self.advantage if advantage is None else advantage
        given = [lambda at, shift=shift: 0.3 * at.x + shift[rows] for shift in (self.policy, self.reference, self.old)]
        points, final = self.points(rows, process)
        predict = Fixed(*given, reward=lambda x0: x0.sin().flatten(1).mean(1), steps=points, final=final[rows])
        drawn = iter(torch.randn(20, B, 3, 2, generator=torch.Generator().manual_seed(5)))
        predict.noise = lambda like: next(drawn)[rows].flatten(1)[:, : like[0].numel()].reshape(like.shape)
        predict.mean = lambda values: torch.tensor(0.05)  # over all processes: of no row of its own
        return self.objective.loss(predict, points[0], advantage[rows])

    def points(self, rows: Tensor, process: float) -> tuple[list[Step | Noised], Tensor]:
        group = torch.arange(B) // max(self.size, 2)
        if self.objective.needs.points == "noised":
            noised = make_noised(B, self.size)
            maps = torch.rand(B, 1, 3, generator=torch.Generator().manual_seed(6))
            return [Noised(noised.x0[rows], noised.noise[rows], noised.t[rows], group[rows], maps[rows])], noised.x0
        if self.objective.needs.points == "nodes":
            steps, final = make_nodes(torch.zeros(B, 3, 2), [1, 3], batch=B)
            return [step.select(rows) for step in steps], final
        torch.manual_seed(0)
        x, noise = torch.randn(B, 3, 2), torch.randn(B, 3, 2)
        v = 0.3 * x + self.old
        law = DanceSDE(0.5).transition(x, v, 0.8, 0.8 - H, 0.95)
        x_next = law.sample(noise)
        said = process * torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -0.5])
        step = Step(
            x, x_next, 0.8, 0.8 - H, 0.95, law.log_prob(x_next), 1, DanceSDE(0.5), v=v, group=group, process=said
        )  # fmt: skip
        return [step.select(rows)], x


def case(name: str, moved: bool = True) -> Case:
    """moved: policy, reference and slow copy differ; otherwise the run is at its start."""
    torch.manual_seed(1)
    objective = OBJECTIVES[name](**OPTIONS.get(name, {}))
    shifts = [torch.randn(B, 3, 2)] * 3
    if moved:
        shifts = [shifts[0] + 0.02 * torch.randn(B, 3, 2) for _ in range(3)]
    signs = torch.tensor([1.0, -1.0] * 3)
    return Case(objective, *shifts, signs if objective.needs.unit == "pair" else torch.tensor([1.5, -0.5, 0.3, -2.0, 0.7, 1.0]))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_may_be_split_and_permuted(name):
    """Units (a sample, a pair, a group) alone or in another order, a group's members too: each keeps its loss and its pull."""
    of = case(name)
    whole = of.loss().total
    units = torch.arange(B).reshape(-1, of.size)
    turned = units.roll(1, 1) if of.objective.needs.unit == "group" else units
    for order in ([len(units) - 1], [1, 0, *range(2, len(units))]):
        rows = turned[order].flatten()
        part = of.loss(rows).total
        torch.testing.assert_close(part, whole[rows if len(whole) == B else torch.tensor(order)], rtol=1e-4, atol=1e-5)
    assert whole.isfinite().all() and len(whole) in (B, len(units))
    assert whole.unique().numel() == len(whole), "rows that differ in nothing would hide a mistake"


BY_SIGN = [
    "awm",
    "b2diffurl",
    "branch_grpo",
    "crd",
    "dgpo",
    "euphonium",
    "flow_dppo",
    "g2rpo",
    "grpo",
    "grpo_guard",
    "kto",
    "nft",
]
BY_PLACE = ["d3po", "dpo", "dragon", "inpo"]


@pytest.mark.parametrize("name", [*BY_SIGN, *BY_PLACE])
def test_at_the_start_the_opposite_signal_gives_the_opposite_gradient(name):
    """All advantages turned round, or the better and the worse of every pair exchanged. (Not of methods that only learn from good
    samples, or climb.)"""

    def gradient(**what):
        of = case(name, moved=False)
        of.policy = of.policy.clone().requires_grad_()
        of.loss(**what).total.sum().backward()
        return of.policy.grad

    told = case(name).advantage
    plain = gradient()
    if name in BY_PLACE:
        other = gradient(rows=torch.tensor([1, 0, 3, 2, 5, 4]), advantage=told[[1, 0, 3, 2, 5, 4]])
    else:
        other = gradient(advantage=-told, process=-1.0)
    torch.testing.assert_close(other, -plain, rtol=1e-3, atol=1e-5)
    assert plain.abs().max() > 1e-3


def edges(A: Tensor) -> Tensor:
    """Of the leaves' own edges: normalised in the two groups."""
    groups = A.reshape(2, 3)
    return ((groups - groups.mean(1, keepdim=True)) / groups.std(1, keepdim=True)).flatten()


#: The loss of each unit where the policy is the one that sampled, and the reference: of the advantages.
AT_THE_START = {
    "grpo": lambda A: -A,
    "g2rpo": lambda A: -A,
    "b2diffurl": lambda A: -A,
    "flow_dppo": lambda A: -A,
    "euphonium": lambda A: -A,
    "branch_grpo": lambda A: -edges(A),
    "grpo_guard": lambda A: -A / H,
    "awm": lambda A: -A / 5,
    "d3po": lambda A: torch.full((3,), math.log(2)),
    "dpo": lambda A: torch.full((3,), math.log(2)),
    "inpo": lambda A: torch.full((3,), math.log(2)),
    "dragon": lambda A: torch.full((3,), math.log(2)),
    "dense_dpo": lambda A: torch.full((2,), math.log(6)),
    "dgpo": lambda A: torch.full((2,), math.log(2) / 100),
    "crd": lambda A: 5 * ((A - A.reshape(2, 3).mean(1).repeat_interleave(3)) / 10).square(),
    "kto": lambda A: 1 - (0.05 * 5 * -A.sign()).sigmoid(),  # the baseline of 0.05 that `Case` gives
}


@pytest.mark.parametrize("name", AT_THE_START)
def test_the_value_at_the_start(name):
    of = case(name, moved=False)
    loss = of.loss()
    torch.testing.assert_close(loss.values, AT_THE_START[name](of.advantage), rtol=1e-4, atol=1e-5)
    if loss.penalty is not None and name != "euphonium":  # whose penalty holds the steps' own loss
        assert loss.penalty.abs().max() < 1e-6


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if hasattr(objective, "choose")])
def test_what_is_chosen_does_not_depend_on_the_rewards_scale_or_order(name):
    """7 r - 3 in place of r: the same rows with the same weights. Another order inside the groups: the same samples (not of
    DRAGON, whose pairs are neighbours)."""
    torch.manual_seed(2)
    group, rewards = torch.arange(3).repeat_interleave(4), torch.randn(12, 1)
    samples = Samples([Prompt("a")] * 12, list(range(12)), group, torch.zeros(12, 2))

    def chosen(values):
        return OBJECTIVES[name]().choose(samples, advantages(values, group))

    rows, weights = chosen(rewards)
    again, same = chosen(7 * rewards - 3)
    assert len(rows) and torch.equal(rows, again)
    torch.testing.assert_close(weights, same, rtol=1e-4, atol=1e-5)
    if name != "dragon":
        order = torch.cat([4 * g + torch.randperm(4) for g in range(3)])
        turned, turned_weights = chosen(rewards[order])
        paired = dict(zip(rows.tolist(), weights.tolist(), strict=True))
        assert dict(zip(order[turned].tolist(), turned_weights.tolist(), strict=True)) == pytest.approx(paired, rel=1e-4)


def test_the_example_of_the_contributing_guide(recipe, tmp_path, monkeypatch):
    """It can be pasted as it stands, runs, starts at the reference, and shares a pass between rewards, as it says."""
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    code = guide.split("## Add an objective")[1].split("```python\n")[1].split("```")[0]
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(OBJECTIVES, "mine", importlib.import_module("mine").Mine)
    of = case("mine")
    torch.testing.assert_close(of.loss(torch.tensor([4, 1])).total, of.loss().total[[4, 1]])
    options = ["objective=mine", "rewards.jpeg_size=1", "balance=marble", "times.count=1"]
    _, (first, second) = short_run(recipe, tmp_path, *options)
    assert first["kl"] == 0 < second["kl"] and first["balance/jpeg_size/weight"] > 0
