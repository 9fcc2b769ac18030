"""Rewards balanced by their gradients: small problems against closed forms, one pass against K, and the loop around it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from flowrl import Policy, Trainer, load_recipe
from flowrl.batch import Loss
from flowrl.config import ConfigError
from flowrl.record import LORA_FILE, read_metrics
from flowrl.train import balance as ways
from flowrl.train.affine import mixed, output_gram
from flowrl.train.balance import BALANCES, Equal, Marble, PCGrad, TorchJD, UPGrad, Weights
from flowrl.train.gram import cagrad, conditioned, gram, min_norm, pcgrad, upgrad
from flowrl.train.objectives import AWM, GRPO, NFT
from flowrl.train.trainer import _Clock
from tests.pipelines import CALL, GUIDED, tiny

NAN = float("nan")


def vectors(K: int, P: int = 6, seed: int = 0, shift: float = 0.5) -> torch.Tensor:
    """(K, P) gradients that conflict here and there, of lengths that differ."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(K, P, generator=generator, dtype=torch.float64) + shift
    return g * torch.rand(K, 1, generator=generator, dtype=torch.float64).add(0.1)


# ------------------------------------------------------------------------------------------------ the shortest combination


def test_two_gradients_have_a_closed_form():
    """alpha_1 = clip((g2 - g1) . g2 / |g1 - g2|^2, 0, 1); with unit lengths always one half."""
    inside = 0
    for seed in range(20):
        g = vectors(2, 3, seed, shift=0)
        first = float(((g[1] - g[0]) @ g[1] / (g[0] - g[1]).square().sum()).clamp(0, 1))
        inside += 0 < first < 1
        assert min_norm(gram(g), ridge=1e-12).tolist() == pytest.approx([first, 1 - first], abs=1e-6)
        unit = g / g.norm(dim=1, keepdim=True)
        assert min_norm(gram(unit)).tolist() == pytest.approx([0.5, 0.5])
    assert 0 < inside < 20  # both branches were seen


@pytest.mark.parametrize("K", [1, 3, 5, 40])
def test_every_reward_with_a_weight_has_the_same_product_and_no_other_has_less(K):
    """The point of the simplex with the least norm: g_k . g* = |g*|^2 on the support, and more elsewhere."""
    for seed in range(3):
        g = vectors(K, 60, seed)
        G = gram(g)
        alpha = min_norm(G, ridge=1e-10)
        assert alpha.sum() == pytest.approx(1) and (alpha >= 0).all()
        products, norm = G @ alpha, alpha @ G @ alpha
        assert (products >= norm - 1e-6).all()
        assert torch.allclose(products[alpha > 1e-3], norm, atol=1e-6)
        generator = torch.Generator().manual_seed(seed)
        others = torch.rand(500, K, generator=generator, dtype=torch.float64) ** 3
        others = others / others.sum(1, keepdim=True)
        assert (((others @ G) * others).sum(1) >= norm - 1e-6).all()


def every_face(G: torch.Tensor) -> torch.Tensor:
    """The same by trying every set of gradients: the best of the stationary points that lie inside their face."""
    K, best, least = len(G), None, torch.inf
    for chosen in itertools.product([False, True], repeat=K):
        S = torch.tensor(chosen).nonzero().flatten()
        if not len(S):
            continue
        x = torch.linalg.solve(G[S][:, S], torch.ones(len(S), dtype=torch.float64))
        if (x / x.sum() >= 0).all() and 1 / x.sum() < least:
            best, least = torch.zeros(K, dtype=torch.float64).index_put((S,), x / x.sum()), 1 / x.sum()
    return best


def test_the_active_set_is_the_right_one():
    sizes = set()
    for seed in range(8):
        H = conditioned(gram(vectors(6, 8, seed)), 1e-6)
        assert torch.allclose(min_norm(H, ridge=0.0), every_face(H), atol=1e-9)
        sizes.add(int((every_face(H) > 0).sum()))
    assert len(sizes) > 1


def test_two_gradients_by_hand():
    """g = (1, 0) and (-.5, 1) of unit length: half of each, and the sum serves both as much as its own square, 0.276393."""
    g = torch.tensor([[1.0, 0.0], [-0.5, 1.0]], dtype=torch.float64)
    g = g / g.norm(dim=1, keepdim=True)
    alpha = min_norm(gram(g))
    d = alpha @ g
    assert alpha.tolist() == pytest.approx([0.5, 0.5]) and (g @ d).tolist() == pytest.approx([0.276393] * 2, abs=1e-6)
    assert float(d @ d) == pytest.approx(0.276393, abs=1e-6)


