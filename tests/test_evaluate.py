"""The evaluation protocol: one-to-one assignment, clamping, every metric or the reason why not, and the controls."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.data import astronaut
from torch import Tensor
from torch.nn.functional import avg_pool2d

from gradleak import metrics
from gradleak.errors import DataError
from gradleak.evaluate import (
    RECOGNISABLE_SSIM,
    Evaluation,
    evaluate,
    identify,
    label_scores,
    mean_image_control,
    quality_over_rounds,
    recognisable,
    remark,
    verdict,
)
from gradleak.matching import assign, many_to_one
from gradleak.observation import Truth

METRICS = ("psnr", "ssim", "fsim", "lpips", "mse")


@pytest.fixture(scope="module")
def truth() -> Truth:
    """Eight 32 x 32 pieces of a photograph."""
    image = torch.from_numpy(astronaut().copy()).permute(2, 0, 1)[None] / 255
    pieces = avg_pool2d(image, 4).unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5).reshape(16, 3, 32, 32)
    return Truth(pieces[::2].clone(), torch.arange(8) // 2, tuple(f"piece {i}" for i in range(8)))


def noise_like(images: Tensor, *, seed: int = 0) -> Tensor:
    return torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def reconstruction(truth: Truth) -> Tensor:
    """Noisier from image to image, and in part outside [0, 1]."""
    return truth.images + torch.linspace(0.02, 0.3, 8).view(8, 1, 1, 1) * noise_like(truth.images)


@given(batch=st.integers(1, 6), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_assignment_is_the_best_of_all_permutations(batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(2, batch, 1, 2, 3, generator=generator)
    order = assign(x, y)
    assert sorted(order.tolist()) == list(range(batch))
    best = min(float((x[list(p)] - y).square().sum()) for p in itertools.permutations(range(batch)))
    assert float((x[order] - y).square().sum()) == pytest.approx(best, rel=1e-5)


def test_assignment_undoes_a_shuffle(truth: Truth) -> None:
    shuffle = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(shuffle[assign(truth.images[shuffle], truth.images)], torch.arange(8))


def test_assignment_sees_tiny_differences_of_bright_images() -> None:
    """The three terms of the squared distance cancel to 1e-12 of their size."""
    y = 1 - 1e-6 * torch.rand(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(assign(y.flip(0), y), torch.arange(4).flip(0))


def test_assignment_refuses_other_shapes_and_nan() -> None:
    with pytest.raises(DataError, match=r"\(2, 1, 4, 4\) and \(3, 1, 4, 4\)"):
        assign(torch.zeros(2, 1, 4, 4), torch.zeros(3, 1, 4, 4))
    with pytest.raises(DataError, match="NaN"):
        assign(torch.full((2, 1, 4, 4), math.nan), torch.zeros(2, 1, 4, 4))


def test_the_truth_itself_is_perfect(truth: Truth) -> None:
    result = evaluate(truth.images, truth, labels=truth.labels, lpips="off")
    assert result.assignment == list(range(8))
    assert result.label_matches == 8
    assert result.assigned_by == "mse"
    for name, value in (("psnr", metrics.PSNR_CAP), ("ssim", 1), ("fsim", 1), ("mse", 0)):
        assert result.summary[name]["mean"] == pytest.approx(value)
        assert result.summary[name]["std"] == pytest.approx(0, abs=1e-6)


def test_the_order_of_reconstructions_changes_only_the_assignment(truth: Truth, reconstruction: Tensor) -> None:
    shuffle = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    plain = evaluate(reconstruction, truth, labels=truth.labels, lpips="off")
    shuffled = evaluate(reconstruction[shuffle], truth, labels=truth.labels[shuffle], lpips="off")
    assert shuffle[shuffled.assignment].tolist() == plain.assignment
    for name in ("psnr", "ssim", "fsim", "mse"):
        assert shuffled.per_image[name] == pytest.approx(plain.per_image[name], abs=1e-5)
        assert shuffled.summary[name] == pytest.approx(plain.summary[name], abs=1e-5)
    assert shuffled.many_to_one == pytest.approx(plain.many_to_one, abs=1e-5)
    assert shuffled.label_matches == plain.label_matches


def test_summary_and_worst(truth: Truth, reconstruction: Tensor) -> None:
    result = evaluate(reconstruction, truth, lpips="off")
    for name in ("psnr", "ssim", "fsim", "mse"):
        values = torch.tensor(result.per_image[name], dtype=torch.float64)
        summary = result.summary[name]
        assert summary["mean"] == pytest.approx(float(values.mean()))
        assert summary["std"] == pytest.approx(float(values.std(correction=0)))
        assert summary["median"] == pytest.approx(float(values.quantile(0.5)))
        assert summary["worst"] == float(values.max() if name == "mse" else values.min())


def test_reconstructions_are_clamped(truth: Truth, reconstruction: Tensor) -> None:
    assert not 0 <= reconstruction.min() <= reconstruction.max() <= 1
    plain, clamped = (evaluate(x, truth, lpips="off") for x in (reconstruction, reconstruction.clamp(0, 1)))
    assert plain == clamped


def test_more_noise_is_worse(truth: Truth) -> None:
    noise = noise_like(truth.images)
    results = [evaluate(truth.images + sigma * noise, truth, lpips="off").summary for sigma in (0.02, 0.1, 0.4)]
    for name in ("psnr", "ssim", "fsim"):
        assert results[0][name]["mean"] > results[1][name]["mean"] > results[2][name]["mean"]  # type: ignore[operator]


def test_many_to_one_is_never_worse(truth: Truth, reconstruction: Tensor) -> None:
    x = (0.5 * reconstruction + 0.5 * reconstruction.roll(1, dims=0)).clamp(0, 1)
    result = evaluate(x, truth, lpips="off")
    for name in ("psnr", "ssim"):
        assert result.many_to_one[name] >= result.summary[name]["mean"]  # type: ignore[operator]
    closest = many_to_one(x, truth.images, metrics.mse, higher_is_better=False)
    assert float(closest.mean()) <= result.summary["mse"]["mean"]  # type: ignore[operator]


def test_many_to_one_is_fooled_by_copies_and_the_assignment_is_not(truth: Truth) -> None:
    copies = truth.images[:1].expand(8, -1, -1, -1)
    result = evaluate(copies, truth, lpips="off")
    assert result.many_to_one["ssim"] == pytest.approx(1)
    assert recognisable(result) == 1


def test_labels_follow_the_assignment(truth: Truth) -> None:
    shuffle = torch.arange(8).flip(0)
    assert evaluate(truth.images[shuffle], truth, labels=truth.labels[shuffle], lpips="off").label_matches == 8
    assert evaluate(truth.images[shuffle], truth, labels=truth.labels, lpips="off").label_matches == 0
    assert evaluate(truth.images, truth, lpips="off").label_matches is None
    with pytest.raises(DataError, match="labels"):
        evaluate(truth.images, truth, labels=truth.labels[:3], lpips="off")


def test_lpips_off_is_none_with_a_note(truth: Truth) -> None:
    result = evaluate(truth.images, truth, lpips="off")
    assert result.per_image["lpips"] == [None] * 8
    assert set(result.summary["lpips"].values()) == {None}
    assert set(result.notes) == {"lpips"}
    assert "switched off" in result.notes["lpips"]


def test_lpips_from_a_file(truth: Truth, reconstruction: Tensor, shared: Path) -> None:
    backbone = shared / "weights" / "vgg16_features.safetensors"
    if not backbone.is_file():
        pytest.skip(f"no VGG-16 at {backbone}")
    perfect = evaluate(truth.images, truth, lpips=str(backbone))
    assert perfect.per_image["lpips"] == [0.0] * 8
    assert not perfect.notes
    summary = evaluate(reconstruction, truth, lpips=str(backbone)).summary["lpips"]
    assert 0 < summary["mean"] < summary["worst"]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("shape", "missing"),
    [
        ((2, 1, 16, 16), {"lpips"}),
        ((2, 4, 16, 16), {"fsim", "lpips"}),
        ((2, 3, 10, 10), {"ssim", "lpips"}),
        ((1, 3, 8, 12), {"ssim", "lpips"}),
    ],
)
def test_a_metric_that_is_not_defined_is_none_with_a_note(shape: tuple[int, ...], missing: set[str]) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    truth = Truth(images, torch.zeros(shape[0], dtype=torch.int64))
    result = evaluate(images, truth, lpips="off")
    assert set(result.notes) == missing
    for name in METRICS:
        assert (None in result.per_image[name]) == (name in missing)
    assert (result.many_to_one["ssim"] is None) == ("ssim" in missing)
    assert ("SSIM cannot be computed" in verdict(result)) == ("ssim" in missing)
    assert (recognisable(result) is None) == ("ssim" in missing)
    assert (None in quality_over_rounds(images[None], truth)["ssim"]) == ("ssim" in missing)


def test_to_dict_is_json(truth: Truth, reconstruction: Tensor) -> None:
    result = evaluate(reconstruction, truth, lpips="off")
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()


def test_wrong_reconstructions_are_refused(truth: Truth) -> None:
    with pytest.raises(DataError, match=r"\(7, 3, 32, 32\), the truth \(8, 3, 32, 32\)"):
        evaluate(truth.images[:7], truth, lpips="off")
    with pytest.raises(DataError, match=r"in 1 of 8 images \(first: 3\)"):
        evaluate(truth.images.index_fill(0, torch.tensor(3), math.nan), truth, lpips="off")
    with pytest.raises(DataError, match=r"truth must be images .* values from 0 to 255"):
        evaluate(truth.images, replace(truth, images=(truth.images * 300).clamp(0, 255)), lpips="off")


def test_evaluation_does_not_touch_its_inputs(truth: Truth, reconstruction: Tensor) -> None:
    images, x = truth.images.clone(), reconstruction.clone().requires_grad_()
    evaluate(x, truth, lpips="off")
    assert torch.equal(truth.images, images)
    assert torch.equal(x.detach(), reconstruction)
    assert x.grad is None


def test_quality_over_rounds_is_evaluate_per_snapshot(truth: Truth, reconstruction: Tensor) -> None:
    snapshots = torch.stack([noise_like(truth.images, seed=3), reconstruction.flip(0), truth.images])
    curves = quality_over_rounds(snapshots, truth)
    for name, curve in curves.items():
        single = [evaluate(x, truth, lpips="off").summary[name]["mean"] for x in snapshots]
        assert curve == pytest.approx(single, abs=1e-6)
        assert curve == sorted(curve)  # type: ignore[type-var]
    with pytest.raises(DataError, match="snapshot 1 holds NaN"):
        quality_over_rounds(snapshots.index_fill(0, torch.tensor(1), math.nan), truth)
    with pytest.raises(DataError, match="snapshots have shape"):
        quality_over_rounds(truth.images, truth)


def test_good_reconstructions_are_identified_among_decoys_and_noise_is_not(truth: Truth) -> None:
    """Every true image is the nearest of all; noise is nearest to the same image whatever it should be."""
    decoys = 1 - truth.images
    found = identify(truth.images.flip(0) + 0.05 * noise_like(truth.images), truth, decoys=decoys)
    assert (found.candidates, found.chance) == (16, 1 / 16)
    assert found.ranks == {"mse": [1] * 8, "ssim": [1] * 8}
    assert found.rate == {"mse": 1.0, "ssim": 1.0}
    lost = identify(noise_like(truth.images), truth, decoys=decoys)
    assert lost.rate["mse"] is not None
    assert lost.rate["mse"] <= 2 / 8


@given(batch=st.integers(1, 5), others=st.integers(0, 6), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_ranks_are_those_of_an_explicit_loop(batch: int, others: int, seed: int) -> None:
    """By squared error; what is nearer than the true image counts, in the batch or not; decoys never help."""
    generator = torch.Generator().manual_seed(seed)
    x, y, decoys = (torch.rand(n, 1, 4, 4, generator=generator) for n in (batch, batch, others))
    truth = Truth(y, torch.zeros(batch, dtype=torch.int64))
    found, alone = identify(x, truth, decoys=decoys), identify(x, truth)
    order, candidates = assign(x, y), [*y, *decoys]
    assert found.ranks["ssim"] is None  # smaller than its window
    assert found.candidates == len(candidates)
    for i in range(batch):
        errors = [float((x[order[i]].double() - c.double()).square().mean()) for c in candidates]
        assert found.ranks["mse"] is not None
        assert found.ranks["mse"][i] == 1 + sum(error < errors[i] for error in errors)
    assert found.rate["mse"] is not None
    assert alone.rate["mse"] is not None
    assert found.rate["mse"] <= alone.rate["mse"]


def test_a_copy_among_the_decoys_does_not_hide_an_image(truth: Truth) -> None:
    assert identify(truth.images, truth, decoys=truth.images).rate == {"mse": 1.0, "ssim": 1.0}
    with pytest.raises(DataError, match="decoys"):
        identify(truth.images, truth, decoys=truth.images[:, :, :16])


@given(
    there=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    seed=st.integers(0, 2**31),
    classes=st.integers(7, 20),
)
@settings(max_examples=50, deadline=None)
def test_label_scores_are_shares_of_counts(there: list[int], seed: int, classes: int) -> None:
    """Against their definitions in plain Python; right labels in any order are perfect by all of them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(there)
    guess = torch.randint(7, (len(labels),), generator=generator)
    n, m = ([values.tolist().count(k) for k in range(classes)] for values in (labels, guess))
    scores = label_scores(guess, labels, classes=classes)
    present, named = [k for k in range(classes) if n[k]], [k for k in range(classes) if n[k] or m[k]]
    assert scores == pytest.approx(
        {
            "accuracy": sum(map(min, n, m)) / len(labels),
            "classes_found": sum(m[k] > 0 for k in present) / len(present),
            "counts_exact": sum(m[k] == n[k] for k in named) / len(named),
            "existence_accuracy": sum((m[k] > 0) == (n[k] > 0) for k in range(classes)) / classes,
            "number_accuracy": sum(m[k] == n[k] for k in range(classes)) / classes,
        }
    )
    right = label_scores(labels[torch.randperm(len(labels), generator=generator)], labels)
    assert right == {"accuracy": 1.0, "classes_found": 1.0, "counts_exact": 1.0}


