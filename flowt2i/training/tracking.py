"""Where a run's numbers and pictures go: `RUN/log.jsonl` always, TensorBoard and Weights & Biases where asked for."""

import json
import math
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flowt2i.config import Config
from flowt2i.errors import UserError
from flowt2i.files import whole


class Tracker:
    """Writes scalars and images of a run under the optimizer step they belong to."""

    def __init__(self, run: Path, config: Config, step: int):
        self.run = run
        for name in ("log.jsonl", "eval.jsonl"):
            _cut(run / name, step)
        self._file = (run / "log.jsonl").open("a", buffering=1)
        self._evaluations = (run / "eval.jsonl").open("a", buffering=1)
        self._board: Any = None
        self._wandb: Any = None
        if config.track.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError("track.tensorboard needs `pip install tensorboard`") from error
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step)
        if config.track.use_wandb:
            try:
                import wandb
            except ImportError as error:
                raise UserError("track.use_wandb needs `pip install wandb`") from error
            identity = run / "wandb.id"  # a resume goes on in the same W&B run
            if not identity.exists():
                identity.write_text(uuid.uuid4().hex[:8])
            try:
                self._wandb = wandb.init(
                    project=config.track.wandb_project, dir=str(run), mode=config.track.wandb_mode, config=config.model_dump(), name=run.name,
                    id=identity.read_text(), resume="allow",
                )  # fmt: skip
            except wandb.errors.Error as error:
                raise UserError(f"Weights & Biases cannot start ({str(error).splitlines()[0]}): log in, or use --track.wandb_mode offline") from error

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """One line of log.jsonl; nested dicts become `a/b` elsewhere."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._send(step, values)

    def evaluation(self, step: int, values: dict[str, Any]) -> None:
        """One line of eval.jsonl."""
        self._evaluations.write(json.dumps({"step": step, **values}) + "\n")
        self._send(step, values)

    def _send(self, step: int, values: dict[str, Any]) -> None:
        flat: dict[str, Any] = {}
        for key, value in values.items():
            if isinstance(value, dict):
                flat |= {f"{key}/{inner}": v for inner, v in value.items()}
            else:
                flat[key] = value
        numbers = {key: float(value) for key, value in flat.items() if isinstance(value, int | float)}
        if self._board:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, step)
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def image(self, step: int, name: str, picture: Image.Image) -> Path:
        """Save a picture as RUN/samples/step-*.png, and send it on."""
        path = self.run / picture_name(step, name)
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
        if self._board:
            self._board.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        if self._wandb:
            import wandb

            self._wandb.log({name: wandb.Image(picture)}, step=step)
        return path

    def close(self) -> None:
        self._file.close()
        self._evaluations.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def picture_name(step: int, name: str) -> str:
    """Where in a run's folder a picture lies."""
    return f"samples/step-{step:08d}{'' if name == 'samples' else '-' + name}.png"


def read_log(path: Path, until: float = math.inf) -> list[dict[str, Any]]:
    """The lines of a log.jsonl or eval.jsonl, up to the step `until`. A line that a kill cut short is left out; no lines where there is no such file."""
    found = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
            if line["step"] <= until:
                found.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _cut(path: Path, step: int) -> None:
    """Drop lines past the step that a resume continues from, so that no step stands in a log twice."""
    if not path.exists():
        return
    with whole(path) as aside:
        aside.write_text("".join(json.dumps(line) + "\n" for line in read_log(path, step)))
