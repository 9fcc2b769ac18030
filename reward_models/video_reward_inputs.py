"""What VideoReward (arXiv 2501.13918) is given: a question that holds its three tokens, and frames of a clip in whole patches.

Frames are chosen and sized as by Qwen2-VL's own processor, by what the checkpoint's model_config.json says.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEADS = ("VQ", "MQ", "TA")
TOKENS = tuple(f"<|{head}_reward|>" for head in HEADS)
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
