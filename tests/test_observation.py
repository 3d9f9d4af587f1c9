"""Updates and truths in files: the same bytes again, and damage, mismatch and malice named, never run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradleak import models
from gradleak.client import FedSGD, operator, simulate
from gradleak.errors import DataError, GradleakError, ObservationError
from gradleak.observation import Observation, Truth
from gradleak.run import invert_observation, spec_for
from gradleak.spec import ModelSpec
from gradleak.tensors import read_tensors, write_tensors

MODEL = ModelSpec(name="resnet20-cifar", width=2, num_classes=4)
SHAPE = (3, 8, 8)


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    """Threads that wait for each other cost more than these small tensors."""
    torch.set_num_threads(1)


def batch() -> Truth:
    return Truth(torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 3]), ("a", "b", "ü"))


def observation(**settings: Any) -> Observation:
    return simulate(FedSGD(models.build(MODEL, image_shape=SHAPE)), batch(), model=MODEL, **settings)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("saved") / "update.safetensors"
    observation().save(file)
    return file


@pytest.fixture
def path(saved: Path, tmp_path: Path) -> Path:
    """A sound update file to damage."""
    return Path(shutil.copy(saved, tmp_path))


Edit = Callable[[dict[str, torch.Tensor], dict[str, str], dict[str, Any]], None]


def edit(path: Path, change: Edit) -> None:
    """Change tensors, metadata or the JSON header of a file."""
    tensors, metadata = read_tensors(path)
    header = json.loads(metadata.pop("observation"))
    change(tensors, metadata, header)
    write_tensors(path, tensors, {"observation": json.dumps(header), **metadata})


def attack_it(path: Path) -> None:
    """What `gradleak invert` does up to the operator."""
    found = Observation.load(path)
    spec = spec_for(found, model=None, overrides=["attack.rounds=1", "attack.channels=4", "device=cpu"], where=str(path))
    invert_observation(found, spec, path.parent / "out", where=str(path), progress=False)


@pytest.mark.parametrize("grant", [True, False])
def test_round_trip(tmp_path: Path, grant: bool) -> None:
    """Every tensor, the protocol and the model come back; saving again, or elsewhere, gives the same bytes."""
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    saved = observation(grant_labels=grant)
    saved.save(first)
    loaded = Observation.load(first)
    for name in ("update", "weights", "buffers"):
        there, here = getattr(saved, name), getattr(loaded, name)
        assert set(there) == set(here)
        assert all(torch.equal(there[key], here[key]) and there[key].dtype == here[key].dtype for key in there)
    for name in ("image_shape", "batch", "protocol", "model", "granted"):
        assert getattr(saved, name) == getattr(loaded, name)
    assert (loaded.labels is not None) == grant == ("labels" in loaded.granted)
    loaded.save(second)
    assert first.read_bytes() == second.read_bytes()


def test_the_file_holds_no_image(path: Path) -> None:
    """The server's side only: no tensor of the batch's size, no names, no labels unless they are granted."""
    tensors, metadata = read_tensors(path)
    assert all(t.numel() != batch().images.numel() or k.startswith(("update", "weights")) for k, t in tensors.items())
    assert "ü" not in str(metadata)
    assert "labels" not in dataclasses.asdict(observation(grant_labels=False)) or observation(grant_labels=False).labels is None


def test_files_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    """They hold personal data, wherever the user puts them."""
    observation().save(tmp_path / "update.safetensors")
    batch().save(tmp_path / "truth.safetensors")
    assert [file.stat().st_mode & 0o777 for file in sorted(tmp_path.iterdir())] == [0o600, 0o600]


def test_operator_has_the_observed_state() -> None:
    """F gets the observed weights, running statistics, mode and loss; a model of another seed gives the same update."""
    other = models.build(MODEL.model_copy(update={"seed": 9}), image_shape=SHAPE)
    seen, truth = observation(), batch()
    rebuilt = operator(seen, other)(truth.images, truth.labels)
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in seen.update.items())


def test_simulate_names_a_label_out_of_range() -> None:
    client = FedSGD(models.build(MODEL, image_shape=SHAPE))
    for label in (4, -1):
        with pytest.raises(DataError, match=rf"label {label} .*4 classes"):
            simulate(client, Truth(batch().images, torch.tensor([0, label, 1])))


FIRST = "update/conv1.weight"


def set_value(value: float) -> Edit:
    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str], header: dict[str, Any]) -> None:
        tensors[FIRST].view(-1)[3] = value

    return change


def zero(tensors: dict[str, torch.Tensor], metadata: dict[str, str], header: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if name.startswith("update/"):
            tensor.zero_()


EDITS: dict[str, tuple[Edit, list[str]]] = {
    "NaN": (set_value(float("nan")), ["conv1.weight", "NaN"]),
    "infinity": (set_value(float("inf")), ["conv1.weight", "infinite"]),
    "all zeros": (zero, ["zero"]),
    "lacks a parameter": (lambda t, m, h: t.pop(FIRST), ["lacks", "conv1.weight"]),
    "has one too many": (lambda t, m, h: t.update({"update/more": torch.ones(2)}), ["unexpected", "more"]),
    "wrong shape": (
        lambda t, m, h: t.update({FIRST: torch.ones(2, 3, 1, 1)}),
        ["conv1.weight", "(2, 3, 1, 1)", "(2, 3, 3, 3)"],
    ),
    "transposed": (lambda t, m, h: t.update({FIRST: t[FIRST].transpose(0, 1)}), ["conv1.weight", "(3, 2, 3, 3)"]),
    "integers": (lambda t, m, h: t.update({FIRST: t[FIRST].long()}), ["conv1.weight", "int64", "floating"]),
    "no update": (lambda t, m, h: [t.pop(k) for k in list(t) if k.startswith("update/")], ["no update"]),
    "NaN weights": (lambda t, m, h: t["weights/conv1.weight"].fill_(float("nan")), ["weights", "conv1.weight", "NaN"]),
    "lacks weights": (lambda t, m, h: t.pop("weights/conv1.weight"), ["weights", "conv1.weight"]),
    "buffer of another shape": (
        lambda t, m, h: t.update({"buffers/bn1.running_mean": torch.ones(5)}),
        ["bn1.running_mean", "(5,)"],
    ),
    "buffer that is not there": (lambda t, m, h: t.update({"buffers/more": torch.ones(5)}), ["more"]),
    "NaN buffer": (lambda t, m, h: t["buffers/bn1.running_var"].fill_(float("nan")), ["bn1.running_var", "NaN"]),
    "foreign tensor": (lambda t, m, h: t.update({"images": torch.ones(3)}), ["unexpected", "images"]),
    "label too large": (lambda t, m, h: t.update(labels=torch.tensor([0, 4, 1])), ["label", "4"]),
    "label that is ignored by torch": (lambda t, m, h: t.update(labels=torch.tensor([0, -100, 1])), ["label", "-100"]),
    "labels of another number": (lambda t, m, h: t.update(labels=torch.tensor([0, 1])), ["labels", "(2,)", "(3,)"]),
    "labels that are not integers": (lambda t, m, h: t.update(labels=torch.ones(3)), ["cross-entropy", "float32", "int64"]),
    "targets that are not finite": (lambda t, m, h: t.update(labels=torch.full((3, 4), torch.nan)), ["labels", "finite"]),
    "normalisation of another number of channels": (
        lambda t, m, h: h.update(normalisation={"mean": [0.5], "std": [0.5]}),
        ["normalisation.mean", "3 channels"],
    ),
    "normalisation by zero": (
        lambda t, m, h: h.update(normalisation={"mean": [0.5] * 3, "std": [0.5, 0, 0.5]}),
        ["normalisation.std", "greater than 0"],
    ),
    "another format": (lambda t, m, h: m.update(format="gradleak-truth"), ["gradleak-truth", "gradleak-observation"]),
    "no format": (lambda t, m, h: m.pop("format"), ["None", "gradleak-observation"]),
    "later version": (lambda t, m, h: m.update(version="3"), ["version", "'3'", "1 and 2"]),
    "header cut short": (lambda t, m, h: m.update(observation='{"batch": 3'), ["JSON"]),
    "header nested without end": (lambda t, m, h: m.update(observation="[" * 100_000), ["header"]),
    "header that is no object": (lambda t, m, h: m.update(observation="[1]"), ["header"]),
    "header without a batch": (lambda t, m, h: h.pop("batch"), ["header", "batch"]),
    "infinite batch": (lambda t, m, h: m.update(observation=json.dumps({**h, "batch": float("inf")})), ["header"]),
    "no images": (lambda t, m, h: h.update(batch=0), ["batch", "greater than 0"]),
    "too many images": (lambda t, m, h: h.update(batch=10**12), ["out of range"]),
    "flat images": (lambda t, m, h: h.update(image_shape=[64]), ["header"]),
    "unknown mode": (lambda t, m, h: h["protocol"].update(mode="test"), ["header", "mode"]),
    "unknown protocol key": (lambda t, m, h: h["protocol"].update(rate=1), ["header", "rate"]),
    "unknown model": (
        lambda t, m, h: h["model"].update(name="resnet19-cifar"),
        ["unknown model", "'resnet19-cifar'", "did you mean"],
    ),
    "another width": (lambda t, m, h: h["model"].update(width=3), ["shape", "(3,", "another architecture"]),
}


@pytest.mark.parametrize("name", list(EDITS))
def test_bad_content_is_named(path: Path, name: str) -> None:
    """An error for people that names the fault and (unless it is the model's) the file."""
    change, words = EDITS[name]
    edit(path, change)
    with pytest.raises(GradleakError) as error:
        attack_it(path)
    message = str(error.value)
    assert all(word in message for word in words), message
    if name != "unknown model":
        assert isinstance(error.value, ObservationError)
        assert str(path) in message


@pytest.mark.parametrize("part", ["loss", "model"])
def test_an_update_file_never_names_code_that_is_run(path: Path, tmp_path: Path, part: str) -> None:
    """A client writes the file, the server reads it: a file or module in its header is refused, not imported."""
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\ndef function(*args, **kwargs):\n    raise RuntimeError\n"
    )
    where = f"{tmp_path / 'own.py'}:function"
    edit(path, lambda t, m, h: h["protocol"].update(loss=where) if part == "loss" else h.update(model={"name": where}))
    with pytest.raises(GradleakError) as error:
        attack_it(path)
    assert not ran.exists()
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda good: b"", ["not a safetensors file"]),
        (lambda good: good[:6], ["not a safetensors file"]),
        (lambda good: good[: len(good) // 2], ["truncated"]),
        (lambda good: good[:-1], ["truncated"]),
        (lambda good: good[:40], ["truncated"]),
        (lambda good: b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x01u.", ["not a safetensors file", "pickle"]),
        (lambda good: b"just some text in a file", ["not a safetensors file"]),
        (lambda good: (2**62).to_bytes(8, "little") + good[8:], ["not a safetensors file"]),
        (lambda good: (20_000_000).to_bytes(8, "little") + good[8:], ["truncated"]),
        (lambda good: good[:9] + b"#" + good[10:], ["the header is not valid JSON"]),
    ],
)
def test_damaged_files_are_named(path: Path, content: Callable[[bytes], bytes], words: list[str]) -> None:
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(ObservationError) as error:
        Observation.load(path)
    assert all(word in str(error.value) for word in [str(path), *words]), error.value


def test_a_pickle_is_refused_unread(path: Path) -> None:
    """Both of torch's formats; the message says how to convert them."""
    for zipped in (True, False):
        torch.save(nn.Linear(2, 2).state_dict(), path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ObservationError, match=r"pickles, which are not read here.*save_file"):
            Observation.load(path)


@pytest.mark.parametrize("name", ["absent.safetensors", "."])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ObservationError, match="no such file"):
        Observation.load(tmp_path / name)


