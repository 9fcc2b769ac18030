"""Clips as files: what is read is what was written; frames, rates and texts; bad files and rates in one line each."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from flowrl.batch import Prompt, Samples, concatenate
from flowrl.clips import FACTS, PARAMETERS, clip_bytes, is_clip, rate_of, read_clip, texts_of
from flowrl.pairs import load_batch, load_shown
from flowrl.reward_models.base import RewardError
from flowrl.reward_models.clips import rate_of as rate_for_reward


def noise(count: int = 9, size: int = 16, seed: int = 0) -> np.ndarray:
    """(count, size, size, 3) uint8; a file that loses anything cannot give them back."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def ramps(count: int = 5, side: int = 48) -> np.ndarray:
    """Smooth colours that change from frame to frame, which a video coder keeps nearly as they are."""
    x, y = np.linspace(0, 255, side), np.linspace(255, 0, side)
    frames = [np.stack(np.broadcast_arrays(x[None, :], y[:, None], np.full((1, 1), 50.0 * i)), -1) for i in range(count)]
    return np.stack(frames).astype(np.uint8)


@pytest.mark.parametrize("fps", [8, 16, 23.976, 24, 1000])
def test_webp_gives_back_what_was_written(tmp_path, fps):
    """To the bit, in number and at the rate, though equal neighbours are stored as one and times in whole milliseconds."""
    frames = noise()
    frames[3] = frames[4] = frames[2]
    (tmp_path / "a.webp").write_bytes(clip_bytes(frames, fps))
    with Image.open(tmp_path / "a.webp") as stored:
        assert stored.n_frames == 7
        durations = [frame.convert("RGB") and frame.info["duration"] for frame in ImageSequence.Iterator(stored)]
    assert sum(durations) == pytest.approx(9 * 1000 / fps, abs=1)
    pixels, rate = read_clip(tmp_path / "a.webp")
    assert np.array_equal(pixels, frames) and rate == fps == rate_of(tmp_path / "a.webp")


@pytest.mark.parametrize("count", [1, 5])
def test_a_frozen_clip_keeps_its_frames(tmp_path, count):
    """It is stored as a still picture, and still is a clip."""
    frames = np.repeat(noise(1), count, 0)
    (tmp_path / "a.webp").write_bytes(clip_bytes(frames, 8))
    assert is_clip(tmp_path / "a.webp") and np.array_equal(read_clip(tmp_path / "a.webp")[0], frames)
    (tmp_path / "still.webp").write_bytes(saved(Image.fromarray(frames[0]), "WEBP", lossless=True))
    assert not is_clip(tmp_path / "still.webp")


def saved(picture: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("fps", "side"), [(8, 48), (23.976, 49)])
def test_mp4_gives_back_nearly_that(tmp_path, fps, side):
    """Within 12 of 255 of smooth colours; of an odd side the last row and column go."""
    frames = ramps(side=side)
    (tmp_path / "a.mp4").write_bytes(clip_bytes(frames, fps, "mp4"))
    pixels, rate = read_clip(tmp_path / "a.mp4")
    assert pixels.shape == (5, 48, 48, 3) and rate == pytest.approx(fps, rel=1e-4) and rate_of(tmp_path / "a.mp4") == rate
    assert np.abs(pixels.astype(int) - frames[:, :48, :48]).max() <= 12


@pytest.mark.parametrize("form", ["webp", "mp4"])
def test_texts_travel_inside(tmp_path, form):
    texts = {FACTS: json.dumps({"request": {"prompt": "猫"}}), PARAMETERS: "a cat\nSteps: 4, ä \u2028 😀"}
    path = tmp_path / f"a.{form}"
    path.write_bytes(clip_bytes(ramps(), 8, form, texts))
    back = texts_of(path)
    assert back[PARAMETERS] == texts[PARAMETERS]
    assert json.loads(back[FACTS]) == {"request": {"prompt": "猫"}, "clip": {"frames": 5, "fps": 8}}


def test_lossy_webp_is_small_and_near(tmp_path):
    """Of a picture with the noise of a camera, whose deviation is 3 of 255."""
    grain = np.random.default_rng(0).normal(0, 3, (5, 160, 160, 3))
    frames = (ramps(side=160) + grain).clip(0, 255).astype(np.uint8)
    small, whole = clip_bytes(frames, 8, quality=90), clip_bytes(frames, 8)
    (tmp_path / "a.webp").write_bytes(small)
    pixels, rate = read_clip(tmp_path / "a.webp")
    assert len(small) < len(whole) / 2 and pixels.shape == frames.shape and rate == 8
    assert np.abs(pixels.astype(int) - frames).mean() < 3


def test_animations_of_others_are_counted_in_units_of_the_shortest(tmp_path):
    """100, 200 and 100 ms: four frames at 10 a second. 62, 63, 62 ms are one pace: 3000 / 187 = 16.04 a second."""
    a, b, c = (Image.fromarray(frame) for frame in noise(3))
    a.save(tmp_path / "a.webp", save_all=True, append_images=[b, c], duration=[100, 200, 100], lossless=True)
    pixels, rate = read_clip(tmp_path / "a.webp")
    assert np.array_equal(pixels, noise(3)[[0, 1, 1, 2]]) and rate == 10
    a.save(tmp_path / "b.webp", save_all=True, append_images=[b, c], duration=[62, 63, 62], lossless=True)
    pixels, rate = read_clip(tmp_path / "b.webp")
    assert len(pixels) == 3 and rate == pytest.approx(3000 / 187)


