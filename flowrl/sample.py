"""Pictures into a folder: models (with LoRAs) x samplers x prompts x seeds, each picture with all that drew it inside.

    sample_to_folder(["tiny-sd3", "tiny-sd3+runs/demo@0.5"], ["a red circle"], "samples", seeds=[0, 1], grid=True)

    samples/tiny-sd3/a-red-circle-a1e4a280d2-s0.png        texts inside: `parameters` (what other tools read), `flowrl` (JSON)
    samples/tiny-wan/a-red-circle-a1e4a280d2-s0.webp       a clip, or .mp4 where that is asked for
    samples/tiny-sd3-fk-particles-8/steering/...           of steered pictures: report (JSON) and genealogy (PNG)
    samples/samples.jsonl  samples/grid.png                a row for each picture, with its rewards; the labelled sheet

A picture depends on its model, prompt, seed and settings alone, and its name on the first three: the same command gives the same
files. One that is there is kept if it was drawn by the same settings, and otherwise nothing is touched; so an interrupted
command goes on when it is given again. Rewards are those of the stored picture, in 8 bits (of an mp4: of what it holds).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowrl import __version__
from flowrl.batch import Prompt, Samples
from flowrl.clips import FACTS, FORMS, PARAMETERS, RATE, check_form, clip_bytes
from flowrl.conditions import check_conditions, condition_of
from flowrl.config import ConfigError, build
from flowrl.data import load_prompts
from flowrl.model_facts import ModelFacts
from flowrl.pairs import load_batch
from flowrl.pictures import Cell, file_stem, picture_bytes, read_facts, read_frames, reduced, sheet_files, slug
from flowrl.policy import DTYPES, Policy, resolve_model
from flowrl.record import environment, move, unfinished, write_text, writing
from flowrl.reward_models import load_reward
from flowrl.reward_models.base import Reward, failing_as, score, to_pil, traits_of
from flowrl.samplers import TRANSITIONS, AllButLast
from flowrl.samplers.steering import STEERS, PolicyModel, Report, genealogy_picture, steer
from flowrl.samplers.steering.loop import strength_of
from flowrl.sources import Source

TABLE = "samples.jsonl"
ODE = {"name": "ode"}


# ------------------------------------------------------------------------------------------------ what is asked for


@dataclass(frozen=True)
class Settings:
    """What decides a picture besides its model, prompt and seed. None is the model's own value.

    transition: the sampler {name, options}. call: further arguments of the pipeline (negative_prompt, num_frames, ...).
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    transition: dict[str, Any] = field(default_factory=lambda: dict(ODE))
    call: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    solver: str = "euler"  #: Of the plain sampler's deterministic steps: euler, or dpmpp2m.
    fps: float | None = None  #: Frames per second of clips.


@dataclass(frozen=True)
class Column:
    """What stands in one column of the sheet and one folder: a model and a way of steering it."""

    source: Source
    steering: dict[str, Any] | None
    label: str
    folder: str


@dataclass(frozen=True)
class Item:
    """One picture to be."""

    column: Column
    prompt: Prompt
    seed: int
    file: Path
    request: dict[str, Any]
    starts: tuple[str, ...] = ()  #: Columns with pictures that its model starts from.


@dataclass
class Sampled:
    """What is in the folder now. rows: of this call's pictures, as in samples.jsonl. accounts: what steering cost, by column."""

    folder: Path
    rows: list[dict[str, Any]]
    drawn: int
    repeated: int
    sheets: list[Path] = field(default_factory=list)
    accounts: dict[str, list[tuple[str, str]]] = field(default_factory=dict)


