"""The memory that an attack is estimated to take, beside what it takes: each in a fresh process.

    python benchmarks/memory.py [--json FILE]

``measured_mb`` is the highest memory of the process over two rounds less what it had before the attack, ``ratio`` the
estimate over it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import gradleak as gl  # before torch: it sets how threads wait

# isort: split
import psutil
import torch

from gradleak.attacks import attack
from gradleak.attacks.recipe import Problem
from gradleak.invert import invert, peak_memory_mb
from gradleak.memory import MIB, estimate

#: Model, width, images, engine, attack.
CASES = [
    ("resnet18-cifar", 64, 16, "secant", "cinet"),
    ("resnet18-cifar", 64, 16, "exact", "cinet"),
    ("resnet18-cifar", 64, 64, "secant", "cinet"),
    ("resnet18-cifar", 64, 64, "exact", "cinet"),
    ("resnet18-cifar", 16, 32, "auto", "cinet"),
    ("convnet", None, 128, "secant", "cinet"),
    ("resnet18-cifar", 16, 64, "exact", "inverting-gradients"),
]


def measure(name: str, width: int | None, batch: int, engine: str, recipe_name: str) -> dict[str, float]:
    """Estimate and measurement of one case, in this process."""
    torch.manual_seed(0)
    truth = gl.Truth(images=torch.rand(batch, 3, 32, 32), labels=torch.arange(batch) % 10)
    model = gl.build_model(gl.ModelSpec(name=name, width=width, activation="sigmoid"), image_shape=(3, 32, 32))
    client = gl.FedSGD(model)
    observation = gl.simulate(client, truth)
    labels = gl.recover("known", observation, client)
    recipe = attack(recipe_name, rounds=2, engine=engine, snapshots=0)
    problem = Problem(
        observation=observation, client=client, observed=observation.update, labels=labels.values, gain_sensitivity=0.0
    )
    found = estimate(problem, recipe, recipe.image_model(problem))
    before = psutil.Process().memory_info().rss / MIB
    invert(observation, recipe, client=client, labels=labels, progress=False)
    return {"estimated_mb": found.total / MIB, "measured_mb": peak_memory_mb(torch.device("cpu")) - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", type=int, help="measure one case in this process, and print it as JSON")
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure(*CASES[options.case])))
        return
    rows = []
    for number, (name, width, batch, engine, recipe) in enumerate(CASES):
        done = subprocess.run([sys.executable, __file__, "--case", str(number)], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        row = {"model": name, "width": width, "batch": batch, "engine": engine, "attack": recipe}
        row |= {key: round(value) for key, value in found.items()}
        row["ratio"] = round(found["estimated_mb"] / found["measured_mb"], 2)
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"command": "python benchmarks/memory.py", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
