"""CI-Net's last rounds, in which L-BFGS corrects pixels: when they begin, what they bring, and how they are interrupted."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradleak.attacks import CINetAttack, attack
from gradleak.attacks.cinet import SMOOTHING
from gradleak.checkpoint import Checkpoint
from gradleak.client import FedSGD, simulate
from gradleak.data import load
from gradleak.image_model import BRIGHTNESS, Corrected, photographic
from gradleak.invariance import bright_gain, hold_gain
from gradleak.invert import Reconstruction, _Best, _Loop, invert
from gradleak.labels import Labels, recover
from gradleak.observation import Truth
from gradleak.prior import coarse, smoothed, total_variation
from gradleak.sharded import WHOLE, Shard
from gradleak.spec import DataSpec


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def truth() -> Truth:
    """Two photographs of 16 x 16 pixels."""
    return load(DataSpec(source="sample", batch=2, size=16))


@pytest.fixture(scope="module")
def client() -> FedSGD:
    """Two convolutions and a linear layer."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.Sigmoid(), nn.Conv2d(16, 16, 3, padding=1), nn.Sigmoid()]
    return FedSGD(nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10)))


def run(client: FedSGD, truth: Truth, *, rule: str = "known", **more: Any) -> Reconstruction:
    observation = simulate(client, truth)
    loop = {key: more.pop(key) for key in ("checkpoint", "stop") if key in more}
    recipe = attack("cinet", **{"rounds": 60, "channels": 16, **more})
    labels = recover("known", observation, client)
    return invert(observation, recipe, client=client, labels=Labels(labels.values, rule), progress=False, **loop)