def sample_to_folder(
    models: Sequence[str | Path],
    prompts: str | Path | Sequence[str | Prompt],
    out: str | Path = "samples",
    *,
    seeds: Sequence[int] = (0,),
    settings: Settings | None = None,
    steers: Sequence[dict[str, Any] | None] = (None,),
    rewards: Sequence[Any] = (),
    grid: bool = False,
    overwrite: bool = False,
    batch_size: int | None = None,
    device: str | None = None,
    progress: bool = False,
    clip_format: str = "webp",
) -> Sampled:
    """Draw what is not there yet, score everything, write the table and the sheet.

    models: as `Source` reads them. prompts: as `flowrl.data.load_prompts`. steers: one column each for every model, {name,
    options} of a method in STEERS, or None for the plain sampler; the option `reward` names what it climbs, by default the
    first of `rewards`. batch_size: samples per denoiser call; by the size of the pictures when None. clip_format: webp, which
    loses nothing, or mp4.
    Raises ConfigError, FileNotFoundError, ValueError before anything is written where the input is at fault.
    """
    settings, out = settings or Settings(), Path(out)
    items, repeated = plan(models, load_prompts(prompts), seeds, settings, steers, rewards, out, clip_format)
    digests: dict[str, str | None] = {}
    for source in dict.fromkeys(item.column.source for item in items):
        source.check()
        digests[source.text] = source.digest()
    todo = [item for item in items if overwrite or not is_drawn(item, digests[item.column.source.text])]
    scorers = {name_of(spec): load_reward(spec) for spec in rewards}
    for name, reward in scorers.items():
        if traits_of(reward).arity != "point" or "references" in traits_of(reward).needs:
            raise ConfigError(f"reward {name} compares pictures with others: use it with `flowrl eval` or `flowrl train`")
    climbs = dict.fromkeys(item.request["steer_reward"] for item in todo if item.column.steering)
    climbed = {name: scorers.get(name) or load_reward(name) for name in climbs}
    rows: dict[Path, dict[str, Any]] = {}
    with made(out):
        try:
            drawing = {item.file for item in todo}
            for part in _batches([item for item in items if item.file not in drawing], batch_size or 16):
                images, fps = load_batch([item.file for item in part]) if scorers else (None, None)
                rows |= _rows(part, images, fps, scorers, out)
            for part, images, fps in draw(todo, items, settings, climbed, digests, batch_size, device, progress):
                rows |= _rows(part, images, fps, scorers, out)
        finally:  # also when it is interrupted: the table says what is there
            write_table(out, [rows[item.file] for item in items if item.file in rows], {item.file for item in todo})
        sheets = write_sheets(out, items, rows) if grid else []
    columns = {item.column.label: item.column for item in items if item.column.steering}
    accounts = {label: account([item for item in items if item.column is column]) for label, column in columns.items()}
    return Sampled(out, [rows[item.file] for item in items], len(todo), repeated, sheets, accounts)


def plan(
    models: Sequence[str | Path],
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    settings: Settings,
    steers: Sequence[dict[str, Any] | None],
    rewards: Sequence[Any],
    out: Path,
    clip_format: str = "webp",
) -> tuple[list[Item], int]:
    """Every picture of a command, model by model, and how many prompts were repeated. Checks all that needs no weights."""
    check_form(clip_format)
    if settings.dtype not in DTYPES:
        raise ConfigError(f"dtype={settings.dtype!r}: choose one of {', '.join(DTYPES)}")
    build(settings.transition, TRANSITIONS, "transition")
    if len(set(seeds)) < len(seeds) or not seeds:
        raise ConfigError("seeds: name each once, and at least one")
    distinct, repeated = _distinct(prompts)
    items = []
    known: dict[str, ModelFacts | None] = {}
    for column in _columns([Source.parse(str(model)) for model in models], steers):
        steering, climbs = column.steering, None
        if steering is not None:
            steering = dict(steering)
            climbs = steering.pop("reward", None) or (name_of(rewards[0]) if rewards else None)
            if climbs is None:
                raise ConfigError(f"steer {steering.get('name')}: name the reward that it climbs, with --reward NAME")
            method_of(steering, settings)
        if column.source.model not in known:
            known[column.source.model] = facts_for(column.source, prompts, settings)
        facts = known[column.source.model]
        suffix = FORMS[clip_format] if facts is not None and facts.draws_clips else ".png"
        for prompt, again in distinct:
            if facts is not None and facts.conditions:
                prompt = located(prompt, facts)
            for seed in seeds:
                request = request_for(column.source.text, prompt, int(seed), settings, steering, climbs)
                file = out / column.folder / f"{file_stem(prompt.text, int(seed), again)}{suffix}"
                items.append(Item(column, prompt, int(seed), file, request, facts.conditions if facts is not None else ()))
    return items, repeated


