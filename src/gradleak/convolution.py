"""A convolution and its derivatives: the three products that first derivatives of F are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradleak import winograd

if TYPE_CHECKING:
    from typing_extensions import Self

Sizes = int | Sequence[int]
"""Of both directions, or down and across."""


@dataclass(frozen=True)
class Geometry:
    """Of a convolution of x, B x C_in x H x W, with w: its output and both transposes, each linear in either factor.

    They are torch's, or of fewer multiplications where that pays (:mod:`gradleak.winograd`).

    Attributes:
        stride, padding, dilation, groups: As in ``torch.nn.functional.conv2d``.
        kept: What is known of weights that stay as they are; None: they do not.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    kept: winograd.Kept | None = None

    @classmethod
    def of(cls, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int, kept: winograd.Kept | None = None) -> Self:
        """From what ``torch.conv2d`` is given: one number for both directions, or two."""

        def both(sizes: Sizes) -> tuple[int, ...]:
            return (sizes, sizes) if isinstance(sizes, int) else tuple(sizes)

        return cls(both(stride), both(padding), both(dilation), groups, kept)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """The output y."""
        if self.by_winograd(x, w):
            return winograd.forward(x, w, self.kept)
        return torch.conv2d(x, w, None, self.stride, self.padding, self.dilation, self.groups)

    def to_images(self, y: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """The cotangent y of the output to that of x, of which the shape is read only."""
        if self.by_winograd(x, w):
            return winograd.to_images(y, x, w, self.kept)
        found: Tensor = self._backward(y, x, w, [True, False, False])[0]
        return found

    def to_weight(self, y: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """The cotangent y of the output to that of w, of which the shape is read only."""
        if self.by_winograd(x, w):
            return winograd.to_weight(y, x, w)
        found: Tensor = self._backward(y, x, w, [False, True, False])[1]
        return found.contiguous()

    def by_winograd(self, x: Tensor, w: Tensor) -> bool:
        """Whether the products have fewer multiplications than torch's."""
        plain = self.groups == 1 and all(sizes == (1, 1) for sizes in (self.stride, self.padding, self.dilation))
        return plain and w.shape[2:] == (3, 3) and winograd.pays(x, w)

    def _backward(self, y: Tensor, x: Tensor, w: Tensor, wanted: list[bool]) -> Sequence[Any]:
        found: Sequence[Any] = torch.ops.aten.convolution_backward(
            y, x, w, None, self.stride, self.padding, self.dilation, False, [0, 0], self.groups, wanted
        )
        return found
