"""How pictures are drawn, apart from what they show: the settings of a drawing, checked, and the velocity and solver that follow from them."""

import functools
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from flowt2i import guidance
from flowt2i.config import SampleConfig
from flowt2i.errors import UserError, nearest
from flowt2i.guidance import Branches
from flowt2i.schedules import check_schedule, make_times, written
from flowt2i.solvers import SOLVERS, Solver, Velocity, dopri5, sde
from flowt2i.styles import BY_STYLES

NAMES = ("steps", "solver", "schedule", "shift", "tolerance", "guidance", "guidance_rule", "guidance_rescale", "guidance_from", "guidance_until", "analogy",
         "analogy_until", "style_contrast", "style_contrast_until", "zero_init")  # fmt: skip
ALWAYS = ("steps", "solver", "guidance", "shift")  # told even where they are at their defaults
RULES = get_args(SampleConfig.model_fields["guidance_rule"].annotation)
# What numbers mean, beside the range that their field in `SampleConfig` states.
HINTS = {
    "steps": "", "shift": " (1: as the schedule says)", "tolerance": "", "guidance": " (1: none)", "guidance_rescale": " (0: none)",
    "guidance_from": " (0: noise, 1: data)", "guidance_until": " (0: noise, 1: data)", "analogy": " (0: none)",
    "analogy_until": " (0: noise, 1: data)", "style_contrast": " (0: none)", "style_contrast_until": " (0: noise, 1: data)", "zero_init": " (0: none)",
}  # fmt: skip


def resolve(own: SampleConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The model's own settings with those given (None: not given), checked; UserError says which is out of range.

    The model's own shift belongs to its own schedule: a schedule that is given is used as it is, unless a shift is given beside it. Times that are
    written out, here or in the configuration, also say how many steps there are, unless that is given.
    """
    unknown = [name for name in given if name not in NAMES]
    if unknown:
        raise UserError(f"no setting {unknown[0]!r}{nearest(unknown[0], NAMES)}")
    chosen: dict[str, Any] = {name: getattr(own, name) if given.get(name) is None else given[name] for name in NAMES}
    if not isinstance(chosen["schedule"], str):
        raise UserError(f"schedule {chosen['schedule']!r}: give a name, or times as text such as 0,0.02,0.1,0.4,1")
    check_schedule(chosen["schedule"])
    if given.get("schedule") is not None and given.get("shift") is None:
        chosen["shift"] = 1.0
    if given.get("steps") is None and (times := written(chosen["schedule"])):
        chosen["steps"] = len(times) - 1
    for name, known in (("solver", tuple(SOLVERS)), ("guidance_rule", RULES)):
        if chosen[name] not in known:
            raise UserError(f"no {name.replace('_', ' ')} {chosen[name]!r}{nearest(str(chosen[name]), known)}")
    for name, hint in HINTS.items():
        least, most = _range(name)
        kinds = int if name == "steps" else int | float
        if isinstance(chosen[name], bool) or not isinstance(chosen[name], kinds) or not least <= chosen[name] <= most:  # NaN is not between anything
            raise UserError(f"{name.replace('_', ' ')} {chosen[name]} is out of range: choose {least:g} to {most:g}{hint}")
    if chosen["guidance_from"] >= chosen["guidance_until"]:
        raise UserError(f"the guidance interval {chosen['guidance_from']:g} to {chosen['guidance_until']:g} is empty: the first time must be the smaller one")
    for name in BY_STYLES:
        if chosen[name] and len(own.styles) < 2:
            raise UserError(f"{name.replace('_', ' ')} compares styles, and this model names none (`sample.styles`, at least two): leave it out")
    make_times(chosen["schedule"], chosen["steps"], chosen["shift"])  # its UserError before the work
    return chosen


def own_steps(own: SampleConfig) -> int:
    """The steps that a model draws in where nothing is given: times that are written out say how many they are."""
    times = written(own.schedule)
    return len(times) - 1 if times else own.steps


def _range(name: str) -> tuple[float, float]:
    """The least and the most that a field of `SampleConfig` may be."""
    bounds = SampleConfig.model_fields[name].metadata
    least, most = (next(getattr(bound, end) for bound in bounds if hasattr(bound, end)) for end in ("ge", "le"))
    return least, most


def telling(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that say how a picture came about: the usual four, and what differs from the defaults."""
    defaults, idle = SampleConfig(), [f"{name}_until" for name in BY_STYLES if not settings.get(name)]
    told = lambda name, value: name in ALWAYS or name not in NAMES or (value != getattr(defaults, name) and name not in idle)
    return {name: value for name, value in settings.items() if told(name, value)}


def describe(settings: dict[str, Any]) -> str:
    """The settings in words, for protocols: "euler 50 steps, guidance 3, shift 1", and what else is not at its default."""
    told = telling(settings)
    others = [f"{name.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
              for name, value in told.items() if name not in ALWAYS]  # fmt: skip
    usual = f"{settings['solver']} {settings['steps']} steps, guidance {settings['guidance']:g}, shift {settings['shift']:g}"
    return ", ".join([usual, *others])


def times_of(settings: dict[str, Any]) -> Tensor:
    return make_times(settings["schedule"], settings["steps"], settings["shift"])


def solver_of(settings: dict[str, Any], noise: Callable[[Tensor], Tensor] = torch.randn_like) -> Solver:
    """The solver with what only it takes: the tolerance of `dopri5`, where the noise of `sde` comes from."""
    if settings["solver"] == "dopri5":
        return functools.partial(dopri5, rtol=settings["tolerance"], atol=settings["tolerance"])
    if settings["solver"] == "sde":
        return functools.partial(sde, noise=noise)
    return SOLVERS[settings["solver"]]


def is_guided(settings: dict[str, Any]) -> bool:
    return bool(settings["guidance"] != 1)


def guide(settings: dict[str, Any], alone: Velocity, pair: Branches) -> Velocity:
    """The velocity to follow: `alone` (no guidance) or the rule applied to `pair` = (good, bad), on the interval that is set."""
    scale, share = float(settings["guidance"]), float(settings["guidance_rescale"])

    def rule(good: Tensor, bad: Tensor, z: Tensor, t: Tensor) -> Tensor:
        velocity = guidance.by_rule(settings["guidance_rule"], good, bad, scale)
        return guidance.rescale(velocity, good, z, t, share) if share else velocity

    velocity = guidance.guided(pair, rule) if is_guided(settings) else alone
    if is_guided(settings) and (settings["guidance_from"] > 0 or settings["guidance_until"] < 1):
        velocity = guidance.on_interval(velocity, alone, settings["guidance_from"], settings["guidance_until"])
    return velocity
