"""The pipeline is the policy: rollout, replay, decode and adapters on real diffusers pipelines of nine families."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from flowrl.policy import Policy, resolve_model
from flowrl.samplers import CPS, DDIM, ODE, FlowSDE
from flowrl.samplers.scheduler import Unservable, one_step_scheduler
from tests.pipelines import CALL, DENOISER, GUIDED, reload, tiny

PROMPTS = ["a red circle", "blue", "two green squares"]
SEEDS = [1, 2, 3]
FLOW = ["sd3", "flux", "qwenimage", "wan", "ltx", "hunyuan"]
ALL = ["sd15", "sdxl", "cogvideox", *FLOW]
CASES = [pytest.param(name, guided, id=f"{name}{'-guided' if guided else ''}") for name in ALL for guided in (False, True)]


def make(name: str, guided: bool = False, **options) -> Policy:
    return Policy(tiny(name, **options), {**CALL[name], **(GUIDED[name] if guided else {}), "num_inference_steps": 5})


@pytest.mark.parametrize(("name", "guided"), CASES)
def test_replay_and_decode_are_bit_equal(name, guided):
    """The velocity at a recorded state, its log-prob and the decoded picture are those of the rollout, to the bit."""
    policy = make(name, guided)
    samples = policy.rollout(PROMPTS, SEEDS, transition=FlowSDE(0.7), stochastic=[0, 2, 3], keep_velocity=True)
    assert [step.index for step in samples.steps] == [0, 2, 3]
    for step in samples.steps:
        v = policy.velocity(PROMPTS, step)
        assert torch.equal(v, step.v)
        assert torch.equal(step.gaussian(v).log_prob(step.x_next), step.log_prob)
    whole = policy.decode(samples)
    assert whole.min() >= 0 and whole.max() <= 1 and whole.shape[0] == 3 and whole.shape[-3] == 3
    assert torch.equal(whole, policy.decode(samples))


@pytest.mark.parametrize(("name", "guided"), CASES)
def test_times_per_sample(name, guided):
    """One time per sample gives what separate calls with one time each give, and the times matter."""
    policy = make(name, guided)
    x = policy.rollout(PROMPTS, SEEDS, transition=FlowSDE(0.7), stochastic=[1]).steps[0].x
    t = torch.tensor([0.9, 0.5, 0.3])
    together = policy.velocity(PROMPTS, x, t)
    alone = torch.cat([policy.velocity([PROMPTS[i]], x[i : i + 1], t[i : i + 1]) for i in range(3)])
    assert (together - alone).abs().max() < 1e-4 * alone.abs().max()
    assert (together - policy.velocity(PROMPTS, x, torch.full((3,), 0.5)))[0].abs().max() > 1e-2 * alone.abs().max()


@pytest.mark.parametrize("name", ALL)
def test_samples_do_not_depend_on_their_batch(name):
    policy = make(name)
    kwargs = {"transition": FlowSDE(0.7), "stochastic": [0, 2]}
    batch = policy.rollout(PROMPTS, SEEDS, **kwargs).latents
    alone = policy.rollout(PROMPTS[1:2], SEEDS[1:2], **kwargs).latents
    assert (batch[1:2] - alone).abs().max() < 1e-4 * alone.abs().max()
    assert (batch[0] - batch[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["sd3", "flux", "qwenimage", "ltx", "hunyuan", "cogvideox"])
def test_plain_rollout_is_the_pipelines_own_call(name):
    """Without stochastic steps the policy draws what the untouched pipeline draws with the same generators."""
    pipe = tiny(name)
    generators = [torch.Generator().manual_seed(2 * seed) for seed in SEEDS]
    expected = pipe(PROMPTS, generator=generators, num_inference_steps=5, output_type="pt", **CALL[name])[0]
    policy = make(name)
    got = policy.decode(policy.rollout(PROMPTS, SEEDS))
    assert (got - torch.as_tensor(expected).float()).abs().max() < 2e-3


def test_noise_levels_that_are_moved_stay_where_they_are():
    """CogVideoX divides its signal-to-noise ratio by snr_shift_scale: the same steps are noisier, and end at 0 all the same."""
    call = {**CALL["cogvideox"], "num_inference_steps": 4}
    moved, plain = (Policy(tiny("cogvideox", snr_shift_scale=scale), call) for scale in (3.0, 1.0))
    assert torch.equal(moved.pipe.scheduler.alphas_cumprod, tiny("cogvideox").scheduler.alphas_cumprod.float())
    assert all(a > b for a, b in zip(moved.times[1:-1], plain.times[1:-1], strict=True))
    assert moved.times[0] == plain.times[0] == 1 and moved.times[-1] == plain.times[-1] == 0


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_unet_rollout_is_ddim(prediction):
    """An SD1.5 rollout by the flow's ODE is the pipeline's call with DDIM(eta = 0), for eps- and v-prediction."""
    options = {"prediction": "v"} if prediction == "v" else {}
    pipe = tiny("sd15", **options)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    generators = [torch.Generator().manual_seed(2 * seed) for seed in SEEDS]
    expected = pipe(PROMPTS, generator=generators, num_inference_steps=5, output_type="latent", **CALL["sd15"])[0]
    got = make("sd15", **options).rollout(PROMPTS, SEEDS).latents
    assert (got - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", ALL)
def test_gradient_reaches_every_lora_weight_and_nothing_else(name):
    policy = make(name)
    policy.add_lora(rank=2)
    with torch.no_grad():
        for parameter in policy.trainable().values():  # B starts at 0, and then A has no gradient
            parameter.add_(0.05)
    step = policy.rollout(PROMPTS, SEEDS, transition=CPS(0.8), stochastic=[1]).steps[0]
    policy.velocity(PROMPTS, step).float().square().sum().backward()
    assert all("lora_" in key for key in policy.trainable())
    # The last block of a joint transformer discards its text stream, so that stream's output projections get none.
    without = [key for key, p in policy.trainable().items() if p.grad is None or not p.grad.any()]
    assert len(without) < len(policy.trainable()) / 4
    for component in policy.pipe.components.values():
        if isinstance(component, torch.nn.Module):
            assert all(p.grad is None for key, p in component.named_parameters() if "lora_" not in key)


@pytest.mark.parametrize("name", ALL)
def test_update_save_and_load_through_diffusers(name, tmp_path):
    """One update changes LoRA weights only; the file that is saved, loaded by the pipeline itself, draws the same picture."""
    policy = make(name)
    policy.pipe.save_pretrained(tmp_path / "base")
    policy = Policy(reload(tmp_path / "base"), policy.call)
    policy.add_lora(rank=2, alpha=3)
    frozen = {key: p.clone() for key, p in policy.denoisers[DENOISER[name]].named_parameters() if "lora_" not in key}
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.5)
    for _ in range(2):
        step = policy.rollout(PROMPTS, SEEDS, transition=CPS(0.8), stochastic=[1]).steps[0]
        v = policy.velocity(PROMPTS, step)
        (v.square().mean() / v.detach().square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(policy.trainable().values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = dict(policy.denoisers[DENOISER[name]].named_parameters())
    assert all(torch.equal(after[key], value) for key, value in frozen.items())
    policy.save(tmp_path / "lora")
    tuned = policy.decode(policy.rollout(PROMPTS, SEEDS))
    with policy.using("reference"):
        base = policy.decode(policy.rollout(PROMPTS, SEEDS))
    assert not torch.equal(tuned, base)

    fresh = reload(tmp_path / "base")
    fresh.load_lora_weights(tmp_path / "lora")
    loaded = Policy(fresh, policy.call)
    assert torch.allclose(loaded.decode(loaded.rollout(PROMPTS, SEEDS)), tuned, atol=1e-5)


def test_wearing_other_weights():
    """using() swaps weights and puts them back; a snapshot follows the policy by its decay."""
    policy = make("sd3")
    policy.train_all()
    key, parameter = next(iter(policy.trainable().items()))
    policy.snapshot("reference")
    policy.snapshot("ema")
    start = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(1.0)
    policy.blend("ema", 0.9)
    assert torch.allclose(policy.snapshots["ema"][key], start + 0.1, atol=1e-6)
    with policy.using("reference"):
        assert torch.equal(parameter, start)
        with pytest.raises(RuntimeError, match="already using"), policy.using("ema"):
            pass
    assert torch.equal(parameter, start + 1.0)
    with pytest.raises(KeyError, match="no weights named"), policy.using("odl"):
        pass
    assert policy.wearing == "policy"


def test_prompts_are_encoded_once():
    policy = make("sd3")
    calls = []
    inner = policy.pipe.text_encoder.forward
    policy.pipe.text_encoder.forward = lambda *a, **k: calls.append(1) or inner(*a, **k)
    policy.rollout(PROMPTS * 2, range(6))
    first = len(calls)
    policy.rollout(PROMPTS[::-1], SEEDS)
    assert first > 0
    assert len(calls) == first


def test_bf16_weights_replay_with_ratio_one():
    pipe = tiny("sd3").to(torch.bfloat16)
    policy = Policy(pipe, {**CALL["sd3"], "num_inference_steps": 5})
    policy.add_lora(rank=2)
    assert all(p.dtype == torch.float32 for p in policy.trainable().values())
    samples = policy.rollout(PROMPTS, SEEDS, transition=FlowSDE(0.7), stochastic=[1, 3])
    for step in samples.steps:
        assert step.native.dtype == torch.bfloat16
        ratio = (step.gaussian(policy.velocity(PROMPTS, step)).log_prob(step.x_next) - step.log_prob).exp()
        assert (ratio - 1).abs().max() <= 1e-5


def test_autocast_keeps_the_graph_after_a_no_grad_pass():
    """A weight cache filled under no_grad would cut the graph: the ratio would stay at 1 for ever."""
    policy = Policy(tiny("sd3"), {**CALL["sd3"], "num_inference_steps": 5}, autocast=torch.bfloat16)
    policy.add_lora(rank=2)
    step = policy.rollout(PROMPTS, SEEDS, transition=CPS(0.8), stochastic=[1], keep_velocity=True).steps[0]
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=10.0)
    with torch.no_grad(), policy.using("reference"):
        policy.velocity(PROMPTS, step)
    v = policy.velocity(PROMPTS, step)
    assert torch.equal(v, step.v)
    v.float().square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in policy.trainable().values())
    optimizer.step()
    assert not torch.equal(policy.velocity(PROMPTS, step), step.v)


def test_shared_initial_noise():
    policy = make("sd3")
    shared = policy.rollout(["a"] * 2, [1, 2], init_seeds=[7, 7], transition=CPS(0.8), stochastic=[0])
    assert torch.equal(shared.steps[0].native[0], shared.steps[0].native[1])
    assert not torch.equal(shared.latents[0], shared.latents[1])


def test_deterministic_transition_cannot_be_stochastic():
    with pytest.raises(ValueError, match="deterministic"):
        make("sd3").rollout(["a"], [1], transition=ODE(), stochastic=[0])


def test_lora_targets_that_match_nothing():
    with pytest.raises(ValueError, match="match nothing.*to_q"):
        make("sd3").add_lora(targets=["to_qq"])


# ------------------------------------------------------------------------------------------------ schedulers, refusals


def test_multistep_schedulers_become_one_step():
    wan = tiny("wan").scheduler
    flow = one_step_scheduler(wan)
    assert isinstance(flow, FlowMatchEulerDiscreteScheduler)
    assert flow.config.shift == wan.config.flow_shift
    assert isinstance(one_step_scheduler(tiny("sdxl").scheduler), DDIMScheduler)


def test_unservable_schedulers_say_why():
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(Unservable, match="inverted sigmas"):
        one_step_scheduler(scheduler)
    with pytest.raises(Unservable, match="zero terminal SNR"):
        one_step_scheduler(DDIMScheduler(rescale_betas_zero_snr=True))


def test_unservable_pipeline_is_refused_at_load():
    from diffusers import DDPMPipeline

    unet = tiny("sd15").unet
    with pytest.raises(Unservable, match="no encode_prompt"):
        Policy(DDPMPipeline(unet=unet, scheduler=DDIMScheduler()))


def test_models_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="embedded models: tiny-sd3"):
        resolve_model("tiny-sd4")
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        resolve_model(tmp_path)
    tiny("sd3").save_pretrained(tmp_path / "m")
    for file in (tmp_path / "m" / "transformer").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no safetensors weights for: transformer"):
        resolve_model(tmp_path / "m")


def test_the_pipeline_is_left_as_it_was():
    """After use, scheduler class, methods and flags of the pipeline are its own again."""
    policy = make("sd3")
    before = (type(policy.pipe.scheduler), copy.copy(policy.pipe.scheduler.config))
    samples = policy.rollout(PROMPTS, SEEDS, transition=DDIM(1.0), stochastic=[0])
    policy.velocity(PROMPTS, samples.steps[0])
    policy.decode(samples)
    assert (type(policy.pipe.scheduler), policy.pipe.scheduler.config) == before
    assert "prepare_latents" not in vars(policy.pipe)
    assert not policy.pipe.interrupt


def test_latents_of_another_size_are_refused():
    policy = make("sd3")
    with pytest.raises(ValueError, match="do not fit this call"):
        policy.decode(torch.zeros(1, 4, 3, 3), prompts=["a"])


def test_vp_grid_is_ddims():
    """t of each level from the model's alphas: sqrt(1-abar) / (sqrt(abar) + sqrt(1-abar)), by hand for the first one."""
    policy = make("sd15")
    grid = policy.grid()
    abar = float(policy.pipe.scheduler.alphas_cumprod[grid.timesteps[0]])
    assert grid.t[0] == pytest.approx(math.sqrt(1 - abar) / (math.sqrt(abar) + math.sqrt(1 - abar)), abs=1e-6)
    assert all(a > b for a, b in zip(grid.t, grid.t[1:], strict=False))


