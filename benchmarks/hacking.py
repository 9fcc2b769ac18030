"""The hacking study: what a generator learns from a preference model alone, and what holds it back.

    python benchmarks/hacking.py                                     every arm, seeds 0 and 1; four minutes each on two cores
    python benchmarks/hacking.py --arms preference gate --seeds 0    some of them
    python benchmarks/hacking.py --report                            tables and pictures of what is there

Each arm is the quick start with other rewards (and without its pull towards the base model). What was not trained on is measured
on 120 held-out prompts x 4 pictures: strict accuracy and the share of pictures with a component that is no shape, both by the
exact reader, and a preference model of another seed. Runs are kept under --out and taken up where they stopped; results.json,
hacking.png (pictures) and curves.png are written there.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from torch import Tensor

from flowrl.cli import quiet_libraries
from flowrl.config import load_recipe
from flowrl.data import load_prompts
from flowrl.evaluate import Evaluation, Protocol, compare, evaluate, text_table
from flowrl.pictures import Cell, contact_sheet
from flowrl.record import checkpoints, load_trained, read_metrics
from flowrl.reward_models import load_reward
from flowrl.reward_models.base import to_pil
from flowrl.train import Trainer

MEMBERS = ["tiny_preference", "tiny_preference_1", "tiny_preference_2"]
#: A preference in (0, 1), so that a gate may multiply it.
BOUNDED = {"name": "tiny_preference", "shape": {"sigmoid": {"center": 0.0, "scale": 2.0}}}
#: Arm -> what it says, and its rewards.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "preference": ("preference alone", {"tiny_preference": 1.0}),
    "ensemble": ("ensemble, minimum of 2", {"ensemble": {"of": MEMBERS[:2], "reduce": "min"}}),
    "artifact": ("preference + artifact", {"tiny_preference": 1.0, "tiny_artifact": 1.0}),
    "gate": ("preference x artifact", {"gate": {"of": BOUNDED, "by": "tiny_artifact"}}),
    "win_rate": ("win rate of the preference", {"win_rate": {"of": "tiny_preference"}}),
    "par": ("preference against base pictures", {"tiny_preference": {"weight": 1.0, "shape": {"par": {"k": 1.0}}}}),
    "verifier": ("exact verifier", {"tiny_dense": 1.0, "tiny_strict": 1.0}),
    "noise": ("noise (control)", {"noise": 1.0}),
}


def noise(images: Tensor, prompts: list[str]) -> list[float]:
    """Says nothing, differently for every picture: what updates of this size do without any signal."""
    return [random.Random(image.numpy().tobytes()).random() for image in images]


#: Measured, and trained on by no arm but the first and the last.
MEASURES = {
    "tiny_preference": "preference (trained on)",
    MEMBERS[2]: "preference of another seed",
    "tiny_artifact": "artifact model",
    "tiny_clean": "free of artifacts",
    "tiny_strict": "accuracy",
    "tiny_dense": "partial credit",
}
WATCHED = ("tiny_preference", "tiny_clean", "tiny_strict")  #: During training, for the curves.
PROTOCOL = Protocol("tiny-test", 20, 1.0, seeds=4)


def train(arm: str, seed: int, out: Path, overrides: list[str]) -> Path:
    """One run, or the rest of one."""
    folder = out / f"{arm}-{seed}"
    recipe = load_recipe("quickstart", ["objective.beta=0", *overrides, f"seed={seed}", f"output_dir={folder}"])
    recipe.rewards = ARMS[arm][1]
    recipe.eval_rewards = {name: 1.0 for name in WATCHED if name not in recipe.rewards}
    if arm == "par":
        recipe.references = {"name": "base", "count": 2}
    if checkpoints(folder):
        recipe.resume_from_checkpoint = "latest"
    trainer = Trainer(recipe, rewards={"noise": noise} if arm == "noise" else None)
    if trainer.progress.step < recipe.max_steps:
        trainer.train()
    return folder


def measured(model: str | Path, name: str, keep_images: bool = False) -> Evaluation:
    rewards = {reward: load_reward(reward) for reward in MEASURES}
    prompts = load_prompts(PROTOCOL.prompts)
    return evaluate(load_trained(model), prompts, rewards, PROTOCOL, name=name, keep_images=keep_images, progress=True)


def report(out: Path, seeds: list[int]) -> None:
    """Tables of all finished runs with paired intervals, the pictures of the first seed, the curves."""
    finished = {arm: [s for s in seeds if (out / f"{arm}-{s}" / "README.md").is_file()] for arm in ARMS}
    base = measured("tiny-sd3", "base", keep_images=True)
    rows, results, pictures = [], {}, {"base": base}
    for arm, runs in finished.items():
        for seed in runs:
            tuned = measured(out / f"{arm}-{seed}", f"{arm} {seed}", keep_images=seed == runs[0])
            if seed == runs[0]:
                pictures[ARMS[arm][0]] = tuned
            differences = {name: compare(base, tuned, name) for name in MEASURES}
            results[f"{arm}-{seed}"] = {name: vars(d) for name, d in differences.items()}
            cells = [f"{d.tuned:.3f} ({d.low:+.3f} to {d.high:+.3f})" for d in differences.values()]
            rows.append([f"{ARMS[arm][0]}, {seed}", *cells])
    before = [f"{base.mean(name):.3f}" for name in MEASURES]
    print(text_table(["rewards, seed", *MEASURES.values()], [["before", *before], *rows]))
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw_pictures(pictures, out / "hacking.png")
    draw_curves({arm: [read_metrics(out / f"{arm}-{s}") for s in runs] for arm, runs in finished.items()}, out / "curves.png")


def draw_pictures(evaluations: dict[str, Evaluation], path: Path, per_kind: int = 2) -> None:
    """The same prompts and seeds before and after each arm; in colour below what the exact reader says."""
    base = evaluations["base"]
    chosen = [[i for i, p in enumerate(base.prompts) if p.columns["kind"] == kind][:per_kind] for kind in base.kinds]
    rows = [i for some in chosen for i in some]
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


def draw_curves(runs: dict[str, list[list[dict]]], path: Path) -> None:
    """Held-out measures over training steps, one panel each, one colour per arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(WATCHED), figsize=(3.8 * len(WATCHED), 3.4), dpi=130)
    for name, axes in zip(WATCHED, panels, strict=True):
        for k, (arm, several) in enumerate(runs.items()):
            for j, metrics in enumerate(several):
                points = [(row["step"], row[f"eval/{name}"]) for row in metrics if row.get(f"eval/{name}") is not None]
                axes.plot(*zip(*points, strict=True), color=f"C{k}", label=None if j else ARMS[arm][0], linewidth=1.2)
        axes.set(title=MEASURES[name], xlabel="steps")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of every run, like max_steps=200")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--no-report", action="store_true", help="only train")
    parser.add_argument("--out", type=Path, default=Path("runs/hacking"))
    arguments = parser.parse_args()
    quiet_libraries()
    for seed in [] if arguments.report else arguments.seeds:
        for arm in arguments.arms:
            train(arm, seed, arguments.out, arguments.overrides)
    if not arguments.no_report:
        report(arguments.out, arguments.seeds)


if __name__ == "__main__":
    main()