def test_facts_of_the_shortest_combination():
    """Permutations permute it; a common scale changes nothing; a floor holds, at 1 all are equal; twins share one weight."""
    G = gram(vectors(5))
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.allclose(min_norm(G[order][:, order]), min_norm(G)[order], atol=1e-9)
    assert torch.allclose(min_norm(1e6 * G), min_norm(G), atol=1e-9)
    floored = min_norm(G, floor=0.5)
    assert min_norm(G).min() < 0.1 - 1e-6 <= floored.min() and floored.sum() == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    others = torch.rand(500, 5, generator=generator, dtype=torch.float64)
    others = 0.1 + 0.5 * others / others.sum(1, keepdim=True)
    assert (((others @ G) * others).sum(1) >= floored @ G @ floored - 1e-6).all()
    assert torch.allclose(min_norm(G, floor=1.0), torch.full((5,), 0.2, dtype=torch.float64))
    twins = torch.tensor([[1.0, 0], [1, 0], [0, 1]], dtype=torch.float64)
    assert min_norm(gram(twins)).tolist() == pytest.approx([0.25, 0.25, 0.5], abs=1e-5)
    assert min_norm(torch.zeros(3, 3)).tolist() == pytest.approx([1 / 3] * 3)
    opposed = torch.tensor([[1.0, 0], [-1, 0]], dtype=torch.float64)
    assert min_norm(gram(opposed)).tolist() == pytest.approx([0.5, 0.5])  # nothing improves both


# ------------------------------------------------------------------------------------------------ the others


def test_upgrad_harms_none_and_leaves_friends_alone():
    """g1 = (1, 0), g2 = (-1, 1): projected on what harms none, (1/2, 1/2) and (0, 1); their mean is (1/4, 3/4).

    In weights: v1 = (1, 1/2), v2 = (1, 1), mean (1, 3/4). Without conflict it is the mean.
    """
    g = torch.tensor([[1.0, 0], [-1, 1]], dtype=torch.float64)
    w = upgrad(gram(g), ridge=1e-12)
    assert w.tolist() == pytest.approx([1.0, 0.75]) and (w @ g).tolist() == pytest.approx([0.25, 0.75])
    friends = torch.tensor([[1.0, 0.2], [0.3, 1]], dtype=torch.float64)
    assert upgrad(gram(friends)).tolist() == pytest.approx([0.5, 0.5])
    for seed in range(5):
        g = vectors(6, 8, seed, shift=0)
        G = gram(g)
        assert (G @ upgrad(G) >= -1e-5 * G.diagonal().mean()).all() and (upgrad(G) >= 1 / 6).all()


def test_pcgrad_by_hand():
    """g1 = (1, 0), g2 = (-1, 1): v1 = g1 + g2 / 2 = (1/2, 1/2), v2 = g2 + g1 = (0, 1): weights (1 + 1, 1/2 + 1) / 2."""
    g = torch.tensor([[1.0, 0], [-1, 1]], dtype=torch.float64)
    assert pcgrad(gram(g)).tolist() == pytest.approx([1.0, 0.75])
    G = gram(vectors(5, 8, 1, shift=0))
    draws = [pcgrad(G, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1, 2, 3)]
    assert torch.equal(draws[0], draws[1]) and any(not torch.equal(draws[0], other) for other in draws[2:])


def test_cagrad_is_best_for_the_worst_within_its_ball():
    """c = 0 is the mean; no other direction within c |g_0| of it has a larger smallest product."""
    g = vectors(4, 3, 2, shift=0.1)
    G, mean = gram(g), g.mean(0)
    assert torch.allclose(cagrad(G, c=0.0), torch.full((4,), 0.25, dtype=torch.float64))
    d = cagrad(G, c=0.7) @ g
    assert (d - mean).norm() == pytest.approx(float(0.7 * mean.norm()), rel=1e-3)
    generator = torch.Generator().manual_seed(0)
    others = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    others = mean + 0.7 * mean.norm() * others / others.norm(dim=1, keepdim=True)
    best = (others @ g.T).min(1).values.max()
    assert (g @ d).min() >= best - 1e-4 and (g @ d).min() > (g @ mean).min()


