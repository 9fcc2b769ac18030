"""What a reward is: a callable from samples to one number each, higher is better, NaN where it abstains.

    reward(samples) -> Tensor (N,)

Four arities: a reward looks at one sample at a time (point), compares the samples of one prompt (group), or scores a sample by
what it does to a whole set (batch); a process reward also scores noisy states, step by step. `Traits` says which, and what the
reward needs. A plain function `def f(images, prompts, **columns) -> list[float | None]` is a reward too, and so is its dotted
path. It gets images as a tensor (N, 3, H, W) in [0, 1] (clips: (N, F, 3, H, W)), or as PIL pictures when it has the attribute
`pil = True`, and those columns of the prompt file that it names (all of them with **columns). None abstains.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import math
import shlex
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import yaml
from torch import Tensor

from flowrl.batch import Samples
from flowrl.config import coerced

#: What a reward may ask of the samples: decoded pictures, clips (N, F, 3, H, W), their frame rate, pictures to compare with,
#: final latents.
NEEDS = ("images", "clips", "fps", "references", "latents")
REWARD_FILE = "reward.json"


@dataclass(frozen=True)
class Traits:
    """What a reward says about itself, to the loop and to its readers."""

    arity: Literal["point", "group", "batch"] = "point"  #: group compares the samples of one prompt, batch all of them.
    needs: tuple[str, ...] = ("images",)  #: Among NEEDS.
    columns: tuple[str, ...] = ()  #: Columns of the prompt file that it reads; where it finds none it abstains.
    range: tuple[float, float] = (-math.inf, math.inf)  #: Its values lie within.
    differentiable: bool = False  #: Its gradients reach the pictures.
    remote: bool = False  #: It waits for another machine: the loop draws the next batch meanwhile.
    licence: str = ""  #: Of its weights.


class Reward(Protocol):
    """A scorer. Stateful ones are classes; `name` is how metrics call it. It may have `traits`; without, `Traits()` holds."""

    name: str

    def __call__(self, samples: Samples) -> Tensor:
        """(N,) fp32, higher is better, NaN abstains."""


@runtime_checkable
class LearningReward(Protocol):
    """A reward that goes on learning while it is used. The loop calls `update` after each scoring and keeps its state."""

    def update(self, samples: Samples, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Learn from fresh samples. reduce averages a tensor over processes. Returns metrics by name."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class ProcessReward(Protocol):
    """A reward of noisy states: what steering and per-step credit ask for."""

    def noisy(self, x: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
        """x: (B, ...) in flow coordinates; t: (B,), 1 is noise; returns (B,) with graph."""


@runtime_checkable
class MapReward(Protocol):
    """A reward that also says where: its score is the mean of its map."""

    def map(self, samples: Samples) -> Tensor:
        """(N, h, w) in [0, 1], 1 is good."""


class RewardError(RuntimeError):
    """A scorer broke its contract or failed; the message names the reward and what it did."""


class NotScores(RewardError):
    """What a scorer returned is no score for each sample; asking again does not help."""


def traits_of(reward: Any) -> Traits:
    return getattr(reward, "traits", None) or Traits()


def parts_of(reward: Any) -> Iterator[Any]:
    """A reward and all the rewards inside it: `of` holds one of them, or a list."""
    yield reward
    inner = getattr(reward, "of", None)
    for part in inner if isinstance(inner, list | tuple) else [] if inner is None else [inner]:
        yield from parts_of(part)


class FunctionReward:
    """A plain function as a reward. Raises RewardError when it returns the wrong number or type of values.

    The function's attribute `traits` is the reward's; `higher_is_better = False` turns the sign, and the range with it.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None):
        self.function = function
        self.name = str(name or getattr(function, "__name__", type(function).__name__))
        self.traits = traits_of(function)
        self.sign = 1.0
        if not getattr(function, "higher_is_better", True):
            low, high = self.traits.range
            self.sign, self.traits = -1.0, replace(self.traits, range=(-high, -low))
        parameters = inspect.signature(function).parameters
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.parameters = set(parameters)

    def __call__(self, samples: Samples) -> Tensor:
        assert samples.images is not None, "rewards score decoded samples"
        images = to_pil(samples.images) if getattr(self.function, "pil", False) else samples.images
        columns = {name: values for name, values in samples.columns.items() if self.takes_all or name in self.parameters}
        return self.sign * as_scores(self.function(images, samples.texts, **columns), len(samples), self.name)


