r"""The transpose of a client operator: from a cotangent of the update back to the images.

For one gradient, :math:`A(x) = \nabla_W L(x; W)`, the transpose applied to :math:`r` is

.. math:: A'(x)^\top r = \nabla_x \langle \nabla_W L(x; W), r \rangle
          = \frac{d}{dh} \nabla_x L(x; W + h r) \Big|_{h=0}.

The left form is :func:`exact` (double backward), the right one :func:`secant` (first derivatives only).
Both return the update and its transpose at these images, as ``torch.func.vjp`` does.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from gradleak import bfloat16, mixed
from gradleak.distance import norm
from gradleak.errors import ModelError
from gradleak.observation import Update
from gradleak.prefix import Prefix
from gradleak.winograd import Kept

Loss = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""Weights and images to the scalar training loss L."""

Transpose = Callable[[Update], Tensor]
"""Cotangent of the update (same names and shapes) to the cotangent of the images."""

log = logging.getLogger(__name__)

#: Largest error of a secant, as a fraction of the cotangent's norm.
TOLERANCE = 0.05

#: The same where an optimiser is fed with signs, few of which such an error changes.
SIGNED_TOLERANCE = 0.1


def exact(loss: Loss, weights: Update, images: Tensor) -> tuple[Update, Transpose]:
    r""":math:`\nabla_x \langle \nabla_W L, r \rangle` by double backward, restricted to the images.

    Args:
        loss: :math:`L(W, x)`, twice differentiable.
        weights: W, name -> tensor.
        images: B x C x H x W.

    Returns:
        The update, and its transpose; the transpose can be called once.
    """
    names = list(weights)
    leaves = [weights[name].detach().requires_grad_() for name in names]
    images = images.detach().requires_grad_()
    value = loss(dict(zip(names, leaves, strict=True)), images)
    gradients = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True, materialize_grads=True)

    def transpose(cotangent: Update) -> Tensor:
        attached = [(g, cotangent[name]) for name, g in zip(names, gradients, strict=True) if g.requires_grad]
        if not attached:
            return torch.zeros_like(images)
        outputs, cotangents = zip(*attached, strict=True)
        (image_cotangent,) = second_derivative(outputs, [images], cotangents)
        return image_cotangent.detach()

    return {name: g.detach() for name, g in zip(names, gradients, strict=True)}, transpose


