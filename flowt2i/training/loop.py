"""The training of one run.

    flowt2i train --config quickstart --data data/scenes --out runs/quickstart
    flowt2i train --config quickstart --data data/scenes --out runs/quickstart --resume latest

A step: fetch, draw noise and times, forward and backward (gradients are summed over ranks at the last micro-batch only), clip, agree with
the other ranks that all is finite and whether to stop, optimizer, EMA, counters; then log, evaluate, save. State is counted in optimizer steps.
"""

import contextlib
import errno
import fcntl
import gc
import json
import math
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from flowt2i import flow, perceptual, precision, ragged, shapes
from flowt2i.codec import codec_from_spec, stored_to_latents
from flowt2i.config import Config, seconds
from flowt2i.data import feed
from flowt2i.data.dataset import Batch, ImageTextDataset
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.model import count_parameters
from flowt2i.pipeline import Pipeline, build_model
from flowt2i.text import load_encoder, load_tokenizer
from flowt2i.training import checkpoint, distributed, dryrun, lora, matching, parallel, resuming, start, stream
from flowt2i.training.compiling import compile_training, text_padding, will_compile
from flowt2i.training.ema import EMA
from flowt2i.training.evaluate import evaluate
from flowt2i.training.features import CaptionFeatures
from flowt2i.training.fit_memory import StartAgain, fit_memory
from flowt2i.training.objective import Objective, Terms, drop_captions, with_perceptual
from flowt2i.training.optim import Optimizer, clip_gradients, learning_rate, schedule_steps
from flowt2i.training.pace import Pace
from flowt2i.training.parts import commas, keep_one_side
from flowt2i.training.saver import Contents, Saver
from flowt2i.training.score import KernelScore
from flowt2i.training.tracking import Tracker, picture_name, read_log

WARM, TIMED = 5, 20  # `train.minutes`: the first steps (compilation) do not count; the speed is first known after so many


class Stopped(Exception):
    """A signal or the wall-clock budget asked for the end; everything is saved."""


class Outcome(NamedTuple):
    """What the ranks agreed on in a step, before the optimizer."""

    loss: float  # of the global batch
    norm: float  # of its gradient, before clipping
    stop: bool
    statistics: dict[str, float]