def as_scores(values: Any, count: int, name: str) -> Tensor:
    """What a scorer returned, as (count,) fp32 on the CPU, None as NaN; a tensor keeps its graph, for those who climb gradients.

    Raises NotScores on anything else.
    """
    if isinstance(values, Tensor):
        scores = values.float().cpu()
    else:
        try:
            scores = torch.tensor([float("nan") if value is None else float(value) for value in values])
        except (TypeError, ValueError):
            raise NotScores(
                f"reward {name!r} returned {type(values).__name__} instead of one number (or None) per sample"
            ) from None
    if scores.shape != (count,):
        raise NotScores(f"reward {name!r} returned values of shape {tuple(scores.shape)} for {count} samples")
    if scores.isinf().any():
        raise NotScores(f"reward {name!r} returned infinity for sample {int(scores.isinf().nonzero()[0])}")
    return scores


def to_pil(images: Tensor) -> list[Any]:
    """(N, 3, H, W) in [0, 1] -> N PIL pictures; clips (N, F, 3, H, W) -> N lists of F."""
    from PIL import Image

    def one(image: Tensor) -> Any:
        if image.ndim == 4:
            return [one(frame) for frame in image]
        return Image.fromarray(image.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())

    return [one(image) for image in images]


# ------------------------------------------------------------------------------------------------ by name


