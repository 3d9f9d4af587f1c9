"""GradInversion: fit pixels with priors on fidelity, and let several seeds pull one another together.

H. Yin et al., "See through Gradients: Image Batch Recovery via GradInversion", CVPR 2021.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from gradleak.attacks.recipe import Attack, Problem, Schedule
from gradleak.distance import DistanceName
from gradleak.image_model import Initial, Pixels
from gradleak.prior import batch_norm_statistics, group_consistency, squared_norm, total_variation
from gradleak.vjp import EngineName


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class GradInversionAttack(Attack):
    r"""Squared L2 matching with image priors, over a group of seeds (Yin et al. 2021), by Adam with cosine decay.

    .. math:: \min_x \|A(x, y) - g^*\|^2 + \alpha_{TV} \mathrm{TV}(x) + \alpha_2 \|x\|^2
              + \alpha_{BN} R_{BN}(x) + \alpha_{group} R_{group}(x)

    Weights, rate and rounds are the paper's (1e-4, 1e-6, 0.1, 0.01). What differs from it: the matching loss is Eq. 2 of
    CI-Net over all parameters with weight 1, where the paper sums a weighted norm over layers; members of the group are
    assigned one to one, not registered (:func:`gradleak.prior.group_consistency`); all terms act from the first round;
    warm-up and the Gaussian noise on each step are left out. The size of the group is our choice.

    Attributes:
        total_variation: Weight of :func:`gradleak.prior.total_variation`.
        squared_norm: Weight of :func:`gradleak.prior.squared_norm`.
        batch_norm_statistics: Weight of :func:`gradleak.prior.batch_norm_statistics`; without the grant
            ``batch-norm-statistics`` the term is off.
        group_consistency: Weight of :func:`gradleak.prior.group_consistency`.
        initial: First images: ``normalised`` is the authors' N(0, 1) on normalised images.
    """

    needs: ClassVar[str] = f"{Attack.needs}; uses batch statistics where threat.batch_statistics grants them"

    rounds: int = Field(default=20_000, ge=1)
    distance: DistanceName = "squared-l2"
    signed: bool = False
    learning_rate: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    schedule: Schedule = "cosine"
    engine: EngineName = "exact"
    gain: Literal["natural", "free"] = "free"
    group: int = Field(default=4, ge=1)
    total_variation: float = Field(default=1e-4, ge=0)
    squared_norm: float = Field(default=1e-6, ge=0)
    batch_norm_statistics: float = Field(default=0.1, ge=0)
    group_consistency: float = Field(default=0.01, ge=0)
    initial: Initial = "normalised"

    def image_model(self, problem: Problem) -> Pixels:
        return Pixels(batch=problem.batch, image_shape=problem.image_shape, group=self.group, initial=self.initial)

    def prior(self, images: Tensor, problem: Problem) -> Tensor:
        # means over a group times its size: matching losses of members are summed too
        smooth = self.total_variation * total_variation(images) + self.squared_norm * squared_norm(images)
        penalty = self.group * smooth + self.group_consistency * group_consistency(images, problem.labels)
        statistics = problem.observation.batch_statistics
        if statistics is not None:
            for member in images.split(problem.batch):
                penalty = penalty + self.batch_norm_statistics * batch_norm_statistics(problem.client, member, statistics)
        return penalty

    def describe(self, problem: Problem, image_model: nn.Module) -> dict[str, Any]:
        statistics = problem.observation.batch_statistics
        matched = "off: not granted" if statistics is None else f"{len(statistics)} layers matched"
        return {"statistics_used": matched}


PRESETS: dict[str, tuple[Attack, str]] = {
    "gradinversion": (
        GradInversionAttack(),
        "GradInversion: pixels, squared L2, image priors and a group of seeds (Yin et al. 2021)",
    ),
}
