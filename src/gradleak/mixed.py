"""Which parts of a round are in a faster format, and that no other is in less than float32; which convolutions take fewer
multiplications in it.

On processors, rounds can be partly in bfloat16: half the time for these parts where there are the instructions. The image model
is, whatever images it makes: F sees them in float32. So are the gradients of F's convolution weights, the only part of the
secant that is not divided by its small step. Numbers are rounded to 8 bits and summed in float32, so that the rounding averages
out: the update's relative error is below a thousandth (docs/performance.md). Processors that are fast at it (AMX, Zen 5)
have all of F in it (:mod:`gradleak.bfloat16`), as long as the loop finds that near enough to float32.

On GPUs all convolutions of such a round are in TF32, 11 bits, and the transpose is the exact one: a secant would be lost in it.
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

from gradleak import winograd
from gradleak.convolution import Geometry

_format: ContextVar[str] = ContextVar("format", default="float32")
_cudnn: Any = torch.backends.cudnn


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, CUDA computes float32 convolutions and matrix products in float32, by kernels that give the same bits again.

    By default cuDNN rounds the numbers of convolutions to the 11 bits of TF32: more than the step of the secant changes them.
    Also a decorator.
    """
    if not torch.cuda.is_available():
        yield
        return
    products = torch.backends.cuda.matmul
    before = products.fp32_precision, _cudnn.deterministic
    products.fp32_precision, _cudnn.deterministic = "ieee", True
    try:
        with _convolutions("ieee"):
            yield
    finally:
        products.fp32_precision, _cudnn.deterministic = before


@contextmanager
def rounds(mixed: bool, device: torch.device, *, whole: bool = False) -> Iterator[None]:
    """Inside, a CUDA device's convolutions are in TF32; elsewhere :func:`image_model` and the weights' gradients of
    :func:`convolutions` are in bfloat16, or with ``whole`` all of F. Or none of them.
    """
    on_gpu = device.type == "cuda"
    token = _format.set(("tf32" if on_gpu else "bfloat16, F too" if whole else "bfloat16") if mixed else "float32")
    try:
        with _convolutions("tf32" if mixed else "ieee") if on_gpu else nullcontext():
            yield
    finally:
        _format.reset(token)


@contextmanager
def _convolutions(precision: str) -> Iterator[None]:
    """CUDA's float32 convolutions inside are in ``ieee`` or ``tf32``, in the whole process."""
    before = _cudnn.conv.fp32_precision
    _cudnn.conv.fp32_precision = precision
    try:
        yield
    finally:
        _cudnn.conv.fp32_precision = before


def tf32() -> bool:
    """Whether convolutions are in TF32 here."""
    return _format.get() == "tf32"


def whole() -> bool:
    """Whether F's passes are in bfloat16 here."""
    return _format.get() == "bfloat16, F too"


def image_model(device: torch.device) -> AbstractContextManager[Any]:
    """Computes an image model; its output is to be taken to float32."""
    return torch.autocast(device.type, torch.bfloat16) if _format.get().startswith("bfloat16") else nullcontext()


def convolutions(kept: winograd.Kept | None = None) -> AbstractContextManager[Any]:
    """Convolutions inside have weight gradients by bfloat16 where the round has, and are products of fewer multiplications
    where that pays (:mod:`gradleak.winograd`), with what is ``kept`` of the weights. They can be differentiated once.
    """
    half = _format.get() == "bfloat16"
    return _Convolutions(half, kept) if half or winograd.pays_here() else nullcontext()


@functools.cache
def supported(device: str) -> bool:
    """Whether the device has the faster format: GPUs with TF32, processors with AVX-512 BF16 or AMX."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    if device != "cpu":
        return False  # not measured
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@functools.cache
def whole_pays(device: str) -> bool:
    """Whether products in bfloat16 are so fast that all of F in it pays: a processor with matrix units (AMX), or with
    AVX-512 BF16 of full width: AMD's Zen 5, which alone has VP2INTERSECT beside it and no matrix units.
    """
    if device != "cpu":
        return False
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    wide = bool(found.get("avx512_bf16") and found.get("avx512_vp2intersect"))
    return wide or bool(torch.cpu._is_amx_tile_supported())


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: Geometry, half: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.half = geometry, half
        return geometry.forward(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, *_ = ctx.needs_input_grad
        image_cotangent = ctx.geometry.to_images(cotangent, x, weight) if to_x else None
        gradient = None
        if to_weight:
            factors = (t.bfloat16() if ctx.half else t for t in (cotangent, x, weight))
            gradient = ctx.geometry.to_weight(*factors).to(weight.dtype)
        return image_cotangent, gradient, None, None


class _Convolutions(TorchFunctionMode):
    def __init__(self, half: bool, kept: winograd.Kept | None) -> None:
        super().__init__()
        self.half, self.kept = half, kept

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Sequence[Any] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        named = named or {}
        if function is torch.conv2d and len(arguments) == 7 and not named and not isinstance(arguments[4], str):
            x, weight, bias, stride, padding, dilation, groups = arguments
            geometry = Geometry.of(stride, padding, dilation, groups, self.kept)
            half = self.half and weight.requires_grad and weight.dtype == torch.float32
            if half or geometry.by_winograd(x, weight):
                y = _Convolution.apply(x, weight, geometry, half)
                return y if bias is None else y + bias[:, None, None]
        return function(*arguments, **named)
