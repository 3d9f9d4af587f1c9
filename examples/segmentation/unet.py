"""A small U-Net that tells coins from their background: 1 x 64 x 64 grey images to 1 x 64 x 64 logits."""

import torch
from torch import Tensor, nn


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(4, outputs),
        nn.GELU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.GroupNorm(4, outputs),
        nn.GELU(),
    )


class UNet(nn.Module):
    """Two scales: what the lower one finds is upsampled and joined with the upper one's features."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.upper, self.lower = block(1, width), block(width, 2 * width)
        self.joined, self.last = block(3 * width, width), nn.Conv2d(width, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.upper(images)
        coarse = nn.functional.interpolate(self.lower(nn.functional.avg_pool2d(fine, 2)), scale_factor=2)
        return self.last(self.joined(torch.cat([fine, coarse], dim=1)))


def build() -> nn.Module:
    """What ``model.name = "unet.py:build"`` calls."""
    return UNet()
