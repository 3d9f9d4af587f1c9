r"""F in bfloat16, and the exact transpose through it, on processors that are fast at that format (AMX, Zen 5).

A convolution there takes an eighth of its time in float32, so that the seven of a double backward cost less than the five of
the secant, which bfloat16 would drown. But torch's own second derivatives waste it: that of a convolution is one whose kernel
is a whole cotangent, and that of batch norm some twenty passes over memory. Here both are made of the operations that first
derivatives have. They can be differentiated twice, the second time with respect to the images only.

Weights, statistics of batch norm, linear layers and the loss are in float32, and sums are taken in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gradleak.convolution import Geometry

#: Of images, weights and cotangents in the passes.
FORMAT = torch.bfloat16

#: Convolutions with so many times more weights than values that they are given are products of matrices.
MATRICES = 4

_aten = torch.ops.aten


@contextmanager
def passes() -> Iterator[None]:
    """Convolutions and batch norms of a pass inside are in bfloat16, and what else autocast has in it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.bfloat16 == FORMAT, cache_enabled=False), _Layers():
        yield


class _Layers(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Sequence[Any] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        named = named or {}
        if function is torch.conv2d and len(arguments) == 7 and not named:
            x, weight, bias, stride, padding, dilation, groups = arguments
            if x.ndim == 4 and not isinstance(padding, str):
                y = _Convolution.apply(_half(x), weight.to(FORMAT), _Matrices.of(stride, padding, dilation, groups))
                return y if bias is None else y + bias.to(y.dtype)[:, None, None]
        if function is F.batch_norm and (found := _batch_norm(*arguments, **named)) is not None:
            return found
        if function is F.linear:
            with torch.autocast("cpu", enabled=False):
                return function(arguments[0].to(arguments[1].dtype), *arguments[1:], **named)
        return function(*arguments, **named)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """As ``torch.nn.functional.batch_norm``, or None: with running statistics, or where a weight of zero leaves nothing to
    divide by in the second derivative. Running statistics are never looked at: not updated.
    """
    if not training or x.ndim != 4 or not (weight is None or bool(weight.all())):
        return None
    if weight is None:
        weight = torch.ones(x.shape[1], dtype=torch.promote_types(FORMAT, torch.float32))
    found: Tensor = _BatchNorm.apply(_half(x), weight, torch.zeros_like(weight) if bias is None else bias, eps)
    return found


def _half(x: Tensor) -> Tensor:
    return x.to(FORMAT, memory_format=torch.channels_last)


class _Matrices(Geometry):
    """The same by products of matrices where there are more weights than images' values, as in the last layers of a ResNet.

    There libraries spend most of the time on bringing the weights into their own order; these are in the order that weights
    have.
    """

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        if not self._as_matrices(x.numel(), w):
            return super().forward(x, w)
        patches = self._patches(x, w)
        return (patches.flatten(3) @ w.flatten(1).T).permute(0, 3, 1, 2)

    def to_images(self, y: Tensor, x: Tensor, w: Tensor) -> Tensor:
        if not self._as_matrices(x.numel(), w):
            return super().to_images(y, x, w)
        patches = (y.permute(0, 2, 3, 1) @ w.flatten(1)).unflatten(3, (x.shape[1], -1))
        patches = patches.permute(4, 0, 1, 2, 3).contiguous()
        (down, across), (top, left) = self.stride, self.padding
        rows, columns = y.shape[2:]
        shape = len(x), x.shape[2] + 2 * top, x.shape[3] + 2 * left, x.shape[1]
        padded = torch.zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32))
        for i in range(w.shape[2]):
            for j in range(w.shape[3]):
                to = padded[:, i : i + down * rows : down, j : j + across * columns : across]
                to += patches[i * w.shape[3] + j]
        inner = padded[:, top : top + x.shape[2], left : left + x.shape[3]]
        return inner.to(x.dtype).permute(0, 3, 1, 2)

    def to_weight(self, y: Tensor, x: Tensor, w: Tensor) -> Tensor:
        if not self._as_matrices(x.numel(), w):
            return super().to_weight(y, x, w)
        patches = self._patches(x, w).flatten(0, 2).flatten(1)  # and not a product for each image
        return (y.permute(0, 2, 3, 1).flatten(0, 2).T @ patches).view(w.shape)

    def _as_matrices(self, size: int, w: Tensor) -> bool:
        return w.numel() > MATRICES * size and self.groups == 1 and self.dilation == (1, 1)

    def _patches(self, x: Tensor, w: Tensor) -> Tensor:
        """B x rows x columns x channels x kernel positions."""
        top, left = self.padding
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top))
        patches = padded.unfold(1, w.shape[2], self.stride[0]).unfold(2, w.shape[3], self.stride[1])
        # channels by channels first, in long runs: half the time
        return patches.permute(0, 1, 2, 4, 5, 3).flatten(3, 4).transpose(3, 4).contiguous()


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return geometry.forward(x, w)

    @staticmethod
    def backward(ctx: Any, y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w = ctx.saved_tensors
        return (*_ConvolutionBackward.apply(_half(y), x, w, ctx.geometry, ctx.needs_input_grad[:2]), None)


class _ConvolutionBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, w: Tensor, geometry: Geometry, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(y, x, w)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        to_x, to_w = wanted
        return geometry.to_images(y, x, w) if to_x else None, geometry.to_weight(y, x, w) if to_w else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, a: Tensor | None, v: Tensor | None) -> tuple[Tensor | None, ...]:
        y, x, w = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        products = [] if a is None else [(_half(a), w)]
        products += [] if v is None else [(x, v.to(w.dtype))]
        to_y, to_x = None, None
        if products and geometry.groups == 1:  # as one, which sums in float32
            to_y = geometry.forward(*(torch.cat(factors, 1) for factors in zip(*products, strict=True)))
        elif products:
            to_y = torch.stack([geometry.forward(*factors) for factors in products]).sum(0)
        if v is not None and ctx.needs_input_grad[1]:
            to_x = geometry.to_images(y, x, v.to(w.dtype))
        return to_y, to_x, None, None, None


