"""What `sampling.py` measures: settings of a drawing, in lines of a plot. group -> panel -> line -> settings, cheapest first.

Settings are complete (`PLAIN` with what differs), so that a model's own configuration changes nothing. Evaluations in the comments are with guidance's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowt2i import settings as choices
from flowt2i.config import PRESETS, SampleConfig
from flowt2i.solvers import EVALUATIONS

Settings = dict[str, Any]
Panels = dict[str, dict[str, list[Settings]]]

PLAIN: Settings = {name: getattr(SampleConfig(), name) for name in choices.NAMES}  # 50 even Euler steps, guidance 3: what all others are compared with
BASE: Settings = PLAIN | {"steps": 8, "shift": 5.0}  # which the others vary: 16 evaluations, guided at all times; until 2026-11-23 the default of `quickstart`
DEFAULT: Settings = PLAIN | PRESETS["quickstart"]["sample"]  # 16 evaluations too, guided next to the noise only
SEARCHED = "quickstart"  # the grid that comes with the package
STEPPING = ("solver", "steps", "schedule", "shift", "tolerance")  # how the flow is followed, and not which
# What to expect; what a drawing took is counted as it happens. dopri5 chooses its own steps: about 60 at tolerance 0.3 (measured).
CALLS: dict[str, Callable[[int], int]] = EVALUATIONS | {"dopri5": lambda n: 60}
ALONE = 3.0  # how much longer an evaluation takes where pictures are drawn one by one, as by dopri5, about


def _steps(*numbers: int, **more: Any) -> list[Settings]:
    return [BASE | more | {"steps": n} for n in numbers]


def _guided(**more: Any) -> list[Settings]:
    return _steps(4, 8, **more)


def solvers() -> Panels:
    """At the times of `BASE`."""
    euler = _steps(4, 8, 16, 50)  # 8, 16, 32, 100
    return {
        "one evaluation a step": {
            "Euler": euler,
            "AB2": _steps(4, 8, 16, 50, solver="ab2"),  # the same
            "AB4": _steps(4, 10, 44, solver="ab4"),  # 20, 32, 100
            "SDE": _steps(8, 16, 50, solver="sde"),  # 16, 32, 100
        },
        "several evaluations a step": {
            "Euler": euler,
            "Heun": _steps(2, 4, 8, solver="heun"),  # 6, 14, 30
            "midpoint": _steps(2, 4, 8, solver="midpoint"),  # 8, 16, 32
            "RK4": _steps(1, 2, 4, 12, solver="rk4"),  # 6, 14, 30, 94
            "Dormand–Prince": [BASE | {"solver": "dopri5", "tolerance": 0.3}],
        },
    }


def schedules() -> Panels:
    def times(**more: Any) -> dict[str, list[Settings]]:
        return {
            "even": _steps(4, 8, 16, shift=1.0, **more),
            "shift 3": _steps(4, 8, 16, shift=3.0, **more),
            "shift 5": _steps(4, 8, 16, **more),
            "searched": _steps(4, 8, 16, shift=1.0, schedule=SEARCHED, **more),
        }

    euler = times()
    euler["even"] = [*euler["even"], PLAIN]
    return {"Euler": euler, "AB2": times(solver="ab2")}


def guidance(guides: dict[str, Path]) -> Panels:
    """With the solver and times of `BASE`. guides: weaker models for autoguidance, by the name that their line gets."""
    plain = _guided()
    weaker = {name: _guided(guidance=2.0, guide=str(path)) for name, path in guides.items()}
    away = {"away from": {"the empty caption": plain} | weaker} if weaker else {}
    return {
        "scale": {
            "3": plain,
            "1 (none)": _steps(4, 8, 16, guidance=1.0),
            "1.5": _guided(guidance=1.5),
            "2": _guided(guidance=2.0),
            "5": _guided(guidance=5.0),
        },
        "rule and interval": {
            "plain": plain,
            "from t = 0.05": _guided(guidance_from=0.05),  # 6, 14
            "until t = 0.2": _steps(4, 8, 10, 20, guidance_until=0.2),  # 7, 13, 16, 32
            "until t = 0.3, shift 3": [DEFAULT],  # 16
            "CFG-Zero*": _guided(guidance_rule="zero-star"),
            "zero-init 0.04": _guided(zero_init=0.04),
            "rescale 0.7": _guided(guidance_rescale=0.7),
        },
    } | away


def groups(guides: dict[str, Path]) -> dict[str, Panels]:
    return {"solvers": solvers(), "schedules": schedules(), "guidance": guidance(guides)}


# These tell most: they get as many pictures as a Fréchet distance needs, the others a kernel distance of fewer.
FRECHET: list[Settings] = [
    PLAIN,
    BASE | {"steps": 4},
    BASE,
    DEFAULT,
    BASE | {"solver": "ab2"},
    BASE | {"shift": 1.0},
    BASE | {"guidance": 1.0},
    BASE | {"guidance": 2.0},
    BASE | {"steps": 10, "guidance_until": 0.2},
]


def named(settings: Settings) -> Settings:
    """With a guide by its folder alone, as results tell it."""
    return settings | ({"guide": Path(settings["guide"]).name} if "guide" in settings else {})


def label(settings: Settings) -> str:
    """In words."""
    return choices.describe(named(settings))


def same_flow(settings: Settings) -> bool:
    """Whether it follows the same velocities as `PLAIN`, so that many steps of both end at the same pictures (but for `sde`'s noise)."""
    own, plain = ({name: value for name, value in s.items() if name not in STEPPING} for s in (settings, PLAIN))
    return own == plain


def cost(settings: Settings) -> float:
    """About how much time a picture takes, in evaluations of a batch; an interval's savings are not counted."""
    guided, alone = 2 if choices.is_guided(settings) else 1, ALONE if settings["solver"] == "dopri5" else 1.0
    return CALLS[settings["solver"]](settings["steps"]) * guided * alone
