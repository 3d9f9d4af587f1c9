"""Convolutions of fewer multiplications: in float64 they are torch's to the last digits, in float32 nearly so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gradleak import mixed, winograd
from gradleak.client import FedSGD
from gradleak.convolution import Geometry
from gradleak.models.cifar import resnet18
from gradleak.vjp import SelfChecking, secant


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any processor, for networks that a test can afford."""
    monkeypatch.setattr(winograd, "pays_here", lambda: True)
    monkeypatch.setattr(winograd, "CHANNELS", 1)
    monkeypatch.setattr(winograd, "SIZE", 1)


def of_torch(y: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and the transposes of y."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    out = F.conv2d(x, w, padding=1)
    return (out.detach(), *torch.autograd.grad(out, [x, w], y))


def ours(y: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return winograd.forward(x, w), winograd.to_images(y, x, w), winograd.to_weight(y, x, w)


def factors(batch: int, inputs: int, outputs: int, size: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, outputs, *size), (batch, inputs, *size), (outputs, inputs, 3, 3)
    y, x, w = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return y, x, w


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (7, 7), (8, 4), (5, 3), (1, 2)], ids=str)
def test_products_and_transposes_are_those_of_torch(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    # kernels in several parts, and a part in several columns
    monkeypatch.setattr(winograd, "PART", 36 * 5 * 3)
    monkeypatch.setattr(winograd, "COLUMNS", 7)
    given = factors(3, 5, 7, size, torch.float64)
    for found, wanted in zip(ours(*given), of_torch(*given), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(4, 4), (7, 5)], ids=str)
