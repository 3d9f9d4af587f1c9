"""How the cost of a round grows with the batch, the attacked model and the resolution; two processes against one.

    python benchmarks/scaling.py [--axes batch parameters resolution processes] [--max-seconds 600] [--json FILE]

Each axis changes one thing and keeps the others (``resnet18-cifar`` of ``--width``, ``--batch`` images of ``--size`` pixels,
generators of ``--channels``); a point is what ``step.py`` measures. ``slope`` is that of the least-squares line through log
seconds against log B, P(F) or pixels, ``r_squared`` its R^2: linear growth is a slope of 1. F's forward pass, timed in the
same turns, has a slope too. An axis ends where its next point would take more than ``--max-seconds``.

``processes`` runs ``gradleak audit`` in one process of one thread and in two of one thread each
(``torch.distributed.run``), in turns, and takes the median time of a round after the first, which makes the metric and checks
the secant; ``seconds_of_first`` is that one's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gradleak as gl  # noqa: F401  (before torch: it sets how threads wait)

# isort: split
import torch

from gradleak.folder import LOG
from record import provenance, write_rows
from step import FORWARD, HEAD, PROGRAMS, shown
from tables import table

Row = dict[str, Any]
#: Axis -> what of a row its slope is against.
AXES = {"batch": "batch", "parameters": "parameters", "resolution": "pixels"}

LAUNCHERS: dict[str, list[str]] = {
    "one process": ["-m", "gradleak"],
    "two processes": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gradleak"],
}

SPEC = """
[data]
source = "sample"
batch = {batch}
[model]
name = "resnet18-cifar"
width = {width}
activation = "sigmoid"
[attack]
name = "cinet"
snapshots = 0
[evaluate]
lpips = "off"
"""


def points(axis: str, options: argparse.Namespace) -> list[tuple[str, int]]:
    """Model and batch of each point of an axis."""
    model = f"resnet18-cifar:{options.width}"
    if axis == "batch":
        return [(f"{model}@{options.size}", batch) for batch in options.batches]
    if axis == "parameters":
        return [(f"resnet18-cifar:{width}@{options.size}", options.batch) for width in options.widths]
    return [(f"{model}@{size}", options.batch) for size in options.sizes]


def along(axis: str, options: argparse.Namespace) -> list[Row]:
    """The rows of one axis, and the slope of each program."""
    rows: list[Row] = []
    took: list[float] = []
    for model, batch in points(axis, options):
        # the next point of a doubling takes as many times longer as the last one did, and at least as long
        growth = max(1.0, took[-1] / took[-2]) if len(took) > 1 else 2.0
        if took and took[-1] * growth > options.max_seconds:
            print(f"{model}, B = {batch} and beyond: left out, more than --max-seconds {options.max_seconds:g}")
            break
        start = time.perf_counter()
        rows += [{**row, "axis": axis} for row in shown(model, batch, options)]
        took.append(time.perf_counter() - start)
    return [*rows, *slopes(axis, rows, options.programs)]


def slopes(axis: str, rows: list[Row], programs: list[str]) -> list[Row]:
    """The slope of log seconds of each program and of F's forward pass."""
    found = []
    for name in [*programs, FORWARD]:
        own = [row for row in rows if row["name"] == (programs[0] if name == FORWARD else name)]
        key = "seconds_of_forward" if name == FORWARD else "seconds_per_round"
        slope, r_squared = fit([row[AXES[axis]] for row in own], [row[key] for row in own])
        empty = dict.fromkeys(("seconds_per_round", "units", "peak_memory_mb", "ratio_vs_baseline"))
        model, batch = (own[0]["model"], own[0]["batch"]) if own else (None, None)
        about = {"name": name, "axis": axis, "model": model, "batch": batch, "points": len(own)}
        found.append({**about, **empty, "slope": slope, "r_squared": r_squared})
    return found


def fit(x: list[float], y: list[float]) -> tuple[float | None, float | None]:
    """Slope and R^2 of log y against log x; None with fewer than two points."""
    if len(set(x)) < 2:
        return None, None
    a, b = ([math.log(value) for value in values] for values in (x, y))
    spread = statistics.pvariance(b)
    slope = statistics.linear_regression(a, b).slope
    return round(slope, 3), round(statistics.correlation(a, b) ** 2, 4) if spread > 0 else None


