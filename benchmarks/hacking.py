"""The hacking study: what a generator learns from a preference model alone, and what holds it back.

    OMP_NUM_THREADS=2 python benchmarks/hacking.py                   every arm, seeds 0 and 1; some minutes each on two cores
    python benchmarks/hacking.py --arms preference gate --seeds 0    some of them
    python benchmarks/hacking.py --report                            tables and pictures of what is there

The strongest optimiser at hand, so that a weakness shows soon: the gradient of the reward itself. From a state on the way (10 ODE
steps, one of the last five), one prediction of the picture is decoded and scored, and a LoRA climbs (ReFL, arXiv 2304.05977).
What was not trained on is measured on 120 held-out prompts x 4 pictures: strict accuracy and the share of pictures in which
every component is a shape, both by the exact reader, and a preference model of another seed. Finished runs stay under --out;
results.json, hacking.png (pictures) and hacking-costs.png are written there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from flowrl.batch import Prompt, Samples
from flowrl.commands.common import quiet_libraries
from flowrl.data import load_prompts, prompt_order, sample_seed
from flowrl.evaluate import Evaluation, Protocol, compare, evaluate, text_table
from flowrl.pictures import Cell, contact_sheet
from flowrl.policy import LORA_FILE, Policy
from flowrl.reward_models import load_reward
from flowrl.reward_models.base import Reward, score, to_pil
from flowrl.samplers.flow import x0_from

MEMBERS = ["tiny_preference", "tiny_preference_1", "tiny_preference_2"]
#: What is trained on, by arm: rewards with weights, in deviations of the preference within a prompt's pictures (`unit`).
ARMS: dict[str, tuple[str, Any]] = {
    "preference": ("preference alone", lambda mean, unit: {"tiny_preference": 1 / unit}),
    "ensemble_min": ("minimum of 2 members", lambda mean, unit: {_ensemble("min"): 1 / unit}),
    "artifact": ("preference + artifact", lambda mean, unit: {"tiny_preference": 1 / unit, "tiny_artifact": 5.0}),
    "gate": ("preference x artifact", lambda mean, unit: {_gate(mean, unit): 1.0}),
}
MEASURES = {
    "tiny_preference": "preference",
    MEMBERS[2]: "another preference",
    "tiny_artifact": "artifact model",
    "tiny_clean": "clean",
    "tiny_strict": "accuracy",
    "tiny_dense": "partial credit",
}
PROTOCOL = Protocol("tiny-test", 20, 1.0, seeds=4)
STEPS, LATE = 10, 5  #: Denoising steps of a rollout, and how many of the last a prediction may start from.


def _ensemble(reduce: str) -> str:
    return f"ensemble of='[{', '.join(MEMBERS[:2])}]' reduce={reduce}"


def _gate(mean: float, unit: float) -> str:
    squashed = f"{{name: tiny_preference, shape: {{sigmoid: {{center: {mean}, scale: {unit}}}}}}}"
    return f"gate of='{squashed}' by=tiny_artifact"


def spread(policy: Policy, prompts: Sequence[Prompt], groups: int = 16, size: int = 8) -> tuple[float, float]:
    """Mean of the preference over the model's own pictures, and its deviation within a prompt's."""
    items = [prompt for prompt in prompts[:: len(prompts) // groups][:groups] for _ in range(size)]
    samples = policy.rollout(items, [sample_seed(7, i) for i in range(len(items))], num_inference_steps=STEPS)
    samples.images = policy.decode(samples)
    values = score({"r": load_reward("tiny_preference")}, samples)[:, 0].reshape(-1, size)
    return float(values.mean()), float(values.std(1).mean())


def climb(policy: Policy, rewards: list[tuple[Reward, float]], prompts: list[Prompt], seeds: list[int], node: int) -> Tensor:
    """The weighted sum of rewards (B,) of the pictures predicted from a node of the ODE, with graph to the weights."""
    x, _, grid = policy.trunk(prompts, seeds, node, num_inference_steps=STEPS)
    t = torch.full((len(x),), grid.t[node])
    texts = [prompt.text for prompt in prompts]
    v = policy.velocity(texts, x.float(), t, num_inference_steps=STEPS)
    x0 = x0_from(x.float(), v.float(), t)
    images = policy.decode(x0, texts, with_graph=True)
    samples = Samples(prompts, seeds, torch.arange(len(prompts)), x0, images)
    return torch.stack([weight * reward(samples) for reward, weight in rewards]).sum(0)


def train(arm: str, seed: int, out: Path, updates: int, batch: int, lr: float) -> None:
    """One run; its LoRA and its curve are the sign that it is finished."""
    folder = out / f"{arm}-{seed}"
    if (folder / "curve.json").is_file():
        return
    policy = Policy.load("tiny-sd3", autocast="bfloat16")
    policy.set_attention_backend("eager")
    policy.add_lora(32, seed=seed)
    prompts, test = load_prompts("tiny-train"), load_prompts("tiny-test")
    rewards = [(load_reward(spec), weight) for spec, weight in ARMS[arm][1](*spread(policy, prompts)).items()]
    watched = {name: load_reward(name) for name in ("tiny_preference", "tiny_clean", "tiny_strict")}
    parameters = list(policy.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0)
    curve = []
    bar = tqdm(range(updates + 1), desc=f"{arm} {seed}", unit="update")
    for update in bar:
        if update % 25 == 0 or update == updates:
            now = evaluate(policy, test, watched, Protocol("tiny-test", STEPS, 1.0))
            curve.append({"update": update, **{name: now.mean(name) for name in watched}})
            bar.set_postfix({name.removeprefix("tiny_"): f"{curve[-1][name]:.3f}" for name in watched})
        if update == updates:
            break
        chosen = [prompts[i] for i in prompt_order(len(prompts), batch, update, seed)]
        node = STEPS - 1 - sample_seed(seed, update) % LATE
        total = climb(policy, rewards, chosen, [sample_seed(seed, update, i) for i in range(batch)], node)
        (-total.mean()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    folder.mkdir(parents=True, exist_ok=True)
    policy.save(folder)
    (folder / "curve.json").write_text(json.dumps(curve, indent=1) + "\n")


def measured(model: str | Path, name: str, measures: Sequence[str], keep_images: bool = False) -> Evaluation:
    """The pinned evaluation. model: an embedded name, or a folder with a LoRA for it."""
    lora = str(model) if (Path(model) / LORA_FILE).is_file() else None
    policy = Policy.load("tiny-sd3" if lora else str(model), lora=lora)
    rewards = {reward: load_reward(reward) for reward in measures}
    prompts = load_prompts(PROTOCOL.prompts)
    return evaluate(policy, prompts, rewards, PROTOCOL, name=name, keep_images=keep_images, progress=True)


def report(out: Path, arms: dict[str, str], measures: dict[str, str]) -> dict[str, Any]:
    """A table of all finished runs with paired intervals, and the pictures of each arm's first seed. arms: heading by arm."""
    base = measured("tiny-sd3", "base", list(measures), keep_images=True)
    results: dict[str, Any] = {"base": {name: base.mean(name) for name in measures}}
    rows, pictures = [["before", *(f"{base.mean(name):.3f}" for name in measures)]], {"before": base}
    for arm, heading in arms.items():
        for folder in sorted(path.parent for path in out.glob(f"{arm}-[0-9]*/{LORA_FILE}")):
            first = heading not in pictures
            tuned = measured(folder, folder.name, list(measures), keep_images=first)
            pictures |= {heading: tuned} if first else {}
            differences = {name: compare(base, tuned, name) for name in measures}
            results[folder.name] = {name: vars(d) for name, d in differences.items()}
            cells = [f"{d.tuned:.3f} ({d.low:+.3f} to {d.high:+.3f})" for d in differences.values()]
            rows.append([f"{heading}, {folder.name.rpartition('-')[2]}", *cells])
    print(text_table(["trained on, seed", *measures.values()], rows))
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw_pictures(pictures, out / f"{out.name}.png")
    return results


