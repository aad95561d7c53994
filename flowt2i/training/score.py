"""While training on real data: the kernel distance of a few pictures, cheap enough not to keep the training waiting."""

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch

from flowt2i.errors import UserError
from flowt2i.evaluation import nets, pictures, reference
from flowt2i.evaluation.kid import kernel_distance
from flowt2i.pipeline import Pipeline
from flowt2i.training.pace import score_steps

if TYPE_CHECKING:
    from flowt2i.training.loop import Trainer

MOST_REAL = 256  # real pictures it compares with: looked at once a run
TOGETHER = 16  # pictures drawn and looked at together whatever the number of ranks, so that the score does not depend on it; 64 keep four ranks busy


class KernelScore:
    """Kernel distance on EfficientNet-lite0 between `train.score_images` pictures of held-out captions (the averaged weights) and held-out images.

    Watch its course: so few pictures tell models apart only where they differ much. `flowt2i evaluate --metrics kid --num 2048` is for figures.
    Of data of several shapes it looks at one, the model's own (`description.home`).
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
            self.net = self._load_net(trainer)
            self.real = self._features_of_real(self.net, trainer, pipeline)
        captions, home = trainer.heldout.captions(), _of_home(trainer)
        rows = [row for row in reference.captioned(captions) if home[row]]
        asked = [captions[rows[k % len(rows)]] for k in range(count)] if len(rows) else []
        if len(asked) < 3 or len(self.real) < 3:
            return {}
        estimate = kernel_distance(self._features_of_drawn(self.net, trainer, pipeline, asked), self.real)
        return {"kid": estimate.value, "kid_error": estimate.error}

    def _load_net(self, trainer: "Trainer") -> nets.FeatureNet:
        """UserError on all ranks where one has no net: the others must not go on alone, and an evaluation that fails does not end the training."""
        net: nets.FeatureNet | None = None
        failure: UserError | None = None
        try:
            net = nets.load_net(nets.EFFICIENTNET, trainer.world.device)
        except UserError as error:
            failure = error
        pictures.raise_everywhere(trainer.world, failure)
        assert net is not None
        return net

    def _features_of_real(self, net: nets.FeatureNet, trainer: "Trainer", pipeline: Pipeline) -> torch.Tensor:
        """Of up to MOST_REAL held-out images, as the codec shows them: [N, dim], over all ranks, the same on each."""
        rows = reference.spread(len(trainer.heldout))
        rows = rows[_of_home(trainer)[rows]][:MOST_REAL]

        def work(part: range) -> np.ndarray:
            return net(pipeline.to_images(trainer.latents(trainer.heldout.fetch(rows[part.start : part.stop]), None))).numpy()

        found = pictures.over_ranks(trainer.world, len(rows), work, (net.dim,), np.float32, False, "", TOGETHER)
        return torch.from_numpy(found)

    def _features_of_drawn(self, net: nets.FeatureNet, trainer: "Trainer", pipeline: Pipeline, asked: list[str]) -> torch.Tensor:
        """Of a picture of each caption, number k with the seed STRIDE + k as `flowt2i evaluate` has it: [N, dim], over all ranks, the same on each."""
        steps = score_steps(trainer.config.sample)

        def work(part: range) -> np.ndarray:
            drawn = pipeline.sample(asked[part.start : part.stop], seed=pictures.STRIDE + part.start, steps=steps, batch_size=min(TOGETHER, trainer.at_once))
            return net(drawn.images).numpy()

        found = pictures.over_ranks(trainer.world, len(asked), work, (net.dim,), np.float32, False, "", TOGETHER)
        return torch.from_numpy(found)


def _of_home(trainer: "Trainer") -> np.ndarray:
    """Which held-out pictures have the shape that the model draws of its own. bool [N]."""
    description = trainer.description
    return trainer.heldout.bucket_of() == description.sizes.index(description.home)
