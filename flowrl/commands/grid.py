"""`flowrl grid`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowrl.commands.common import command, make_folder
from flowrl.commands.gallery import gather, input_options

GRID_HELP = """\
A labelled sheet for a paper, as PNG: prompts down, models and seeds across, rewards below. It takes what `flowrl gallery` takes.
Clips are strips of frames there; in a .webp or .mp4 they move, in step.

  flowrl grid tiny-sd3 runs/demo --limit 6 --seeds 3 --out figure.png
  flowrl grid samples/ --by seed --no-rewards --note "20 ODE steps, guidance 4.5"
  flowrl grid tiny-wan runs/tiny-video-nft --limit 6 --seeds 1 --out film.webp
"""


def add(commands: Any) -> None:
    grid = command(commands, "grid", run_grid, "a labelled sheet of the same pictures, for papers", description=GRID_HELP)
    grid.add_argument(
        "--out", type=Path, default=Path("grid.png"), help="the file (default grid.png), a page each where it is tall"
    )
    grid.add_argument("--by", choices=("model", "seed"), default="model", help="what the columns are grouped by (default model)")
    grid.add_argument("--no-rewards", action="store_true", help="pictures alone")
    grid.add_argument("--note", help="the line at the foot (default: how the pictures came about)")
    input_options(grid)


def run_grid(arguments: argparse.Namespace) -> int:
    import sys

    from flowrl.clips import FORMS
    from flowrl.config import ConfigError
    from flowrl.gallery.sheet import write_sheet

    if arguments.out.suffix.lower() not in (".png", *FORMS.values()):
        raise ConfigError(f"--out {arguments.out}: a sheet is a .png, or where clips are to move a {' or '.join(FORMS.values())}")
    if arguments.out.is_dir():
        raise ConfigError(f"--out {arguments.out} is a folder")
    make_folder(arguments.out.parent)
    found, _, said = gather(arguments)
    if not found.cells:
        raise ConfigError(
            f"{arguments.inputs[0]} holds no pictures of models to put beside each other; `flowrl gallery` shows films"
        )
    note = said if arguments.note is None else arguments.note
    files, problems = write_sheet(
        arguments.out, found.cells, by_seed=arguments.by == "seed", rewards=not arguments.no_rewards, note=note
    )
    for problem in [*found.problems, *problems]:
        print(f"flowrl: {problem}", file=sys.stderr)
    for file in files:
        print(file)
    return 0
