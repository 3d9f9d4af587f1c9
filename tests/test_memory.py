"""Memory: told before a run, kept by computing in pieces, and survived when it runs out."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradleak import cli
from gradleak.attacks import attack
from gradleak.attacks.recipe import Problem
from gradleak.client import Average, ClientOperator, FedAvg, FedSGD, simulate
from gradleak.defences import Clip, defend
from gradleak.errors import MemoryLimitError, SpecError
from gradleak.image_model import Pixels
from gradleak.invert import invert
from gradleak.labels import recover
from gradleak.memory import MIB, available, estimate, fit
from gradleak.observation import Truth
from gradleak.vjp import SelfChecking, exact, secant

PIXELS = Pixels(batch=16, image_shape=(3, 16, 16))


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


def batch(count: int = 5, *, size: int = 16) -> Truth:
    generator = torch.Generator().manual_seed(0)
    return Truth(images=torch.rand(count, 3, size, size, generator=generator), labels=torch.arange(count) % 10)


def network(*, norm: type[nn.Module] | None = None, width: int = 8, size: int = 16) -> nn.Module:
    torch.manual_seed(0)
    between = [] if norm is None else [norm(width)]
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), *between, nn.Sigmoid(), nn.Flatten(), nn.Linear(width * size * size, 10)
    )


def problem(client: ClientOperator, truth: Truth) -> Problem:
    observation = simulate(client, truth)
    return Problem(observation=observation, client=client, observed=observation.update, labels=truth.labels, gain_sensitivity=1)


def in_pieces(client: ClientOperator, size: int) -> ClientOperator:
    client.in_pieces(size)
    return client


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("engine", [exact, secant, SelfChecking()], ids=["exact", "secant", "self-checking"])
@pytest.mark.parametrize("around", ["alone", "average", "clipped"])
def test_pieces_change_nothing_but_memory(size: int, engine: Any, around: str) -> None:
    """Update and transpose, in float64, equal those of the whole batch."""
    truth = batch()
    x, y = truth.images.double(), truth.labels

    def client() -> ClientOperator:
        plain = FedSGD(network()).to("cpu", torch.float64)
        if around == "average":
            return Average(plain, sizes=[3, 2])
        return defend(plain, [Clip(norm=0.1)]) if around == "clipped" else plain

    whole, split = client(), in_pieces(client(), size)
    update, transpose = whole.vjp(x, y, engine=exact)
    pieces, back = split.vjp(x, y, engine=engine)
    cotangent = {
        name: torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(1)) for name, t in update.items()
    }
    torch.testing.assert_close(split(x, y), update)
    torch.testing.assert_close(pieces, update)
    expected = transpose(cotangent)
    assert float((back(cotangent) - expected).norm() / expected.norm()) < 1e-3


def test_pieces_with_soft_labels() -> None:
    truth = batch()
    x, y = truth.images.double(), torch.rand(5, 10, dtype=torch.float64).softmax(1)
    whole, split = FedSGD(network()).to("cpu", torch.float64), in_pieces(FedSGD(network()).to("cpu", torch.float64), 2)
    update, transpose = whole.joint_vjp(x, y)
    pieces, back = split.joint_vjp(x, y)
    torch.testing.assert_close(pieces, update)
    torch.testing.assert_close(back(update), transpose(update))


def test_what_cannot_be_split() -> None:
    """Batch statistics, local steps: an error, not another result."""
    coupled = FedSGD(network(norm=nn.BatchNorm2d))
    assert not coupled.can_split
    with pytest.raises(SpecError, match="batch statistics couple"):
        coupled.in_pieces(1)
    with pytest.raises(SpecError, match="cannot be processed in pieces"):
        FedAvg(network(), learning_rate=0.1).in_pieces(1)
    assert FedSGD(network(norm=nn.BatchNorm2d), mode="eval").can_split


def test_the_estimate_grows_with_the_batch_and_falls_with_pieces() -> None:
    """Linearly in the images that are held; double backward holds more than the secant."""
    small, large = (estimate(problem(FedSGD(network()), batch(n)), attack("idlg"), PIXELS) for n in (4, 16))
    assert large.per_image == pytest.approx(small.per_image, rel=0.01)
    assert small.per_image > 0
    assert large.held == 4 * small.held
    held = estimate(problem(in_pieces(FedSGD(network()), 3), batch(16)), attack("idlg"), PIXELS)
    assert held.held == 3
    light = estimate(problem(FedSGD(network()), batch(4)), attack("cinet", engine="secant"), PIXELS)
    assert light.per_image < small.per_image


def test_fit_splits_as_far_as_it_must() -> None:
    """The fewest halvings that fit; what still does not fit is refused with the numbers and the ways out."""
    recipe = attack("idlg")
    whole = estimate(problem(FedSGD(network()), batch(16)), recipe, PIXELS)
    fixed = whole.updates + whole.image_model
    limit = (fixed + 0.3 * (whole.total - fixed)) / MIB
    task = problem(FedSGD(network()), batch(16))
    found = fit(task, recipe, PIXELS, limit_mb=limit)
    assert found.held == task.client.piece == 4
    assert found.total <= limit * MIB
    assert fit(problem(FedSGD(network()), batch(16)), recipe, PIXELS).held == 16
    with pytest.raises(MemoryLimitError, match=r"takes about.*the limit is 0 MiB.*--memory-limit"):
        fit(problem(FedSGD(network()), batch(16)), recipe, PIXELS, limit_mb=0.01)
    with pytest.raises(MemoryLimitError, match="batch statistics couple the images"):
        fit(problem(FedSGD(network(norm=nn.BatchNorm2d)), batch(16)), recipe, PIXELS, limit_mb=limit / 2)


def test_available_memory_is_that_of_the_machine() -> None:
    assert 10 * MIB < available(torch.device("cpu")) < math.inf


def test_the_command_line_refuses_what_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    arguments = [
        "audit",
        "--set",
        "data.batch=2",
        "--set",
        "data.size=16",
        "--out",
        str(tmp_path / "run"),
        "--memory-limit",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["gradleak", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "the limit is 1 MiB" in message
    assert "data.batch" in message


class RunsOut:
    """Mean cross-entropy that asks for more memory than there is, when it sees more than so many images."""

    def __init__(self, most: int, after: int) -> None:
        self.most, self.after, self.calls = most, after, 0

    def __call__(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if len(output) > self.most and self.calls > self.after:
            torch.empty(2**60, dtype=torch.uint8)
        return cross_entropy(output, labels)


def attacked(client: FedSGD, truth: Truth) -> Any:
    observation = simulate(FedSGD(client.model.requires_grad_()), truth)
    labels = recover("known", observation, client)
    return invert(observation, attack("cinet", channels=4, rounds=6), client=client, labels=labels, progress=False)


def test_memory_that_runs_out_is_mended_once() -> None:
    """Half as many images at a time, and the report says so."""
    found = attacked(FedSGD(network(), loss=RunsOut(2, after=23)), batch(4))
    assert found.rounds == 6
    assert found.notes["images_at_a_time"] == 2
    assert any("Memory ran out in round" in text and "2 images at a time" in text for text in found.warnings)


def test_memory_that_runs_out_again_keeps_the_best() -> None:
    found = attacked(FedSGD(network(), loss=RunsOut(1, after=22)), batch(4))
    assert "memory ran out in round" in found.stopped
    assert found.images.isfinite().all()
    assert found.matching_loss <= min(row["loss"] for row in found.history)


def test_memory_that_runs_out_in_the_first_round_is_an_error() -> None:
    with pytest.raises(MemoryLimitError, match="first round, with 2 images"):
        attacked(FedSGD(network(), loss=RunsOut(1, after=3)), batch(4))


SCRIPT = """
import resource
import torch
from torch import nn
import gradleak as gl
from gradleak.invert import invert
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.Sigmoid(), nn.Conv2d(24, 24, 3, padding=1), nn.Sigmoid(),
                      nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
