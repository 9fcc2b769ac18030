"""Does every objective reach its own goal? Each tiny recipe before and after, on held-out prompts.

    python benchmarks/objectives.py                            every objective that is not in the table yet
    python benchmarks/objectives.py nft dpo --seeds 0 1        some of them
    python benchmarks/objectives.py rwr --set objective.kl=2 learning_rate=1e-3 --out runs/try
    python benchmarks/objectives.py --report                   the table and the picture of what is there

An objective's run is its recipe `tiny-NAME` (NFT's is the quick start), as it ships, for at most --max-minutes of processor
time. Its goal is the weighted sum of the rewards that it trained on; where it learned from data, what the data shows: right
pictures. Measured on 120 held-out prompts x 8 pictures (`video-NAME`: clips), by as many ODE steps as its recipe evaluates with
(20 by default), averaged weights, the same seeds before and after, intervals by a paired bootstrap over prompts; runs of several
seeds get a line of their mean as well. Runs stay under --out and are taken up where they stopped; objectives.png is written
there. With OMP_NUM_THREADS=1 two of them fit on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowrl.commands.common import quiet_libraries
from flowrl.config import Recipe, load_recipe, recipe_names
from flowrl.data import load_prompts
from flowrl.evaluate import Evaluation, Protocol, compare, evaluate, text_table
from flowrl.policy import Policy
from flowrl.record import checkpoints, load_trained
from flowrl.reward_models.base import load_rewards
from flowrl.scorefile import read_results, write_results
from flowrl.sources import Source
from flowrl.statistics import interval
from flowrl.train import Trainer

SEEDS = 8  #: Pictures or clips for each held-out prompt.
#: What every run is measured by, besides its own goal: of pictures, and of clips.
ALWAYS = {
    "tiny-test": {"tiny_strict": 1.0, "tiny_dense": 1.0},
    "tiny-video-test": {"tiny_video_strict": 1.0, "tiny_video_dense": 1.0},
}


def names() -> list[str]:
    """The objectives that have a tiny recipe."""
    return ["nft", *(name.removeprefix("tiny-") for name in recipe_names() if name.startswith("tiny-"))]


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load_recipe("quickstart" if name == "nft" else f"tiny-{name}", overrides)


def train(
    name: str,
    seed: int,
    out: Path,
    max_minutes: float,
    *overrides: str,
    label: str | None = None,
    hooks: Sequence[Callable[..., None]] = (),
) -> Path:
    """One run, or the rest of one, in a folder named after the label, by default the objective's name."""
    folder = out / f"{label or name}-{seed}"
    options = [f"seed={seed}", f"output_dir={folder}", "eval_steps=0", "report_to=none", *overrides]
    recipe = recipe_of(name, *options)
    if checkpoints(folder):
        recipe.resume_from_checkpoint = "latest"
    before = json.loads(kept.read_text())["minutes"] if (kept := folder / "facts.json").is_file() else 0.0
    started = time.process_time()
    goal = {k: v.get("weight", 1.0) if isinstance(v, dict) else v for k, v in recipe.rewards.items()}

    def account(trainer: Trainer, *_: Any) -> None:
        """After each step, so that the time of a run that is killed counts as well."""
        minutes = before + (time.process_time() - started) / 60
        done = {"steps": trainer.progress.step, "images": trainer.progress.images, "minutes": minutes}
        kept.write_text(json.dumps({**done, "goal": goal, "data": recipe.data}) + "\n")
        if minutes >= max_minutes:
            trainer.recipe.max_minutes = 0.0  # ends the run

    trainer = Trainer(recipe, hooks=[*hooks, account])
    if trainer.progress.step < recipe.max_steps and before < max_minutes:
        trainer.train()
    account(trainer)
    return folder


def clear_false_start(folder: Path) -> None:
    """Remove what a run left that was killed before its first checkpoint."""
    if (folder / "metrics.jsonl").exists() and not checkpoints(folder):
        shutil.rmtree(folder)


def measured(policy: Policy, prompts: str, rewards: dict[str, Any], steps: int, name: str) -> Evaluation:
    loaded = {label: reward for label, (reward, _) in load_rewards({**rewards, **ALWAYS[prompts]}).items()}
    return evaluate(policy, load_prompts(prompts), loaded, Protocol(prompts, steps, 1.0, SEEDS), name=name)


def before_and_after(folder: Path, recipe: Recipe, rewards: dict[str, Any]) -> tuple[Evaluation, Evaluation]:
    """The model that a run started from, measured once for all that measure the same, and the run's own."""
    prompts, steps = str(recipe.eval_prompts), recipe.eval_num_inference_steps
    options: dict[str, Any] = {"dtype": recipe.dtype, "autocast": recipe.autocast, "attention_backend": recipe.attention_backend}
    facts = json.dumps([recipe.model, Source.parse(recipe.model).digest(), prompts, rewards, steps, SEEDS, options], default=str)
    kept = folder.parent / f"base-{hashlib.sha256(facts.encode()).hexdigest()[:10]}.json"
    if not kept.is_file():
        write_results(kept, [measured(Policy.load(recipe.model, **options), prompts, rewards, steps, "base")])
    return read_results(kept)[0], measured(load_trained(folder, **options), prompts, rewards, steps, folder.name)


def goal_of(result: Evaluation, goal: dict[str, float]) -> np.ndarray:
    """(P,) the weighted sum of the goal's rewards, mean over a prompt's pictures."""
    columns = [weight * result.scores[:, :, result.rewards.index(name)].numpy() for name, weight in goal.items()]
    return np.nanmean(np.sum(columns, 0), 1)


