r"""Changes of the images that the update does not see, and what to do about them without the truth.

With batch statistics after a bias-free first convolution, :math:`A(s\,x) = A(x)` for every gain :math:`s > 0`, up to the
batch norm's epsilon: the first convolution's output is divided by its own deviation, and the gradient of its weights has
the factor s of its input and 1/s of that division. A matching loss cannot find the brightness of such a batch.
"""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor

from gradleak.observation import Update
from gradleak.protocols import ClientOperator
from gradleak.sharded import WHOLE, Shard

#: Photographs of a batch reach the end of the range: over random batches of 8 and 16 CIFAR-10 images this quantile of all
#: values is .992 +- .015 and .997 +- .008 (docs/experiments.md), so the gain is known to about one per cent.
BRIGHT_QUANTILE = 0.998

#: Root mean square of photographs' values: .532 +- .031 over random batches of 16 CIFAR-10 images (docs/experiments.md).
NATURAL_RMS = 0.53

#: Largest gain that is set, and one over the smallest: rounds that pull on total variation darken photographs by 1.6 and more.
LARGEST_GAIN = 8.0


def gain_sensitivity(client: ClientOperator, images: Tensor, labels: Tensor, *, gain: float = 0.9) -> float:
    r"""Relative change of the update per relative change of the gain, the median over its tensors.

    .. math:: \operatorname*{median}_k \; \|A_k(s\,x) - A_k(x)\| \,/\, \big((1 - s)\,\|A_k(x)\|\big)

    The median, since the last layer hardly depends on the images at all, and biases before a batch norm are round-off.

    Args:
        client: The operator A.
        images: B x C x H x W.
        labels: B.
        gain: s.

    Returns:
        About 0 where the update does not depend on the gain, of order 1 where it does.
    """
    before, after = client(images, labels), client(gain * images, labels)
    norms = {name: float(t.norm()) for name, t in before.items()}
    changes = [float((after[name] - before[name]).norm()) / norm for name, norm in norms.items() if norm > 0]
    return statistics.median(changes) / (1 - gain) if changes else 0.0


def random_updates(client: ClientOperator, labels: Tensor, image_shape: tuple[int, int, int]) -> tuple[Update, Update]:
    """A of two batches of random images with the same labels, the same two for the same shapes.

    Args:
        client: The operator A.
        labels: B, those of the attack.
        image_shape: (C, H, W).
    """
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.rand(len(labels), *image_shape, generator=generator) for _ in range(2))
    weight = next(iter(client.weights.values()))
    labels = labels.to(weight.device)
    return client(one.to(weight), labels), client(other.to(weight), labels)


def relative_changes(first: Update, second: Update) -> dict[str, float]:
    r""":math:`2 \, \|a_k - b_k\| \,/\, \big(\|a_k\| + \|b_k\|\big)` of each tensor that is not zero, in [0, 2]."""
    sizes = {name: float(t.norm() + second[name].norm()) for name, t in first.items()}
    return {name: 2 * float((second[name] - first[name]).norm()) / size for name, size in sizes.items() if size > 0}


def image_sensitivity(client: ClientOperator, labels: Tensor, image_shape: tuple[int, int, int]) -> float:
    r"""Relative change of the update from one batch of random images to another, the largest over its tensors.

    .. math:: \max_k \; 2 \, \|A_k(x) - A_k(x')\| \,/\, \big(\|A_k(x)\| + \|A_k(x')\|\big)

    Zero for an F whose activations are all dead, say: such an update tells nothing of the images.

    Args: as :func:`random_updates`.

    Returns:
        In [0, 2]; round-off where the update does not depend on the images.
    """
    return max(relative_changes(*random_updates(client, labels, image_shape)).values(), default=0.0)


def hold_gain(images: Tensor, cotangent: Tensor, *, shard: Shard = WHOLE) -> Tensor:
    r"""Add the pull towards photographs' brightness that a client blind to the gain does not exert.

    .. math:: c + \|c\| \, \log\!\big(\mathrm{rms}(x) / \rho\big)\, x / \|x\|, \qquad \rho = 0.53

    :math:`A(s\,x) = A(x)` makes :math:`\langle c, x \rangle = 0` for every cotangent c of the matching loss: the gain drifts
    with the noise of the steps, until bright pixels end at the limit of the output range. The added term lies in just
    that direction, so it takes nothing from the fit.

    Args:
        images: x, B x C x H x W.
        cotangent: c, of the same shape.
        shard: Which of the images these are; norms are those of all.
    """
    images = images.detach()
    norm = shard.norm(images)
    rms = norm / math.sqrt(images.numel() / shard.share)
    if norm == 0:
        return cotangent
    return cotangent + (shard.norm(cotangent) * math.log(rms / NATURAL_RMS) / norm) * images


def bright_gain(images: Tensor) -> float:
    """The gain that puts the :data:`BRIGHT_QUANTILE` of all values at 1, where photographs' brightest values are.

    Returns:
        s in [1/8, 8]; 1 for images without a bright value.
    """
    # kthvalue, not quantile: the latter refuses tensors of more than 2^24 elements
    values = images.detach().float().flatten()
    k = max(1, min(len(values), round(BRIGHT_QUANTILE * len(values))))
    bright = float(values.kthvalue(k).values)
    return min(LARGEST_GAIN, max(1 / LARGEST_GAIN, 1 / bright)) if bright > 0 else 1.0
