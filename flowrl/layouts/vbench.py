"""VBench, arXiv 2311.17982, github.com/Vchitect/VBench (prompts/README, evaluate.sh, vbench/*.py and scripts/ read)."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flowrl.batch import Prompt
from flowrl.clips import RATE, clip_bytes, is_clip, read_clip
from flowrl.evaluate import Evaluation
from flowrl.layouts.base import Layout, Results, Row, file_name, placing, score_of
from flowrl.pictures import read_frames


class Dimension(NamedTuple):
    """Weight in its score; the values that count as 0 and as 1; the prompt suite, and so the folder, where it is another's."""

    weight: float = 1.0
    low: float = 0.0
    high: float = 1.0
    suite: str = ""


#: The dimensions of quality and of meaning.
QUALITY = {
    "subject_consistency": Dimension(low=0.1462),
    "background_consistency": Dimension(low=0.2615, suite="scene"),
    "temporal_flickering": Dimension(low=0.6293),
    "motion_smoothness": Dimension(low=0.706, high=0.9975, suite="subject_consistency"),
    "aesthetic_quality": Dimension(suite="overall_consistency"),
    "imaging_quality": Dimension(suite="overall_consistency"),
    "dynamic_degree": Dimension(weight=0.5, suite="subject_consistency"),
}
SEMANTIC = {
    "object_class": Dimension(),
    "multiple_objects": Dimension(),
    "human_action": Dimension(),
    "color": Dimension(),
    "spatial_relationship": Dimension(),
    "scene": Dimension(high=0.8222),
    "appearance_style": Dimension(low=0.0009, high=0.2855),
    "temporal_style": Dimension(high=0.364),
    "overall_consistency": Dimension(high=0.364),
}
SUITES = {name: dimension.suite or name for name, dimension in {**QUALITY, **SEMANTIC}.items()}


class VBench(Layout):
    """OUT/MODEL/SUITE/PROMPT-0.mp4 ...; results: NAME_eval_results.json, of one dimension or of several.

    A suite serves up to three dimensions. Its standard mode reads five clips of a prompt, of every suite; its README wants 25 of
    temporal_flickering. Clips in which a scorer finds nothing to score are missing from its results: they abstain.
    """

    name, count, whole = "vbench", 5, False

    def prompts(self, path: Path) -> list[Prompt]:
        """VBench_full_info.json, SUITE.txt, or the folder prompts/prompts_per_dimension."""
        if path.suffix == ".json":
            return self._of_info(path)
        suites = dict.fromkeys(SUITES.values())
        files = [f for suite in suites if (f := path / f"{suite}.txt").is_file()] if path.is_dir() else [path]
        if not files or any(file.stem not in suites or not file.is_file() for file in files):
            raise ValueError(
                f"vbench: {path} is neither VBench_full_info.json, SUITE.txt nor a folder of them ({', '.join(suites)})"
            )
        return [
            Prompt(line.strip(), {"kind": file.stem})
            for file in files
            for line in file.read_text(encoding="utf-8").split("\n")
            if line.strip()
        ]

    def _of_info(self, path: Path) -> list[Prompt]:
        entries = read_json(path)
        prompts = []
        for number, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
            try:
                suite = next(SUITES[name] for name in entry["dimension"])
                prompts.append(Prompt(entry["prompt_en"].strip(), {"kind": suite}))
            except (KeyError, TypeError, AttributeError, StopIteration):
                raise ValueError(f'{path}, entry {number}: wants "prompt_en" and "dimension", of those that VBench has') from None
        return list({(prompt.text, prompt.columns["kind"]): prompt for prompt in prompts}.values())

    def keys(self, prompts: Sequence[Prompt]) -> list[str]:
        for number, prompt in enumerate(prompts, 1):
            if prompt.columns.get("kind") not in SUITES.values():
                raise ValueError(
                    f"vbench: prompt {number}, {prompt.text!r}, is of no suite ({', '.join(dict.fromkeys(SUITES.values()))}): "
                    "take --prompts vbench:prompts/prompts_per_dimension"
                )
        return [f"{prompt.columns['kind']}/{prompt.text}" for prompt in prompts]

    def root(self, out: Path, model: str, prompts: Sequence[Prompt]) -> Path:
        return out / model

    def places(self, root: Path, prompts: Sequence[Prompt], seeds: int) -> list[list[Path]]:
        self.keys(prompts)
        places = []
        for prompt in prompts:
            names = [file_name(prompt.text, f"{prompt.text}-{j}.mp4", self.name) for j in range(seeds)]
            places.append([root / prompt.columns["kind"] / name for name in names])
        return places

    def write(self, prompt: Prompt, sources: Sequence[Path], places: Sequence[Path]) -> None:
        for source, place in zip(sources, places, strict=True):
            with placing(place) as file:
                write_mp4(source, file)

    def read(self, place: Path, index: int, seeds: int) -> Any:
        return read_frames(place)

    def files(self, path: Path) -> list[Path]:
        return sorted(path.rglob("*_eval_results.json")) if path.is_dir() else [path]

    def results(self, path: Path, seeds: int | None) -> Results:
        """NAME_eval_results.json, or a folder of them."""
        found: dict[tuple[str, int], Row] = {}
        summary: dict[str, float] = {}
        for file in self.files(path):
            for dimension, value in read_dimensions(file):
                summary[dimension] = score_of(value[0], f"{file}, {dimension}")
                for number, entry in enumerate(value[1], 1):
                    where = f"{file}, {dimension}, clip {number}"
                    if not isinstance(entry, dict) or not {"video_path", "video_results"} <= set(entry):
                        raise ValueError(f"{where}: wants video_path and video_results")
                    name = re.fullmatch(r"(.+)-(\d+)", Path(entry["video_path"]).stem)
                    if name is None:
                        raise ValueError(f"{where}: {entry['video_path']} is not named PROMPT-0.mp4 or its like")
                    folder = Path(entry["video_path"]).parent.name
                    suite = folder if folder in SUITES.values() else SUITES[dimension]
                    key, index = f"{suite}/{name[1]}", int(name[2])
                    row = found.setdefault(
                        (key, index), Row(where, key, index, {}, Prompt(name[1], {"kind": suite}), entry["video_path"])
                    )
                    if dimension in row.scores:
                        raise ValueError(f"{where}: {entry['video_path']} has a score of {dimension} already")
                    scale = 100 if dimension == "imaging_quality" else 1  # of clips in percent, of all of them not
                    row.scores[dimension] = score_of(entry["video_results"], where) / scale
        return Results(list(found.values()), {**summary, **totals(summary)})

    def command(self, root: Path, evaluation: Evaluation) -> str:
        return f"python evaluate.py --videos_path {root}/SUITE --dimension DIMENSION (evaluate.sh names the suites)"


