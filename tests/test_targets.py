"""Targets of any shape: every loss with a client of every protocol, known or optimised together with the images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gradleak import attack, data, evaluate, invert, recover, run
from gradleak.client import build_client, operator, simulate
from gradleak.errors import DataError, ObservationError, OutputError, SpecError
from gradleak.labels import Labels
from gradleak.models import normalisation, normalised
from gradleak.observation import Observation, Truth
from gradleak.spec import ClientSpec, DataSpec, parse
from gradleak.targets import LOSSES, FreeTargets, are_classes, fault

SHAPE = (1, 8, 12)


class Dense(nn.Module):
    """A map of K numbers for each pixel."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.inner = nn.Conv2d(1, 8, 3, padding=1)
        self.outer = nn.Conv2d(8, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.sigmoid(4 * self.inner(x)))


def flat(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 12, 5, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(288, outputs))


def squeezed() -> nn.Module:
    return nn.Sequential(flat(1), nn.Flatten(0))


#: Loss -> model, targets of three images.
CASES: dict[str, tuple[str, nn.Module, Tensor]] = {}


def _cases() -> None:
    torch.manual_seed(0)
    CASES["classes"] = ("cross-entropy", flat(), torch.tensor([0, 2, 1]))
    CASES["soft labels"] = ("cross-entropy", flat(), torch.rand(3, 3).softmax(1))
    CASES["classes of pixels"] = ("cross-entropy", Dense(), torch.randint(0, 3, (3, 8, 12)))
    CASES["several labels"] = ("bce-with-logits", flat(), torch.randint(0, 2, (3, 3)).float())
    CASES["masks"] = ("bce-with-logits", Dense(1), torch.randint(0, 2, (3, 1, 8, 12)).float())
    CASES["numbers"] = ("mse", flat(), torch.randn(3, 3))
    CASES["one number"] = ("mse", squeezed(), torch.randn(3))


_cases()


def capture(name: str, protocol: str = "fedsgd", *, grant: bool = True) -> tuple[Observation, Truth, nn.Module]:
    loss, model, targets = CASES[name]
    own = {"fedavg": {"learning_rate": 0.1, "epochs": 2, "local_batch": 2}, "average": {"clients": 3}}.get(protocol, {})
    truth = Truth(torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1)), targets)
    client = build_client(model, ClientSpec(protocol=protocol, loss=loss, **own), 3)  # type: ignore[arg-type]
    return simulate(client, truth, grant_labels=grant), truth, model


@pytest.mark.parametrize("protocol", ["fedsgd", "fedavg", "average"])
@pytest.mark.parametrize("name", list(CASES))
def test_the_update_is_that_of_the_loss(name: str, protocol: str, tmp_path: Path) -> None:
    """One gradient equals autograd's; targets survive the file; the operator of the file gives the same update."""
    seen, truth, model = capture(name, protocol)
    if protocol == "fedsgd":
        value = LOSSES[CASES[name][0]](model(truth.images), truth.labels)
        for (parameter, _), g in zip(
            model.named_parameters(), torch.autograd.grad(value, list(model.parameters())), strict=True
        ):
            assert torch.allclose(seen.update[parameter], g, atol=1e-7), parameter
    seen.save(tmp_path / "u.safetensors")
    truth.save(tmp_path / "t.safetensors")
    loaded = Observation.load(tmp_path / "u.safetensors")
    assert loaded.labels is not None
    assert torch.equal(loaded.labels, truth.labels)
    assert torch.equal(Truth.load(tmp_path / "t.safetensors").labels, truth.labels)
    again = operator(loaded, model)(truth.images, truth.labels)
    assert all(torch.allclose(again[parameter], g) for parameter, g in loaded.update.items())