# ------------------------------------------------------------------------------------------------ pictures as latents


def pictures_of(name: str, count: int = 3) -> torch.Tensor:
    shape = (count, CALL[name]["num_frames"], 3, 32, 32) if "num_frames" in CALL[name] else (count, 3, 32, 32)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ALL)
def test_latents_of_pictures_decode_to_what_the_autoencoder_makes_of_them(name):
    """The bare autoencoder, there and back, gives the pictures that the pipeline's tail gives for `latents_of`: scale and shift
    (SD), mean and deviation of each channel (Qwen, Wan, LTX), packing (FLUX, Qwen, LTX) and frames are all undone."""
    policy, pictures = make(name), pictures_of(name)
    latents = policy.latents_of(pictures)
    assert latents.shape == policy.rollout(PROMPTS, SEEDS).latents.shape and not latents.requires_grad
    vae, inputs = tiny(name).vae, 2 * pictures - 1
    framed = inputs.transpose(1, 2) if inputs.ndim == 5 else inputs[:, :, None] if name == "qwenimage" else inputs
    with torch.no_grad():
        back = vae.decode(vae.encode(framed).latent_dist.mode()).sample
    expected = (back / 2 + 0.5).clamp(0, 1)
    expected = expected.transpose(1, 2) if inputs.ndim == 5 else expected[:, :, 0] if name == "qwenimage" else expected
    assert (policy.decode(latents) - expected).abs().max() < 1e-4
    assert (expected - expected.flip(0)).abs().max() > 1e-3, "the pictures differ"


def test_latents_of_a_picture_do_not_depend_on_the_others():
    policy, pictures = make("sd3"), pictures_of("sd3")
    assert torch.equal(policy.latents_of(pictures)[1:2], policy.latents_of(pictures[1:2]))


def test_pictures_that_cannot_become_latents():
    """Another size than the call draws; a pipeline whose autoencoder only decodes."""
    policy = make("sd3")
    with pytest.raises(ValueError, match="pictures of 48 x 32 pixels .* set height and width"):
        policy.latents_of(torch.rand(1, 3, 32, 48))
    policy.pipe.vae = torch.nn.Identity()
    with pytest.raises(Unservable, match="no autoencoder that encodes"):
        policy.latents_of(pictures_of("sd3"))
