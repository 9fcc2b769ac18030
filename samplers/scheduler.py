"""The seam: a diffusers pipeline driven from inside, through its scheduler.

A pipeline's own `__call__` is the policy. We hand it a scheduler of its own class whose loop is driven by one of four
drives, and nothing of the pipeline is copied:

    Rollout   serve every step, replace the solver's rule by a `Transition`, record the stochastic steps
    Trunk     serve the first steps by the ODE, hand back the state there and its velocity, stop the call
    Replay    serve exactly one step at an injected state, hand back the model output with its graph, stop the call
    Decode    serve no step at all: the call's tail decodes the injected latents

The schedule always stays whole (pipelines read its length, slice it, index `sigmas[i]`); only its *iteration* is ours:
steps that must not run are skipped through the pipeline's own `interrupt` property. The state goes in below `latents=`, as
the first result of `prepare_latents`, so it has the layout that the loop has.

Everything a drive computes is in flow coordinates (`flowrl.samplers.flow`): eps- and v-prediction models (SD1.5, SDXL) are the
same flow on another chart, with DDIM's time grid.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from flowrl.batch import Step
from flowrl.samplers import flow
from flowrl.samplers.solvers import SOLVERS, DPMpp2M
from flowrl.samplers.transitions import ODE, Transition


class Unservable(ValueError):
    """A pipeline that the seam cannot drive; the message says why."""


class _Recorded(Exception):
    """Raised by a replay's `step` once it has what it came for."""


# ------------------------------------------------------------------------------------------------ the time grid


