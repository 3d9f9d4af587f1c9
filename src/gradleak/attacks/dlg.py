"""Deep leakage from gradients: fit pixels to the observed gradient by L-BFGS, with or without the labels.

L. Zhu, Z. Liu and S. Han, "Deep Leakage from Gradients", NeurIPS 2019; B. Zhao, K. R. Mopuri and H. Bilen, "iDLG: Improved
Deep Leakage from Gradients", 2020.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from gradleak.attacks.recipe import Attack, Problem, Schedule
from gradleak.distance import DistanceName
from gradleak.image_model import Initial, Pixels
from gradleak.vjp import EngineName


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class IDLGAttack(Attack):
    r""":math:`\min_x \|A(x, y) - g^*\|^2` by L-BFGS, with labels that are known or recovered first (Zhao et al. 2020).

    The step is the authors': length 1, no line search, 300 calls of up to twenty evaluations. Such steps can diverge;
    the loop then keeps the best iterate, and ``repeat`` adds restarts.

    Attributes:
        initial: First images, ``normal`` as the authors' or ``normalised`` (:class:`gradleak.image_model.Pixels`).
    """

    shards: ClassVar[bool] = True

    rounds: int = Field(default=300, ge=1)
    distance: DistanceName = "squared-l2"
    optimiser: Literal["adam", "sgd", "lbfgs"] = "lbfgs"
    signed: bool = False
    learning_rate: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    schedule: Schedule = "constant"
    engine: EngineName = "exact"
    gain: Literal["natural", "free"] = "free"
    initial: Initial = "normal"

    def image_model(self, problem: Problem) -> Pixels:
        return Pixels(
            batch=problem.batch,
            image_shape=problem.image_shape,
            group=self.group,
            initial=self.initial,
        )


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DLGAttack(IDLGAttack):
    r""":math:`\min_{x, \lambda} \|A(x, \mathrm{softmax}(\lambda)) - g^*\|^2` by L-BFGS (Zhu et al. 2019, Algorithm 1)."""

    needs: ClassVar[str] = "the update alone: it fits the labels too"
    joint_labels: ClassVar[bool] = True


PRESETS: dict[str, tuple[Attack, str]] = {
    "dlg": (DLGAttack(), "DLG: pixels and soft labels together, L-BFGS (Zhu et al. 2019)"),
    "idlg": (IDLGAttack(), "iDLG: pixels with known or recovered labels, L-BFGS (Zhao et al. 2020)"),
}
