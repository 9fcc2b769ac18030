"""The command line: `flowrl COMMAND`, with a file for each command in `flowrl.commands`.

Bad input ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from flowrl.commands import doctor, evaluate, gallery, grid, plan, report, rewards, sample, train

DESCRIPTION = """\
Align image and video generators (diffusion, flow matching) with rewards.

  flowrl train quickstart                                  reinforcement learning on the embedded model, in minutes
  flowrl eval runs/quickstart --against tiny-sd3           the same prompts and seeds, before and after
  flowrl gallery tiny-sd3 runs/quickstart --out gallery    a page of pictures side by side
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:  # words after options, which argparse leaves over
        words = vars(arguments).get("overrides", vars(arguments).get("prompts"))
        if not isinstance(words, list) or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        words += rest
    set_spinning()  # before torch is loaded
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the folder that a reward's dotted path starts from
    if not hasattr(arguments, "run"):
        parser.print_help()
        return 0
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        print("flowrl: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `flowrl recipes | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("FLOWRL_TRACEBACK") or not is_users(error):
            raise
        print(f"flowrl: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def set_spinning() -> None:
    """How long torch's threads wait awake for each other: a tenth of a millisecond on an idle machine, not at all on a busy one.

    Two cores, all theirs, take a quarter less time for small models that way than with threads that sleep at once. Where another
    process wants the cores, spinning brings both to a standstill. Only libgomp listens; what the user has set stays.
    """
    try:
        running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1  # beside this process
    except (OSError, ValueError, IndexError):
        running = os.cpu_count() or 1
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000" if 2 * running < (os.cpu_count() or 1) else "0")


def is_users(error: Exception) -> bool:
    """Whether an error is the input's (one line is enough) or ours (the traceback is wanted)."""
    import errno

    from flowrl.config import ConfigError

    if isinstance(
        error,
        ConfigError | FileNotFoundError | PermissionError | FileExistsError | NotADirectoryError | IsADirectoryError,
    ):
        return True
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT) or type(error) is OSError
    names = {kind.__name__ for kind in type(error).__mro__}  # by name: their modules import torch
    return bool(names & {"RewardError", "CheckFailed", "Unservable"}) or type(error) is ValueError


class Parser(argparse.ArgumentParser):
    """Bad arguments end with one line, like all bad input; the usage is what --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"flowrl: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    from flowrl import __version__

    parser = Parser(prog="flowrl", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"flowrl {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in (train, plan, sample, evaluate, gallery, grid, report, rewards, doctor):
        module.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
