"""Benchmarks of others: small hand-made files in the form of each, exports that its scorer would read, faults by file and row."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowrl.batch import Prompt
from flowrl.clips import clip_bytes
from flowrl.evaluate import Evaluation, Protocol, compare
from flowrl.layouts import LAYOUTS, export, find_pictures, manifest_of, parse, read_scores
from flowrl.layouts.vbench import QUALITY, SEMANTIC, SUITES
from flowrl.pictures import picture_bytes
from flowrl.protocol import digest_of
from flowrl.scorefile import read_results

# ------------------------------------------------------------------------------------------------ prompts of each

METADATA = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}], "prompt": "a photo of a red cow"},
]
SUB_DIMS = json.dumps(
    {"Primary Categories": "Art", "Testpoints": ["Style", "Attribute - Color"], "Testpoint Description": ["", ""]}
)


def prompt_files(name: str, folder: Path) -> Path:
    """Two prompts of each benchmark, as its repository has them."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == "geneval":
        file = folder / "evaluation_metadata.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in METADATA))
        return file
    if name == "dpg":
        (folder / "10.txt").write_text("ten sheep\n")
        (folder / "9.txt").write_text("nine sheep")
        return folder
    if name == "t2icompbench":
        (folder / "color_val.txt").write_text("a green bench and a blue bowl\n")
        (folder / "complex_val.txt").write_text("The red hat was on top of the rack.\tspatial\n\n")
        (folder / "complex_val_action.txt").write_text("not for drawing\n")
        return folder
    if name == "unigenbench":
        file = folder / "test_prompts_en_long.csv"
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows(
                [["index", "prompt_en", "sub_dims_en"], ["0", 'a "star", red', SUB_DIMS], ["7", "two", SUB_DIMS]]
            )
        return file
    (folder / "color.txt").write_text("a red bicycle\n")
    (folder / "human_action.txt").write_text("A person is riding a bike\n")
    return folder


def drawn(prompts: list[Prompt], seeds: int, folder: Path, frames: int = 0, side: int = 8) -> tuple[Evaluation, list[list[Path]]]:
    """Pictures of one colour each, as `flowrl sample` stores them; the colour says which prompt and sample it is."""
    folder.mkdir(exist_ok=True)
    files = []
    for i in range(len(prompts)):
        row = []
        for j in range(seeds):
            pictures = [Image.new("RGB", (side, side), (40 * i + f, 20 * j, 200)) for f in range(max(1, frames))]
            texts = {"flowrl": json.dumps({"request": {"prompt": prompts[i].text}})}
            file = folder / f"{i}-{j}.{'webp' if frames else 'png'}"
            file.write_bytes(clip_bytes(pictures, 8, texts=texts) if frames else picture_bytes(pictures[0], texts))
            row.append(file)
        files.append(row)
    size = (frames, side, side) if frames else (side, side)
    protocol = Protocol("p", 20, 1.0, seeds=seeds, digest=digest_of(prompts), size=size, dtype="float32")
    order = [[100 * i + j for j in range(seeds)] for i in range(len(prompts))]
    return Evaluation("my/model", protocol, prompts, order, [], torch.zeros(len(prompts), seeds, 0), weights="w0"), files


