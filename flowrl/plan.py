"""What a recipe takes on each process: memory while it rolls out, decodes and updates, and time. No weight is loaded.

The run's own code is carried out on shapes (`flowrl.hollow`): a rollout to see what is recorded, one denoiser call, one decoding,
and the objective's loss and backward pass at a batch. So guidance, branches, reference passes, recomputed activations and chains
of steps cost what they cost in the run, for any architecture. Weights, optimiser and averages are counted.

Left out: what rewards take while they score, workspaces inside operators (a convolution's, some hundred MB on a GPU), the CUDA
context (about 0.5 GB), and what an allocator cannot give back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.attention import EAGER
from flowrl.batch import Noised, Prompt, Samples, Step
from flowrl.conditions import BLANK
from flowrl.config import ConfigError, Plan, Recipe
from flowrl.data import load_prompts
from flowrl.hollow import Ledger, Shapes, locate, pipeline
from flowrl.model_facts import defaults_of
from flowrl.policy import DTYPES, Policy
from flowrl.reward_models.base import REWARD_FILE, Traits
from flowrl.reward_models.maps import latent_grid
from flowrl.samplers.branching import branched_rollout, tree_seeds
from flowrl.train.predict import PolicyPredict
from flowrl.train.trainer import copies_of, decode_in_parts, parts

PHASES = ("rollout", "decode", "update")
#: A prompt of usual length, where the recipe's file is not here.
USUAL = "a watercolour of a small harbour at dawn, fishing boats in front of old houses, gulls above them, soft light, mist"
WORTH_A_LOOK = 1e9  #: Bytes from which on it is worked out what an option would leave of them.
DECODED_AT_ONCE = 32  #: As `Policy.decode` has it.
#: Bytes of the weights of rewards, of the sizes that are published: CLIP ViT-L/14 and ViT-H/14 and BLIP-large in float32,
#: Qwen2-VL-2B in bfloat16. Those without weights have 0.
REWARD_BYTES = {
    "clip_score": 1_712_000_000, "aesthetic": 1_712_000_000, "video_text": 1_712_000_000, "pickscore": 3_944_000_000,
    "hpsv2": 3_944_000_000, "image_reward": 1_788_000_000, "video_reward": 4_420_000_000,
    **dict.fromkeys(("brightness", "jpeg_size", "remote", "ensemble", "gate", "tree", "frames", "temporal_flicker"), 0),
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """Something that takes memory. size: bytes in each of PHASES. lower: the options that make it smaller."""

    name: str
    size: tuple[int, int, int]
    lower: str = ""


@dataclass
class Estimate:
    """Of one process. flops: floating point operations of a training step, in each of PHASES. forward: of one denoiser call on a
    batch, guidance included. notes: what is not counted."""

    items: list[Item]
    flops: tuple[int, int, int]
    forward: int
    notes: list[str]

    @property
    def peak(self) -> tuple[int, int, int]:
        """Bytes in each of PHASES."""
        rollout, decode, update = (sum(item.size[k] for item in self.items) for k in range(3))
        return rollout, decode, update

    def seconds(self, forward: float) -> tuple[float, float, float]:
        """Of a training step, in each of PHASES. forward: measured, of one denoiser call on a batch, in seconds."""
        rollout, decode, update = (forward * flops / self.forward for flops in self.flops)
        return rollout, decode, update


def estimate(recipe: Recipe, plan: Plan) -> Estimate:
    """Memory and operations of a recipe whose arithmetic is worked out.

    Raises FileNotFoundError where the model's config files are not on this machine, ConfigError for what cannot be run through.
    """
    return Run(recipe, plan, locate(recipe.model)).estimate()


def texts_of(recipe: Recipe) -> list[str]:
    """The recipe's prompts, where their file is here."""
    try:
        return [] if recipe.data is not None else [prompt.text for prompt in load_prompts(recipe.prompts)]
    except (OSError, ValueError):
        return []


class Stand(PolicyPredict):
    """`Predict` of shapes. In place of each reward stands the mean of what it sees."""

    _on_policy = False  #: Shapes have no values to compare: the old policy is planned with a pass of its own.

    def scores(self, x0: Tensor, images: Tensor | None) -> Tensor:
        seen = x0 if images is None else images
        return seen.float().flatten(1).mean(1, keepdim=True).expand(-1, max(1, len(self.reward_functions)))


