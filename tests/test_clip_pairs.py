"""Preferences between clips from files: formats, frame rates, errors that name the line; clips whose flaws are known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from flowrl.clip_pairs import load_clip, load_clip_pairs
from flowrl.tiny.clip_pairs import NOISE, flawed, flawed_pair
from flowrl.tiny.follow import parts
from flowrl.tiny.moves import random_spec


def frames(count: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture
def folder(tmp_path):
    """a.png, an animated picture whose second frame is shown twice; b, a folder of three frames."""
    first, second, third = frames()
    first.save(tmp_path / "a.png", save_all=True, append_images=[second, second, third], duration=125)
    (tmp_path / "b").mkdir()
    for i, frame in enumerate(frames()):
        frame.save(tmp_path / "b" / f"{i}.png")
    return tmp_path


def pixels(pictures: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2) / 255


def test_clips_are_read_from_animations_folders_and_tensors(folder):
    clip, rate = load_clip(folder / "a.png")
    first, second, third = frames()
    torch.testing.assert_close(clip, pixels([first, second, second, third]))
    assert rate == 8
    clip, rate = load_clip(folder / "b")
    torch.testing.assert_close(clip, pixels(frames()))
    assert rate is None
    clip, rate = load_clip((pixels(frames()) * 255).byte())
    torch.testing.assert_close(clip, pixels(frames()))


def test_videos_are_read_with_their_rate(tmp_path):
    av = pytest.importorskip("av")
    shown = [Image.new("RGB", (32, 32), (40 * i, 100, 200 - 40 * i)) for i in range(5)]
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for picture in shown:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    clip, rate = load_clip(tmp_path / "clip.mp4")
    assert rate == 16
    torch.testing.assert_close(clip, pixels(shown), rtol=0, atol=6 / 255)


def test_a_table_of_videoalign(folder):
    """Labels A, B, same, and what is none of them; the row's frame rates, where it has some."""
    (folder / "pairs.csv").write_text(
        "path_A,path_B,prompt,VQ,MQ,TA,fps_A,fps_B\n"
        'a.png,./b,"left, then right",A,B,same,24.0,\n'
        "b,a.png,up,invalid,,b,,\n"
    )  # fmt: skip
    one, two = load_clip_pairs(folder / "pairs.csv")
    assert one.prompt == "left, then right" and one.labels == (1, 0, 0.5) and one.fps == (24, None)
    assert [math.isnan(label) for label in two.labels] == [True, True, False] and two.labels[2] == 0
    assert [(len(clip), rate) for clip, rate in one.clips()] == [(4, 24), (3, None)]
    assert [rate for _, rate in two.clips()] == [None, 8]


def test_lines_with_one_label(folder):
    rows = [{"prompt": "up", "video_0": "a.png", "video_1": "b", "label_0": 0.5, "fps_1": 8}]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (pair,) = load_clip_pairs(folder / "pairs.jsonl", ["quality", "motion"])
    assert pair.labels == (0.5, 0.5) and pair.fps == (None, 8)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "up", "video_0": "a.png"}, "line 1: has no pair of clips"),
        ({"prompt": "up", "video_0": "a.png", "video_1": "c.mp4", "label_0": 1}, "line 1: video_1: there is no clip"),
        ({"video_0": "a.png", "video_1": "b", "label_0": 1}, 'line 1: wants a text "prompt"'),
        ({"prompt": "up", "video_0": "a.png", "video_1": "b"}, "label_0 is None, and must lie in"),
        ({"prompt": "up", "video_0": "a.png", "video_1": "b", "label_0": 2}, "label_0 is 2, and must lie in"),
        ({"prompt": "up", "video_0": "a.png", "video_1": "b", "label_0": 1, "fps_0": 0}, "fps_0 is 0, and must be positive"),
        ({"prompt": "up", "video_0": "a.png", "video_1": "b", "label_0": 1, "fps_0": "x"}, "fps_0 is 'x', not a number"),
        ({"prompt": "up", "path_A": "a.png", "path_B": "b", "VQ": "both"}, "none of VQ, MQ, TA is A, B or same"),
    ],
)
def test_bad_rows_are_named(folder, row, message):
    (folder / "pairs.jsonl").write_text(json.dumps(row))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_clip_pairs(folder / "pairs.jsonl")


def test_bad_files_are_named(folder):
    (folder / "x.mp4").write_bytes(b"no video")
    (folder / "x.gif").write_bytes(b"no clip")
    (folder / "empty").mkdir()
    frames()[0].resize((5, 5)).save(folder / "b" / "9.png")
    for name, message in (
        ("x.mp4", "x.mp4 is no video"),
        ("x.gif", "x.gif is no clip"),
        ("empty", "empty has no frames"),
        ("b", "its frames have different sizes"),
    ):
        with pytest.raises(ValueError, match=message):
            load_clip(folder / name)
    with pytest.raises(FileNotFoundError, match="there is no clip"):
        load_clip(folder / "none.mp4")
    (folder / "pairs.txt").write_text("a")
    with pytest.raises(ValueError, match=r"\.csv or \.jsonl"):
        load_clip_pairs(folder / "pairs.txt")
    (folder / "pairs.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1: not valid JSON"):
        load_clip_pairs(folder / "pairs.jsonl")


# ------------------------------------------------------------------------------------------------ known flaws


def test_flaws_are_what_they_say():
    """Noise is alike in all frames; a shaking camera breaks the way; another caption's content is not what was asked for."""
    rng = np.random.default_rng(3)
    spec = random_spec(rng, "train", {"direction": 1.0})
    clean, noisy, shaken, other = (
        torch.from_numpy(flawed(spec, levels, np.random.default_rng(1)))
        for levels in ((0, 0, 0), (2, 0, 0), (0, 2, 0), (0, 0, 1))
    )
    difference = (noisy - clean)[:, :, 4:44, 4:44]
    assert float(difference.std()) == pytest.approx(NOISE[2], rel=0.35)  # part of it is clipped at white
    assert parts(clean[None], [spec])[0].tolist() == [1, 1, 1, 1]
    assert parts(shaken[None], [spec])[0, 2] < 1
    assert parts(other[None], [spec])[0].mean() < 0.9


def test_labels_say_which_clip_has_less_of_a_flaw():
    """Standing noise is read off a clip's background: its order, where clips differ in it, is that of the labels."""
    rng = np.random.default_rng(0)
    agreed = []
    for _ in range(30):
        pair = flawed_pair(rng)
        assert set(pair.labels) <= {0.0, 0.5, 1.0}
        first, second = (clip[:, :, :4].std(axis=(2, 3)).mean() for clip in pair.clips)
        if pair.labels[0] != 0.5:
            agreed.append((first < second) == (pair.labels[0] == 1))
        else:
            assert first == pytest.approx(second, rel=0.5, abs=0.02)
    assert len(agreed) > 10 and np.mean(agreed) > 0.9
    again = flawed_pair(np.random.default_rng(7))
    np.testing.assert_array_equal(again.clips, flawed_pair(np.random.default_rng(7)).clips)
