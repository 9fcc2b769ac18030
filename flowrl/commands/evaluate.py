"""`flowrl eval`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowrl.commands.common import REWARDS_HELP, command, evaluate_models, make_folder, positive, sampling_options


def add(commands: Any) -> None:
    evaluation = command(commands, "eval", run_eval, "score a model, or two on the same prompts and seeds")
    evaluation.add_argument("model", help="as for sample: a name, a folder, a run, a checkpoint; with LoRAs: MODEL+LORA[@SCALE]")
    evaluation.add_argument("--against", help="the model to compare with: a paired table with 95 %% intervals")
    evaluation.add_argument("--rewards", nargs="+", default=["tiny_strict", "tiny_dense"], help=REWARDS_HELP)
    evaluation.add_argument("--limit", type=positive, help="prompts, spread evenly over the file (default: all)")
    evaluation.add_argument("--out", type=Path, help="write the scores as JSON")
    sampling_options(evaluation, seeds=4, prompts="tiny-test")


def run_eval(arguments: argparse.Namespace) -> int:
    import json

    from flowrl.evaluate import comparison_rows, score_rows, text_table
    from flowrl.record import write_text

    if arguments.out:
        make_folder(arguments.out.parent)
    models = [arguments.model, *([arguments.against] if arguments.against else [])]
    results = evaluate_models(models, arguments, limit=arguments.limit)
    model, base = results[0], results[-1]
    if arguments.against:
        for reward in model.rewards:
            print(text_table(*comparison_rows(base, model, reward)), end="\n\n")
    else:
        print(text_table(*score_rows(model)))
    if arguments.out:
        write_text(arguments.out, json.dumps([result.to_json() for result in results], ensure_ascii=False, indent=1) + "\n")
    return 0
