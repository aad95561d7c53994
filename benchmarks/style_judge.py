"""A small convolutional network that tells styles apart, trained on real pictures: whom a drawn picture's style must convince."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from flowt2i import precision

STEPS, BATCH, WIDTH, RATE = 600, 64, 16, 3e-3
SHIFT = 4  # pixels by which training pictures are moved at most


def network(classes: int) -> nn.Sequential:
    """Pixels [b, 3, S, S] in -1..1 -> scores [b, classes]: eight convolutions at four scales, then the mean over places."""
    layers: list[nn.Module] = []
    channels = 3
    for scale in range(4):
        width = WIDTH * 2**scale
        for stride in (2 if scale else 1, 1):
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def pixels(images: np.ndarray) -> Tensor:
    """uint8 [n, S, S, 3] -> [n, 3, S, S] in -1..1."""
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


def trained(images: np.ndarray, labels: Tensor, classes: int, progress: bool = False, seed: int = 0) -> nn.Sequential:
    """The network, trained on images uint8 [n, S, S, 3] and labels [n]: the same for the same pictures and seed on one machine. Two minutes of a core."""
    device = torch.device("cpu")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = network(classes).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
        for _ in tqdm(range(STEPS), desc="training the judge of styles", unit="step", disable=not progress, leave=False):
            rows = torch.randint(len(images), (BATCH,))
            down, right = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
            batch = pixels(images[rows.numpy()]).roll((down, right), (2, 3))
            batch = batch.flip(-1) if torch.rand(()) < 0.5 else batch
            with precision.autocast(precision.resolved("auto", device), device):
                scores = net(batch)
            loss = F.cross_entropy(scores.float(), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.inference_mode()
def seen(net: nn.Module, images: np.ndarray) -> Tensor:
    """The style [n] that it sees in each of images uint8 [n, S, S, 3]."""
    return torch.cat([net(pixels(images[start : start + BATCH])).argmax(1) for start in range(0, len(images), BATCH)])
