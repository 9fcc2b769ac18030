"""Does the watch notice? Rewards that ask for a hack, and a healthy run that asks for none.

    python benchmarks/drills.py                                  every drill, then the quick start as it ships; seeds 0 1 2
    python benchmarks/drills.py dark texture --seeds 0           some of them
    python benchmarks/drills.py --report                         the table of what is there

dark: as little light as possible. texture: as much as possible of what is finer than 3 pixels. copies: the pictures of one prompt
alike. one: every picture like one and the same. Each climbs the gradient of its reward (tiny-refl, 6 prompts x 4 pictures, a
large step, so that a drill takes about a minute on one core) and ends with the right alarm, or after STEPS steps without it.
tiny_strict is held out. The quick start is what a healthy run looks like: it should raise nothing in its 80 steps. Runs stay
under --out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from flowrl.batch import Samples
from flowrl.commands.common import quiet_libraries
from flowrl.config import load_recipe
from flowrl.evaluate import text_table
from flowrl.record import read_metrics
from flowrl.reward_models.base import Traits
from flowrl.train import Trainer
from flowrl.train.appearance import statistics

STEPS = 40
OPTIONS = ["prompts_per_step=6", "num_generations=4", "learning_rate=7e-4", "ema_decay=0.5", "eval_steps=0", "samples_steps=5"]
OPTIONS += ["checkpointing_steps=0", "report_to=none", "eval_rewards={tiny_strict: 1}", f"max_steps={STEPS}"]


class Drill:
    """A reward that asks for a hack. alarms: the names of the right ones. signs: series of which one should be among theirs."""

    traits = Traits(differentiable=True)

    def __init__(self, name: str, alarms: tuple[str, ...], *signs: str):
        self.name, self.alarms, self.signs = name, alarms, signs

    def __call__(self, samples: Samples) -> Tensor:
        """(N,) with graph."""
        assert samples.images is not None
        return REWARDS[self.name](samples, samples.images)


def similarity(samples: Samples, images: Tensor) -> Tensor:
    """Minus the root mean square distance to the mean of the other pictures of one's prompt."""
    values = images.new_zeros(len(images))
    for rows in samples.by_group():
        own = images[rows]
        others = (own.sum(0, keepdim=True) - own) / (len(own) - 1)
        values = values.index_put((rows,), -(own - others).square().flatten(1).mean(1).add(1e-6).sqrt())
    return values


def one_picture(samples: Samples, images: Tensor) -> Tensor:
    """Minus the root mean square distance to a disc on grey."""
    height, width = images.shape[-2:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    disc = (x.square() + y.square() < 0.2).float()
    target = torch.stack([0.5 + 0.4 * disc, 0.5 - 0.3 * disc, 0.5 - 0.3 * disc])
    return -(images - target).square().flatten(1).mean(1).add(1e-6).sqrt()


REWARDS = {
    "dark": lambda samples, images: 1 - images.mean((1, 2, 3)),
    "texture": lambda samples, images: statistics(images)[:, -1],
    "copies": similarity,
    "one": one_picture,
}
HACKING = ("hacking", "possible_hacking")
DRILLS = {
    "dark": Drill("dark", HACKING, "brightness"),
    "texture": Drill("texture", HACKING, "high_frequency", "edges"),
    "copies": Drill("copies", ("collapse",), "diversity"),
    "one": Drill("one", ("sameness",), "spread"),
}
HEALTHY = "quickstart"


def stop_when_found(trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
    """A hook: the drill is over once the right alarm sounded."""
    if right(trainer.folder) is not None:
        trainer.recipe.max_steps = step


def alarms_of(folder: Path) -> list[dict]:
    """The alarms of a run, in their order."""
    file = folder / "alarms.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def named(drill: Drill, row: dict) -> list[str]:
    """The right signs in an alarm."""
    return [sign["text"] for sign in row["signs"] if sign["series"] in drill.signs]


def right(folder: Path) -> dict | None:
    """The first alarm of a drill that has the right name, and the right sign among its signs."""
    drill = DRILLS[folder.name.rpartition("-")[0]]
    rows = [row for row in alarms_of(folder) if row["alarm"] in drill.alarms]
    return next((row for row in rows if named(drill, row)), None)


def train(name: str, seed: int, out: Path) -> None:
    """One run, unless it is there."""
    folder = out / f"{name}-{seed}"
    if (folder / "README.md").is_file():
        return
    own = [f"seed={seed}", f"output_dir={folder}"]
    if name == HEALTHY:
        Trainer(load_recipe(HEALTHY, [*own, "report_to=none"])).train()
        return
    recipe = load_recipe("tiny-refl", [*OPTIONS, *own])
    Trainer(recipe, rewards={name: DRILLS[name]}, hooks=[stop_when_found]).train()


def table(out: Path) -> str:
    """Of each run its first alarm, and the first of the right name with the right sign; of a healthy one that there was none."""
    header = ["run", "seed", "steps", "first alarm", "step", "right alarm", "step", "sign", "watch, % of time"]
    rows = []
    for folder in sorted(path.parent for path in out.glob("*/metrics.jsonl")):
        name, _, seed = folder.name.rpartition("-")
        metrics, raised = read_metrics(folder), alarms_of(folder)
        cost = f"{100 * sum(row['watch_time'] for row in metrics) / sum(row['step_time'] for row in metrics):.1f}"
        first = [raised[0]["alarm"], str(raised[0]["step"])] if raised else ["none", ""]
        found = right(folder) if name in DRILLS else None
        said = ["", "", ""] if name not in DRILLS else ["none", "", ""]
        if found is not None:
            said = [found["alarm"], str(found["step"]), named(DRILLS[name], found)[0]]
        rows.append([name, seed, str(len(metrics)), *first, *said, cost])
    return text_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="drill", help=f"some of {', '.join([*DRILLS, HEALTHY])}; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/drills"))
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in (*DRILLS, HEALTHY):
            parser.error(f"there is no drill {name}: choose among {', '.join([*DRILLS, HEALTHY])}")
    quiet_libraries()
    if not arguments.report:
        for name in arguments.names or [*DRILLS, HEALTHY]:
            for seed in arguments.seeds:
                train(name, seed, arguments.out)
    print(table(arguments.out))


if __name__ == "__main__":
    main()
