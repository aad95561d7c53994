"""Post-training: pictures that the model draws are moved towards the real ones, as a whole, in the features of a frozen image network (`match`).

A flow is trained on single steps from true pictures; what its own drawing makes of many steps it never sees. Here every step draws pictures as
`generate` would, and lowers the Fréchet distance of all that was drawn lately to the training pictures (FD-loss: Yang et al., 2604.28190). Its Gaussians
are those of thousands of pictures, its gradient is that of one batch: for features x it is `x - T(x)`, where T carries the Gaussian of the drawn onto
that of the real ones (`frechet.transport`), so the loss is the squared distance to T(x), held fixed. The last passes of a drawing are differentiated
(`match.live`); those before them decide what the picture is of, and are not, nor is the caption encoder, whose weights do not train meanwhile.
(Of several kinds the covariances are pooled in part: then the moves are those between the pooled Gaussians.)

A distance of distributions does not ask for the right picture: besides (`match.expected`), features are drawn towards those of the caption's own picture, or of
a caption that has none (`match.composed`) towards those that `compose.expected` tells.

The network is EfficientNet-lite1; scores are taken by another (`efficientnet.py`). Still a model that was trained so is no longer judged by a Fréchet distance
in independence: say so beside its score.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from flowt2i import efficientnet, perceptual
from flowt2i.codec import stored_to_latents
from flowt2i.config import Config, MatchConfig
from flowt2i.data.dataset import ImageTextDataset
from flowt2i.description import DatasetDescription
from flowt2i.drawing import Drawing
from flowt2i.editing import Start
from flowt2i.errors import UserError
from flowt2i.evaluation.frechet import Moments, transport
from flowt2i.evaluation.reference import spread
from flowt2i.pipeline import Pipeline
from flowt2i.styles import Parted, parted, styles_of
from flowt2i.training.compose import composed, expected
from flowt2i.training.distributed import World

REFRESH = 8  # steps between two looks at the distances, whose eigenvalues take some seconds of a CPU
AT_ONCE = 32  # pictures a pass where nothing is differentiated
LEAST = 32  # training pictures to compare with


def require(config: Config, description: DatasetDescription, count: int) -> None:
    """UserError where `match` cannot be done with these settings, data and number of training samples."""
    if not config.match.weight:
        return
    if description.codec.kind != "pixels":
        raise UserError("match.weight works on pixels only: drawn latents would have to be decoded at every step")
    if description.buckets:
        raise UserError("match.weight works on pictures of one shape: prepare the data without buckets, or leave it out")
    if config.data.flip:
        raise UserError("match.weight compares with the pictures as they are: leave --data.flip out")
    if config.train.parallel == "fsdp":
        raise UserError("match.weight needs whole weights on every rank: choose --train.parallel ddp")
    if config.sample.solver == "dopri5":
        raise UserError("match.weight draws in a fixed number of steps: choose another --sample.solver than dopri5")
    if count < LEAST:
        raise UserError(f"match.weight compares with the training pictures, and {count} are too few: at least {LEAST}")


class FeatureSets(nn.Module):
    """What is compared: the features before the classifier; and mean and deviation over places of those at every scale, which see textures and colours."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], size: int):
        """Of pictures that `x * std + mean` makes pixels in -1..1, enlarged to `size`. UserError where EfficientNet-lite1 is not installed."""
        super().__init__()
        net = efficientnet.load(1, "match.weight")
        self.body = perceptual.PerceptualLoss(net, torch.tensor(mean), torch.tensor(std), size)
        self.head = fuse_conv_bn_eval(net._conv_head, net._bn1).requires_grad_(False)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """[b, 3, H, W] -> sets of features [b, d], in fp32."""
        with torch.autocast(pictures.device.type, enabled=False):
            scales = list(self.body.features(pictures.float()))
            return {
                "last": nn.functional.relu6(self.head(scales[-1])).mean((2, 3)),
                "scales": torch.cat([statistic for scale in scales for statistic in (scale.mean((2, 3)), _deviation(scale.var((2, 3), correction=0)))], 1),
            }


def _deviation(variance: Tensor) -> Tensor:
    """Its root, with a slope that stays finite where there is none."""
    return (variance + 1e-3).sqrt()


