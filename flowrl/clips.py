"""Clips as files: one writer, one reader.

clip_bytes(frames, fps=16)                     # an animated WebP, lossless; form="mp4" is H.264 (wants PyAV), quality=90 is small
pixels, fps = read_clip("clip.webp")           # (F, H, W, 3) uint8, and frames per second where the file says
texts_of("clip.webp")                          # what else stands inside a picture or clip

A player shows equal neighbours as one frame for longer, and counts in whole milliseconds. So the number of frames and their rate
stand inside the file as well, and what is read is what was written: to the bit where nothing was lost.
"""

from __future__ import annotations

import io
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

#: How clips are written, by name: the suffix of the file.
FORMS = {"webp": ".webp", "mp4": ".mp4"}
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
ANIMATED = (".png", ".apng", ".webp", ".gif")
FRAMES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FACTS = "flowrl"  #: The text that holds everything, as JSON.
PARAMETERS = "parameters"  #: The text that other tools read.
RATE = 16.0  #: Frames per second where nobody says.
SMALL = 128  #: Pixels of the longer side up to which a lossless file is packed with patience.
MOST_PIXELS = 1 << 31  #: Of all frames together: a clip that claims more is not unpacked.
DESCRIPTION, EXIF, COMMENT = 0x010E, 0x8769, 0x9286  # where EXIF has texts: ImageDescription, and UserComment one level down
UNPLAYABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # Pillow raises all of them


def check_form(form: str) -> None:
    """Raise ValueError for a form that is unknown, or that this machine cannot write."""
    if form not in FORMS:
        raise ValueError(f"clip_format={form!r}: clips are written as {' or '.join(FORMS)}")
    if form == "mp4":
        video_library("mp4")


def check_rate(fps: float, name: str = "fps") -> float:
    """A frame rate as a number. Raises ValueError for what is none."""
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= 1000:  # a player counts in milliseconds
        raise ValueError(f"{name}={fps!r}: frames per second, more than 0 and at most 1000")
    return float(fps)


def video_library(what: str) -> Any:
    """PyAV. Raises ValueError where it is not installed."""
    try:
        import av
    except ImportError:
        raise ValueError(f"{what} wants PyAV: pip install flowrl-diffusion[video]") from None
    return av


# ------------------------------------------------------------------------------------------------ writing


def clip_bytes(
    frames: Sequence[Image.Image] | np.ndarray,
    fps: float = RATE,
    form: str = "webp",
    texts: Mapping[str, str] | None = None,
    quality: int | None = None,
) -> bytes:
    """A clip as the bytes of a file. frames: pictures of one size, or pixels (F, H, W, 3) uint8.

    form: webp, or mp4, which is H.264 at high quality in half the colours' resolution, and loses the last row or column of an odd
    size. texts: FACTS (JSON of an object) and PARAMETERS. quality: of webp, 0 to 100; None loses nothing.
    """
    check_form(form)
    check_rate(fps)
    pictures = [frame.convert("RGB") if isinstance(frame, Image.Image) else Image.fromarray(frame) for frame in frames]
    if not pictures or len({picture.size for picture in pictures}) > 1:
        raise ValueError("a clip has one frame at least, and all of one size")
    facts = {**json.loads((texts or {}).get(FACTS, "{}")), "clip": {"frames": len(pictures), "fps": fps}}
    said = {**(texts or {}), FACTS: json.dumps(facts)}
    return _webp(pictures, fps, said, quality) if form == "webp" else _mp4(pictures, fps, said)


def _webp(pictures: list[Image.Image], fps: float, texts: Mapping[str, str], quality: int | None) -> bytes:
    exif = Image.Exif()
    exif[DESCRIPTION] = texts[FACTS]
    if PARAMETERS in texts:
        exif.get_ifd(EXIF)[COMMENT] = b"UNICODE\0" + texts[PARAMETERS].encode("utf-16-be", "surrogatepass")
    starts = [round(1000 * i / fps) for i in range(len(pictures) + 1)]
    options: dict[str, Any] = {"quality": quality, "method": 2}
    if quality is None:
        patience = {"method": 4, "quality": 75} if max(pictures[0].size) <= SMALL else {"method": 0, "quality": 0}
        options = {"lossless": True, **patience}
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=[max(1, end - start) for start, end in pairwise(starts)],
        loop=0,
        exif=exif.tobytes(),
        **options,
    )
    return buffer.getvalue()


