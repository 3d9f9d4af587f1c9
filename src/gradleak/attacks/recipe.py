"""An attack as a recipe for the shared loop of :mod:`gradleak.invert`: what it optimises, on which distance, how."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from gradleak.muon import Muon
from gradleak.sharded import WHOLE, Shard
from gradleak.vjp import EngineName

if TYPE_CHECKING:
    from gradleak.client import ClientOperator
    from gradleak.observation import Observation, Update

#: Below this sensitivity the update does not tell the gain of the images.
GAIN_BLIND = 0.02

Schedule = Literal["constant", "cosine", "step"]
Optimiser = Literal["adam", "sgd", "lbfgs", "muon"]

#: The distances of :mod:`gradleak.distance`, and that of :mod:`gradleak.whitening`.
Matching = Literal["cosine", "squared-l2", "whitened"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What an attack may look at: the server's side only.

    Attributes:
        observation: What the server holds.
        client: The operator A at the observed weights, on the device and in the precision of the run.
        observed: g* there, name -> tensor.
        labels: B labels that the attack uses, there.
        gain_sensitivity: How much A depends on the gain of random images (:mod:`gradleak.invariance`).
        shard: Which of the images this process computes with.
    """

    observation: Observation
    client: ClientOperator
    observed: Update
    labels: Tensor
    gain_sensitivity: float
    shard: Shard = WHOLE

    def last(self, share: float) -> Problem:
        """The problem of matching the last layers only (:meth:`gradleak.protocols.ClientOperator.last`), or itself."""
        client = self.client.last(share)
        if client is self.client:
            return self
        return dataclasses.replace(self, client=client, observed={name: self.observed[name] for name in client.weights})

    @property
    def gain_blind(self) -> bool:
        """Whether the update does not tell the gain of the images."""
        return self.gain_sensitivity < GAIN_BLIND

    @property
    def batch(self) -> int:
        """B."""
        return self.observation.batch

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.observation.image_shape


