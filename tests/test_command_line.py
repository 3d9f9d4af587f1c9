"""The command line as an interface: help to work from alone, one JSON object, completion, a quick start."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import typer.main

from gradleak import catalogue, cli
from gradleak.attacks import ATTACKS
from gradleak.defences import DEFENCES
from gradleak.models import build
from gradleak.spec import ModelSpec, RunSpec, load
from gradleak.tensors import read_tensors, write_tensors
from test_cli import call

GROUP: Any = typer.main.get_command(cli.app)
COMMANDS = cli.commands()
#: It loses the help of arguments with click 8.5.
OLD_TYPER = tuple(int(part) for part in typer.__version__.split(".")[:2]) < (0, 26)


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    """Threads that wait for each other cost more than these small tensors."""
    torch.set_num_threads(1)


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m gradleak ARGUMENTS`` in a process of its own."""
    command = [sys.executable, "-X", "importtime", "-m", "gradleak", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "COLUMNS": "100", **environment}
    )


@pytest.mark.parametrize("arguments", [["--help"], ["audit", "--help"], ["--version"], ["audit", "--oot", "x"]], ids=" ".join)
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    """Nor for anything else that takes long: the slowest import of them all is well below a second."""
    done = process(*arguments)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "gradleak.cli" in imported
    assert not imported & {"torch", "torchvision", "scipy", "matplotlib", "numpy"}
    if arguments == ["--version"]:
        assert done.stdout.startswith("gradleak ")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With what it stands for, in groups; and each command has examples."""
    assert call(*name.split(), "--help") == 0
    out = capsys.readouterr().out
    assert "Examples:" in out
    assert f"$ gradleak {name}" in out
    for parameter in COMMANDS[name].params:
        assert parameter.help or (OLD_TYPER and parameter.param_type_name == "argument"), parameter.name
        assert parameter.opts[-1] in out or parameter.param_type_name == "argument"
    assert any(parameter.name == "json_" for parameter in COMMANDS[name].params)


def test_the_help_of_all_has_exit_codes_and_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in GROUP.commands)
    assert all(f"\n    {code} " in out for code in ("0", "1", "2", "130", "143"))
    assert "--install-completion" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["adit"], "Did you mean 'audit'?"), (["audit", "--rsume"], "--resume"), (["invert", "x", "--attak", "dlg"], "--attack")],
    ids=str,
)
def test_misspelt_commands_and_options(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("typed", "meant"), [("attack.engine=exat", "exact"), ("labels.rule=count", "counts")])
def test_misspelt_words_of_a_setting(typed: str, meant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("audit", "--set", typed, "--out", tmp_path / "run") == 2
    assert f"did you mean '{meant}'?" in capsys.readouterr().err


def one_object(captured: str) -> dict[str, Any]:
    """What is on standard output: one JSON object, and nothing beside it."""
    found: dict[str, Any] = json.loads(captured)
    assert isinstance(found, dict)
    return found


def test_json_of_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One object on standard output, though the user's own model prints when it is built."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "import torch\n"
        "def build(image_shape):\n"
        "    print('building')\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 10))\n"
    )
    Path("spec.toml").write_text("[data]\nbatch = 2\nsize = 16\n")
    Path("few.toml").write_text(
        'device = "cpu"\n[data]\nbatch = 2\nsize = 16\n[attack]\nrounds = 2\nchannels = 8\n[evaluate]\nlpips = "off"\n'
    )
    few = ["--set", "attack.rounds=2", "--set", "attack.channels=8", "--set", "device=cpu"]
    own = ["--model", "mine.py:build"]

    def run(*arguments: str) -> dict[str, Any]:
        assert call(*arguments, "--json") == 0
        captured = capsys.readouterr()
        assert ("building" in captured.err) == ("--model" in arguments)
        return one_object(captured.out)

    audit = run("audit", "few.toml", *own, "--out", "audit")
    assert audit["report"] == str(tmp_path / "audit" / "report.html")
    assert audit["metrics"] == json.loads(Path("audit/result.json").read_text())["metrics"]
    files = ("--out", "u.safetensors", "--truth", "t.safetensors")
    assert run("capture", "spec.toml", *own, *files) == {
        "update": "u.safetensors",
        "numbers": 7690,
        "images": 2,
        "truth": "t.safetensors",
    }
    assert run("validate", "u.safetensors", *own)["fits"] is True
    weights, _ = read_tensors(Path("u.safetensors"))
    np.savez("gradient.npz", **{name[7:]: t.numpy() for name, t in weights.items() if name.startswith("update/")})
    shape = ("--batch", "2", "--image-shape", "3x16x16")
    assert run("convert", *own, "--gradient", "gradient.npz", *shape, "--out", "c.safetensors")["images"] == 2
    assert "metrics" not in run("invert", "u.safetensors", *own, *few, "--out", "run")
    assert run("evaluate", "run", "--truth", "t.safetensors", "--lpips", "off")["metrics"]["ssim"]["mean"] is not None
    assert run("check", "few.toml", *own)["rounds"] == 2
    table = run("audit", "few.toml", *own, "--set", 'matrix.attacks=["cinet"]', "--out", "table")
    assert [row["attack"] for row in table["rows"]] == ["cinet"]
    purged = run("purge", "run")
    assert str(Path("run", "grid.png")) in purged["removed"]
    trained = run("train-generator", "sample", "--images", "4", "--size", "16", "--rounds", "1", "--width", "4", "--out", "g")
    assert trained["generator"] == "g"
    trained = run("train-model", "sample", *own, "--images", "4", "--size", "16", "--rounds", "1", "--out", "w")
    assert trained["weights"] == "w"
    assert set(run("list")) == set(catalogue.KINDS)
    assert run("list", "attacks")["attacks"]["dlg"]["needs"].startswith("the update alone")
    assert run("list", "attacks", "dlg")["settings"][0]["key"] == "attack.rounds"


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (["audit", "--set", "data.bath=2", "--out", "run"], "SpecError", "did you mean 'batch'?"),
        (["audit", "--out"], "UsageError", "--out"),
        (["audit"], "UsageError", "--out"),
        (["adit", "--out", "run"], "UsageError", "audit"),
        (["evaluate", "absent", "--truth", "t"], "DataError", "no such file"),
    ],
    ids=str,
)
def test_errors_as_json(
    arguments: list[str],
    kind: str,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One object, exit code 2, and the line for people on standard error as ever."""
    monkeypatch.chdir(tmp_path)
    assert call(*arguments[:1], "--json", *arguments[1:]) == 2
    captured = capsys.readouterr()
    error = one_object(captured.out)["error"]
    assert error["kind"] == kind
    assert words in error["message"]
    assert f"gradleak: error: {error['message']}" in captured.err
    assert not list(tmp_path.iterdir())


