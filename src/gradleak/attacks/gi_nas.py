"""GI-NAS: choose the generator's architecture by the matching loss before any training, then fit it as CI-Net does.

W. Yu, H. Fang, B. Chen, X. Sui, C. Chen, H. Wu, S.-T. Xia and K. Xu, "GI-NAS: Boosting Gradient Inversion Attacks through
Adaptive Neural Architecture Search", IEEE TIFS 2025.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak.attacks.cinet import resolve_channels
from gradleak.attacks.recipe import Attack, Problem, Schedule
from gradleak.cinet import (
    Activation,
    ChannelRule,
    CINet,
    Normalisation,
    OutputRange,
    SideBySide,
    block_widths,
)
from gradleak.distance import DISTANCES, DistanceName
from gradleak.vjp import EngineName

#: The ways of doubling the size that are searched.
UPSAMPLING = ("nearest", "bilinear", "bicubic")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One point of the search space: :data:`UPSAMPLING` x the subsets of the pairs of blocks.

    Attributes:
        upsampling: One of :data:`UPSAMPLING`, for the blocks and the skip connections.
        skips: Pairs (i, j), i < j: the output of block i is added to that of block j.
    """

    upsampling: str
    skips: tuple[tuple[int, int], ...] = ()

    def describe(self) -> dict[str, Any]:
        """For a report: skip connections by the number of pixels of the blocks they join, 4, 8, 16, ..."""
        return {"upsampling": self.upsampling, "skips": [f"{4 * 2**i}->{4 * 2**j}" for i, j in self.skips]}


def search_space_size(blocks: int) -> int:
    """Number of architectures with so many blocks: three ways of doubling times 2^(pairs of blocks)."""
    return len(UPSAMPLING) << math.comb(blocks, 2)


def architecture(index: int, blocks: int) -> Architecture:
    """The architecture number ``index`` of :func:`search_space_size` (blocks); number 0 is CI-Net's own."""
    pattern, upsampling = divmod(index, len(UPSAMPLING))
    pairs = itertools.combinations(range(blocks), 2)
    return Architecture(UPSAMPLING[upsampling], tuple(pair for k, pair in enumerate(pairs) if pattern >> k & 1))


