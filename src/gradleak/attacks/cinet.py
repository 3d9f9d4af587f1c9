"""CI-Net: fit an untrained, over-parameterised generator to the observed gradient.

C. Zhang et al., "Generative Gradient Inversion via Over-Parameterized Networks in Federated Learning", ICCV 2023.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from gradleak.attacks.recipe import Attack, Matching, Optimiser, Phase, Problem
from gradleak.cinet import (
    Activation,
    ChannelRule,
    CINet,
    Interpolation,
    Normalisation,
    OutputLayer,
    OutputRange,
    SideBySide,
    choose_channels,
)
from gradleak.image_model import Corrected
from gradleak.lbfgs import LBFGS
from gradleak.prior import smoothed

#: Pixels are corrected where the generator brought the matching loss below this share of the first one.
EXPLAINED = 0.1

#: The same of a whitened loss, which falls about as the squared error of the images does, where the cosine falls faster.
WHITENED_EXPLAINED = 0.3

#: Longest step of L-BFGS on pixels, as the root mean square of the correction u over all its elements.
LONGEST_STEP = 0.01

#: Weight of total variation (:func:`gradleak.prior.smoothed`) in what the rounds on pixels start from, for values in [0, 1] and
#: images of 256 pixels. It is in proportion to their longer side: neighbours differ more in small photographs.
SMOOTHING = 0.03

#: Rounds on pixels after which they begin again from what they have come to, smoothed, if as many are left. Fewer are better
#: spent on going on.
SMOOTH_EVERY = 400


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class CINetAttack(Attack):
    r""":math:`\theta \leftarrow \theta - \eta\, \mathrm{sign}(\nabla_\theta D(A(G(z_0, \theta), y), g^*))`  (Algorithm 1).

    Attributes:
        channels: c, or the over-parameterisation rule that sets it (:func:`gradleak.cinet.choose_channels`).
        latent: Length of each image's latent.
        latent_seed: Seed of the latents alone, Fig. 8; None: they are drawn by the attack's seed, as theta is.
        interpolation: How a block doubles the size: ``nearest``, or ``linear`` (bilinear).
        normalisation: Of the 3x3 convolutions: ``spectral``, ``pixel`` or ``none``.
        activation: After each of them.
        output: ``tanh`` in [-1, 1], or ``sigmoid`` in [0, 1].
        headroom: Range of the sigmoid output where the update does not tell the gain; else it is [0, 1].
        output_layer: ``single``: one 1x1 convolution; ``blended``: the mean of the last two resolutions' images.
        residual: Skip connection around each block.
        convolutions: 3x3 convolutions in a block.
        pixel_share: Share of the rounds, the last ones, in which L-BFGS corrects the pixels of what the generator made
            (:class:`gradleak.image_model.Corrected`). The learning rate's schedule is that of all rounds. The generator has
            these rounds too in a group, with targets that are fitted, and where it left too much of the update unexplained.
        relative_total_variation: :math:`\tau` in :math:`D\,(\mathrm{TV}(x) / \sqrt{\mathrm{TV}(\bar x)})^\tau`, which the
            rounds on pixels minimise: one per cent less total variation is worth :math:`\tau` per cent of the loss, however
            small it is, and half as much where the images without their fine structure (:func:`gradleak.prior.coarse`) lose it
            too. They start from what the generator made, smoothed, since in the spectrum of photographs they hardly move its
            fine noise; and after :data:`SMOOTH_EVERY` rounds from what they have come to, smoothed. 0: neither.

    The choices are those of appendix B (:class:`gradleak.cinet.CINet`). The defaults are our fastest good recipe, ``cinet``:
    the whitened distance, orthogonal steps (:class:`gradleak.muon.Muon`) with cosine decay, SiLU, sigmoid output, no
    spectral norm.
    """

    shards: ClassVar[bool] = True

    distance: Matching = "whitened"
    optimiser: Optimiser = "muon"
    learning_rate: float = Field(default=1e-2, gt=0, allow_inf_nan=False)
    channels: Annotated[int, Field(ge=1, le=4096)] | ChannelRule = Field(default="auto", union_mode="left_to_right")
    latent: int = Field(default=128, ge=1)
    latent_seed: int | None = Field(default=None, ge=0, lt=2**63)
    interpolation: Interpolation = "nearest"
    normalisation: Normalisation = "none"
    activation: Activation = "silu"
    output: OutputRange = "sigmoid"
    headroom: float = Field(default=1.25, ge=1)
    output_layer: OutputLayer = "single"
    residual: bool = False
    convolutions: int = Field(default=2, ge=1, le=8)
    pixel_share: float = Field(default=0.35, ge=0, lt=1)
    relative_total_variation: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    @property
    def pixel_rounds(self) -> int:
        """How many of the rounds correct pixels."""
        return 0 if self.group > 1 else min(round(self.pixel_share * self.rounds), self.rounds - 1)

    def image_model(self, problem: Problem) -> nn.Module:
        if self.group > 1:
            return SideBySide([self.generator(problem) for _ in range(self.group)])
        generator = self.generator(problem)
        return Corrected(generator, (problem.batch, *problem.image_shape)) if self.pixel_rounds else generator

    def phases(self, image_model: nn.Module) -> list[Phase]:
        if not self.pixel_rounds:
            return super().phases(image_model)
        assert isinstance(image_model, Corrected)
        theta = list(image_model.generator.parameters())
        lbfgs = LBFGS([image_model.u], lr=LONGEST_STEP)

        def begin(images: Tensor, share: float, whitened: bool) -> bool:
            explained = bool(image_model.settled) or share <= (WHITENED_EXPLAINED if whitened else EXPLAINED)
            if explained:
                lbfgs.state.clear()
                weight = SMOOTHING * max(images.shape[2:]) / 256
                image_model.settle(smoothed(images, weight=weight) if self.relative_total_variation else images)
            return explained

        return [
            self.phase(theta, self.rounds - self.pixel_rounds, horizon=self.rounds),
            Phase(
                self.pixel_rounds,
                lbfgs,
                LambdaLR(lbfgs, lambda t: 1.0),
                begin=begin,
                again=SMOOTH_EVERY if self.relative_total_variation else 0,
                precise=True,
                drifting=False,
                relative_total_variation=self.relative_total_variation,
            ),
        ]

    def generator(self, problem: Problem) -> CINet:
        """One generator of a whole batch."""
        return CINet(
            batch=problem.batch,
            image_shape=problem.image_shape,
            channels=resolve_channels(self.channels, problem, latent=self.latent, convolutions=self.convolutions),
            latent=self.latent,
            latent_seed=self.latent_seed,
            interpolation=self.interpolation,
            normalisation=self.normalisation,
            activation=self.activation,
            output=self.output,
            headroom=self.headroom if problem.gain_blind and self.gain == "natural" else 1.0,
            output_layer=self.output_layer,
            residual=self.residual,
            convolutions=self.convolutions,
        )

    def describe(self, problem: Problem, image_model: nn.Module) -> dict[str, Any]:
        generator = next(module for module in image_model.modules() if isinstance(module, CINet))
        size = sum(p.numel() for p in generator.parameters())
        corrected = isinstance(image_model, Corrected) and bool(image_model.settled)
        return {"generator_channels": generator.channels, "generator_parameters": size, "pixels_corrected": corrected}


def resolve_channels(channels: int | ChannelRule, problem: Problem, *, latent: int, convolutions: int) -> int:
    """c as it is given, or by its over-parameterisation rule (:func:`gradleak.cinet.choose_channels`)."""
    if isinstance(channels, int):
        return channels
    return choose_channels(
        channels,
        batch=problem.batch,
        image_shape=problem.image_shape,
        update_size=problem.client.parameters,
        latent=latent,
        convolutions=convolutions,
    )


PRESETS: dict[str, tuple[Attack, str]] = {
    "cinet": (CINetAttack(), "our fastest good CI-Net recipe"),
    "cinet-paper": (
        CINetAttack(
            rounds=10_000,
            optimiser="sgd",
            learning_rate=5e-3,
            schedule="constant",
            distance="cosine",
            engine="exact",
            channels="paper",
            normalisation="spectral",
            activation="leaky_relu",
            output="tanh",
            gain="free",
            pixel_share=0.0,
            relative_total_variation=0.0,
        ),
        "CI-Net as its paper states it: Algorithm 1, P(G) > P(F)",
    ),
    "cinet-reference": (
        CINetAttack(
            rounds=2000,
            optimiser="adam",
            learning_rate=1e-3,
            schedule="constant",
            distance="cosine",
            engine="exact",
            channels="reference",
            normalisation="spectral",
            activation="leaky_relu",
            output="tanh",
            gain="free",
            pixel_share=0.0,
            relative_total_variation=0.0,
        ),
        "CI-Net as its authors' code runs it: Adam on signs at 1e-3, width by batch size",
    ),
}
