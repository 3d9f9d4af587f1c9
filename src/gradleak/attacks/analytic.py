"""Analytic: where F begins with a linear layer on the image, the update holds the image itself.

L. T. Phong, Y. Aono, T. Hayashi, L. Wang and S. Moriai, "Privacy-Preserving Deep Learning via Additively Homomorphic
Encryption", IEEE TIFS 2018, section III; J. Geiping, H. Bauermeister, H. Droege and M. Moeller, "Inverting Gradients - How
easy is it to break privacy in federated learning?", NeurIPS 2020, Proposition 3.1.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from gradleak.attacks.recipe import Attack, Problem
from gradleak.distance import DISTANCES, DistanceName
from gradleak.errors import ObservationError

#: How far beyond [0, 1] a candidate may reach and still count as an image.
RANGE_SLACK = 0.01
#: Largest difference of two equal candidates, in units of the image range: the round-off of float32 and little more.
EQUAL = 1e-6
#: Largest relative error of the layer's gradient for images that are accepted from a batch.
EXACT = 1e-3


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class AnalyticAttack(Attack):
    r""":math:`x = \nabla_{W_k} L / \nabla_{b_k} L`, without a loop, for F that begins with :math:`W x + b`  (Proposition 2).

    With :math:`\delta_i = \partial L / \partial (W x_i + b)` the layer's gradients are :math:`\sum_i \delta_{ik} x_i` and
    :math:`\sum_i \delta_{ik}`.

    - One image: exact; all rows k are used, weighted by least squares.
    - One image, layer without a bias: exact up to a scale. The scale is the one of least matching loss (``distance``)
      among those that put the image into [0, 1].
    - A batch: a row that only one image activates gives that image. An image counts as found when at least two rows
      agree on it; rows that mix images agree by chance at most. Needs B such images, which must give the layer's
      gradient, and a bias.

    The layer's input may be a pixelwise affine function of the image (a normalisation), which is found and inverted. The
    settings of a loop, from ``rounds`` on, have no effect.
    """

    needs: ClassVar[str] = (
        "a model that begins with a linear layer on the image; of a batch, rows that one image alone activates"
    )

    distance: DistanceName = "squared-l2"

    def closed_form(self, problem: Problem) -> Tensor:
        layer = first_layer(problem)
        if problem.batch > 1:
            images = _separate(problem, layer)
        elif layer.bias is not None:
            images = layer.images(_quotient(layer.weight, layer.bias, layer.name))
        else:
            images = _scaled(problem, layer, self.distance)
        return images.to(next(iter(problem.client.weights.values())))

    def describe(self, problem: Problem, image_model: nn.Module) -> dict[str, Any]:
        layer = first_layer(problem)
        scale = "told by the bias gradient" if layer.bias is not None else "the one of least matching loss in [0, 1]"
        return {"layer": layer.name, "scale": scale}


@dataclasses.dataclass(frozen=True)
class FirstLayer:
    """F's first layer, linear on the flattened image: its gradient, and how the image enters it.

    Attributes:
        name: In F.
        weight: Gradient of W, rows x (C H W), float64.
        bias: Gradient of b, rows; None where the layer has no bias or does not send its gradient.
        gain: The layer's input is ``gain * x + offset``, pixel by pixel; C H W numbers, none of them zero.
        offset: C H W numbers.
        image_shape: (C, H, W).
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    gain: Tensor
    offset: Tensor
    image_shape: tuple[int, int, int]

    def images(self, inputs: Tensor) -> Tensor:
        """The images that give these inputs of the layer. N x (C H W) -> N x C x H x W."""
        return ((inputs - self.offset) / self.gain).reshape(-1, *self.image_shape)


