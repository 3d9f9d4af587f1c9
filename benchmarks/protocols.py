"""What other clients send, inverted by CI-Net: FedAvg, averages, number formats, some layers only.

    python benchmarks/protocols.py [--only NAME ...] [--picture docs/images/protocols.png]

Embedded photographs, sigmoid ResNet-18 of width 16 with random weights, batch norm in train mode, labels known, 200 rounds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gradleak as gl  # before torch: it sets how threads wait

# isort: split
import torch

from gradleak import data, models
from gradleak.attacks import attack
from gradleak.client import build_client, defence_costs, operator
from gradleak.errors import ObservationError
from gradleak.invert import invert
from gradleak.labels import Labels
from gradleak.report.figures import comparison_png
from gradleak.spec import ClientSpec, DataSpec, ModelSpec
from gradleak.tensors import read_tensors, write_tensors
from record import aligned, provenance, rows_of, save_row, scores

SEED, ROUNDS, CHANNELS = 0, 200, 32

#: Cell -> (number of images, the client).
CELLS: dict[str, tuple[int, dict[str, Any]]] = {
    "FedSGD": (8, {}),
    "FedAvg, 5 steps of 2 images, known order": (10, {"protocol": "fedavg", "local_batch": 2, "learning_rate": 0.1}),
    "average of 4 clients": (8, {"protocol": "average", "clients": 4}),
    "float16": (8, {"transport": "float16"}),
    "8-bit": (8, {"transport": "8-bit"}),
    "4-bit": (8, {"transport": "4-bit"}),
    "without the last layer": (8, {"layers": ["conv1*", "bn1*", "layer*"]}),
    "stem and first stage": (8, {"layers": ["conv1*", "bn1*", "layer1*"]}),
    "last stage and last layer": (8, {"layers": ["layer4*", "linear*"]}),
}


def measure(name: str, *, rounds: int, work: Path) -> dict[str, Any]:
    """One client's update, inverted and scored."""
    batch, settings = CELLS[name]
    spec = ClientSpec.model_validate(settings)
    truth = data.load(DataSpec(source="sample", batch=batch, size=32))
    # the photographs have eight classes
    model = models.build(ModelSpec(name="resnet18-cifar", width=16, activation="sigmoid"), image_shape=(3, 32, 32))
    observation = gl.simulate(build_client(model, spec, batch), truth, seed=SEED)
    assert observation.labels is not None
    recipe = attack("cinet", rounds=rounds, channels=CHANNELS, snapshots=0)
    labels = Labels(observation.labels, "known")
    result = invert(observation, recipe, client=operator(observation, model), labels=labels, seed=SEED, progress=False)
    work.mkdir(parents=True, exist_ok=True)
    write_tensors(work / f"{name}.safetensors", {"images": aligned(result.images, truth), "truth": truth.images}, {})
    costs = defence_costs(model, spec, truth, defences=[], seed=SEED) if spec.transport else []
    return {
        "name": name,
        "client": settings,
        "images": batch,
        "parameters_sent": sum(t.numel() for t in observation.update.values()),
        "distortion": float(f"{costs[-1].total:.3g}") if costs else 0.0,
        "rounds": result.rounds,
        "matching_loss": float(f"{result.matching_loss:.3g}"),
        "engine": result.notes.get("engine_check", {}).get("in_use"),
        "metrics": scores(result.images, truth),
        "seconds": round(result.seconds, 1),
        **provenance(seed=SEED),
    }


def picture(path: Path, work: Path) -> None:
    """The photographs above what each client's update gave away."""
    rows: dict[str, torch.Tensor] = {}
    for row in rows_of("protocols"):
        tensors, _ = read_tensors(work / f"{row['name']}.safetensors", error=ObservationError)
        if len(tensors["truth"]) > len(rows.get("truth", ())):
            rows = {"truth": tensors["truth"], **{name: images for name, images in rows.items() if name != "truth"}}
        rows[f"{row['name']}\nSSIM {row['metrics']['ssim']['mean']:.2f}"] = tensors["images"]
    comparison_png(path, rows, pixels=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--work", type=Path, default=Path("runs/protocols"), help="where reconstructions go")
    parser.add_argument("--picture", type=Path, help="draw what has been measured, and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.picture:
        picture(arguments.picture, arguments.work)
        return
    for name in arguments.only:
        row = measure(name, rounds=arguments.rounds, work=arguments.work)
        save_row("protocols", row)
        print(name, row["metrics"], row["matching_loss"], row["seconds"], "s", flush=True)


if __name__ == "__main__":
    main()
