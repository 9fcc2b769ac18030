"""The loop: prompts -> rollout -> score -> advantages -> objective -> update -> record. Written once, for every objective.

Everything random is a function of (seed, step, prompt, generation), so a run can be stopped, resumed or spread over processes
without changing what it computes. Gradients are summed over processes by hand: a pipeline calls its denoiser through
attributes that a DistributedDataParallel wrapper would hide.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from flowrl import record
from flowrl.batch import Noised, Point, Prompt, Samples, Step, concatenate
from flowrl.clips import check_form
from flowrl.conditions import check_conditions
from flowrl.config import ConfigError, Plan, Recipe, build, unknown
from flowrl.data import even_order, generators, load_prompts, prompt_order, sample_seed
from flowrl.evaluate import Protocol, evaluate
from flowrl.model_facts import ModelFacts
from flowrl.policy import LORA_FILE, Policy, resolve_model
from flowrl.references import attach, references_of
from flowrl.reward_models.base import LearningReward, MapReward, ProcessReward, Reward, load_rewards, parts_of, traits_of
from flowrl.reward_models.maps import latent_grid, to_grid
from flowrl.samplers import GLASS, SCHEDULES, TIMES, TRANSITIONS, Transition
from flowrl.samplers.branching import branched_rollout, tree_seeds
from flowrl.samplers.schedules import Late, Spread, Times
from flowrl.samplers.steering.euphonium import Euphonium, guided_rollout
from flowrl.train import preflight
from flowrl.train.advantages import Scaling, advantages, group_mean_std, normalized, weighted_sum, zero_variance_share
from flowrl.train.balancing import Balancing, over_updates
from flowrl.train.constraints import Constraints
from flowrl.train.loop_habits import Interrupts, in_any_process, lr_factor, print_rows, reduce_gradients, trackers, wind_up
from flowrl.train.objectives import OBJECTIVES
from flowrl.train.objectives.base import Needs
from flowrl.train.offline import Data
from flowrl.train.predict import PolicyPredict
from flowrl.train.scoring import Scoring
from flowrl.train.watch import Watch


class Trainer:
    """One run of a recipe.

        Trainer(load_recipe("quickstart", ["max_steps=50"])).train()

    rewards: functions or Reward objects by name, in place of the recipe's (their weights: the recipe's, else 1).
    prompts: a list in place of the recipe's file. policy: a loaded Policy in place of the recipe's model.
    hooks: called after each step as hook(trainer, step, metrics).
    Raises ConfigError, before any weight is loaded, for options that cannot work.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        rewards: dict[str, Any] | None = None,
        prompts: Sequence[str | Prompt] | None = None,
        policy: Policy | None = None,
        hooks: Sequence[record.Hook] = (),
    ):
        from accelerate import Accelerator

        self.recipe = recipe
        self.objective, self.transition, self.schedule, trained = parts(recipe)
        self.times: Times = build(recipe.times, TIMES, "times")
        self.data = Data.load(recipe.data, self.objective.needs) if recipe.data else None
        self.prompts = (
            load_prompts(prompts if prompts is not None else recipe.prompts) if self.data is None else self.data.prompts
        )
        self.eval_prompts = load_prompts(recipe.eval_prompts) if recipe.eval_prompts else []
        given = rewards if rewards is not None else recipe.rewards
        self.rewards, self.weights = _rewards(given, recipe, beside=recipe.eval_rewards)
        held_out = _rewards(recipe.eval_rewards, recipe, "eval_rewards", beside=given)[0]
        self.eval_rewards = {**self.rewards, **held_out}
        self.watch = Watch.of(recipe, held_out, self.eval_rewards)
        self.references = _references(recipe, {**self.rewards, **self.eval_rewards})
        if recipe.confidence is not None and not hasattr(self.rewards.get(recipe.confidence), "confidence"):
            doubters = [label for label, reward in self.rewards.items() if hasattr(reward, "confidence")]
            raise ConfigError(
                f"confidence={recipe.confidence}: no reward of this run that knows its doubt; those that do: "
                f"{', '.join(doubters) or 'none; add one, as in rewards.u={name: uncertain, of: NAME} confidence=u'}"
            )
        if self.data is None and not self.rewards:
            raise ConfigError("rewards is empty: name at least one, like rewards.tiny_dense=1")
        if self.objective.needs.differentiable:
            _check_differentiable(self.rewards, recipe)
        self.process = _process_reward(self.rewards, recipe) if self.objective.needs.process else None
        self.map_reward = _map_reward(self.rewards, recipe) if self.objective.needs.maps else None
        guidance = getattr(self.objective, "guidance", None)
        self.guidance = None if guidance is None else Euphonium(**guidance)
        self.constraints = Constraints.of(recipe.constraints, self.rewards)
        if recipe.constraints and self.objective.needs.differentiable:
            raise ConfigError(f"constraints weigh advantages, and {recipe.objective['name']} climbs rewards: use grpo, nft, ...")
        self.weights.update(self.constraints.signs)
        self.weights_row = torch.tensor([self.weights[name] for name in self.rewards])
        self.best = _best(self.rewards, self.weights, recipe) if recipe.virtual_best else None
        self.balancing = Balancing.of(recipe, self.objective, self.weights)
        if recipe.prompts_per_step > len(self.prompts):
            raise ConfigError(
                f"prompts_per_step={recipe.prompts_per_step} exceeds the {len(self.prompts)} prompts of "
                f"{recipe.data or recipe.prompts}"
            )
        if recipe.prompts_by is not None and not any(recipe.prompts_by in prompt.columns for prompt in self.prompts):
            known = ", ".join(sorted({name for prompt in self.prompts for name in prompt.columns})) or "none"
            raise ConfigError(f"prompts_by={recipe.prompts_by}: no prompt has this column; columns: {known}")
        self._order(0)  # says so now if there are too few of a kind

        self.folder = Path(recipe.output_dir)
        self.accelerator = Accelerator(log_with=trackers(recipe.report_to) or None, project_dir=self.folder / "tracker")
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.plan = plan_of(recipe, self.objective, trained, self.world, None if self.data is None else self.data.rows)
        self.checkpoint = record.find_checkpoint(recipe)
        self.changed = record.check_resumable(self.checkpoint, recipe) if self.checkpoint else []
        check_form(recipe.clip_format)
        if policy is not None:
            _check_model(policy.facts, {**policy.call, **recipe.call_arguments()}, recipe, self)
        elif (facts := ModelFacts.read(resolve_model(recipe.model))) is not None:
            _check_model(facts, {**facts.call, **recipe.call_arguments()}, recipe, self)
        if policy is None:
            _check_lora(recipe.lora)
        if self.is_main:
            record.prepare_folder(self.folder, self.checkpoint)

        self.policy = policy or Policy.load(
            recipe.model,
            lora=recipe.lora,
            dtype=recipe.dtype,
            autocast=recipe.autocast,
            device=self.accelerator.device,
        )
        if recipe.attention_backend:
            try:
                self.policy.set_attention_backend(recipe.attention_backend)
            except (ValueError, RuntimeError, ImportError) as error:
                raise ConfigError(f"attention_backend={recipe.attention_backend}: {error}") from None
        decode_in_parts(self.policy, recipe.decode)
        _check_call(recipe, self.policy)
        self.policy.call.update(recipe.call_arguments())
        if recipe.fps is not None:
            self.policy.set_fps(recipe.fps)
        self._make_trainable()
        parameters = self.policy.trainable()
        self.gathering = _Metrics()  # of the update under way
        self.optimizer = torch.optim.AdamW(
            parameters.values(),
            lr=recipe.learning_rate,
            betas=(recipe.adam_beta1, recipe.adam_beta2),
            weight_decay=recipe.weight_decay,
        )
        self.copies = copies_of(self.objective.needs, recipe, self.references)
        for name in self.copies:
            self.policy.snapshot(name)
        self.progress = record.Progress()
        if self.checkpoint:
            self.restore(self.checkpoint)
        self.hooks = list(hooks)
        own = record.lies_in(self.checkpoint, self.folder)
        self.saved_at = self.progress.step if own else None  # step of the newest checkpoint in the folder
        self.finished = False  # whether train() came to its end, and not to Ctrl-C
        self._interrupts = Interrupts(self.is_main)

    # ------------------------------------------------------------------------------------------------ properties

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def learning(self) -> dict[str, LearningReward]:
        """The rewards that go on learning, those inside others too, each by a name of its own."""
        parts = [(label, i, part) for label, reward in self.rewards.items() for i, part in enumerate(parts_of(reward))]
        return {f"{label}.{i}" if i else label: part for label, i, part in parts if isinstance(part, LearningReward)}

    @property
    def keeping_state(self) -> dict[str, record.Stateful]:
        """What else a checkpoint holds, by name."""
        kept = {"constraints": self.constraints, "balance": self.balancing, "watch": self.watch}
        return {name: part for name, part in kept.items() if part is not None}

    def _make_trainable(self) -> None:
        recipe = self.recipe
        if recipe.train == "full":
            if recipe.lora:
                raise ConfigError("lora and train=full exclude each other: merge the LoRA into the model first")
            self.policy.train_all()
        elif self.policy.has_lora:
            self.policy.train_lora()
        else:
            self.policy.add_lora(recipe.lora_rank, recipe.lora_alpha, recipe.lora_targets, seed=recipe.seed)
        if recipe.gradient_checkpointing:
            self.policy.enable_gradient_checkpointing()

    # ------------------------------------------------------------------------------------------------ the loop

    def train(self) -> Path:
        """Run to max_steps (or max_minutes, or Ctrl-C, which saves and says how to resume). Returns the run's folder."""
        from tqdm.auto import tqdm

        recipe, progress = self.recipe, self.progress
        self._announce()
        if self.is_main:
            record.write_facts(self.folder, recipe)
        metrics_file = record.Metrics(self.folder / "metrics.jsonl", progress.step) if self.is_main else None
        if self.watch is not None and self.is_main:
            self.watch.open(self.folder, progress.step)
        self.accelerator.init_trackers("flowrl")
        bar = tqdm(
            total=recipe.max_steps,
            initial=progress.step,
            desc=recipe.objective["name"],
            unit="step",
            disable=not self.is_main,
        )
        started, before = time.monotonic(), progress.seconds
        with self._interrupts.counted(), bar:
            while progress.step < recipe.max_steps and not self._should_stop(progress.seconds):
                metrics = self.step()
                progress.seconds = before + time.monotonic() - started
                if recipe.eval_steps and progress.step % recipe.eval_steps == 0:
                    metrics.update(self.evaluate())
                if self.watch is not None:
                    metrics.update(self.watch.judge(self, metrics))
                if metrics_file:
                    metrics_file.write(progress.step, metrics)
                    self.accelerator.log(metrics, step=progress.step)
                bar.set_postfix_str(_postfix(metrics))
                bar.update()
                for hook in self.hooks:
                    hook(self, progress.step, metrics)
                if recipe.checkpointing_steps and progress.step % recipe.checkpointing_steps == 0:
                    self.save_checkpoint()
            self.finished |= progress.step >= recipe.max_steps
            bar.close()
            if self.watch is not None:
                self.watch.end(self)
            wind_up(self, "flowrl train")
        self.accelerator.end_training()
        return self.folder

    def step(self) -> dict[str, float]:
        """One training step: sample, score, update. Returns its metrics."""
        recipe, clock = self.recipe, _Clock()
        if self.data is None:
            batches, samples, scores, advantage, metrics = self.collect(clock)
        else:
            batches, samples, advantage = self.recall(clock)
            scores, metrics = torch.zeros(len(samples), 0), {}
        if self.progress.updates == 0 and recipe.checks:
            preflight.check_run(self, batches, scores)
        metrics.update(self.update(batches, advantage))
        if "old" in self.copies:
            self.policy.blend("old", old_decay(recipe.old_decay, self.progress.step))
        clock.lap("update_time")
        self.progress.step += 1
        self.progress.images += self.plan.images_per_step
        if (
            self.is_main
            and self.data is None
            and self.recipe.samples_steps
            and (self.progress.step % self.recipe.samples_steps == 0 or self.progress.step == 1)
        ):
            shown = self.folder, self.progress.step, samples, scores, list(self.rewards), advantage
            record.write_samples(*shown, recipe.clip_format)
        if self.watch is not None:
            metrics.update(self.watch.step(self, batches[0], samples, metrics))
            clock.lap("watch_time")
        calls = sum(self.plan.denoiser_calls) * self.progress.step
        cost = {"images": float(self.progress.images), "denoiser_calls": float(calls), "memory_gb": peak_memory(), **clock.laps}
        return {**metrics, **cost, "step_time": sum(clock.laps.values())}

    def collect(self, clock: _Clock) -> tuple[list[Samples], Samples, Tensor, Tensor, dict[str, float]]:
        """The policy's own samples: batches with their recorded steps, all as one, scores (N, K), advantages (N,), metrics."""
        batches, samples, scores = self.scored(self.rollout(self.progress.step), clock)
        judged = [(self.gathered(scores), self.gathered(samples.group))]  # int64: floats would merge large ids
        constrained = self.constraints.update(judged[0][0], list(self.rewards))
        advantage, metrics = self.advantages(*judged[0])
        metrics.update(constrained)
        for stride in self.recipe.strides[1:]:
            _, ends, of_ends = self.scored((self.end(batch, stride) for batch in batches), clock)
            judged.append((self.gathered(of_ends), self.gathered(ends.group)))
            further, told = self.advantages(*judged[-1])
            advantage = advantage + further
            metrics[f"reward/stride{stride}"] = told["reward"]
        if self.process is not None:
            metrics["process_reward"] = self.credit(batches)
            clock.lap("score_time")
        confidence = torch.ones(len(samples))
        if self.recipe.confidence is not None:
            doubter: Any = self.rewards[self.recipe.confidence]
            confidence = doubter.confidence(samples).cpu()
        advantage = advantage * confidence
        if self.balancing is not None:
            each = torch.stack([self.each(*of) for of in judged]).sum(0) * confidence.unsqueeze(1)
            for batch, own in zip(batches, each.split([len(batch) for batch in batches]), strict=True):
                batch.each = own
        for label, reward in self.learning.items():
            learnt = reward.update(samples, partial(self.accelerator.reduce, reduction="mean"))
            metrics.update({f"rewards/{label}/{name}": value for name, value in learnt.items()})
            clock.lap("learn_time")
        return batches, samples, scores, advantage, metrics

    def scored(self, drawn: Iterable[Samples], clock: _Clock) -> tuple[list[Samples], Samples, Tensor]:
        """Batches, decoded as they come, all as one, and their scores (N, K)."""
        batches = []
        with Scoring(self.rewards) as scoring:
            for batch in drawn:
                clock.lap("rollout_time")
                batch.images = self.policy.decode(batch)
                preflight.check_pictures(batch, self.progress.step + 1)
                attach(batch, self.references, self.policy)
                if self.map_reward is not None:
                    assert batch.images is not None
                    height, width = batch.images.shape[-2:]
                    batch.maps = to_grid(self.map_reward.map(batch), latent_grid(batch.latents, (height, width)))
                clock.lap("decode_time")
                scoring.submit(batch)
                batches.append(batch)
            samples = concatenate(batches)
            if samples.images is not None:  # of which one copy is enough
                for batch, images in zip(batches, samples.images.split([len(batch) for batch in batches]), strict=True):
                    batch.images = images
            scores = scoring.finish(samples)
        clock.lap("score_time")
        return batches, samples, scores

    def end(self, batch: Samples, stride: int) -> Samples:
        """Where the batch's trajectories end if, after their last noisy step, the ODE visits every stride-th node only."""
        last = batch.steps[-1]
        return self.policy.rollout(
            batch.prompts,
            batch.seeds,
            group=batch.group,
            latents=last.native_next,
            start=last.index + 1,
            stride=stride,
            solver=self.recipe.solver,
        )

    def credit(self, batches: list[Samples]) -> float:
        """Give every recorded step its advantage by the process reward of where it led, relative to its group at that step.

        Returns the mean reward over steps and processes. A group never leaves its process, but may lie in several batches.
        """
        assert self.process is not None
        group, means = torch.cat([batch.group for batch in batches]), []
        for steps in zip(*(batch.steps for batch in batches), strict=True):
            with torch.no_grad():
                values = [
                    self.process.noisy(step.x_next, torch.full((len(batch),), step.t_next), batch.texts).float().cpu()
                    for batch, step in zip(batches, steps, strict=True)
                ]
            means.append(torch.cat(values).nanmean())
            own = normalized(torch.cat(values), group).nan_to_num(0.0)  # who abstains has no say, like `advantages`
            for step, advantage in zip(steps, own.split([len(batch) for batch in batches]), strict=True):
                step.process = advantage
        return float(self.accelerator.reduce(torch.stack(means).nanmean().to(self.accelerator.device), "mean"))

    def recall(self, clock: _Clock) -> tuple[list[Samples], Samples, Tensor]:
        """This process's share of the step's data: batches, all as one, and advantages (N,), 1 to do and -1 not to."""
        assert self.data is not None
        parts = [
            self.data.batch(
                [(position, self._order(self.progress.step)[position]) for position in places],
                self.policy,
                self.recipe,
                self.progress.step,
            )
            for places in self._places(self.plan.group_size)
        ]
        clock.lap("data_time")
        batches = [batch for batch, _ in parts]
        return batches, concatenate(batches), torch.cat([advantage for _, advantage in parts])

    def _order(self, step: int) -> list[int]:
        recipe, column = self.recipe, self.recipe.prompts_by
        if column is None:
            return prompt_order(len(self.prompts), recipe.prompts_per_step, step, recipe.seed)
        kinds = [str(prompt.columns.get(column)) for prompt in self.prompts]
        return even_order(kinds, recipe.prompts_per_step, step, recipe.seed)

    def _places(self, size: int) -> list[list[int]]:
        """This process's positions among the step's prompts, batch by batch, ordered by update; each stands for `size` rows."""
        recipe = self.recipe
        share = recipe.prompts_per_step // recipe.updates_per_step // self.world
        places = [
            position
            for update in range(recipe.updates_per_step)
            for position in range((update * self.world + self.rank) * share, (update * self.world + self.rank + 1) * share)
        ]
        per_batch = max(1, self.plan.batch_size // size)
        return [places[start : start + per_batch] for start in range(0, len(places), per_batch)]

    def rollout(self, step: int) -> Iterator[Samples]:
        """This process's share of the step's samples, batch by batch, ordered by update. A group never leaves its process."""
        recipe, needs = self.recipe, self.objective.needs
        order = self._order(step)
        chosen = [] if needs.points == "noised" else self.schedule.steps(recipe.num_inference_steps, recipe.seed, step)
        stochastic, nodes = (chosen, []) if needs.trajectory else ([], chosen)
        items = [(position, g) for places in self._places(1) for position in places for g in range(recipe.num_generations)]
        for start in range(0, len(items), self.plan.batch_size):
            part = items[start : start + self.plan.batch_size]
            draw: Any = self.policy.rollout
            tree: dict[str, Any] = {}
            if recipe.branches:
                keys = [(recipe.seed, step, position) for position, _ in part]
                init_seeds, noise_seeds = tree_seeds(keys, [g for _, g in part], recipe.branches, len(stochastic))
                draw = partial(branched_rollout, self.policy)
                tree = {"init_seeds": init_seeds, "noise_seeds": noise_seeds, "spread": recipe.branch_spread}
            if self.process is not None and self.guidance is not None:
                draw = partial(guided_rollout, self.policy, process_reward=self.process.noisy, guidance=self.guidance)
            with self.policy.using("old" if needs.old else "policy"):
                batch = draw(
                    [self.prompts[order[position]] for position, _ in part],
                    [sample_seed(recipe.seed, step, position, g) for position, g in part],
                    transition=self.transition if needs.trajectory else None,
                    stochastic=stochastic,
                    group=torch.tensor([step * recipe.prompts_per_step + position for position, _ in part]),
                    keep_velocity=needs.sampled_velocity,
                    solver=recipe.solver,
                    **({"record": nodes} if nodes else {}),
                    **tree,
                )
            for recorded in batch.steps:
                recorded.group = batch.group
            yield batch

    def advantages(self, rewards: Tensor, groups: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Advantages (N,) of this process's samples, and the rewards' metrics. rewards, groups: of all processes."""
        for k, name in enumerate(self.rewards):
            if rewards[:, k].isnan().all():
                raise preflight.CheckFailed(
                    f"reward {name!r} abstained (NaN) on every sample of step {self.progress.step + 1}: "
                    "does it fit these prompts?"
                )
        recipe, weights = self.recipe, self.weights_row
        all_advantages = advantages(
            rewards,
            groups,
            self.constraints.weights(weights, list(self.rewards)),
            recipe.aggregation,
            recipe.scale_rewards,
            best=self.best,
            temperature=recipe.aggregation_temperature,
        )
        _, std, _ = group_mean_std(rewards, groups)
        metrics = {
            "reward": float(weighted_sum(rewards, self.constraints.free(weights, list(self.rewards))).nanmean()),
            "reward_std": float(std.nanmean()),
            "frac_reward_zero_std": zero_variance_share(rewards, groups),
        }
        for k, name in enumerate(self.rewards):
            metrics[f"rewards/{name}/mean"] = float(rewards[:, k].nanmean())
            metrics[f"rewards/{name}/std"] = float(std[:, k].mean())
            if truncated := getattr(self.rewards[name], "truncated", 0.0):  # share of prompts whose tail its tokenizer cuts off
                metrics[f"rewards/{name}/truncated"] = truncated
        return self._own(all_advantages), metrics

    def each(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """(N, K) the advantages of this process's samples by each reward alone, NaN where it abstains."""
        scaling = Scaling(self.recipe.scale_rewards, best=self.best)
        return self._own(scaling.each(rewards, groups, self.weights_row))

    def gathered(self, values: Tensor) -> Tensor:
        """Of all processes, in the order of their rank."""
        return self.accelerator.gather(values.to(self.accelerator.device)).cpu()

    def _own(self, gathered: Tensor) -> Tensor:
        """This process's part of what `gathered` brought together."""
        return gathered.float().chunk(self.world)[self.rank]

    def update(self, batches: list[Samples], advantage: Tensor) -> dict[str, float]:
        """The step's optimiser updates, each over its share of the batches. advantage: (N,) in the order of the batches."""
        recipe = self.recipe
        gathered = self.gathering = _Metrics()
        per_update = len(batches) // recipe.updates_per_step
        split = self.chosen(batches, advantage)
        norms, kept, measured = [], [], []
        for start in range(0, len(batches), per_update):
            part = split[start : start + per_update]
            rows = self._sum(sum(len(values) for _, values in part))
            if self.balancing is not None:
                measured.append(self.balancing.backward(self, part, gathered, rows))
            for batch, values in part if self.balancing is None else []:
                if len(values):
                    self.backward(batch, values, gathered, rows)
            norms.append(self.apply())
            kept.append(rows)
        metrics = gathered.means(self.accelerator)
        if hasattr(self.objective, "choose"):
            metrics["rows"] = sum(kept)
        metrics.update(over_updates(measured))
        return {**metrics, "grad_norm": sum(norms) / len(norms), "learning_rate": self.optimizer.param_groups[0]["lr"]}

    def chosen(self, batches: list[Samples], advantage: Tensor) -> list[tuple[Samples, Tensor]]:
        """The rows of each batch that the objective trains on, and their advantages: all, or those that its `choose` names."""
        if not hasattr(self.objective, "choose"):
            return list(zip(batches, advantage.split([len(batch) for batch in batches]), strict=True))
        samples = concatenate(batches)
        rows, values = self.objective.choose(samples, advantage)
        parts, start = [], 0
        for batch in batches:
            own = (rows >= start) & (rows < start + len(batch))
            parts.append((replace(batch, images=None).select(rows[own] - start), values[own]))
            start += len(batch)
        return parts

    def backward(
        self, batch: Samples, advantage: Tensor, gathered: _Metrics, rows: int | None = None, loss_of: Any = None
    ) -> None:
        """Add the gradient of one batch: the objective's mean over all trained rows of the update and all points.

        rows: how many rows the update has in all processes; the plan's number by default. loss_of: in place of the objective's
        loss; it is given the same.
        """
        needs = self.objective.needs
        if needs.trajectory and not bool(advantage.any()) and not (needs.reference or needs.process):
            return  # no signal in this batch, and no pull towards the reference: its gradient is zero
        rows = rows or self.plan.images_per_update * self.world
        predict = self.predict(batch)
        advantage = advantage.to(batch.latents.device)
        for point, count in self.points(batch):
            loss = (loss_of or self.objective.loss)(predict, point, advantage)
            values = loss.total
            (values.sum() * (len(advantage) / (len(values) * rows * count))).backward()
            predict.forget()
            gathered.add(loss.metrics, point.t)

    def predict(self, batch: Samples) -> PolicyPredict:
        return PolicyPredict(
            self.policy,
            batch,
            reference=self.recipe.reference_weights,
            rewards=self.rewards,
            weights=self.weights_row,
            accelerator=self.accelerator,
            look=None if self.watch is None else self._see,
            context=self.recipe.decode_context,
        )

    def _see(self, point: Point, v: Tensor) -> None:
        """Of each velocity (B, ...) that is trained on: its root mean square."""
        self.gathering.add({"watch/velocity_norm": v.detach().float().square().flatten(1).mean(1).sqrt()}, point.t)

    def points(self, batch: Samples) -> Iterator[tuple[Step | Noised, int]]:
        """Where the objective is asked about a batch, and at how many points: recorded steps, or fresh noise on final latents."""
        needs = self.objective.needs
        if needs.points != "noised":
            yield from ((step, len(batch.steps)) for step in batch.steps)
            return
        size = {"sample": 1, "pair": 2}.get(needs.unit)
        heads = [i - i % size for i in range(len(batch))] if size else [int((batch.group == g).nonzero()[0]) for g in batch.group]
        own = [sample_seed(seed, self.progress.step) for seed in batch.seeds]
        rngs = generators([own[i] for i in heads] if needs.shared_noise else own, offset=1)
        u = torch.stack([torch.rand(1, generator=rng)[0] for rng in generators(own)])[heads]
        if self.times.shared:
            u = torch.rand(1, generator=generators([sample_seed(self.recipe.seed, self.progress.step)])[0]).expand(len(batch))
        x0 = batch.latents.float()
        for j in range(self.times.count):
            t = self.times.at((j + u) / self.times.count, self.policy.times)
            noise = randn_tensor(x0.shape, generator=rngs, device=x0.device, dtype=torch.float32)
            yield Noised(x0, noise, t.to(x0.device), batch.group, batch.maps), self.times.count

    def _sum(self, value: int) -> int:
        """Over all processes."""
        if self.world == 1:
            return value
        return int(self.accelerator.reduce(torch.tensor(value, device=self.accelerator.device), "sum"))

    def apply(self) -> float:
        """Sum gradients over processes, clip, step, average. Returns the gradient's norm."""
        parameters = list(self.policy.trainable().values())
        reduce_gradients(self.accelerator, parameters, "sum")
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.recipe.max_grad_norm)
        if not norm.isfinite():
            raise preflight.CheckFailed(
                f"the gradient of update {self.progress.updates + 1} is not finite: lower learning_rate or use autocast=bfloat16"
            )
        factor = lr_factor(self.recipe, self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        n = self.progress.updates
        self.progress.updates += 1
        self.policy.blend("ema", min(self.recipe.ema_decay, (1 + n) / (10 + n)))
        return float(norm)

    # ------------------------------------------------------------------------------------------------ around the loop

    def evaluate(self) -> dict[str, float]:
        """Held-out scores of the averaged weights, on the main process."""
        if not self.is_main:
            return {}
        recipe = self.recipe
        call = {k: v for k, v in recipe.call_arguments().items() if k not in ("num_inference_steps", "guidance_scale")}
        protocol = Protocol(
            recipe.eval_prompts or "",
            recipe.eval_num_inference_steps,
            recipe.guidance_scale,
            recipe.eval_seeds,
            call=call,
        )
        result = evaluate(
            self.policy,
            self.eval_prompts,
            self.eval_rewards,
            protocol,
            name="ema",
            weights="ema",
            references=self.references,
        )
        if self.watch is not None:
            self.watch.evaluated(self.progress.step, result)
        return {f"eval/{name}": result.mean(name) for name in self.eval_rewards}

    def restore(self, checkpoint: Path) -> None:
        """Everything as it was in a checkpoint. Raises ConfigError where it does not fit."""
        self.progress = record.load_checkpoint(checkpoint, self.policy, self.optimizer)
        record.load_reward_states(checkpoint, self.learning)
        record.load_states(checkpoint, self.keeping_state)
        self.saved_at = self.progress.step

    def save_checkpoint(self) -> None:
        if self.is_main:
            record.save_checkpoint(
                self.folder,
                self.policy,
                self.optimizer,
                self.recipe,
                self.progress,
                self.recipe.checkpoints_total_limit,
                self.learning,
                self.keeping_state,
            )
        self.saved_at = self.progress.step
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        """The result: averaged weights and a model card."""
        if self.is_main:
            record.save_result(self.policy, self.folder)
            record.write_model_card(self.folder, self.policy, self.recipe, self.progress)

    def _announce(self) -> None:
        if not self.is_main:
            return
        trainable = sum(p.numel() for p in self.policy.trainable().values())
        rows = [
            *self.plan.table(),
            ("trainable weights", f"{trainable:,} ({self.recipe.train})"),
            ("output", str(self.folder)),
        ]
        print_rows(rows)
        if self.checkpoint:
            print(
                f"  resuming from {self.checkpoint}" + "".join(f"\n    changed: {change}" for change in self.changed),
                flush=True,
            )

    def _should_stop(self, seconds: float) -> bool:
        """Sets `finished`, too: an interrupted run is not. All processes agree, though only one may have been interrupted."""
        limit = self.recipe.max_minutes
        late = limit is not None and seconds >= limit * 60
        alarmed = self.watch is not None and self.watch.ending is not None
        interrupted, late, alarmed = in_any_process(self.accelerator, self._interrupts.count > 0, late, alarmed)
        self.finished = not interrupted
        return interrupted or late or alarmed


# ------------------------------------------------------------------------------------------------ helpers


class _Metrics:
    """Means over samples of an objective's metrics, overall and per tenth of the time axis (`clip_ratio/t0.8`)."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))

    def add(self, metrics: dict[str, Any], t: float | Tensor) -> None:
        for name, value in metrics.items():
            value = torch.as_tensor(value, dtype=torch.float64).cpu().reshape(-1)
            self.sums[name] += torch.stack([value.sum(), torch.tensor(float(len(value)), dtype=torch.float64)])
            times = torch.as_tensor(t, dtype=torch.float64).cpu().reshape(-1)
            times = (
                times[:: max(1, len(times) // len(value))] if len(times) > 1 else times.expand(len(value))
            )  # a pair, a group: one
            tenths = (10 * times[: len(value)]).round().long()
            for tenth in tenths.unique().tolist():
                own = value[tenths == tenth]
                self.sums[f"{name}/t{tenth / 10:.1f}"] += torch.tensor([float(own.sum()), float(len(own))], dtype=torch.float64)

    def means(self, accelerator: Any) -> dict[str, float]:
        sums = self.sums
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            merged: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
            for part in gather_object([dict(sums)]):
                for name, entry in part.items():
                    merged[name] += entry
            sums = merged
        return {name: float(entry[0] / entry[1]) for name, entry in sums.items()}


def peak_memory() -> float:
    """In GB: of the device where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class _Clock:
    def __init__(self) -> None:
        self.last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.monotonic()
        self.laps[name], self.last = self.laps.get(name, 0.0) + now - self.last, now


def parts(recipe: Recipe) -> tuple[Any, Transition, Any, list[int]]:
    """Objective, transition and schedule of a recipe, and the steps of its first rollout. Raises ConfigError."""
    objective = build(recipe.objective, OBJECTIVES, "objective")
    transition = build(recipe.transition, {**TRANSITIONS, "glass": GLASS}, "transition")
    schedule = build(recipe.steps, SCHEDULES, "steps")
    if isinstance(transition, GLASS):
        raise ConfigError(
            "transition glass has no density in closed form, so there is no ratio to train on, and it is a sampler for steering "
            "only: choose flow_sde, cps, matched_cps or ddim"
        )
    name = recipe.objective["name"]
    if not objective.needs.trajectory:
        for option, used in (("branches", recipe.branches), ("strides", recipe.strides[1:])):
            if used:
                raise ConfigError(
                    f"{option}={getattr(recipe, option)}: {name} does not train on noisy steps, in which branches could part; "
                    f"leave {option} out, or choose a method of trajectories (grpo, g2rpo, b2diffurl, branch_grpo, ...)"
                )
    if objective.needs.trajectory and transition.deterministic:
        raise ConfigError(
            f"{name} needs a stochastic sampler, {transition} is deterministic: "
            "choose flow_sde, cps, dance_sde or ddim, with noise"
        )
    if objective.needs.points == "noised":
        return objective, transition, schedule, []
    try:
        trained = schedule.steps(recipe.num_inference_steps, recipe.seed, 0)
    except ValueError as error:
        raise ConfigError(f"steps: {error}") from None
    if objective.needs.trajectory and isinstance(schedule, Late | Spread):
        raise ConfigError(
            f"steps={recipe.steps['name']} names nodes for the gradient of a reward, and may name the last step, which draws no "
            f"noise; {name} wants window, fraction, backward or all_but_last"
        )
    if len(recipe.branches) > len(trained):
        raise ConfigError(f"branches={recipe.branches} wants {len(recipe.branches)} stochastic steps, steps gives {len(trained)}")
    if hasattr(objective, "check"):
        try:
            objective.check(recipe, trained)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None
    return objective, transition, schedule, trained


def plan_of(recipe: Recipe, objective: Any, trained: Sequence[int], processes: int, rows: int | None = None) -> Plan:
    """The arithmetic of a run, from what `parts` gave. rows: of an item of data. Raises ConfigError if it does not work out."""
    noised = objective.needs.points == "noised"
    points = build(recipe.times, TIMES, "times").count if noised else len(trained)
    return Plan(recipe, processes, points, rows, objective.needs.unit != "sample").check()


def _rewards(
    section: dict[str, Any], recipe: Recipe, where: str = "rewards", beside: Iterable[str] = ()
) -> tuple[dict[str, Reward], dict[str, float]]:
    """Rewards and weights of a recipe's section, or of given objects, whose weights the recipe may hold. beside: labels of the
    other section."""
    given = {label: recipe.rewards.get(label, 1.0) for label, value in section.items() if callable(value)}
    try:
        loaded = load_rewards(section, beside)
        for label, value in given.items():
            weight = value.get("weight", 1.0) if isinstance(value, dict) else value
            loaded[label] = (loaded[label][0], float(weight))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}.{error}") from None
    return {label: reward for label, (reward, _) in loaded.items()}, {label: weight for label, (_, weight) in loaded.items()}


def _process_reward(rewards: dict[str, Reward], recipe: Recipe) -> ProcessReward:
    """The first reward that scores noisy states. Raises ConfigError where there is none."""
    for reward in rewards.values():
        if isinstance(reward, ProcessReward):
            return reward
    raise ConfigError(
        f"{recipe.objective['name']} wants a reward of noisy states, and none of {', '.join(rewards)} is one: add one, as in "
        "rewards.tiny_latent=0 (its weight in the pictures' reward may be 0), or an object of yours with noisy(x, t, prompts)"
    )


def _map_reward(rewards: dict[str, Reward], recipe: Recipe) -> MapReward:
    """The first reward, or part of one, that says where a picture is good. Raises ConfigError when there is none."""
    found = next((part for reward in rewards.values() for part in parts_of(reward) if isinstance(part, MapReward)), None)
    if found is None:
        raise ConfigError(
            f"{recipe.objective['name']} weighs each place of a picture, and no reward of this run has a map: "
            "add one, as in rewards.region_map=1"
        )
    return found


def _check_differentiable(rewards: dict[str, Reward], recipe: Recipe) -> None:
    """Raises ConfigError when the objective climbs the gradient of rewards, and some have none."""
    if flat := [label for label, reward in rewards.items() if not traits_of(reward).differentiable]:
        raise ConfigError(
            f"{recipe.objective['name']} climbs the gradient of its rewards; {', '.join(flat)} {'have' if flat[1:] else 'has'} "
            "none: train on those that have (tiny_preference, pickscore, hpsv2, image_reward, latent, ...; a function of your "
            "own says so by an attribute traits = Traits(differentiable=True)), or by an objective of values (grpo, nft)"
        )


def _references(recipe: Recipe, rewards: dict[str, Reward]) -> Any:
    """Where references come from. Raises ConfigError when a reward wants them and the recipe does not say."""
    try:
        source = references_of(recipe.references)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for label, reward in rewards.items():
        if source is None and "references" in traits_of(reward).needs:
            raise ConfigError(
                f"rewards.{label} compares with other pictures: say which, as in references={{name: base, count: 2}}"
            )
    return source


def _best(rewards: dict[str, Reward], weights: dict[str, float], recipe: Recipe) -> Tensor:
    """(K,) the best possible value of each reward, the smallest where its weight is negative; NaN where there is none.

    Raises ConfigError when too few are known: one where each reward is normalised by itself, all where their sum is.
    """
    best = torch.tensor([traits_of(reward).range[int(weights[label] >= 0)] for label, reward in rewards.items()])
    known = best.isfinite()
    if recipe.aggregation in ("pareto", "softmin"):
        raise ConfigError(f"virtual_best shifts advantages that aggregation={recipe.aggregation} centres again: use another one")
    if not bool(known.all() if recipe.aggregation == "sum_then_normalize" else known.any()):
        unknown_ones = ", ".join(label for label, is_known in zip(rewards, known, strict=True) if not is_known)
        raise ConfigError(
            f"virtual_best wants rewards with a known maximum, and {unknown_ones} has none: cap or squash it, "
            f"as in rewards.{unknown_ones.split(',')[0]}={{weight: 1, shape: {{sigmoid: ...}}}}"
        )
    return torch.where(known, best, torch.nan)


def _check_model(facts: ModelFacts, call: dict[str, Any], recipe: Recipe, trainer: Trainer) -> None:
    """Raises ConfigError for what the model cannot do, as far as its configuration tells: clips of so many frames, clips at all
    where a reward wants them, prompts without the picture that it starts from. Of a class of its own the first batch tells."""
    if not facts.parameters:
        return
    if call.get("num_frames") is not None:
        facts.check_frames(call["num_frames"])
    wanting = [label for label, reward in trainer.eval_rewards.items() if "clips" in traits_of(reward).needs]
    if wanting and not facts.draws_clips:
        raise ConfigError(
            f"rewards.{wanting[0]} scores clips, and {facts.pipeline} draws pictures: give a video model, or another reward"
        )
    if recipe.fps is not None:
        facts.check_fps(recipe.fps)
    rate = facts.fps(call) if recipe.fps is None else recipe.fps
    for label, reward in trainer.eval_rewards.items():
        own = next((part.fps for part in parts_of(reward) if isinstance(getattr(part, "fps", None), int | float)), rate)
        if rate is not None and own is not None and not math.isclose(own, rate, rel_tol=0.01):
            raise ConfigError(
                f"rewards.{label}: fps={own:g}, and the clips of this run have {rate:g} frames per second: leave the reward's "
                "option out, or set the recipe's fps"
            )
    for prompts in (trainer.prompts, trainer.eval_prompts):
        check_conditions(prompts, facts, call)


def _check_lora(lora: str | None) -> None:
    if lora is None or (Path(lora) / LORA_FILE).is_file() or Path(lora).is_file():
        return
    if Path(lora).is_dir():
        raise ConfigError(f"lora: there is no {LORA_FILE} in {lora}")
    if lora.count("/") != 1 or lora.startswith((".", "/", "~")):
        raise ConfigError(f"lora: there is no folder {lora} (hub ids look like owner/name)")


def copies_of(needs: Needs, recipe: Recipe, references: object = None) -> list[str]:
    """Which copies of the weights a run keeps.

    "ema", the average; "old", the slow one that an objective samples from or compares with; "reference", the weights it started
    from, where they cannot be had by switching a LoRA off. references: what the learning rewards compare with, if anything.
    """
    names = ["ema"]
    if needs.old or (needs.reference and recipe.reference_weights == "old"):
        names.append("old")
    if recipe.train == "full" and (needs.reference or getattr(references, "weights", None) == "reference"):
        names.append("reference")
    return names


def decode_in_parts(policy: Policy, how: str) -> None:
    """Let the autoencoder decode as `Recipe.decode` says. Raises ConfigError where it cannot."""
    vae = getattr(policy.pipe, "vae", None)
    for call in {"whole": (), "slices": ("enable_slicing",), "tiles": ("enable_slicing", "enable_tiling")}[how]:
        if not hasattr(vae, call):
            raise ConfigError(f"decode={how}: the {type(vae).__name__} of {policy.name} cannot; use decode=whole")
        getattr(vae, call)()


def _check_call(recipe: Recipe, policy: Policy) -> None:
    """The pipeline takes these arguments, and the loop does not set them itself."""
    for name in recipe.call_arguments():
        if name not in policy.call_names:
            raise ConfigError(unknown(f"argument (or one that training sets itself) of {policy.name}", name, policy.call_names))


def _postfix(metrics: dict[str, float]) -> str:
    shown = {
        "reward": "reward",
        "eval/tiny_strict": "eval",
        "clip_ratio": "clip",
        "frac_reward_zero_std": "flat",
        "grad_norm": "grad",
        "step_time": "s",
    }
    return "  ".join(f"{label} {metrics[name]:.3g}" for name, label in shown.items() if name in metrics)


def old_decay(schedule: Sequence[float], step: int) -> float:
    """What the slow copy keeps of itself after step `step` (0, 1, ...): min(max, rate (step - start)); 0 copies the policy."""
    start, rate, top = schedule
    return min(top, rate * max(0.0, step - start))


def set_threads() -> None:
    """Nothing to do on most machines; under `accelerate launch` on a CPU each process takes its share of the cores."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
