"""The command line: `flowt2i COMMAND …`. Heavy imports happen inside the commands, so that `--help` answers at once."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from flowt2i import __version__
from flowt2i.config import PREPARATION, PRESETS, Config, describe_fields, load_config, parse_overrides, resolve
from flowt2i.errors import UserError, nearest

INTERRUPTED = 3  # exit status of a training that a signal stopped, all saved


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line and exit 2; options are never abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs | {"allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see `{self.prog} --help`\n")


def examples(*lines: str) -> dict[str, Any]:
    return {"epilog": "examples:\n" + "\n".join(f"  {line}" for line in lines), "formatter_class": argparse.RawDescriptionHelpFormatter}


# ---- prepare ----------------------------------------------------------------------------------------------------------


def add_prepare(commands: Any) -> None:
    from flowt2i.data.options import PrepareOptions

    parser = commands.add_parser(
        "prepare",
        help="captioned images -> a dataset that training reads",
        description="Read captioned images, filter, resize, encode, and write a dataset folder. The same command again continues where it stopped.",
        **examples(
            "flowt2i prepare scenes --out data/scenes --count 40000",
            "flowt2i prepare my_images/ --out data/mine                   # metadata.jsonl, or a .txt beside each image",
            "flowt2i prepare 'shards/{00000..00046}.tar' --out data/t2i --codec sd-vae-ft-mse --text t5-small",
            "flowt2i prepare --out data/text-to-image-2M --limit 100000   # jackyhate/text-to-image-2M from the hub, streamed",
            "torchrun --nproc-per-node 4 load_dataset.py 'shards/*.tar' --out data/t2i   # or, anywhere: prepare … --worker 0/4, 1/4, …",
            "flowt2i prepare part0 part1 --merge --out data/t2i           # of workers that had no common disk",
        ),
    )
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help=PrepareOptions.model_fields["sources"].description)
    parser.add_argument("--config", metavar="PRESET", help="codec and text encoder of this preset, unless given")
    for name, info in PrepareOptions.model_fields.items():
        if name == "sources":
            continue
        flag = "--" + name.replace("_", "-")
        text = (info.description or "").replace("%", "%%")
        if isinstance(info.default, bool):
            parser.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.add_argument(
                flag,
                dest=name,
                default=None,
                required=info.is_required(),
                metavar=name.split("_")[-1].upper(),
                help=f"{text}{'' if info.default in (None, '') or info.is_required() else f' (default {info.default})'}",
            )
    parser.add_argument("--merge", action="store_true", help="SOURCE are folders that workers (--worker) wrote: make one dataset of them")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object on the last line")
    parser.set_defaults(run=run_prepare)


def run_prepare(args: argparse.Namespace) -> int:
    from flowt2i.data.options import PrepareOptions
    from flowt2i.data.prepare import prepare

    fields = {name: value for name in PrepareOptions.model_fields if (value := getattr(args, name)) not in (None, [])}
    if args.merge:
        from flowt2i.data.merge import merge

        if others := sorted(fields.keys() - {"sources", "out"}):
            raise UserError(f"--merge takes its options from the folders: leave out --{others[0].replace('_', '-')}")
        report = merge([Path(source) for source in args.sources], Path(args.out))
        if args.json:
            print(json.dumps(report))
        return 0
    preset = args.config or (None if args.sources else "stability")  # the hub's 2M pairs are what the big presets are for
    if preset and preset not in PREPARATION:
        raise UserError(f"no preset {preset!r}{nearest(preset, PREPARATION)}")
    report = prepare(PrepareOptions.of(**{**(PREPARATION[preset] if preset else {}), **fields}))
    if args.json:
        print(json.dumps(report))
    return 0


# ---- inspect ----------------------------------------------------------------------------------------------------------


def add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="look at a prepared dataset",
        description="Counts, statistics and caption lengths of a dataset, and a contact sheet.",
        **examples("flowt2i inspect data/scenes", "flowt2i inspect data/scenes --out sheet.png --json"),
    )
    parser.add_argument("data", metavar="DIR", type=Path, help="prepared dataset")
    parser.add_argument("--out", type=Path, help="where the contact sheet goes (default DIR/contact.png)")
    parser.add_argument("--json", action="store_true", help="print the statistics as one JSON object on the last line")
    parser.set_defaults(run=run_inspect)


def run_inspect(args: argparse.Namespace) -> int:
    from flowt2i.data.inspect import inspect

    summary = inspect(args.data, args.out, quiet=args.json)
    if args.json:
        print(json.dumps(summary))
    return 0


# ---- train ------------------------------------------------------------------------------------------------------------


def add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model",
        description="Train a run. Any setting can be given as --section.field value.",
        epilog="examples:\n  flowt2i train --config quickstart --data data/scenes\n"
        "  flowt2i train --config stability --data data/mine --out runs/mine --optim.lr 3e-4\n"
        "  flowt2i train --config stability --data data/mine --out runs/mine --resume latest\n"
        "  torchrun --nproc-per-node 2 train.py --config stability --data data/mine\n\n"
        "presets: " + ", ".join(PRESETS) + "\n\nsettings:\n" + describe_fields().replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="PRESET", help="preset, or the config.json of a run (default stability)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared dataset (default: the only one under data/)")
    parser.add_argument("--out", type=Path, metavar="RUN", help="run folder (default runs/PRESET-DATA)")
    parser.add_argument("--resume", metavar="latest|PATH", help="continue from the run's newest checkpoint, or from the one at PATH")
    parser.add_argument("--stop-after", metavar="TIME", help="save and stop after so long, such as 3h or 90m (the same as --train.stop_after)")
    parser.add_argument("--codec", help="folder of the VAE, where it moved since the data was prepared")
    parser.add_argument("--text", help="folder of the text encoder, where it moved since the data was prepared")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and start nothing")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object on the last line")
    parser.set_defaults(run=run_train, overrides=True)


def configuration(args: argparse.Namespace) -> Config:
    """What `--config` and the settings after it say."""
    if getattr(args, "stop_after", None):
        args.rest = [*args.rest, "--train.stop_after", args.stop_after]
    if args.config and args.config.endswith(".json"):
        return resolve(None, args.rest, base=load_config(Path(args.config)))
    return resolve(args.config, args.rest)


def run_train(args: argparse.Namespace) -> int:
    config = configuration(args)
    if args.print_config:
        print(json.dumps(resolved_config(config, args.data), indent=2))
        return 0
    data = args.data or only_dataset()
    run = args.out or Path("runs") / f"{config.preset}-{data.resolve().name}"
    from flowt2i.training.distributed import ToldElsewhere
    from flowt2i.training.loop import Stopped, train

    main_rank = os.environ.get("RANK", "0") == "0"
    try:
        summary = train(config, data, run, args.resume, codec=args.codec, text=args.text)
    except Stopped as stopped:
        if main_rank:
            print(f"flowt2i train: {stopped}", file=sys.stderr)
        return INTERRUPTED
    except ToldElsewhere:
        return 2
    if not main_rank:
        return 0
    if args.json:
        print(json.dumps(summary))
    else:
        print(
            f"trained {summary['step']} steps ({summary['images_seen']:,} images) in "
            f"{summary['seconds'] / 60:.1f} min, at most {summary['peak_memory_gib']} GiB: {run}",
            file=sys.stderr,
        )
        print(f'next: flowt2i generate "…" --model {run} --out picture.png', file=sys.stderr)
    return 0


def resolved_config(config: Config, data: Path | None) -> dict[str, Any]:
    """The configuration, and, where the data is given, what follows from it."""
    if data is None:
        return config.model_dump()
    from flowt2i.description import DatasetDescription
    from flowt2i.training.distributed import accumulation

    codec = DatasetDescription.load(data).codec
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    micro, accumulate = accumulation(config.data.batch_size, config.train.micro_batch, ranks)
    facts = {"data": str(data), "micro_batch": micro, "accumulation": accumulate, "ranks": ranks}
    return config.model_dump() | {"resolved": facts | {"model": config.model.resolve(codec.kind, codec.shape).model_dump()}}


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


# ---- generate ---------------------------------------------------------------------------------------------------------


def add_sampling(parser: argparse.ArgumentParser, seed: str = "seed of the first picture; the next ones count on (default 0)") -> None:
    parser.add_argument("--steps", type=int, help="solver steps (default: the model's, usually 50)")
    parser.add_argument("--solver", help="euler or heun")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale; 1: none")
    parser.add_argument("--shift", type=float, help="above 1: shorter steps next to the noise, where layout is decided; 1: even steps (default: the model's)")
    parser.add_argument("--seed", type=int, default=0, help=seed)
    parser.add_argument("--weights", default="auto", help="ema, raw, or auto: EMA where there is one (default auto)")
    parser.add_argument("--codec", help="folder of the VAE, where it moved since the data was prepared")
    parser.add_argument("--text", help="folder of the text encoder, where it moved since the data was prepared")
    parser.add_argument("--device", help="cpu, cuda, … (default: the best there is)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")


def add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="pictures from prompts",
        description="Draw pictures. One picture goes to FILE; several go to FILE-000.png, FILE-001.png, …, and FILE is their captioned grid.",
        **examples(
            'flowt2i generate "a large red circle" --model runs/quickstart --out circle.png',
            'flowt2i generate "a blue star" "a red heart" --model runs/quickstart --out grid.png --num 4 --guidance 2 --steps 30',
            "flowt2i generate --prompts prompts.txt --model runs/quickstart --out grid.png",
        ),
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what the picture shows")
    parser.add_argument("--prompts", dest="file", type=Path, help="a text file with a prompt a line")
    parser.add_argument("--model", type=Path, help="run folder, checkpoint or exported model (default: the newest run under runs/)")
    parser.add_argument("--out", type=Path, default=Path("picture.png"), help="PNG to write (default picture.png)")
    parser.add_argument("--num", type=int, default=1, help="pictures of each prompt (default 1)")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at a time (default 64)")
    add_sampling(parser)
    parser.set_defaults(run=run_generate)


def newest_run() -> Path:
    runs = sorted((p for p in Path("runs").glob("*") if (p / "checkpoints").exists()), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise UserError("which model? give --model PATH (no run under runs/: train one, for instance with `make quickstart`)")
    return runs[-1]


def load_pipeline(args: argparse.Namespace) -> Any:
    from flowt2i.pipeline import Pipeline

    return Pipeline.from_pretrained(args.model or newest_run(), weights=args.weights, device=args.device, codec=args.codec, text=args.text)


def run_generate(args: argparse.Namespace) -> int:
    prompts = list(args.prompts)
    if args.file:
        try:
            prompts += [line.strip() for line in args.file.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {args.file}: {error}") from error
    if not prompts:
        raise UserError('no prompt: flowt2i generate "a large red circle" --out picture.png')
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: pictures are written as PNG, so give a name that ends in .png")
    if args.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write --out {args.out}: {error.strerror}") from error
    if args.out.is_dir() or not os.access(args.out.parent, os.W_OK):  # before the work, not after it
        raise UserError(f"cannot write --out {args.out}: give another name or folder")
    from tqdm import tqdm

    from flowt2i.grid import grid
    from flowt2i.pipeline import save_png

    pipeline = load_pipeline(args)
    with tqdm(total=len(prompts) * max(1, args.num), desc="drawing", unit="image", leave=False, disable=None) as bar:
        samples = pipeline.sample(
            prompts, steps=args.steps, solver=args.solver, guidance=args.guidance, shift=args.shift, seed=args.seed, num=args.num,
            batch_size=args.batch_size, progress=bar.update,
        )  # fmt: skip
    pictures = samples.pictures()
    files = [args.out] if len(pictures) == 1 else [args.out.with_name(f"{args.out.stem}-{i:03d}.png") for i in range(len(pictures))]
    for picture, file in zip(pictures, files):
        save_png(picture, file)
    result: dict[str, Any] = {
        "files": [str(f) for f in files],
        "seconds": round(samples.seconds, 3),
        "evaluations": samples.evaluations,
        **samples.settings,
    }
    if len(pictures) > 1:
        columns = args.num if args.num > 1 else min(8, round(len(pictures) ** 0.5 + 0.49))
        sheet = grid(samples.images, samples.prompts, columns=columns)
        sheet.info["flowt2i"] = json.dumps({"prompts": samples.prompts, "seeds": samples.seeds, **samples.settings, "version": __version__})
        save_png(sheet, args.out)
        result["grid"] = str(args.out)
    print(
        json.dumps(result) if args.json else f"wrote {args.out} ({len(pictures)} picture(s), {samples.evaluations} evaluations each, {samples.seconds:.1f} s)"
    )
    return 0


# ---- evaluate ---------------------------------------------------------------------------------------------------------


def add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="score a model",
        description="Prompt following on the built-in scenes, judged by an exact checker, with 95% intervals.",
        **examples("flowt2i evaluate --model runs/quickstart --num 500", "flowt2i evaluate --model runs/quickstart --heldout-pairs --json"),
    )
    parser.add_argument("--model", type=Path, help="run folder, checkpoint or exported model (default: the newest run under runs/)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared dataset to score on; scenes need none, their prompts are drawn anew")
    parser.add_argument("--metrics", default="scenes", help="which scores, with commas between: scenes")
    parser.add_argument("--num", type=int, default=500, help="prompts (default 500)")
    parser.add_argument("--heldout-pairs", action="store_true", help="ask for pairs of colour and shape that training never showed")
    add_sampling(parser, seed="seed of the prompts; the noise of picture k is always that of seed 1000000 + k (default 0)")
    parser.set_defaults(run=run_evaluate)


def run_evaluate(args: argparse.Namespace) -> int:
    for name in args.metrics.split(","):
        if name != "scenes":
            raise UserError(f"no metric {name!r}{nearest(name, ['scenes'])}")
    if args.num < 1:
        raise UserError("--num must be at least 1")
    from flowt2i.description import DatasetDescription

    if args.data and not DatasetDescription.load(args.data).is_scenes:
        raise UserError(f"the scenes score is for the built-in data, and {args.data} is not: leave out --data, or prepare `scenes`")
    pipeline = load_pipeline(args)
    if not pipeline.description.is_scenes:
        raise UserError("the scenes score asks for shapes and colours, but this model was trained on other data")
    from flowt2i.evaluation.scenes import score_pipeline

    settings = {"steps": args.steps, "solver": args.solver, "guidance": args.guidance, "shift": args.shift}
    scores = score_pipeline(pipeline, args.num, seed=args.seed, heldout=args.heldout_pairs, progress=True, **settings)
    used = pipeline.settings(**settings)
    kind = "heldout-pairs" if args.heldout_pairs else "prompts"
    title = f"scenes-{kind}-{args.num}@{pipeline.description.codec.image_size}"
    protocol = f"{title}, {used['solver']} {used['steps']} steps, guidance {used['guidance']:g}, shift {used['shift']:g}, "
    protocol += f"prompt seed {args.seed}, {pipeline.weights} weights"
    if args.json:
        values = {f"{title}/{part}": score["accuracy"] for part, score in scores.items()}
        print(json.dumps(values | {"intervals": {f"{title}/{part}": score for part, score in scores.items()}, "protocol": protocol}))
    else:
        print(protocol)
        for part, score in scores.items():
            print(f"  {part:14s} {score['accuracy']:6.1%}   [{score['low']:.1%}, {score['high']:.1%}]   n={score['n']}")
    return 0


# ---- demo, bench ------------------------------------------------------------------------------------------------------


def add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="the web page",
        description="A page that draws pictures from prompts and shows them forming.",
        **examples("flowt2i demo", "flowt2i demo --model runs/quickstart --port 7861"),
    )
    parser.add_argument("--model", type=Path, help="run folder, checkpoint or exported model (default: the newest run under runs/)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default 7860)")
    parser.add_argument("--share", action="store_true", help="also through a public gradio.live address; anyone with the link can use it")
    for flag in ("--codec", "--text", "--device"):
        parser.add_argument(flag, help="as in generate")
    parser.set_defaults(run=run_demo, weights="auto")


def run_demo(args: argparse.Namespace) -> int:
    from flowt2i.demo import serve

    serve(load_pipeline(args), port=args.port, share=args.share)
    return 0


def add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="speed and memory on this machine",
        description="Images a second in training and sampling, and the share of the machine's measured ceiling.",
        **examples("flowt2i bench --config quickstart", "flowt2i bench --config stability --json --train.micro_batch 32"),
    )
    parser.add_argument("--config", metavar="PRESET", default="quickstart", help="preset (default quickstart)")
    parser.add_argument("--text-tokens", type=int, default=16, help="tokens a caption (default 16)")
    parser.add_argument(
        "--latents",
        action=argparse.BooleanOptionalAction,
        help="8x8x4 latents and 512-wide features of a frozen encoder, instead of pixels and the built-in encoder",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")
    parser.set_defaults(run=run_bench, overrides=True)


def run_bench(args: argparse.Namespace) -> int:
    from flowt2i.bench import bench

    config: Config = resolve(args.config, args.rest)
    if args.text_tokens < 1:
        raise UserError("--text-tokens must be at least 1")
    result = bench(
        config, text_tokens=args.text_tokens, latents=PREPARATION.get(config.preset, {}).get("codec") != "pixels" if args.latents is None else args.latents
    )
    print(json.dumps(result) if args.json else result["verdict"])
    return 0


# ---- doctor, verify-resume --------------------------------------------------------------------------------------------


def add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check the machine, and a run before it starts",
        description="What this machine has and lacks. With --config and --data also a real step, a checkpoint and a picture, and what the run will take. "
        "Exit status 2 where something would stop the run.",
        **examples("flowt2i doctor", "flowt2i doctor --config stability --data data/mine --out runs/mine"),
    )
    parser.add_argument("--config", metavar="PRESET", help="preset, or the config.json of a run; settings as --section.field value")
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared dataset")
    parser.add_argument("--out", type=Path, metavar="RUN", help="run folder: its disk is the one that is looked at (default runs/PRESET-DATA)")
    parser.add_argument("--codec", help="folder of the VAE, where it moved since the data was prepared")
    parser.add_argument("--text", help="folder of the text encoder, where it moved since the data was prepared")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")
    parser.set_defaults(run=run_doctor, overrides=True)


def run_doctor(args: argparse.Namespace) -> int:
    if args.rest and not args.config:
        raise UserError(f"{args.rest[0]}: settings belong to a --config")
    config = configuration(args) if args.config else None
    from flowt2i.doctor import examine, report

    run = args.out or Path("runs") / (f"{config.preset}-{args.data.resolve().name}" if config and args.data else "")
    result = examine(config, args.data, run, codec=args.codec, text=args.text)
    print(json.dumps(result) if args.json else report(result))
    return 0 if result["ok"] else 2


def add_verify_resume(commands: Any) -> None:
    parser = commands.add_parser(
        "verify-resume",
        help="show that an interrupted training loses nothing",
        description="Train a few steps with and without a stop in the middle, in temporary folders, and compare losses, weights, averages and optimizer "
        "bit by bit. Exit status 0: equal, 1: not.",
        **examples(
            "flowt2i verify-resume --config quickstart --data data/scenes",
            "flowt2i verify-resume --config stability --data data/mine --ranks 2 --json",
        ),
    )
    parser.add_argument("--config", metavar="PRESET", help="preset, or the config.json of a run; settings as --section.field value (default stability)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared dataset (default: the only one under data/)")
    parser.add_argument("--steps", type=int, default=6, help="steps to train (default 6)")
    parser.add_argument("--at", type=int, default=3, help="step during which the signal comes (default 3)")
    parser.add_argument("--ranks", type=int, default=1, help="processes, started by torchrun where more than one (default 1)")
    parser.add_argument("--codec", help="folder of the VAE, where it moved since the data was prepared")
    parser.add_argument("--text", help="folder of the text encoder, where it moved since the data was prepared")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")
    parser.set_defaults(run=run_verify_resume, overrides=True)


def run_verify_resume(args: argparse.Namespace) -> int:
    config = configuration(args)
    from flowt2i.verify_resume import report, verify_resume

    words = [word for flag in ("config", "codec", "text") if (value := getattr(args, flag)) for word in (f"--{flag}", value)]
    say = lambda text: print(f"verify-resume: {text} …", file=sys.stderr)
    result = verify_resume(config, [*words, *args.rest], args.data or only_dataset(), args.steps, args.at, args.ranks, say)
    print(json.dumps(result) if args.json else report(result))
    return 0 if result["equal"] else 1


# ---- main -------------------------------------------------------------------------------------------------------------

COMMANDS: dict[str, Callable[[Any], None]] = {
    "prepare": add_prepare,
    "inspect": add_inspect,
    "train": add_train,
    "generate": add_generate,
    "evaluate": add_evaluate,
    "demo": add_demo,
    "bench": add_bench,
    "doctor": add_doctor,
    "verify-resume": add_verify_resume,
}


def build_parser() -> Parser:
    parser = Parser(
        prog="flowt2i",
        description="Train a text-to-image model from scratch with flow matching, score it, sample from it, serve it.",
        **examples(
            "flowt2i prepare scenes --out data/scenes",
            "flowt2i train --config quickstart --data data/scenes --out runs/quickstart",
            'flowt2i generate "a small red circle left of a large blue star" --model runs/quickstart --out picture.png',
        ),
    )
    parser.add_argument("--version", action="version", version=f"flowt2i {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for add in COMMANDS.values():
        add(commands)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 2 (a mistake the user can mend), 3 (stopped by a signal, all saved)."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    words = list(sys.argv[1:] if words is None else words)
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        print(f"flowt2i: error: no command {words[0]!r}{nearest(words[0], COMMANDS)}", file=sys.stderr)
        return 2
    parser = build_parser()
    args, rest = parser.parse_known_args(words)
    if not args.command:
        parser.print_help()
        return 0
    try:
        if rest and not getattr(args, "overrides", False):
            key = parse_overrides(rest)[0][0]
            raise UserError(f"unknown option --{key}; see `flowt2i {args.command} --help`")
        args.rest = rest
        return int(args.run(args))
    except UserError as error:
        print(f"flowt2i {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"flowt2i {args.command}: stopped", file=sys.stderr)
        return 130


def run(words: Sequence[str] | None = None) -> NoReturn:
    """`main`, and the end of the process."""
    leave(main(words))


def leave(status: int) -> NoReturn:
    """End the process. One of several training ranks ends at once: a thread of its process group that is still at work while C++ takes
    its globals down would abort ("terminate called without an active exception") what is complete and closed."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "flowt2i.training.loop" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
