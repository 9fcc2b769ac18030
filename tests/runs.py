"""Real processes that run the command line, quick to start: forks of a server that has the imports behind it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "flowrl.cli",
        "flowrl.train.trainer",
        "accelerate",
        "peft",
        "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
        "transformers.models.clip.modeling_clip",
        "transformers.models.t5.modeling_t5",
    ]
)
#: The command as it is installed.
FLOWRL = Path(sys.executable).parent / "flowrl"


class Output(NamedTuple):
    code: int | None
    out: str
    err: str


def start(
    argv: Sequence[object], log: Path, file_limit: int | None = None, env: dict[str, str] | None = None
) -> multiprocessing.Process:
    """`flowrl ARGV` in a process of its own; its output goes to LOG.out and LOG.err. file_limit: largest file, in bytes."""
    process = SERVER.Process(target=_command, args=([str(a) for a in argv], str(log), file_limit, env or {}))
    process.start()
    return process


def finish(process: multiprocessing.Process, log: Path, timeout: float = 120) -> Output:
    process.join(timeout)
    assert process.exitcode is not None, f"still running after {timeout} s:\n{Path(f'{log}.err').read_text()}"
    return Output(process.exitcode, Path(f"{log}.out").read_text(), Path(f"{log}.err").read_text())


def run(argv: Sequence[object], log: Path, file_limit: int | None = None) -> Output:
    return finish(start(argv, log, file_limit), log)


def run_installed(*argv: object, timeout: float = 120) -> Output:
    """The executable that users call."""
    done = subprocess.run([FLOWRL, *map(str, argv)], capture_output=True, text=True, timeout=timeout, check=False)
    return Output(done.returncode, done.stdout, done.stderr)


def ranks(count: int) -> list[dict[str, str]]:
    """What a launcher puts into the environment of `count` processes that train together on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _command(argv: list[str], log: str, file_limit: int | None, env: dict[str, str]) -> None:
    from flowrl.cli import main

    os.environ.update(env)
    for stream, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    torch.set_num_threads(1)
    gc.freeze()  # or the first collection would copy what is shared with the server: half a second
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.exit(main(argv))
