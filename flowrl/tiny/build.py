"""Make the embedded model from nothing: `python -m flowrl.tiny.build`.

The stages are in stages.py; each picks up where a killed run stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from . import evaluate
from .moves import split as moving
from .scenes import split
from .stages import Settings, encode_pool, train_transformer, train_vae

STAGES = ("vae", "latents", "transformer")


def _swap_in(fresh: Path, out: Path) -> None:
    """Put the folder `fresh` in the place of `out`; a reader finds the old one or the new one."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def export(settings: Settings, pipe: Any, info: dict[str, Any]) -> None:
    """Write the pipeline, its call arguments and its card; replace `out` in one go."""
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    fresh = settings.out.with_name(f".{settings.out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    for name in ("tokenizer", "tokenizer_2"):  # they keep, and would save, the padding of the last call
        if (tokenizer := getattr(pipe, name, None)) is not None:
            tokenizer.backend_tokenizer.no_padding()
            tokenizer.backend_tokenizer.no_truncation()
    pipe.save_pretrained(fresh, safe_serialization=True)
    for file in fresh.rglob("*.safetensors"):
        file.chmod(0o644)  # written as 0600; an installed package is read by others
    rate = {"fps": settings.of.FPS} if hasattr(settings.of, "FPS") else {}
    (fresh / "flowrl.json").write_text(json.dumps({"call": settings.of.CALL, **rate}, indent=2) + "\n")
    (fresh / "README.md").write_text(evaluate.card(settings, info))
    _swap_in(fresh, settings.out)


def build(settings: Settings) -> Path:
    """All stages up to `settings.until`; returns the folder of the model."""
    settings.work.mkdir(parents=True, exist_ok=True)
    vae = train_vae(settings)
    if settings.until == "vae":
        return settings.out
    pool = encode_pool(settings, vae)
    if settings.until == "latents":
        return settings.out
    result = train_transformer(settings, vae, pool, export)
    pipe = result.pop("pipe")
    export(settings, pipe, {**result, "preliminary": True})
    if settings.test_seeds:
        reloaded = settings.of.load(settings.out).to(settings.torch_device())
        report = evaluate.report(reloaded, settings.test_seeds)
        (settings.work / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        result["vae_seconds"] = torch.load(settings.work / "vae.pt", weights_only=True)["seconds"]
        export(settings, pipe, {**result, "report": report})
        print(json.dumps(report, indent=2))
    return settings.out


def write_prompts(folder: Path) -> None:
    """Write tiny-train.jsonl, tiny-test.jsonl and those of clips, tiny-video-train.jsonl and -test.jsonl: one spec per line."""
    folder.mkdir(parents=True, exist_ok=True)
    for world, specs in (("tiny", split), ("tiny-video", moving)):
        for name in ("train", "test"):
            lines = [json.dumps(spec) for spec in specs(name)]
            (folder / f"{world}-{name}.jsonl").write_text("\n".join(lines) + "\n")


#: What differs from `Settings` where clips are trained.
VIDEO: dict[str, Any] = {
    "world": "video",
    "steps": 2600,
    "vae_batch": 4,
    "vae_steps": 6000,
    "vae_stills": 1200,
    "vae_lr": 1.5e-3,
    "vae_emphasis": 4.0,
    "pool": 24_000,
}


def _parser(video: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flowrl.tiny.build",
        description="Train an embedded model from nothing and write it as a diffusers folder: text to image (an SD3 pipeline "
        "for 64x64 scenes of coloured shapes), or with --video text to video (a Wan pipeline for 9 frames of 48x48 of moving "
        "ones).",
        epilog="A run that was stopped continues when the same command is given again. A longer run: raise --steps; "
        "where the old one had finished, its learning rate has already fallen, so that a fresh --work is usually "
        "better. Example, a ten-minute trial: python -m flowrl.tiny.build --out /tmp/tiny --work /tmp/work "
        "--steps 1200 --vae-steps 800 --pool 20000",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    root = Path(__file__).resolve().parents[2]
    defaults = Settings(Path(), Path(), **(VIDEO if video else {}))
    add = parser.add_argument
    add("--video", action="store_true", help="the text-to-video model; the defaults below are then its own")
    add("--out", type=Path, default=root / "assets" / defaults.of.NAME, help="folder of the finished pipeline (replaced)")
    add("--work", type=Path, default=Path("runs") / f"{defaults.of.NAME}-build", help="folder of checkpoints and latents")
    add("--steps", type=int, default=defaults.steps, help="updates of transformer and text encoders")
    add("--vae-steps", type=int, default=defaults.vae_steps, help="updates of the VAE")
    add("--vae-batch", type=int, default=defaults.vae_batch, help="pictures or clips per update of the VAE")
    add("--pool", type=int, default=defaults.pool, help="pictures or clips whose latents are trained on")
    add("--batch", type=int, default=defaults.batch, help="latents per update of the transformer")
    add("--lr", type=float, default=defaults.lr, help="peak learning rate of the transformer")
    add("--seed", type=int, default=defaults.seed, help="seed of weights, scenes and noise")
    add("--device", default=defaults.device, help="auto, cpu, cuda, ...")
    add("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    add("--fp32", action="store_true", help="train without bf16 autocast (slower on recent CPUs and GPUs)")
    add(
        "--compile", action="store_true", help="the transformer by torch.compile: a quarter faster on a CPU, wants a C++ compiler"
    )
    add("--until", choices=STAGES, default=defaults.until, help="stop after this stage")
    add("--export-every", type=float, default=defaults.export_every, help="seconds between early exports; 0: none")
    add("--evaluate-every", type=int, default=defaults.evaluate_every, help="steps between evaluations in the log")
    add("--test-seeds", type=int, default=defaults.test_seeds, help="samples per test prompt in the final scores")
    add("--prompts", type=Path, default=root / "assets" / "prompts", help="folder of the prompt files (rewritten)")
    return parser


def main(argv: list[str] | None = None) -> None:
    video = "--video" in (sys.argv[1:] if argv is None else argv)
    options = vars(_parser(video).parse_args(argv))
    if threads := options.pop("threads"):
        torch.set_num_threads(threads)
    write_prompts(options.pop("prompts"))
    options["bf16"] = not options.pop("fp32")
    del options["video"]
    build(Settings(**{**(VIDEO if video else {}), **options}))


if __name__ == "__main__":
    main()