class Recent:
    """The Gaussians of what was drawn lately, one a kind of caption, and the way from each to the real one; of one set of features. On the CPU in float64."""

    def __init__(self, real: Tensor, kinds: Tensor, population: int):
        """real: features [n, d] of training pictures, of kinds [n], numbered from 0, of which so many drawn pictures are remembered in all."""
        number, dim = int(kinds.max()) + 1, real.shape[1]
        self.real = _shrunk([Moments.of(real[kinds == kind]) for kind in range(number)])
        if not all(torch.isfinite(moments.covariance).all() and moments.covariance.trace() > 0 for moments in self.real):
            raise UserError("match.weight: the training pictures are all alike, or not finite: there is no distribution to compare with")
        self.scale = sum(moments.covariance.trace().item() for moments in self.real) / number  # sets of features count alike, in units of their own spread
        self.most = population / number
        self.count = torch.zeros(number, dtype=torch.float64)  # drawn pictures remembered of each kind
        self.mean, self.square = torch.zeros(number, dim, dtype=torch.float64), torch.zeros(number, dim, dim, dtype=torch.float64)  # about the real means
        self.map, self.distance = torch.zeros(number, dim, dim), torch.zeros(number, dtype=torch.float64)

    def add(self, features: Tensor, kinds: Tensor) -> None:
        """Count features [n, d] of kinds [n]; what has been counted before fades."""
        for kind in kinds.unique().tolist():
            x = features[kinds == kind].cpu().double() - self.real[kind].mean
            share = len(x) / (self.count[kind].item() + len(x))
            self.mean[kind].lerp_(x.mean(0), share)
            self.square[kind].lerp_(x.T @ x / len(x), share)
            self.count[kind] = min(self.count[kind].item() + len(x), self.most)

    def refresh(self) -> None:
        """Look at the distances, and find the ways, anew."""
        drawn = [Moments(real.mean + mean, square - mean.outer(mean)) for real, mean, square in zip(self.real, self.mean, self.square)]
        for kind, (ours, real) in enumerate(zip(_shrunk(drawn), self.real)):
            map_, self.distance[kind] = transport(ours, real)
            self.map[kind] = map_.float()

    def loss(self, x: Tensor, kinds: Tensor, wanted: Tensor, weight: float) -> Tensor:
        """Squared distance of features [b, d] of kinds [b] to where the maps carry them, and, weighed, to those wanted of each; the mean."""
        onto = torch.stack([real.mean for real in self.real])
        mean, target = (onto + self.mean).float().to(x.device), onto.float().to(x.device)[kinds]
        for kind in kinds.unique().tolist():
            rows = kinds == kind
            target[rows] += (x.detach()[rows] - mean[kind]) @ self.map[kind].to(x.device)
        return ((x - target).square().sum(1) + weight * (x - wanted.to(x)).square().sum(1)).mean() / self.scale


def _shrunk(kinds: list[Moments]) -> list[Moments]:
    """Each covariance half its own, half the mean of all: a kind has fewer pictures than there are features."""
    pooled = torch.stack([moments.covariance for moments in kinds]).mean(0)
    return [Moments(moments.mean, (moments.covariance + pooled) / 2) for moments in kinds]


