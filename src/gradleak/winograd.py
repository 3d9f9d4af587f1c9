r"""Convolutions of small images with 3 x 3 kernels, in a quarter of the multiplications.

Winograd's minimal filtering: with d six values of a row and g the three weights of a kernel, the four outputs are

.. math:: y = A^\top [(G g) \odot (B^\top d)],

six multiplications in place of twelve. G and A evaluate polynomials at six points and B interpolates, so that any six points
do. In two dimensions a tile of 4 x 4 outputs takes 36 in place of 144; over channels and images they are 36 products of
matrices. The form is linear in d, g and y, so that both derivatives are its transposes, and cost the same.

Tiles overlap, and bringing them into order costs what is saved, where images are large. A small image is one row of a matrix:
B and A over all of its tiles are matrices too (:func:`_transforms`), and no number is copied. Kernels are transformed in parts
that stay in the cache.

Source: Winograd, "Arithmetic complexity of computations" (1980); Lavin and Gray, "Fast algorithms for convolutional neural
networks", CVPR 2016.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

#: Where polynomials are evaluated, and at infinity. The usual points, 0, 1, -1, 2 and -2, have twice the round-off, and save
#: multiplications in transforms that are products of matrices here.
POINTS = (0.0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2), -math.sqrt(2))

#: Outputs of a tile in a row, weights of a kernel in a row, and values that the tile needs.
OUTPUTS, WEIGHTS, VALUES = 4, 3, 6

#: Largest height and width of images: with 16 the transforms, which grow with the square of it, cost what is saved.
SIDE = 8

#: Most values of whole tiles over an image's values: with more, too much is computed that lies outside.
OUTSIDE = 4 / 3

#: Least number of input times output channels, and of values of the images: with fewer, products are too small to gain.
CHANNELS, SIZE = 128**2, 2**17

#: Numbers of transformed kernels at a time: 4 MiB, and as many columns of the product that makes them.
PART, COLUMNS = 2**20, 4096

#: Transformed kernels take four times the memory of the weights. They are kept where there are at most so many images: with
#: more, making them takes a smaller share of the time, and memory is short.
IMAGES_KEPT = 32

#: Numbers between the rows of transformed kernels: rows at powers of two are in each other's place in the cache.
PADDING = 16


def pays_here() -> bool:
    """Whether this is faster than the library's convolutions: on one thread of a processor with AVX2 and without AVX-512. Where
    multiplying is cheaper it was not measured, and two threads wait for memory together.
    """
    return torch.get_num_threads() == 1 and torch.backends.cpu.get_cpu_capability() == "AVX2"


def pays(x: Tensor, w: Tensor) -> bool:
    """Whether to compute the convolution of x, B x C_in x H x W, with w, C_out x C_in x 3 x 3, so; with a padding of one."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or w.dtype != torch.float32 or x.ndim != 4:
        return False
    height, width = x.shape[2:]
    tiles = math.ceil(height / OUTPUTS) * math.ceil(width / OUTPUTS)
    fits = max(height, width) <= SIDE and tiles * OUTPUTS**2 <= OUTSIDE * height * width
    return pays_here() and fits and w.shape[0] * w.shape[1] >= CHANNELS and x.numel() >= SIZE


class Kept:
    """Transformed kernels of weights that stay as they are from pass to pass."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, torch.Size], tuple[Tensor, int, Tensor]] = {}
        self._used: set[tuple[int, torch.Size]] = set()

    def next_pass(self) -> None:
        """Forget what was not used since the last call: weights that were replaced."""
        self._known = {key: known for key, known in self._known.items() if key in self._used}
        self._used.clear()

    def kernels(self, w: Tensor) -> Tensor:
        """36 x C_out x C_in."""
        key = w.data_ptr(), w.shape
        self._used.add(key)
        known = self._known.get(key)
        if known is None or known[1] != w._version:
            # the weights are held too, so that no others come to be in their place
            known = self._known[key] = w.detach(), w._version, _transformed_kernels(w)
        return known[2]


def forward(x: Tensor, w: Tensor, kept: Kept | None = None) -> Tensor:
    """The convolution, B x C_out x H x W."""
    a, b = _transforms(*x.shape[2:], x.dtype)
    values = _transformed(x, b)
    products = values.new_empty(*values.shape[:2], len(w))
    for rows, kernels in _kernels(w, len(x), kept):
        products[:, :, rows] = values @ kernels.transpose(1, 2)
    return _images(products, a, x)


def to_images(y: Tensor, x: Tensor, w: Tensor, kept: Kept | None = None) -> Tensor:
    """The cotangent y of the output to that of x, of which the shape is read only."""
    a, b = _transforms(*x.shape[2:], x.dtype)
    products = _transformed(y, a)
    values = products.new_zeros(*products.shape[:2], x.shape[1])
    for rows, kernels in _kernels(w, len(x), kept):
        values.baddbmm_(products[:, :, rows], kernels)
    return _images(values, b, x)


def to_weight(y: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """The cotangent y of the output to that of w, of which the shape is read only."""
    a, b = _transforms(*x.shape[2:], x.dtype)
    products, values = _transformed(y, a), _transformed(x, b)
    found = w.new_empty(w.shape)
    for rows in _parts(w):
        part = found[rows]
        kernels = _room(part)
        torch.bmm(products[:, :, rows].transpose(1, 2), values, out=kernels)
        part.view(-1, WEIGHTS**2).copy_((_kernel_transform(w.dtype).T @ kernels.flatten(1)).T)
    return found


@functools.cache
def _transforms(height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B of all tiles of an image, each 36 tiles x H W."""
    planes = [
        torch.einsum("ikp,jlq->ijklpq", down, across).flatten(0, 3).flatten(1).to(dtype)
        for down, across in zip(_tiles(height), _tiles(width), strict=True)
    ]
    return planes[0], planes[1]


