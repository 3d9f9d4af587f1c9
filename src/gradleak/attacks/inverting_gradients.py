"""Inverting Gradients: fit pixels to the direction of the observed gradient, with total variation as the prior.

J. Geiping, H. Bauermeister, H. Droege and M. Moeller, "Inverting Gradients - How easy is it to break privacy in federated
learning?", NeurIPS 2020.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from gradleak.attacks.recipe import Attack, Problem, Schedule
from gradleak.distance import DistanceName
from gradleak.image_model import Initial, Pixels
from gradleak.prior import total_variation
from gradleak.vjp import EngineName


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class InvertingGradientsAttack(Attack):
    r""":math:`\min_{x \in [0, 1]^n} 1 - \cos(A(x, y), g^*) + \alpha\, \mathrm{TV}(x)`  (Geiping et al. 2020, Eq. 4).

    Adam is fed the gradient's sign, its rate falls by ten after 3/8, 5/8 and 7/8 of the rounds, and each step is followed
    by a projection onto the box.

    Attributes:
        total_variation: :math:`\alpha`. The authors' published settings have 1e-2 for a batch of 100 CIFAR images (the
            default; their notebook "ResNet32-10 - Recovering 100 CIFAR-100 images", with 24,000 rounds and rate 0.1),
            1e-6 for an untrained and 1e-1 for a trained ResNet on ImageNet, and 1e-4 on their command line. Their
            pixels are normalised, so that their total variation is about four times that of images in [0, 1].
        initial: First images: ``normalised`` is the authors' N(0, 1) on normalised images.
    """

    shards: ClassVar[bool] = True

    rounds: int = Field(default=24_000, ge=1)
    distance: DistanceName = "cosine"
    learning_rate: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    schedule: Schedule = "step"
    engine: EngineName = "exact"
    gain: Literal["natural", "free"] = "free"
    total_variation: float = Field(default=1e-2, ge=0)
    initial: Initial = "normalised"

    def image_model(self, problem: Problem) -> Pixels:
        return Pixels(batch=problem.batch, image_shape=problem.image_shape, group=self.group, initial=self.initial)

    def prior(self, images: Tensor, problem: Problem) -> Tensor:
        # the mean over a group times its size: matching losses of members are summed too
        return self.total_variation * self.group * total_variation(images)

    def project(self, image_model: nn.Module) -> None:
        assert isinstance(image_model, Pixels)
        image_model.clamp()


PRESETS: dict[str, tuple[Attack, str]] = {
    "inverting-gradients": (
        InvertingGradientsAttack(),
        "Inverting Gradients: pixels, cosine and total variation, signed Adam (Geiping et al. 2020)",
    ),
}
