"""Muon: momentum of which all singular values are made one, for the weights of a generator (Jordan et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

#: Of a step x -> (a + b x^2 + c x^4) x of singular values: five bring all above .002 near one (Jordan et al. 2024).
COEFFICIENTS = 3.4445, -4.7750, 2.0315
STEPS = 5

#: Root mean square of a weight's step over eta: about that of Adam (Liu et al. 2025), so that both have the same rates.
ROOT_MEAN_SQUARE = 0.2


class Muon(torch.optim.Optimizer):
    r""":math:`m \leftarrow \beta m + g / \|g\|, \quad W \leftarrow W - \tfrac15 \eta \sqrt{\max(o, k)}\, U V^\top` with
    :math:`m = U \Sigma V^\top` as a matrix of o rows, one for each output, and k columns.

    Every direction of a layer moves as far as any other, however small its share of the gradient; a sign does that for single
    numbers only. Gradients are normalised before they are averaged, layer by layer, since a matching loss falls by orders of
    magnitude: the last ones would else weigh next to nothing beside those of ten rounds before. Parameters of one dimension
    are stepped as by Adam on signs: by the mean sign of their gradients. ``torch.optim.Muon`` takes matrices alone, does not
    normalise, and iterates in bfloat16, which most processors are slow in.

    Args:
        parameters: Tensors of one group.
        lr: eta.
        momentum: beta, of both means.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        """Evaluate at the present point, then move; the value of ``closure``, which sets the gradients."""
        with torch.enable_grad():
            loss = closure()
        (group,) = self.param_groups
        eta, beta = group["lr"], group["momentum"]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state.update(mean=torch.zeros_like(p), steps=0)
            mean, state["steps"] = state["mean"], state["steps"] + 1
            if p.ndim < 2:
                mean.lerp_(p.grad.sign(), 1 - beta)
                p.sub_(mean, alpha=eta / (1 - beta ** state["steps"]))
            else:
                mean.mul_(beta).add_(normalised(p.grad))
                move = orthogonal(mean.flatten(1))
                p.sub_(move.view_as(p), alpha=ROOT_MEAN_SQUARE * eta * math.sqrt(max(move.shape)))
        return loss


def orthogonal(matrix: Tensor) -> Tensor:
    r""":math:`U V^\top` of :math:`U \Sigma V^\top`, with singular values of .7 to 1.2 in place of ones; zero of zero."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = normalised(matrix.T if tall else matrix)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def normalised(tensor: Tensor) -> Tensor:
    """The tensor over its Euclidean norm; zero of zero."""
    return tensor / tensor.norm().clamp_min(torch.finfo(tensor.dtype).tiny)
