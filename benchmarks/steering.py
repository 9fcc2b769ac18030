"""Reward against denoiser calls for every steering method, at equal budget, with a held-out reward beside the steered one.

    OMP_NUM_THREADS=1 python benchmarks/steering.py                 writes docs/steering.png and the tables of docs/steering.md

The embedded model, 10 denoising steps, 40 held-out prompts of the four harder kinds, one sample each from a seed of its own.
Part one steers by `tiny_dense` (partial credit, from an exact verifier without gradient) and holds out `tiny_strict`. Part two
steers by `brightness`, which has a gradient, on half of the prompts, and holds out `tiny_dense`: does the picture still follow
its prompt? The budget is in denoiser calls per returned sample; a backward pass counts as two. Intervals: paired bootstrap over
prompts, against best of N at the same budget.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flowrl.batch import Prompt
from flowrl.commands.common import quiet_libraries
from flowrl.data import load_prompts
from flowrl.evaluate import prompt_seed, text_table
from flowrl.policy import Policy
from flowrl.reward_models import load_reward
from flowrl.reward_models.base import Reward, score
from flowrl.samplers import CPS, DDIM, GLASS
from flowrl.samplers.steering import (
    FK,
    BestOfN,
    Doob,
    FlowMap,
    Guidance,
    Paths,
    PolicyModel,
    Rollover,
    Twisted,
    ZeroOrder,
    steer_each,
)
from flowrl.samplers.steering.loop import Steering, strength_of

TITLES = ("tiny_dense (steered)", "tiny_strict (held out)")
KINDS = ("two_object", "counting", "position", "color_attr")


@dataclass
class Planned:
    """A method at a budget, in calls per returned sample."""

    name: str
    budget: int
    method: Steering
    steps: int = 10


@dataclass
class Run:
    """One method at one budget, over P prompts. calls, rewards: per returned sample. steered, held_out: (P,) of those."""

    plan: Planned
    calls: float
    rewards: float
    ess: float | None
    ancestors: float | None
    seconds: float
    steered: np.ndarray
    held_out: np.ndarray


def by_value(lam: float) -> list[Planned]:
    """Methods that only compare rewards."""
    plans = [Planned("plain ODE", 10, BestOfN(1))]
    for n in (2, 4, 8):
        budget = 10 * n
        plans += [
            Planned("best of N", budget, BestOfN(n)),
            Planned("best of N, CPS", budget, BestOfN(n, CPS(0.8))),
            Planned("best of N, DDIM", budget, BestOfN(n, DDIM(1.0))),
            Planned("FK difference, CPS", budget, FK(n, lam)),
            Planned("FK max, CPS", budget, FK(n, lam, "max")),
            Planned("FK difference, DDIM", budget, FK(n, lam, transition=DDIM(1.0))),
            Planned("FK difference, GLASS", budget, FK(n, lam, transition=GLASS(2)), steps=5),
            Planned("zero-order", budget, ZeroOrder(max(1, n // 4), min(n, 4))),
        ]
        if n < 8:
            plans += [Planned("Doob sample, reused eps", budget, Doob("sample", "reuse", 4, lam, particles=n))]
        if n > 2:
            plans += [
                Planned("Doob best child", budget, Doob("best", "child", 4, particles=n // 4)),
                Planned("paths", budget, Paths(n // 4, 2, first=4, back=3, forward=2)),
                Planned("rollover", budget, Rollover(budget, 1)),
            ]
    return plans


def by_gradient(lam: float) -> list[Planned]:
    """Methods that follow a gradient, at 60 calls, and what a single guided sample costs."""
    plans = [Planned("plain ODE", 10, BestOfN(1)), Planned("best of N", 30, BestOfN(3)), Planned("best of N", 60, BestOfN(6))]
    for strength in (1, 4):
        label = f"lam x {strength}"
        plans += [
            Planned(f"FK difference, CPS, {label}", 60, FK(6, strength * lam)),
            Planned(f"twisted SMC, {label}", 60, Twisted(2, strength * lam)),
            Planned(f"flow map of one step, {label}", 60, FlowMap(2, strength * lam, map_steps=1)),
            Planned(f"through denoiser, {label}", 30, Guidance("denoiser", strength * lam)),
            Planned(f"through denoiser, best of 2, {label}", 60, Guidance("denoiser", strength * lam, 2)),
            Planned(f"Jacobian-free, {label}", 10, Guidance("jacobian_free", strength * lam)),
            Planned(f"Jacobian-free, best of 6, {label}", 60, Guidance("jacobian_free", strength * lam, 6)),
        ]
    return plans


def measure(policy: Policy, prompts: list[Prompt], rewards: dict[str, Reward], plan: Planned) -> Run:
    """Every prompt has a seed of its own, the same for every method. rewards: the steered one, then the held-out one."""
    start, seeds = time.perf_counter(), [prompt_seed(prompt.text, 0) for prompt in prompts]
    result = steer_each(policy, prompts, next(iter(rewards.values())), plan.method, seeds, num_inference_steps=plan.steps)
    seconds = time.perf_counter() - start
    scores, report = score(rewards, result.samples).numpy(), result.report
    carried = not report.log_z.isnan().any()
    return Run(
        plan,
        (report.counts.denoiser_calls + 2 * report.counts.denoiser_backwards) / len(prompts),
        report.counts.reward_calls / len(prompts),
        report.ess[-1] / report.particles if carried else None,
        float(report.surviving.float().mean()) if carried else None,
        seconds,
        scores[:, 0],
        scores[:, 1],
    )


def interval(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Mean paired difference and its 95 % interval, by a bootstrap over prompts."""
    difference = ours - theirs
    draws = np.random.default_rng(0).integers(0, len(difference), (10_000, len(difference)))
    low, high = np.quantile(difference[draws].mean(1), [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def table(runs: list[Run], steered: str, held_out: str) -> str:
    """A row for each run; the verdict is against best of N at the same budget."""
    best = {run.plan.budget: run for run in runs if run.plan.name == "best of N"}
    header = ["method", "calls", "rewards", steered, held_out, "minus best of N", "verdict", "ESS/N", "ancestors", "s"]
    rows = []
    for run in runs:
        against, verdict, shown = best.get(run.plan.budget), "", ""
        if against is not None and against is not run:
            value, low, high = interval(run.steered, against.steered)
            verdict = "wins" if low > 0 else "loses" if high < 0 else "even"
            shown = f"{value:+.3f} ({low:+.3f} to {high:+.3f})"
        rows.append([
            run.plan.name, f"{run.calls:.0f}", f"{run.rewards:.0f}", f"{run.steered.mean():.3f}", f"{run.held_out.mean():.3f}",
            shown, verdict, "" if run.ess is None else f"{run.ess:.2f}",
            "" if run.ancestors is None else f"{run.ancestors:.1f}", f"{run.seconds:.0f}",
        ])  # fmt: skip
    return text_table(header, rows)


def draw(runs: list[Run], path: Path) -> None:
    """Steered reward (left) and held-out reward (right) over denoiser calls, a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), dpi=140, sharex=True)
    for k, name in enumerate(dict.fromkeys(run.plan.name for run in runs if run.plan.name != "plain ODE")):
        line = [run for run in runs if run.plan.name == name]
        style = (
            {"color": "black", "linewidth": 2.5}
            if name == "best of N"
            else {"linewidth": 1.2, "linestyle": "--" if k > 9 else "-"}
        )
        for panel, field in zip(panels, ("steered", "held_out"), strict=True):
            panel.plot([r.calls for r in line], [getattr(r, field).mean() for r in line], marker="o", ms=4, label=name, **style)
    plain = runs[0]
    for panel, field, title in zip(
        panels, ("steered", "held_out"), ("tiny_dense (steered)", "tiny_strict (held out)"), strict=True
    ):
        panel.axhline(getattr(plain, field).mean(), color="grey", linewidth=0.8, linestyle=":")
        panel.set(xscale="log", xticks=[20, 40, 80], xticklabels=["20", "40", "80"], title=title)
        panel.set_xlabel("denoiser calls per returned sample")
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=40, help="held-out prompts, evenly over the kinds")
    parser.add_argument("--out", type=Path, default=Path("docs/steering.png"))
    parser.add_argument("--steered", choices=["tiny_dense", "brightness"], help="one part only")
    arguments = parser.parse_args()
    quiet_libraries()
    policy = Policy.load("tiny-sd3", autocast="bfloat16", attention_backend="eager")
    hard = [prompt for prompt in load_prompts("tiny-test") if prompt.columns["kind"] in KINDS]
    prompts = hard[:: max(1, len(hard) // arguments.prompts)][: arguments.prompts]
    parts = [("tiny_dense", "tiny_strict", by_value, prompts), ("brightness", "tiny_dense", by_gradient, prompts[::2])]
    for steered, held_out, methods, chosen in parts:
        if arguments.steered not in (None, steered):
            continue
        start, rewards = time.perf_counter(), {name: load_reward(name) for name in (steered, held_out)}
        seeds = [prompt_seed(prompt.text, 1) for prompt in chosen[::5]]
        with torch.no_grad():
            lam = strength_of(PolicyModel(policy, chosen[::5], seeds, rewards[steered], num_inference_steps=10), None)
        print(f"\nSteered by {steered}, {len(chosen)} prompts, tilt strength {lam:.3g}: lam r spreads by 1.5 over base samples")
        runs = []
        for plan in methods(lam):
            runs.append(measure(policy, chosen, rewards, plan))
            print(f"  {plan.name}, {plan.budget}: {runs[-1].steered.mean():.3f}, {runs[-1].seconds:.0f} s", flush=True)
        print(f"\n{table(runs, steered, held_out)}\n{time.perf_counter() - start:.0f} s")
        if methods is by_value:
            draw(runs, arguments.out)


if __name__ == "__main__":
    main()