def test_pixels_are_smoothed_again_where_rounds_enough_follow(
    client: FedSGD, truth: Truth, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The best iterate is then the best since, whatever came before; an interrupted run does the same."""
    monkeypatch.setattr(sys.modules["gradleak.attacks.cinet"], "SMOOTH_EVERY", 8)
    # so much that the loss rises, whatever a processor's rounding
    monkeypatch.setattr(sys.modules["gradleak.attacks.cinet"], "SMOOTHING", 10 * SMOOTHING)
    settled = []
    settle = Corrected.settle
    monkeypatch.setattr(Corrected, "settle", lambda self, images: (settled.append(images.clone()), settle(self, images)))
    whole = run(client, truth, rounds=60, pixel_share=0.5)  # 30 rounds on pixels: smoothed before the 1st, 9th and 17th
    assert len(settled) == 3
    losses = [row["loss"] for row in whole.history]
    assert losses[46] > losses[45]
    assert whole.best_round > 46
    assert whole.matching_loss <= min(losses[46:])
    for cut in (38, 45, 46, 47):
        path, calls = tmp_path / f"{cut}.safetensors", iter(range(1, 1000))
        run(
            client,
            truth,
            rounds=60,
            pixel_share=0.5,
            checkpoint=Checkpoint(path, every=1e9),
            stop=lambda calls=calls, cut=cut: "SIGINT" if next(calls) == cut else "",
        )
        resumed = run(client, truth, rounds=60, pixel_share=0.5, checkpoint=Checkpoint(path, every=1e9))
        assert torch.equal(resumed.images, whole.images), f"cut after round {cut}"
        assert resumed.best_round == whole.best_round
    settled.clear()
    run(client, truth, rounds=60, pixel_share=0.5, relative_total_variation=0.0)
    assert len(settled) == 1


def test_the_first_iterate_of_a_new_beginning_is_the_best_whatever_its_loss() -> None:
    best, labels = _Best(), torch.tensor([0])
    for t, (loss, kept) in enumerate([(3.0, 3.0), (1.0, 1.0), (2.0, 1.0), (5.0, 5.0), (6.0, 5.0), (4.0, 4.0)]):
        if t == 3:
            best.begin_anew(t)
            assert float(best.images) == 1.0
        best.offer(loss, torch.tensor(loss), labels)
        best.round_done(t + 1)
        assert best.loss == float(best.images) == kept
    assert best.round == 6


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (1, 1, 5, 8), (1, 4, 7, 7)])
def test_the_spectrum_of_photographs_is_a_symmetric_map(shape: tuple[int, ...]) -> None:
    """<S a, b> = <a, S b>, so that the gradient with respect to u is S times that of the images."""
    torch.manual_seed(0)
    a, b = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    assert float((photographic(a) * b).sum()) == pytest.approx(float((a * photographic(b)).sum()), rel=1e-10)
    assert photographic(a).shape == shape


def test_white_noise_gets_the_spectrum_of_photographs() -> None:
    """Amplitude times frequency is the same at all frequencies; brightness varies three times as much as colour."""
    torch.manual_seed(0)
    x = photographic(torch.randn(4000, 3, 8, 8))
    brightness = x.mean(1)
    amplitude = torch.fft.fft2(brightness).abs().square().mean(0).sqrt()
    frequency = torch.fft.fftfreq(8).abs()
    products = [float(amplitude[0, k] * frequency[k]) for k in (1, 2, 3)]
    assert products == pytest.approx([products[0]] * 3, rel=0.05)
    colour = (x - brightness[:, None])[:, 0] * (3 / 2) ** 0.5  # a channel less the mean of three has 2/3 of the variance
    assert float(brightness.std() * 3**0.5 / colour.std()) == pytest.approx(BRIGHTNESS, rel=0.05)


def test_settled_images_stand_until_u_moves() -> None:
    images = torch.rand(2, 3, 8, 8)
    model = Corrected(nn.Sequential(), (2, 3, 8, 8))
    model.settle(images)
    assert torch.equal(model(), images)
    copy = Corrected(nn.Sequential(), (2, 3, 8, 8))
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        copy.u.add_(1)
    assert torch.allclose(copy(), images + photographic(torch.ones(2, 3, 8, 8)))


def test_the_pixel_phase_lowers_the_matching_loss_at_equal_rounds(client: FedSGD, truth: Truth) -> None:
    with_it, without = run(client, truth, rounds=150), run(client, truth, rounds=150, pixel_share=0.0)
    assert with_it.rounds == without.rounds == 150
    assert with_it.notes["pixels_corrected"]
    assert with_it.matching_loss < 0.3 * without.matching_loss
    assert [row["loss"] for row in with_it.history[:90]] == [row["loss"] for row in without.history[:90]]


def test_the_generator_goes_on_where_it_does_not_explain_the_update(client: FedSGD, truth: Truth, tmp_path: Path) -> None:
    """After two rounds it does not: what follows is what an attack without a pixel phase does, also after an interruption."""
    found, without = run(client, truth, rounds=6, pixel_share=0.5), run(client, truth, rounds=6, pixel_share=0.0)
    assert not found.notes["pixels_corrected"]
    assert found.rounds == 6
    assert torch.equal(found.images, without.images)
    path, calls = tmp_path / "checkpoint.safetensors", iter(range(1, 9))
    run(client, truth, rounds=6, pixel_share=0.5, checkpoint=Checkpoint(path), stop=lambda: "SIGINT" * (next(calls) == 5))
    resumed = run(client, truth, rounds=6, pixel_share=0.5, checkpoint=Checkpoint(path))
    assert torch.equal(resumed.images, without.images)


def test_an_interrupted_run_goes_on_to_the_same_bytes(client: FedSGD, truth: Truth, tmp_path: Path) -> None:
    """In the generator's rounds, at the border, and in the pixels'."""
    whole = run(client, truth)
    border = 60 - round(0.35 * 60)
    for cut in (10, border - 1, border, border + 1, 50):
        checkpoint = Checkpoint(tmp_path / f"{cut}.safetensors", every=1e9)
        calls = iter(range(1, 1000))
        run(client, truth, checkpoint=checkpoint, stop=lambda calls=calls, cut=cut: "SIGINT" if next(calls) == cut else "")
        resumed = run(client, truth, checkpoint=Checkpoint(tmp_path / f"{cut}.safetensors", every=1e9))
        assert torch.equal(resumed.images, whole.images), f"cut after round {cut}"
        assert resumed.matching_loss == whole.matching_loss


def test_a_group_and_joint_targets_have_no_pixel_phase(client: FedSGD, truth: Truth) -> None:
    group = run(client, truth, rounds=6, group=2)
    assert group.rounds == 6
    assert group.stopped == "all 6 rounds done"
    joint = run(client, truth, rounds=20, rule="joint")
    assert joint.rounds == 20
    assert not joint.notes["pixels_corrected"]


def test_fewer_channels_are_corrected_too(truth: Truth) -> None:
    """Grey images."""
    torch.manual_seed(0)
    grey = Truth(truth.images.mean(1, keepdim=True), truth.labels)
    client = FedSGD(nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(512, 10)))
    found = run(client, grey, rounds=60)
    assert found.images.shape == (2, 1, 16, 16)
    assert isinstance(found.images, Tensor)
    assert found.rounds == 60


def test_a_relative_prior_makes_smoother_images_and_the_history_is_that_of_the_loss(client: FedSGD, truth: Truth) -> None:
    plain, smooth = (run(client, truth, relative_total_variation=tau) for tau in (0.0, 3.0))
    begin = plain.rounds - round(CINetAttack().pixel_share * plain.rounds)
    losses = [[row["loss"] for row in rebuilt.history] for rebuilt in (plain, smooth)]
    assert losses[0][:begin] == losses[1][:begin]
    assert losses[0][begin + 2 :] != losses[1][begin + 2 :]
    assert all(loss > 0 for loss in losses[1])  # not the logarithm that is minimised
    assert losses[1][-1] < losses[1][begin]
    assert total_variation(smooth.images) < total_variation(plain.images)


def test_the_relative_prior_has_the_gradient_of_its_logarithm() -> None:
    """And does not change with the unit of the loss: what is added is tau times that of the logarithm."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    prior = (total_variation(images) / total_variation(coarse(images)).sqrt()).log()
    (expected,) = torch.autograd.grad(3 * prior, images)
    loop = object.__new__(_Loop)
    loop.shard = WHOLE
    value = loop._smooth(images, 3.0)
    assert value == pytest.approx(3 * float(prior.detach()))
    assert images.grad is not None
    torch.testing.assert_close(images.grad, expected)
    assert loop._smooth(torch.zeros(1, 3, 8, 8, requires_grad=True), 3.0) == 0


@pytest.mark.parametrize(
    ("shape", "side"),
    [
        ((256, 256), (32, 32)),
        ((256, 128), (32, 16)),
        ((128, 128), (32, 32)),
        ((32, 32), (16, 16)),
        ((4, 5), (2, 2)),
        ((3, 9), (3, 9)),
    ],
)
def test_coarse_images_have_about_32_pixels_and_their_means(shape: tuple[int, int], side: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *shape, dtype=torch.float64)
    found = coarse(images)
    assert found.shape == (2, 3, *side)
    if (shape[0] * side[1], shape[0] % side[0], shape[1] % side[1]) == (side[0] * shape[1], 0, 0):
        torch.testing.assert_close(found.mean((2, 3)), images.mean((2, 3)))


def test_halving_the_contrast_is_worth_half_of_what_halving_fine_structure_alone_is() -> None:
    """Contrast lowers the total variation of coarse images too."""
    torch.manual_seed(0)
    loop = object.__new__(_Loop)
    loop.shard = WHOLE
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    before, less = (loop._smooth(x.requires_grad_(), 1.0) for x in (images.clone(), images / 2))
    assert before - less == pytest.approx(math.log(2) / 2)


def test_the_gain_is_held_while_the_generator_is_fitted_and_not_while_pixels_are(
    truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rounds on pixels only the loss and the prior pull; a darker result is set to photographs' brightness in the end."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(16), nn.Sigmoid()]
    blind = FedSGD(nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 10)))
    held = []

    def count(images: Tensor, cotangent: Tensor, *, shard: Shard) -> Tensor:
        held.append(len(images))
        return hold_gain(images, cotangent, shard=shard)

    monkeypatch.setitem(_Loop._evaluate.__globals__, "hold_gain", count)  # the module has the name of its function
    found = run(blind, truth)
    assert found.notes["pixels_corrected"]
    assert len(held) == 60 - round(CINetAttack().pixel_share * 60)
    assert float(found.images.flatten().kthvalue(round(0.998 * found.images.numel())).values) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("gain", [0.2, 1.0, 5.0])
