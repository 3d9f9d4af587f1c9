"""Rounds that are partly in bfloat16: half the time for these parts on processors that have the instructions.

The image model is, whatever images it makes: F sees them in float32. So are the gradients of F's convolution weights, the only
part of the secant that is not divided by its small step. Numbers are rounded to 8 bits and summed in float32, so that the
rounding averages out: the update's relative error is below a thousandth (docs/performance.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_in_use: ContextVar[bool] = ContextVar("mixed", default=False)


@contextmanager
def rounds(mixed: bool) -> Iterator[None]:
    """Inside, :func:`image_model` and :func:`weight_gradients` are in bfloat16, or not."""
    token = _in_use.set(mixed)
    try:
        yield
    finally:
        _in_use.reset(token)


def image_model(device: torch.device) -> AbstractContextManager[Any]:
    """Computes an image model; its output is to be taken to float32."""
    return torch.autocast(device.type, torch.bfloat16) if _in_use.get() else nullcontext()


def weight_gradients() -> AbstractContextManager[Any]:
    """Convolutions inside have weight gradients by bfloat16. They can be differentiated once."""
    return _Convolutions() if _in_use.get() else nullcontext()


@functools.cache
def supported(device: str) -> bool:
    """Whether the device computes in bfloat16 faster than in float32: processors with AVX-512 BF16 or AMX."""
    if device != "cpu":
        return False  # not measured
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, options: tuple[Sequence[int], ...], groups: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options, ctx.groups = options, groups
        stride, padding, dilation = options
        return torch.conv2d(x, weight, None, stride, padding, dilation, groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, *_ = ctx.needs_input_grad

        def back(cotangent: Tensor, x: Tensor, weight: Tensor, *, wanted: list[bool]) -> Sequence[Tensor | None]:
            stride, padding, dilation = ctx.options
            found: Sequence[Tensor | None] = torch.ops.aten.convolution_backward(
                cotangent, x, weight, None, stride, padding, dilation, False, [0, 0], ctx.groups, wanted
            )
            return found

        image_cotangent = back(cotangent, x, weight, wanted=[True, False, False])[0] if to_x else None
        gradient = None
        if to_weight:
            half = (t.bfloat16() for t in (cotangent, x, weight))
            gradient = back(*half, wanted=[False, True, False])[1]
            gradient = None if gradient is None else gradient.to(weight.dtype)
        return image_cotangent, gradient, None, None


class _Convolutions(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Sequence[Any] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        named = named or {}
        if function is torch.conv2d and len(arguments) == 7 and not named:
            x, weight, bias, stride, padding, dilation, groups = arguments
            if weight.requires_grad and weight.dtype == torch.float32 and not isinstance(padding, str):
                y = _Convolution.apply(x, weight, (stride, padding, dilation), groups)
                return y if bias is None else y + bias[:, None, None]
        return function(*arguments, **named)
