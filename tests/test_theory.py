"""The propositions hold on real gradients, in float64: what total variation prefers, what is told, and what is not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import one_hot

from gradleak.attacks import attack
from gradleak.client import FedSGD, simulate
from gradleak.data import load
from gradleak.distance import DistanceName
from gradleak.errors import DataError
from gradleak.invariance import gain_sensitivity, image_sensitivity
from gradleak.invert import invert
from gradleak.labels import recover
from gradleak.prior import total_variation
from gradleak.spec import DataSpec
from gradleak.theory import (
    column_space_residual,
    counting,
    linear_gradient,
    matching_loss,
    softmax_residual,
    total_variation_limit,
)

SEEDS = range(4)
LABELS = torch.tensor([1, 0])


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    return load(DataSpec(source="sample", batch=2, size=8)).images.double()


def network(seed: int) -> FedSGD:
    torch.manual_seed(seed)
    return FedSGD(nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(96, 4)).double(), mode="train")


def classifier(seed: int, *, inputs: int, samples: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """X (D x N), y (N), W (D x K) of a bias-free softmax classifier."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(inputs, samples, generator=g, dtype=torch.float64)
    w = torch.randn(inputs, classes, generator=g, dtype=torch.float64)
    return x, torch.randint(classes, (samples,), generator=g), w


