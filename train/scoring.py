"""Scores of a step's samples. A reward that waits for another machine gets each batch while the next one is drawn."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from flowrl.batch import Samples
from flowrl.reward_models.base import Reward, score_one, traits_of


class Scoring:
    """Collects batches and scores them: `submit` each, then `finish`. Use as a context: leaving it drops what still waits.

    Rewards with `traits.remote` and pointwise arity start at once, one thread each; all others score the whole step at the end:
    they would only take the cores from the sampler, or they compare samples of several batches.
    """

    def __init__(self, rewards: dict[str, Reward]):
        self.rewards = rewards
        self.early = [name for name, reward in rewards.items() if traits_of(reward).remote and traits_of(reward).arity == "point"]
        self.pools = {name: ThreadPoolExecutor(1, thread_name_prefix=f"reward {name}") for name in self.early}
        self.waiting: dict[str, list[Future[Tensor]]] = {name: [] for name in self.early}

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self.pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    def submit(self, batch: Samples) -> None:
        """A decoded batch. Raises what an earlier one has met already: there is no use in drawing on."""
        for name in self.early:
            for done in self.waiting[name]:
                if done.done():
                    done.result()
            self.waiting[name].append(self.pools[name].submit(score_one, name, self.rewards[name], batch))

    def finish(self, samples: Samples) -> Tensor:
        """(N, K) fp32 on the CPU, columns in the order of the rewards. samples: all batches as one."""
        columns = [
            torch.cat([future.result() for future in self.waiting[name]])
            if name in self.waiting
            else score_one(name, reward, samples)
            for name, reward in self.rewards.items()
        ]
        return torch.stack(columns, 1)
