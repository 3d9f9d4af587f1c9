"""Rounds that are partly in bfloat16."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from gradleak import bfloat16, mixed
from gradleak.attacks import attack
from gradleak.checkpoint import Checkpoint
from gradleak.client import FedSGD, simulate
from gradleak.data import load
from gradleak.invert import Reconstruction, _Loop, invert
from gradleak.labels import recover
from gradleak.models.cifar import resnet18
from gradleak.spec import DataSpec
from gradleak.vjp import secant

#: Names of the loop's module, which has the name of its function.
LOOP = _Loop._match.__globals__


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def client() -> FedSGD:
    torch.manual_seed(0)
    return FedSGD(resnet18(image_shape=(3, 16, 16), num_classes=10, width=8))


def test_the_update_is_that_of_float32_but_for_the_convolutions_last_digits(client: FedSGD) -> None:
    x, y = torch.rand(4, 3, 16, 16), torch.arange(4)
    whole, transpose = client.vjp(x, y, engine=secant)
    with mixed.rounds(True, torch.device("cpu")):
        half, other = client.vjp(x, y, engine=secant)
    changed = set()
    for name, tensor in whole.items():
        error = float((half[name] - tensor).norm() / tensor.norm())
        assert error < 0.02
        changed |= {name} if error > 1e-4 else set()
    assert changed
    assert all(isinstance(client.model.get_submodule(name.rpartition(".")[0]), nn.Conv2d) for name in changed)
    with mixed.rounds(True, torch.device("cpu")):
        torch.testing.assert_close(other(whole), transpose(whole))


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 6, (1, 3), dilation=2, bias=False),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    ],
)
def test_every_convolution_gives_its_own_output_and_gradients(convolution: nn.Conv2d) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 4, 12, 12, requires_grad=True)
    parameters = [x, *convolution.parameters()]
    plain = convolution(x)
    with mixed.rounds(True, torch.device("cpu")), mixed.convolutions():
        y = convolution(x)
    torch.testing.assert_close(y, plain)
    wanted, found = (torch.autograd.grad((out * out.detach().cos()).sum(), parameters) for out in (plain, y))
    torch.testing.assert_close(found[0], wanted[0])
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).norm()) < 0.02 * float(b.norm())


def test_nothing_changes_outside() -> None:
    with mixed.rounds(False, torch.device("cpu")), mixed.convolutions():
        y = nn.Conv2d(3, 4, 3)(torch.rand(1, 3, 8, 8))
    assert y.grad_fn is not None
    assert "Convolution" in type(y.grad_fn).__name__
    assert not hasattr(y.grad_fn, "groups")


def run(client: FedSGD, **settings: object) -> Reconstruction:
    truth = load(DataSpec(source="sample", batch=2, size=16))
    observation = simulate(client, truth)
    recipe = attack("cinet", **{"rounds": 40, "channels": 8, **settings})
    return invert(observation, recipe, client=client, labels=recover("known", observation, client), progress=False)


def test_an_attack_in_mixed_precision_fits_as_well(client: FedSGD, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed, "supported", lambda device: True)
    whole, half = run(client), run(client, precision="mixed")
    assert half.notes["bfloat16"]
    assert half.matching_loss < 2 * whole.matching_loss
    assert half.images.dtype == torch.float32
    assert half.history[0]["loss"] == pytest.approx(whole.history[0]["loss"], rel=0.02)
    assert half.history[0]["loss"] != whole.history[0]["loss"]


def test_without_the_instructions_it_is_float32(client: FedSGD, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed, "supported", lambda device: False)
    whole, half = run(client, rounds=5), run(client, rounds=5, precision="mixed")
    assert not half.notes["bfloat16"]
    assert torch.equal(whole.images, half.images)
    assert dataclasses.asdict(whole)["matching_loss"] == half.matching_loss


@pytest.fixture
def _whole_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that is fast enough at it, and for a small F."""
    monkeypatch.setattr(mixed, "supported", lambda device: True)
    monkeypatch.setattr(mixed, "whole_pays", lambda device: True)
    monkeypatch.setitem(LOOP, "WHOLE_FROM", 0)
    monkeypatch.setitem(LOOP, "WHOLE_TOLERANCE", 5.0)  # a narrow F has little to average over
    monkeypatch.setitem(LOOP, "WHOLE_EVERY", 10)


