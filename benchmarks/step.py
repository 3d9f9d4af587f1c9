"""Cost of one round of an attack: a plain double-backward baseline against the engines, taking turns.

    python benchmarks/step.py [--models resnet18-cifar:64 torchvision/resnet18 ...] [--batches 4 16 64] [--json FILE]

Every program does one whole round (generator forward, client's update, distance, transpose, generator backward, optimiser
step, bookkeeping) on the same client; ``seconds_per_round`` is the median over ``--repeats``, ``spread`` the least and the
most. Each program has a process of its own and waits while another has its turn: ours keep freed memory, which the baseline
does not. ``units`` is seconds over those of F's forward pass, measured in the same interleaving; ``ratio_vs_baseline`` the
baseline's median over the program's; ``memory_vs_baseline`` the baseline's memory over the program's. ``peak_memory_mb`` is
the peak of a fresh process that ran three rounds of one program, less that of one that only built it. ``peak_share`` is the
share of this machine's best measured convolution rate that F's forward pass reaches. On a GPU (``--device cuda``) the programs
take turns in one process, and memory is what PyTorch allocated.

The self-checking secant of ``cinet`` runs the exact transpose in its first round and every 200 rounds: the memory has it,
the median has not. A model is NAME[:WIDTH][@PIXELS]; torchvision's take 256 pixels, the others 32, unless it says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gradleak as gl  # before torch: it sets how threads wait

# isort: split
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak.attacks import attack
from gradleak.attacks.recipe import Problem
from gradleak.cinet import choose_channels
from gradleak.invert import _Loop, peak_memory_mb  # the loop itself: a round here is a round of an attack
from gradleak.labels import Labels
from gradleak.memory import keep_freed_memory
from gradleak.mixed import full_float32
from record import provenance, write_rows

Round = Callable[[], object]
FORWARD = "forward of F"


@dataclass(frozen=True)
class Setting:
    """What the programs share.

    Attributes:
        model: F.
        images: B x C x H x W, for F's forward pass.
        problem: What an attack is given.
        channels: The generators' width; None: by each recipe's rule.
    """

    model: nn.Module
    images: Tensor
    problem: Problem
    channels: int | None


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
        for i, c in enumerate(self.convolutions):
            self.register_buffer(f"u{i}", torch.randn(1, c.out_channels))
        self.to_rgb = nn.Conv2d(widths[-1], 3, 1)

    def forward(self) -> Tensor:
        x = self.stem(self.z)
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            if i % 2 == 0 and i > 0:
                x = F.interpolate(x, scale_factor=2)
            w = convolution.weight
            matrix = w.view(w.size(0), -1)
            with torch.no_grad():
                u = self.get_buffer(f"u{i}")
                v = F.normalize(u @ matrix)
                u.copy_(F.normalize(v @ matrix.t()))
            sigma = (v @ matrix.t() @ u.t()).squeeze()
            x = F.leaky_relu(norm(F.conv2d(x, w / sigma, convolution.bias, padding=1)), 0.1)
        return torch.tanh(self.to_rgb(x))


def baseline(setting: Setting) -> Round:
    """A round that costs what the reference code's does: ``backward()`` on all leaves through both gradients."""
    model, problem = setting.model.train(), setting.problem
    observed = [problem.observed[name] for name, _ in model.named_parameters()]
    rule = {"batch": problem.batch, "image_shape": problem.image_shape, "update_size": problem.client.parameters}
    channels = setting.channels or choose_channels("reference", **rule)
    generator = PlainGenerator(problem.batch, problem.image_shape[-1], channels).to(problem.labels.device)
    optimiser = torch.optim.Adam(generator.parameters(), lr=1e-3)

    def run() -> None:
        optimiser.zero_grad()
        loss = F.cross_entropy(model(generator()), problem.labels)
        gradient = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        product = sum((a * b).sum() for a, b in zip(gradient, observed, strict=True))
        norms = [sum(t.pow(2).sum() for t in g).sqrt() for g in (gradient, observed)]
        (1 - product / norms[0] / norms[1]).backward()
        for p in generator.parameters():
            p.grad.sign_()
        optimiser.step()

    return run


def ours(setting: Setting, *, preset: str, **settings: Any) -> Round:
    """A round of the loop that every attack shares, with a recipe's generator and engine."""
    if setting.channels is not None:
        settings["channels"] = setting.channels
    return _Loop(setting.problem, attack(preset, snapshots=0, **settings), Labels(setting.problem.labels, "known")).round


