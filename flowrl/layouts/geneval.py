"""GenEval, arXiv 2310.11513, github.com/djghosh13/geneval (layout, evaluate_images.py and summary_scores.py read)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from flowrl.batch import Prompt
from flowrl.data import load_prompts
from flowrl.evaluate import Evaluation
from flowrl.layouts.base import Layout, Results, Row, put, score_of


class GenEval(Layout):
    """OUT/00000/metadata.jsonl (the line of evaluation_metadata.jsonl) and OUT/00000/samples/0000.png ...; results: JSON lines.

    Its overall score is the mean of the six kinds' means: the row "mean of kinds" of a comparison.
    """

    name, count = "geneval", 4

    def prompts(self, path: Path) -> list[Prompt]:
        """evaluation_metadata.jsonl."""
        prompts = [Prompt(prompt.text, {**prompt.columns, "kind": prompt.columns.get("tag")}) for prompt in load_prompts(path)]
        self.keys(prompts)
        return prompts

    def keys(self, prompts: Sequence[Prompt]) -> list[str]:
        for number, prompt in enumerate(prompts, 1):
            if not {"tag", "include"} <= set(prompt.columns):
                raise ValueError(
                    f"geneval: prompt {number}, {prompt.text!r}, lacks the columns tag and include: "
                    "take --prompts geneval:evaluation_metadata.jsonl"
                )
        return [f"{i:05d}" for i in range(len(prompts))]

    def places(self, root: Path, prompts: Sequence[Prompt], seeds: int) -> list[list[Path]]:
        digits = 5 if (root / "00000" / "samples" / "00000.png").is_file() else 4  # its own generator writes five
        return [[root / key / "samples" / f"{j:0{digits}d}.png" for j in range(seeds)] for key in self.keys(prompts)]

    def write(self, prompt: Prompt, sources: Sequence[Path], places: Sequence[Path]) -> None:
        facts = {name: value for name, value in prompt.columns.items() if name != "kind"}
        folder = places[0].parent.parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metadata.jsonl").write_text(json.dumps({**facts, "prompt": prompt.text}), encoding="utf-8")
        for source, place in zip(sources, places, strict=True):
            put(source, place)

    def results(self, path: Path, seeds: int | None) -> Results:
        """The --outfile of evaluate_images.py."""
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
                picture, prompt, correct = Path(row["filename"]), Prompt(row["prompt"], {"kind": row["tag"]}), row["correct"]
                index = int(picture.stem)
            except (ValueError, KeyError, TypeError) as error:
                wanted = "filename (00000/samples/0000.png), tag, prompt and correct"
                raise ValueError(f"{where}: wants {wanted} ({error})") from None
            score = score_of(correct, where, 0, 1)
            rows.append(Row(where, picture.parent.parent.name, index, {"geneval": score}, prompt, str(picture)))
        return Results(rows)

    def command(self, root: Path, evaluation: Evaluation) -> str:
        return f"python evaluation/evaluate_images.py {root} --outfile {root}.results.jsonl --model-path OBJECT_DETECTOR_FOLDER"
