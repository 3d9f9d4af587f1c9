"""Small settings in which the older attacks are known to work: one CIFAR-10 image each.

    python benchmarks/classics.py --source cifar10 --resnet20 cifar10_resnet20.safetensors [--only NAME ...]

- ``dlg``, ``idlg``: the first ten training images, one at a time, on the sigmoid LeNet of Deep Leakage from Gradients (random
  weights). ``dlg`` finds the label by itself, ``idlg`` reads it from the gradient. First images are N(1/2, 1/4^2). Of
  ``repeat`` restarts the one with the least matching loss counts, as an attacker would choose.
- ``inverting-gradients``: one image on a ReLU ResNet-20 that was trained on CIFAR-10, batch norm in eval mode, label read from
  the gradient (rule ``idlg``). Each weight of total variation is a row.
- ``analytic``: one image from a network that begins with a linear layer.

Pictures go to ``--pictures``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gradleak as gl  # before torch: it sets how threads wait

# isort: split
import torch
from torch import Tensor, nn

from gradleak import data, models
from gradleak.attacks import attack
from gradleak.client import operator
from gradleak.errors import DivergedError
from gradleak.invert import Reconstruction, invert
from gradleak.labels import Rule, recover
from gradleak.observation import Truth
from gradleak.report.figures import comparison_png
from gradleak.spec import DataSpec, ModelSpec
from record import provenance, save_row, scores

SEED, IMAGES, EXACT_ENOUGH = 0, 10, 30.0


def rebuild(
    model: nn.Module, truth: Truth, name: str, *, mode: str = "train", rule: Rule = "idlg", seed: int = SEED, **settings: Any
) -> Reconstruction | None:
    """One attack on one client's gradient, its labels recovered by a rule; None where it diverged at once."""
    observation = gl.simulate(gl.FedSGD(model, mode=mode), truth, grant_labels=rule == "known")  # type: ignore[arg-type]
    client = operator(observation, model)
    recipe, labels = attack(name, snapshots=0, **settings), recover(rule, observation, client)
    try:
        return invert(observation, recipe, client=client, labels=labels, seed=seed, progress=False)
    except DivergedError:
        return None


