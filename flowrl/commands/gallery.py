"""`flowrl gallery`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowrl.commands.common import (
    REWARDS_HELP,
    command,
    evaluate_models,
    make_folder,
    positive,
    sampling_options,
    spread,
    world_of,
)

GALLERY_HELP = """\
A page that puts pictures of the same prompt and seed side by side, with their rewards: a folder that opens from disk, without a
server. Views: grid, wipe, blink, film over training, blind vote (its export is preference data for training).

  flowrl gallery tiny-sd3 runs/demo                                models are drawn, under one protocol; the first is the base
  flowrl gallery tiny-sd3 runs/demo/checkpoint-* runs/demo         checkpoints of a run become a film, too
  flowrl gallery runs/demo/samples                                 what a run saved while it trained, as a film
  flowrl gallery samples/                                          the folder of `flowrl sample`, with its rewards
  flowrl gallery before=renders/a after=renders/b --rewards clip_score   folders of pictures: captions in NAME.txt,
                                                                   metadata.jsonl, the pictures themselves, or their names
"""


def add(commands: Any) -> None:
    gallery = command(
        commands, "gallery", run_gallery, "a page that puts models side by side: same prompt, same seed", description=GALLERY_HELP
    )
    gallery.add_argument("--out", type=Path, default=Path("gallery"), help="folder of the page (default gallery)")
    gallery.add_argument("--title", help="heading of the page (default: what is compared)")
    input_options(gallery)


def input_options(parser: argparse.ArgumentParser) -> None:
    """What `gallery` and `grid` take alike."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="models, runs, checkpoints (with LoRAs: MODEL+LORA[@SCALE]), or folders of pictures; NAME=INPUT names its column; "
        "the first is the base",
    )
    parser.add_argument(
        "--rewards",
        nargs="+",
        metavar="NAME",
        help=REWARDS_HELP
        + " (default for models: tiny_strict tiny_dense, of tiny-wan those of clips; for pictures: those that they come with)",
    )
    parser.add_argument("--limit", type=positive, help="prompts, evenly from all (default for models: 48; for pictures: all)")
    sampling_options(parser, seeds=2)


def run_gallery(arguments: argparse.Namespace) -> int:
    import sys

    from flowrl.gallery import write_gallery
    from flowrl.gallery.page import check_replaceable

    check_replaceable(arguments.out)
    make_folder(arguments.out.parent)
    found, tables, subtitle = gather(arguments)
    page = write_gallery(
        arguments.out,
        found.cells,
        title=arguments.title or title_of(found),
        subtitle=subtitle,
        tables=tables,
        films=found.films,
        checkpoints=found.checkpoints,
        trained=found.trained,
        problems=found.problems,
    )
    for problem in found.problems[:5]:
        print(f"flowrl: {problem}", file=sys.stderr)
    if len(found.problems) > 5:
        print(f"flowrl: and {len(found.problems) - 5} more, which the page names", file=sys.stderr)
    print(page)
    return 0


def gather(arguments: argparse.Namespace) -> tuple[Any, list[Any], str]:
    """The pictures of all inputs, tables about them, and a line that says how they came about. Raises ConfigError."""
    from flowrl.config import ConfigError
    from flowrl.gallery.inputs import Inputs, in_order, joined, read_input, scored

    parts, models = [], []
    for text in in_order(list(dict.fromkeys(arguments.inputs))):
        name, place = named(text)
        found = read_input(Path(place), name)
        if found is None:
            models.append((name, place))
        else:
            parts.append((Path(place), found))
    pictures = [place for place, part in parts if part.cells]
    if models and pictures:
        raise ConfigError(
            f"{models[0][1]} is to be drawn and {pictures[0]} holds pictures: draw it with the same prompts and seeds first "
            f"(flowrl sample {models[0][1]} ... --out FOLDER), then name that folder"
        )
    if not models:
        whole = joined(parts)
        whole.cells = limited(whole.cells, arguments.limit)
        return (scored(whole, arguments.rewards) if arguments.rewards else whole), [], said_of(whole)
    drawn, tables, subtitle = draw(models, arguments)
    films = [(Path(place, "samples"), film) for name, place in models if (film := read_input(Path(place, "samples"), name))]
    return (
        joined([(Path(), drawn), *parts, *[(place, Inputs(films=f.films, problems=f.problems)) for place, f in films]]),
        tables,
        subtitle,
    )


