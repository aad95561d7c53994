"""Flow matching along straight paths: the path, its velocity, the times to train at, the loss.

Pure functions; nothing here knows of networks, devices or files. Time runs from noise to data, `t = 0` noise and
`t = 1` data (half of the field runs the other way: Stable Diffusion 3 and FLUX have `t = 1` noise). Shapes: data, noise and
`z` are `[B, C, H, W]`, times are `[B]`.

Sources: Lipman et al., Flow Matching (2210.02747); Liu et al., Rectified Flow (2209.03003), eq. 1; Esser et al. (2403.03206),
sec. 3.1, for logit-normal times; Li & He, JiT (2511.13720), for predicting the data and weighing its error as a velocity's.
"""

from typing import Literal

import torch
from torch import Tensor

from flowt2i.precision import double
from flowt2i.schedules import shift_times

Prediction = Literal["v", "x"]


def _per_image(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 1))


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point of the path at time t: `z_t = noise + t (data - noise)`. [B, C, H, W]."""
    return noise + _per_image(t, data) * (data - noise)


def velocity_target(data: Tensor, noise: Tensor) -> Tensor:
    """The path's velocity, `dz/dt = data - noise`: constant along a straight path. [B, C, H, W]."""
    return data - noise


def to_velocity(output: Tensor, z: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
    """Turn what the network puts out into a velocity [B, C, H, W].

    "v": it is one. "x": it is the predicted data, and `v = (x - z) / (1 - t)` (from `z_t` above, solved for the velocity), so that
    an Euler step up to t = 1 lands on the predicted data. Not defined at t = 1 itself, where solvers never ask.
    """
    if prediction == "v":
        return output
    return (output - z) / _per_image(1 - t, z).clamp_min(1e-6)


def to_data(velocity: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """The clean data a velocity points to, `z + (1 - t) v` [B, C, H, W]: what previews show."""
    return z + _per_image(1 - t, z) * velocity


def times(
    uniform: Tensor,
    choice: Tensor,
    distribution: Literal["uniform", "logit_normal"],
    mean: float = 0.0,
    std: float = 1.0,
    uniform_share: float = 0.1,
    shift: float = 1.0,
) -> Tensor:
    """Training times in (0, 1) from two uniform draws [B] each.

    "uniform": the first draw itself. "logit_normal": `t = sigmoid(mean + std * Phi^-1(u))` (2403.03206, eq. 19), except for a
    share `uniform_share` of the batch (where `choice` falls under it), which stays uniform so that no time is never trained.
    shift: all of them are moved towards the noise by as much (`schedules.shift_times`; of logit-normal times the mean falls by log(shift)).
    """
    if distribution == "uniform":
        return shift_times(uniform, shift) if shift != 1 else uniform
    normal = torch.special.ndtri(double(uniform).clamp(1e-6, 1 - 1e-6))
    shaped = torch.sigmoid(mean + std * normal).to(uniform)
    mixed = torch.where(choice < uniform_share, uniform, shaped)
    return shift_times(mixed, shift) if shift != 1 else mixed  # bit for bit what it was, where nothing is shifted


def velocity_error(output: Tensor, data: Tensor, noise: Tensor, t: Tensor, prediction: Prediction, floor: float = 0.05) -> Tensor:
    """How far the network's velocity is from the wanted one [B, C, H, W], in fp32.

    For "x" the error of the predicted data over `max(1 - t, floor)`: the same as the velocity's error wherever the floor does not act.
    Below the floor the smallest errors next to the data would outweigh all else (JiT, sec. 3 and table 1).
    """
    if prediction == "v":
        return output.float() - velocity_target(data, noise)
    return (output.float() - data) / _per_image(1 - t, data).clamp_min(floor)


def loss_per_image(error: Tensor) -> Tensor:
    """Mean square of each image's error [B]."""
    return error.square().flatten(1).mean(1)


def edges_per_image(error: Tensor) -> Tensor:
    """Mean square of the differences between neighbours, across and down, of each image's error [B].

    With the loss itself the squared norm of a Sobolev space: it has the same minimum, the conditional mean, at any weight, and gives what is fine more of
    the gradient. To the pattern of k waves over N places it adds `4 sin^2(pi k / N)` times that pattern's own square, in each direction.
    """
    return loss_per_image(error.diff(dim=-1)) + loss_per_image(error.diff(dim=-2))
