"""On a GPU: what is computed there is what a CPU computes, in float32 proper, and comes out the same again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import gradleak as gl
from gradleak import mixed
from gradleak.attacks import attack, available
from gradleak.checkpoint import Checkpoint
from gradleak.client import operator
from gradleak.evaluate import evaluate
from gradleak.invert import Reconstruction, invert
from gradleak.labels import recover
from gradleak.observation import Observation, Truth
from gradleak.run import audit
from gradleak.spec import RunSpec
from gradleak.vjp import secant
from gradleak.whitening import whitened

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")

CUDA = torch.device("cuda:0")


@pytest.fixture(scope="module")
def truth() -> Truth:
    return gl.load_data(gl.DataSpec(source="sample", batch=4, size=32))


@pytest.fixture(scope="module")
def observed(truth: Truth) -> tuple[Observation, torch.nn.Module]:
    model = gl.build_model(gl.ModelSpec(name="resnet18-cifar", width=16, activation="sigmoid"), image_shape=(3, 32, 32))
    return gl.simulate(gl.FedSGD(model), truth), model


def run(
    observed: tuple[Observation, torch.nn.Module],
    device: torch.device = CUDA,
    *,
    name: str = "cinet",
    checkpoint: Checkpoint | None = None,
    end: int | None = None,
    **settings: Any,
) -> Reconstruction:
    observation, model = observed
    client = operator(observation, model).to(device)
    recipe = attack(name, **{"rounds": 6, **({"channels": 8} if name.startswith("cinet") else {}), **settings})
    labels, calls = recover("known", observation, client), iter(range(1, 10**6))
    return invert(
        observation,
        recipe,
        client=client,
        labels=labels,
        progress=False,
        checkpoint=checkpoint,
        stop=lambda: "SIGTERM" if next(calls) == end else "",
    )


def test_the_update_and_its_transpose_are_those_of_float64(observed: tuple[Observation, torch.nn.Module], truth: Truth) -> None:
    """TF32 would leave three digits of the update, and none of the secant's difference."""
    client = operator(*observed)
    x, y = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), truth.labels
    update, transpose = client.to("cpu", torch.float64).vjp(x.double(), y)
    expected = transpose(update)
    with mixed.full_float32():
        found, back = client.to(CUDA).vjp(x.to(CUDA), y.to(CUDA), engine=secant)
        image_cotangent = back({name: t.float().to(CUDA) for name, t in update.items()})
    for name, t in update.items():
        assert float((found[name].cpu() - t).norm() / t.norm()) < 1e-4, name
    assert float((image_cotangent.cpu() - expected).norm() / expected.norm()) < 0.02


def test_the_settings_of_torch_are_left_as_they_were() -> None:
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.conv.fp32_precision, products.fp32_precision, cudnn.deterministic
    with mixed.full_float32():
        assert (cudnn.conv.fp32_precision, products.fp32_precision, cudnn.deterministic) == ("ieee", "ieee", True)
        with mixed.rounds(True, CUDA):
            assert (cudnn.conv.fp32_precision, products.fp32_precision) == ("tf32", "ieee")
        assert (cudnn.conv.fp32_precision, products.fp32_precision) == ("ieee", "ieee")
    assert (cudnn.conv.fp32_precision, products.fp32_precision, cudnn.deterministic) == before


def test_the_metric_is_that_of_the_cpu(observed: tuple[Observation, torch.nn.Module], truth: Truth) -> None:
    observation, model = observed
    client, x = operator(observation, model), torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    values = []
    with mixed.full_float32():
        for device in (torch.device("cpu"), CUDA):
            there, y = client.to(device), truth.labels.to(device)
            target = {name: t.to(device) for name, t in observation.update.items()}
            values.append(whitened(there, y, target, observation.image_shape)(there(x.to(device), y), target)[0])
    assert values[1] == pytest.approx(values[0], rel=1e-3)


@pytest.mark.parametrize("name", available())
def test_every_attack_runs_there(observed: tuple[Observation, torch.nn.Module], truth: Truth, name: str) -> None:
    """The first round's loss is that of the CPU: image models are made there."""
    settings: dict[str, Any] = {"engine": "exact"} if name not in ("analytic",) else {}
    try:
        expected = run(observed, torch.device("cpu"), name=name, rounds=2, **settings)
    except gl.GradleakError as refusal:  # it needs another model, or a generator
        with pytest.raises(type(refusal)):
            run(observed, name=name, rounds=2, **settings)
        return
    found = run(observed, name=name, rounds=2, **settings)
    assert found.history[0]["loss"] == pytest.approx(expected.history[0]["loss"], rel=1e-2)
    assert found.images.device.type == "cpu"
    assert bool(found.images.isfinite().all())


def test_a_run_there_rebuilds_images(observed: tuple[Observation, torch.nn.Module], truth: Truth) -> None:
    rebuilt = run(observed, rounds=250, channels=32, precision="mixed")
    assert rebuilt.notes["tf32"] is True
    assert rebuilt.notes["engine_check"]["in_use"] == "secant"
    assert evaluate(rebuilt.images, truth, lpips="off").summary["ssim"]["mean"] > 0.7


@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_a_run_gives_the_same_bits_again_and_after_an_interruption(
    observed: tuple[Observation, torch.nn.Module], tmp_path: Path, precision: str
) -> None:
    settings = {"rounds": 12, "pixel_share": 0.5, "precision": precision}
    whole, again = run(observed, **settings), run(observed, **settings)
    assert [row["loss"] for row in again.history] == [row["loss"] for row in whole.history]
    path = tmp_path / "checkpoint"
    partial = run(observed, checkpoint=Checkpoint(path, every=math.inf), end=7, **settings)
    assert partial.rounds == 7
    rest = run(observed, checkpoint=Checkpoint(path, every=math.inf), **settings)
    assert [row["loss"] for row in rest.history] == [row["loss"] for row in whole.history]
    assert torch.equal(rest.images, whole.images)


def test_an_audit_names_the_gpu(tmp_path: Path) -> None:
    settings = {"data": {"batch": 2, "size": 16}, "attack": {"name": "cinet", "channels": 4, "rounds": 6}, "device": "cuda"}
    result = audit(RunSpec(**settings, model={"name": "lenet"}, evaluate={"lpips": "off"}), tmp_path / "run", progress=False)
    assert result["device"] == f"cuda:0, {torch.cuda.get_device_name(0)}"
    assert result["cost"]["peak_memory_mb"] > 0