def test_torchjd_is_a_door_to_others():
    """Its MGDA and UPGrad agree with ours; what keeps a state, wants options or does not exist is refused with the cause."""
    pytest.importorskip("torchjd")
    generator = torch.Generator().manual_seed(0)
    for seed in range(3):
        G = gram(vectors(4, 8, seed))
        theirs = TorchJD(weighting="MGDA", options={"epsilon": 1e-6, "max_iters": 20000}).solve(G, generator)
        assert torch.allclose(theirs, Marble().solve(G, generator), atol=5e-3)
        pytest.importorskip("quadprog")
        assert torch.allclose(TorchJD(weighting="UPGrad").solve(G, generator), UPGrad().solve(G, generator), atol=1e-2)
    assert TorchJD().solve(G, generator).isfinite().all()
    random = TorchJD(weighting="Random")  # drawn from the run's seed, not from what was drawn before
    first = random.solve(G, generator)
    torch.rand(3)
    assert torch.equal(first, random.solve(G, generator))
    for options, message in [
        ({"weighting": "Mine"}, "weighting=Mine: torchjd has AlignedMTL, .*UPGrad"),
        ({"weighting": "CRMOGM"}, "CRMOGM (keeps a state|wants options)"),
        ({"weighting": "MGDA", "options": {"steps": 3}}, "weighting=MGDA: .*steps"),
    ]:
        with pytest.raises(ValueError, match=message):
            TorchJD(**options)


def test_torchjd_that_is_missing_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchjd", None)
    with pytest.raises(ValueError, match="torchjd is not installed: pip install torchjd"):
        TorchJD()


# ------------------------------------------------------------------------------------------------ weights over time

YES = torch.ones(3, dtype=torch.bool)
ONES = torch.ones(3)


def test_weights_are_averaged_and_absent_rewards_keep_theirs():
    """Norms 1, 2, 4, orthogonal: alpha 1/3 each. Then 1, 1, -: with ema 0.7 and reward 2 absent, alpha stays 1/3 each; norms
    0.7 + 0.3, 1.4 + 0.3, 4. With mean norm 7/3, u = 7/9, 7/18, 7/36; without the absent one 1/2 each and mean norm 1.35."""
    options, generator = Marble(), torch.Generator()
    first = Weights.new(3).refresh(options, torch.diag(torch.tensor([1.0, 4.0, 16.0])).double(), YES, ONES, generator)
    assert first.alpha.tolist() == pytest.approx([1 / 3] * 3) and first.norms.tolist() == [1, 2, 4]
    assert first.coefficients(options, YES, ONES).tolist() == pytest.approx([7 / 9, 7 / 18, 7 / 36])
    some = torch.tensor([True, True, False])
    second = first.refresh(options, torch.diag(torch.tensor([1.0, 1.0, 0.0])).double(), some, ONES, generator)
    assert second.alpha.tolist() == pytest.approx([1 / 3] * 3) and second.norms.tolist() == pytest.approx([1, 1.7, 4])
    assert second.coefficients(options, some, ONES).tolist() == pytest.approx([1.35 / 2, 1.35 / 2 / 1.7, 0])
    assert second.coefficients(options, ~YES, ONES).tolist() == [0, 0, 0]


def test_the_first_measurement_is_taken_whole_and_later_ones_in_part():
    """Unit gradients g_0 = g_1, g_2 orthogonal: alpha 1/4, 1/4, 1/2; then all orthogonal: 0.7 of that and 0.3 of a third."""
    twins = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.float64)
    first = Weights.new(3).refresh(Marble(), twins, YES, ONES, torch.Generator())
    assert first.alpha.tolist() == pytest.approx([0.25, 0.25, 0.5], abs=1e-5)
    second = first.refresh(Marble(), torch.eye(3).double(), YES, ONES, torch.Generator())
    assert second.alpha.tolist() == pytest.approx([0.275, 0.275, 0.45], abs=1e-5)


def test_a_vanishing_gradient_counts_as_absent():
    G = torch.diag(torch.tensor([1.0, 0.0, 4.0])).double()
    state = Weights.new(3).refresh(Marble(), G, YES, ONES, torch.Generator())
    assert state.alpha.tolist() == pytest.approx([1 / 3] * 3) and state.norms[1].isnan()
    u = state.coefficients(Marble(), YES, ONES, G.diagonal().sqrt())
    assert u.tolist() == pytest.approx([0.75, 0, 0.375])  # one half each, mean norm 1.5