#: Where the second picture of the second prompt goes, with two pictures each.
PLACES = {
    "geneval": "00001/samples/0001.png",
    "dpg": "10.png",
    "t2icompbench": "complex/samples/The red hat was on top of the rack._000001.png",
    "unigenbench": "en_long/my-model/7_1.png",
    "vbench": "my-model/human_action/A person is riding a bike-1.mp4",
}
COMMANDS = {
    "geneval": "evaluate_images.py {root} --outfile",
    "dpg": "PIC_NUM=2 bash dpg_bench/dist_eval.sh {root} 8",
    "t2icompbench": "{root}/CATEGORY/",
    "unigenbench": "--model my-model --categories en_long --eval_data_dir {out} --images_per_prompt 2",
    "vbench": "--videos_path {root}/SUITE",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_export_goes_where_the_scorer_looks_and_comes_back(tmp_path, name):
    layout = LAYOUTS[name]
    prompts = layout.prompts(prompt_files(name, tmp_path / "prompts"))
    evaluation, files = drawn(
        prompts, 2, tmp_path / "drawn", frames=4 if name == "vbench" else 0, side=16 if name == "vbench" else 8
    )
    out = tmp_path / "out"
    root, new = export(layout, evaluation, files, out)
    assert (new, len(prompts)) == (2, 2) and (out / PLACES[name]).is_file()
    assert COMMANDS[name].format(root=root, out=out) in layout.command(root, evaluation)
    assert read_results(manifest_of(root))[0].seeds == evaluation.seeds and not manifest_of(root).is_relative_to(root)

    known, places = find_pictures(layout, root, None, None)  # back, from the files and the manifest alone
    assert (known.prompts, known.model, len(places)) == (prompts, "my/model", 4)
    for place, (i, j) in zip(places, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
        picture = layout.read(*place, 2)
        pixel = np.array(picture[0] if isinstance(picture, list) else picture)[4, 4].astype(int)
        assert abs(pixel - [40 * i, 20 * j, 200]).max() <= (12 if name == "vbench" else 0)  # H.264 is not lossless
        assert not isinstance(picture, list) or len(picture) == 4

    (out / PLACES[name]).unlink()  # as an interrupted export leaves it
    with pytest.raises(
        ValueError, match=re.escape(f"lacks 1 of {2 if name == 'dpg' else 4} files: {out / PLACES[name]} is the first")
    ):
        find_pictures(layout, root, None, None)
    assert export(layout, evaluation, files, out)[1] == 1 and (out / PLACES[name]).is_file()


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_export_does_not_mix_with_others(tmp_path, name):
    layout = LAYOUTS[name]
    prompts = layout.prompts(prompt_files(name, tmp_path / "prompts"))
    evaluation, files = drawn(prompts, 2, tmp_path / "drawn", frames=4 if name == "vbench" else 0, side=16)
    root, _ = export(layout, evaluation, files, tmp_path / "out")
    evaluation.weights = "w1"
    with pytest.raises(
        ValueError, match=r"holds pictures of another export \(weights: my/model \(w0\) against my/model \(w1\)\)"
    ):
        export(layout, evaluation, files, tmp_path / "out")
    manifest_of(root).unlink()
    with pytest.raises(ValueError, match="holds other files already"):
        export(layout, evaluation, files, tmp_path / "out")


@pytest.mark.parametrize("name", LAYOUTS)
def test_prompts_that_a_layout_cannot_use(tmp_path, name):
    """Others than its own, a path that is none, and prompts that cannot be file names."""
    layout = LAYOUTS[name]
    with pytest.raises(ValueError, match=rf"^{name}: prompt 1, 'a cat', (lacks|is of no).*--prompts {name}:"):
        layout.keys([Prompt("a cat")])
    (tmp_path / "bad.txt").write_text("a cat\n")
    with pytest.raises((ValueError, FileNotFoundError)):
        layout.prompts(tmp_path / "bad.txt")
    if name in ("t2icompbench", "vbench"):
        for text, fault in (("a/b", "has '/' in it"), ("x" * 260, "longer than a file's name")):
            with pytest.raises(ValueError, match=fault):
                layout.places(tmp_path, [Prompt(text, {"kind": "color"})], 1)


def test_prompts_keep_what_scorers_and_tables_need(tmp_path):
    """GenEval's tag is the kind; DPG's files in the order of their numbers; UniGenBench's quoted cells; VBench's suites."""
    read = {name: layout.prompts(prompt_files(name, tmp_path / name)) for name, layout in LAYOUTS.items()}
    assert [p.columns["kind"] for p in read["geneval"]] == ["single_object", "colors"]
    assert [(p.text, p.columns["item_id"]) for p in read["dpg"]] == [("nine sheep", "9"), ("ten sheep", "10")]
    assert [p.text for p in read["t2icompbench"]] == ["a green bench and a blue bowl", "The red hat was on top of the rack."]
    assert [(p.text, p.columns["index"], p.columns["category"]) for p in read["unigenbench"]] == [
        ('a "star", red', 0, "en_long"),
        ("two", 7, "en_long"),
    ]
    info = tmp_path / "VBench_full_info.json"
    entries = [
        {"prompt_en": "a dog", "dimension": ["subject_consistency", "dynamic_degree"]},
        {"prompt_en": "a dog", "dimension": ["scene"]},
    ]
    info.write_text(json.dumps(entries))
    assert [(p.text, p.columns["kind"]) for p in LAYOUTS["vbench"].prompts(info)] == [
        ("a dog", "subject_consistency"),
        ("a dog", "scene"),
    ]
    info.write_text(json.dumps([*entries, {"prompt_en": "x", "dimension": ["beauty"]}]))
    with pytest.raises(ValueError, match=r"VBench_full_info\.json, entry 3"):
        LAYOUTS["vbench"].prompts(info)


def test_geneval_metadata_is_the_line_of_the_prompt_file(tmp_path):
    prompts = LAYOUTS["geneval"].prompts(prompt_files("geneval", tmp_path / "prompts"))
    evaluation, files = drawn(prompts, 2, tmp_path / "drawn")
    export(LAYOUTS["geneval"], evaluation, files, tmp_path / "out")
    assert json.loads((tmp_path / "out/00001/metadata.jsonl").read_text()) == METADATA[1]
    (tmp_path / "other/00000/samples").mkdir(parents=True)  # its own generator writes five digits
    (tmp_path / "other/00000/samples/00000.png").write_bytes(files[0][0].read_bytes())
    known, places = find_pictures(LAYOUTS["geneval"], tmp_path / "other", prompts[:1], 1)
    assert places[0][0].name == "00000.png" and known.protocol.num_inference_steps is None


def test_dpg_grids(tmp_path):
    """Four pictures as 2 x 2, row by row, as compute_dpg_bench.py cuts them; three leave the last place black; one is itself."""
    layout = LAYOUTS["dpg"]
    for seeds in (1, 3, 4):
        evaluation, files = drawn([Prompt("x", {"item_id": "7"})], seeds, tmp_path / f"drawn{seeds}")
        export(layout, evaluation, files, tmp_path / f"out{seeds}")
        with Image.open(tmp_path / f"out{seeds}" / "7.png") as grid:
            assert grid.size == ((8, 8) if seeds == 1 else (16, 16))
            corners = [(0, 0), (8, 0), (0, 8), (8, 8)][:seeds]
            assert [grid.getpixel(corner)[1] for corner in corners] == [20 * j for j in range(seeds)]
            assert seeds != 3 or grid.getpixel((12, 12)) == (0, 0, 0)
    evaluation, files = drawn([Prompt("x", {"item_id": "7"})], 5, tmp_path / "drawn5")
    with pytest.raises(ValueError, match="room for 4 pictures of a prompt, not 5"):
        export(layout, evaluation, files, tmp_path / "out5")
    Image.new("RGB", (8, 6)).save(tmp_path / "drawn4" / "0-2.png")
    evaluation, files = drawn([Prompt("x", {"item_id": "7"})], 4, tmp_path / "wide")
    Image.new("RGB", (8, 6)).save(files[0][2])
    with pytest.raises(ValueError, match=r"0-2\.png is 8 x 6: its scorer cuts grids of squares"):
        export(layout, evaluation, files, tmp_path / "wide-out")


def test_t2icompbench_numbers_through_a_category(tmp_path):
    """Pictures 0, 1 of the first prompt, 2, 3 of the second of a category, from 0 again in the next."""
    prompts = [Prompt("a", {"kind": "color"}), Prompt("b", {"kind": "shape"}), Prompt("c", {"kind": "color"})]
    places = LAYOUTS["t2icompbench"].places(Path("o"), prompts, 2)
    names = [str(place) for row in places for place in row]
    assert names[:3] == ["o/color/samples/a_000000.png", "o/color/samples/a_000001.png", "o/shape/samples/b_000000.png"]
    assert names[4:] == ["o/color/samples/c_000002.png", "o/color/samples/c_000003.png"]
    with pytest.raises(ValueError, match="has '_' in it"):
        LAYOUTS["t2icompbench"].places(Path("o"), [Prompt("a_b", {"kind": "color"})], 1)


def test_vbench_wants_clips(tmp_path):
    evaluation, files = drawn([Prompt("a", {"kind": "color"})], 1, tmp_path / "drawn")
    with pytest.raises(ValueError, match=r"vbench wants clips, and .*0-0\.png is a picture"):
        export(LAYOUTS["vbench"], evaluation, files, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.mp4"))


# ------------------------------------------------------------------------------------------------ results of each


def geneval_results(folder: Path, root: str = "out") -> Path:
    """evaluate_images.py walks folders in no order."""
    rows = []
    for i, j, correct in ((1, 1, False), (0, 0, True), (1, 0, True), (0, 1, True)):
        about = {"tag": METADATA[i]["tag"], "prompt": METADATA[i]["prompt"], "correct": correct, "reason": "", "details": "{}"}
        rows.append({"filename": f"{root}/0000{i}/samples/000{j}.png", **about, "metadata": json.dumps(METADATA[i])})
    file = folder / "results.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def dpg_results(folder: Path, root: str = "out") -> Path:
    file = folder / "dpg-bench_20250101-000000_results.txt"
    scores = f"{root}/10.png, 0.5, 1.0, 0.75\n{root}/9.png, 0.0, 1.0, 0.5\n"
    categories = "L1 category scores:\n\tentity: 81.5\nL2 category scores:\n\tentity - whole: 80.25\n"
    file.write_text(f"{scores}Model: mine\n{categories}Image path: {root}\nSave results to: x\nDPG-Bench score: 62.5\n")
    return file


def t2i_results(folder: Path, root: str = "out") -> Path:
    for category, scorer, values in (
        ("color", "annotation_blip", ["0.6900", "0.7100"]),
        ("complex", "annotation_blip", ["0.2", "0.4"]),
        ("complex", "annotation_3_in_1", [0.1, 0.3]),
        ("complex", "labels/annotation_obj_detection_2d", [0.0, 0.5]),
        ("color", "annotation1_blip/VQA/result", ["0.1", "0.1"]),  # an intermediate file of its own
    ):
        place = folder / root / category / scorer
        place.mkdir(parents=True, exist_ok=True)
        (place / "vqa_result.json").write_text(json.dumps([{"question_id": i, "answer": v} for i, v in enumerate(values)]))
    return folder / root


def unigen_results(folder: Path, root: str = "out/en_long/my-model") -> Path:
    """The judge gave no answer for the last picture."""
    points = "['Style', 'Attribute - Color', 'Attribute - Size']"
    answers = {(0, 0): [1, 1, 0], (0, 1): [0, 0, 0], (7, 0): [1, 1, 1], (7, 1): None}
    file = folder / "my-model_en_long.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["index", "prompt", "testpoint", "output", "result_json", "img_path"])
        for (index, j), answer in answers.items():
            verdict = json.dumps(None if answer is None else {"score": answer, "analysis": []}, indent=4)
            writer.writerow([index, f"prompt {index}", points, "<score>, with\nlines", verdict, f"{root}/{index}_{j}.png"])
    return file


def vbench_results(folder: Path, root: str = "out/my-model") -> Path:
    """Clips that a scorer finds nothing in are missing; imaging quality of clips is in percent."""
    bike, ride = f"{root}/color/a red bicycle", f"{root}/human_action/A person is riding a bike"
    data = {
        "color": [0.5, [{"video_path": f"{bike}-1.mp4", "video_results": 0.5, "cur_success_frame_rate": 0.5}]],
        "human_action": [0.5, [{"video_path": f"{ride}-{j}.mp4", "video_results": j == 1} for j in range(2)]],
        "imaging_quality": [0.66, [{"video_path": f"{bike}-{j}.mp4", "video_results": 66.0} for j in range(2)]],
    }
    file = folder / "results_2025_eval_results.json"
    file.write_text(json.dumps(data))
    return file


WRITERS = {
    "geneval": geneval_results,
    "dpg": dpg_results,
    "t2icompbench": t2i_results,
    "unigenbench": unigen_results,
    "vbench": vbench_results,
}
nan = math.nan
#: (P, S) of a reward, by hand from the files above, prompts in the benchmark's order.
EXPECTED = {
    "geneval": {"geneval": [[1, 1], [1, 0]]},
    "dpg": {"dpg": [[0, 1], [0.5, 1]]},
    "t2icompbench": {
        "t2icompbench": [[0.69, 0.71], [0.1, 0.3]],
        "blip_vqa": [[nan, nan], [0.2, 0.4]],
        "unidet_2d": [[nan, nan], [0, 0.5]],
    },
    "unigenbench": {
        "unigenbench": [[2 / 3, 0], [1, nan]],
        "unigenbench/Style": [[1, 0], [1, nan]],
        "unigenbench/Attribute": [[0.5, 0], [1, nan]],
    },
    "vbench": {
        "color": [[nan, 0.5], [nan, nan]],
        "human_action": [[nan, nan], [0, 1]],
        "imaging_quality": [[0.66, 0.66], [nan, nan]],
    },
}


#: Without a manifest T2I-CompBench has ten pictures to a prompt: a test of its own.
@pytest.mark.parametrize(("name", "exported"), [(n, e) for n in LAYOUTS for e in (True, False) if e or n != "t2icompbench"])
def test_results_come_back(tmp_path, monkeypatch, name, exported):
    """With the manifest of the export: its protocol, prompts, seeds. Without: what the file tells, and nothing is made up."""
    monkeypatch.chdir(tmp_path)
    layout = LAYOUTS[name]
    prompts = layout.prompts(prompt_files(name, tmp_path / "prompts"))
    evaluation, files = drawn(prompts, 2, tmp_path / "drawn", frames=4 if name == "vbench" else 0, side=16)
    if exported:
        export(layout, evaluation, files, Path("out"))
    (tmp_path / "theirs").mkdir()
    path = WRITERS[name](tmp_path if name == "t2icompbench" else tmp_path / "theirs")
    result = read_scores(layout, path)
    order = sorted(range(2), key=lambda i: result.prompts[i].columns["kind"]) if name == "vbench" else [0, 1]
    for reward, values in EXPECTED[name].items():
        scores = result.scores[order][:, :, result.rewards.index(reward)]
        assert torch.allclose(scores, torch.tensor(values, dtype=torch.float32), atol=1e-6, equal_nan=True), reward
    assert set(result.rewards) == set(EXPECTED[name])
    if exported:
        assert (result.model, result.prompts, result.seeds, result.weights) == ("my/model", prompts, evaluation.seeds, "w0")
        assert result.protocol == evaluation.protocol
    else:
        assert result.protocol.num_inference_steps is None and result.protocol.seeds == 2 and result.weights is None
        assert result.model == {"dpg": "mine", "unigenbench": "my-model"}.get(name, path.stem)


def test_what_a_benchmark_sums_up(tmp_path):
    assert read_scores(LAYOUTS["dpg"], dpg_results(tmp_path)).summary == {
        "L1 entity": 81.5,
        "L2 entity - whole": 80.25,
        "DPG-Bench": 62.5,
    }
    # Over test points: Attribute 1 of 2 + 0 of 2 + 2 of 2, Style 1 + 0 + 1 of 3
    summary = read_scores(LAYOUTS["unigenbench"], unigen_results(tmp_path)).summary
    assert summary == pytest.approx({"Attribute": 3 / 6, "Style": 2 / 3})
    assert read_scores(LAYOUTS["vbench"], vbench_results(tmp_path)).summary["imaging_quality"] == 0.66


def test_vbench_totals(tmp_path):
    """All dimensions at their upper end: quality, semantic, total are 1. At the lower one 0. Quality 1, semantic 0: (4 + 0) / 5.
    Dynamic degree alone at 0: it has half a weight of 6.5, so quality 6 / 6.5."""

    def totals(values: dict[str, float]) -> dict[str, float]:
        clips = [{"video_path": "a-0.mp4", "video_results": 0.5}]
        file = tmp_path / "all_eval_results.json"
        file.write_text(json.dumps({name: [value, clips] for name, value in values.items()}))
        return read_scores(LAYOUTS["vbench"], file).summary

    low, high = ({name: end[i] for name, end in {**QUALITY, **SEMANTIC}.items()} for i in (1, 2))
    assert set(high) == set(SUITES)
    names = ("quality score", "semantic score", "total score")
    assert [totals(high)[n] for n in names] == pytest.approx([1, 1, 1]) and [totals(low)[n] for n in names] == pytest.approx(
        [0, 0, 0]
    )
    mixed = {**{n: high[n] for n in QUALITY}, **{n: low[n] for n in SEMANTIC}}
    assert totals(mixed)["total score"] == pytest.approx(0.8)
    assert totals({**high, "dynamic_degree": 0.0})["quality score"] == pytest.approx(6 / 6.5)
    assert "total score" not in totals({"color": 0.5})


def test_t2icompbench_without_a_manifest_has_ten_pictures_of_each(tmp_path):
    place = tmp_path / "color" / "annotation_blip"
    place.mkdir(parents=True)
    (place / "vqa_result.json").write_text(json.dumps([{"question_id": i, "answer": i / 20} for i in range(20)]))
    result = read_scores(LAYOUTS["t2icompbench"], place / "vqa_result.json")
    assert result.scores.shape == (2, 10, 1) and result.per_prompt("t2icompbench").tolist() == pytest.approx(
        [4.5 / 20, 14.5 / 20]
    )


def test_results_of_two_models_compare(tmp_path):
    """GenEval counts the mean of its kinds: base 1 and 1/2, tuned 1/2 and 1/2."""
    (tmp_path / "b").mkdir()
    base = read_scores(LAYOUTS["geneval"], geneval_results(tmp_path))
    file = geneval_results(tmp_path / "b")
    file.write_text(
        file.read_text().replace(
            '0000/samples/0001.png", "tag": "single_object", "prompt": "a photo of a bench", "correct": true',
            '0000/samples/0001.png", "tag": "single_object", "prompt": "a photo of a bench", "correct": false',
        )
    )
    tuned = read_scores(LAYOUTS["geneval"], file)
    d = compare(base, tuned, "geneval", by_kind=True)
    assert (d.base, d.tuned) == (0.75, 0.5) and base.kinds == ["single_object", "colors"]


# ------------------------------------------------------------------------------------------------ faults


def swap(old: str, new: str):
    """The first `old` of a file's text becomes `new`."""
    return lambda text: text.replace(old, new, 1)


FAULTS = [
    ("geneval", swap('"correct": false', '"correct": 2'), "line 1: 2.0 is not within 0 and 1"),
    ("geneval", swap('"tag"', '"tog"'), "line 1: wants filename (00000/samples/0000.png), tag, prompt and correct ('tag')"),
    ("geneval", swap("0001.png", "grid.png"), "line 1: wants filename"),
    ("geneval", lambda text: text[:80], "line 1: wants filename"),
    ("geneval", lambda text: text.split("\n", 1)[1], "has no row for 1 of 4 pictures: 1 of 00001 is the first"),
    ("geneval", lambda text: text + text.split("\n")[0], "line 5: picture 1 of 00001 has a row already"),
    ("geneval", lambda text: "\n", "holds no results of geneval"),
    ("dpg", swap("0.75", "0.8"), "line 1: the last number is not the mean of those before it"),
    ("dpg", swap("0.0, 1.0, 0.5", "0.0, none, 0.5"), "line 2: 'none' is not a number"),
    ("dpg", swap("Model: mine", "nonsense"), "line 3: neither `PICTURE, score, ..., mean` nor a line of the summary"),
    ("dpg", swap("0.0, 1.0, 0.5", "1.0, 1.0"), "has no row for 1 of 4 pictures: 1 of 9 is the first"),
    ("unigenbench", swap("0_1.png", "1_1.png"), "row 2: img_path 'out/en_long/my-model/1_1.png' is not 0_0.png"),
    ("unigenbench", swap("result_json", "verdict"), "lacks the column result_json"),
    ("unigenbench", swap("['Style', ", "["), "row 1: there is not one score for each test point"),
    ("unigenbench", swap("['Style'", "['Style"), "row 1: testpoint or result_json cannot be read"),
    ("unigenbench", lambda text: text.split("\n")[0], "has no rows"),
    ("vbench", swap('"color"', '"colour"'), "'colour' is no dimension of VBench"),
    ("vbench", swap('"video_path"', '"path"'), "color, clip 1: wants video_path and video_results"),
    ("vbench", swap("-1.mp4", ".mp4"), "color, clip 1: out/my-model/color/a red bicycle.mp4 is not named PROMPT-0.mp4"),
    ("vbench", swap('"video_results": 0.5', '"video_results": [0.5]'), "color, clip 1: [0.5] is not a number"),
    ("vbench", lambda text: text[:-3], "is not JSON"),
    ("vbench", lambda text: "[]", "is no result file of VBench"),
]


@pytest.mark.parametrize(("name", "change", "message"), FAULTS)
def test_faults_are_named_by_file_and_row(tmp_path, name, change, message):
    file = WRITERS[name](tmp_path)
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_scores(LAYOUTS[name], file)
    assert file.name in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"question_id": 0, "answer": "high"}], "entry 1: 'high' is not a number"),
        ([{"question_id": 0}], 'entry 1: wants {"question_id": 0, "answer": "0.69"}'),
        ([{"question_id": 0, "answer": 1}, {"question_id": 0, "answer": 1}], "entry 2: question_id 0 is there already"),
        ([{"question_id": 0, "answer": 1}, {"question_id": 2, "answer": 1}], "has no question_id 1: a picture was not scored"),
        ([{"question_id": i, "answer": 1} for i in range(11)], "has no row for 9 of 20 pictures: 1 of color/1 is the first"),
    ],
)
def test_faults_of_t2icompbench(tmp_path, entries, message):
    place = tmp_path / "color" / "annotation_blip"
    place.mkdir(parents=True)
    (place / "vqa_result.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_scores(LAYOUTS["t2icompbench"], place / "vqa_result.json")
    (tmp_path / "vqa_result.json").write_text("[]")
    with pytest.raises(ValueError, match=r"its folders are not CATEGORY/SCORER"):
        read_scores(LAYOUTS["t2icompbench"], tmp_path / "vqa_result.json")


def test_results_that_are_not_of_the_export(tmp_path, monkeypatch):
    """A row of a picture that was never exported is named, not dropped."""
    monkeypatch.chdir(tmp_path)
    prompts = LAYOUTS["geneval"].prompts(prompt_files("geneval", tmp_path / "prompts"))
    evaluation, files = drawn(prompts, 1, tmp_path / "drawn")
    export(LAYOUTS["geneval"], evaluation, files, Path("out"))
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1: picture 1 of 00001 is none of the 2 x 1 that were exported"):
        read_scores(LAYOUTS["geneval"], geneval_results(tmp_path))


def test_names_of_layouts():
    assert parse("geneval:out/x") == (LAYOUTS["geneval"], Path("out/x"))
    assert parse("geneval") is None and parse("owner/name") is None and parse("geneval2:x") is None and parse("dpg:") is None
