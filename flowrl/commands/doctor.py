"""`flowrl doctor`."""

from __future__ import annotations

import argparse
from typing import Any

from flowrl.commands.common import command


def add(commands: Any) -> None:
    command(commands, "doctor", run_doctor, "versions, devices, attention backends")


def run_doctor(arguments: argparse.Namespace) -> int:
    from flowrl.record import environment

    for name, value in environment().items():
        print(f"{name:<18} {value}")
    import torch

    from flowrl.attention import names

    print(f"{'GPU':<18} {'yes' if torch.cuda.is_available() else 'none: runs on the CPU'}")
    print(f"{'backends':<18} {', '.join(names())}")
    return 0
