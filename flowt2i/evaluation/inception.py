"""Inception-v3 as FID uses it: the network of 2015-12-05 that TensorFlow published, with its quirks, in the names of the converted weights.

Written out here because the packages that hold it need torchvision, or unpickle the weights. The quirks (Heusel et al. 1706.08500 used this very
graph): average pooling that leaves padding out of the mean, and in the last block a maximum where the paper has an average. Weights:
`weights-inception-2015-12-05-6726825d.pth` (torch-fidelity) or `pt_inception-2015-12-05-6726825d.pth` (pytorch-fid), Apache-2.0; the same tensors.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE, DIM = 299, 2048


class Conv(nn.Module):
    """Convolution, batch norm, ReLU; `padded` keeps the sides, which only stride 1 does."""

    def __init__(self, inside: int, outside: int, kernel: int | tuple[int, int], stride: int = 1, padded: bool = True):
        super().__init__()
        high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (high // 2, wide // 2) if padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(inside, outside, (high, wide), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outside, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def mean_pool(x: Tensor) -> Tensor:
    """3x3 average that leaves padding out."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class Mixed5(nn.Module):
    """35x35 block."""

    def __init__(self, inside: int, pooled: int):
        super().__init__()
        self.branch1x1 = Conv(inside, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(inside, 48, 1), Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3 = Conv(inside, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3)
        self.branch_pool = Conv(inside, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(mean_pool(x))], 1)


class Mixed6a(nn.Module):
    """35x35 to 17x17."""

    def __init__(self, inside: int):
        super().__init__()
        self.branch3x3 = Conv(inside, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3 = Conv(inside, 64, 1), Conv(64, 96, 3), Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class Mixed6(nn.Module):
    """17x17 block with 7x7 convolutions taken apart."""

    def __init__(self, width: int):
        super().__init__()
        across, down = (1, 7), (7, 1)
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1, self.branch7x7_2, self.branch7x7_3 = Conv(768, width, 1), Conv(width, width, across), Conv(width, 192, down)
        self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3 = Conv(768, width, 1), Conv(width, width, down), Conv(width, width, across)
        self.branch7x7dbl_4, self.branch7x7dbl_5 = Conv(width, width, down), Conv(width, 192, across)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(mean_pool(x))], 1)


class Mixed7a(nn.Module):
    """17x17 to 8x8."""

    def __init__(self, inside: int):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(inside, 192, 1), Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(inside, 192, 1), Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1)), Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class Mixed7(nn.Module):
    """8x8 block; the last one pools by maximum."""

    def __init__(self, inside: int, last: bool):
        super().__init__()
        self.pool = max_pool if last else mean_pool
        across, down = (1, 3), (3, 1)
        self.branch1x1 = Conv(inside, 320, 1)
        self.branch3x3_1, self.branch3x3_2a, self.branch3x3_2b = Conv(inside, 384, 1), Conv(384, 384, across), Conv(384, 384, down)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inside, 448, 1), Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, across), Conv(384, 384, down)
        self.branch_pool = Conv(inside, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        wide = [self.branch3x3_2a(single), self.branch3x3_2b(single), self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *wide, self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """Pictures float [N, 3, 299, 299] in 0..255 to the 2048 numbers before the classifier, which is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = Mixed5(192, 32), Mixed5(256, 64), Mixed5(288, 64)
        self.Mixed_6a = Mixed6a(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = Mixed6(128), Mixed6(160), Mixed6(160), Mixed6(192)
        self.Mixed_7a = Mixed7a(768)
        self.Mixed_7b, self.Mixed_7c = Mixed7(1280, last=False), Mixed7(2048, last=True)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [N, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))  # [N, 192, 71, 71]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))  # [N, 288, 35, 35]
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # [N, 768, 17, 17]
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [N, 2048, 8, 8]
        return x.mean((2, 3))
