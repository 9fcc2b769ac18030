"""What flows through the loop: prompts -> samples -> scores -> steps. Dataclasses of tensors, shapes in the docstrings.

Words: N samples = P prompts x G generations, S recorded steps, K rewards. `...` stands for the latent dimensions, which are
whatever the pipeline's own scheduler sees (packed for FLUX, Qwen-Image, LTX; with frames for video).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flowrl.samplers.transitions import Gaussian, Transition


@dataclass(frozen=True)
class Prompt:
    """One prompt and the free columns that stood beside it in its file (GenEval metadata, OCR target, ...)."""

    text: str
    columns: dict[str, Any] = field(default_factory=dict)
    #: File and line that it came from; files that its columns name lie relative to it.
    place: tuple[Path, int] | None = field(default=None, compare=False, repr=False)

    @property
    def where(self) -> str:
        """The prompt as an error names it."""
        return repr(self.text) if self.place is None else f"{self.place[0]}, line {self.place[1]}"


@dataclass
class Step:
    """One recorded stochastic step of B samples, as a trajectory objective reads it.

    native, native_next: (B, ...) the state as the pipeline's scheduler saw it and the sampled next state, in the loop's dtype.
    Neighbouring steps share them. t, t_next: times in [0, 1], 1 is noise. t_max: largest grid value below 1 (the pole of some
    kernels). log_prob: (B,) fp32, mean log-density over latent dimensions under the policy that sampled. index: position in the
    schedule, 0 is the noisiest step. transition: the rule that sampled it. scale, scale_next: native over flow coordinates (see
    `flowrl.samplers.flow`), 1 for flow models. v: (B, ...) the velocity sampled from; None unless the objective asked for it.
    owner: None, or (B,) int64 where samples share states (branches): native and v then hold the U distinct states, and sample b
    stood in state owner[b]. One model call per distinct state serves all its samples.
    group: (B,) int64, equal for the samples of one prompt. process: (B,) advantage of this very step by a process reward.
    """

    native: Tensor
    native_next: Tensor
    t: float
    t_next: float
    t_max: float
    log_prob: Tensor
    index: int
    transition: Transition
    scale: float = 1.0
    scale_next: float = 1.0
    v: Tensor | None = None
    owner: Tensor | None = None
    group: Tensor | None = None
    process: Tensor | None = None

    @property
    def x(self) -> Tensor:
        """(B, ...) fp32, the state in flow coordinates."""
        return self.per_sample(self.native).float() / self.scale

    def per_sample(self, of_states: Tensor) -> Tensor:
        """Something of the distinct states (U, ...) for each sample (B, ...)."""
        return of_states if self.owner is None else of_states[self.owner.to(of_states.device)]

    @property
    def sampled_velocity(self) -> Tensor:
        """(B, ...) the velocity that each sample's step was drawn from, for objectives that need it."""
        assert self.v is not None, "the rollout did not keep its velocities"
        return self.per_sample(self.v)

    @property
    def first_samples(self) -> list[int]:
        """For each distinct state, the first sample that stood in it."""
        if self.owner is None:
            return list(range(len(self.native)))
        first = {u: b for b, u in reversed(list(enumerate(self.owner.tolist())))}
        return [first[u] for u in range(len(self.native))]

    @property
    def x_next(self) -> Tensor:
        """(B, ...) fp32, the sampled next state in flow coordinates."""
        return self.native_next.float() / self.scale_next

    def select(self, rows: Tensor) -> Step:
        """The same step of some of its samples, in this order. rows: (M,) int64."""

        def of(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows.to(values.device)]

        states, owner = of(self.owner), None
        if states is not None:
            states, owner = states.unique(return_inverse=True)
        kept = rows if states is None else states
        return replace(
            self,
            native=self.native[kept.to(self.native.device)],
            native_next=self.native_next[rows.to(self.native_next.device)],
            log_prob=self.log_prob[rows.to(self.log_prob.device)],
            v=None if self.v is None else self.v[kept.to(self.v.device)],
            owner=owner,
            group=of(self.group),
            process=of(self.process),
        )

    def gaussian(self, v: Tensor) -> Gaussian:
        """The step's distribution of next states for a velocity v (B, ...): the rule that sampled it, another policy."""
        return self.transition.transition(self.x, v, self.t, self.t_next, self.t_max)