def nearest(name: str, known: Iterable[str]) -> str:
    """', did you mean ...?' for an unknown name, or the list of known ones."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else f"; known are {', '.join(known)}"


def load_reward(spec: Any, **options: Any) -> Reward:
    """A reward from what users write.

    spec: a name of REWARDS; a text "name key=value key=value"; a mapping {"name": ..., option: ...}; a folder that
    `flowrl train-reward` wrote; the dotted path of a function or class (`my_package.my_module.my_function`); a function; a
    Reward. options, and those of the spec, go to its constructor; the option `shape` shapes its values (`shaping.Shaped`).
    Raises ValueError for unknown names (with the nearest known ones), for paths that cannot be imported and for options that
    the reward does not have.
    """
    if isinstance(spec, str) and not Path(spec).is_dir():
        spec, options = _words(spec, options)
    elif isinstance(spec, Mapping):
        options = {**spec, **options}
        spec = options.pop("name", None)
        if spec is None:
            raise ValueError(f"a reward with options needs its name, as in {{name: judge, url: ...}}; got {options}")
        return load_reward(spec, **options)
    if (shape := options.pop("shape", None)) is not None:
        from flowrl.reward_models.shaping import Shaped

        return Shaped(load_reward(spec, **options), shape)
    if not isinstance(spec, str | Path):
        if options:
            raise ValueError(f"reward {spec!r} is loaded already and takes no options, but got {', '.join(options)}")
        return spec if hasattr(spec, "name") else FunctionReward(spec)
    if (Path(place_of(spec)) / REWARD_FILE).is_file():
        return _from_folder(Path(place_of(spec)), options)
    return _construct(_named(str(spec)), str(spec), options)


def find_reward(name: str) -> tuple[Any, dict[str, Any]]:
    """The class or function behind a name, an embedded one, a folder or a dotted path, and the options that a folder implies.

    Raises ValueError as `load_reward`.
    """
    folder = Path(place_of(name))
    if (folder / REWARD_FILE).is_file():
        facts = json.loads((folder / REWARD_FILE).read_text(encoding="utf-8"))
        return find_reward(facts["reward"])[0], {**facts.get("options", {}), "folder": name}
    return _named(name), {}


def _named(spec: str) -> Any:
    """The class or function of a name or a dotted path."""
    from flowrl.reward_models import EMBEDDED, REWARDS

    if spec in REWARDS:
        return _import(REWARDS[spec], spec)
    if "/" in spec or Path(spec).is_dir():
        there = f"there is no {REWARD_FILE} in it" if Path(spec).is_dir() else "there is no such folder"
        raise ValueError(f"reward {spec!r}: {there}; `flowrl train-reward` writes one")
    module_name, _, attribute = spec.replace(":", ".").rpartition(".")
    if not module_name:
        raise ValueError(f"unknown reward {spec!r}{nearest(spec, [*REWARDS, *EMBEDDED])} (or give the dotted path of a function)")
    return _import(f"{module_name}:{attribute}", spec)


def short_labels(labels: Iterable[str]) -> dict[str, str]:
    """What metrics call each of them: a folder of `flowrl train-reward` by its last name, where no other of them is called so."""
    known = list(dict.fromkeys(labels))
    names = [Path(label).name if "/" in label and (Path(label) / REWARD_FILE).is_file() else label for label in known]
    return {label: name if names.count(name) == 1 else label for label, name in zip(known, names, strict=True)}


def load_rewards(section: Mapping[str, Any] | Sequence[Any], beside: Iterable[str] = ()) -> dict[str, tuple[Reward, float]]:
    """Rewards with their weights from {label: weight} or {label: {weight: ..., name: ..., option: ...}}, or a list of specs.

    The label is the reward's name unless `name` says otherwise: one reward may so serve twice, with other options. That of a
    folder is shortened to its last name where that is unique, among the labels of `beside` too (`short_labels`).
    Raises ValueError, in which the label comes first.
    """
    if not isinstance(section, Mapping):
        loaded = [load_reward(spec) for spec in section]
        return {_free(reward.name, i, loaded): (reward, 1.0) for i, reward in enumerate(loaded)}
    rewards = {}
    short = short_labels([*section, *beside])
    for label, value in section.items():
        try:
            if isinstance(value, Mapping):
                options = dict(value)
                weight = options.pop("weight", 1.0)
                reward = load_reward(options.pop("name", label), **options)
            elif callable(value):
                reward, weight = load_reward(value), 1.0
            else:
                reward, weight = load_reward(label), value
        except (TypeError, ValueError) as error:
            raise ValueError(f"{label}: {error}") from None
        try:
            number = float(weight)
        except (TypeError, ValueError):
            raise ValueError(f"{label}: the weight {weight!r} is not a number") from None
        if not math.isfinite(number):
            raise ValueError(f"{label}: the weight {weight} is not a finite number")
        rewards[short[label]] = (reward, number)
    return rewards


def _free(name: str, index: int, all_of: list[Reward]) -> str:
    return name if sum(reward.name == name for reward in all_of) == 1 else f"{name}_{index}"


def embedded_folder(name: str) -> Path:
    """Where a reward model that ships lies."""
    from importlib.resources import files

    return Path(str(files("flowrl.assets"))) / "rewards" / name


def place_of(model: str | Path) -> str | Path:
    """The folder of a model that ships, by its name; any other folder or hub id as it is."""
    from flowrl.reward_models import EMBEDDED

    return embedded_folder(str(model)) if str(model) in EMBEDDED else model


def _words(text: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """'name key=value' -> the name, and the options with those of the text."""
    name, *words = shlex.split(text) or [text]
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"reward {text!r}: {word!r} is not key=value")
        try:
            options = {key: yaml.safe_load(value), **options}
        except yaml.YAMLError:
            fix = "quote again what has spaces, as in \"NAME 'shape={cap: 1}'\""
            raise ValueError(f"reward {text!r}: {word!r} is not valid YAML; {fix}") from None
    return name, options


def _from_folder(folder: Path, options: dict[str, Any]) -> Reward:
    from flowrl.reward_models import REWARDS

    try:
        facts = json.loads((folder / REWARD_FILE).read_text(encoding="utf-8"))
        kind, own = facts["reward"], dict(facts.get("options", {}))
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"reward {folder}: its {REWARD_FILE} cannot be read") from None
    if kind not in REWARDS:
        raise ValueError(f"reward {folder}: {REWARD_FILE} names the unknown reward {kind!r}{nearest(str(kind), REWARDS)}")
    reward = _construct(_import(REWARDS[kind], kind), kind, {**own, "folder": folder, **options})
    reward.name = folder.name
    return reward


def _construct(made: Any, spec: str, options: dict[str, Any]) -> Any:
    """A reward from a class and its options, or from a function, which has none."""
    if inspect.isclass(made):
        parameters = inspect.signature(made).parameters
        fixed = {name: p for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
        surplus = [name for name in options if name not in fixed] if len(fixed) == len(parameters) else []
        if surplus:
            raise ValueError(f"reward {spec!r} has no option {surplus[0]!r}{nearest(surplus[0], [*fixed, 'weight', 'shape'])}")
        if missing := [name for name, p in fixed.items() if p.default is p.empty and name not in options]:
            raise ValueError(f"reward {spec!r} wants {', '.join(missing)}; `flowrl rewards {spec}` says what they mean")
        made = made(**_typed(made, options))
    elif options:
        raise ValueError(f"reward {spec!r} is a function and has no options, but got {', '.join(options)}")
    return made if hasattr(made, "name") else FunctionReward(made, spec.replace(":", ".").rpartition(".")[2])


def _typed(cls: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options of the types that a class says they have: '1e-4' is a number where one is wanted. Raises ConfigError, a ValueError.

    What may be chosen, a class says itself; types that cannot be told (of a user's class) are not checked.
    """
    try:
        hints = typing.get_type_hints(cls if is_dataclass(cls) else cls.__init__)
    except (NameError, TypeError, AttributeError):
        return options
    plain = {name: hint for name, hint in hints.items() if not any(map(_is_choice, (hint, *typing.get_args(hint))))}
    return {name: coerced(value, plain[name], name) if name in plain else value for name, value in options.items()}


