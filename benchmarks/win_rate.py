"""Win rate against pointwise reward (Pref-GRPO's claim), by policy gradient on the same preference model.

    python benchmarks/win_rate.py                                       every arm, seeds 0 and 1
    python benchmarks/win_rate.py max_steps=50 --arms win_rate          options of every run, some of the arms
    python benchmarks/win_rate.py --report                              the table of what is there

Each arm is `tiny-grpo` with another reward. The control's reward is noise: what updates of this size do without any signal.
Measured as in `benchmarks/hacking.py`. Runs stay under --out and are taken up where they stopped.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from hacking import MEASURES, report
from torch import Tensor

from flowrl.commands.common import quiet_libraries
from flowrl.config import load_recipe
from flowrl.record import checkpoints
from flowrl.train import Trainer

#: Arm -> what it says, and its rewards.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "pointwise": ("preference", {"tiny_preference": 1.0}),
    "win_rate": ("win rate of the preference", {"win_rate": {"of": "tiny_preference"}}),
    "par": ("preference against base pictures", {"tiny_preference": {"weight": 1.0, "shape": {"par": {"k": 1.0}}}}),
    "noise": ("noise (control)", {"noise": 1.0}),
}


def noise(images: Tensor, prompts: list[str]) -> list[float]:
    """Says nothing, differently for every picture."""
    return [random.Random(image.numpy().tobytes()).random() for image in images]


def train(arm: str, seed: int, out: Path, overrides: list[str]) -> None:
    """One run, or the rest of one."""
    folder = out / f"{arm}-{seed}"
    recipe = load_recipe("tiny-grpo", ["eval_steps=0", *overrides, f"seed={seed}", f"output_dir={folder}"])
    recipe.rewards = ARMS[arm][1]
    if arm == "par":
        recipe.references = {"name": "base", "count": 2}
    if checkpoints(folder):
        recipe.resume_from_checkpoint = "latest"
    trainer = Trainer(recipe, rewards={"noise": noise} if arm == "noise" else None)
    if trainer.progress.step < recipe.max_steps:
        trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--no-report", action="store_true", help="only train")
    parser.add_argument("--out", type=Path, default=Path("runs/win_rate"))
    arguments = parser.parse_args()
    quiet_libraries()
    for seed in [] if arguments.report else arguments.seeds:
        for arm in arguments.arms:
            train(arm, seed, arguments.out, arguments.overrides)
    if not arguments.no_report:
        report(arguments.out, {arm: heading for arm, (heading, _) in ARMS.items()}, MEASURES)


if __name__ == "__main__":
    main()