def facts_for(source: Source, prompts: Sequence[Prompt], settings: Settings) -> ModelFacts | None:
    """What is known of a model before it is loaded. Raises ConfigError for frames, rates and prompts that do not suit it."""
    try:
        facts = ModelFacts.read(resolve_model(source.base))
    except (FileNotFoundError, ConfigError):  # `Source.check` says it, when all else is checked
        return None
    if facts is None:
        return None
    call = {**facts.call, **settings.call}
    if settings.fps is not None:
        facts.check_fps(settings.fps)
    if call.get("num_frames") is not None:
        facts.check_frames(call["num_frames"])
    check_conditions(prompts, facts, call)
    return facts


def located(prompt: Prompt, facts: ModelFacts) -> Prompt:
    """The prompt with whole paths of the pictures that it starts from, so that what it drew can be drawn again."""
    paths = {name: str(source.resolve()) for name, source in condition_of(prompt, facts) if isinstance(source, Path)}
    return dataclasses.replace(prompt, columns={**prompt.columns, **paths})


def request_for(
    model: str,
    prompt: Prompt,
    seed: int,
    settings: Settings,
    steering: dict[str, Any] | None = None,
    climbs: str | None = None,
) -> dict[str, Any]:
    """One picture as it is asked for, in what JSON can hold. climbs: the name of the reward that steers."""
    said = {"model": model, "prompt": prompt.text, "columns": prompt.columns, "seed": seed, **dataclasses.asdict(settings)}
    return json.loads(json.dumps({**said, "steer": steering, "steer_reward": climbs}, default=str))


def _distinct(prompts: Sequence[Prompt]) -> tuple[list[tuple[Prompt, int]], int]:
    """Each prompt once; equal texts with other columns stay, numbered. And how many were left out."""
    found: dict[str, list[Prompt]] = {}
    kept = []
    for prompt in prompts:
        same = found.setdefault(prompt.text, [])
        if prompt not in same:
            kept.append((prompt, len(same)))
            same.append(prompt)
    return kept, len(prompts) - len(kept)


def _columns(sources: Sequence[Source], steers: Sequence[dict[str, Any] | None]) -> list[Column]:
    """Each with a label and a folder of its own."""
    sources = list(dict.fromkeys(sources))
    labels = [source.label for source in sources]
    columns: list[Column] = []
    for source in sources:
        label = source.label if labels.count(source.label) == 1 else source.text
        for steering in steers:
            name = label
            if steering is not None:
                options = [f"{key}={_text(value)}" for key, value in steering.items() if key != "name"]
                name = " ".join([label, str(steering.get("name")), *options])
            folder = slug(name, 80) or "model"
            if len(slug(name, 1000)) > 80 or any(folder == other.folder for other in columns):
                folder += "-" + hashlib.sha256(name.encode()).hexdigest()[:6]
            if all(name != other.label for other in columns):
                columns.append(Column(source, steering, name, folder))
    return columns


def method_of(steering: dict[str, Any], settings: Settings) -> Any:
    """The method with its options; it takes the command's transition where it has none of its own."""
    options = dict(steering)
    takes = {f.name for f in dataclasses.fields(STEERS[options["name"]])} if options.get("name") in STEERS else set()  # type: ignore[arg-type]
    if "transition" in takes and settings.transition != ODE:
        options.setdefault("transition", settings.transition)
    return build(options, STEERS, "steer")


def name_of(reward: Any) -> str:
    return reward if isinstance(reward, str) else str(getattr(reward, "name", getattr(reward, "__name__", "reward")))