def kept_result(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What is known of a run, and what was measured of it, unless it has gone on since."""
    kept, facts = folder / "result.json", json.loads((folder / "facts.json").read_text())
    result = json.loads(kept.read_text()) if kept.is_file() else None
    return facts, result if result is not None and result["steps"] == facts["steps"] else None


def score(folder: Path) -> dict[str, Any]:
    """Before and after of one run; kept in its folder."""
    facts, result = kept_result(folder)
    if result is not None:
        return result
    recipe = load_recipe(folder / "recipe.yaml")
    rewards = {} if facts["data"] else recipe.rewards
    always = ALWAYS[str(recipe.eval_prompts)]
    goal = always if facts["data"] else facts["goal"]
    base, tuned = before_and_after(folder, recipe, rewards)
    before, after = goal_of(base, goal), goal_of(tuned, goal)
    accuracy = compare(base, tuned, next(iter(always)))
    result = {
        **facts,
        "before": float(before.mean()),
        "after": float(after.mean()),
        "changes": (after - before).tolist(),
        "interval": interval(after - before),
        "accuracy": [accuracy.base, accuracy.tuned, accuracy.low, accuracy.high],
    }
    (folder / "result.json").write_text(json.dumps(result) + "\n")
    return result


def results(out: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, seed and result of all runs that have one."""
    files = sorted(out.glob("*/result.json"))
    return [(*file.parent.name.rpartition("-")[::2], json.loads(file.read_text())) for file in files]


def pooled(out: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """Of runs that differ in the seed alone the mean: each prompt's change over the seeds, then the bootstrap over prompts."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, _, result in results(out):
        if "changes" in result:
            found.setdefault(name, []).append(result)
    means = []
    for name, seeds in found.items():
        if len(seeds) > 1:
            mean = {key: np.mean([r[key] for r in seeds], 0) for key in ("before", "after", "accuracy", "changes", "minutes")}
            whole = {key: round(np.mean([r[key] for r in seeds])) for key in ("steps", "images")}
            means.append((name, f"mean of {len(seeds)}", {**seeds[0], **mean, **whole, "interval": interval(mean["changes"])}))
    return means


def table(out: Path) -> str:
    header = ["objective", "seed", "goal", "before", "after", "change (95 % interval)", "accuracy, %"]
    header += ["steps", "images", "minutes"]
    rows = []
    for name, seed, r in [*results(out), *pooled(out)]:
        low, high = r["interval"]
        goal = "right pictures" if r["data"] else " + ".join(k if w == 1 else f"{w:g} {k}" for k, w in r["goal"].items() if w)
        change = f"{r['after'] - r['before']:+.3f} ({low:+.3f} to {high:+.3f})"
        accuracy = f"{100 * r['accuracy'][0]:.1f} -> {100 * r['accuracy'][1]:.1f}"
        counts = [str(r["steps"]), f"{r['images']:,}", f"{r['minutes']:.1f}"]
        rows.append([name, seed, goal, f"{r['before']:.3f}", f"{r['after']:.3f}", change, accuracy, *counts])
    return text_table(header, rows)


def draw(out: Path) -> None:
    """By how many points the accuracy has changed, and its interval: a line for each method, the best on top.

    Of several seeds the mean, between the mean ends of their intervals, which is wider than the interval of the mean.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {name: r["accuracy"] for name, _, r in [*results(out), *pooled(out)]}
    panels: dict[str, dict[str, np.ndarray]] = {"pictures": {}, "clips": {}}
    for name, (base, tuned, low, high) in sorted(found.items(), key=lambda item: item[1][1] - item[1][0]):
        panels["clips" if name.startswith("video-") else "pictures"][name] = 100 * np.array([tuned - base, low, high])
    panels = {what: of for what, of in panels.items() if of}
    height = [len(of) + 1.5 for of in panels.values()]
    figure, axes = plt.subplots(
        len(panels), figsize=(7, 0.19 * sum(height) + 0.6), dpi=120, sharex=True, squeeze=False, height_ratios=height
    )
    for place, (what, of) in zip(axes.flat, panels.items(), strict=True):
        for row, (change, low, high) in enumerate(of.values()):
            color = "C0" if low > 0 else "C3" if high < 0 else "grey"
            place.errorbar(change, row, xerr=[[change - low], [high - change]], fmt="o", markersize=4, capsize=2, color=color)
        place.set_yticks(range(len(of)), of, fontsize=8)
        place.set_title(what, fontsize=9, loc="left")
        place.axvline(0, color="grey", linewidth=0.8, linestyle=":")
        place.spines[["top", "right"]].set_visible(False)
        place.tick_params(labelsize=8)
    axes.flat[-1].set_xlabel("change in held-out accuracy, points (paired 95 % interval)", fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "objectives.png")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="objectives; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--max-minutes", type=float, default=9, help="of processor time, for each run")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="key=value", help="options that differ in all runs; give an --out"
    )
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    arguments = parser.parse_args()
    if arguments.set and arguments.out == parser.get_default("out"):
        parser.error("--set: these are not the recipes; give their runs a folder of their own by --out")
    quiet_libraries()
    if not arguments.report:
        for name in arguments.names or names():
            for seed in arguments.seeds:
                clear_false_start(arguments.out / f"{name}-{seed}")
                score(train(name, seed, arguments.out, arguments.max_minutes, "checkpointing_steps=10", *arguments.set))
                print(table(arguments.out), flush=True)
    print(table(arguments.out))
    if results(arguments.out):
        draw(arguments.out)


if __name__ == "__main__":
    main()
