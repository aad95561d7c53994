"""From prompts to pictures: the public Python face, used by `generate`, the demo, and the previews of a training.

from flowt2i import Pipeline
images = Pipeline.from_pretrained("runs/quickstart")(["a small red circle"], steps=50, guidance=2.0, seed=0)
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from flowt2i import __version__, flow, guidance, solvers
from flowt2i.config import Config, load_config
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError, nearest
from flowt2i.model import FlowTransformer
from flowt2i.text import CaptionTokenizer, FrozenEncoder, load_encoder, load_tokenizer
from flowt2i.training import checkpoint
from flowt2i.training.distributed import best_device

Preview = Callable[[int, int, np.ndarray], None]  # (step, steps, images uint8 [B, H, W, 3] of the predicted clean pictures)


@dataclass
class Samples:
    """Pictures and how they came about."""

    images: np.ndarray  # uint8 [N, H, W, 3]
    prompts: list[str]  # [N]
    seeds: list[int]  # [N]
    settings: dict[str, Any]  # steps, solver, guidance, shift
    evaluations: int  # network evaluations a picture took, guidance's counted
    seconds: float

    def pictures(self) -> list[Image.Image]:
        """PIL images whose `info["flowt2i"]` says how to make them again."""
        pictures = []
        for image, prompt, seed in zip(self.images, self.prompts, self.seeds):
            picture = Image.fromarray(image)
            picture.info["flowt2i"] = json.dumps({"prompt": prompt, "seed": seed, **self.settings, "version": __version__})
            pictures.append(picture)
        return pictures


def save_png(picture: Image.Image, path: Path | IO[bytes]) -> None:
    """Save a picture with the settings in its `info` as PNG text, to a path or an open file."""
    text = PngInfo()
    text.add_text("flowt2i", str(picture.info.get("flowt2i", "")))
    picture.save(path, "PNG", pnginfo=text)


class Pipeline:
    """A trained model with all it needs to draw: tokenizer, text encoder, codec, latent statistics."""

    def __init__(
        self, model: FlowTransformer, config: Config, description: DatasetDescription, tokenizer: CaptionTokenizer,
        encoder: FrozenEncoder | None = None, codec: Any = None, name: str = "", weights: str = "",
    ):  # fmt: skip
        self.model, self.config, self.description, self.tokenizer, self.encoder = model, config, description, tokenizer, encoder
        self._codec, self.name, self.weights = codec, name, weights
        self.device = next(model.parameters()).device
        self.mean = torch.tensor(description.latent_mean, device=self.device).view(1, -1, 1, 1)
        self.std = torch.tensor(description.latent_std, device=self.device).view(1, -1, 1, 1)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        weights: str = "auto",
        device: str | torch.device | None = None,
        codec: str | None = None,
        text: str | None = None,
    ) -> "Pipeline":
        """Load a run folder (its newest good checkpoint), a checkpoint, or an exported model.

        weights: "ema", "raw", or "auto" (EMA where there is one). codec, text: folders to load VAE and text encoder from, where
        they are not where they were when the data was prepared. UserError where anything is missing or does not fit.
        """
        folder = checkpoint.find(Path(path))
        config = load_config(folder / "config.json")
        description = DatasetDescription.load(folder)
        stem = {"auto": "ema" if (folder / "ema.safetensors").exists() else "model", "ema": "ema", "raw": "model"}.get(weights)
        if stem is None:
            raise UserError(f"no weights {weights!r}: choose ema, raw or auto")
        if not (folder / f"{stem}.safetensors").exists():
            raise UserError(f"{folder} has no {weights} weights: choose {'raw' if stem == 'ema' else 'ema'}")
        model = build_model(config, description)
        checkpoint.load_into(model, folder / f"{stem}.safetensors")
        try:
            target = torch.device(device) if device else best_device()
            model = model.to(target).eval().requires_grad_(False)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {str(device)!r} cannot be used here ({str(error).splitlines()[0]}): leave it out, or choose cpu") from error
        tokenizer = load_tokenizer(description.text, folder)
        encoder = load_encoder(description.text, compute_dtype(config), text).to(target) if description.text.kind == "hf" else None
        return cls(model, config, description, tokenizer, encoder, codec, str(path), "EMA" if stem == "ema" else "raw")

    @property
    def codec(self) -> Any:
        """Loaded at first use: training and latents-only work need no decoder."""
        if self._codec is None or isinstance(self._codec, str):
            from flowt2i.codec import codec_from_spec

            self._codec = codec_from_spec(self.description.codec, self._codec).to(self.device)
        return self._codec

    def __call__(self, prompts: str | Sequence[str], **settings: Any) -> list[Image.Image]:
        """Pictures of the prompts, in order; settings as in `sample`."""
        return self.sample(prompts, **settings).pictures()

    @torch.inference_mode()
    def sample(
        self, prompts: str | Sequence[str], *, steps: int | None = None, solver: str | None = None, guidance: float | None = None,
        shift: float | None = None, seed: int = 0, num: int = 1, batch_size: int = 64, preview: Preview | None = None, preview_every: int = 1,
        progress: Callable[[int], Any] | None = None,
    ) -> Samples:  # fmt: skip
        """Draw `num` pictures of each prompt. Picture k of the call has the seed `seed + k`, whatever batch it falls into.

        steps, solver, guidance, shift: None takes the model's own. preview(step, steps, images) is called every `preview_every` steps with
        the predicted clean pictures of the batch at work; progress(n) after each batch of n. UserError on settings out of range.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        settings = self.settings(steps, solver, guidance, shift)
        if not prompts:
            raise UserError("no prompt: give at least one")
        if any(not p.strip() for p in prompts):
            raise UserError("an empty prompt: say what the picture should show")
        if num < 1 or not 0 <= seed < 2**62:
            raise UserError("num must be at least 1 and seed between 0 and 2^62")
        started = time.perf_counter()
        every = [p for p in prompts for _ in range(num)]
        seeds = [seed + k for k in range(len(every))]
        images = []
        for start in range(0, len(every), batch_size):
            part = slice(start, start + batch_size)
            images.append(self._batch(every[part], seeds[part], settings, preview, preview_every))
            if progress:
                progress(len(images[-1]))
        evaluations = solvers.EVALUATIONS[settings["solver"]](settings["steps"]) * (1 if settings["guidance"] == 1 else 2)
        return Samples(np.concatenate(images), every, seeds, settings, evaluations, time.perf_counter() - started)

    def settings(self, steps: int | None = None, solver: str | None = None, guidance: float | None = None, shift: float | None = None) -> dict[str, Any]:
        """The settings that will be used, checked; UserError says which is out of range."""
        own = self.config.sample
        chosen: dict[str, Any] = {
            "steps": own.steps if steps is None else steps,
            "solver": solver or own.solver,
            "guidance": own.guidance if guidance is None else guidance,
            "shift": own.shift if shift is None else shift,
        }
        if not isinstance(chosen["steps"], int) or not 1 <= chosen["steps"] <= 1000:
            raise UserError(f"steps {chosen['steps']} is out of range: choose 1 to 1000")
        if chosen["solver"] not in solvers.SOLVERS:
            raise UserError(f"no solver {chosen['solver']!r}{nearest(str(chosen['solver']), solvers.SOLVERS)}")
        if not math.isfinite(chosen["guidance"]) or not 0 <= chosen["guidance"] <= 100:
            raise UserError(f"guidance {chosen['guidance']} is out of range: choose 0 to 100 (1: none)")
        if not math.isfinite(chosen["shift"]) or not 0 < chosen["shift"] <= 100:
            raise UserError(f"shift {chosen['shift']} is out of range: choose above 0 to 100 (1: even steps)")
        return chosen

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Caption features [B, T, D] and mask [B, T]. T is the same for every batch (a picture must not depend on its neighbours)."""
        width = max(self.description.longest_caption, 1)
        rows = self.tokenizer(list(captions))
        width = max(width, *(len(row) for row in rows))
        ids = torch.full((len(rows), width), self.description.text.pad_id, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        ids, mask = ids.to(self.device), mask.to(self.device)
        return (self.encoder(ids, mask) if self.encoder else self.model.encode_captions(ids, mask)), mask

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        """One CPU generator an image, so that a seed means the same noise on every device and in every batch. [B, C, H, W]."""
        return torch.stack([torch.randn(self.model.shape, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(self.device)

    def field(self, z: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """The model as a velocity field: z [B, C, H, W], t [] -> [B, C, H, W] fp32."""
        times = t.expand(z.shape[0])
        output = self.model(z, times, text, mask).float()
        return flow.to_velocity(output, z, times, self.model.config.target)

    def to_images(self, z: Tensor) -> np.ndarray:
        """Normalised latents [B, C, H, W] -> uint8 [B, H, W, 3]."""
        pixels = self.codec.decode(z.float() * self.std + self.mean)
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def _batch(self, prompts: list[str], seeds: list[int], settings: dict[str, Any], preview: Preview | None, preview_every: int) -> np.ndarray:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16"):
            if settings["guidance"] == 1:
                velocity = guidance.conditional(self.field, *self.encode(prompts))
            else:
                text, mask = self.encode([*prompts, *[""] * len(prompts)])  # together: both halves are padded alike
                n = len(prompts)
                velocity = guidance.classifier_free(self.field, text[:n], mask[:n], text[n:], mask[n:], settings["guidance"])
            steps = settings["steps"]

            def show(step: int, t: Tensor, z: Tensor, v: Tensor) -> None:
                if preview and (step % preview_every == 0 or step == steps - 1):
                    preview(step + 1, steps, self.to_images(flow.to_data(v, z, t.expand(z.shape[0]))))

            times = solvers.shift_times(solvers.uniform_times(steps, self.device), settings["shift"])
            z = solvers.SOLVERS[settings["solver"]](velocity, self.initial_noise(seeds), times, show)
        if not torch.isfinite(z).all():
            raise UserError("the model put out numbers that are not finite: its training diverged, or guidance is too high for it")
        return self.to_images(z)


def compute_dtype(config: Config) -> torch.dtype:
    """What a frozen text encoder runs in: the same at training and at sampling."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def build_model(config: Config, description: DatasetDescription) -> FlowTransformer:
    """An untrained model of this configuration for data of this description."""
    shape = description.codec.shape
    text = description.text
    return FlowTransformer(config.model.resolve(description.codec.kind, shape), shape, text.dim if text.kind == "hf" else 0, text.vocab_size)
