"""How a sample is scored. A reward is a callable `reward(samples) -> Tensor (N,)`; NaN abstains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flowrl.reward_models import simple
from flowrl.reward_models.base import FunctionReward, Reward, RewardError, load_reward, score
from flowrl.reward_models.verify import TinyVerifier

#: Rewards by the name that a recipe uses.
REWARDS: dict[str, Callable[..., Reward]] = {
    "tiny_strict": partial(TinyVerifier, "strict"),
    "tiny_dense": partial(TinyVerifier, "dense"),
    "brightness": partial(FunctionReward, simple.brightness),
    "jpeg_size": partial(FunctionReward, simple.jpeg_size),
}

__all__ = ["REWARDS", "FunctionReward", "Reward", "RewardError", "load_reward", "score"]
