"""What is fuzzed: each target gives one parser one input, and knows what may happen.

Either the input is accepted, and what was read can be written and read again as the same; or it is refused by a
:class:`GradleakError` with a printable message. Anything else that is raised is a crash. Hypothesis (``test_fuzz.py``) and
atheris (``atheris_parsers.py``) share these functions.
"""

from __future__ import annotations

import functools
import io
import json
import struct
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gradleak import data, defences, models, results, spec
from gradleak.archive import read_archive
from gradleak.client import simulate
from gradleak.dcgan import Generator
from gradleak.errors import GradleakError, ObservationError
from gradleak.evaluate import evaluate, target_scores
from gradleak.metrics import load_lpips
from gradleak.observation import Observation, Truth
from gradleak.protocols import FedSGD
from gradleak.report import ReportData
from gradleak.report.html import render
from gradleak.run import spec_for
from gradleak.spec import ClientSpec, DataSpec, DefenceSpec, ModelSpec
from gradleak.tensors import read_checkpoint, read_tensors, write_tensors
from gradleak.updates import read_arrays

#: (target, "accepted" or "refused") -> how many inputs.
COUNTS: Counter[tuple[str, str]] = Counter()

Target = Callable[[Any], None]
TARGETS: dict[str, Target] = {}


def target(function: Target) -> Target:
    """Register a target; its runs are counted, and a refusal must be printable."""
    name = function.__name__

    @functools.wraps(function)
    def run(content: Any) -> None:
        try:
            function(content)
        except GradleakError as error:
            message = str(error)
            assert message, "a refusal says why"
            assert message.isprintable(), f"not printable: {message!r}"
            assert len(message) < 2100, "a message has an end"
            COUNTS[name, "refused"] += 1
        else:
            COUNTS[name, "accepted"] += 1

    TARGETS[name] = run
    return run


@functools.cache
def folder() -> Path:
    """Where inputs are put: in memory where the system has such a file system."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="gradleak-fuzz-", dir=memory if memory.is_dir() else None))


def put(name: str, content: bytes) -> Path:
    path = folder() / name
    path.write_bytes(content)
    return path


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        t.dtype == other[name].dtype and torch.equal(t.nan_to_num(), other[name].nan_to_num()) for name, t in one.items()
    )


@target
def safetensors(content: bytes) -> None:
    """Any tensor file, as weights and LPIPS backbones are read."""
    tensors, metadata = read_tensors(put("a.safetensors", content))
    write_tensors(folder() / "b.safetensors", tensors, metadata)
    again, same_metadata = read_tensors(folder() / "b.safetensors")
    assert same(tensors, again)
    assert metadata == same_metadata


@target
def weights(content: bytes) -> None:
    """A file of weights for a built-in model."""
    models.build(MODEL.model_copy(update={"weights": put("w.safetensors", content)}), image_shape=(3, 8, 8))


@target
def backbone(content: bytes) -> None:
    """A file of VGG-16 for LPIPS; no generated file is one, so each is refused after its tensors were read."""
    load_lpips(str(put("v.safetensors", content)))


@target
def observation(content: bytes) -> None:
    """An update file, and the specification that an attack makes of its header."""
    read = Observation.load(put("u.safetensors", content))
    read.save(folder() / "again.safetensors")
    again = Observation.load(folder() / "again.safetensors")
    assert same(read.update, again.update)
    assert same(read.weights, again.weights)
    for key in ("image_shape", "batch", "protocol", "model", "defences", "surrogate_data", "normalisation"):
        assert getattr(read, key) == getattr(again, key), key
    spec_for(read, model=None, overrides=[], where="u.safetensors")
    defences.parse(read.defences)


@target
def truth(content: bytes) -> None:
    """A truth file, and its score against a black picture."""
    read = Truth.load(put("t.safetensors", content))
    read.save(folder() / "again.safetensors")
    again = Truth.load(folder() / "again.safetensors")
    assert torch.equal(read.images, again.images)
    assert torch.equal(read.labels, again.labels)
    assert read.names == again.names
    target_scores(read.labels, read.labels)
    if read.images.numel() < 5000:
        evaluate(torch.zeros_like(read.images), read, lpips="off")


@target
def generator(content: bytes) -> None:
    """A generator file."""
    read = Generator.load(put("g.safetensors", content))
    read.save(folder() / "again.safetensors")
    assert same(read.state_dict(), Generator.load(folder() / "again.safetensors").state_dict())


@target
def specification(content: bytes) -> None:
    """The text of a TOML specification."""
    read = spec.load(put("spec.toml", content))
    assert spec.load(put("again.toml", spec.dump(read).encode())) == read
    defences.parse(read.defence)


@target
def table(content: dict[str, Any]) -> None:
    """A specification as tables, as Python gives it."""
    read = spec.parse(content)
    assert spec.parse(read.model_dump(exclude_none=True)) == read


@target
def assignments(content: list[str]) -> None:
    """What stands behind ``--set``."""
    read = spec.load(None, content)
    spec.load(put("again.toml", spec.dump(read).encode()))


@target
def defence_tables(content: list[Any]) -> None:
    """``[[defence]]`` tables."""
    parsed = defences.parse(spec.parse({"defence": content}).defence)
    assert [d.spec for d in defences.parse([d.spec for d in parsed])] == [d.spec for d in parsed]


@target
def npz(content: bytes) -> None:
    """A NumPy archive with images and labels."""
    path = put("a.npz", content)
    read = data.load(DataSpec(source=f"npz:{path}", batch=1))
    np.savez(folder() / "b.npz", x=read.images.permute(0, 2, 3, 1).contiguous().numpy(), y=read.labels.numpy())
    check_images(read)


@target
def archive(content: bytes) -> None:
    """A NumPy archive of gradients or weights: by name, or in order."""
    read = read_arrays(put("g.npz", content))
    named = {f"arr_{i}": a for i, a in enumerate(read)} if isinstance(read, list) else dict(read)
    np.savez(folder() / "again.npz", **named)
    again = read_archive(folder() / "again.npz", error=ObservationError)
    assert named.keys() == again.keys()
    assert all(np.array_equal(a, again[name], equal_nan=a.dtype.kind in "fc") for name, a in named.items())


@target
def checkpoint(content: bytes) -> None:
    """What ``torch.save`` wrote of a state_dict, as ``convert`` reads it."""
    read = read_checkpoint(put("w.pt", content))
    assert read
    assert sum(t.numel() * t.element_size() for t in read.values()) <= 2 * len(content)


@target
def labels(content: bytes) -> None:
    """The member ``y`` of an archive that is otherwise good."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x.npy", npy(np.zeros((3, 4, 4, 3), np.uint8)))
        archive.writestr("y.npy", content)
    check_images(data.load(DataSpec(source=f"npz:{put('l.npz', stream.getvalue())}", batch=2)))


