"""A diffusers pipeline seen as an RL policy: rollout, velocity with gradient, decode, and the weights it can wear.

    policy = Policy.load("tiny-sd3")
    policy.add_lora(rank=16)
    samples = policy.rollout(["a red circle"] * 8, seeds=range(8), transition=CPS(0.8), stochastic=[2, 3, 4])
    v = policy.velocity(samples.prompts, samples.steps[0])          # with graph, equal to the rollout's
    with policy.using("reference"):
        v_ref = policy.velocity(samples.prompts, samples.steps[0])  # adapters off

No pipeline is copied or patched for good: `samplers/scheduler.py` drives the pipeline's own `__call__` through its scheduler.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.attention import set_backend
from flowrl.batch import Prompt, Samples, Step, merged
from flowrl.clips import check_rate
from flowrl.conditions import BLANK, ConditionMemo, by_condition, check_conditions, condition_of, picture_of
from flowrl.data import generators
from flowrl.model_facts import DEFAULTS_FILE, ModelFacts, defaults_of
from flowrl.samplers.scheduler import Decode, Grid, Replay, Rollout, Trunk, Unservable, driven, one_step_scheduler
from flowrl.samplers.transitions import ODE, Transition
from flowrl.slices import sliced
from flowrl.tiny import model_path

#: Models that come with the library, by name.
EMBEDDED = ("tiny-sd3", "tiny-wan")
DENOISERS = ("transformer", "transformer_2", "unet")
#: Which attention projections a LoRA adapts when nothing is said: those of diffusers' own training scripts.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LORA_FILE = "pytorch_lora_weights.safetensors"


class Policy:
    """A pipeline as a policy. `call` holds the pipeline's call arguments that rollout, replay and decode share.

    pipe: any diffusers pipeline that the seam serves (`Unservable` says why not). Its weights are frozen, in eval mode.
    autocast: None, or the dtype of the denoiser's autocast (weights keep their own). fps: frames per second of its clips, by
    default what the call says, or what is usual for the pipeline.
    """

    def __init__(
        self, pipe: Any, call: dict[str, Any] | None = None, autocast: torch.dtype | None = None, fps: float | None = None
    ):
        self.pipe = pipe
        self.call: dict[str, Any] = dict(call or {})
        self.facts = ModelFacts.of(pipe)
        if fps is not None:
            self.set_fps(fps)
        self.autocast_dtype = autocast
        self._raw_call = _undecorated_call(pipe)
        _check_servable(pipe)
        pipe.scheduler = one_step_scheduler(pipe.scheduler)
        pipe.set_progress_bar_config(disable=True)
        self.denoisers: dict[str, Any] = {
            name: module for name in DENOISERS if isinstance(module := getattr(pipe, name, None), nn.Module)
        }
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        self.has_lora = False
        self.snapshots: dict[str, dict[str, Tensor]] = {}
        self.wearing = "policy"
        self._memo = _PromptMemo(pipe)
        self._conditions = ConditionMemo(pipe)
        self._grids: dict[str, Grid] = {}

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        lora: str | Path | None = None,
        dtype: str = "float32",
        autocast: str | None = None,
        device: str | torch.device | None = None,
        attention_backend: str | None = None,
        fps: float | None = None,
        **call: Any,
    ) -> Policy:
        """Load a pipeline directory, a hub id or an embedded model ("tiny-sd3"), and optionally a LoRA folder on top.

        dtype: of the weights. autocast: "bfloat16" runs the denoiser under autocast. `fps` and `call` override the
        model's own defaults (its `flowrl.json`, where there is one). Raises `FileNotFoundError` with the cause.
        """
        from diffusers import DiffusionPipeline

        path = resolve_model(model)
        defaults, rate = defaults_of(Path(path))
        pipe = DiffusionPipeline.from_pretrained(str(path), dtype=DTYPES[dtype], **_left_out(path))
        if lora is not None:
            pipe.load_lora_weights(str(lora), adapter_name="policy")
        if device is not None:
            pipe.to(device)
        policy = cls(pipe, {**defaults, **call}, DTYPES[autocast] if autocast else None, rate)
        if fps is not None:
            policy.set_fps(fps)
        policy.has_lora = lora is not None
        if attention_backend is not None:
            policy.set_attention_backend(attention_backend)
        return policy

    # ---------------------------------------------------------------------------------------- properties

    @property
    def device(self) -> torch.device:
        return next(next(iter(self.denoisers.values())).parameters()).device

    @property
    def name(self) -> str:
        return type(self.pipe).__name__

    @property
    def _parameters(self) -> Any:
        return inspect.signature(self._raw_call).parameters

    @property
    def call_names(self) -> list[str]:
        """The pipeline's call arguments that a user may set; the others are set by rollout, replay and decode."""
        return sorted(set(self._parameters) - {"self", "prompt", "latents", "generator", "output_type", "return_dict"})

    @property
    def fps(self) -> float | None:
        """Frames per second of its clips; None of pictures, and where nobody says."""
        return self.facts.fps(self.call)

    def set_fps(self, fps: float) -> None:
        """Say the frame rate, to the pipeline too where its call has an argument for it. Raises ValueError for what is none."""
        self.facts = replace(self.facts, rate=check_rate(fps))
        if self.facts.rate_argument:
            self.call[self.facts.rate_argument] = int(fps) if float(fps).is_integer() else fps

    @property
    def num_frames(self) -> int | None:
        """Frames of its clips; None of pictures, and where the pipeline decides."""
        given = self.call.get("num_frames")
        return self.facts.num_frames if given is None else given

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by a name that is stable over runs."""
        return {
            f"{name}.{key}": parameter
            for name, module in self.denoisers.items()
            for key, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    # ---------------------------------------------------------------------------------------- what trains

    def add_lora(self, rank: int = 32, alpha: float | None = None, targets: Sequence[str] | None = None, seed: int = 0) -> None:
        """Put a LoRA on every denoiser (fp32 weights over a base of any dtype). alpha: twice the rank by default.

        targets: module name endings; the attention projections by default. Raises ValueError when none matches.
        """
        from peft import LoraConfig

        for module in self.denoisers.values():
            names = [name for name, _ in module.named_modules()]
            wanted = list(targets or LORA_TARGETS)
            present = [target for target in wanted if any(name == target or name.endswith("." + target) for name in names)]
            missing = sorted(set(wanted) - set(present)) if targets else []
            if missing or not present:
                endings = sorted(
                    {name.rsplit(".", 1)[-1] for name, child in module.named_modules() if isinstance(child, nn.Linear)}
                )
                raise ValueError(
                    f"lora_targets {missing or wanted} match nothing in {type(module).__name__}; "
                    f"its linear layers end in {endings}"
                )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                config = LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, init_lora_weights="gaussian", target_modules=present)
                module.add_adapter(config, adapter_name="policy")
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        self.has_lora = True

    def train_lora(self) -> None:
        """Go on training a LoRA that was loaded."""
        for module in self.denoisers.values():
            module.set_adapter("policy")
            for name, parameter in module.named_parameters():
                if "lora_" in name:
                    parameter.requires_grad_(True)
                    parameter.data = parameter.data.float()

    def train_all(self) -> None:
        """Full fine-tuning. The reference is then a frozen copy: call `snapshot("reference")` before the first update."""
        for module in self.denoisers.values():
            module.requires_grad_(True)

    # ---------------------------------------------------------------------------------------- which weights it wears

    def snapshot(self, name: str) -> None:
        """Keep a copy of the trainable weights under `name` ("ema", "old", "reference")."""
        self.snapshots[name] = {key: parameter.detach().clone() for key, parameter in self.trainable().items()}

    @torch.no_grad()
    def blend(self, name: str, decay: float) -> None:
        """Move snapshot `name` towards the policy: s <- decay s + (1 - decay) policy. decay 0 copies."""
        for key, parameter in self.trainable().items():
            self.snapshots[name][key].lerp_(parameter, 1 - decay)

    def holds(self, name: str) -> bool:
        """Does snapshot `name` hold the policy's own weights of now, to the bit?"""
        return all(torch.equal(self.snapshots[name][key], parameter) for key, parameter in self.trainable().items())

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Wear other weights inside the block: "policy", "reference", or a snapshot. Not to be left open during backward.

        Reference means adapters off where there is a LoRA, and otherwise the snapshot of that name.
        """
        if name == self.wearing:
            yield
            return
        if self.wearing != "policy":
            raise RuntimeError(f"already using {self.wearing!r}; leave it before using {name!r}")
        self.wearing = name
        try:
            if name == "reference" and self.has_lora:
                for module in self.denoisers.values():
                    module.disable_adapters()
                try:
                    yield
                finally:
                    for module in self.denoisers.values():
                        module.enable_adapters()
            elif name in self.snapshots:
                parameters = self.trainable()
                own = {key: parameter.data for key, parameter in parameters.items()}
                for key, parameter in parameters.items():
                    parameter.data = self.snapshots[name][key]
                try:
                    yield
                finally:
                    for key, parameter in parameters.items():
                        parameter.data = own[key]
            else:
                raise KeyError(f"no weights named {name!r}; there are {['policy', 'reference', *self.snapshots]}")
        finally:
            self.wearing = "policy"

    # ---------------------------------------------------------------------------------------- calling the pipeline

    def encode(self, prompts: Iterable[str | Prompt]) -> None:
        """Encode prompts ahead of time, one by one; after that the text encoders are not called again for them."""
        for prompt in {item.text: item for item in _items(prompts)}.values():
            self._run([prompt], Decode(self.pipe), generator=generators([0]), output_type="latent")

    def rollout(
        self,
        prompts: Sequence[str | Prompt],
        seeds: Sequence[int],
        *,
        transition: Transition | None = None,
        stochastic: Sequence[int] = (),
        init_seeds: Sequence[int] | None = None,
        group: Tensor | None = None,
        keep_velocity: bool = False,
        latents: Tensor | None = None,
        start: int = 0,
        stop: int | None = None,
        stride: int = 1,
        solver: str = "euler",
        record: Sequence[int] = (),
        **call: Any,
    ) -> Samples:
        """Sample one batch without gradient and record the stochastic steps.

        prompts, seeds: B each; a sample depends on its own prompt and seed only. Prompts that start from different pictures take
        a call for each. stochastic: indices of the steps that follow `transition`; the others follow the ODE, by `solver`
        ("euler", or "dpmpp2m" of second order). init_seeds: seeds of the initial noise where they differ (shared inside a group).
        record: steps of the ODE to record too.
        A part of a trajectory: from `latents` (B, ...) at node `start` of the grid, over every `stride`-th node, to `stop`.
        """
        items = _items(prompts)
        transition = transition or ODE()
        if stochastic and transition.deterministic:
            raise ValueError(
                f"{transition} is deterministic: no step can be stochastic; choose FlowSDE, CPS, DanceSDE or DDIM with noise"
            )
        seeds = [int(seed) for seed in seeds]
        groups = torch.arange(len(items)) if group is None else group.to(torch.int64)
        if (frames := {**self.call, **call}.get("num_frames")) is not None:
            self.facts.check_frames(frames)
        if len(apart := by_condition(items, self.facts)) > 1:
            parts = [
                self.rollout(
                    [items[i] for i in rows],
                    [seeds[i] for i in rows],
                    transition=transition,
                    stochastic=stochastic,
                    init_seeds=None if init_seeds is None else [init_seeds[i] for i in rows],
                    group=groups[rows],
                    keep_velocity=keep_velocity,
                    latents=None if latents is None else latents[rows],
                    start=start,
                    stop=stop,
                    stride=stride,
                    solver=solver,
                    record=record,
                    **call,
                )
                for rows in apart
            ]
            return merged(parts, apart)
        rngs = generators(seeds, offset=1)
        drive = Rollout(self.pipe, transition, list(stochastic), rngs, keep_velocity, start, stop, stride, solver, record)
        partial = latents is not None or stop is not None
        final: list[Tensor] = []
        if "callback_on_step_end" in self._parameters:  # sees the state after the pipeline's own edits (inpainting blends)

            def keep_latents(pipe: Any, index: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
                final[:] = [kwargs["latents"]]
                if partial and drive.latents is not None and not torch.equal(final[0], drive.latents):
                    raise Unservable(f"{self.name} edits its latents after each step, which a trajectory in parts would miss")
                return kwargs

            call = {**call, "callback_on_step_end": keep_latents}
        with torch.no_grad():
            self._run(items, drive, latents, generator=generators(init_seeds or seeds), output_type="latent", **call)
        result = final[0] if final else drive.latents
        assert result is not None
        fps = self.facts.fps({**self.call, **call})
        return Samples(prompts=items, seeds=seeds, group=groups, latents=result, steps=drive.steps, fps=fps)

    def trunk(
        self,
        prompts: Sequence[str | Prompt],
        init_seeds: Sequence[int],
        node: int,
        latents: Tensor | None = None,
        start: int = 0,
        solver: str = "euler",
        **call: Any,
    ) -> tuple[Tensor, Tensor, Grid]:
        """Follow the ODE to a node of the grid, without gradient: the state there and its velocity, both (B, ...), and the grid.

        From the noise of `init_seeds`, or from `latents` at node `start`. Where branches part (`flowrl.samplers.branching`).
        """
        items, grids = _items(prompts), []

        def run(rows: list[int]) -> tuple[Tensor, Tensor]:
            drive = Trunk(self.pipe, start, node, solver)
            rngs, state = generators([init_seeds[i] for i in rows]), None if latents is None else _rows(latents, rows)
            with torch.no_grad():
                self._run([items[i] for i in rows], drive, state, generator=rngs, output_type="latent", **call)
            grids.append(drive.grid)
            return drive.native, drive.velocity

        native, velocity = self._apart(items, run)
        return native, velocity, grids[0]

    def velocity(self, prompts: Sequence[str | Prompt], at: Step | Tensor, t: Tensor | None = None, **call: Any) -> Tensor:
        """The velocity v = eps - x0, (B, ...), with graph where gradients are enabled.

        at: a recorded step (bit-equal to the rollout's v for the same batch; states that several samples share are evaluated
        once), or a state in flow coordinates (B, ...) with its times t (B,) in (0, 1].
        """
        items = _items(prompts)
        if isinstance(at, Step):
            native, items = at.native, [items[b] for b in at.first_samples]
        else:
            assert t is not None, "a state needs its times"
            native = self._grid_of(**call).to_native(at, t, self._state_dtype)

        def run(rows: list[int]) -> tuple[Tensor]:
            index = at.index if isinstance(at, Step) else None
            drive = Replay(self.pipe, index, None if t is None or index is not None else _rows(t, rows))
            rngs, state = generators([0] * len(rows)), _rows(native, rows)
            self._run([items[i] for i in rows], drive, state, generator=rngs, output_type="latent", **call)
            if drive.velocity is None:
                raise Unservable(f"{self.name} did not call its scheduler at the requested step")
            return (drive.velocity,)

        (v,) = self._apart(items, run)
        return at.per_sample(v) if isinstance(at, Step) else v

    def decode(
        self,
        samples: Samples | Tensor,
        prompts: Sequence[str | Prompt] | None = None,
        batch_size: int = 32,
        with_graph: bool = False,
        frames: Sequence[int] | None = None,
        context: int | None = None,
        **call: Any,
    ) -> Tensor:
        """Latents to pictures (N, 3, H, W) or clips (N, F, 3, H, W), fp32 in [0, 1], by the pipeline's own tail.

        with_graph: let the gradient of the pictures reach the latents. frames: only these frames of clips, in this order.
        context: through how many latent frames before its own a frame's gradient goes back, where the autoencoder decodes one
        after the other (`flowrl.slices`); None is all, and exact.
        """
        latents = samples.latents if isinstance(samples, Samples) else samples
        items = samples.prompts if isinstance(samples, Samples) else _items(prompts or [self._blank] * len(latents))

        def run(rows: list[int]) -> tuple[Tensor]:
            parts = []
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                images = self._run(
                    [items[i] for i in part],
                    Decode(self.pipe),
                    _rows(latents, part),
                    generator=generators([0] * len(part)),
                    output_type="pt",
                    autocast=False,
                    **call,
                )[0]
                if frames is not None and images.ndim != 5:
                    raise ValueError(f"frames={list(frames)}: {self.name} draws pictures, not clips")
                parts.append((images if frames is None else images[:, list(frames)]).float())
            return (torch.cat(parts),)

        some = sliced(getattr(self.pipe, "vae", None), frames or (), self.facts.stride, context)
        with torch.set_grad_enabled(with_graph), some:
            return self._apart(items, run)[0]

    def latents_of(self, pictures: Tensor) -> Tensor:
        """Pictures (N, 3, H, W), or clips (N, F, 3, H, W), in [0, 1] as final latents (N, ...), without gradient.

        The mean of the autoencoder's posterior, then the pipeline's own tail backwards. From latents to what its `vae.decode` is
        given that tail scales, shifts and reorders every number by itself, z = P (a x + b), so that two runs of it and one
        vector-Jacobian product give x = P^T (a (z - b) / a^2): what each pipeline does to its latents need not be known.
        Each picture is encoded by itself: its latents do not depend on the others, to the bit.
        Raises Unservable for a pipeline without such an autoencoder.
        """
        vae: Any = getattr(self.pipe, "vae", None)
        if not hasattr(vae, "encode") or not hasattr(vae, "decode"):
            raise Unservable(f"{self.name} has no autoencoder that encodes pictures")
        inputs = pictures if pictures.ndim == 4 else pictures.transpose(1, 2)
        first = next(vae.parameters())
        if pictures.ndim == 4 and max(p.ndim for p in vae.parameters()) == 5:  # an autoencoder of clips, as Qwen-Image has
            inputs = inputs.unsqueeze(2)
        with torch.no_grad():
            posteriors = [vae.encode((2 * one - 1).to(first)).latent_dist for one in inputs.split(1)]
            z = torch.cat([posterior.mode() for posterior in posteriors]).float()
        like = self._start_latents(len(pictures))

        def tail(latents: Tensor) -> Tensor:
            given: list[Tensor] = []

            def decode(latent: Tensor, *_: Any, **__: Any) -> Any:
                given.append(latent)
                raise _Seen

            with _replaced(vae, "decode", decode), suppress(_Seen):
                self.decode(latents, batch_size=len(latents), with_graph=True)
            return given[0].float()

        with torch.enable_grad():
            x = torch.zeros_like(like, dtype=torch.float32, requires_grad=True)
            b = tail(x)
            a = tail(torch.ones_like(x)).detach() - b.detach()
            if b.shape != z.shape and b.numel() == z.numel():
                z = z.reshape(b.shape)
            if b.shape != z.shape:
                raise ValueError(
                    f"pictures of {pictures.shape[-1]} x {pictures.shape[-2]} pixels give latents {tuple(z.shape[1:])}, this "
                    f"pipeline's call wants {tuple(b.shape[1:])}: set height and width, and num_frames of clips"
                )
            (latents,) = torch.autograd.grad(b, x, (z - b.detach()) / a.square())
        return latents

    def _start_latents(self, count: int) -> Tensor:
        """The shape of latents of this call: (count, ...)."""
        drive = Trunk(self.pipe, 0, 0)
        with torch.no_grad():
            self._run([self._blank], drive, generator=generators([0]), output_type="latent")
        return drive.native.new_zeros(count, *drive.native.shape[1:])

    @property
    def times(self) -> list[float]:
        """The times that a call with the policy's own arguments visits, from noise to the end; asked once for each such call."""
        return self._grid_of().t

    def _grid_of(self, **call: Any) -> Grid:
        key = repr(sorted({**self.call, **call}.items()))
        if key not in self._grids:
            self._grids[key] = self.grid(**call)
        return self._grids[key]

    def grid(self, **call: Any) -> Grid:
        """The time grid of a call, without running the denoiser."""
        drive = Decode(self.pipe)
        with torch.no_grad():
            self._run([self._blank], drive, generator=generators([0]), output_type="latent", **call)
        return drive.grid

    @property
    def _blank(self) -> Prompt:
        """A prompt of no words, with a picture where the pipeline needs one and the call has none."""
        return BLANK if set(self.facts.needed_conditions) - set(self.call) else Prompt("")

    def _apart(self, prompts: Sequence[Prompt], run: Callable[[list[int]], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `run` gives for the rows that share a picture, of all rows in their order."""
        apart = by_condition(prompts, self.facts)
        if len(apart) == 1:
            return run(apart[0])
        order = torch.tensor([row for rows in apart for row in rows]).argsort()
        return tuple(torch.cat(column)[order.to(column[0].device)] for column in zip(*map(run, apart), strict=True))

    def _run(
        self, prompts: Sequence[Prompt], drive: Any, latents: Tensor | None = None, autocast: bool = True, **call: Any
    ) -> Any:
        """A call of the pipeline for prompts that start from the same pictures."""
        check_conditions(prompts[:1], self.facts, {**self.call, **call}, opened=False)
        condition = condition_of(prompts[0], self.facts)
        pictures = {name: picture_of(name, source, prompts[0]) for name, source in condition}
        arguments = {**self.call, **call, **pictures, "return_dict": False}
        kept = self._conditions.of(condition, len(prompts))
        with driven(self.pipe, drive, latents), kept, self.autocast() if autocast else nullcontext():
            return self._raw_call(self.pipe, prompt=[prompt.text for prompt in prompts], **arguments)

    def autocast(self) -> Any:
        """Autocast for the denoiser, without its weight cache: a cache filled under no_grad would cut the graph later."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, cache_enabled=False)

    @property
    def _state_dtype(self) -> torch.dtype:
        return next(iter(self.denoisers.values())).dtype

    # ---------------------------------------------------------------------------------------- backends, saving

    def set_attention_backend(self, name: str) -> None:
        """Use one of diffusers' attention backends (native, xformers, flash, ...), or `eager`, for rollout and update alike.

        Probed on this machine by the trainer, forward and backward, before any training. Errors: `flowrl.attention.set_backend`.
        """
        for module in self.denoisers.values():
            set_backend(module, name)

    def enable_gradient_checkpointing(self) -> None:
        for module in self.denoisers.values():
            module.enable_gradient_checkpointing()

    def save(self, folder: Path, weights: str = "policy") -> None:
        """Write what was trained: `pytorch_lora_weights.safetensors` (LoRA), or a whole pipeline directory (full fine-tuning)."""
        with self.using(weights):
            if self.has_lora:
                from peft.utils import get_peft_model_state_dict

                layers = {
                    f"{name}_lora_layers": get_peft_model_state_dict(module, adapter_name="policy")
                    for name, module in self.denoisers.items()
                }
                metadata = {
                    f"{name}_lora_adapter_metadata": module.peft_config["policy"].to_dict()
                    for name, module in self.denoisers.items()
                }
                accepted = inspect.signature(type(self.pipe).save_lora_weights).parameters
                type(self.pipe).save_lora_weights(str(folder), **layers, **{k: v for k, v in metadata.items() if k in accepted})
            else:
                self.pipe.save_pretrained(str(folder), safe_serialization=True)
                defaults = {"call": self.call, **({} if self.facts.rate is None else {"fps": self.facts.rate})}
                (Path(folder) / DEFAULTS_FILE).write_text(json.dumps(defaults, indent=2) + "\n")


def resolve_model(model: str | Path) -> Path | str:
    """An embedded name, a directory that holds a whole pipeline, or else a hub id. Raises FileNotFoundError with the cause."""
    if str(model) in EMBEDDED:
        return model_path(str(model))
    path = Path(model)
    if path.exists():
        index = path / "model_index.json"
        if not index.is_file():
            raise FileNotFoundError(f"{path} is not a diffusers pipeline: it has no model_index.json")
        components = json.loads(index.read_text())
        missing = [
            name
            for name, entry in components.items()
            if name in (*DENOISERS, "vae")
            and isinstance(entry, list)
            and entry[0]
            and not list((path / name).glob("*.safetensors"))
        ]
        if missing:
            raise FileNotFoundError(f"{path} has no safetensors weights for: {', '.join(missing)}")
        return path
    if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise FileNotFoundError(f"no model at {model}; embedded models: {', '.join(EMBEDDED)}; hub ids look like owner/name")
    return str(model)


def _left_out(path: Path | str) -> dict[str, None]:
    """Components that a local pipeline was saved without (SD3 without its T5): diffusers wants to be told again."""
    index = Path(path) / "model_index.json"
    components = json.loads(index.read_text()) if index.is_file() else {}
    return {name: None for name, entry in components.items() if entry == [None, None]}


def _items(prompts: Iterable[str | Prompt]) -> list[Prompt]:
    return [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]


def _rows(values: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a tensor: itself where they are all."""
    return values if len(rows) == len(values) else values[rows]


class _Seen(Exception):
    """What was asked for has passed by."""


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an object, for the time of the block."""
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)


def _undecorated_call(pipe: Any) -> Callable[..., Any]:
    """The pipeline's `__call__` without its no_grad decorator."""
    call = inspect.unwrap(type(pipe).__call__)
    if call is type(pipe).__call__:
        raise Unservable(f"{type(pipe).__name__}: its __call__ is not decorated, so gradients cannot be let through")
    return call


def _check_servable(pipe: Any) -> None:
    name = type(pipe).__name__
    for attribute in ("scheduler", "encode_prompt", "prepare_latents"):
        if not hasattr(pipe, attribute):
            raise Unservable(f"{name} has no {attribute}: the seam has nothing to hold on to")
    if not any(getattr(pipe, denoiser, None) is not None for denoiser in DENOISERS):
        raise Unservable(f"{name} has none of {', '.join(DENOISERS)}")


class _PromptMemo:
    """Encodes each distinct prompt once, through the pipeline's own `encode_prompt`, whatever it returns.

    A row of the batch is encoded alone; the results are stacked along the dimension that grows with the batch, found by
    encoding one prompt and then two. Sequences of different lengths are padded with zeros at the end, as pipelines do, and
    a mask that a pipeline leaves out where nothing is padded (Qwen-Image) is filled in.
    """

    ROWS = (
        "prompt",
        "prompt_2",
        "prompt_3",
        "prompt_4",
        "negative_prompt",
        "negative_prompt_2",
        "negative_prompt_3",
        "negative_prompt_4",
    )

    def __init__(self, pipe: Any):
        self.encode = pipe.encode_prompt
        self.signature = inspect.signature(self.encode)
        self.memo: dict[Any, Any] = {}
        pipe.encode_prompt = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.signature.bind(*args, **kwargs).arguments
        prompts = bound.get("prompt")
        if not isinstance(prompts, list) or any(isinstance(value, Tensor) for value in bound.values()):
            return self.encode(*args, **kwargs)
        rows = [{key: self._row(key, value, i, len(prompts)) for key, value in bound.items()} for i in range(len(prompts))]
        results = [self._encoded(row) for row in rows]
        if not isinstance(results[0], tuple):
            return _stack(results)
        grows = self._growing(rows[0])
        columns = [[result[k] for result in results] for k in range(len(grows))]
        lengths = next(
            (
                [v.shape[1] for v in column]
                for column, grow in zip(columns, grows, strict=True)
                if grow and isinstance(column[0], Tensor) and column[0].ndim > 1
            ),
            [],
        )
        if len(set(lengths)) > 1:
            masks = self._masks(rows[lengths.index(min(lengths))], rows[lengths.index(max(lengths))])
            for k, dtype in masks.items():
                columns[k] = [torch.ones(1, n, dtype=dtype) if v is None else v for v, n in zip(columns[k], lengths, strict=True)]
        return tuple(_stack(column) if grow else column[0] for column, grow in zip(columns, grows, strict=True))

    def _row(self, key: str, value: Any, i: int, size: int) -> Any:
        return [value[i if len(value) == size else 0]] if key in self.ROWS and isinstance(value, list) else value

    def _encoded(self, row: dict[str, Any]) -> Any:
        key = tuple((name, repr(value)) for name, value in row.items())
        if key not in self.memo:
            with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                self.memo[key] = self.encode(**row)
        return self.memo[key]

    def _pair(self, first: dict[str, Any], second: dict[str, Any]) -> Any:
        """Two rows encoded as one batch."""
        return self._encoded(
            {key: value + second[key] if key in self.ROWS and isinstance(value, list) else value for key, value in first.items()}
        )

    def _once(self, what: str, row: dict[str, Any], find: Callable[[], Any]) -> Any:
        """A fact about `encode_prompt` that depends on the kind of call and not on its prompts."""
        kind = (what, *((name, repr(value)) for name, value in row.items() if name not in self.ROWS))
        if kind not in self.memo:
            self.memo[kind] = find()
        return self.memo[kind]

    def _growing(self, row: dict[str, Any]) -> list[bool]:
        """For each returned value: does its first dimension grow with the batch?"""
        return self._once(
            "growing",
            row,
            lambda: [a is None or len(b) == 2 * len(a) for a, b in zip(self._encoded(row), self._pair(row, row), strict=True)],
        )

    def _masks(self, short: dict[str, Any], long: dict[str, Any]) -> dict[int, torch.dtype]:
        """Positions and types of the masks that appear only where prompts of different lengths share a batch."""
        return self._once(
            "masks",
            short,
            lambda: {
                k: b.dtype
                for k, (a, b) in enumerate(zip(self._encoded(short), self._pair(short, long), strict=True))
                if a is None and b is not None
            },
        )


def _stack(values: list[Any]) -> Any:
    """Results of single prompts as the result of the batch."""
    if values[0] is None:
        return None
    if isinstance(values[0], list):
        return [item for value in values for item in value]
    length = max(value.shape[1] for value in values) if values[0].ndim > 1 else 0
    if length:
        values = [nn.functional.pad(value, (0, 0) * (value.ndim - 2) + (0, length - value.shape[1])) for value in values]
    return torch.cat([value.to(values[0].device) for value in values])
