"""The attacks on free pixels: they recover what can be recovered, and their priors are what their formulas say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradleak import data, models
from gradleak.attacks import ATTACKS, attack, dlg, gradinversion, inverting_gradients
from gradleak.attacks.gradinversion import GradInversionAttack
from gradleak.attacks.inverting_gradients import InvertingGradientsAttack
from gradleak.attacks.recipe import Attack, Problem
from gradleak.client import FedSGD, simulate
from gradleak.errors import ObservationError, SpecError
from gradleak.image_model import Pixels
from gradleak.invert import Reconstruction, invert
from gradleak.labels import Labels, recover
from gradleak.metrics import psnr
from gradleak.observation import Observation, Truth
from gradleak.prior import batch_norm_statistics, group_consistency, squared_norm, total_variation
from gradleak.spec import DataSpec, ModelSpec

NAMES = [*dlg.PRESETS, *gradinversion.PRESETS, *inverting_gradients.PRESETS]


def network(*, batch_norm: bool = False) -> nn.Sequential:
    """A small relative of DLG's LeNet, weights uniform on (-0.5, 0.5) as there, for 3 x 8 x 8 images and 4 classes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 5, stride=2, padding=2),
        nn.BatchNorm2d(12) if batch_norm else nn.Identity(),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(192, 4),
    )
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def truth(images: int = 1) -> Truth:
    """Smooth random images 3 x 8 x 8 and labels 2, 1, 2, 1, ..."""
    noise = torch.rand(images, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    smooth = nn.functional.interpolate(noise, size=(8, 8), mode="bilinear")
    return Truth(smooth, torch.tensor([2, 1] * images)[:images])


def capture(images: int = 1, *, batch_norm: bool = False) -> tuple[Truth, FedSGD, Observation]:
    client = FedSGD(network(batch_norm=batch_norm))
    return truth(images), client, simulate(client, truth(images))


def run(recipe: Attack, client: FedSGD, observation: Observation, *, labels: Labels | None = None) -> Reconstruction:
    labels = labels or recover("known", observation, client)
    return invert(observation, recipe, client=client, labels=labels, progress=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_every_preset_runs(name: str, batch_norm: bool) -> None:
    private, client, observation = capture(2, batch_norm=batch_norm)
    recipe = attack(name, rounds=2)
    found = run(recipe, client, observation)
    assert found.images.shape == private.images.shape
    assert found.rounds == 2
    assert len(found.labels.values) == 2
    assert 0 <= float(found.images.min()) <= float(found.images.max()) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_presets_start_from_pixels_of_any_group(name: str) -> None:
    assert ATTACKS[name][0].gain == "free"
    _, client, observation = capture(2)
    assert run(attack(name, rounds=1, group=3), client, observation).images.shape == (2, 3, 8, 8)


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(SpecError, match=r"attack\.initial"):
        attack("idlg", initial="zeros")


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", ["dlg", "idlg"])
def test_one_image_is_recovered_pixel_for_pixel(name: str, precision: str) -> None:
    private, client, observation = capture()
    recipe = attack(name, rounds=15, precision=precision, initial="normalised")
    found = run(recipe, client, observation, labels=recover("idlg", observation, client))
    assert float(psnr(found.images, private.images)) >= 30
    assert found.matching_loss < 1e-4 * found.history[0]["loss"]


def test_dlg_finds_the_label_without_being_given_it() -> None:
    private, client, observation = capture()
    wrong = Labels((private.labels + 1) % 4, "known")
    found = run(attack("dlg", rounds=15, initial="normalised"), client, observation, labels=wrong)
    assert found.labels.rule == "joint"
    assert found.labels.values.tolist() == private.labels.tolist()
    assert float(psnr(found.images, private.images)) >= 30
    given_wrong = run(attack("idlg", rounds=15, initial="normalised"), client, observation, labels=wrong)
    assert given_wrong.matching_loss > 1e3 * found.matching_loss


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dlg", "idlg"])
def test_a_cifar_image_is_recovered_from_lenet(name: str, shared: Path) -> None:
    private = data.load(DataSpec(source=f"npz:{shared / 'data' / 'cifar10_train_first1024.npz'}", batch=1))
    client = FedSGD(models.build(ModelSpec(name="lenet"), image_shape=(3, 32, 32)))
    observation = simulate(client, private, grant_labels=False)
    found = run(attack(name, rounds=50, initial="normalised"), client, observation, labels=recover("idlg", observation, client))
    assert found.labels.values.tolist() == private.labels.tolist()
    assert float(psnr(found.images, private.images)) >= 30


class Watched:
    """Puts the image model's last state into the notes of a run."""

    def describe(self, problem: Problem, image_model: nn.Module) -> dict[str, Any]:
        assert isinstance(image_model, Pixels)
        return {"pixels": image_model.images.detach().clone()}


class WatchedInvertingGradients(Watched, InvertingGradientsAttack): ...


class WatchedGradInversion(Watched, GradInversionAttack): ...


def test_inverting_gradients_descends_inside_the_box() -> None:
    private, client, observation = capture()
    found = run(WatchedInvertingGradients(rounds=80), client, observation)
    assert found.matching_loss < 0.2 * found.history[0]["loss"]
    pixels = found.notes["pixels"]
    assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 1
    assert float(psnr(found.images, private.images)) > 12
    wild = run(WatchedInvertingGradients(rounds=1, initial="normal"), client, observation).notes["pixels"]
    assert (float(wild.min()), float(wild.max())) == (0, 1)


def test_inverting_gradients_lowers_its_rate_by_ten_at_three_eighths_five_eighths_and_seven_eighths() -> None:
    _, client, observation = capture()
    rates = [row["learning_rate"] for row in run(attack("inverting-gradients", rounds=8), client, observation).history]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001])