@dataclass
class Seen:
    """What stands for a reward when an objective asks what it looks at."""

    traits: Traits


class Run:
    """One process of a run, carried out on shapes."""

    def __init__(self, recipe: Recipe, plan: Plan, folder: Path):
        self.recipe, self.plan, self.texts = recipe, plan, texts_of(recipe)
        self.objective, self.transition, _, self.trained = parts(recipe)
        defaults, _ = defaults_of(folder)
        autocast = DTYPES[recipe.autocast] if recipe.autocast else None
        self.policy = Policy(pipeline(folder, DTYPES[recipe.dtype]), {**defaults, **recipe.call_arguments()}, autocast)
        self.notes: list[str] = []
        self.pixels = (0, 0)  # height and width, once something is decoded
        self._backend()
        decode_in_parts(self.policy, recipe.decode)
        if recipe.train == "full":
            self.policy.train_all()
        else:
            self.policy.add_lora(recipe.lora_rank, recipe.lora_alpha, recipe.lora_targets)
        if recipe.gradient_checkpointing:
            self.policy.enable_gradient_checkpointing()
        self.shapes = Shapes(self.policy)
        self.copies = copies_of(self.objective.needs, recipe)
        for name in self.copies:
            self.policy.snapshot(name)
        for parameter in self.policy.trainable().values():
            parameter.grad = torch.zeros_like(parameter)

    def _backend(self) -> None:
        """Attention by torch's own operators; other kernels keep about as little as its fused ones."""
        name = self.recipe.attention_backend
        if name is not None and (name == EAGER or "native" in name):
            self.policy.set_attention_backend(name)
        elif name is not None:
            self.notes.append(f"attention_backend={name} is counted as torch's own fused attention")

    # ------------------------------------------------------------------------------------------------ what is carried out

    def estimate(self) -> Estimate:
        batch = self.batch()
        call, forward = self.call(batch)
        decode, shown, decoding = self.decode(len(batch))
        update, updating = self.update(batch)
        lower_update = self._lower_update(batch, update)
        batches = self.plan.images_per_step // self.plan.world_size // self.plan.batch_size
        offline = self.recipe.data is not None
        flops = (batches * self.visited(batch) * forward // len(batch), 0 if offline else batches * decoding, batches * updating)
        items = [
            *self.weights(),
            *self.trained_state(),
            *self.rewards(),
            *self.encoded(),
            *self.kept(batch, batches, shown),
            Item("denoiser call of the rollout", (call, 0, 0), f"smaller batch_size (now {len(batch)})"),
            # Decoding itself, or bringing all pictures together, which makes a copy.
            Item("decoding", (0, max(decode, (batches + 1) * shown), 0), self._lower_decoding(decode, len(batch))),
            Item("activations and temporaries of the update", (0, 0, max(update, self._trained_size)), lower_update),
        ]
        if offline:
            items = [Item(item.name, (0, 0, item.size[2]), item.lower) for item in items]
        items = [item for item in items if any(item.size)]
        return Estimate(sorted(items, key=lambda item: -max(item.size)), flops, forward, self.notes)

    def batch(self) -> Samples:
        """A batch as the loop draws it, of zeros from the denoiser on, with the tensors that it would record."""
        recipe, needs, rows = self.recipe, self.objective.needs, self.plan.batch_size
        size = self.plan.group_size
        prompts = [self._prompt] * rows
        group = torch.arange(rows) // size
        self.shapes.zeros = True
        if recipe.data is not None:
            latents = self.policy.trunk(prompts, range(rows), 0)[0]
            batch = Samples(prompts, list(range(rows)), group, latents)
        else:
            draw: Any = self.policy.rollout
            tree: dict[str, Any] = {}
            stochastic, nodes = (self.trained, []) if needs.trajectory else ([], self.trained)
            if recipe.branches:
                keys = [(int(g),) for g in group]
                members = [i % size for i in range(rows)]
                init_seeds, noise_seeds = tree_seeds(keys, members, recipe.branches, len(stochastic))
                draw = partial(branched_rollout, self.policy)
                tree = {"init_seeds": init_seeds, "noise_seeds": noise_seeds, "spread": recipe.branch_spread}
            batch = draw(
                prompts,
                list(range(rows)),
                transition=self.transition if needs.trajectory else None,
                stochastic=stochastic,
                group=group,
                keep_velocity=needs.sampled_velocity,
                solver=recipe.solver,
                **({"record": nodes} if nodes else {}),
                **tree,
            )
        self.shapes.zeros = False
        for step in batch.steps:
            step.group = batch.group
            step.process = torch.linspace(-1, 1, rows) if needs.process else None
        return batch

    @property
    def _prompt(self) -> Prompt:
        """The longest of them, and a picture where the pipeline wants one."""
        columns = BLANK.columns if self.policy.facts.needed_conditions else {}
        return Prompt(max(self.texts, key=len) if self.texts else USUAL, columns)

    def visited(self, batch: Samples) -> int:
        """States that a rollout asks the denoiser about: fewer where branches share them, more where strides end anew."""
        if self.recipe.data is not None:
            return 0
        steps, count = self.recipe.num_inference_steps, len(batch)
        walked = at = 0
        for step in batch.steps:  # up to it there are as many states as stand there
            walked, at = walked + (step.index + 1 - at) * len(step.native), step.index + 1
        ends = sum(-(-(steps - at) // stride) for stride in self.recipe.strides)
        return walked + ends * count

    def call(self, batch: Samples) -> tuple[int, int]:
        """Bytes at most in one call of the denoiser without gradient, guidance included, and its operations."""
        with torch.no_grad(), Ledger(self._known()) as ledger:
            self.policy.velocity(batch.prompts, self.shapes.of(batch.latents.float()), torch.full((len(batch),), 0.5))
        return ledger.peak, ledger.flops

    def decode(self, rows: int) -> tuple[int, int, int]:
        """Bytes at most while a batch is decoded, of its pictures, and operations."""
        part = min(rows, DECODED_AT_ONCE)
        self.shapes.zeros = True
        latents = self.shapes.of(self.policy.trunk([self._prompt] * part, range(part), 0)[0])
        self.shapes.zeros = False
        with Ledger(self._known()) as ledger:
            pictures = self.policy.decode(latents, [self._prompt] * part)
        times, self.pixels = -(-rows // part), (pictures.shape[-2], pictures.shape[-1])
        shown = pictures.nbytes * rows // part
        return ledger.peak + (shown - pictures.nbytes), shown, ledger.flops * times

    def update(self, batch: Samples) -> tuple[int, int]:
        """Peak bytes of a batch's loss and gradient, without weights and samples; operations of all points."""
        advantage = torch.linspace(-1, 1, len(batch)) if self.recipe.data is None else torch.ones(len(batch))
        if self.recipe.data is not None and self.plan.group_size == 2:
            advantage[1::2] = -1
        if hasattr(self.objective, "choose"):
            rows, advantage = self.objective.choose(batch, advantage)
            batch = batch.select(rows)
        found = [self._point(batch, index, advantage) for index in self._points(batch)]
        flops = [each for _, each in found]
        if self.objective.needs.points == "noised":
            total = flops[0] * self.plan.trained_steps
        elif self.objective.needs.points == "nodes":
            total = sum(flops) * len(batch.steps) // len(flops)
        else:  # in proportion to the states, which branches share
            total = flops[-1] * sum(len(step.native) for step in batch.steps) // len(batch.steps[-1].native)
        return max(peak for peak, _ in found), total

    def _points(self, batch: Samples) -> Sequence[int | None]:
        """Where the loss is asked: at which of the recorded steps, or, None, at noised latents. All cost the same but for chains
        of steps, the longest of which starts first, and branches, which share the first state and not the last."""
        if self.objective.needs.points == "noised":
            return [None]
        differ = self.objective.needs.points == "nodes" or self.recipe.branches
        return sorted({0, len(batch.steps) - 1}) if differ else [0]

    def _point(self, batch: Samples, index: int | None, advantage: Tensor) -> tuple[int, int]:
        latents = self.shapes.of(batch.latents)
        steps = [self._shaped(each) for each in batch.steps]
        shaped = Samples(batch.prompts, batch.seeds, batch.group, latents, steps=steps, start=batch.start)
        weights = torch.ones(max(1, len(self.recipe.rewards)))
        stands: dict[str, Any] = {name: Seen(Traits(needs=self._looks_at())) for name in self.recipe.rewards or {"reward": 1}}
        options: dict[str, Any] = {"reference": self.recipe.reference_weights, "context": self.recipe.decode_context}
        predict = Stand(self.policy, shaped, rewards=stands, weights=weights, **options)
        with Ledger([*self._known(), latents]) as ledger:
            point: Any = self._noised(latents, batch.group) if index is None else steps[index]
            loss = self.objective.loss(predict, point, advantage)
            loss.total.sum().backward()
            del loss, point
            predict.forget()
        return ledger.peak, ledger.flops

    def _shaped(self, step: Step) -> Step:
        tensors = {name: getattr(step, name) for name in ("native", "native_next", "log_prob", "v")}
        shaped: dict[str, Any] = {name: None if value is None else self.shapes.of(value) for name, value in tensors.items()}
        return replace(step, **shaped)

    def _noised(self, latents: Tensor, group: Tensor) -> Noised:
        x0 = latents.float()
        maps = torch.ones(len(x0), *latent_grid(latents, self.pixels)) if self.objective.needs.maps else None
        return Noised(x0, torch.randn_like(x0), torch.full((len(x0),), 0.5), group, maps)

    def _known(self) -> Iterator[Tensor]:
        for module in self._modules().values():
            yield from module.parameters()
            yield from module.buffers()
        for parameter in self.policy.trainable().values():
            if parameter.grad is not None:
                yield parameter.grad
        for snapshot in self.policy.snapshots.values():
            yield from snapshot.values()

    # ------------------------------------------------------------------------------------------------ what is counted

    def _modules(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self.policy.pipe.components.items() if isinstance(part, nn.Module)}

    @property
    def _trained_size(self) -> int:
        """Bytes of what trains. AdamW takes as much again for a moment, when the activations are gone."""
        return size_of(self.policy.trainable().values())

    def weights(self) -> Iterator[Item]:
        lower = "" if self.recipe.dtype != "float32" or self.recipe.train == "full" else "dtype=bfloat16 (half)"
        for name, module in self._modules().items():
            own = [p for key, p in module.named_parameters() if "lora_" not in key]
            count = sum(p.numel() for p in own)
            yield Item(f"{name}: {type(module).__name__}, {_count(count)}", _always(size_of([*own, *module.buffers()])), lower)

    def trained_state(self) -> Iterator[Item]:
        """Adapters, gradients, AdamW's two moments, and the copies of the weights that a run keeps."""
        size, lora = self._trained_size, self.recipe.train == "lora"
        lower = f"lora_rank (now {self.recipe.lora_rank}), lora_targets" if lora else "train=lora"
        if lora:
            yield Item("LoRA", _always(size), lower)
        balanced = 0 if self.recipe.balance["name"] == "none" else len(self.recipe.rewards) + 1
        yield Item("gradients", (0, 0, size * (1 + balanced)), lower if not balanced else f"balance.gram; {lower}")
        yield Item("AdamW's moments", _always(2 * size), lower)
        for name in self.copies:
            yield Item(f"copy of the weights: {name}", _always(size), lower)

    def rewards(self) -> Iterator[Item]:
        """Of rewards whose weights are known; the others are named in the notes."""
        unknown = []
        for name in dict.fromkeys(reward_names({**self.recipe.rewards, **self.recipe.eval_rewards})):
            place = reward_folder(name)
            size = weights_in(place) if place is not None else REWARD_BYTES.get(name, 0)
            if self._is_latent(name):
                size = self._model_again(name)
            if size:
                yield Item(f"reward {name}", _always(size), "flowrl serve it elsewhere, rewards.remote={url: ...}")
            elif name not in REWARD_BYTES and not name.startswith("tiny_"):  # verifiers have no weights
                unknown.append(name)
        if unknown:
            self.notes.append(f"weights of the rewards {', '.join(unknown)}")

    def encoded(self) -> Iterator[Item]:
        """Encoded prompts, which are kept for good, each once."""
        memo = self.policy._memo.memo
        one = max((size_of(t for t in _tensors(value) if len(t) == 1) for value in memo.values()), default=0)
        seen = self.recipe.prompts_per_step // self.plan.world_size * self.recipe.max_steps
        count = min(seen, len(self.texts) or seen)
        yield Item(f"encoded prompts, {count:,} of {gigabytes(one)}", _always(one * count), "fewer distinct prompts")

    def kept(self, batch: Samples, batches: int, shown: int) -> Iterator[Item]:
        """What the batches of a step leave until it ends: recorded steps, and pictures."""
        steps = batch.trajectory_bytes + batch.latents.nbytes
        lower = "steps={name: window, size: ...}" if self.objective.needs.trajectory and batch.steps else ""
        lower = ", ".join(filter(None, (lower, "more processes, smaller prompts_per_step")))
        before = (batches - 1, batches, batches)
        yield Item("recorded steps and latents", _times(steps, before), lower)
        if self.recipe.data is None:
            yield Item("pictures", _times(shown, (batches - 1, batches - 1, batches)), "more processes, smaller prompts_per_step")

    def _model_again(self, name: str) -> int:
        """Bytes of a latent reward, which loads its model for itself: as a rule that of the run."""
        named = [pair for module in self._modules().values() for pair in module.named_parameters()]
        count = sum(p.numel() for key, p in named if "lora_" not in key)
        options = [value for value in self.recipe.rewards.values() if isinstance(value, dict) and value.get("name") == name]
        return count * (2 if any(value.get("dtype") == "bfloat16" for value in options) else 4)

    def _looks_at(self) -> tuple[str, ...]:
        names = list(reward_names(self.recipe.rewards))
        return ("latents",) if names and all(map(self._is_latent, names)) else ("images",)

    def _is_latent(self, name: str) -> bool:
        return name == "latent" or _card(name).get("reward") == "latent"

    def _lower_decoding(self, decode: int, rows: int) -> str:
        words = [f"smaller batch_size (now {self.plan.batch_size})"]
        for how in {"whole": ("slices", "tiles"), "slices": ("tiles",), "tiles": ()}[self.recipe.decode]:
            if decode > WORTH_A_LOOK:
                with suppress(ConfigError):
                    decode_in_parts(self.policy, how)
                    words.insert(0, f"decode={how} ({gigabytes(self.decode(rows)[0])})")
        return ", ".join(words)

    def _lower_update(self, batch: Samples, update: int) -> str:
        words = [f"smaller batch_size (now {self.plan.batch_size})"]
        if self.objective.needs.differentiable and self._looks_at() != ("latents",):
            words.append("objective.frames, decode_context" if self.policy.facts.draws_clips else "height, width")
        if not self.recipe.gradient_checkpointing and update > WORTH_A_LOOK:
            with suppress(ValueError, AttributeError):  # denoisers without
                self.policy.enable_gradient_checkpointing()
                words.insert(0, f"gradient_checkpointing=true ({gigabytes(self.update(batch)[0])})")
        return ", ".join(words)


# ------------------------------------------------------------------------------------------------ helpers


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; one that is named twice counts once."""
    return sum({id(t): t.nbytes for t in tensors}.values())


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in (value if isinstance(value, tuple | list) else [value]) if isinstance(t, Tensor) and t.ndim]


def _always(size: int) -> tuple[int, int, int]:
    return size, size, size


def _times(size: int, counts: tuple[int, int, int]) -> tuple[int, int, int]:
    rollout, decode, update = (size * count for count in counts)
    return rollout, decode, update


def reward_names(section: Any) -> Iterator[str]:
    """The names of rewards in a recipe's section, those inside others too."""
    for label, value in section.items():
        if isinstance(value, dict) and "name" in value:
            yield str(value["name"])
        elif label not in ("of", "by"):
            yield str(label)
        inner = [value.get(key) for key in ("of", "by")] if isinstance(value, dict) else []
        for part in [p for i in inner for p in (i if isinstance(i, list) else [i])]:
            if isinstance(part, str):
                yield part.split()[0]
            elif isinstance(part, dict):
                yield from reward_names({part.get("name", "?"): part})


def reward_folder(name: str) -> Path | None:
    """The folder of a reward that ships, or that is a folder."""
    from importlib.resources import files

    for place in (Path(str(files("flowrl.assets"))) / "rewards" / name, Path(name)):
        if (place / REWARD_FILE).is_file():
            return place
    return None


def weights_in(folder: Path) -> int:
    """Bytes of the weights in a folder, as float32."""
    from safetensors import safe_open

    total = 0
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            total += sum(4 * torch.Size(opened.get_slice(key).get_shape()).numel() for key in opened.keys())  # noqa: SIM118
    return total


def _card(name: str) -> dict[str, Any]:
    place = reward_folder(name)
    return {} if place is None else json.loads((place / REWARD_FILE).read_text(encoding="utf-8"))


def gigabytes(size: float) -> str:
    """1e9 bytes are 1 GB, as in the metric memory_gb."""
    return f"{size / 1e9:.2f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"


def _count(weights: int) -> str:
    return f"{weights / 1e9:.2f} B" if weights >= 1e9 else f"{weights / 1e6:.1f} M"
