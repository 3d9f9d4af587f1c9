r"""The whitened distance: directions of an update weigh as much as they do not vary with the images by themselves.

What an update says about its images is spread very unevenly over its numbers. Most of its norm hardly depends on the images,
a few directions follow their brightness, and what tells one image from another is small. Generalised least squares weighs
directions by the inverse covariance, here that of what random images of the same labels would send:

.. math:: \langle a, b \rangle_M = \sum_l \langle a_l, M_l b_l \rangle, \qquad M_l \approx \mathrm{Cov}[A(x, y)_l]^{-1}.

The covariance of a weight of o x i (x k) numbers is taken as a Kronecker product of three factors, over outputs, inputs and
kernel positions, as K-FAC (Martens & Grosse 2015) and Shampoo (Gupta et al. 2018) do for other matrices; that of a vector as a
multiple of the identity. No image of the client is needed: only the labels, W, and noise with the spectrum of photographs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak import mixed
from gradleak.client import ClientOperator
from gradleak.image_model import photographic
from gradleak.observation import Update
from gradleak.sharded import WHOLE, Shard

#: Batches of random images from which the covariance is taken.
SAMPLES = 8

#: Added to each factor, as a share of its largest eigenvalue, where each image has a gradient of its own (docs/experiments.md).
DAMPING = 0.01

#: The same times B, where batch statistics couple the images: few are then better found with more of it, and many with less.
COUPLED_DAMPING = 0.5

#: Eigenvalues of a factor below this share of its damping are taken as one: their inverses differ by no more than this.
TAIL = 0.3

#: Factors with more rows are taken as the identity: their eigenvalues would cost more than the attack.
LARGEST = 2048

#: Matrices with so many numbers are multiplied by oneDNN; of smaller ones the calls cost more than the products.
ONEDNN_FROM = 2**15

#: A tensor whose numbers vary less than this, relative to the root mean square of the whole update, says nothing but round-off.
ROUND_OFF = 1e-6

#: Mean and deviation of the random images' values, about those of photographs.
MEAN, DEVIATION = 0.5, 0.25


@dataclass(frozen=True)
class Factors:
    r"""One tensor's :math:`M_l = s\, (O \otimes I \otimes K)`.

    A factor is a symmetric matrix, n x n; or, where few of its eigenvalues are apart from the others, V, n x r, which
    stands for :math:`1 - V V^T`: a product then takes 2r / n of the time.

    Attributes:
        scale: s; zero where the images do not change this tensor.
        outputs, inputs, kernel: The factors; None: the identity.
    """

    scale: float
    outputs: Tensor | None = None
    inputs: Tensor | None = None
    kernel: Tensor | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        """:math:`M_l` times a tensor of this shape."""
        if self.outputs is None and self.inputs is None and self.kernel is None:
            return self.scale * tensor
        g = _three(tensor).movedim(2, 0)  # kernel positions first: few and wide products of matrices, and no copy between them
        shape, g = g.shape, self.scale * g.flatten(1)
        if self.kernel is not None:
            (g,) = _columns_(self.kernel, g[None])
        g = g.view(shape)
        if self.outputs is not None:
            g = _columns_(self.outputs, g)
        if self.inputs is not None:
            g = _rows_(self.inputs, g.flatten(0, 1)).view(shape)
        return g.movedim(0, 2).reshape(tensor.shape)


class Whitened:
    r"""One minus the cosine of the angle between two updates in the metric M, and its cotangent.

    :math:`D(g, g^*) = 1 - \langle g, g^* \rangle_M / (\|g\|_M \|g^*\|_M)`. With
    :math:`c = \langle g, g^* \rangle_M / \|g^*\|_M^2` and the residual :math:`e = g - c g^*`, orthogonal to :math:`g^*` in M,

    .. math:: \|g\|_M^2 = c^2 \|g^*\|_M^2 + \|e\|_M^2, \qquad
              \frac{\partial D}{\partial g} = \frac{c \|g^*\|_M}{\|g\|_M^3} M e - \frac{\|e\|_M^2}{\|g^*\|_M \|g\|_M^3} M g^*,

    so that M is applied once, to something small: a small distance keeps its digits. Of several processes each applies it to
    some of the tensors.

    Args:
        factors: M, name -> :class:`Factors` (:func:`factors`), of the tensors that this process works on.
        observed: :math:`g^*`.
        shard: The processes.
    """

    def __init__(self, factors: dict[str, Factors], observed: Update, *, shard: Shard = WHOLE) -> None:
        self.factors, self.observed, self.shard = factors, observed, shard
        self.whitened = {name: factors[name](observed[name]) for name in shard.own_of(observed)}
        self.size = self._sum(_products(observed, self.whitened)) ** 0.5

    def __call__(self, update: Update, observed: Update) -> tuple[float, Update]:
        """Value and cotangent (names of ``observed``, which must be the update that this distance was made for)."""
        if observed is not self.observed:
            return Whitened(self.factors, observed, shard=self.shard)(update, observed)
        if self.size == 0:
            return 1.0, {name: torch.zeros_like(t) for name, t in observed.items()}
        c = self._sum(_products(update, self.whitened)) / self.size**2
        cotangent, products = {}, []
        for name in self.whitened:
            e = torch.sub(update[name], observed[name], alpha=c)
            cotangent[name] = self.factors[name](e)
            products.append(torch.dot(e.flatten(), cotangent[name].flatten()))
        squared = self._sum(products)
        along = c * self.size
        length = (along**2 + squared) ** 0.5
        if length == 0:
            return 1.0, {name: torch.zeros_like(t) for name, t in observed.items()}
        value = squared / (length * (length + along)) if along > 0 else 1 - along / length
        for name, t in cotangent.items():
            t.mul_(along / length**3).sub_(self.whitened[name], alpha=squared / (self.size * length**3))
        return value, self.shard.collect(cotangent, observed)

    def only(self, observed: Update) -> Whitened:
        """The distance of some of the tensors, in the same metric; where one process works on all of them."""
        return Whitened({name: self.factors[name] for name in observed}, observed, shard=self.shard)

    def _sum(self, products: list[Tensor]) -> float:
        """Over all processes, of which one may have no tensors."""
        total = _total([next(iter(self.observed.values())).new_zeros(()), *products])
        self.shard.sum_([total])
        return float(total)


def whitened(
    client: ClientOperator, labels: Tensor, observed: Update, image_shape: tuple[int, int, int], *, shard: Shard = WHOLE
) -> Whitened:
    """The distance to ``observed`` for batches with these labels; the same for the same client, labels and shapes.

    Args:
        client: The operator A at the observed weights.
        labels: B labels.
        observed: g*; its names are compared.
        image_shape: (C, H, W).
        shard: The processes that divide the metric's tensors among them.
    """

    def sent() -> Iterator[Update]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(SAMPLES):
            noise = photographic(torch.randn(len(labels), *image_shape, generator=generator))
            images = (MEAN + DEVIATION * noise / noise.std()).clamp_(0, 1)
            update = client(images.to(next(iter(client.weights.values()))), labels)
            yield {name: update[name] for name in observed}

    damping = COUPLED_DAMPING / len(labels) if client.has_batch_statistics else DAMPING
    with mixed.rounds(False, labels.device):  # it serves the rounds in float32 too
        return Whitened(factors(sent(), damping=damping, names=shard.own_of(observed)), observed, shard=shard)


def factors(updates: Iterable[Update], *, damping: float, names: Collection[str] | None = None) -> dict[str, Factors]:
    """M from two or more updates of random images: the inverse of their covariance about their mean, tensor by tensor.

    Args:
        updates: Of the same names and shapes.
        damping: Added to each factor of the covariance, as a share of its largest eigenvalue; positive.
        names: Of which tensors; None: of all.
    """
    mean: Update = {}
    scatter: dict[str, list[Tensor | None]] = {}
    total: dict[str, float] = {}
    for count, update in enumerate(updates):
        if not count:
            mean = {name: t.clone() for name, t in update.items()}
            scatter = {name: [None, None, None] for name in update if names is None or name in names}
            total = dict.fromkeys(scatter, 0.0)
            continue
        for name, t in update.items():  # Welford: deviations from the mean so far
            deviation = t - mean[name]
            mean[name] += deviation / (count + 1)
            if name not in scatter:
                continue
            weight = count / (count + 1)
            total[name] += weight * float(deviation.square().sum())
            if t.ndim > 1:
                scatter[name] = [
                    None if new is None else weight * new if old is None else old.add_(new, alpha=weight)
                    for old, new in zip(scatter[name], _squares(_three(deviation)), strict=True)
                ]
    numbers = sum(t.numel() for t in mean.values())
    faint = ROUND_OFF**2 * float(_total(_products(mean, mean))) / numbers
    found = {}
    for name in scatter:
        t = mean[name]
        if not faint * t.numel() < total[name] < math.inf:  # nor where it is not a number
            found[name] = Factors(0.0)
        elif t.ndim < 2:
            found[name] = Factors(t.numel() / total[name])
        else:
            # E <d, M d> = trace of M times the covariance, of the factors' product, is to be the number of d's numbers
            inverses: list[Tensor | None] = []
            expected = total[name]
            for square in scatter[name]:
                if square is None:
                    inverses.append(None)
                    continue
                share, inverse = _inverse(square.double(), damping)
                expected *= share
                inverses.append(inverse.to(t.dtype))
            found[name] = Factors(t.numel() / expected, *inverses)
    return found


def _inverse(square: Tensor, damping: float) -> tuple[float, Tensor]:
    """A sum of squares: the trace of its product with its damped inverse over its own, and that inverse (:class:`Factors`)."""
    values, vectors = torch.linalg.eigh(square)
    values = values.clamp_min(0)
    inverse = 1 / (values / values[-1] + damping)
    apart = values > TAIL * damping * values[-1]
    if 2 * int(apart.sum()) < len(values):
        inverse[~apart] = inverse[~apart].mean()
        inverse = inverse / inverse[0]
        factor = vectors[:, apart] * (1 - inverse[apart]).sqrt()
    else:
        factor = (vectors * inverse) @ vectors.T
    return float((values * inverse).sum() / values.sum()), factor


def _rows_(factor: Tensor, x: Tensor) -> Tensor:
    """x, m x n, times a symmetric factor, n x n, as :class:`Factors` has it; in place where that has few columns: large tensors
    cost more to allocate than to add to.
    """
    n, r = factor.shape
    if _by_onednn(factor, x):
        return _product(x, factor) if r == n else x.sub_(_product(_product(x, factor), factor.T))
    return x @ factor if r == n else x.addmm_(x @ factor, factor.T, alpha=-1)


def _columns_(factor: Tensor, x: Tensor) -> Tensor:
    """A symmetric factor, n x n, times each of x, k x n x m; in place where it has few columns, or oneDNN computes it."""
    n, r = factor.shape
    if _by_onednn(factor, x[0]):
        for one in x:
            if r == n:
                one.copy_(_product(factor, one))
            else:
                one.sub_(_product(factor, _product(factor.T, one)))
        return x
    if r == n:
        return factor @ x
    factor = factor.expand(len(x), n, r)
    return x.baddbmm_(factor, factor.mT @ x, alpha=-1)


def _by_onednn(factor: Tensor, x: Tensor) -> bool:
    """Whether their products are oneDNN's: those of torch are MKL's, at half of an AMD processor's rate."""
    large = x.numel() >= ONEDNN_FROM and len(factor) >= 32 and factor.numel() > 0
    return large and x.device.type == "cpu" and x.dtype == torch.float32 and not x.requires_grad and _onednn()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")


@functools.cache
def _onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _three(tensor: Tensor) -> Tensor:
    """A weight of two or more dimensions as outputs x inputs x kernel positions."""
    return tensor.reshape(tensor.shape[0], tensor.shape[1], -1)


def _squares(g: Tensor) -> list[Tensor | None]:
    """Sums of products over all but one of three dimensions; None where a dimension is one, or larger than :data:`LARGEST`."""
    return [
        None if not 1 < n <= LARGEST else torch.tensordot(g, g, dims=([d for d in range(3) if d != k],) * 2)
        for k, n in enumerate(g.shape)
    ]


def _products(a: Update, b: Update) -> list[Tensor]:
    """Of each tensor of b with that of a."""
    return [torch.dot(a[name].flatten(), t.flatten()) for name, t in b.items()]


def _total(numbers: list[Tensor]) -> Tensor:
    """Sum in float64; one tensor, so that a GPU waits once."""
    return torch.stack(numbers).double().sum()
