"""What the library costs on top of the bare denoiser: ratios from one run, in which the two take turns.

    python benchmarks/cost.py                         the embedded model, CPU or GPU
    python benchmarks/cost.py --sd35-medium           an SD3.5-Medium-sized transformer with random weights (a GPU with 24 GB)

Rollout: `Policy.rollout` against `steps` bare calls of the transformer on the same batch without gradient. Update: one GRPO
loss and its backward through the pipeline, against the transformer's own forward and backward. Both under the same autocast and
attention backend (--attention; on a CPU torch's fused kernel, `native`, makes both slower). Medians over rounds; the two take
turns inside a round, so that drift of the machine cancels.

Branches: one stochastic step (the third) from a state that the 8 samples of a group share, against the same step from 8 separate
starts: what sharing states saves in the rollout and in the update.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from flowrl.batch import Samples
from flowrl.data import load_prompts
from flowrl.policy import Policy
from flowrl.samplers import CPS
from flowrl.samplers.branching import branched_rollout
from flowrl.train.objectives import GRPO
from flowrl.train.predict import PolicyPredict


def timed(function: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def sd35_medium(device: str) -> Policy:
    """The architecture of SD3.5-Medium around random weights, with the embedded model's text encoders and a latent of 64 x 64."""
    from diffusers import SD3Transformer2DModel

    policy = Policy.load("tiny-sd3")
    channels, pooled = policy.pipe.transformer.config.in_channels, policy.pipe.transformer.config.pooled_projection_dim
    joint = policy.pipe.transformer.config.joint_attention_dim
    transformer = SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=channels, out_channels=channels, num_layers=24, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=joint, caption_projection_dim=1536, pooled_projection_dim=pooled,
        pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
    )  # fmt: skip
    policy.pipe.register_modules(transformer=transformer.to(torch.bfloat16))
    policy.pipe.to(device)
    return Policy(policy.pipe, {**policy.call, "height": 512, "width": 512})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--trained", type=int, default=3, help="stochastic, trained steps")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--autocast", default="bfloat16")
    parser.add_argument("--attention", help="backend; by default eager on a CPU, torch's own choice on a GPU")
    parser.add_argument("--sd35-medium", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = arguments.attention or (None if device == "cuda" else "eager")

    if arguments.sd35_medium:
        policy = sd35_medium(device)
    else:
        policy = Policy.load("tiny-sd3", autocast=arguments.autocast, device=device, attention_backend=backend)
    policy.call["num_inference_steps"] = arguments.steps
    policy.add_lora(rank=32)
    prompts = [prompt.text for prompt in load_prompts("tiny-train")[: arguments.batch]]
    stochastic = list(range(arguments.trained))

    def rollout():
        return policy.rollout(prompts, range(len(prompts)), transition=CPS(0.7), stochastic=stochastic)

    samples = rollout()
    predict, objective = PolicyPredict(policy, samples), GRPO()
    advantage = torch.randn(len(prompts), device=device)

    # The denoiser's own arguments, caught once from a real call.
    denoiser = next(iter(policy.denoisers.values()))
    caught: dict[str, Any] = {}
    hook = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: caught.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    policy.velocity(prompts, samples.steps[0])
    hook.remove()

    def bare() -> torch.Tensor:
        with policy.autocast():
            return denoiser(*caught["args"], **caught["kwargs"])[0]

    def bare_rollout() -> None:
        with torch.no_grad():
            for _ in range(arguments.steps):
                bare()

    def bare_update() -> None:
        for _ in samples.steps:
            bare().float().mean().backward()

    def update() -> None:
        for step in samples.steps:
            objective.loss(predict, step, advantage).values.mean().backward()

    # One SDE step per trajectory, from shared and from separate states.
    groups = [prompts[b // 8] for b in range(len(prompts))]
    starts = [b // 8 for b in range(len(prompts))]
    one_step: dict[str, Any] = {"transition": CPS(0.7), "stochastic": [2]}

    def branched():
        return branched_rollout(policy, groups, range(len(groups)), init_seeds=starts, **one_step)

    def separate():
        return policy.rollout(groups, range(len(groups)), init_seeds=starts, **one_step)

    def update_of(batch: Samples) -> Callable[[], None]:
        return lambda: objective.loss(PolicyPredict(policy, batch), batch.steps[0], advantage).values.mean().backward()

    pairs = {
        "rollout": (rollout, bare_rollout),
        "update": (update, bare_update),
        "branched rollout": (branched, separate),
        "branched update": (update_of(branched()), update_of(separate())),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    for turn in range(arguments.rounds + 1):
        for name, (ours, theirs) in pairs.items():
            first, second = (ours, theirs) if turn % 2 else (theirs, ours)
            a, b = timed(first), timed(second)
            if turn:  # the first round warms up
                times[name].append((a, b) if turn % 2 else (b, a))
    decode = min(timed(lambda: policy.decode(samples, batch_size=len(samples))) for _ in range(3))

    size = sum(p.numel() for p in denoiser.parameters()) / 1e6
    print(f"{type(denoiser).__name__}, {size:.1f} M weights, {device}, {torch.get_num_threads()} threads")
    print(f"batch {len(prompts)}, {arguments.steps} steps, {arguments.trained} trained; medians of {arguments.rounds} rounds")
    print(f"{'':<18}{'ours':>10}{'bare / separate':>17}{'ratio':>8}")
    for name, rows in times.items():
        ours, theirs, ratio = (statistics.median(values) for values in zip(*((a, b, a / b) for a, b in rows), strict=True))
        print(f"{name:<18}{ours:>9.3f}s{theirs:>16.3f}s{ratio:>8.3f}")
    print(f"decode    {decode:.3f}s for {len(prompts)} pictures")
    print(f"a stored trajectory: {samples.trajectory_bytes / len(samples):,.0f} bytes per sample for {arguments.trained} steps")
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory: {peak / 2**20:,.0f} MiB")


if __name__ == "__main__":
    main()
