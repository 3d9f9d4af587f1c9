"""GIAS: search the latents of a generator, then its weights.

J. Jeon, J. Kim, K. Lee, S. Oh and J. Ok, "Gradient Inversion with Generative Image Prior", NeurIPS 2021.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from gradleak.attacks.recipe import Attack, Phase, Problem, Schedule
from gradleak.dcgan import Generator
from gradleak.distance import DistanceName
from gradleak.errors import ModelError
from gradleak.prior import total_variation
from gradleak.vjp import EngineName

Weights = Literal["per-image", "shared"]


class LatentGenerator(nn.Module):
    r""":math:`x_i = G(z_i; w_i)`: one latent for each image, and weights of its own or common ones.

    Args:
        generator: G, N x latent -> N x C x H x W; a copy for each image starts from its weights.
        images: Number of images.
        weights: ``per-image``: :math:`w_i`, as in the authors' code; ``shared``: one w.

    Attributes:
        latents: z, images x latent, N(0, 1) at first, from torch's global random state.
        generators: One, or one for each image.

    Shapes:
        ``forward()`` -> images x C x H x W.
    """

    def __init__(self, generator: Generator, *, images: int, weights: Weights) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(images, generator.latent))
        copies = images if weights == "per-image" else 1
        self.generators = nn.ModuleList(copy.deepcopy(generator) for _ in range(copies))

    def forward(self) -> Tensor:
        if len(self.generators) == 1:
            shared: Tensor = self.generators[0](self.latents)
            return shared
        return torch.cat([generator(z[None]) for generator, z in zip(self.generators, self.latents, strict=True)])


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class GIASAttack(Attack):
    r""":math:`\min_z`, then :math:`\min_w` of :math:`D(A(G(z; w), y), g^*) + \alpha\, \mathrm{TV}(G(z; w))`  (Jeon et al.).

    The defaults are the authors' script for 32-pixel ImageNet: cosine, unsigned Adam, 500 rounds at 3e-2 on the latents,
    then 5,000 at 1e-3 on the weights, each with a tenth of the rate after 3/8, 5/8 and 7/8. They bring a StyleGAN2; here
    it is a DCGAN.

    Attributes:
        generator: A file that ``gradleak train-generator`` wrote: surrogate data, which the threat model must
            grant. None: an untrained generator, which knows no images (as in CI-Net's Fig. 1); its batch norm uses the
            statistics of what it generates.
        weights: ``per-image``: each image has weights of its own in the second phase; ``shared``: one set for the batch.
        latent_share: Fraction of the rounds that optimises the latents; the rest optimises the weights.
        weight_learning_rate: eta of the second phase; ``learning_rate`` is that of the first.
        total_variation: alpha.
        latent: Length of an untrained generator's latents.
        width: Channels of an untrained generator (:class:`gradleak.dcgan.Generator`).
    """

    needs: ClassVar[str] = f"{Attack.needs}; with attack.generator=FILE also threat.surrogate_data"

    rounds: int = Field(default=5500, ge=1)
    distance: DistanceName = "cosine"
    signed: bool = False
    learning_rate: float = Field(default=3e-2, gt=0, allow_inf_nan=False)
    schedule: Schedule = "step"
    engine: EngineName = "exact"
    gain: Literal["natural", "free"] = "free"
    generator: str | None = None
    weights: Weights = "per-image"
    latent_share: float = Field(default=1 / 11, ge=0, le=1)
    weight_learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    total_variation: float = Field(default=1e-6, ge=0)
    latent: int = Field(default=100, ge=1)
    width: int = Field(default=64, ge=1)

    @property
    def requires(self) -> frozenset[str]:
        return frozenset() if self.generator is None else frozenset({"surrogate-data"})

    def image_model(self, problem: Problem) -> LatentGenerator:
        if self.generator is None:
            generator = Generator(image_shape=problem.image_shape, latent=self.latent, width=self.width)
        else:
            generator = Generator.load(Path(self.generator).expanduser())
            if generator.image_shape != problem.image_shape:
                found, wanted = ("x".join(map(str, shape)) for shape in (generator.image_shape, problem.image_shape))
                raise ModelError(f"{self.generator}: makes images of {found}, the client's are {wanted}; train another")
        return LatentGenerator(generator, images=self.group * problem.batch, weights=self.weights)

    def prior(self, images: Tensor, problem: Problem) -> Tensor:
        # the mean over a group times its size: matching losses of members are summed too
        return self.total_variation * self.group * total_variation(images)

    def phases(self, image_model: nn.Module) -> list[Phase]:
        assert isinstance(image_model, LatentGenerator)
        first = round(self.rounds * self.latent_share)
        latents = self.phase([image_model.latents], first)
        weights = list(image_model.generators.parameters())
        phases = [latents, self.phase(weights, self.rounds - first, learning_rate=self.weight_learning_rate)]
        return [phase for phase in phases if phase.rounds]

    def describe(self, problem: Problem, image_model: nn.Module) -> dict[str, Any]:
        assert isinstance(image_model, LatentGenerator)
        generator = image_model.generators[0]
        assert isinstance(generator, Generator)
        return {
            "surrogate_data": self.generator is not None,
            "generator_channels": generator.width,
            "generator_parameters": sum(p.numel() for p in image_model.parameters()),
        }


PRESETS: dict[str, tuple[Attack, str]] = {
    "gias": (GIASAttack(), "GIAS: latents of a generator, then its weights (Jeon et al. 2021); generator=FILE, else untrained"),
}
