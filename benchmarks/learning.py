"""How far a recipe carries the embedded model: held-out accuracy before and after, for several seeds, and the curve.

    python benchmarks/learning.py                                     the quick start, seeds 0 1 2
    python benchmarks/learning.py --seeds 0 --max-minutes 30          a long run
    python benchmarks/learning.py tiny-grpo objective.beta=0.1        any recipe, any override

Every seed is a run of its own under --out, taken up where it stopped. The evaluation is pinned: 120 held-out prompts x 4
pictures, 20 ODE steps, averaged weights, intervals by a paired bootstrap over prompts. Writes results.json and curve.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from flowrl.commands.common import quiet_libraries
from flowrl.config import Recipe, load_recipe
from flowrl.data import load_prompts
from flowrl.evaluate import Evaluation, Protocol, compare, comparison_rows, evaluate, text_table
from flowrl.record import checkpoints, load_trained, read_metrics
from flowrl.reward_models import load_reward
from flowrl.train import Trainer


def scores_of(model: str | Path, name: str, protocol: Protocol) -> Evaluation:
    """The pinned evaluation of a model or a run, on this machine's fastest arithmetic for the embedded model."""
    policy = load_trained(model)
    rewards = {reward: load_reward(reward) for reward in ("tiny_strict", "tiny_dense")}
    return evaluate(policy, load_prompts(protocol.prompts), rewards, protocol, name=name, progress=True)


def run(recipe: Recipe, base: Evaluation) -> dict[str, Any]:
    """One run, or what is left of it: before, after, interval, minutes, pictures, alarms of the watch. Kept in its folder."""
    folder = Path(recipe.output_dir)
    kept = folder / "result.json"
    if not kept.is_file():
        recipe.resume_from_checkpoint = "latest" if checkpoints(folder) else None
        trainer = Trainer(recipe)
        trainer.train()
        tuned = scores_of(folder, f"seed {recipe.seed}", base.protocol)
        print(text_table(*comparison_rows(base, tuned, "tiny_strict")), flush=True)
        facts = {"minutes": trainer.progress.seconds / 60, "images": trainer.progress.images}
        kept.write_text(json.dumps({**vars(compare(base, tuned, "tiny_strict")), **facts}) + "\n")
    alarms = folder / "alarms.jsonl"
    return {**json.loads(kept.read_text()), "alarms": len(alarms.read_text().splitlines()) if alarms.is_file() else 0}


def draw(curves: dict[str, list[dict]], base: float, path: Path) -> None:
    """Held-out strict accuracy over training minutes, a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=150)
    for label, rows in curves.items():
        minutes, seconds = [0.0], 0.0
        accuracy = [base]
        for row in rows:
            seconds += row["step_time"]
            if row.get("eval/tiny_strict") is not None:
                minutes.append(seconds / 60)
                accuracy.append(row["eval/tiny_strict"])
        axes.plot(minutes, [100 * a for a in accuracy], label=label)
    axes.axhline(100 * base, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="minutes of training", ylabel="held-out accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-minutes", type=float)
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    arguments = parser.parse_args()
    quiet_libraries()

    protocol = Protocol("tiny-test", 20, 1.0, seeds=4)
    base = scores_of(load_recipe(arguments.recipe, arguments.overrides).model, "base", protocol)
    results, curves = {}, {}
    for seed in arguments.seeds:
        folder = arguments.out / f"seed-{seed}"
        overrides = [*arguments.overrides, f"seed={seed}", f"output_dir={folder}"]
        if arguments.max_minutes:
            overrides += [f"max_minutes={arguments.max_minutes}", "max_steps=100000"]
        results[seed] = run(load_recipe(arguments.recipe, overrides), base)
        curves[f"seed {seed}"] = read_metrics(folder)
    print("\nseed  base   tuned  difference (95 % interval)   minutes  images  alarms")
    for seed, r in results.items():
        interval = f"{r['tuned'] - r['base']:+.3f} ({r['low']:+.3f} to {r['high']:+.3f})"
        print(f"{seed:<6}{r['base']:.3f}  {r['tuned']:.3f}  {interval:<27}{r['minutes']:>8.1f}{r['images']:>8}{r['alarms']:>8}")
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(curves, base.mean("tiny_strict"), arguments.out / "curve.png")


if __name__ == "__main__":
    main()
