"""What `flowrl eval` scores: saved scores, results and pictures of benchmarks, models to be drawn, all under one protocol.

Whatever can be refused without loading weights is refused before anything is drawn or written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowrl.batch import Prompt, Samples, stacked
from flowrl.clips import rate_of
from flowrl.commands.common import (
    evaluate_model,
    is_averaged,
    make_folder,
    open_model,
    protocol,
    read_prompts,
    size_of,
    spread,
    world_of,
)
from flowrl.config import ConfigError
from flowrl.evaluate import Evaluation, check_comparable, score_all
from flowrl.kept import Kept, check_pictures_suffice
from flowrl.layouts import LAYOUTS, Layout, export, export_root, find_pictures, parse, read_scores
from flowrl.model_facts import DEFAULTS_FILE
from flowrl.pairs import load_picture
from flowrl.policy import EMBEDDED, resolve_model
from flowrl.protocol import Protocol, differences, digest_of, reward_version
from flowrl.reward_models import Reward, load_reward
from flowrl.reward_models.base import short_labels, traits_of
from flowrl.reward_models.features import embed, load_features, picture_files
from flowrl.sample import default_batch_size
from flowrl.scorefile import find_results, is_results
from flowrl.sources import Source

#: Options by the field of the protocol that they set.
OPTIONS = {"num_inference_steps": "steps", "guidance_scale": "guidance", **{n: n for n in ("seeds", "seed", "solver", "dtype")}}


@dataclass
class Scoring:
    """What scores pictures. specs: what loads each reward, by label, and the features."""

    specs: dict[str, str]
    rewards: dict[str, Reward]
    features: Any


def gather(arguments: argparse.Namespace, defaults: Mapping[str, Any]) -> tuple[list[Evaluation], Tensor | None]:
    """An evaluation of each model, the base last, and features of the reference pictures. Raises ValueError, or OSError."""
    texts = [*arguments.models, *([arguments.against] if arguments.against else [])]
    known, folders, models = sort_inputs(texts, bool(arguments.rewards))
    target = layout_and_path(arguments.export) if arguments.export else None
    if target and not models:
        raise ConfigError("--export arranges pictures that are drawn: name a model")
    prompts, shared = pinned(arguments, known, models) if known else asked(arguments, defaults, models, target)
    scoring = scoring_of(arguments, known, folders, models)
    reference = reference_features(arguments, scoring, known)
    if target:
        arguments.pictures = arguments.pictures or target[1].with_name(f"{target[1].name}-pictures")
    for file in (arguments.out, arguments.markdown):
        if file:
            make_folder(file.parent)
    results = {text: selected(text, result, scoring, arguments.rewards) for text, result in known.items()}
    if models and prompts and shared:
        results |= draw(arguments, models, prompts, shared, scoring, target)
    for text, (layout, root) in folders.items():
        results[text] = score_folder(arguments, layout, root, prompts, scoring)
    names = [results[text].model for text in dict.fromkeys(texts)]
    return [replace(r, model=text) if names.count((r := results[text]).model) > 1 else r for text in texts], reference


# ------------------------------------------------------------------------------------------------ what is named


def sort_inputs(texts: Sequence[str], rescore: bool) -> tuple[dict[str, Evaluation], dict[str, tuple[Layout, Path]], list[str]]:
    """Scores that are there, folders of pictures, and models, by the texts that name them.

    rescore: folders are taken for pictures even where results lie in them.
    """
    known: dict[str, Evaluation] = {}
    folders: dict[str, tuple[Layout, Path]] = {}
    models = []
    for text in dict.fromkeys(texts):
        named = parse(text)
        if named and named[1].is_dir() and (rescore or not named[0].files(named[1])):
            folders[text] = named
        elif named:
            known[text] = read_scores(*named)
        elif is_results(text):
            known[text] = find_results(text)
        else:
            Source.parse(text).check()
            models.append(text)
    return known, folders, models


def layout_and_path(text: str) -> tuple[Layout, Path]:
    """Of --export LAYOUT:DIR."""
    named = parse(text)
    if named is None:
        raise ConfigError(f"--export {text}: write LAYOUT:DIR, with a layout of {', '.join(LAYOUTS)}")
    return named


def read_any_prompts(source: str) -> list[Prompt]:
    """A prompt file, an embedded set, or LAYOUT:PATH."""
    named = parse(source)
    if named is None:
        return read_prompts(source)
    layout, path = named
    if not path.exists():
        raise FileNotFoundError(f"no prompts of {layout.name} at {path}")
    return layout.prompts(path)


# ------------------------------------------------------------------------------------------------ one protocol


def asked(
    arguments: argparse.Namespace, defaults: Mapping[str, Any], models: Sequence[str], target: tuple[Layout, Path] | None
) -> tuple[list[Prompt] | None, Protocol | None]:
    """Prompts and protocol by the options, and by the first model's own call; none where neither prompts nor models are named."""
    prompts = None
    if models or arguments.prompt_file:
        arguments.prompt_file = arguments.prompt_file or world_of(models)[0]
        prompts = spread(read_any_prompts(arguments.prompt_file), arguments.limit)
    if target and not arguments.seeds:
        arguments.seeds = target[0].count
    for name, value in defaults.items():
        if getattr(arguments, name) is None and not (name == "seeds" and not models):
            setattr(arguments, name, value)
    if not models:
        return prompts, None
    return prompts, replace(protocol(arguments, own_call(models[0])), solver=arguments.solver, call=size_of(arguments))