def lenet(name: str, source: str, *, rounds: int, repeat: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``dlg`` or ``idlg`` on each of the first ten images."""
    model = models.build(ModelSpec(name="lenet"), image_shape=(3, 32, 32))
    images, found = [], []
    for i in range(IMAGES):
        truth = data.load(DataSpec(source=source, start=i, batch=1))
        result = rebuild(model, truth, name, rounds=rounds, repeat=repeat, patience=20, initial="normalised")
        images.append(torch.zeros(3, 32, 32) if result is None else result.images[0])
        if result is not None:
            right = bool(result.labels.values[0] == truth.labels[0])
            row = {"psnr": scores(result.images, truth)["psnr"]["mean"], "ssim": scores(result.images, truth)["ssim"]["mean"]}
            found.append({"image": i, **row, "label_right": right, "seconds": round(result.seconds, 1)})
            print(name, found[-1], f"{result.matching_loss:.2e}", result.stopped, flush=True)
    truth = data.load(DataSpec(source=source, batch=IMAGES))
    successes = sum(row["psnr"] >= EXACT_ENOUGH for row in found)
    row = {
        "name": f"{name} on LeNet",
        "attack": name,
        "settings": {"rounds": rounds, "repeat": repeat, "patience": 20, "initial": "normalised"},
        "images": IMAGES,
        "successes": successes,
        "best_psnr": max(row["psnr"] for row in found),
        "per_image": found,
        "seconds": round(sum(row["seconds"] for row in found), 1),
    }
    return row, {"truth": truth.images, f"{name}: {successes} of {IMAGES}": torch.stack(images)}


def trained_resnet20(source: str, weights: Path, *, image: int, settings: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """``inverting-gradients`` on one image and the trained ReLU ResNet-20 in eval mode."""
    model = models.build(
        ModelSpec(name="resnet20-cifar", weights=weights, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        image_shape=(3, 32, 32),
    )
    truth = data.load(DataSpec(source=source, start=image, batch=1))
    result = rebuild(model, truth, "inverting-gradients", mode="eval", **settings)
    assert result is not None
    chosen = f"TV {settings['total_variation']:g}, rate {settings['learning_rate']:g}, {settings['rounds']} rounds"
    row = {
        "name": f"inverting-gradients on ResNet-20, image {image}, {chosen}",
        "attack": "inverting-gradients",
        "image": image,
        "settings": settings,
        "matching_loss": float(f"{result.matching_loss:.3g}"),
        "label_right": bool(result.labels.values[0] == truth.labels[0]),
        "metrics": scores(result.images, truth),
        "seconds": round(result.seconds, 1),
    }
    return row, result.images[0]


def linear_first(source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``analytic`` on one image and a network whose first layer is linear, as PSNR of at most 100 dB."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 100), nn.ReLU(), nn.Linear(100, 10))
    truth = data.load(DataSpec(source=source, batch=1))
    result = rebuild(model, truth, "analytic")
    assert result is not None
    row = {
        "name": "analytic on a linear first layer",
        "attack": "analytic",
        "settings": {"model": "Linear(3072, 100), ReLU, Linear(100, 10)"},
        "metrics": scores(result.images, truth),
        "seconds": round(result.seconds, 3),
    }
    return row, {"truth": truth.images, "analytic": result.images}


def main() -> None:
    cells = ("analytic", "dlg", "idlg", "inverting-gradients")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="cifar10", help="cifar10, or npz:FILE with its first training images")
    parser.add_argument("--resnet20", type=Path, help="safetensors file of the trained ResNet-20")
    parser.add_argument("--only", nargs="+", choices=cells, default=list(cells))
    parser.add_argument("--rounds", type=int, default=50, help="of dlg and idlg")
    parser.add_argument("--repeat", type=int, default=1, help="restarts of dlg and idlg")
    parser.add_argument("--images", type=int, nargs="+", default=[7], help="for inverting-gradients")
    parser.add_argument("--total-variation", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2, 1e-1])
    parser.add_argument("--learning-rate", type=float, default=0.1, help="of inverting-gradients")
    parser.add_argument("--descent", type=int, default=600, help="rounds of inverting-gradients")
    parser.add_argument("--pictures", type=Path, default=Path("runs/classics"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.pictures.mkdir(parents=True, exist_ok=True)

    def keep(row: dict[str, Any]) -> None:
        save_row("classics", {**row, **provenance(seed=SEED)})
        print({key: value for key, value in row.items() if key != "per_image"}, flush=True)

    for name in ("dlg", "idlg"):
        if name in arguments.only:
            row, pictures = lenet(name, arguments.source, rounds=arguments.rounds, repeat=arguments.repeat)
            keep(row)
            comparison_png(arguments.pictures / f"lenet-{name}.png", pictures)
    if "analytic" in arguments.only:
        row, pictures = linear_first(arguments.source)
        keep(row)
    if "inverting-gradients" in arguments.only:
        rows = {
            "truth": torch.cat(
                [data.load(DataSpec(source=arguments.source, start=i, batch=1)).images for i in arguments.images]
            )
        }
        for weight in arguments.total_variation:
            settings = {"rounds": arguments.descent, "total_variation": weight, "learning_rate": arguments.learning_rate}
            rebuilt = []
            for image in arguments.images:
                row, picture = trained_resnet20(arguments.source, arguments.resnet20, image=image, settings=settings)
                keep(row)
                rebuilt.append(picture)
            rows[f"TV {weight:g}"] = torch.stack(rebuilt)
        comparison_png(arguments.pictures / "resnet20.png", rows, pixels=96)


if __name__ == "__main__":
    main()
