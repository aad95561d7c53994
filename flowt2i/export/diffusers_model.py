"""The transformer as diffusers knows one. `flowt2i export --format diffusers` puts this file, with flowt2i/model.py, beside its weights.

diffusers runs from sigma = 1 (noise) to 0 (data), ours from t = 0 to 1: `t = 1 - sigma`, `timestep = 1000 sigma`. On the same path
`z = sigma noise + (1 - sigma) data` its velocity is `dz/dsigma = noise - data`, ours with the sign turned.
"""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from flowt2i.config import ModelConfig
from flowt2i.model import FlowTransformer


class FlowT2ITransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' own way of mixing them
    """Our transformer, told in diffusers' time.

    model: the fields of its configuration; shape: (C, H, W) of the latents; text_dim: width of a frozen encoder's features, 0 for the
    built-in one with `vocab_size` tokens; latent_mean, latent_std: per channel, of the raw latents (of pixels in [-1, 1]).
    """

    @register_to_config
    def __init__(self, model: dict[str, Any], shape: list[int], text_dim: int, vocab_size: int, latent_mean: list[float], latent_std: list[float]):
        super().__init__()
        channels, height, width = shape
        self.net = FlowTransformer(ModelConfig(**model), (channels, height, width), text_dim, vocab_size, latent_mean, latent_std)

    def encode_captions(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Built-in text encoder only: token ids [B, T], mask [B, T] -> features [B, T, D]."""
        with self._half():
            return self.net.encode_captions(ids, mask)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """hidden_states z [B, C, H, W], timestep [B] in (0, 1000], features [B, T, D], mask [B, T] -> `noise - data` [B, C, H, W], fp32.

        Of a network that puts out the data x: `noise - x = (z - x) / sigma`.
        """
        sigma = timestep.float() / 1000
        with self._half():
            output = self.net(hidden_states, 1 - sigma, encoder_hidden_states, encoder_attention_mask.bool()).float()
        velocity = -output if self.config["model"]["prediction"] == "v" else (hidden_states - output) / sigma.view(-1, 1, 1, 1)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def _half(self) -> torch.autocast:
        """With half-precision weights, time and norms stay in fp32 and products are half: what training under autocast did."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)
