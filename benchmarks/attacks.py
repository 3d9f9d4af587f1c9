"""All attacks at equal wall time: the same 16 CIFAR-10 training images, sigmoid ResNet-18, one core, ten minutes each.

    python benchmarks/attacks.py --source cifar10 [--only NAME ...] [--minutes 10] [--lpips FILE] [--generator FILE]
    python benchmarks/attacks.py --source cifar10 --picture docs/images/attacks.png

Labels are known, batch norm is in train mode, F has its random weights. A few rounds are timed first; then the number of
rounds is what fits into the time, since schedules depend on it. An attack that stops early (L-BFGS that diverges) starts again
with the next seed while there is time for another round, and the run with the least matching loss counts. ``gi-nas``
searches within the time. ``gias-dcgan`` needs a generator that saw other images of the kind:

    gradleak train-generator cifar10 --start 64 --images 960 --width 32 --rounds 400 --out dcgan.safetensors

Reconstructions go to ``--work`` (private images), for the picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import gradleak as gl  # before torch: it sets how threads wait

# isort: split
import torch

from gradleak import data, models
from gradleak.attacks import Attack, attack
from gradleak.client import operator
from gradleak.errors import DivergedError, ObservationError
from gradleak.invert import Reconstruction, invert
from gradleak.labels import Labels
from gradleak.report.figures import comparison_png
from gradleak.spec import DataSpec, ModelSpec
from gradleak.tensors import read_tensors, write_tensors
from record import aligned, provenance, rows_of, save_row, scores

#: Cell -> (preset, settings that differ from the preset's). The self-checking secant serves all that take first-order steps.
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "cinet": ("cinet", {"channels": 32}),
    "cinet-reference": ("cinet-reference", {"engine": "auto"}),
    "inverting-gradients": ("inverting-gradients", {"engine": "auto"}),
    "gradinversion": ("gradinversion", {"engine": "auto", "group": 1}),
    "dlg": ("dlg", {}),
    "idlg": ("idlg", {}),
    "gias": ("gias", {"engine": "auto"}),
    "gias-dcgan": ("gias", {"engine": "auto"}),
    "gi-nas": ("gi-nas", {"engine": "auto", "candidates": 40, "learning_rate": 5e-3, "schedule": "cosine"}),
    "analytic": ("analytic", {}),
}
SEED = 0


class Setting:
    """The observation that all attacks share, and its truth."""

    def __init__(self, *, source: str, batch: int, width: int) -> None:
        self.truth = data.load(DataSpec(source=source, batch=batch))
        self.model = models.build(ModelSpec(name="resnet18-cifar", width=width, activation="sigmoid"), image_shape=(3, 32, 32))
        self.observation = gl.simulate(gl.FedSGD(self.model), self.truth)
        self.client = operator(self.observation, self.model)
        assert self.observation.labels is not None
        self.labels = Labels(self.observation.labels, "known")

    def run(self, recipe: Attack, *, seed: int = SEED, progress: bool = False) -> Reconstruction:
        return invert(self.observation, recipe, client=self.client, labels=self.labels, seed=seed, progress=progress)


def seconds_per_round(setting: Setting, recipe: Attack, *, probe: int) -> tuple[float, float]:
    """Seconds before the first round (a search), and of a round after the first two, which warm up and check the engine."""
    # without its search an architecture costs about the same
    short = dataclasses.replace(recipe, rounds=2 + probe, snapshots=0, **({"candidates": 2} if _searches(recipe) else {}))
    history = setting.run(short).history
    steady = (history[-1]["seconds"] - history[1]["seconds"]) / probe
    if not _searches(recipe):
        return 0.0, steady
    start = time.perf_counter()
    run = setting.run(dataclasses.replace(recipe, rounds=1, snapshots=0))
    return time.perf_counter() - start - run.history[-1]["seconds"], steady


def _searches(recipe: Attack) -> bool:
    return any(field.name == "candidates" for field in dataclasses.fields(recipe))


def measure(name: str, setting: Setting, *, seconds: float, generator: Path | None, lpips: str, work: Path) -> dict[str, Any]:
    """One cell: time it, run it, score it."""
    preset, changed = CELLS[name]
    settings = {**changed, **({"generator": str(generator)} if name == "gias-dcgan" else {})}
    recipe = attack(preset, **settings)
    row: dict[str, Any] = {"name": name, "attack": preset, "changed": changed, "surrogate_data": name == "gias-dcgan"}
    if name == "analytic":
        try:
            setting.run(recipe)
        except ObservationError as refusal:
            return {**row, "error": str(refusal), **provenance(seed=SEED)}
    lbfgs = recipe.optimiser == "lbfgs"
    try:
        before, each = seconds_per_round(setting, recipe, probe=1 if lbfgs else 5)
    except IndexError:  # it stopped within two rounds
        before, each = 0.0, seconds
    start, runs, restarts, left = time.perf_counter(), [], 0, seconds
    while restarts == 0 or (left > max(2 * each, 0.05 * seconds) and not (runs and runs[-1].stopped.startswith("all"))):
        recipe = dataclasses.replace(recipe, rounds=max(1, int((left - before) / each)), snapshots=0)
        try:
            runs.append(setting.run(recipe, seed=SEED + restarts, progress=True))
        except DivergedError as fault:
            print(f"{name}, seed {SEED + restarts}: {fault}", flush=True)
        restarts += 1
        left = seconds - (time.perf_counter() - start)
    best = min(runs, key=lambda run: run.matching_loss)
    work.mkdir(parents=True, exist_ok=True)
    write_tensors(work / f"{name}.safetensors", {"images": aligned(best.images, setting.truth)}, {})
    return {
        **row,
        "rounds": best.rounds,
        "restarts": restarts,
        "seconds": round(time.perf_counter() - start, 1),
        "seconds_per_round_timed_before": round(each, 3),
        "seconds_of_search": round(before, 1),
        "stopped": best.stopped,
        "matching_loss": float(f"{best.matching_loss:.3g}"),
        "metrics": scores(best.images, setting.truth, lpips=lpips),
        "notes": {key: value for key, value in best.notes.items() if key != "searched"},
        **provenance(seed=SEED),
    }


def picture(path: Path, setting: Setting, work: Path) -> None:
    """Truth above, then a row for each attack that has been run, best PSNR first."""
    found = {row["name"]: row["metrics"]["psnr"]["mean"] for row in rows_of("attacks") if "metrics" in row}
    rows = {"truth": setting.truth.images}
    for name in sorted(found, key=lambda name: -found[name]):
        rows[f"{name}\n{found[name]:.1f} dB"] = read_tensors(work / f"{name}.safetensors", error=ObservationError)[0]["images"]
    comparison_png(path, rows, pixels=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="cifar10", help="cifar10, or npz:FILE with the same images")
    parser.add_argument("--only", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--lpips", default="off", help="as evaluate.lpips")
    parser.add_argument("--generator", type=Path, help="file of gradleak train-generator, for gias-dcgan")
    parser.add_argument("--work", type=Path, default=Path("runs/attacks"))
    parser.add_argument("--picture", type=Path, help="draw what has been run, and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting(source=arguments.source, batch=arguments.batch, width=arguments.width)
    if arguments.picture:
        picture(arguments.picture, setting, arguments.work)
        return
    for name in arguments.only:
        if name == "gias-dcgan" and arguments.generator is None:
            print("gias-dcgan: skipped, it needs --generator", flush=True)
            continue
        row = measure(
            name,
            setting,
            seconds=60 * arguments.minutes,
            generator=arguments.generator,
            lpips=arguments.lpips,
            work=arguments.work,
        )
        save_row("attacks", row)
        print(name, row.get("metrics", row.get("error")), row.get("seconds"), "s", flush=True)


if __name__ == "__main__":
    main()
