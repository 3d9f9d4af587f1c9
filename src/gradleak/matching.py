"""Which reconstruction is compared with which original: the update does not depend on the order of the images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from gradleak.errors import DataError


def assign(reconstruction: Tensor, truth: Tensor) -> Tensor:
    r"""The one-to-one assignment of least total mean squared error (the Hungarian problem, scipy's solver).

    :math:`\pi^* = \arg\min_\pi \sum_i \|x_{\pi(i)} - x^*_i\|^2`

    Args:
        reconstruction: B x C x H x W, finite; any range and device.
        truth: The same shape.

    Returns:
        B indices (int64, CPU): ``reconstruction[assign(reconstruction, truth)]`` stands in the order of ``truth``.

    Raises:
        DataError: Shapes differ, or a value is not finite.
    """
    if reconstruction.shape != truth.shape or truth.ndim != 4 or truth.numel() == 0:
        raise DataError(
            "a one-to-one assignment needs as many reconstructions as originals, all of one shape; "
            f"found {tuple(reconstruction.shape)} and {tuple(truth.shape)}"
        )
    cost = squared_distances(truth, reconstruction)
    if not cost.isfinite().all():
        raise DataError("images that hold NaN or infinite values cannot be assigned")
    return torch.as_tensor(linear_sum_assignment(cost.numpy())[1], dtype=torch.int64)


def many_to_one(
    reconstruction: Tensor,
    truth: Tensor,
    metric: Callable[[Tensor, Tensor], Tensor],
    *,
    higher_is_better: bool = True,
) -> Tensor:
    r"""The score of CI-Net's reference code: each reconstruction beside the original it resembles most.

    :math:`s_j = \max_i \mathrm{metric}(x_j, x^*_i)`, separately for every metric

    Several reconstructions may take one original and others may go unclaimed, so it is never worse than a one-to-one
    score, and B copies of one good reconstruction are perfect by it. It takes B times as many comparisons.

    Args:
        reconstruction: B x C x H x W, as ``metric`` wants it.
        truth: Any number of originals of the same C x H x W.
        metric: Pairs of images to one number each, such as :func:`gradleak.metrics.ssim`.
        higher_is_better: ``False`` for distances.

    Returns:
        B numbers, in the order of ``reconstruction``.
    """
    scores = torch.stack([metric(reconstruction, original.expand_as(reconstruction)) for original in truth])
    return scores.amax(dim=0) if higher_is_better else scores.amin(dim=0)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    r""":math:`\|a_i - b_j\|^2` as :math:`\|a_i\|^2 + \|b_j\|^2 - 2 \langle a_i, b_j \rangle`: one matrix product.

    Args:
        a: B x C x H x W.
        b: N x C x H x W.

    Returns:
        B x N, float64, on the CPU.
    """
    # float64, since the three terms nearly cancel for close images
    a, b = (images.detach().cpu().double().flatten(1) for images in (a, b))
    return a.square().sum(1)[:, None] + b.square().sum(1)[None, :] - 2 * a @ b.T
