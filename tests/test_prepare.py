"""Files that a study trains: made once, named by their content, and what the cells' runs take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from gradleak import models
from gradleak.attacks import attack
from gradleak.data import load
from gradleak.dcgan import Generator
from gradleak.errors import DataError, SpecError
from gradleak.spec import DataSpec, ModelSpec
from gradleak.study.prepare import Prepare, prepare
from gradleak.study.spec import StudySpec, cells
from gradleak.tensors import read_tensors


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


def model(**settings: Any) -> Prepare:
    convnet = {"name": "convnet", "width": 4}
    table = {"name": "trained", "kind": "model", "source": "pictures", "images": 8, "size": 8, "rounds": 2, "model": convnet}
    return Prepare.model_validate({**table, **settings})


def generator(**settings: Any) -> Prepare:
    table = {
        "name": "gan",
        "kind": "generator",
        "source": "noise",
        "images": 4,
        "size": 8,
        "rounds": 1,
        "width": 4,
        "latent": 8,
    }
    return Prepare.model_validate({**table, **settings})


def test_files_are_what_runs_take(tmp_path: Path) -> None:
    """Weights that load into F, and a generator of such images; the source's name is looked up."""
    files = prepare([model(), generator()], tmp_path / "prepared", sources={"pictures": "sample"})
    assert sorted(file.name for file in (tmp_path / "prepared").iterdir()) == sorted(file.name for file in files.values())
    spec = ModelSpec(name="convnet", width=4, weights=files["trained"])
    loaded = models.build(spec, image_shape=(3, 8, 8)).state_dict()
    tensors, _ = read_tensors(files["trained"])
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert Generator.load(files["gan"]).image_shape == (3, 8, 8)
    attack("gias", generator=str(files["gan"]))


def test_a_file_that_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same content under another name is the same file; nothing is trained again."""
    first = prepare([generator()], tmp_path, sources={})["gan"]
    written = first.stat().st_mtime_ns
    monkeypatch.setattr("gradleak.study.prepare.data.load", None)
    assert prepare([generator(name="other")], tmp_path, sources={}) == {"other": first}
    assert first.stat().st_mtime_ns == written


def test_training_repeats(tmp_path: Path) -> None:
    one, two = (prepare([model()], tmp_path / n, sources={"pictures": "sample"})["trained"] for n in "ab")
    assert one.name == two.name
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"start": 1}, {"rounds": 3}, {"optimiser": "sgd"}, {"model": ModelSpec()}], ids=str
)
def test_the_key_is_of_everything_that_decides(change: dict[str, Any]) -> None:
    assert model(**change).key != model().key == model(name="other").key
    assert len(model().key) == 16


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"model": None}, "needs the table 'model'"),
        ({"width": 8}, "'width' is a setting of kind 'generator'"),
        ({"kind": "generator"}, "'model' is a setting of kind 'model'"),
        ({"kind": "images"}, "'model' or 'generator'"),
        ({"name": "../x"}, "pattern"),
        ({"image": 3}, "Extra inputs"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(table: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        model(**table)


def test_faults_are_named(tmp_path: Path) -> None:
    """A name twice, and a source that nobody placed; no half of a file is left."""
    with pytest.raises(SpecError, match="two files have one name"):
        prepare([model(), model(seed=1)], tmp_path, sources={})
    with pytest.raises(DataError, match=r"unknown data\.source 'pictures'"):
        prepare([model()], tmp_path, sources={})
    assert list(tmp_path.iterdir()) == []


def test_cells_name_the_file(tmp_path: Path) -> None:
    """A cell's weights are the file that ``prepare`` writes; its key does not depend on the folder."""
    study = StudySpec(
        base={"data": {"batch": 2, "size": 8}, "attack": {"name": "cinet", "rounds": 1}},
        grid={"model": [{"name": "convnet", "width": 4}, {"name": "convnet", "width": 4, "weights": "prepared:trained"}]},
        prepare=[model()],
    )
    _, trained = cells(study, prepared=tmp_path)
    assert trained.spec.model.weights == prepare(study.prepare, tmp_path, sources={"pictures": "sample"})["trained"]
    assert trained.key == cells(study)[1].key
    image = load(DataSpec(batch=2, size=8)).images
    assert models.build(trained.spec.model, image_shape=(3, 8, 8))(image).shape == (2, 10)
