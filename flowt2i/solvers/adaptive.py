"""An ODE solver that chooses its steps by the error it makes: Dormand & Prince's method of order 5(4)."""

import torch
from torch import Tensor

from flowt2i.solvers.fixed import Callback, Tableau, Velocity, advance, runge_kutta_stages

# Dormand & Prince (1980), table 2; Hairer, Nørsett & Wanner, Solving ODEs I, table II.5.2. The last stage is the first of the next step.
DOPRI5 = Tableau(
    c=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    b=(35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
)
FOURTH = (5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)  # weights of the order 4 inside
ERROR = tuple(fifth - fourth for fifth, fourth in zip(DOPRI5.b, FOURTH))

SAFETY, LEAST, MOST = 0.9, 0.2, 10.0  # of the step's growth, as torchdiffeq and Hairer's DOPRI5 have them
SMALLEST = 1e-7  # step, as a share of the whole: below it the tolerance cannot be had
TRIES = 500  # steps tried at most: enough for any tolerance that a sane field allows
TAIL = 1e-3  # share of the whole that is left to a last Euler step: the velocity may not exist at the end


class ToleranceError(ArithmeticError):
    """The error cannot be held under the tolerance: the field is too rough, not finite, or computed too coarsely."""


def dopri5(velocity: Velocity, z: Tensor, times: Tensor, callback: Callback | None = None, *, rtol: float = 1e-3, atol: float = 1e-3) -> Tensor:
    """Dormand-Prince 5(4) with local extrapolation; a step is kept where the RMS of `error / (atol + rtol max |z|)` is at most 1.

    Of `times` the ends alone decide; the callback still comes once for each interval, with the state interpolated there (cubic Hermite).
    The whole batch shares its steps, so a picture is the same in every batch only up to the tolerance. Each try costs six evaluations,
    whatever the tolerance; the decision to keep it waits for the device. ToleranceError where the steps become vanishingly small.
    """
    grid = times.tolist()
    start, end = grid[0], grid[-1]
    stop = end - TAIL * (end - start)
    now, shown, tries = start, 0, 0
    v = velocity(z, times[0])
    h = min(_first_step(velocity, z, v, times[0], stop - now, rtol, atol), stop - now)
    while now < stop:
        h, tries = min(h, stop - now), tries + 1
        stages = runge_kutta_stages(velocity, z, torch.full_like(times[0], now), h, DOPRI5, v)
        ahead = advance(z, h, DOPRI5.b, stages)
        error = _rms(advance(torch.zeros_like(z), h, ERROR, stages) / (atol + rtol * torch.maximum(z.abs(), ahead.abs())))
        if error <= 1:  # false for NaN too
            reached = stop if now + h > stop - SMALLEST else now + h
            while shown < len(grid) - 1 and grid[shown] < reached:
                if callback:
                    callback(shown, times[shown], *_hermite(z, ahead, v, stages[-1], (grid[shown] - now) / h, h))
                shown += 1
            z, v, now = ahead, stages[-1], reached
        if now < stop and (tries == TRIES or h < SMALLEST * (end - start)):
            raise ToleranceError(f"the steps at t = {now:.4g} become too short for rtol {rtol:g}, atol {atol:g}")
        h *= min(MOST, max(LEAST, SAFETY * error**-0.2)) if 0 < error < float("inf") else (MOST if error == 0 else LEAST)
    for step in range(shown, len(grid) - 1):  # times within the tail
        if callback:
            callback(step, times[step], z + (grid[step] - now) * v, v)
    return z + (end - now) * v


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _first_step(velocity: Velocity, z: Tensor, v: Tensor, t: Tensor, most: float, rtol: float, atol: float) -> float:
    """A first guess of the step from the field's size and change (Hairer, Nørsett & Wanner, Solving ODEs I, sec. II.4). One evaluation, within `most`."""
    scale = atol + rtol * z.abs()
    size, slope = _rms(z / scale), _rms(v / scale)
    trial = min(0.01 * size / slope if min(size, slope) > 1e-5 else 1e-6, most)
    bend = _rms((velocity(z + trial * v, t + trial) - v) / scale) / trial
    largest = max(slope, bend)
    return min(100 * trial, (0.01 / largest) ** 0.2 if largest > 1e-15 else max(1e-6, trial * 1e-3))


def _hermite(z: Tensor, ahead: Tensor, v: Tensor, v_ahead: Tensor, s: float, h: float) -> tuple[Tensor, Tensor]:
    """State and velocity at a share `s` of a step, from those at its ends (Solving ODEs I, eq. II.6.7)."""
    chord = ahead - z
    state = (1 - s) * z + s * ahead + s * (s - 1) * ((1 - 2 * s) * chord + (s - 1) * h * v + s * h * v_ahead)
    slope = 6 * s * (1 - s) * chord / h + (1 - s) * (1 - 3 * s) * v + s * (3 * s - 2) * v_ahead
    return state, slope