def _mp4(pictures: list[Image.Image], fps: float, texts: Mapping[str, str]) -> bytes:
    av = video_library("mp4")
    rate, (width, height), buffer = Fraction(fps).limit_denominator(1001), pictures[0].size, io.BytesIO()
    width, height = max(2, width - width % 2), max(2, height - height % 2)
    with av.open(buffer, "w", format="mp4") as container:
        container.metadata.update({"comment": texts[FACTS], "description": texts.get(PARAMETERS, "")})
        stream = container.add_stream("libx264", rate=rate, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = 1 / rate
        stream.codec_context.colorspace, stream.codec_context.color_range = 6, 1  # what the conversion below gives
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_image(picture.crop((0, 0, width, height)))
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG")
            frame.pts, frame.time_base = i, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ reading


def read_clip(path: str | Path) -> tuple[np.ndarray, float | None]:
    """Pixels (F, H, W, 3) uint8 of a video, an animated picture or a folder of frames, and frames per second where it says.

    Raises FileNotFoundError, or ValueError with one line for what is no clip.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no clip {path}")
    rate: float | None
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in FRAMES)
        frames, rate = [_still(file) for file in files], None
    elif path.suffix.lower() in VIDEOS:
        frames, rate = _video(path)
    elif path.suffix.lower() in ANIMATED:
        frames, rate = _animated(path)
    else:
        raise ValueError(f"{path}: a clip is a video, an animated {', '.join(ANIMATED)}, or a folder of frames")
    if not frames:
        raise ValueError(f"{path} has no frames")
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError(f"{path}: its frames have different sizes")
    return np.stack(frames), rate


def rate_of(path: str | Path) -> float | None:
    """Frames per second that a file says it has, without reading its frames; None where it says nothing."""
    if Path(path).suffix.lower() in VIDEOS:
        with _unplayable(Path(path), "video"), video_library(f"{path}: reading videos").open(str(path)) as container:
            rate = container.streams.video[0].average_rate if container.streams.video else None
            return float(rate) if rate else None
    said = _said(texts_of(path))
    return None if said is None else said[1]


def is_clip(path: str | Path) -> bool:
    """Whether a file is a video, or an animated picture, or was written as a clip of one frame. False for what cannot be read."""
    path = Path(path)
    if path.suffix.lower() in VIDEOS:
        return True
    if path.suffix.lower() not in ANIMATED:
        return False
    try:
        with Image.open(path) as image:
            return getattr(image, "is_animated", False) or _said(_texts(image)) is not None
    except UNPLAYABLE:
        return False


def texts_of(path: str | Path) -> dict[str, str]:
    """FACTS and PARAMETERS of a picture or clip, as far as it has them and they can be read."""
    try:
        if Path(path).suffix.lower() in VIDEOS:
            with video_library(str(path)).open(str(path)) as container:
                said = {FACTS: container.metadata.get("comment", ""), PARAMETERS: container.metadata.get("description", "")}
                return {name: text for name, text in said.items() if text}
        with Image.open(path) as image:
            return _texts(image)
    except UNPLAYABLE:
        return {}


def _texts(image: Image.Image) -> dict[str, str]:
    if image.format == "PNG" and FACTS not in image.info:
        image.load()  # where other tools saved it: behind the pixels
    found = {name: text for name in (FACTS, PARAMETERS) if isinstance(text := image.info.get(name), str)}
    if image.format in ("WEBP", "JPEG"):
        exif = image.getexif()
        comment = exif.get_ifd(EXIF).get(COMMENT, b"")
        if isinstance(exif.get(DESCRIPTION), str) and exif[DESCRIPTION].startswith("{"):
            found[FACTS] = exif[DESCRIPTION]
        if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
            found[PARAMETERS] = comment[8:].decode("utf-16-be", "replace")
    return found


def _said(texts: Mapping[str, str]) -> tuple[int, float] | None:
    """How many frames a clip of ours has, and their rate."""
    try:
        clip = json.loads(texts[FACTS])["clip"]
        return int(clip["frames"]), check_rate(clip["fps"])
    except (KeyError, TypeError, ValueError):
        return None


@contextmanager
def _unplayable(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except UNPLAYABLE as error:
        raise ValueError(f"{path} is no {what}: {error}") from None


def _still(path: Path) -> np.ndarray:
    with _unplayable(path, "picture"), Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def _counted(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Passes frames on, and stops a file that holds too many."""
    held = 0

    def count(frame: np.ndarray) -> np.ndarray:
        nonlocal held
        held += frame.shape[0] * frame.shape[1]
        if held > MOST_PIXELS:
            raise ValueError(f"its frames have more than {MOST_PIXELS >> 20} million pixels together")
        return frame

    return count


def _animated(path: Path) -> tuple[list[np.ndarray], float | None]:
    """Every frame as often as it is shown: in all as many as the file says, or else in units of the shortest."""
    counted = _counted(path)
    with _unplayable(path, "clip"), Image.open(path) as image:
        said = _said(_texts(image))
        stored, durations = [], []
        for frame in ImageSequence.Iterator(image):
            stored.append(counted(np.asarray(frame.convert("RGB"))))
            durations.append(float(frame.info.get("duration") or 0))
        if said is not None and len(stored) <= said[0] and said[0] * stored[0][..., 0].size <= MOST_PIXELS:
            count, rate = said
            ends = list(accumulate(durations))
            return [stored[min(bisect_right(ends, (k + 0.5) / count * ends[-1]), len(stored) - 1)] for k in range(count)], rate
    if min(durations) <= 0:
        return stored, None
    unit = min(durations)
    shown = [frame for frame, duration in zip(stored, durations, strict=True) for _ in range(round(duration / unit))]
    return shown, 1000 * len(shown) / math.fsum(durations)


def _video(path: Path) -> tuple[list[np.ndarray], float | None]:
    av, counted = video_library(f"{path}: reading videos"), _counted(path)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate) if stream.average_rate else None
            return [counted(frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)], rate
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is no video: {error}") from None
