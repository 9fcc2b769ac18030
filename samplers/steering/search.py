"""Search: more samples, or better noise, for the same generator; the particle with the highest reward is returned. No gradient.

BestOfN     N independent samples
ZeroOrder   a pivot noise and its neighbours
"""

from __future__ import annotations

from dataclasses import dataclass

from flowrl.samplers.steering.loop import Model, Outcome, best, check_positive, finish, transition_of
from flowrl.samplers.transitions import ODE, Transition


@dataclass(frozen=True)
class BestOfN:
    """The best of N independent samples. KL(best of N || base) = log N - (N - 1) / N, whatever the reward."""

    particles: int = 8  #: N.
    transition: Transition = ODE()  #: How each is sampled; the ODE by default.

    def __post_init__(self) -> None:
        object.__setattr__(self, "transition", transition_of(self.transition))
        check_positive(particles=self.particles)

    def run(self, model: Model) -> Outcome:
        state = finish(model, model.start(self.particles), 0, self.transition)
        return best(state, model.reward(model.flow(state, model.steps)))
