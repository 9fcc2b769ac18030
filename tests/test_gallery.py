"""The comparison gallery: what Python writes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flowrl.clips import read_clip
from flowrl.gallery import Cell, Film, Frame, Table, write_gallery
from tests.gallery import HOSTILE, ROWS, cell, example_cells, page_data, shape_picture, tree


def test_import_needs_no_torch():
    code = "import sys, flowrl.gallery; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_data_keep_order_and_sort_seeds(tmp_path):
    data = page_data(write_gallery(tmp_path / "g", example_cells(), title="T"))
    assert data["models"] == [{"name": "base"}, {"name": "tuned"}]
    assert data["rewards"] == [{"name": "verify", "heldOut": False}, {"name": "aesthetic", "heldOut": False}]
    assert [row["prompt"] for row in data["prompts"]] == [row[0] for row in ROWS]
    assert [row["kind"] for row in data["prompts"]] == [row[1] for row in ROWS]
    assert [[s["seed"] for s in row["sets"]] for row in data["prompts"]] == [[1, 2]] * 5
    assert [c["rewards"] for c in data["prompts"][1]["sets"][0]["cells"]] == [[0.9, 22.0], [0.4, 22.0]]


def test_a_reward_that_abstains_is_null(tmp_path):
    rewards = [{"a": None}, {"a": float("nan"), "b": 1}, {}]
    cells = [cell(seed=seed, rewards=values) for seed, values in enumerate(rewards)]
    sets = page_data(write_gallery(tmp_path / "g", cells, title="T"))["prompts"][0]["sets"]
    assert [s["cells"][0]["rewards"] for s in sets] == [[None, None], [None, 1.0], [None, None]]


def test_an_absent_picture_is_null_and_a_missing_file_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    cut = tmp_path / "cut.png"
    shape_picture(0, size=256).save(cut)
    cut.write_bytes(cut.read_bytes()[:300])
    cells = [
        cell("base", seed=0),
        cell("tuned", seed=1, image=tmp_path / "lost.png"),
        cell("tuned", seed=2, image=tmp_path / "broken.png"),
        cell("tuned", seed=3, image=cut),
    ]
    sets = page_data(write_gallery(tmp_path / "g", cells, title="T"))["prompts"][0]["sets"]
    assert sets[0]["cells"][1] is None
    assert [s["cells"][1]["note"] for s in sets[1:]] == [
        "Missing file: lost.png",
        "Unreadable file: broken.png",
        "Unreadable file: cut.png",
    ]


def test_hostile_text_stays_inside_its_json(tmp_path):
    cells = [cell(prompt=prompt, details={"<b>": prompt}, kind=prompt) for prompt in HOSTILE]
    table = Table(HOSTILE[0], [HOSTILE[1]], [[HOSTILE[2]]])
    page = write_gallery(tmp_path / "g", cells, title=HOSTILE[0], subtitle=HOSTILE[3], tables=[table])
    text = page.read_text("utf-8")
    assert text.count("</script>") == 2
    assert text.count("<script") == 2
    assert "<img" not in text
    data = page_data(page)
    assert [row["prompt"] for row in data["prompts"]] == HOSTILE
    assert data["title"] == HOSTILE[0]
    assert data["tables"] == [{"title": HOSTILE[0], "header": [HOSTILE[1]], "rows": [[HOSTILE[2]]]}]


def test_the_same_cells_give_the_same_files(tmp_path):
    first = write_gallery(tmp_path / "a", example_cells(), title="T")
    second = write_gallery(tmp_path / "b", example_cells(), title="T")
    assert tree(first.parent) == tree(second.parent)
    names = sorted(path.name for path in (tmp_path / "a" / "images").iterdir())
    assert len(names) == 20
    assert all(re.fullmatch(r"[0-9a-f]{12}-s\d-m[01]-(base|tuned)\.png", name) for name in names)


def test_names_do_not_depend_on_the_other_prompts(tmp_path):
    few = write_gallery(tmp_path / "a", [cell(seed=-3)], title="T")
    more = write_gallery(tmp_path / "b", [cell(prompt="another"), cell(seed=-3)], title="T")
    assert {p.name for p in (few.parent / "images").iterdir()} < {p.name for p in (more.parent / "images").iterdir()}


def test_originals_are_exact_and_large_ones_get_a_thumbnail(tmp_path):
    source = tmp_path / "photo.jpg"
    shape_picture(3, size=800).save(source)
    large = shape_picture(4, size=1024)
    clear = shape_picture(5, size=600).convert("RGBA")
    cells = [cell(seed=0, image=source), cell(seed=1, image=large), cell(seed=2, image=clear), cell(seed=3)]
    page = write_gallery(tmp_path / "g", cells, title="T")
    drawn = [s["cells"][0] for s in page_data(page)["prompts"][0]["sets"]]
    assert (page.parent / drawn[0]["image"]).read_bytes() == source.read_bytes()
    assert Image.open(page.parent / drawn[1]["image"]).tobytes() == large.tobytes()
    assert [(c["width"], "thumb" in c) for c in drawn] == [(800, True), (1024, True), (600, True), (64, False)]
    thumbs = [Image.open(page.parent / c["thumb"]) for c in drawn[:3]]
    assert [t.size for t in thumbs] == [(512, 512)] * 3
    assert thumbs[2].mode == "RGBA"


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "CMYK", "F", "YCbCr"])
def test_every_mode_of_picture_can_be_written(tmp_path, mode):
    picture = shape_picture(0, size=520).convert(mode)
    page = write_gallery(tmp_path / "g", [cell(image=picture)], title="T")
    assert len(tree(page.parent)) == 3


def clip(count: int, size: int = 40) -> list[Image.Image]:
    """Frames whose red is 10 times their number."""
    return [Image.new("RGB", (size, size // 2), (10 * i, 0, 0)) for i in range(count)]


def test_frames_of_a_clip_lie_in_one_picture_and_the_original_is_animated(tmp_path):
    """7 frames of 40 x 20: three columns, three lines, 120 x 60 pixels."""
    page = write_gallery(tmp_path / "g", [cell(image=clip(7), fps=20)], title="T")
    drawn = page_data(page)["prompts"][0]["sets"][0]["cells"][0]
    assert (drawn["width"], drawn["height"]) == (40, 20)
    assert drawn["frames"] == {"file": drawn["frames"]["file"], "count": 7, "columns": 3, "ms": 50}
    sheet = Image.open(page.parent / drawn["frames"]["file"])
    assert sheet.size == (120, 60)
    assert [sheet.getpixel((40 * (i % 3) + 20, 20 * (i // 3) + 10)) for i in range(7)] == [(10 * i, 0, 0) for i in range(7)]
    pixels, rate = read_clip(page.parent / drawn["image"])
    assert (pixels[:, 10, 20, 0].tolist(), rate) == ([0, 10, 20, 30, 40, 50, 60], 20)


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".png"])
def test_animated_files_are_clips_at_an_even_pace(tmp_path, suffix):
    """Frames of 100, 200 and 100 ms: four of 100 ms, the second twice."""
    file = tmp_path / f"clip{suffix}"
    first, *rest = clip(3)
    options = {"lossless": True} if suffix == ".webp" else {}
    first.save(file, save_all=True, append_images=rest, duration=[100, 200, 100], loop=0, **options)
    page = write_gallery(tmp_path / "g", [cell(image=file)], title="T")
    drawn = page_data(page)["prompts"][0]["sets"][0]["cells"][0]
    assert (drawn["frames"]["count"], drawn["frames"]["ms"]) == (4, 100)
    sheet = Image.open(page.parent / drawn["frames"]["file"]).convert("RGB")
    assert [sheet.getpixel((40 * (i % 2) + 20, 20 * (i // 2) + 10))[0] for i in range(4)] == [0, 10, 10, 20]
    assert (page.parent / drawn["image"]).read_bytes() == file.read_bytes()


def test_long_clips_are_reduced(tmp_path):
    """100 frames of 1024 x 512 hold 52 million pixels; those kept at most 2^23, as JPEG."""
    page = write_gallery(tmp_path / "g", [cell(image=[Image.new("RGB", (1024, 512))] * 100)], title="T")
    drawn = page_data(page)["prompts"][0]["sets"][0]["cells"][0]
    sheet = Image.open(page.parent / drawn["frames"]["file"])
    assert sheet.format == "JPEG" and sheet.width * sheet.height <= 1.02 * (1 << 23)
    assert sheet.width // 10 <= 512


def test_photos_stand_upright(tmp_path):
    """A camera that was turned: stored 300 x 200 with orientation 6, shown 200 x 300."""
    photo = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 200)).save(photo, exif=exif)
    drawn = page_data(write_gallery(tmp_path / "g", [cell(image=photo)], title="T"))["prompts"][0]["sets"][0]["cells"][0]
    assert (drawn["width"], drawn["height"]) == (200, 300)


def test_films_checkpoints_and_held_out_rewards(tmp_path):
    """A film's numbers stand by position in its own rewards; a step without a reward has null there."""
    frames = [Frame(1, [cell("r", rewards={"a": 0.5})], {"a": 0.4}), Frame(9, [cell("r", rewards={"b": 1.0})], {"b": 0.9})]
    cells = [cell("base", rewards={"a": 0.1, "c": 0.2}), cell("r/checkpoint-9")]
    page = write_gallery(
        tmp_path / "g", cells, title="T", films=[Film("r", frames)], checkpoints={"r/checkpoint-9": ("r", 9)}, trained=["a"]
    )
    data = page_data(page)
    assert data["models"] == [{"name": "base"}, {"name": "r/checkpoint-9", "run": "r", "step": 9}]
    assert data["rewards"] == [{"name": "a", "heldOut": False}, {"name": "c", "heldOut": True}]
    [film] = data["films"]
    assert film["rewards"] == ["a", "b"]
    assert [frame["means"] for frame in film["frames"]] == [[0.4, None], [None, 0.9]]
    assert [frame["cells"][0]["rewards"] for frame in film["frames"]] == [[0.5, None], [None, 1.0]]
    assert all((page.parent / frame["cells"][0]["image"]).is_file() for frame in film["frames"])