#: Name -> what builds its round.
PROGRAMS: dict[str, Callable[[Setting], Round]] = {
    "baseline": baseline,
    "exact": partial(ours, preset="cinet-reference", engine="exact"),
    "secant": partial(ours, preset="cinet-reference", engine="secant"),
    "cinet": partial(ours, preset="cinet"),
    "cinet, mixed": partial(ours, preset="cinet", precision="mixed"),
    "cinet, mixed, last 90 %": partial(ours, preset="cinet", precision="mixed", matched=0.9),
    "cinet, mixed, last 75 %": partial(ours, preset="cinet", precision="mixed", matched=0.75),
    "cinet, mixed, last 40 %": partial(ours, preset="cinet", precision="mixed", matched=0.4),
}


def model_spec(model: str) -> tuple[gl.ModelSpec, int]:
    """The attacked model that NAME[:WIDTH][@PIXELS] names, with sigmoid activations, and the side of its images."""
    described, _, pixels = model.partition("@")
    name, _, width = described.partition(":")
    size = int(pixels) if pixels else 256 if name.startswith("torchvision/") else 32
    return gl.ModelSpec(name=name, width=int(width) if width else None, activation="sigmoid"), size


def setting(model: str, batch: int, *, channels: int | None = None, device: str = "cpu") -> Setting:
    """F and an update to match: that of two random images, whatever B. Its values change no cost, and the gradient of the
    whole batch would hide the memory of a round in that of building it.
    """
    spec, size = model_spec(model)
    images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(batch) % 10
    network = gl.build_model(spec, image_shape=(3, size, size))
    client = gl.FedSGD(network)
    observation = gl.simulate(client, gl.Truth(images[:2], labels[:2]))
    observation = dataclasses.replace(observation, batch=batch, labels=labels)
    problem = Problem(
        observation=observation,
        client=client.to(device),
        observed={name: t.to(device) for name, t in observation.update.items()},
        labels=labels.to(device),
        gain_sensitivity=0.0,
    )
    return Setting(network.to(device), images.to(device), problem, channels)


def build(program: str, shared: Setting) -> Round:
    """One program's round, or F's forward pass."""
    torch.manual_seed(0)
    if program == FORWARD:
        shared.model.train()
        return lambda: shared.model(shared.images)
    if program != "baseline" and shared.images.device.type == "cpu":
        keep_freed_memory()  # as an attack does
    return PROGRAMS[program](shared)


@contextmanager
def processes(
    programs: list[str], model: str, batch: int, channels: int | None, device: str
) -> Iterator[dict[str, Callable[[], float]]]:
    """Program -> a function that has it do one round in a process of its own, and gives the seconds; on a GPU in this one."""
    if device != "cpu":
        shared = setting(model, batch, channels=channels, device=device)
        yield {program: partial(seconds, build(program, shared)) for program in programs}
        return
    context, started = multiprocessing.get_context("spawn"), []

    def start(program: str) -> Callable[[], float]:
        ours, theirs = context.Pipe()
        arguments = (theirs, program, model, batch, channels, torch.get_num_threads())
        process = context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        started.append(process)

        def turn() -> float:
            ours.send(True)
            return float(ours.recv())

        return turn

    try:
        yield {program: start(program) for program in programs}
    finally:
        for process in started:
            process.terminate()


def serve(connection: Connection, program: str, model: str, batch: int, channels: int | None, threads: int) -> None:
    """Do a round whenever asked to."""
    torch.set_num_threads(threads)
    run = build(program, setting(model, batch, channels=channels))
    while connection.recv():
        connection.send(seconds(run))


