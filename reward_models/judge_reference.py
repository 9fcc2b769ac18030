"""Better than a reference picture: RewardDance, arXiv 2509.08826, and the several tasks of OneReward, arXiv 2508.21066."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowrl.batch import Samples
from flowrl.reward_models.base import Traits
from flowrl.reward_models.judge_client import Judge, Order, check_choice, check_weights, columns_of, fill
from flowrl.reward_models.judge_read import yes_probability
from flowrl.reward_models.win_rate import coin

BETTER_THAN_REFERENCE = (
    "Two pictures were made for this prompt: {prompt}\n{instruction}\nIs the second picture better than the first? "
    "Answer yes or no first, then give your reasons."
)
OVERALL = "Judge how closely they follow the prompt and how good they look."


@dataclass(kw_only=True, eq=False)
class Reference(Judge):
    """Is the sample x better than reference pictures x' of its prompt? In [0, 1]; 1/2 is as good.

        r = mean over references x' and tasks k of (P(yes | x', x, y, i_k) + 1 - P(yes | x, x', y, i_k)) / 2

    The question is whether the second picture is better. References are best-of-N pictures of the base model (RewardDance), of an
    earlier policy (OneReward), or of a folder: the loop provides them. OneReward's tasks and criteria are `tasks`; those count
    that the prompt's column `task` names (one, or a list), all of them where it has no such column. A sample to which none
    applies abstains, and so does one for which none of a task's comparisons can be read.
    """

    #: Asked in both orders. {instruction} stands for the task's, {prompt} and columns as in `judge`.
    question: str = BETTER_THAN_REFERENCE
    #: What to look at, by the name of the task.
    tasks: dict[str, str] = field(default_factory=lambda: {"overall": OVERALL})
    #: Weight of each task; 1 where it is not named.
    weights: dict[str, float] = field(default_factory=dict)
    #: both, or random: one order per reference, by a coin that depends on the seed.
    order: Order = "both"

    name: ClassVar[str] = "reference_judge"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise ValueError("tasks: at least one, {name: instruction}")
        check_choice("order", self.order, ("both", "random"))
        check_weights(self.weights, tuple(self.tasks))

    @property
    def traits(self) -> Traits:
        return Traits(
            needs=("images", "references"),
            columns=columns_of(self.question, "instruction"),
            range=(0.0, 1.0),
            remote=True,
            licence="see model card",
        )

    def __call__(self, samples: Samples) -> Tensor:
        assert samples.images is not None and samples.references is not None
        count = samples.references.shape[1]
        pictures, references = self.pictures(samples.images), self.pictures(samples.references.flatten(0, 1))
        applies = torch.zeros(len(samples), len(self.tasks), dtype=torch.bool)
        asked, questions = [], []
        for i, prompt in enumerate(samples.prompts):
            for k, (task, instruction) in enumerate(self.tasks.items()):
                text = fill(self.question, prompt, instruction=instruction)
                if text is None or not _named(prompt.columns.get("task"), task):
                    continue
                applies[i, k] = True
                for r in range(count):
                    shown = (references[i * count + r], pictures[i])
                    for swapped in (False, True) if self.order == "both" else (coin(samples.seeds[i], r),):
                        asked.append((int(swapped), i, k, r))
                        questions.append([*(reversed(shown) if swapped else shown), text])
        answers = self.ask(questions)
        p_yes = self.read([yes_probability(answer.first) for answer in answers], answers)
        better = torch.full((2, len(samples), len(self.tasks), count), torch.nan, dtype=torch.float64)
        for place, p in zip(asked, p_yes, strict=True):
            better[place] = 1 - p if place[0] else p
        of_pair = better.mean(0) if self.order == "both" else better.nanmean(0)
        weights = applies * torch.tensor([float(self.weights.get(task, 1.0)) for task in self.tasks])
        of_task = torch.where(applies, of_pair.nanmean(2), 0.0)
        return ((of_task * weights).sum(1) / weights.sum(1)).float()  # 0 / 0, where no task applies, is NaN


def _named(tasks: Any, task: str) -> bool:
    """Whether a prompt's column `task` (a name, a list of names, or nothing) says that a task counts."""
    return tasks is None or task == tasks or (not isinstance(tasks, str) and task in tasks)