def named(text: str) -> tuple[str | None, str]:
    """(name, input) of NAME=INPUT; what exists is taken as it is."""
    name, equals, place = text.partition("=")
    return (name, place) if equals and name and place and "/" not in name and not Path(text).exists() else (None, text)


def limited(cells: list[Any], limit: int | None) -> list[Any]:
    """The cells of at most `limit` prompts."""
    kept = set(spread(list(dict.fromkeys(cell.prompt for cell in cells)), limit))
    return [cell for cell in cells if cell.prompt in kept]


def title_of(found: Any) -> str:
    base, *others = dict.fromkeys(cell.model for cell in found.cells) or dict.fromkeys(film.name for film in found.films) or [""]
    if len(others) == 1 and found.cells:
        return f"{others[0]} against {base}"
    return ", ".join([base, *others]) if len(others) < 4 else f"{base} and {len(others)} others"


def said_of(found: Any) -> str:
    return "What the run drew while it trained." if found.films and not found.cells else ""


def draw(models: list[tuple[str | None, str]], arguments: argparse.Namespace) -> tuple[Any, list[Any], str]:
    """Every model under the protocol of the first one's defaults, as cells; with tables of the comparison."""
    from flowrl.clips import RATE
    from flowrl.comparison import Comparison, score_tables
    from flowrl.gallery import Cell, Table
    from flowrl.gallery.inputs import Inputs, trained_on
    from flowrl.reward_models.base import to_pil
    from flowrl.sample import Settings, command_of, facts_for, located, request_for
    from flowrl.sources import Source

    prompts, rewards = world_of([place for _, place in models])
    arguments.prompt_file, arguments.rewards = arguments.prompt_file or prompts, arguments.rewards or list(rewards)
    results = evaluate_models([place for _, place in models], arguments, keep_images=True, limit=arguments.limit or 48)
    found = Inputs()
    for (name, model), result in zip(models, results, strict=True):
        result.model = unique(name or result.model, model, found.models)
        found.models[result.model] = model
        found.trained |= trained_on(model)
        facts = facts_for(Source.parse(model), [], Settings())
        assert result.samples is not None and result.samples.images is not None
        for i, picture in enumerate(to_pil(result.samples.images)):
            p, s = divmod(i, arguments.seeds)
            scores = {name: None if (v := float(result.scores[p, s, k])) != v else v for k, name in enumerate(result.rewards)}
            prompt = result.prompts[p] if facts is None else located(result.prompts[p], facts)
            steps, guidance = result.protocol.num_inference_steps, result.protocol.guidance_scale
            size, call = (arguments.height, arguments.width), frames_of(arguments)
            settings = Settings(steps, guidance, *size, call=call, dtype=arguments.dtype, fps=arguments.fps)
            details = {
                "steps": str(steps),
                "guidance": str(guidance),
                "noise seed": str(result.seeds[p][s]),
                "command": command_of(request_for(model, prompt, result.seeds[p][s], settings)),
            }
            kind = prompt.columns.get("kind")
            shown = None if kind is None else str(kind)
            found.cells.append(Cell(result.model, prompt.text, s, picture, scores, shown, details, result.samples.fps or RATE))
    base = results[0]
    compared = [table for other in results[1:] for table in Comparison.of(base, other).tables()] or score_tables(results)
    tables = [Table(table.title, table.header, table.rows) for table in compared]
    shared = base.protocol
    subtitle = f"{len(base.prompts)} {shared.prompts} prompts, {shared.seeds} seeds, {shared.num_inference_steps} ODE steps"
    return found, tables, subtitle


def frames_of(arguments: argparse.Namespace) -> dict[str, int]:
    """What the pipeline is told about the frames of clips, where it is."""
    return {} if arguments.num_frames is None else {"num_frames": arguments.num_frames}


def unique(name: str, model: str, taken: Any) -> str:
    """A column of its own for every model: two of one name get their paths."""
    return (
        name if name not in taken else f"{name} ({model})" if f"{name} ({model})" not in taken else f"{name} ({len(taken) + 1})"
    )