def test_a_file_that_claims_too_many_frames_is_read_as_it_is(tmp_path):
    """Whoever writes {"clip": {"frames": 10^9}} into a file of two frames gets two."""
    exif = Image.Exif()
    exif[0x010E] = json.dumps({"clip": {"frames": 10**9, "fps": 8}})
    a, b = (Image.fromarray(frame) for frame in noise(2))
    a.save(tmp_path / "a.webp", save_all=True, append_images=[b], duration=125, lossless=True, exif=exif.tobytes())
    assert len(read_clip(tmp_path / "a.webp")[0]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fps": 0}, "fps=0: frames per second, more than 0 and at most 1000"),
        ({"fps": float("nan")}, "fps=nan: frames per second"),
        ({"fps": -8}, "fps=-8: frames per second"),
        ({"form": "avi"}, "clip_format='avi': clips are written as webp or mp4"),
        ({"frames": []}, "a clip has one frame at least, and all of one size"),
        ({"frames": [Image.new("RGB", (4, 4)), Image.new("RGB", (4, 5))]}, "a clip has one frame at least, and all of one size"),
    ],
)
def test_what_cannot_be_written_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        clip_bytes(**{"frames": noise(), **arguments})


def test_unreadable_clips_are_named(tmp_path):
    whole = clip_bytes(ramps(), 8)
    film = clip_bytes(ramps(), 8, "mp4")
    broken = {"cut.webp": whole[: len(whole) // 2], "empty.webp": b"", "x.mp4": b"no video", "cut.mp4": film[: len(film) // 2]}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is no (clip|video): "):
            read_clip(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no clip"):
        read_clip(tmp_path / "none.webp")


def test_videos_want_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"reading videos wants PyAV: pip install flowrl-diffusion\[video\]"):
        read_clip(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"mp4 wants PyAV"):
        clip_bytes(ramps(), 8, "mp4")


# ------------------------------------------------------------------------------------------------ batches


def files(folder: Path, **clips: tuple[np.ndarray, float]) -> list[Path]:
    for name, (frames, fps) in clips.items():
        (folder / f"{name}.webp").write_bytes(clip_bytes(frames, fps))
    return [folder / f"{name}.webp" for name in clips]


def test_a_batch_of_clips_has_one_length_size_and_rate(tmp_path):
    a, b = files(tmp_path, a=(noise(5), 8), b=(noise(5, seed=1), 8))
    images, fps = load_batch([a, b])
    assert images.shape == (2, 5, 3, 16, 16) and fps == 8
    assert torch.equal(images[1], load_shown(b)[0]) and not torch.equal(images[0], images[1])
    (tmp_path / "p.png").write_bytes(saved(Image.fromarray(noise(1)[0]), "PNG"))
    assert load_shown(tmp_path / "p.png")[0].shape == (3, 16, 16) and load_shown(tmp_path / "p.png")[1] is None
    long, wide, fast = files(tmp_path, long=(noise(9), 8), wide=(noise(5, 20), 8), fast=(noise(5), 16))
    for other, message in (
        (long, r"different lengths in one batch: \S+a\.webp has 5 frames, \S+long\.webp has 9 frames"),
        (wide, r"different sizes in one batch: \S+a\.webp has 16 x 16 pixels, \S+wide\.webp has 20 x 20 pixels"),
        (fast, r"different rates in one batch: \S+a\.webp has 8\.0 frames per second, \S+fast\.webp has 16\.0"),
        (tmp_path / "p.png", r"different lengths in one batch: \S+a\.webp has 5 frames, \S+p\.png has one picture"),
    ):
        with pytest.raises(ValueError, match=message):
            load_batch([a, other])


def test_samples_of_mixed_lengths_do_not_join():
    def part(text: str, frames: int) -> Samples:
        images = torch.zeros(2, frames, 3, 4, 4)
        return Samples([Prompt(text)] * 2, [0, 1], torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1), images, fps=8)

    assert concatenate([part("a", 5), part("b", 5)]).images.shape == (4, 5, 3, 4, 4)
    with pytest.raises(ValueError, match="different lengths in one batch: 'a' has 5 frames, 'b' has 9 frames"):
        concatenate([part("a", 5), part("b", 9)])


def test_a_reward_that_demands_another_rate_refuses():
    """24 and 23.976 are one rate; 16 and 8 are not."""
    samples = Samples([Prompt("a")], [0], torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1), fps=8)
    assert rate_for_reward(samples, None, "r") == rate_for_reward(samples, 8, "r") == 8
    with pytest.raises(RewardError, match="reward 'r' is set to fps=16, and these clips have 8 frames per second"):
        rate_for_reward(samples, 16, "r")
    samples.fps = 23.976
    assert rate_for_reward(samples, 24, "r") == 24
