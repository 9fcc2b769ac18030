"""The recipe: every option of a run, typed, documented in a sentence, checked before any weight is loaded.

A recipe is a YAML file (those that ship are found by name) plus `key=value` overrides; a section's option is reached with a
dot (`objective.epsilon=1e-5`). Unknown keys are errors that name the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """An option that cannot work; one sentence that names it and the fix."""


def option(default: Any, help: str) -> Any:
    """A documented field of a recipe; mutable defaults are copied."""
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class Recipe:
    """All options of `flowrl train`. Section options (objective, transition, steps) are a name plus that class's own fields."""

    sections: ClassVar = ("objective", "transition", "steps", "times", "balance", "references", "watch")

    # -- what is trained
    model: str = option("tiny-sd3", "Model to align: an embedded name, a pipeline directory, or a hub id.")
    lora: str | None = option(None, "Folder of a LoRA to go on from.")
    train: Literal["lora", "full"] = option("lora", "Train a LoRA, or all weights of the denoiser.")
    lora_rank: int = option(32, "Rank of the LoRA.")
    lora_alpha: float | None = option(None, "LoRA scale; twice the rank by default.")
    lora_targets: list[str] | None = option(None, "Module name endings that get a LoRA; the attention projections by default.")
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "Storage type of the weights; bfloat16 for a frozen base under a LoRA (whose own weights stay fp32)."
    )
    autocast: Literal["bfloat16"] | None = option(None, "Run the denoiser under autocast with this type.")
    attention_backend: str | None = option(
        None,
        "One of diffusers' attention backends (native, xformers, flash, ...), or eager (for bfloat16 on a CPU); for rollout and "
        "update alike.",
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, more time.")
    decode: Literal["whole", "slices", "tiles"] = option(
        "whole",
        "How the autoencoder decodes: a batch at once, sample by sample (slices: the same pictures in less memory), or in "
        "overlapping tiles of each sample (least memory; large pictures may show their seams).",
    )
    decode_context: int | None = option(
        None,
        "Where the gradient of a reward on some frames of a clip (objective.frames) goes back through a causal autoencoder: this "
        "many latent frames before each. All by default, which is exact; 0 takes the least memory.",
    )

    # -- what it is trained on
    prompts: str = option("tiny-train", "Prompt file (.txt or .jsonl) or embedded set.")
    rewards: dict[str, Any] = option(
        {"tiny_dense": 1.0},
        "Rewards by name, folder or dotted path, each with its weight, or with a mapping: `weight`, the reward's own options, "
        "`shape` (cap, sigmoid, par, dither), and `name` where the key is a label of your own. `flowrl rewards` lists them.",
    )
    references: dict[str, Any] = option(
        {},
        "Pictures to compare with, for rewards that want them: {name: base} draws them by the model before training, ema by the "
        "averaged policy, folder takes them from `path`; count, best_of and by (a reward) choose among them.",
    )
    data: str | None = option(
        None,
        "Train on these pictures instead of the policy's own: pairs (a .jsonl or .parquet file, a folder with chosen/, "
        "rejected/, prompts/), the samples of a run compared by a reward ('RUN reward=NAME gap=0.1'), a folder of pictures with "
        "captions, or what the embedded world draws (tiny-pairs, tiny-scenes).",
    )
    eval_prompts: str | None = option(None, "Prompts of the evaluations during training; none by default.")
    eval_rewards: dict[str, Any] = option(
        {}, "Held-out rewards, measured in evaluations and never trained on; the training rewards are measured too."
    )

    # -- how samples are drawn
    num_inference_steps: int = option(10, "Denoising steps of a rollout. Fewer than in evaluation saves time and costs little.")
    transition: dict[str, Any] = option(
        {"name": "cps"},
        "The stochastic step: flow_sde, dance_sde, memoryless, cps, matched_cps or ddim, with noise_level or eta; "
        "decay=cosine lets that level fall towards the picture, to final_level.",
    )
    steps: dict[str, Any] = option(
        {"name": "window"},
        "Which steps are stochastic and trained: all_but_last, fraction, window or backward; by gradients of a reward: "
        "late or spread.",
    )
    times: dict[str, Any] = option(
        {"name": "grid"},
        "Objectives that noise clean latents: at which times. grid (those of the sampler), uniform or logit_normal; `count` of "
        "them per sample and update, between `low` and `high`.",
    )
    solver: Literal["euler", "dpmpp2m"] = option(
        "euler",
        "How a rollout takes the steps that are not stochastic: euler, or dpmpp2m, whose second order is closer to the ODE. "
        "Evaluations use euler.",
    )
    guidance_scale: float | None = option(
        None,
        "Guidance in rollout and update; the model's default when unset. Training without guidance (1.0) is cheaper.",
    )
    height: int | None = option(None, "Height in pixels; the model's default when unset.")
    width: int | None = option(None, "Width in pixels; the model's default when unset.")
    num_frames: int | None = option(None, "Frames of a clip, for video models: 4 k + 1 for Wan, whose autoencoder wants that.")
    fps: float | None = option(
        None, "Frames per second of clips, which rewards of motion read; the model's own when unset (Wan 16, tiny-wan 8)."
    )
    call: dict[str, Any] = option({}, "Further arguments of the pipeline's call (negative_prompt, max_sequence_length, ...).")
    branches: list[int] = option(
        [],
        "Branches that part from one state at the first stochastic step (and the next ones): [8] lets 8 samples share a start, "
        "[4, 2] splits each of 4 branches in two. Shared states cost one model call. Empty: every sample has its own start.",
    )
    branch_spread: float | None = option(
        None, "Ratio of own to shared noise among branches that part; independent by default. In use: 1 to 8."
    )
    strides: list[int] = option(
        [1],
        "How the ODE goes on after the last noisy step: over every node of the grid (1), and, [1, 2], once more over every "
        "second one. All these ends are scored and their advantages added (G2RPO); the first is the sample.",
    )

    # -- how the reward becomes an update
    objective: dict[str, Any] = option({"name": "grpo"}, "The method and its options.")
    reference_weights: Literal["base", "ema", "old"] = option(
        "base", "What the objective calls the reference: the model as it was, the averaged weights, or the slow copy `old`."
    )
    old_decay: list[float] = option(
        [0, 0.001, 0.5],
        "How the slow copy of the policy, from which some objectives sample, follows it: after each step it keeps "
        "min(max, rate x (step - start)) of itself, given as [start, rate, max].",
    )
    balance: dict[str, Any] = option(
        {"name": "none"}, "Several rewards: balance their gradients, not their values (marble, ...); none adds advantages up."
    )
    prompts_per_step: int = option(16, "Prompts per training step, over all processes.")
    prompts_by: str | None = option(
        None, "Take as many prompts of every value of this column (kind, say) in each step; by default all prompts alike."
    )
    num_generations: int = option(8, "Samples per prompt: the group that advantages are relative to.")
    updates_per_step: int = option(1, "Optimiser updates per training step; the samples are split between them.")
    batch_size: int = option(32, "Samples per denoiser call, per process, in rollout and update.")
    scale_rewards: Literal["group", "batch", "none"] = option(
        "group", "Divide centred rewards by the deviation of the group, of the batch, or not."
    )
    virtual_best: bool = option(
        False,
        "Count an imagined sample with the best possible reward in each group's statistics (NGRPO): groups that are all "
        "wrong then push away from what they did. For rewards with a known maximum.",
    )
    confidence: str | None = option(
        None, "Label of one of `rewards`, of the kind `uncertain`, whose confidence in a sample weighs its advantage (Ctrl-U)."
    )
    aggregation: Literal["sum_then_normalize", "normalize_then_sum", "correlation", "pareto", "softmin"] = option(
        "normalize_then_sum",
        "Several rewards: sum and normalise, or normalise each and sum (GDPO), weigh those less that agree with the others "
        "(correlation), keep what no other sample of the group beats in every reward (pareto), or let the worst count (softmin).",
    )
    aggregation_temperature: float = option(
        0.5, "Of correlation and softmin: 0 would listen to one reward alone, large values to all the same."
    )
    constraints: dict[str, Any] = option(
        {},
        "Rewards whose mean is to reach a value, and which count only while it does not: {tiny_artifact: 0.8}, or with a mapping "
        "of at_least or at_most, rate, decay, most. Their weight is the multiplier that a Lagrangian gives them.",
    )

    # -- optimiser
    learning_rate: float = option(3e-4, "AdamW's learning rate.")
    adam_beta1: float = option(0.9, "AdamW's first beta.")
    adam_beta2: float = option(0.999, "AdamW's second beta.")
    weight_decay: float = option(1e-4, "AdamW's weight decay.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    lr_warmup_steps: int = option(0, "Updates over which the learning rate rises linearly from 0.")
    lr_decay_from: float = option(
        1.0, "Part of max_steps after which the learning rate falls linearly to 0; 1 never lets it fall."
    )
    ema_decay: float = option(
        0.9, "Decay of the averaged weights that are evaluated and saved, per update; warmed up as (1 + n) / (10 + n)."
    )
    max_steps: int = option(100, "Training steps (rollout plus updates).")
    max_minutes: float | None = option(None, "Stop after this many minutes of training, whichever comes first; none by default.")
    seed: int = option(0, "Seed of everything random: prompt order, noise, windows, LoRA initialisation.")

    # -- what is kept
    output_dir: str = option("runs/flowrl", "Folder of the run.")
    checkpointing_steps: int = option(50, "Steps between checkpoints; 0 keeps only the last state.")
    checkpoints_total_limit: int = option(2, "Checkpoints kept.")
    samples_steps: int = option(10, "Steps between sample pictures on disk; 0 for none.")
    clip_format: Literal["webp", "mp4"] = option(
        "webp", "How clips are saved: animated WebP (without loss up to 128 pixels), or mp4, which wants PyAV."
    )
    eval_steps: int = option(0, "Steps between evaluations; 0 for none.")
    eval_num_inference_steps: int = option(20, "Denoising steps of an evaluation, always by the ODE.")
    eval_seeds: int = option(1, "Samples per prompt in an evaluation.")
    report_to: str = option("tensorboard", "Trackers, comma separated, by accelerate's names (tensorboard, wandb, ...), or none.")
    resume_from_checkpoint: str | None = option(None, "Checkpoint folder to go on from, or `latest` of output_dir.")
    checks: bool = option(True, "Check before the first update that the run can work, and stop with the cause if not.")
    watch: dict[str, Any] = option(
        {"name": "trends"},
        "Test pictures, held-out rewards and updates for drifts, and raise alarms (docs/watch.md): trends, with action (warn, "
        "stop, rollback), false_alarms, change, held_out_samples, ignore; or none.",
    )

    def __post_init__(self) -> None:
        positive = (
            "lora_rank", "num_inference_steps", "prompts_per_step", "updates_per_step", "batch_size", "max_steps",
            "learning_rate", "max_grad_norm", "eval_num_inference_steps", "eval_seeds", "aggregation_temperature",
        )  # fmt: skip
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be positive")
        for name in ("lora_alpha", "height", "width", "num_frames", "max_minutes"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be positive")
        not_negative = (
            "checkpointing_steps", "checkpoints_total_limit", "samples_steps", "eval_steps", "weight_decay",
            "lr_warmup_steps", "seed",
        )  # fmt: skip
        for name in not_negative:
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must not be negative")
        for name in ("ema_decay", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must lie in [0, 1)")
        for name in ("model", "prompts", "output_dir"):
            if not getattr(self, name).strip():
                raise ConfigError(f"{name} is empty")
        if self.fps is not None:
            try:
                from flowrl.clips import check_rate  # with numpy, which help can do without

                check_rate(self.fps)
            except ValueError as error:
                raise ConfigError(str(error)) from None
        if self.decode_context is not None and self.decode_context < 0:
            raise ConfigError(f"decode_context={self.decode_context}: must not be negative")
        if self.num_generations < 2:
            raise ConfigError(
                f"num_generations={self.num_generations}: a group of one has no advantage; use at least 2, better 8 to 24"
            )
        if self.aggregation == "correlation" and self.num_generations < 3:
            raise ConfigError(
                f"num_generations={self.num_generations}: aggregation=correlation compares how rewards go together in a group; "
                "use at least 3, better 8 to 24"
            )
        if self.num_inference_steps < 2:
            raise ConfigError(
                "num_inference_steps=1: the last step is deterministic, so there is nothing to train; use at least 2"
            )
        if self.train == "full" and self.dtype != "float32":
            raise ConfigError(
                "train=full updates the weights themselves, which bfloat16 rounds; use dtype=float32 autocast=bfloat16"
            )
        if len(self.old_decay) != 3 or not (self.old_decay[1] >= 0 and 0 <= self.old_decay[2] < 1):
            raise ConfigError(f"old_decay={self.old_decay}: wants [start, rate, max], with rate >= 0 and max in [0, 1)")
        if not 0 <= self.lr_decay_from <= 1:
            raise ConfigError(f"lr_decay_from={self.lr_decay_from}: must lie in [0, 1]")
        whole = all(type(b) is int and b >= 2 for b in self.branches)
        if not whole or self.num_generations % math.prod(self.branches):
            raise ConfigError(
                f"branches={self.branches}: whole numbers from 2 up, whose product divides num_generations={self.num_generations}"
            )
        if self.branch_spread is not None and not (self.branch_spread > 0 and self.branches):
            raise ConfigError(f"branch_spread={self.branch_spread}: must be positive, and goes with branches")
        steps = [stride for stride in self.strides if type(stride) is int and stride >= 1]
        if steps != self.strides or self.strides[:1] != [1] or len(set(steps)) < len(steps):
            raise ConfigError(f"strides={self.strides}: different whole numbers, the first of them 1, as in [1, 2]")
        if not self.rewards and self.data is None:
            raise ConfigError("rewards is empty: name at least one, like rewards.tiny_dense=1")
        if self.eval_steps and not self.eval_prompts:
            raise ConfigError("eval_steps is set but eval_prompts is not: name the prompts to evaluate on")

    def call_arguments(self) -> dict[str, Any]:
        """Pipeline call arguments that the recipe sets."""
        named = {name: getattr(self, name) for name in ("num_inference_steps", "guidance_scale", "height", "width", "num_frames")}
        return {**self.call, **{name: value for name, value in named.items() if value is not None}}

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


# ------------------------------------------------------------------------------------------------ reading


def recipe_names(package: str = "flowrl.train.recipes") -> list[str]:
    """The recipes that ship in a package."""
    return sorted(path.name.removesuffix(".yaml") for path in files(package).iterdir() if path.name.endswith(".yaml"))


def load_recipe(source: str | Path | dict[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from a shipped name, a YAML file or a mapping, with `key=value` overrides. Raises ConfigError in one sentence."""
    return read_recipe(Recipe, "flowrl.train.recipes", source, overrides)


def read_recipe(cls: type[T], package: str, source: str | Path | dict[str, Any], overrides: Iterable[str] = ()) -> T:
    """A recipe of any kind: its dataclass, and the package that those which ship lie in. The class' `sections` name options
    that are {name: ..., option: ...}, and may be given by the name alone."""
    values = dict(source) if isinstance(source, dict) else _read_yaml(source, package)
    for override in overrides:
        _override(cls, values, override)
    return make(cls, values, "recipe")


def _read_yaml(source: str | Path, package: str) -> dict[str, Any]:
    path, names = Path(source), recipe_names(package)
    if str(source) in names:
        text = files(package).joinpath(f"{source}.yaml").read_text(encoding="utf-8")
    elif path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{source} is not UTF-8 text (byte {error.start})") from None
    else:
        close = difflib.get_close_matches(str(source), names, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else f"; recipes that ship: {', '.join(names)}"
        raise ConfigError(f"no recipe {source}{hint}")
    values = _parse(text, str(source))
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: a recipe is a mapping of options")
    return values


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is a date that does not exist
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark and "\n" in text else ""
        raise ConfigError(f"{where}{line}: not valid YAML") from None


def _override(cls: Any, values: dict[str, Any], override: str) -> None:
    """Put one `key=value` or `section.key=value` into place. Naming another class in a section drops the old one's options."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"{override!r}: overrides look like key=value")
    value = _parse(text, override) if text else ""
    section, _, name = key.strip().partition(".")
    known = {field.name: field for field in dataclasses.fields(cls)}
    if section not in known:
        raise ConfigError(unknown("recipe option", section, known))
    if not name:
        if section in cls.sections and isinstance(value, str):
            value = {"name": value}
        if section == "rewards" and isinstance(value, str):
            value = {value: 1.0}
        values[section] = value
        return
    current = values.get(section)
    if current is None:
        make_default = known[section].default_factory
        current = make_default() if make_default is not dataclasses.MISSING else {}
        if section in ("rewards", "eval_rewards"):
            current = {}
    if not isinstance(current, dict):
        raise ConfigError(f"{key}: {section} is a single value, not a section")
    if name == "name":
        values[section] = {"name": value}
    elif value is None:
        values[section] = {k: v for k, v in current.items() if k != name}
    else:
        values[section] = {**current, name: value}


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """'unknown WHAT NAME; did you mean ...?'"""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"unknown {what} {name!r}" + (f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}")


def make(cls: type[T], values: dict[str, Any], what: str) -> T:
    """A dataclass from a mapping: unknown keys and wrong types are ConfigErrors; '1e-4' is a number where one is wanted."""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(unknown(f"{what} option", key, fields))
        arguments[key] = coerced(value, hints[key], f"{key}" if what == "recipe" else f"{what}.{key}")
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what}: {error}") from None


def build(section: dict[str, Any] | str, classes: Mapping[str, type], what: str) -> Any:
    """An instance from a section {name: ..., option: ...} and the classes it may name."""
    section = {"name": section} if isinstance(section, str) else dict(section)
    name = section.pop("name", None)
    if name is None:
        raise ConfigError(f"{what} has no name: choose one of {', '.join(classes)}")
    if name not in classes:
        raise ConfigError(unknown(what, name, classes))
    return make(classes[name], section, what)


def coerced(value: Any, hint: Any, where: str) -> Any:
    """A value as a type hint wants it; of a union the first that fits. Raises ConfigError, which begins with `where`."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        refusals = []
        for option_ in (o for o in options if o is not type(None)):
            try:
                return coerced(value, option_, where)
            except ConfigError as error:
                refusals.append(error)
        raise refusals[0]
    if origin is Literal:
        if value not in options:
            raise ConfigError(f"{where}={value!r}: choose one of {', '.join(map(str, options))}")
        return value
    if hint is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{where}={value!r}: true or false")
        return value
    if hint in (int, float):
        try:
            number = hint(value) if not isinstance(value, bool) else None
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None or not math.isfinite(number) or (hint is int and float(value) != number):
            raise ConfigError(f"{where}={value!r}: wants {'a whole number' if hint is int else 'a number'}")
        return number
    if hint is str:
        if not isinstance(value, str | int | float):
            raise ConfigError(f"{where}={value!r}: wants text")
        return str(value)
    if origin is tuple:
        wanted = options[:1] * len(value) if options[1:] == (...,) and isinstance(value, list | tuple) else options
        if not isinstance(value, list | tuple) or len(value) != len(wanted):
            raise ConfigError(f"{where}={value!r}: wants a list" + (f" of {len(wanted)}" if ... not in wanted else ""))
        return tuple(coerced(each, one, where) for each, one in zip(value, wanted, strict=True))
    if origin is dict and not isinstance(value, dict):
        raise ConfigError(f"{where}={value!r}: wants a mapping, like {where}: {{name: ...}}")
    if origin is list and not isinstance(value, list):
        raise ConfigError(f"{where}={value!r}: wants a list, like [a, b]")
    return value


# ------------------------------------------------------------------------------------------------ arithmetic


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run, worked out and checked before any weight is loaded."""

    recipe: Recipe
    world_size: int
    trained_steps: int  #: Points with gradient per sample: recorded steps, or noised times.
    rows: int | None = None  #: Per prompt; num_generations by default.
    whole_groups: bool = False  #: The rows of a prompt must lie in one batch.

    @property
    def group_size(self) -> int:
        return self.rows or self.recipe.num_generations

    @property
    def images_per_step(self) -> int:
        return self.recipe.prompts_per_step * self.group_size

    @property
    def images_per_update(self) -> int:
        """Per process."""
        return self.images_per_step // self.world_size // self.recipe.updates_per_step

    @property
    def gradient_accumulation_steps(self) -> int:
        """Denoiser calls with gradient behind one update, per process."""
        return self.images_per_update // self.batch_size * self.trained_steps

    @property
    def batch_size(self) -> int:
        return min(self.recipe.batch_size, self.images_per_update)

    @property
    def denoiser_calls(self) -> tuple[int, int]:
        """Of a step over all processes, in images x steps: those of the rollout, and those with gradient."""
        rollout = 0 if self.recipe.data else self.images_per_step * self.recipe.num_inference_steps
        return rollout, self.images_per_step * self.trained_steps

    def check(self) -> Plan:
        r = self.recipe
        divisor = self.world_size * r.updates_per_step
        if r.prompts_per_step % divisor:
            valid = sorted({max(divisor, r.prompts_per_step // divisor * divisor), (r.prompts_per_step // divisor + 1) * divisor})
            raise ConfigError(
                f"prompts_per_step={r.prompts_per_step} does not divide over {self.world_size} process(es) x "
                f"updates_per_step={r.updates_per_step}; use {' or '.join(map(str, valid))}"
            )
        if self.images_per_update % self.batch_size:
            per = self.images_per_update
            divisors = [d for d in range(1, per + 1) if per % d == 0]
            valid = sorted(divisors, key=lambda d: abs(d - r.batch_size))[:3]
            raise ConfigError(
                f"batch_size={r.batch_size} does not divide the {per} images of an update "
                f"(prompts_per_step x num_generations / processes / updates_per_step); use {', '.join(map(str, sorted(valid)))}"
            )
        if self.whole_groups and self.batch_size % self.group_size:
            raise ConfigError(
                f"batch_size={r.batch_size}: {r.objective['name']} compares the {self.group_size} samples of a prompt, so a "
                f"batch holds whole groups; use a multiple of {self.group_size} that divides {self.images_per_update}"
            )
        return self

    def table(self) -> list[tuple[str, str]]:
        r = self.recipe
        calls, updates = self.denoiser_calls
        rollout = "no rollout" if r.data else f"{r.num_inference_steps} denoising steps in a rollout"
        rows = f"{self.group_size} {'of the data' if r.data else 'generations'}"
        return [
            ("prompts per step", str(r.prompts_per_step)),
            ("images per step", f"{self.images_per_step} = {r.prompts_per_step} prompts x {rows}"),
            ("updates per step", f"{r.updates_per_step}, each over {self.images_per_step // r.updates_per_step} images"),
            ("batches per update", f"{self.images_per_update // self.batch_size} of {self.batch_size} images"),
            ("trained points", f"{self.trained_steps} per image; {rollout}"),
            ("gradient accumulation", f"{self.gradient_accumulation_steps} backward passes per update and process"),
            ("denoiser calls per step", f"{calls} images x steps in rollout, {updates} with gradient"),
            ("steps", f"{r.max_steps} ({r.max_steps * self.images_per_step} images)"),
            ("processes", str(self.world_size)),
        ]  # fmt: skip
