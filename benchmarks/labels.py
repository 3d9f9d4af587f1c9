"""How well labels are recovered from one gradient: every rule, several models, B = 1 to 256.

    python benchmarks/labels.py --source cifar10 --resnet20 cifar10_resnet20.safetensors

Batches are drawn at random, with repeats of classes as they come, from the first 1,024 CIFAR-10 training images. With n_k the
number of images of class k and m_k the recovered one, over the classes with n_k > 0:

- ``classes``: the share with m_k > 0;
- ``counts``: the share with m_k = n_k;
- ``labels``: sum of min(n_k, m_k) over B.

Each is a mean over the batches. ``classes`` and ``counts`` follow the label existence and label number accuracies of iLRG (Ma
et al. 2023). ``joint`` is DLG, which optimises soft labels together with the pixels; it is tried on LeNet at B = 1 and 4.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, get_args

import gradleak as gl  # before torch: it sets how threads wait

# isort: split
import torch
from torch import Tensor

from gradleak import data, models
from gradleak.attacks import attack
from gradleak.client import operator
from gradleak.errors import DivergedError, ObservationError
from gradleak.invert import invert
from gradleak.labels import Rule, recover
from gradleak.observation import Truth
from gradleak.run import label_accuracy
from gradleak.spec import DataSpec, ModelSpec
from record import provenance, save_row

SEED, POOL = 0, 1024
BATCHES = (1, 4, 16, 64, 128, 256)
RULES = [rule for rule in get_args(Rule) if rule not in ("auto", "known")]

#: Name -> (model, the client's mode); ``weights`` is filled in for the trained one.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "LeNet, sigmoid, untrained": ({"name": "lenet"}, "train"),
    "ResNet-18 (width 16), sigmoid, untrained": ({"name": "resnet18-cifar", "width": 16, "activation": "sigmoid"}, "train"),
    "ResNet-18 (width 16), ReLU, untrained": ({"name": "resnet18-cifar", "width": 16}, "train"),
    "ResNet-20, ReLU, trained, eval mode": (
        {"name": "resnet20-cifar", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        "eval",
    ),
    "ResNet-20, ReLU, trained, train mode": (
        {"name": "resnet20-cifar", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        "train",
    ),
}


def class_accuracies(recovered: Tensor, truth: Tensor) -> dict[str, float]:
    """``classes``, ``counts`` and ``labels`` of one batch."""
    classes = int(max(recovered.max(), truth.max())) + 1
    found, there = torch.bincount(recovered, minlength=classes), torch.bincount(truth, minlength=classes)
    present = there > 0
    return {
        "classes": float((found > 0)[present].double().mean()),
        "counts": float((found == there)[present].double().mean()),
        "labels": label_accuracy(recovered, truth),
    }


def measure(name: str, pool: Truth, *, weights: Path | None, batches: int) -> list[dict[str, Any]]:
    """The rows of one model: a row for each rule and batch size."""
    settings, mode = MODELS[name]
    trained = {"weights": weights} if "trained" in name and "untrained" not in name else {}
    model = models.build(ModelSpec(**settings, **trained), image_shape=(3, 32, 32))
    rows = []
    for batch in BATCHES:
        results: dict[str, list[dict[str, float]]] = {rule: [] for rule in [*RULES, "joint"]}
        errors: dict[str, str] = {}
        start = time.perf_counter()
        for number in range(batches):
            generator = torch.Generator().manual_seed(1000 * batch + number)
            chosen = torch.randperm(POOL, generator=generator)[:batch]
            truth = Truth(pool.images[chosen], pool.labels[chosen])
            client = gl.FedSGD(model, mode=mode)  # type: ignore[arg-type]
            observation = gl.simulate(client, truth)
            known = operator(observation, model)
            for rule in RULES:
                try:
                    found = recover(rule, observation, known).values
                    results[rule].append(class_accuracies(found, truth.labels))
                except ObservationError as refusal:
                    errors[rule] = str(refusal)
            if settings["name"] == "lenet" and batch <= 4:
                recipe, labels = attack("dlg", rounds=30, patience=15, snapshots=0), recover("known", observation, known)
                try:
                    joint = invert(observation, recipe, client=known, labels=labels, seed=SEED, progress=False)
                    results["joint"].append(class_accuracies(joint.labels.values, truth.labels))
                except DivergedError as refusal:
                    errors["joint"] = str(refusal)
        for rule, scores in results.items():
            if not scores and rule not in errors:
                continue
            row: dict[str, Any] = {"name": f"{name}, B = {batch}, {rule}", "model": name, "batch": batch, "rule": rule}
            row |= {"batches": len(scores), "failed": batches - len(scores)}
            for key in ("classes", "counts", "labels"):
                row[key] = round(sum(score[key] for score in scores) / len(scores), 4) if scores else None
            row["error"] = errors.get(rule)
            rows.append({**row, "seconds": round(time.perf_counter() - start, 1), **provenance(seed=SEED)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="cifar10", help="cifar10, or npz:FILE with its first 1,024 training images")
    parser.add_argument("--resnet20", type=Path, help="safetensors file of the trained ResNet-20")
    parser.add_argument("--batches", type=int, default=5, help="random batches of each size")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pool = data.load(DataSpec(source=arguments.source, batch=POOL))
    for name in arguments.only:
        if "untrained" not in name and arguments.resnet20 is None:
            print(f"{name}: skipped, it needs --resnet20", flush=True)
            continue
        for row in measure(name, pool, weights=arguments.resnet20, batches=arguments.batches):
            save_row("labels", row)
            print(row["name"], row["classes"], row["counts"], row["labels"], row["failed"] or "", flush=True)


if __name__ == "__main__":
    main()
