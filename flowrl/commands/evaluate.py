"""`flowrl eval`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowrl.commands.common import REWARDS_HELP, command, positive, quiet_libraries, sampling_options

EVAL_HELP = """\
Score models under one protocol: the same prompts, seeds, steps, guidance and size, by the ODE. Against a base: paired differences
with 95 % intervals, by kind of prompt, win rates, diversity, distance of distributions. The protocol is saved beside the scores;
scores of different protocols are not compared, and the line that refuses says what differs.

  flowrl eval tiny-sd3                                        one model, by kind of prompt, with intervals
  flowrl eval runs/demo --against tiny-sd3                    before and after
  flowrl eval tiny-sd3 --out base.json                        saved scores are not drawn again:
  flowrl eval runs/a runs/b --against base.json --out ab.json       the protocol, prompts and rewards are those of base.json
  flowrl eval ab.json:a --against ab.json:b                   nothing is sampled
  flowrl eval runs/demo --against tiny-sd3 --markdown report.md     for a report or a pull request

Long evaluations keep their pictures; given again, the command goes on where it was stopped:

  flowrl eval runs/sd35 --against stabilityai/stable-diffusion-3.5-medium --prompts prompts.txt --rewards pickscore hpsv2 \\
      --features openai/clip-vit-large-patch14 --pictures pictures --out scores.json

Benchmarks with scorers of their own (geneval, dpg, t2icompbench, unigenbench, vbench): LAYOUT:PATH names their prompt files, the
folders that their scorers read, and their result files:

  flowrl eval runs/sd35 --prompts geneval:evaluation_metadata.jsonl --export geneval:out     draws 4 pictures of each prompt
  (their scorer, in its own environment)                                                     says how it is called
  flowrl eval geneval:out.results.jsonl --against geneval:base.results.jsonl                 compares what it said
  flowrl eval geneval:out --rewards pickscore                                                scores the exported pictures here

docs/evaluation.md says more.
"""
#: Taken where nothing else is given: neither an option nor saved scores.
DEFAULTS = {"seeds": 4, "seed": 0, "dtype": "float32", "solver": "euler"}


def add(commands: Any) -> None:
    evaluation = command(commands, "eval", run_eval, "score models, or two on the same prompts and seeds", description=EVAL_HELP)
    evaluation.add_argument(
        "models",
        nargs="+",
        metavar="model",
        help="as for sample: a name, a folder, a run, a checkpoint; with LoRAs: MODEL+LORA[@SCALE]; or saved scores, "
        "FILE.json[:MODEL]; or LAYOUT:PATH, results or pictures of a benchmark",
    )
    evaluation.add_argument("--against", metavar="MODEL", help="the base, named likewise: paired tables with 95 %% intervals")
    evaluation.add_argument(
        "--rewards",
        nargs="+",
        metavar="NAME",
        help=REWARDS_HELP + " (default tiny_strict tiny_dense, of tiny-wan those of clips, or those of saved scores)",
    )
    evaluation.add_argument("--limit", type=positive, help="prompts, spread evenly over the file (default: all)")
    evaluation.add_argument(
        "--features",
        metavar="ENCODER",
        help="for diversity and distances: pixels, tiny_clip, folder or hub id of a dual encoder or a vision transformer; or "
        "none (default: tiny_clip for the embedded model, otherwise none)",
    )
    evaluation.add_argument("--reference", type=Path, metavar="DIR", help="pictures to measure the distance to, like real ones")
    kept = evaluation.add_argument_group("what is kept")
    kept.add_argument("--out", type=Path, metavar="FILE", help="the scores with their protocol, as JSON")
    kept.add_argument("--markdown", type=Path, metavar="FILE", help="the tables, for a report")
    kept.add_argument("--pictures", type=Path, metavar="DIR", help="keep the pictures; what is there already is not drawn again")
    kept.add_argument(
        "--export", metavar="LAYOUT:DIR", help="arrange the pictures as a benchmark's scorer wants them (kept in DIR-pictures)"
    )
    sampling_options(evaluation, seeds=4, batch_size=None)
    evaluation.add_argument("--solver", choices=("euler", "dpmpp2m"), help="how the ODE is followed (default euler)")
    evaluation.set_defaults(**dict.fromkeys(DEFAULTS))  # what is given shows, beside a protocol that is saved


def run_eval(arguments: argparse.Namespace) -> int:
    quiet_libraries()
    from flowrl.commands.eval_inputs import gather
    from flowrl.comparison import NOTE, Comparison, as_markdown, as_text, score_tables
    from flowrl.record import write_text
    from flowrl.scorefile import write_results

    results, reference = gather(arguments, DEFAULTS)
    models, base = results[: len(arguments.models)], results[-1]
    comparisons = []
    if arguments.against:
        comparisons = [Comparison.of(base, model, reference) for model in models]
        tables = [table for comparison in comparisons for table in comparison.tables()]
        title = f"{', '.join(model.model for model in models)} against {base.model}"
    else:
        tables, title = score_tables(models), ", ".join(model.model for model in models)
    facts = [f"{len(base.prompts)} prompts: {base.protocol}", *(note for c in comparisons for note in c.notes)]
    if tables:
        print("\n\n".join([*facts, as_text(tables)]))
    if arguments.out:
        write_results(arguments.out, results, comparisons=[comparison.to_json() for comparison in comparisons])
        print(f"\n{arguments.out}")
    if arguments.markdown:
        write_text(arguments.markdown, as_markdown(title, facts, tables, NOTE if arguments.against else ""))
        print(f"\n{arguments.markdown}")
    return 0
