"""Training an attacked model: it learns, repeats, leaves the caller's model alone, and its weights can be attacked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from gradleak import models
from gradleak.cli import app
from gradleak.errors import DataError, DivergedError
from gradleak.federation import held_out_score
from gradleak.observation import Truth
from gradleak.spec import ModelSpec
from gradleak.tensors import read_tensors
from gradleak.training import train_model


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


def bright(images: int, *, seed: int = 0) -> Truth:
    """Images whose class is the channel that is brightest."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % 3
    pixels = 0.5 * torch.rand(images, 3, 8, 8, generator=generator)
    pixels[torch.arange(images), labels] += 0.5
    return Truth(pixels, labels)


def network(**settings: Any) -> nn.Module:
    spec = ModelSpec(**{"name": "resnet20-cifar", "width": 4, "num_classes": 3, **settings})
    return models.build(spec, image_shape=(3, 8, 8))


@pytest.mark.parametrize(("optimiser", "rate"), [("adam", 1e-2), ("sgd", 5e-2)])
def test_training_generalises(optimiser: Any, rate: float) -> None:
    """Far better than before on images it has not seen, in eval mode."""
    model, unseen = network(), bright(60, seed=9)
    trained = train_model(model, bright(30), rounds=40, batch=12, optimiser=optimiser, learning_rate=rate)
    assert not trained.training
    assert held_out_score(trained, unseen).accuracy > 0.9 > held_out_score(model, unseen).accuracy


def test_training_repeats_and_leaves_the_callers_model() -> None:
    """A function of its arguments: the same seed gives the same weights to the bit, another one others."""
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one, two, other = (train_model(model, bright(9), rounds=4, batch=4, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_classes_must_be_the_models() -> None:
    truth = bright(4)
    with pytest.raises(DataError, match=r"label 7 is out of range: the model has 3 classes.*model\.num_classes"):
        train_model(network(), Truth(truth.images, torch.tensor([0, 1, 2, 7])), rounds=1)
    with pytest.raises(DataError, match="each image needs one class"):
        train_model(network(), Truth(truth.images, torch.full((4, 3), 1 / 3)), rounds=1)


def test_a_diverging_training_says_so() -> None:
    with pytest.raises(DivergedError, match="lower its learning rate"):
        train_model(network(), bright(9), rounds=20, optimiser="sgd", learning_rate=1e30)


def test_trained_weights_are_what_a_specification_takes(tmp_path: Path) -> None:
    """`train-model` with a built-in network and another activation; the file loads into the same model."""
    out = tmp_path / "weights.safetensors"
    options = ["--model", "convnet", "--set", "model.width=4", "--set", "model.activation=tanh", "--images", "16"]
    done = CliRunner().invoke(app, ["train-model", "sample", *options, "--rounds", "3", "--size", "8", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "training accuracy" in done.output
    spec = ModelSpec(name="convnet", width=4, activation="tanh", weights=out)
    loaded = models.build(spec, image_shape=(3, 8, 8)).state_dict()
    tensors, _ = read_tensors(out)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    untrained = models.build(spec.model_copy(update={"weights": None}), image_shape=(3, 8, 8)).state_dict()
    assert any(not torch.equal(untrained[name], tensor) for name, tensor in tensors.items())
