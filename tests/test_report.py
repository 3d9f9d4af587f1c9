"""The report: complete, self-contained, escaped, deterministic, and working in a real browser."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from gradleak.errors import OutputError
from gradleak.observation import Truth
from gradleak.report import ReportData, grid_png, render, write_report
from gradleak.report.figures import curve_svg, picture, png_data_uri

HOSTILE = "<img src=x onerror=alert(1)>"
PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")


def photographs(batch: int, height: int = 32, width: int = 32, channels: int = 3) -> Tensor:
    """Different square crops of scikit-image's photographs, B x C x H x W in [0, 1]."""
    images = []
    for i in range(batch):
        with Image.open(Path(skimage.__file__).parent / "data" / PHOTOGRAPHS[i % 4]) as photograph:
            side = min(photograph.size) * 9 // (9 + i // 4)
            left, top = (photograph.width - side) // 2, (photograph.height - side) // (2 + i // 4)
            crop = photograph.convert("RGB").crop((left, top, left + side, top + side)).resize((width, height))
        images.append(torch.from_numpy(np.asarray(crop).copy()).permute(2, 0, 1).float() / 255)
    batch_images = torch.stack(images)
    return batch_images[:, torch.arange(channels) % 3]


def report_data(
    batch: int = 8, height: int = 32, width: int = 32, channels: int = 3, names: tuple[str, ...] | None = None
) -> ReportData:
    """A run as it might be: noisy reconstructions in a shuffled order, with real metrics, snapshots and a history."""
    generator = torch.Generator().manual_seed(0)
    truth = photographs(batch, height, width, channels)
    noise = torch.randn(truth.shape, generator=generator)
    strength = torch.linspace(0.25, 0.02, batch)[torch.randperm(batch, generator=generator)].view(-1, 1, 1, 1)
    order = torch.randperm(batch, generator=generator)

    def at(progress: float) -> Tensor:
        """Reconstructions in the attack's own order, clearer with progress."""
        return (truth * progress + 0.5 * (1 - progress) + noise * (strength + 0.4 * (1 - progress)))[order]

    def score(images: Tensor, first: int) -> dict[str, list[float]]:
        rebuilt = images[torch.argsort(order)].clamp(0, 1)
        pairs = [(t.numpy(), r.numpy()) for t, r in zip(truth[:first], rebuilt[:first], strict=True)]
        return {
            "psnr": [float(peak_signal_noise_ratio(t, r, data_range=1)) for t, r in pairs],
            "ssim": [float(structural_similarity(t, r, channel_axis=0, data_range=1)) for t, r in pairs],
        }

    kept = [1, 20, 60, 120, 200, 300, 400, 500, 600]
    snapshots = torch.stack([at(1 - 0.85 * (1 - r / 600) ** 2) for r in kept])
    curves = [score(s, 4) for s in snapshots]
    final = score(snapshots[-1], batch)
    per_image = {
        **final,
        "fsim": [min(1.0, 0.5 + s / 2) for s in final["ssim"]],
        "lpips": [0.7 * (1 - s) for s in final["ssim"]],
    }
    result: dict[str, Any] = {
        "verdict": f"The attack rebuilt 6 of {batch} images recognisably from one gradient of a ResNet-18.",
        "attack": {"name": "cinet", "rounds": 600, "channels": 64, "distance": "cosine", "learning_rate": 0.001},
        "metrics": {
            key: {
                "mean": float(np.mean(v)),
                "median": float(np.median(v)),
                "worst": max(v) if key == "lpips" else min(v),
                "std": float(np.std(v)),
            }
            for key, v in per_image.items()
        },
        "per_image": per_image,
        "assignment": torch.argsort(order).tolist(),
        "many_to_one": {key: {"mean": float(np.mean(v)) + 0.01} for key, v in per_image.items()},
        "matching_loss": 0.0001834,
        "assumptions": [
            {
                "name": "threat model",
                "value": "B",
                "why": "honest-but-curious server that knows model and update (SoK)",
            },
            {
                "name": "labels",
                "value": "granted",
                "why": "the attack was told the labels; recovering them would cost it",
            },
            {"name": "batch size", "value": batch, "why": "the client says how many images it averaged over"},
            {
                "name": "batch norm",
                "value": "train mode",
                "why": "statistics of the batch itself, not running averages",
            },
            {"name": "activation", "value": "sigmoid", "why": "smooth; published attacks of this size fail with ReLU"},
            {"name": "weights", "value": "untrained", "why": "trained networks leak less"},
            {"name": "P(F) against B·C·H·W", "value": "700,000 > 24,576", "why": "more equations than unknowns"},
        ],
        "cost": {"rounds": 600, "seconds": 83.2, "seconds_per_round": 0.1387, "peak_memory_mb": 912.4},
        "labels": {"rule": "known", "accuracy": 1.0},
        "versions": {"gradleak": "0.1.0", "torch": "2.9.0", "python": "3.11.7"},
        "seed": 0,
        "device": "cpu",
        "stopped": "all 600 rounds done",
        "controls": {
            "random-noise gradient": {"psnr": {"mean": 9.1}, "ssim": {"mean": 0.03}, "lpips": {"mean": 0.71}},
            "mean image": {"psnr": {"mean": 13.4}, "ssim": {"mean": 0.11}, "lpips": {"mean": 0.66}},
        },
        "command": f"gradleak audit --set data.batch={batch} --set attack.rounds=600 --seed 0",
        "advice": [
            {"title": "Larger batches", "text": "Averaging over more images gives the attack more unknowns to find."},
            {"title": "Train first", "text": "Weights of a trained network answer less to single images."},
            {
                "title": "Differential privacy",
                "text": "Clipping and noise bound what any attack can learn, at a price.",
            },
        ],
        "warnings": [],
    }
    loss = np.exp(np.random.default_rng(0).normal(0, 0.1, 600)) * 10 ** (-np.linspace(0, 600, 600) / 160)
    return ReportData(
        result=result,
        images=snapshots[-1],
        truth=Truth(
            truth,
            torch.arange(batch) % 10,
            names
            if names is not None
            else tuple(PHOTOGRAPHS[i % 4].split(".")[0] + (f" {i // 4 + 1}" if i >= 4 else "") for i in range(batch)),
        ),
        snapshots=snapshots,
        history=[{"round": i + 1, "loss": float(v), "learning_rate": 1e-3, "seconds": 0.14 * i} for i, v in enumerate(loss)],
        quality={
            "round": [float(r) for r in kept],
            "psnr": [float(np.mean(s["psnr"])) for s in curves],
            "ssim": [float(np.mean(s["ssim"])) for s in curves],
        },
    )


