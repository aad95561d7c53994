"""A perceptual loss: how far a predicted picture is from the true one in the features of a frozen image network.

The mean squared error of a pixel weighs a shifted edge like a wrong colour. Features of a network that was trained to recognise things weigh what people
see, and a network that predicts clean pixels learns outlines from them sooner (Zhang et al., LPIPS, 1801.03924, eq. 1, here without learned weights;
Ma et al., PixelGen, 2602.02493, for flow matching on pixels, with the loss left out near the noise, where the clean picture is not yet decided).

The network is EfficientNet-lite1 (`efficientnet.py`).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from flowt2i import efficientnet
from flowt2i.config import FlowConfig
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError


def of_run(config: FlowConfig, description: DatasetDescription, device: torch.device) -> "PerceptualLoss | None":
    """What a run of these settings and data asks for; None: nothing. UserError where the data are not pixels."""
    if not config.perceptual:
        return None
    if description.codec.kind != "pixels":
        raise UserError("flow.perceptual works on pixels only: the latents of a VAE would have to be decoded at every step")
    return load(description.latent_mean, description.latent_std, config.perceptual_size).to(device)


def load(mean: Sequence[float], std: Sequence[float], size: int) -> "PerceptualLoss":
    """With EfficientNet-lite1, of pictures normalised by mean and std [3] of pixels in -1..1, enlarged to size. UserError where it is not installed."""
    net = efficientnet.load(1, "flow.perceptual")
    return PerceptualLoss(net, torch.tensor(mean), torch.tensor(std), size)


class PerceptualLoss(nn.Module):
    """Distance of pictures [b, 3, H, W] in the features at strides 2 to 32 of the network, each position's features scaled to length 1."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: Any, mean: Tensor, std: Tensor, size: int):
        """net: an EfficientNet; `pictures * std + mean` are pixels in -1..1; pictures are enlarged to `size` pixels in their shorter side, where it is less."""
        super().__init__()
        self.size = size
        net = net.eval()
        self.stem = fuse_conv_bn_eval(net._conv_stem, net._bn0)
        self.blocks = nn.ModuleList(_Block(block) for block in net._blocks)
        # pixels in 0..255 are 127.5 (x std + mean + 1)
        self.register_buffer("mean", ((127.5 * (mean + 1) - efficientnet.MEAN) / efficientnet.STD).view(1, 3, 1, 1))
        self.register_buffer("std", (127.5 * std / efficientnet.STD).view(1, 3, 1, 1))
        self.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, pictures: Tensor) -> Iterator[Tensor]:
        """[b, 3, h, w], enlarged to H, W -> [b, C, H / 2, W / 2], [b, C', H / 4, W / 4] and so on: the last of each size."""
        if (shorter := min(pictures.shape[2:])) < self.size:
            size = [round(side * self.size / shorter) for side in pictures.shape[2:]]
            pictures = nn.functional.interpolate(pictures, size, mode="bilinear")
        x = nn.functional.relu6(self.stem((pictures * self.std + self.mean).contiguous(memory_format=torch.channels_last)))
        for block in self.blocks:
            y = block(x)
            if y.shape[2:] != x.shape[2:]:
                yield x
            x = y
        yield x

    def forward(self, predicted: Tensor, true: Tensor) -> Tensor:
        """[b]: per scale the squared distance of unit features, over the positions' mean; the sum of scales."""
        with torch.autocast(predicted.device.type, enabled=False):
            with torch.no_grad():
                wanted = list(self.features(true.float()))
            unit = lambda x: nn.functional.normalize(x, dim=1, eps=1e-6)
            pairs = zip(self.features(predicted.float()), wanted)
            return torch.stack([(unit(x) - unit(y)).square().sum(1).mean((1, 2)) for x, y in pairs]).sum(0)


class _Block(nn.Module):
    """An inverted bottleneck with its normalisations folded into the convolutions."""

    def __init__(self, block: Any):
        super().__init__()
        expands = hasattr(block, "_expand_conv")
        self.expand = fuse_conv_bn_eval(block._expand_conv, block._bn0) if expands else nn.Identity()
        self.activate = nn.ReLU6() if expands else nn.Identity()
        self.depthwise, self.project = fuse_conv_bn_eval(block._depthwise_conv, block._bn1), fuse_conv_bn_eval(block._project_conv, block._bn2)
        args = block._block_args
        stride = args.stride if isinstance(args.stride, int) else args.stride[0]
        self.skip = block.id_skip and stride == 1 and args.input_filters == args.output_filters

    def forward(self, x: Tensor) -> Tensor:
        y = self.activate(self.expand(x))
        y = self.project(nn.functional.relu6(self.depthwise(y)))
        return x + y if self.skip else y
