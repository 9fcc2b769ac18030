"""How near `flowrl plan` comes: its memory against what runs of transformers of increasing size take at most.

    python benchmarks/plan.py                             Stable Diffusion 3, FLUX and Wan, 20 to 300 M random weights
    python benchmarks/plan.py wan-100M flux-20M           some of them
    python benchmarks/plan.py --recipe train=full objective=nft     with other options than GRPO on a LoRA
    python benchmarks/plan.py --large                     at the size of SD3.5-Medium, FLUX.1-dev and Wan 2.1: wants a GPU

Each runs two steps in a process of its own; the second is measured, its rollout (with decoding) and its update apart. On a GPU:
torch.cuda.max_memory_allocated. On a CPU: how far the process's resident set grows over what it was before the model was made,
with an allocator that gives back at once what is freed. Text encoders are small, the autoencoders of the embedded size.
With --time the plan's time, from one measured denoiser call, is compared as well.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

#: Width and depth: heads of 64, and layers (FLUX: half of them with two streams).
SIZES = {"20M": (6, 6), "100M": (12, 8), "300M": (16, 14)}
FAMILIES = ("sd3", "flux", "wan")
#: The real ones: SD3.5-Medium, FLUX.1-dev, Wan 2.1 1.3B and 14B.
LARGE = ("sd3-large", "flux-large", "wan-1.3B", "wan-14B")
OPTIONS = [
    "objective=grpo", "transition=flow_sde", "steps={name: window, size: 2, low: 0, high: 2}", "num_inference_steps=3",
    "prompts_per_step=2", "num_generations=2", "batch_size=4", "lora_rank=16", "max_steps=2", "prompts=tiny-test",
    "rewards={brightness: 1}", "watch=none", "report_to=none", "samples_steps=0", "checkpointing_steps=0", "checks=false",
    "guidance_scale=3.5",
]  # fmt: skip
#: Tokens of an image or clip, and how the embedded autoencoders are called: both shrink a side by 8.
CALLS = {
    "sd3": ["height=256", "width=256", "call={max_sequence_length: 77}"],
    "flux": ["height=256", "width=256", "call={max_sequence_length: 77}"],
    "wan": ["height=128", "width=128", "num_frames=17", "call={max_sequence_length: 77}"],
}
LARGE_CALLS = {
    "sd3": ["height=512", "width=512"],
    "flux": ["height=512", "width=512"],
    "wan": ["height=240", "width=416", "num_frames=33"],
}


def build(name: str) -> Any:
    """A pipeline with random weights, of the real classes."""
    family, size = name.split("-")
    heads, layers = SIZES.get(size, (24, 24))
    torch.manual_seed(0)
    return {"sd3": _sd3, "flux": _flux, "wan": _wan}[family](size, heads, layers)


def _sd3(size: str, heads: int, layers: int) -> Any:
    from diffusers import SD3Transformer2DModel

    from flowrl.policy import Policy

    pipe = Policy.load("tiny-sd3").pipe
    own, large = pipe.transformer.config, size == "large"
    transformer = SD3Transformer2DModel(
        sample_size=64, patch_size=2, in_channels=own.in_channels, out_channels=own.in_channels, num_layers=layers,
        attention_head_dim=64, num_attention_heads=heads, joint_attention_dim=own.joint_attention_dim,
        caption_projection_dim=64 * heads, pooled_projection_dim=own.pooled_projection_dim, pos_embed_max_size=96,
        dual_attention_layers=tuple(range(13)) if large else (), qk_norm="rms_norm",
    )  # fmt: skip
    pipe.register_modules(transformer=transformer)
    return pipe


def _texts(pooled: int) -> dict[str, Any]:
    """A small CLIP and a small T5."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from flowrl.tiny import models, video

    clip, words = models.make_tokenizer(), video.make_tokenizer()
    ids = {"bos_token_id": clip.bos_token_id, "eos_token_id": clip.eos_token_id, "pad_token_id": clip.pad_token_id}
    config = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=pooled, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, **ids
    )
    t5 = T5Config(vocab_size=len(words), d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
    return {
        "tokenizer": clip, "text_encoder": CLIPTextModel(config), "tokenizer_2": words, "text_encoder_2": T5EncoderModel(t5),
    }  # fmt: skip


def _flux(size: str, heads: int, layers: int) -> Any:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    double, single = (19, 38) if size == "large" else (layers // 2, layers - layers // 2)
    dim = 128 if size == "large" else 64
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=double, num_single_layers=single, attention_head_dim=dim, num_attention_heads=heads,
        joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=True,
        axes_dims_rope=(dim // 8, dim * 7 // 16, dim * 7 // 16),
    )  # fmt: skip
    blocks: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8, shift_factor=0.0, **blocks)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return FluxPipeline(**_texts(32), transformer=transformer, vae=vae, scheduler=scheduler)


def _wan(size: str, heads: int, layers: int) -> Any:
    from diffusers import WanTransformer3DModel

    from flowrl.tiny import video

    arch = video.Architecture(latent_channels=16, layers=1)
    pipe = video.make_pipeline(arch, video.make_vae(arch))
    real = {"1.3B": (12, 128, 30, 8960), "14B": (40, 128, 40, 13824)}
    heads, dim, layers, inner = real.get(size, (heads, 64, layers, 4 * 64 * heads))
    transformer = WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=dim, ffn_dim=inner, num_layers=layers, text_dim=arch.text_width
    )
    pipe.register_modules(transformer=transformer)
    return pipe