def own_call(model: str) -> dict[str, Any]:
    """A model's own defaults of its pipeline's call, from the file beside it."""
    file = Path(resolve_model(Source.parse(model).base)) / DEFAULTS_FILE
    return json.loads(file.read_text())["call"] if file.is_file() else {}


def pinned(
    arguments: argparse.Namespace, known: Mapping[str, Evaluation], models: Sequence[str]
) -> tuple[list[Prompt] | None, Protocol | None]:
    """Prompts and protocol of scores that are there. Raises ConfigError where an option says something else."""
    text, pin = next(iter(known.items()))
    theirs = pin.protocol
    if models and theirs.num_inference_steps is None:
        raise ConfigError(f"{text} does not say how its pictures were drawn: {models[0]} cannot be drawn alike")
    ours = replace(theirs, **{f: value for f, option in OPTIONS.items() if (value := getattr(arguments, option)) is not None})
    if arguments.prompt_file or arguments.limit:
        prompts = spread(read_any_prompts(arguments.prompt_file) if arguments.prompt_file else pin.prompts, arguments.limit)
        ours = replace(ours, prompts=arguments.prompt_file or theirs.prompts, digest=digest_of(prompts))
    if theirs.size:
        *frames, height, width = theirs.size
        wanted = [arguments.num_frames or frames[0]] if frames else []
        ours = replace(ours, size=(*wanted, arguments.height or height, arguments.width or width))
        arguments.height, arguments.width, arguments.num_frames = height, width, frames[0] if frames else None
        theirs = replace(theirs, call={**theirs.call, **size_of(arguments)})
    if found := differences(theirs, ours):
        raise ConfigError(f"{text} was scored by another protocol ({'; '.join(found)}): leave the option out, or score it again")
    for other in list(known.values())[1:]:
        if arguments.against:
            check_comparable(pin, other)
    arguments.dtype = theirs.dtype or "float32"
    return pin.prompts, replace(theirs, rewards={})


# ------------------------------------------------------------------------------------------------ what scores


def scoring_of(
    arguments: argparse.Namespace,
    known: Mapping[str, Evaluation],
    folders: Mapping[str, Any],
    models: Sequence[str],
) -> Scoring:
    """Rewards and features: as asked, or as of the saved scores, or the defaults. Raises where saved scores are of others."""
    if not models and not folders:
        return Scoring({}, {}, None)
    pin = next((result for result in known.values() if result.specs), None)
    saved = pin.specs if pin else {}
    quiet = arguments.export and not arguments.rewards  # pictures for the scorers of others
    if arguments.rewards:
        specs = {label: spec for spec, label in short_labels(arguments.rewards).items()}
    elif saved:
        specs = {label: spec for label, spec in saved.items() if label != "features"}
    else:
        specs = {} if quiet else {name: name for name in world_of(models)[1]}
    rewards = {label: load_reward(spec) for label, spec in specs.items()}
    for label, reward in rewards.items():
        if "references" in traits_of(reward).needs:
            raise ConfigError(f"reward {label} compares with pictures of its own for each prompt, which eval does not draw")
    if arguments.pictures or arguments.export or folders:
        check_pictures_suffice(rewards)
    for text, result in known.items():
        shared = [label for label in rewards if label in result.rewards]
        if arguments.against and rewards and not shared:
            raise ConfigError(f"{text} has scores of {', '.join(result.rewards) or 'nothing'}, not of {', '.join(rewards)}")
        versions = Protocol(rewards={label: reward_version(rewards[label]) for label in shared})
        if found := differences(Protocol(rewards=result.protocol.rewards), versions, *shared):
            raise ConfigError(f"{text} was scored by another version ({'; '.join(found)}): score it again")
    encoder = arguments.features or saved.get("features") or (None if known or quiet or not is_embedded(models) else "tiny_clip")
    encoder = None if encoder == "none" else encoder
    return Scoring({**specs, **({"features": encoder} if encoder else {})}, rewards, load_features(encoder) if encoder else None)


def selected(text: str, result: Evaluation, scoring: Scoring, wanted: Sequence[str] | None) -> Evaluation:
    """Of saved scores those that --rewards names, where nothing is scored now (beside models, the shared ones count anyway)."""
    if not wanted or scoring.rewards:
        return result
    labels = list(short_labels(wanted).values())
    if missing := [label for label in labels if label not in result.rewards]:
        raise ConfigError(f"{text} has scores of {', '.join(result.rewards) or 'nothing'}, not of {missing[0]}")
    return replace(result, rewards=labels, scores=result.scores[:, :, [result.rewards.index(label) for label in labels]])


