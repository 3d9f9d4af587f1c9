"""An attack as a recipe for the shared loop of :mod:`gradleak.invert`: what it optimises, on which distance, how."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn

from gradleak.distance import DistanceName
from gradleak.observation import Observation
from gradleak.vjp import EngineName

Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Attack:
    """The settings that every attack has; a subclass adds its image model.

    Attributes:
        rounds: T, number of steps.
        distance: ``cosine`` (Eq. 3) or ``squared-l2`` (Eq. 2).
        optimiser: ``adam`` or ``sgd`` (plain descent).
        signed: Feed the optimiser the sign of the gradient.
        learning_rate: eta.
        schedule: ``constant``, or ``cosine`` from eta to zero over all rounds.
        engine: Transpose of the client operator: ``auto`` (self-checking secant), ``secant``, ``exact``.
        precision: ``float32`` or ``float64``.
        patience: Stop after so many rounds in which the best loss fell by less than 1 %; None: never.
        snapshots: How many intermediate reconstructions are kept.
    """

    requires: ClassVar[frozenset[str]] = frozenset()

    rounds: int = Field(1000, ge=1)
    distance: DistanceName = "cosine"
    optimiser: Literal["adam", "sgd"] = "adam"
    signed: bool = True
    learning_rate: float = Field(5e-3, gt=0)
    schedule: Schedule = "cosine"
    engine: EngineName = "auto"
    precision: Literal["float32", "float64"] = "float32"
    patience: int | None = Field(None, ge=1)
    snapshots: int = Field(12, ge=0, le=64)

    def image_model(self, observation: Observation, update_size: int) -> nn.Module:
        """A module whose ``forward()`` gives the images, B x C x H x W, from trainable parameters.

        Args:
            observation: What the server holds.
            update_size: P(F), number of scalars in the update.
        """
        raise NotImplementedError

    def stepper(self, image_model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """The optimiser of the image model's parameters, and its learning-rate schedule."""
        parameters = [p for p in image_model.parameters() if p.requires_grad]
        optimiser: torch.optim.Optimizer
        if self.optimiser == "adam":
            optimiser = torch.optim.Adam(parameters, lr=self.learning_rate)
        else:
            optimiser = torch.optim.SGD(parameters, lr=self.learning_rate)
        factor: Callable[[int], float] = lambda t: 1.0  # noqa: E731
        if self.schedule == "cosine":
            factor = lambda t: (1 + math.cos(math.pi * min(t / self.rounds, 1))) / 2  # noqa: E731
        return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)

    def describe(self, observation: Observation, update_size: int) -> dict[str, Any]:
        """What a report should say of this attack beside its settings, for example the generator's size."""
        return {}
