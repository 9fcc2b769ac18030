"""Pictures to compare with: from the base model, from the slowly moving policy, or from a folder.

In a recipe:  references={name: base, count: 2}              drawn once per prompt by the model before training
              references={name: ema, best_of: 4, by: tiny_dense}     the best of four of the averaged weights, anew each step
              references={name: folder, path: references}    what `flowrl sample MODEL --prompts FILE --out references` wrote
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowrl.batch import Prompt, Samples
from flowrl.evaluate import prompt_seed
from flowrl.pairs import load_picture
from flowrl.policy import Policy
from flowrl.reward_models.base import RewardError, load_reward, score_one


@dataclass
class Drawn:
    """References that a policy draws by the ODE: the `count` best of `best_of` by a reward, or just `count`.

    weights: "reference" is the model before training, and its pictures are kept (8 bits, in memory); "ema" is the averaged
    policy of the moment. Their seeds depend on the prompt alone, and differ from those of the samples and of evaluations.
    """

    weights: str
    count: int = 1
    best_of: int | None = None
    by: Any = None
    num_inference_steps: int | None = None
    batch_size: int = 32
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.count < 1 or (self.best_of or self.count) < self.count:
            raise ValueError(f"references: count={self.count} of best_of={self.best_of} is not a choice")
        if (self.best_of or self.count) > self.count and self.by is None:
            raise ValueError("references: best_of wants `by`, the reward that says which are best")
        self._judge = None if self.by is None else load_reward(self.by)

    def __call__(self, prompts: Sequence[Prompt], policy: Policy) -> Tensor:
        """(N, R, 3, H, W) in [0, 1], one row for each prompt."""
        pictures: dict[str, Tensor] = self._kept if self.weights == "reference" else {}
        wanted = list({prompt.text: prompt for prompt in prompts if prompt.text not in pictures}.values())
        at_once = max(1, self.batch_size // (self.best_of or self.count))
        with torch.no_grad(), policy.using(self.weights):
            for part in (wanted[start : start + at_once] for start in range(0, len(wanted), at_once)):
                chosen = self._draw(part, policy).mul(255).round().byte().cpu()
                pictures |= {prompt.text: row for prompt, row in zip(part, chosen, strict=True)}
        return torch.stack([pictures[prompt.text] for prompt in prompts]).float() / 255

    def _draw(self, prompts: Sequence[Prompt], policy: Policy) -> Tensor:
        drawn = self.best_of or self.count
        items = [(prompt, prompt_seed(prompt.text, j, seed=1)) for prompt in prompts for j in range(drawn)]
        steps: dict[str, Any] = {} if self.num_inference_steps is None else {"num_inference_steps": self.num_inference_steps}
        samples = policy.rollout([prompt for prompt, _ in items], [seed for _, seed in items], **steps)
        samples.images = pictures = policy.decode(samples, batch_size=len(samples))
        images = pictures.unflatten(0, (len(prompts), drawn))
        if self._judge is None:
            return images
        values = score_one(self._judge.name, self._judge, samples).nan_to_num(-torch.inf).unflatten(0, (len(prompts), drawn))
        best = values.argsort(dim=1, descending=True, stable=True)[:, : self.count].to(images.device)
        return images[torch.arange(len(prompts), device=images.device)[:, None], best]


@dataclass
class Stored:
    """References from a folder that `flowrl sample` wrote, found by their prompt. count: pictures per prompt, the first ones."""

    path: str
    count: int = 1

    def __post_init__(self) -> None:
        table = Path(self.path) / "samples.jsonl"
        if not table.is_file():
            raise FileNotFoundError(f"references: there is no {table}; `flowrl sample MODEL --prompts FILE --out DIR` writes one")
        self._files: dict[str, list[Path]] = defaultdict(list)
        for line in table.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            self._files[row["prompt"]].append(Path(self.path) / row["file"])

    def __call__(self, prompts: Sequence[Prompt], policy: Policy) -> Tensor:
        rows = {text: self._read(text) for text in dict.fromkeys(prompt.text for prompt in prompts)}
        sizes = {picture.shape for pictures in rows.values() for picture in pictures}
        if len(sizes) > 1:
            found = ", ".join(sorted(f"{width} x {height}" for _, height, width in sizes))
            raise RewardError(f"references: {self.path} has pictures of several sizes ({found}); one batch wants one")
        return torch.stack([torch.stack(rows[prompt.text]) for prompt in prompts])

    def _read(self, text: str) -> list[Tensor]:
        files = self._files.get(text, [])[: self.count]
        if len(files) < self.count:
            raise RewardError(f"references: {self.path} has {len(files)} of {self.count} pictures for {text!r}")
        try:
            return [load_picture(file) for file in files]
        except (ValueError, FileNotFoundError) as error:
            raise RewardError(f"references: {error}") from None


def references_of(section: dict[str, Any]) -> Drawn | Stored | None:
    """From a recipe's section {name: base | ema | folder, option: ...}; None where it is empty. Raises ValueError."""
    options = dict(section)
    name = options.pop("name", None)
    if name is None and not options:
        return None
    kinds: dict[Any, Any] = {"base": lambda **o: Drawn("reference", **o), "ema": lambda **o: Drawn("ema", **o), "folder": Stored}
    if name not in kinds:
        raise ValueError(f"references: name={name!r}: choose one of {', '.join(kinds)}")
    try:
        return kinds[name](**options)
    except TypeError as error:
        raise ValueError(f"references {name}: {str(error).rpartition('() ')[2]}") from None


def attach(samples: Samples, source: Drawn | Stored | None, policy: Policy) -> None:
    """Put the references of a source, if there is one, beside the samples."""
    if source is not None:
        samples.references = source(samples.prompts, policy).to(samples.latents.device)
