"""How close reconstructions are to the private batch: assign one to one, score, summarise. No attack imports this."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gradleak import metrics
from gradleak.errors import DataError, GradleakError
from gradleak.matching import assign, many_to_one
from gradleak.observation import Truth

#: An image counts as recognisable from this SSIM on. A convention that makes one sentence possible, not a finding:
#: people recognise some images below it, and not every detail above it. Report the SSIM beside it.
RECOGNISABLE_SSIM = 0.60

#: Metrics that grow with the error; the others fall.
DISTANCES = ("lpips", "mse")


@dataclass(frozen=True)
class Evaluation:
    """The scores of one batch of reconstructions; images are in the order of the truth.

    Attributes:
        assignment: Entry i is the index of the reconstruction that is compared with original i.
        per_image: ``psnr`` (dB), ``ssim``, ``fsim``, ``lpips``, ``mse`` -> one number per original, or ``None`` for
            each where the metric cannot be computed (``notes`` says why).
        summary: Metric -> ``mean``, ``median``, ``worst`` (the smallest of psnr, ssim, fsim; the largest of lpips,
            mse) and ``std`` over the images (the population's: 0 for one image).
        many_to_one: Mean ``psnr`` and ``ssim`` by the reference code's score (:func:`gradleak.matching.many_to_one`),
            to compare with figures published so, and for nothing else.
        notes: Metric -> why it is missing.
        assigned_by: What the assignment minimises.
        label_matches: How many reconstructions are compared with an original of the label the attack gave them;
            ``None`` without the attack's labels.
        names: One name per original, or empty.
    """

    assignment: list[int]
    per_image: dict[str, list[float | None]]
    summary: dict[str, dict[str, float | None]]
    many_to_one: dict[str, float | None]
    notes: dict[str, str]
    assigned_by: str = "mse"
    label_matches: int | None = None
    names: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, finite numbers and ``None``, as JSON holds them."""
        return {**asdict(self), "names": list(self.names)}


def evaluate(images: Tensor, truth: Truth, *, labels: Tensor | None = None, lpips: str = "auto") -> Evaluation:
    """Score a reconstruction: clamp to [0, 1], assign one to one by mean squared error, then every metric.

    All of it on the CPU in float32 and more, so that a score does not depend on the machine. A metric that cannot be
    computed (no LPIPS backbone, images too small, a number of channels it is not defined for) is ``None`` with a note.

    Args:
        images: The reconstruction, B x C x H x W, finite.
        truth: The client's batch, in [0, 1].
        labels: B labels, the attack's for each reconstruction.
        lpips: Where VGG-16 comes from; see :func:`gradleak.metrics.load_lpips`.

    Raises:
        DataError: Another number or shape of images than the truth's, a value that is not finite, or a truth outside
            [0, 1].
    """
    x, y = _reconstruction(images, truth), _originals(truth)
    order = assign(x, y)
    per_image, notes = _score(x[order], y, lpips)
    return Evaluation(
        assignment=order.tolist(),
        per_image=per_image,
        summary={name: _summary(name, values) for name, values in per_image.items()},
        many_to_one={
            name: None if name in notes else float(many_to_one(x, y, metric).mean())
            for name, metric in (("psnr", metrics.psnr), ("ssim", metrics.ssim))
        },
        notes=notes,
        label_matches=None if labels is None else _label_matches(labels, truth, order),
        names=truth.names,
    )


def quality_over_rounds(snapshots: Tensor, truth: Truth) -> dict[str, list[float | None]]:
    """Mean ``psnr`` and ``ssim`` of each snapshot of an attack, each with its own assignment.

    Args:
        snapshots: S x B x C x H x W, finite.
        truth: The client's batch, in [0, 1].

    Returns:
        Two lists of S numbers; ``ssim`` holds ``None`` where images are smaller than its window.

    Raises:
        DataError: As :func:`evaluate`.
    """
    if snapshots.ndim != 5:
        raise DataError(f"snapshots have shape {tuple(snapshots.shape)}; expected (snapshots, *images.shape)")
    y = _originals(truth)
    curves: dict[str, list[float | None]] = {"psnr": [], "ssim": []}
    has_ssim = min(y.shape[2:]) >= metrics.SSIM_WINDOW
    for number, snapshot in enumerate(snapshots):
        x = _reconstruction(snapshot, truth, name=f"snapshot {number}")
        x = x[assign(x, y)]
        curves["psnr"].append(float(metrics.psnr(x, y).mean()))
        curves["ssim"].append(float(metrics.ssim(x, y).mean()) if has_ssim else None)
    return curves


def mean_image_control(truth: Truth, *, lpips: str = "auto") -> Evaluation:
    """The control without an attack: the mean image of the batch, guessed for every original.

    An oracle: no server knows the mean of a private batch. No single image has a smaller squared error, so an attack
    that does not clearly beat this one has told little about the individual images.
    """
    images = _originals(truth)
    return evaluate(images.mean(dim=0).expand_as(images), truth, lpips=lpips)


def recognisable(evaluation: Evaluation, *, threshold_ssim: float = RECOGNISABLE_SSIM) -> int | None:
    """How many images reach the SSIM of :data:`RECOGNISABLE_SSIM`; ``None`` where SSIM cannot be computed."""
    scores = _ssim(evaluation)
    return sum(score >= threshold_ssim for score in scores) if scores else None


def verdict(evaluation: Evaluation, *, threshold_ssim: float = RECOGNISABLE_SSIM) -> str:
    """One sentence for people: how many images are recognisable, and the closest and the least close of them."""
    scores = _ssim(evaluation)
    if not scores:
        return f"SSIM cannot be computed ({evaluation.notes['ssim']}); the mean PSNR is {_mean_psnr(evaluation)}."
    rule = f"SSIM >= {threshold_ssim:.2f}"
    if len(scores) == 1:
        found = "is" if scores[0] >= threshold_ssim else "is not"
        return f"The image {found} recognisable ({rule}): SSIM {scores[0]:.2f}, PSNR {_mean_psnr(evaluation)}."
    count = recognisable(evaluation, threshold_ssim=threshold_ssim)
    order = sorted(range(len(scores)), key=scores.__getitem__)
    closest, least = (f"{_name(evaluation, i)} (SSIM {scores[i]:.2f})" for i in (order[-1], order[0]))
    return (
        f"{count} of {len(scores)} images {'is' if count == 1 else 'are'} recognisable ({rule}); "
        f"the closest is {closest}, the least close {least}."
    )


def _reconstruction(images: Tensor, truth: Truth, *, name: str = "the reconstruction") -> Tensor:
    if images.shape != truth.images.shape:
        raise DataError(
            f"{name} has shape {tuple(images.shape)}, the truth {tuple(truth.images.shape)}; "
            "they must hold the same number of images of the same size"
        )
    images = images.detach().to("cpu", torch.float32)
    bad = (~images.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise DataError(f"{name} holds NaN or infinite values in {len(bad)} of {len(images)} images (first: {bad[0]})")
    return images.clamp(0, 1)


def _originals(truth: Truth) -> Tensor:
    images = truth.images.detach().to("cpu", torch.float32)
    if images.ndim != 4 or images.numel() == 0 or not (images.min() >= 0 and images.max() <= 1):
        raise DataError(
            f"the truth must be images (B, C, H, W) with values in [0, 1]; found shape {tuple(images.shape)}"
            + (f", values from {float(images.min()):g} to {float(images.max()):g}" if images.numel() else "")
        )
    return images


def _score(x: Tensor, y: Tensor, lpips: str) -> tuple[dict[str, list[float | None]], dict[str, str]]:
    """Every metric of ``x[i]`` against ``y[i]``, and why some are missing."""
    table: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "psnr": metrics.psnr,
        "ssim": metrics.ssim,
        "fsim": metrics.fsim,
        "lpips": lambda x, y: metrics.lpips(x, y, metrics.load_lpips(lpips)),
        "mse": metrics.mse,
    }
    per_image: dict[str, list[float | None]] = {}
    notes = {}
    for name, metric in table.items():
        try:
            per_image[name] = metric(x, y).tolist()
        except GradleakError as reason:  # ranges and shapes were checked: what is left is size, channels, backbone
            per_image[name] = [None] * len(y)
            notes[name] = str(reason)
    return per_image, notes


def _summary(name: str, values: list[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    if not known:
        return dict.fromkeys(("mean", "median", "worst", "std"))
    return {
        "mean": statistics.fmean(known),
        "median": statistics.median(known),
        "worst": max(known) if name in DISTANCES else min(known),
        "std": statistics.pstdev(known),
    }


def _label_matches(labels: Tensor, truth: Truth, order: Tensor) -> int:
    if labels.shape != truth.labels.shape:
        raise DataError(f"labels have shape {tuple(labels.shape)}, the truth's {tuple(truth.labels.shape)}")
    return int((labels.cpu()[order] == truth.labels.cpu()).sum())


def _ssim(evaluation: Evaluation) -> list[float]:
    return [score for score in evaluation.per_image["ssim"] if score is not None]


def _mean_psnr(evaluation: Evaluation) -> str:
    return f"{evaluation.summary['psnr']['mean']:.1f} dB"


def _name(evaluation: Evaluation, index: int) -> str:
    return evaluation.names[index] if evaluation.names else f"image {index}"
