"""Image quality, one number per image: MSE, PSNR, SSIM, FSIM and LPIPS-VGG of reconstructions against originals.

Every metric takes two float tensors B x C x H x W in [0, data_range] and returns B numbers on their device; image i is
compared with image i (see :mod:`gradleak.matching`). They refuse other shapes and ranges with a :class:`DataError`.
On CUDA, torch's TF32 convolutions cost SSIM the digits its variances need: :mod:`gradleak.evaluate` scores on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import piq
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models import VGG16_Weights

from gradleak.errors import DataError, GradleakError
from gradleak.network import announce
from gradleak.tensors import check_state, read_tensors

#: Largest PSNR reported, in dB: identical images have an infinite one, which JSON cannot hold.
PSNR_CAP = 100.0
#: Smallest side in pixels: SSIM's Gaussian window, and four poolings of VGG-16.
SSIM_WINDOW = 11
LPIPS_SMALLEST = 16
#: Environment variable that names a safetensors file with VGG-16's convolutions, used by ``lpips = "auto"``.
LPIPS_BACKBONE = "GRADLEAK_LPIPS_BACKBONE"

_VGG16 = VGG16_Weights.IMAGENET1K_V1
_CHUNK_PIXELS = 2**18  # four 256 x 256 images: FSIM's filter bank and VGG's features take about 50 MB for each


class LpipsUnavailable(GradleakError):
    """LPIPS cannot be computed: there is no VGG-16, or the file given for it does not hold one."""


def mse(reconstruction: Tensor, truth: Tensor, *, data_range: float = 1.0) -> Tensor:
    r"""Mean squared error in float64, :math:`\frac{1}{CHW} \sum (x - y)^2`; 0 for equal images.

    Args:
        reconstruction: B x C x H x W in [0, ``data_range``].
        truth: The same shape and range.
        data_range: The largest possible value.

    Raises:
        DataError: Shapes differ or are not B x C x H x W, values are not floats in [0, ``data_range``].
    """
    _check(reconstruction, truth, data_range)
    return (reconstruction.double() - truth.double()).square().mean(dim=(1, 2, 3))


def psnr(reconstruction: Tensor, truth: Tensor, *, data_range: float = 1.0) -> Tensor:
    r"""Peak signal-to-noise ratio in dB, :math:`10 \log_{10}(R^2 / \mathrm{MSE})`, at most :data:`PSNR_CAP`.

    The mean squared error is exact; piq, which the reference code uses, adds 1e-8 to it and so ends at 80 dB
    (0.04 dB apart at 60 dB). Arguments and errors as :func:`mse`.
    """
    error = mse(reconstruction, truth, data_range=data_range) / data_range**2
    return -10 * error.clamp_min(10 ** (-PSNR_CAP / 10)).log10()


def ssim(reconstruction: Tensor, truth: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Structural similarity, 1 for equal images (Wang et al. 2004), averaged over channels; as piq computes it.

    Gaussian window of 11 pixels, sigma 1.5; images of 384 pixels and more are first pooled to about 256.
    Arguments and errors as :func:`mse`.

    Raises:
        DataError: Also if a side is shorter than the window.
    """
    _check(reconstruction, truth, data_range, metric="SSIM", smallest=SSIM_WINDOW)
    value: Tensor = piq.ssim(reconstruction.float(), truth.float(), data_range=data_range, reduction="none")
    return value