@dataclass
class State:
    """Somewhere off the recorded path. x: (B, ...) fp32 in flow coordinates. t: (B,) in (0, 1], 1 is noise."""

    x: Tensor
    t: Tensor


@dataclass
class Noised:
    """Clean latents and the noise that they are to be told from, at times of their own: what a forward-process loss reads.

    x0, noise: (B, ...) fp32. t: (B,) in (0, 1]. group: (B,) int64, equal for the samples of one prompt. map: (B, h, w) in [0, 1],
    where the picture is good; None unless the objective asked for it.
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    group: Tensor | None = None
    map: Tensor | None = None

    @property
    def x(self) -> Tensor:
        """(B, ...) fp32, x_t = (1 - t) x0 + t noise."""
        t = self.t.to(self.x0).reshape(-1, *[1] * (self.x0.ndim - 1))
        return (1 - t) * self.x0 + t * self.noise

    @property
    def target(self) -> Tensor:
        """(B, ...) fp32, the velocity of this path: noise - x0."""
        return self.noise - self.x0


#: Where an objective asks for the velocity.
Point: TypeAlias = Step | Noised | State


@dataclass
class Samples:
    """Generated samples of one or several batches.

    latents: (N, ...) final latents, in the pipeline's coordinates. images: (N, 3, H, W) or (N, F, 3, H, W) fp32 in [0, 1].
    group: (N,) int64, equal for the G samples of one prompt. seeds: one per sample: a sample depends on nothing else.
    steps: the recorded steps, noisiest first; each holds all N samples. references: (N, R, 3, H, W) in [0, 1], R pictures to
    compare each sample with, for rewards that need them. fps: frames per second of clips. maps: (N, h, w) in [0, 1], what a
    reward says of every place. start: (N,) int64, equal for samples of one prompt that set out from one noise; None where each
    has its own. each: (N, K) the advantage by each reward alone, NaN where it abstains; None unless gradients are balanced.
    """

    prompts: list[Prompt]
    seeds: list[int]
    group: Tensor
    latents: Tensor
    images: Tensor | None = None
    steps: list[Step] = field(default_factory=list)
    references: Tensor | None = None
    fps: float | None = None
    maps: Tensor | None = None
    start: Tensor | None = None
    each: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def texts(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]

    @property
    def columns(self) -> dict[str, list[Any]]:
        """Every free column as a list of N values; None where a prompt lacks it."""
        names = dict.fromkeys(name for prompt in self.prompts for name in prompt.columns)
        return {name: [prompt.columns.get(name) for prompt in self.prompts] for name in names}

    def select(self, indices: Sequence[int] | Tensor) -> Samples:
        """Some of the samples, in this order."""
        rows = torch.as_tensor(indices, dtype=torch.int64).cpu()

        def of(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows.to(values.device)]

        return Samples(
            prompts=[self.prompts[i] for i in rows.tolist()],
            seeds=[self.seeds[i] for i in rows.tolist()],
            group=self.group[rows.to(self.group.device)],
            latents=self.latents[rows.to(self.latents.device)],
            images=of(self.images),
            steps=[step.select(rows) for step in self.steps],
            references=of(self.references),
            fps=self.fps,
            maps=of(self.maps),
            start=of(self.start),
            each=of(self.each),
        )

    def by_group(self) -> list[Tensor]:
        """The indices of each prompt's samples, (G,) int64 each, groups in the order of their first sample."""
        return _places(self.group.tolist())

    def by_start(self) -> list[Tensor]:
        """The same of samples that share prompt and start; `by_group` where each sample has its own start."""
        if self.start is None:
            return self.by_group()
        return _places(list(zip(self.group.tolist(), self.start.tolist(), strict=True)))

    @property
    def trajectory_bytes(self) -> int:
        """Memory of the recorded steps, in bytes; a tensor that two steps share counts once."""
        kept = [t for step in self.steps for t in (step.native, step.native_next, step.log_prob, step.v) if t is not None]
        return sum({t.data_ptr(): t.nbytes for t in kept}.values())


