"""One micro-batch to its loss: the module that training differentiates (and DDP wraps)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowt2i import flow, precision
from flowt2i.config import FlowConfig
from flowt2i.model import FlowTransformer
from flowt2i.perceptual import PerceptualLoss


class Terms(NamedTuple):
    losses: Tensor  # [b], of the flow
    output: Tensor  # [b, C, H, W], what the network put out
    edges: Tensor | None = None  # [b], weighed; None: not asked for
    perceptual: Tensor | None = None  # likewise

    def mean(self) -> Tensor:
        """What is differentiated."""
        return sum((term for term in (self.edges, self.perceptual) if term is not None), self.losses).mean()


class Objective(nn.Module):
    """Flow-matching loss of a model, from normalised latents to one number an image."""

    def __init__(self, model: FlowTransformer, config: FlowConfig, computes: precision.Precision):
        super().__init__()
        self.model, self.config, self.computes = model, config, computes
        self.edges = config.edges if model.config.target == "x" else 0.0  # what a velocity's error has of noise is edges everywhere

    def __getstate__(self) -> dict[str, Any]:
        """As the model's: `errors` compiled in place stays with the original."""
        return {name: value for name, value in super().__getstate__().items() if name != "errors"}

    def forward(self, data: Tensor, noise: Tensor, t: Tensor, text: Tensor, mask: Tensor, room: int = 0) -> Terms:
        """data, noise [b, C, H, W]; t [b]; text: token ids [b, T] (built-in encoder) or features [b, T, D]; mask [b, T]; room: see the model."""
        z = flow.interpolate(data, noise, t)
        with precision.autocast(self.computes, data.device):
            features = self.model.encode_captions(text, mask) if text.dtype == torch.int64 else text
            output = self.model(z, t, features, mask, room)
        losses, edges = self.errors(output, data, noise, t)
        return Terms(losses, output, edges)

    def errors(self, output: Tensor, data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The flow's losses [b] of what the network put out [b, C, H, W], and the weighed ones of edges [b] (None: not asked for)."""
        error = flow.velocity_error(output, data, noise, t, self.model.config.target, self.config.floor)
        return flow.loss_per_image(error), self.edges * flow.edges_per_image(error) if self.edges else None


def with_perceptual(terms: Terms, net: PerceptualLoss | None, data: Tensor, noise: Tensor, t: Tensor, prediction: flow.Prediction, config: FlowConfig) -> Terms:
    """The terms with the weighed perceptual loss of the predicted pictures, 0 for times before `perceptual_from`; as they are where there is no net.

    Shapes as in `flow.loss_per_image`. How many pictures count decides the shapes, so a GPU is waited for once.
    """
    if net is None:
        return terms
    losses, rows = torch.zeros_like(t), (t >= config.perceptual_from).nonzero().flatten()
    if len(rows):
        predicted, true = terms.output[rows].float(), data[rows]
        if prediction == "v":
            predicted = flow.to_data(predicted, flow.interpolate(true, noise[rows], t[rows]), t[rows])
        losses = losses.index_add(0, rows, config.perceptual * net(predicted, true))
    return terms._replace(perceptual=losses)


def drop_captions(text: Tensor, mask: Tensor, dropped: Tensor, null: Tensor) -> tuple[Tensor, Tensor]:
    """Put the empty caption in place of the dropped ones.

    text [b, T] ids or [b, T, D] features; null [n] ids or [n, D] features of the encoded empty caption; dropped [b] bool.
    """
    n = null.shape[0]
    if mask.shape[1] < n:  # batches whose longest caption is shorter than the empty one
        pad = n - mask.shape[1]
        text = torch.cat([text, text.new_zeros(text.shape[0], pad, *text.shape[2:])], 1)
        mask = torch.cat([mask, mask.new_zeros(mask.shape[0], pad)], 1)
    empty = torch.zeros_like(text[0])
    empty[:n] = null.to(text.dtype)
    where = dropped.view(-1, *[1] * (text.ndim - 1))
    return torch.where(where, empty, text), torch.where(dropped[:, None], torch.arange(mask.shape[1], device=mask.device) < n, mask)
