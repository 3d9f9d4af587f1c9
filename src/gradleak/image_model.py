"""Images as free pixels: of the attacks that have no generator, and as a correction of what a generator made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Initial = Literal["normal", "normalised"]

#: Photographs vary so much more in brightness than in colour, as deviations.
BRIGHTNESS = 3.0


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


class Corrected(nn.Module):
    r"""A generator's images, and once they are settled a correction of their pixels: :math:`x = G(\theta) + S u`.

    S gives the correction u the spectrum of photographs, 1/f in both directions and three times as much brightness as colour,
    so that a step of equal size in every element of u is a likely change of a photograph.

    Args:
        generator: Its ``forward()`` gives the images, B x C x H x W.
        shape: (B, C, H, W).

    Attributes:
        u: The correction, of that shape; zero at first.
        settled: Whether the images stand, and u is what is fitted.
        rows: Which images of the batch ``forward()`` gives; all of them at first.

    Shapes:
        ``forward()`` -> B x C x H x W.
    """

    images: Tensor
    settled: Tensor
    rows = slice(None)

    def __init__(self, generator: nn.Module, shape: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.generator = generator
        self.u = nn.Parameter(torch.zeros(shape))
        self.register_buffer("images", torch.zeros(shape))
        self.register_buffer("settled", torch.tensor(False))

    @torch.no_grad()
    def settle(self, images: Tensor) -> None:
        """From now on correct these images: u is zero."""
        self.images.copy_(images)
        self.u.zero_()
        self.settled.fill_(True)

    def forward(self) -> Tensor:
        if not self.settled:
            made: Tensor = self.generator()
            return made
        return self.images[self.rows] + photographic(self.u[self.rows])


def photographic(u: Tensor) -> Tensor:
    r""":math:`S u`, with S symmetric: amplitudes over the frequency, :data:`BRIGHTNESS` times the mean over the channels.

    White noise becomes noise with the spectrum of photographs, :math:`1/f`, down to one period in the longer side.

    Shapes:
        B x C x H x W to the same.
    """
    height, width = u.shape[-2:]
    rows = torch.fft.fftfreq(height, device=u.device, dtype=u.dtype)[:, None]
    columns = torch.fft.rfftfreq(width, device=u.device, dtype=u.dtype)[None]
    frequency = (rows.square() + columns.square()).sqrt().clamp_min(1 / max(height, width))
    filtered = torch.fft.irfft2(torch.fft.rfft2(u) * (frequency.square().mean().sqrt() / frequency), s=(height, width))
    if u.shape[1] != 3:
        return filtered
    return filtered + (BRIGHTNESS - 1) * filtered.mean(dim=1, keepdim=True)
