"""Distances between two updates, each as its value and its cotangent with respect to the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from gradleak.observation import Update

Distance = Callable[[Update, Update], tuple[float, Update]]
DistanceName = Literal["cosine", "squared-l2"]


def squared_l2(update: Update, observed: Update) -> tuple[float, Update]:
    r"""Squared distance and its cotangent.

    :math:`D(g, g^*) = \|g - g^*\|^2`, :math:`\partial D / \partial g = 2 (g - g^*)`  (CI-Net, Eq. 2)

    Args:
        update: What the current images would have sent, name -> tensor.
        observed: What the client sent; its names select what is compared.

    Returns:
        The distance, and its cotangent (names of ``observed``).
    """
    residual = {name: update[name] - target for name, target in observed.items()}
    return norm(residual) ** 2, {name: 2 * r for name, r in residual.items()}


def cosine(update: Update, observed: Update) -> tuple[float, Update]:
    r"""One minus the cosine of the angle between two updates, all parameters as one vector, and its cotangent.

    :math:`D(g, g^*) = 1 - \langle g, g^* \rangle / (\|g\| \|g^*\|)`  (CI-Net, Eq. 3). With the unit vectors
    :math:`u = g / \|g\|`, :math:`v = g^* / \|g^*\|` and :math:`e = v - u` it is computed as

    .. math:: D = \tfrac12 \|e\|^2, \qquad \partial D / \partial g = -\big(e + \tfrac12 \|e\|^2 u\big) / \|g\|,

    which is the same, and keeps its digits where ``1 - cos`` in float32 has none left (below 6e-8).

    Returns:
        The distance in [0, 2], and its cotangent (names of ``observed``). A zero update is at distance 1 from everything.
    """
    size, observed_size = norm({name: update[name] for name in observed}), norm(observed)
    if size == 0 or observed_size == 0:
        return 1.0, {name: torch.zeros_like(target) for name, target in observed.items()}
    u, v = [update[name] for name in observed], list(observed.values())
    # in place where it can be: tensors of the update's size cost more to allocate than to compute
    error = torch._foreach_mul(v, 1 / observed_size)
    torch._foreach_add_(error, u, alpha=-1 / size)
    value = norm(dict(zip(observed, error, strict=True))) ** 2 / 2
    torch._foreach_add_(error, u, alpha=value / size)
    torch._foreach_mul_(error, -1 / size)
    return value, dict(zip(observed, error, strict=True))


DISTANCES: dict[str, Distance] = {"cosine": cosine, "squared-l2": squared_l2}


def norm(update: Update) -> float:
    """Euclidean norm of an update, all tensors as one vector; also where squares leave the range of float32."""
    tensors = list(update.values())
    size = float(torch.stack([torch.linalg.vector_norm(t) for t in tensors]).double().norm())
    if 1e-15 < size < 1e15:
        return size
    return float(torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]).norm())
