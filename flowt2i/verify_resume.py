"""Does an interrupted training end exactly where an uninterrupted one does, here, with this configuration?

    flowt2i verify-resume --config stability --data data/mine --steps 6 --at 3

Trains so many steps without a stop; trains them again, stopped by a real SIGTERM during step `at` and resumed in a fresh process by the same
command; and compares the loss of every step and all weights, averages and optimizer moments bit by bit. Where they differ, an uninterrupted
training is repeated: if even that differs from the first, it is the device's kernels that do not repeat themselves, not the resume.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flowt2i.config import Config
from flowt2i.errors import INTERRUPTED, UserError
from flowt2i.training import checkpoint
from flowt2i.training.compiling import will_compile
from flowt2i.training.distributed import best_device
from flowt2i.training.tracking import read_log

FILES = ("model", "ema", "optimizer", "matching")


def verify_resume(
    config: Config, words: Sequence[str], data: Path, steps: int = 6, at: int = 3, ranks: int = 1, progress: Callable[[str], Any] = lambda text: None
) -> dict[str, Any]:
    """Train, interrupt, resume, compare. words: what chose the configuration on the command line (`--config …` and overrides).

    Returns `equal`, `losses` [{step, uninterrupted, interrupted}], `tensors` {file: {count, equal, largest_difference}} and, where not equal, `repeatable`.
    """
    if not 1 <= at < steps:
        raise UserError(f"--at {at} must lie between 1 and --steps {steps} - 1")
    compiled = "on" if will_compile(config.train, best_device()) else "off"  # as the real run will do, however few the steps are here
    settings = {
        "train.steps": steps, "train.minutes": 0, "train.log_every": 1, "train.eval_every": 0, "train.checkpoint_every": steps, "train.compile": compiled,
        "train.eval_images": 1, "train.score_prompts": 0, "sample.steps": 1, "sample.images": 1, "track.use_wandb": "false", "track.tensorboard": "false",
    }  # fmt: skip
    command = ["train", *words, "--data", str(data), *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]
    try:
        place = tempfile.TemporaryDirectory(prefix="flowt2i-verify-")
    except OSError as error:
        raise UserError(f"no temporary folder can be written ({error.strerror}): set TMPDIR to a folder on a disk with room") from error
    with place as folder:
        whole, stopped = Path(folder, "uninterrupted"), Path(folder, "interrupted")
        progress(f"{steps} steps without a stop")
        _train(command, whole, ranks)
        progress(f"{steps} steps, stopped at step {at}")
        _train(command, stopped, ranks, stop_at=at)
        if checkpoint.list_steps(stopped) != [at]:
            raise UserError(f"the interrupted training left no checkpoint at step {at}: nothing to resume from")
        progress("resumed in a fresh process")
        _train(command, stopped, ranks)
        result = compare(whole, stopped)
        if not result["equal"]:
            progress("not equal: is the device itself repeatable?")
            again = Path(folder, "again")
            _train(command, again, ranks)
            control = compare(whole, again)
            result |= {"repeatable": control["equal"], "difference_of_repeats": control["largest_difference"]}
    return {"steps": steps, "at": at, "ranks": ranks, "device": best_device().type, "compiled": compiled == "on"} | result


def compare(a: Path, b: Path) -> dict[str, Any]:
    """Losses step by step and the tensors of the newest checkpoints of two runs."""
    ours, theirs = losses(a), losses(b)
    lines = [{"step": step, "uninterrupted": ours.get(step), "interrupted": theirs.get(step)} for step in sorted(ours | theirs)]
    worst = max((_relative(line["uninterrupted"], line["interrupted"]) for line in lines), default=float("inf"))
    tensors = {}
    (one, other) = (checkpoint.find(run) for run in (a, b))
    for name in FILES:
        if (one / f"{name}.safetensors").exists() or (other / f"{name}.safetensors").exists():
            tensors[name] = _compare_tensors(*(checkpoint.load_tensors(path / f"{name}.safetensors") for path in (one, other)))
    equal = worst == 0 and all(part["equal"] == part["count"] for part in tensors.values())
    return {"equal": equal, "losses": lines, "tensors": tensors, "largest_difference": max([worst, *(part["largest_difference"] for part in tensors.values())])}


def losses(run: Path) -> dict[int, float]:
    """Loss by step of a run's log."""
    return {line["step"]: line["loss"] for line in read_log(run / "log.jsonl") if "loss" in line}


