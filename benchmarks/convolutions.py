"""Convolutions of small images in a quarter of the multiplications, against torch's, one layer at a time.

    python benchmarks/convolutions.py [--layers 512x4x16 256x8x16 ...] [--json FILE]

A layer is CHANNELSxSIDExBATCH: a 3 x 3 convolution of as many channels to as many. Its output and both transposes are
computed in turns by torch and by :mod:`gradleak.winograd`, whether an attack would take it there or not: ``taken`` says so.
``milliseconds`` are medians over ``--repeats``, ``ratio_vs_torch`` is torch's over ours, and ``errors`` are those of torch's
and of ours to float64, as a share of the product's norm.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradleak  # noqa: F401  # before torch: it sets how threads wait

# isort: split
import torch
from torch import Tensor

from gradleak import winograd
from gradleak.memory import keep_freed_memory
from record import provenance, write_rows
from step import interleaved

LAYERS = ["512x4x16", "256x8x16", "128x8x16", "512x4x64", "256x8x64", "512x7x16", "512x4x4"]

Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of the output's cotangent, the images and the weights."""


def backward(y: Tensor, x: Tensor, w: Tensor, *, to: int) -> Tensor:
    """torch's transpose, to the images (0) or to the weights (1)."""
    wanted = [to == 0, to == 1, False]
    found = torch.ops.aten.convolution_backward(y, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted)
    transposed: Tensor = found[to]
    return transposed


#: Product -> torch's, ours.
PRODUCTS: dict[str, tuple[Product, Product]] = {
    "output": (lambda y, x, w: torch.conv2d(x, w, None, 1, 1), lambda y, x, w: winograd.forward(x, w)),
    "to images": (lambda y, x, w: backward(y, x, w, to=0), winograd.to_images),
    "to weights": (lambda y, x, w: backward(y, x, w, to=1), winograd.to_weight),
}


@torch.no_grad()
def measure(layer: str, *, repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each product of a layer."""
    channels, side, batch = map(int, layer.split("x"))
    generator = torch.Generator().manual_seed(0)
    y, x = (torch.randn(batch, channels, side, side, generator=generator) for _ in range(2))
    w = torch.randn(channels, channels, 3, 3, generator=generator)
    for name, (theirs, ours) in PRODUCTS.items():
        exact = theirs(y.double(), x.double(), w.double())
        errors = [float((product(y, x, w) - exact).norm() / exact.norm()) for product in (theirs, ours)]
        rounds = {"torch": lambda f=theirs: f(y, x, w), "winograd": lambda f=ours: f(y, x, w)}
        times = interleaved(rounds, repeats=repeats)
        medians = [1e3 * statistics.median(times[way]) for way in ("torch", "winograd")]
        yield {
            "name": name,
            "layer": layer,
            "taken": winograd.pays(x, w),
            "milliseconds": [float(f"{t:.4g}") for t in medians],
            "ratio_vs_torch": round(medians[0] / medians[1], 3),
            "errors": [float(f"{e:.2g}") for e in errors],
        }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=LAYERS, metavar="CHANNELSxSIDExBATCH")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as an attack does
    origin, rows = provenance(seed=0), []
    print(f"{'layer':12} {'product':12} {'taken':>5} {'torch, ms':>10} {'ours, ms':>10} {'ratio':>6} {'errors':>18}")
    for layer in options.layers:
        for row in measure(layer, repeats=options.repeats):
            theirs, ours = row["milliseconds"]
            errors = " ".join(f"{e:.1e}" for e in row["errors"])
            taken = "yes" if row["taken"] else "no"
            print(
                f"{layer:12} {row['name']:12} {taken:>5} {theirs:10} {ours:10} {row['ratio_vs_torch']:6} {errors:>18}",
                flush=True,
            )
            rows.append({**row, **origin})
            if options.json:
                write_rows(options.json, rows)


if __name__ == "__main__":
    main()
