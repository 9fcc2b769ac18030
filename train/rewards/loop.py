"""The loop that trains reward models: batch -> loss -> update -> record. Written once, for every task.

    RUN/recipe.yaml  environment.json  metrics.jsonl  README.md  reward.json  ...     the reward model: rewards.RUN=1
    RUN/checkpoint-100/training_state/

A batch is a function of (seed, step, process), and so are the random numbers of a step: a run that was stopped goes on as if it
had not been. Gradients are averaged over processes; evaluation, on the main process, is of the averaged weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowrl import record
from flowrl.config import ConfigError, make
from flowrl.data import sample_seed
from flowrl.reward_models.base import REWARD_FILE
from flowrl.train.loop_habits import Interrupts, in_any_process, lr_factor, print_rows, reduce_gradients, trackers, wind_up
from flowrl.train.rewards import find_task
from flowrl.train.rewards.recipe import RewardRecipe, load_reward_recipe

__all__ = [
    "RewardRecipe",
    "RewardTrainer",
    "Score",
    "Task",
    "held_out_prompts",
    "load_reward_recipe",
    "load_task",
    "picks",
    "positions",
    "seeds",
]


class Score(NamedTuple):
    """A held-out number, and how many examples (pictures, or pairs of them) it is taken over."""

    value: float
    n: int

    @classmethod
    def mean(cls, values: Tensor) -> Score:
        """Of (n,) bools or numbers."""
        return cls(values.float().mean().item(), len(values))


class Task(Protocol):
    """What is learnt, and from what. A dataclass of options; its methods are called in this order.

    One whose reward does not score pictures says in `tried_by` which recipe shows it at work.
    """

    def prepare(self, recipe: RewardRecipe, device: torch.device) -> nn.Module:
        """Load data and model. The parameters that require a gradient are trained. Raises ConfigError for bad options or data."""

    def batch(self, step: int) -> Any:
        """This process's share of the step's batch (0, 1, ...): `positions`, `picks` and `seeds` below say which that is."""

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """Mean loss of the batch with graph, and metrics."""

    def evaluate(self) -> dict[str, Score]:
        """Held-out scores, without gradient; the module holds the averaged weights and is in evaluation mode."""

    def save(self, folder: Path) -> None:
        """Write what `load_reward(folder)` reads, reward.json included. The loop adds README.md."""

    def describe(self) -> str:
        """Markdown for the card: what the model is and which data it has seen, held-out data included."""


def load_task(section: dict[str, Any]) -> Task:
    """The task of a recipe's section {name: ..., option: ...}. Raises ConfigError."""
    options = dict(section)
    name = options.pop("name", None)
    return make(find_task(str(name)), options, "task")


def tried_by(task: Task) -> str:
    """The recipe that shows a task's reward at work: the task's own `tried_by`, or that of pictures."""
    return getattr(task, "tried_by", "quickstart")


# ------------------------------------------------------------------------------------------------ batches


def positions(recipe: RewardRecipe) -> range:
    """The places in a step's batch (0 ... batch_size - 1) that this process fills."""
    from accelerate import PartialState

    state = PartialState()
    share = recipe.batch_size // state.num_processes
    return range(state.process_index * share, (state.process_index + 1) * share)


def picks(count: int, recipe: RewardRecipe, step: int) -> list[int]:
    """Which of `count` examples this process takes at a step: every epoch a fresh permutation, nothing to remember."""
    where = [divmod(step * recipe.batch_size + place, count) for place in positions(recipe)]
    return [int(_permutation(count, recipe.seed, epoch)[i]) for epoch, i in where]


@lru_cache(maxsize=8)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def seeds(recipe: RewardRecipe, step: int) -> list[int]:
    """One seed for each example of this process at a step, whatever the number of processes."""
    return [sample_seed(recipe.seed, step, place) for place in positions(recipe)]


def held_out_prompts(prompts: Iterable[str], share: float, seed: int, data: str) -> set[str]:
    """A random `share` of the distinct prompts, rounded up. Raises ValueError, which names `data`, where none would be left."""
    distinct = sorted(set(prompts))
    count = math.ceil(share * len(distinct))
    if count == len(distinct):
        raise ValueError(f"{data} has one prompt only: name held-out data in task.eval_data")
    return {distinct[i] for i in np.random.default_rng(seed).permutation(len(distinct))[:count]}


