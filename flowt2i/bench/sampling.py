"""How fast pictures are drawn: one, and a batch of them, with the preset's own sampler and with 50 Euler steps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowt2i.bench.timing import Budget
from flowt2i.config import Config
from flowt2i.description import DatasetDescription
from flowt2i.model import FlowTransformer
from flowt2i.pipeline import Pipeline

# What most trainers draw with: guided at all times, at the preset's scale.
PLAIN: dict[str, Any] = {"steps": 50, "solver": "euler", "schedule": "uniform", "shift": 1.0, "guidance_from": 0.0, "guidance_until": 1.0}


class StandInPipeline(Pipeline):
    """A pipeline whose captions are random features or ids, and which leaves latents undecoded."""

    def __init__(self, model: FlowTransformer, config: Config, description: DatasetDescription):
        super().__init__(model, config, description, tokenizer=None)  # type: ignore[arg-type]

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        text = self.description.text
        mask = torch.ones(len(captions), self.description.longest_caption, dtype=torch.bool, device=self.device)
        if text.dim:
            return torch.randn(*mask.shape, text.dim, device=self.device), mask
        return self.model.encode_captions(torch.full(mask.shape, 2, device=self.device), mask), mask

    def to_images(self, z: Tensor) -> Any:
        return z[:, :3].clamp(-1, 1).permute(0, 2, 3, 1).float().cpu().numpy()


def sampling_rates(model: FlowTransformer, config: Config, description: DatasetDescription, images: int, seconds: float) -> dict[str, Any]:
    """Seconds for one picture and images a second in a batch of `images`, with the preset's sampler and with `PLAIN`, and how many times fewer seconds.

    Where all steps would take too long, fewer are timed, and the rate is that of the steps alone. A latent's decoding and the frozen text encoder are
    left out.
    """
    pipeline = StandInPipeline(model.eval(), config, description)
    own = pipeline.settings()
    budget = Budget(seconds)
    out: dict[str, Any] = {name: own[name] for name in ("steps", "solver", "guidance", "shift")} | {"batch": images}
    one = draw_seconds(pipeline, 1, {}, own["steps"], budget.share(0.1))
    many = draw_seconds(pipeline, images, {}, own["steps"], budget.share(0.4))
    plain_one = draw_seconds(pipeline, 1, PLAIN, PLAIN["steps"], budget.share(0.1))
    plain_many = draw_seconds(pipeline, images, PLAIN, PLAIN["steps"], budget.share(0.4))
    model.train()
    out |= {"one_picture_s": round(one, 4), "images_per_s": round(images / many, 3)}
    out |= {"euler50_one_picture_s": round(plain_one, 4), "euler50_images_per_s": round(images / plain_many, 3)}
    return out | {"times_fewer_seconds": round(plain_many / many, 2), "times_fewer_seconds_one": round(plain_one / one, 2)}


def draw_seconds(pipeline: Pipeline, images: int, settings: dict[str, Any], steps: int, seconds: float) -> float:
    """Seconds of drawing a batch: the faster of two draws of all steps where these fit into `seconds`, else of as many steps as do."""
    draw = lambda number: pipeline.sample(["stand-in"], num=images, batch_size=images, **settings | {"steps": number}).seconds
    draw(1)
    each = draw(1)
    timed = max(1, min(steps, int(seconds / 2 / each)))
    return min(draw(timed), draw(timed)) * steps / timed
