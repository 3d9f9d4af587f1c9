"""Runs that are interrupted and go on, as the command line does it; and what a report says of trouble."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradleak import cli
from gradleak.attacks import attack
from gradleak.client import FedSGD, simulate
from gradleak.data import load
from gradleak.errors import OutputError
from gradleak.folder import lock_folder, open_folder
from gradleak.invert import Reconstruction, invert
from gradleak.labels import recover
from gradleak.observation import Observation
from gradleak.spec import DataSpec

TINY = {
    "data.batch": "2",
    "data.size": "16",
    "model.name": "lenet",
    "model.activation": "sigmoid",
    "attack.channels": "4",
    "attack.rounds": "6",
    "evaluate.lpips": "off",
    "device": "cpu",
    "threads": "1",
}

LOSS = """
import os, signal
from pathlib import Path
from torch.nn.functional import cross_entropy

calls = Path(__file__).with_name("calls")

def loss(output, labels):
    left = int(calls.read_text()) - 1
    calls.write_text(str(left))
    if left == 0:
        os.kill(os.getpid(), signal.{signal})
    return cross_entropy(output, labels)
"""


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def interrupting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a loss that sends a signal to its own process at its nth call; n is in the file ``calls``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loss.py").write_text(LOSS.replace("{signal}", "SIGTERM"))
    (tmp_path / "calls").write_text("-1")
    return tmp_path


def call(*arguments: str | Path, **changed: str) -> int:
    settings = [part for key, value in {**TINY, **changed}.items() for part in ("--set", f"{key}={value}")]
    sys.argv = ["gradleak", *(str(a) for a in arguments), *(settings if arguments[0] == "audit" else [])]
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert isinstance(end.value.code, int)
    return end.value.code


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def numbers(folder: Path) -> dict[str, Any]:
    """What must not depend on an interruption."""
    result = read(folder)
    kept = {key: result[key] for key in ("metrics", "matching_loss", "best_round", "verdict", "stopped", "warnings", "partial")}
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    return {**kept, "losses": losses, "bytes": (folder / "reconstruction.safetensors").read_bytes()}


def test_a_signal_and_resume(interrupting: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 143, a partial result that says so, no other file than documented; then the undisturbed result."""
    own = {"client.loss": "loss.py:loss"}
    assert call("audit", "--out", interrupting / "whole", **own) == 0
    (interrupting / "calls").write_text("15")
    out = interrupting / "run"
    assert call("audit", "--out", out, **own) == 143
    assert "--resume" in capsys.readouterr().err
    partial = read(out)
    assert partial["partial"] is True
    assert partial["interrupted"] == "SIGTERM"
    assert partial["verdict"].startswith("Partial result")
    assert any(text.startswith("Partial result: interrupted by SIGTERM after round") for text in partial["warnings"])
    assert 1 <= partial["cost"]["rounds"] < 6
    assert "Partial result: interrupted by SIGTERM" in (out / "report.html").read_text()
    assert (out / "checkpoint.safetensors").stat().st_mode & 0o777 == 0o600
    assert call("audit", "--out", out, **own) == 2
    assert "unfinished run: go on with --resume" in capsys.readouterr().err
    assert call("audit", "--resume", "--out", out, **own) == 0
    assert numbers(out) == numbers(interrupting / "whole")
    assert {file.name for file in out.iterdir()} == {file.name for file in (interrupting / "whole").iterdir()}


def test_resume_finds_its_own_specification(interrupting: Path) -> None:
    """Without a specification and --set, the folder's spec.toml is used."""
    own = {"client.loss": "loss.py:loss"}
    assert call("audit", "--out", interrupting / "whole", **own) == 0
    (interrupting / "calls").write_text("15")
    assert call("audit", "--out", interrupting / "run", **own) == 143
    sys.argv = ["gradleak", "audit", "--resume", "--out", str(interrupting / "run")]
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert numbers(interrupting / "run") == numbers(interrupting / "whole")


def test_an_interruption_during_the_control(interrupting: Path) -> None:
    """The attack is done and kept; the control goes on."""
    own = {"client.loss": "loss.py:loss", "evaluate.controls": "true"}
    (interrupting / "calls").write_text("10000")
    assert call("audit", "--out", interrupting / "whole", **own) == 0
    used = 10000 - int((interrupting / "calls").read_text())
    (interrupting / "calls").write_text(str(used - 10))
    out = interrupting / "run"
    assert call("audit", "--out", out, **own) == 143
    assert "controls" not in read(out)
    assert "after the attack" in read(out)["warnings"][-1]
    assert call("audit", "--resume", "--out", out, **own) == 0
    assert numbers(out) == numbers(interrupting / "whole")
    assert read(out)["controls"] == read(interrupting / "whole")["controls"]