def test_kept_kernels_give_the_same(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    kept, (y, x, w) = winograd.Kept(), factors(3, 5, 7, size, torch.float64)
    wanted = of_torch(y, x, w)
    for _ in range(2):
        kept.next_pass()
        torch.testing.assert_close(winograd.forward(x, w, kept), wanted[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(winograd.to_images(y, x, w, kept), wanted[1], rtol=1e-12, atol=1e-12)
    assert kept.kernels(w) is kept.kernels(w.detach())
    monkeypatch.setattr(winograd, "IMAGES_KEPT", 2)
    kept = winograd.Kept()
    winograd.forward(x, w, kept)
    assert not kept._known  # too many images


def test_kept_kernels_are_those_of_the_weights_as_they_are() -> None:
    kept, (y, x, w) = winograd.Kept(), factors(3, 5, 7, (4, 4), torch.float64)
    winograd.forward(x, w, kept)
    w.mul_(2)
    torch.testing.assert_close(winograd.forward(x, w, kept), of_torch(y, x, w)[0], rtol=1e-12, atol=1e-12)
    # weights that are made anew for each pass: no confusion with those before, and none is held for long
    for k in range(20):
        kept.next_pass()
        other = w * k
        torch.testing.assert_close(winograd.forward(x, other, kept), k * of_torch(y, x, w)[0], rtol=1e-12, atol=1e-10)
        assert len(kept._known) <= 2


def test_round_off_is_about_that_of_torch() -> None:
    given = factors(8, 96, 96, (8, 8), torch.float32)
    wanted = of_torch(*(t.double() for t in given))
    for found, exact in zip(ours(*given), wanted, strict=True):
        assert float((found - exact).norm()) < 3e-6 * float(exact.norm())


def test_a_tile_takes_a_quarter_of_the_multiplications() -> None:
    """Between the transforms, which do not grow with the product of input and output channels times images."""
    _, x, w = factors(2, 64, 64, (8, 8), torch.float32)

    def count(product: Callable[[Tensor, Tensor], Tensor], operation: object) -> int:
        with FlopCounterMode(display=False) as counter:
            product(x, w)
        return counter.get_flop_counts()["Global"][operation]

    plain = count(lambda x, w: F.conv2d(x, w, padding=1), torch.ops.aten.convolution)
    assert 4 * count(winograd.forward, torch.ops.aten.bmm) == plain


def test_images_in_any_order_of_memory() -> None:
    given = factors(3, 4, 6, (8, 8), torch.float64)
    turned = [t.contiguous(memory_format=torch.channels_last) for t in given]
    for found, wanted in zip(ours(*turned), of_torch(*given), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize(
    ("convolution", "taken"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), True),
        (nn.Conv2d(4, 6, 3, padding=1, bias=False), True),
        (nn.Conv2d(4, 6, 3, padding="same"), False),
        (nn.Conv2d(4, 6, 3, padding=1, stride=2), False),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), False),
        (nn.Conv2d(4, 6, 3, padding=2, dilation=2), False),
        (nn.Conv2d(4, 6, 1), False),
        (nn.Conv2d(4, 6, 3, padding=1).double(), False),
    ],
    ids=str,
)
def test_a_convolution_has_its_own_output_and_gradients(
    convolution: nn.Conv2d, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    plain_forward = winograd.forward
    monkeypatch.setattr(winograd, "forward", lambda x, w, kept: (calls.append(x.shape), plain_forward(x, w, kept))[1])
    x = torch.rand(2, 4, 8, 8, dtype=convolution.weight.dtype, requires_grad=True)
    leaves = [x, *convolution.parameters()]
    plain = convolution(x)
    with mixed.convolutions():
        y = convolution(x)
    assert bool(calls) == taken
    wanted, found = (torch.autograd.grad((out * out.detach().cos()).sum(), leaves) for out in (plain, y))
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("_always")
def test_sizes_may_be_single_numbers() -> None:
    x, w = torch.rand(2, 4, 8, 8), torch.rand(6, 4, 3, 3, requires_grad=True)
    with mixed.convolutions():
        y = F.conv2d(x, w, None, 1, 1, 1, 1)
    torch.testing.assert_close(y, F.conv2d(x, w, padding=1))
    assert Geometry.of(1, 1, 1, 1) == Geometry.of([1, 1], (1, 1), (1, 1), 1)
    with mixed.rounds(True, torch.device("cpu")), mixed.convolutions():
        y = F.conv2d(x, w, None, 2, 1, 1, 1)
    (gradient,) = torch.autograd.grad(y.sum(), w)
    assert gradient.shape == w.shape


@pytest.mark.usefixtures("_always")
def test_the_secant_of_a_whole_network_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    client = FedSGD(resnet18(image_shape=(3, 16, 16), num_classes=10, width=8))
    x, y = torch.rand(4, 3, 16, 16), torch.arange(4)
    found, transpose = client.vjp(x, y, engine=secant)
    cotangent = {name: torch.randn_like(g) for name, g in found.items()}
    back = transpose(cotangent)
    with_kept, kept = SelfChecking(), winograd.Kept()
    monkeypatch.setattr(with_kept, "_kept", kept)
    for _ in range(3):
        again, transposed = client.vjp(x, y, engine=with_kept)
        transposed(cotangent)
    assert kept._known
    for name, g in found.items():
        torch.testing.assert_close(again[name], g, rtol=1e-3, atol=1e-5)
    monkeypatch.setattr(winograd, "pays_here", lambda: False)
    wanted, other = client.vjp(x, y, engine=secant)
    differs = 0
    for name, g in wanted.items():
        torch.testing.assert_close(found[name], g, rtol=1e-3, atol=1e-5)
        assert found[name].is_contiguous()
        differs += not found[name].equal(g)
    assert differs  # it was another way
    plain = other(cotangent)
    assert 0 < float((back - plain).norm()) < 0.02 * float(plain.norm())


@pytest.mark.parametrize(
    ("batch", "channels", "size", "dtype", "expected"),
    [
        (16, 512, (4, 4), torch.float32, True),
        (16, 256, (8, 8), torch.float32, True),
        (16, 512, (7, 7), torch.float32, True),
        (4, 512, (4, 4), torch.float32, False),  # few images
        (16, 256, (5, 5), torch.float32, False),  # tiles that are half empty
        (16, 128, (16, 16), torch.float32, False),  # large images
        (64, 64, (8, 8), torch.float32, False),  # few channels
        (16, 512, (4, 4), torch.float64, False),
        (16, 512, (4, 4), torch.bfloat16, False),
    ],
)
def test_where_it_was_measured_to_pay(
    batch: int, channels: int, size: tuple[int, int], dtype: torch.dtype, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = torch.empty(batch, channels, *size, dtype=dtype), torch.empty(channels, channels, 3, 3, dtype=dtype)
    for here in (True, False):
        monkeypatch.setattr(winograd, "pays_here", lambda here=here: here)
        assert winograd.pays(x, w) == (expected and here)


def test_only_on_one_thread_of_processors_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, threads, expected in (("AVX2", 1, True), ("AVX2", 2, False), ("AVX512", 1, False), ("DEFAULT", 1, False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        torch.set_num_threads(threads)
        assert winograd.pays_here() == expected