@pytest.mark.usefixtures("_whole_pays")
def test_where_it_pays_all_of_f_is_in_bfloat16_and_is_looked_at_in_float32(
    client: FedSGD, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    monkeypatch.setattr(bfloat16, "passes", lambda: (passes.append(1), contextlib.nullcontext())[1])
    plain = run(client, precision="mixed", rounds=30)
    assert len(passes) == plain.notes["whole_model_in_bfloat16"]["rounds"] > 0


@pytest.mark.usefixtures("_whole_pays")
@pytest.mark.parametrize(("matched", "expected"), [(1.0, [0, 10]), (0.3, [0, 9, 10])])
def test_it_is_looked_at_too_where_more_layers_are_compared(
    matched: float, expected: list[int], client: FedSGD, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20 rounds the generator has 13, and the last four of those compare all of the update."""
    looked = []
    own = _Loop._checked
    monkeypatch.setattr(_Loop, "_checked", lambda loop, member: (looked.append(loop.t), own(loop, member))[1])
    run(client, precision="mixed", rounds=20, matched=matched)
    assert looked == expected


@pytest.mark.usefixtures("_whole_pays")
def test_an_attack_with_all_of_f_in_bfloat16_fits_as_well(client: FedSGD) -> None:
    whole, half = run(client), run(client, precision="mixed")
    said = half.notes["whole_model_in_bfloat16"]
    assert said["rounds"] >= 26
    assert 0 < said["relative_error"] < 5
    assert half.matching_loss < 2 * whole.matching_loss
    assert half.history[0]["loss"] == pytest.approx(whole.history[0]["loss"], rel=0.02)  # looked at in float32
    assert half.history[1]["loss"] != half.history[0]["loss"]


@pytest.mark.usefixtures("_whole_pays")
def test_where_bfloat16_is_too_far_off_it_is_given_up(client: FedSGD, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried once, and the rounds that follow are those of a processor that is not fast enough at it."""
    passes: list[str] = []
    formats: list[str] = []
    tried, gradients = bfloat16.passes, mixed.convolutions
    monkeypatch.setattr(bfloat16, "passes", lambda: (passes.append("tried"), tried())[1])
    monkeypatch.setattr(mixed, "convolutions", lambda *kept: (formats.append(mixed._format.get()), gradients(*kept))[1])
    monkeypatch.setitem(LOOP, "WHOLE_TOLERANCE", 1e-6)
    found = run(client, precision="mixed", rounds=24)
    of_found = formats.copy()
    assert len(passes) == 1
    assert "whole_model_in_bfloat16" not in found.notes
    assert found.notes["bfloat16"]
    monkeypatch.setattr(mixed, "whole_pays", lambda device: False)
    formats.clear()
    other = run(client, precision="mixed", rounds=24)
    assert len(passes) == 1
    later = -2 * 23  # two passes a round, but for the first one, which looks for the step
    assert (set(of_found[:later]), set(formats[:later])) == ({"float32"}, {"bfloat16"})
    assert of_found[later:] == formats[later:]
    assert found.history[0]["loss"] == pytest.approx(other.history[0]["loss"], rel=0.02)


@pytest.mark.usefixtures("_whole_pays")
def test_an_f_that_bfloat16_breaks_is_run_in_float32() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.linear = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(196, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.convolution(x).sigmoid()
            if y.dtype != torch.float32:
                raise RuntimeError("expected scalar type Float but found BFloat16")
            return self.linear(y.flatten(1))

    torch.manual_seed(0)
    found = run(FedSGD(Picky()), precision="mixed", rounds=8)
    assert found.rounds == 8
    assert "whole_model_in_bfloat16" not in found.notes


@pytest.mark.usefixtures("_whole_pays")
def test_such_a_run_goes_on_to_the_same_bytes(client: FedSGD, tmp_path: Path) -> None:
    truth = load(DataSpec(source="sample", batch=2, size=16))
    observation = simulate(client, truth)
    recipe = attack("cinet", rounds=20, channels=8, precision="mixed")
    labels = recover("known", observation, client)

    def go(stop_at: int | None) -> Reconstruction:
        asked = iter(range(1, 100))
        return invert(
            observation,
            recipe,
            client=client,
            labels=labels,
            progress=False,
            checkpoint=Checkpoint(tmp_path / "state.safetensors", every=1e9),
            stop=lambda: "pause" if next(asked) == stop_at else "",
        )

    undisturbed = go(None)
    Checkpoint(tmp_path / "state.safetensors").remove()
    assert go(5).interrupted
    resumed = go(None)
    assert torch.equal(resumed.images, undisturbed.images)
    assert resumed.notes["whole_model_in_bfloat16"] == undisturbed.notes["whole_model_in_bfloat16"]