def processes(options: argparse.Namespace) -> list[Row]:
    """Seconds of a round of ``gradleak audit`` by each launcher, which take turns; a launcher that fails says why."""
    times: dict[str, list[float]] = {name: [] for name in LAUNCHERS}
    first: dict[str, list[float]] = {name: [] for name in LAUNCHERS}
    memory: dict[str, list[float]] = {name: [] for name in LAUNCHERS}
    faults: dict[str, str] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "spec.toml"
        spec.write_text(
            options.spec.read_text(encoding="utf-8") if options.spec else SPEC.format(batch=options.batch, width=options.width),
            encoding="utf-8",
        )
        for turn in range(options.repeats):
            for name, launcher in LAUNCHERS.items():
                if name in faults:
                    continue
                out = Path(folder) / f"{name.replace(' ', '-')}-{turn}"
                settings = [f"attack.rounds={options.rounds}", "threads=1"]
                overrides = [word for setting in settings for word in ("--set", setting)]
                command = [sys.executable, *launcher, "audit", str(spec), *overrides, "--out", str(out), "--quiet"]
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
                if done.returncode:
                    faults[name] = (done.stderr.strip().splitlines() or ["no message"])[-1]
                    continue
                cost = json.loads((out / "result.json").read_text(encoding="utf-8"))["cost"]
                after = [json.loads(line)["seconds"] for line in (out / LOG).read_text(encoding="utf-8").splitlines()]
                first[name].append(after[0])
                times[name].append(statistics.median(b - a for a, b in itertools.pairwise(after)))
                memory[name].append(cost["peak_memory_mb"])
    medians = {name: statistics.median(values) for name, values in times.items() if values and name not in faults}
    one = medians.get("one process")
    return [
        {
            "name": name,
            "axis": "processes",
            "model": str(options.spec.name) if options.spec else f"resnet18-cifar:{options.width}",
            "batch": None if options.spec else options.batch,
            "rounds": options.rounds,
            "seconds_per_round": medians.get(name),
            "spread": [min(times[name]), max(times[name])] if name in medians else None,
            "seconds_of_first": statistics.median(first[name]) if name in medians else None,
            "units": None,
            "peak_memory_mb": max(memory[name]) if name in medians else None,
            "ratio_vs_baseline": round(one / medians[name], 3) if one is not None and name in medians else None,
            **({"error": faults[name]} if name in faults else {}),
        }
        for name in LAUNCHERS
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=[*AXES, "processes"], default=[*AXES, "processes"])
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=["baseline", "cinet"])
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--widths", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--sizes", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--width", type=int, default=16, help="of F, where it stays the same")
    parser.add_argument("--batch", type=int, default=16, help="where it stays the same")
    parser.add_argument("--size", type=int, default=32, help="pixels, where they stay the same")
    parser.add_argument("--channels", type=int, default=32, help="of the generators, whatever the batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-seconds", type=float, default=600.0, help="of one point")
    parser.add_argument("--rounds", type=int, default=20, help="of each audit, for processes; two or more")
    parser.add_argument("--spec", type=Path, help="what is audited, for processes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the points")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if options.rounds < 2:
        parser.error("--rounds: 2 or more, since the first one is left out")
    torch.set_num_threads(options.threads)
    origin = provenance(seed=0, device=options.device)
    rows: list[Row] = []
    for axis in options.axes:
        if axis != "processes":
            print(f"\n{axis}\n{HEAD}")
        found = processes(options) if axis == "processes" else along(axis, options)
        threads = {"threads": 1} if axis == "processes" else {}
        rows += [{**row, **origin, **threads} for row in found]
        if options.json:
            write_rows(options.json, rows)
    fitted: list[list[object]] = [
        [row["axis"], row["name"], row["points"], row["slope"], row["r_squared"]] for row in rows if "slope" in row
    ]
    print(f"\n{table(['axis', 'program', 'points', 'slope', 'R^2'], fitted)}")
    launched: list[list[object]] = [
        [row["name"], row.get("error", row["seconds_per_round"]), row["spread"] or "-", row["ratio_vs_baseline"] or "-"]
        for row in rows
        if row["axis"] == "processes"
    ]
    if launched:
        print(f"\n{table(['audit in', 'seconds a round', 'spread', 'one process over it'], launched)}")


if __name__ == "__main__":
    main()