class SkipGenerator(CINet):
    r"""CI-Net's generator with another way of doubling and with skip connections between its blocks.

    :math:`h_j = \mathrm{block}_j(\uparrow h_{j-1}) + \sum_{(i, j)} C_{ij} \uparrow h_i`, with 1x1 convolutions
    :math:`C_{ij}`. The parameters of CI-Net are drawn first: with one seed all architectures share them.

    Args:
        architecture: Doubling and skip connections.
        batch: B, number of images.
        image_shape: (C, H, W).
        channels: c.
        choices: The other choices of :class:`gradleak.cinet.CINet`.

    Attributes:
        candidates: What the search saw: architectures and their matching losses; empty without a search.
    """

    def __init__(
        self, architecture: Architecture, *, batch: int, image_shape: tuple[int, int, int], channels: int, **choices: Any
    ) -> None:
        super().__init__(batch=batch, image_shape=image_shape, channels=channels, **choices)
        self.mode = architecture.upsampling
        self.architecture = architecture
        self.candidates: list[tuple[Architecture, float]] = []
        widths = block_widths(channels, len(self.blocks) - 1)
        self.skips = nn.ModuleList(nn.Conv2d(widths[i], widths[j], 1) for i, j in architecture.skips)

    def forward(self) -> Tensor:
        x: Tensor = self.stem(self.z0)
        outputs: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            x = block(self._double(x) if index else x)
            for (source, target), skip in zip(self.architecture.skips, self.skips, strict=True):
                if target == index:
                    # the 1x1 convolution first: at the smaller size it costs less, and the order does not matter
                    x = x + F.interpolate(skip(outputs[source]), scale_factor=2 ** (target - source), mode=self.mode)
            outputs.append(x)
        images: Tensor = self.output(self.to_rgb(x))
        height, width = self.image_size
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        return images[:, :, top : top + height, left : left + width]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class GINASAttack(Attack):
    r""":math:`\min_G D(A(G(z_0, \theta_0), y), g^*)` over architectures, then :math:`\min_\theta` of it  (Yu et al. 2025).

    The search trains nothing: each candidate is scored by the matching loss of its first images, with the same latents
    and, where architectures coincide, the same weights. Each member of a group searches for itself. The authors search
    5-level U-Nets with random inputs; here it is CI-Net's generator. Steps, rounds, activation and output are those of the
    authors' code.

    Attributes:
        candidates: How many architectures are compared, drawn without repetition from :func:`search_space_size`; CI-Net's
            own is always among them.
        channels: c, or the rule that sets it (:func:`gradleak.cinet.choose_channels`).
        latent, normalisation, activation, output, convolutions: As of :class:`gradleak.attacks.cinet.CINetAttack`.
    """

    rounds: int = Field(default=30_000, ge=1)
    distance: DistanceName = "cosine"
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    schedule: Schedule = "constant"
    engine: EngineName = "exact"
    gain: Literal["natural", "free"] = "free"
    candidates: int = Field(default=100, ge=1)
    channels: int | ChannelRule = Field(default="auto", union_mode="left_to_right")
    latent: int = Field(default=128, ge=1)
    normalisation: Normalisation = "none"
    activation: Activation = "leaky_relu"
    output: OutputRange = "sigmoid"
    convolutions: int = Field(default=2, ge=1, le=8)

    def image_model(self, problem: Problem) -> nn.Module:
        if self.group > 1:
            return SideBySide([self.search(problem) for _ in range(self.group)])
        return self.search(problem)

    def search(self, problem: Problem) -> SkipGenerator:
        """The generator of least first matching loss among the candidates, as it was when it was scored."""
        weight = next(iter(problem.client.weights.values()))
        seed = int(torch.randint(2**31, ()))
        blocks = len(self._generator(Architecture("nearest"), problem, seed).blocks)
        size = search_space_size(blocks)
        drawn = random.Random(seed).sample(range(1, size), min(self.candidates, size) - 1)
        candidates: list[tuple[Architecture, float]] = []
        for index in (0, *drawn):
            candidate = architecture(index, blocks)
            with torch.no_grad():
                images = self._generator(candidate, problem, seed).to(weight)()
            update = problem.client(images, problem.labels)
            candidates.append((candidate, DISTANCES[self.distance](update, problem.observed)[0]))
        candidates.sort(key=lambda found: found[1] if math.isfinite(found[1]) else math.inf)
        chosen = self._generator(candidates[0][0], problem, seed)
        chosen.candidates = candidates
        return chosen

    def _generator(self, candidate: Architecture, problem: Problem, seed: int) -> SkipGenerator:
        channels = resolve_channels(self.channels, problem, latent=self.latent, convolutions=self.convolutions)
        # the same start for every candidate: their losses then differ by the architecture
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return SkipGenerator(
                candidate,
                batch=problem.batch,
                image_shape=problem.image_shape,
                channels=channels,
                latent=self.latent,
                normalisation=self.normalisation,
                activation=self.activation,
                output=self.output,
                convolutions=self.convolutions,
            )

    def describe(self, problem: Problem, image_model: nn.Module) -> dict[str, Any]:
        generator = image_model.members[0] if isinstance(image_model, SideBySide) else image_model
        assert isinstance(generator, SkipGenerator)
        return {
            "generator_channels": generator.channels,
            "generator_parameters": sum(p.numel() for p in generator.parameters()),
            "architecture": generator.architecture.describe(),
            "search_space": search_space_size(len(generator.blocks)),
            "searched": [
                {**found.describe(), "matching_loss": loss if math.isfinite(loss) else None}
                for found, loss in generator.candidates
            ],
        }


PRESETS: dict[str, tuple[Attack, str]] = {
    "gi-nas": (GINASAttack(), "GI-NAS: CI-Net with up-sampling and skip connections chosen by its first loss (Yu et al. 2025)"),
}