class Grid:
    """The schedule that a scheduler was set to, in flow time.

    t: N+1 floats in [0, 1], decreasing, the last one the end. timesteps: (N,) what the model is told. t_max: the largest t < 1.
    """

    def __init__(self, scheduler: Any):
        self.timesteps: Tensor = scheduler.timesteps.as_subclass(Tensor)
        self.is_flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        self.num_train_timesteps: int = scheduler.config.num_train_timesteps
        if self.is_flow:
            self.t = [float(sigma) for sigma in scheduler.sigmas]
        else:
            self.prediction: str = scheduler.config.prediction_type
            self.alphas: Tensor = scheduler.alphas_cumprod
            final = torch.as_tensor(scheduler.final_alpha_cumprod).reshape(1).to(self.alphas)
            levels = torch.cat([self.alphas[self.timesteps.cpu().long()], final])
            self.t = [float(t) for t in flow.vp_time(levels.double())]
        below_one = [t for t in self.t if t < 1 - 1e-6]
        self.t_max = max(below_one)

    def scale(self, t: float) -> float:
        """c(t): the pipeline's state is c * x, with x in flow coordinates. 1 for flow models."""
        return 1.0 if self.is_flow else float(flow.vp_scale(t))

    def to_native(self, x: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
        """A state in flow coordinates at per-sample times (B,) as the pipeline has it."""
        return (x if self.is_flow else x * flow.expand(flow.vp_scale(t), x)).to(dtype)

    def velocity(self, native: Tensor, output: Tensor, t: float | Tensor) -> Tensor:
        """The model's output as a flow velocity v = eps - x0, (B, ...)."""
        return output if self.is_flow else flow.vp_velocity(native, output, t, self.prediction)

    def ode_step(self, native: Tensor, v: Tensor, i: int, following: int) -> Tensor:
        """Euler's step of the flow from node i to node `following`, in the pipeline's coordinates."""
        t, t_next = self.t[i], self.t[following]
        x = native.float() / self.scale(t) - (t - t_next) * v.float()
        return (self.scale(t_next) * x).to(native.dtype)

    def model_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """What to tell the model for flow times t (B,), and the flow times that this really means.

        Flow models take any real time. The others know `num_train_timesteps` noise levels: t is moved to the nearest one.
        """
        if self.is_flow:
            return t * self.num_train_timesteps, t
        levels = flow.vp_time(self.alphas.double()).to(t.device)  # increasing
        nearest = (t.double()[:, None] - levels[None]).abs().argmin(dim=1)
        return nearest, levels[nearest].float()


# ------------------------------------------------------------------------------------------------ what the loop iterates over


class Schedule(torch.Tensor):
    """The whole schedule as a tensor; iterating over it is the drive's affair. Slices (image-to-image) remember their offset."""

    drive: Drive
    offset: int

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    @classmethod
    def of(cls, timesteps: Tensor, drive: Drive, offset: int = 0) -> Schedule:
        schedule = timesteps.as_subclass(cls)
        schedule.drive, schedule.offset = drive, offset
        return schedule

    def __getitem__(self, item: Any) -> Tensor:
        picked = self.as_subclass(Tensor)[item]
        if isinstance(item, slice) and item.step in (None, 1):
            return Schedule.of(picked, self.drive, self.offset + item.indices(len(self))[0])
        return picked

    def __iter__(self) -> Iterator[Tensor]:
        return self.drive.iterate(self.as_subclass(Tensor), self.offset)

    def __deepcopy__(self, memo: dict) -> Schedule:
        return Schedule.of(self.as_subclass(Tensor).clone(), self.drive, self.offset)


class Row(torch.Tensor):
    """One time per sample, (B,), that a pipeline may treat as the scalar t of a step.

    `expand(n)` and `repeat(n)` tile it over the batch (guidance doubles the batch); a comparison must have one answer for
    the whole batch (two-expert models: group samples by expert), or it is refused.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Stay a row through casts and arithmetic; anything of another shape (an embedding) is a plain tensor."""
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(Tensor) if isinstance(result, Row) and result.ndim != 1 else result

    def expand(self, *sizes: Any) -> Tensor:  # type: ignore[override]
        row = self.as_subclass(Tensor)
        size = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        times, rest = divmod(int(size[0]), row.shape[0])
        if len(size) != 1 or rest:
            raise Unservable(
                f"this pipeline expands the time of a step to {tuple(size)}, which does not fit {row.shape[0]} samples"
            )
        return row.repeat(times)

    def repeat(self, *sizes: Any) -> Tensor:
        return self.expand(int(sizes[0]) if int(sizes[0]) >= self.shape[0] else int(sizes[0]) * self.shape[0])

    def __getitem__(self, item: Any) -> Tensor:
        return self if item is None else super().__getitem__(item)

    def unsqueeze(self, dim: int) -> Tensor:
        return self

    def _one_answer(self, answers: Tensor) -> bool:
        answers = answers.as_subclass(Tensor)
        if not (answers.all() or not answers.any()):
            raise Unservable(
                "this pipeline decides by the step's time (two experts?): group samples so that all fall on one side"
            )
        return bool(answers.all())

    def __ge__(self, other: Any) -> Any:
        return self._one_answer(super().__ge__(other))

    def __gt__(self, other: Any) -> Any:
        return self._one_answer(super().__gt__(other))

    def __le__(self, other: Any) -> Any:
        return self._one_answer(super().__le__(other))

    def __lt__(self, other: Any) -> Any:
        return self._one_answer(super().__lt__(other))


# ------------------------------------------------------------------------------------------------ the drives


class Drive:
    """Base of the drives: knows the pipeline, the grid once it is set, and the step that is being served."""

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.index = 0
        self.grid: Grid  # once the pipeline has set its timesteps
        self.scheduler: Any = None

    def serve(self, scheduler: Any) -> Tensor:
        self.scheduler, self.grid = scheduler, Grid(scheduler)
        return Schedule.of(scheduler.timesteps, self)

    def iterate(self, timesteps: Tensor, offset: int) -> Iterator[Tensor]:
        raise NotImplementedError

    def only(self, served: Container[int], timesteps: Tensor, offset: int) -> Iterator[Tensor]:
        """Run the steps in `served`; the pipeline passes over the others, where it can be told to, or never sees them."""
        interruptible = hasattr(type(self.pipe), "interrupt")
        for i, t in enumerate(timesteps, offset):
            if i in served:
                self.index = self.scheduler._step_index = i
            elif not interruptible:
                continue
            self.pipe._interrupt = i not in served
            yield t
        self.pipe._interrupt = False

    def step(self, output: Tensor, native: Tensor) -> Tensor:
        raise NotImplementedError


class Rollout(Drive):
    """Sample a trajectory. Steps in `stochastic` follow `transition` and are recorded; the others follow the ODE.

    generators: one per sample, for the noise of the steps. keep_velocity: store v with each step. solver: one of `SOLVERS`.
    record: steps of the ODE to record too, as deterministic ones.
    start, stop, stride: visit only the grid's nodes start, start + stride, ..., stop (the end unless given), in as many steps.
    """

    def __init__(
        self,
        pipe: Any,
        transition: Transition,
        stochastic: list[int],
        generators: list[torch.Generator],
        keep_velocity: bool = False,
        start: int = 0,
        stop: int | None = None,
        stride: int = 1,
        solver: str = "euler",
        record: Sequence[int] = (),
    ):
        super().__init__(pipe)
        if solver not in SOLVERS:
            raise ValueError(f"solver={solver!r} is unknown: use {' or '.join(map(repr, SOLVERS))}")
        self.multistep = DPMpp2M() if solver == "dpmpp2m" else None
        self.transition, self.stochastic, self.generators = transition, frozenset(stochastic), generators
        self.keep_velocity, self.record = keep_velocity, frozenset(record)
        self.start, self.stop, self.stride = start, stop, stride
        self.steps: list[Step] = []
        self.latents: Tensor | None = None

    def iterate(self, timesteps: Tensor, offset: int) -> Iterator[Tensor]:
        end = len(self.grid.t) - 1 if self.stop is None else self.stop
        nodes = [*range(self.start, end, self.stride), end]
        self.following = dict(itertools.pairwise(nodes))
        return self.only(self.following, timesteps, offset)

    def step(self, output: Tensor, native: Tensor) -> Tensor:
        grid, i = self.grid, self.index
        following = self.following[i]
        v = grid.velocity(native, output, grid.t[i])
        if i not in self.stochastic:
            self.latents = self.ode_step(native, v, i, following)
            if i in self.record:
                self.steps.append(self._deterministic(native, v, i, following))
            return self.latents
        if self.multistep:
            self.multistep.reset()
        noise = randn_tensor(native.shape, generator=self.generators, device=native.device, dtype=torch.float32)
        step = stochastic_step(grid, self.transition, native, v, i, following, noise)
        # Clones: some pipelines write the next state in place.
        before = self.steps[-1] if self.steps and self.steps[-1].index == i - 1 else None
        shared = before.native_next if before is not None and torch.equal(before.native_next, native) else None
        step.native = native.clone() if shared is None else shared
        self.latents, step.native_next = step.native_next, step.native_next.clone()
        step.v = v.clone() if self.keep_velocity else None
        self.steps.append(step)
        return self.latents

    def _deterministic(self, native: Tensor, v: Tensor, i: int, following: int) -> Step:
        grid, end = self.grid, self.latents
        assert end is not None
        return Step(
            native=native.clone(),
            native_next=end.clone(),
            t=grid.t[i],
            t_next=grid.t[following],
            t_max=grid.t_max,
            log_prob=torch.zeros(len(native)),
            index=i,
            transition=ODE(),
            scale=grid.scale(grid.t[i]),
            scale_next=grid.scale(grid.t[following]),
            v=v.clone() if self.keep_velocity else None,
        )

    def ode_step(self, native: Tensor, v: Tensor, i: int, following: int) -> Tensor:
        grid = self.grid
        if self.multistep is None:
            return grid.ode_step(native, v, i, following)
        t, t_next = grid.t[i], grid.t[following]
        x_next = self.multistep.step(native.float() / grid.scale(t), v, t, t_next, last=following == len(grid.t) - 1)
        return (grid.scale(t_next) * x_next).to(native.dtype)


class Trunk(Rollout):
    """Walk the ODE to node `stop`, look there, and stop the call. native, velocity: (B, ...), the state and the answer."""

    native: Tensor
    velocity: Tensor

    def __init__(self, pipe: Any, start: int, stop: int, solver: str = "euler"):
        super().__init__(pipe, ODE(), [], [], start=start, stop=stop + 1, solver=solver)
        self.node = stop

    def step(self, output: Tensor, native: Tensor) -> Tensor:
        if self.index < self.node:
            return super().step(output, native)
        self.native, self.velocity = native.clone(), self.grid.velocity(native, output, self.grid.t[self.index])
        raise _Recorded


def stochastic_step(
    grid: Grid, transition: Transition, native: Tensor, v: Tensor, i: int, following: int, noise: Tensor,
    owner: Tensor | None = None, lean: Tensor | None = None,
) -> Step:  # fmt: skip
    """Draw the next states from node i to node `following` and record them. native, v: (U, ...) the distinct states.

    noise: (B, ...) fp32, one per sample; owner: (B,) the state of each sample where several share one, else B = U.
    lean: (U, ...) added to the mean where the states are drawn, and not to the law that their log-prob is of.
    """
    t, t_next = grid.t[i], grid.t[following]
    step = Step(
        native=native,
        native_next=native,
        t=t,
        t_next=t_next,
        t_max=grid.t_max,
        log_prob=torch.empty(0),
        index=i,
        transition=transition,
        scale=grid.scale(t),
        scale_next=grid.scale(t_next),
        owner=owner,
    )
    gaussian = step.gaussian(step.per_sample(v))
    # Rounded to the loop's dtype before its log-prob is taken: a replay reads the rounded state.
    x_next = gaussian.sample(noise) if lean is None else gaussian.sample(noise) + step.per_sample(lean)
    step.native_next = (step.scale_next * x_next).to(native.dtype)
    step.log_prob = gaussian.log_prob(step.x_next)
    return step


class Replay(Drive):
    """One model call at a given state: at step `index` of the schedule, or at per-sample flow times `t` (B,).

    After the call: `velocity` (B, ...), with its graph, and `native`, the state as the model saw it.
    """

    def __init__(self, pipe: Any, index: int | None = None, t: Tensor | None = None):
        super().__init__(pipe)
        self.target, self.times = index if index is not None else 0, t
        self.velocity: Tensor | None = None

    def serve(self, scheduler: Any) -> Tensor:
        schedule = super().serve(scheduler)
        if self.times is not None:
            # Which step the loop believes to be in: the first one at or below the noisiest requested time.
            noisiest = float(self.times.max())
            self.target = next((i for i, t in enumerate(self.grid.t[:-1]) if t <= noisiest + 1e-6), len(self.grid.t) - 2)
        elif not 0 <= self.target < len(scheduler.timesteps):
            raise IndexError(f"step {self.target} of a schedule of {len(scheduler.timesteps)} steps")
        return schedule

    def iterate(self, timesteps: Tensor, offset: int) -> Iterator[Tensor]:
        for t in self.only([self.target], timesteps, offset):
            if self.times is not None:
                t = self.grid.model_time(self.times)[0].to(t.device).as_subclass(Row)
            yield t

    def step(self, output: Tensor, native: Tensor) -> Tensor:
        t = self.grid.t[self.index] if self.times is None else self.grid.model_time(self.times)[1]
        self.velocity = self.grid.velocity(native, output, t)
        raise _Recorded


class Decode(Drive):
    """No step is served; the pipeline decodes the injected latents."""

    def iterate(self, timesteps: Tensor, offset: int) -> Iterator[Tensor]:
        self.pipe._interrupt = False
        return iter(())


# ------------------------------------------------------------------------------------------------ the scheduler


@functools.cache
def _driven_class(base: Any) -> type:
    """A subclass of `base` with its name and signatures (pipelines inspect both), whose loop belongs to a drive."""

    class Driven(base):  # type: ignore[misc, valid-type]
        order = 1
        drive: Drive

        @functools.wraps(base.set_timesteps)
        def set_timesteps(self, *args, **kwargs):
            base.set_timesteps(self, *args, **kwargs)
            self.timesteps = self.drive.serve(self)

        @functools.wraps(base.step)
        def step(self, model_output, timestep, sample, *args, return_dict=True, **kwargs):
            following = self.drive.step(model_output, sample)
            return SchedulerOutput(prev_sample=following) if return_dict else (following,)

    Driven.__name__ = Driven.__qualname__ = base.__name__
    return Driven


def one_step_scheduler(scheduler: Any) -> Any:
    """The scheduler that the seam drives for a pipeline that came with `scheduler`: flow Euler, or DDIM on the same noise levels.

    A multistep solver has no transition density, so its rule is replaced; the model and its noise levels stay.
    Raises `Unservable` for schedules that neither covers.
    """
    config = scheduler.config
    name = type(scheduler).__name__
    if config.get("invert_sigmas", False):
        raise Unservable(f"{name}: inverted sigmas (data at 1) are not supported")
    if type(scheduler) is FlowMatchEulerDiscreteScheduler:
        return FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=False)
    if config.get("use_flow_sigmas", False) or config.get("prediction_type") == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=config.num_train_timesteps,
            shift=config.get("flow_shift", 1.0) or 1.0,
            use_dynamic_shifting=config.get("use_dynamic_shifting", False),
        )
    if config.get("beta_schedule") and config.get("prediction_type", "epsilon") in (
        "epsilon",
        "v_prediction",
        "sample",
    ):
        if config.get("rescale_betas_zero_snr", False) and config.get("prediction_type") == "epsilon":
            raise Unservable(f"{name}: noise prediction with zero terminal SNR has no clean estimate at its first step")
        own = {key: value for key, value in config.items() if key != "snr_shift_scale"}
        ddim = DDIMScheduler.from_config(own, clip_sample=False, thresholding=False, set_alpha_to_one=False)
        if "snr_shift_scale" in config:  # CogVideoX moves its noise levels to where DDIM's options do not reach
            ddim.alphas_cumprod = scheduler.alphas_cumprod.float()
            ddim.final_alpha_cumprod = scheduler.final_alpha_cumprod
        return ddim
    raise Unservable(f"{name}: neither a flow-matching schedule nor a beta schedule with epsilon, v or sample prediction")


@contextmanager
def driven(pipe: Any, drive: Drive, latents: Tensor | None = None) -> Iterator[None]:
    """Hand the pipeline's loop to `drive`; with `latents`, start it from that state. Everything is put back afterwards."""
    own = pipe.scheduler
    base: Any = type(own)
    scheduler = copy.copy(own)
    scheduler.__class__ = _driven_class(base)
    scheduler.drive = drive
    pipe.scheduler = scheduler
    if latents is not None:
        prepare = pipe.prepare_latents

        @functools.wraps(prepare)
        def injected(*args, **kwargs):
            prepared = prepare(*args, **kwargs)
            first = prepared[0] if isinstance(prepared, tuple) else prepared
            if first.shape != latents.shape:
                raise ValueError(
                    f"latents of shape {tuple(latents.shape)} do not fit this call, which works on {tuple(first.shape)}"
                )
            state = latents.to(device=first.device, dtype=first.dtype)
            return (state, *prepared[1:]) if isinstance(prepared, tuple) else state

        pipe.prepare_latents = injected
    try:
        yield
    except _Recorded:
        pass
    finally:
        pipe.scheduler = own
        if latents is not None:
            del pipe.prepare_latents
