"""The genealogy of a run as a picture: who was copied, who was dropped, and how evenly weights were spread."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from flowrl.samplers.steering import Report

ALIVE, DEAD, CHOSEN, TEXT = (70, 120, 180), (215, 215, 215), (220, 90, 30), (90, 90, 90)


def genealogy_picture(report: Report, path: str | Path, populations: int = 8) -> Path:
    """Draw up to `populations` populations above each other; noise on the left, finished samples on the right. Writes a PNG.

    Blue lines have a descendant at the end, grey ones have none, the orange one leads to the returned sample. The number
    under a column is the ESS there.
    """
    history, chosen = report.history, report.chosen
    count = min(populations, len(chosen))
    ancestors = [row[:count] for row in history.ancestors]
    n = ancestors[0].shape[1] if ancestors else report.particles
    if not ancestors:
        ancestors = [torch.arange(n).repeat(count, 1)]
    columns = len(ancestors) + 1
    dx, dy, margin, foot = max(60, 480 // columns), max(6, min(18, 160 // n)), 40, 34
    height = n * dy + foot
    picture = Image.new("RGB", (2 * margin + (columns - 1) * dx, count * height + margin), "white")
    draw = ImageDraw.Draw(picture)

    for p in range(count):
        top = p * height + margin // 2
        # Walk back from the end: which places of each column lead to somebody alive, and to the chosen one.
        alive, line = [torch.ones(n, dtype=torch.bool)], [int(chosen[p])]
        for row in reversed(ancestors):
            before = torch.zeros(n, dtype=torch.bool)
            before[row[p][alive[0]]] = True
            alive, line = [before, *alive], [int(row[p][line[0]]), *line]
        for drawn_last in (False, True):
            for k, row in enumerate(ancestors):
                for j in range(n):
                    parent = int(row[p, j])
                    ours = line[k + 1] == j and line[k] == parent
                    colour = CHOSEN if ours else ALIVE if bool(alive[k + 1][j]) else DEAD
                    if (colour != DEAD) == drawn_last:
                        ends = [(margin + (k + i) * dx, top + place * dy + dy // 2) for i, place in ((0, parent), (1, j))]
                        draw.line(ends, fill=colour, width=3 if ours else 2)
        for k, row in enumerate(alive):
            for j in range(n):
                x, y = margin + k * dx, top + j * dy + dy // 2
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=CHOSEN if line[k] == j else ALIVE if bool(row[j]) else DEAD)
        for k, (t, size) in enumerate(zip(history.t, history.ess, strict=True), 1):
            label = f"t {t:.2f}\n{float(size[p]):.1f}" if p == count - 1 else f"{float(size[p]):.1f}"
            draw.text((margin + k * dx - 12, top + n * dy + 2), label, fill=TEXT)
    path = Path(path)
    picture.save(path)
    return path