@target
def image(content: bytes) -> None:
    """An image in a folder."""
    (folder() / "images" / "a").mkdir(parents=True, exist_ok=True)
    put("images/a/x.png", content)
    check_images(data.load(DataSpec(source=f"folder:{folder() / 'images'}", batch=1, size=8)))


@target
def result(content: bytes) -> None:
    """result.json, and the report without pictures that `purge` makes of it."""
    put("result.json", content)
    read = results.read_result(folder())
    json.dumps(read, allow_nan=False)
    quality = read.get("quality") or {}
    render(ReportData(read, images=None, truth=None, snapshots=None, history=[], quality=quality))


@target
def history(content: bytes) -> None:
    """log.jsonl."""
    put("log.jsonl", content)
    rows = results.read_history(folder())
    put("log.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    assert repr(results.read_history(folder())) == repr(rows)  # NaN is not equal to itself


@target
def reconstruction(content: bytes) -> None:
    """reconstruction.safetensors of a run folder that is otherwise good."""
    run = folder() / "run"
    run.mkdir(exist_ok=True)
    (run / "result.json").write_bytes(seeds()["result"][0])
    put("run/reconstruction.safetensors", content)
    read = results.read_run(run)
    evaluate(read.images, Truth(torch.zeros(2, 3, 12, 12), torch.tensor([0, 1])), labels=read.labels, lpips="off")


def check_images(read: Truth) -> None:
    assert read.images.dtype == torch.float32
    assert 0 <= read.images.min() <= read.images.max() <= 1
    if read.labels.is_floating_point():
        assert read.labels.isfinite().all()
    else:
        assert read.labels.dtype == torch.int64
        assert read.labels.min() >= 0


MODEL = ModelSpec(name="lenet", num_classes=3)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def png(size: int, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.arange(size * size * 3, dtype=np.uint8).reshape(size, size, 3)).save(stream, **options)
    return stream.getvalue()


def header(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A safetensors file whose header was changed."""
    length = struct.unpack("<Q", content[:8])[0]
    table = json.loads(content[8 : 8 + length])
    change(table)
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@functools.cache
def seeds() -> dict[str, list[bytes]]:
    """Good files for each target of bytes: what mutations start from."""
    torch.manual_seed(0)
    here = folder()
    batch = Truth(torch.rand(2, 3, 8, 8), torch.tensor([0, 2]), ("a", "b"))
    model = models.build(MODEL, image_shape=(3, 8, 8))
    for name, client in (("fedsgd", ClientSpec()), ("fedavg", ClientSpec(protocol="fedavg", learning_rate=0.1))):
        seen = simulate(FedSGD(model), batch, grant_labels=True, model=MODEL)
        small = {key: t for key, t in seen.update.items() if t.numel() < 100}
        replaced = {"update": small, "weights": {}, "buffers": {}, "protocol": client}
        replaced["defences"] = (DefenceSpec.model_validate({"name": "clip", "norm": 1.0}),)
        Observation(**{**vars(seen), **replaced}).save(here / f"{name}.safetensors")
    batch.save(here / "truth.safetensors")
    Generator(image_shape=(1, 8, 8), latent=2, width=1).save(here / "generator.safetensors")
    run = {"images": torch.rand(2, 3, 12, 12), "labels": torch.tensor([0, 1])}
    run |= {"snapshots": torch.zeros(1, 2, 3, 12, 12, dtype=torch.uint8), "snapshot_rounds": torch.tensor([1])}
    write_tensors(here / "run.safetensors", run, {"format": "gradleak-reconstruction", "version": "1"})
    write_tensors(here / "weights.safetensors", {k: v for k, v in model.state_dict().items() if v.numel() < 200}, {})
    archives = []
    for save in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        save(stream, x=np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3), y=np.array([0, 1]))
        archives.append(stream.getvalue())
    by_name, in_order, saved, nested = (io.BytesIO() for _ in range(4))
    np.savez(by_name, **{"a.weight": np.ones((2, 3), np.float32), "a.bias": np.zeros(2), "steps": np.array(3)})
    np.savez_compressed(in_order, np.ones((2, 3), np.float32), np.asfortranarray(np.ones((2, 2))))
    torch.save({"a.weight": torch.ones(2, 3), "steps": torch.tensor(3)}, saved)
    torch.save({"epoch": 2, "state_dict": {"a.weight": torch.ones(2, 3)}}, nested)
    metrics = {"psnr": {"mean": 20.0, "median": 20.0, "worst": 10.0, "std": 1.0}}
    row = {"round": 1, "loss": 0.5, "learning_rate": 0.1, "seconds": 0.2}
    outcome = {
        "verdict": "2 of 2 images",
        "attack": {"name": "cinet", "rounds": 3, "gain_check": {"sensitivity": 0.1, "applied": 1.0}},
        "matching_loss": 0.01,
        "assumptions": [{"name": "Labels", "value": "granted", "why": "it says so"}],
        "labels": {"rule": "known", "values": [0, 1], "accuracy": 1.0},
        "cost": {"rounds": 3, "seconds": 1.5, "seconds_per_round": 0.5, "peak_memory_mb": 100.0},
        "advice": [{"title": "Clip", "text": "and add noise"}],
        "warnings": ["a warning"],
        "metrics": metrics,
        "per_image": {"psnr": [10.0, 30.0], "ssim": [None, None]},
        "assignment": [1, 0],
        "many_to_one": {"psnr": 20.0, "ssim": None},
        "controls": {"mean image": metrics},
        "notes": {"ssim": "too small"},
        "quality": {"round": [1], "psnr": [20.0], "ssim": [None]},
        "versions": {"python": "3.11"},
        "seed": 0,
        "device": "cpu",
        "stopped": "all rounds",
        "command": "gradleak audit",
    }
    files = {name: (here / f"{name}.safetensors").read_bytes() for name in ("fedsgd", "fedavg", "truth", "generator", "run")}
    tensors = [*files.values(), (here / "weights.safetensors").read_bytes()]
    shapes = [npy(np.array([0, 1, 2])), npy(np.array([0, 1, 2], np.uint8)), npy(np.array([0, 1, 2], np.uint64))]
    return {
        "safetensors": tensors,
        "weights": tensors[-1:],
        "backbone": tensors[-1:],
        "observation": [files["fedsgd"], files["fedavg"]],
        "truth": [files["truth"]],
        "generator": [files["generator"]],
        "reconstruction": [files["run"]],
        "npz": archives,
        "archive": [by_name.getvalue(), in_order.getvalue()],
        "checkpoint": [saved.getvalue(), nested.getvalue()],
        "labels": shapes,
        "image": [
            png(6, format="PNG"),
            *(png(6, format=kind) for kind in ("JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")),
        ],
        "result": [json.dumps(outcome).encode()],
        "history": [(json.dumps(row) + "\n").encode() * 2],
        "specification": [
            spec.dump(spec.load(None)).encode(),
            b'seed = 1\n[data]\nbatch = 2\n[[defence]]\nname = "clip"\nnorm = 1.0\n[attack]\nname = "gias"\n',
        ],
    }
