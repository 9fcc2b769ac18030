"""The pictures of an evaluation in a folder: drawn once, scored from their files, there for exports; an interrupted one goes on.

    kept = Kept(Path("pictures"), ["tiny-sd3", "runs/demo"], prompts, protocol)
    kept.draw("tiny-sd3")                                     # what is not there yet
    kept.evaluate("tiny-sd3", rewards)                        # an Evaluation, of 8 bits per colour

The folder is one of `flowrl sample`: every picture carries what drew it, samples.jsonl its scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flowrl.batch import Prompt, Samples
from flowrl.config import ConfigError
from flowrl.evaluate import Evaluation, finite, score_all, seeds_of
from flowrl.pairs import load_batch
from flowrl.pictures import read_facts
from flowrl.protocol import Protocol
from flowrl.reward_models.base import Reward, traits_of
from flowrl.sample import Item, Settings, draw, is_drawn, made, plan, write_table


class Kept:
    """One folder, one protocol, one or several models. Raises ConfigError before anything is drawn if the input is at fault."""

    def __init__(
        self,
        out: Path,
        models: Sequence[str],
        prompts: Sequence[Prompt],
        protocol: Protocol,
        batch_size: int | None = None,
        fps: float | None = None,
    ):
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--pictures {out} is a file: name a folder")
        call = dict(protocol.call)
        self.out, self.prompts, self.protocol, self.batch_size = out, list(prompts), protocol, batch_size
        self.settings = Settings(
            protocol.num_inference_steps,
            protocol.guidance_scale,
            call.pop("height", None),
            call.pop("width", None),
            call=call,
            dtype=protocol.dtype or "float32",
            solver=protocol.solver,
            fps=fps,
        )
        self.items: dict[str, list[Item]] = {model: [] for model in models}
        for prompt, seeds in zip(prompts, seeds_of(prompts, protocol), strict=True):
            for item in plan(models, [prompt], seeds, self.settings, [None], [], out)[0]:
                self.items[item.request["model"]].append(item)

    def todo(self, model: str) -> list[Item]:
        """What is not there yet. Raises ConfigError if another picture stands in a place, FileNotFoundError without a model."""
        source = self.items[model][0].column.source
        source.check()
        digest = source.digest()
        distinct = {item.file: item for item in self.items[model]}
        try:
            return [item for item in distinct.values() if not is_drawn(item, digest)]
        except ConfigError as error:
            raise ConfigError(f"{str(error).rpartition(': ')[0]}: choose another --pictures folder, or delete this one") from None

    def draw(self, model: str, device: str | None = None, progress: bool = False) -> int:
        """Draw what is not there yet; how many pictures that were."""
        todo = self.todo(model)
        digests = {item.column.source.text: item.column.source.digest() for item in todo[:1]}
        with made(self.out):
            for _ in draw(todo, todo, self.settings, {}, digests, self.batch_size, device, progress):
                pass
        return len(todo)

    def files(self, model: str) -> list[list[Path]]:
        """(P, S) files of the pictures."""
        return [[item.file for item in row] for row in self._rows(model)]

    def label(self, model: str) -> str:
        """What tables call a model."""
        return self.items[model][0].column.label

    def folder(self, model: str) -> str:
        """The name of a model's folder."""
        return self.items[model][0].column.folder

    def _rows(self, model: str) -> list[list[Item]]:
        count = self.protocol.seeds
        return [self.items[model][i * count : (i + 1) * count] for i in range(len(self.prompts))]

    def evaluate(
        self,
        model: str,
        rewards: dict[str, Reward],
        *,
        ema: bool | None = None,
        features: Any = None,
        device: str = "cpu",
        progress: bool = False,
    ) -> Evaluation:
        """Scores of what is there, and the table samples.jsonl."""
        files = [item.file for item in self.items[model]]
        facts = read_facts(files[0])
        size = self.batch_size or 16
        place = iter(range(0, len(files), size))

        def read(part: Sequence[tuple[Prompt, int]]) -> Samples:
            start = next(place)
            return stored([prompt for prompt, _ in part], [seed for _, seed in part], files[start : start + len(part)], device)

        guidance = self.protocol.guidance_scale
        guidance = facts["resolved"].get("guidance_scale") if guidance is None else guidance
        protocol, name = replace(self.protocol, guidance_scale=guidance, ema=ema), self.label(model)
        result = score_all(read, self.prompts, rewards, protocol, name, size, progress=progress, features=features)
        result.weights = facts.get("weights")
        self._write_table(model, result)
        return result

    def _write_table(self, model: str, result: Evaluation) -> None:
        rows = [
            {
                "file": item.file.relative_to(self.out).as_posix(),
                "model": model,
                "sampler": "ode",
                "column": item.column.label,
                "prompt": item.prompt.text,
                "seed": item.seed,
                "rewards": {reward: finite(result.scores[i, j, k]) for k, reward in enumerate(result.rewards)},
                **({"columns": item.prompt.columns} if item.prompt.columns else {}),
            }
            for i, row in enumerate(self._rows(model))
            for j, item in enumerate(row)
        ]
        write_table(self.out, list({row["file"]: row for row in rows}.values()), set())


def check_pictures_suffice(rewards: dict[str, Reward]) -> None:
    """Raise ConfigError for rewards that want more than pictures in a file."""
    for label, reward in rewards.items():
        if "latents" in traits_of(reward).needs:
            raise ConfigError(f"reward {label} scores latents, and files of pictures hold none: leave it out, or --pictures")


def stored(prompts: Sequence[Prompt], seeds: Sequence[int], files: Sequence[Path], device: str = "cpu") -> Samples:
    """Samples from files of `flowrl sample`, pictures or clips."""
    images, fps = load_batch(files)
    nothing = torch.zeros(len(files), 0)
    return Samples(list(prompts), list(seeds), torch.arange(len(files)), nothing, images.to(device), fps=fps)