def test_a_gallery_is_known_by_its_pictures(tmp_path):
    """Votes belong to pictures: another title keeps them, other pixels or another prompt do not."""
    ids = [
        page_data(write_gallery(tmp_path / str(i), [cell(**changes)], title=title))["id"]
        for i, (title, changes) in enumerate([("a", {}), ("b", {}), ("a", {"image": shape_picture(9)}), ("a", {"prompt": "b"})])
    ]
    assert ids[0] == ids[1] and len(set(ids)) == 3


def test_seeds_beyond_a_browsers_whole_numbers_are_text(tmp_path):
    seeds = [(1 << 53) - 1, 1 << 53, 1 << 61]
    sets = page_data(write_gallery(tmp_path / "g", [cell(seed=seed) for seed in seeds], title="T"))["prompts"][0]["sets"]
    assert [s["seed"] for s in sets] == [seeds[0], str(seeds[1]), str(seeds[2])]


def test_problems_name_the_place_of_every_picture_that_is_not_there(tmp_path):
    film = Film("run", [Frame(3, [cell(image=tmp_path / "gone.png")], {})])
    (tmp_path / "empty.mp4").write_bytes(b"")
    cells = [cell("m", seed=4, image=tmp_path / "lost.png"), cell("m", seed=5, image=tmp_path / "empty.mp4")]
    page = write_gallery(tmp_path / "g", cells, title="T", films=[film], problems=["a line"])
    assert page_data(page)["problems"] == [
        "a line",
        "Missing file: lost.png (m, seed 4: a red circle)",
        "Unreadable file: empty.mp4 (m, seed 5: a red circle)",
        "Missing file: gone.png (run, step 3)",
    ]


