"""CI-Net: an untrained, over-parameterised convolutional generator of a batch of images (CI-Net, appendix B)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

Interpolation = Literal["nearest", "linear"]
Normalisation = Literal["spectral", "pixel", "none"]
Activation = Literal["leaky_relu", "relu", "silu", "gelu"]
OutputRange = Literal["tanh", "sigmoid"]
OutputLayer = Literal["single", "blended"]
ChannelRule = Literal["paper", "reference", "auto"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}


class PixelNorm(nn.Module):
    r""":math:`x_c / \sqrt{\tfrac1C \sum_c x_c^2 + \epsilon}` at every pixel  (Karras et al. 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


class SigmoidOutput(nn.Module):
    r""":math:`h\, \sigma(2 a) = h\, (1 + \tanh a) / 2`: tanh moved to the range of images, [0, 1], times a headroom."""

    def __init__(self, headroom: float = 1.0) -> None:
        super().__init__()
        self.headroom = headroom

    def forward(self, x: Tensor) -> Tensor:
        return self.headroom * torch.sigmoid(2 * x)


class Block(nn.Module):
    """``convolutions`` times (3x3 convolution, batch norm, activation), with or without a skip connection."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        convolutions: int,
        normalisation: Normalisation,
        activation: Activation,
        residual: bool,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(convolutions):
            convolution = nn.Conv2d(inputs if index == 0 else outputs, outputs, 3, padding=1)
            layers.append(spectral_norm(convolution) if normalisation == "spectral" else convolution)
            if normalisation == "pixel":
                layers.append(PixelNorm())
            layers += [nn.BatchNorm2d(outputs, track_running_stats=False), activation_module(activation)]
        self.body = nn.Sequential(*layers)
        self.skip = (nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y if self.skip is None else y + self.skip(x)


class CINet(nn.Module):
    r"""The generator :math:`x = G(z_0, \theta)`: one fixed latent for each image, one :math:`\theta` for the batch.

    A 4x4 transposed convolution turns the latent into ``channels`` maps; blocks at 4, 8, 16, 32 (64, 128, 256) pixels
    follow, each after doubling the size; a 1x1 convolution gives the image. Other sizes and rectangles start
    from a stem of ceil(H / 2^k) x ceil(W / 2^k) and are cropped at the centre.

    Args:
        batch: B, number of images.
        image_shape: (C, H, W).
        channels: c; blocks up to 32 pixels have c channels, at 64 c/2, at 128 and 256 c/4.
        latent: Length of each z0 ~ N(0, 1).
        interpolation: ``nearest`` (the paper's) or ``linear`` (bilinear; Fig. 9).
        normalisation: of the 3x3 convolutions: ``spectral`` (the paper's), ``pixel``, ``none``.
        activation: ``leaky_relu`` (slope 0.1, the paper's), ``relu``, ``silu``, ``gelu``.
        output: ``tanh`` in [-1, 1] (the paper's) or ``sigmoid`` in [0, headroom].
        headroom: Above 1 where the update does not tell the gain: bright pixels are then not squeezed against the end.
        output_layer: ``single`` (the paper's), or the last two resolutions' outputs ``blended`` half and half.
        residual: Skip connection around each block (the paper has none).
        convolutions: 3x3 convolutions in a block (the paper has two).
        latent_seed: Seed of the latents alone; theta is then what it is without one.

    Attributes:
        rows: Which images of the batch ``forward()`` makes; all of them at first.

    Shapes:
        ``forward()`` -> B x C x H x W. Latents and theta come from torch's global random state.
    """

    z0: Tensor
    rows = slice(None)

    def __init__(
        self,
        *,
        batch: int,
        image_shape: tuple[int, int, int],
        channels: int = 32,
        latent: int = 128,
        interpolation: Interpolation = "nearest",
        normalisation: Normalisation = "spectral",
        activation: Activation = "leaky_relu",
        output: OutputRange = "tanh",
        headroom: float = 1.0,
        output_layer: OutputLayer = "single",
        residual: bool = False,
        convolutions: int = 2,
        latent_seed: int | None = None,
    ) -> None:
        super().__init__()
        colours, height, width = image_shape
        doublings = max(0, math.ceil(math.log2(max(height, width) / 4)))
        self.channels = channels
        self.image_size = (height, width)
        self.mode = "bilinear" if interpolation == "linear" else "nearest"
        stem = (math.ceil(height / 2**doublings), math.ceil(width / 2**doublings))
        widths = block_widths(channels, doublings)
        self.register_buffer("z0", torch.randn(batch, latent, 1, 1))
        if latent_seed is not None:  # after the draw above, so that theta is the same
            self.z0.copy_(torch.randn(self.z0.shape, generator=torch.Generator().manual_seed(latent_seed)))
        self.stem = nn.Sequential(
            nn.ConvTranspose2d(latent, channels, stem),
            nn.BatchNorm2d(channels, track_running_stats=False),
            activation_module(activation),
        )
        self.blocks = nn.ModuleList(
            Block(
                inputs,
                outputs,
                convolutions=convolutions,
                normalisation=normalisation,
                activation=activation,
                residual=residual,
            )
            for inputs, outputs in zip([channels, *widths], widths, strict=False)
        )
        self.to_rgb = nn.Conv2d(widths[-1], colours, 1)
        blended = output_layer == "blended" and doublings > 0
        self.to_rgb_before = nn.Conv2d(widths[-2], colours, 1) if blended else None
        self.output: nn.Module = nn.Tanh() if output == "tanh" else SigmoidOutput(headroom)

    def forward(self) -> Tensor:
        x = before = self.stem(self.z0[self.rows])
        for index, block in enumerate(self.blocks):
            before = x
            x = block(x if index == 0 else self._double(x))
        rgb = self.to_rgb(x)
        if self.to_rgb_before is not None:
            rgb = (rgb + self._double(self.to_rgb_before(before))) / 2
        images: Tensor = self.output(rgb)
        height, width = self.image_size
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        return images[:, :, top : top + height, left : left + width]

    def _double(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode=self.mode)


class SideBySide(nn.Module):
    """Several generators with latents and parameters of their own; their batches one after another."""

    def __init__(self, members: list[CINet]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self) -> Tensor:
        return torch.cat([member() for member in self.members])


def activation_module(name: Activation) -> nn.Module:
    """The generator's activation by name; LeakyReLU has the paper's slope 0.1."""
    return nn.LeakyReLU(0.1) if name == "leaky_relu" else ACTIVATIONS[name]()


def block_widths(channels: int, doublings: int) -> list[int]:
    """Channels of the blocks at 4, 8, 16, ... pixels: c up to 32, c/2 at 64, c/4 beyond (reference code)."""
    divisor = [1, 1, 1, 1, 2]
    return [max(4, channels // (divisor[k] if k < len(divisor) else 4)) for k in range(doublings + 1)]


def generator_parameters(*, channels: int, image_shape: tuple[int, int, int], latent: int = 128, convolutions: int = 2) -> int:
    """P(G): number of trained parameters of :class:`CINet` with these sizes and the paper's other choices."""
    with torch.device("meta"):
        net = CINet(
            batch=1,
            image_shape=image_shape,
            channels=channels,
            latent=latent,
            normalisation="none",
            convolutions=convolutions,
        )
    return sum(p.numel() for p in net.parameters())


def choose_channels(
    rule: ChannelRule,
    *,
    batch: int,
    image_shape: tuple[int, int, int],
    update_size: int,
    latent: int = 128,
    convolutions: int = 2,
) -> int:
    """The generator's width c by an over-parameterisation rule.

    - ``paper``: the least multiple of 8 with P(G) > P(F)  (Algorithm 1, step 1).
    - ``reference``: doubled from 32 until P(G of the 32-pixel generator) > 4 B H W  (reference code).
    - ``auto``: our best: 48 up to B = 8, 64 up to B = 32, 96 up to B = 64, 128 beyond  (docs/experiments.md).

    Args:
        batch: B.
        image_shape: (C, H, W).
        update_size: P(F), number of scalars in the update.
    """
    if rule == "auto":
        return 48 if batch <= 8 else 64 if batch <= 32 else 96 if batch <= 64 else 128
    if rule == "reference":
        channels, unknowns = 32, 4 * batch * image_shape[1] * image_shape[2]
        while generator_parameters(channels=channels, image_shape=(3, 32, 32), latent=latent) <= unknowns:
            channels *= 2
        return channels
    low, high = 1, 2  # in units of 8 channels: P(G) grows with c, so bisect
    sizes = {"image_shape": image_shape, "latent": latent, "convolutions": convolutions}
    while generator_parameters(channels=8 * high, **sizes) <= update_size:  # type: ignore[arg-type]
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if generator_parameters(channels=8 * middle, **sizes) <= update_size:  # type: ignore[arg-type]
            low = middle
        else:
            high = middle
    fits = generator_parameters(channels=8 * low, **sizes) > update_size  # type: ignore[arg-type]
    return 8 * (low if fits else high)
