"""What every row of ``benchmarks/results/*.json`` says of how it was measured, and how rows get into a file."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gradleak.evaluate import Evaluation, evaluate
from gradleak.files import write_atomically
from gradleak.observation import Truth
from gradleak.run import device_name, versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def provenance(*, seed: int, device: str = "cpu") -> dict[str, Any]:
    """Command, commit (with ``+`` if the program differs from it), seed, device, threads, versions."""
    script = Path(sys.argv[0]).resolve()
    changed = _git("status", "--porcelain", "--", "src", str(script))
    command = shlex.join(["python", f"benchmarks/{script.name}", *sys.argv[1:]])
    return {
        "command": command,
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if changed else ""),
        "seed": seed,
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def scores(images: torch.Tensor, truth: Truth, *, lpips: str = "off") -> dict[str, Any]:
    """Metric -> mean and worst over the images, one to one; a metric that cannot be computed is missing."""
    evaluation: Evaluation = evaluate(images, truth, lpips=lpips)
    return {
        name: {kind: round(row[kind], 4) for kind in ("mean", "worst")}
        for name, row in evaluation.summary.items()
        if name != "mse" and row["mean"] is not None
    }


def aligned(images: torch.Tensor, truth: Truth) -> torch.Tensor:
    """The reconstructions in the order of the originals that they are compared with."""
    return images[torch.tensor(evaluate(images, truth, lpips="off").assignment)]


def save_row(name: str, row: dict[str, Any]) -> None:
    """Put a row into ``benchmarks/results/NAME.json``, in place of an earlier one with the same ``name``."""
    path = RESULTS / f"{name}.json"
    rows = rows_of(name)
    names = [other["name"] for other in rows]
    if row["name"] in names:
        rows[names.index(row["name"])] = row
    else:
        rows.append(row)
    write_rows(path, rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a file by rows, one a line."""
    write_atomically(path, "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in rows) + "\n]\n")


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of ``benchmarks/results/NAME.json``; none if there is no such file."""
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return rows


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