def is_embedded(models: Sequence[str]) -> bool:
    """Whether all models are, or were trained from, those that ship."""
    return bool(models) and all(Source.parse(model).base in EMBEDDED for model in models)


def reference_features(arguments: argparse.Namespace, scoring: Scoring, known: Mapping[str, Evaluation]) -> Tensor | None:
    """(M, d) of the pictures in --reference."""
    if arguments.reference is None:
        return None
    files = picture_files(arguments.reference)
    encoder = scoring.features
    if encoder is None and (spec := next((r.specs["features"] for r in known.values() if "features" in r.specs), None)):
        encoder = load_features(spec)
    if encoder is None or not arguments.against:
        raise ConfigError("--reference measures distances of two models: give --against MODEL and --features ENCODER too")
    return torch.cat([embed(encoder, load_picture(file)[None]) for file in files]).float()


# ------------------------------------------------------------------------------------------------ pictures and scores


def draw(
    arguments: argparse.Namespace,
    models: Sequence[str],
    prompts: Sequence[Prompt],
    shared: Protocol,
    scoring: Scoring,
    target: tuple[Layout, Path] | None,
) -> dict[str, Evaluation]:
    """Models sampled and scored, each by itself in memory; with --pictures from files, and exported from there."""
    results = {}
    given = arguments.batch_size, arguments.fps
    kept = Kept(arguments.pictures, models, prompts, shared, *given) if arguments.pictures else None
    outs: dict[str, Path] = {}
    if kept and target:
        layout, out = target
        for model in models:
            same = len(models) > 1 and layout.root(out, "model", prompts) == out  # the layout has no place for several models
            outs[model] = out / kept.folder(model) if same else out
            export_root(layout, outs[model], kept.label(model), prompts, shared, Source.parse(model).digest())
    for model in models:
        result = (
            draw_in_memory(arguments, model, prompts, shared, scoring)
            if kept is None
            else from_files(arguments, kept, model, scoring)
        )
        result.specs = scoring.specs
        results[model] = result
        if kept and target:
            root, new = export(target[0], result, kept.files(model), outs[model], progress=True)
            print(f"{result.model}: {len(prompts)} prompts in {root} ({new} new)\n  {target[0].command(root, result)}\n")
    return results


def draw_in_memory(
    arguments: argparse.Namespace, model: str, prompts: Sequence[Prompt], shared: Protocol, scoring: Scoring
) -> Evaluation:
    policy = open_model(model, arguments, prompts)
    size = arguments.batch_size or default_batch_size(policy)
    try:
        return evaluate_model(model, policy, list(prompts), scoring.rewards, shared, size, features=scoring.features)
    except torch.OutOfMemoryError:
        raise ConfigError(f"the device has no room for {size} pictures at once: try a smaller --batch-size") from None


def from_files(arguments: argparse.Namespace, kept: Kept, model: str, scoring: Scoring) -> Evaluation:
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    there = len({file for row in kept.files(model) for file in row}) - len(kept.todo(model))
    if there:
        print(f"{model}: {there} pictures are in {kept.out} already")
    kept.draw(model, device, progress=True)
    averaged = is_averaged(model)
    return kept.evaluate(model, scoring.rewards, ema=averaged, features=scoring.features, device=device, progress=True)


def score_folder(
    arguments: argparse.Namespace, layout: Layout, root: Path, prompts: Sequence[Prompt] | None, scoring: Scoring
) -> Evaluation:
    """Pictures in a benchmark's layout, whoever drew them."""
    known, places = find_pictures(layout, root, prompts, arguments.seeds)
    size, protocol = arguments.batch_size or 16, replace(known.protocol, rewards={})
    place = iter(range(0, len(places), size))

    def read(part: Sequence[tuple[Prompt, int]]) -> Samples:
        start, count = next(place), len(part)
        files = places[start : start + count]
        images = stacked([as_tensor(layout.read(file, i, protocol.seeds)) for file, i in files], [str(file) for file, _ in files])
        nothing, fps = torch.zeros(count, 0), rate_of(files[0][0]) if images.ndim == 5 else None
        return Samples([p for p, _ in part], [s for _, s in part], torch.arange(count), nothing, images, fps=fps)

    rewards, features = scoring.rewards, scoring.features
    result = score_all(read, known.prompts, rewards, protocol, known.model, size, progress=True, features=features)
    return replace(result, seeds=known.seeds, weights=known.weights, specs=scoring.specs)


def as_tensor(picture: Any) -> Tensor:
    """A picture (3, H, W), or a clip's frames (F, 3, H, W), in [0, 1]."""
    if isinstance(picture, list):
        return torch.stack([as_tensor(frame) for frame in picture])
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