def interleaved(rounds: Mapping[str, Round], *, repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each of the programs' rounds, which take turns: A B C A B C ..."""
    return in_turns({program: partial(seconds, run) for program, run in rounds.items()}, repeats=repeats, warm_up=warm_up)


def in_turns(timed: Mapping[str, Callable[[], float]], *, repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """What each of the programs' functions gives, which take turns."""
    times: dict[str, list[float]] = {program: [] for program in timed}
    for repeat in range(warm_up + repeats):
        for program, run in timed.items():
            elapsed = run()
            if repeat >= warm_up:
                times[program].append(elapsed)
    return times


def convolution_peak(device: str = "cpu") -> float:
    """The best rate of a 3x3 convolution on this device, in FLOP/s, over sizes that ResNets have."""
    best, calls = 0.0, 1 if device == "cpu" else 50  # a GPU does one in the time of its launch
    for channels, size in ((64, 32), (128, 16), (256, 8), (512, 4)):
        x, w = torch.randn(64, channels, size, size).to(device), torch.randn(channels, channels, 3, 3).to(device)
        times = [seconds(lambda x=x, w=w: [F.conv2d(x, w, padding=1) for _ in range(calls)]) / calls for _ in range(8)]
        best = max(best, 2 * 9 * channels**2 * size**2 * 64 / min(times))
    return best


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call; a GPU is done with everything before and after."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def forward_flops(model: nn.Module, images: Tensor) -> float:
    """FLOP of F's convolutions and linear layers in one forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return float(counter.get_total_flops())


def extra_memory(program: str, model: str, batch: int, *, channels: int | None = None, device: str = "cpu") -> float:
    """Peak memory of three rounds over that of a process that built the program only, in MiB, each in a fresh process; on a GPU
    over what is allocated before them.
    """
    if device != "cpu":
        run = build(program, setting(model, batch, channels=channels, device=device))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        for _ in range(3):
            run()
        return peak_memory_mb(torch.device(device)) - before
    peaks = []
    for rounds in (0, 3):
        probe = [program, model, str(batch), str(channels or 0), str(rounds), str(torch.get_num_threads())]
        # by way of a shell: Linux counts the peak of whoever starts a program as its own, and this process may be large
        command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, str(Path(__file__).resolve()), "--probe", *probe]
        peaks.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return peaks[1] - peaks[0]


def probe(program: str, model: str, batch: str, channels: str, rounds: str, threads: str) -> float:
    """The peak memory of this process after some rounds, in MiB."""
    torch.set_num_threads(int(threads))
    run = build(program, setting(model, int(batch), channels=int(channels) or None))
    for _ in range(int(rounds)):
        run()
    return peak_memory_mb(torch.device("cpu"))


@full_float32()
def measure(
    model: str,
    batch: int,
    *,
    programs: list[str],
    repeats: int,
    memory: bool,
    channels: int | None = None,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Rows of the programs for one model and batch."""
    shared = setting(model, batch, channels=channels, device=device)
    with processes([*programs, FORWARD], model, batch, channels, device) as timed:
        times = in_turns(timed, repeats=repeats, warm_up=1 if device == "cpu" else 3)
    medians = {program: statistics.median(values) for program, values in times.items()}
    share = forward_flops(shared.model, shared.images) / medians[FORWARD] / convolution_peak(device)
    if memory:
        peaks = {program: extra_memory(program, model, batch, channels=channels, device=device) for program in programs}
    else:
        peaks = {}

    def ratio(values: dict[str, float], program: str) -> float | None:
        return round(values["baseline"] / values[program], 3) if "baseline" in values and values[program] > 0 else None

    return [
        {
            "name": program,
            "model": model,
            "batch": batch,
            "pixels": shared.images.shape[-1],
            "parameters": shared.problem.client.parameters,
            "channels": channels,
            "seconds_per_round": float(f"{medians[program]:.4g}"),
            "spread": [float(f"{bound(times[program]):.4g}") for bound in (min, max)],
            "seconds_of_forward": float(f"{medians[FORWARD]:.4g}"),
            "units": round(medians[program] / medians[FORWARD], 2),
            "peak_memory_mb": round(peaks[program], 1) if memory else None,
            "ratio_vs_baseline": ratio(medians, program),
            "memory_vs_baseline": ratio(peaks, program),
            "peak_share": round(share, 3),
        }
        for program in programs
    ]


def shown(model: str, batch: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of :func:`measure` by the command's options, each printed."""
    for row in measure(
        model,
        batch,
        programs=options.programs,
        repeats=options.repeats,
        memory=not options.no_memory,
        channels=options.channels,
        device=options.device,
    ):
        print(line(row), flush=True)
        yield row


def line(row: Mapping[str, Any]) -> str:
    """A row as a line of :data:`HEAD`'s table."""
    memory, ratio, memory_ratio = (
        "-" if row[key] is None else row[key] for key in ("peak_memory_mb", "ratio_vs_baseline", "memory_vs_baseline")
    )
    spread = " to ".join(map(str, row["spread"]))
    return (
        f"{row['name']:12} {row['model']:24} {row['batch']:4} {row['seconds_per_round']:9} {spread:>18} {row['units']:6} "
        f"{ratio:>7} {memory:>9} {memory_ratio:>10} {row['peak_share']:9}"
    )


HEAD = (
    f"{'program':12} {'model':24} {'B':>4} {'s/round':>9} {'spread':>18} {'units':>6} {'ratio':>7} {'MiB':>9} "
    f"{'MiB ratio':>10} {'F of peak':>9}"
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18-cifar:64", "resnet18-cifar:16", "torchvision/resnet18"])
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--max-pixels", type=int, default=4 * 256 * 256, help="larger B x H x W are left out")
    parser.add_argument("--channels", type=int, help="the generators' width; left out: by each recipe's rule")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--probe", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.probe:
        print(probe(*options.probe))
        return
    torch.set_num_threads(options.threads)
    origin, rows = provenance(seed=0, device=options.device), []
    print(HEAD)
    for model in options.models:
        for batch in options.batches:
            if batch * model_spec(model)[1] ** 2 > options.max_pixels:
                print(f"{model}, B = {batch}: left out, more than --max-pixels {options.max_pixels}")
                continue
            rows += [{**row, **origin} for row in shown(model, batch, options)]
            if options.json:
                write_rows(options.json, rows)


if __name__ == "__main__":
    main()
