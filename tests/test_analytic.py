"""The closed form: where F begins with a linear layer the update holds the image; elsewhere it says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gradleak import models
from gradleak.attacks import Problem, attack
from gradleak.attacks.analytic import first_layer
from gradleak.client import FedSGD, simulate
from gradleak.data import load
from gradleak.errors import ObservationError
from gradleak.invert import Reconstruction, invert, noise_update
from gradleak.labels import recover
from gradleak.metrics import psnr
from gradleak.observation import Truth
from gradleak.spec import DataSpec, ModelSpec

CLASSES = 10
PIXELS = 8
INPUTS = 3 * PIXELS * PIXELS


class Shift(nn.Module):
    """A normalisation inside the model: [0, 1] to [offset, offset + 4]."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return 4 * x + self.offset


def photographs(batch: int) -> Truth:
    truth = load(DataSpec(source="sample", batch=batch, size=PIXELS))
    return Truth(truth.images, torch.arange(batch).flip(0) % CLASSES)


def perceptron(*, width: int = 64, bias: bool = True, activation: Callable[[], nn.Module] = nn.Sigmoid) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(INPUTS, width, bias=bias), activation(), nn.Linear(width, CLASSES))


def run(model: nn.Module, truth: Truth) -> Reconstruction:
    client = FedSGD(model)
    observation = simulate(client, truth)
    labels = recover("known", observation, client)
    return invert(observation, attack("analytic"), client=client, labels=labels, progress=False)


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("bias", [True, False])
def test_one_image_is_exact(activation: Callable[[], nn.Module], bias: bool) -> None:
    """With a bias the scale is told; without one the matching loss finds it."""
    truth = photographs(1)
    found = run(perceptron(bias=bias, activation=activation), truth)
    assert psnr(found.images, truth.images).min() >= 60
    assert found.matching_loss < 1e-10
    assert found.rounds == 1


def test_a_softmax_classifier_is_the_proposition_itself() -> None:
    truth = photographs(1)
    torch.manual_seed(0)
    found = run(nn.Sequential(nn.Flatten(), nn.Linear(INPUTS, CLASSES, bias=False)), truth)
    assert psnr(found.images, truth.images).min() >= 60


@pytest.mark.parametrize("bias", [True, False])
def test_the_models_own_normalisation_is_inverted(tmp_path: Path, bias: bool) -> None:
    """As ``model.mean`` and ``model.std`` give it, and as a layer of the model."""
    code = f"""
import torch
def build():
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear({INPUTS}, 32, bias={bias}), torch.nn.Sigmoid(), torch.nn.Linear(32, {CLASSES})
    )
"""
    (tmp_path / "own.py").write_text(code)
    spec = ModelSpec(name=f"{tmp_path / 'own.py'}:build", mean=[0.5, 0.4, 0.3], std=[0.2, 0.25, 0.3])
    truth = photographs(1)
    found = run(models.build(spec, image_shape=(3, PIXELS, PIXELS)), truth)
    assert psnr(found.images, truth.images).min() >= 60

    found = run(nn.Sequential(Shift(-2.0), *perceptron(bias=bias)), truth)  # type: ignore[misc]
    assert psnr(found.images, truth.images).min() >= 60


@pytest.mark.parametrize("batch", [2, 4])
def test_a_batch_through_a_relu_is_exact_and_in_the_order_of_the_labels(batch: int) -> None:
    truth = photographs(batch)
    found = run(perceptron(width=256, activation=nn.ReLU), truth)
    assert psnr(found.images, truth.images).min() >= 60
    assert found.matching_loss < 1e-10


@pytest.mark.parametrize("width", [32, 512])
def test_a_layer_that_mixes_the_images_of_a_batch_is_refused(width: int) -> None:
    """Also a wide one, where some rows agree by chance."""
    with pytest.raises(ObservationError, match=r"'1' (mix them|agree).*cinet"):
        run(perceptron(width=width), photographs(2))


def test_a_batch_needs_a_bias() -> None:
    with pytest.raises(ObservationError, match="no bias gradient"):
        run(perceptron(bias=False, activation=nn.ReLU), photographs(2))


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([nn.Conv2d(3, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * PIXELS**2, CLASSES)], r"'0' \(Conv2d\)"),
        ([nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(INPUTS, CLASSES)], r"'0' \(GroupNorm\)"),
        ([nn.AvgPool2d(2), nn.Flatten(), nn.Linear(INPUTS // 4, CLASSES)], r"\(48,\), is not the image of 3x8x8"),
        ([nn.BatchNorm2d(3, affine=False), nn.Flatten(), nn.Linear(INPUTS, CLASSES)], "is not the image"),
        ([nn.ReflectionPad2d(1), nn.Flatten(), nn.Linear(300, CLASSES)], "is not the image"),
        ([nn.Sigmoid(), nn.Flatten(), nn.Linear(INPUTS, CLASSES)], "is not the image"),
        ([nn.Linear(PIXELS, PIXELS), nn.Flatten(), nn.Linear(INPUTS, CLASSES)], "is not the image"),
        ([nn.Flatten(), nn.Sequential(*[nn.Linear(INPUTS, INPUTS)] * 2), nn.Linear(INPUTS, CLASSES)], "used 2 times"),
    ],
    ids=["convolution", "group norm", "pooling", "batch statistics", "padding", "not affine", "not flattened", "used twice"],
)
def test_any_other_first_layer_is_refused_by_name(layers: list[nn.Module], reason: str) -> None:
    with pytest.raises(ObservationError, match=reason):
        run(nn.Sequential(*layers), photographs(1))


def test_a_frozen_first_layer_is_refused() -> None:
    model = perceptron()
    model.get_submodule("1").requires_grad_(False)
    with pytest.raises(ObservationError, match=r"'1'.*not in the update"):
        run(model, photographs(1))


def test_a_gradient_of_no_image_is_refused() -> None:
    """Inputs in [1, 5] all have one sign, and no multiple of a random direction has."""
    client = FedSGD(nn.Sequential(Shift(1.0), *perceptron(bias=False)))  # type: ignore[misc]
    observation = noise_update(simulate(client, photographs(1)))
    labels = recover("known", observation, client)
    with pytest.raises(ObservationError, match="no multiple of the gradient of '2'"):
        invert(observation, attack("analytic"), client=client, labels=labels, progress=False)


def test_it_says_which_layer_and_where_the_scale_is_from() -> None:
    for bias, scale in ((True, "told by the bias gradient"), (False, "least matching loss")):
        client = FedSGD(perceptron(bias=bias))
        observation = simulate(client, photographs(1))
        assert observation.labels is not None
        problem = Problem(
            observation=observation,
            client=client,
            observed=observation.update,
            labels=observation.labels,
            gain_sensitivity=1.0,
        )
        said = attack("analytic").describe(problem, nn.Identity())
        assert said["layer"] == first_layer(problem).name == "1"
        assert scale in said["scale"]
