"""What a steering method sees: a model of P prompts, N particles each, whose every use is counted.

All states are (P, N, ...): particle n of prompt p. A `state` is what the pipeline's scheduler would see at a node of the time
grid, in its dtype and coordinates; `x` is the same in flow coordinates, fp32 (`flowrl.samplers.flow`). Keeping the state is what
makes a method without strength equal to the plain sampler bit for bit.
"""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from flowrl.samplers.steering.tilt import auto_strength
from flowrl.samplers.transitions import GLASS, ODE, TRANSITIONS, Transition

#: How particles go from node to node. GLASS asks the denoiser several times per step and has no density.
Move: TypeAlias = Transition | GLASS
MOVES: dict[str, type] = {**TRANSITIONS, "glass": GLASS}


@dataclass
class Counts:
    """What was spent, in samples: one call of the denoiser on a batch of 8 counts 8."""

    denoiser_calls: int = 0  #: Forward passes of the denoiser.
    denoiser_backwards: int = 0  #: Backward passes through the denoiser.
    reward_calls: int = 0  #: Samples scored; those of a latent reward included.
    reward_backwards: int = 0  #: Gradients of the reward.
    decodes: int = 0  #: Latents decoded to pictures, for the reward and for the result.


class Model(ABC):
    """P prompts of one generator and one reward, on one time grid. Subclasses say how; this class counts and checks.

    t: K + 1 node times, decreasing, from noise to the end. t_max: the largest below 1. prompts: the P texts.
    """

    #: Samples per call that a graph may hold; methods with gradients go through the prompts in parts.
    batch_size: int = 64
    #: Decoding is what a reward call costs, unless the reward reads latents.
    decodes: bool = True

    def __init__(self, t: Sequence[float], t_max: float, prompts: Sequence[str]) -> None:
        self.t, self.t_max, self.prompts = t, t_max, prompts
        self.counts = Counts()
        self.first: tuple[Tensor, Tensor] | None = None

    # -- to be written

    @abstractmethod
    def draw_start(self, n: int) -> tuple[Tensor, Tensor | None]:
        """(P, n, ...) states at node 0, pure noise; with their velocity where a generator hands them out only together."""

    @abstractmethod
    def draw_noise(self, like: Tensor) -> Tensor:
        """Standard normal, fp32, shaped like the states (P, n, ...): the next draw of the stream of each particle's place."""

    @abstractmethod
    def draw_uniform(self, n: int) -> Tensor:
        """(P, n) uniform in [0, 1), from a stream of each prompt's."""

    @abstractmethod
    def predict(self, state: Tensor, node: int) -> Tensor:
        """v at a node, (P, n, ...), with graph where gradients are enabled."""

    @abstractmethod
    def predict_at(self, x: Tensor, t: float) -> Tensor:
        """v at any time in (0, 1], (P, n, ...). x in flow coordinates."""

    @abstractmethod
    def score(self, x0: Tensor) -> Tensor:
        """Reward of clean samples x0 (flow coordinates), (P, n), NaN where it abstains; with graph where gradients are on."""

    def score_noisy(self, x: Tensor, t: float) -> Tensor:
        """A process reward's score of noisy states, (P, n), with graph. x: flow coordinates."""
        raise ValueError("this reward scores no noisy latents: give one with a method `noisy(x, t, prompts)`")

    # -- coordinates

    @property
    def steps(self) -> int:
        return len(self.t) - 1

    def flow(self, state: Tensor, node: int) -> Tensor:
        """A state in flow coordinates, fp32."""
        return state.float()

    def native(self, x: Tensor, node: int) -> Tensor:
        """Flow coordinates as the state at a node, rounded to the loop's dtype."""
        return x

    def only(self, prompts: list[int]) -> Model:
        """The same model for some of its prompts; what they spend is counted together."""
        part = copy.copy(self)
        part.prompts = [self.prompts[p] for p in prompts]
        return part

    def parts(self, n: int) -> Iterator[tuple[Model, slice]]:
        """The prompts in runs of at most `batch_size` samples with n each, for what holds a graph."""
        size = max(1, self.batch_size // n)
        for start in range(0, len(self.prompts), size):
            stop = min(start + size, len(self.prompts))
            yield self.only(list(range(start, stop))), slice(start, stop)

    # -- what methods call

    def start(self, n: int) -> Tensor:
        """(P, n, ...) states at node 0."""
        state, v = self.draw_start(n)
        if v is not None:
            self.counts.denoiser_calls += state.shape[0] * n
            self.first = (state, v)
        return state

    def velocity(self, state: Tensor, node: int) -> Tensor:
        """v at a node of the grid, (P, n, ...)."""
        if node == 0 and self.first is not None and state is self.first[0]:
            return self.first[1]
        self.counts.denoiser_calls += state.shape[0] * state.shape[1]
        return self.predict(state, node)

    def velocity_at(self, x: Tensor, t: float) -> Tensor:
        """v at a free time, (P, n, ...)."""
        self.counts.denoiser_calls += x.shape[0] * x.shape[1]
        return self.predict_at(x, t)

    def reward(self, x0: Tensor) -> Tensor:
        """Reward of clean samples, (P, n) fp32, on the device of x0. Raises ValueError that names the prompt of a NaN."""
        self.counts.reward_calls += x0.shape[0] * x0.shape[1]
        self.counts.decodes += x0.shape[0] * x0.shape[1] if self.decodes else 0
        return self._checked(self.score(x0))

    def noisy_reward(self, x: Tensor, t: float) -> Tensor:
        """A process reward of noisy states, (P, n)."""
        self.counts.reward_calls += x.shape[0] * x.shape[1]
        return self._checked(self.score_noisy(x, t))

    def flow_map(self, x: Tensor, v: Tensor, t: float, steps: int) -> Tensor:
        """Where the ODE leads from (x, t), (P, n, ...), in Euler steps of equal length; v is the velocity there, already known.

        A generator with a distilled map overrides this.
        """
        times = [t * (1 - k / steps) for k in range(steps + 1)]
        x = x - (times[0] - times[1]) * v.float()
        for s, s_next in itertools.pairwise(times[1:]):
            x = x - (s - s_next) * self.velocity_at(x, s).float()
        return x

    def _checked(self, rewards: Tensor) -> Tensor:
        bad = (~rewards.detach().isfinite()).any(1).nonzero()
        if len(bad):
            raise ValueError(
                f"the reward gave no number for a sample of {self.prompts[int(bad[0])]!r}: a potential cannot abstain, so steer "
                "only prompts that the reward scores"
            )
        return rewards


def draws_noise(move: Move) -> bool:
    return isinstance(move, GLASS) or not move.deterministic


def stochastic(model: Model, node: int, move: Move) -> bool:
    """Does the step from this node draw noise? The last one does not, except with GLASS, which keeps the marginals there too."""
    return isinstance(move, GLASS) or (draws_noise(move) and node < model.steps - 1)


def advance(model: Model, state: Tensor, v: Tensor, node: int, move: Move, shift: Tensor | None = None) -> Tensor:
    """One step from a node to the next: by `move` where it draws noise, by Euler's ODE elsewhere and at the end.

    shift: (P, N, ...) added to the mean of a stochastic step.
    """
    if isinstance(move, GLASS):
        return inner_flow(model, state, v, node, move)
    return place(model, state, v, node, move, model.draw_noise(state) if stochastic(model, node, move) else None, shift)


def place(
    model: Model, state: Tensor, v: Tensor, node: int, transition: Transition, noise: Tensor | None, shift: Tensor | None = None
) -> Tensor:
    """The next state for a given noise; None is the ODE's step. Written as `scheduler.Rollout` does, to the bit."""
    t, t_next = model.t[node], model.t[node + 1]
    x = model.flow(state, node)
    if noise is None:
        return model.native(x - (t - t_next) * v.float(), node + 1)
    law = transition.transition(x, v, t, t_next, model.t_max)
    x_next = law.sample(noise)
    return model.native(x_next if shift is None else x_next + shift, node + 1)


def inner_flow(model: Model, state: Tensor, v: Tensor, node: int, move: GLASS) -> Tensor:
    """A step of GLASS. Its first question to the denoiser is the one that v answers."""
    known = [v]

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return known.pop() if known else model.velocity_at(x, float(t.flatten()[0]))

    x, noise = model.flow(state, node), model.draw_noise(state)
    return model.native(move.sample(velocity, x, model.t[node], model.t[node + 1], noise), node + 1)


def finish(model: Model, state: Tensor, node: int, move: Move) -> Tensor:
    """From a node to the end, (P, N, ...)."""
    for i in range(node, model.steps):
        state = advance(model, state, model.velocity(state, i), i, move)
    return state


def strength_of(model: Model, tilt_strength: float | None) -> float:
    """lam: as given, or by default such that lam r spreads by 1.5 over base samples (4 of each of the first 8 prompts)."""
    if tilt_strength is not None:
        return tilt_strength
    some = model.only(list(range(min(8, len(model.prompts)))))
    return auto_strength(some.reward(some.flow(finish(some, some.start(4), 0, ODE()), some.steps)))


def gather(of_particles: Tensor, ancestors: Tensor) -> Tensor:
    """What belongs to the ancestors: out[p, n] = of_particles[p, ancestors[p, n]]. ancestors: (P, N) int64."""
    return of_particles[torch.arange(len(ancestors), device=ancestors.device)[:, None], ancestors]


# ------------------------------------------------------------------------------------------------ what comes out


@dataclass
class History:
    """Who descended from whom. t: times of the events; ess: (P,) each; ancestors: (P, N) each, the identity if nobody moved."""

    t: list[float] = field(default_factory=list)
    ess: list[Tensor] = field(default_factory=list)
    ancestors: list[Tensor] = field(default_factory=list)

    def add(self, t: float, ess: Tensor, ancestors: Tensor) -> None:
        self.t.append(t)
        self.ess.append(ess.detach().cpu())
        self.ancestors.append(ancestors.detach().cpu())

    def surviving(self, prompts: int, n: int) -> Tensor:
        """(P,): how many particles of the start have a descendant at the end."""
        roots = torch.arange(n).repeat(prompts, 1)
        for ancestors in self.ancestors:
            roots = gather(roots, ancestors)
        return torch.tensor([len(row.unique()) for row in roots])


@dataclass
class Outcome:
    """The end of a run. state: (P, N, ...) at the last node; rewards, log_weights: (P, N); chosen: (P,) the particle to return.

    log_z: (P,) estimate of log E[exp(lam r)] under the base model; NaN where the method has none. strength: lam as used.
    """

    state: Tensor
    rewards: Tensor
    chosen: Tensor
    log_weights: Tensor
    log_z: Tensor
    strength: float = 0.0
    history: History = field(default_factory=History)


class Steering(Protocol):
    """A method: a dataclass of options, checked when it is made, that runs a model."""

    def run(self, model: Model) -> Outcome:
        """Draw N particles for each prompt, and choose."""


def best(state: Tensor, rewards: Tensor, history: History | None = None, strength: float = 0.0) -> Outcome:
    """The outcome of a search: the particle with the highest reward, no weights."""
    nothing = torch.zeros_like(rewards)
    return Outcome(state, rewards, rewards.argmax(1), nothing, nothing[:, 0] * torch.nan, strength, history or History())


# ------------------------------------------------------------------------------------------------ checks of options


def move_of(value: Any) -> Any:
    """A move from itself, its name, or a mapping {name: cps, noise_level: 0.7}. Raises ValueError in one sentence."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        return value
    options = {key: option for key, option in value.items() if key != "name"}
    if value.get("name") not in MOVES:
        raise ValueError(f"transition {value.get('name')!r} is unknown: known are {', '.join(MOVES)}")
    try:
        return MOVES[value["name"]](**options)
    except TypeError as error:
        raise ValueError(f"transition {value['name']!r}: {error}") from None


def check_noisy(move: Move, gaussian: bool = False) -> None:
    """gaussian: the method needs the mean and the std of the step."""
    if not draws_noise(move):
        raise ValueError(f"{move} is deterministic: copies of a particle would never part; try transition=cps")
    if gaussian and isinstance(move, GLASS):
        raise ValueError(f"{move} has no density, which this method needs; try transition=ddim")


def check_positive(**options: float) -> None:
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"{name}={value} must be positive")


def check_times(t_from: float, t_to: float) -> None:
    if not 0 <= t_to <= t_from <= 1:
        raise ValueError(f"t_from={t_from}, t_to={t_to}: the window must satisfy 1 >= t_from >= t_to >= 0")


def check_strength(tilt_strength: float | None) -> None:
    if tilt_strength is not None and not tilt_strength >= 0:
        raise ValueError(f"tilt_strength={tilt_strength} must not be negative: turn the reward's sign instead, or use 0 for none")
