"""PISCES' two rewards by optimal transport on clips: each alone, both, and neither (the model as it was).

    python benchmarks/pisces.py                                every arm, seed 0
    python benchmarks/pisces.py --arms both --seeds 0 1
    python benchmarks/pisces.py --report                       the table of what is there

An arm is the recipe `tiny-video-pisces` with some of its rewards. Both rewards, and the exact reader's, of which no run knows,
are measured on the held-out captions x 8 clips, 20 ODE steps, averaged weights, the same seeds before and after; intervals by a
paired bootstrap over captions. Runs stay under --out and are taken up where they stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from objectives import before_and_after, clear_false_start, kept_result, train

from flowrl.commands.common import quiet_libraries
from flowrl.config import load_recipe
from flowrl.evaluate import compare, text_table

#: By name: what a table calls it, and how it differs from the recipe.
ARMS: dict[str, tuple[str, list[str]]] = {
    "quality": ("of the whole clip", ["rewards.words=null"]),
    "words": ("of words in places and times", ["rewards.quality=null"]),
    "both": ("both", []),
}


def score(folder: Path) -> dict[str, Any]:
    """Before and after of both rewards and the exact reader's; kept in the run's folder."""
    facts, result = kept_result(folder)
    if result is not None:
        return result
    base, tuned = before_and_after(folder, load_recipe(folder / "recipe.yaml"), load_recipe("tiny-video-pisces").rewards)
    result = {**facts, "rewards": {name: vars(compare(base, tuned, name)) for name in base.rewards}}
    (folder / "result.json").write_text(json.dumps(result) + "\n")
    return result


def table(out: Path) -> str:
    found = [
        (f"{title}, seed {file.parent.name.rpartition('-')[2]}", json.loads(file.read_text()))
        for arm, (title, _) in ARMS.items()
        for file in sorted(out.glob(f"{arm}-*/result.json"))
    ]
    rows = []
    for name, of in found[0][1]["rewards"].items() if found else ():
        changes = [result["rewards"][name] for _, result in found]
        cells = [f"{d['tuned'] - d['base']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})" for d in changes]
        rows.append([name, f"{of['base']:.3f}", *cells])
    for what, form in (("steps", ",d"), ("images", ",d"), ("minutes", ".1f")):
        rows.append([what, "", *(f"{result[what]:{form}}" for _, result in found)])
    return text_table(["held out", "neither", *(title for title, _ in found)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--max-minutes", type=float, default=10, help="of processor time, for each run")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/pisces"))
    arguments = parser.parse_args()
    quiet_libraries()
    if not arguments.report:
        for seed in arguments.seeds:
            for arm in arguments.arms:
                clear_false_start(arguments.out / f"{arm}-{seed}")
                score(train("video-pisces", seed, arguments.out, arguments.max_minutes, *ARMS[arm][1], label=arm))
                print(table(arguments.out), flush=True)
    print(table(arguments.out))


if __name__ == "__main__":
    main()