# ------------------------------------------------------------------------------------------------ the loop


class RewardTrainer:
    """One run of a recipe.

        folder = RewardTrainer(load_reward_recipe("tiny-preference", ["max_steps=200"])).train()
        reward = load_reward(folder)

    task: an object in place of the recipe's. Raises ConfigError, before anything is loaded, for options that cannot work.
    """

    def __init__(self, recipe: RewardRecipe, task: Task | None = None):
        from accelerate import Accelerator

        self.recipe, self.task = recipe, task or load_task(recipe.task)
        self.folder = Path(recipe.output_dir)
        self.accelerator = Accelerator(log_with=trackers(recipe.report_to) or None, project_dir=self.folder / "tracker")
        self.is_main = self.accelerator.is_main_process
        if recipe.batch_size % self.accelerator.num_processes:
            raise ConfigError(f"batch_size={recipe.batch_size} does not divide over {self.accelerator.num_processes} processes")
        self.checkpoint = record.find_checkpoint(recipe)
        self.changed = record.check_resumable(self.checkpoint, recipe, ("task", "seed")) if self.checkpoint else []
        if self.is_main:
            record.prepare_folder(self.folder, self.checkpoint)

        torch.manual_seed(recipe.seed)
        self.module = self.task.prepare(recipe, self.accelerator.device)
        self.trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ConfigError("task: nothing is left to train; freeze less")
        self.averages = {name: p.detach().clone() for name, p in self.trained.items()}
        betas = (0.9, recipe.adam_beta2)
        self.optimizer = torch.optim.AdamW(self.trained.values(), recipe.learning_rate, betas, weight_decay=recipe.weight_decay)
        self.progress = record.Progress()
        if self.checkpoint:
            self._load(self.checkpoint)
        self.saved_at = self.progress.step if record.lies_in(self.checkpoint, self.folder) else None
        self.finished = False  #: Whether train() came to its end, and not to Ctrl-C.
        self.held_out: dict[str, Score] = {}  #: Of the last evaluation.
        self._interrupts = Interrupts(self.is_main)

    # -- steps

    def train(self) -> Path:
        """Run to max_steps (or max_minutes, or Ctrl-C, which saves and says how to go on). Returns the run's folder."""
        from tqdm.auto import tqdm

        recipe, progress = self.recipe, self.progress
        self._announce()
        if self.is_main:
            record.write_facts(self.folder, recipe)
        metrics_file = record.Metrics(self.folder / "metrics.jsonl", progress.step) if self.is_main else None
        self.accelerator.init_trackers("flowrl")
        if progress.step == 0 and recipe.eval_steps:
            self._log(metrics_file, self.evaluate())
        bar = tqdm(total=recipe.max_steps, initial=progress.step, desc=recipe.task["name"], unit="step", disable=not self.is_main)
        started, before = time.monotonic(), progress.seconds
        with self._interrupts.counted(), bar:
            while progress.step < recipe.max_steps and not self._should_stop():
                metrics = self.step()
                if progress.step == recipe.max_steps or (recipe.eval_steps and progress.step % recipe.eval_steps == 0):
                    metrics |= self.evaluate()
                progress.seconds = before + time.monotonic() - started
                self._log(metrics_file, metrics)
                bar.set_postfix_str(self._postfix(metrics))
                bar.update()
                if recipe.checkpointing_steps and progress.step % recipe.checkpointing_steps == 0:
                    self.save_checkpoint()
            self.finished |= progress.step >= recipe.max_steps
            bar.close()
            wind_up(self, "flowrl train-reward")
        self.accelerator.end_training()
        return self.folder

    def step(self) -> dict[str, float]:
        """One update. Returns its metrics, means over processes."""
        recipe, progress, started = self.recipe, self.progress, time.monotonic()
        torch.manual_seed(sample_seed(recipe.seed, progress.step, self.accelerator.process_index))
        batch = self.task.batch(progress.step)
        self.module.train()
        with self._autocast():
            loss, metrics = self.task.loss(batch)
        loss.backward()
        parameters = list(self.trained.values())
        reduce_gradients(self.accelerator, parameters, "mean")
        norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        if not norm.isfinite():
            raise ConfigError(
                f"the gradient of step {progress.step + 1} is not finite: lower learning_rate, or leave autocast out"
            )
        rate = recipe.learning_rate * lr_factor(recipe, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        keep = min(recipe.ema_decay, (1 + progress.step) / (10 + progress.step))
        torch._foreach_lerp_(list(self.averages.values()), [p.detach() for p in parameters], 1 - keep)
        progress.step += 1
        progress.updates += 1
        means = self._means({"loss": float(loss.detach()), **metrics})
        return {**means, "grad_norm": float(norm), "learning_rate": rate, "step_time": time.monotonic() - started}

    def evaluate(self) -> dict[str, float]:
        """Held-out scores of the averaged weights, `eval/...`, on the main process."""
        if not self.is_main:
            return {}
        with self.averaged(), torch.no_grad():
            self.module.eval()
            self.held_out = self.task.evaluate()
        return {f"eval/{name}": score.value for name, score in self.held_out.items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the module holds the averaged weights."""
        kept = {name: p.detach().clone() for name, p in self.trained.items()}
        self._put(self.averages)
        try:
            yield
        finally:
            self._put(kept)

    def _put(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(weights[name])

    def _autocast(self) -> Any:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16) if self.recipe.autocast else nullcontext()

    def _means(self, metrics: dict[str, float]) -> dict[str, float]:
        """Over processes, which have the same metrics."""
        if self.accelerator.num_processes == 1:
            return metrics
        values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=self.accelerator.device)
        return dict(zip(metrics, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    # -- around the steps

    def _announce(self) -> None:
        if not self.is_main:
            return
        trained = sum(p.numel() for p in self.trained.values())
        total = sum(p.numel() for p in self.module.parameters())
        rows = [("task", self.recipe.task["name"]), ("trained weights", f"{trained:,} of {total:,}")]
        rows += [("examples", f"{self.recipe.max_steps} steps x {self.recipe.batch_size}"), ("output", str(self.folder))]
        print_rows(rows)
        if self.checkpoint:
            print(f"  resuming from {self.checkpoint}" + "".join(f"\n    changed: {change}" for change in self.changed))

    def _log(self, metrics_file: record.Metrics | None, metrics: dict[str, float]) -> None:
        if metrics_file:
            metrics_file.write(self.progress.step, metrics)
            self.accelerator.log(metrics, step=self.progress.step)

    def _postfix(self, metrics: dict[str, float]) -> str:
        shown = {"loss": "loss", "accuracy": "accuracy", "grad_norm": "grad", "step_time": "s"}
        parts = [f"{label} {metrics[name]:.3g}" for name, label in shown.items() if name in metrics]
        return "  ".join([*parts, *(f"held-out {name} {value:.3g}" for name, (value, _) in list(self.held_out.items())[:1])])

    def _should_stop(self) -> bool:
        """Sets `finished`, too: an interrupted run is not."""
        limit = self.recipe.max_minutes
        late = limit is not None and self.progress.seconds >= limit * 60
        interrupted, late = in_any_process(self.accelerator, self._interrupts.count > 0, late)
        self.finished = not interrupted
        return interrupted or late

    # -- what is kept

    def _state(self) -> dict[str, Tensor]:
        """Trained weights and buffers."""
        buffers = {name: b for name, b in self.module.state_dict().items() if name not in dict(self.module.named_parameters())}
        return {**buffers, **self.trained}

    def save_checkpoint(self) -> None:
        """What the run needs to go on bit for bit."""
        if self.is_main:
            with record.written_whole(self.folder / f"checkpoint-{self.progress.step}") as temporary:
                state = temporary / record.STATE
                state.mkdir()
                save_file(
                    {name: t.detach().clone().contiguous() for name, t in self._state().items()}, state / "model.safetensors"
                )
                save_file({name: t.contiguous() for name, t in self.averages.items()}, state / "averages.safetensors")
                with (state / "optimizer.pt").open("wb") as file:
                    torch.save(self.optimizer.state_dict(), file)
                facts = {"progress": vars(self.progress), "recipe": vars(self.recipe)}
                (state / "state.json").write_text(json.dumps(facts))
            record.prune(self.folder, self.recipe.checkpoints_total_limit)
        self.saved_at = self.progress.step
        self.accelerator.wait_for_everyone()

    def _load(self, checkpoint: Path) -> None:
        state = checkpoint / record.STATE
        with record.reading(checkpoint):
            weights, averages = load_file(state / "model.safetensors"), load_file(state / "averages.safetensors")
            optimizer = torch.load(state / "optimizer.pt", weights_only=True, map_location=self.accelerator.device)
        record.put_weights(checkpoint, weights, self._state())
        record.put_weights(checkpoint, averages, self.averages)
        self.optimizer.load_state_dict(optimizer)
        self.progress = record.Progress(**record.read_state(checkpoint)["progress"])

    def save(self) -> None:
        """The reward model with its card into the run's folder, and a table of what it scores."""
        if not self.is_main:
            return
        if not self.held_out:
            self.evaluate()
        with self.averaged(), record.writing(self.folder), record.unfinished(self.folder) as temporary:
            self.module.eval()
            self.task.save(temporary)
            for file in temporary.rglob("*"):
                file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors writes 0600; a reward model is read by others
            (temporary / "README.md").write_text(self.card(), encoding="utf-8")
            if not (temporary / REWARD_FILE).is_file():
                raise RuntimeError(f"task {self.recipe.task['name']} wrote no {REWARD_FILE}")
            for path in temporary.iterdir():
                record.move(path, self.folder / path.name)
        print("\n" + "\n".join(f"  {line}" for line in self._table()))
        print(f"\nDone: {self.folder}\nUse it: flowrl train {tried_by(self.task)} rewards.{self.folder}=1")

    def _table(self) -> list[str]:
        """Held-out scores before and after, each with its number of examples, as the rows of a Markdown table."""
        rows = record.read_metrics(self.folder)
        first = rows[0] if rows and rows[0]["step"] == 0 else {}
        width = max(map(len, ["held out", *self.held_out]))
        lines = [f"| {'held out'.ljust(width)} |      n | before |  after |", f"|{'-' * (width + 2)}|-------:|-------:|-------:|"]
        for name, (value, n) in self.held_out.items():
            lines.append(f"| {name.ljust(width)} | {n:6,} | {_short(first.get(f'eval/{name}'))} | {_short(value)} |")
        return lines

    def card(self) -> str:
        """README.md of the reward model."""
        facts, recipe = record.environment(), self.recipe
        return CARD.format(
            name=self.folder.name,
            description=self.task.describe().strip(),
            recipe=tried_by(self.task),
            steps=self.progress.step,
            batch=recipe.batch_size,
            rate=recipe.learning_rate,
            minutes=self.progress.seconds / 60,
            device=facts["device"],
            threads=facts["threads"],
            seed=recipe.seed,
            weights=sum(p.numel() for p in self.trained.values()),
            table="\n".join(self._table()),
            folder=self.folder,
            task=recipe.task["name"],
            versions=", ".join(f"{k} {facts[k]}" for k in ("torch", "transformers")),
        )


def _short(value: float | None) -> str:
    return "     -" if value is None or math.isnan(value) else f"{value:6.3f}"


CARD = """---
library_name: flowrl
tags: [flowrl, reward-model]
---

# {name}

{description}

## Use

`flowrl train {recipe} rewards.{folder}=1`, or

```python
from flowrl.reward_models import load_reward

reward = load_reward("{folder}")  # reward(samples) -> Tensor (N,)
```

## Training

{steps:,} steps of {batch} examples, AdamW at {rate:g}, {weights:,} trained weights, {minutes:.1f} minutes ({device}, {threads} \
threads), seed {seed}.

{table}

Held-out data; `n` is how many pictures, or pairs of them, a number is taken over; `before` is the model that training started
from. A reward model is a proxy: what scores highest under it is not always what is best. Look at the pictures, and at a reward
that was not trained on.

## Reproduce

`flowrl train-reward recipe.yaml`, with the `recipe.yaml` beside this file ({versions}).
"""