@pytest.mark.parametrize(("options", "ratio"), [(Marble(), 3.0), (Equal(), None)])
def test_a_weight_is_the_progress_that_a_reward_asks_for(options, ratio):
    """MARBLE: weight 3 gives three times the product with the unit gradient. Equal: three times the gradient. Scale-free."""
    g = vectors(3, 8, 0)
    weights = torch.tensor([1.0, 3.0, 1.0])
    state = Weights.new(3).refresh(options, gram(g), YES, weights, torch.Generator())
    u = state.coefficients(options, YES, weights, gram(g).diagonal().sqrt())
    products = (u @ g) @ (g / g.norm(dim=1, keepdim=True)).T
    if ratio:
        assert (state.alpha > 0.01).all()
        assert (products / products[0]).tolist() == pytest.approx([1, 3, 1], rel=1e-3)
    else:
        assert (u * g.norm(dim=1) / (u[0] * g[0].norm())).tolist() == pytest.approx([1, 3, 1])
    again = Weights.new(3).refresh(options, gram(g), YES, 10 * weights, torch.Generator())
    assert torch.allclose(again.coefficients(options, YES, 10 * weights, gram(g).diagonal().sqrt()), u)


def test_lengths_matter_without_normalisation():
    """K = 2, orthogonal, lengths 1 and 2: alpha = (4/5, 1/5), which favours the short one; u = alpha."""
    options = Marble(normalize=False, ridge=1e-12)
    G, two = torch.diag(torch.tensor([1.0, 4.0])).double(), torch.ones(2)
    state = Weights.new(2).refresh(options, G, two.bool(), two, torch.Generator())
    assert state.coefficients(options, two.bool(), two).tolist() == pytest.approx([0.8, 0.2])


def test_options_are_checked():
    for wrong, message in [
        ({"refresh": 0}, "refresh=0: must be positive"),
        ({"ema": 1.0}, "ema=1.0: must lie in"),
        ({"gram": "fast"}, "gram='fast': choose one of exact, lora, batch, output"),
        ({"floor": 1.5}, "floor=1.5"),
        ({"watch": -1}, "watch=-1"),
    ]:
        with pytest.raises(ValueError, match=message):
            Marble(**wrong)
    assert set(BALANCES) == {"none", "marble", "equal", "upgrad", "pcgrad", "cagrad", "torchjd"} and ways.Marble is Marble


# ------------------------------------------------------------------------------------------------ one pass for all rewards


@dataclass(frozen=True)
class Toy:
    """Values n(w) + A d(w) of one parameter each, with |A| clipped at 2."""

    n: torch.Tensor
    d: torch.Tensor
    advantage_clip: float = 2.0

    def loss(self, predict, point, advantage):
        A = advantage.clamp(-self.advantage_clip, self.advantage_clip)
        return Loss(self.n * predict**2 + A * self.d * predict, {"policy_loss": self.n + A}, penalty=self.n * 0 + predict)


def test_one_pass_has_the_gradient_of_all_rewards_together():
    """By hand at w = 1: n_i' = 2 n_i, d_i' = d_i. Reward 0 scores all 3 samples, reward 1 the first two of N_1 = 4 elsewhere too.

    A = (1, 3 -> clipped to 2, -1), (-1, 0.5, NaN); u = (2, 5):
    2 / 3 (2 n_0 + d_0 + 2 n_1 + 2 d_1 + 2 n_2 - d_2) + 5 / 4 (2 n_0 - d_0 + 2 n_1 + d_1 / 2), as a mean over 3 rows times 3.
    """
    n, d = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 4.0])
    w = torch.ones(3, requires_grad=True)
    advantage = torch.tensor([[1.0, -1.0], [3.0, 0.5], [-1.0, NAN]])
    loss = mixed(Toy(n, d), w, None, advantage, torch.tensor([2.0, 5.0]), torch.tensor([3.0, 4.0]), rows=3)
    (got,) = torch.autograd.grad(loss.values.sum() / 3, w)
    a = 2 / 3 * (2 * n + torch.tensor([1.0, 2, -1]) * d)
    b = 5 / 4 * (2 * n + torch.tensor([-1.0, 0.5, 0]) * d) * torch.tensor([1.0, 1, 0])
    assert torch.allclose(got, a + b)
    assert loss.penalty is not None and torch.equal(loss.penalty, w)
    small = mixed(Toy(n, d, 0.25), w, None, advantage, torch.tensor([2.0, 5.0]), torch.tensor([3.0, 4.0]), rows=3)
    (got,) = torch.autograd.grad(small.values.sum() / 3, w)
    a = 2 / 3 * (2 * n + torch.tensor([0.25, 0.25, -0.25]) * d)
    b = 5 / 4 * (2 * n + torch.tensor([-0.25, 0.25, 0]) * d) * torch.tensor([1.0, 1, 0])
    assert torch.allclose(got, a + b)


