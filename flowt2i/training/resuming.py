"""Going on from a checkpoint: which one, does it belong to this data and these settings, and its weights and counters into the trainer."""

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowt2i import precision
from flowt2i.config import Config, load_config
from flowt2i.description import DatasetDescription, require_same
from flowt2i.errors import UserError
from flowt2i.training import checkpoint, dryrun
from flowt2i.training.optim import learning_rate, schedule_steps

if TYPE_CHECKING:
    from flowt2i.training.loop import Trainer

# Fields and sections that a resume must not change.
SAME = ("data.batch_size", "data.subset", "data.flip", "train.seed", "train.lora", "model", "flow", "match", "optim.name")


def find(run: Path, resume: str | None) -> Path | None:
    """The checkpoint to continue from ("latest", a run folder or a checkpoint), or None for a new run. Never silently starts over.

    Clears up in the run folder what a killed training left there: for one rank, which holds the lock. UserError where there is nothing to resume
    from, or a run that nobody asked to resume.
    """
    checkpoint.recover(run)
    dryrun.clear(run)
    steps = checkpoint.list_steps(run, whole=False)
    if resume is None:
        if steps:
            raise UserError(f"{run} already holds a run at step {steps[-1]}: add --resume latest to continue it, or choose another --out")
        return None
    if resume == "latest":
        source = checkpoint.newest_good(run)
        if source is None:
            print(f"no checkpoint in {run} yet: starting at step 0", file=sys.stderr)
        return source
    source = checkpoint.find(Path(resume))
    if not (source / "state.json").exists():
        raise UserError(f"--resume {resume} is an exported model, without the optimizer's state: resume from a run folder or a checkpoint")
    return source


def load(trainer: "Trainer", source: Path, theirs: Config) -> None:
    """Weights, their average, the optimizer's state and the counters of a checkpoint, of which `require_ours` gave the configuration.

    UserError where one does not fit.
    """
    checkpoint.load_into(trainer.model, source / "model.safetensors")
    state = checkpoint.read_state(source)
    if bool(trainer.ema) != (source / "ema.safetensors").exists():
        raise UserError(f"{source} {'lacks' if trainer.ema else 'has'} EMA weights: resume with the --train.ema that it was made with")
    if trainer.ema:
        checkpoint.load_into(trainer.ema.model, source / "ema.safetensors")
        trainer.ema.updates = state["ema_updates"]
    try:
        trainer.optimizer.load_state(checkpoint.load_tensors(source / "optimizer.safetensors"))
    except (KeyError, ValueError) as error:
        raise UserError(f"{source}/optimizer.safetensors belongs to another optimizer or model: {error}") from error
    if trainer.matching:
        try:
            trainer.matching.load_state(checkpoint.load_tensors(source / "matching.safetensors"))
        except (KeyError, ValueError) as error:
            raise UserError(f"{source}/matching.safetensors does not fit: {error}") from error
    trainer.step = state["step"]
    if trainer.config.train.minutes:
        trainer.steps = state["steps"]
        if trainer.steps:  # 0: stopped before its speed was known
            _warn_of_other_minutes(trainer, theirs)
            trainer.config.train.minutes = theirs.train.minutes or trainer.config.train.minutes  # checkpoints go on telling what laid it out
    _warn_of_another_schedule(trainer, theirs, state["steps"])
    _warn_of_another_precision(trainer, source, state)


def require_ours(trainer: "Trainer", source: Path) -> Config:
    """The configuration of a checkpoint. UserError where it was made of other data, or with other settings that a resume must not change."""
    data = DatasetDescription.load(source)
    require_same(data.codec, trainer.description.codec, "codec of the checkpoint and of the data")
    require_same(data.text, trainer.description.text, "text encoder of the checkpoint and of the data")
    for name in ("latent_mean", "latent_std", "fingerprint"):
        if getattr(data, name) != getattr(trainer.description, name):
            raise UserError(f"the checkpoint {source} was trained on other data ({name} differs): resume with that data, or start a new run")
    theirs = load_config(source / "config.json")
    for name in SAME:
        section, _, field = name.partition(".")
        a, b = (getattr(c, section) if not field else getattr(getattr(c, section), field) for c in (theirs, trainer.config))
        if a != b:
            other = field or next(f for f in type(a).model_fields if getattr(a, f) != getattr(b, f))
            value = json.dumps(getattr(getattr(theirs, section), other)).strip('"')  # as the command line takes it
            what = f"{section}.{other}"
            raise UserError(f"the checkpoint {source} was made with another {what}: resume with --{what} {value}, or start a new run with another --out")
    return theirs


def _warn_of_other_minutes(trainer: "Trainer", theirs: Config) -> None:
    """A run by time became one by steps at its start: its learning rate falls towards the last of them."""
    before, now = theirs.train.minutes, trainer.config.train.minutes
    if trainer.world.main and before != now:
        length = f"{before:g} minutes, which made {trainer.steps:,} steps," if before else f"{trainer.steps:,} steps"
        warnings.warn(
            f"this run was laid out for {length} and ends there: --train.steps N in place of "
            f"--train.minutes {now:g} lengthens it, another --out begins a new run",
            stacklevel=2,
        )


def _warn_of_another_schedule(trainer: "Trainer", theirs: Config, their_steps: int) -> None:
    """A run that is extended keeps its learning rates only where the schedule's length was fixed; else say that it bends."""
    ours, before, now = trainer.config.optim, schedule_steps(theirs, their_steps), schedule_steps(trainer.config, trainer.steps)
    if trainer.world.main and before != now and ours.schedule != "constant":
        hint = f" (--optim.schedule_steps {before} keeps it)" if before else ""
        rates = [learning_rate(*laid_out) for laid_out in ((theirs.optim, trainer.step, before), (ours, trainer.step, now))]
        warnings.warn(
            f"the {ours.schedule} schedule was laid out for {before or 'endless'} steps and is now for {now or 'endless'}: at step "
            f"{trainer.step} the learning rate goes from {rates[0]:.3g} to {rates[1]:.3g} of its maximum{hint}",
            stacklevel=2,
        )


def _warn_of_another_precision(trainer: "Trainer", source: Path, state: dict[str, Any]) -> None:
    """A run that goes on elsewhere may compute in what that device is made for (`precision.resolved`)."""
    asked = json.loads((source / "config.json").read_text()).get("train", {}).get("precision")  # all that checkpoints told before "auto" was there
    before = state.get("precision", asked)
    if trainer.world.main and before in precision.DTYPES and before != trainer.computes:
        keep = before == "fp32" or precision.has_bf16(trainer.world.device.type)
        hint = f" (--train.precision {before} keeps it)" if keep else f": {before} is slow on this {trainer.world.device.type}"
        warnings.warn(f"so far it was trained in {before}, here it goes on in {trainer.computes}{hint}", stacklevel=2)
