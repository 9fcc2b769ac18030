"""Which kernel computes a denoiser's attention, by name: diffusers' backends, and `eager`.

    set_backend(pipe.transformer, "xformers")      # native, flash, xformers, ...: what this diffusers and machine have
    set_backend(pipe.transformer, "eager")         # softmax(q k^T / sqrt d) v, operator by operator

diffusers gives the name to the attention processors that ask its dispatcher (FLUX, Wan, Qwen-Image, ...). Those of Stable
Diffusion 1.5, XL and 3 call torch's fused function themselves and would ignore it without a word; here that call is led to the
dispatcher as well, inside the processor, so that recomputation under gradient checkpointing takes the same way.

`eager` is for bfloat16 on CPUs, where the fused kernel's backward pass is slow: for a batch of 96, 4 heads of 32, 81 tokens, one
thread takes 19 ms for both passes in place of 95.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

EAGER = "eager"


def names() -> list[str]:
    """What `set_backend` takes; which of them a machine has, it finds out. Names of diffusers that begin with _ are left out."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return sorted([EAGER, *(each.value for each in AttentionBackendName if not each.value.startswith("_"))])


def set_backend(module: nn.Module, name: str) -> None:
    """Every attention of a denoiser by this backend, forward and backward.

    Raises ValueError for an unknown name, or a module whose attention cannot be chosen; RuntimeError or ImportError, from
    diffusers, for a backend that this machine lacks.
    """
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
    from diffusers.models.attention_processor import Attention, MochiAttention

    kinds = (Attention, MochiAttention, AttentionModuleMixin)
    processors = [part.processor for part in module.modules() if isinstance(part, kinds) and part.processor is not None]
    choose: Any = getattr(module, "set_attention_backend", None)
    if choose is None or not processors:
        raise ValueError(f"{type(module).__name__} has no attention backends in this diffusers; leave attention_backend unset")
    if name != EAGER and name not in {backend.value for backend in AttentionBackendName}:
        raise ValueError(f"unknown backend; choose from {', '.join(names())}")
    choose("native" if name == EAGER else name)

    def dispatched(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        swapped = (each.transpose(1, 2) for each in (query, key, value))  # the dispatcher has tokens before heads
        return dispatch_attention_fn(*swapped, *args, backend=AttentionBackendName(name), **kwargs).transpose(1, 2)

    for processor in processors:
        asks = hasattr(processor, "_attention_backend")
        _lead(processor, eager if name == EAGER else None if asks or name == "native" else dispatched)


def eager(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **kwargs: Any) -> Tensor:
    """softmax(q k^T scale + mask) v for tensors (batch, heads, tokens, channels); a boolean mask is True where one may look.

    Of torch's further arguments it takes scale, by name. Raises ValueError for dropout, causality and grouped queries.
    """
    scale = kwargs.pop("scale", None) or query.shape[-1] ** -0.5
    if any(rest) or any(kwargs.values()):
        raise ValueError(f"attention_backend={EAGER} has no dropout, causality or grouped queries")
    scores = (query * scale) @ key.transpose(-1, -2)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1).to(value.dtype) @ value


class _Led(TorchFunctionMode):
    """Inside its block torch's fused attention is the given function."""

    def __init__(self, kernel: Callable[..., Tensor]):
        super().__init__()
        self.kernel = kernel

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.kernel if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def _lead(processor: Any, kernel: Callable[..., Tensor] | None) -> None:
    """Let a processor compute attention by `kernel`, or, None, as it is written."""
    if not hasattr(processor, "_kernel"):
        if kernel is None:
            return
        processor.__class__ = _leading(processor.__class__)
    processor._kernel = kernel


@functools.cache
def _leading(kind: Any) -> Any:
    """A processor class whose calls look at `_kernel`. Its signature is kept: diffusers reads it."""

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._kernel is None:
            return kind.__call__(self, *args, **kwargs)
        with _Led(self._kernel):
            return kind.__call__(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})