def test_products_at_the_output_are_those_of_the_advantages():
    """Where every d_i has length 1 and n = 0, the products are sums of A_ik A_il over N_k N_l."""
    A = torch.tensor([[1.0, -1], [2, 0.5], [-1, 1]])
    q = torch.nn.functional.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    products = output_gram([(q, A.T)], torch.tensor([3.0, 2.0]))
    assert torch.allclose(products, (A.T @ A / torch.tensor([[9.0, 6], [6, 4]])).double(), atol=1e-6)


# ------------------------------------------------------------------------------------------------ in the loop


def red(images, prompts):
    return (images[..., 0, :, :] - images[..., 1, :, :]).flatten(1).mean(1)


def rough(images, prompts):
    return (images[..., 1:] - images[..., :-1]).abs().flatten(1).mean(1)


def not_everywhere(images, prompts):
    """Green, where the prompt says nothing of blue."""
    return [None if "blue" in p else float(image[..., 1, :, :].mean()) for image, p in zip(images, prompts, strict=True)]


REWARDS = {"red": red, "rough": rough, "some": not_everywhere}


def make(recipe, place, *overrides: str, name: str = "sd3", guided: bool = False, rewards=None) -> Trainer:
    """2 prompts x 4 pictures, three rewards, one of which abstains on one prompt."""
    policy = Policy(tiny(name), {**CALL[name], **(GUIDED[name] if guided else {})})
    options = [f"output_dir={place}/run", "num_generations=4", "learning_rate=1e-2", "times.count=2", *overrides]
    return Trainer(load_recipe(recipe, options), policy=policy, rewards=rewards or REWARDS, prompts=["a red circle", "blue"])


