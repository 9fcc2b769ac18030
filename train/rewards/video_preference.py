"""Trains VideoReward (arXiv 2501.13918): Bradley-Terry with ties for the heads of one Qwen2-VL, each with labels of its own.

    L = mean over known labels (pair i, head d) of -log P(label_{i,d} | r_d(first_i) - r_d(second_i))      `losses`, k = 5

A label that is missing or invalid is left out of the mean (the authors' code counts it as a loss of 0). What it writes is in the
published layout, with mean and deviation of each head on the held-out clips.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from flowrl.clip_pairs import ClipPair, load_clip_pairs
from flowrl.config import ConfigError
from flowrl.reward_models.base import REWARD_FILE
from flowrl.reward_models.video_checkpoint import CONFIG_FILE
from flowrl.reward_models.video_reward_inputs import HEADS, TEMPLATE, TOKENS, Settings, read_template
from flowrl.reward_models.video_reward_network import BASE, VideoRewardNetwork
from flowrl.reward_models.weights import unreachable
from flowrl.tiny.clip_pairs import flawed_pair
from flowrl.tiny.moves import FPS, FRAMES, SIDE, all_specs
from flowrl.train.rewards import losses
from flowrl.train.rewards.loop import RewardRecipe, Score, held_out_prompts, picks, seeds

#: What the thumbnail is asked.
SHORT = "Visual Quality: <|VQ_reward|> Motion Quality: <|MQ_reward|> {text_prompt} Text Alignment: <|TA_reward|>"
#: A turn as Qwen2-VL's own template writes it, without the line that says who it is.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
LINEAR = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def thumbnail(width: int = 64, layers: int = 2, template: str = SHORT) -> VideoRewardNetwork:
    """An untrained Qwen2-VL that sees moving shapes in tokens of 12 x 12 pixels and two frames, and reads their grammar."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    texts = [*(spec["prompt"] for spec in all_specs()), template, "system user assistant"]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    marks = [f"<|{name}|>" for name in ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")]
    special = ["<pad>", "<unk>", *marks]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate([*special, *words])}, "<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", chat_template=CHAT)
    fast.add_tokens([*marks, *TOKENS], special_tokens=True)
    heads = max(1, width // 32)
    text: dict[str, Any] = {
        "vocab_size": len(fast),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
    }
    vision = {"depth": layers, "embed_dim": width, "hidden_size": width, "num_heads": heads, "mlp_ratio": 2, "patch_size": 6}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = dict(zip(names, fast.convert_tokens_to_ids(list(tokens)), strict=True))
    model = Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision, **ids))
    settings = Settings(num_frames=FRAMES - 1, max_frame_pixels=SIDE * SIDE, min_frame_pixels=SIDE * SIDE)
    return VideoRewardNetwork(model, fast, settings, template)


