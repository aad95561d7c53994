"""What commands share: examples in `--help`, the options of sampling and of places that moved, defaults found by looking."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowt2i import box, sizes
from flowt2i.config import Config, load_config, resolve
from flowt2i.errors import UserError, first_of_node

if TYPE_CHECKING:
    from flowt2i.pipeline import Pipeline


def examples(*lines: str) -> dict[str, Any]:
    return {"epilog": "examples:\n" + "\n".join(f"  {line}" for line in lines), "formatter_class": argparse.RawDescriptionHelpFormatter}


def add_json(parser: argparse.ArgumentParser, what: str = "result") -> None:
    parser.add_argument("--json", action="store_true", help=f"print the {what} as one JSON object on the last line")


def add_moved(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--codec", help="folder of the VAE, where it moved since the data was prepared")
    parser.add_argument("--text", help="folder of the text encoder, where it moved since the data was prepared")


def add_config(parser: argparse.ArgumentParser, default: str = "") -> None:
    settings = "; settings as --section.field value" + (f" (default {default})" if default else "")
    parser.add_argument("--config", metavar="PRESET", help="preset, or the config.json of a run" + settings)
    add_size(parser)


def add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", metavar="S|M|L|25M", help="size of the model, by name (XS, S, M, L, XL) or as a number of parameters: scales width, depth, "
                        "heads, caption encoder, rates and batch of the preset, but for what is given by --section.field (docs/learning.md)")  # fmt: skip


MODEL = "run folder, checkpoint, exported model, name of a packaged model (`flowt2i models`; a folder of that name wins) or hub id"
OR_ELSE = "the newest run under runs/, else the first packaged model"


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help=f"{MODEL} (default: {OR_ELSE})")


def add_sampling(parser: argparse.ArgumentParser, seed: str = "seed of the first picture; the next ones count on (default 0)") -> None:
    parser.add_argument("--steps", type=int, help="solver steps (default: the model's, as for all that follows)")
    parser.add_argument("--solver", help="euler, heun, midpoint, rk4, ab2, ab4, dopri5 (adaptive) or sde (stochastic)")
    parser.add_argument("--schedule", help="times of the steps: uniform, a searched grid by name, or the times themselves, such as 0,0.02,0.1,0.4,1")
    parser.add_argument("--shift", type=float, help="above 1: shorter steps next to the noise, where layout is decided; with --schedule 1: as it says")
    parser.add_argument("--tolerance", type=float, help="of dopri5, relative and absolute")
    parser.add_argument("--guidance", type=float, help="guidance scale; 1: none")
    parser.add_argument("--guidance-rule", help="cfg (plain), zero-star (CFG-Zero*) or mean-kept (plain, but for the mean colour)")
    parser.add_argument("--guidance-rescale", type=float, metavar="SHARE", help="share of the contrast added by guidance that is taken back, 0 to 1")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("FROM", "UNTIL"), help="guidance between these times only (0: noise, 1: data)")
    parser.add_argument("--analogy", type=float, metavar="SHARE", help='of prompts "SUBJECT, STYLE": at first as the subject is in the other styles, 0 to 1')
    parser.add_argument(
        "--style-contrast", type=float, metavar="WEIGHT", help="of the same prompts: more of what sets the style apart from the others, 0 to 10"
    )
    parser.add_argument("--zero-init", type=float, metavar="TIME", help="begin at this time, with the noise as it is (CFG-Zero*: 0.04; default 0)")
    parser.add_argument("--negative", metavar="PROMPT", help="what guidance leads away from, instead of the empty caption")
    parser.add_argument("--guide", metavar="PATH", help="a weaker model that guidance leads away from instead (autoguidance)")
    parser.add_argument("--seed", type=int, default=0, help=seed)
    parser.add_argument("--weights", default="auto", help="ema, raw, or auto: EMA where there is one (default auto)")
    parser.add_argument("--compile", action="store_true", help="compile the network (and a guide) first: the first picture takes longer")
    add_moved(parser)
    parser.add_argument("--device", help="cpu, cuda, … (default: the best there is)")
    add_json(parser)


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_sampling` asks for, as arguments of `Pipeline.sample` (without the seed); None where nothing was said."""
    first, last = args.guidance_interval or (None, None)
    return {
        "steps": args.steps, "solver": args.solver, "schedule": args.schedule, "shift": args.shift, "tolerance": args.tolerance,
        "guidance": args.guidance, "guidance_rule": args.guidance_rule, "guidance_rescale": args.guidance_rescale, "guidance_from": first,
        "guidance_until": last, "analogy": args.analogy, "style_contrast": args.style_contrast,
        "zero_init": args.zero_init, "negative": args.negative, "guide": args.guide,
    }  # fmt: skip


def configuration(args: argparse.Namespace) -> Config:
    """What `--config`, `--size` and the settings after them say."""
    if getattr(args, "stop_after", None):
        args.rest = [*args.rest, "--train.stop_after", args.stop_after]
    preset, base = (None, load_config(Path(args.config))) if args.config and args.config.endswith(".json") else (args.config, None)
    config = resolve(preset, args.rest, base)
    if getattr(args, "size", None):
        args.rest = [*sizes.words(args.size, resolve(preset, [], base), config.model), *args.rest]  # what was given by name comes later, and wins
        config = resolve(preset, args.rest, base)
    return config


def only_dataset() -> Path:
    """The one prepared dataset under data/, where --data is not given."""
    found = sorted(p.parent for p in Path("data").glob("*/dataset.json"))
    if len(found) == 1:
        return found[0]
    known = (
        f": choose one of {', '.join(map(str, found))}"
        if found
        else " (none under data/): run `flowt2i prepare scenes --out data/scenes`, then add --data data/scenes"
    )
    raise UserError(f"which dataset? give --data DIR{known}")


def newest_run() -> Path:
    """Under runs/, by the date of its newest checkpoint. UserError where there is none."""
    from flowt2i.training import checkpoint

    dated = [(checkpoint.folder(run, steps[-1]).stat().st_mtime, run) for run in Path("runs").glob("*") if (steps := checkpoint.list_steps(run))]
    if not dated:
        raise UserError("which model? give --model PATH (no run with a checkpoint under runs/: train one, for instance with `make quickstart`)")
    return max(dated)[1]


def model_of(given: Path | None) -> Path:
    """The model that was given, or else the newest run, or else the first packaged model: which of them is said on stderr.

    UserError where there is none at all.
    """
    if given:
        return given
    try:
        model = newest_run()
    except UserError:
        packaged = box.default()
        if packaged is None:
            raise
        model = packaged
    say_taken(model)
    return model


def say_taken(model: Path) -> None:
    """One line on stderr: the model that is used, since none was given."""
    if first_of_node():
        what = f"{model.name}, which comes with flowt2i" if box.holds(model) else f"{model}, the newest"
        print(f"model: {what} (--model takes another)", file=sys.stderr)


def load_pipeline(args: argparse.Namespace) -> "Pipeline":
    from flowt2i.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(model_of(args.model), weights=args.weights, device=args.device, codec=args.codec, text=args.text)
    return pipeline.compile() if getattr(args, "compile", False) else pipeline
