"""L-BFGS with one evaluation a step: each evaluation either is accepted or shortens the last step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

#: A step that does not lower the loss is shortened by this factor, ...
SHORTER = 0.3

#: ... and where it is shorter than this share of the direction, the history is forgotten.
SHORTEST = 0.05

#: First step, along the gradient, as a share of the longest one.
FIRST = 0.25

#: Pairs without so much curvature, relative to their lengths, are not kept.
CURVATURE = 1e-10


class LBFGS(torch.optim.Optimizer):
    r""":math:`p \leftarrow p - t H \nabla L(p)`, H from the last pairs :math:`s_k = \Delta p, y_k = \Delta \nabla L`
    (Nocedal & Wright 2006, algorithm 7.4), :math:`H_0 = \langle s, y \rangle / \|y\|^2`.

    ``torch.optim.LBFGS`` evaluates several times in a step, or moves without looking whether the loss fell. Here a step is
    one evaluation: if it lowered the loss, the point is accepted and the next direction taken; if not, the next point lies
    closer to the last accepted one.

    Args:
        parameters: Tensors of one group.
        lr: Longest step, as the root mean square over all elements.
        history: Pairs that are kept.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, history: int = 60) -> None:
        super().__init__(list(parameters), {"lr": lr, "history": history})

    @torch.no_grad()
    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        """Evaluate at the present point, then move; the value of ``closure``, which sets the gradients."""
        with torch.enable_grad():
            loss = float(closure())
        (group,) = self.param_groups
        parameters: list[nn.Parameter] = group["params"]
        state = self.state[parameters[0]]
        p = torch.cat([q.detach().flatten() for q in parameters])
        gradient = torch.cat([(torch.zeros_like(q) if q.grad is None else q.grad).flatten() for q in parameters])
        if not state:
            state.update(s=[], y=[], first=FIRST)
            self._accept(state, loss, p, gradient, group)
        elif loss < state["loss"]:
            s, y = p - state["p"], gradient - state["gradient"]
            if float(s @ y) > CURVATURE * float(s.norm() * y.norm()):
                state["s"], state["y"] = [*state["s"], s][-group["history"] :], [*state["y"], y][-group["history"] :]
            self._accept(state, loss, p, gradient, group)
        else:
            state["t"] *= SHORTER
            if state["t"] < SHORTEST:
                state.update(s=[], y=[], first=SHORTER * state["first"])
                self._accept(state, state["loss"], state["p"], state["gradient"], group)
        target = state["p"] + state["t"] * state["direction"]
        for q, part in zip(parameters, target.split([q.numel() for q in parameters]), strict=True):
            q.copy_(part.view_as(q))
        return loss

    @staticmethod
    def _accept(state: dict[str, Any], loss: float, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Take a point as the one to go on from, with its direction."""
        longest = group["lr"] * math.sqrt(p.numel())
        direction = -_apply(state["s"], state["y"], gradient)
        length = float(direction.norm())
        if not state["s"]:
            direction *= state["first"] * longest / max(length, torch.finfo(p.dtype).tiny)
        elif length > longest:
            direction *= longest / length
        state.update(loss=loss, p=p, gradient=gradient, direction=direction, t=1.0)


def _apply(s: list[Tensor], y: list[Tensor], gradient: Tensor) -> Tensor:
    """H times the gradient: the two loops."""
    q = gradient.clone()
    weights = []
    for s_k, y_k in zip(reversed(s), reversed(y), strict=True):
        rho = 1 / float(s_k @ y_k)
        a = rho * float(s_k @ q)
        q.sub_(y_k, alpha=a)
        weights.append((a, rho))
    if s:
        q.mul_(float(s[-1] @ y[-1]) / float(y[-1] @ y[-1]))
    for s_k, y_k, (a, rho) in zip(s, y, reversed(weights), strict=True):
        q.add_(s_k, alpha=a - rho * float(y_k @ q))
    return q
