"""A site's model and images, for ``test_nvflare.py``."""

from __future__ import annotations

import torch
from torch import nn

RATE = 0.5


class Net(nn.Sequential):
    """Two convolutions and a linear layer, with a batch norm whose statistics travel too."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.Sigmoid(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(8 * 8 * 8, 10),
        )


def batch(site: str, round: int) -> object:
    """Two photographs, others for each site."""
    import gradleak as gl  # NVFlare imports this module on the server too

    return gl.load_data(gl.DataSpec(source="sample", batch=2, start=2 * (int(site[-1]) - 1), size=16))


def missing(site: str, round: int) -> object:
    raise FileNotFoundError("the images are gone")


def seeded() -> Net:
    torch.manual_seed(0)
    return Net()