@dataclasses.dataclass(frozen=True)
class Phase:
    r"""Some rounds of one optimiser with its learning-rate schedule.

    Attributes:
        rounds: Their number.
        optimiser: A step of it is a round.
        schedule: Stepped after each.
        signed: Whether the optimiser is fed the sign of the gradient.
        begin: Called before the first of them with the best images so far, B x C x H x W, their matching loss as a share of
            the first one, and whether the distance is whitened. If it returns False, the phase before has these rounds too.
        again: ``begin`` is called again after so many of them, where as many are left, and the best images are those with the
            least matching loss since then. 0: never.
        precise: Whether its rounds are in float32 where the attack's precision is ``mixed``.
        relative_total_variation: tau; above 0 its rounds minimise
            :math:`\log D + \tau (\log \mathrm{TV}(x) - \tfrac12 \log \mathrm{TV}(\bar x))` in place of D, with
            :math:`\bar x` the images without their fine structure (:func:`gradleak.prior.coarse`).
        drifting: Whether its steps let the gain of the images drift where the update does not tell it, so that it is to be
            held. Descent along the gradient itself does not: the gradient has no part in that direction.
    """

    rounds: int
    optimiser: torch.optim.Optimizer
    schedule: LambdaLR
    signed: bool = False
    begin: Callable[[Tensor, float, bool], bool] | None = None
    again: int = 0
    precise: bool = False
    relative_total_variation: float = 0.0
    drifting: bool = True


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Attack:
    """The settings that every attack has; a subclass adds its image model, and what else it needs.

    Attributes:
        needs: What the attack must have, for `gradleak list`.
        joint_labels: Whether the targets are optimised together with the images, by the same optimiser, whatever rule gave
            labels (:class:`gradleak.targets.FreeTargets`).
        shards: Whether several processes can share the images (:mod:`gradleak.sharded`): the image model's generators have
            ``rows``, and a prior is a mean over the images.
        rounds: T, number of steps.
        distance: ``cosine`` (Eq. 3); ``squared-l2`` (Eq. 2); ``whitened``: the cosine after weighing each direction of the
            update by how little it varies by itself (:mod:`gradleak.whitening`), and ``cosine`` where a defence changed the
            update, it was rounded on its way, or targets are fitted too.
        matched: Share of the update's numbers that is compared, counted from the last layer backwards. Below 1 a round costs
            less: what lies before those layers is computed once for both of the secant's passes (:mod:`gradleak.prefix`). The
            last quarter of the rounds (of CI-Net: of its generator's, and then all on pixels) compares all of the update. So
            does every round with a client that has a defence or several steps.
        optimiser: ``adam``, ``sgd`` (plain descent), ``lbfgs`` (a round is one call: up to twenty evaluations), or ``muon``
            (:class:`gradleak.muon.Muon`), which is made for the weights of a generator.
        signed: Feed the optimiser the sign of the gradient; ``muon`` does so itself where it is of use.
        learning_rate: eta.
        schedule: ``constant``; ``cosine`` from eta to zero over all rounds; ``step``: a tenth after 3/8, 5/8 and 7/8.
        engine: Transpose of the client operator: ``auto`` (self-checking secant), ``secant``, ``exact``.
        precision: ``float32``, ``float64``, or ``mixed``: float32, and the image model and the gradients of F's convolution
            weights in bfloat16 where the processor has the instructions, all of a wide F where it is fast enough at it, or
            convolutions in TF32 and the exact transpose on a GPU; the pixel phase of CI-Net is in float32.
        patience: Stop after so many rounds in which the best loss fell by less than 1 %; None: never.
        gain: Where the update does not depend on the images' overall gain: ``natural`` holds it near that of photographs
            and puts the brightest values at 1 in the end (:mod:`gradleak.invariance`), ``free`` lets it drift.
        group: Members with other seeds that are fitted side by side; the one with the least matching loss is kept.
        repeat: Restarts with other seeds; the one with the least matching loss is kept.
        snapshots: How many intermediate reconstructions are kept.
    """

    needs: ClassVar[str] = "the labels, granted or recovered (labels.rule)"
    joint_labels: ClassVar[bool] = False
    shards: ClassVar[bool] = False

    rounds: int = Field(default=1000, ge=1)
    distance: Matching = "cosine"
    matched: float = Field(default=1.0, gt=0, le=1)
    optimiser: Optimiser = "adam"
    signed: bool = True
    learning_rate: float = Field(default=5e-3, gt=0, allow_inf_nan=False)
    schedule: Schedule = "cosine"
    engine: EngineName = "auto"
    precision: Literal["float32", "float64", "mixed"] = "float32"
    patience: int | None = Field(default=None, ge=1)
    gain: Literal["natural", "free"] = "natural"
    group: int = Field(default=1, ge=1)
    repeat: int = Field(default=1, ge=1)
    snapshots: int = Field(default=12, ge=0, le=64)

    @property
    def requires(self) -> frozenset[str]:
        """What the threat model must grant for these settings: names of :data:`gradleak.threat.GRANTS`."""
        return frozenset()

    def closed_form(self, problem: Problem) -> Tensor | None:
        """The images, B x C x H x W, where they can be computed without a loop; None where they are fitted."""
        return None

    def image_model(self, problem: Problem) -> nn.Module:
        """A module whose ``forward()`` gives the images, (group B) x C x H x W, from trainable parameters."""
        raise NotImplementedError

    def prior(self, images: Tensor, problem: Problem) -> Tensor | None:
        """A differentiable scalar that is added to the matching loss, or None."""
        return None

    def project(self, image_model: nn.Module) -> None:
        """Put the parameters back into their set (a box, say) after a step."""

    def phases(self, image_model: nn.Module) -> list[Phase]:
        """What is optimised, in which order; one phase over all parameters unless a subclass says otherwise."""
        return [self.phase(list(image_model.parameters()), self.rounds)]

    def phase(
        self,
        parameters: list[nn.Parameter],
        rounds: int,
        *,
        learning_rate: float | None = None,
        horizon: int | None = None,
    ) -> Phase:
        """The optimiser and schedule of these settings for some parameters.

        ``horizon`` is the number of rounds that the schedule is made for, where it is another.
        """
        eta = self.learning_rate if learning_rate is None else learning_rate
        optimisers: dict[str, Callable[[], torch.optim.Optimizer]] = {
            "adam": lambda: torch.optim.Adam(parameters, lr=eta),
            "sgd": lambda: torch.optim.SGD(parameters, lr=eta),
            "lbfgs": lambda: torch.optim.LBFGS(parameters, lr=eta),
            "muon": lambda: Muon(parameters, lr=eta),
        }
        optimiser = optimisers[self.optimiser]()
        schedule = LambdaLR(optimiser, schedule_factor(self.schedule, horizon or rounds))
        return Phase(rounds, optimiser, schedule, self.signed and self.optimiser != "muon")

    def describe(self, problem: Problem, image_model: nn.Module) -> dict[str, Any]:
        """What a report should say of this attack beside its settings, for example the generator's size."""
        return {}


def schedule_factor(schedule: Schedule, rounds: int) -> Callable[[int], float]:
    """The learning rate over eta, as a function of the number of rounds done."""
    if schedule == "cosine":
        return lambda t: (1 + math.cos(math.pi * min(t / rounds, 1))) / 2
    if schedule == "step":
        return lambda t: 0.1 ** sum(t >= rounds * k / 8 for k in (3, 5, 7))
    return lambda t: 1.0
