"""The network of VideoReward (arXiv 2501.13918): Qwen2-VL without its vocabulary head, a linear head at three tokens; its files.

Frames become patches with graph; no file is written or read on the way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowrl.reward_models.backbones import resized
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
from flowrl.reward_models.video_reward_inputs import (
    HEADS,
    TEMPLATE,
    TOKENS,
    Settings,
    checked_template,
    frame_indices,
    frame_size,
    read_template,
)
from flowrl.reward_models.weights import unreachable

BASE = "Qwen/Qwen2-VL-2B-Instruct"  #: What it was made of.
HEAD, EMBEDDING = "rm_head.weight", "language_model.embed_tokens.weight"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  #: Of Qwen2-VL's pixels.


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
