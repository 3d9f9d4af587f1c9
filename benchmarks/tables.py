"""The tables of docs/results.md from ``benchmarks/results/*.json``, as Markdown.

python benchmarks/tables.py [attacks classics protocols defences labels]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from record import rows_of

Row = dict[str, Any]


def table(head: list[str], lines: list[list[object]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *[[str(cell) for cell in line] for line in lines]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def pair(row: Row, metric: str, digits: int) -> str:
    """Mean and worst of a metric, or nothing."""
    scores = row.get("metrics", {}).get(metric)
    return "" if scores is None else " / ".join(_short(scores[kind], digits) for kind in ("mean", "worst"))


def _short(value: float, digits: int) -> str:
    """.834 for 0.834, 21.8 for 21.8."""
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def attacks() -> str:
    lines: list[list[object]] = []
    for row in sorted(rows_of("attacks"), key=lambda row: -row.get("metrics", {}).get("psnr", {}).get("mean", -1)):
        if "metrics" not in row:
            lines.append([f"`{row['name']}`", "does not apply", *[""] * 6, row["commit"]])
            continue
        scores = [pair(row, "psnr", 1), pair(row, "ssim", 3), pair(row, "fsim", 3), pair(row, "lpips", 3)]
        restarts = f" ({row['restarts']} starts)" if row["restarts"] > 1 else ""
        cost = [f"{row['matching_loss']:.1e}", row["rounds"], f"{row['seconds']:.0f}{restarts}", row["commit"]]
        lines.append([f"`{row['name']}`", *scores, *cost])
    return table(["attack", "PSNR", "SSIM", "FSIM", "LPIPS", "matching loss", "rounds", "seconds", "commit"], lines)


def classics() -> str:
    lines: list[list[object]] = []
    for row in rows_of("classics"):
        if "successes" in row:
            best = max(row["per_image"], key=lambda found: found["psnr"])
            share = f"{row['successes']} of {row['images']} images at 30 dB or more"
            scores = f"{share}; best {best['psnr']:.1f} dB, SSIM {best['ssim']:.3f}"
        else:
            scores = f"{row['metrics']['psnr']['mean']:.1f} dB, SSIM {row['metrics']['ssim']['mean']:.3f}"
        lines.append([row["name"], scores, f"{row['seconds']:.3g}", row["commit"]])
    return table(["attack", "result", "seconds", "commit"], lines)


def protocols() -> str:
    lines: list[list[object]] = []
    for row in rows_of("protocols"):
        scores = [pair(row, "ssim", 3), pair(row, "psnr", 1), f"{row['matching_loss']:.1e}"]
        cost = [row["engine"], f"{row['seconds']:.0f}", row["commit"]]
        lines.append([row["name"], row["images"], f"{row['parameters_sent']:,}", *scores, *cost])
    return table(["what is sent", "images", "numbers", "SSIM", "PSNR", "matching loss", "engine", "seconds", "commit"], lines)


def defences() -> str:
    lines: list[list[object]] = []
    for row in rows_of("defences"):
        after = row.get("round", {}).get("defended")
        cost = ["", ""] if after is None else [_short(after["accuracy"], 3), f"{after['loss']:.3f}"]
        epsilon = "" if row["epsilon"] is None else f"{row['epsilon']:.3g}"
        lines.append([row["name"], pair(row, "ssim", 3), pair(row, "psnr", 1), f"{row['distortion']:.3g}", *cost, epsilon])
    return table(["defence", "SSIM", "PSNR", "distortion", "accuracy", "loss", "epsilon"], lines)


def labels() -> str:
    rows = rows_of("labels")
    batches = sorted({row["batch"] for row in rows})
    lines: list[list[object]] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for rule in dict.fromkeys(row["rule"] for row in rows if row["model"] == model):
            cells: list[object] = []
            for batch in batches:
                found = [row for row in rows if (row["model"], row["rule"], row["batch"]) == (model, rule, batch)]
                known = bool(found) and found[0]["classes"] is not None
                cells.append(" / ".join(f"{found[0][key]:.2f}" for key in ("classes", "counts")) if known else "")
            if any(cells):
                lines.append([model, f"`{rule}`", *cells])
    return table(["model", "rule", *[f"B = {batch}" for batch in batches]], lines)


TABLES: dict[str, Callable[[], str]] = {
    "attacks": attacks,
    "classics": classics,
    "protocols": protocols,
    "defences": defences,
    "labels": labels,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or TABLES:
        print(f"{TABLES[name]()}\n")