def first_layer(problem: Problem) -> FirstLayer:
    """Find F's first layer with parameters by running F, and check that it is linear on the flattened image.

    Raises:
        ObservationError: It is another kind of layer, its input is not a pixelwise affine function of the image, it is
            used twice, or its gradient is not in the update; names the layer.
    """
    client, shape = problem.client, problem.image_shape
    layers = {
        name: module
        for name, module in client.model.named_modules()
        if not list(module.children()) and next(module.parameters(), None) is not None
    }
    calls: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: calls.append((name, args[0].detach().double())))
        for name, module in layers.items()
    ]
    weight = next(iter(client.weights.values()))
    noise = torch.rand(6, *shape, generator=torch.Generator().manual_seed(0)).to(weight)
    black, white = torch.zeros_like(noise[:1]), torch.ones_like(noise[:1])
    try:
        with torch.no_grad():
            # the second batch tells a fixed normalisation from one by the batch's own statistics
            client.outputs(torch.cat([black, white, noise[:2]]))
            uses = [name for name, _ in calls]
            client.outputs(noise[2:])
    finally:
        for handle in handles:
            handle.remove()
    if not uses:
        raise ObservationError("attack 'analytic': the model has no layer with parameters")
    name, seen = calls[0]
    what = f"attack 'analytic': the model's first layer is {name or 'the model itself'!r} ({type(layers[name]).__name__})"
    if not isinstance(layers[name], nn.Linear):
        raise ObservationError(
            f"{what}; the closed form needs a linear layer on the flattened image there. Use an attack with a loop: cinet"
        )
    if uses.count(name) > 1:
        raise ObservationError(f"{what}, and it is used {uses.count(name)} times: its gradient is a sum that hides the image")
    if seen.ndim != 2 or seen.shape[1] != noise[0].numel() or not _is_pixelwise_affine(seen, calls[len(uses)][1], noise):
        raise ObservationError(
            f"{what}, but its input, of shape {tuple(seen.shape[1:])}, is not the image of {'x'.join(map(str, shape))}, "
            "flattened and at most normalised pixel by pixel; use an attack with a loop: cinet"
        )
    if _parameter(name, "weight") not in problem.observed:
        raise ObservationError(f"{what}, and its gradient is not in the update; use an attack with a loop: cinet")
    bias = problem.observed.get(_parameter(name, "bias"))
    return FirstLayer(
        name=name,
        weight=problem.observed[_parameter(name, "weight")].double(),
        bias=None if bias is None else bias.double(),
        gain=seen[1] - seen[0],
        offset=seen[0],
        image_shape=shape,
    )


def _parameter(layer: str, kind: str) -> str:
    """The full name in F of a layer's ``weight`` or ``bias``; F itself may be the layer."""
    return f"{layer}.{kind}" if layer else kind


def _is_pixelwise_affine(first: Tensor, second: Tensor, noise: Tensor) -> bool:
    """Whether both batches of layer inputs are gain * x + offset, with gain and offset from the black and the white image."""
    gain, offset = first[1] - first[0], first[0]
    expected = gain * noise.double().flatten(1) + offset
    close = torch.allclose(torch.cat([first[2:], second]), expected, rtol=0, atol=1e-4 * float(first.abs().max()))
    return close and bool((gain != 0).all())


def _quotient(weight: Tensor, bias: Tensor, name: str) -> Tensor:
    r"""The input z of least :math:`\|\nabla W - \nabla b\, z^\top\|`: every row's quotient, weighted by its bias gradient."""
    if not bias.any():
        raise ObservationError(
            f"attack 'analytic': the bias gradient of {name!r} is zero (a normalisation after it removes the bias, or no unit "
            "is active): its rows tell no image; use an attack with a loop: cinet"
        )
    return bias @ weight / bias.square().sum()