class _BatchNorm(torch.autograd.Function):
    """y = w (x - mean) / deviation + b with the batch's own mean and deviation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
        y, mean, inverse = _aten.native_batch_norm(x, w, b, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, w, mean, inverse)
        ctx.eps = eps
        found: Tensor = y
        return found

    @staticmethod
    def backward(ctx: Any, y: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return (*_BatchNormBackward.apply(_half(y), *ctx.saved_tensors, ctx.eps), None)


class _BatchNormBackward(torch.autograd.Function):
    r"""With :math:`\hat x = (x - \mu) / \sigma` and :math:`P u = u - \overline{u} - \hat x \, \overline{u \hat x}`, the
    cotangent u of the output goes to :math:`g = (w / \sigma) P u` of x, :math:`\sum u \hat x` of w and :math:`\sum u` of b.

    Cotangents a, s and t of these go to :math:`(w / \sigma) P a + s \hat x + t` of u, and to that of x,

    .. math:: \tfrac1w (c_1 g + c_2 (w / \sigma) P a) - \frac{\langle a, g \rangle}{N \sigma} \hat x, \qquad
              c_1 = s - \frac{w}{\sigma} \overline{a \hat x}, \quad c_2 = -\frac{w}{\sigma} \overline{u \hat x},

    each channel by itself, N its number of values.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, x: Tensor, w: Tensor, mean: Tensor, inverse: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        g, to_w, to_b = _project(u, x, w, mean, inverse, eps)
        ctx.save_for_backward(x, w, mean, inverse, g, to_w)
        ctx.eps = eps
        return g, to_w, to_b

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, a: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor | None, ...]:
        x, w, mean, inverse, g, along_u = ctx.saved_tensors
        a, count = _half(a), x.numel() // x.shape[1]
        projected, along_a, _ = _project(a, x, w, mean, inverse, ctx.eps)
        # the sum of a g by the operation that gives that of u x^
        product = _aten.native_batch_norm_backward(
            a, g, None, None, None, torch.zeros_like(mean), torch.ones_like(mean), True, ctx.eps, [False, True, False]
        )[1]

        def each(channel: Tensor) -> Tensor:
            return channel.to(x.dtype)[:, None, None]

        slope = s * inverse
        to_u = torch.addcmul(projected, x, each(slope)).add_(each(t - slope * mean))
        back = -product * inverse.square() / count
        to_x = (g * each(s / w - inverse * along_a / count)).addcmul_(projected, each(-inverse * along_u / count))
        to_x.addcmul_(x, each(back)).add_(each(-back * mean))
        return to_u, to_x, None, None, None, None


def _project(u: Tensor, x: Tensor, w: Tensor, mean: Tensor, inverse: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = _aten.native_batch_norm_backward(
        u, x, w, None, None, mean, inverse, True, eps, [True, True, True]
    )
    return found