def without_truth(data: ReportData) -> ReportData:
    missing = ("metrics", "per_image", "assignment", "many_to_one", "controls")
    result = {k: v for k, v in data.result.items() if k not in missing}
    return replace(data, result=result, truth=None, quality={})


class Page(HTMLParser):
    """What a page consists of: elements with attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def attributes(self, name: str) -> list[str]:
        return [value or "" for _, attrs in self.elements for key, value in attrs.items() if key == name]


@pytest.fixture(scope="module")
def eight() -> ReportData:
    return report_data(8)


@pytest.fixture(scope="module")
def html(eight: ReportData) -> str:
    return render(eight)


def test_everything_is_inside_the_page(html: str) -> None:
    page = Page(html)
    for name in ("src", "href", "xlink:href", "srcset", "poster", "action", "data", "formaction", "background"):
        assert all(value.startswith(("data:", "#")) for value in page.attributes(name)), name
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", html))
    assert len(html) < 1_500_000
    policy = next(attrs["content"] or "" for tag, attrs in page.elements if tag == "meta" and "http-equiv" in attrs)
    script = html[html.index("<script>") + len("<script>") : html.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}';")


def test_identifiers_are_unique_and_pictures_have_alternative_texts(html: str) -> None:
    page = Page(html)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    anchors = [value[1:] for value in page.attributes("href") if value.startswith("#")]
    assert set(anchors) <= set(ids)
    assert set(page.attributes("aria-labelledby")) <= set(ids)
    pictures = [attrs for tag, attrs in page.elements if tag == "img"]
    assert len(pictures) == 8 * 2 + 4 * (8 + 1)  # pairs, and four strips of eight frames and the truth
    assert all(attrs["alt"] for attrs in pictures)


def test_foreign_text_shows_literally() -> None:
    data = report_data(2, names=(HOSTILE, "</script><script>alert(2)</script>"))
    text = "\"'><script>alert(3)</script>{{ 7 * 7 }}"
    data.result.update(
        verdict=text,
        warnings=[text],
        command=text,
        device=text,
        stopped=text,
        attack={"name": text, text: {text: text}},
        labels={"rule": text},
        versions={text: text},
        notes={text: text},
        assumptions=[{"name": text, "value": text, "why": text}],
        advice=[{"title": text, "text": text}],
        controls={text: {"ssim": {"mean": 0.1}}},
    )
    html = render(data)
    page = Page(html)
    assert "onerror" not in {key for _, attrs in page.elements for key in attrs}
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert HOSTILE in page.text
    assert page.text.count(text) >= 14
    assert html.count("alert(") == html.count("alert(1)&gt;") + html.count("alert(2)&lt;") + html.count("alert(3)&lt;")


def test_names_may_be_any_text(tmp_path: Path) -> None:
    data = report_data(4, names=("\udcff.png", "two\nlines", "a" * 300, "漢字"))
    data.result["command"] = "gradleak \udcff"
    write_report(tmp_path, data)
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert all(name in page.text for name in ("?.png", "two lines", "a" * 300, "漢字"))


def shown_order(html: str) -> list[int]:
    return [int(i) for i in re.findall(r'<figure class="card[^"]*" id="image-(\d+)"', html)]


def test_pictures_run_from_best_to_worst(eight: ReportData, html: str) -> None:
    ssim = eight.result["per_image"]["ssim"]
    assert shown_order(html) == sorted(range(8), key=lambda i: -ssim[i])


def test_each_true_image_stands_beside_its_assigned_reconstruction(eight: ReportData, html: str) -> None:
    """The batch comes back shuffled; the card of true image i must show ``images[assignment[i]]``."""
    assert eight.truth is not None
    assert eight.result["assignment"] != list(range(8))
    for i, j in enumerate(eight.result["assignment"]):
        card = html[html.index(f'id="image-{i}"') :]
        first, second = re.findall(r'src="(data:[^"]*)"', card)[:2]
        assert first == png_data_uri(picture(eight.truth.images[i]))
        assert second == png_data_uri(picture(eight.images[j]))


def test_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, report_data(2))
    for name in ("report.html", "grid.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["grid.png", "report.html"]


def test_without_truth_there_are_reconstructions_and_no_metric(eight: ReportData) -> None:
    html = render(without_truth(eight))
    page = Page(html)
    assert shown_order(html) == list(range(8))
    assert "Truth:" not in html
    assert not any(name in page.text for name in ("SSIM", "PSNR", "LPIPS"))
    assert "no truth" in page.text
    assert "Matching loss" in page.text


def test_an_almost_empty_result_is_reported() -> None:
    images = photographs(2)
    for truth in (None, Truth(images, torch.zeros(2, dtype=torch.int64))):
        page = Page(render(ReportData({}, images, truth, None, [], {})))
        assert "image 1" in page.text
        assert "Private." in page.text


def test_metrics_that_were_not_measured_show_a_dash_and_the_reason() -> None:
    data = report_data(3)
    data.result["per_image"].update(lpips=None, fsim=[None, 0.5, float("nan")], ssim=[None, 0.5, 0.9])
    data.result["metrics"].update(lpips=None, fsim={"mean": None})
    data.result["notes"] = {"lpips": "VGG-16 is not in the cache"}
    data.result["per_image"]["psnr"] = [float("inf"), 20.0, 30.0]
    html = render(data)
    assert shown_order(html) == [2, 1, 0]
    page = Page(html)
    assert "VGG-16 is not in the cache" in page.text
    assert "–" in page.text
    assert "∞" in page.text
    assert "nan" not in page.text.lower().replace("chelsea", "").split()


@pytest.mark.parametrize(
    ("batch", "height", "width", "channels"), [(1, 24, 40, 1), (40, 32, 32, 3), (3, 8, 16, 4), (2, 16, 9, 2)]
)
def test_any_batch_shape_and_channel_count(batch: int, height: int, width: int, channels: int, tmp_path: Path) -> None:
    data = report_data(batch, height, width, channels)
    write_report(tmp_path, data)
    assert len(shown_order((tmp_path / "report.html").read_text("utf-8"))) == batch
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width <= 1600


def test_where_ssim_is_missing_psnr_ranks() -> None:
    data = report_data(3)
    data.result["per_image"].update(ssim=[None] * 3, psnr=[10.0, 30.0, 20.0])
    data.quality["ssim"] = [None] * len(data.quality["round"])  # type: ignore[list-item]
    html = render(data)
    assert shown_order(html) == [1, 2, 0]
    assert "Mean SSIM" not in html


def test_grid_stays_bounded_for_many_and_for_large_images(tmp_path: Path) -> None:
    for images in (torch.zeros(256, 1, 32, 32), torch.zeros(2, 3, 40, 1000)):
        grid_png(tmp_path / "grid.png", images, images)
        with Image.open(tmp_path / "grid.png") as grid:
            assert grid.width <= 1600
            assert grid.height <= 10_000


def test_grid_shows_truth_above_reconstruction(tmp_path: Path) -> None:
    white, black = torch.ones(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    grid_png(tmp_path / "grid.png", white * 0.5, black)
    with Image.open(tmp_path / "grid.png") as grid:
        column = np.asarray(grid.convert("L"))[:, grid.width // 3 * 2]
    assert np.flatnonzero(column == 128).max() < np.flatnonzero(column == 0).min()


def test_pictures_clamp_and_survive_values_that_are_not_finite() -> None:
    image = torch.tensor([[-1.0, 2.0], [float("nan"), 0.5]]).expand(3, 2, 2)
    assert np.asarray(picture(image))[..., 0].tolist() == [[0, 255], [0, 128]]
    assert picture(image[:1]).mode == picture(image[:2]).mode == "L"


def test_curves_leave_matplotlib_as_it_was_and_use_the_page_colours() -> None:
    with matplotlib.rc_context({"font.size": 31.0, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        svg = curve_svg([0, 1, 2], [1.0, 0.1, float("nan")], label="loss", log=True)
        assert dict(matplotlib.rcParams) == before
    assert "var(--accent)" in svg
    assert "#ff0000" not in svg
    assert re.search(r"#0[1-4]0", svg) is None
    assert curve_svg([0, 1], [0.0, -1.0], label="loss", log=True) == ""


def test_long_histories_stay_small() -> None:
    rounds = list(range(150_000))
    assert len(curve_svg(rounds, [1 / (r + 1) for r in rounds], label="loss", log=True)) < 60_000


def test_a_folder_that_cannot_be_written_is_named(eight: ReportData, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="missing"):
        write_report(tmp_path / "missing", eight)
