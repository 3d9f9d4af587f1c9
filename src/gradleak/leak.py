"""How much one update gives away, for whoever holds both it and the images: attack it, then score what was rebuilt.

A client can do this to its own update before it leaves (:mod:`gradleak.integrations`). The attack is the server's: it is given
the observation, and the truth is first looked at when the attack has ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from gradleak import metrics
from gradleak.errors import DataError
from gradleak.evaluate import RECOGNISABLE_SSIM
from gradleak.invert import Reconstruction
from gradleak.matching import many_to_one
from gradleak.observation import Observation, Truth
from gradleak.run import attack_observation, prepare
from gradleak.spec import parse

#: The attack of an audit that has to be quick: under a minute for a small convolutional network on two cores.
QUICK: Mapping[str, Any] = MappingProxyType({"name": "cinet", "rounds": 300})


@dataclass(frozen=True)
class Leak:
    """What an attack of a given size rebuilt from one update. A stronger attack, or a longer one, may rebuild more.

    Attributes:
        score: SSIM of the image that was rebuilt best, in [0, 1]: the largest of ``per_image``.
        per_image: For each of the client's images the SSIM with the reconstruction that is most like it.
        recognisable: How many of them reach :data:`gradleak.evaluate.RECOGNISABLE_SSIM`.
        baseline: The score of a plain grey image: what is reached without any update.
        threshold: The largest score that is let pass.
        reconstruction: The rebuilt images, the labels that were used, the matching loss, rounds and seconds.
    """

    score: float
    per_image: tuple[float, ...]
    recognisable: int
    baseline: float
    threshold: float
    reconstruction: Reconstruction

    @property
    def exceeded(self) -> bool:
        """Whether the score is above the threshold."""
        return self.score > self.threshold

    @property
    def verdict(self) -> str:
        """One sentence for people; it names no image."""
        found = "exceeds" if self.exceeded else "does not exceed"
        return (
            f"Leak score {self.score:.2f} {found} the threshold {self.threshold:.2f}: {self.recognisable} of "
            f"{len(self.per_image)} images recognisable (SSIM >= {RECOGNISABLE_SSIM:.2f}) after "
            f"{self.reconstruction.rounds} rounds; a plain grey image scores {self.baseline:.2f}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Numbers and the verdict as JSON holds them; no image, no label and no name."""
        return {
            "score": self.score,
            "threshold": self.threshold,
            "exceeded": self.exceeded,
            "recognisable": self.recognisable,
            "per_image": list(self.per_image),
            "baseline": self.baseline,
            "matching_loss": self.reconstruction.matching_loss,
            "rounds": self.reconstruction.rounds,
            "seconds": round(self.reconstruction.seconds, 3),
            "verdict": self.verdict,
        }


def measure_leak(
    observation: Observation,
    model: nn.Module,
    truth: Truth,
    *,
    attack: Mapping[str, Any] = QUICK,
    labels: str | None = None,
    threshold: float = RECOGNISABLE_SSIM,
    seed: int = 0,
    device: str = "auto",
    memory_limit_mb: float | None = None,
) -> Leak:
    r"""Attack an update, and compare what was rebuilt with the images it came from.

    .. math:: \mathrm{score} = \max_i \max_j \mathrm{SSIM}(x_j, x^*_i)

    over the originals :math:`x^*_i` and the reconstructions :math:`x_j`: the data leakage value of Hatamizadeh et al. 2022
    (arXiv 2202.06924), as NVFlare's filter thresholds it. Any reconstruction counts for an original, so no assignment can hide
    a leak. The truth is no argument of the attack (:func:`gradleak.run.attack_observation`).

    Args:
        observation: What the server will hold.
        model: F; its weights are used where the observation has none. It stays as it is.
        truth: The client's images, in the observation's size and number.
        attack: Name and settings, as the table ``[attack]`` of a specification.
        labels: A label rule of :data:`gradleak.labels.RULES`; None: ``known`` where the observation grants them, else ``auto``.
        threshold: The largest score, in [0, 1], that is let pass.
        seed: Of the attack.
        device: As :func:`gradleak.run.choose_device`.
        memory_limit_mb: MiB that the attack may take; None: what is free.

    Raises:
        DataError: The truth has another number or size of images, a value outside [0, 1], or images smaller than SSIM's
            window; or the threshold is outside [0, 1].
        SpecError: The attack or the rule is not known.
        ObservationError: The observation does not fit the model, or does not grant what the attack requires.
        DivergedError: No round had a finite matching loss.
    """
    expected, found = (observation.batch, *observation.image_shape), tuple(truth.images.shape)
    if found != expected:
        raise DataError(
            f"the truth has images of {found}, the update is of {expected}; give the very batch that the client trained on"
        )
    if min(expected[2:]) < metrics.SSIM_WINDOW:
        raise DataError(f"images of {expected[2]} x {expected[3]} pixels: SSIM needs {metrics.SSIM_WINDOW} at least")
    if not 0 <= float(truth.images.min()) <= float(truth.images.max()) <= 1:
        raise DataError("the truth has values outside [0, 1]; give the images as they are before they are normalised")
    if not 0 <= threshold <= 1:
        raise DataError(f"threshold is {threshold}; expected an SSIM in [0, 1]")
    rule = labels or ("known" if observation.labels is not None else "auto")
    spec = parse(
        {
            "attack": dict(attack),
            "labels": {"rule": rule},
            "seed": seed,
            "device": device,
            "memory_limit_mb": memory_limit_mb,
        },
        where="attack",
    )
    recipe, where = prepare(spec)
    rebuilt = attack_observation(observation, model, recipe, spec, where, progress=False)
    per_image = _best_ssim(rebuilt.images, truth.images)
    return Leak(
        score=_score(per_image),
        per_image=tuple(per_image.tolist()),
        recognisable=int((per_image >= RECOGNISABLE_SSIM).sum()),
        baseline=_score(_best_ssim(torch.full_like(truth.images[:1], 0.5), truth.images)),
        threshold=threshold,
        reconstruction=rebuilt,
    )


def _best_ssim(reconstruction: Tensor, originals: Tensor) -> Tensor:
    """For each original the SSIM of the reconstruction that is most like it."""
    x, y = (images.detach().to("cpu", torch.float32).clamp(0, 1) for images in (reconstruction, originals))
    return many_to_one(y, x, metrics.ssim)


def _score(per_image: Tensor) -> float:
    return float(per_image.max().clamp(0, 1))
