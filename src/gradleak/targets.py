r"""The targets y of a training loss: which shapes it takes, and how an attack that does not know them optimises them.

===================  ==================================================  =================================================
loss                 targets                                             optimised as (:class:`FreeTargets`)
===================  ==================================================  =================================================
``cross-entropy``    classes, int64, B x ... (F's output without its     :math:`\mathrm{softmax}(\lambda)` over dimension 1
                     dimension 1); or soft labels, as F's output
``bce-with-logits``  float in [0, 1], of the shape of F's output         :math:`\sigma(\lambda)`
``mse``              float, of the shape of F's output                   :math:`\lambda`
one's own            anything with first dimension B                     :math:`\lambda`, of the shape of F's output
===================  ==================================================  =================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

TrainingLoss = Callable[[Tensor, Tensor], Tensor]
"""Output of F and targets to the client's training loss (a scalar, the mean over the batch)."""

#: Losses by name; each is a mean over images.
LOSSES: dict[str, TrainingLoss] = {
    "cross-entropy": cross_entropy,
    "bce-with-logits": binary_cross_entropy_with_logits,
    "mse": mse_loss,
}


def are_classes(targets: Tensor) -> bool:
    """Whether there is one class for each image: integers of shape (B,)."""
    return targets.ndim == 1 and not targets.is_floating_point()


def fault(loss: str, targets: Tensor, output: Tensor) -> str | None:
    """Why these targets do not go with a loss and F's output; None where they do, or the loss is one's own.

    Args:
        loss: Name of the loss.
        targets: B x ...
        output: F's output; its first dimension may be another one than B.
    """
    if loss not in LOSSES:
        return None
    classes, shape = (output.shape[1] if output.ndim > 1 else 0), (len(targets), *output.shape[1:])
    found = f"found {str(targets.dtype).removeprefix('torch.')} {tuple(targets.shape)}"
    if loss == "cross-entropy" and classes == 0:
        return f"cross-entropy needs a model with one output for each class, and this one gives {tuple(output.shape)}"
    if loss == "cross-entropy" and not targets.is_floating_point():
        if targets.shape != (len(targets), *shape[2:]):
            return f"cross-entropy of an output {shape} takes classes of shape {(len(targets), *shape[2:])}, {found}"
        bad = (targets < 0) | (targets >= classes)
        if bool(bad.any()):
            return f"label {int(targets[bad][0])} is out of range: the model has {classes} classes (0 to {classes - 1})"
        return None
    if loss == "cross-entropy" and targets.shape != shape:
        return (
            f"cross-entropy of an output {shape} takes classes (int64) of shape {(len(targets), *shape[2:])}, or soft labels "
            f"of the output's, {found}"
        )
    if loss == "cross-entropy" and not torch.allclose(targets.sum(1), torch.ones(()).to(targets), atol=1e-3):
        return "soft labels of cross-entropy must sum to 1; several labels for an image need the loss bce-with-logits"
    if not targets.is_floating_point() or targets.shape != shape:
        return f"{loss} takes float targets of the shape of the model's output, {shape}, {found}"
    if loss == "bce-with-logits" and not (targets.min() >= 0 and targets.max() <= 1):
        return f"bce-with-logits takes targets in [0, 1], found [{float(targets.min()):g}, {float(targets.max()):g}]"
    return None


class FreeTargets(nn.Module):
    r"""Targets that an attack optimises together with the images (DLG, Zhu et al. 2019, Algorithm 1, for any loss).

    Args:
        loss: Name of the client's loss; the table above says what it makes of :math:`\lambda`.
        shape: Of F's output for the batch, B x ...

    Attributes:
        free: :math:`\lambda`, N(0, 1) at first, from torch's global random state.

    Shapes:
        ``forward()`` -> ``shape``.
    """

    def __init__(self, loss: str, shape: Sequence[int]) -> None:
        super().__init__()
        self.loss = loss
        self.free = nn.Parameter(torch.randn(*shape))

    def forward(self) -> Tensor:
        if self.loss == "cross-entropy":
            return self.free.softmax(dim=1)
        return self.free.sigmoid() if self.loss == "bce-with-logits" else self.free * 1.0

    def settled(self, targets: Tensor) -> Tensor:
        """Targets as a client has them: classes of soft labels; others as they are."""
        return targets.argmax(1) if self.loss == "cross-entropy" else targets
