"""What the tests of the gallery share: example data, and ways of looking at a page."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from flowrl.gallery import Cell

COLOURS = {"red": (214, 60, 52), "green": (52, 150, 86), "blue": (49, 104, 205), "yellow": (238, 196, 60)}
HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 1">',
    "<!-- <script> ' \" & &amp; {{data}} \\u003c \u2028 ]]>",
    "\U0001f534 a red circle \ud83d",  # an emoji, and half of another
    "دائرة حمراء إلى يسار مربع أزرق",
]


# ---------------------------------------------------------------- example data


def shape_picture(seed: int, name: str = "circle", colour: str = "red", size: int = 64) -> Image.Image:
    """One coloured shape on a pale background."""
    rng = random.Random(seed)
    image = Image.new("RGB", (size, size), tuple(rng.randint(225, 248) for _ in range(3)))
    x, y, r = (rng.uniform(0.25, 0.75) * size, rng.uniform(0.25, 0.75) * size, rng.uniform(0.1, 0.2) * size)
    draw = ImageDraw.Draw(image)
    box = (x - r, y - r, x + r, y + r)
    draw.ellipse(box, COLOURS[colour]) if name == "circle" else draw.rectangle(box, COLOURS[colour])
    return image


# prompt, kind, and verify of (base, tuned) for seeds 1 and 2
ROWS: list[tuple[str, str, list[tuple[float | None, float | None]]]] = [
    ("a red circle", "single", [(0.5, 0.5), (0.5, 0.5)]),  # unchanged
    ("two blue squares", "counting", [(0.9, 0.4), (0.2, 0.8)]),  # worst regression, in seed 1
    ("a green circle", "single", [(0.1, 1.0), (0.3, 0.4)]),  # largest gain
    ("three red squares", "counting", [(0.6, 0.5), (0.6, 0.61)]),
    ("a yellow square", "single", [(None, None), (None, 0.7)]),  # no difference is known
]


def example_cells() -> Iterator[Cell]:
    """Five prompts, two seeds, two models, two rewards."""
    for row, (prompt, kind, seeds) in enumerate(ROWS):
        for model in (0, 1):
            for seed in (2, 1):
                yield Cell(
                    model=("base", "tuned")[model],
                    prompt=prompt,
                    seed=seed,
                    image=shape_picture(10 * row + seed + model, colour=list(COLOURS)[row % 4]),
                    rewards={"verify": seeds[seed - 1][model], "aesthetic": 21.0 + row if seed == 1 else None},
                    kind=kind,
                    details={"steps": "10", "command": f"flowrl sample '{prompt}' --seed {seed}"},
                )


def cell(model: str = "base", prompt: str = "a red circle", seed: int = 0, **changes: Any) -> Cell:
    """A cell of which a test says only what it is about."""
    rest: dict[str, Any] = {"image": shape_picture(seed), "rewards": {}} | changes
    return Cell(model, prompt, seed, **rest)


def page_data(page: Path) -> dict[str, Any]:
    """The JSON block of a written page."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text("utf-8"), re.S)
    assert found
    return json.loads(found[1])


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under `folder`, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- looking at a page


def eventually(page: Any, expression: str) -> None:
    """Wait until a JavaScript expression holds (playwright's own wait needs eval, which the page's policy forbids)."""
    deadline = time.perf_counter() + 20
    while not page.evaluate(expression):
        assert time.perf_counter() < deadline, f"never became true: {expression}"
        time.sleep(0.02)


PARTS = "nodes => nodes.map(n => [...n.childNodes].map(part => part.textContent.trim()).filter(Boolean).join(' '))"


def lines(page: Any, selector: str) -> list[str]:
    """What the matching elements say, their parts separated by one space."""
    return page.locator(selector).evaluate_all(PARTS)
