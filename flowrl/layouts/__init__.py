"""Benchmarks of others: their prompts in, our pictures in their folders, their result files back. `LAYOUT:PATH` names each.

    prompts = LAYOUTS["geneval"].prompts(Path("evaluation_metadata.jsonl"))
    export(LAYOUTS["geneval"], evaluation, files, Path("out"))         # out/00000/samples/0000.png, and out.flowrl.json beside it
    read_scores(LAYOUTS["geneval"], Path("out/results.jsonl"))         # an Evaluation, with the protocol of out.flowrl.json

Scorers that want other packages and large models run where they are at home; nothing of theirs is computed here.
"""

from __future__ import annotations

from pathlib import Path

from flowrl.layouts.base import Layout, export, export_root, find_pictures, manifest_of, read_scores
from flowrl.layouts.dpg import DPG
from flowrl.layouts.geneval import GenEval
from flowrl.layouts.t2icompbench import T2ICompBench
from flowrl.layouts.unigenbench import UniGenBench
from flowrl.layouts.vbench import VBench

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (GenEval(), DPG(), T2ICompBench(), UniGenBench(), VBench())}


def parse(text: str) -> tuple[Layout, Path] | None:
    """The layout and the path of LAYOUT:PATH; None for anything else."""
    name, colon, path = text.partition(":")
    return (LAYOUTS[name], Path(path)) if colon and path and name in LAYOUTS else None


__all__ = ["LAYOUTS", "Layout", "export", "export_root", "find_pictures", "manifest_of", "parse", "read_scores"]