def test_truth_round_trip(tmp_path: Path) -> None:
    batch().save(tmp_path / "a.safetensors")
    loaded = Truth.load(tmp_path / "a.safetensors")
    assert torch.equal(loaded.images, batch().images)
    assert torch.equal(loaded.labels, batch().labels)
    assert loaded.names == batch().names
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


IMAGES, LABELS = torch.rand(2, 1, 4, 4), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"images": IMAGES}, {}, ["labels"]),
        ({"labels": LABELS}, {}, ["images"]),
        ({"images": IMAGES[0], "labels": LABELS}, {}, ["(B, C, H, W)", "(1, 4, 4)"]),
        ({"images": IMAGES, "labels": LABELS[:1]}, {}, ["labels", "(1,)"]),
        ({"images": (255 * IMAGES).byte(), "labels": LABELS}, {}, ["float", "uint8"]),
        ({"images": 255 * IMAGES, "labels": LABELS}, {}, ["[0, 1]"]),
        ({"images": IMAGES * float("nan"), "labels": LABELS}, {}, ["finite"]),
        ({"images": IMAGES, "labels": torch.tensor([0, -1])}, {}, ["label", "-1"]),
        ({"images": IMAGES, "labels": LABELS}, {"names": "{"}, ["JSON"]),
        ({"images": IMAGES, "labels": LABELS}, {"names": '{"a": 1}'}, ["names"]),
        ({"images": IMAGES, "labels": LABELS}, {"names": '["only one"]'}, ["names"]),
    ],
)
def test_bad_truths_are_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], words: list[str]
) -> None:
    path = tmp_path / "truth.safetensors"
    write_tensors(path, tensors, {"format": "gradleak-truth", "version": "1", **metadata})
    with pytest.raises(DataError) as error:
        Truth.load(path)
    assert all(word in str(error.value) for word in [str(path), *words]), error.value
