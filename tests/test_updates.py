"""Updates of one's own code: whatever form they come in, the observation is that of the client that computed them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradleak as gl
from gradleak import cli
from gradleak.client import operator
from gradleak.errors import ObservationError, SpecError
from gradleak.observation import Observation
from gradleak.updates import load_weights, read_arrays

CODE = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Sigmoid(), nn.Flatten(), nn.Linear(6 * 64, 5))
"""
SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("own") / "own.py"
    file.write_text(CODE)
    return f"{file}:net"


@pytest.fixture
def model(source: str) -> nn.Module:
    torch.manual_seed(3)
    return gl.build_model(gl.ModelSpec(name=source, seed=3), image_shape=SHAPE)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(4, *SHAPE, generator=generator), torch.tensor([0, 1, 4, 2])


def step(model: nn.Module, batch: tuple[Tensor, Tensor], *, rate: float = 0.1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State before and after one step of SGD."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimiser = torch.optim.SGD(model.parameters(), lr=rate)
    optimiser.zero_grad()
    cross_entropy(model(batch[0]), batch[1]).backward()
    optimiser.step()
    return before, {name: t.clone() for name, t in model.state_dict().items()}


def close(one: dict[str, Tensor], other: dict[str, Tensor], *, atol: float = 1e-7) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(t, other[name], atol=atol) for name, t in one.items())