def test_absent_classes_make_published_accuracies_of_labels_flattering() -> None:
    """All wrong, and yet 98 of 100 classes are right."""
    scores = label_scores(torch.tensor([1]), torch.tensor([0]), classes=100)
    assert (scores["accuracy"], scores["classes_found"], scores["counts_exact"]) == (0, 0, 0)
    assert (scores["existence_accuracy"], scores["number_accuracy"]) == (0.98, 0.98)


@pytest.mark.parametrize(
    ("ssim", "noise", "doubted"),
    [(0.9, 0.2, False), (0.31, 0.21, False), (0.30, 0.21, True), (0.1, 0.4, True), (0.4, 0.4, True)],
)
def test_images_that_noise_gives_as_well_are_doubted(ssim: float, noise: float, doubted: bool) -> None:
    """The sentence has both means and the difference that is asked for."""
    sentence = remark(ssim, {"random-noise gradient": {"ssim": {"mean": noise}}, "mean image": {"ssim": {"mean": 1.0}}})
    assert bool(sentence) is doubted
    if doubted:
        assert "do not come from the gradient" in sentence
        assert all(f"{number:.2f}" in sentence for number in (ssim, noise, 0.1))


def test_without_a_control_nothing_is_doubted_but_an_update_blind_to_the_images() -> None:
    assert remark(0.1) == remark(None, {}) == remark(0.1, {"mean image": {"ssim": {"mean": 0.4}}}) == ""
    assert remark(0.1, {"random-noise gradient": {"ssim": {"mean": None}}}, image_sensitivity=0.5) == ""
    assert "does not depend on the images" in remark(0.9, image_sensitivity=0.0)
    assert "does not depend on the images" in remark(None, image_sensitivity=1e-8)


