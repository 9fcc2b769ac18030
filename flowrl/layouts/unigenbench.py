"""UniGenBench of Pref-GRPO, arXiv 2508.20751, github.com/CodeGoat24/UniGenBench (data/*.csv and eval/src/eval_common.py read)."""

from __future__ import annotations

import ast
import csv
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowrl.batch import Prompt
from flowrl.evaluate import Evaluation
from flowrl.layouts.base import Layout, Results, Row

CATEGORIES = ("en", "en_long", "zh", "zh_long")


class UniGenBench(Layout):
    """OUT/CATEGORY/MODEL/INDEX_0.png ...; results: CSV with a judge's 0 or 1 for each test point of a picture.

    `unigenbench` is the share of a picture's test points that it meets, `unigenbench/Attribute` that of one primary dimension;
    the benchmark's own numbers, over all test points alike, are the summary.
    """

    name, count = "unigenbench", 4

    def prompts(self, path: Path) -> list[Prompt]:
        """test_prompts_CATEGORY.csv."""
        prompts, language = [], ""
        for where, row in read_csv(path, ("index",)):
            language = next((name for name in ("en", "zh") if f"prompt_{name}" in row), "")
            if not language or not row["index"].isdecimal():
                raise ValueError(f"{where}: wants an index, prompt_en or prompt_zh, and sub_dims")
            prompts.append(Prompt(row[f"prompt_{language}"].strip(), {"index": int(row["index"])}))
        category = path.stem.removeprefix("test_prompts_")
        category = category if category in CATEGORIES else language
        return [Prompt(prompt.text, {**prompt.columns, "category": category}) for prompt in prompts]

    def keys(self, prompts: Sequence[Prompt]) -> list[str]:
        for number, prompt in enumerate(prompts, 1):
            if not {"index", "category"} <= set(prompt.columns):
                raise ValueError(
                    f"unigenbench: prompt {number}, {prompt.text!r}, lacks the columns index and category: "
                    "take --prompts unigenbench:data/test_prompts_en.csv"
                )
        return [str(prompt.columns["index"]) for prompt in prompts]

    def root(self, out: Path, model: str, prompts: Sequence[Prompt]) -> Path:
        return out / str(prompts[0].columns["category"]) / model

    def places(self, root: Path, prompts: Sequence[Prompt], seeds: int) -> list[list[Path]]:
        return [[root / f"{key}_{j}.png" for j in range(seeds)] for key in self.keys(prompts)]

    def results(self, path: Path, seeds: int | None) -> Results:
        """results/MODEL_CATEGORY.csv. Pictures for which the judge gave no answer abstain."""
        rows: list[Row] = []
        totals: dict[str, list[int]] = defaultdict(list)
        for where, row in read_csv(path, ("index", "prompt", "testpoint", "result_json", "img_path")):
            found = re.fullmatch(r"(\d+)_(\d+)", Path(row["img_path"]).stem)
            if found is None or found[1] != row["index"]:
                raise ValueError(f"{where}: img_path {row['img_path']!r} is not {row['index']}_0.png or its like")
            by_dimension: dict[str, list[int]] = defaultdict(list)
            for point, met in answers_of(row, where):
                by_dimension[point.split("-", 1)[0].strip()].append(met)
            everything = [met for answers in by_dimension.values() for met in answers]
            scores = {"unigenbench": sum(everything) / len(everything) if everything else float("nan")}
            for dimension, answers in by_dimension.items():
                scores[f"unigenbench/{dimension}"] = sum(answers) / len(answers)
                totals[dimension] += answers
            prompt = Prompt(row["prompt"], {"index": int(row["index"])})
            rows.append(Row(where, row["index"], int(found[2]), scores, prompt, row["img_path"]))
        summary = {dimension: sum(answers) / len(answers) for dimension, answers in sorted(totals.items())}
        model, _, category = path.stem.partition("_")
        return Results(rows, summary, model if category in CATEGORIES else path.stem)

    def command(self, root: Path, evaluation: Evaluation) -> str:
        category, model, base = root.parent.name, root.name, root.parent.parent
        seeds = evaluation.protocol.seeds
        given = f"--model {model} --categories {category} --eval_data_dir {base} --images_per_prompt {seeds}"
        return f"bash eval/eval_vllm.sh {given}"


def answers_of(row: dict[str, str], where: str) -> list[tuple[str, int]]:
    """Test points with 1 where the picture meets them; nothing where the judge gave no answer."""
    try:
        points: Any = ast.literal_eval(row["testpoint"])
        verdict: Any = json.loads(row["result_json"] or "null")
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{where}: testpoint or result_json cannot be read ({error})") from None
    if verdict is None:
        return []
    scores = verdict.get("score") if isinstance(verdict, dict) else None
    if not isinstance(points, list) or not isinstance(scores, list) or len(points) != len(scores):
        raise ValueError(f"{where}: there is not one score for each test point")
    return [(str(point), int(score == 1)) for point, score in zip(points, scores, strict=True)]


def read_csv(path: Path, wanted: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Rows by column, each with its place. Raises ValueError where columns are missing, or cells."""
    csv.field_size_limit(1 << 24)  # a judge's answer is long
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if missing := set(wanted) - set(reader.fieldnames or ()):
            raise ValueError(f"{path} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(sorted(missing))}")
        rows = [(f"{path}, row {number}", row) for number, row in enumerate(reader, 1)]
    for where, row in rows:
        if None in row.values() or None in row:
            raise ValueError(f"{where}: it has not as many cells as the header")
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows
