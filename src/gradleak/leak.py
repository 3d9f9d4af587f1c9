"""How much one update gives away, for whoever holds both it and the images: attack it, then score what was rebuilt.

A client can do this to its own update before it leaves (:mod:`gradleak.integrations`). The attack is the server's: it is given
the observation and nothing else. The truth scores what was rebuilt, and tells whether it and the settings explain the update
at all: where they do not, a low score would be a false all-clear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from gradleak import metrics, mixed
from gradleak.client import operator
from gradleak.distance import DISTANCES, norm
from gradleak.errors import DataError, SpecError
from gradleak.evaluate import RECOGNISABLE_SSIM
from gradleak.invert import Reconstruction
from gradleak.matching import many_to_one
from gradleak.observation import Observation, Truth
from gradleak.run import UNEXPLAINED, attack_observation, prepare
from gradleak.spec import RunSpec, parse
from gradleak.targets import fault

#: The attack of an audit that has to be quick: under a minute for a small convolutional network on two cores.
QUICK: Mapping[str, Any] = MappingProxyType({"name": "cinet", "rounds": 300})

#: The largest cosine distance between the observed update and the truth's at which truth and settings are believed, beside what
#: rounded weights leave. Where all was true it was 2e-6 at most; other images left 1.6e-4 in a sigmoid network, and 0.03 to 0.5
#: in others.
REPRODUCED = 1e-4


@dataclass(frozen=True)
class Leak:
    """What an attack of a given size rebuilt from one update. A stronger attack, or a longer one, may rebuild more.

    Attributes:
        score: SSIM of the image that was rebuilt best, in [0, 1]: the largest of ``per_image``.
        per_image: For each of the client's images the SSIM with the reconstruction that is most like it.
        recognisable: How many of them reach :data:`gradleak.evaluate.RECOGNISABLE_SSIM`.
        baseline: The score of a plain grey image: what is reached without any update.
        threshold: The largest score that is let pass.
        truth_distance: One minus the cosine between the observed update and what the truth would send by the settings, in
            [0, 2]: near 0 where all that was said of the client is true.
        reconstruction: The rebuilt images, the labels that were used, the matching loss, rounds and seconds.
        doubt: Why the score says nothing; empty where the truth reproduces the update to :data:`REPRODUCED` and
            rounding, or where it cannot be expected to: the client draws its batches, or defends its update.
        unexplained: Whether the attack failed to fit an undefended update: the cosine distance that it reached is above
            :data:`gradleak.run.UNEXPLAINED`.
    """

    score: float
    per_image: tuple[float, ...]
    recognisable: int
    baseline: float
    threshold: float
    truth_distance: float
    reconstruction: Reconstruction
    doubt: str = ""
    unexplained: bool = False

    @property
    def exceeded(self) -> bool:
        """Whether the score is above the threshold."""
        return self.score > self.threshold

    @property
    def inconclusive(self) -> bool:
        """Whether the score is low only because the attack failed: that is no pass."""
        return self.unexplained and not self.exceeded

    @property
    def verdict(self) -> str:
        """A sentence or two for people; they name no image."""
        found = (
            f"{self.recognisable} of {len(self.per_image)} images recognisable (SSIM >= {RECOGNISABLE_SSIM:.2f}) after "
            f"{self.reconstruction.rounds} rounds; a plain grey image scores {self.baseline:.2f}"
            f"{', more than what was rebuilt' if self.score < self.baseline else ''}."
        )
        score = f"eak score {self.score:.2f}, threshold {self.threshold:.2f}: {found}"
        if self.exceeded:
            doubt = f" But {self.doubt}." if self.doubt else ""
            return f"Leak score {self.score:.2f} exceeds the threshold {self.threshold:.2f}: {found}{doubt}"
        if self.doubt:
            return f"Not auditable: {self.doubt}. L{score}"
        if self.inconclusive:
            away = _cosine_left(self.reconstruction)
            return (
                f"Inconclusive: the attack did not fit the update (cosine distance {away or 0:.2g}), so a low score proves "
                f"little; l{score}"
            )
        return f"Leak score {self.score:.2f} does not exceed the threshold {self.threshold:.2f}: {found}"

    def to_dict(self) -> dict[str, Any]:
        """Numbers and the verdict as JSON holds them; no image, no label and no name."""
        return {
            "score": self.score,
            "threshold": self.threshold,
            "exceeded": self.exceeded,
            "inconclusive": self.inconclusive,
            "doubt": self.doubt,
            "recognisable": self.recognisable,
            "per_image": list(self.per_image),
            "baseline": self.baseline,
            "truth_distance": self.truth_distance,
            "matching_loss": self.reconstruction.matching_loss,
            "rounds": self.reconstruction.rounds,
            "seconds": round(self.reconstruction.seconds, 3),
            "verdict": self.verdict,
        }


@mixed.full_float32()
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

    Beside it stands the cosine distance of the observed update from A(x*, y*), what the truth would send by the observation's
    own account of the client: where that is large, truth or settings are wrong, and :attr:`Leak.doubt` says so.

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
            window; its labels do not go with the model's output; or the threshold is outside [0, 1].
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
    rule = labels or ("known" if observation.labels is not None else "auto")
    spec = specification(
        attack=attack, labels=rule, threshold=threshold, seed=seed, device=device, memory_limit_mb=memory_limit_mb
    )
    recipe, where = prepare(spec)
    away = _truth_distance(observation, model, truth)
    rebuilt = attack_observation(observation, model, recipe, spec, where, progress=False)
    per_image = _best_ssim(rebuilt.images, truth.images)
    defended = bool(observation.defences) or observation.protocol.transport is not None
    return Leak(
        score=_score(per_image),
        per_image=tuple(per_image.tolist()),
        recognisable=int((per_image >= RECOGNISABLE_SSIM).sum()),
        baseline=_score(_best_ssim(torch.full_like(truth.images[:1], 0.5), truth.images)),
        threshold=threshold,
        truth_distance=away,
        reconstruction=rebuilt,
        doubt=""
        if away <= max(REPRODUCED, _rounding(observation, model)) or defended or _draws(observation)
        else "the truth and the settings given (model, client, mean, std) do not reproduce this update (distance "
        f"{away:.2g}): the score says nothing",
        unexplained=not defended
        and getattr(recipe, "distance", None) in ("cosine", "whitened")
        and (_cosine_left(rebuilt) or 0.0) > UNEXPLAINED,
    )


def specification(
    *,
    attack: Mapping[str, Any] = QUICK,
    labels: str | None = None,
    threshold: float = RECOGNISABLE_SSIM,
    seed: int = 0,
    device: str = "auto",
    memory_limit_mb: float | None = None,
) -> RunSpec:
    """The keywords of :func:`measure_leak`, checked, as a specification.

    Raises:
        DataError: The threshold is outside [0, 1].
        SpecError: The attack is no table with a name, or a setting has another type.
    """
    if not isinstance(attack, Mapping) or "name" not in attack:
        raise SpecError(f'attack is {attack!r}; expected its name and settings, as {{"name": "cinet", "rounds": 300}}')
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise DataError(f"threshold is {threshold!r}; expected an SSIM in [0, 1]")
    table = {"attack": dict(attack), "seed": seed, "device": device, "memory_limit_mb": memory_limit_mb}
    return parse({**table, "labels": {"rule": labels or "auto"}}, where="audit")


def _cosine_left(rebuilt: Reconstruction) -> float | None:
    """The cosine distance of the reconstruction's update, where the attack's distance is that or a whitened one."""
    left: float | None = rebuilt.notes.get("cosine_distance", rebuilt.matching_loss)
    return left


def _truth_distance(observation: Observation, model: nn.Module, truth: Truth) -> float:
    r""":math:`1 - \cos(A(x^*, y^*), g^*)`: how far the truth is from explaining the update. Nothing is drawn."""
    client = operator(observation, model)
    weight = next(iter(client.weights.values()))
    images, labels = truth.images.to(weight), truth.labels.to(weight.device)
    with torch.no_grad():
        output = client.outputs(images[:1].repeat(2, 1, 1, 1))
    if bad := fault(client.loss_name, labels, output):
        raise DataError(f"the truth does not go with the model: {bad}")
    computed = client(images, labels)
    value, _ = DISTANCES["cosine"](computed, {name: t.to(weight.device) for name, t in observation.update.items()})
    return value


def _rounding(observation: Observation, model: nn.Module) -> float:
    r"""What float32 weights whose difference is the update may leave of cosine distance: :math:`\tfrac12 (2 r)^2`.

    r is the expected norm of the rounding errors, half a spacing at most each, relative to the update's.
    """
    own = {**dict(model.named_parameters()), **observation.weights}
    rounded = norm({name: own[name].detach() for name in observation.update}) * torch.finfo(torch.float32).eps / 12**0.5
    return 2 * (rounded / max(norm(observation.update), 1e-30)) ** 2


def _draws(observation: Observation) -> bool:
    """Whether the update depends on an order that the client drew: with one batch of all images it does not."""
    protocol = observation.protocol
    return protocol.order == "shuffled" and protocol.local_batch is not None and protocol.local_batch < observation.batch


def _best_ssim(reconstruction: Tensor, originals: Tensor) -> Tensor:
    """For each original the SSIM of the reconstruction that is most like it."""
    x, y = (images.detach().to("cpu", torch.float32).clamp(0, 1) for images in (reconstruction, originals))
    return many_to_one(y, x, metrics.ssim)


def _score(per_image: Tensor) -> float:
    return float(per_image.max().clamp(0, 1))
