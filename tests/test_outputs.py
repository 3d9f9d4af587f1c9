"""Run folders hold personal data: private, redacted on request, and purged by command."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from gradleak import results
from gradleak.errors import OutputError
from gradleak.results import purge
from gradleak.tensors import write_tensors
from test_cli import call, one_line, read, tiny

PICTURES = {"reconstruction.safetensors", "grid.png"}
ROWS = {"result.json", "log.jsonl", "spec.toml"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``audit`` and ``redacted``, the same run with and without pictures; a capture and its attack, ``run``."""
    folder = tmp_path_factory.mktemp("outputs")
    before = os.umask(0)
    try:
        assert call("audit", *tiny(), "--out", folder / "audit", "--quiet") == 0
        assert call("audit", *tiny(), "--out", folder / "redacted", "--redact", "--quiet") == 0
        files = ("--out", folder / "new" / "update.safetensors", "--truth", folder / "new" / "truth.safetensors")
        assert call("capture", *tiny(), *files) == 0
    finally:
        os.umask(before)
    return folder


def pages(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_everything_is_private_whatever_the_umask(home: Path) -> None:
    """Folders 0700 and files 0600, with a umask that forbids nothing."""
    for path in home.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_the_report_and_the_terminal_say_that_it_is_private(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "This page shows private images" in pages(home / "audit")
    results_of = read(home / "audit")
    assert "redacted" not in results_of


def test_a_redacted_run_has_the_same_figures_and_no_picture(home: Path) -> None:
    whole, redacted = read(home / "audit"), read(home / "redacted")
    assert names(home / "redacted") == names(home / "audit") - PICTURES
    for key in ("metrics", "per_image", "assignment", "quality", "matching_loss", "labels"):
        assert whole[key] == redacted[key]
    assert redacted["redacted"] is True
    page = pages(home / "redacted")
    assert "data:image" not in page
    assert "<img" not in page
    assert "Redacted" in page
    assert "This page shows private images" not in page
    assert f"{whole['metrics']['psnr']['mean']:.1f} dB" in page
    # names of images may be names of files or people
    assert "astronaut" in pages(home / "audit")
    assert "astronaut" not in page + redacted["verdict"]


def test_a_redacted_attack_and_a_redacted_evaluation(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attack = ["--set", "device=cpu", "--set", "attack.rounds=2", "--set", "attack.channels=4", "--quiet"]
    update, truth = home / "new" / "update.safetensors", home / "new" / "truth.safetensors"
    assert call("invert", update, *attack, "--redact", "--out", tmp_path / "blind") == 0
    assert names(tmp_path / "blind") == ROWS | {"report.html"}
    assert "<img" not in pages(tmp_path / "blind")
    assert "It shows private images" not in capsys.readouterr().out
    assert call("evaluate", tmp_path / "blind", "--truth", truth, "--lpips", "off") == 2
    assert "--redact" in one_line(capsys.readouterr().err)
    assert call("invert", update, *attack, "--out", tmp_path / "run") == 0
    assert call("evaluate", tmp_path / "run", "--truth", truth, "--lpips", "off", "--redact") == 0
    assert names(tmp_path / "run") == ROWS | {"report.html"}
    assert read(tmp_path / "run")["metrics"]["psnr"]["mean"] > 0
    assert "<img" not in pages(tmp_path / "run")


def test_purge_keeps_the_rows_and_removes_the_pictures(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every run folder below; files of other programs stay, and so does what links lead to."""
    for name in ("a", "b"):
        shutil.copytree(home / "audit", tmp_path / "matrix" / "cells" / name)
    cell = tmp_path / "matrix" / "cells" / "a"
    rows = {name: (cell / name).read_bytes() for name in ROWS}
    (cell / "mine.png").write_bytes(b"of somebody else")
    (cell / "checkpoint.safetensors").write_bytes(b"half of a checkpoint")
    (cell / "checkpoint.previous.safetensors").write_bytes(b"the one before")
    (cell / ".reconstruction.safetensors.123.tmp").write_bytes(b"left by a killed process")
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(home / "audit", tmp_path / "elsewhere" / "run")
    (tmp_path / "matrix" / "link").symlink_to(tmp_path / "elsewhere")
    assert call("purge", tmp_path / "matrix") == 0
    out = capsys.readouterr().out
    assert "removed: " in out
    assert "may remain" in out
    assert names(cell) == ROWS | {"report.html", "mine.png"}
    assert {name: (cell / name).read_bytes() for name in ROWS} == rows
    page = pages(cell)
    assert "<img" not in page
    assert "data:image" not in page
    assert "Redacted" in page
    assert (cell / "report.html").stat().st_mode & 0o777 == 0o600
    assert names(tmp_path / "matrix" / "cells" / "b") == ROWS | {"report.html"}
    assert names(tmp_path / "elsewhere" / "run") >= PICTURES
    # nothing is left to do, and that is no error
    assert call("purge", tmp_path / "matrix") == 0
    assert call("evaluate", cell, "--truth", home / "new" / "truth.safetensors", "--lpips", "off") == 2
    assert "purged" in one_line(capsys.readouterr().err)


def test_purge_of_a_run_that_was_killed(tmp_path: Path) -> None:
    """There is no result yet: a checkpoint of ours says that it is a run."""
    write_tensors(tmp_path / "checkpoint.safetensors", {"images": torch.rand(1, 3, 4, 4)}, {"format": "gradleak-checkpoint"})
    (tmp_path / "spec.toml").write_text("seed = 1\n")
    (tmp_path / "report.html").write_text("a page with pictures, of which no result is left")
    purge(tmp_path)
    assert names(tmp_path) == {"spec.toml"}


@pytest.mark.parametrize(
    "content", [{}, {"result.json": "{}"}, {"checkpoint.safetensors": "of a training", "grid.png": "mine"}]
)
def test_purge_leaves_other_folders_alone(content: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    assert call("purge", tmp_path) == 2
    assert "no run folder" in one_line(capsys.readouterr().err)
    assert names(tmp_path) == set(content)
    assert call("purge", tmp_path / "absent") == 2
    assert "no such folder" in one_line(capsys.readouterr().err)


def test_purge_leaves_a_run_in_use_alone(home: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    shutil.copytree(home / "audit", tmp_path / "run")
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="in use"):
            purge(tmp_path / "run")
    assert names(tmp_path / "run") >= PICTURES
    purge(tmp_path / "run")
    assert not names(tmp_path / "run") & PICTURES


def test_a_report_that_cannot_be_written_anew_is_removed(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "audit", tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text("{")
    results.purge(tmp_path / "run")
    assert names(tmp_path / "run") == ROWS


def test_help_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    assert "purge" in capsys.readouterr().out
    for command in ("audit", "invert", "evaluate"):
        assert call(command, "--help") == 0
        assert "--redact" in capsys.readouterr().out