def _is_choice(hint: Any) -> bool:
    return typing.get_origin(hint) is Literal


def _import(path: str, spec: str) -> Any:
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a module of the user's does on import
        raise ValueError(f"reward {spec!r}: cannot import {module_name} ({type(error).__name__}: {error})") from None
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ValueError(f"reward {spec!r}: {module_name} has no function or class {attribute}")
    return found


# ------------------------------------------------------------------------------------------------ scoring


@contextmanager
def failing_as(name: str, *passing: type[Exception]) -> Iterator[None]:
    """Whatever a reward raises becomes a RewardError that names it, from its cause; exceptions in `passing` stay as they are."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (RewardError, *passing)):
            raise
        raise RewardError(f"reward {name!r} raised {type(error).__name__}: {error} (FLOWRL_TRACEBACK=1 shows where)") from error


def check_needs(reward: Any, samples: Samples, name: str) -> None:
    """Raise RewardError, with the fix, when the samples lack what the reward asks for."""
    images = samples.images
    missing = {
        "images": images is None and "this reward scores decoded pictures",
        "clips": (images is None or images.ndim != 5) and "this reward scores clips (N, F, 3, H, W), and these are pictures",
        "fps": samples.fps is None and "it wants the frame rate of the clips: set fps",
        "references": samples.references is None and "it compares with other pictures: say which with `references` in the recipe",
        "latents": samples.latents is None and "it scores latents",
    }
    for need in traits_of(reward).needs:
        if missing[need]:
            raise RewardError(f"reward {name!r} needs {need}: {missing[need]}")


def score_one(name: str, reward: Reward, samples: Samples) -> Tensor:
    """One reward of every sample, (N,) fp32 on the CPU. Raises RewardError, with its name, for whatever it raises."""
    with torch.no_grad(), failing_as(name):
        check_needs(reward, samples, name)
        return as_scores(reward(samples), len(samples), name)


def score(rewards: dict[str, Reward], samples: Samples) -> Tensor:
    """Every reward of every sample, (N, K) fp32 on the CPU, columns in the order of `rewards`. NaN where one abstains."""
    columns = [score_one(name, reward, samples) for name, reward in rewards.items()]
    return torch.stack(columns, dim=1) if columns else torch.zeros(len(samples), 0)