def test_mean_image_is_the_best_single_guess(truth: Truth) -> None:
    control = mean_image_control(truth, lpips="off").summary["mse"]["mean"]
    for guess in (torch.full((3, 32, 32), 0.5), *truth.images):
        assert control <= float(metrics.mse(guess.expand_as(truth.images), truth.images).mean())  # type: ignore[operator]


def with_ssim(*scores: float, names: tuple[str, ...] = ()) -> Evaluation:
    psnr: dict[str, float | None] = {"mean": 20.0}
    return Evaluation([], {"ssim": list(scores)}, {"psnr": psnr}, {}, {}, names=names)


def test_verdict() -> None:
    three = with_ssim(0.93, 0.41, RECOGNISABLE_SSIM, names=("cat", "cup", "fox"))
    assert recognisable(three) == 2
    assert verdict(three) == (
        "2 of 3 images are recognisable to a stranger under these assumptions (SSIM >= 0.60); "
        "the closest is cat (SSIM 0.93), the least close cup (SSIM 0.41)."
    )
    assert recognisable(three, threshold_ssim=0.95) == 0
    assert "the closest is image 1" in verdict(with_ssim(0.3, 0.7))
    assert verdict(with_ssim(0.3, 0.7)).startswith("1 of 2 images is recognisable to a stranger")
    one = "The image is recognisable to a stranger under these assumptions (SSIM >= 0.60): SSIM 0.70, PSNR 20.0 dB."
    assert verdict(with_ssim(0.7)) == one
    assert verdict(with_ssim(0.2)).startswith("The image is not recognisable")
