"""Motion in clips as tensor arithmetic, with graph: optical flow, how much moves, how smoothly, how much flickers.

flow        a(x) = b(x + u(x)), u (B, 2, H, W) in pixels, (x, y)
flicker     1 - mean |I_{t+1} - I_t|                                             VBench, 2311.17982: temporal flickering
smoothness  1 - mean |I_t - (I_{t-1}(x + u_-) + I_{t+1}(x + u_+)) / 2|           ours, in place of VBench's interpolator
            u_- = (u_{b,a} - u_{a,b}) / 4, u_+ = -u_-                            Super SloMo, 1712.00080: eq. 4 at t = 1/2
degree      of each pair of frames the mean of the 5 % largest |u|, of these the k-th largest    VBench: dynamic degree
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowrl.reward_models.weights import fill, read

#: Two batches of pictures (B, 3, H, W) in [0, 1] -> u (B, 2, H, W).
Flow = Callable[[Tensor, Tensor], Tensor]

DEGREE_FPS = 8  #: Frames per second that VBench's dynamic degree looks at.
DEGREE_PIXELS = 6 / 256  #: Of the shorter side: what must be moved between two of these frames to count.
DEGREE_SHARE = 4 / 16  #: Of the frames must move by that much.
REACH = 2.0  #: Pixels by which a level of the flow may differ from the coarser one.
TOP = 0.05  #: Part of the pixels whose mean speed is a frame's.


def flicker(clips: Tensor) -> Tensor:
    """(N,) in [0, 1], 1 where nothing changes. clips: (N, F, 3, H, W)."""
    return 1 - (clips[:, 1:] - clips[:, :-1]).float().abs().flatten(1).mean(1)


def smoothness(clips: Tensor, flow: Flow) -> Tensor:
    """(N,) in [0, 1]: how near every inner frame is to the middle of its neighbours, along the flow. clips: F >= 3 frames."""
    before, middle, after = (clips[:, i : clips.shape[1] - 2 + i].flatten(0, 1) for i in range(3))
    half = (flow(after, before) - flow(before, after)) / 4
    between = (warp(before, half) + warp(after, -half)) / 2
    return 1 - (middle - between).abs().unflatten(0, (len(clips), -1)).flatten(1).mean(1)


def degree(clips: Tensor, flow: Flow, fps: float, held: bool = False) -> Tensor:
    """(N,) speed of the k-th fastest pair of frames, over the speed that counts: above 1 VBench says that the clip moves.

    Frames are thinned to about 8 per second, and k is a quarter of them. clips: (N, F, 3, H, W), F >= 2. held: speeds count by
    the square of what they explain (`explained`), which VBench does not ask.
    """
    seen = clips[:, :: max(1, round(fps / DEGREE_FPS))]
    if seen.shape[1] < 2:
        seen = clips[:, [0, -1]]
    a, b = seen[:, :-1].flatten(0, 1), seen[:, 1:].flatten(0, 1)
    u = flow(a, b)
    speed = (u.square().sum(1) + 1e-12).sqrt()
    if held:
        speed = speed * explained(a, b, u).square()
    speed = speed.flatten(1)
    fastest = speed.topk(max(1, int(TOP * speed.shape[1])), dim=1).values.mean(1).unflatten(0, (len(clips), -1))
    k = min(max(1, round(DEGREE_SHARE * seen.shape[1])), fastest.shape[1])
    return fastest.topk(k, dim=1).values[:, -1] / (DEGREE_PIXELS * min(clips.shape[-2:]))


def explained(a: Tensor, b: Tensor, u: Tensor, sigma: float = 2.0) -> Tensor:
    """(B, H, W) in [0, 1]: the part of the change around a pixel, in squares, that the flow undoes. 1 of what moves, about 0.3 of
    noise, less of what fades."""
    change, rest = (blur((other.float() - a).square().mean(1, keepdim=True), sigma) for other in (b, warp(b, u)))
    return (1 - rest / (change + 1e-4)).clamp(0, 1)[:, 0]


# ------------------------------------------------------------------------------------------------ flow


def warp(images: Tensor, u: Tensor) -> Tensor:
    """images(x + u(x)), bilinear, the border repeated. images: (B, C, H, W); u: (B, 2, H, W) in pixels, (x, y)."""
    height, width = images.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height).to(u), torch.arange(width).to(u), indexing="ij")
    at_x, at_y = (2 * (x + u[:, 0]) / max(width - 1, 1) - 1), (2 * (y + u[:, 1]) / max(height - 1, 1) - 1)
    return F.grid_sample(images.float(), torch.stack([at_x, at_y], -1), padding_mode="border", align_corners=True)


def lucas_kanade(a: Tensor, b: Tensor, levels: int = 4, iterations: int = 4, sigma: float = 1.5, damping: float = 1e-4) -> Tensor:
    """Dense Lucas-Kanade from coarse to fine: du = -(sum w g g^T + damping 1)^-1 sum w g (b(x + u) - a), g the mean gradient.

    sigma: of the Gaussian window w, in pixels of each level. damping: against places without texture, which keep the flow of the
    coarser level. A level halves the sides, down to 8 pixels.
    """
    grey = a.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1).float()
    pyramid = [((a.float() * grey).sum(1, keepdim=True), (b.float() * grey).sum(1, keepdim=True))]
    while len(pyramid) < levels and min(pyramid[-1][0].shape[-2:]) >= 16:
        pyramid.append(tuple(F.avg_pool2d(blur(x, 0.8), 2) for x in pyramid[-1]))  # type: ignore[arg-type]
    u = torch.zeros_like(pyramid[-1][0]).expand(-1, 2, -1, -1)
    for first, second in reversed(pyramid):
        size = first.shape[-2:]
        if u.shape[-2:] != size:
            scale = u.new_tensor([size[1] / u.shape[-1], size[0] / u.shape[-2]]).view(1, 2, 1, 1)
            u = F.interpolate(u, size, mode="bilinear", align_corners=False) * scale
        coarse = u
        for _ in range(iterations):
            moved, seen = warp(second, u), inside(u)
            gx, gy = gradient((first + moved) / 2)
            change = moved - first
            products = blur(torch.cat([gx * gx, gx * gy, gy * gy, gx * change, gy * change], 1) * seen, sigma)
            xx, xy, yy, xt, yt = products.unbind(1)
            xx, yy = xx + damping, yy + damping
            determinant = xx * yy - xy * xy
            step = -torch.stack([yy * xt - xy * yt, xx * yt - xy * xt], 1) / determinant[:, None]
            u = coarse + (u + step - coarse).clamp(-REACH, REACH)
        u = blur(u, sigma)
    return u


def inside(u: Tensor) -> Tensor:
    """(B, 1, H, W): 1 where x + u(x) lies in the picture, else 0; what left it says nothing of its motion."""
    height, width = u.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height).to(u), torch.arange(width).to(u), indexing="ij")
    at_x, at_y = x + u[:, 0].detach(), y + u[:, 1].detach()
    return ((at_x >= 0) & (at_x <= width - 1) & (at_y >= 0) & (at_y <= height - 1)).float()[:, None]


def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences of (B, 1, H, W) along x and y, per pixel."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2, (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian, per channel of (B, C, H, W), the border repeated."""
    reach = max(1, round(2.5 * sigma))
    weights = torch.exp(-(torch.arange(-reach, reach + 1).to(x) ** 2) / (2 * sigma**2))
    weights, channels = weights / weights.sum(), x.shape[1]
    padded = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(rows, weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


class Raft:
    """torchvision's RAFT (2003.12039) with the user's weights, large or small as the file says. Small pictures are enlarged."""

    def __init__(self, weights: str | Path):
        from torchvision.models.optical_flow import raft_large, raft_small

        path = Path(weights).expanduser()
        if not path.is_file():
            raise ValueError(f"weights={str(weights)!r}: no such file; raft wants torchvision's, as raft_large_C_T_SKHT_V2")
        state = read(path)
        self.network = (raft_large if "mask_predictor.convrelu.0.weight" in state else raft_small)(weights=None)
        fill(self.network, state, path)
        self.network.requires_grad_(False).eval()

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        height, width = a.shape[-2:]
        scale = max(1.0, 128 / min(height, width))
        size = tuple(max(128, 8 * round(side * scale / 8)) for side in (height, width))
        large = [F.interpolate(x.float(), size, mode="bilinear", align_corners=False) * 2 - 1 for x in (a, b)]
        u = self.network.to(a.device)(*large)[-1]
        back = u.new_tensor([width / size[1], height / size[0]]).view(1, 2, 1, 1)
        return F.interpolate(u, (height, width), mode="bilinear", align_corners=False) * back


def load_flow(spec: Any = "lucas_kanade", weights: str | Path | None = None) -> Flow:
    """lucas_kanade, raft (with its weights), "package.module:function" of your own, or a function. Raises ValueError."""
    import pkgutil

    if callable(spec):
        return spec
    if spec == "lucas_kanade":
        return lucas_kanade
    if spec == "raft":
        if weights is None:
            raise ValueError("flow=raft wants weights: a file of torchvision's, as raft_large_C_T_SKHT_V2")
        return Raft(weights)
    if isinstance(spec, str) and ":" in spec:
        try:
            return pkgutil.resolve_name(spec)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"flow={spec!r} cannot be imported: {error}") from None
    raise ValueError(f"flow={spec!r}: choose lucas_kanade, raft, or package.module:function of your own")
