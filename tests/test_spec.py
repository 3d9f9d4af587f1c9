"""A run's specification: TOML, overrides, the nearest known key, and one form for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gradleak.attacks import ATTACKS, attack
from gradleak.errors import SpecError
from gradleak.run import resolve
from gradleak.spec import MAX_SPEC_BYTES, RunSpec, dump, load, override, parse

FULL = """
seed = 3
device = "cpu"
threads = 2

[data]
source = "npz:batch.npz"
batch = 4
start = 2
size = 64

[model]
name = "convnet"
width = 8
num_classes = 4
activation = "tanh"
weights = "w.safetensors"
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]

[client]
mode = "eval"

[labels]
rule = "counts"

[attack]
name = "cinet-paper"
rounds = 7
learning_rate = 1e-3

[evaluate]
lpips = "off"
controls = true
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(FULL)
    return path


def test_the_embedded_default_needs_nothing() -> None:
    spec = load()
    assert spec.data.source == "sample"
    assert spec.attack["name"] == "cinet"
    assert spec == load(None, [])


def test_every_table_of_a_file(file: Path) -> None:
    spec = load(file)
    assert (spec.seed, spec.device, spec.threads) == (3, "cpu", 2)
    assert (spec.data.source, spec.data.batch, spec.data.start, spec.data.size) == ("npz:batch.npz", 4, 2, 64)
    assert (spec.model.name, spec.model.activation, spec.model.weights) == ("convnet", "tanh", Path("w.safetensors"))
    assert spec.client.mode == "eval"
    assert spec.labels.rule == "counts"
    assert spec.attack == {"name": "cinet-paper", "rounds": 7, "learning_rate": 1e-3}
    assert spec.evaluate.controls


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("data.batch=5", ("data", "batch"), 5),
        (" data.batch = 5 ", ("data", "batch"), 5),
        ("data.source=folder:/a b=c", ("data", "source"), "folder:/a b=c"),  # no quotes needed, and '=' may follow
        ('data.source="sample"', ("data", "source"), "sample"),
        ("evaluate.controls=false", ("evaluate", "controls"), False),
        ("model.mean=[0.1, 0.2, 0.3]", ("model", "mean"), [0.1, 0.2, 0.3]),
        ("model.weights=other.safetensors", ("model", "weights"), Path("other.safetensors")),
        ("seed=9", ("seed",), 9),
        ("attack.rounds=11", ("attack", "rounds"), 11),
        ("attack.channels=paper", ("attack", "channels"), "paper"),
    ],
)
def test_set_changes_one_key_and_nothing_else(file: Path, text: str, path: tuple[str, ...], value: Any) -> None:
    found, before = load(file, [text]).model_dump(), load(file).model_dump()
    assert without(found, path) == without(before, path)
    for key in path:
        found = found[key]
    assert found == value
    assert load(file, ["seed=1", "seed=2"]).seed == 2  # the last one counts