def _scaled(problem: Problem, layer: FirstLayer, distance: DistanceName) -> Tensor:
    """The image from a layer without a bias: its direction from the gradient, its scale from the matching loss."""
    strongest = layer.weight[layer.weight.square().sum(1).argmax()]
    direction = (layer.weight @ strongest) @ layer.weight  # the rows are parallel: this averages them
    direction = direction / direction.norm()
    ends = torch.stack([layer.offset - RANGE_SLACK * layer.gain, layer.offset + (1 + RANGE_SLACK) * layer.gain])
    limits = (ends / direction)[:, direction != 0]
    low, high = float(limits.amin(0).max()), float(limits.amax(0).min())
    if low > high:
        raise ObservationError(
            f"attack 'analytic': no multiple of the gradient of {layer.name!r} is an image with values in [0, 1]; is this the "
            "gradient of one image?"
        )
    weight = next(iter(problem.client.weights.values()))

    def loss(scale: float) -> float:
        image = layer.images(scale * direction).to(weight)
        return DISTANCES[distance](problem.client(image, problem.labels), problem.observed)[0]

    # a global grid, then eight finer ones around the best point: six digits of the scale
    for points in (65, *[9] * 8):
        grid = torch.linspace(low, high, points, dtype=torch.float64).tolist()
        losses = [loss(scale) for scale in grid]
        best = losses.index(min(losses))
        low, high = grid[max(0, best - 1)], grid[min(points - 1, best + 1)]
    return layer.images((low + high) / 2 * direction)


def _separate(problem: Problem, layer: FirstLayer) -> Tensor:
    """The B images on which at least two rows each agree, in the order of the labels."""
    if layer.bias is None:
        raise ObservationError(
            f"attack 'analytic': {layer.name!r} sends no bias gradient, which {problem.batch} images need; without it only one "
            "image can be computed. Use an attack with a loop: cinet"
        )
    rows = layer.bias.abs().argsort(descending=True)
    rows = rows[layer.bias[rows] != 0]
    candidates = layer.images(layer.weight[rows] / layer.bias[rows, None])
    valid = ((candidates >= -RANGE_SLACK) & (candidates <= 1 + RANGE_SLACK)).flatten(1).all(1)
    rows, candidates = rows[valid], candidates[valid]
    found: list[tuple[Tensor, Tensor]] = []
    while len(rows):
        agree = (candidates - candidates[0]).abs().flatten(1).amax(1) <= EQUAL
        if agree.sum() > 1:
            found.append((candidates[0], rows[agree]))
        rows, candidates = rows[~agree], candidates[~agree]
    if len(found) < problem.batch:
        raise ObservationError(
            f"attack 'analytic': found {len(found)} of {problem.batch} images: the rows of {layer.name!r} mix them. Each image "
            "needs two units that it alone activates, as in a wide layer before a ReLU; use an attack with a loop: cinet"
        )
    found.sort(key=lambda image_rows: -len(image_rows[1]))
    chosen, rows_of = zip(*found[: problem.batch], strict=True)
    images = _in_label_order(problem, layer, torch.stack(chosen), rows_of)
    error = _relative_error(problem, layer, images)
    if error > EXACT:
        raise ObservationError(
            f"attack 'analytic': the {problem.batch} images on which rows of {layer.name!r} agree miss its gradient by "
            f"{error:.1%}: they agree by chance, and the rows mix the images. Use an attack with a loop: cinet"
        )
    return images


def _in_label_order(problem: Problem, layer: FirstLayer, images: Tensor, rows_of: tuple[Tensor, ...]) -> Tensor:
    """Assign images to labels: an image's own rows must have the bias gradient that its label gives them."""
    assert layer.bias is not None
    weight = next(iter(problem.client.weights.values()))
    values, position = problem.labels.unique(return_inverse=True)
    costs = []
    for value in values:
        update = problem.client(images.to(weight), torch.full_like(problem.labels, int(value)))
        bias = update[_parameter(layer.name, "bias")].double()
        costs.append(torch.stack([(bias - layer.bias)[rows].norm() / layer.bias[rows].norm() for rows in rows_of]))
    _, order = linear_sum_assignment(torch.stack(costs)[position].cpu().numpy())
    return images[torch.as_tensor(order, device=images.device)]


def _relative_error(problem: Problem, layer: FirstLayer, images: Tensor) -> float:
    """How far the layer's gradient for these images is from the observed one, relative to it."""
    weight = next(iter(problem.client.weights.values()))
    gradient = problem.client(images.to(weight), problem.labels)[_parameter(layer.name, "weight")].double()
    return float((gradient - layer.weight).norm() / layer.weight.norm())


PRESETS: dict[str, tuple[Attack, str]] = {
    "analytic": (AnalyticAttack(), "closed form where F begins with a linear layer (Phong et al. 2018, Geiping et al. 2020)"),
}