def is_drawn(item: Item, digest: str | None) -> bool:
    """Whether the picture is there. Raises ConfigError when another one stands in its place."""
    if not item.file.exists():
        return False
    fix = "choose another --out, or --overwrite"
    try:
        facts = read_facts(item.file)
    except ValueError as error:
        raise ConfigError(f"{error}: {fix}") from None
    ours, theirs = dict(item.request), dict(facts["request"])
    if not item.column.steering:  # columns describe the prompt; a reward that steers makes them all part of the picture
        for request in (ours, theirs):
            request["columns"] = {name: (request.get("columns") or {}).get(name) for name in item.starts}
    for name in ours:
        if ours[name] != theirs.get(name):
            raise ConfigError(
                f"{item.file} was drawn with {name}={_text(theirs.get(name))}, now {name}={_text(ours[name])}: {fix}"
            )
    if digest and facts.get("weights") and digest != facts["weights"]:
        raise ConfigError(f"{item.file} was drawn by other weights of {ours['model']}: {fix}")
    return True


# ------------------------------------------------------------------------------------------------ drawing


def draw(
    todo: Sequence[Item],
    items: Sequence[Item],
    settings: Settings,
    climbed: Mapping[str, Reward],
    digests: Mapping[str, str | None],
    batch_size: int | None,
    device: str | None,
    progress: bool,
) -> Iterator[tuple[list[Item], Tensor, float | None]]:
    """Draw and store, batch by batch; one model in memory at a time. Yields what was drawn, as `load_batch` would read it."""
    from tqdm.auto import tqdm

    given = {name: getattr(settings, name) for name in ("num_inference_steps", "guidance_scale")}
    call = {name: value for name, value in given.items() if value is not None}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tqdm(total=len(todo), unit="picture", disable=not progress or not todo) as bar:
        for source in dict.fromkeys(item.column.source for item in todo):
            bar.set_description(f"loading {source.label}")
            policy = source.open(settings.dtype, device, **size_of(settings), **settings.call)
            if settings.fps is not None:
                policy.set_fps(settings.fps)
            size = batch_size or default_batch_size(policy)
            weights = digests[source.text] or source.digest()
            for column in dict.fromkeys(item.column.label for item in todo if item.column.source == source):
                bar.set_description(column)
                ours = [item for item in todo if item.column.label == column]
                drawing = (
                    _steered(policy, ours, [i for i in items if i.column.label == column], settings, climbed, size, call)
                    if ours[0].column.steering
                    else _plain(policy, ours, settings, size, call)
                )
                with enough_memory(size):
                    for part, images, more in drawing:
                        images = (images.clamp(0, 1) * 255).round() / 255
                        facts = {"weights": weights, "resolved": {**resolved(policy, call), **more}, "software": software()}
                        store(part, images, facts)
                        if part[0].file.suffix == FORMS["mp4"]:  # rewards are of what is stored
                            images = load_batch([item.file for item in part])[0].to(images)
                        yield part, images, policy.fps
                        bar.update(len(part))
            del policy


def _plain(
    policy: Policy, items: Sequence[Item], settings: Settings, size: int, call: dict[str, Any]
) -> Iterator[tuple[list[Item], Tensor, dict[str, Any]]]:
    """Batches of the plain sampler: the ODE, or another transition at every step but the last."""
    transition = build(settings.transition, TRANSITIONS, "transition")
    stochastic: list[int] = []
    if not transition.deterministic:
        stochastic = AllButLast().steps(len(policy.grid(**call).t) - 1, 0, 0)
    for part in _batches(items, size):
        prompts, seeds = [item.prompt for item in part], [item.seed for item in part]
        solver: dict[str, Any] = {"solver": settings.solver} if settings.solver != "euler" else {}
        samples = policy.rollout(prompts, seeds, transition=transition, stochastic=stochastic, **solver, **call)
        yield part, policy.decode(samples), {}


