"""What is expected of photographs beside the update: scalars that are added to the matching loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from gradleak.errors import ObservationError
from gradleak.matching import assign
from gradleak.protocols import ClientOperator

#: Pixels of the longer side of a photograph without its fine structure (:func:`coarse`).
COARSE = 32

Statistics = Mapping[str, tuple[Tensor, Tensor]]
"""Batch-norm layer -> mean and biased variance of what it is given, one number per channel."""


def total_variation(images: Tensor) -> Tensor:
    r"""Anisotropic total variation: the mean absolute difference of neighbours, across plus down.

    :math:`\mathrm{TV}(x) = \overline{|x_{h, w+1} - x_{h, w}|} + \overline{|x_{h+1, w} - x_{h, w}|}`, means over images,
    channels and pairs, as Geiping et al. (2020) compute it. :math:`\mathrm{TV}(a x + b) = |a|\, \mathrm{TV}(x)`.

    Args:
        images: B x C x H x W, H and W at least 2; any range.

    Returns:
        A scalar, in [0, 2] for images in [0, 1]; 0 for constant images.
    """
    return images.diff(dim=3).abs().mean() + images.diff(dim=2).abs().mean()


def coarse(images: Tensor) -> Tensor:
    """Means over squares of k x k pixels; k brings the longer side to about :data:`COARSE`, and is 2 at least.

    Args:
        images: B x C x H x W. A rest of H or W is left out. Images of less than four pixels a side stay as they are.
    """
    height, width = images.shape[-2:]
    k = min(max(2, round(max(height, width) / COARSE)), min(height, width) // 2)
    return avg_pool2d(images, k) if k > 1 else images


@torch.no_grad()
def smoothed(images: Tensor, *, weight: float, steps: int = 60) -> Tensor:
    r"""The images without what is more likely noise than edges.

    .. math:: \arg\min_y \; \tfrac12 \|y - x\|^2 + \lambda \sum |\nabla y|,

    with :math:`|\nabla y|` the length of the differences across and down, each channel by itself; by Chambolle's fixed point
    (2004, eq. 9) on the dual field p, :math:`y = x - \lambda\, \mathrm{div}\, p`. It keeps each channel's mean.

    Args:
        images: x, B x C x H x W.
        weight: lambda, in units of the values.
        steps: Of the fixed point, with step 1/4.
    """
    down, across = torch.zeros_like(images), torch.zeros_like(images)

    def divergence() -> Tensor:
        found = down + across
        found[..., 1:, :] -= down[..., :-1, :]
        found[..., 1:] -= across[..., :-1]
        return found

    for _ in range(steps):
        residual = divergence() - images / weight
        # the last row of ``down`` and column of ``across`` stay zero: no neighbour
        d, a = torch.zeros_like(down), torch.zeros_like(across)
        d[..., :-1, :], a[..., :-1] = residual.diff(dim=-2), residual.diff(dim=-1)
        scale = 1 + 0.25 * (d.square() + a.square()).sqrt()
        down, across = (down + 0.25 * d) / scale, (across + 0.25 * a) / scale
    return images - weight * divergence()


def squared_norm(images: Tensor) -> Tensor:
    r"""Mean over the images of :math:`\|x_i\|^2`, the sum over an image's values: the l2 prior of Yin et al. (2021).

    Args:
        images: B x C x H x W.
    """
    return images.square().sum() / len(images)


def batch_norm_statistics(client: ClientOperator, images: Tensor, target: Statistics) -> Tensor:
    r"""How far the images' batch statistics are from the client's.

    :math:`\sum_l \|\mu_l(x) - \mu_l^*\| + \sum_l \|\sigma_l^2(x) - \sigma_l^{2*}\|`  (Yin et al. 2021, R_BN). It takes
    one more forward pass of F.

    Args:
        client: The operator A.
        images: B x C x H x W, the images of one member.
        target: The client's statistics (:meth:`gradleak.protocols.ClientOperator.batch_statistics`) of the layers to match.

    Returns:
        A scalar; 0 for the client's own batch.

    Raises:
        ObservationError: F has no such batch-norm layer, or it has another number of channels.
    """
    found = client.batch_statistics(images)
    terms = []
    for name, wanted in target.items():
        if name not in found or found[name][0].shape != wanted[0].shape:
            has = f"it has {len(found[name][0])} channels" if name in found else "there is no such batch-norm layer"
            raise ObservationError(
                f"batch statistics of {name!r} are granted for {len(wanted[0])} channels, and in the model {has}; "
                "is it another model?"
            )
        terms += [torch.linalg.vector_norm(h - t.to(h)) for h, t in zip(found[name], wanted, strict=True)]
    return torch.stack(terms).sum()


def group_consistency(images: Tensor, labels: Tensor) -> Tensor:
    r"""How far the members of a group, which started from different seeds, are from the image they agree on.

    .. math:: \frac1B \sum_{g=1}^{G} \sum_{i=1}^{B} \|x_{g, \pi_g(i)} - \bar x_i\|^2, \qquad
              \bar x_i = \frac1G \sum_g x_{g, \pi_g(i)},

    after the group consistency of Yin et al. (2021). Where the authors register the members' images to one
    another (RANSAC-flow), :math:`\pi_g` here is the one-to-one assignment of a member's images to the first member's of
    least squared distance: images of one label may come in any order, and those of different labels never trade places.

    Args:
        images: (G B) x C x H x W, member after member; finite.
        labels: B, the labels of one member's images.

    Returns:
        A scalar; 0 when all members agree.

    Raises:
        DataError: A value of images with repeated labels is not finite.
    """
    members = images.split(len(labels))
    aligned = torch.stack([members[0], *(member[_order(member, members[0], labels)] for member in members[1:])])
    return (aligned - aligned.mean(0)).square().sum() / len(labels)


def _order(member: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    """Indices that put a member's images in the order of the reference's."""
    order = torch.arange(len(labels), device=labels.device)
    values, counts = labels.unique(return_counts=True)
    for label in values[counts > 1]:
        rows = (labels == label).nonzero().flatten()
        order[rows] = rows[assign(member.detach()[rows], reference.detach()[rows]).to(rows.device)]
    return order
