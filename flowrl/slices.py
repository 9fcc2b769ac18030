"""Clips decoded latent frame by latent frame, for the gradient of a few frames only.

with sliced(vae, frames=[0, 7], stride=4, context=0):
    clip = vae.decode(z)          # frames 0 and 7 (of latent frames 0 and 2) carry a graph, and are what they always are

The autoencoder of Wan is causal in time: it decodes one latent frame after the other and keeps of the earlier ones what its
convolutions reach back to. So what comes after the last frame that is wanted need not be decoded, and what comes before needs no
graph where the gradient may end there. Frames are exact in any case, to the bit. The gradient is exact with context=None; with
context=c it leaves out what a frame owes to latent frames more than c before its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: Autoencoders whose `decode` calls their `decoder` once for each latent frame, the first with first_chunk=True.
SLICING = ("AutoencoderKLWan",)


def latent_frame(frame: int, stride: int) -> int:
    """The latent frame that a frame is decoded from: the first is alone, then `stride` of them each."""
    return 0 if frame == 0 else (frame - 1) // stride + 1


@contextmanager
def sliced(vae: Any, frames: Sequence[int], stride: int | None, context: int | None = None) -> Iterator[None]:
    """Within, `vae` decodes for the sake of these frames alone: others come without graph, those after the last as zeros.

    An autoencoder that does not decode in slices is left as it is, and everything is exact.
    """
    if type(vae).__name__ not in SLICING or not stride or not frames:
        yield
        return
    wanted = {latent_frame(frame, stride) for frame in frames}
    last = max(wanted)
    reach = last if context is None else context
    live = {i for s in wanted for i in range(max(0, s - reach), s + 1)}
    decode, at = vae.decoder.forward, -1
    shape: torch.Size

    def forward(x: Tensor, *args: Any, first_chunk: bool = False, **kwargs: Any) -> Tensor:
        nonlocal at, shape
        at = 0 if first_chunk else at + 1
        if at > last:
            return x.new_zeros(*shape[:2], stride, *shape[3:])
        with torch.set_grad_enabled(torch.is_grad_enabled() and at in live):
            out = decode(x, *args, first_chunk=first_chunk, **kwargs)
        shape = out.shape
        return out

    vae.decoder.forward = forward
    try:
        yield
    finally:
        del vae.decoder.forward