def _steered(
    policy: Policy,
    items: Sequence[Item],
    column: Sequence[Item],
    settings: Settings,
    climbed: Mapping[str, Reward],
    size: int,
    call: dict[str, Any],
) -> Iterator[tuple[list[Item], Tensor, dict[str, Any]]]:
    """One picture after the other: a population shares nothing with its neighbours, so any of them can be drawn again alone."""
    request = items[0].request
    reward: Any = Named(request["steer_reward"], climbed[request["steer_reward"]])
    method = method_of(request["steer"], settings)
    folder = items[0].file.parent / "steering"
    if getattr(method, "tilt_strength", 0.0) is None:  # one strength for the whole column, from its first prompts
        first = list({item.prompt.text: item for item in reversed(column)}.values())[::-1][:8]
        model = PolicyModel(policy, [i.prompt for i in first], [i.seed for i in first], reward, size, **call)
        method = dataclasses.replace(method, tilt_strength=strength_of(model, None))
        write_text(
            folder / "strength.json",
            json.dumps({"tilt_strength": method.tilt_strength, "counts": dataclasses.asdict(model.counts)}) + "\n",
        )
    for item in items:
        result = steer(policy, [item.prompt], reward, method, [item.seed], batch_size=size, **call)
        assert result.samples.images is not None
        write_text(folder / f"{item.file.stem}.json", json.dumps(report_json(item, result.report), indent=1) + "\n")
        with writing(folder), unfinished(folder) as temporary:
            drawn = genealogy_picture(result.report, temporary / f"{item.file.stem}.png")
            move(drawn, folder / drawn.name)
        yield [item], result.samples.images, {"steering": str(method), "tilt_strength": getattr(method, "tilt_strength", None)}


class Named:
    """A reward whose failures carry its name, gradients and all."""

    def __init__(self, name: str, reward: Reward):
        self.name, self.reward = name, reward

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reward, name)

    def __call__(self, samples: Samples) -> Tensor:
        with failing_as(self.name, torch.OutOfMemoryError):
            return self.reward(samples)


def size_of(settings: Settings) -> dict[str, int]:
    """Height and width where they are given."""
    return {name: value for name in ("height", "width") if (value := getattr(settings, name)) is not None}


