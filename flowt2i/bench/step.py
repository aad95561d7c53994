"""The bare step: model, optimizer and EMA of a training, fed with what lies ready. What a training loop is measured against."""

from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowt2i import flow, perceptual, precision, ragged
from flowt2i.bench.captions import draw_lengths, padded_width
from flowt2i.bench.timing import clock, fastest_of, mean_of, one_shape_each
from flowt2i.config import Config
from flowt2i.data.dataset import ImageTextDataset
from flowt2i.description import CodecSpec, DatasetDescription, TextSpec
from flowt2i.errors import UserError
from flowt2i.memory import is_out_of_memory
from flowt2i.model import FlowTransformer
from flowt2i.pipeline import build_model
from flowt2i.training import stream
from flowt2i.training.ema import EMA
from flowt2i.training.objective import Objective, drop_captions, with_perceptual
from flowt2i.training.optim import Optimizer, clip_gradients

VOCABULARY = 1024  # of stand-in captions; the size hardly matters, an embedding is looked up
FEATURES = 512  # width of the stand-in frozen encoder, T5-small's
PARTS = ("data", "noise", "forward", "backward", "optimizer", "ema")


def describe(latents: bool, longest: int) -> DatasetDescription:
    """A description of data that is nowhere: 64x64 pixels and the built-in encoder, or 8x8x4 latents and a frozen one."""
    codec = CodecSpec(kind="vae", id="stand-in", shape=(4, 8, 8)) if latents else CodecSpec(kind="pixels")
    channels = codec.shape[0]
    text = TextSpec(kind="hf" if latents else "builtin", dim=FEATURES if latents else 0, vocab_size=VOCABULARY, max_tokens=longest, null_tokens=(1,))
    return DatasetDescription(codec=codec, text=text, latent_mean=(0.0,) * channels, latent_std=(1.0,) * channels, train_count=1, heldout_count=0,
                              heldout_fraction=0, longest_caption=longest)  # fmt: skip


class BareStep:
    """A training's step without its loop: random images, random caption tokens of real lengths, all on the device already.

    lengths: of all captions of a dataset, from which a batch's are drawn; or {tokens: captions}. UserError where the model itself does not fit.
    """

    def __init__(self, config: Config, description: DatasetDescription, lengths: dict[int, int] | np.ndarray, device: torch.device, compiled: bool = False):
        self.config, self.description, self.device, self.compiled = config, description, device, compiled
        self.lengths = lengths
        self.room_for = ragged.Lengths.of(np.repeat(list(lengths), list(lengths.values())) if isinstance(lengths, dict) else lengths).room_for
        torch.manual_seed(config.train.seed)
        try:
            self.model: FlowTransformer = build_model(config, description).to(device)
            self.ema = EMA(self.model, config.train.ema) if config.train.ema else None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError("out of memory with the weights alone: choose a smaller model (--model.width, --model.depth)") from error
        computes = precision.resolved(config.train.precision, device)
        self.optimizer = Optimizer(config.optim, self.model, precision.DTYPES[computes])
        self.objective = Objective(self.model, config.flow, computes)
        self.perceptual = perceptual.of_run(config.flow, description, device)

    def inputs(self, images: int) -> tuple[Any, ...]:
        """Images, noise, times, captions and their room of a micro-batch, as `Objective` takes them."""
        config = self.config
        draw = stream.draw(config.train.seed, 0, images, self.description.codec.shape, config.flow.caption_dropout, False, self.device)
        f = config.flow
        t = flow.times(draw.uniform, draw.choice, f.times, f.logit_mean, f.logit_std, f.uniform_share, f.time_shift)
        captions, mask, room = self.captions(images)
        null = captions[0, :1]  # an empty caption is one token, the end
        return draw.noise.flip(0), draw.noise, t, *drop_captions(captions, mask, draw.dropped, null), room

    def captions(self, images: int) -> tuple[Tensor, Tensor, int]:
        """Token ids [B, T], or features [B, T, D] of a frozen encoder, their mask [B, T], and room for them; T as training pads a batch of such captions."""
        lengths = draw_lengths(images, self.lengths)
        width = padded_width(int(lengths.max()), self.description.longest_caption, self.compiled)
        host = torch.from_numpy(np.arange(width) < lengths[:, None])
        mask, room = host.to(self.device), self.room_for(host)
        text = self.description.text
        if text.dim:
            return torch.randn(images, width, text.dim, device=self.device) * mask.unsqueeze(-1), mask, room
        return torch.randint(2, text.vocab_size, (images, width), device=self.device) * mask, mask, room

    def loss(self, inputs: tuple[Any, ...]) -> Tensor:
        data, noise, t = inputs[:3]
        return with_perceptual(self.objective(*inputs), self.perceptual, data, noise, t, self.model.config.target, self.config.flow).mean()

    def clip(self) -> float:
        return clip_gradients(self.model, self.config.optim.clip).item()  # .item(): training looks whether the norm is finite

    def micro_step(self, images: int) -> None:
        self.loss(self.inputs(images)).backward()

    def update(self) -> None:
        self.clip()
        self.optimizer.step(1e-6)
        if self.ema:
            self.ema.update()

    def step(self, images: int, accumulate: int) -> None:
        """One optimizer step."""
        for _ in range(accumulate):
            self.micro_step(images)
        self.update()
        self.optimizer.zero_grad()

    def micro_seconds(self, images: int) -> float:
        """Seconds a micro-batch takes, compiled for its own size."""
        with one_shape_each():
            return fastest_of(lambda: self.micro_step(images), self.device)

    def update_seconds(self) -> float:
        """Seconds of clipping, optimizer and EMA: once a step, however many micro-batches it has."""
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        seconds = fastest_of(self.update, self.device)
        self.optimizer.zero_grad()
        return seconds

    def step_seconds(self, images: int, accumulate: int, seconds: float) -> float:
        """Mean seconds of whole steps, one after the other for about so long."""
        with one_shape_each():
            return mean_of(lambda: self.step(images, accumulate), self.device, seconds=seconds)

    def fits(self, images: int) -> bool:
        """Whether a step of one micro-batch of this many images fits into memory."""
        try:
            self.step(images, 1)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            self.optimizer.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return True

    def parts(self, images: int, dataset: ImageTextDataset | None = None) -> dict[str, float]:
        """Seconds of each part of a step of one micro-batch, waiting for the device after each: the median of three after a warm-up.

        "data" is a fetch from the dataset and its way to the device, where there is a dataset.
        """
        rounds: list[dict[str, float]] = []
        random = np.random.default_rng(0)
        rows = max(dataset.by_bucket(), key=len) if dataset else np.zeros(0, np.int64)  # a batch is of one shape
        with one_shape_each():
            for _ in range(4):
                marks = [clock(self.device)]
                if dataset:
                    batch = dataset.fetch(rows[random.integers(0, len(rows), images)])
                    _ = batch.stored.to(self.device), batch.ids.to(self.device), batch.mask.to(self.device)
                marks.append(clock(self.device))
                inputs = self.inputs(images)
                marks.append(clock(self.device))
                loss = self.loss(inputs)
                marks.append(clock(self.device))
                loss.backward()
                marks.append(clock(self.device))
                self.clip()
                self.optimizer.step(1e-6)
                self.optimizer.zero_grad()
                marks.append(clock(self.device))
                if self.ema:
                    self.ema.update()
                marks.append(clock(self.device))
                rounds.append({name: b - a for name, a, b in zip(PARTS, marks, marks[1:])})
        return {name: median([r[name] for r in rounds[1:]]) for name in PARTS}