def test_an_empty_gallery_is_a_page(tmp_path):
    assert page_data(write_gallery(tmp_path / "g", [], title="T"))["prompts"] == []


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([cell(), cell()], "Two pictures by 'base'"),
        ([cell(kind="a"), cell(seed=1, kind="b")], "two kinds: 'a' and 'b'"),
        ([cell(rewards={"verify": float("inf")})], "'verify' is infinite"),
    ],
)
def test_contradictions_are_refused(tmp_path, cells, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        write_gallery(tmp_path / "g", cells, title="T")
    assert list(tmp_path.iterdir()) == []


def test_a_ragged_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="2 columns, but a row of 1"):
        write_gallery(tmp_path / "g", [], title="T", tables=[Table("t", ["a", "b"], [["1"]])])


def test_a_failure_leaves_nothing_behind_and_keeps_the_old_gallery(tmp_path):
    def failing() -> Iterator[Cell]:
        yield cell()
        raise RuntimeError("the model ran out of memory")

    out = tmp_path / "g"
    with pytest.raises(RuntimeError):
        write_gallery(out, failing(), title="T")
    assert list(tmp_path.iterdir()) == []
    write_gallery(out, [cell()], title="old")
    before = tree(tmp_path)
    with pytest.raises(RuntimeError):
        write_gallery(out, failing(), title="new")
    assert tree(tmp_path) == before


