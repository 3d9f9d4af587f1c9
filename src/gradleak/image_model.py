"""Images as free pixels: the image model of the attacks that have no generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Initial = Literal["normal", "normalised"]


class Pixels(nn.Module):
    r"""The images themselves as the parameter: :math:`G(\theta) = \theta`  (Zhu et al. 2019). Pixels are not bounded.

    Args:
        batch: B, number of images.
        image_shape: (C, H, W).
        group: Members side by side, each with B images of its own.
        initial: First images: ``normal``, N(0, 1); ``normalised``, N(1/2, 1/4^2), which is N(0, 1) for images that were
            normalised by the mean and deviation of photographs.

    Attributes:
        images: The images, (group B) x C x H x W.
        rows: Which images of each member's batch ``forward()`` gives; all of them at first.

    Shapes:
        ``forward()`` -> (group B) x C x H x W. First values come from torch's global random state.
    """

    rows = slice(None)

    def __init__(
        self,
        *,
        batch: int,
        image_shape: tuple[int, int, int],
        group: int = 1,
        initial: Initial = "normal",
    ) -> None:
        super().__init__()
        self.group = group
        noise = torch.randn(group * batch, *image_shape)
        starts: dict[str, Callable[[], Tensor]] = {"normal": lambda: noise, "normalised": lambda: 0.5 + 0.25 * noise}
        self.images = nn.Parameter(starts[initial]())

    def forward(self) -> Tensor:
        if self.rows == slice(None):
            return self.images
        return torch.cat([member[self.rows] for member in self.images.chunk(self.group)])

    @torch.no_grad()
    def clamp(self) -> None:
        """Project the images onto the box [0, 1]."""
        self.images.clamp_(0, 1)