truth = gl.Truth(images=torch.rand(16, 3, 64, 64), labels=torch.arange(16) % 10)
client = gl.FedSGD(model)
observation = gl.simulate(client, truth)
labels = gl.recover("known", observation, client)
recipe = gl.attack("inverting-gradients", rounds=2, snapshots=0)
for piece in (8, None):  # kernels for both sizes are made before memory is short
    client.in_pieces(piece)
    invert(observation, gl.attack("inverting-gradients", rounds=1, snapshots=0), client=client, labels=labels, progress=False)
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
_, most = resource.getrlimit(resource.RLIMIT_AS)
for extra in range(100, 0, -12):  # less and less, until 16 images at once do not fit
    resource.setrlimit(resource.RLIMIT_AS, (pages + extra * 2**20, most))
    found = invert(observation, recipe, client=client, labels=labels, progress=False, memory_limit_mb=1e6)
    if found.warnings:
        break
print(found.rounds, found.notes.get("images_at_a_time"), found.warnings)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is set through Linux's address space")
def test_a_real_shortage_of_memory() -> None:
    """A process whose address space is limited after the first round: 16 images do not fit, and it goes on with 8."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    rounds, pieces, *_ = done.stdout.split(maxsplit=2)
    assert int(rounds) >= 1
    assert pieces == "8"
    assert "Memory ran out" in done.stdout
