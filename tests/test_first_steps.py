"""What a new user does first and wrong: each is told in one line, or at the top of the report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gradleak import cli, run
from gradleak.data import load
from gradleak.errors import DataError, ModelError, SpecError
from gradleak.models import build
from gradleak.observation import Truth
from gradleak.spec import DataSpec, ModelSpec, parse

SCRIPT = "import sys\nfrom torch import nn\nfrom neighbour import outputs\n"


def tiny(**more: Any) -> dict[str, Any]:
    return {
        "data": {"batch": 2, "size": 8},
        "model": {"name": "lenet", **more},
        "attack": {"name": "cinet", "rounds": 2, "channels": 4},
        "evaluate": {"lpips": "off"},
        "device": "cpu",
    }


def said(result: dict[str, Any]) -> dict[str, str]:
    return {row["name"]: row["value"] for row in result["assumptions"]}


def test_the_assumptions_always_name_the_normalisation(tmp_path: Path) -> None:
    plain = run.audit(parse(tiny()), tmp_path / "a", progress=False)
    assert said(plain)["Normalisation of the images"] == "none"
    declared = run.audit(parse(tiny(mean=[0.5] * 3, std=[0.2] * 3)), tmp_path / "b", progress=False)
    assert said(declared)["Normalisation of the images"] == "mean 0.5, 0.5, 0.5; std 0.2, 0.2, 0.2"
    assert "images normalised by mean 0.5" in (tmp_path / "b" / "report.html").read_text()


def outcome(**more: Any) -> dict[str, Any]:
    return {
        "labels": {"rule": "counts", "accuracy": 1.0},
        "assumptions": [{"name": "Defences", "value": "none"}, {"name": "Client", "value": "FedSGD"}],
        "matching_loss": 1e-4,
        "attack": {"distance": "cosine"},
        **more,
    }


def test_a_report_says_why_an_attack_may_have_missed_something() -> None:
    """Nothing where all is well; wrong labels, a high loss and one class each in a sentence; not what a defence explains."""
    two, one = (Truth(torch.rand(2, 3, 8, 8), torch.tensor(labels)) for labels in ([0, 1], [1, 1]))
    assert run.weaknesses(outcome(), two) == []
    assert "Only 50 %" in run.weaknesses(outcome(labels={"rule": "counts", "accuracy": 0.5}))[0]
    assert "distance of the updates is still 4.0e-02" in run.weaknesses(outcome(matching_loss=0.04))[0]
    whitened = {"distance": "whitened", "cosine_distance": 0.04}
    assert "distance of the updates is still 4.0e-02" in run.weaknesses(outcome(attack=whitened))[0]
    assert run.weaknesses(outcome(matching_loss=0.04, attack={**whitened, "cosine_distance": 1e-4})) == []
    defended = [{"name": "Defences", "value": "sign"}]
    assert run.weaknesses(outcome(matching_loss=0.04, assumptions=defended)) == []
    assert run.weaknesses(outcome(matching_loss=0.04, attack={"distance": "squared-l2"})) == []
    assert "one class" in run.weaknesses(outcome(), one)[0]


def test_a_model_file_may_import_its_neighbour_and_must_not_end_the_program(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("outputs = 4\n")
    (tmp_path / "net.py").write_text(
        SCRIPT + "def net(): return nn.Sequential(nn.Flatten(), nn.Linear(192, outputs))\nif len(sys.argv) > 99: sys.exit(3)\n"
    )
    assert build(ModelSpec(name=f"{tmp_path / 'net.py'}:net"), image_shape=(3, 8, 8))(torch.rand(1, 3, 8, 8)).shape == (1, 4)
    (tmp_path / "script.py").write_text("import argparse\nargparse.ArgumentParser().parse_args(['--unknown'])\n")
    with pytest.raises(ModelError, match=r"ended the program while it was imported.*__main__"):
        build(ModelSpec(name=f"{tmp_path / 'script.py'}:net"), image_shape=(3, 8, 8))
    with pytest.raises(ModelError, match=r"net\.py:FUNCTION"):
        build(ModelSpec(name=str(tmp_path / "net.py")), image_shape=(3, 8, 8))
    with pytest.raises(ModelError, match=r"3x16x16 \(C x H x W\).*data\.size"):
        build(ModelSpec(name=f"{tmp_path / 'net.py'}:net"), image_shape=(3, 16, 16))


def test_a_folder_without_its_prefix_and_means_of_0_to_255(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'folder:"):
        load(DataSpec(source=str(tmp_path)))
    with pytest.raises(SpecError, match=r"divide those of images in 0\.\.255"):
        parse(tiny(mean=[123.7, 116.3, 103.5]))


def test_defences_by_name_alone() -> None:
    spec = parse({"defence": ["sign", {"name": "clip", "norm": 1.0}]})
    assert [defence.name for defence in spec.defence] == ["sign", "clip"]


def test_truths_outside_the_unit_range_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found \[-2, 2\].*images \* std \+ mean"):
        Truth(torch.tensor([-2.0, 2.0]).repeat(1, 3, 2, 1), torch.tensor([0])).save(tmp_path / "t.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["invert", "my.toml", "--out", "run"], "gradleak audit my.toml"),
        (["convert", "--gradient", "g.npz", "--batch", "1", "--image-shape", "3x8x8", "--out", "u.safetensors"], "--model"),
    ],
    ids=["a specification to invert", "convert without a model"],
)
def test_the_other_command_is_named(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gradleak", *arguments])
    with pytest.raises(SystemExit) as leave:
        cli.main()
    assert leave.value.code == 2
    assert words in capsys.readouterr().err