def expected(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return gl.FedSGD(model)(*batch)


# observe ------------------------------------------------------------------------------------------------------------------


def test_observe_keeps_what_a_step_sends(model: nn.Module, batch: tuple[Tensor, Tensor], source: str, tmp_path: Path) -> None:
    """The gradient at the weights of the block's beginning, also after the optimiser stepped; the file is attacked as it is."""
    wanted, before = expected(model, batch), {name: t.clone() for name, t in model.state_dict().items()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    with gl.observe(model, labels=batch[1]) as seen:
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimiser.step()
    assert close(seen.observation.update, wanted)
    assert all(torch.equal(t, before[name]) for name, t in {**seen.observation.weights, **seen.observation.buffers}.items())
    assert (seen.observation.batch, seen.observation.image_shape, seen.observation.protocol.mode) == (4, SHAPE, "train")
    seen.save(tmp_path / "u.safetensors")
    loaded = Observation.load(tmp_path / "u.safetensors")
    fresh = gl.build_model(gl.ModelSpec(name=source, seed=9), image_shape=SHAPE)
    assert close(operator(loaded, fresh)(*batch), wanted)


def test_observe_of_local_epochs_is_the_change_of_the_weights(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """Two epochs in batches of two, as the operator of FedAvg computes them."""
    client = gl.ClientSpec(protocol="fedavg", learning_rate=0.1, epochs=2, local_batch=2)
    wanted = gl.FedAvg(model, learning_rate=0.1, epochs=2, batch_size=2)(*batch)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    with gl.observe(model, client=client) as seen:
        for _ in range(2):
            for x, y in zip(batch[0].split(2), batch[1].split(2), strict=True):
                optimiser.zero_grad()
                cross_entropy(model(x), y).backward()
                optimiser.step()
    assert seen.observation.batch == 4
    assert close(seen.observation.update, wanted, atol=1e-6)


def test_observe_declares_the_normalisation(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """A loop that normalises its images, and an attack on images in [0, 1], agree on the update."""
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    images = (batch[0] - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with gl.observe(model, mean=mean, std=std) as seen:
        cross_entropy(model(images), batch[1]).backward()
    assert close(operator(seen.observation, model)(*batch), seen.observation.update, atol=1e-6)


def test_observe_asks_for_the_normalisation_of_images_outside_the_unit_range(
    model: nn.Module, batch: tuple[Tensor, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    with gl.observe(model):
        cross_entropy(model(batch[0]), batch[1]).backward()
    assert "mean=" not in caplog.text
    model.zero_grad()
    with gl.observe(model):
        cross_entropy(model(4 * batch[0] - 2), batch[1]).backward()
    assert "give observe mean= and std=" in caplog.text


def test_frozen_and_unused_parameters_are_not_matched(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    model[1].requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    with gl.observe(model) as seen:
        cross_entropy(model(batch[0]), batch[1]).backward()
    assert set(seen.observation.update) == {"0.weight", "0.bias", "4.weight", "4.bias"}
    assert close(operator(seen.observation, model)(*batch), seen.observation.update)


def test_observe_says_what_is_missing(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ObservationError, match="no image went through the model"), gl.observe(model):
        pass
    with pytest.raises(ObservationError, match=r"no parameter has a gradient.*backward"), gl.observe(model):
        model(batch[0])
    cross_entropy(model(batch[0]), batch[1]).backward()
    with pytest.raises(ObservationError, match="zero_grad"), gl.observe(model):
        cross_entropy(model(batch[0]), batch[1]).backward()
    with gl.observe(model) as seen:  # as its first line it is as good as before the block
        model.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
    assert close(seen.observation.update, expected(model, batch))
    model.zero_grad()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)

    def epochs() -> None:
        with gl.observe(model):
            for _ in range(2):
                optimiser.zero_grad()
                cross_entropy(model(batch[0]), batch[1]).backward()
                optimiser.step()

    with pytest.raises(ObservationError, match=r"several local steps.*fedavg"):
        epochs()
    model.zero_grad()
    with pytest.raises(ZeroDivisionError), gl.observe(model):  # an error of the loop's own is not covered up
        _ = 1 / 0
    assert not model._forward_pre_hooks
    with pytest.raises(ObservationError, match=r"labels have shape \(3,\)"), gl.observe(model, labels=[1, 2, 3]):
        cross_entropy(model(batch[0]), batch[1]).backward()


# arrays -------------------------------------------------------------------------------------------------------------------

Form = Callable[[dict[str, Tensor], nn.Module], object]

FORMS: dict[str, Form] = {
    "tensors by name": lambda state, model: state,
    "arrays by name": lambda state, model: {name: t.numpy() for name, t in state.items()},
    "arrays in the state's order": lambda state, model: [t.numpy() for t in state.values()],
    "arrays in the parameters' order": lambda state, model: [state[name].numpy() for name, _ in model.named_parameters()],
    "by name, wrapped": lambda state, model: {f"_module.{name}": t for name, t in state.items()},
    "by name, compiled and parallel": lambda state, model: {f"module._orig_mod.{name}": t for name, t in state.items()},
}


@pytest.mark.parametrize("form", list(FORMS))
def test_weights_before_and_after(form: str, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """One step of SGD changes the weights by the learning rate times the gradient; the buffers are those before."""
    wanted = expected(model, batch)
    before, after = step(model, batch)
    seen = gl.from_weights(
        FORMS[form](before, model),  # type: ignore[arg-type]
        FORMS[form](after, model),  # type: ignore[arg-type]
        model,
        batch=4,
        image_shape=SHAPE,
        client=gl.ClientSpec(protocol="fedavg", learning_rate=0.1),
    )
    assert close(seen.update, {name: 0.1 * g for name, g in wanted.items()}, atol=1e-6)
    assert all(torch.equal(t, before[name]) for name, t in seen.weights.items())
    if "parameters' order" not in form:
        assert torch.equal(seen.buffers["1.running_mean"], before["1.running_mean"])
        assert close(operator(seen, model)(*batch), seen.update, atol=1e-6)


@pytest.mark.parametrize("form", [name for name in FORMS if "state" not in name])
def test_a_gradient(form: str, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    wanted = expected(model, batch)
    seen = gl.from_gradient(FORMS[form](wanted, model), model, batch=4, image_shape=SHAPE)  # type: ignore[arg-type]
    assert close(seen.update, wanted)
    assert close(operator(seen, model)(*batch), wanted)


def test_a_part_of_the_parameters(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """What is missing is frozen for the attack; its weights are still F's."""
    wanted = {name: g for name, g in expected(model, batch).items() if name.startswith("0.")}
    seen = gl.from_gradient(wanted, model, batch=4, image_shape=SHAPE)
    client = operator(seen, model)
    assert set(client.weights) == {"0.weight", "0.bias"}
    assert seen.protocol.layers == ["0.weight", "0.bias"]
    assert close(client(*batch), wanted)


def test_arrays_that_do_not_fit(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    wanted = expected(model, batch)
    arrays = [t.numpy() for t in wanted.values()]
    shared = {"batch": 4, "image_shape": SHAPE}
    for gradient, words in [
        (arrays[:-1], r"5 arrays; the model has 9 in state_dict\(\), 6 in parameters\(\)"),
        ([*arrays[:4], arrays[4].T, arrays[5]], r"array 4 has shape \(384, 5\), and '4.weight' of the model \(5, 384\)"),
        ({"0.weight": wanted["0.weight"][:2]}, r"'0.weight' has shape \(2, 3, 3, 3\), the model expects \(6, 3, 3, 3\)"),
        ({"first": wanted["0.weight"]}, r"none of its names is a parameter.*'first'.*'0.weight'"),
        ({**wanted, "more": torch.ones(2)}, "'more' is no parameter"),
        ({**wanted, "0.bias": torch.full((6,), torch.nan)}, "'0.bias': has NaN"),
        ({"0.bias": ["a"]}, "'0.bias': is no array of numbers"),
        ({name: torch.zeros_like(g) for name, g in wanted.items()}, "zero"),
    ]:
        with pytest.raises(ObservationError, match=words):
            gl.from_gradient(gradient, model, **shared)  # type: ignore[arg-type]
    with pytest.raises(ObservationError, match="zero"):
        gl.from_weights(None, dict(model.state_dict()), model, **shared)  # type: ignore[arg-type]
    with pytest.raises(ObservationError, match=r"expected batch >= 1 and image_shape \(C, H, W\)"):
        gl.from_gradient(wanted, model, batch=4, image_shape=(8, 8))
    with pytest.raises(ObservationError, match="expected 3 numbers each"):
        gl.from_gradient(wanted, model, mean=[0.5], **shared)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="did you mean 'mse'"):
        gl.from_gradient(wanted, model, client=gl.ClientSpec(loss="msee"), **shared)  # type: ignore[arg-type]


def test_a_change_that_drowns_in_rounding_is_told(
    model: nn.Module, batch: tuple[Tensor, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """A learning rate of 1e-6 leaves of float32 weights hardly more than their rounding; the estimate has the right size."""
    wanted = expected(model, batch)
    before, after = step(model, batch, rate=1e-6)
    seen = gl.from_weights(before, after, model, batch=4, image_shape=SHAPE)
    off = sum(float((seen.update[n] - 1e-6 * g).square().sum()) for n, g in wanted.items() if n in seen.update) ** 0.5
    size = sum(float(g.square().sum()) for g in seen.update.values()) ** 0.5
    assert "learning rate is not known" in caplog.text
    told = float(caplog.text.split("about ")[1].split(" %")[0]) / 100
    assert 0.3 < told / (off / size) < 3


# files --------------------------------------------------------------------------------------------------------------------


def write(path: Path, state: dict[str, Tensor]) -> Path:
    if path.suffix == ".npz" and path.stem.endswith("list"):
        np.savez(path, *(t.numpy() for t in state.values()))
    elif path.suffix == ".npz":
        np.savez(path, **{name: t.numpy() for name, t in state.items()})  # type: ignore[arg-type]
    elif path.suffix == ".safetensors":
        save_file(state, path)
    elif path.stem.endswith("whole"):
        torch.save({"epoch": 3, "state_dict": state}, path)
    else:
        torch.save(state, path)
    return path


def call(*arguments: object) -> int:
    """`gradleak ARGUMENTS` in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gradleak", *map(str, arguments)])
        with pytest.raises(SystemExit) as leave:
            cli.main()
    return int(leave.value.code or 0)


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz", "list.npz", "a.pt", "whole.pth"])
def test_convert_and_validate_files(
    name: str,
    source: str,
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Weights before and after, in every kind of file, become one and the same update file, which fits the model."""
    wanted = expected(model, batch)
    before, after = step(model, batch)
    out = tmp_path / "u.safetensors"
    files = [write(tmp_path / f"{kind}-{name}", state) for kind, state in (("before", before), ("after", after))]
    arguments = ["--before", files[0], "--after", files[1], "--model", source, "--batch", 4, "--image-shape", "3x8x8"]
    rate = ["--set", "client.protocol=fedavg", "--set", "client.learning_rate=0.1", "--labels", "0,1,4,2"]
    assert call("convert", *arguments, *rate, "--out", out) == 0
    seen = Observation.load(out)
    assert close(seen.update, {n: 0.1 * g for n, g in wanted.items()}, atol=1e-6)
    assert seen.labels is not None
    assert seen.labels.tolist() == [0, 1, 4, 2]
    capsys.readouterr()
    assert call("validate", out, "--model", source, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["batch"], found["image_shape"], found["fits"], found["labels"]) == (4, [3, 8, 8], True, [4])
    assert sum(found["layers"].values()) == pytest.approx(1)
    assert found["image_sensitivity"] > 0.01
    assert call("validate", out) == 0
    assert "--model" in capsys.readouterr().out
    assert call("validate", out, "--model", "lenet") == 2
    if name != "a.safetensors":
        return
    assert call("invert", out, "--model", source, "--set", "attack.rounds=2", "--out", tmp_path / "run", "--quiet") == 0


def test_convert_a_gradient_at_given_weights(
    source: str, model: nn.Module, batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    """Buffers and weights come from --before; a normalisation is declared once, here, and `invert` finds it in the file."""
    before = write(tmp_path / "w.safetensors", dict(model.state_dict()))
    normalised = gl.normalised(model, mean=[0.5] * 3, std=[0.2] * 3)
    gradient = write(tmp_path / "g.npz", expected(normalised, batch))
    out = tmp_path / "u.safetensors"
    arguments = [
        "convert",
        "--gradient",
        gradient,
        "--before",
        before,
        "--model",
        source,
        "--batch",
        4,
        "--image-shape",
        "3x8x8",
    ]
    declared = ["--set", "model.mean=[0.5,0.5,0.5]", "--set", "model.std=[0.2,0.2,0.2]"]
    assert call(*arguments, *declared, "--out", out) == 0
    assert call(*arguments, *declared, "--out", out) == 2, "it is there already"
    seen = Observation.load(out)
    fresh = gl.build_model(gl.ModelSpec(name=source, seed=8), image_shape=SHAPE)
    assert close(operator(seen, fresh)(*batch), seen.update, atol=1e-6)


def test_bad_files_are_named(source: str, model: nn.Module, tmp_path: Path) -> None:
    """What is refused, and in which words; nothing is written."""

    class Surprise:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "marker",)

    torch.save({"a": Surprise()}, tmp_path / "bomb.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "view.pt")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 nothing")
    (tmp_path / "text.csv").write_text("1, 2")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], object), allow_pickle=True)
    for name, words in {
        "bomb.pt": "is no file of plain tensors alone.*torch.save\\(model.state_dict",
        "list.pt": "holds list, expected a state_dict",
        "view.pt": "larger than the file",
        "cut.npz": "not a readable .npz archive",
        "text.csv": "unknown kind of file",
        "objects.npz": "type object; expected numbers",
        "absent.pt": "no such file|No such file",
    }.items():
        with pytest.raises(ObservationError, match=words):
            read_arrays(tmp_path / name)
    assert not (tmp_path / "marker").exists()
    shared = ["--model", source, "--batch", 1, "--image-shape", "3x8x8", "--out", tmp_path / "u.safetensors"]
    assert call("convert", *shared) == 2
    assert call("convert", "--gradient", tmp_path / "list.pt", *shared) == 2
    assert call("convert", "--gradient", tmp_path / "list.pt", *shared[:4], "--image-shape", "8x8", *shared[6:]) == 2
    assert not (tmp_path / "u.safetensors").exists()
    with pytest.raises(ObservationError, match="the weights: none of its names"):
        load_weights(model, {"x": torch.ones(2)})


def test_validate_names_a_foreign_file(model: nn.Module, tmp_path: Path, batch: tuple[Tensor, Tensor]) -> None:
    from gradleak.validate import validate

    save_file(dict(model.state_dict()), tmp_path / "w.safetensors")
    with pytest.raises(ObservationError, match="gradleak convert"):
        validate(tmp_path / "w.safetensors")
    gl.Truth(*batch).save(tmp_path / "t.safetensors")
    assert validate(tmp_path / "t.safetensors").labels == [4]
