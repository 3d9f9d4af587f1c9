"""Distances between updates: value and cotangent by autograd, digits, scale, and the zero update."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gradleak.distance import DISTANCES, cosine, squared_l2
from gradleak.observation import Update

SHAPES = {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,), "linear.weight": (5, 16), "scalar": ()}


def update(seed: int, *, dtype: torch.dtype = torch.float64) -> Update:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, dtype=dtype, generator=generator) for name, shape in SHAPES.items()}


def flat(parts: Update) -> Tensor:
    return torch.cat([t.flatten() for t in parts.values()])


def as_type(parts: Update, dtype: torch.dtype) -> Update:
    return {name: t.to(dtype) for name, t in parts.items()}


#: The definitions of CI-Net, Eq. 2 and 3, for autograd.
DEFINITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared-l2": lambda g, target: (g - target).square().sum(),
    "cosine": lambda g, target: 1 - (g @ target) / (g.norm() * target.norm()),
}


@pytest.mark.parametrize("name", list(DISTANCES))
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_value_and_cotangent(name: str, scale: float) -> None:
    """D and dD/dg are autograd's, in float64; the arguments are left as they are."""
    g, target = {k: scale * t for k, t in update(0).items()}, update(1)
    copies = ({k: t.clone() for k, t in part.items()} for part in (g, target))
    value, cotangent = DISTANCES[name](g, target)

    leaf = flat(g).requires_grad_()
    expected = DEFINITIONS[name](leaf, flat(target))
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-12)
    assert {k: t.shape for k, t in cotangent.items()} == {k: t.shape for k, t in target.items()}
    torch.testing.assert_close(flat(cotangent), leaf.grad, rtol=1e-10, atol=0)
    for before, now in zip(copies, (g, target), strict=True):
        assert all(torch.equal(before[k], now[k]) for k in now)


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)
def test_distance_to_itself_is_zero(distance: Callable[[Update, Update], tuple[float, Update]]) -> None:
    value, cotangent = distance(update(0), update(0))
    assert value == pytest.approx(0, abs=1e-30)
    assert flat(cotangent).norm() < 1e-12


@pytest.mark.parametrize("apart", [1e-3, 1e-5, 1e-6])
def test_cosine_keeps_its_digits_in_float32(apart: float) -> None:
    """Of nearly equal updates, where 1 - cos has lost all of them: within 5 % of float64 in value and cotangent."""
    target = update(0, dtype=torch.float32)
    g = {k: t + apart * update(1, dtype=torch.float32)[k] for k, t in target.items()}
    value, cotangent = cosine(g, target)
    expected, expected_cotangent = cosine(as_type(g, torch.float64), as_type(target, torch.float64))
    assert value == pytest.approx(expected, rel=0.05)
    error = flat(cotangent) - flat(expected_cotangent).float()
    assert error.norm() < 0.2 * flat(expected_cotangent).norm()
    if apart <= 1e-5:
        naive = float(DEFINITIONS["cosine"](flat(g), flat(target)))
        assert abs(naive - expected) > expected / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e6, 1e20])
def test_cosine_does_not_see_scales(dtype: torch.dtype, scale: float) -> None:
    """D(s g, g*) = D(g, s g*) = D(g, g*) and dD/dg (s g, g*) = dD/dg (g, g*) / s, also where squares leave float32."""
    g, target = update(0, dtype=dtype), update(1, dtype=dtype)
    value, cotangent = cosine(g, target)
    for scaled in ((g, {k: scale * t for k, t in target.items()}), ({k: scale * t for k, t in g.items()}, target)):
        assert cosine(*scaled)[0] == pytest.approx(value, rel=1e-5)
    shrunk = cosine({k: scale * t for k, t in g.items()}, target)[1]
    torch.testing.assert_close(flat(shrunk).double() * scale, flat(cotangent).double(), rtol=1e-4, atol=1e-6)


def test_cosine_is_between_0_and_2() -> None:
    g = update(0)
    opposite = {k: -t for k, t in g.items()}
    assert cosine(g, opposite)[0] == pytest.approx(2)
    assert cosine(g, g)[0] >= 0


@pytest.mark.parametrize("zero", ["update", "observed", "both"])
def test_a_zero_update_is_at_cosine_distance_1_and_pulls_nowhere(zero: str) -> None:
    """No direction, no angle: no NaN that would end a run either."""
    nothing = {k: torch.zeros_like(t) for k, t in update(0).items()}
    value, cotangent = cosine(
        nothing if zero in ("update", "both") else update(0), nothing if zero in ("observed", "both") else update(1)
    )
    assert value == 1.0
    assert not flat(cotangent).any()


@pytest.mark.parametrize("distance", [cosine, squared_l2])
def test_the_observed_names_select_what_is_compared(distance: Callable[[Update, Update], tuple[float, Update]]) -> None:
    """A tensor that the client did not send counts neither in the value nor in the norm."""
    g, target = update(0), update(1)
    del target["conv.bias"]
    value, cotangent = distance(g, target)
    assert list(cotangent) == list(target)
    assert value == distance({k: g[k] for k in target}, target)[0]
