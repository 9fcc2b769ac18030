"""Preference data: every format that is read, and what is said about what cannot be."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from flowrl.pairs import PreferencePair, RankedList, load_lists, load_pairs, load_picture
from flowrl.tiny import pairs as tiny
from flowrl.tiny import split, verify
from flowrl.tiny.scenes import KINDS


@pytest.fixture
def pictures(tmp_path):
    """red.png, green.png and blue.jpg in a folder, 4 x 3 pixels."""
    for name in ("red.png", "green.png", "blue.jpg"):
        Image.new("RGB", (4, 3), name.partition(".")[0]).save(tmp_path / name)
    return tmp_path


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def color(source) -> tuple[int, int, int]:
    return tuple(load_picture(source)[:, 0, 0].mul(255).round().int().tolist())


RED, GREEN = (255, 0, 0), (0, 128, 0)


def test_pickapic(pictures):
    """Columns of Pick-a-Pic, with pictures as paths, base64 and data URLs; weights are 1 over the examples of a prompt."""
    encoded = base64.b64encode((pictures / "green.png").read_bytes()).decode()
    file = write(
        pictures / "data.jsonl",
        {"caption": "a", "jpg_0": "red.png", "jpg_1": encoded, "label_0": 1, "label_1": 0, "num_examples_per_prompt": 4},
        {"caption": "b", "jpg_0": f"data:image/png;base64,{encoded}", "jpg_1": "red.png", "label_0": 0.5},
        {"prompt": "c", "image_0": "red.png", "image_1": "blue.jpg", "label_0": 0.3, "label_1": 0.7},
    )
    one, two, three = load_pairs(file)
    assert (one.prompt, one.label, one.weight, color(one.first), color(one.second)) == ("a", 1, 0.25, RED, GREEN)
    assert (two.label, two.weight, color(two.first), color(two.second)) == (0.5, 1, GREEN, RED)
    assert three.label == 0.3 and load_picture(three.second).shape == (3, 3, 4)
    assert [item.ranks for item in load_lists(file)] == [(1, 2), (1, 1), (2, 1)]


@pytest.mark.parametrize("names", [("chosen", "rejected"), ("positive", "negative"), ("pos_path", "neg_path")])
def test_chosen_and_rejected(pictures, names):
    (pair,) = load_pairs(write(pictures / "data.jsonl", {"prompt": "a", names[0]: "red.png", names[1]: "green.png"}))
    assert (pair.label, color(pair.first), color(pair.second)) == (1, RED, GREEN)


def test_ranked_lists(pictures):
    """Three pictures of ranks 2, 1, 2: three pairs, better first, one of them a tie; together they weigh as one."""
    file = write(pictures / "data.jsonl", {"prompt": "a", "images": ["red.png", "green.png", "blue.jpg"], "ranks": [2, 1, 2]})
    (ranked,) = load_lists(file)
    assert isinstance(ranked, RankedList) and ranked.ranks == (2, 1, 2)
    pairs = load_pairs(file)
    assert [(pair.first.stem, pair.second.stem, pair.label) for pair in pairs] == [
        ("green", "red", 1), ("red", "blue", 0.5), ("green", "blue", 1)
    ]  # fmt: skip
    assert sum(pair.weight for pair in pairs) == pytest.approx(1)


def test_parquet(pictures):
    """As Hugging Face's datasets store Pick-a-Pic: bytes, or a struct of bytes and path."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    red, green = ((pictures / f"{name}.png").read_bytes() for name in ("red", "green"))
    rows = [{"caption": "a", "jpg_0": red, "jpg_1": green, "label_0": 0.0}] * 300
    parquet.write_table(pyarrow.Table.from_pylist(rows), pictures / "a.parquet")
    pairs = load_pairs(pictures / "a.parquet")
    assert len(pairs) == 300 and (pairs[-1].label, color(pairs[-1].first)) == (0, RED)
    rows = [{"prompt": "a", "chosen": {"bytes": red, "path": None}, "rejected": {"bytes": green, "path": "x.png"}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), pictures / "b.parquet")
    assert color(load_pairs(pictures / "b.parquet")[0].second) == GREEN


def test_a_folder_of_chosen_and_rejected(pictures):
    for folder, file in (("chosen", "red.png"), ("rejected", "green.png")):
        (pictures / folder).mkdir()
        (pictures / folder / "first.png").write_bytes((pictures / file).read_bytes())
    (pictures / "prompts").mkdir()
    with pytest.raises(ValueError, match=r"first.png has no counterpart .*prompts/first.txt"):
        load_pairs(pictures)
    (pictures / "prompts" / "first.txt").write_text("a red picture\n")
    (pair,) = load_pairs(pictures)
    assert (pair.prompt, color(pair.first), color(pair.second)) == ("a red picture", RED, GREEN)


def run_samples(folder, step, rewards, groups):
    place = folder / "samples" / f"step-{step:06d}"
    place.mkdir(parents=True)
    rows = []
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        Image.new("RGB", (4, 4), "red").save(place / f"{i:04d}.png")
        values = {"dense": reward, "other": 0.0}
        rows.append(
            {"file": f"{i:04d}.png", "prompt": f"p{group}", "seed": i, "group": group, "rewards": values, "advantage": 0.0}
        )
    write(place / "samples.jsonl", *rows)


