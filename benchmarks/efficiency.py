"""How many pictures does it take? Held-out accuracy against pictures drawn in training, and against processor time.

    python benchmarks/efficiency.py                        GRPO on all steps, Fast, G2RPO, NFT and AWM; seeds 0 1 2
    python benchmarks/efficiency.py nft dgpo --seeds 0     some of them, or other objectives that have a tiny recipe
    python benchmarks/efficiency.py guided unguided        Euphonium on clips, with the process reward's lean and without
    python benchmarks/efficiency.py --report               the table and the picture of what is there

A run is the objective's tiny recipe, as it ships, for at most --max-minutes of processor time. Every --every steps the averaged
weights draw 120 held-out prompts x --pictures by 20 ODE steps, always from the same seeds, and the exact reader counts the right
ones. Single evaluations are noisy, so a level counts as reached where the mean of an evaluation, the one before and the one after
it first comes up to it; the best is the largest of these means, which flatters every method a little. Pictures of evaluations do
not count, nor does their processor time. Runs stay under --out and are taken up where they stopped; efficiency.png is written
there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from objectives import ALWAYS, clear_false_start, names, recipe_of, train

from flowrl.commands.common import quiet_libraries
from flowrl.config import Recipe
from flowrl.data import load_prompts
from flowrl.evaluate import Protocol, evaluate, text_table
from flowrl.policy import Policy
from flowrl.reward_models.base import load_rewards
from flowrl.train import Trainer

#: By name: what a table calls it, its objective, and how it differs from that one's recipe. Others go by their objective's name.
METHODS: dict[str, tuple[str, str, list[str]]] = {
    "grpo_all": ("GRPO, all steps but the last", "grpo", ["steps=all_but_last"]),
    "fast": ("GRPO, a window of two (Fast)", "grpo", []),
    "g2rpo": ("G2RPO", "g2rpo", []),
    "nft": ("NFT", "nft", []),
    "awm": ("AWM", "awm", []),
    "guided": ("Euphonium, guided rollouts", "video-euphonium", []),
    "unguided": ("Euphonium, unguided", "video-euphonium", ["objective.guide=false"]),
}
DEFAULTS = ("grpo_all", "fast", "g2rpo", "nft", "awm")
POINTS = (5.0, 8.0)  #: Levels, in points above the base model.
ACCURACY = 90.0  #: A level in percent.
SHARE = 0.9  #: A level as a share of the largest gain of all runs.


def method(name: str) -> tuple[str, str, list[str]]:
    return METHODS.get(name, (name, name, []))


# ------------------------------------------------------------------------------------------------ measuring


def accuracy(policy: Policy, prompts: str, pictures: int, weights: str = "policy") -> float:
    """Percent of right pictures or clips."""
    strict = next(iter(ALWAYS[prompts]))
    rewards = {label: reward for label, (reward, _) in load_rewards({strict: 1.0}).items()}
    protocol = Protocol(prompts, 20, 1.0, seeds=pictures)
    return 100 * evaluate(policy, load_prompts(prompts), rewards, protocol, weights=weights).mean(strict)


class Curve:
    """A hook: each step's pictures and processor minutes, and, every so many steps, the accuracy, as lines of a file.

    Of a run that is taken up again the lines up to there are kept. The first step of a process, whose time would hold loading and
    checks, counts as much as the second.
    """

    def __init__(self, file: Path, every: int, pictures: int):
        self.file, self.every, self.pictures = file, every, pictures
        self.ended: float | None = None  # processor seconds when the last step was over, evaluation included
        self.uncounted = 1  # steps whose time is taken to be that of the next one

    def __call__(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        seconds = 0.0
        if self.ended is not None:
            seconds, self.uncounted = (1 + self.uncounted) * (time.process_time() - self.ended), 0
        rows = [row for row in read(self.file) if row["step"] < step]
        before = rows[-1]["minutes"] if rows else 0.0
        row = {"step": step, "images": trainer.progress.images, "minutes": before + seconds / 60}
        if step % self.every == 0:
            row["accuracy"] = accuracy(trainer.policy, str(trainer.recipe.eval_prompts), self.pictures, "ema")
        self.file.write_text("".join(json.dumps(one) + "\n" for one in [*rows, row]))
        self.ended = time.process_time()


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def base_accuracy(kept: Path, recipe: Recipe, pictures: int) -> float:
    """Of the model that all runs start from, kept. Raises SystemExit where another was, or another number of pictures."""
    facts = {"model": recipe.model, "pictures": pictures}
    if kept.is_file():
        found = json.loads(kept.read_text())
        if different := [f"{key} {found[key]}" for key in facts if found[key] != facts[key]]:
            raise SystemExit(f"{kept.parent} holds runs with {' and '.join(different)}: give another --out")
        return found["accuracy"]
    policy = Policy.load(recipe.model, autocast=recipe.autocast, attention_backend=recipe.attention_backend)
    value = accuracy(policy, str(recipe.eval_prompts), pictures)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({**facts, "accuracy": value}) + "\n")
    return value


# ------------------------------------------------------------------------------------------------ reporting


def curves(out: Path) -> dict[str, dict[str, np.ndarray]]:
    """By method and seed: (3, n) pictures, minutes and accuracy at the evaluations."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for file in sorted(out.glob("*/curve.jsonl")):
        name, _, seed = file.parent.name.rpartition("-")
        rows = [[row["images"], row["minutes"], row["accuracy"]] for row in read(file) if "accuracy" in row]
        if rows:
            found.setdefault(name, {})[seed] = np.array(rows).T
    return dict(sorted(found.items(), key=lambda item: ([*METHODS, item[0]].index(item[0]), item[0])))