def test_options_that_stand_for_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--model``, ``--weights`` and ``--attack`` are the settings of that name; ``--set`` has the last word."""
    monkeypatch.chdir(tmp_path)
    few = ["--set", "data.batch=2", "--set", "data.size=16", "--set", "attack.rounds=1", "--set", "evaluate.lpips=off"]
    model = build(ModelSpec(name="lenet", seed=3), image_shape=(3, 16, 16))
    write_tensors(Path("w x.safetensors"), dict(model.state_dict()), {})
    short = ["--model", "lenet", "--weights", "w x.safetensors"]
    assert call("audit", *short, "--attack", "inverting-gradients", *few, "--out", "run", "--quiet") == 0
    spec = load(Path("run/spec.toml"))
    assert (spec.model.name, spec.model.weights, spec.attack["name"]) == (
        "lenet",
        Path("w x.safetensors"),
        "inverting-gradients",
    )
    assert call("capture", *short, "--set", "model.name=convnet", *few, "--out", "u") == 2  # the weights are lenet's
    assert call("capture", *short, *few, "--out", "u") == 0
    sent, _ = read_tensors(Path("u"))
    assert torch.equal(sent["weights/fc.weight"], model.get_parameter("fc.weight"))
    assert call("invert", "u", "--attack", "inverting-gradients", "--set", "attack.rounds=1", "--out", "again", "--quiet") == 0
    assert load(Path("again/spec.toml")).attack["name"] == "inverting-gradients"


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("gradleak audit --set client.pro", ["client.protocol="]),
        (
            "gradleak audit --set client.protocol=",
            ["client.protocol=fedsgd", "client.protocol=fedavg", "client.protocol=average"],
        ),
        ("gradleak list de", ["defences"]),
        ("gradleak pur", ["purge"]),
    ],
)
def test_completion_in_a_shell(line: str, offered: list[str]) -> None:
    """As bash asks for it, without torch."""
    code = "import sys; from gradleak.cli import main; sys.argv = ['gradleak']; main()"
    words = {"_GRADLEAK_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **words},
    )
    assert done.stdout.split() == offered
    assert "| torch\n" not in done.stderr


@pytest.mark.parametrize(("kind", "name"), [("attacks", n) for n in ATTACKS] + [("defences", n) for n in DEFENCES], ids=str)
def test_every_setting_has_its_meaning(kind: str, name: str) -> None:
    """Read from the docstring where the field is; and its default is the preset's."""
    entry = catalogue.entry(kind, name)
    fields = dataclasses.fields(ATTACKS[name][0] if kind == "attacks" else DEFENCES[name][0])  # type: ignore[arg-type]
    assert [setting.key.removeprefix("attack.") for setting in entry.settings] == [field.name for field in fields]
    for setting in entry.settings:
        assert setting.meaning, setting.key
        assert not any(mark in setting.meaning + entry.text for mark in ("\\", ":class:", ":math:", "``")), setting
        assert "value" not in setting.type.split()
        if kind == "attacks":
            assert setting.default == getattr(ATTACKS[name][0], setting.key.removeprefix("attack."))


def test_every_key_of_a_specification_has_its_meaning() -> None:
    found = {setting.key: setting for table in catalogue.tables() for setting in catalogue.entry("settings", table).settings}
    for name, field in RunSpec.model_fields.items():
        for key in getattr(field.annotation, "model_fields", {}):
            assert found[f"{name}.{key}"].meaning
    assert all(setting.meaning for setting in found.values())


def test_public_names_are_functions_and_not_modules() -> None:
    """In any order of imports: `gradleak.invert` and `gradleak.evaluate` have the names of their modules."""
    code = (
        "import gradleak.invert, gradleak.evaluate, gradleak\n"
        "from gradleak import api\n"
        "assert all(getattr(gradleak, name) is getattr(api, name) for name in api.__all__)\n"
        "assert set(api.__all__) == set(gradleak.__all__) <= set(dir(gradleak))\n"
        "assert gradleak.federation.__name__ == 'gradleak.federation'\n"
        "import copy\n"  # by what Ray serialises too: a function that uses the package must reach its workers
        "assert copy.deepcopy(gradleak) is gradleak\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