def test_pairs_of_a_run(tmp_path):
    """Within a group only, the higher reward first, a difference up to the gap a tie; what abstains is in no pair."""
    run_samples(tmp_path, 1, [0.2, 0.9, 0.3, None, 0.5], [7, 7, 8, 8, 8])
    run_samples(tmp_path, 10, [0.1, 0.2], [7, 7])
    found = load_pairs(tmp_path, reward="dense")
    names = [(pair.prompt, pair.first.parent.name, pair.first.stem, pair.second.stem, pair.label) for pair in found]
    assert names == [
        ("p7", "step-000001", "0001", "0000", 1),
        ("p8", "step-000001", "0004", "0002", 1),
        ("p7", "step-000010", "0001", "0000", 1),
    ]
    assert [pair.label for pair in load_pairs(tmp_path, reward="dense", gap=0.2)] == [1, 0.5, 0.5]
    assert load_pairs(tmp_path / "samples" / "step-000010" / "samples.jsonl", reward="dense") == found[2:]
    with pytest.raises(ValueError, match=r"samples.jsonl, line 1: reward=None: say which .*\(dense, other\)"):
        load_pairs(tmp_path)


def test_pairs_of_flowrl_sample(pictures):
    """A table without groups compares pictures of one prompt; a single reward needs no name."""
    rows = [
        {"file": f, "prompt": p, "rewards": {"r": v}}
        for f, p, v in [("red.png", "a", 1), ("green.png", "a", 2), ("blue.jpg", "b", 3)]
    ]
    write(pictures / "samples.jsonl", *rows)
    (pair,) = load_pairs(pictures)
    assert (color(pair.first), color(pair.second)) == (GREEN, RED)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"line 2: not valid JSON"),
        ([1], r"line 2: wants an object"),
        ({"chosen": "red.png", "rejected": "red.png"}, r'line 2: wants a text "prompt"'),
        ({"prompt": "a", "chosen": "red.png"}, r"line 2: has no pair of pictures \(columns jpg_0, jpg_1; "),
        ({"prompt": "a", "chosen": "red.png", "rejected": "no.png"}, r"line 2: there is no picture .*no.png"),
        ({"prompt": "a", "chosen": "red.png", "rejected": 3}, r"line 2: a picture is a path, bytes, or base64 text, not int"),
        ({"prompt": "a", "jpg_0": "red.png", "jpg_1": "red.png"}, r"line 2: has no label_0"),
        ({"prompt": "a", "jpg_0": "red.png", "jpg_1": "red.png", "label_0": 2}, r"label_0 is 2.0, and must lie in \[0, 1\]"),
        ({"prompt": "a", "jpg_0": "red.png", "jpg_1": "red.png", "label_0": 1, "label_1": 1}, r"must sum to 1"),
        ({"prompt": "a", "jpg_0": "red.png", "jpg_1": "red.png", "label_0": "1"}, r"label_0 is '1', not a number"),
        ({"prompt": "a", "images": ["red.png", "red.png"], "ranks": [1]}, r'line 2: wants as many "ranks" as "images"'),
    ],
)
def test_bad_rows_are_named(pictures, row, message):
    good = {"prompt": "a", "chosen": "red.png", "rejected": "green.png"}
    text = row if isinstance(row, str) else json.dumps(row)
    (pictures / "data.jsonl").write_text(json.dumps(good) + "\n" + text + "\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_pairs(pictures / "data.jsonl")


def test_bad_places_are_named(pictures):
    (pictures / "empty.jsonl").write_text("\n")
    (pictures / "data.csv").write_text("a,b\n")
    for place, message in [
        ("no.jsonl", "no preference data at"),
        ("empty.jsonl", "no pairs in it"),
        ("data.csv", "is .jsonl, .parquet"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_pairs(pictures / place)
    with pytest.raises(ValueError, match="has no chosen/"):
        load_pairs(pictures)


def png(width: int, height: int, pixels: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file that says what it likes."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    told = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(told)


LINES = zlib.compress(b"\0" * 8 * 25)  # of a black picture of 8 x 8
BOMB = zlib.compress(bytes(1 << 26), 9)  # 65 kB that unpack to 64 MiB


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x89PNG rubbish", "is no picture that can be read: cannot identify"),
        (b"", "is no picture that can be read: cannot identify"),
        (png(8, 8, b"no zlib"), "is no picture that can be read"),
        (png(8, 8, LINES)[:48], "is no picture that can be read"),
        (png(8, 8, LINES, (b"zTXt", b"a\0\0" + BOMB)), "is no picture that can be read"),
        (png(9000, 9000, BOMB), "is no picture that can be read: 9000 x 9000 pixels, more than 67,108,864"),
        (png(60_000, 60_000, BOMB), "is no picture that can be read: Image size .* exceeds limit"),
    ],
)
def test_hostile_pictures_are_named(tmp_path, data, message):
    """Broken, cut off, or small files that claim to be gigabytes: one sentence with the file's name, whatever Pillow raises."""
    (tmp_path / "theirs.png").write_bytes(data)
    with pytest.raises(ValueError, match=f"theirs.png {message}"):
        load_picture(tmp_path / "theirs.png")
    with pytest.raises(ValueError, match="a row of the data is no picture that can be read"):
        load_picture(data)
    with pytest.raises(FileNotFoundError, match="there is no picture .*mine.png"):
        load_picture(tmp_path / "mine.png")


def test_pictures_are_the_same_from_every_source(pictures):
    path = pictures / "blue.jpg"
    pixels = load_picture(path)
    assert torch.equal(pixels, load_picture(path.read_bytes())) and torch.equal(pixels, load_picture(pixels))
    assert torch.equal(pixels, load_picture(pixels.mul(255).round().byte()))
    grey = io.BytesIO()
    Image.new("L", (2, 2), 100).save(grey, "png")
    assert load_picture(grey.getvalue()).shape == (3, 2, 2)


# ------------------------------------------------------------------------------------------------ the embedded world


def test_agreement_is_the_verifier_on_scenes():
    """What the scenes say of every caption in the batch is what the verifier reads from their pictures."""
    images, specs, shown = tiny.captioned_scenes(40, seed=3)
    read = torch.stack([verify(images, [spec] * 40)[0] for spec in specs], 1).bool().numpy()
    assert (read == shown).mean() > 0.995 and shown.diagonal().all()
    assert 40 < shown.sum() < 400


def test_every_second_caption_is_a_word_away_and_none_is_held_out():
    _, specs, _ = tiny.captioned_scenes(60, seed=0)
    held = {spec["prompt"] for spec in split("test")}
    for one, other in zip(specs[::2], specs[1::2], strict=True):
        a, b = one["prompt"].split(), other["prompt"].split()
        assert len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1
    assert not held & {spec["prompt"] for spec in specs}


def test_word_tests_are_false_where_they_should_be():
    images, right, wrong = tiny.word_tests(5, seed=0)
    strict = [verify(images, specs)[0].mean() for specs in (right, wrong)]
    assert strict[0] > 0.95 and strict[1] < 0.05
    assert {spec["kind"] for spec in right} == set(KINDS) and all(spec in split("test") for spec in right)


def test_the_human_chooses_as_the_logistic_curve_says():
    """Differences of utility 1, 0.3 and -2: first with probability sigma(1) but for slips, a tie, second."""
    human, rng = tiny.Human(tie=0.4, slips=0.1), np.random.default_rng(0)
    for difference, expected in [(1.0, 0.9 * 0.731059 + 0.1 * 0.268941), (-2.0, 0.9 * 0.119203 + 0.1 * 0.880797)]:
        labels = human.choices(np.full(40_000, difference), rng)
        assert labels.mean() == pytest.approx(expected, abs=0.01) and set(labels) == {0, 1}
    assert set(human.choices(np.full(10, 0.3), rng)) == {0.5}


def test_the_human_likes_what_is_said_and_what_is_vivid():
    grey, red = torch.full((3, 8, 8), 0.9), torch.zeros(3, 8, 8)
    red[0] = 1
    human = tiny.Human()
    assert human.utility(grey, torch.tensor(1.0)) - human.utility(grey, torch.tensor(0.5)) == pytest.approx(2.5)
    assert human.utility(red, torch.tensor(0.5)) > human.utility(grey, torch.tensor(0.5))
    assert tiny.vividness(torch.stack([grey, red])).tolist() == pytest.approx([0, 1])


def test_choices_between_drawn_pictures(tmp_path, monkeypatch):
    """The same seed gives the same choices of the same pictures, from the cache the second time; another seed other choices."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = tiny.human_choices("train", 3, 2, seed=0, limit=2, steps=2)
    assert (
        one.images.shape == (2, 3, 3, 64, 64)
        and one.images.dtype == torch.uint8
        and len(list(tmp_path.rglob("*.safetensors"))) == 1
    )
    strict, dense = verify(one.images[1].float() / 255, [s for s in split("train") if s["prompt"] == one.prompts[1]] * 3)
    assert torch.equal(one.strict[1], strict) and torch.equal(one.dense[1], dense)
    assert one.pairs.shape == (4, 3) and (one.pairs[:, 1] != one.pairs[:, 2]).all()
    import flowrl.tiny.models

    monkeypatch.setattr(flowrl.tiny.models, "load", None)  # nothing is drawn again
    again, other = (tiny.human_choices("train", 3, 2, seed=seed, limit=2, steps=2) for seed in (0, 1))
    assert torch.equal(one.images, again.images) and torch.equal(one.pairs, again.pairs) and torch.equal(one.labels, again.labels)
    assert torch.equal(one.images, other.images) and not torch.equal(one.pairs, other.pairs)


def test_a_pair_as_a_list_has_the_nearer_end():
    pair = PreferencePair("a", b"", b"", 0.3)
    assert pair.as_list.ranks == (2, 1) and PreferencePair("a", b"", b"").as_list.ranks == (1, 2)