def test_total_variation_smooths() -> None:
    _, client, observation = capture()
    plain, smoothed = (
        run(WatchedInvertingGradients(rounds=40, total_variation=weight), client, observation).notes["pixels"]
        for weight in (0.0, 1.0)
    )
    assert float(total_variation(smoothed)) < 0.5 * float(total_variation(plain))


def test_the_group_pulls_its_members_together() -> None:
    private, client, observation = capture(2)
    labels = private.labels
    apart, together = (
        group_consistency(
            run(WatchedGradInversion(rounds=30, group=2, group_consistency=weight), client, observation).notes["pixels"], labels
        )
        for weight in (0.0, 10.0)
    )
    assert float(together) < 0.1 * float(apart)


def test_statistics_are_matched_where_they_are_granted_and_reported_off_where_not() -> None:
    private, client, observation = capture(2, batch_norm=True)
    recipe = GradInversionAttack(rounds=30, group=1, batch_norm_statistics=10.0)
    without = run(recipe, client, observation)
    assert "off" in without.notes["statistics_used"]
    granted = run(recipe, client, simulate(client, private, grant_batch_statistics=True))
    assert granted.notes["statistics_used"] == "1 layers matched"
    target = client.batch_statistics(private.images)
    far, near = (float(batch_norm_statistics(client, found.images, target)) for found in (without, granted))
    assert near < 0.5 * far


def test_batch_norm_statistics_vanish_for_the_true_batch_alone_and_pull_towards_it() -> None:
    client = FedSGD(network(batch_norm=True)).to("cpu", torch.float64)
    private, other = truth(3).images.double(), torch.rand(3, 3, 8, 8, dtype=torch.float64).requires_grad_()
    target = client.batch_statistics(private)
    mean, variance = target["1"]
    h = client.model[0](private)
    assert torch.allclose(mean, h.mean((0, 2, 3)))
    assert torch.allclose(variance, h.var((0, 2, 3), correction=0))

    assert float(batch_norm_statistics(client, private, target)) == 0
    assert float(batch_norm_statistics(client, private.flip(0), target)) == pytest.approx(0, abs=1e-12)
    distance = batch_norm_statistics(client, other, target)
    (gradient,) = torch.autograd.grad(distance, other)
    nearer = other - 1e-3 * gradient / gradient.norm()
    assert 0 < batch_norm_statistics(client, nearer, target).item() < distance.item()