def from_language_model(place: str | Path, template: str, settings: Settings) -> VideoRewardNetwork:
    """A Qwen2-VL with three more tokens and an untrained head. Raises ValueError where there is none."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place))
        model = Qwen2VLModel.from_pretrained(str(place), dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise unreachable(place, error) from None
    tokenizer.add_tokens(list(TOKENS), special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))
    return VideoRewardNetwork(model, tokenizer, settings, template)


class Marks(nn.Module):
    """What is learnt of the embeddings of the three tokens, where those of all others stay as they are."""

    def __init__(self, network: VideoRewardNetwork):
        super().__init__()
        embedding = network.model.get_input_embeddings()
        self.rows = nn.Parameter(torch.zeros(len(TOKENS), embedding.weight.shape[1]))
        self.ids = network.ids
        embedding.register_forward_hook(self._added)

    def _added(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        known = inputs[0][..., None] == torch.tensor(self.ids, device=output.device)
        return output + (known.to(self.rows) @ self.rows).to(output.dtype)


@dataclass
class VideoPreference:
    """Options of the task `video_preference`."""

    tried_by: ClassVar = "tiny-video-nft"

    data: str = "tiny"  #: File of `flowrl.clip_pairs` (.csv, .jsonl), or `tiny`: drawn clips whose flaws are known.
    eval_data: str | None = None  #: Held-out data; by default a part of the prompts of `data`.
    eval_share: float = 0.1  #: That part.
    held_out: int = 96  #: Held-out pairs of `tiny`.
    #: What to start from: a VideoReward in the published layout, or a Qwen2-VL; folder or hub id. Unset: for `tiny`, an untrained
    #: thumbnail; else Qwen/Qwen2-VL-2B-Instruct.
    model: str | None = None
    template: str | None = None  #: A text file with {text_prompt} and the three tokens; unset: the model's, or this library's.
    fps: float | None = None  #: Frames per second of clips where neither the row nor the file says.
    sampled_fps: float = 2.0  #: Frames per second that the model looks at.
    num_frames: int | None = None  #: Frames that it looks at, in place of a rate.
    max_frame_pixels: int = 448 * 448  #: Pixels of a frame, at most.
    tie_factor: float = 5.0  #: k: the larger, the likelier is a tie.
    lora_rank: int = 64  #: LoRA on the linear layers of the language model, merged when saved; 0 trains all of its weights.
    lora_alpha: float = 128.0  #: Its weights count alpha / rank times.
    train_vision: bool = True  #: Train the vision tower too.
    gradient_checkpointing: bool = False  #: Compute the layers again in the backward pass, to save memory.
    width: int = 64  #: Of the thumbnail, a multiple of 32.
    layers: int = 2  #: Of the thumbnail, to see and to read.

    def __post_init__(self) -> None:
        if not self.tie_factor > 1:
            raise ConfigError(f"task.tie_factor={self.tie_factor}: must exceed 1, where ties are impossible")
        if not 0 < self.eval_share < 1:
            raise ConfigError(f"task.eval_share={self.eval_share}: a share between 0 and 1")
        if self.lora_rank < 0 or not self.lora_alpha > 0:
            raise ConfigError(f"task: lora_rank={self.lora_rank} must not be negative, and lora_alpha={self.lora_alpha} positive")
        if self.width % 32:
            raise ConfigError(f"task.width={self.width}: must be a multiple of 32")

    def prepare(self, recipe: RewardRecipe, device: torch.device) -> nn.Module:
        self.recipe, self.device = recipe, device
        try:
            self.train_set, self.test_set = self._read()
            self.network = self._start()
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(f"task: {error}") from None
        network = self.network.requires_grad_(True)
        network.model.visual.requires_grad_(self.train_vision)
        self.marks: Marks | None = None
        if self.lora_rank and self.start is not None:
            from peft import LoraConfig, inject_adapter_in_model

            network.model.language_model.requires_grad_(False)
            lora = LoraConfig(r=self.lora_rank, lora_alpha=self.lora_alpha, target_modules=LINEAR)
            inject_adapter_in_model(lora, network.model.language_model)
            self.marks = network.marks = Marks(network)
        if self.gradient_checkpointing:
            network.model.gradient_checkpointing_enable({"use_reentrant": False})
        return network.to(device)

    @property
    def start(self) -> str | None:
        return self.model if self.model or self.data == "tiny" else BASE

    def _start(self) -> VideoRewardNetwork:
        if self.start is None:
            return thumbnail(self.width, self.layers, read_template(self.template) if self.template else SHORT)
        if (Path(self.start) / CONFIG_FILE).is_file():
            return VideoRewardNetwork.load(self.start, template=self.template, dtype="float32")
        sizes = {"fps": self.sampled_fps, "num_frames": self.num_frames, "max_frame_pixels": self.max_frame_pixels}
        template = read_template(self.template) if self.template else TEMPLATE
        return from_language_model(self.start, template, Settings(**sizes))  # type: ignore[arg-type]

    def _read(self) -> tuple[list[ClipPair], list[ClipPair]]:
        if self.data == "tiny":
            rng = np.random.default_rng([self.recipe.seed, 1])
            return [], [_drawn(rng, "test") for _ in range(self.held_out)]
        everything = load_clip_pairs(self.data, HEADS)
        if self.eval_data:
            return everything, load_clip_pairs(self.eval_data, HEADS)
        held = held_out_prompts((pair.prompt for pair in everything), self.eval_share, self.recipe.seed, self.data)
        return [p for p in everything if p.prompt not in held], [p for p in everything if p.prompt in held]

    def batch(self, step: int) -> list[ClipPair]:
        if self.data == "tiny":
            return [_drawn(np.random.default_rng(seed), "train") for seed in seeds(self.recipe, step)]
        return [self.train_set[i] for i in picks(len(self.train_set), self.recipe, step)]

    def scores_of(self, pairs: Sequence[ClipPair]) -> Tensor:
        """Raw scores (B, 2, 3) of both clips of each pair."""
        seen = [
            self.network.sampled(frames, self.fps if rate is None else rate).to(self.device)
            for pair in pairs
            for frames, rate in pair.clips()
        ]
        return self.network(seen, [pair.prompt for pair in pairs for _ in range(2)]).unflatten(0, (-1, 2))

    def loss(self, batch: list[ClipPair]) -> tuple[Tensor, dict[str, float]]:
        scores = self.scores_of(batch)
        d, labels = scores[:, 0] - scores[:, 1], labels_of(batch).to(scores.device)
        accuracy = {f"accuracy/{head}": losses.accuracy(*known_of(d.detach(), labels, i)) for i, head in enumerate(HEADS)}
        known = {name: value for name, value in accuracy.items() if not math.isnan(value)}
        return known_mean(losses.bradley_terry_with_ties(d, labels, self.tie_factor), labels), known

    def evaluate(self) -> dict[str, Score]:
        """Of each head: accuracy of decided pairs; accuracy_with_ties, with the best threshold; and which share are ties."""
        parts = [self.scores_of(self.test_set[i : i + 8]).cpu() for i in range(0, len(self.test_set), 8)]
        scores, labels = torch.cat(parts), labels_of(self.test_set)
        self.units = scores.flatten(0, 1)
        result = {}
        for i, head in enumerate(HEADS):
            d, label = known_of(scores[:, 0] - scores[:, 1], labels, i)
            if not len(label):
                continue
            result[f"accuracy/{head}"] = Score(losses.accuracy(d, label), int((label != 0.5).sum()))
            result[f"accuracy_with_ties/{head}"] = Score(losses.accuracy_with_ties(d, label)[0], len(label))
            result[f"ties/{head}"] = Score.mean(label == 0.5)
        return result

    def save(self, folder: Path) -> None:
        mean, std = self.units.mean(0), self.units.std(0).clamp_min(1e-6)
        self.network.settings.mean, self.network.settings.std = (dict(zip(HEADS, of.tolist(), strict=True)) for of in (mean, std))
        scale = self.lora_alpha / self.lora_rank if self.marks else None
        embedding = self.network.model.get_input_embeddings().weight
        added = self.marks.rows.detach().to(embedding) if self.marks else 0.0
        with torch.no_grad():
            embedding[self.network.ids] += added
            self.network.save(folder, torch.float32 if self.start is None else torch.bfloat16, scale)
            embedding[self.network.ids] -= added
        card = {"reward": "video_reward", "options": {}}
        (folder / REWARD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")

    def describe(self) -> str:
        start = "an untrained Qwen2-VL of thumbnail size" if self.start is None else f"`{self.start}`"
        data = (
            "drawn clips of the training captions, whose noise (VQ), shaking (MQ) and content (TA) differ by known amounts"
            if self.data == "tiny"
            else f"`{Path(self.data).name}`: {len(self.train_set):,} pairs"
        )
        return (
            f"A reward model of clips with three heads, {', '.join(HEADS)}, made of {start} by Bradley-Terry with ties"
            f" (k = {self.tie_factor:g}) on {data}. Held out: {len(self.test_set):,} pairs of other prompts; ties are counted by"
            " the threshold that suits them best. Scores are in deviations from their mean on the held-out clips."
        )


def labels_of(pairs: Sequence[ClipPair]) -> Tensor:
    """(B, 3), NaN where nothing is known."""
    return torch.tensor([pair.labels for pair in pairs])


def known_of(d: Tensor, labels: Tensor, head: int) -> tuple[Tensor, Tensor]:
    """Differences and labels (n,) of one head, where they are known. d, labels: (B, K)."""
    known = ~labels[:, head].isnan()
    return d[known, head], labels[known, head]


def known_mean(values: Tensor, labels: Tensor) -> Tensor:
    """The mean of values (B, K) where the label is known; 0, with graph, where none is."""
    known = ~labels.isnan()
    return torch.where(known, values, 0.0).sum() / known.sum().clamp(min=1)


def _drawn(rng: np.random.Generator, split: str) -> ClipPair:
    spec, clips, labels = flawed_pair(rng, split)
    first, second = torch.from_numpy(clips).float()
    return ClipPair(spec["prompt"], first, second, labels, (FPS, FPS))
