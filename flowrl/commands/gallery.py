"""`flowrl gallery`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowrl.commands.common import REWARDS_HELP, command, evaluate_models, make_folder, positive, sampling_options


def add(commands: Any) -> None:
    gallery = command(commands, "gallery", run_gallery, "a page that puts models side by side: same prompt, same seed")
    gallery.add_argument("models", nargs="+", help="models, runs or checkpoints; the first is the base")
    gallery.add_argument("--out", type=Path, default=Path("gallery"), help="folder of the page (default gallery)")
    gallery.add_argument("--rewards", nargs="+", default=["tiny_strict", "tiny_dense"], help=REWARDS_HELP)
    gallery.add_argument("--limit", type=positive, default=48, help="prompts, spread evenly over the file (default 48)")
    gallery.add_argument("--title", default="flowrl gallery")
    sampling_options(gallery, seeds=2, prompts="tiny-test")


def run_gallery(arguments: argparse.Namespace) -> int:
    from flowrl.evaluate import comparison_rows, score_rows
    from flowrl.gallery import Cell, Table, write_gallery
    from flowrl.gallery.page import check_replaceable
    from flowrl.record import beside
    from flowrl.reward_models.base import to_pil
    from flowrl.sample import Settings, command_of, request_for

    check_replaceable(arguments.out)
    make_folder(arguments.out.parent)
    results = evaluate_models(arguments.models, arguments, keep_images=True, limit=arguments.limit)
    cells = []
    for model, result in zip(arguments.models, results, strict=True):
        assert result.samples is not None and result.samples.images is not None
        for i, picture in enumerate(to_pil(result.samples.images)):
            p, s = divmod(i, arguments.seeds)
            scores = {name: None if (v := float(result.scores[p, s, k])) != v else v for k, name in enumerate(result.rewards)}
            image = beside(picture) if isinstance(picture, list) else picture
            prompt = result.prompts[p]
            steps, guidance = result.protocol.num_inference_steps, result.protocol.guidance_scale
            settings = Settings(steps, guidance, arguments.height, arguments.width, dtype=arguments.dtype)
            details = {
                "steps": str(steps),
                "guidance": str(guidance),
                "noise seed": str(result.seeds[p][s]),
                "command": command_of(request_for(model, prompt, result.seeds[p][s], settings)),
            }
            cells.append(Cell(result.model, prompt.text, s, image, scores, prompt.columns.get("kind"), details))
    base = results[0]
    tables = [
        Table(f"{other.model} against {base.model}: {reward}", *comparison_rows(base, other, reward))
        for other in results[1:]
        for reward in base.rewards
    ]
    if len(results) == 1:
        tables = [Table(base.model, *score_rows(base))]
    shared = base.protocol
    subtitle = f"{len(base.prompts)} {shared.prompts} prompts, {shared.seeds} seeds, {shared.num_inference_steps} ODE steps"
    page = write_gallery(arguments.out, cells, title=arguments.title, subtitle=subtitle, tables=tables)
    print(f"{page}")
    return 0