def test_statistics_of_another_model_are_refused() -> None:
    client, images = FedSGD(network(batch_norm=True)), truth(2).images
    with pytest.raises(ObservationError, match=r"'7' .* no such batch-norm layer"):
        batch_norm_statistics(client, images, {"7": (torch.zeros(12), torch.ones(12))})
    with pytest.raises(ObservationError, match=r"'1' .* 5 channels, and in the model it has 12"):
        batch_norm_statistics(client, images, {"1": (torch.zeros(5), torch.ones(5))})


def test_a_vanishing_statistics_term_has_a_finite_gradient() -> None:
    client = FedSGD(network(batch_norm=True))
    images = truth(2).images.requires_grad_()
    target = {name: (m.detach(), v.detach()) for name, (m, v) in client.batch_statistics(images).items()}
    (gradient,) = torch.autograd.grad(batch_norm_statistics(client, images, target), images)
    assert bool(gradient.isfinite().all())


def test_total_variation_is_zero_for_constants_and_scales_with_contrast() -> None:
    images = truth(2).images.double()
    assert float(total_variation(torch.full_like(images, 0.3))) == 0
    assert float(total_variation(-3 * images + 7)) == pytest.approx(3 * float(total_variation(images)))
    assert float(total_variation(images.transpose(2, 3))) == pytest.approx(float(total_variation(images)))
    checkerboard = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).double().expand(1, 3, 8, 8)
    assert float(total_variation(checkerboard)) == 2
    step = torch.zeros(1, 1, 4, 4).index_fill_(3, torch.tensor([2, 3]), 1.0)
    assert float(total_variation(step)) == pytest.approx(1 / 3)


def test_squared_norm_is_the_mean_over_images_of_their_squared_length() -> None:
    images = truth(3).images.double()
    assert float(squared_norm(images)) == pytest.approx(sum(float(x.norm()) ** 2 for x in images) / 3)
    assert float(squared_norm(2 * images)) == pytest.approx(4 * float(squared_norm(images)))


def test_group_consistency_sees_neither_the_group_mean_nor_the_order_of_images_of_one_label() -> None:
    first, labels = torch.rand(4, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 1, 1, 3])
    within, across = torch.tensor([2, 0, 1, 3]), torch.tensor([3, 1, 2, 0])
    assert float(group_consistency(first, labels)) == 0
    assert float(group_consistency(torch.cat([first, first[within]]), labels)) == 0
    assert float(group_consistency(torch.cat([first, first[across]]), labels)) > 0
    apart = torch.cat([first + 0.01, first[within] - 0.01])
    assert float(group_consistency(apart, labels)) == pytest.approx(2 * 0.01**2 * first[0].numel())


def test_group_consistency_pulls_each_member_to_the_mean() -> None:
    first, second = torch.rand(2, 2, 3, 8, 8, dtype=torch.float64)
    images = torch.cat([first, second]).requires_grad_()
    labels = torch.tensor([0, 1])
    (gradient,) = torch.autograd.grad(group_consistency(images, labels), images)
    mean = (first + second) / 2
    assert torch.allclose(gradient, torch.cat([first - mean, second - mean]))  # 2 / B times the deviation, B = 2


@pytest.mark.parametrize("name", ["inverting-gradients", "gradinversion"])
def test_the_prior_of_a_group_is_the_sum_of_its_members_priors(name: str) -> None:
    _, client, observation = capture(2)
    problem = Problem(observation, client, observation.update, torch.tensor([2, 1]), gain_sensitivity=1.0)
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    off = {"group_consistency": 0.0} if name == "gradinversion" else {}
    group, single = attack(name, group=2, **off), attack(name, group=1, **off)
    parts = [float(single.prior(member, problem)) for member in images.split(2)]  # type: ignore[arg-type]
    assert float(group.prior(images, problem)) == pytest.approx(sum(parts))  # type: ignore[arg-type]


def test_pixels_start_as_told() -> None:
    torch.manual_seed(0)
    normal = Pixels(batch=8, image_shape=(3, 16, 16))
    assert float(normal().detach().mean()) == pytest.approx(0, abs=0.05)
    assert float(normal().detach().std()) == pytest.approx(1, abs=0.05)
    photographs: Tensor = Pixels(batch=4, group=2, image_shape=(3, 16, 16), initial="normalised")().detach()
    assert photographs.shape == (8, 3, 16, 16)
    assert float(photographs.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(photographs.std()) == pytest.approx(0.25, abs=0.02)
