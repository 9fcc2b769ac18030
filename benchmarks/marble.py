"""Several rewards that do not agree: added up, normalised and added up (GDPO), or balanced by their gradients (MARBLE).

    python benchmarks/marble.py                                every arm, seed 0, then the cost of a step
    python benchmarks/marble.py --arms gdpo marble --seeds 0 1
    python benchmarks/marble.py --report                       the tables and the picture of what is there

The recipe `tiny-marble` with a distractor: brightness, which on a bright ground is best where there is nothing. Its advantage
goes against those of the other four in most groups. At every second update the gradient of each reward is measured and compared
with the update that is made, which changes nothing in it. Every reward is measured on 120
held-out prompts x 8 pictures, 20 ODE steps, averaged weights, the same seeds before and after, intervals by a paired bootstrap
over prompts. The cost of a step is taken apart from that: trainers that do not watch take ten steps in turn, in one process, and
count its processor time. Runs stay under --out and are taken up where they stopped; marble.png is written there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from objectives import before_and_after, clear_false_start, kept_result, train

from flowrl.commands.common import quiet_libraries
from flowrl.config import load_recipe
from flowrl.evaluate import compare, text_table
from flowrl.record import read_metrics
from flowrl.train import Trainer

DISTRACTOR = "rewards.brightness=1"
#: By name: what a table calls it, and how it differs from the recipe.
ARMS: dict[str, tuple[str, list[str]]] = {
    "sum": ("weighted sum", ["aggregation=sum_then_normalize", "balance={name: none, watch: 2, gram: lora}"]),
    "gdpo": ("GDPO", ["aggregation=normalize_then_sum", "balance={name: none, watch: 2, gram: lora}"]),
    "marble_exact": ("MARBLE, measured at each update", ["balance={name: marble, refresh: 1, gram: lora}"]),
    "marble": ("MARBLE, measured at each tenth", ["balance={name: marble, refresh: 10, watch: 2, gram: lora}"]),
}
#: The same without watching, and what they are compared with, which comes first.
COSTS: dict[str, list[str]] = {
    "one reward": ["rewards={tiny_dense: 1.0}", "balance=none"],
    "five, GDPO": [DISTRACTOR, "balance=none"],
    "five, MARBLE at each tenth": [DISTRACTOR, "balance={name: marble, refresh: 10, gram: lora}"],
    "five, MARBLE at each tenth, gram=exact": [DISTRACTOR, "balance={name: marble, refresh: 10, gram: exact}"],
    "five, MARBLE at each tenth, gram=batch": [DISTRACTOR, "balance={name: marble, refresh: 10, gram: batch}"],
    "five, MARBLE at each tenth, gram=output": [DISTRACTOR, "balance={name: marble, refresh: 10, gram: output}"],
    "five, MARBLE at each update": [DISTRACTOR, "balance={name: marble, refresh: 1, gram: lora}"],
}
REFRESH = 10  #: Steps in turn, of which one measures.
SMOOTH = 10  #: Steps that a curve's point is the mean of.


# ------------------------------------------------------------------------------------------------ measuring


def score(folder: Path) -> dict[str, Any]:
    """Before and after of every reward, and how often an update went against one; kept in the run's folder."""
    facts, result = kept_result(folder)
    if result is not None:
        return result
    recipe = load_recipe(folder / "recipe.yaml")
    base, tuned = before_and_after(folder, recipe, recipe.rewards)
    rewards = {name: vars(compare(base, tuned, name)) for name in base.rewards}
    result = {**facts, "rewards": rewards, "conflict": conflict(read_metrics(folder))}
    (folder / "result.json").write_text(json.dumps(result) + "\n")
    return result


def conflict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the updates of a run: the cosine of the worst reward with each, and which one it was."""
    found = [row for row in rows if row.get("balance/worst_cosine") is not None]
    cosines = [
        {key.split("/")[1]: value for key, value in row.items() if key.endswith("/cosine") and value is not None} for row in found
    ]
    return {
        "worst": [row["balance/worst_cosine"] for row in found],
        "which": [min(of, key=of.__getitem__) for of in cosines],
    }


def cost(out: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Processor seconds per step, and of its update, of each of COSTS: a number for every round of REFRESH steps."""
    kept = out / "cost.json"
    if kept.is_file() and len(next(iter((found := json.loads(kept.read_text())).values()))["step"]) >= rounds:
        return found
    trainers, clocks = {}, {}
    for number, (name, overrides) in enumerate(COSTS.items()):
        options = [f"output_dir={out}/cost-{number}", "eval_steps=0", "report_to=none", "samples_steps=0", *overrides]
        trainers[name] = Trainer(load_recipe("tiny-marble", options))
        clocks[name] = Clocked(trainers[name].update)
        trainers[name].update = clocks[name]  # type: ignore[assignment, method-assign]
        trainers[name].step()  # the checks, and the first measurement
    seconds: dict[str, dict[str, list[float]]] = {name: {"step": [], "update": []} for name in COSTS}
    for _ in range(rounds):
        for name, trainer in trainers.items():
            clocks[name].seconds, started = 0.0, time.process_time()
            for _ in range(REFRESH):
                trainer.step()
            seconds[name]["step"].append((time.process_time() - started) / REFRESH)
            seconds[name]["update"].append(clocks[name].seconds / REFRESH)
        kept.write_text(json.dumps(seconds) + "\n")
    return seconds


class Clocked:
    """A function, and the processor seconds that its calls took."""

    def __init__(self, function: Callable[..., Any]):
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any) -> Any:
        started = time.process_time()
        result = self.function(*arguments)
        self.seconds += time.process_time() - started
        return result