def default_batch_size(policy: Policy) -> int:
    """As many pixels per call as four pictures of 1024 x 1024 have, at most 64 pictures."""
    side = getattr(policy.pipe, "default_sample_size", None) or 128
    side = (max(side) if isinstance(side, list | tuple) else side) * getattr(policy.pipe, "vae_scale_factor", 8)
    height, width = (policy.call.get(name) or side for name in ("height", "width"))
    return int(min(64, max(1, 4 * 1024**2 // (height * width * (policy.num_frames or 1)))))


@contextmanager
def enough_memory(size: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        fix = f"try --batch-size {size // 2}" if size > 1 else "try --dtype bfloat16, or smaller pictures"
        raise ConfigError(f"the device has no room for {size} pictures at once: {fix}; what is drawn is kept") from None


def resolved(policy: Policy, call: Mapping[str, Any]) -> dict[str, Any]:
    """What the pipeline is really called with."""
    named = ("num_inference_steps", "guidance_scale", "true_cfg_scale", "negative_prompt", "num_frames")
    defaults = {name: p.default for name, p in policy._parameters.items() if name in named}
    rate = {} if policy.fps is None else {"fps": policy.fps}
    return json.loads(json.dumps({"pipeline": policy.name, **defaults, **policy.call, **call, **rate}, default=str))


def software() -> dict[str, str]:
    found = environment()
    return {name: found[name] for name in ("flowrl-diffusion", "torch", "diffusers", "device") if name in found}


# ------------------------------------------------------------------------------------------------ files


@contextmanager
def made(out: Path) -> Iterator[None]:
    """The folder, proven to be writable; gone again if nothing came into it."""
    import tempfile

    new = [place for place in (out, *out.parents) if not place.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made: {error.strerror}") from None
    try:
        yield
    finally:
        for place in new:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()


def store(items: Sequence[Item], images: Tensor, facts: dict[str, Any]) -> None:
    """Each picture into its place, whole or not at all, with all that drew it."""
    with unfinished(items[0].file.parent) as temporary:
        for item, picture in zip(items, to_pil(images), strict=True):
            size = {
                "width": images.shape[-1],
                "height": images.shape[-2],
                "num_frames": len(images[0]) if images.ndim == 5 else None,
            }
            inside = {
                "flowrl": __version__,
                "command": command_of(strengthened(item.request, facts), item.file),
                "request": item.request,
                **facts,
                "resolved": {**facts["resolved"], **size},
            }
            texts = {PARAMETERS: parameters(inside), FACTS: json.dumps(inside)}
            with writing(item.file):
                (temporary / item.file.name).write_bytes(_file_bytes(item.file, picture, texts, facts["resolved"].get("fps")))
                move(temporary / item.file.name, item.file)


def _file_bytes(file: Path, picture: Any, texts: dict[str, str], fps: float | None) -> bytes:
    """A picture, or a clip (a list of frames) in the form that the file's name says."""
    if not isinstance(picture, list):
        return picture_bytes(picture, texts)
    form = next(form for form, suffix in FORMS.items() if suffix == file.suffix)
    return clip_bytes(picture, fps or RATE, form, texts)


def parameters(facts: Mapping[str, Any]) -> str:
    """The text that picture viewers and model hubs read: prompt, negative prompt, then `Key: value` pairs on one line."""
    request, call = facts["request"], facts["resolved"]
    transition = dict(request["transition"])
    sampler = " ".join([transition.pop("name").upper(), *(f"{k}={v}" for k, v in transition.items())])
    sampler = request["solver"].upper() if sampler == "ODE" else sampler
    guidance = call["true_cfg_scale"] if (call.get("true_cfg_scale") or 1) != 1 else call.get("guidance_scale")
    pairs = {
        "Steps": call.get("num_inference_steps"),
        "Sampler": request["steer"]["name"].upper() if request["steer"] else sampler,
        "CFG scale": guidance,
        "Seed": request["seed"],
        "Size": f"{call['width']}x{call['height']}",
        "Frames": call.get("num_frames"),
        "FPS": None if call.get("fps") is None else f"{call['fps']:g}",
        "Model hash": facts.get("weights"),
        "Model": request["model"],
        "Steering": call.get("steering"),
        "Version": f"flowrl {facts['flowrl']}",
    }
    lines = [request["prompt"], *([f"Negative prompt: {negative}"] if (negative := call.get("negative_prompt")) else [])]
    quoted = {k: json.dumps(str(v), ensure_ascii=False) if set(str(v)) & set(',:\n"') else v for k, v in pairs.items()}
    return "\n".join([*lines, ", ".join(f"{k}: {v}" for k, v in quoted.items() if v is not None)])


def command_of(request: Mapping[str, Any], file: Path | None = None) -> str:
    """The command that draws this picture again, for a shell. Where the prompt's columns steered it, they come from the file."""
    if file and request["steer"] and request["columns"]:
        return shlex.join(["flowrl", "sample", "--from", str(file), "--out", "again"])
    words = ["flowrl", "sample", request["model"], request["prompt"], "--seed", str(request["seed"])]
    options = {"steps": "num_inference_steps", "guidance": "guidance_scale", "height": "height", "width": "width", "fps": "fps"}
    for option, name in options.items():
        words += [f"--{option}", _text(request[name])] if request.get(name) is not None else []
    words += ["--image", request["columns"]["image"]] if isinstance(request["columns"].get("image"), str) else []
    words += ["--clip-format", "mp4"] if file and file.suffix == FORMS["mp4"] else []
    for option, default in (("dtype", "float32"), ("solver", "euler")):
        words += [f"--{option}", request[option]] if request[option] != default else []
    sections = {"transition": request["transition"] if request["transition"] != ODE else None, "steer": request["steer"]}
    for option, section in sections.items():
        if section:
            words += [f"--{option}", section["name"], *(f"{k}={_text(v)}" for k, v in section.items() if k != "name")]
    if request["call"]:
        words += ["--call", *(f"{k}={_text(v)}" for k, v in request["call"].items())]
    words += ["--rewards", request["steer_reward"]] if request["steer"] else []
    return shlex.join(words)


def _text(value: Any) -> str:
    """A value as the command line reads it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def request_of(path: str | Path) -> dict[str, Any]:
    """The request that a picture was drawn by."""
    facts = read_facts(path)
    return strengthened(facts["request"], facts)


def strengthened(request: dict[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The request with the strength that was chosen for it, where it was steered without one."""
    strength = facts["resolved"].get("tilt_strength")
    return request if strength is None else {**request, "steer": {**request["steer"], "tilt_strength": strength}}


def _batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """At most `size` neighbours of one column."""
    for label in dict.fromkeys(item.column.label for item in items):
        column = [item for item in items if item.column.label == label]
        for start in range(0, len(column), size):
            yield column[start : start + size]


def _rows(
    items: Sequence[Item], images: Tensor | None, fps: float | None, scorers: Mapping[str, Reward], out: Path
) -> dict[Path, dict[str, Any]]:
    """A row of the table for each picture."""
    prompts, seeds = [item.prompt for item in items], [item.seed for item in items]
    samples = Samples(prompts, seeds, torch.arange(len(items)), torch.zeros(len(items), 0), images, fps=fps)
    values = score(dict(scorers), samples).tolist()
    rows = {}
    for item, scores in zip(items, values, strict=True):
        steering = item.column.steering
        rows[item.file] = {
            "file": item.file.relative_to(out).as_posix(),
            "model": item.request["model"],
            "sampler": steering["name"] if steering else item.request["transition"]["name"],
            "column": item.column.label,
            "prompt": item.prompt.text,
            "seed": item.seed,
            "rewards": {k: None if v != v else round(v, 6) for k, v in zip(scorers, scores, strict=True)},
            **({"columns": item.prompt.columns} if item.prompt.columns else {}),
        }
    return rows


def write_table(out: Path, rows: Sequence[dict[str, Any]], drawn: set[Path]) -> None:
    """samples.jsonl, whole: these rows, after those of other commands whose pictures are still there.

    A picture that was not drawn now keeps the rewards that were measured before and not asked for again.
    """
    ours = {row["file"]: row for row in rows}
    others = []
    if (out / TABLE).is_file():
        for line in (out / TABLE).read_text(encoding="utf-8").split("\n"):
            try:
                row = json.loads(line)
                if (new := ours.get(row["file"])) and out / row["file"] not in drawn:
                    new["rewards"] = {**row["rewards"], **new["rewards"]}
                elif new is None and (out / row["file"]).is_file():
                    others.append(row)
            except (ValueError, KeyError, TypeError):
                continue
    if rows:
        write_text(out / TABLE, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in [*others, *rows]))


def write_sheets(out: Path, items: Sequence[Item], rows: Mapping[Path, dict[str, Any]]) -> list[Path]:
    """grid.png: prompts down, models and seeds across, rewards below; grid-1.png, grid-2.png, ... where one would be too tall."""
    seeds = list(dict.fromkeys(item.seed for item in items))
    places: dict[tuple[str, str], dict[tuple[str, int], Item]] = {}
    for item in items:
        row = item.prompt.text, item.file.stem.removesuffix(f"-s{item.seed}")
        places.setdefault(row, {})[item.column.label, item.seed] = item
    columns = [(label, seed) for label in dict.fromkeys(item.column.label for item in items) for seed in seeds]
    facts = read_facts(items[0].file)["resolved"]
    size = f"{facts['width']} x {facts['height']}"
    transition, solver = items[0].request["transition"], items[0].request["solver"]
    steps, guidance = facts.get("num_inference_steps"), facts.get("guidance_scale")
    sampler = " ".join([str(transition["name"]).upper(), *(f"{k}={v}" for k, v in transition.items() if k != "name")])
    sampler += f" ({solver})" if solver != "euler" else ""
    note = ", ".join([f"{steps} {sampler} steps", *([f"guidance {guidance:g}"] if guidance is not None else []), size])

    def cell(item: Item | None) -> Cell:
        if item is None:
            return Cell(None)
        scores = rows[item.file]["rewards"]
        shown = [f"{name.rpartition('.')[2]} {'-' if value is None else f'{value:.3g}'}" for name, value in scores.items()]
        return Cell(reduced(read_frames(item.file)), "  ".join(shown))

    written = []
    lines = list(places.items())
    names = [(label, f"seed {seed}") for label, seed in columns]
    texts = [text for (text, _), _ in lines]
    drawn = sheet_files(out / "grid.png", texts, names, lambda r, c: cell(lines[r][1].get(columns[c])), facts["height"], note)
    for file, content in drawn:
        with writing(file), unfinished(out) as temporary:
            (temporary / file.name).write_bytes(content)
            move(temporary / file.name, file)
        written.append(file)
    return written


# ------------------------------------------------------------------------------------------------ what steering cost


def report_json(item: Item, report: Report) -> dict[str, Any]:
    """The report of one population, in plain numbers."""
    log_z = float(report.log_z[0])
    history = report.history
    return {
        "picture": item.file.name,
        "prompt": item.prompt.text,
        "seed": item.seed,
        "method": str(report.method),
        "reward": item.request["steer_reward"],
        "counts": dataclasses.asdict(report.counts),
        "tilt_strength": report.strength,
        "rewards": report.rewards[0].tolist(),
        "log_weights": report.log_weights[0].tolist(),
        "chosen": int(report.chosen[0]),
        "log_z": None if log_z != log_z else log_z,
        "surviving_ancestors": int(report.surviving[0]),
        "history": [
            {"t": t, "ess": float(size[0]), "ancestors": ancestors[0].tolist()}
            for t, size, ancestors in zip(history.t, history.ess, history.ancestors, strict=True)
        ],
    }


def account(items: Sequence[Item]) -> list[tuple[str, str]]:
    """What a column's pictures cost, and what their weights did, from the reports beside them: name and value."""
    folder = items[0].file.parent / "steering"
    files = [file for item in items if (file := folder / f"{item.file.stem}.json").is_file()]
    reports = [json.loads(file.read_text()) for file in files]
    if not reports:
        return []
    steps = read_facts(items[0].file)["resolved"].get("num_inference_steps") or 0
    counts: dict[str, int] = dict.fromkeys(reports[0]["counts"], 0)
    spent = [report["counts"] for report in reports]
    if (folder / "strength.json").is_file():
        spent.append(json.loads((folder / "strength.json").read_text())["counts"])
    for one in spent:
        counts = {name: counts[name] + one[name] for name in counts}
    lines = [("method", reports[0]["method"])]
    for name, value in counts.items():
        if value:
            per = f"{value / len(reports):,.1f} per picture"
            plain = f", {value / len(reports) / steps:.1f} x the plain sampler's" if name == "denoiser_calls" and steps else ""
            lines.append((name.replace("_", " "), f"{value:,} ({per}{plain})"))
    returned = [report["rewards"][report["chosen"]] for report in reports]
    everybody = [value for report in reports for value in report["rewards"]]
    lines.append((reports[0]["reward"], f"{np.mean(returned):.4f} returned, {np.mean(everybody):.4f} over all particles"))
    particles = len(reports[0]["rewards"])
    if reports[0]["tilt_strength"]:
        lines.append(("tilt strength", f"{reports[0]['tilt_strength']:.4g}"))
    if histories := [report["history"] for report in reports if report["history"]]:
        events = [(histories[0][k]["t"], np.mean([h[k]["ess"] for h in histories])) for k in range(len(histories[0]))]
        lines.append((f"ESS of {particles}", "  ".join(f"t {t:.2f}: {size:.1f}" for t, size in events)))
        surviving = np.mean([report["surviving_ancestors"] for report in reports])
        lines.append(("surviving ancestors", f"{surviving:.1f} of {particles}"))
    if all(report["log_z"] is not None for report in reports):
        lines.append(("log Z", f"{np.mean([report['log_z'] for report in reports]):.4f}"))
    return lines
