"""A site's model and images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from gradleak import Truth

RATE = 0.5


class Net(nn.Sequential):
    """Two convolutions and a linear layer, with sigmoids, for 3 x 16 x 16 images and 10 classes."""

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


def batch(site: str, round: int) -> Truth:
    """Two of the embedded photographs, others for each site."""
    import gradleak as gl  # here: NVFlare imports this module on the server too, for the model

    return gl.load_data(gl.DataSpec(source="sample", batch=2, start=2 * (int(site[-1]) - 1), size=16))