class Trainer:
    """Owns model, optimizer, EMA, data and counters of a run."""

    def __init__(
        self, config: Config, data: Path, run: Path, resume: str | None = None, progress: bool = True, codec: str | None = None, text: str | None = None,
        init: Path | None = None,
    ):  # fmt: skip
        self.started = time.perf_counter()
        self.world = distributed.start(config.train.timeout_s)
        self.config, self.data, self.run_folder, self.progress = config, data, run, progress and self.world.main
        self.micro, self.accumulate = distributed.accumulation(config.data.batch_size, config.train.micro_batch, self.world.size)
        self.description = DatasetDescription.load(data)
        self._check_data()
        self.model_config = config.model.resolve(self.description.codec.kind, self.description.codec.shape)
        self.sharded = config.train.parallel == "fsdp" and self.world.size > 1
        if self.sharded and config.optim.name == "muon":
            raise UserError("optim.name muon needs whole matrices, and --train.parallel fsdp splits them: choose --optim.name adamw, or --train.parallel ddp")
        if self.sharded and config.sample.solver == "dopri5":
            raise UserError("sample.solver dopri5 takes as many passes as a picture needs, --train.parallel fsdp the same on all ranks: choose another solver")
        self.world.on_main(self._lock)
        try:
            self._build(resume, codec, text, init)
        except BaseException:
            self.close()
            raise

    def _build(self, resume: str | None, codec: str | None, text: str | None, init: Path | None) -> None:
        world, device = self.world, self.world.device
        source = world.on_main(lambda: resuming.find(self.run_folder, resume))
        config = self.config = start.remembered(self.config, source, init)
        self.description = start.described(self.description, config.origin)
        self.compiled = will_compile(config.train, device)
        pad = text_padding(self.description.longest_caption, self.compiled)
        self.dataset = ImageTextDataset(self.data, "train", pad_to=pad)
        self.heldout = ImageTextDataset(self.data, "heldout", pad_to=pad) if self.description.heldout_count else self.dataset
        self.count = min(config.data.subset or len(self.dataset), len(self.dataset))
        self.buckets = self.dataset.by_bucket(self.count)
        self.lengths = ragged.Lengths.of(self.dataset.token_lengths()[: self.count])
        self.shapes = [self.description.codec.latent_shape(size) for size in self.description.sizes]
        self.tokenizer = load_tokenizer(self.description.text, self.data)
        torch.manual_seed(config.train.seed)
        self.model = build_model(config, self.description)
        if init and not source:
            start.load(self.model, init)
        if config.train.lora:
            lora.inject(self.model, config.train.lora)
        if config.match.weight and config.origin and self.model.caption_encoder:
            # Drawings have no gradient for it, and optimizers scale what they get: the few true pictures' alone would move it as far as all else.
            self.model.caption_encoder.requires_grad_(False)
        self.ema = EMA(self.model, config.train.ema) if config.train.ema else None
        self.computes = world.on_main(lambda: precision.resolved(config.train.precision, device))
        self.objective = Objective(self.model, config.flow, self.computes)
        self.perceptual = perceptual.of_run(config.flow, self.description, device)
        self.ema_objective = Objective(self.ema.model, config.flow, self.computes) if self.ema else None
        for objective in (self.objective, self.ema_objective):
            if objective and self.sharded:
                parallel.shard(objective, device)
            elif objective:
                objective.to(device)
        self.optimizer = Optimizer(config.optim, self.model, precision.DTYPES[self.computes])
        self.step, self.steps = 0, 0 if config.train.minutes else config.train.steps
        self.encoder = load_encoder(self.description.text, precision.DTYPES[self.computes], text).to(device) if self.description.text.kind == "hf" else None
        theirs = resuming.require_ours(self, source) if source else None  # before what takes long
        self.matching = self._matching() if config.match.weight else None
        if source and theirs:
            resuming.load(self, source, theirs)
        self.resumed_from = source
        self.first, self.resumed, self.warm = self.step, bool(self.step and self.steps), 0.0
        self.mean = torch.tensor(self.description.latent_mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(self.description.latent_std, device=device).view(1, -1, 1, 1)
        # Only previews decode, but a VAE that is missing had better be missed now than after a thousand steps.
        self.codec = codec_from_spec(self.description.codec, codec).to(device)
        self.commas = commas(self.tokenizer)
        self.null, self.text_of, self.heldout_text_of = self._prepare_text()
        if self.compiled:
            compile_training(self.objective, len(self.shapes), self.sharded)
        self.wrapped: nn.Module = parallel.replicate(self.objective) if world.size > 1 and not self.sharded else self.objective
        self.kernel_score, self.pace = KernelScore(), Pace(config.train.eval_every, config.train.eval_share, self.progress)
        self.saver = Saver(world, self.run_folder, config.train.keep_recent, config.train.keep_every)
        self.logged_saves = 0
        self.forecast = dryrun.Forecast(self)
        self.budget = seconds(config.train.stop_after)
        self.stop_signal: int | None = None
        self.stop_reason = "by a signal"  # to another rank

    # ---- set-up -------------------------------------------------------------------------------------------------------

    def _matching(self) -> matching.Matching:
        pipeline = Pipeline(self.model, self.config, self.description, self.tokenizer, self.encoder)
        pipeline.computes = self.computes
        heldout = self.heldout.captions() if self.heldout is not self.dataset else []
        return matching.Matching(self.config, pipeline, self.dataset, self.count, heldout, self.world, self.progress)

    def _check_data(self) -> None:
        wanted = {"codec": self.config.data.codec, "text": self.config.data.text}
        for name, want in wanted.items():
            have = getattr(self.description, name).id
            if want not in ("any", have) and have.rsplit("/", 1)[-1] != want:
                raise UserError(f"data.{name} asks for {want!r}, but {self.data} was prepared with {have!r}: prepare the data again, or set --data.{name} any")
        if self.description.train_count < 1:
            raise UserError(f"{self.data} has no training samples")
        model = self.config.model.resolve(self.description.codec.kind, self.description.codec.shape)
        for size in self.description.sizes:
            _, height, width = self.description.codec.latent_shape(size)
            if height % model.patch or width % model.patch:
                step = model.patch * self.description.codec.factor
                near = shapes.name((shapes.nearest_multiple(size[0], step), shapes.nearest_multiple(size[1], step)))
                raise UserError(
                    f"model.patch {model.patch} does not divide the {shapes.name(size)} pictures of {self.data}: choose a divisor, "
                    f"or prepare the data again with shapes such as {near} (--bucket-step {step})"
                )
        matching.require(self.config, self.description, min(self.config.data.subset or self.description.train_count, self.description.train_count))
        if self.config.data.flip and self.description.codec.kind != "pixels":
            raise UserError("data.flip works on pixels only: latents of a VAE cannot be mirrored")

    def _lock(self) -> None:
        """Keep other trainings out of the run folder, for as long as rank 0 lives."""
        try:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            self._lock_file = (self.run_folder / ".lock").open("w")
        except OSError as error:
            raise UserError(f"cannot write into --out {self.run_folder}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another training is writing into {self.run_folder}: choose another --out") from error
        except OSError as error:
            warnings.warn(f"no locks on this file system ({error.strerror}): see to it that only one training writes into {self.run_folder}", stacklevel=2)

    def close(self) -> None:
        """Let another training use the run folder."""
        if self.world.main:
            self._lock_file.close()

    def _prepare_text(self) -> tuple[Tensor, Any, Any]:
        ids = torch.tensor(self.description.text.null_tokens, device=self.world.device)
        if self.encoder is None:
            by_ids = lambda batch, changed=(): batch.ids.to(self.world.device, non_blocking=True)
            return ids, by_ids, by_ids
        encoder = self.encoder

        null = encoder(ids[None], torch.ones_like(ids[None], dtype=torch.bool))[0]
        make = lambda dataset: CaptionFeatures(encoder, dataset, self.description.text.dim, self.world.device, self.progress)
        training = make(self.dataset)
        return null, training, training if self.heldout is self.dataset else make(self.heldout)

    # ---- the run ------------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Train to the end. Returns a summary; raises Stopped after saving when a signal came or the time was up."""
        if self.complete and self.world.main:
            more = "give a larger --train.steps in place of --train.minutes" if self.config.train.minutes else "raise --train.steps"
            print(f"{self.run_folder} is complete at step {self.step}: {more} to go on, or choose another --out", file=sys.stderr)
        with self._signals():
            self._make_ready()
            return self._run()

    @property
    def complete(self) -> bool:
        return bool(self.steps) and self.step >= self.steps

    def _make_ready(self) -> None:
        """What comes before the first step: all that could fail later is tried, and the micro-batch fitted to the memory."""
        dryrun.check(self)
        if self.resumed_from and self.world.main:
            for moved in checkpoint.set_aside(self.run_folder, self.step):
                print(f"a later checkpoint of the branch that is left now lies in {moved}", file=sys.stderr)
        if self.world.device.type == "cuda" and not self.complete:  # a CPU's memory is virtual: it does not say when it is full
            fit_memory(self)
        if self.progress:
            print(self.headline(), file=sys.stderr)
        if self.matching and not self.resumed_from and not self.complete and not self.matching.fill(self.stopping):
            raise Stopped(f"stopped {self._why()} before the first step: the same command begins again")
        if not dryrun.rehearse(self) and self.world.size > 2 and not self.sharded and not self.complete:
            self._settle_buckets()
        self._write_config()

    def _settle_buckets(self) -> None:
        """A gradient that is thrown away: DDP lays its buckets anew after its first one, and the sum of three ranks or more rounds by where a
        number lies in a bucket. Without this a resume's first step would round otherwise than the uninterrupted run's.
        """
        self._gradient(self._fetched(), logging=False, learn=False)
        self.optimizer.zero_grad()

    def _run(self) -> dict[str, Any]:
        """The steps that are left, with what is logged, shown and saved between them."""
        tracker = Tracker(self.run_folder, self.config, self.step) if self.world.main else None
        bar = tqdm(total=self.steps or None, initial=self.step, unit="step", desc="training", disable=not self.progress, smoothing=0.05)
        batches: Any = iter(self._loader())
        batch_size, every = self.config.data.batch_size, self.config.train
        since, since_step = time.perf_counter(), self.step
        evaluation: dict[str, Any] = {}
        try:
            shown = self.complete and self.world.on_main(self._was_shown)
            if self.complete and not shown:  # it was stopped between its last checkpoint and its last evaluation
                evaluation = evaluate(self, tracker, last=True)
            while not self.complete:
                logging = (self.step + 1) % every.log_every == 0
                factor = learning_rate(self.config.optim, self.step, schedule_steps(self.config, self.steps))
                outcome = self._step(batches, factor, logging)
                self.step += 1
                if self.step == self.first + 1:  # the optimizer has its state now
                    self.saver.reserve(self._tensors())  # what a dry run has not got ready
                self._set_budget(bar)
                bar.update()
                self.forecast.after_step()
                if logging and tracker:
                    now = time.perf_counter()
                    rate = (self.step - since_step) * batch_size / max(1e-9, now - since)
                    since, since_step = now, self.step
                    line: dict[str, Any] = {
                        "images_seen": self.step * batch_size,
                        "loss": outcome.loss,
                        "lr": self.config.optim.lr * factor,
                        "grad_norm": outcome.norm,
                    }
                    if self.config.optim.name == "muon":
                        line["muon_lr"] = self.config.optim.muon_lr * factor
                    tracker.scalars(self.step, line | {"images_per_s": rate, "statistics": outcome.statistics} | self._last_save())
                    bar.set_postfix_str(f"loss {outcome.loss:.3f}, {rate:.0f} images/s")
                last = self.complete
                if last or outcome.stop or self.step % every.checkpoint_every == 0:
                    self.save()
                if last or (not outcome.stop and self.pace.due(self.step, self.world)):
                    evaluation = evaluate(self, tracker, last=last)
                    since, since_step = time.perf_counter(), self.step
                if last or outcome.stop:
                    self.saver.wait()
                if outcome.stop and not last:
                    raise Stopped(f"stopped {self._why()} at step {self.step}; continue with --resume latest")
            if not evaluation and not shown and self.stopping():
                raise Stopped(f"stopped {self._why()} after the last step, {self.step}, before its evaluation; make that with --resume latest")
        finally:
            self.saver.settle()  # whatever ended the run, a checkpoint that was begun is finished
            if self.saver.failed and sys.exc_info()[1] is not self.saver.error and self.world.main:
                warnings.warn(str(self.saver.error), stacklevel=2)
            batches.close()  # loader processes end here, not when a traceback is dropped
            bar.close()
            if tracker:
                tracker.close()
        summary = {"run": str(self.run_folder), "step": self.step, "images_seen": self.step * batch_size}
        summary |= {"seconds": round(time.perf_counter() - self.started, 1), "peak_memory_gib": round(distributed.peak_memory(self.world.device), 2)}
        return summary | self.saver.summary() | evaluation

    def _step(self, batches: Any, factor: float, logging: bool) -> Outcome:
        """One optimizer step over the global batch. UserError, before anything is updated, where a loss or the gradient is not finite."""
        outcome = self._gradient(batches, logging)
        self.optimizer.step(factor)
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update()
        return outcome

    def rehearse_step(self) -> None:
        """The step to come, with its own samples and noise, at a learning rate of 0: the weights stay, the optimizer has a state."""
        self._gradient(self._fetched(), logging=False, learn=False)
        self.optimizer.step(0.0)
        self.optimizer.zero_grad()

    def _gradient(self, batches: Any, logging: bool, learn: bool = True) -> Outcome:
        """Forward and backward over the global batch: the gradient, clipped. UserError on all ranks where it or a loss is not finite.

        learn False: a rehearsal, of which nothing is remembered.
        """
        draw, t = self.draw(self.step)
        total = torch.zeros((), device=self.world.device)
        statistics: dict[str, float] = {}
        rows = self._rows()
        matched: dict[str, float] = {}
        if self.matching:
            matched = self.matching.gradient(self.step, learn)  # past DDP, which sums what lies there over the ranks with the last micro-batch's
        for number, part in enumerate(rows):
            batch = next(batches)
            last = number == len(rows) - 1
            with parallel.gradient_sync(self.wrapped, on=last):
                data, terms = self.forward(self.wrapped, batch, draw, t, part)
                loss = terms.mean() / len(rows)
                loss.backward()
            total += loss.detach()
            if logging and last:
                statistics = self._statistics(data, draw.noise[part], t[part], terms) | matched
        norm = clip_gradients(self.model, self.config.optim.clip)
        loss_value, norm_value, stop = self._agree(total, norm)
        return Outcome(loss_value, norm_value, stop, statistics)

    @property
    def at_once(self) -> int:
        """Pictures for a pass of an evaluation: twice what a training pass takes, of which every block keeps what it has put out; guidance doubles them."""
        return max(8, 2 * self.micro)

    def _rows(self) -> list[slice]:
        """Rows of the global batch that this rank works through, one slice a micro-batch."""
        return stream.micro_rows(self.config.data.batch_size, self.micro, self.world.rank, self.world.size)

    def _fetched(self) -> Iterator[Batch]:
        """The micro-batches of the step at hand, without the loader."""
        indices = self.indices(self.step)
        return (self.dataset.fetch(indices[part]) for part in self._rows())

    def indices(self, step: int) -> np.ndarray:
        """Numbers of the samples of a step's global batch."""
        return stream.global_batch(self.config.train.seed, step, self.config.data.batch_size, self.buckets)

    def shape(self, step: int) -> tuple[int, int, int]:
        """Shape of the latents of a step's global batch."""
        bucket, _ = stream.bucket_of(self.config.train.seed, step, self.config.data.batch_size, tuple(map(len, self.buckets)))
        return self.shapes[bucket]

    def draw(self, step: int, shape: tuple[int, int, int] | None = None) -> tuple[stream.Draw, Tensor]:
        """The randomness of a step's global batch (for latents of another shape, where one is given), and its times."""
        config, codec = self.config, self.description.codec
        dropout, moments = config.flow.caption_dropout, codec.kind == "vae"
        draw = stream.draw(config.train.seed, step, config.data.batch_size, shape or self.shape(step), dropout, moments, self.world.device)
        f = config.flow
        return draw, flow.times(draw.uniform, draw.choice, f.times, f.logit_mean, f.logit_std, f.uniform_share, f.time_shift)

    def forward(self, module: nn.Module, batch: Batch, draw: stream.Draw, t: Tensor, part: slice) -> tuple[Tensor, Terms]:
        """Latents and loss terms of a micro-batch: rows `part` of the global batch."""
        data = self.latents(batch, draw.latent_noise[part] if draw.latent_noise is not None else None)
        if self.config.data.flip:
            data = torch.where(draw.flipped[part].view(-1, 1, 1, 1), data.flip(-1), data)
        batch, changed = self._keep_parts(batch, draw.part[part])
        room = self.lengths.room_for(batch.mask, self.null.shape[0])
        mask = batch.mask.to(self.world.device, non_blocking=True)
        text, mask = drop_captions(self.text_of(batch, changed), mask, draw.dropped[part], self.null)
        noise, t = draw.noise[part], t[part]
        terms = module(data, noise, t, text, mask, room)
        return data, with_perceptual(terms, self.perceptual, data, noise, t, self.model_config.target, self.config.flow)

    def _keep_parts(self, batch: Batch, chance: Tensor) -> tuple[Batch, list[int]]:
        """The batch with one side of a comma left of some captions (`flow.part_dropout`), and which rows these are. chance [b]."""
        if not self.config.flow.part_dropout:
            return batch, []
        spec = self.description.text
        ids, mask, changed = keep_one_side(batch.ids, batch.mask, chance, self.config.flow.part_dropout, self.commas, spec.null_tokens, spec.pad_id)
        return batch._replace(ids=ids, mask=mask), changed

    # ---- what the ranks agree on --------------------------------------------------------------------------------------

    def _agree(self, total: Tensor, norm: Tensor) -> tuple[float, float, bool]:
        """Loss of the global batch, gradient norm, and whether to stop, the same on all ranks: one small sum, one wait for the device.

        Raises on all ranks alike where one of them has a loss that is not finite, or could not write a checkpoint.
        """
        flags = [self.stop_signal is not None, self._is_late(), self.saver.failed, *(rank == self.world.rank for rank in range(self.world.size))]
        shared = torch.cat([total[None], torch.tensor(flags, dtype=total.dtype).to(total.device, non_blocking=True)])
        shared[4:] *= ~torch.isfinite(total)  # each rank marks its own place
        loss, signalled, late, failed, *bad, norm_value = torch.cat([self.world.sum(shared), norm.detach()[None]]).tolist()
        loss /= self.world.size
        if failed:
            self.saver.raise_error()
        if any(bad) or not math.isfinite(norm_value):
            raise self._not_finite(loss, norm_value, [rank for rank, flag in enumerate(bad) if flag])
        self.stop_reason = "by a signal" if signalled else f"after {self.config.train.stop_after}"
        return loss, norm_value, bool(signalled or late)

    def _not_finite(self, loss: float, norm: float, ranks: list[int]) -> UserError:
        """Name the ranks whose loss (or, where all losses are finite, whose own gradient) is not finite, and the samples they saw."""
        batch, size = self.config.data.batch_size, self.world.size
        if not ranks and not self.sharded:  # the sum of gradients tells no rank apart: each looks at its own again
            marks = torch.zeros(size)
            marks[self.world.rank] = not self._own_gradient_is_finite()
            ranks = self.world.sum(marks.to(self.world.device)).nonzero().flatten().tolist()
        indices = self.indices(self.step)
        ranks = ranks or list(range(size))
        samples = "; ".join(f"rank {rank}: {indices[rank * batch // size : (rank + 1) * batch // size].tolist()}" for rank in ranks)
        advice = "look at these samples"
        if self.step:  # at step 0 no learning rate had a part in it
            again = "resume" if checkpoint.list_steps(self.run_folder) else "start again"
            advice = f"{again} with a lower --optim.lr, or {advice}"
        return self.world.fail(f"loss {loss} or gradient norm {norm} is not finite at step {self.step} (samples of {samples}): nothing was updated; {advice}")

    def _own_gradient_is_finite(self) -> bool:
        """Whether this rank's rows of the step at hand, by themselves, have a finite gradient."""
        self.optimizer.zero_grad()
        draw, t = self.draw(self.step)
        for part, batch in zip(self._rows(), self._fetched()):
            self.forward(self.objective, batch, draw, t, part)[1].mean().backward()
        finite = all(bool(torch.isfinite(p.grad).all()) for p in self.model.parameters() if p.grad is not None)
        self.optimizer.zero_grad()
        return finite

    def stopping(self) -> bool:
        """Whether a signal reached any rank, or the time is up: asked between the parts of what takes long (by all ranks)."""
        return self.world.any(self.stop_signal is not None or self._is_late())

    def _is_late(self) -> bool:
        return time.perf_counter() - self.started > self.budget

    def _why(self) -> str:
        """Why the run stops before its end."""
        if self.stop_signal is not None:
            return f"by signal {self.stop_signal}"
        return f"after {self.config.train.stop_after}" if self._is_late() else self.stop_reason

    def latents(self, batch: Batch, noise: Tensor | None) -> Tensor:
        """Stored pixels or moments -> normalised latents [b, C, H, W]."""
        return (stored_to_latents(self.description.codec.kind, batch.stored.to(self.world.device, non_blocking=True), noise) - self.mean) / self.std

    @torch.no_grad()
    def _statistics(self, data: Tensor, noise: Tensor, t: Tensor, terms: Terms) -> dict[str, float]:
        z = flow.interpolate(data, noise, t)
        velocity = flow.to_velocity(terms.output.detach().float(), z, t.clamp_max(1 - self.config.flow.floor), self.model_config.target)
        target = flow.velocity_target(data, noise)
        found = {
            "latent_mean": data.mean().item(), "latent_std": data.std().item(),
            "velocity_target_std": target.std().item(), "velocity_std": velocity.std().item(), "velocity_mean": velocity.mean().item(),
        }  # fmt: skip
        beside = {"edges_loss": terms.edges, "perceptual_loss": terms.perceptual}
        told = {name: term.mean().item() for name, term in beside.items() if term is not None}
        return found | {"flow_loss": terms.losses.mean().item()} | told if told else found

    def _loader(self) -> Iterator[Batch]:
        sampler = stream.StepSampler(self.config.train.seed, self.buckets, self.config.data.batch_size, self.micro, self.world.rank, self.world.size, self.step)
        workers = self.config.data.workers
        collate: Any = ImageTextDataset.collate  # the batch comes whole from the dataset
        return feed.batches(DataLoader(
            self.dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers, pin_memory=self.world.device.type == "cuda",
            persistent_workers=workers > 0, multiprocessing_context="spawn" if workers else None,
        ))  # fmt: skip

    def _set_budget(self, bar: Any) -> None:
        """With `train.minutes`: turn the time into a number of steps, so that the learning rate can end within it.

        Done once the speed is known, and again every 100 steps up to half way, since a machine's speed drifts; a resume keeps the number.
        """
        minutes, done = self.config.train.minutes, self.step - self.first
        if not minutes or self.resumed:
            return
        if done == WARM:
            self.warm = time.perf_counter()
        elif done == TIMED or (done > TIMED and done % 100 == 0 and self.step < self.steps / 2):
            now = time.perf_counter()
            per_step = (now - self.warm) / (done - WARM)
            left = minutes * 60 - (now - self.started)
            self.steps = self.world.from_main(self.step + max(10, int(left / per_step)))
            bar.total = self.steps
            bar.refresh()
            self._write_config()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT are only noted within: the step at work is finished first."""
        handlers = {which: signal.signal(which, self._on_signal) for which in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for which, handler in handlers.items():
                signal.signal(which, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.stop_signal = number

    # ---- saving ----------------------------------------------------------------------------------------

    def pipeline(self) -> Pipeline:
        """The model as it would be loaded from a checkpoint now: the EMA where there is one."""
        model = self.ema.model if self.ema else self.model
        pipeline = Pipeline(model, self.config, self.description, self.tokenizer, self.encoder, self.codec)
        pipeline.computes = self.computes  # the ranks have agreed on it
        return pipeline

    def save(self) -> None:
        """Have a checkpoint written (by rank 0, beside the training) and superseded ones dropped; `saver.wait` says when it stands."""
        self.saver.save(self.step, *self.contents())

    def contents(self) -> Contents:
        """What a checkpoint holds now: tensors, texts and folders."""
        state: dict[str, Any] = {"step": self.step, "images_seen": self.step * self.config.data.batch_size, "steps": self.steps}
        state |= {"ema_updates": self.ema.updates if self.ema else 0, "precision": self.computes}
        texts = {"state.json": json.dumps(state), "config.json": self.config.model_dump_json(indent=2)}
        texts["dataset.json"] = self.description.model_dump_json(indent=2)
        return self._tensors(), texts, {"tokenizer": self.data / "tokenizer"}

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint, by file and name."""
        tensors = {"model": self.model.state_dict(), "optimizer": self.optimizer.state()}
        tensors |= {"ema": self.ema.model.state_dict()} if self.ema else {}
        return tensors | ({"matching": self.matching.state()} if self.matching else {})

    def _was_shown(self) -> bool:
        """Whether the evaluation at this step and its pictures are there."""
        lines = read_log(self.run_folder / "eval.jsonl")
        return any(line["step"] == self.step for line in lines) and (self.run_folder / picture_name(self.step, "samples")).exists()

    def _last_save(self) -> dict[str, Any]:
        """What the newest finished write took, once, for the log."""
        new = self.saver.reports[self.logged_saves :]
        self.logged_saves += len(new)
        return {"checkpoint": new[-1]} if new else {}

    def _write_config(self) -> None:
        if self.world.main:
            facts = {"data": str(self.data), "micro_batch": self.micro, "accumulation": self.accumulate, "ranks": self.world.size, "steps": self.steps}
            facts |= {"device": str(self.world.device), "precision": self.computes, "compiled": self.compiled, "model": self.model_config.model_dump()}
            if self.world.device.type == "cuda":
                facts["device_name"] = torch.cuda.get_device_name(self.world.device)
            resolved = self.config.model_dump() | {"resolved": facts | {"parameters": count_parameters(self.model)}}
            aside = self.run_folder / "config.json.tmp"
            aside.write_text(json.dumps(resolved, indent=2) + "\n")
            aside.replace(self.run_folder / "config.json")

    def headline(self) -> str:
        """What is about to happen, for people."""
        parts = count_parameters(self.model)
        lines = [f"begins from {self.config.origin.told}"] if self.config.origin and not self.resumed_from else []
        lines += [
            f"model: {parts['total'] / 1e6:.1f}M trainable parameters (" + ", ".join(f"{k} {v / 1e6:.2f}M" for k, v in parts.items() if k != "total") + ")"
        ]
        of_shapes = f" of {len(self.shapes)} shapes, a batch of one" if self.description.buckets else ""
        lines.append(
            f"batch: {self.config.data.batch_size} images a step = {self.micro} x {self.accumulate} accumulation x {self.world.size} rank(s); "
            f"{self.count:,} training images{of_shapes}; {self.world.device.type}, {self.computes}{', compiled' if self.compiled else ''}"
            f"{', ' + ('fsdp' if self.sharded else 'ddp') if self.world.size > 1 else ''}"
        )
        return "\n".join(lines)


def train(config: Config, data: Path, run: Path, resume: str | None = None, progress: bool = True, **where: Any) -> dict[str, Any]:
    """Train a run; see `Trainer` (`where`: codec, text: folders where these moved to; init: folder of the model to begin from).

    UserError for what the user can mend, Stopped after a signal (all saved).
    """
    before: tuple[float, int | None] | None = None  # (started, stop_signal) of a start that ran out of memory; not the error, which holds the model
    try:
        while True:
            try:
                return _train(config, data, run, resume, progress, before, **where)
            except StartAgain as again:
                config = config.model_copy(deep=True)
                config.train.micro_batch, before = again.micro, (again.started, again.stop_signal)
            gc.collect()  # what is left of the model that was too large
    except UserError as error:
        raise distributed.said_once(error) from error
    finally:
        distributed.stop()


def _train(
    config: Config, data: Path, run: Path, resume: str | None, progress: bool, before: tuple[float, int | None] | None, **where: Any
) -> dict[str, Any]:  # fmt: skip
    trainer = None
    try:
        if before:
            distributed.restart(config.train.timeout_s)
        trainer = Trainer(config, data, run, resume, progress, **where)
        if before:
            trainer.started, trainer.stop_signal = before
        return trainer.train()
    except RuntimeError as error:
        if distributed.lost_rank(error):
            raise UserError("another rank was lost, so this one ends; the newest checkpoint stands: run the same command again with --resume latest") from error
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            raise
        raise UserError(f"cannot write into {run} ({error.strerror}): the newest checkpoint stands; mend it and run again with --resume latest") from error
    finally:
        if trainer:
            trainer.close()
