"""While training on real data: the kernel distance of a few pictures, cheap enough not to keep the training waiting."""

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch

from flowt2i.errors import UserError
from flowt2i.evaluation import nets, pictures, reference
from flowt2i.evaluation.kid import kernel_distance
from flowt2i.pipeline import Pipeline

if TYPE_CHECKING:
    from flowt2i.training.loop import Trainer

MOST_REAL = 256  # real pictures it compares with: looked at once a run
STEPS = 20  # of the solver at most


class KernelScore:
    """Kernel distance on EfficientNet-lite0 between `train.score_images` pictures of held-out captions (the averaged weights) and held-out images.

    Watch its course: so few pictures tell models apart only where they differ much. `flowt2i evaluate --metrics kid --num 2048` is for figures.
    """

    def __init__(self) -> None:
        self.net: nets.FeatureNet | None = None
        self.real: torch.Tensor | None = None
        self.told = False

    def __call__(self, trainer: "Trainer", pipeline: Pipeline) -> dict[str, float]:
        """{"kid", "kid_error"}; nothing, said once, where EfficientNet-lite0 is not installed."""
        count, world = trainer.config.train.score_images, trainer.world
        if world.any(not nets.has_efficientnet()):
            if world.main and not self.told:
                warnings.warn(f"no kernel distance at evaluations: {nets.EFFICIENTNET_INSTALL} (--train.score_images 0 ends this note)", stacklevel=2)
            self.told = True
            return {}
        if self.net is None or self.real is None:
            failure: UserError | None = None
            try:
                self.net = nets.load_net(nets.EFFICIENTNET, world.device)
            except UserError as error:  # the others must not go on alone: an evaluation that fails does not end the training
                failure = error
            pictures.raise_everywhere(world, failure)
            assert self.net is not None
            rows = reference.spread(len(trainer.heldout))[:MOST_REAL]
            real = np.concatenate([pipeline.to_images(trainer.latents(trainer.heldout.fetch(part), None)) for part in np.split(rows, range(64, len(rows), 64))])
            self.real = pictures.features(self.net, real, world, progress=False)
        captions = trainer.heldout.captions()
        rows = reference.captioned(captions)
        asked = [captions[rows[k % len(rows)]] for k in range(count)] if len(rows) else []
        if len(asked) < 3 or len(self.real) < 3:
            return {}
        drawing = pictures.Drawing(pipeline, asked, 0, {"steps": min(STEPS, trainer.config.sample.steps)})
        drawn = pictures.features(self.net, drawing.images(world, progress=False), world, progress=False)
        estimate = kernel_distance(drawn, self.real)
        return {"kid": estimate.value, "kid_error": estimate.error}
