"""CI-Net: fit an untrained, over-parameterised generator to the observed gradient.

C. Zhang et al., "Generative Gradient Inversion via Over-Parameterized Networks in Federated Learning", ICCV 2023.
"""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from gradleak.attacks.recipe import Attack
from gradleak.cinet import (
    Activation,
    ChannelRule,
    CINet,
    Interpolation,
    Normalisation,
    OutputLayer,
    OutputRange,
    choose_channels,
)
from gradleak.observation import Observation


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class CINetAttack(Attack):
    r""":math:`\theta \leftarrow \theta - \eta\, \mathrm{sign}(\nabla_\theta D(A(G(z_0, \theta), y), g^*))`  (Algorithm 1).

    Attributes:
        channels: c, or the over-parameterisation rule that sets it (:func:`gradleak.cinet.choose_channels`).

    The other attributes are the generator's choices of appendix B (:class:`gradleak.cinet.CINet`). The defaults are our
    fastest good recipe, ``cinet``: Adam on signs with cosine decay, SiLU, sigmoid output, no spectral norm.
    """

    channels: int | ChannelRule = Field("auto", union_mode="left_to_right")
    latent: int = Field(128, ge=1)
    interpolation: Interpolation = "nearest"
    normalisation: Normalisation = "none"
    activation: Activation = "silu"
    output: OutputRange = "sigmoid"
    output_layer: OutputLayer = "single"
    residual: bool = False
    convolutions: int = Field(2, ge=1, le=8)

    def resolved_channels(self, observation: Observation, update_size: int) -> int:
        """c for this observation."""
        if isinstance(self.channels, int):
            return self.channels
        return choose_channels(
            self.channels,
            batch=observation.batch,
            image_shape=observation.image_shape,
            update_size=update_size,
            latent=self.latent,
            convolutions=self.convolutions,
        )

    def image_model(self, observation: Observation, update_size: int) -> CINet:
        return CINet(
            batch=observation.batch,
            image_shape=observation.image_shape,
            channels=self.resolved_channels(observation, update_size),
            latent=self.latent,
            interpolation=self.interpolation,
            normalisation=self.normalisation,
            activation=self.activation,
            output=self.output,
            output_layer=self.output_layer,
            residual=self.residual,
            convolutions=self.convolutions,
        )

    def describe(self, observation: Observation, update_size: int) -> dict[str, Any]:
        size = sum(p.numel() for p in self.image_model(observation, update_size).parameters())
        return {"generator_channels": self.resolved_channels(observation, update_size), "generator_parameters": size}


PRESETS: dict[str, tuple[Attack, str]] = {
    "cinet": (CINetAttack(), "our fastest good CI-Net recipe"),
    "cinet-paper": (
        CINetAttack(
            rounds=10_000,
            optimiser="sgd",
            schedule="constant",
            engine="exact",
            channels="paper",
            normalisation="spectral",
            activation="leaky_relu",
            output="tanh",
        ),
        "CI-Net as its paper states it: Algorithm 1, P(G) > P(F)",
    ),
    "cinet-reference": (
        CINetAttack(
            rounds=2000,
            learning_rate=1e-3,
            schedule="constant",
            engine="exact",
            channels="reference",
            normalisation="spectral",
            activation="leaky_relu",
            output="tanh",
        ),
        "CI-Net as its authors' code runs it: Adam on signs at 1e-3, width by batch size",
    ),
}
