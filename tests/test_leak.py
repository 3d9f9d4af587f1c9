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
from gradleak.defences import Gaussian, defend
from gradleak.errors import DataError, ObservationError, SpecError
from gradleak.leak import REPRODUCED, Leak, measure_leak
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


def _sgd(model: nn.Module, truth: Truth, **normalisation: list[float]) -> Observation:
    """A real step of a client that normalises, or not, and what is said of it."""
    mean, std = (torch.tensor(normalisation.get(key, [value] * 3)) for key, value in (("mean", 0.0), ("std", 1.0)))
    images = (truth.images - mean[:, None, None]) / std[:, None, None]
    nn.functional.cross_entropy(model(images), truth.labels).backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gl.from_gradient(gradient, model, batch=len(images), image_shape=(3, 16, 16), labels=truth.labels)


def test_a_truth_that_is_true_reproduces_the_update(read: Leak) -> None:
    """Whether or not the rate that scales it is known; nothing is doubted, and the figure is written."""
    assert read.truth_distance < 1e-6
    assert read.doubt == ""
    assert read.to_dict()["truth_distance"] == read.truth_distance
    scaled = observe(linear(), photographs(1))
    scaled = dataclasses.replace(scaled, update={name: 0.01 * t for name, t in scaled.update.items()})
    assert measure_leak(scaled, linear(), photographs(1), attack=CLOSED).truth_distance < 1e-6


@pytest.mark.parametrize("rate", [1e-1, 1e-5])
def test_rounded_weights_are_no_reason_to_doubt(rate: float) -> None:
    """Float32 weights before and after a step: the smaller it is, the more of their difference is rounding."""
    model, truth = gl.build_model(gl.ModelSpec(name="lenet"), image_shape=(3, 16, 16)), photographs(2)
    before, update = model.state_dict(), observe(model, truth).update
    after = {name: before[name] - rate * t for name, t in update.items()}
    spec = gl.ClientSpec(protocol="fedavg", learning_rate=rate)
    observation = gl.from_weights(before, after, model, batch=2, image_shape=(3, 16, 16), client=spec)
    assert measure_leak(observation, model, truth, attack=QUICK).doubt == ""


def test_other_images_are_doubted_even_where_a_model_hardly_tells_them_apart() -> None:
    """A sigmoid network that is not trained: its update depends on the labels above all."""
    model = gl.build_model(gl.ModelSpec(name="convnet", activation="sigmoid"), image_shape=(3, 32, 32))
    own, other = (gl.load_data(gl.DataSpec(source="sample", batch=4, start=start, size=32)) for start in (0, 4))
    other = dataclasses.replace(other, labels=own.labels)
    leak = measure_leak(observe(model, own), model, other, attack={**QUICK, "rounds": 1})
    assert leak.truth_distance < 1e-3
    assert leak.doubt


@pytest.mark.parametrize("fault", ["images", "labels", "normalisation", "epochs"])
def test_what_was_said_wrongly_is_doubted_and_never_passes_for_safe(fault: str) -> None:
    model, truth = gl.build_model(gl.ModelSpec(name="lenet"), image_shape=(3, 16, 16)), photographs(2)
    observation = observe(model, truth)
    if fault == "images":
        truth = gl.load_data(gl.DataSpec(source="sample", batch=2, start=4, size=16))
    elif fault == "labels":
        truth = dataclasses.replace(truth, labels=(truth.labels + 1) % 10)
    elif fault == "normalisation":
        observation = _sgd(model, truth, mean=[0.9, 0.1, 0.5], std=[0.1, 0.2, 0.3])
    else:
        sent = gl.FedAvg(model, learning_rate=5.0, epochs=4)(truth.images, truth.labels)
        observation = dataclasses.replace(observation, update=sent)
    leak = measure_leak(observation, model, truth, attack=QUICK)
    assert leak.truth_distance > REPRODUCED
    assert f"do not reproduce this update (distance {leak.truth_distance:.2g})" in leak.verdict
    assert leak.verdict.startswith("Not auditable: the truth")


@pytest.mark.parametrize("reason", ["order", "defence"])
def test_what_the_client_draws_is_no_reason_to_doubt_it(reason: str) -> None:
    """Batches in an order of its own, and noise: no truth reproduces them."""
    model, truth = gl.build_model(gl.ModelSpec(name="lenet"), image_shape=(3, 16, 16)), photographs(2)
    if reason == "order":
        spec = gl.ClientSpec(protocol="fedavg", learning_rate=0.5, epochs=1, local_batch=1, order="shuffled")
        client = gl.build_client(model, spec, 2)
    else:
        client = defend(gl.FedSGD(model), [Gaussian(sigma=10.0)])
    observation = gl.simulate(client, truth, seed=1)
    away = dataclasses.replace(truth, images=1 - truth.images)
    leak = measure_leak(observation, model, away, attack=QUICK)
    assert leak.truth_distance > REPRODUCED
    assert leak.doubt == ""


def test_an_attack_that_failed_is_no_pass(read: Leak) -> None:
    """Three rounds fit nothing: the verdict says so. One that exceeds the threshold has found its leak all the same."""
    model, truth = gl.build_model(gl.ModelSpec(name="convnet", width=4), image_shape=(3, 16, 16)), photographs(2)
    leak = measure_leak(observe(model, truth), model, truth, attack=QUICK)
    assert leak.reconstruction.notes["cosine_distance"] > 1e-2
    assert (leak.inconclusive, leak.exceeded, leak.to_dict()["inconclusive"]) == (True, False, True)
    assert leak.verdict.startswith("Inconclusive: the attack did not fit the update (cosine distance ")
    assert "does not exceed" not in leak.verdict
    above = dataclasses.replace(leak, threshold=0.0)
    assert not above.inconclusive
    assert " exceeds the threshold 0.00" in above.verdict
    assert "does not exceed" in dataclasses.replace(leak, unexplained=False).verdict
    assert "more than what was rebuilt" in dataclasses.replace(leak, baseline=1.0).verdict
    assert "more than what was rebuilt" not in read.verdict


def test_labels_that_the_model_does_not_have_are_named() -> None:
    truth = dataclasses.replace(photographs(1), labels=torch.tensor([99]))
    with pytest.raises(DataError, match="label 99 is out of range"):
        measure_leak(observe(linear(), photographs(1)), linear(), truth, attack=CLOSED)
