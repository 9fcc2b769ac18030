"""The rewards' gradients in the loop: measured, balanced, watched, over all processes. `flowrl.train.balance` is the theory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowrl.batch import Point, Samples
from flowrl.config import ConfigError, Recipe, build
from flowrl.data import sample_seed
from flowrl.train.affine import mixed, output_gradients, output_gram
from flowrl.train.balance import BALANCES, Unbalanced, Weights
from flowrl.train.gram import gram
from flowrl.train.per_sample import LinearTape
from flowrl.train.preflight import CheckFailed

if TYPE_CHECKING:
    from flowrl.train.trainer import Trainer

Parts = Sequence[tuple[Samples, Tensor]]


class Balancing:
    """What becomes of the rewards' gradients in each update of a run.

    names, weights: (K,) the rewards. weights: their own, whose sign the advantages (`Samples.each`) already carry.
    """

    def __init__(self, options: Any, names: Sequence[str], weights: Tensor):
        self.options, self.names, self.reward_weights = options, list(names), weights.double()
        self.state = Weights.new(len(self.names))
        self.tape: LinearTape | None = None

    @classmethod
    def of(cls, recipe: Recipe, objective: Any, weights: Mapping[str, float]) -> Balancing | None:
        """None where gradients are neither balanced nor watched. Raises ConfigError for what cannot go together."""
        options = build(recipe.balance, BALANCES, "balance")
        name, method = recipe.balance["name"], recipe.objective["name"]
        plain = isinstance(options, Unbalanced)
        if plain and not options.watch:
            return None
        if recipe.data or not objective.needs.rewards or objective.needs.points == "nodes" or hasattr(objective, "choose"):
            raise ConfigError(
                f"balance={name}: {method} does not learn from every sample by its advantage, so there is no gradient for each "
                "reward: use balance=none"
            )
        if not plain and recipe.constraints:
            raise ConfigError(f"balance={name}: constraints weigh advantages, not gradients: use balance=none with constraints")
        if not plain and not any(weights.values()):
            raise ConfigError(f"balance={name}: every reward has weight 0")
        affine = objective.needs.affine and objective.needs.unit == "sample"
        if not affine and (options.gram != "exact" or getattr(options, "refresh", 1) > 1):
            raise ConfigError(
                f"balance={name}: the loss of {method} is not affine in the advantage of a sample, so that one backward pass "
                f"cannot serve several rewards: use balance.gram=exact{'' if plain else ' balance.refresh=1'}"
            )
        if options.gram == "lora" and (recipe.train == "full" or recipe.branches):
            raise ConfigError("balance.gram=lora wants a LoRA, and samples that share no state: use balance.gram=exact")
        return cls(options, list(weights), torch.tensor(list(weights.values())))

    def state_dict(self) -> dict[str, Any]:
        return {"names": self.names, **self.state.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError where the state is of other rewards."""
        names = state["names"]
        if names != self.names:
            raise ConfigError(f"the checkpoint balances {', '.join(names)}, this recipe {', '.join(self.names)}: start a new run")
        self.state = Weights(**{key: value for key, value in state.items() if key != "names"})

    # ------------------------------------------------------------------------------------------------ one update

    def backward(self, trainer: Trainer, parts: Parts, gathered: Any, rows: int) -> dict[str, float]:
        """Leave the gradient of one update in the parameters, to be summed over processes; returns what was measured.

        parts: the update's batches, with their advantages (n,) for all rewards together and `each` for every one.
        """
        options, watch = self.options, self.options.watch
        watched = watch > 0 and trainer.progress.updates % watch == 0
        if isinstance(options, Unbalanced):
            for batch, advantage in parts:
                trainer.backward(batch, advantage, gathered, rows)
            return self._cosines(trainer, parts, rows) if watched else {}
        counts, present = self._present(trainer, parts)
        due = self.state.since >= options.refresh or bool((present & self.state.norms.isnan()).any())
        if due and options.gram in ("exact", "lora"):
            gradients = self.gradients(trainer, parts, rows, gathered)
            products = gram(gradients)
            self._refresh(trainer, products[:-1, :-1], present)
            u = self.state.coefficients(options, present, self.reward_weights, products.diagonal()[:-1].sqrt())
            self._put(trainer, u, gradients)
            u = torch.cat([u, torch.ones(1, dtype=u.dtype)])
            length = (u @ products @ u).clamp(min=0).sqrt()
            cosines = (products @ u)[:-1] / (length * products.diagonal()[:-1].sqrt())
            return {**self._measured(), **self._named("cosine", cosines), **self._worst(cosines)}
        metrics = {}
        if due:
            self._refresh(trainer, self._products(trainer, parts, rows, counts), present)
            metrics = self._measured()
        else:
            self.state.since += 1
        u = self.state.coefficients(options, present, self.reward_weights)
        for batch, _ in parts:
            assert batch.each is not None
            loss_of = partial(mixed, trainer.objective, u=u, counts=counts, rows=rows)
            trainer.backward(batch, batch.each, gathered, rows, loss_of)
        return {**metrics, **(self._cosines(trainer, parts, rows) if watched else {})}

    def _present(self, trainer: Trainer, parts: Parts) -> tuple[Tensor, Tensor]:
        """(K,) the samples of the update that each reward scores, and whether it tells any of them apart and has a weight."""
        each = torch.cat([batch.each for batch, _ in parts if batch.each is not None])
        found = torch.stack([(~each.isnan()).sum(0), (each.nan_to_num(0.0) != 0).sum(0)]).float()
        counts, telling = self._sum(trainer, found.to(trainer.accelerator.device)).cpu()
        return counts, (telling > 0) & (self.reward_weights != 0)

    def _refresh(self, trainer: Trainer, products: Tensor, present: Tensor) -> None:
        generator = torch.Generator().manual_seed(sample_seed(trainer.recipe.seed, trainer.progress.updates))
        self.state = self.state.refresh(self.options, products, present, self.reward_weights, generator)
        if trainer.world > 1:
            from accelerate.utils import broadcast_object_list

            self.state = Weights(**broadcast_object_list([self.state.state_dict()])[0])

    def _put(self, trainer: Trainer, u: Tensor, gradients: Tensor) -> None:
        """The combined gradient into the first process' parameters; the others add nothing to the sum."""
        u = torch.cat([u, torch.ones(1, dtype=u.dtype)]).to(gradients)
        parameters = list(trainer.policy.trainable().values())
        combined = (u @ gradients).split([p.numel() for p in parameters])
        for p, touched, gradient in zip(parameters, self.touched, combined, strict=True):
            p.grad = gradient.view_as(p) if touched and trainer.is_main else None

    # ------------------------------------------------------------------------------------------------ measuring

    def gradients(self, trainer: Trainer, parts: Parts, rows: int, gathered: Any = None, first: bool = False) -> Tensor:
        """(K + 1, P) fp32, over all processes: every reward's gradient of the update, and the penalty's. Leaves p.grad alone.

        first: of the first batch and point alone. Raises CheckFailed where one is not finite.
        """
        sums = _Sums.new(list(trainer.policy.trainable().values()), len(self.names))
        add = self._add_lora if self.options.gram == "lora" else self._add_exact
        for batch, predict, point, count in self._points(trainer, parts, first):
            assert batch.each is not None
            each = batch.each.to(sums.flat.device)
            metrics = add(trainer, predict, point, each, sums, 1 / count, 1 / (rows * count))
            for found in metrics if gathered is not None else ():
                gathered.add(found, point.t)
        flat, seen, touched = (self._sum(trainer, values) for values in (sums.flat, sums.seen, sums.touched))
        flat[:-1] /= seen.clamp(min=1e-12).unsqueeze(1)
        self.touched = (touched > 0).tolist()
        for name, finite in zip([*self.names, "the penalty"], flat.isfinite().all(1).tolist(), strict=True):
            if not finite:
                raise CheckFailed(
                    f"the gradient of {name} in update {trainer.progress.updates + 1} is not finite: lower learning_rate or use "
                    "autocast=bfloat16"
                )
        return flat

    def _points(self, trainer: Trainer, parts: Parts, first: bool = False) -> Iterator[tuple[Samples, Any, Point, int]]:
        for batch, _ in parts[:1] if first else parts:
            predict = trainer.predict(batch)
            for point, count in trainer.points(batch):
                yield batch, predict, point, count
                predict.forget()
                if first:
                    break

    def _add_exact(
        self, trainer: Trainer, predict: Any, point: Point, each: Tensor, sums: _Sums, share: float, penalty_share: float
    ) -> list[Mapping[str, Any]]:
        """A backward pass for each reward, and one for the penalty. Returns the metrics of each."""
        parameters = list(trainer.policy.trainable().values())

        def add(row: int, total: Tensor) -> None:
            for place, found in enumerate(torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)):
                if found is not None:
                    sums.into[place][row] += found
                    sums.touched[place] = 1

        metrics = []
        for k, advantage in enumerate(each.unbind(1)):
            loss = trainer.objective.loss(predict, point, advantage.nan_to_num(0.0))
            n = len(loss.values)
            valid = ~advantage.isnan().view(n, -1).all(1)
            sums.seen[k] += valid.sum() * share
            if valid.any():
                add(k, torch.where(valid, loss.values, 0.0).sum() * share)
            if k == 0 and loss.penalty is not None:
                add(len(self.names), loss.penalty.sum() * (len(each) / n * penalty_share))
            metrics.append(loss.metrics)
        return metrics

    def _add_lora(
        self, trainer: Trainer, predict: Any, point: Point, each: Tensor, sums: _Sums, share: float, penalty_share: float
    ) -> list[Mapping[str, Any]]:
        """The same from the samples' own gradients at the LoRA layers."""
        if self.tape is None:
            self.tape = LinearTape(list(trainer.policy.denoisers.values()), trainer.policy.trainable())
        with self.tape.recording():
            predict(point)
        v, pairs, loss = output_gradients(trainer.objective, predict, point, each)
        none = each.new_zeros(1, len(each))
        pairs = [(q, torch.cat([factors * share, none])) for q, factors in pairs]
        if loss.penalty is not None:
            (q,) = torch.autograd.grad(loss.penalty.sum(), v, retain_graph=True)
            pairs.append((q, torch.cat([none.expand(len(self.names), -1), none + penalty_share])))
        for q, factors in pairs:
            sums.touched[sorted(self.tape.add(sums.into, v, q, factors))] = 1
        sums.seen += (~each.isnan()).sum(0) * share
        return [loss.metrics]

    def _products(self, trainer: Trainer, parts: Parts, rows: int, counts: Tensor) -> Tensor:
        """(K, K) products of the gradients, measured at less than the whole update."""
        if self.options.gram == "batch":
            return gram(self.gradients(trainer, parts, rows, first=True)[:-1])
        total = torch.zeros(len(self.names), len(self.names), dtype=torch.float64)
        for batch, predict, point, count in self._points(trainer, parts):
            assert batch.each is not None
            _, pairs, _ = output_gradients(trainer.objective, predict, point, batch.each.to(trainer.policy.device))
            total += output_gram(pairs, counts) / count**2
        return self._sum(trainer, total.to(trainer.policy.device)).cpu()

    def _sum(self, trainer: Trainer, values: Tensor) -> Tensor:
        return trainer.accelerator.reduce(values, "sum") if trainer.world > 1 else values

    # ------------------------------------------------------------------------------------------------ what is logged

    def _cosines(self, trainer: Trainer, parts: Parts, rows: int) -> dict[str, float]:
        """Of every reward's gradient with the one that is in the parameters. Changes nothing."""
        parameters = list(trainer.policy.trainable().values())
        update = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
        update = self._sum(trainer, update).unsqueeze(0)
        gradients = self.gradients(trainer, parts, rows)[:-1]
        norms = torch.stack([row.double().norm() for row in gradients]).cpu()
        cosines = gram(gradients, update).squeeze(1) / (norms * update.double().norm().cpu())
        return {**self._named("norm", norms), **self._named("cosine", cosines), **self._worst(cosines)}

    def _measured(self) -> dict[str, float]:
        return {**self._named("weight", self.state.alpha), **self._named("norm", self.state.norms)}

    def _named(self, what: str, values: Tensor) -> dict[str, float]:
        """Those that are known, by the reward's name."""
        found = zip(self.names, values.tolist(), strict=True)
        return {f"balance/{name}/{what}": value for name, value in found if value == value}

    def _worst(self, cosines: Tensor) -> dict[str, float]:
        """The smallest cosine of the rewards that have a weight and a gradient."""
        known = cosines[(self.reward_weights != 0) & cosines.isfinite()]
        return {"balance/worst_cosine": float(known.min())} if len(known) else {}


@dataclass
class _Sums:
    """Gradients of the K rewards, and of the penalty last, as they add up.

    flat: (K + 1, P). into: the same memory, (K + 1, ...) for each parameter. seen: (K,) samples. touched: which parameters have
    a gradient at all.
    """

    flat: Tensor
    into: list[Tensor]
    seen: Tensor
    touched: Tensor

    @classmethod
    def new(cls, parameters: Sequence[Tensor], K: int) -> _Sums:
        sizes, device = [p.numel() for p in parameters], parameters[0].device
        flat = torch.zeros(K + 1, sum(sizes), device=device)
        into = [part.view(K + 1, *p.shape) for part, p in zip(flat.split(sizes, 1), parameters, strict=True)]
        return cls(flat, into, torch.zeros(K, device=device), torch.zeros(len(sizes), device=device))


def over_updates(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    """A step's metrics from those of its updates: means, and the worst of the worst cosines."""
    values: dict[str, list[float]] = {}
    for metrics in measured:
        for name, value in metrics.items():
            values.setdefault(name, []).append(value)
    return {name: min(v) if name.endswith("worst_cosine") else sum(v) / len(v) for name, v in values.items()}
