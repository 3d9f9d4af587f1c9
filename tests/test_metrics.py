"""Metrics: their properties, what they refuse, and where LPIPS gets its backbone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import piq
import pytest
import torch
from safetensors.torch import load_file, save_file
from skimage.data import astronaut
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, pad
from torchvision.models.vgg import cfgs, make_layers

from gradleak import metrics
from gradleak.errors import DataError

Metric = Callable[[Tensor, Tensor], Tensor]

SIMILARITIES: list[Metric] = [metrics.psnr, metrics.ssim, metrics.fsim]
ALL: list[Metric] = [*SIMILARITIES, metrics.mse]


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """Sixteen 32 x 32 pieces of a photograph."""
    image = torch.from_numpy(astronaut().copy()).permute(2, 0, 1)[None] / 255
    return avg_pool2d(image, 4).unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5).reshape(16, 3, 32, 32)


@pytest.fixture(scope="module")
def backbone(shared: Path) -> Path:
    path = shared / "weights" / "vgg16_features.safetensors"
    if not path.is_file():
        pytest.skip(f"no VGG-16 at {path}")
    return path


@pytest.fixture(scope="module")
def network(backbone: Path) -> nn.Module:
    return metrics.load_lpips(str(backbone))


def noisy(images: Tensor, sigma: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + sigma * noise).clamp(0, 1)


def blurred(images: Tensor) -> Tensor:
    kernel = torch.full((images.shape[1], 1, 3, 3), 1 / 9)
    return conv2d(pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=images.shape[1])


@pytest.mark.parametrize(
    ("metric", "perfect"),
    [(metrics.psnr, metrics.PSNR_CAP), (metrics.ssim, 1), (metrics.fsim, 1), (metrics.mse, 0)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_equal_images_are_perfect(metric: Metric, perfect: float, channels: int, photographs: Tensor) -> None:
    score = metric(photographs[:, :channels], photographs[:, :channels])
    torch.testing.assert_close(score, torch.full_like(score, perfect))


@pytest.mark.parametrize("metric", ALL)
def test_symmetric(metric: Metric, photographs: Tensor) -> None:
    x, y = noisy(photographs, 0.1), photographs
    torch.testing.assert_close(metric(x, y), metric(y, x))


@pytest.mark.parametrize("metric", ALL)
def test_one_number_per_image_whatever_the_rest_of_the_batch(metric: Metric, photographs: Tensor) -> None:
    x = noisy(photographs, 0.1)
    alone = torch.cat([metric(a[None], b[None]) for a, b in zip(x, photographs, strict=True)])
    torch.testing.assert_close(metric(x, photographs), alone)


@pytest.mark.parametrize("metric", ALL)
def test_more_noise_is_worse(metric: Metric, photographs: Tensor) -> None:
    scores = [metric(noisy(photographs, sigma), photographs).mean() for sigma in (0.02, 0.05, 0.1, 0.2, 0.4)]
    assert scores == sorted(scores, reverse=metric is not metrics.mse)


@pytest.mark.parametrize("metric", ALL)
def test_data_range_is_a_unit(metric: Metric, photographs: Tensor) -> None:
    x, y = noisy(photographs, 0.1), photographs
    unit = 255**2 if metric is metrics.mse else 1
    torch.testing.assert_close(metric(255 * x, 255 * y, data_range=255), unit * metric(x, y))  # type: ignore[call-arg]


def test_psnr_by_hand_and_beside_piq(photographs: Tensor) -> None:
    grey = torch.full((2, 3, 8, 8), 0.5)
    torch.testing.assert_close(metrics.psnr(grey, grey + 0.1), torch.full((2,), 20.0).double(), atol=1e-5, rtol=0)
    x = noisy(photographs, 0.1)
    torch.testing.assert_close(
        metrics.psnr(x, photographs).float(), piq.psnr(x, photographs, reduction="none"), atol=1e-3, rtol=0
    )


def test_flat_images_have_finite_scores(photographs: Tensor) -> None:
    for metric in ALL:
        for grey in (0.0, 0.5, 1.0):
            flat = torch.full_like(photographs, grey)
            assert metric(flat, photographs).isfinite().all()
            assert metric(flat, torch.zeros_like(flat)).isfinite().all()


def test_chunks_do_not_show(photographs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    x = noisy(photographs, 0.1)
    whole = metrics.fsim(x, photographs)
    monkeypatch.setattr(metrics, "_CHUNK_PIXELS", 5 * 32 * 32)
    torch.testing.assert_close(metrics.fsim(x, photographs), whole)


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(2, 3, 16, 16), torch.zeros(3, 3, 16, 16), r"\(2, 3, 16, 16\), the truth \(3, 3, 16, 16\)"),
        (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), "images, channels, height, width"),
        (torch.zeros(0, 3, 16, 16), torch.zeros(0, 3, 16, 16), r"\(0, 3, 16, 16\)"),
        (torch.full((1, 3, 16, 16), 1.5), torch.zeros(1, 3, 16, 16), "reconstruction has values from 1.5 to 1.5"),
        (torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), -0.5), "truth has values from -0.5"),
        (torch.full((1, 3, 16, 16), math.nan), torch.zeros(1, 3, 16, 16), "nan"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16), "torch.uint8"),
    ],
)
def test_wrong_images_are_refused(metric: Metric, x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        metric(x, y)


def test_too_small_and_too_many_channels_are_refused() -> None:
    small, many = torch.zeros(1, 3, 10, 32), torch.zeros(1, 4, 32, 32)
    with pytest.raises(DataError, match="SSIM needs images of at least 11 x 11 pixels"):
        metrics.ssim(small, small)
    with pytest.raises(DataError, match="LPIPS needs images of at least 16 x 16 pixels"):
        metrics.lpips(small, small, nn.Identity())
    for metric in (metrics.fsim, lambda x, y: metrics.lpips(x, y, nn.Identity())):
        with pytest.raises(DataError, match="1 or 3 channels; these images have 4"):
            metric(many, many)
    assert metrics.ssim(many, many) == 1


def test_lpips_orders_images_as_people_do(network: nn.Module, photographs: Tensor) -> None:
    images = photographs[::3]

    def lpips(x: Tensor) -> Tensor:
        return metrics.lpips(x, images, network)

    assert (lpips(images) == 0).all()
    assert lpips(images).shape == (6,)
    assert (lpips(blurred(images)) > 0).all()
    assert lpips(blurred(images)).mean() < 0.6 * lpips(images.roll(1, dims=0)).mean()
    noise = [lpips(noisy(images, sigma)).mean() for sigma in (0.05, 0.1, 0.3)]
    assert noise == sorted(noise)


def test_lpips_symmetric_in_any_unit_and_repeats_one_channel(network: nn.Module, photographs: Tensor) -> None:
    x, y = noisy(photographs[:2], 0.1), photographs[:2]
    score = metrics.lpips(x, y, network)
    torch.testing.assert_close(metrics.lpips(y, x, network), score)
    torch.testing.assert_close(metrics.lpips(255 * x, 255 * y, network, data_range=255), score)
    repeated = metrics.lpips(x[:, :1].repeat(1, 3, 1, 1), y[:, :1].repeat(1, 3, 1, 1), network)
    torch.testing.assert_close(metrics.lpips(x[:, :1], y[:, :1], network), repeated)


def test_lpips_is_its_formula(network: nn.Module, backbone: Path, photographs: Tensor) -> None:
    """sum over 5 layers of mean over pixels of w . (unit features' squared difference), on torchvision's own VGG."""
    features = make_layers(cfgs["D"])
    features.load_state_dict({name.removeprefix("features."): t for name, t in load_file(backbone).items()})
    x, y = noisy(photographs[:2], 0.1), photographs[:2]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((-0.03, -0.088, -0.188), (0.458, 0.448, 0.45)))
    a, b = ((2 * images - 1 - mean) / std for images in (x, y))
    total = torch.zeros(2)
    with torch.no_grad():
        for i, layer in enumerate(features):
            a, b = layer(a), layer(b)
            if i in (3, 8, 15, 22, 29):
                weight = network.get_parameter(f"lin{(3, 8, 15, 22, 29).index(i)}.model.1.weight")
                unit = [f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b)]
                total += (weight * (unit[0] - unit[1]).square()).sum(1).mean(dim=(1, 2))
    torch.testing.assert_close(metrics.lpips(x, y, network), total, atol=1e-5, rtol=1e-4)


def test_loading_lpips_is_quiet_and_leaves_the_random_state(
    backbone: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    metrics._lpips_network.cache_clear()
    before = torch.get_rng_state()
    network = metrics.load_lpips(str(backbone))
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert not network.training
    assert not any(p.requires_grad for p in network.get_submodule("net").parameters())
    assert metrics.load_lpips(str(backbone)) is network


def test_auto_says_what_it_looked_for_and_how_to_give_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv(metrics.LPIPS_BACKBONE, raising=False)
    with pytest.raises(metrics.LpipsUnavailable) as refused:
        metrics.load_lpips("auto")
    for part in (str(tmp_path), "vgg16-397923af.pth", "'download'", "GRADLEAK_LPIPS_BACKBONE", "features.0.weight"):
        assert part in str(refused.value)
    with pytest.raises(metrics.LpipsUnavailable, match="switched off"):
        metrics.load_lpips("off")


def test_auto_takes_the_file_of_the_environment(monkeypatch: pytest.MonkeyPatch, backbone: Path) -> None:
    monkeypatch.setenv(metrics.LPIPS_BACKBONE, str(backbone))
    assert metrics.load_lpips("auto") is metrics.load_lpips(str(backbone))


def test_auto_takes_torchvisions_checkpoint(monkeypatch: pytest.MonkeyPatch, backbone: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv(metrics.LPIPS_BACKBONE, raising=False)
    metrics._lpips_network.cache_clear()
    checkpoint = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"an interrupted download")
    with pytest.raises(metrics.LpipsUnavailable, match=r"torchvision could not give it.*vgg16-397923af.pth"):
        metrics.load_lpips("auto")
    torch.save({**load_file(backbone), "classifier.6.bias": torch.zeros(1000)}, checkpoint)
    loaded = metrics.load_lpips("auto").state_dict()
    expected = metrics.load_lpips(str(backbone)).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    metrics._lpips_network.cache_clear()


def test_a_checkpoint_that_runs_code_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv(metrics.LPIPS_BACKBONE, raising=False)
    metrics._lpips_network.cache_clear()
    checkpoint = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    checkpoint.parent.mkdir(parents=True)
    torch.save({"features.0.weight": Payload()}, checkpoint)
    with pytest.raises(metrics.LpipsUnavailable) as refused:
        metrics.load_lpips("auto")
    assert not (tmp_path / "ran").exists()
    assert "trust" not in str(refused.value)  # torch's own message explains how to load it all the same


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda t: t.pop("features.5.bias"), "lacks 'features.5.bias'"),
        (lambda t: t.update({"features.40.bias": torch.zeros(1)}), "has unexpected 'features.40.bias'"),
        (
            lambda t: t.update({"features.0.bias": torch.zeros(3)}),
            r"'features.0.bias' has shape \(3,\), the model expects \(64,\)",
        ),
        (lambda t: t["features.2.bias"].fill_(math.nan), "'features.2.bias' has 64 values of 64 that are NaN"),
    ],
)
def test_a_wrong_backbone_is_refused(
    fault: Callable[[dict[str, Tensor]], object], message: str, backbone: Path, tmp_path: Path
) -> None:
    tensors = load_file(backbone)
    fault(tensors)
    path = tmp_path / "vgg.safetensors"
    save_file(tensors, path)
    with pytest.raises(metrics.LpipsUnavailable, match=rf"vgg.safetensors \(VGG-16 for LPIPS\): {message}"):
        metrics.load_lpips(str(path))


def test_a_backbone_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vgg.pth"
    with pytest.raises(metrics.LpipsUnavailable, match=r"vgg\.pth"):
        metrics.load_lpips(str(path))
    torch.save({}, path)
    with pytest.raises(metrics.LpipsUnavailable, match=r"vgg\.pth"):
        metrics.load_lpips(str(path))