def _tiles(size: int) -> tuple[Tensor, Tensor]:
    """A and B of the tiles of a row, points x tiles x size; what is outside of the row is zero or left out."""
    tiles = math.ceil(size / OUTPUTS)
    a, b = (torch.zeros(VALUES, tiles, size + VALUES, dtype=torch.float64) for _ in range(2))
    for k in range(tiles):
        first = OUTPUTS * k
        a[:, k, first : first + OUTPUTS] = _evaluate(OUTPUTS)
        b[:, k, first : first + VALUES] = torch.linalg.inv(_evaluate(VALUES)).T
    return a[..., :size], b[..., 1 : size + 1]


def _evaluate(coefficients: int) -> Tensor:
    """Of a polynomial at all points: points x coefficients."""
    powers = torch.tensor(POINTS, dtype=torch.float64)[:, None] ** torch.arange(coefficients)
    return torch.cat([powers, torch.eye(coefficients, dtype=torch.float64)[-1:]])


@functools.cache
def _kernel_transform(dtype: torch.dtype) -> Tensor:
    """G in two dimensions, 36 x 9."""
    return torch.einsum("ip,jq->ijpq", _evaluate(WEIGHTS), _evaluate(WEIGHTS)).flatten(0, 1).flatten(1).to(dtype)


def _transformed(images: Tensor, transform: Tensor) -> Tensor:
    """From B x C x H x W to 36 x (tiles B) x C."""
    batch, channels = images.shape[:2]
    return (transform @ images.reshape(batch * channels, -1).T).view(VALUES**2, -1, channels)


def _images(transformed: Tensor, transform: Tensor, like: Tensor) -> Tensor:
    """Back to B x C x H x W, by the transpose."""
    batch, channels = len(like), transformed.shape[2]
    return (transformed.view(-1, batch * channels).T @ transform).view(batch, channels, *like.shape[2:])


def _parts(w: Tensor) -> Iterator[slice]:
    """Output channels whose transformed kernels are computed together."""
    step = max(1, PART // (VALUES**2 * w.shape[1]))
    return (slice(k, min(k + step, len(w))) for k in range(0, len(w), step))


def _room(w: Tensor) -> Tensor:
    """For the transformed kernels of w: 36 x C_out x C_in."""
    n = w.shape[0] * w.shape[1]
    return w.new_empty(VALUES**2, n + PADDING)[:, :n].unflatten(1, w.shape[:2])


def _transformed_kernels(w: Tensor) -> Tensor:
    """36 x C_out x C_in."""
    kernels, flat = _room(w), w.reshape(-1, WEIGHTS**2)
    to = kernels.flatten(1)
    for k in range(0, len(flat), COLUMNS):
        torch.mm(_kernel_transform(w.dtype), flat[k : k + COLUMNS].T, out=to[:, k : k + COLUMNS])
    return kernels


def _kernels(w: Tensor, images: int, kept: Kept | None) -> Iterator[tuple[slice, Tensor]]:
    """Output channels and their transformed kernels: all of those that are kept, else one part after the other."""
    if kept is not None and images <= IMAGES_KEPT:
        yield slice(None), kept.kernels(w)
        return
    for rows in _parts(w):
        yield rows, _transformed_kernels(w[rows])