def smoothed(values: np.ndarray) -> np.ndarray:
    """(n,) the mean of each value and its neighbours."""
    return np.array([values[max(0, i - 1) : i + 2].mean() for i in range(len(values))])


def reached(curve: np.ndarray, level: float) -> np.ndarray | None:
    """(2,) pictures and minutes at which a curve (3, n) comes up to a level, or None."""
    places = np.flatnonzero(smoothed(curve[2]) >= level)
    return curve[:2, places[0]] if len(places) else None


def table(out: Path, base: float) -> str:
    found = curves(out)
    gains = [smoothed(curve[2]).max() - base for seeds in found.values() for curve in seeds.values()]
    best = max(gains, default=0.0)
    levels = {f"+{points:g} points": base + points for points in POINTS}
    levels |= {f"{SHARE:.0%} of the best (+{SHARE * best:.1f})": base + SHARE * best, f"{ACCURACY:g} %": ACCURACY}
    rows = []
    for name, seeds in found.items():
        ends = [smoothed(curve[2]).max() - base for curve in seeds.values()]
        drawn = max(curve[0, -1] for curve in seeds.values())
        cells = [
            method(name)[0],
            str(len(seeds)),
            f"{drawn:,.0f}",
            f"{np.mean(ends):+.1f} ({min(ends):+.1f} to {max(ends):+.1f})",
        ]
        rows.append([*cells, *(cell([reached(curve, level) for curve in seeds.values()]) for level in levels.values())])
    return text_table(["method", "seeds", "pictures", f"best, points above {base:.1f} %", *levels], rows)


def cell(found: list[np.ndarray | None]) -> str:
    """Pictures and processor minutes to a level: the median of the seeds that reach it, their range, and how many they are."""
    there = np.array([values for values in found if values is not None])
    if not len(there):
        return "not reached"
    images, minutes = np.median(there, 0)
    spread = "" if len(there) == 1 else f" ({there[:, 0].min():,.0f} to {there[:, 0].max():,.0f})"
    return f"{images:,.0f}{spread}, {minutes:.1f} min; {len(there)} of {len(found)}"


def draw(out: Path, base: float) -> None:
    """Accuracy against pictures and against processor minutes: the mean of a method's seeds, and from the worst to the best."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), dpi=130, sharey=True)
    for k, (name, seeds) in enumerate(curves(out).items()):
        length = min(curve.shape[1] for curve in seeds.values())
        heights = np.stack([[base, *smoothed(curve[2, :length])] for curve in seeds.values()])
        for axes, across in zip(panels, (0, 1), strict=True):
            x = np.array([0, *np.mean([curve[across, :length] for curve in seeds.values()], 0)])
            axes.plot(x, heights.mean(0), color=f"C{k}", label=method(name)[0])
            axes.fill_between(x, heights.min(0), heights.max(0), color=f"C{k}", alpha=0.15, linewidth=0)
    for axes, label in zip(panels, ("pictures drawn in training", "processor minutes of training"), strict=True):
        for level in (base, *(base + points for points in POINTS)):
            axes.axhline(level, color="grey", linewidth=0.8, linestyle=":")
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out accuracy, %")
    panels[1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "efficiency.png")
    plt.close(figure)


def report(out: Path, base: float) -> None:
    if curves(out):
        print(table(out, base), flush=True)
        draw(out, base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", help=f"of {', '.join(METHODS)}, or any objective with a tiny recipe; the first five by default"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-minutes", type=float, default=8, help="of processor time, for each run, with its evaluations")
    parser.add_argument("--every", type=int, default=10, help="steps from one evaluation to the next")
    parser.add_argument("--pictures", type=int, default=2, help="per held-out prompt")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="options that differ in all runs")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/efficiency"))
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if method(name)[1] not in names()]:
        parser.error(f"{unknown[0]}: known are {', '.join([*METHODS, *names()])}")
    quiet_libraries()
    kept = arguments.out / "base.json"
    if arguments.report:
        if not kept.is_file():
            parser.error(f"--report: {arguments.out} holds no runs")
        report(arguments.out, json.loads(kept.read_text())["accuracy"])
        return
    chosen = arguments.names or DEFAULTS
    base = base_accuracy(kept, recipe_of(method(chosen[0])[1]), arguments.pictures)
    for seed in arguments.seeds:
        for name in chosen:
            _, objective, overrides = method(name)
            folder = arguments.out / f"{name}-{seed}"
            clear_false_start(folder)
            curve = Curve(folder / "curve.jsonl", arguments.every, arguments.pictures)
            overrides = ["checkpointing_steps=10", *overrides, *arguments.set]
            train(objective, seed, arguments.out, arguments.max_minutes, *overrides, label=name, hooks=[curve])
            report(arguments.out, base)


if __name__ == "__main__":
    main()