def test_a_batch_that_drifted_far_is_set_to_the_same_brightness(gain: float) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bright_gain(gain * images) * gain, bright_gain(images))


def test_smoothing_lowers_its_objective_and_keeps_the_mean() -> None:
    """And is what it says: no small change of the result lowers the objective, which is convex."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, 9, 12, dtype=torch.float64)
    images[..., 6:] += 2  # an edge
    found = smoothed(images, weight=0.2, steps=3000)

    def objective(y: Tensor) -> float:
        down, across = torch.zeros_like(y), torch.zeros_like(y)
        down[..., :-1, :], across[..., :-1] = y.diff(dim=-2), y.diff(dim=-1)
        return float((y - images).square().sum() / 2 + 0.2 * (down.square() + across.square()).sqrt().sum())

    assert objective(found) < 0.9 * objective(images)
    for _ in range(20):
        assert objective(found + 1e-3 * torch.randn_like(found)) > objective(found)
        assert objective(found + 1e-2 * photographic(torch.randn_like(found))) > objective(found)
    torch.testing.assert_close(found.mean((2, 3)), images.mean((2, 3)))
    assert found[..., 6].mean() - found[..., 5].mean() > 1.5  # the edge stands


def test_the_rounds_on_pixels_start_from_smoothed_images(client: FedSGD, truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    settled = []
    settle = Corrected.settle
    monkeypatch.setattr(Corrected, "settle", lambda self, images: (settled.append(images.clone()), settle(self, images)))
    for tau in (0.0, 1.0):
        run(client, truth, relative_total_variation=tau)
    plain, smooth = settled
    torch.testing.assert_close(smooth, smoothed(plain, weight=SMOOTHING * 16 / 256))
