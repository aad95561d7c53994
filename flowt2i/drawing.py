"""One drawing: a network, its settings and what it starts from are put together into a velocity to follow, batch by batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowt2i import editing, flow, precision
from flowt2i import settings as choices
from flowt2i.codec import stored_to_latents
from flowt2i.editing import Picture, Start
from flowt2i.errors import UserError
from flowt2i.guidance import Branches, Captions, TextVelocity, analogous, between, conditional, contrasted, time_of, together
from flowt2i.schedules import times_from
from flowt2i.shapes import Shape
from flowt2i.solvers import ToleranceError, Velocity
from flowt2i.styles import BY_STYLES, compared, parted

if TYPE_CHECKING:
    from flowt2i.pipeline import Pipeline

Change = Callable[[Tensor, Tensor, Tensor], Tensor]  # (velocity, z, t) -> the one in its place
Preview = Callable[[int, int, np.ndarray], None]  # (step, steps, images uint8 [B, H, W, 3] of the predicted clean pictures)


@dataclass
class Given:
    """A picture to start from, and what of it is drawn anew."""

    data: Tensor  # [1, C, h, w], normalised
    strength: float
    original: np.ndarray  # uint8 [H, W, 3]
    pixels: np.ndarray | None  # the mask, bool [H, W], true where it is drawn anew; None: everywhere
    latents: Tensor | None  # the same for latents, [1, 1, h, w]

    @property
    def size(self) -> Shape:
        """Its (width, height)."""
        return self.original.shape[1], self.original.shape[0]


def given_picture(
    pipeline: "Pipeline", init: Picture | None, strength: float | None, mask: Picture | None, sizes: Sequence[Shape]
) -> Given | None:  # fmt: skip
    """The picture to start from, encoded, at that of the sizes (width, height) it fits best; UserError where it or its mask cannot be used."""
    if init is None:
        if mask is not None or strength is not None:
            raise UserError("a mask or a strength needs a picture to start from: give `init`")
        return None
    share = (1.0 if mask is not None else 0.6) if strength is None else strength
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.001 <= share <= 1:
        raise UserError(f"strength {share} is out of range: choose 0.001 (little changes) to 1 (all is drawn anew)")
    codec = pipeline.description.codec
    original, pixels = editing.load_init(init, mask, sizes)
    stored = pipeline.codec.encode(torch.tensor(original).permute(2, 0, 1)[None])
    data = (stored_to_latents(codec.kind, torch.from_numpy(stored).to(pipeline.device)) - pipeline.mean) / pipeline.std
    latents = None if pixels is None else editing.shrink_mask(torch.from_numpy(pixels)[None, None].float(), (1, *data.shape[2:])).to(pipeline.device)
    return Given(data, share, original, pixels, latents)


class Noise:
    """Normal numbers from one CPU generator an image, so that a seed means the same noise on every device and in every batch. Each call goes on."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self, like: Tensor | None = None) -> Tensor:
        """[B, C, H, W]."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


@dataclass
class Drawing:
    """What all batches of a drawing have in common, and the count of their network evaluations."""

    pipeline: "Pipeline"
    shape: tuple[int, int, int]  # C, H, W of the latents
    settings: dict[str, Any]  # `settings.resolve`'s
    negative: str | None = None
    guide: "Pipeline | None" = None
    given: Given | None = None
    alive: Callable[[], None] | None = None  # called before every evaluation of a network: what it raises ends the drawing
    evaluated: int = 0  # captioned pictures that went through a network

    def batch(self, starts: list[Start], preview: Preview | None = None, every: int = 1) -> np.ndarray:
        """Pictures uint8 [B, H, W, 3] of `starts`; `preview` is called at the first step, at each `every`-th after it, and at the last."""

        def show(step: int, steps: int, t: Tensor, z: Tensor, v: Tensor) -> None:
            if preview and (step % every == 0 or step == steps - 1):
                preview(step + 1, steps, self._finish(flow.to_data(v, z, t.expand(z.shape[0]).to(z))))

        z = self.latents(starts, show)
        if not torch.isfinite(z).all():
            raise UserError("the model put out numbers that are not finite: its training diverged, or guidance is too high for it")
        return self._finish(z)

    def latents(self, starts: list[Start], show: Callable[[int, int, Tensor, Tensor, Tensor], None] | None = None, live: int = 0) -> Tensor:
        """What the flow makes of `starts`, normalised and not clamped [B, C, H, W]. show(step, steps, t, z, velocity): before each step.

        live: gradients that are on go through the velocities from the time on at which the last so many steps begin; through captions never.
        """
        model, noise = self.pipeline, self._noise(starts)
        z, times = noise(), choices.times_of(self.settings)
        begin = max(self.settings["zero_init"], 1 - self.given.strength if self.given else 0.0)
        if begin:
            times = times_from(times, begin)
        if self.given:
            z = self._from_given(self.given, z, begin)
        steps = len(times) - 1
        live_from = float(times[max(0, steps - live)]) - 1e-6
        told = (lambda step, t, z, v: show(step, steps, t, z, v)) if show else None

        with precision.autocast(model.computes, model.device):
            with torch.no_grad():
                velocity = self._velocity(starts)

            def partly_live(z: Tensor, t: Tensor) -> Tensor:
                with torch.set_grad_enabled(torch.is_grad_enabled() and float(t) >= live_from):
                    if torch.is_grad_enabled() and not z.requires_grad:
                        torch.clear_autocast_cache()  # weights that were cast without a gradient must not serve where there is one
                    return velocity(z, t)

            try:
                return choices.solver_of(self.settings, noise)(partly_live if live else velocity, z, times, told)
            except ToleranceError as error:
                raise UserError(f"dopri5: {error}; choose a larger tolerance or another solver") from error

    def _noise(self, starts: list[Start]) -> Callable[..., Tensor]:
        """Draws of noise [B, C, H, W], the first for t = 0: those of the seed, or each between those of two seeds (so that `sde` ends at the second too)."""
        shape, device = self.shape, self.pipeline.device
        own = Noise([s.seed for s in starts], shape, device)
        if all(s.to_seed is None for s in starts):
            return own
        other, mix = Noise([s.seed if s.to_seed is None else s.to_seed for s in starts], shape, device), self._mix(starts)
        return lambda like=None: editing.slerp(own(), other(), mix)

    def _from_given(self, given: Given, noise: Tensor, begin: float) -> Tensor:
        """Where the flow starts for a given picture: on its path at `t = 1 - strength`.

        Zero-init may begin later than that: the state has not moved until then, but the part outside the mask, which is known, has gone along its path.
        """
        z = editing.start_from(given.data, noise, given.strength)
        return z if given.latents is None else torch.where(given.latents > 0.5, z, editing.start_from(given.data, noise, 1 - begin))

    def _velocity(self, starts: list[Start]) -> Velocity:
        """The field to follow for these starts. Their captions are encoded here, once; at each time all of them are evaluated in one batch."""
        wanted = [[s.prompt for s in starts]]
        if any(s.to is not None for s in starts):
            wanted.append([s.prompt if s.to is None else s.to for s in starts])
        mix = self._mix(starts)

        def good(velocities: tuple[Tensor, ...]) -> Tensor:
            return between(velocities[0], velocities[1], mix) if len(wanted) == 2 else velocities[0]

        def styled(branches: Branches) -> Branches:
            """The velocities under what is wanted, changed by what the model says of its styles; those behind them as they are."""

            def changed(z: Tensor, t: Tensor) -> tuple[Tensor, ...]:
                found = branches(z, t)
                return *(change(v, z, t) if change else v for v, change in zip(found, changes)), *found[len(changes) :]

            return changed if any(changes) else branches

        field = self._counted(self.pipeline.field)
        changes = [self._by_styles(field, group) for group in wanted]
        away = [[self.negative or ""] * len(starts)] if choices.is_guided(self.settings) and self.guide is None else []
        captions = _encode(self.pipeline, wanted + away)
        ours = styled(_branches(field, captions[: len(wanted)]))
        if self.guide is not None:
            theirs = _branches(self._counted(self.guide.field), _encode(self.guide, wanted))
            pair: Branches = lambda z, t: (good(ours(z, t)), good(theirs(z, t)))
        else:
            both = styled(_branches(field, captions))
            pair = lambda z, t: (good(velocities := both(z, t)), velocities[-1])
        velocity = choices.guide(self.settings, alone=lambda z, t: good(ours(z, t)), pair=pair)
        if self.given and self.given.latents is not None:
            velocity = editing.keep_outside(velocity, self.given.data, self.given.latents)
        return velocity

    def _by_styles(self, field: TextVelocity, prompts: list[str]) -> Change | None:
        """What analogy and style contrast make of the velocity under the prompts; None where that is nothing."""
        until = {name: self.settings[f"{name}_until"] for name in BY_STYLES if self.settings[name]}
        styles, parts = self.pipeline.config.sample.styles, [parted(prompt) for prompt in prompts]
        in_a_style = torch.tensor([part.style in styles for part in parts], device=self.pipeline.device).view(-1, 1, 1, 1)
        if not until or not in_a_style.any():
            return None
        # One at a time: no more pictures in a batch than guidance has.
        each = [conditional(field, *caption) for caption in _encode(self.pipeline, compared(parts, styles))]

        def changed(good: Tensor, z: Tensor, t: Tensor) -> Tensor:
            acting = [name for name, end in until.items() if time_of(t) < end]
            if not acting:
                return good
            found, style, others = good, each[0](z, t), [velocity(z, t) for velocity in each[2::2]]
            if "analogy" in acting:
                subjects = [velocity(z, t) for velocity in each[1::2]]
                found = analogous(found, style, list(zip(subjects, others)), self.settings["analogy"])
            if "style_contrast" in acting:
                found = contrasted(found, style, others, self.settings["style_contrast"])
            return torch.where(in_a_style, found, good)

        return changed

    def _counted(self, field: TextVelocity) -> TextVelocity:
        def count(z: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            if self.alive:
                self.alive()
            self.evaluated += len(z)
            return field(z, t, text, mask)

        return count

    def _mix(self, starts: list[Start]) -> Tensor:
        return torch.tensor([s.mix for s in starts], device=self.pipeline.device).view(-1, 1, 1, 1)

    def _finish(self, z: Tensor) -> np.ndarray:
        """Pictures of latents, with the given picture's own pixels outside the mask."""
        images = self.pipeline.to_images(z)
        return editing.paste(images, self.given.original, self.given.pixels) if self.given and self.given.pixels is not None else images


def _encode(pipeline: "Pipeline", groups: list[list[str]]) -> list[Captions]:
    """Features and mask of several captions of each picture, all encoded at once and padded alike."""
    text, mask = pipeline.encode([caption for group in groups for caption in group])
    return list(zip(text.chunk(len(groups)), mask.chunk(len(groups))))


def _branches(field: TextVelocity, captions: list[Captions]) -> Branches:
    if len(captions) > 1:
        return together(field, *captions)
    alone = conditional(field, *captions[0])
    return lambda z, t: (alone(z, t),)