# ------------------------------------------------------------------------------------------------ reporting


def runs(out: Path) -> list[tuple[str, str, Path, dict[str, Any]]]:
    """Arm, seed, folder and result of all runs that have one, in the order of the arms."""
    found = []
    for file in out.glob("*/result.json"):
        arm, _, seed = file.parent.name.rpartition("-")
        found.append((arm, seed, file.parent, json.loads(file.read_text())))
    return sorted((run for run in found if run[0] in ARMS), key=lambda run: ([*ARMS].index(run[0]), int(run[1])))


def conflict_table(out: Path) -> str:
    header = ["arm", "seed", "updates", "worst cosine below 0", "mean worst cosine", "which one, when below 0"]
    rows = []
    for arm, seed, _, result in runs(out):
        worst = np.array(result["conflict"]["worst"])
        against = Counter(name for name, value in zip(result["conflict"]["which"], worst, strict=True) if value < 0)
        which = ", ".join(f"{name} {count}" for name, count in against.most_common(3)) or "-"
        rows.append([ARMS[arm][0], seed, str(len(worst)), f"{100 * (worst < 0).mean():.0f} %", f"{worst.mean():+.3f}", which])
    return text_table(header, rows)


def reward_table(out: Path) -> str:
    found = runs(out)
    header = ["held out", "before", *(f"{ARMS[arm][0]}, seed {seed}" for arm, seed, *_ in found)]
    rows = []
    for name, of in found[0][3]["rewards"].items():
        changes = [result["rewards"][name] for *_, result in found]
        cells = [f"{d['tuned'] - d['base']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})" for d in changes]
        rows.append([name, f"{of['base']:.3f}", *cells])
    for what, form in (("steps", ",d"), ("images", ",d"), ("minutes", ".1f")):
        rows.append([what, "", *(f"{result[what]:{form}}" for *_, result in found)])
    return text_table(header, rows)


def cost_table(seconds: dict[str, dict[str, list[float]]]) -> str:
    base = next(iter(seconds.values()))
    rows = []
    for name, of in seconds.items():
        ratios = {part: np.array(of[part]) / np.array(base[part][: len(of[part])]) for part in ("update", "step")}
        cells = [f"{np.mean(of[part]):.2f}" for part in ratios]
        cells += [f"{np.mean(r):.3f} ({r.min():.3f} to {r.max():.3f})" for r in ratios.values()]
        rows.append([name, *cells])
    return text_table(["rewards, of NFT", "update, s", "step, s", "update, relative (rounds)", "step, relative (rounds)"], rows)


def draw(out: Path) -> None:
    """Every reward of the samples of each step, a panel each, and the cosine of the worst one: a line for each arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves: dict[str, list[list[dict[str, Any]]]] = {}
    for arm, _, folder, _ in runs(out):
        curves.setdefault(arm, []).append(read_metrics(folder))
    keys = [key for key in next(iter(curves.values()))[0][0] if key.startswith("rewards/") and key.endswith("/mean")]
    panels = {**{key: key.split("/")[1] for key in keys}, "balance/worst_cosine": "cosine of the worst reward with the update"}
    figure, axes = plt.subplots(2, -(-len(panels) // 2), figsize=(11, 5.4), dpi=120)
    for place, (key, title) in zip(axes.flat, panels.items(), strict=False):
        for arm, seeds in curves.items():
            length = min(len(rows) for rows in seeds)
            smooth = np.mean([running([row.get(key, np.nan) for row in rows[:length]]) for rows in seeds], 0)
            place.plot(np.arange(1, length + 1), smooth, color=f"C{[*ARMS].index(arm)}", label=ARMS[arm][0])
        if key.startswith("balance"):
            place.axhline(0, color="grey", linewidth=0.8, linestyle=":")
        place.set_title(title, fontsize=9)
        place.spines[["top", "right"]].set_visible(False)
        place.tick_params(labelsize=8)
    for place in axes.flat[len(panels) :]:
        place.axis("off")
    for place in axes[-1]:
        place.set_xlabel(f"step (mean of the last {SMOOTH})", fontsize=8)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=len(labels), loc="lower center")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(out / "marble.png")
    plt.close(figure)


def running(values: list[float]) -> np.ndarray:
    """(n,) the mean of the last SMOOTH values, of those that are known; some always is."""
    return np.array([np.nanmean(values[max(0, i + 1 - SMOOTH) : i + 1]) for i in range(len(values))])


def report(out: Path) -> None:
    if runs(out):
        print(conflict_table(out), reward_table(out), sep="\n\n")
        draw(out)
    if (out / "cost.json").is_file():
        print(f"\n{cost_table(json.loads((out / 'cost.json').read_text()))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument("--max-minutes", type=float, default=15, help="of processor time, for each run")
    parser.add_argument("--cost-rounds", type=int, default=3, help=f"of {REFRESH} steps, for the cost; 0 leaves it out")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/marble"))
    arguments = parser.parse_args()
    quiet_libraries()
    if not arguments.report:
        for seed in arguments.seeds:
            for arm in arguments.arms:
                clear_false_start(arguments.out / f"{arm}-{seed}")
                overrides = [DISTRACTOR, f"max_steps={arguments.steps}", "checkpointing_steps=10", *ARMS[arm][1]]
                score(train("marble", seed, arguments.out, arguments.max_minutes, *overrides, label=arm))
                report(arguments.out)
        if arguments.cost_rounds:
            cost(arguments.out, arguments.cost_rounds)
    report(arguments.out)


if __name__ == "__main__":
    main()
