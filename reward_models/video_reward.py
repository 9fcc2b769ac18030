"""VideoReward (arXiv 2501.13918): Qwen2-VL reads a clip and three criteria, each of which ends in a token of its own.

    r_d = (w_d . h_d - mean_d) / std_d        h_d: last hidden state at the token of d = VQ, MQ, TA
    r   = sum_d weight_d r_d

VQ is visual quality, MQ quality of motion, TA agreement with the text. Attention is causal, and the prompt stands behind the
tokens of VQ and MQ: these two are blind to it. Frames become patches with graph; no file is written or read on the way.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowrl.batch import Samples
from flowrl.reward_models.backbones import resized
from flowrl.reward_models.base import Traits, nearest
from flowrl.reward_models.clips import Once, clips_of, rate_of
from flowrl.reward_models.preference import Preset
from flowrl.reward_models.video_checkpoint import (
    CONFIG_FILE,
    TEMPLATE_FILE,
    canonical,
    find_folder,
    lora_scale,
    merged,
    newest_checkpoint,
    read_checkpoint,
    read_facts,
)
from flowrl.reward_models.weights import unreachable

PRESET = Preset("KwaiVGI/VideoReward", licence="see model card (Apache-2.0; code: MIT)")
HEADS = ("VQ", "MQ", "TA")
BASE = "Qwen/Qwen2-VL-2B-Instruct"  #: What it was made of.
HEAD, EMBEDDING = "rm_head.weight", "language_model.embed_tokens.weight"
TOKENS = tuple(f"<|{head}_reward|>" for head in HEADS)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  #: Of Qwen2-VL's pixels.
FEWEST, MOST = 4, 768  #: Frames that are sampled by rate.

#: What the model is asked, in the order of the published prompt, with its tokens and headings, in words of our own.
TEMPLATE = """
Rate a generated video by three criteria, one after the other and none by another: Visual Quality, Motion Quality, and Text Alignment. Each rating lies between 0, the worst, and 10, the best.

**Visual Quality:**
How good single frames are, whatever moves.
- **Reasonableness:** Bodies, objects and surroundings are built as they can be; nothing contradicts itself.
- **Clarity:** Frames are sharp and easy to read, without blur.
- **Detail Richness:** Textures, materials, light and small things such as hair or cloth are worked out.
- **Aesthetic and Creativity:** Colour, composition, depth and mood please and fit together.
- **Safety:** Nothing is violent, adult or otherwise harmful; if something is, the rating is the lowest.

Please provide the ratings of Visual Quality: <|VQ_reward|>
END

**Motion Quality:**
How good the changes between frames are.
- **Stability:** Frames continue each other; colours, textures and parts of bodies stay, and nothing jumps.
- **Naturalness:** Things move as physics and living bodies do.
- **Aesthetic Quality:** Motion and changes of view are fluid and pleasant to watch.
- **Fusion:** What moves lies in its surroundings and not on top of them.
- **Clarity of Motion:** Moving parts stay sharp and steady.
- **Amplitude:** Enough moves; a video that hardly changes is rated low.

Please provide the ratings of Motion Quality: <|MQ_reward|>
END

**Text Alignment:**
How well the video shows what the textual prompt says.
- **Subject Relevance** The subjects are those of the text, in number, looks and behaviour.
- **Motion Relevance:** What they do is what the text says, in kind, extent and direction.
- **Environment Relevance:** Place and background are those of the text.
- **Style Relevance:** A style that the text names is kept.
- **Camera Movement Relevance:** The camera moves as the text says.