def second_derivative(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Cotangents of gradients (``outputs``, made with ``create_graph``) to those of ``inputs``; zeros for unused ones.

    Raises:
        ModelError: F uses an operation for which torch has no second derivative; names it.
    """
    try:
        return torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, materialize_grads=True)
    except RuntimeError as fault:
        missing = re.match(r"derivative for (?:aten::)?(\w+?)(?:_backward)? is not implemented", str(fault))
        if missing is None:
            raise
        raise ModelError(
            f"the model uses {missing[1]}, for which torch has no second derivative, and attacks need one: exchange it, for "
            'example with model.activation = "sigmoid" where it is an activation'
        ) from None


def secant(
    loss: Loss, weights: Update, images: Tensor, *, step: float = 1e-3, kept: Kept | None = None
) -> tuple[Update, Transpose]:
    r""":math:`(\nabla_x L(x; W + h r) - \nabla_x L(x; W)) / h` with :math:`h = \text{step} / \|r\|`.

    Needs first derivatives only: about five forward passes of F in place of eight and a half, and less than half the
    memory; fewer still where no weight moves in the first layers (:mod:`gradleak.prefix`). The error is of order ``step``
    (curvature) plus round-off over ``step``.

    Args:
        loss: :math:`L(W, x)`, once differentiable.
        weights: W, name -> tensor.
        images: B x C x H x W.
        step: Length of the move in weight space.
        kept: What an earlier call with the same weights made of them; None: nothing is kept.
    """
    names = list(weights)
    leaves = [weights[name].detach().requires_grad_() for name in names]
    images = images.detach().requires_grad_()
    prefix = Prefix(images)
    if kept is not None:
        kept.next_pass()
    with mixed.convolutions(kept):
        value = prefix(lambda: loss(dict(zip(names, leaves, strict=True)), images))
    found = torch.autograd.grad(value, [*leaves, *prefix.border], allow_unused=True)
    gradients = [torch.zeros_like(w) if g is None else g for w, g in zip(leaves, found, strict=False)]
    # the first pass's cotangents are the secant's base point: reusing them saves two of seven passes
    base = found[len(leaves) :]

    def transpose(cotangent: Update, *, step: float = step) -> Tensor:
        size = norm(cotangent)
        if size == 0:
            return torch.zeros_like(images)
        h = step / size
        moved = torch._foreach_add([w.detach() for w in leaves], [cotangent[name] for name in names], alpha=h)
        del cotangent  # as large as the model, and the caller may have let go of it
        with torch.enable_grad(), mixed.convolutions():
            value = prefix(lambda: loss(dict(zip(names, moved, strict=True)), images))
        ends = torch.autograd.grad(value, prefix.border, allow_unused=True)
        return prefix.backward(
            [None if a is None or b is None else (a - b).mul_(1 / h) for a, b in zip(ends, base, strict=True)]
        )

    return dict(zip(names, gradients, strict=True)), transpose


class SelfChecking:
    """The secant while steps forwards and backwards agree, the exact transpose where they do not.

    Every ``every`` rounds the secant is computed with :math:`h` and with :math:`-h`. Half their difference is its error: that
    of curvature, of round-off, or of kinks (of ReLU, say), which lie elsewhere in both directions. Longer and shorter steps
    than the last one are tried as long as the error falls, and all where it stays above ``tolerance``. The step with the least
    error is kept, and the mean of both ways is used in that round; when even that error is above ``tolerance``, the exact
    transpose is used until the next check. So memory is that of the secant where F is smooth.

    Args:
        tolerance: Largest error of the secant, as a fraction of the cotangent's norm.
        every: Rounds between two checks.
        steps: Candidate step lengths.
        size: Norm of a cotangent of the images.

    Attributes:
        step: The step in use.
        error: Relative error at the last check.
        trusted: Whether the secant is in use.
    """

    def __init__(
        self,
        *,
        tolerance: float = TOLERANCE,
        every: int = 200,
        steps: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        size: Callable[[Tensor], float] = lambda t: float(t.norm()),
    ) -> None:
        self.tolerance, self.every, self.steps, self.size = tolerance, every, steps, size
        self.step, self.error, self.trusted = 1e-3, math.nan, True
        self._calls = 0
        self._kept = Kept()

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {
            "step": self.step,
            "error": self.error,
            "trusted": self.trusted,
            "calls": self._calls,
            "tolerance": self.tolerance,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from :meth:`state_dict`."""
        self.step, self.error = state["step"], state["error"]
        self.trusted, self._calls, self.tolerance = bool(state["trusted"]), int(state["calls"]), state["tolerance"]

    def check_next(self) -> None:
        """The next round checks."""
        self._calls = 0

    def tolerate(self, tolerance: float) -> None:
        """From now on this tolerance; where it is another than before, the next round checks."""
        if tolerance != self.tolerance:
            self.tolerance = tolerance
            self.check_next()

    def decline(self) -> None:
        """Told by an operator that the secant is not defined for: the exact transpose is in use, without error."""
        self.trusted, self.error = False, 0.0

    def __call__(self, loss: Loss, weights: Update, images: Tensor) -> tuple[Update, Transpose]:
        if mixed.tf32():  # it rounds the weights more than the step moves them
            return exact(loss, weights, images)
        if mixed.whole():  # it rounds more still

            def in_bfloat16(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
                with bfloat16.passes():
                    return loss(weights, images)

            return exact(in_bfloat16, weights, images)
        check = self._calls % self.every == 0
        self._calls += 1
        if not check:
            if not self.trusted:
                return exact(loss, weights, images)
            return secant(loss, weights, images, step=self.step, kept=self._kept)
        update, candidate = secant(loss, weights, images, kept=self._kept)

        def transpose(cotangent: Update) -> Tensor:
            found: dict[float, tuple[float, Tensor]] = {}

            def error(step: float) -> float:
                if step not in found:
                    one_sided = candidate(cotangent, step=step)  # type: ignore[call-arg]
                    two_sided = (one_sided + candidate(cotangent, step=-step)) / 2  # type: ignore[call-arg]
                    found[step] = self.size(one_sided - two_sided) / (self.size(two_sided) or 1.0), two_sided
                return found[step][0]

            # each costs two passes of F, and the best is seldom far from the last one
            start = min(range(len(self.steps)), key=lambda k: abs(math.log(self.steps[k] / self.step)))
            for way in (self.steps[start:], self.steps[start::-1]):
                least = math.inf
                for step in way:
                    before, least = least, error(step)
                    if not least < before:
                        break
            if not min(map(error, found)) <= self.tolerance:  # kinks make more than one valley
                for step in self.steps:
                    error(step)
            self.step, (self.error, image_cotangent) = min(found.items(), key=lambda item: item[1][0])
            trusted = self.error <= self.tolerance
            if trusted != self.trusted:
                log.info(
                    "secant error %.1e with step %.0e: %s",
                    self.error,
                    self.step,
                    "secant" if trusted else "exact from here",
                )
            self.trusted = trusted
            return image_cotangent if trusted else exact(loss, weights, images)[1](cotangent)

        return update, transpose


Engine = Callable[[Loss, Update, Tensor], tuple[Update, Transpose]]
EngineName = Literal["auto", "secant", "exact"]


def engine(name: EngineName) -> Engine:
    """``auto`` (:class:`SelfChecking`), ``secant`` or ``exact``."""
    engines: dict[str, Callable[[], Engine]] = {
        "auto": SelfChecking,
        "secant": lambda: secant,
        "exact": lambda: exact,
    }
    return engines[name]()