def _places(keys: Sequence[Hashable]) -> list[Tensor]:
    """Where each distinct key stands, keys in the order of their first appearance."""
    places: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        places.setdefault(key, []).append(i)
    return [torch.tensor(indices) for indices in places.values()]


def merged(parts: Sequence[Samples], rows: Sequence[Sequence[int]]) -> Samples:
    """Samples that were drawn apart as one batch, with their steps, which are at the same places of the schedule.

    rows: for each part, where its samples belong.
    """
    order = torch.tensor([row for part in rows for row in part]).argsort()
    known: dict[tuple[int, ...], Tensor] = {}

    def joined(tensors: Sequence[Any]) -> Any:
        """One tensor of several; what steps share they go on sharing."""
        if tensors[0] is None:
            return None
        key = tuple(map(id, tensors))
        if key not in known:
            known[key] = torch.cat(list(tensors))[order.to(tensors[0].device)]
        return known[key]

    kept = ("native", "native_next", "log_prob", "v", "group", "process")
    steps = [
        replace(same[0], **{name: joined([getattr(step, name) for step in same]) for name in kept})
        for same in zip(*(part.steps for part in parts), strict=True)
    ]
    whole = concatenate(list(parts)).select(order)
    whole.steps = steps
    return whole


def concatenate(parts: list[Samples]) -> Samples:
    """Several batches as one, without their recorded steps (those stay in the batches that the update replays)."""

    def of(values: list[Tensor | None]) -> Tensor | None:
        known = [value for value in values if value is not None]
        return torch.cat(known) if len(known) == len(parts) else None

    images = [part.images[0] for part in parts if part.images is not None]
    if len(images) == len(parts):
        check_alike(images, [repr(part.texts[0]) for part in parts])
    return Samples(
        prompts=[prompt for part in parts for prompt in part.prompts],
        seeds=[seed for part in parts for seed in part.seeds],
        group=torch.cat([part.group for part in parts]),
        latents=torch.cat([part.latents for part in parts]),
        images=of([part.images for part in parts]),
        references=of([part.references for part in parts]),
        fps=parts[0].fps,
        maps=of([part.maps for part in parts]),
        start=of([part.start for part in parts]),
        each=of([part.each for part in parts]),
    )


def stacked(pictures: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """Pictures (N, 3, H, W) or clips (N, F, 3, H, W) of single ones. Raises as `check_alike`."""
    check_alike(pictures, names)
    return torch.stack(list(pictures))


def check_alike(pictures: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise ValueError where pictures (3, H, W) or clips (F, 3, H, W) differ in length or size; it names the first two."""
    first = pictures[0].shape
    for picture, name in zip(pictures, names, strict=True):
        if picture.shape == first:
            continue
        lengths = [f"{shape[0]} frames" if len(shape) == 4 else "one picture" for shape in (first, picture.shape)]
        sizes = [f"{shape[-1]} x {shape[-2]} pixels" for shape in (first, picture.shape)]
        what, (ours, theirs) = ("lengths", lengths) if lengths[0] != lengths[1] else ("sizes", sizes)
        raise ValueError(f"clips or pictures of different {what} in one batch: {names[0]} has {ours}, {name} has {theirs}")


@dataclass
class Loss:
    """What an objective returns: values (n,) fp32 with graph, and detached metrics, each a tensor or a float.

    values: one per sample, per pair or per group: the loop takes their mean over the whole update. penalty: (n,) likewise, added
    to them, what does not depend on the advantages (a pull towards the reference): balancing leaves it alone.
    """

    values: Tensor
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)
    penalty: Tensor | None = None

    @property
    def total(self) -> Tensor:
        return self.values if self.penalty is None else self.values + self.penalty