Textual prompt - {text_prompt}
Please provide the ratings of Text Alignment: <|TA_reward|>
END
"""  # noqa: E501


@dataclass
class Settings:
    """What a checkpoint says of its inputs and outputs. Pixels are those of a frame; mean and std those of its raw scores."""

    fps: float = 2.0
    num_frames: int | None = None
    max_frame_pixels: int = 448 * 448
    min_frame_pixels: int = 128 * 28 * 28
    mean: dict[str, float] = field(default_factory=lambda: dict.fromkeys(HEADS, 0.0))
    std: dict[str, float] = field(default_factory=lambda: dict.fromkeys(HEADS, 1.0))

    @classmethod
    def of(cls, facts: Mapping[str, Any], place: str | Path) -> Settings:
        """From model_config.json. Raises ValueError for a model that is asked otherwise, or samples its frames otherwise."""
        data, model = facts.get("data_config", {}), facts.get("model_config", {})
        wanted: list[tuple[str, Any, Any]] = [
            ("model_config.reward_token", model.get("reward_token", "special"), "special"),
            ("model_config.use_special_tokens", model.get("use_special_tokens", True), True),
            ("data_config.sample_type", data.get("sample_type", "uniform"), "uniform"),
            ("data_config.eval_dim", list(data.get("eval_dim") or HEADS), list(HEADS)),
        ]
        for name, found, known in wanted:
            if found != known:
                raise ValueError(f"{place}: {name} is {found!r}; only {known!r} can be read")
        said = facts.get("inference_config") or {}
        sizes = {name: data[name] for name in ("fps", "num_frames", "max_frame_pixels", "min_frame_pixels") if name in data}
        settings = cls(**sizes)
        if said:
            settings.mean, settings.std = ({head: float(said[f"{head}_{key}"]) for head in HEADS} for key in ("mean", "std"))
        return settings

    @property
    def facts(self) -> dict[str, Any]:
        """The sections of model_config.json that `of` reads them from."""
        data = {name: value for name, value in asdict(self).items() if name not in ("mean", "std")}
        units = {f"{head}_{key}": getattr(self, key)[head] for head in HEADS for key in ("mean", "std")}
        return {"data_config": data, "inference_config": units}


# ------------------------------------------------------------------------------------------------ the network


class VideoRewardNetwork(nn.Module):
    """Qwen2-VL without its vocabulary head, and the linear head of the three tokens.

    Clips, a sequence of (F_i, 3, H_i, W_i) in [0, 1] whose frames are sampled already, and prompts -> raw scores (N, 3), fp32.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: Settings | None = None, template: str = TEMPLATE, outputs: int = 3):
        super().__init__()
        self.model, self.tokenizer, self.settings = model, tokenizer, settings or Settings()
        self.template = checked_template(template)
        config = model.config
        self.rm_head = nn.Linear(config.text_config.hidden_size, outputs, bias=False, dtype=model.dtype)
        self.ids = [int(i) for i in tokenizer.convert_tokens_to_ids(list(TOKENS))]
        self.video = tokenizer.convert_ids_to_tokens(config.video_token_id)
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer of this Qwen2-VL has no chat template, which says where the clip stands")

    def forward(self, clips: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        patches, grids = zip(*(self.patches(clip) for clip in clips), strict=True)
        ids, mask = (value.to(clips[0].device) for value in self.tokens(prompts, grids))
        states = self.model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values_videos=torch.cat(patches).to(self.model.dtype),
            video_grid_thw=torch.tensor(grids, device=ids.device),
            mm_token_type_ids=2 * (ids == self.model.config.video_token_id).int(),
            use_cache=False,
        ).last_hidden_state
        rows = torch.arange(len(ids), device=ids.device)
        at = torch.stack([states[rows, (ids == token).int().argmax(1)] for token in self.ids], 1)  # (N, 3, W)
        raw = F.linear(at.float(), self.rm_head.weight.float())
        return raw[..., 0] if raw.shape[-1] == 1 else raw.diagonal(dim1=1, dim2=2)

    def patches(self, clip: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """(F, 3, H, W) -> what the vision tower takes, (t h w, 3 x frames x patch x patch), and (t, h, w), with graph."""
        vision = self.model.config.vision_config
        side, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        size = frame_size(clip.shape[-2:], side * merge, self.settings.min_frame_pixels, self.settings.max_frame_pixels)
        mean, std = (clip.new_tensor(values, dtype=torch.float32).view(1, 3, 1, 1) for values in (MEAN, STD))
        x = (resized(clip, size, "squash") - mean) / std
        x = torch.cat([x, x[-1:].expand(-len(x) % frames, -1, -1, -1)])  # the last frame again
        t, h, w = len(x) // frames, size[0] // side, size[1] // side
        x = x.reshape(t, frames, 3, h // merge, merge, side, w // merge, merge, side)
        return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1), (t, h, w)

    def tokens(self, prompts: Sequence[str], grids: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask (N, L), padded at the right. Raises ValueError for a prompt that holds one of the model's own tokens."""
        texts = []
        for prompt, (t, h, w) in zip(prompts, grids, strict=True):
            if own := [token for token in (*TOKENS, self.video) if token in prompt]:
                raise ValueError(f"a prompt must not hold {own[0]}: {prompt[:80]!r}")
            asked = self.template.replace("{text_prompt}", prompt)
            turn = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": asked}]}]
            text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            count = t * h * w // self.model.config.vision_config.spatial_merge_size**2
            texts.append(text.replace(self.video, self.video * count, 1))
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=self.padding)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()

    @property
    def padding(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    def standardised(self, raw: Tensor) -> Tensor:
        """(N, 3) raw -> (N, 3) in deviations from the mean on the authors' clips."""
        mean, std = (raw.new_tensor([of[head] for head in HEADS]) for of in (self.settings.mean, self.settings.std))
        return (raw - mean) / std

    def sampled(self, clip: Tensor, fps: float | None, rate: float | None = None, count: int | None = None) -> Tensor:
        """The frames that the model looks at, (f, 3, H, W). fps: of the clip; rate, count: in place of the settings' own."""
        if rate is None and count is None:
            count = self.settings.num_frames
        rate = self.settings.fps if rate is None else rate
        return clip[frame_indices(len(clip), fps, rate, count, self.model.config.vision_config.temporal_patch_size)]

    # -- files

    @classmethod
    def load(
        cls, place: str | Path, base: str | Path | None = None, template: str | Path | None = None, dtype: str = "bfloat16"
    ) -> VideoRewardNetwork:
        """From a folder or hub id in the published layout, frozen, LoRA merged into the weights.

        base: where the architecture and the tokenizer are; None: what model_config.json names. template: a file, see
        `read_template`; None: the folder's own, where it has one. Raises ValueError, in one sentence, for what is missing.
        """
        from transformers import AutoConfig, AutoTokenizer

        root = find_folder(place)
        facts, checkpoint = read_facts(root), newest_checkpoint(root)
        named = str(base or facts.get("model_config", {}).get("model_name_or_path") or BASE)
        beside = root / named if (root / named).is_dir() else named
        words = checkpoint / "tokenizer" if (checkpoint / "tokenizer").is_dir() else beside
        try:
            config, tokenizer = AutoConfig.from_pretrained(str(beside)), AutoTokenizer.from_pretrained(str(words))
        except (OSError, ValueError) as error:
            raise unreachable(beside, error) from None
        if config.model_type != "qwen2_vl":
            raise ValueError(f"{beside} is a {config.model_type}, and VideoReward is a qwen2_vl")
        tokenizer.add_tokens(list(TOKENS), special_tokens=True)
        state, whole = read_checkpoint(checkpoint)
        if not whole:
            state = {**base_weights(beside, len(tokenizer)), **state}
        state = merged(state, lora_scale(facts.get("peft_lora_config") or {}))
        for name in (HEAD, EMBEDDING):
            if name not in state:
                raise ValueError(f"{checkpoint} lacks {name}")
        if len(state[EMBEDDING]) <= max(tokenizer.convert_tokens_to_ids(list(TOKENS))):
            raise ValueError(f"{checkpoint} has embeddings of {len(state[EMBEDDING])} tokens, fewer than its tokenizer knows")
        head = state.pop(HEAD)
        own = template or next(iter(root.glob(TEMPLATE_FILE)), None)
        network = cls(
            model_of(config, state, getattr(torch, dtype), checkpoint),
            tokenizer,
            Settings.of(facts, root),
            read_template(own) if own else TEMPLATE,
            len(head),
        )
        network.rm_head.weight.data.copy_(head)
        return network.requires_grad_(False).eval()

    def save(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16, scale: float | None = None, **facts: Any) -> None:
        """As `load` reads it: the published layout, with the architecture, the tokenizer and the template in it.

        scale: of LoRA's weights, which are merged. facts: stored beside, in model_config.json.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.config.save_pretrained(folder / "base")
        self.tokenizer.save_pretrained(folder / "base")
        (folder / TEMPLATE_FILE).write_text(self.template, encoding="utf-8")
        weights = {**self.model.state_dict(), HEAD: self.rm_head.weight}
        state = merged({canonical(name): value.detach().cpu() for name, value in weights.items()}, scale)
        kept = {name: value.to(dtype).contiguous() for name, value in state.items()}
        save_file(kept, folder / "model.safetensors")
        card = {
            "model_config": {"model_name_or_path": "base", "output_dim": len(self.rm_head.weight)},
            **self.settings.facts,
            **facts,
        }
        (folder / CONFIG_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def base_weights(place: str | Path, tokens: int) -> dict[str, Tensor]:
    """Of a Qwen2-VL, with embeddings of so many tokens. Raises ValueError where there is none."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    try:
        model = Qwen2VLModel.from_pretrained(str(place), dtype="auto")
    except (OSError, ValueError) as error:
        raise unreachable(place, error) from None
    model.resize_token_embeddings(tokens)
    return model.state_dict()


def model_of(config: Any, state: Mapping[str, Tensor], dtype: torch.dtype, where: str | Path) -> Any:
    """A Qwen2VLModel of these weights, whatever the vocabulary of its config. Raises ValueError that names what is missing."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    config.text_config.vocab_size = len(state[EMBEDDING])
    kept = {name: value.to(dtype) for name, value in state.items()}
    model, info = Qwen2VLModel.from_pretrained(
        None, config=config, state_dict=kept, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    if wrong := sorted([*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])]):
        raise ValueError(f"{where} lacks {len(wrong)} weights of its architecture, or has them in another shape: {wrong[0]} ...")
    return model


# ------------------------------------------------------------------------------------------------ inputs


def frame_indices(count: int, fps: float | None, rate: float, frames: int | None = None, factor: int = 2) -> Tensor:
    """Which of a clip's `count` frames are looked at: `frames` of them, or `rate` per second of `fps`, spread evenly.

    As Qwen's own sampler: an even number, at least 4 and at most 768 by rate, all where there are fewer. Raises ValueError for a
    single frame, and where the rate is wanted and fps is None.
    """
    if frames is not None:
        wanted: float = frames
    elif fps is None:
        raise ValueError("the frame rate of a clip must be known to sample it")
    else:
        wanted = min(max(count / fps * rate, FEWEST), min(MOST, count) // factor * factor)
    taken = min(round(wanted / factor) * factor, count)
    if taken < factor:
        raise ValueError(f"a clip of {count} frames, {taken} of them sampled, is no clip: {factor} at least")
    return torch.linspace(0, count - 1, taken).round().long()


def frame_size(size: Sequence[int], factor: int, least: int, most: int) -> tuple[int, int]:
    """(height, width) in whole tokens of `factor` pixels, the proportions kept, with `least` to `most` pixels in all."""
    height, width = (max(factor, round(side / factor) * factor) for side in size)
    area = size[0] * size[1]
    if height * width > most:
        height, width = (max(factor, math.floor(side / math.sqrt(area / most) / factor) * factor) for side in size)
    elif height * width < least:
        height, width = (math.ceil(side * math.sqrt(least / area) / factor) * factor for side in size)
    return height, width


def read_template(path: str | Path) -> str:
    """The text of a file, in which {text_prompt} is the prompt; of a .py file the text in it that has all three tokens.

    A .py file, as the authors' prompt_template.py, is read and not run. Raises ValueError where there is no such text.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        if Path(path).suffix == ".py":
            constants = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
            text = next((c for c in constants if isinstance(c, str) and all(token in c for token in TOKENS)), "")
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise ValueError(f"template={str(path)!r} cannot be read: {error}") from None
    return checked_template(text, f"template={str(path)!r}: ")


def checked_template(text: str, where: str = "template: ") -> str:
    """The text itself. Raises ValueError where it lacks the prompt, or does not hold each of the three tokens once."""
    for part in (*TOKENS, "{text_prompt}"):
        if text.count(part) != 1:
            raise ValueError(f"{where}it must hold {part} once, and does {text.count(part)} times")
    return text


# ------------------------------------------------------------------------------------------------ the reward


class VideoReward:
    """Visual quality, quality of motion and agreement with the text of clips, in deviations from the mean of the authors' data.

    Rewards of one folder share its weights, and read the same clips once: `{vq: {name: video_reward, dimensions: VQ}, mq: ...}`
    costs no more than the sum. The published weights were trained with the authors' prompt; the one here says the same in other
    words, so that scores differ from the published ones: `template` takes the original.
    """

    def __init__(
        self,
        model: str | Path = PRESET.model,  #: Folder in the published layout, or its hub id.
        #: VQ, MQ, TA, a list of them, or weights as {VQ: 1, MQ: 0.5}; the scores are added up.
        dimensions: Any = HEADS,
        base: str | Path | None = None,  #: Folder or hub id of the Qwen2-VL; unset: as model_config.json says.
        #: A text file with {text_prompt} and the three tokens in it, or the authors' prompt_template.py, which is not run.
        template: str | Path | None = None,
        fps: float | None = None,  #: Frames per second of the clips; unset: as the samples say.
        sampled_fps: float | None = None,  #: Frames per second that it looks at; unset: as model_config.json says (2).
        num_frames: int | None = None,  #: Frames that it looks at, of any clip, in place of a rate.
        batch_size: int = 4,  #: Clips in one forward pass.
        dtype: str = "bfloat16",  #: Of the weights: float32, bfloat16 or float16.
        folder: str | Path | None = None,  #: What `flowrl train-reward` wrote, in place of `model`.
    ):
        if sampled_fps is not None and num_frames is not None:
            raise ValueError(f"video_reward: sampled_fps={sampled_fps:g} and num_frames={num_frames}: one or the other")
        self.weights = torch.tensor([weights_of(dimensions)[head] for head in HEADS])
        place = folder or model
        names = (str(value) if value is not None else None for value in (base, template))
        self.network = _network(str(place), *names, dtype)
        self.read = _reader(self.network, fps, sampled_fps, num_frames, batch_size)
        self.name = "video_reward"
        timed = num_frames is None and fps is None and (sampled_fps is not None or self.network.settings.num_frames is None)
        needs = ("clips", "fps") if timed else ("clips",)
        self.traits = Traits(needs=needs, differentiable=True, licence=PRESET.licence_of(place))

    def __call__(self, samples: Samples) -> Tensor:
        scores = self.read(samples)
        return (scores * self.weights.to(scores)).sum(1)

    def scores(self, samples: Samples) -> Tensor:
        """VQ, MQ, TA, (N, 3), in deviations from the mean on the authors' clips, with graph."""
        return self.read(samples)


def weights_of(dimensions: Any) -> dict[str, float]:
    """Weights of VQ, MQ and TA, 0 for those that are not named. Raises ValueError for other names."""
    named = (
        dimensions
        if isinstance(dimensions, Mapping)
        else dict.fromkeys([dimensions] if isinstance(dimensions, str) else dimensions, 1.0)
    )
    for name in named:
        if name not in HEADS:
            raise ValueError(f"video_reward: unknown dimension {name!r}{nearest(str(name), HEADS)}")
    if not any(named.values()):
        raise ValueError("video_reward: dimensions names none of VQ, MQ and TA")
    return {head: float(named.get(head, 0.0)) for head in HEADS}


@lru_cache(maxsize=2)
def _network(place: str, base: str | None, template: str | None, dtype: str) -> VideoRewardNetwork:
    return VideoRewardNetwork.load(place, base, template, dtype)


@lru_cache(maxsize=8)
def _reader(network: VideoRewardNetwork, fps: float | None, rate: float | None, count: int | None, batch_size: int) -> Once:
    def read(samples: Samples) -> Tensor:
        clips = clips_of(samples, "video_reward", frames=2)
        timed = count is None and (rate is not None or network.settings.num_frames is None)
        own = rate_of(samples, fps, "video_reward") if timed else None
        network.to(clips.device)
        parts = []
        for rows in torch.arange(len(clips)).split(batch_size):
            seen = [network.sampled(clips[i], own, rate, count) for i in rows]
            parts.append(network(seen, [samples.texts[i] for i in rows]))
        return network.standardised(torch.cat(parts))

    return Once(read)
