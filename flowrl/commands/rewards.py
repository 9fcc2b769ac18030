"""`flowrl rewards | serve`."""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import Any

from flowrl.commands.common import command, positive, quiet_libraries, whole

OF_ALL = """\
Every reward also takes `weight`, and `shape`, what happens to its values, one or several in order: {cap: 2}, {dither: 0.05},
negate, {sigmoid: {center: 0, scale: 1}}, {par: {k: 1}} (how often it beats reference pictures)."""


def add(commands: Any) -> None:
    rewards = command(commands, "rewards", run_rewards, "list the rewards, or explain one")
    rewards.add_argument("name", nargs="?", help="a reward, folder or dotted path, to read what it does and which options it has")

    serve = command(commands, "serve", run_serve, "put rewards behind HTTP, for `remote` elsewhere (docs/serving.md)")
    serve.add_argument("rewards", nargs="+", metavar="reward", help='names, folders, dotted paths, or "name key=value"')
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine only)")
    serve.add_argument("--port", type=whole, default=8000, help="default 8000; 0 takes a free one")
    serve.add_argument("--token-env", metavar="NAME", help="environment variable with the token that every request must carry")
    serve.add_argument("--open", dest="everybody", action="store_true", help="allow other machines without a token")
    serve.add_argument("--max-batch", type=positive, default=64, help="samples per request and per call (default 64)")
    serve.add_argument("--max-pixels", type=positive, default=1 << 24, help="pixels of a picture (default 16777216)")
    serve.add_argument("--max-megabytes", type=positive, default=256, help="size of a request (default 256)")
    serve.add_argument("--batch-window-ms", type=whole, default=5, help="wait for small requests to score together (default 5)")
    serve.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")


def run_rewards(arguments: argparse.Namespace) -> int:
    import inspect
    import shlex

    quiet_libraries()
    from flowrl.reward_models import EMBEDDED, REWARDS
    from flowrl.reward_models.base import embedded_folder, find_reward

    if arguments.name is None:
        for name in REWARDS:
            print(f"{name:<20} {(find_reward(name)[0].__doc__ or '').strip().splitlines()[0]}")
        print("\ntrained on the embedded world, ready to use:")
        for name in EMBEDDED:
            print(f"{name:<20} {first_sentence((embedded_folder(name) / 'README.md').read_text(encoding='utf-8'))}")
        return 0
    found, implied = find_reward(arguments.name)
    options = [] if not inspect.isclass(found) else list(inspect.signature(found).parameters.values())
    print("\n\n".join(part for part in (arguments.name, inspect.cleandoc(found.__doc__ or "")) if part), end="\n\n")
    print_options(found, implied)
    print(("\n" if options else "") + OF_ALL)
    needed = [f"{option.name}: ..." for option in options if option.default is option.empty and option.name not in implied]
    value = "{" + ", ".join(["weight: 1", *needed]) + "}" if needed else "1"
    print(f"\n  flowrl train quickstart rewards.{arguments.name}={shlex.quote(value)}")
    return 0


def first_sentence(card: str) -> str:
    """What a model card says first, on one line: it starts after the front matter and the title."""
    paragraphs = card.split("---\n", 2)[-1].strip().split("\n\n")
    said = " ".join(next(part for part in paragraphs if not part.startswith("#")).split())
    return said.split(". ")[0].rstrip(".:") + "."


def print_options(of: Any, implied: dict[str, Any]) -> None:
    """The options of a class, with their defaults and what is said of them. implied: values that a name implies."""
    import inspect
    import textwrap

    said = option_comments(of)
    for option in inspect.signature(of).parameters.values() if inspect.isclass(of) else []:
        default = implied.get(option.name, option.default)
        shown = "required" if default is option.empty else "" if "factory" in repr(default) else str(default)
        text = f"{shown:<12} {said.get(option.name, '')}".rstrip()
        print("\n".join(textwrap.wrap(text, 118, initial_indent=f"  {option.name:<20} ", subsequent_indent=" " * 36)))


def option_comments(of: Any) -> dict[str, str]:
    """What the `#:` comments above, or behind, the options of a class say, by option: the fields of a dataclass and its bases, or
    the parameters of `__init__`."""
    import dataclasses
    import inspect
    import re
    import textwrap

    comments: dict[str, str] = {}
    if not inspect.isclass(of):
        return comments
    if dataclasses.is_dataclass(of):
        sources = [inspect.getsource(cls) for cls in reversed(inspect.getmro(of)) if cls.__module__ != "builtins"]
    elif inspect.isfunction(of.__init__):
        sources = [textwrap.dedent(inspect.getsource(of.__init__)).split("\n)")[0]]
    else:
        sources = []
    for source in sources:
        above: list[str] = []
        for line in source.splitlines():
            if line.strip().startswith("#:"):
                above.append(line.strip()[2:].strip())
            elif field := re.match(r"    (\w+): .*?(?:  #: (.*))?$", line):
                comments[field[1]] = " ".join([*above, field[2] or ""]).strip() or comments.get(field[1], "")
                above = []
            elif line.strip():
                above = []
    return comments


def run_serve(arguments: argparse.Namespace) -> int:
    from flowrl.config import ConfigError
    from flowrl.reward_models.wire import Limits
    from flowrl.serve import serve

    if arguments.port > 65535:
        raise ConfigError(f"--port {arguments.port}: a port is at most 65535")
    with suppress(ModuleNotFoundError):  # it serves where a scorer's packages leave no room for diffusers and transformers
        quiet_libraries()
    serve(
        arguments.rewards,
        arguments.host,
        arguments.port,
        token_env=arguments.token_env,
        everybody=arguments.everybody,
        limits=Limits(arguments.max_batch, arguments.max_pixels, arguments.max_megabytes),
        window=arguments.batch_window_ms / 1000,
        device=arguments.device,
    )
    return 0
