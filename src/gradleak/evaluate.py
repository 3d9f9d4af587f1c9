"""How close reconstructions are to the private batch: assign one to one, score, summarise. No attack imports this."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gradleak import metrics
from gradleak.errors import DataError, GradleakError
from gradleak.matching import assign, many_to_one, squared_distances
from gradleak.observation import Truth
from gradleak.targets import are_classes

#: An image counts as recognisable from this SSIM on. A convention that makes one sentence possible, not a finding:
#: people recognise some images below it, and not every detail above it. Report the SSIM beside it.
RECOGNISABLE_SSIM = 0.60

#: An attack's mean SSIM must be this much above that of the random-noise gradient, or its images may be its prior's alone.
#: A convention as well: means over a batch differ by about .05 from seed to seed.
CLEARLY_ABOVE_SSIM = 0.10

#: Below this relative change of the update between two batches of random images it does not depend on the images
#: (:func:`gradleak.invariance.image_sensitivity`): what is left is round-off.
IMAGE_BLIND = 1e-6

#: Values (reconstructions x candidates x C x H x W) up to which candidates are also ranked by SSIM: some seconds.
MAX_RANKED_VALUES = 2**25

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
        labels: B x ..., the labels or targets that the attack has for each reconstruction.
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


@dataclass(frozen=True)
class Identification:
    """Whether the true image is the nearest among N candidates.

    Attributes:
        candidates: N, the originals and the decoys.
        ranks: Metric (``mse``, ``ssim``) -> the rank of each original among the candidates, in the order of the truth: 1 plus
            the number of candidates that are strictly nearer to its reconstruction. ``None`` where it is not computed.
        rate: Metric -> the share of originals of rank 1.
        chance: 1 / N, the rate of a guess that knows nothing.
    """

    candidates: int
    ranks: dict[str, list[int] | None]
    rate: dict[str, float | None]
    chance: float


def identify(images: Tensor, truth: Truth, *, decoys: Tensor | None = None) -> Identification:
    r"""The identification rate: :math:`\frac1B \, |\{i : \mathrm{rank}_i = 1\}|` after the one-to-one assignment.

    .. math:: \mathrm{rank}_i = 1 + |\{c : d(x_{\pi(i)}, c) < d(x_{\pi(i)}, x^*_i)\}|, \qquad
              c \in \{x^*_1, \dots, x^*_B\} \cup \text{decoys}

    with d the mean squared error of the clamped images, nothing subtracted, or 1 - SSIM. A copy of the original among the
    candidates does not count against it. The assignment has looked at the originals, so reconstructions that know nothing
    can come out above 1 / N among the originals; they do not against decoys.

    Args:
        images: The reconstruction, B x C x H x W, finite.
        truth: The client's batch, in [0, 1].
        decoys: Other images that the client might have had, M x C x H x W in [0, 1]; none of them reached the attack.

    Raises:
        DataError: As :func:`evaluate`, or decoys of another size or range.
    """
    x, y = _reconstruction(images, truth), _originals(truth)
    x = x[assign(x, y)]
    others = y[:0] if decoys is None else decoys.detach().to("cpu", torch.float32)
    if others.shape[1:] != y.shape[1:]:
        raise DataError(f"the decoys have shape {tuple(others.shape)}, the truth {tuple(y.shape)}; expected images of one size")
    candidates = torch.cat([y, others])
    errors = squared_distances(x, candidates)
    # one matrix product is quick for any N, and exact up to this: a copy of the original must not count as nearer
    round_off = 1e-12 * x.double().square().sum(dim=(1, 2, 3))[:, None]
    nearer = errors < errors.diagonal()[:, None] - round_off
    ranks: dict[str, list[int] | None] = {"mse": (1 + nearer.sum(1)).tolist(), "ssim": None}
    if len(x) * candidates.numel() <= MAX_RANKED_VALUES and min(y.shape[2:]) >= metrics.SSIM_WINDOW:
        ranks["ssim"] = [_ssim_rank(image, candidates, own=i) for i, image in enumerate(x)]
    return Identification(
        candidates=len(candidates),
        ranks=ranks,
        rate={name: None if rank is None else rank.count(1) / len(rank) for name, rank in ranks.items()},
        chance=1 / len(candidates),
    )


def label_scores(recovered: Tensor, truth: Tensor, *, classes: int | None = None) -> dict[str, float]:
    r"""How many labels an attack used are right; labels have no order, so they are compared as counts.

    With :math:`n_k` images of class k in the batch and :math:`\hat n_k` recovered ones,

    - ``accuracy``: :math:`\sum_k \min(n_k, \hat n_k) / B`, the share of labels recovered (IRec in the code of iLRG),
    - ``classes_found``: of the classes with :math:`n_k > 0`, the share with :math:`\hat n_k > 0`,
    - ``counts_exact``: of the classes with :math:`n_k > 0` or :math:`\hat n_k > 0`, the share with :math:`\hat n_k = n_k`;

    and over all K classes, most of which may be absent and easily right (Ma et al. 2023, for comparison with them),

    - ``existence_accuracy``, LeAcc: the share of classes with :math:`[\hat n_k > 0] = [n_k > 0]`,
    - ``number_accuracy``, LnAcc: the share with :math:`\hat n_k = n_k`.

    Args:
        recovered: B labels, in any order.
        truth: B labels, in any order.
        classes: K; None: the last two are left out.

    Returns:
        Name -> a share in [0, 1].
    """
    length = 1 + max(int(recovered.max()), int(truth.max()), (classes or 0) - 1)
    found, there = (torch.bincount(labels.cpu(), minlength=length) for labels in (recovered, truth))
    named = (found > 0) | (there > 0)
    scores = {
        "accuracy": float(torch.minimum(found, there).sum() / len(truth)),
        "classes_found": float((found[there > 0] > 0).double().mean()),
        "counts_exact": float((found == there)[named].double().mean()),
    }
    if classes is not None:
        scores["existence_accuracy"] = float(((found > 0) == (there > 0)).double().mean())
        scores["number_accuracy"] = float((found == there).double().mean())
    return scores


def target_scores(
    used: Tensor, truth: Tensor, *, classes: int | None = None, assignment: list[int] | None = None
) -> dict[str, float]:
    r"""How right the targets are that an attack used: :func:`label_scores` of classes, else the error of each pair of images.

    Args:
        used: B x ..., the attack's, in the order of its images.
        truth: B x ..., the client's.
        classes: K, where there are classes.
        assignment: Entry i is the reconstruction that is compared with original i; None: the orders are the same.

    Returns:
        Of one class for each image the scores of :func:`label_scores`. Of classes of pixels ``accuracy``, the share that is
        right. Of floats ``mean_absolute_error``.

    Raises:
        DataError: The targets have other shapes.
    """
    truth = _as_classes(truth, used)
    if are_classes(used) and are_classes(truth):
        return label_scores(used, truth, classes=classes)
    if used.shape != truth.shape:
        raise DataError(f"targets have shape {tuple(used.shape)}, the truth's {tuple(truth.shape)}")
    paired = used.cpu() if assignment is None else used.cpu()[assignment]
    if used.is_floating_point() or truth.is_floating_point():
        return {"mean_absolute_error": float((paired.double() - truth.cpu().double()).abs().mean())}
    return {"accuracy": float((paired == truth.cpu()).double().mean())}


def remark(
    mean_ssim: float | None,
    controls: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    image_sensitivity: float | None = None,
    margin_ssim: float = CLEARLY_ABOVE_SSIM,
) -> str:
    """What a verdict must add where the images need not come from the update; ``""`` where they seem to.

    Args:
        mean_ssim: The attack's.
        controls: Control -> metric -> ``mean``, as result.json has them; ``random-noise gradient`` is the one that counts.
        image_sensitivity: How much the update changes with the images (:func:`gradleak.invariance.image_sensitivity`).
        margin_ssim: By how much the attack's mean SSIM must exceed the control's.
    """
    if image_sensitivity is not None and image_sensitivity < IMAGE_BLIND:
        return (
            f"The update does not depend on the images (relative change {image_sensitivity:.1e} from one random batch to "
            "another): nothing that is shown comes from them."
        )
    noise = ((controls or {}).get("random-noise gradient") or {}).get("ssim") or {}
    without = noise.get("mean")
    if mean_ssim is None or without is None or mean_ssim >= without + margin_ssim:
        return ""
    return (
        f"A random-noise gradient does as well (mean SSIM {without:.2f}, this update {mean_ssim:.2f}; a difference of "
        f"{margin_ssim:.2f} is asked for): the images do not come from the gradient but from the attack's prior."
    )


def recognisable(evaluation: Evaluation, *, threshold_ssim: float = RECOGNISABLE_SSIM) -> int | None:
    """How many images reach the SSIM of :data:`RECOGNISABLE_SSIM`; ``None`` where SSIM cannot be computed."""
    scores = _ssim(evaluation)
    return sum(score >= threshold_ssim for score in scores) if scores else None


def verdict(evaluation: Evaluation, *, threshold_ssim: float = RECOGNISABLE_SSIM) -> str:
    """One sentence for people: how many images are recognisable, and the closest and the least close of them."""
    scores = _ssim(evaluation)
    if not scores:
        return f"SSIM cannot be computed ({evaluation.notes['ssim']}); the mean PSNR is {_mean_psnr(evaluation)}."
    rule = f"recognisable to a stranger under these assumptions (SSIM >= {threshold_ssim:.2f})"
    if len(scores) == 1:
        found = "is" if scores[0] >= threshold_ssim else "is not"
        return f"The image {found} {rule}: SSIM {scores[0]:.2f}, PSNR {_mean_psnr(evaluation)}."
    count = recognisable(evaluation, threshold_ssim=threshold_ssim)
    order = sorted(range(len(scores)), key=scores.__getitem__)
    closest, least = (f"{_name(evaluation, i)} (SSIM {scores[i]:.2f})" for i in (order[-1], order[0]))
    return (
        f"{count} of {len(scores)} images {'is' if count == 1 else 'are'} {rule}; "
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


def _ssim_rank(image: Tensor, candidates: Tensor, *, own: int) -> int:
    """The rank of ``candidates[own]`` by its SSIM with ``image``."""
    scores = torch.cat([metrics.ssim(image.expand_as(part), part) for part in candidates.split(64)])
    return 1 + int((scores > scores[own]).sum())


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


def _as_classes(truth: Tensor, used: Tensor) -> Tensor:
    """The client's targets; of soft labels the classes, where the attack used classes."""
    return truth.argmax(1) if are_classes(used) and truth.is_floating_point() and truth.ndim == 2 else truth


def _label_matches(labels: Tensor, truth: Truth, order: Tensor) -> int:
    own = _as_classes(truth.labels, labels)
    if labels.shape != own.shape:
        raise DataError(f"labels have shape {tuple(labels.shape)}, the truth's {tuple(truth.labels.shape)}")
    same = labels.cpu()[order] == own.cpu()
    return int(same.flatten(1).all(1).sum() if same.ndim > 1 else same.sum())


def _ssim(evaluation: Evaluation) -> list[float]:
    return [score for score in evaluation.per_image["ssim"] if score is not None]


def _mean_psnr(evaluation: Evaluation) -> str:
    return f"{evaluation.summary['psnr']['mean']:.1f} dB"


def _name(evaluation: Evaluation, index: int) -> str:
    return evaluation.names[index] if evaluation.names else f"image {index}"