def linear_client(weights: Tensor) -> FedSGD:
    """The same classifier as an attacked model; a sample is an image of 1 x 1 pixels."""
    layer = nn.Linear(*weights.shape, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(weights.T)
    return FedSGD(nn.Sequential(nn.Flatten(), layer))


def as_images(samples: Tensor) -> Tensor:
    return samples.T[:, :, None, None]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("distance", ["squared-l2", "cosine"])
def test_beyond_its_limit_total_variation_ranks_a_blank_image_above_the_truth(
    photographs: Tensor, seed: int, distance: DistanceName
) -> None:
    """Proposition 1, with the penalised loss written out; just below the limit the truth is still the better one."""
    client = network(seed)
    limit = total_variation_limit(client, photographs, LABELS, distance=distance)
    assert 0 < limit < math.inf
    observed = client(photographs, LABELS)
    blank = photographs.mean(dim=(0, 2, 3), keepdim=True).expand_as(photographs)

    def penalised(images: Tensor, weight: float) -> float:
        return matching_loss(client, images, LABELS, observed, distance=distance) + weight * float(total_variation(images))

    assert float(total_variation(blank)) == 0
    assert limit == pytest.approx(penalised(blank, 0.0) / float(total_variation(photographs)), rel=1e-9)
    assert penalised(blank, 1.001 * limit) < penalised(photographs, 1.001 * limit)
    assert penalised(blank, 0.999 * limit) > penalised(photographs, 0.999 * limit)


def test_the_limit_of_any_candidate_and_of_none(photographs: Tensor) -> None:
    client = network(0)
    softer = 0.5 * photographs + 0.25
    limit = total_variation_limit(client, photographs, LABELS, candidate=softer)
    gap = float(total_variation(photographs) - total_variation(softer))
    loss = matching_loss(client, softer, LABELS, client(photographs, LABELS))
    assert limit * gap == pytest.approx(loss)
    assert total_variation_limit(client, photographs, LABELS, candidate=photographs) == math.inf
    harsher = photographs + torch.rand(photographs.shape, generator=torch.Generator().manual_seed(0))
    assert total_variation_limit(client, photographs, LABELS, candidate=harsher) == math.inf
    with pytest.raises(DataError, match="shape"):
        total_variation_limit(client, photographs, LABELS, candidate=photographs[:1])


@given(seed=st.integers(0, 2**31), images=st.integers(1, 3), size=st.integers(3, 6), contrast=st.floats(0.05, 1))
@settings(max_examples=25, deadline=None)
def test_the_limit_holds_for_any_network_and_batch(seed: int, images: int, size: int, contrast: float) -> None:
    """Proposition 1 on random networks and images: the ranking of blank and truth turns over at the limit and nowhere else."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(3 * size * size, 4)]
    client = FedSGD(nn.Sequential(*layers).double())
    truth, labels = contrast * torch.rand(images, 2, size, size, dtype=torch.float64), torch.randint(4, (images,))
    blank = truth.mean(dim=(0, 2, 3), keepdim=True).expand_as(truth)
    limit, observed = total_variation_limit(client, truth, labels), client(truth, labels)
    for share in (0.0, 0.5, 0.99, 1.01, 2.0, 100.0):
        penalised = [
            matching_loss(client, x, labels, observed) + share * limit * float(total_variation(x)) for x in (truth, blank)
        ]
        assert (penalised[1] < penalised[0]) is (share > 1)


def test_an_attack_beyond_the_limit_ends_at_a_blank_image_and_one_below_it_does_not() -> None:
    """What the ranking means for a search: the same attack, weights far beyond and far below lambda.

    Nearly blank: of its iterates an attack returns the one that matches best, and signed steps never come to rest.
    """
    truth = load(DataSpec(source="sample", batch=1, size=8))
    client = network(0).to("cpu", torch.float32)
    observation = simulate(client, truth)
    limit = total_variation_limit(client, truth.images, truth.labels, distance="cosine")
    smooth, close = {}, {}
    for share in (100, 0.01):
        recipe = attack("inverting-gradients", rounds=150, learning_rate=0.05, snapshots=0, total_variation=share * limit)
        rebuilt = invert(observation, recipe, client=client, labels=recover("known", observation, client), progress=False)
        smooth[share] = float(total_variation(rebuilt.images) / total_variation(truth.images))
        close[share] = rebuilt.matching_loss
    assert smooth[100] < 0.3 < 0.7 < smooth[0.01]
    assert close[0.01] < 0.1 * close[100]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("samples", "classes"), [(1, 4), (3, 4), (7, 3)])
def test_a_linear_classifiers_gradient_is_its_samples_times_the_residual(seed: int, samples: int, classes: int) -> None:
    """Proposition 2: N grad W = X P, against the client operator's own gradient."""
    x, y, w = classifier(seed, inputs=12, samples=samples, classes=classes)
    update = linear_client(w)(as_images(x), y)["1.weight"].T
    torch.testing.assert_close(linear_gradient(x, y, w), update, rtol=1e-10, atol=1e-14)
    residual = softmax_residual(x, y, w)
    torch.testing.assert_close(samples * update, x @ residual, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(residual + one_hot(y, classes), (x.T @ w).softmax(1))
    assert float(residual.sum(1).abs().max()) < 1e-14
    assert column_space_residual(update, x) < 1e-10


@pytest.mark.parametrize("seed", SEEDS)
def test_one_sample_is_told_up_to_scale_by_every_column(seed: int) -> None:
    x, y, w = classifier(seed, inputs=12, samples=1, classes=5)
    gradient = linear_gradient(x, y, w)
    cosines = (gradient * x).sum(0) / (gradient.norm(dim=0) * x.norm())
    torch.testing.assert_close(cosines.abs(), torch.ones(5, dtype=torch.float64))


@given(seed=st.integers(0, 2**31), samples=st.integers(1, 4), outputs=st.integers(2, 9), bias=st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_gradient_of_any_linear_layer_is_spanned_by_its_inputs(seed: int, samples: int, outputs: int, bias: bool) -> None:
    """Proposition 2 beyond a classifier: a first and an inner layer, with and without a bias, any loss after them.

    With one sample and a bias each row of the weight's gradient over its entry of the bias's is that sample, scale included.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, outputs, bias=bias), nn.Tanh(), nn.Linear(outputs, 5, bias=bias)).double()
    x, y = torch.rand(samples, 12, 1, 1, dtype=torch.float64), torch.randint(5, (samples,))
    update = FedSGD(model)(x, y)
    with torch.no_grad():
        inputs = {"1": x.flatten(1), "3": model[:3](x)}
    for layer, entered in inputs.items():
        gradient = update[f"{layer}.weight"]
        assert column_space_residual(gradient.T, entered.T) < 1e-7
        if samples == 1 and bias:
            rows = gradient / update[f"{layer}.bias"][:, None]
            torch.testing.assert_close(rows, entered.expand_as(rows), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_other_samples_have_the_same_gradient(seed: int) -> None:
    r"""X + v n^T with W^T v = 0 and n^T P = 0: the span of the samples is not the samples, and X_grad is not a point."""
    x, y, w = classifier(seed, inputs=12, samples=5, classes=3)
    v = torch.linalg.svd(w)[0][:, -1]
    n = torch.linalg.svd(softmax_residual(x, y, w))[0][:, -1]
    other = x + torch.outer(v, n)
    assert float((other - x).norm()) == pytest.approx(1.0)
    torch.testing.assert_close(linear_gradient(other, y, w), linear_gradient(x, y, w), rtol=1e-10, atol=1e-14)
    client = linear_client(w)
    assert matching_loss(client, as_images(other), y, client(as_images(x), y)) < 1e-24


def test_the_column_space_leaves_out_what_the_samples_do_not_span() -> None:
    x, y, w = classifier(0, inputs=12, samples=3, classes=4)
    gradient = linear_gradient(x, y, w)
    outside = torch.linalg.svd(x)[0][:, -1:]
    assert column_space_residual(outside, x) == pytest.approx(1.0)
    assert column_space_residual(outside * torch.zeros(1, dtype=torch.float64), x) == 0
    assert column_space_residual(gradient, x[:, [0, 1, 2, 2]]) < 1e-10
    assert 0 < column_space_residual(gradient, x[:, :2]) < 1


@pytest.mark.parametrize("seed", SEEDS)
def test_a_range_that_misses_the_gradients_set_cannot_reach_it(photographs: Tensor, seed: int) -> None:
    """Proposition 3: constant images stay away from zero loss; free pixels reach it at the truth, and in its other orders."""
    client, labels = network(seed), torch.tensor([1, 1])
    observed = client(photographs, labels)
    greys = torch.linspace(0, 1, 21, dtype=torch.float64)
    constant = [
        matching_loss(client, torch.full_like(photographs, float(c)), labels, observed, distance="cosine") for c in greys
    ]
    assert min(constant) > 1e-4
    assert matching_loss(client, photographs, labels, observed, distance="cosine") < 1e-25
    assert matching_loss(client, photographs.flip(0), labels, observed, distance="cosine") < 1e-25


def test_counting_is_a_comparison_of_two_numbers() -> None:
    client = network(0)
    assert client.parameters == 6 * 28 + 97 * 4 == 556
    few, many = counting(client, 2, (3, 8, 8)), counting(client, 3, (3, 8, 8))
    assert (few.equations, few.unknowns, few.determined) == (556, 384, True)
    assert (many.equations, many.unknowns, many.determined) == (556, 576, False)
    assert "not a guarantee" in few.verdict
    assert "cannot be unique" in many.verdict


@pytest.mark.parametrize("seed", SEEDS)
def test_with_too_few_equations_some_change_of_the_images_is_not_told(seed: int) -> None:
    """A null vector of the derivative of A: along it the update changes by the second order only."""
    torch.manual_seed(seed)
    client = FedSGD(
        nn.Sequential(nn.Conv2d(3, 2, 3), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)).double()
    )
    x, y = torch.rand(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 2])
    assert not counting(client, 2, (3, 4, 4)).determined

    def update(images: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in client(images, y).values()])

    h, basis = 1e-5, torch.eye(x.numel(), dtype=torch.float64).reshape(-1, *x.shape)
    derivative = torch.stack([(update(x + h * e) - update(x - h * e)) / (2 * h) for e in basis], dim=1)
    untold = torch.linalg.svd(derivative)[2][-1].reshape(x.shape)
    told = torch.linalg.svd(derivative)[2][0].reshape(x.shape)
    changes = [float((update(x + 1e-3 * v) - update(x)).norm()) for v in (untold, told)]
    assert changes[0] < 1e-2 * changes[1]


def test_an_update_that_does_not_depend_on_the_images_is_seen() -> None:
    """Dead units before the last layer leave its bias's gradient alone, whatever the images; live ones do not."""
    alive, dead = network(0), network(0)
    dead.weights["0.bias"].fill_(-1e4)
    assert image_sensitivity(dead, LABELS, (3, 8, 8)) == 0
    assert image_sensitivity(alive, LABELS, (3, 8, 8)) > 1e-2


def test_batch_statistics_hide_the_gain() -> None:
    """The gain of the images is such a direction where batch norm follows a bias-free convolution, and not elsewhere."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-12), nn.Sigmoid(), nn.Flatten(), nn.Linear(144, 4)]
    client = FedSGD(nn.Sequential(*layers).double())
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert gain_sensitivity(client, images, LABELS) < 1e-6
    assert matching_loss(client, 0.5 * images, LABELS, client(images, LABELS)) < 1e-12
    assert gain_sensitivity(network(0), images, LABELS) > 1e-3