def test_invert_resumes(interrupting: Path) -> None:
    update = interrupting / "update.safetensors"
    settings = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    sys.argv = ["gradleak", "capture", *settings, "--set", "client.loss=loss.py:loss", "--out", str(update)]
    with pytest.raises(SystemExit):
        cli.main()
    attacked = ["--loss", "loss.py:loss", "--set", "attack.channels=4", "--set", "attack.rounds=6", "--set", "threads=1"]
    assert call("invert", update, *attacked, "--out", interrupting / "whole") == 0
    (interrupting / "calls").write_text("12")
    assert call("invert", update, *attacked, "--out", interrupting / "run") == 143
    assert call("invert", update, *attacked, "--out", interrupting / "run", "--resume") == 0
    whole, run = (interrupting / name / "reconstruction.safetensors" for name in ("whole", "run"))
    assert run.read_bytes() == whole.read_bytes()
    assert read(interrupting / "run")["partial"] is False
    other = Observation.load(update, loss="loss.py:loss")
    changed = {name: 2 * t for name, t in other.update.items()}
    dataclasses.replace(other, update=changed).save(interrupting / "other.safetensors")
    assert call("invert", interrupting / "other.safetensors", *attacked, "--out", interrupting / "run", "--resume") == 2


def test_resuming_what_is_finished_or_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An absent run begins; a finished one is left alone, and its result is told again."""
    assert call("audit", "--resume", "--out", tmp_path / "run") == 0
    told = capsys.readouterr().out
    stamps = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()}
    assert call("audit", "--resume", "--out", tmp_path / "run") == 0
    assert capsys.readouterr().out == told
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()} == stamps


def test_resuming_another_run_names_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key that changes the numbers is an error; the number of threads is not."""
    assert call("audit", "--out", tmp_path / "run") == 0
    before = numbers(tmp_path / "run")
    assert call("audit", "--resume", "--out", tmp_path / "run", **{"attack.rounds": "7"}) == 2
    assert "attack.rounds was 6 and is 7" in capsys.readouterr().err
    assert call("audit", "--resume", "--out", tmp_path / "run", threads="2", checkpoint_seconds="5") == 0
    assert call("audit", "--resume", "--force", "--out", tmp_path / "run") == 2
    assert "give one of them" in capsys.readouterr().err
    assert numbers(tmp_path / "run") == before


def test_a_folder_belongs_to_one_process(tmp_path: Path) -> None:
    """The lock is exclusive, is released, and leaves nothing behind; remains of a killed run are swept up."""
    out = tmp_path / "run"
    with open_folder(out):
        (out / ".checkpoint.safetensors.1234.tmp").write_bytes(b"half")
        with pytest.raises(OutputError, match="in use by another gradleak process"), lock_folder(out):
            pass
        (out / "spec.toml").write_text("")
    with open_folder(out, resume=True):
        assert {file.name for file in out.iterdir()} == {".lock", "spec.toml"}
    assert {file.name for file in out.iterdir()} == {"spec.toml"}
    (out / "mine.txt").write_text("not a run's")
    with open_folder(out, force=True):
        pass
    assert {file.name for file in out.iterdir()} == {"mine.txt"}


class Hiccup:
    """Mean cross-entropy that is NaN at one call."""

    def __init__(self, call: int) -> None:
        self.calls, self.call = 0, call

    def __call__(self, output: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return cross_entropy(output, labels) * (float("nan") if self.calls == self.call else 1)


def attacked(loss: Any, **settings: Any) -> Reconstruction:
    truth = load(DataSpec(source="sample", batch=2, size=16))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(512, 10))
    observation = simulate(FedSGD(model), truth)
    client = FedSGD(model, loss=loss)
    recipe = attack("cinet", **{"channels": 8, "engine": "exact", "gain": "free", **settings})
    return invert(observation, recipe, client=client, labels=recover("known", observation, client), progress=False)


def test_one_loss_that_is_nan_costs_a_smaller_step(caplog: pytest.LogCaptureFixture) -> None:
    """The run goes on from a good state with a tenth of the step, does all its rounds, and says so."""
    found = attacked(Hiccup(25), rounds=30, learning_rate=5e-3, schedule="constant")
    assert found.rounds == 30
    assert found.stopped == "all 30 rounds done"
    assert "became nan in round" in found.warnings[0]
    assert "with a tenth of the step" in caplog.text
    rates = [row["learning_rate"] for row in found.history]
    assert rates[0] == pytest.approx(5e-3)
    assert rates[-1] == pytest.approx(5e-4)
    assert all(math.isfinite(row["loss"]) for row in found.history)
    healthy = attacked(cross_entropy, rounds=30, learning_rate=5e-3, schedule="constant")
    assert found.matching_loss < healthy.history[10]["loss"]


def test_a_plateau_is_reported() -> None:
    """Steps too small to move anything: the report says since when nothing happened."""
    still = attacked(cross_entropy, rounds=40, optimiser="sgd", learning_rate=1e-9, schedule="constant")
    assert any(
        text.startswith("Plateau: the matching loss has not fallen by 1 % since round 1 of 40") for text in still.warnings
    )
    assert not attacked(cross_entropy, rounds=40).warnings


OWN = """
import torch
from torch import nn

class Blind(nn.Module):
    '''Its output does not depend on the images.'''

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(10))

    def forward(self, images):
        return self.bias.expand(len(images), 10) + 0 * images.mean()

def build(image_shape, num_classes=10):
    return Blind()
"""


def test_an_update_that_does_not_depend_on_the_images_is_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(OWN)
    own = {"model.name": "models.py:build", "model.activation": "model", "attack.rounds": "2"}
    assert call("audit", "--out", tmp_path / "run", **own) == 0
    result = read(tmp_path / "run")
    assert "The update does not depend on the images" in result["verdict"]
    assert "The update does not depend on the images" in (tmp_path / "run" / "report.html").read_text()