def fsim(reconstruction: Tensor, truth: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Feature similarity, 1 for equal images (Zhang et al. 2011): FSIMc for RGB, FSIM for one channel; from piq.

    Arguments and errors as :func:`mse`.

    Raises:
        DataError: Also if there are neither 1 nor 3 channels.
    """
    _check(reconstruction, truth, data_range, metric="FSIM", smallest=2, channels=(1, 3))
    metric = functools.partial(piq.fsim, data_range=data_range, reduction="none", chromatic=reconstruction.shape[1] == 3)
    return _in_chunks(metric, reconstruction.float(), truth.float())


@torch.no_grad()
def lpips(reconstruction: Tensor, truth: Tensor, network: nn.Module, *, data_range: float = 1.0) -> Tensor:
    """Learned perceptual distance with VGG-16 features, 0 for equal images (Zhang et al. 2018, version 0.1).

    One channel is repeated to three.

    Args:
        reconstruction: B x C x H x W in [0, ``data_range``].
        truth: The same shape and range.
        network: What :func:`load_lpips` returns, on the images' device.
        data_range: The largest possible value.

    Raises:
        DataError: As :func:`mse`, or a side is shorter than 16 pixels, or there are neither 1 nor 3 channels.
    """
    _check(reconstruction, truth, data_range, metric="LPIPS", smallest=LPIPS_SMALLEST, channels=(1, 3))

    def metric(x: Tensor, y: Tensor) -> Tensor:
        # normalize=True maps [0, 1] to the [-1, 1] that the network expects
        value: Tensor = network(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1), normalize=True)
        return value.flatten()

    return _in_chunks(metric, reconstruction.float() / data_range, truth.float() / data_range)


def load_lpips(source: str = "auto") -> nn.Module:
    """The LPIPS-VGG network for :func:`lpips`: linear heads from the ``lpips`` package, VGG-16 from ``source``.

    Nothing is downloaded unless ``source`` is ``"download"``; the caller's random state is left as it was. A network
    is kept for the next call with the same file.

    Args:
        source: ``"auto"``: the safetensors file that :data:`LPIPS_BACKBONE` names, else torchvision's checkpoint if
            it already lies in torch.hub's folder. ``"download"``: torchvision's checkpoint, fetched if need be.
            ``"off"``: never. Anything else: a safetensors file with torchvision's ``features.N.weight`` and ``.bias``.

    Raises:
        LpipsUnavailable: Says what was looked for and how to give it.
    """
    if source == "off":
        raise LpipsUnavailable("LPIPS is switched off (evaluate.lpips = 'off')")
    if source == "download":
        return _lpips_network(None)
    if source != "auto":
        return _lpips_network(source)
    if file := os.environ.get(LPIPS_BACKBONE):
        return _lpips_network(file)
    if not _checkpoint().is_file():
        raise LpipsUnavailable(
            f"LPIPS needs VGG-16: there is no {_checkpoint()}, and {LPIPS_BACKBONE} is not set. Either let "
            "torchvision download it once (528 MB: evaluate.lpips = 'download'), or name a safetensors file that "
            f"holds features.0.weight .. features.28.bias (evaluate.lpips = FILE, or {LPIPS_BACKBONE}=FILE)"
        )
    return _lpips_network(None)


@functools.lru_cache(maxsize=2)
def _lpips_network(file: str | None) -> nn.Module:
    """LPIPS with the backbone in ``file``, or with torchvision's (``None``)."""
    if file is None:
        where, backbone = str(_checkpoint()), _torchvision_vgg16()
    else:
        where, (backbone, _) = file, read_tensors(Path(file), error=LpipsUnavailable)
    blank = _blank_lpips()
    state = blank.net.state_dict()
    names = {key: f"features.{key.partition('.')[2]}" for key in state}  # slice2.5.bias is features.5.bias
    features = {name: tensor for name, tensor in backbone.items() if not name.startswith("classifier.")}
    expected = {names[key]: tensor.shape for key, tensor in state.items()}
    check_state(features, expected, where=f"{where} (VGG-16 for LPIPS)", error=LpipsUnavailable)
    blank.net.load_state_dict({key: features[name] for key, name in names.items()}, strict=True)
    lpips_network: nn.Module = blank.float()
    return lpips_network


def _checkpoint() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(_VGG16.url).name


def _torchvision_vgg16() -> dict[str, Tensor]:
    path = _checkpoint()
    if not path.is_file():
        announce(_VGG16.url, what="VGG-16 for LPIPS (528 MB)", file=path, error=LpipsUnavailable)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            state: dict[str, Tensor] = _VGG16.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # network, hash, truncated file: torch and urllib share no class
        # the first sentence only: torch's next one advises to unpickle
        reason = str(error).strip().partition(". ")[0].partition("\n")[0] or type(error).__name__
        raise LpipsUnavailable(
            f"LPIPS needs VGG-16, and torchvision could not give it: {reason}. Put {_VGG16.url} at {path} (remove a "
            f"damaged file there first), or name a safetensors file that holds features.N.weight and features.N.bias: "
            f"evaluate.lpips = FILE, or {LPIPS_BACKBONE}=FILE"
        ) from None
    return state


def _blank_lpips() -> Any:
    """LPIPS-VGG with the package's linear heads and an arbitrary backbone; nothing is downloaded or drawn at random."""
    import lpips as package  # here: it brings scipy.ndimage and tqdm, and most runs have no backbone

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("cpu"), _NoInitialisation():
        warnings.simplefilter("ignore")  # the package still speaks to torchvision by names deprecated since 0.13
        return package.LPIPS(net="vgg", pnet_rand=True, verbose=False)


class _NoInitialisation(TorchFunctionMode):
    """Leaves new weights as allocated: VGG-16's unused classifier would take 4 s and 500 MB to fill at random."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _in_chunks(metric: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    images = max(1, _CHUNK_PIXELS // (x.shape[2] * x.shape[3]))
    return torch.cat([metric(a, b) for a, b in zip(x.split(images), y.split(images), strict=True)])


def _check(
    reconstruction: Tensor,
    truth: Tensor,
    data_range: float,
    *,
    metric: str = "MSE",
    smallest: int = 1,
    channels: tuple[int, ...] = (),
) -> None:
    """Raise :class:`DataError` unless the metric is defined for these images."""
    shape = tuple(reconstruction.shape)
    if shape != tuple(truth.shape) or len(shape) != 4 or 0 in shape:
        raise DataError(
            f"{metric} compares two tensors of one shape (images, channels, height, width); "
            f"the reconstruction has {shape}, the truth {tuple(truth.shape)}"
        )
    for name, images in (("reconstruction", reconstruction), ("truth", truth)):
        if not images.is_floating_point():
            raise DataError(f"{metric}: the {name} is {images.dtype}; expected floats in [0, {data_range:g}]")
        low, high = (float(bound) for bound in images.aminmax())
        if not (low >= 0 and high <= data_range):  # so written that NaN fails
            raise DataError(
                f"{metric}: the {name} has values from {low:g} to {high:g}; expected [0, {data_range:g}]. "
                "Clamp it, or give the data_range it has"
            )
    if min(shape[2:]) < smallest:
        raise DataError(f"{metric} needs images of at least {smallest} x {smallest} pixels; these have {shape[2:]}")
    if channels and shape[1] not in channels:
        expected = " or ".join(map(str, channels))
        raise DataError(f"{metric} is defined for {expected} channels; these images have {shape[1]}")
