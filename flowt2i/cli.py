"""The command line: `flowt2i COMMAND …`; the commands are in `flowt2i/commands/`."""

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from flowt2i import __version__
from flowt2i.errors import UserError, first_of_node, nearest, told_elsewhere


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line and exit 2; options are never abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs | {"allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        if not first_of_node():
            self.exit(told_elsewhere())
        self.exit(2, f"{self.prog}: error: {message}; see `{self.prog} --help`\n")


# Each with its line in `flowt2i --help`.
COMMANDS = {
    "prepare": "captioned images -> a dataset that training reads",
    "inspect": "look at a prepared dataset",
    "train": "train a model",
    "generate": "pictures from prompts",
    "evaluate": "score a model",
    "demo": "the web page",
    "models": "the models that come with flowt2i",
    "bench": "speed and memory on this machine",
    "doctor": "check the machine, and a run before it starts",
    "verify-resume": "show that an interrupted training loses nothing",
    "export": "a folder with the model and its card, for other machines, diffusers, ONNX or the hub",
}
EXAMPLES = """examples:
  flowt2i prepare scenes --out data/scenes
  flowt2i train --config quickstart --data data/scenes --out runs/quickstart
  flowt2i generate "a small red circle left of a large blue star" --model runs/quickstart --out picture.png"""


def build_parser(command: str | None = None) -> Parser:
    """The parser of one command, or, without it, one that only knows their names: what a command's options need is imported for that command alone."""
    parser = Parser(
        prog="flowt2i",
        description="Train a text-to-image model from scratch with flow matching, score it, sample from it, serve it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flowt2i {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    if command:
        importlib.import_module(f"flowt2i.commands.{command.replace('-', '_')}").add(commands)
    else:
        for name, line in COMMANDS.items():
            commands.add_parser(name, help=line)
    return parser


def apart(words: list[str]) -> tuple[list[str], list[str]]:
    """Settings, `--section.field value` as `parse_overrides` reads them, apart from the rest: a value is not taken for an argument of the command."""
    kept: list[str] = []
    given: list[str] = []
    is_open = False  # whether the word before is a setting whose value may follow
    for word in words:
        is_setting = word.startswith("--") and "." in word.partition("=")[0]
        (given if is_setting or (is_open and not word.startswith("--")) else kept).append(word)
        is_open = is_setting and "=" not in word
    return kept, given


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 2 (a mistake the user can mend), 3 (stopped by a signal, all saved)."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    words = list(sys.argv[1:] if words is None else words)
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        print(f"flowt2i: error: no command {words[0]!r}{nearest(words[0], COMMANDS)}", file=sys.stderr)
        return 2
    if not words or words[0].startswith("-"):
        parser = build_parser()
        parser.parse_args(words[:1])  # --help and --version end here, and so does an option that is none
        parser.print_help()
        return 0
    words, given = apart(words)
    args, rest = build_parser(words[0]).parse_known_args(words)
    rest = [*rest, *given]
    try:
        if rest and not getattr(args, "overrides", False):
            what = f"option {rest[0].partition('=')[0]}" if rest[0].startswith("-") else f"argument {rest[0]!r}"
            meant = f" (--model {rest[0]}?)" if hasattr(args, "model") and not hasattr(args, "prompts") and not rest[0].startswith("-") else ""
            raise UserError(f"unknown {what}{meant}; see `flowt2i {args.command} --help`")
        args.rest = rest
        return int(args.run(args))
    except UserError as error:
        print(f"flowt2i {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"flowt2i {args.command}: stopped", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        from flowt2i.memory import is_out_of_memory, told

        if not is_out_of_memory(error):
            raise
        what = f"out of memory ({told(error)})"
        print(f"flowt2i {args.command}: error: {what}: ask for less at a time (smaller pictures, fewer of them), or free some", file=sys.stderr)
        return 2


def run(words: Sequence[str] | None = None) -> NoReturn:
    """`main`, and the end of the process."""
    leave(main(words))


def leave(status: int) -> NoReturn:
    """End the process. One of several ranks ends at once: a thread of its process group that is still at work while C++ takes
    its globals down would abort ("terminate called without an active exception") what is complete and closed."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "flowt2i.training.distributed" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