def totals(values: dict[str, float]) -> dict[str, float]:
    """Quality, semantic and total score of all 16 dimensions; nothing where one is missing."""
    if not set(SUITES) <= set(values):
        return {}

    def weighted(dimensions: dict[str, Dimension]) -> float:
        parts = [d.weight * (values[name] - d.low) / (d.high - d.low) for name, d in dimensions.items()]
        return sum(parts) / sum(d.weight for d in dimensions.values())

    quality, semantic = weighted(QUALITY), weighted(SEMANTIC)
    return {"quality score": quality, "semantic score": semantic, "total score": (4 * quality + semantic) / 5}


def read_dimensions(file: Path) -> list[tuple[str, list[Any]]]:
    """(dimension, [overall, clips]) of a result file. Raises ValueError with file and dimension."""
    data = read_json(file)
    if not isinstance(data, dict) or not data:
        raise ValueError(f"{file} is no result file of VBench: it wants {{DIMENSION: [overall, [clips]]}}")
    for dimension, value in data.items():
        if dimension not in SUITES:
            raise ValueError(f"{file}: {dimension!r} is no dimension of VBench")
        if not isinstance(value, list) or len(value) < 2 or not isinstance(value[1], list):
            raise ValueError(f"{file}, {dimension}: wants [overall, [clips]]")
    return list(data.items())


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error})") from None


def write_mp4(source: Path, place: Path) -> None:
    """A clip of `flowrl sample` as H.264, near to lossless, at its own frame rate; one that is that already as it is."""
    if not is_clip(source):
        raise ValueError(f"vbench wants clips, and {source} is a picture: draw with a video model")
    if source.suffix == place.suffix:
        shutil.copyfile(source, place)
        return
    frames, rate = read_clip(source)
    place.write_bytes(clip_bytes(frames, rate or RATE, "mp4"))