def drift(trainer: Trainer, scale: float) -> None:
    """Move the policy away from what it sampled with."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainer.policy.trainable().values():
            p.add_(scale * torch.randn(p.shape, generator=generator))


def gradient(trainer: Trainer, batches, advantage) -> tuple[torch.Tensor, dict]:
    """What an update would step along; no step is taken."""
    found = []

    def look() -> float:
        found.append(flat(trainer))
        for p in trainer.policy.trainable().values():
            p.grad = None
        trainer.progress.updates += 1
        return 0.0

    trainer.apply = look
    metrics = trainer.update(batches, advantage)
    (g,) = found
    return g, metrics


def flat(trainer: Trainer) -> torch.Tensor:
    parameters = trainer.policy.trainable().values()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]).detach().clone()


def by_hand(trainer: Trainer, batches) -> tuple[torch.Tensor, torch.Tensor]:
    """(K, P) gradients: of the mean of the objective's values over the samples that each reward scores; (P,) the penalty's."""
    parameters = list(trainer.policy.trainable().values())

    def of(total) -> torch.Tensor:
        found = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    rows = []
    for k in range(3):
        values = []
        for batch in batches:
            predict = trainer.predict(batch)
            for point, _ in trainer.points(batch):
                advantage = batch.each[:, k]
                loss = trainer.objective.loss(predict, point, advantage.nan_to_num(0.0))
                values.append(loss.values[~advantage.isnan()])
        rows.append(of(torch.cat(values).mean()))
    penalties = [
        trainer.objective.loss(predict, point, torch.zeros(len(batch))).penalty
        for batch in batches
        for predict in [trainer.predict(batch)]
        for point, _ in trainer.points(batch)
    ]
    return torch.stack(rows), of(torch.cat(penalties).mean()) if penalties[0] is not None else torch.zeros(rows[0].shape)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


#: objective, whether the policy has moved since it sampled, by how much.
CASES = {
    "nft": ("objective={name: nft, kl: 0.1}", 0.0),
    "nft-moved": ("objective={name: nft, kl: 0.1}", 0.1),
    "grpo": ("objective={name: grpo, beta: 0.1}", 0.0),
    "awm": ("objective={name: awm, beta: 0.1}", 0.0),
    "awm-moved": ("objective={name: awm, beta: 0.1}", 0.1),
}


@pytest.mark.parametrize("case", CASES)
def test_one_pass_and_the_lora_give_what_a_pass_for_each_reward_gives(recipe, tmp_path, case):
    """The combined gradient by hand, in three ways: K passes, per-sample gradients at the LoRA, and one pass with the weights of
    the last measurement; in two batches, with a reward that abstains on one of two prompts (N_k = 8, 8, 4)."""
    objective, scale = CASES[case]
    trainer = make(recipe, tmp_path, objective, "batch_size=4", "balance={name: marble, refresh: 2, ema: 0}")
    batches, _, _, advantage, _ = trainer.collect(_Clock())
    assert torch.cat([b.each for b in batches]).isnan().sum(0).tolist() == [0, 0, 4]
    drift(trainer, scale)
    g, penalty = by_hand(trainer, batches)
    norms = g.norm(dim=1).double()
    alpha = min_norm(gram(g / norms.unsqueeze(1)))
    expected = (alpha * norms.mean() / norms).float() @ g + penalty
    exact, metrics = gradient(trainer, batches, advantage)
    assert relative(exact, expected) < 1e-5
    assert [metrics[f"balance/{name}/weight"] for name in REWARDS] == pytest.approx(alpha.tolist(), abs=1e-4)
    assert [metrics[f"balance/{name}/norm"] for name in REWARDS] == pytest.approx(norms.tolist(), rel=1e-4)
    cosines = torch.nn.functional.cosine_similarity(g, expected.unsqueeze(0))
    assert [metrics[f"balance/{name}/cosine"] for name in REWARDS] == pytest.approx(cosines.tolist(), abs=1e-4)
    assert metrics["balance/worst_cosine"] == pytest.approx(float(cosines.min()), abs=1e-4)

    again, between = gradient(trainer, batches, advantage)
    assert relative(again, expected) < 1e-5
    assert not any(name.startswith("balance/") for name in between)
    for name in ("policy_loss", "kl"):
        assert between[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5)

    trainer.balancing.options = Marble(refresh=1, ema=0, gram="lora")
    assert relative(gradient(trainer, batches, advantage)[0], expected) < 1e-5
    trainer.balancing.options = Marble(refresh=1, ema=0, gram="output")
    proxy, metrics = gradient(trainer, batches, advantage)
    found = [metrics[f"balance/{name}/weight"] for name in REWARDS]
    assert sum(found) == pytest.approx(1) and min(found) >= 0
    assert torch.nn.functional.cosine_similarity(proxy, expected, dim=0) > 0.5


def test_the_released_shortcut_is_another_gradient(recipe, tmp_path):
    """Advantages mixed with alpha, abstentions as 0, divided by N: what the identity above replaces."""
    trainer = make(recipe, tmp_path, "objective={name: nft, kl: 0}", "balance={name: marble, refresh: 1}")
    batches, _, _, advantage, _ = trainer.collect(_Clock())
    exact, metrics = gradient(trainer, batches, advantage)
    alpha = torch.tensor([metrics[f"balance/{name}/weight"] for name in REWARDS])
    trainer.balancing = None
    mixture = torch.cat([(batch.each.nan_to_num(0.0) * alpha).sum(1) for batch in batches])
    assert relative(gradient(trainer, batches, mixture)[0], exact) > 0.1


def test_a_moved_grpo_clips_the_mixed_advantage_by_its_own_sign(recipe, tmp_path):
    """Off-policy and clipped: K passes and per-sample gradients agree; one pass is what the mixed advantage itself would give."""
    trainer = make(recipe, tmp_path, "objective={name: grpo, epsilon: 1e-3}", "balance={name: marble, refresh: 2, ema: 0}")
    batches, _, _, advantage, _ = trainer.collect(_Clock())
    drift(trainer, 3e-3)
    exact, metrics = gradient(trainer, batches, advantage)
    assert 0.1 < metrics["clip_ratio"] < 1
    once, _ = gradient(trainer, batches, advantage)
    state = trainer.balancing.state
    u = state.coefficients(trainer.balancing.options, YES, ONES)
    each = torch.cat([batch.each for batch in batches])
    a = (each.nan_to_num(0.0) * (u / torch.tensor([8.0, 8.0, 4.0])).float()).sum(1) * 8
    trainer.balancing.options = Marble(refresh=1, ema=0, gram="lora")
    assert relative(gradient(trainer, batches, advantage)[0], exact) < 1e-5
    trainer.balancing = None
    assert relative(gradient(trainer, batches, a)[0], once) < 1e-5 < 0.01 < relative(once, exact)


@pytest.mark.parametrize(
    ("name", "guided", "options"),
    [("sd15", True, []), ("wan", False, []), ("flux", False, []), ("sd3", True, ["gradient_checkpointing=true"])],
)
def test_the_lora_way_on_every_family(recipe, tmp_path, name, guided, options):
    """UNet and transformer with guidance (two rows a sample), clips, packed latents, checkpointing: as a pass for each reward."""
    options = ["objective={name: nft, kl: 0.1}", "balance={name: marble, refresh: 1}", *options]
    trainer = make(recipe, tmp_path, *options, name=name, guided=guided)
    batches, _, _, advantage, _ = trainer.collect(_Clock())
    drift(trainer, 0.05)
    exact, _ = gradient(trainer, batches, advantage)
    trainer.balancing.state = Weights.new(3)
    trainer.balancing.options = Marble(refresh=1, gram="lora")
    found, metrics = gradient(trainer, batches, advantage)
    assert relative(found, exact) < 1e-5 and metrics["balance/red/norm"] > 0


def test_groups_are_balanced_too(recipe, tmp_path):
    """An objective with one loss for a group, by a pass for each reward; groups on which one abstains are not in its mean."""
    trainer = make(recipe, tmp_path, "objective=dgpo", "batch_size=4", "balance={name: marble, refresh: 1}")
    metrics = trainer.step()
    assert metrics["balance/some/norm"] > 0 and metrics["grad_norm"] > 0
    assert metrics["balance/worst_cosine"] > -1e-3


@pytest.mark.parametrize(
    "how", ["equal", "upgrad", "pcgrad", "cagrad", "{name: marble, gram: batch}", "{name: marble, floor: 0.3}"]
)
def test_every_way_of_balancing_trains(recipe, tmp_path, how):
    trainer = make(recipe, tmp_path, "objective={name: nft, kl: 0}", "batch_size=4", f"balance={how}", "balance.refresh=2")
    before = {key: p.detach().clone() for key, p in trainer.policy.trainable().items()}
    measured, between = trainer.step(), trainer.step()
    assert any(not torch.equal(before[key], p) for key, p in trainer.policy.trainable().items())
    assert measured["balance/red/weight"] > 0 and "balance/red/weight" not in between
    assert all(value == value for value in [*measured.values(), *between.values()])
    assert between["grad_norm"] > 0
    if how != "{name: marble, gram: batch}":
        assert measured["balance/worst_cosine"] > (-1 if how in ("equal", "cagrad") else -1e-3)
    if "floor" in how:
        assert min(measured[f"balance/{name}/weight"] for name in REWARDS) >= 0.1 - 1e-9


def test_marble_agrees_with_every_reward_where_the_sum_does_not(recipe, tmp_path):
    """Three rewards that say the same, and one against them: the sum leaves it behind, MARBLE has no negative cosine."""
    rewards = {
        **{f"red{k}": red for k in range(3)},
        "blue": lambda images, prompts: rough(images, prompts) - red(images, prompts),
    }
    worst = {}
    for how in ("none", "marble"):
        options = [f"balance={{name: {how}, watch: 1}}", "objective={name: nft, kl: 0}", "aggregation=normalize_then_sum"]
        worst[how] = make(recipe, tmp_path / how, *options, rewards=rewards).step()["balance/worst_cosine"]
    assert worst["none"] < -0.1 and worst["marble"] > -1e-4


def test_watching_changes_nothing(recipe, tmp_path):
    """Weights after two steps with two updates each are the same to the bit, watched or not; of one reward the cosine is 1."""
    runs = {}
    for watch in (0, 1, 2):
        trainer = make(
            recipe, tmp_path / str(watch), f"balance={{name: none, watch: {watch}}}", "updates_per_step=2", "batch_size=4"
        )
        metrics = [trainer.step(), trainer.step()]
        assert ["balance/worst_cosine" in row for row in metrics] == [watch > 0] * 2
        runs[watch] = trainer.policy.trainable()
    for watch in (1, 2):
        assert all(torch.equal(runs[0][key], runs[watch][key]) for key in runs[0])
    alone = make(
        recipe, tmp_path / "alone", "balance={name: none, watch: 1}", "objective={name: nft, kl: 0}", rewards={"red": red}
    )
    assert alone.step()["balance/red/cosine"] == pytest.approx(1, abs=1e-6)


def test_a_reward_of_weight_0_is_watched_and_not_trained(recipe, tmp_path):
    """Its gradient is measured, its weight in the update is 0, and a negative weight turns a reward round."""
    options = ["balance={name: marble, refresh: 1}", "objective={name: nft, kl: 0}", "rewards.rough=0", "rewards.red=-1"]
    metrics = make(recipe, tmp_path, *options).step()
    assert metrics["balance/rough/weight"] == pytest.approx(1 / 3)  # as at first: never asked
    assert abs(metrics["balance/rough/cosine"]) < 1 and metrics["balance/red/cosine"] > 0
    two = make(recipe, tmp_path / "two", *options[:2], "rewards.red=-1", rewards={"red": red, "some": not_everywhere}).step()
    assert two["balance/red/cosine"] == pytest.approx(metrics["balance/red/cosine"], abs=1e-5)


def test_without_signal_nothing_changes(recipe, tmp_path):
    """All rewards equal: no gradient of any, and nothing moves; when one speaks up, it is measured at once."""
    loud = []
    rewards = {name: lambda images, prompts: red(images, prompts) if loud else torch.zeros(8) for name in ("a", "b")}
    trainer = make(
        recipe, tmp_path, "checks=false", "balance={name: marble, refresh: 5}", "objective={name: grpo}", rewards=rewards
    )
    before = {key: p.detach().clone() for key, p in trainer.policy.trainable().items()}
    assert trainer.step()["grad_norm"] == 0
    assert all(torch.equal(before[key], p) for key, p in trainer.policy.trainable().items())
    loud.append(True)
    metrics = trainer.step()
    assert metrics["grad_norm"] > 0 and metrics["balance/a/weight"] == pytest.approx(0.5, abs=1e-3)


def test_resuming_is_bit_for_bit(recipe, tmp_path):
    """5 steps at once, and 2 + 1 + 2: weights, norms and the place between two measurements are kept."""
    options = ["balance={name: marble, refresh: 3}", "objective={name: nft, kl: 0}"]

    def run(place, steps, *more):
        return make(recipe, tmp_path / place, *options, f"max_steps={steps}", *more).train()

    whole = run("whole", 5)
    pieces = run("pieces", 2)
    for steps in (3, 5):
        run("pieces", steps, "resume_from_checkpoint=latest")
    a, b = (load_file(folder / LORA_FILE) for folder in (whole, pieces))
    assert all(torch.equal(a[key], b[key]) for key in a)
    rows = [
        [{k: v for k, v in row.items() if not k.endswith(("_time", "memory_gb"))} for row in read_metrics(f)]
        for f in (whole, pieces)
    ]
    assert rows[0] == rows[1]
    assert ["balance/red/weight" in row for row in rows[0]] == [True, False, False, True, False]
    with pytest.raises(ConfigError, match="the checkpoint balances red, rough, some, this recipe red: start a new run"):
        make(recipe, tmp_path / "pieces", *options, "max_steps=6", "resume_from_checkpoint=latest", rewards={"red": red})


def test_a_broken_gradient_is_refused_by_name(recipe, tmp_path):
    trainer = make(recipe, tmp_path, "balance={name: marble, refresh: 1}", "objective={name: nft, kl: 0}")
    batches, _, _, advantage, _ = trainer.collect(_Clock())
    mark = batches[0].each[0, 1]

    class Broken(NFT):
        def loss(self, predict, noised, advantage):
            loss = super().loss(predict, noised, advantage)
            return Loss(loss.values * (torch.inf if advantage[0] == mark else 1.0), loss.metrics)

    trainer.objective = Broken(kl=0)
    with pytest.raises(RuntimeError, match="the gradient of rough in update 1 is not finite"):
        trainer.update(batches, advantage)


def test_what_cannot_be_balanced_is_refused(recipe, tmp_path):
    for options, message in [
        (["balance=marble", "objective=dgpo"], "dgpo is not affine .* balance.gram=exact balance.refresh=1"),
        (
            ["balance={name: none, watch: 1, gram: lora}", "objective=dgpo"],
            "use balance.gram=exact$",
        ),
        (["balance=marble", "objective=dpo"], "dpo does not learn from every sample by its advantage"),
        (["balance=marble", "constraints={red: 0.5}"], "use balance=none with constraints"),
        (["balance={name: marble, gram: lora}", "branches=[2]"], "samples that share no state: use balance.gram=exact"),
        (["balance={name: marble, gram: lora}", "train=full"], "wants a LoRA"),
        (["balance=marble", "rewards={red: 0, rough: 0, some: 0}"], "every reward has weight 0"),
        (["balance={name: marble, reward: 1}"], "unknown balance option 'reward'"),
        (["balance=mable"], "did you mean marble"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make(recipe, tmp_path, *options)
    assert GRPO().needs.affine and AWM().needs.affine and not PCGrad().watch
