"""What a reward is: a callable from samples to one number each, higher is better, NaN where it abstains.

    reward(samples) -> Tensor (N,)

A plain function `def f(images, prompts, **columns) -> list[float | None]` is a reward too, and so is its dotted path. It gets
images as a tensor (N, 3, H, W) in [0, 1] (clips: (N, F, 3, H, W)), or as PIL pictures when it has the attribute `pil = True`,
and those columns of the prompt file that it names (all of them with **columns). None abstains.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from flowrl.batch import Samples


class Reward(Protocol):
    """A scorer. Stateful ones are classes; `name` is how metrics call it."""

    name: str

    def __call__(self, samples: Samples) -> Tensor:
        """(N,) fp32 on the CPU, higher is better, NaN abstains."""


class RewardError(RuntimeError):
    """A scorer broke its contract or failed; the message names the reward and what it did."""


class FunctionReward:
    """A plain function as a reward. Raises RewardError when it returns the wrong number or type of values."""

    def __init__(self, function: Callable[..., Any], name: str | None = None):
        self.function = function
        self.name = str(name or getattr(function, "__name__", type(function).__name__))
        parameters = inspect.signature(function).parameters
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.parameters = set(parameters)

    def __call__(self, samples: Samples) -> Tensor:
        assert samples.images is not None, "rewards score decoded samples"
        images = to_pil(samples.images) if getattr(self.function, "pil", False) else samples.images
        columns = {name: values for name, values in samples.columns.items() if self.takes_all or name in self.parameters}
        return as_scores(self.function(images, samples.texts, **columns), len(samples), self.name)


def as_scores(values: Any, count: int, name: str) -> Tensor:
    """What a scorer returned, as (count,) fp32 on the CPU, None as NaN; a tensor keeps its graph, for those who climb gradients.

    Raises RewardError on anything else.
    """
    if isinstance(values, Tensor):
        scores = values.float().cpu()
    else:
        try:
            scores = torch.tensor([float("nan") if value is None else float(value) for value in values])
        except (TypeError, ValueError):
            raise RewardError(
                f"reward {name!r} returned {type(values).__name__} instead of one number (or None) per sample"
            ) from None
    if scores.shape != (count,):
        raise RewardError(f"reward {name!r} returned values of shape {tuple(scores.shape)} for {count} samples")
    if scores.isinf().any():
        raise RewardError(f"reward {name!r} returned infinity for sample {int(scores.isinf().nonzero()[0])}")
    return scores


def to_pil(images: Tensor) -> list[Any]:
    """(N, 3, H, W) in [0, 1] -> N PIL pictures; clips (N, F, 3, H, W) -> N lists of F."""
    from PIL import Image

    def one(image: Tensor) -> Any:
        if image.ndim == 4:
            return [one(frame) for frame in image]
        return Image.fromarray(image.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())

    return [one(image) for image in images]


def nearest(name: str, known: Iterable[str]) -> str:
    """', did you mean ...?' for an unknown name, or the list of known ones."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else f"; known are {', '.join(known)}"


def load_reward(spec: Any, **options: Any) -> Reward:
    """A reward from its name, the dotted path of a function (`my_package.my_module.my_function`), a function, or a Reward.

    options go to the named reward's constructor. Raises ValueError for unknown names (with the nearest known ones), for paths
    that cannot be imported and for options that the reward does not have.
    """
    from flowrl.reward_models import REWARDS

    if not isinstance(spec, str):
        return spec if hasattr(spec, "name") else FunctionReward(spec)
    if spec in REWARDS:
        try:
            return REWARDS[spec](**options)
        except TypeError as error:
            raise ValueError(f"reward {spec!r}: {error}") from None
    module_name, _, function_name = spec.replace(":", ".").rpartition(".")
    if not module_name:
        raise ValueError(f"unknown reward {spec!r}{nearest(spec, REWARDS)} (or give the dotted path of a function)")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a module of the user's does on import
        raise ValueError(f"reward {spec!r}: cannot import {module_name} ({type(error).__name__}: {error})") from None
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"reward {spec!r}: {module_name} has no function or class {function_name}")
    if inspect.isclass(function):
        try:
            function = function(**options)
        except TypeError as error:
            raise ValueError(f"reward {spec!r}: {error}") from None
    elif options:
        raise ValueError(f"reward {spec!r} is a function and has no options, but got {', '.join(options)}")
    return function if hasattr(function, "name") else FunctionReward(function, function_name)


@contextmanager
def failing_as(name: str, *passing: type[Exception]) -> Iterator[None]:
    """Whatever a reward raises becomes a RewardError that names it, from its cause; exceptions in `passing` stay as they are."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (RewardError, *passing)):
            raise
        raise RewardError(f"reward {name!r} raised {type(error).__name__}: {error} (FLOWRL_TRACEBACK=1 shows where)") from error


def score(rewards: dict[str, Reward], samples: Samples) -> Tensor:
    """Every reward of every sample, (N, K) fp32 on the CPU, columns in the order of `rewards`.

    Raises RewardError, with the reward's name, for whatever a scorer raises.
    """
    columns = []
    for name, reward in rewards.items():
        with torch.no_grad(), failing_as(name):
            values = reward(samples)
        columns.append(as_scores(values, len(samples), name))
    return torch.stack(columns, dim=1) if columns else torch.zeros(len(samples), 0)
