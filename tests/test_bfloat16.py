"""F in bfloat16 with second derivatives of its own: they are those of torch, in float64 to the last digits."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from gradleak import bfloat16, mixed
from gradleak.client import FedSGD
from gradleak.models import ModelSpec, build
from gradleak.models.cifar import resnet18
from gradleak.observation import Update
from gradleak.protocols import Mode
from gradleak.vjp import Loss, SelfChecking, Transpose, exact

OURS = {"_ConvolutionBackward", "_BatchNormBackward"}


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same operations without the rounding."""
    monkeypatch.setattr(bfloat16, "FORMAT", torch.float64)


def derivatives(layer: nn.Module, x: Tensor, *, ours: bool) -> list[Tensor]:
    """Output, gradients of a loss, and the second derivative of random directions of these with respect to x."""
    generator = torch.Generator().manual_seed(1)
    x = x.clone().requires_grad_()
    if ours:
        with bfloat16.passes():
            y = layer(x)
        assert y.grad_fn is not None
        assert OURS & {type(f).__name__ for f in (y.grad_fn, *(f for f, _ in y.grad_fn.next_functions))}
    else:
        y = layer(x)
    u = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    leaves = [x, *layer.parameters()]
    first = torch.autograd.grad((y * u).sum() + y.square().sum(), leaves, create_graph=True)
    directions = [torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g.dtype) for g in first]
    (second,) = torch.autograd.grad(first, x, directions)
    return [y.detach(), *(g.detach() for g in first), second]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(4, 6, (1, 3), dilation=2),
        nn.Conv2d(4, 6, 3, groups=2, padding=(1, 0)),
        nn.Conv2d(4, 800, 3, padding=1),  # as matrices
        nn.Conv2d(4, 800, (5, 3), stride=(2, 1), padding=(2, 1), bias=False),
        nn.Conv2d(4, 800, 1, stride=2),
        nn.Conv2d(4, 800, 3, padding=1, dilation=2),
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
    ],
    ids=str,
)
def test_each_layer_has_its_own_derivatives(layer: nn.Module) -> None:
    torch.manual_seed(0)
    layer = layer.double()
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randn(3, 4, 9, 7, dtype=torch.float64)
    for found, wanted in zip(derivatives(layer, x, ours=True), derivatives(layer, x, ours=False), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_whole_network_has_its_own_update_and_transpose(mode: Mode) -> None:
    """But for batch norm with running statistics, which is torch's."""
    torch.manual_seed(0)
    client = FedSGD(resnet18(image_shape=(3, 16, 16), num_classes=10, width=8).double(), mode=mode)
    images, labels = torch.rand(4, 3, 16, 16, dtype=torch.float64), torch.arange(4)

    def ours(loss: Loss, weights: Update, x: Tensor) -> tuple[Update, Transpose]:
        def inside(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
            with bfloat16.passes():
                return loss(weights, x)

        return exact(inside, weights, x)

    wanted, found = (client.vjp(images, labels, engine=engine) for engine in (exact, ours))
    for name, g in wanted[0].items():
        torch.testing.assert_close(found[0][name], g, rtol=1e-9, atol=1e-12)
        assert found[0][name].is_contiguous()
    cotangent = {name: torch.randn_like(g) for name, g in wanted[0].items()}
    torch.testing.assert_close(found[1](cotangent), wanted[1](cotangent), rtol=1e-8, atol=1e-12)


def test_in_bfloat16_both_are_near() -> None:
    torch.manual_seed(0)
    # kinks are another matter: with ReLU a third of such an update is rounding, and an attack gives bfloat16 up at once
    client = FedSGD(build(ModelSpec(name="resnet18-cifar", width=16, activation="sigmoid"), image_shape=(3, 16, 16)))
    images, labels = torch.rand(4, 3, 16, 16), torch.arange(4)
    update, transpose = client.vjp(images, labels, engine=exact)
    with mixed.rounds(True, torch.device("cpu"), whole=True):
        half, other = client.vjp(images, labels, engine=SelfChecking())
    cotangent = {name: torch.randn_like(g) for name, g in update.items()}
    errors = torch.stack([(half[name] - g).norm() for name, g in update.items()])
    assert 0 < errors.norm() < 0.03 * torch.stack([g.norm() for g in update.values()]).norm()
    wanted, found = transpose(cotangent), other(cotangent)
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).norm() < 0.1 * wanted.norm()


def test_a_weight_of_zero_in_batch_norm_divides_nothing() -> None:
    layer = nn.BatchNorm2d(4)
    nn.init.zeros_(layer.weight)
    x = torch.randn(3, 4, 8, 8, requires_grad=True)
    with bfloat16.passes():
        y = layer(x)
    first = torch.autograd.grad((y * torch.randn_like(y)).sum(), list(layer.parameters()), create_graph=True)
    (second,) = torch.autograd.grad(first, x, [torch.ones_like(g) for g in first], materialize_grads=True)
    assert second.isfinite().all()