def save_configs(pipe: Any, folder: Path) -> None:
    """Everything of a pipeline's folder but the weights."""
    pipe.save_config(folder)
    for name, component in pipe.components.items():
        if hasattr(component, "save_config"):
            component.save_config(folder / name)
        elif isinstance(component, torch.nn.Module):
            config: Any = component.config
            config.save_pretrained(folder / name)
        elif component is not None:
            component.save_pretrained(folder / name)


def options(name: str, extra: list[str]) -> list[str]:
    family = name.split("-")[0]
    calls = LARGE_CALLS[family] if name in LARGE else CALLS[family]
    large = ["dtype=bfloat16", "gradient_checkpointing=true"] if name in LARGE else []
    return [*OPTIONS, *calls, *large, *extra]


# ------------------------------------------------------------------------------------------------ measured


def highest(reset: bool = False) -> int:
    """Bytes at most since the last reset."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return peak
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return peak


def spent() -> float:
    """Seconds: of the clock on a GPU, of this process' computing on a CPU, which others may share."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(name: str, extra: list[str], folder: Path) -> None:
    """Two steps of a run, and the second one's peaks and times as a line of JSON. In a process of its own."""
    from flowrl.commands.common import quiet_libraries
    from flowrl.config import load_recipe
    from flowrl.policy import DTYPES, Policy
    from flowrl.train import Trainer
    from flowrl.train.trainer import _Clock

    quiet_libraries()
    recipe = load_recipe({}, [*options(name, extra), f"output_dir={folder}/run"])
    small = ["model=tiny-sd3", "height=64", "width=64", f"output_dir={folder}/warm"]
    warm = Trainer(load_recipe({}, [*OPTIONS, *small]))
    warm.step()  # what libraries keep for good
    del warm
    highest(reset=True)
    before = highest()
    pipe = build(name)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.to(DTYPES[recipe.dtype])
    if torch.cuda.is_available():
        pipe.to("cuda")
    policy = Policy(pipe, recipe.call_arguments(), DTYPES[recipe.autocast] if recipe.autocast else None)
    trainer = Trainer(recipe, policy=policy)
    trainer.step()
    highest(reset=True)
    started = spent()
    batches, _, _, advantage, _ = trainer.collect(_Clock())
    rollout, drawn = highest(reset=True) - before, spent()
    trainer.update(batches, advantage)
    update, updated = highest() - before, spent()
    calls = [spent()]
    with torch.no_grad():
        prompts, x = batches[0].prompts, batches[0].latents.float()
        for _ in range(3):
            trainer.policy.velocity(prompts, x, torch.full((len(x),), 0.5, device=x.device))
            calls.append(spent())
    seconds = {"rollout": drawn - started, "update": updated - drawn}
    forward = sorted(b - a for a, b in itertools.pairwise(calls))[1]
    print(json.dumps({"rollout": rollout, "update": update, "forward": forward, "seconds": seconds}))


def planned(name: str, extra: list[str], folder: Path) -> Any:
    from flowrl.config import load_recipe
    from flowrl.plan import estimate
    from flowrl.train.trainer import parts, plan_of

    save_configs(build(name), folder)
    recipe = load_recipe({}, [*options(name, extra), f"model={folder}"])
    objective, _, _, trained = parts(recipe)
    return estimate(recipe, plan_of(recipe, objective, trained, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="FAMILY-SIZE; all of them by default")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--recipe", nargs="*", default=[], metavar="key=value", help="options that differ")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.recipe, arguments.folder)
        return
    names = arguments.names or (LARGE if arguments.large else [f"{family}-{size}" for size in SIZES for family in FAMILIES])
    give_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    print(f"{'model':<12}{'phase':<9}{'planned':>10}{'measured':>10}{'ratio':>8}")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found = planned(name, arguments.recipe, Path(folder))
            command = [sys.executable, __file__, "--measure", name, "--folder", folder, "--recipe", *arguments.recipe]
            done = subprocess.run(command, env={**os.environ, **give_back}, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        real = json.loads(done.stdout.splitlines()[-1])
        rollout, decode, update = found.peak
        for phase, ours, theirs in (("rollout", max(rollout, decode), real["rollout"]), ("update", update, real["update"])):
            print(f"{name:<12}{phase:<9}{ours / 1e6:>7.0f} MB{theirs / 1e6:>7.0f} MB{ours / theirs:>8.2f}", flush=True)
        if arguments.time:
            rolled, decoded, updated = found.seconds(real["forward"])
            for phase, ours in (("rollout", rolled + decoded), ("update", updated)):
                theirs = real["seconds"][phase]
                print(f"{name:<12}{phase:<9}{ours:>8.2f} s{theirs:>8.2f} s{ours / theirs:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
