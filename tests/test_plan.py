"""The plan of a run: bytes and operations counted on shapes are those of the real tensors, and what they add up to."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from flowrl import Policy, Trainer, load_recipe
from flowrl.cli import main
from flowrl.config import ConfigError, recipe_names
from flowrl.hollow import Ledger, Shapes, locate, pipeline
from flowrl.plan import Estimate, Item, estimate, reward_names
from flowrl.train.offline import rows_of
from flowrl.train.trainer import decode_in_parts, parts, plan_of
from tests.pipelines import CALL, GUIDED, tiny

PROMPTS = ["a red circle", "blue"]


def planned(recipe, *overrides: str, processes: int = 1) -> Estimate:
    recipe = load_recipe(recipe, overrides)
    objective, _, _, trained = parts(recipe)
    rows = rows_of(recipe.data, objective.needs) if recipe.data else None
    return estimate(recipe, plan_of(recipe, objective, trained, processes, rows))


def item(found: Estimate, start: str) -> Item:
    (one,) = (item for item in found.items if item.name.startswith(start))
    return one


def existing(policy: Policy) -> list[torch.Tensor]:
    modules = [m for m in policy.pipe.components.values() if isinstance(m, nn.Module)]
    return [t for m in modules for t in (*m.parameters(), *m.buffers())] + [p.grad for p in policy.trainable().values()]


# ------------------------------------------------------------------------------------------------ the ledger, on shapes


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No collection of cycles meanwhile: checkpointing leaves some, and when they go is a matter of chance."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_the_ledger_counts_what_is_alive():
    """256 floats are 1,024 bytes. Two of them make 2,048 at most, and 1,024 when one has gone; a view of one is no third.
    (4, 8) times (8, 16) takes 2 x 4 x 8 x 16 = 1,024 operations, and 256 bytes for its result."""
    there = torch.zeros(256)
    a, b = torch.zeros(4, 8), torch.zeros(8, 16)
    with Ledger([there]) as ledger:
        first = there + 1
        second = first.view(16, 16) + 1
        assert (ledger.now, ledger.peak) == (2048, 2048)
        del first
        assert (ledger.now, ledger.peak) == (1024, 2048)
        there.add_(second.view(256))
        product = a @ b
    assert (ledger.now, ledger.peak, ledger.flops) == (1024 + product.nbytes, 2048, 1024) and product.nbytes == 256


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [*((name, False) for name in ("sd15", "sdxl", "sd3", "flux", "qwenimage", "wan", "ltx")), ("flux", True), ("wan", True)],
)
def test_shapes_take_what_tensors_take(name, checkpointing, tmp_path, uncollected):
    """Loss, backward pass and decoding of each family, guided by what its call knows of guidance: the same operations, and the
    same peak, to 0.1 %."""
    guided = {} if name in ("flux", "qwenimage") else GUIDED[name]  # a negative prompt of theirs is encoded in each call
    call = {**CALL[name], **guided, "num_inference_steps": 3}
    pipe = tiny(name)
    pipe.save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    found = []
    for policy in (Policy(pipe, call), Policy(pipeline(tmp_path, torch.float32), call)):
        policy.add_lora(rank=2)
        if checkpointing:
            policy.enable_gradient_checkpointing()
        x = policy.rollout(PROMPTS, [0, 1], stop=1).latents.float() if not found else torch.zeros(found[0][0])
        shapes = Shapes(policy) if found else None
        policy.encode(PROMPTS)
        for parameter in policy.trainable().values():
            parameter.grad = torch.zeros_like(parameter)
        t = torch.full((2,), 0.5)
        policy.velocity(PROMPTS, x if shapes is None else shapes.of(x), t)  # what modules keep from their first call
        x = x if shapes is None else shapes.of(x)
        with Ledger([*existing(policy), x]) as update:
            policy.velocity(PROMPTS, x, t).square().mean().backward()
        with Ledger([*existing(policy), x]) as decode:
            policy.decode(x, PROMPTS)
        found.append((tuple(x.shape), update.flops, decode.flops, update.peak, decode.peak))
    assert found[0][:3] == found[1][:3] and found[0][3:] == pytest.approx(found[1][3:], rel=1e-3)


def test_types_are_those_of_from_pretrained(tmp_path):
    """Wan keeps its norms and its time embedding in fp32 whatever is asked for."""
    pipe = tiny("wan")
    pipe.save_pretrained(tmp_path)
    real = type(pipe).from_pretrained(tmp_path, dtype=torch.bfloat16)
    hollow = pipeline(tmp_path, torch.bfloat16)
    for name in ("transformer", "vae", "text_encoder"):
        ours = {key: (p.shape, p.dtype) for key, p in getattr(hollow, name).named_parameters()}
        assert ours == {key: (p.shape, p.dtype) for key, p in getattr(real, name).named_parameters()}
    assert len({dtype for _, dtype in ours.values()}) == 1 and hollow.transformer.condition_embedder.time_embedder.linear_1


# ------------------------------------------------------------------------------------------------ what a run adds up to


def test_what_is_kept_by_hand(recipe, model):
    """Weights are 4 bytes each, 2 in bfloat16; a LoRA's are fp32 always, AdamW has two moments, the average is one copy more, and
    so is the reference of full fine-tuning. 4 samples of (4, 16, 16) fp32 are 16 KB; two neighbouring steps have 3 states, and
    8 log-probs."""
    pipe = tiny("sd3")
    count = sum(p.numel() for p in pipe.transformer.parameters())
    policy = Policy(pipe)
    policy.add_lora(rank=2)
    lora = sum(p.numel() for p in policy.trainable().values())
    found = planned(recipe)
    buffers = sum(b.nbytes for b in pipe.transformer.buffers())
    assert item(found, "transformer").size == (4 * count + buffers,) * 3
    assert item(found, "LoRA").size == (4 * lora,) * 3 and item(found, "AdamW").size == (8 * lora,) * 3
    assert item(found, "gradients").size == (0, 0, 4 * lora) and item(found, "copy of the weights: ema").size == (4 * lora,) * 3
    assert item(found, "recorded steps").size == (0, *(4 * 4096 * 4 + 2 * 4 * 4,) * 2)
    assert item(found, "pictures").size == (0, 0, 4 * 3 * 32 * 32 * 4)
    assert item(planned(recipe, "dtype=bfloat16"), "transformer").size[0] == 2 * count + buffers
    full = planned(recipe, "train=full", "objective.beta=0.1")
    assert item(full, "gradients").size == (0, 0, 4 * count) and item(full, "copy of the weights: reference").size[0] == 4 * count
    assert not any(one.name == "LoRA" for one in full.items)
    assert found.peak[2] == sum(one.size[2] for one in found.items)


def test_activations_grow_with_the_batch_and_shrink_by_recomputation(recipe):
    """Twice the batch keeps twice as much, but for what does not depend on it; what is kept of a step is as much as before."""
    four, two = planned(recipe), planned(recipe, "batch_size=2")
    a, b = (item(found, "activations").size[2] for found in (four, two))
    assert 1.8 < a / b < 2.01
    assert item(planned(recipe, "gradient_checkpointing=true"), "activations").size[2] < 0.8 * a
    assert item(two, "recorded steps").size[2] == item(four, "recorded steps").size[2] == 2 * item(two, "recorded steps").size[0]
    assert two.flops == four.flops and two.forward * 2 == four.forward


@pytest.mark.parametrize("options", [[], ["objective=nft"], ["objective=dpo"], ["objective=refl"], ["guidance_scale=4"]], ids=str)
def test_the_updates_peak_is_that_of_the_trainer(recipe, model, tmp_path, options):
    """Within 8 % for a model this small: the loop keeps noise and metrics of the batch before on top."""
    overrides = [*options, "batch_size=2", f"output_dir={tmp_path}", "watch=none"]
    overrides += ["steps={name: late, size: 1}"] if "objective=refl" in options else []
    found = planned(recipe, *overrides)
    trainer = Trainer(load_recipe(recipe, overrides))
    trainer.step()
    batches, _, _, advantage, _ = trainer.collect(trainer_clock())
    held = [t for s in trainer.policy.snapshots.values() for t in s.values()]
    held += [value for state in trainer.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    held += [p.detach() for p in trainer.policy.trainable().values()]
    held += [t for batch in batches for t in (batch.latents, batch.images, *(s.native for s in batch.steps))]
    held += [
        t for m in trainer.policy.pipe.components.values() if isinstance(m, nn.Module) for t in (*m.parameters(), *m.buffers())
    ]
    with Ledger(held) as ledger:
        trainer.update(batches, advantage)
    ours = item(found, "activations").size[2] + item(found, "gradients").size[2]
    assert ours == pytest.approx(ledger.peak, rel=0.08)


def trainer_clock():
    from flowrl.train.trainer import _Clock

    return _Clock()


def test_operations_and_time(recipe):
    """4 images in 3 steps are 3 calls of a batch. Of an update of 2 points, each costs a call, and a backward pass that takes
    about as much again (of the frozen weights only what reaches the adapters): 2 to 3 calls."""
    found = planned(recipe)
    assert found.flops[0] == 3 * found.forward
    assert 2 * 1.8 < found.flops[2] / found.forward < 2 * 3
    rollout, decode, update = found.seconds(0.5)
    assert rollout == 1.5 and update == pytest.approx(0.5 * found.flops[2] / found.forward) and decode > 0
    again = planned(recipe, "gradient_checkpointing=true")
    assert 0.8 < (again.flops[2] - found.flops[2]) / found.forward / 2 < 1.1  # once more forward, for each point
    with_reference = planned(recipe, "objective.beta=0.1")
    assert (with_reference.flops[2] - found.flops[2]) / found.forward == pytest.approx(2, abs=0.1)  # its pass, for each point


def test_branches_share_their_first_state_and_its_cost(recipe):
    """Two groups of two that part at the first of two steps: 2 states, then 4, where else there are 4 and 4. A rollout of three
    steps visits 2 + 4 + 4 of them, and twice the last 4 where a second stride ends anew."""
    apart, shared = planned(recipe), planned(recipe, "branches=[2]")
    assert shared.flops[0] / shared.forward == 10 / 4 and apart.flops[0] / apart.forward == 12 / 4
    assert planned(recipe, "branches=[2]", "strides=[1, 2]").flops[0] / shared.forward == 14 / 4
    assert shared.flops[2] / apart.flops[2] == pytest.approx(6 / 8, rel=0.02)
    assert item(shared, "activations").size[2] == pytest.approx(item(apart, "activations").size[2], rel=0.05)


@pytest.mark.parametrize("name", [name for name in recipe_names() if load_recipe(name).model == "tiny-sd3"])
def test_every_method_can_be_planned(name, model):
    """Its own loss runs on shapes: no objective looks at numbers on the way."""
    small = ["height=32", "width=32", "call={max_sequence_length: 32}", "attention_backend=null", "autocast=null"]
    recipe = load_recipe(name)
    rows = 2 if recipe.data else recipe.num_generations
    prompts = recipe.updates_per_step * 2
    small += [f"prompts_per_step={prompts}", f"batch_size={2 * rows}", f"model={model}", "prompts_by=null"]
    found = planned(name, *small)
    assert item(found, "activations").size[2] > 0 and found.flops[2] > 0
    assert (found.peak[0] == 0) == (recipe.data is not None)


def test_rewards(recipe):
    """What ships is counted from its files, what is known by its name, wrappers by what they hold, a latent reward by the model
    that it loads; others are named."""
    section = {"gate": {"of": {"name": "tiny_preference"}, "by": "tiny_artifact"}, "mine": {"name": "pickscore"}, "a.b": 1.0}
    assert list(reward_names(section)) == ["gate", "tiny_preference", "tiny_artifact", "pickscore", "a.b"]
    found = planned(recipe, "rewards={pickscore: 1, my.module.reward: 1}")
    assert item(found, "reward pickscore").size == (986_000_000 * 4,) * 3  # CLIP ViT-H/14 in float32
    assert any("my.module.reward" in note for note in found.notes)
    latent = {"process": {"name": "latent", "folder": "runs/mine", "dtype": "bfloat16", "weight": 0}, "tiny_artifact": 1}
    found = planned(recipe, f"rewards={json.dumps(latent)}")
    modules = [module for module in tiny("sd3").components.values() if isinstance(module, nn.Module)]
    assert item(found, "reward latent").size[0] == 2 * sum(p.numel() for module in modules for p in module.parameters())
    assert item(found, "reward tiny_artifact").size[0] > 0 and not found.notes


# ------------------------------------------------------------------------------------------------ decoding in parts


def test_slices_decode_the_same_in_less(recipe):
    assert item(planned(recipe, "decode=slices"), "decoding").size[1] < 0.6 * item(planned(recipe), "decoding").size[1]
    policy = Policy(tiny("sd3"), {**CALL["sd3"], "num_inference_steps": 2})
    batch = policy.rollout(PROMPTS, [0, 1])
    whole = policy.decode(batch)
    decode_in_parts(policy, "slices")
    torch.testing.assert_close(policy.decode(batch), whole, atol=1e-5, rtol=0)
    policy.pipe.vae = nn.Identity()
    with pytest.raises(ConfigError, match="decode=tiles: the Identity of StableDiffusion3Pipeline cannot"):
        decode_in_parts(policy, "tiles")


def test_a_steps_pictures_are_kept_once(recipe, tmp_path):
    trainer = Trainer(load_recipe(recipe, ["batch_size=2", f"output_dir={tmp_path}"]))
    batches, samples, *_ = trainer.collect(trainer_clock())
    assert len(batches) == 2
    storage = samples.images.untyped_storage().data_ptr()
    assert all(batch.images.untyped_storage().data_ptr() == storage for batch in batches)
    assert torch.equal(torch.cat([batch.images for batch in batches]), samples.images)


# ------------------------------------------------------------------------------------------------ the command


def test_command(recipe, capsys):
    assert main(["plan", str(recipe), "--forward", "0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("memory of a process"))
    rows = lines[start + 1 : next(i for i, line in enumerate(lines) if line.startswith("together, at most"))]
    assert any(row.startswith("transformer: SD3Transformer2DModel") for row in rows)
    assert any("smaller batch_size (now 4)" in row for row in rows)
    assert any(line.startswith("time of a step") and "rollout 1.5 s" in line for line in lines)
    assert main(["plan", str(recipe), "--no-memory"]) == 0
    assert "memory" not in capsys.readouterr().out


def test_a_model_that_is_not_here(recipe, capsys):
    assert main(["plan", str(recipe), "model=nobody/nothing"]) == 0
    out = capsys.readouterr().out
    assert "images per step" in out and "memory: the config files of nobody/nothing are not on this machine" in out
    assert "hf download nobody/nothing --include" in out


def test_models_that_cannot_be_read(recipe, model, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no model_index\.json"):
        locate(tmp_path / "empty")
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "transformer" / "config.json").unlink()
    assert main(["plan", str(recipe), f"model={broken}"]) == 0
    assert "lacks files of SD3Transformer2DModel" in capsys.readouterr().out
    shutil.copy(model / "transformer" / "config.json", broken / "transformer")
    index = json.loads((model / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", "AutoencoderOfTomorrow"]}))
    assert main(["plan", str(recipe), f"model={broken}"]) == 2
    assert "diffusers.AutoencoderOfTomorrow, which is not in the libraries" in capsys.readouterr().err