def draw_pictures(evaluations: dict[str, Evaluation], path: Path, per_kind: int = 1) -> None:
    """The same prompts and seeds before and after each arm; below what the exact reader says."""
    base = evaluations["before"]
    rows = [i for kind in base.kinds for i in base._of(kind)[:per_kind]]
    cells = []
    for i in rows:
        row = []
        for result in evaluations.values():
            assert result.samples is not None and result.samples.images is not None
            picture = to_pil(result.samples.images[i * PROTOCOL.seeds : i * PROTOCOL.seeds + 1])[0]
            strict, clean = (float(result.scores[i, 0, result.rewards.index(name)]) for name in ("tiny_strict", "tiny_clean"))
            row.append(Cell(picture, f"{'right' if strict else 'wrong'}{'' if clean else ', artifact'}"))
        cells.append(row)
    contact_sheet([base.prompts[i].text for i in rows], [(name, "") for name in evaluations], cells).save(path)


def draw_costs(results: dict[str, Any], path: Path) -> None:
    """What each arm gained on the preference against what it cost, with 95 % intervals: two panels, a point for each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.6), dpi=130)
    for measure, axes in zip(("tiny_clean", "tiny_strict"), panels, strict=True):
        for k, (arm, (heading, _)) in enumerate(ARMS.items()):
            for j, run in enumerate(name for name in results if name.rpartition("-")[0] == arm):
                (x, xerr), (y, yerr) = _bar(results[run]["tiny_preference"], 1), _bar(results[run][measure], 100)
                axes.errorbar(x, y, yerr, xerr, "o", color=f"C{k}", label=None if j else heading, markersize=4, linewidth=1)
        axes.axhline(0, color="grey", linewidth=0.8, linestyle=":")
        axes.axvline(0, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel="preference, change", ylabel=f"{MEASURES[measure]}, change in points")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def _bar(difference: dict[str, float], scale: float) -> tuple[float, list[list[float]]]:
    """A change and its interval as error bars."""
    change = difference["tuned"] - difference["base"]
    return scale * change, [[scale * (change - difference["low"])], [scale * (difference["high"] - change)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--no-report", action="store_true", help="only train")
    parser.add_argument("--out", type=Path, default=Path("runs/hacking"))
    arguments = parser.parse_args()
    quiet_libraries()
    for seed in [] if arguments.report else arguments.seeds:
        for arm in arguments.arms:
            train(arm, seed, arguments.out, arguments.updates, arguments.batch, arguments.lr)
    if not arguments.no_report:
        results = report(arguments.out, {arm: heading for arm, (heading, _) in ARMS.items()}, MEASURES)
        draw_costs(results, arguments.out / "hacking-costs.png")


if __name__ == "__main__":
    main()
