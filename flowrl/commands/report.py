"""`flowrl report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowrl.commands.common import command


def add(commands: Any) -> None:
    report = command(commands, "report", run_report, "one page of a run: curves, alarms, pictures over time, cost, settings")
    report.add_argument("folder", metavar="RUN", type=Path, help="the folder of a run of train or train-reward, finished or not")
    report.add_argument("--out", type=Path, help="the page (default RUN/report.html)")


def run_report(arguments: argparse.Namespace) -> int:
    from flowrl.config import ConfigError
    from flowrl.report import read_run, write_report

    run = read_run(arguments.folder)
    out = arguments.out or arguments.folder / "report.html"
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder: name a file, like {out / 'report.html'}")
    print(write_report(run, out))
    return 0