class Matching:
    """The post-training of a run: its captions, what real pictures look like, what was drawn lately."""

    def __init__(self, config: Config, pipeline: Pipeline, dataset: ImageTextDataset, count: int, heldout: Sequence[str], world: World, progress: bool):
        """pipeline: of the weights that are trained. heldout: captions that are not to be composed: no drawing of them may be trained.

        UserError where the pictures cannot be spread over the ranks, and where there is nothing to compose, or nothing to compare.
        """
        self.match: MatchConfig = config.match
        self.pipeline, self.world, self.seed, self.progress = pipeline, world, config.train.seed, progress
        if self.match.images % world.size:
            raise UserError(f"match.images {self.match.images} cannot be spread evenly over {world.size} ranks: choose a multiple")
        description = pipeline.description
        self.net = FeatureSets(description.latent_mean, description.latent_std, config.flow.perceptual_size).to(world.device)
        self.drawing = Drawing(pipeline, description.codec.latent_shape(description.home), pipeline.settings())
        captions = dataset.captions()
        rows = np.array([row for row in spread(count).tolist() if captions[row].strip()], np.int64)
        if len(rows) < LEAST:
            raise UserError(f"match.weight draws captions, and {len(rows)} of the training captions say something: at least {LEAST}")
        real = self._real_features(dataset, rows)
        have = [parted(captions[row]) for row in rows]
        known = {parted(caption) for caption in [*captions[:count], *heldout]}
        new: list[Parted] = [pair for pair in composed(have) if pair not in known] if self.match.composed else []
        if self.match.composed and not new:
            raise UserError('match.composed needs captions "SUBJECT, STYLE" with a few styles, and a subject that lacks one of them: leave it out')
        self.captions, self.own = [captions[row] for row in rows] + [str(pair) for pair in new], len(rows)
        self.wanted = {name: torch.cat([features, expected(new, have, features)]) for name, features in real.items()}
        styles = styles_of(have) if self.match.by_style else []
        if all(pair.style in styles for pair in have):
            self.kinds = torch.tensor([styles.index(pair.style) for pair in [*have, *new]])
        else:
            self.kinds = torch.zeros(len(self.captions), dtype=torch.int64)
        self.recent = {name: Recent(features, self.kinds[: self.own], self.match.population) for name, features in real.items()}

    # ---- what training asks -------------------------------------------------------------------------------------------

    def fill(self, stopping: Callable[[], bool]) -> bool:
        """Draw as many pictures as are remembered, for a run that begins. False where that was broken off, since stopping() said so."""
        batches = -(-self.match.population // self.match.images)
        with torch.no_grad(), tqdm(total=batches, desc="drawing what there is to match", unit="batch", leave=False, disable=not self.progress) as bar:
            for number in range(batches):
                if stopping():
                    return False
                self._remember(*self._batch(-1 - number, AT_ONCE)[:2])
                bar.update()
        self._refresh()
        return True

    def gradient(self, step: int, learn: bool = True) -> dict[str, float]:
        """Add the gradient of this rank's share of a step's pictures to the weights'; loss, and distances as they were last looked at.

        learn False: a rehearsal, after which nothing is remembered.
        """
        if learn and step and step % REFRESH == 0:
            self._refresh()
        features, picked, loss = self._batch(step, self.match.micro_batch)
        if learn:
            self._remember(features, picked)
        return {"match_loss": loss} | {f"match_distance_{name}": recent.distance.mean().item() for name, recent in self.recent.items()}

    def _remember(self, features: dict[str, Tensor], picked: Tensor) -> None:
        for name, recent in self.recent.items():
            recent.add(features[name], self.kinds[picked])

    def _refresh(self) -> None:
        for recent in self.recent.values():
            recent.refresh()

    def state(self) -> dict[str, Tensor]:
        """All that a resume needs, by name."""
        return {f"{name}/{what}": getattr(recent, what) for name, recent in self.recent.items() for what in ("count", "mean", "square", "map", "distance")}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` gave; KeyError or ValueError where it does not fit."""
        for name, ours in self.state().items():
            if tensors[name].shape != ours.shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(ours.shape)}")
            ours.copy_(tensors[name])

    # ---- pictures and features ----------------------------------------------------------------------------------------

    def _batch(self, step: int, at_once: int) -> tuple[dict[str, Tensor], Tensor, float]:
        """Features [match.images, d] of a step's pictures, of all ranks; the numbers of their captions; the loss on this rank, whose gradient is
        added to the weights' where gradients are on.
        """
        picked, seeds = self._pick(step)
        share = len(picked) // self.world.size
        mine = slice(self.world.rank * share, (self.world.rank + 1) * share)
        found: list[dict[str, Tensor]] = []
        total = 0.0
        for rows, own in zip(torch.split(picked[mine], at_once), torch.split(seeds[mine], at_once)):
            # Eager, as in `evaluate`; and the backward pass too, which may compute blocks again (`checkpoint_activations`).
            with torch.compiler.set_stance("force_eager"):
                starts = [Start(self.captions[row], seed) for row, seed in zip(rows.tolist(), own.tolist())]
                features = self.net(self.drawing.latents(starts, live=self.match.live))
                if torch.is_grad_enabled():
                    losses = [r.loss(features[name], self.kinds[rows], self.wanted[name][rows], self.match.expected) for name, r in self.recent.items()]
                    loss = torch.stack(losses).sum() * (len(rows) / share)
                    (self.match.weight * loss).backward()
                    total += loss.item()
            found.append({name: x.detach() for name, x in features.items()})
        features = {name: torch.from_numpy(self.world.collect(torch.cat([part[name] for part in found]).cpu().numpy(), len(picked))) for name in found[0]}
        if not all(torch.isfinite(x).all() for x in features.values()):
            raise self.world.fail(
                f"the model drew numbers that are not finite before step {max(0, step)}: begin from another model, or with a lower --optim.lr"
            )
        return features, picked, total

    def _pick(self, step: int) -> tuple[Tensor, Tensor]:
        """Which captions a step draws, and the seeds of their noise: [match.images] both, the same on any number of ranks. step below 0: before the first."""
        words = [self.seed, 4, step] if step >= 0 else [self.seed, 5, -step]
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
        n = self.match.images
        shown, new = random.integers(self.own, size=n), random.integers(self.own, max(self.own + 1, len(self.captions)), size=n)
        picked = np.where(random.random(n) < self.match.composed, new, shown)
        return torch.from_numpy(picked), torch.from_numpy(random.integers(2**62, size=n))

    def _real_features(self, dataset: ImageTextDataset, rows: np.ndarray) -> dict[str, Tensor]:
        """Features [len(rows), d] of training pictures, on the CPU; the work is divided over the ranks."""
        world, mean, std = self.world, self.pipeline.mean, self.pipeline.std
        mine, found = rows[world.share(len(rows))], []
        with torch.no_grad(), tqdm(total=len(mine), desc="features of training pictures", unit="picture", leave=False, disable=not self.progress) as bar:
            for part in np.split(mine, range(AT_ONCE, len(mine), AT_ONCE)):
                stored = dataset.fetch(part).stored.to(world.device)
                found.append({name: x.cpu() for name, x in self.net((stored_to_latents("pixels", stored) - mean) / std).items()})
                bar.update(len(part))
        return {name: torch.from_numpy(world.collect(torch.cat([part[name] for part in found]).numpy(), len(rows))) for name in found[0]}