def test_a_failing_rename_brings_the_old_gallery_back(tmp_path, monkeypatch):
    out = tmp_path / "g"
    write_gallery(out, [cell()], title="old")
    before = tree(tmp_path)
    rename = os.rename

    def failing(source: Any, target: Any) -> None:
        if Path(source).name == "new":
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"):
        write_gallery(out, [cell()], title="new")
    assert tree(tmp_path) == before


def test_an_older_gallery_is_replaced_whole(tmp_path):
    out = tmp_path / "g"
    old = write_gallery(out, [cell(seed=1)], title="old")
    kept = out / page_data(old)["prompts"][0]["sets"][0]["cells"][0]["image"]
    write_gallery(out, [cell(seed=2), cell(seed=3, image=kept)], title="new")  # may quote the one it replaces
    assert page_data(out / "index.html")["title"] == "new"
    assert len(tree(out)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["g"]


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    assert write_gallery(tmp_path / "empty", [cell()], title="T").exists()
    assert write_gallery(tmp_path / "a" / "b", [cell()], title="T") == tmp_path / "a" / "b" / "index.html"


def test_other_things_are_never_replaced(tmp_path):
    page, file, mixed = tmp_path / "page", tmp_path / "file", tmp_path / "mixed"
    page.mkdir()
    (page / "index.html").write_text("<!doctype html><title>mine</title>")
    file.write_text("mine")
    write_gallery(mixed, [cell()], title="T")
    (mixed / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    for out, sentence in [(page, "is not a gallery"), (file, "is a file"), (mixed, "also holds 'notes.txt'")]:
        with pytest.raises(FileExistsError, match=sentence):
            write_gallery(out, iter([cell()]), title="T")
    assert tree(tmp_path) == before


def test_an_unwritable_place_raises_oserror(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_gallery(tmp_path / "file" / "g", [cell()], title="T")


def test_the_page_names_no_other_machine(tmp_path):
    text = write_gallery(tmp_path / "g", example_cells(), title="T").read_text("utf-8")
    assert not re.search(r"(https?:)?//[a-z0-9-]+\.", text.replace("http://www.w3.org/2000/svg", ""))  # a name, not an address
    assert "{{" not in text
    assert str(tmp_path) not in text
