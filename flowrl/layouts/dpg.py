"""DPG-Bench of ELLA, arXiv 2403.05135, github.com/TencentQQGYLab/ELLA (dpg_bench/compute_dpg_bench.py and dist_eval.sh read)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from flowrl.batch import Prompt
from flowrl.evaluate import Evaluation
from flowrl.layouts.base import Layout, Results, Row, natural, placing, score_of
from flowrl.pictures import picture_bytes

_SCORES = re.compile(r"(.+\.(?:png|jpg|jpeg|webp)), ([^,]+(?:, [^,]+)*)", re.IGNORECASE)
_SUMMARY = re.compile(r"\t([^:]+): (.+)|(DPG-Bench score): (.+)")
_HEADINGS = ("Model:", "L1 category scores:", "L2 category scores:", "Image path:", "Save results to:")


class DPG(Layout):
    """OUT/ITEM.png, up to four square pictures of one prompt as a grid of 2 x 2, row by row; results: a text file."""

    name, count = "dpg", 4

    def prompts(self, path: Path) -> list[Prompt]:
        """The folder dpg_bench/prompts: ITEM.txt, one prompt each."""
        files = sorted(path.glob("*.txt"), key=lambda file: natural(file.stem)) if path.is_dir() else []
        if not files:
            raise ValueError(f"dpg: no prompts in {path}: give the folder dpg_bench/prompts, with a file ITEM.txt for each")
        prompts = [Prompt(file.read_text(encoding="utf-8-sig").strip(), {"item_id": file.stem}) for file in files]
        if empty := [file for file, prompt in zip(files, prompts, strict=True) if not prompt.text]:
            raise ValueError(f"dpg: {empty[0]} is empty")
        return prompts

    def keys(self, prompts: Sequence[Prompt]) -> list[str]:
        for number, prompt in enumerate(prompts, 1):
            if "item_id" not in prompt.columns:
                raise ValueError(f"dpg: prompt {number}, {prompt.text!r}, lacks an item_id: take --prompts dpg:dpg_bench/prompts")
        return [str(prompt.columns["item_id"]) for prompt in prompts]

    def places(self, root: Path, prompts: Sequence[Prompt], seeds: int) -> list[list[Path]]:
        if seeds > 4:
            raise ValueError(f"dpg: a grid has room for 4 pictures of a prompt, not {seeds}: take --seeds 4")
        return [[root / f"{key}.png"] * seeds for key in self.keys(prompts)]

    def write(self, prompt: Prompt, sources: Sequence[Path], places: Sequence[Path]) -> None:
        pictures = [opened(source) for source in sources]
        side = pictures[0].width
        for source, picture in zip(sources, pictures, strict=True):
            if picture.size != (side, side):
                raise ValueError(f"dpg: {source} is {picture.width} x {picture.height}: its scorer cuts grids of squares")
        grid = Image.new("RGB", (side, side) if len(pictures) == 1 else (2 * side, 2 * side))
        for j, picture in enumerate(pictures):
            grid.paste(picture, (side * (j % 2), side * (j // 2)))
        with placing(places[0]) as file:
            file.write_bytes(picture_bytes(grid, {}))

    def read(self, place: Path, index: int, seeds: int) -> Any:
        grid = opened(place)
        across = 1 if seeds == 1 else 2
        side = grid.width // across
        if grid.size != (across * side, across * side):
            raise ValueError(f"dpg: {place} is {grid.width} x {grid.height}, no grid of {across} x {across} squares")
        x, y = side * (index % across), side * (index // across)
        return grid.crop((x, y, x + side, y + side))

    def results(self, path: Path, seeds: int | None) -> Results:
        """dpg-bench_TIME_results.txt: lines `PICTURE, score, ..., mean`, then what they sum up to."""
        rows, summary, level, model = [], {}, "", None
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            where = f"{path}, line {number}"
            if found := _SCORES.fullmatch(line):
                picture = Path(found[1])
                *scores, mean = [score_of(text, where, 0, 1) for text in found[2].split(", ")]
                if not scores or not math.isclose(sum(scores) / len(scores), mean, abs_tol=1e-6):
                    raise ValueError(f"{where}: the last number is not the mean of those before it")
                key = picture.name.split(".")[0]
                prompt = Prompt(key, {"item_id": key})
                rows += [Row(where, key, j, {"dpg": score}, prompt, str(picture)) for j, score in enumerate(scores)]
            elif found := _SUMMARY.fullmatch(line):
                summary[f"{level}{found[1]}" if found[1] else "DPG-Bench"] = score_of(found[2] or found[4], where, 0, 100)
            elif line.startswith(_HEADINGS):
                level = f"{line[:2]} " if line.startswith("L") else ""
                model = line.removeprefix("Model: ") if line.startswith("Model:") else model
            elif line.strip():
                raise ValueError(f"{where}: neither `PICTURE, score, ..., mean` nor a line of the summary")
        return Results(rows, summary, model)

    def command(self, root: Path, evaluation: Evaluation) -> str:
        protocol = evaluation.protocol
        side = protocol.size[-1] if protocol.size else "RESOLUTION"
        return f"PIC_NUM={protocol.seeds} bash dpg_bench/dist_eval.sh {root} {side}"


def opened(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")
