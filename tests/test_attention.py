"""Attention backends: the one that is asked for is the one that runs, in every family, forward, backward and recomputed."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from flowrl.attention import eager, names, set_backend
from flowrl.policy import Policy
from tests.pipelines import CALL, tiny

FAMILIES = ("sd15", "sdxl", "sd3", "flux", "qwenimage", "wan", "ltx", "hunyuan")


class Fused(TorchDispatchMode):
    """Counts the calls of torch's fused attention kernels inside its block."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "scaled_dot_product" in func.name()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def family(request):
    """A policy, its denoiser, and a function: (output and gradient of a call, fused kernels in the denoiser's passes)."""
    name = request.param
    policy = Policy(tiny(name), CALL[name])
    policy.add_lora(rank=2)
    (denoiser,) = policy.denoisers.values()
    samples = policy.rollout(["a red circle", "two cats"], [0, 1], num_inference_steps=2)
    fused, forward = Fused(), denoiser.forward

    def counted(*args, **kwargs):
        with fused:
            return forward(*args, **kwargs)

    denoiser.forward = counted

    def run():
        fused.count = 0
        x = samples.latents.clone().requires_grad_()
        v = policy.velocity(samples.prompts, x, torch.tensor([0.4, 0.7]))
        with fused:
            (gradient,) = torch.autograd.grad(v.square().sum(), x)
        return v.detach(), gradient, fused.count

    return policy, denoiser, run


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_the_backend_that_is_asked_for_runs(family):
    """Also where a processor calls torch's function and knows no backends (Stable Diffusion 1.5, XL, 3)."""
    policy, _, run = family
    v, gradient, fused = run()
    assert fused > 0
    for name in ("eager", "_native_math"):
        policy.set_attention_backend(name)
        again, gradient_again, count = run()
        assert count == 0
        torch.testing.assert_close(again, v, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(gradient_again, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
    policy.set_attention_backend("native")
    back, _, count = run()
    assert count == fused and torch.equal(back, v)


@pytest.mark.parametrize("family", ["sd3", "wan"], indirect=True)
def test_recomputation_takes_the_same_way(family):
    policy, denoiser, run = family
    policy.set_attention_backend("eager")
    _, gradient, _ = run()
    policy.enable_gradient_checkpointing()
    denoiser.train()
    _, recomputed, count = run()
    assert count == 0
    torch.testing.assert_close(recomputed, gradient)


@pytest.mark.parametrize(
    "mask", [None, torch.tensor([[True, False, True, True, False]] * 4), torch.linspace(-1, 1, 20).reshape(4, 5)]
)
def test_eager_is_the_formula(mask):
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(2, 3, 4, 8, generator=rng), *torch.randn(2, 2, 3, 5, 8, generator=rng)
    for scale in (None, 0.7):
        torch.testing.assert_close(eager(q, k, v, mask, scale=scale), F.scaled_dot_product_attention(q, k, v, mask, scale=scale))


def test_refusals():
    q = torch.ones(1, 1, 2, 4)
    for options in ({"is_causal": True}, {"dropout_p": 0.1}, {"enable_gqa": True}):
        with pytest.raises(ValueError, match="eager has no dropout, causality"):
            eager(q, q, q, **options)
    with pytest.raises(ValueError, match="Linear has no attention backends"):
        set_backend(torch.nn.Linear(2, 2), "native")
    with pytest.raises(ValueError, match="unknown backend; choose from .*eager.*native.*xformers"):
        set_backend(Policy(tiny("sd3"), CALL["sd3"]).pipe.transformer, "nativ")
    assert "eager" in names() and not any(name.startswith("_") for name in names())