@pytest.mark.parametrize("protocol", ["fedsgd", "fedavg", "average"])
@pytest.mark.parametrize("name", ["classes", "classes of pixels", "masks", "numbers", "one number"])
def test_the_joint_transpose_is_that_of_images_and_targets(name: str, protocol: str) -> None:
    """<A'(x, y) (v, w), u> = <(v, w), A'(x, y)^T u> in float64, the left side by central differences."""
    seen, truth, model = capture(name, protocol)
    client = operator(seen, model).to("cpu", torch.float64)
    free = FreeTargets(CASES[name][0], client.outputs(truth.images.double()).shape).double()
    x, y = truth.images.double(), free().detach()
    v, w = torch.randn_like(x), torch.randn_like(y)
    update, transpose = client.joint_vjp(x, y)
    u = {parameter: torch.randn_like(g) for parameter, g in update.items()}
    back_x, back_y = transpose(u)
    h = 1e-5
    ahead, behind = client(x + h * v, y + h * w), client(x - h * v, y - h * w)
    left = sum(float(((ahead[parameter] - behind[parameter]) / (2 * h) * u[parameter]).sum()) for parameter in u)
    assert left == pytest.approx(float((back_x * v).sum() + (back_y * w).sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "targets", "words"),
    [
        ("classes", torch.tensor([0, 3, 1]), "label 3 is out of range: the model has 3 classes"),
        ("classes", torch.rand(3), "takes classes .*or soft labels"),
        ("classes of pixels", torch.tensor([0, 1, 2]), r"takes classes of shape \(3, 8, 12\)"),
        ("several labels", torch.tensor([0, 1, 2]), r"float targets of the shape of the model's output, \(3, 3\)"),
        ("several labels", 2 * torch.ones(3, 3), r"in \[0, 1\], found \[2, 2\]"),
        ("one number", torch.rand(3, 1), r"\(3,\), found float32 \(3, 1\)"),
    ],
    ids=["range", "floats", "one for all pixels", "integers", "above one", "one dimension too many"],
)
def test_targets_that_do_not_go_with_the_loss(name: str, targets: Tensor, words: str) -> None:
    """They would broadcast, be clamped or crash deep inside; each is named."""
    seen, truth, model = capture(name)
    client = operator(seen, model)
    with pytest.raises(DataError, match=words):
        simulate(client, dataclasses.replace(truth, labels=targets))
    with pytest.raises(ObservationError, match=words):
        operator(dataclasses.replace(seen, labels=targets), model)


def test_a_loss_of_ones_own_is_tried_before_anything_runs(tmp_path: Path) -> None:
    """It may take any targets; when it fails, or gives no single number, the message has both shapes."""
    (tmp_path / "own.py").write_text(
        "def halves(output, y): return (output.flatten(1).mean(1) - y[:, 0] * y[:, 1]).square().mean()\n"
        "def each(output, y): return (output - 1).square()\n"
        "def broken(output, y): return output @ y\n"
    )
    model, truth = flat(), Truth(torch.rand(2, *SHAPE), torch.rand(2, 5))

    def client(loss: str) -> ClientSpec:
        return ClientSpec(loss=f"{tmp_path / 'own.py'}:{loss}")

    seen = simulate(build_client(model, client("halves"), 2), truth)
    assert all(bool(t.isfinite().all()) for t in seen.update.values())
    for name, words in {"each": r"returns a tensor of shape \(2, 3\)", "broken": r"fails on two outputs \(2, 3\)"}.items():
        with pytest.raises(SpecError, match=words):
            simulate(build_client(model, client(name), 2), truth)


class WideDense(Dense):
    """As many numbers in its update as a batch has pixels, and more."""

    def __init__(self) -> None:
        super().__init__(1)
        self.inner, self.outer = nn.Conv2d(1, 32, 5, padding=2), nn.Conv2d(32, 1, 5, padding=2)


@pytest.mark.parametrize(
    ("name", "rule"),
    [("several labels", "known"), ("numbers", "known"), ("masks", "known"), ("several labels", "auto"), ("numbers", "auto")],
)
def test_an_image_is_rebuilt(name: str, rule: str) -> None:
    """By L-BFGS in float64, with the targets known, or optimised too (``joint``, which ``auto`` chooses for these losses)."""
    torch.manual_seed(0)
    loss, targets = CASES[name][0], CASES[name][2][:1]
    model: nn.Module = WideDense() if name == "masks" else flat()
    truth = Truth(torch.rand(1, *SHAPE), targets)
    seen = simulate(build_client(model, ClientSpec(loss=loss), 1), truth, grant_labels=rule == "known")
    client = operator(seen, model)
    labels = recover(rule, seen, client)  # type: ignore[arg-type]
    recipe = attack("dlg" if rule == "auto" else "idlg", rounds=25, precision="float64", repeat=2, initial="normalised")
    found = invert(seen, recipe, client=client, labels=labels, progress=False)
    assert (found.labels.rule, found.labels.values.shape) == ("joint" if rule == "auto" else "known", targets.shape)
    assert evaluate(found.images, truth).summary["mse"]["mean"] == pytest.approx(0, abs=2e-3)  # type: ignore[arg-type]
    assert torch.allclose(found.labels.values.float(), targets, atol=0.1)


