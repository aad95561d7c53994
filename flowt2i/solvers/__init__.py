"""Solvers of `dz/dt = velocity(z, t)` from noise (t = 0) to data (t = 1): pure functions of one signature.

    solver(velocity, z, times, callback=None) -> z

`velocity(z, t)` takes `z [B, C, H, W]` and a scalar tensor `t` and returns `[B, C, H, W]`; `times` is an increasing `[N + 1]`
tensor, however spaced; `callback(step, t, z, v)` is called once for each of the N intervals with the time and state *before* it and the
velocity there, so that a preview of the clean image is `z + (1 - t) v`.

No solver asks for the velocity at the last time: a field made of predicted data has none there (`flow.to_velocity`). A method that
would ask takes its last step by another of one order less, whose single larger error leaves the order of the whole as it is
(Karras et al. 2206.00364, alg. 1, do so for Heun).

| name | order | evaluations of N steps | |
|---|---|---|---|
| euler | 1 | N | |
| midpoint, heun | 2 | 2N, 2N - 1 | |
| rk4 | 4 | 4N - 1 | |
| ab2, ab4 | 2, 4 | N, N + 6 | multistep: the velocities of past steps serve again |
| dopri5 | 5 | as the tolerance asks | chooses its own steps |
| sde | 1 (weak) | N | stochastic, the same marginals |
"""

from collections.abc import Callable

from flowt2i.solvers.adaptive import ToleranceError, dopri5
from flowt2i.solvers.fixed import Callback, Solver, Velocity, ab2, ab4, euler, heun, midpoint, rk4
from flowt2i.solvers.stochastic import sde

SOLVERS: dict[str, Solver] = {
    "euler": euler, "heun": heun, "midpoint": midpoint, "rk4": rk4, "ab2": ab2, "ab4": ab4, "dopri5": dopri5, "sde": sde,
}  # fmt: skip

EVALUATIONS: dict[str, Callable[[int], int]] = {  # of the velocity in N steps, as in the table above; dopri5 is not in it: it chooses
    "euler": lambda n: n, "heun": lambda n: 2 * n - 1, "midpoint": lambda n: 2 * n, "rk4": lambda n: 4 * n - 1,
    "ab2": lambda n: n, "ab4": lambda n: n + 2 * min(3, n), "sde": lambda n: n,
}  # fmt: skip

__all__ = ["EVALUATIONS", "SOLVERS", "Callback", "Solver", "ToleranceError", "Velocity", "ab2", "ab4", "dopri5", "euler", "heun", "midpoint", "rk4", "sde"]