def without(table: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    if len(path) == 1:
        return {k: v for k, v in table.items() if k != path[0]}
    return {k: without(v, path[1:]) if k == path[0] else v for k, v in table.items()}


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("data.bath", "batch"),
        ("data.sourse", "source"),
        ("model.activations", "activation"),
        ("modle.name", "model"),
        ("sed", "seed"),
        ("evaluate.control", "controls"),
        ("client.mod", "mode"),
        ("labels.rules", "rule"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, suggestion: str) -> None:
    with pytest.raises(SpecError) as error:
        load(None, [f"{key}=1"])
    assert f"did you mean {suggestion!r}" in str(error.value)
    assert key.split(".")[-1] in str(error.value) or key.split(".")[0] in str(error.value)


def test_an_unknown_key_without_a_likeness_lists_what_there_is() -> None:
    with pytest.raises(SpecError, match=r"data.*zzz.*known are: batch"):
        load(None, ["data.zzz=1"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data.batch=many", ["data.batch", "integer", "'many'"]),
        ("data.batch=0", ["data.batch", "greater than or equal to 1", "0"]),
        ("data.batch=2.5", ["data.batch", "integer", "2.5"]),
        ("data.size=4", ["data.size", "8"]),
        ("data.download=perhaps", ["data.download", "boolean", "'perhaps'"]),
        ("data=3", ["data", "3"]),
        ("attack=3", ["attack", "dictionary", "3"]),
        ("model.activation=sigmoidal", ["model.activation", "sigmoid", "'sigmoidal'"]),
        ("model.std=[1, 0, 1]", ["model.std", "positive"]),
        ("model.mean=grey", ["model.mean", "list"]),
        ("client.mode=training", ["client.mode", "'train' or 'eval'"]),
        ("client.protocol=fedsdg", ["client.protocol", "fedsgd"]),
        ("labels.rule=guess", ["labels.rule", "idlg"]),
        ("seed=-1", ["seed", "0"]),
        ("threads=0", ["threads", "1"]),
        ("seed.more=1", ["seed"]),
        ("novalue", ["--set", "key=value"]),
        ("=3", ["--set", "key=value"]),
    ],
)
def test_a_wrong_value_is_named_by_its_key(text: str, words: list[str]) -> None:
    with pytest.raises(SpecError) as error:
        load(None, ["seed=4", text])
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(SpecError) as error:
        load(None, ["data.bath=1", "data.size=1", "client.mode=x"])
    assert all(key in str(error.value) for key in ("data.bath", "data.size", "client.mode"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[data\nbatch = 1", ["not valid TOML", "line 1"]),
        (b"seed = 1\nseed = 2", ["not valid TOML"]),
        (b"\xff\xfe\x00", ["not UTF-8"]),
        (b"#" * (MAX_SPEC_BYTES + 1), ["larger than"]),
        (b"[data]\nbath = 1", ["data.bath", "batch"]),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, words: list[str]) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(SpecError) as error:
        load(path)
    assert all(word in str(error.value) for word in [str(path), *words]), error.value


@pytest.mark.parametrize("name", ["absent.toml", "."])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match=r"no such file.*expected a TOML specification"):
        load(tmp_path / name)


@pytest.mark.parametrize("overrides", [[], ["seed=5", "threads=1", "attack.channels=paper"], ["model.width=3"]])
def test_dump_and_load_are_inverse(file: Path, tmp_path: Path, overrides: list[str]) -> None:
    """Also through a file, and with every setting of the attack written out."""
    for spec in (load(file, overrides), load(None, overrides)):
        assert written(dump(spec), tmp_path) == spec
        resolved = resolve(spec, attack(**spec.attack))
        again = written(dump(resolved), tmp_path)
        assert attack(**again.attack) == attack(**spec.attack)
        assert dump(again) == dump(resolved)


def written(text: str, folder: Path) -> RunSpec:
    path = folder / "again.toml"
    path.write_text(text, encoding="utf-8")
    return load(path)


def test_parse_leaves_its_argument_alone() -> None:
    table = {"data": {"batch": 2}}
    assert parse(table) == override(table, [])
    assert table == {"data": {"batch": 2}}
    load(None, ["data.batch=1"])
    assert load().data.batch != 1  # the embedded default is not changed by an override


@pytest.mark.parametrize("name", list(ATTACKS))
def test_every_attack_survives_its_own_settings(name: str) -> None:
    recipe = attack(name)
    assert recipe == ATTACKS[name][0]
    assert attack(name, rounds=3).rounds == 3


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("cinett", {}, ["attack.name", "'cinett'", "did you mean 'cinet'"]),
        ("cinet", {"round": 3}, ["attack.round", "did you mean 'rounds'"]),
        ("cinet", {"rounds": "many"}, ["attack.rounds", "integer", "'many'"]),
        ("cinet", {"rounds": 0}, ["attack.rounds", "1"]),
        ("cinet", {"engine": "quick"}, ["attack.engine", "secant"]),
        ("cinet", {"channels": "wide"}, ["attack.channels", "paper"]),
        ("cinet", {"channels": 0}, ["attack.channels"]),
        ("cinet", {"channels": -8}, ["attack.channels"]),
        ("cinet", {"learning_rate": 0}, ["attack.learning_rate"]),
        ("cinet", {"learning_rate": float("inf")}, ["attack.learning_rate", "finite"]),
        ("cinet", {"learning_rate": float("nan")}, ["attack.learning_rate"]),
        ("cinet", {"activation": "sigmoid"}, ["attack.activation", "silu"]),
    ],
)
def test_attack_settings_are_checked(name: str, settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SpecError) as error:
        attack(name, **settings)
    assert all(word in str(error.value) for word in words), error.value
