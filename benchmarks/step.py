"""Cost of one round of an attack: a plain double-backward baseline against the engines, interleaved in one process.

    python benchmarks/step.py [--models resnet18-cifar:64 ...] [--batches 4 16 64] [--repeats 7] [--json FILE]

Every program does one whole round (generator forward, client's update, distance, transpose, generator backward, optimiser
step) on the same client. ``units`` is seconds over those of F's forward pass, measured in the same interleaving;
``ratio_vs_baseline`` the baseline's median over the program's. Peak memory is that of a fresh process that ran three rounds
of one program, less that of a process that only built it. ``peak_share`` is the share of this machine's best measured
convolution rate that F's forward pass reaches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gradleak as gl  # before torch: it sets how threads wait

# isort: split
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak.attacks import attack
from gradleak.attacks.recipe import Problem
from gradleak.distance import DISTANCES
from gradleak.invert import peak_memory_mb
from gradleak.vjp import engine

PROGRAMS = ("baseline", "exact", "secant", "cinet")
Round = Callable[[], None]


class PlainGenerator(nn.Module):
    """CI-Net's generator as the reference code writes it: spectral norm by hand, running statistics, LeakyReLU, tanh."""

    def __init__(self, batch: int, size: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("z", torch.randn(batch, 128, 1, 1))
        self.stem = nn.Sequential(nn.ConvTranspose2d(128, channels, 4), nn.BatchNorm2d(channels), nn.LeakyReLU(0.1))
        doublings = (size // 4).bit_length() - 1
        widths = [channels // (1 if k < 4 else 2 if k == 4 else 4) for k in range(doublings + 1)]
        pairs = list(zip([channels, *widths], widths, strict=False))
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for i, o in pairs for a, b in ((i, o), (o, o)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o in pairs for _ in range(2))
        self.u = [torch.randn(1, c.out_channels) for c in self.convolutions]
        self.to_rgb = nn.Conv2d(widths[-1], 3, 1)

    def forward(self) -> Tensor:
        x = self.stem(self.z)
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            if i % 2 == 0 and i > 0:
                x = F.interpolate(x, scale_factor=2)
            w = convolution.weight
            matrix = w.view(w.size(0), -1)
            with torch.no_grad():
                v = F.normalize(self.u[i] @ matrix)
                self.u[i] = F.normalize(v @ matrix.t())
            sigma = (v @ matrix.t() @ self.u[i].t()).squeeze()
            x = F.leaky_relu(norm(F.conv2d(x, w / sigma, convolution.bias, padding=1)), 0.1)
        return torch.tanh(self.to_rgb(x))


def baseline(model: nn.Module, images: Tensor, labels: Tensor, channels: int) -> Round:
    """A round that costs what the reference code's does: ``backward()`` on all leaves through both gradients."""
    model = model.train()
    observed = [g.detach() for g in torch.autograd.grad(F.cross_entropy(model(images), labels), list(model.parameters()))]
    generator = PlainGenerator(len(images), images.shape[-1], channels)
    optimiser = torch.optim.Adam(generator.parameters(), lr=1e-3)

    def run() -> None:
        optimiser.zero_grad()
        loss = F.cross_entropy(model(generator()), labels)
        gradient = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        product = sum((a * b).sum() for a, b in zip(gradient, observed, strict=True))
        norms = [sum(t.pow(2).sum() for t in g).sqrt() for g in (gradient, observed)]
        (1 - product / norms[0] / norms[1]).backward()
        for p in generator.parameters():
            p.grad.sign_()
        optimiser.step()

    return run


def ours(name: str, model: nn.Module, truth: gl.Truth, channels: int) -> Round:
    """A round of the shared loop: the reference's generator with an engine, or the whole default recipe ``cinet``."""
    client = gl.FedSGD(model)
    observation = gl.simulate(client, truth)
    recipe = attack("cinet") if name == "cinet" else attack("cinet-reference", channels=channels)
    problem = Problem(
        observation=observation,
        client=client,
        observed=observation.update,
        labels=truth.labels,
        gain_sensitivity=0.0,
    )
    image_model = recipe.image_model(problem)
    phase = recipe.phases(image_model)[0]
    transpose_engine = engine("exact" if name == "exact" else "secant")

    def run() -> None:
        phase.optimiser.zero_grad()
        images = image_model()
        update, transpose = client.vjp(images, truth.labels, engine=transpose_engine)
        _, cotangent = DISTANCES[recipe.distance](update, observation.update)
        images.backward(transpose(cotangent))
        for p in image_model.parameters():
            p.grad.sign_()
        phase.optimiser.step()

    return run


def setting(model: str, batch: int) -> tuple[nn.Module, gl.Truth, int]:
    """F (``name`` or ``name:width``, at 256 pixels for torchvision's), the client's batch, and the reference's width."""
    name, _, width = model.partition(":")
    size = 256 if name.startswith("torchvision/") else 32
    spec = gl.ModelSpec(name=name, width=int(width) if width else None, activation="sigmoid")
    generator = torch.Generator().manual_seed(0)
    truth = gl.Truth(torch.rand(batch, 3, size, size, generator=generator), torch.arange(batch) % 10)
    channels = 32 if batch <= 32 else 64 if batch <= 64 else 128
    return gl.build_model(spec, image_shape=(3, size, size)), truth, channels


def build(program: str, model: nn.Module, truth: gl.Truth, channels: int) -> Round:
    """One program's round."""
    torch.manual_seed(0)
    if program == "baseline":
        return baseline(model, truth.images, truth.labels, channels)
    return ours(program, model, truth, channels)


def convolution_peak() -> float:
    """The best rate of a 3x3 convolution on this machine, in FLOP/s, over sizes that ResNets have."""
    best = 0.0
    for channels, size in ((64, 32), (128, 16), (256, 8), (512, 4)):
        x, w = torch.randn(64, channels, size, size), torch.randn(channels, channels, 3, 3)
        times = [seconds(lambda x=x, w=w: F.conv2d(x, w, padding=1)) for _ in range(8)]
        best = max(best, 2 * 9 * channels**2 * size**2 * 64 / min(times))
    return best


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def forward_flops(model: nn.Module, images: Tensor) -> float:
    """FLOP of F's convolutions and linear layers in one forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return float(counter.get_total_flops())


def extra_memory(program: str, model: str, batch: int) -> float:
    """Peak memory of three rounds over that of a process that built the program only, in MiB, each in a fresh process."""
    peaks = []
    for rounds in (0, 3):
        command = [sys.executable, __file__, "--probe", program, model, str(batch), str(rounds)]
        peaks.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return peaks[1] - peaks[0]


def measure(model: str, batch: int, *, repeats: int, memory: bool) -> list[dict[str, object]]:
    """Rows of all programs for one model and batch, interleaved: A B C D A B C D ..."""
    network, truth, channels = setting(model, batch)
    rounds = {program: build(program, network, truth, channels) for program in PROGRAMS}
    network.train()
    rounds["forward of F"] = lambda: network(truth.images)
    times: dict[str, list[float]] = {program: [] for program in rounds}
    for repeat in range(repeats + 1):
        for program, run in rounds.items():
            elapsed = seconds(run)
            if repeat:  # the first pass warms up
                times[program].append(elapsed)
    medians = {program: statistics.median(values) for program, values in times.items()}
    share = forward_flops(network, truth.images) / medians["forward of F"] / convolution_peak()
    return [
        {
            "name": program,
            "model": model,
            "batch": batch,
            "seconds_per_round": round(medians[program], 4),
            "spread": [round(min(times[program]), 4), round(max(times[program]), 4)],
            "units": round(medians[program] / medians["forward of F"], 2),
            "peak_memory_mb": round(extra_memory(program, model, batch), 1) if memory else None,
            "ratio_vs_baseline": round(medians["baseline"] / medians[program], 2),
            "peak_share": round(share, 2),
        }
        for program in PROGRAMS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18-cifar:64", "resnet18-cifar:16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--probe", nargs=4, metavar=("PROGRAM", "MODEL", "BATCH", "ROUNDS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        program, model, batch, rounds = arguments.probe
        run = build(program, *setting(model, int(batch)))
        for _ in range(int(rounds)):
            run()
        print(peak_memory_mb(torch.device("cpu")))
        return
    rows: list[dict[str, object]] = []
    print(f"{'program':10} {'model':24} {'B':>3} {'s/round':>9} {'units':>6} {'ratio':>6} {'MiB':>8} {'F of peak':>9}")
    for model in arguments.models:
        for batch in arguments.batches:
            for row in measure(model, batch, repeats=arguments.repeats, memory=not arguments.no_memory):
                rows.append(row)
                print(
                    f"{row['name']:10} {row['model']:24} {row['batch']:3} {row['seconds_per_round']:9} {row['units']:6} "
                    f"{row['ratio_vs_baseline']:6} {row['peak_memory_mb'] or '-':>8} {row['peak_share']:9}",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