def report(result: dict[str, Any]) -> str:
    """The comparison as a table, and the verdict in the last line."""
    where = f"{result['device']}{', compiled' if result['compiled'] else ''}, {result['ranks']} rank(s)"
    lines = [f"{result['steps']} steps on {where}; stopped by SIGTERM during step {result['at']} and resumed in a fresh process", ""]
    lines.append(f"  {'step':>5}  {'loss, uninterrupted':<22}{'loss, interrupted':<22}")
    for line in result["losses"]:
        a, b = line["uninterrupted"], line["interrupted"]
        lines.append(f"  {line['step']:>5}  {a!s:<22}{b!s:<22}{'✓' if a == b else '✗'}{'  ← resumed here' if line['step'] == result['at'] + 1 else ''}")
    lines.append("")
    for name, part in result["tensors"].items():
        same = part["equal"] == part["count"]
        lines.append(f"  {'✓' if same else '✗'} {name:<10} {part['equal']} of {part['count']} tensors equal" + ("" if same else f" (first: {part['first']})"))
    lines.append("")
    if result["equal"]:
        lines.append("equal: an interrupted training loses nothing here, bit by bit")
    elif not result["repeatable"]:
        lines.append(
            f"not equal (largest relative difference {result['largest_difference']:.2g}), but two uninterrupted trainings differ too "
            f"({result['difference_of_repeats']:.2g}): kernels of this device do not repeat themselves, so bits cannot be compared here"
        )
    else:
        lines.append(f"NOT equal (largest relative difference {result['largest_difference']:.2g}), although uninterrupted trainings repeat exactly: a bug")
    return "\n".join(lines)


def _relative(a: float | None, b: float | None) -> float:
    if a is None or b is None:
        return float("inf")
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


def _compare_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, Any]:
    differ = {}
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b or a[name].shape != b[name].shape:
            differ[name] = float("inf")
        elif not torch.equal(a[name], b[name]):
            differ[name] = ((a[name] - b[name]).abs().max() / a[name].abs().max().clamp_min(1e-30)).item()
    count = len(a.keys() | b.keys())
    return {"count": count, "equal": count - len(differ), "largest_difference": max(differ.values(), default=0.0), "first": next(iter(differ), None)}


def _train(command: Sequence[str], run: Path, ranks: int, stop_at: int = 0) -> None:
    """Run the train command in a fresh process (under torchrun for several ranks); UserError with its last line where it fails."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*launcher, "-m", "flowt2i.verify_resume", str(stop_at), *command, "--out", str(run), "--resume", "latest"], capture_output=True, text=True
    )
    # torchrun has one exit status for all failures: that the stop came about is seen by the checkpoint it left
    if done.returncode != 0 and not (stop_at and (done.returncode == INTERRUPTED or ranks > 1)):
        said = what_failed(done.stderr)
        full = str(run) in said and ("no room" in said or "write" in said)
        raise UserError(f"the training itself failed: {said}" + ("; here: set TMPDIR to a folder on a disk with room" if full else ""))


def what_failed(told: str) -> str:
    """The line of a training's stderr that says why it failed: of the rank that failed first, among torchrun's own lines and other ranks' complaints."""
    lines = told.splitlines()
    said = [line for line in lines if line.startswith("flowt2i train: error:")]
    if mistake := next((line for line in said if "another rank was lost" not in line), None):
        return mistake
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]+(Error|Exception)\b", line) and "ChildFailedError" not in line]
    first = re.search(r"^Root Cause.*?^ *rank +: (\d+)", told, re.DOTALL | re.MULTILINE)
    own = [line for line in errors if first and line.startswith(f"[rank{first[1]}]: ")]
    return next(reversed(own or errors or said), told[-300:])


def _child(stop_at: int, words: Sequence[str]) -> int:
    """`flowt2i train` in this process; with `stop_at`, SIGTERM arrives while that step is at work, as from a scheduler."""
    from flowt2i import cli
    from flowt2i.training import loop

    class Interrupted(loop.Trainer):
        def _step(self, *args: Any) -> Any:
            if self.step + 1 == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return super()._step(*args)

    if stop_at:
        loop.Trainer = Interrupted  # type: ignore[misc]
    return cli.main(words)


if __name__ == "__main__":
    from flowt2i.cli import leave

    leave(_child(int(sys.argv[1]), sys.argv[2:]))
