"""The leak of one update: its score, and that the attack behind it knows nothing of the truth."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

import gradleak as gl
from gradleak import metrics
from gradleak.errors import DataError, ObservationError, SpecError
from gradleak.leak import Leak, measure_leak
from gradleak.observation import Observation, Truth

CLOSED = {"name": "analytic"}
QUICK = {"name": "cinet", "rounds": 3, "channels": 8}


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


def linear() -> nn.Module:
    """A model that begins with a linear layer, so that one image can be read from its gradient."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.Sigmoid(), nn.Linear(8, 10))


def photographs(batch: int) -> Truth:
    return gl.load_data(gl.DataSpec(source="sample", batch=batch, size=16))


def observe(model: nn.Module, truth: Truth) -> Observation:
    return gl.simulate(gl.FedSGD(model), truth)


@pytest.fixture(scope="module")
def read() -> Leak:
    return measure_leak(observe(linear(), photographs(1)), linear(), photographs(1), attack=CLOSED)


def test_an_image_that_can_be_read_scores_one(read: Leak) -> None:
    assert read.score == pytest.approx(1, abs=1e-3)
    assert (read.recognisable, read.exceeded) == (1, True)
    assert read.baseline < 0.5


def test_an_update_that_is_noise_scores_little() -> None:
    observation = observe(linear(), photographs(1))
    noise = {name: torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for name, t in observation.update.items()}
    leak = measure_leak(dataclasses.replace(observation, update=noise), linear(), photographs(1), attack=CLOSED)
    assert leak.score < 0.2
    assert (leak.recognisable, leak.exceeded) == (0, False)


def test_the_attack_knows_nothing_of_the_truth() -> None:
    """Another truth gives another score and the very same images."""
    model, truth = gl.build_model(gl.ModelSpec(name="lenet"), image_shape=(3, 16, 16)), photographs(2)
    observation = observe(model, truth)
    other = dataclasses.replace(truth, images=1 - truth.images)
    leaks = [measure_leak(observation, model, t, attack=QUICK) for t in (truth, other)]
    assert torch.equal(leaks[0].reconstruction.images, leaks[1].reconstruction.images)
    assert leaks[0].per_image != leaks[1].per_image


def test_the_score_is_that_of_the_best_pair_whatever_the_order() -> None:
    """max over originals and reconstructions of SSIM; it does not depend on how the truth is ordered."""
    model, truth = gl.build_model(gl.ModelSpec(name="lenet"), image_shape=(3, 16, 16)), photographs(3)
    observation = observe(model, truth)
    leak = measure_leak(observation, model, truth, attack=QUICK)
    pairs = [[float(metrics.ssim(x[None], y[None])) for x in leak.reconstruction.images] for y in truth.images]
    assert leak.per_image == pytest.approx([max(row) for row in pairs])
    assert leak.score == pytest.approx(max(max(row) for row in pairs))
    turned = Truth(truth.images.flip(0), truth.labels.flip(0))
    again = measure_leak(observation, model, turned, attack=QUICK)
    assert again.per_image == pytest.approx(leak.per_image[::-1])


def test_the_threshold_is_the_largest_score_that_passes(read: Leak) -> None:
    assert not dataclasses.replace(read, threshold=read.score).exceeded
    assert dataclasses.replace(read, threshold=read.score - 1e-6).exceeded


def test_what_is_written_of_a_leak_names_nothing(read: Leak) -> None:
    """JSON without images, labels and names; the verdict says score, threshold and count."""
    name = photographs(1).names[0]
    text = json.dumps(read.to_dict(), allow_nan=False)
    assert name not in text
    assert {"score", "threshold", "exceeded", "recognisable", "verdict"} <= json.loads(text).keys()
    assert read.verdict.startswith("Leak score 1.00 exceeds the threshold 0.60: 1 of 1 images recognisable")


def test_model_and_random_state_stay_as_they_are() -> None:
    """An audit between two steps of training changes nothing of the training."""
    model, truth = gl.build_model(gl.ModelSpec(name="resnet20-cifar", width=4), image_shape=(3, 16, 16)), photographs(2)
    before, mode = copy.deepcopy(model.state_dict()), model.training
    observation = observe(model, truth)
    state = torch.get_rng_state()
    measure_leak(observation, model, truth, attack=QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == mode
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_labels_are_recovered_where_they_are_not_granted() -> None:
    model, truth = gl.build_model(gl.ModelSpec(name="lenet"), image_shape=(3, 16, 16)), photographs(2)
    hidden = dataclasses.replace(observe(model, truth), labels=None)
    leak = measure_leak(hidden, model, truth, attack=QUICK)
    assert leak.reconstruction.labels.rule == "counts"
    with pytest.raises(ObservationError, match="labels"):
        measure_leak(hidden, model, truth, attack=QUICK, labels="known")


@pytest.mark.parametrize(
    ("truth", "words"),
    [
        (photographs(2), r"\(2, 3, 16, 16\).*\(1, 3, 16, 16\)"),
        (Truth(photographs(1).images * 255, photographs(1).labels), r"outside \[0, 1\]"),
    ],
    ids=["another batch", "another range"],
)
def test_a_truth_that_cannot_be_compared_is_refused_before_the_attack(truth: Truth, words: str) -> None:
    with pytest.raises(DataError, match=words):
        measure_leak(observe(linear(), photographs(1)), linear(), truth, attack={"name": "cinet", "rounds": 10**6})


def test_images_smaller_than_the_window_of_ssim_are_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    truth = gl.load_data(gl.DataSpec(source="sample", batch=1, size=8))
    with pytest.raises(DataError, match="8 x 8 pixels: SSIM needs 11"):
        measure_leak(observe(model, truth), model, truth, attack=CLOSED)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"threshold": 1.5}, DataError, "threshold is 1.5"),
        ({"attack": {"name": "cinett"}}, SpecError, "did you mean 'cinet'"),
        ({"attack": {"name": "cinet", "round": 3}}, SpecError, "did you mean 'rounds'"),
        ({"labels": "knwon"}, SpecError, "labels.rule"),
    ],
    ids=["threshold", "attack", "setting", "rule"],
)
def test_a_wrong_setting_is_named(settings: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        measure_leak(observe(linear(), photographs(1)), linear(), photographs(1), **settings)  # type: ignore[arg-type]
