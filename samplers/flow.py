"""The flow and its coordinates: x0, eps, v, score, re-noising, and diffusion models as the same flow.

This is the one place where the time convention is stated:

    t in [0, 1], 1 is noise        x_t = (1 - t) x0 + t eps,   eps ~ N(0, I)        v = d x_t / dt = eps - x0

A sampler walks down from t = 1 to t = 0. One step goes from t to t_next, and h = t - t_next > 0.

Everywhere in this package x, v, x0, eps are (B, ...) in any float dtype; times are a float, a scalar tensor or (B,).
Everything is computed and returned in fp32.
"""

from typing import TypeAlias

import torch
from torch import Tensor

Time: TypeAlias = float | Tensor  #: one number for the batch (a float or a scalar tensor), or (B,), one per sample


def expand(t: Time, x: Tensor) -> Tensor:
    """t in fp32 on the device of x, shaped to broadcast over x: () stays (), (B,) becomes (B, 1, ..., 1).

    The float is turned into fp32 before any arithmetic, so that a shared time and the same time given per sample
    produce the same bits.
    """
    t = torch.as_tensor(t, dtype=torch.float32, device=x.device)
    if t.numel() == 1:
        return t.reshape(())
    if t.dim() == x.dim() and t.shape[0] == x.shape[0]:
        return t
    if t.shape != x.shape[:1]:
        raise ValueError(
            f"A time of shape {tuple(t.shape)} does not fit x of shape {tuple(x.shape)}: "
            f"pass one number, or one per sample with shape ({x.shape[0]},)."
        )
    return t.reshape(-1, *[1] * (x.dim() - 1))


# -- the flow ----------------------------------------------------------------------------------------------------------


def noised(x0: Tensor, eps: Tensor, t: Time) -> Tensor:
    """x_t = (1 - t) x0 + t eps."""
    t = expand(t, x0)
    return (1 - t) * x0.float() + t * eps.float()


def x0_from(x: Tensor, v: Tensor, t: Time) -> Tensor:
    """x0_hat = x - t v."""
    return x.float() - expand(t, x) * v.float()


def eps_from(x: Tensor, v: Tensor, t: Time) -> Tensor:
    """eps_hat = x + (1 - t) v."""
    return x.float() + (1 - expand(t, x)) * v.float()


def score_from(x: Tensor, v: Tensor, t: Time) -> Tensor:
    """grad_x log p_t(x) = -(x - (1 - t) x0_hat) / t^2 = -eps_hat / t. Pole at t = 0."""
    return -eps_from(x, v, t) / expand(t, x)


def velocity_from_x0(x: Tensor, x0: Tensor, t: Time) -> Tensor:
    """v = (x - x0) / t, from x0 = x - t v. Pole at t = 0."""
    return (x.float() - x0.float()) / expand(t, x)


def velocity_from_eps(x: Tensor, eps: Tensor, t: Time) -> Tensor:
    """v = (eps - x) / (1 - t), from eps = x + (1 - t) v. Pole at t = 1, where x is all noise and eps tells nothing."""
    return (eps.float() - x.float()) / (1 - expand(t, x))


def renoise(x_next: Tensor, noise: Tensor, t_next: Time, t: Time) -> Tensor:
    """Forward from t_next up to t: a draw of x_t given x_{t_next}, exact for any data.

        x_t = c x_{t_next} + sqrt(t^2 - c^2 t_next^2) z,      c = (1 - t) / (1 - t_next)

    The variance is computed as h (t + c t_next) / (1 - t_next), which is equal and loses no digits when h is small.
    """
    t, t_next = expand(t, x_next), expand(t_next, x_next)
    c = (1 - t) / (1 - t_next)
    std = ((t - t_next) * (t + c * t_next) / (1 - t_next)).sqrt()
    return c * x_next.float() + std * noise.float()


# -- variance-preserving diffusion: the same flow in other coordinates -------------------------------------------------
#
#     x_vp = sqrt(abar) x0 + sqrt(1 - abar) eps = c x_flow,      sqrt(abar) = c (1 - t),      sqrt(1 - abar) = c t
#
# A step of any transition in the flow is a step of the diffusion model after scaling by c' = vp_scale(t_next):
#
#     mean_vp = c' mean_flow,      std_vp = c' std_flow
#
# Flow-DDIM(eta) becomes DDIM(eta) of the literature, term by term.


def vp_time(alpha_bar: Time) -> Tensor:
    """The flow time of a diffusion model's noise level: t = sqrt(1 - abar) / (sqrt(abar) + sqrt(1 - abar))."""
    alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float32)
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return noise / (signal + noise)


def vp_scale(t: Time) -> Tensor:
    """c = x_vp / x_flow = sqrt(abar) + sqrt(1 - abar) = 1 / sqrt(t^2 + (1 - t)^2), shaped like t."""
    t = torch.as_tensor(t, dtype=torch.float32)
    return 1 / (t**2 + (1 - t) ** 2).sqrt()


def vp_velocity(x_vp: Tensor, model_output: Tensor, t: Time, prediction_type: str) -> Tensor:
    """The flow's v from a diffusion model's output m at x_vp; t = vp_time(abar).

    "epsilon"        m = eps, so v = (m - x) / (1 - t) with x = x_vp / c.
    "sample"         m = x0,  so v = (x - m) / t.
    "v_prediction"   m = sqrt(abar) eps - sqrt(1 - abar) x0. Together with x_vp this is a rotation of (x0, eps), hence
                     x0  = sqrt(abar) x_vp - sqrt(1 - abar) m,      eps = sqrt(abar) m + sqrt(1 - abar) x_vp, and
                     v   = eps - x0 = c (1 - t + t) m + c (t - (1 - t)) x_vp = c (m + (2 t - 1) x_vp).   No pole.
    """
    t = expand(t, x_vp)
    c = vp_scale(t)
    if prediction_type == "epsilon":
        return velocity_from_eps(x_vp.float() / c, model_output, t)
    if prediction_type == "sample":
        return velocity_from_x0(x_vp.float() / c, model_output, t)
    if prediction_type == "v_prediction":
        return c * (model_output.float() + (2 * t - 1) * x_vp.float())
    raise ValueError(f"prediction_type={prediction_type!r} is unknown: use 'epsilon', 'v_prediction' or 'sample'.")
