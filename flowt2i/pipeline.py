"""From prompts to pictures: the public Python face, used by `generate`, the demo, and the previews of a training.

from flowt2i import Pipeline
images = Pipeline.from_pretrained("runs/quickstart")(["a small red circle"], steps=50, guidance=2.0, seed=0)
"""

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowt2i import editing, exported, flow, hub, precision, shapes
from flowt2i import settings as choices
from flowt2i.codec import to_uint8
from flowt2i.config import Config, load_config
from flowt2i.description import DatasetDescription, require_same
from flowt2i.drawing import Drawing, Noise, Preview, given_picture
from flowt2i.editing import Picture
from flowt2i.errors import UserError
from flowt2i.model import FlowTransformer
from flowt2i.pictures import Samples, checked, name_of, read_settings, save_png
from flowt2i.styles import BY_STYLES
from flowt2i.text import CaptionTokenizer, FrozenEncoder, load_encoder, load_tokenizer
from flowt2i.training import checkpoint
from flowt2i.training.compiling import compile_blocks, has_compiler
from flowt2i.training.distributed import best_device

LARGEST_SIDE = 4096  # pixels of a picture that is drawn

__all__ = ["Pipeline", "Preview", "Samples", "build_model", "save_png"]


class Pipeline:
    """A trained model with all it needs to draw: tokenizer, text encoder, codec, latent statistics."""

    def __init__(
        self, model: FlowTransformer, config: Config, description: DatasetDescription, tokenizer: CaptionTokenizer,
        encoder: FrozenEncoder | None = None, codec: Any = None, name: str = "", weights: str = "", step: int | None = None,
    ):  # fmt: skip
        self.model, self.config, self.description, self.tokenizer, self.encoder = model, config, description, tokenizer, encoder
        self._codec, self.name, self.weights, self.step = codec, name, weights, step
        self._guides: dict[str, Pipeline] = {}
        self._moved: dict[str, Any] = {}  # folders of VAE and text encoder that were named at loading: a guide looks there too
        self._compiled = False
        self.device = next(model.parameters()).device
        self.computes = precision.to_draw(config.train.precision, self.device)
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
        """Load a run folder (its newest good checkpoint), a checkpoint, an exported model, or one from the hub by its id ("owner/name").

        weights: "ema", "raw", or "auto" (EMA where there is one). codec, text: folders to load VAE and text encoder from, where
        they are not where they were when the data was prepared. UserError where anything is missing or does not fit.
        """
        folder = checkpoint.find(hub.local(path))
        config = load_config(folder / "config.json")
        description = DatasetDescription.load(folder)
        stem, kind = exported.weights_file(folder, weights)
        moved = {"codec": codec, "text": text}
        codec, text = codec or exported.taken_along(folder, exported.VAE), text or exported.taken_along(folder, exported.ENCODER)
        model = build_model(config, description)
        checkpoint.load_into(model, folder / f"{stem}.safetensors")
        try:
            target = torch.device(device) if device else best_device()
            model = model.to(target).eval().requires_grad_(False)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {str(device)!r} cannot be used here ({str(error).splitlines()[0]}): leave it out, or choose cpu") from error
        tokenizer = load_tokenizer(description.text, folder)
        dtype = precision.DTYPES[precision.to_draw(config.train.precision, target)]
        encoder = load_encoder(description.text, dtype, text).to(target) if description.text.kind == "hf" else None
        pipeline = cls(model, config, description, tokenizer, encoder, codec, str(path), "EMA" if kind == "ema" else "raw", exported.step_of(folder))
        pipeline._moved = moved
        return pipeline

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
        progress: Callable[[int], Any] | None = None, negative: str | None = None, guide: "Pipeline | str | Path | None" = None,
        init: Picture | None = None, strength: float | None = None, mask: Picture | None = None, variation: float = 0.0, to: str | None = None,
        to_seed: int | None = None, mix: float | None = None, alive: Callable[[], None] | None = None, width: int | None = None,
        height: int | None = None, seeds: Sequence[int] | None = None, done: Callable[[int, Samples], Any] | None = None, **more: Any,
    ) -> Samples:  # fmt: skip
        """Draw `num` pictures of each prompt. Picture k of the call has the seed `seed + k`, whatever batch it falls into.

        steps, solver, guidance, shift, and in `more` every other setting of `SampleConfig` (schedule, tolerance, guidance_rule, guidance_rescale,
        guidance_from, guidance_until, analogy, analogy_until, style_contrast, style_contrast_until, zero_init): None takes the model's own.
        width, height: of the pictures, in pixels, both or neither (the model's own size); see `size`.
        negative: what guidance leads away from, instead of the empty caption. guide: a weaker model that guidance leads away from instead (autoguidance).
        seeds: one for each prompt, in place of `seed` and `num`.
        init: a picture to start from, by `strength` (0: nothing of it changes, 1: nothing of it is left; 0.6 if not given); with a `mask` (bright: draw
        anew) the rest of it stays, and strength is 1 if not given. variation, to, to_seed, mix: see `editing.starts`.
        preview(step, steps, images) is called every `preview_every` steps with the predicted clean pictures of the batch at work;
        progress(n) after each batch of n; done(first, samples) with its pictures, which begin at number `first` of the call. alive() is called before
        every evaluation of a network: what it raises ends the drawing.
        UserError on settings out of range.
        """
        chosen = self.settings(steps, solver, guidance, shift, negative, guide, **more)
        starts = editing.starts([prompts] if isinstance(prompts, str) else list(prompts), seed, num, variation, to, to_seed, mix)
        if seeds is not None:
            if len(seeds) != len(starts) or num != 1:
                raise UserError(f"{len(seeds)} seeds for {len(starts)} pictures: give one for each prompt, and leave num out")
            if any(type(own) is not int or not 0 <= own < editing.LARGEST_SEED for own in seeds):
                raise UserError("seeds must be whole numbers between 0 and 2^62")
            starts = [replace(start, seed=own) for start, own in zip(starts, seeds)]
        if batch_size < 1 or preview_every < 1:
            raise UserError("batch_size and preview_every must be at least 1")
        asked = self.size(width, height) if width is not None or height is not None else None
        started = time.perf_counter()
        given = given_picture(self, init, strength, mask, [asked] if asked else self.description.sizes)
        drawn = asked or (given.size if given else self.description.home)
        shape = self.description.codec.latent_shape(drawn)
        drawing = Drawing(self, shape, chosen, chosen.get("negative"), self._guide(guide), given, alive)
        size = 1 if chosen["solver"] == "dopri5" else batch_size  # its steps follow the error of a batch, and a picture must not depend on its neighbours
        side = self.description.codec.image_size
        told = dict(chosen)
        if drawn != (side, side) or self.description.home != drawn or (drawing.given and self.description.buckets):  # or the picture begun from would decide
            told |= {"width": drawn[0], "height": drawn[1]}
        if drawing.given:
            told |= {"init": name_of(init), "init_pixels": editing.fingerprint(drawing.given.original), "strength": drawing.given.strength}
            if drawing.given.pixels is not None:
                told |= {"mask": name_of(mask), "mask_pixels": editing.fingerprint(drawing.given.pixels)}

        def samples(images: list[np.ndarray], of: Sequence[editing.Start], so_far: int) -> Samples:
            ways, seconds = [s.way() for s in of], time.perf_counter() - started - outside
            prompts, own_seeds, each = [s.prompt for s in of], [s.seed for s in of], round(drawing.evaluated / so_far)
            return Samples(np.concatenate(images), prompts, own_seeds, told, each, seconds, ways if any(ways) else [], self.told())

        images: list[np.ndarray] = []
        outside = 0.0  # seconds that `done` took
        for first in range(0, len(starts), size):
            batch = starts[first : first + size]
            images.append(drawing.batch(batch, preview, preview_every))
            if done:
                drawn_in, left = samples(images[-1:], batch, first + len(batch)), time.perf_counter()
                done(first, drawn_in)
                outside += time.perf_counter() - left
            if progress:
                progress(len(batch))
        return samples(images, starts, len(starts))

    def size(self, width: int | None, height: int | None) -> shapes.Shape:
        """(width, height) of pictures that were asked for: a model draws at any size whose sides codec and patch make, best at those it was trained at.

        UserError where it cannot be made, naming the nearest that can.
        """
        if type(width) is not int or type(height) is not int:
            given = " and ".join(f"{name} {value}" for name, value in (("width", width), ("height", height)) if value is not None)
            raise UserError(f"{given}: give width and height, both in whole pixels, or neither")
        shapes.require(width, height, self.description.codec.factor * self.model.patch, f"a picture of {width}x{height} pixels", "this model makes")
        if max(width, height) > LARGEST_SIDE:
            raise UserError(f"a picture of {width}x{height} pixels is too large: {LARGEST_SIDE} a side at most")
        return width, height

    def settings(
        self, steps: int | None = None, solver: str | None = None, guidance: float | None = None, shift: float | None = None,
        negative: str | None = None, guide: "Pipeline | str | Path | None" = None, **more: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """All settings of `SampleConfig` that will be used, checked, and what guidance leads away from where that is given; UserError says which is wrong."""
        chosen = choices.resolve(self.config.sample, {"steps": steps, "solver": solver, "guidance": guidance, "shift": shift, **more})
        if negative is not None and not isinstance(negative, str):
            raise UserError(f"the negative prompt is {str(negative)[:50]!r}: give a text")
        negative = negative if negative and negative.strip() else None
        if (negative or guide is not None) and not choices.is_guided(chosen):
            raise UserError("a negative prompt or a guide acts through guidance, which is off at 1: set another scale")
        if negative and guide is not None:
            raise UserError("guidance leads away from a negative prompt or from a weaker model, not from both: leave one out")
        return chosen | {name: value for name, value in (("negative", negative), ("guide", name_of(guide))) if value}

    def redraw(self, picture: Picture | dict[str, Any], **instead: Any) -> Samples:
        """The picture again that a PNG of ours (or its metadata) tells of; `instead` overrides settings of it. UserError where it tells nothing.

        A picture that began at another, or that a weaker model guided, needs that one where it was (or given anew: `init`, `mask`, `guide`).
        Warns where this is not the model that drew it.
        """
        told = checked(picture if isinstance(picture, dict) else read_settings(picture))
        before: dict[str, Any] = {name: told[name] for name in ("model", "weights", "step") if name in told}
        if any(self.told().get(name) != value for name, value in before.items()):
            warnings.warn(f"the picture was drawn by {_name(before)}, and this is {_name(self.told())}: it will differ", stacklevel=2)
        for name in BY_STYLES:
            told.setdefault(name, 0.0)  # pictures from before it
            if told[name] and name not in instead and len(self.config.sample.styles) < 2:
                told[name] = 0.0  # another model's, of which was just warned
        wanted = {name: value for name, value in told.items() if name not in ("version", "model", "weights", "step", "init_pixels", "mask_pixels")} | instead
        for name in ("init", "mask", "guide"):
            if isinstance(wanted.get(name), str) and name not in instead and not os.path.exists(wanted[name]):
                raise UserError(f"the picture was made with {name} {wanted[name][:200]!r}, which is not there: give it with --{name}")
        samples = self.sample(wanted.pop("prompt"), **wanted)
        for name in ("init", "mask"):
            if name not in instead and told.get(f"{name}_pixels") != samples.settings.get(f"{name}_pixels"):
                raise UserError(f"the {name} {told[name]!r} is not the picture that was used before: give that one with --{name}")
        return samples

    def told(self) -> dict[str, Any]:
        """Which model this is, as pictures tell it: its name, which weights, and after how many training steps where that is known."""
        return {"model": Path(self.name).name, "weights": self.weights} | ({} if self.step is None else {"step": self.step})

    def compile(self) -> "Pipeline":
        """Compile the network (`torch.compile`), and its guides', at their first picture. UserError without a compiler.

        On a GPU the whole network becomes CUDA graphs, one for each number of pictures: a small network waits for its launches otherwise. Elsewhere
        its blocks are compiled, one for all, which takes less long.
        """
        if not has_compiler():
            raise UserError("torch.compile needs a C++ compiler and Python's headers, which are not here: leave --compile out")
        if self.device.type == "cuda":
            self.model.compile(mode="reduce-overhead")
        else:
            compile_blocks(self.model)
        self._compiled = True
        for guide in self._guides.values():
            guide.compile()
        return self

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
        """The noise that drawing at the model's own size starts from. [B, C, H, W]."""
        return Noise(seeds, self.description.codec.latent_shape(self.description.home), self.device)()

    def field(self, z: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """The model as a velocity field: z [B, C, H, W], t [] -> [B, C, H, W] fp32."""
        times = z.new_full((z.shape[0],), float(t))  # solvers keep the time on the CPU: nothing waits for a GPU here
        output = self.model(z, times, text, mask).to(torch.float32, copy=True)  # a CUDA graph's output is overwritten by its next run
        return flow.to_velocity(output, z, times, self.model.config.target)

    def to_images(self, z: Tensor) -> np.ndarray:
        """Normalised latents [B, C, H, W] -> uint8 [B, H, W, 3]. UserError where pixels are not finite."""
        pixels = self.codec.decode(z.float() * self.std + self.mean)
        if not torch.isfinite(pixels).all():
            raise UserError("the image codec put out numbers that are not finite: the model's training diverged, or guidance is too high for it")
        return to_uint8(pixels)

    def _guide(self, guide: "Pipeline | str | Path | None") -> "Pipeline | None":
        """The weaker model, loaded once; UserError where its latents are not ours."""
        if guide is None:
            return None
        if not isinstance(guide, Pipeline):
            place = os.path.abspath(guide)
            if place not in self._guides:
                loaded = Pipeline.from_pretrained(guide, device=self.device, **self._moved)
                self._guides[place] = loaded.compile() if self._compiled else loaded
            guide = self._guides[place]
        require_same(self.description.codec, guide.description.codec, "the codecs of model and guide")
        ours, theirs = ((d.latent_mean, d.latent_std) for d in (self.description, guide.description))
        if not np.allclose(ours, theirs, atol=1e-3):
            raise UserError("model and guide were trained on data of other statistics: a guide must know the same data")
        return guide


def _name(told: dict[str, Any]) -> str:
    """ "quickstart (EMA weights, step 5000)"."""
    facts = [f"{told['weights']} weights"] if told.get("weights") else []
    facts += [f"step {told['step']}"] if "step" in told else []
    name = (told.get("model") or "a model without a name") + (f" ({', '.join(facts)})" if facts else "")
    return "".join(c if c.isprintable() else "?" for c in name)[:200]  # a PNG may come from anyone, and this goes to a terminal


def build_model(config: Config, description: DatasetDescription) -> FlowTransformer:
    """An untrained model of this configuration for data of this description."""
    shape = description.codec.shape
    text = description.text
    resolved, text_dim = config.model.resolve(description.codec.kind, shape), text.dim if text.kind == "hf" else 0
    model = FlowTransformer(resolved, shape, text_dim, text.vocab_size, description.latent_mean, description.latent_std)
    model.checkpoint_activations = config.train.checkpoint_activations
    return model
