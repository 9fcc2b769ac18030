"""Pictures and clips into a gallery's folder: the original unchanged, and what the page shows in its place where that is lighter.

images/NAME.png    the original, byte for byte where browsers show its format; clips from memory become WebP
thumbs/NAME.jpg    of a large picture: at most THUMBNAIL pixels. Of a clip: its frames, line by line in one picture, which the
                   page shows one after the other; so all clips keep one beat, and no encoder of videos is needed
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from flowrl.clips import RATE, clip_bytes, is_clip, read_clip
from flowrl.pictures import picture_bytes

#: What a cell shows: a picture, the frames of a clip, or a file of either.
Source = Image.Image | Sequence[Image.Image] | Path

THUMBNAIL = 512  #: Longer side in pixels; larger originals get a thumbnail for the grid.
FRAMES_PIXELS = 8 << 20  #: All frames of a clip together; they are reduced to this.
MOST_FRAMES = 240
EXACT = 128  #: Pictures up to this side are shown pixel by pixel, so their frames are stored without loss.
SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif"}  #: Files that browsers show: copied unchanged.
VIDEOS = {".mp4": b"ftyp", ".webm": b"\x1a\x45\xdf\xa3"}  #: That browsers play, with what stands among their first bytes.
PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}


def write_picture(folder: Path, name: str, source: Source, fps: float = RATE) -> tuple[dict[str, Any], str]:
    """Write a picture or clip; return what the page needs to show it, and a digest of its content.

    Keys: image (path), width, height; thumb; of clips frames {file, count, columns, ms}; of files in a video format video. Or
    image None and a note that names the file. fps: frames per second of a clip in memory.
    """
    image: Image.Image
    if isinstance(source, Path):
        if source.suffix.lower() in VIDEOS:
            return _write_video(folder, name, source)
        try:
            original = source.read_bytes()
            image = Image.open(io.BytesIO(original))
            image.load()  # a truncated file is found here, not by the reader of the page
            frames, fps = frames_of(source)
        except FileNotFoundError:
            return {"image": None, "note": f"Missing file: {source.name}"}, source.name
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # Pillow raises all of them for a damaged file
            return {"image": None, "note": f"Unreadable file: {source.name}"}, source.name
        suffix = SUFFIXES.get(image.format or "", "")
        if not suffix:
            original, suffix = _png_bytes(image), ".png"
    elif isinstance(source, Image.Image):
        image, frames, original, suffix = source, [], _png_bytes(source), ".png"
    else:
        frames = [frame.convert("RGB") for frame in source]
        image, original, suffix = frames[0], clip_bytes(frames, fps), ".webp"
    path = f"images/{name}{suffix}"
    (folder / path).write_bytes(original)
    shown = image if frames else ImageOps.exif_transpose(image)
    picture: dict[str, Any] = {"image": path, "width": shown.width, "height": shown.height}
    if len(frames) > 1:
        picture["frames"] = _write_frames(folder, name, frames) | {"ms": round(1000 / fps, 2)}
    elif max(image.size) > THUMBNAIL:
        picture["thumb"] = _write_thumbnail(folder, name, shown)
    return picture, hashlib.sha256(original).hexdigest()


def _write_video(folder: Path, name: str, source: Path) -> tuple[dict[str, Any], str]:
    """A film that the browser decodes; its size is the browser's to find."""
    suffix = source.suffix.lower()
    try:
        original = source.read_bytes()
    except FileNotFoundError:
        return {"image": None, "note": f"Missing file: {source.name}"}, source.name
    except OSError:
        original = b""
    if VIDEOS[suffix] not in original[:16]:
        return {"image": None, "note": f"Unreadable file: {source.name}"}, source.name
    path = f"images/{name}{suffix}"
    (folder / path).write_bytes(original)
    return {"image": path, "video": True, "width": None, "height": None}, hashlib.sha256(original).hexdigest()


def frames_of(file: Path) -> tuple[list[Image.Image], float]:
    """The frames of a clip at an even pace, and how many come in a second; none of a still picture. Raises as `read_clip`."""
    if not is_clip(file):
        return [], RATE
    pixels, rate = read_clip(file)
    rate, count = rate or RATE, min(len(pixels), MOST_FRAMES)
    kept = [pixels[i * len(pixels) // count] for i in range(count)]
    return [Image.fromarray(frame) for frame in kept], rate * count / len(pixels)


def _write_frames(folder: Path, name: str, frames: Sequence[Image.Image]) -> dict[str, Any]:
    """All frames in one picture, `columns` to a line."""
    width, height = frames[0].size
    scale = min(1.0, THUMBNAIL / max(width, height), math.sqrt(FRAMES_PIXELS / (len(frames) * width * height)))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    columns = math.ceil(math.sqrt(len(frames)))
    sheet = Image.new("RGB", (columns * size[0], math.ceil(len(frames) / columns) * size[1]))
    for i, frame in enumerate(frames):
        small = frame if frame.size == size else frame.resize(size, Image.Resampling.LANCZOS)
        sheet.paste(small, (i % columns * size[0], i // columns * size[1]))
    path = f"thumbs/{name}.{'png' if max(size) <= EXACT else 'jpg'}"
    (folder / "thumbs").mkdir(exist_ok=True)
    sheet.save(folder / path, quality=88)
    return {"file": path, "count": len(frames), "columns": columns}


def _png_bytes(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    return picture_bytes(image if image.mode in PNG_MODES else image.convert("RGB"), {})


def _write_thumbnail(folder: Path, name: str, image: Image.Image) -> str:
    """A JPEG whose longer side is THUMBNAIL pixels (a PNG where the picture is transparent); returns its path."""
    opaque = image.mode in {"RGB", "L"}
    small = image.convert("RGB" if opaque else "RGBA")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    path = f"thumbs/{name}.{'jpg' if opaque else 'png'}"
    (folder / "thumbs").mkdir(exist_ok=True)
    small.save(folder / path, quality=88)
    return path