def test_cinet_with_free_targets_matches_the_update() -> None:
    """The rule ``joint`` with a generator: the targets are stepped beside it, and a checkpoint keeps them."""
    seen, _, model = capture("several labels", grant=False)
    client = operator(seen, model)
    settings = {"rounds": 60, "channels": 8, "learning_rate": 0.02}
    found = invert(seen, attack("cinet", **settings), client=client, labels=recover("joint", seen, client), progress=False)
    fixed = invert(
        seen, attack("cinet", **settings), client=client, labels=Labels(torch.full((3, 3), 0.5), "known"), progress=False
    )
    assert found.labels.rule == "joint"
    assert found.matching_loss < 0.7 * fixed.matching_loss
    assert not torch.allclose(found.labels.values, torch.full((3, 3), 0.5), atol=0.05)


def test_rules_for_classes_refuse_other_losses() -> None:
    seen, _, model = capture("numbers", grant=False)
    with pytest.raises(ObservationError, match=r"cross-entropy.*mse.*joint"):
        recover("counts", seen, operator(seen, model))


def test_normalisation_is_declared_once(tmp_path: Path) -> None:
    """An update of normalised images, its file and the plain model give the same operator on images in [0, 1]."""
    model, (mean, std) = flat(), ([0.4], [0.3])
    truth = Truth(torch.rand(3, *SHAPE), torch.tensor([0, 1, 2]))
    seen = simulate(build_client(normalised(model, mean=mean, std=std), ClientSpec(), 3), truth)
    value = nn.functional.cross_entropy(model((truth.images - 0.4) / 0.3), truth.labels)
    expected = dict(zip(seen.update, torch.autograd.grad(value, list(model.parameters())), strict=True))
    assert all(torch.allclose(seen.update[name], g, atol=1e-7) for name, g in expected.items())
    seen.save(tmp_path / "u.safetensors")
    loaded = Observation.load(tmp_path / "u.safetensors")
    assert normalisation(model) is None
    again = operator(loaded, model)(truth.images, truth.labels)
    assert all(torch.allclose(again[name], g, atol=1e-7) for name, g in expected.items())
    twice = operator(loaded, normalised(model, mean=mean, std=std))(truth.images, truth.labels)
    assert all(torch.equal(twice[name], again[name]) for name in again)


def test_arrays_with_masks_and_grey_folders(tmp_path: Path) -> None:
    """An archive of images and masks is audited by the command's own path; a folder gives grey rectangles."""
    import numpy as np
    from PIL import Image

    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Sigmoid(), nn.Conv2d(4, 1, 3, padding=1))\n"
    )
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=rng.random((3, 1, 16, 24)), y=rng.integers(0, 2, (3, 1, 16, 24)).astype(np.float32))
    spec = parse(
        {
            "data": {"source": f"npz:{tmp_path / 'd.npz'}", "batch": 2},
            "model": {"name": f"{tmp_path / 'own.py'}:net", "mean": [0.5], "std": [0.5]},
            "client": {"loss": "bce-with-logits"},
            "labels": {"rule": "joint"},
            "attack": {"name": "cinet", "rounds": 3, "channels": 4},
            "device": "cpu",
        }
    )
    result = run.audit(spec, tmp_path / "out", progress=False)
    assert result["labels"]["shape"] == [2, 1, 16, 24]
    assert result["labels"]["values"] is None
    assert 0 <= result["labels"]["mean_absolute_error"] <= 1
    scored = run.evaluate_run(tmp_path / "out", data.load(spec.data))
    assert scored["labels"] == result["labels"]
    other = data.load(spec.data.model_copy(update={"start": 1}))
    with pytest.raises(OutputError, match=r"scored against other images.*--force"):
        run.evaluate_run(tmp_path / "out", other)
    assert run.evaluate_run(tmp_path / "out", other, force=True)["per_image"] != result["per_image"]
    with pytest.raises(DataError, match=r"data\.size does not resize"):
        data.load(DataSpec(source=f"npz:{tmp_path / 'd.npz'}", batch=2, size=8))
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    Image.new("RGB", (60, 40), (255, 0, 0)).save(tmp_path / "pictures" / "a" / "1.png")
    grey = data.load(DataSpec(source=f"folder:{tmp_path / 'pictures'}", batch=1, size=(16, 32), channels=1))
    assert grey.images.shape == (1, 1, 16, 32)
    assert float(grey.images.mean()) == pytest.approx(0.299, abs=0.005)


def test_free_targets_are_targets() -> None:
    for loss in LOSSES:
        free = FreeTargets(loss, (4, 3, 2))
        assert fault(loss, free().detach(), torch.zeros(2, 3, 2)) is None
        assert fault(loss, free.settled(free().detach()), torch.zeros(2, 3, 2)) is None
    assert are_classes(torch.tensor([1, 2]))
    assert not are_classes(torch.tensor([[1], [2]]))
