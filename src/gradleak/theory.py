r"""The paper's propositions and the counting check, as functions to call on one's own model and batch.

They see the truth: they say what a batch's gradient tells, and are no part of an attack.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from gradleak.distance import DISTANCES, DistanceName
from gradleak.errors import DataError
from gradleak.observation import Update
from gradleak.prior import total_variation
from gradleak.protocols import ClientOperator


@dataclass(frozen=True)
class Counting:
    """Equations against unknowns.

    Attributes:
        equations: P(F), scalars in the update.
        unknowns: B C H W.
    """

    equations: int
    unknowns: int

    @property
    def determined(self) -> bool:
        """Whether there are at least as many equations as unknowns: necessary for a unique answer, not sufficient."""
        return self.equations >= self.unknowns

    @property
    def verdict(self) -> str:
        """The same for people."""
        if self.determined:
            return "enough equations for a unique answer; not a guarantee of one"
        return "fewer equations than unknowns: the images cannot be unique"


def counting(client: ClientOperator, batch: int, image_shape: tuple[int, int, int]) -> Counting:
    """P(F) against B C H W  (CI-Net, section 3).

    Args:
        client: The operator A.
        batch: B.
        image_shape: (C, H, W).
    """
    return Counting(equations=client.parameters, unknowns=batch * math.prod(image_shape))


def total_variation_limit(
    client: ClientOperator,
    truth: Tensor,
    labels: Tensor,
    *,
    candidate: Tensor | None = None,
    distance: DistanceName = "squared-l2",
) -> float:
    r"""The weight of total variation beyond which a blank image ranks above the truth  (CI-Net, Proposition 1).

    With :math:`L(x) = D(A(x, y), g^*)` and :math:`L(x^*) = 0`, the penalised loss :math:`L + \lambda\,\mathrm{TV}` of a
    candidate is below that of the truth exactly when :math:`\lambda` exceeds

    .. math:: \lambda^* = \frac{L(\hat x)}{\mathrm{TV}(x^*) - \mathrm{TV}(\hat x)},

    which is :math:`L(\hat x) / \mathrm{TV}(x^*)` for a blank one, whose total variation is zero. TV is that of
    :func:`gradleak.prior.total_variation`, so the weight compares with an attack's ``total_variation``.

    Args:
        client: The operator A.
        truth: x*, B x C x H x W.
        labels: y, B.
        candidate: :math:`\hat x`, the same shape; None: blank, of the batch's mean colour.
        distance: D.

    Returns:
        lambda*, at least 0; infinity where the candidate is not smoother than the truth, so that no weight prefers it.

    Raises:
        DataError: The shapes differ.
    """
    if candidate is None:
        candidate = truth.mean(dim=(0, 2, 3), keepdim=True).expand_as(truth)
    if candidate.shape != truth.shape:
        raise DataError(f"the candidate has shape {tuple(candidate.shape)}, the truth {tuple(truth.shape)}")
    smoother = float(total_variation(truth) - total_variation(candidate))
    if smoother <= 0:
        return math.inf
    return matching_loss(client, candidate, labels, client(truth, labels), distance=distance) / smoother


def softmax_residual(samples: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    r""":math:`P_{jk} = p_{jk} - 1[k = y_j]` with :math:`p_j = \mathrm{softmax}(W^\top x_j)`  (CI-Net, Proposition 2).

    Args:
        samples: X, D x N, one sample a column.
        labels: N, int64.
        weights: W, D x K.

    Returns:
        P, N x K; its rows sum to zero.
    """
    probabilities = (samples.T @ weights).softmax(dim=1)
    return probabilities - one_hot(labels, weights.shape[1]).to(probabilities)


def linear_gradient(samples: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    r"""The gradient of a bias-free softmax classifier: :math:`N \nabla_W L = X P`  (CI-Net, Proposition 2).

    L is the mean cross-entropy. For one sample every column is that sample up to a factor; for more, each column is a
    combination of them: their span is told, they are not.

    Args:
        samples: X, D x N.
        labels: N, int64.
        weights: W, D x K (the transpose of ``torch.nn.Linear``'s).

    Returns:
        D x K.
    """
    return samples @ softmax_residual(samples, labels, weights) / samples.shape[1]


def column_space_residual(gradient: Tensor, samples: Tensor) -> float:
    r"""Share of a gradient outside the span of the samples: :math:`\|(I - X X^+) \nabla W\| / \|\nabla W\|`.

    Args:
        gradient: D x K.
        samples: X, D x N.

    Returns:
        In [0, 1]; 0 for a linear classifier's own samples (Proposition 2), 0 for a zero gradient.
    """
    gradient, samples = gradient.double(), samples.double()
    norm = float(gradient.norm())
    if norm == 0:
        return 0.0
    # the pseudo-inverse and not a QR factorisation: samples may repeat
    outside = gradient - samples @ (torch.linalg.pinv(samples) @ gradient)
    return min(1.0, float(outside.norm()) / norm)


def matching_loss(
    client: ClientOperator, images: Tensor, labels: Tensor, observed: Update, *, distance: DistanceName = "squared-l2"
) -> float:
    r""":math:`D(A(x, y), g^*)`. It is zero exactly on :math:`X_{\mathrm{grad}}`, which is not a single point.

    An attack through a generator can succeed only if the generator's range meets :math:`X_{\mathrm{grad}}` (CI-Net, A.3):
    a range on which this stays above zero holds no image of that update.

    Args:
        client: The operator A.
        images: B x C x H x W.
        labels: B.
        observed: g*, name -> tensor.
        distance: D.
    """
    return DISTANCES[distance](client(images, labels), observed)[0]
