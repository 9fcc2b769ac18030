"""T2I-CompBench(++), arXiv 2307.06350, github.com/Karine-Huang/T2I-CompBench (all scorers and inference_eval.py read)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from flowrl.batch import Prompt
from flowrl.evaluate import Evaluation
from flowrl.layouts.base import Layout, Results, Row, file_name, score_of

#: The scorer that the paper reports for each category; CATEGORY_val.txt holds its prompts.
CATEGORIES = {
    "color": "blip_vqa",
    "shape": "blip_vqa",
    "texture": "blip_vqa",
    "spatial": "unidet_2d",
    "3d_spatial": "unidet_3d",
    "numeracy": "unidet_numeracy",
    "non_spatial": "clip_similarity",
    "complex": "3_in_1",
}
#: Scorers by the folder that their vqa_result.json lies in.
SCORERS = {
    "annotation_blip": "blip_vqa",
    "annotation_clip": "clip_similarity",
    "annotation_num": "unidet_numeracy",
    "annotation_3_in_1": "3_in_1",
    "annotation_obj_detection_2d": "unidet_2d",
    "annotation_obj_detection_3d": "unidet_3d",
    "sharegpt4v": "share_gpt4v",
}


class T2ICompBench(Layout):
    """OUT/CATEGORY/samples/PROMPT_000000.png, numbered through all pictures of a category, ten for each prompt in a row.

    Results: vqa_result.json of every scorer, by number. `t2icompbench` is the scorer that the paper reports for the category.
    """

    name, count = "t2icompbench", 10

    def prompts(self, path: Path) -> list[Prompt]:
        """CATEGORY_val.txt, or the folder examples/dataset with all of them."""
        files = [f for name in CATEGORIES if (f := path / f"{name}_val.txt").is_file()] if path.is_dir() else [path]
        if not files or any(file.name.removesuffix("_val.txt") not in CATEGORIES or not file.is_file() for file in files):
            raise ValueError(f"t2icompbench: {path} is neither CATEGORY_val.txt nor a folder of them ({', '.join(CATEGORIES)})")
        return [
            Prompt(text, {"kind": file.name.removesuffix("_val.txt")})
            for file in files
            for line in file.read_text(encoding="utf-8").split("\n")
            if (text := line.split("\t")[0].strip())
        ]

    def keys(self, prompts: Sequence[Prompt]) -> list[str]:
        seen: dict[str, int] = {}
        keys = []
        for number, prompt in enumerate(prompts, 1):
            category = str(prompt.columns.get("kind"))
            if category not in CATEGORIES:
                raise ValueError(
                    f"t2icompbench: prompt {number}, {prompt.text!r}, is of no category ({', '.join(CATEGORIES)}): "
                    "take --prompts t2icompbench:examples/dataset"
                )
            keys.append(f"{category}/{seen.setdefault(category, 0)}")
            seen[category] += 1
        return keys

    def places(self, root: Path, prompts: Sequence[Prompt], seeds: int) -> list[list[Path]]:
        """Scorers cut the prompt at the first underscore."""
        places = []
        for prompt, key in zip(prompts, self.keys(prompts), strict=True):
            category, number = key.rsplit("/", 1)
            names = [f"{prompt.text}_{int(number) * seeds + j:06d}.png" for j in range(seeds)]
            places.append([root / category / "samples" / file_name(prompt.text, name, self.name, "/_") for name in names])
        return places

    def files(self, path: Path) -> list[Path]:
        return sorted(f for f in path.rglob("vqa_result.json") if f.parent.name in SCORERS) if path.is_dir() else [path]

    def results(self, path: Path, seeds: int | None) -> Results:
        """.../CATEGORY/SCORER/vqa_result.json, or a folder above several."""
        found: dict[tuple[str, int], Row] = {}
        count = seeds or self.count
        for file in self.files(path):
            place = file.absolute().parent
            category = (place.parent.parent if place.parent.name == "labels" else place.parent).name
            if place.name not in SCORERS or category not in CATEGORIES:
                raise ValueError(f"{file}: its folders are not CATEGORY/SCORER, like color/annotation_blip")
            for question, value in read_answers(file).items():
                number, index = divmod(question, count)
                where, key = f"{file}, question_id {question}", f"{category}/{number}"
                row = found.setdefault((key, index), Row(where, key, index, {}, Prompt(key, {"kind": category})))
                scorer = SCORERS[place.name]
                row.scores |= {"t2icompbench": value} if CATEGORIES[category] == scorer else {scorer: value}
        return Results(list(found.values()), model=path.absolute().name if path.is_dir() else None)

    def command(self, root: Path, evaluation: Evaluation) -> str:
        return f"bash BLIPvqa_eval/test.sh, UniDet_eval, CLIPScore_eval, 3_in_1_eval, each with {root}/CATEGORY/ as its out_dir"


def read_answers(file: Path) -> dict[int, float]:
    """Scores by question_id, which counts pictures from 0 without gaps. Raises ValueError with file and entry."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error})") from None
    answers: dict[int, float] = {}
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
        where = f"{file}, entry {number}"
        if (
            not isinstance(entry, dict)
            or not {"question_id", "answer"} <= set(entry)
            or not str(entry["question_id"]).isdecimal()
        ):
            raise ValueError(f'{where}: wants {{"question_id": 0, "answer": "0.69"}}')
        if int(entry["question_id"]) in answers:
            raise ValueError(f"{where}: question_id {entry['question_id']} is there already")
        answers[int(entry["question_id"])] = score_of(entry["answer"], where)
    if missing := set(range(len(answers))) - set(answers):
        raise ValueError(f"{file} has no question_id {min(missing)}: a picture was not scored")
    return answers
