"""The benchmark programs, tiny: their rows, their censoring, and that a killed one goes on. Their figures are not looked at."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gradleak.attacks import attack
from gradleak.errors import SpecError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("a source distribution has no benchmarks", allow_module_level=True)

KEYS = {"name", "model", "batch", "seconds_per_round", "units", "peak_memory_mb", "ratio_vs_baseline"}
KEYS |= {"command", "commit", "seed", "device", "threads", "versions"}
TINY = ["--model", "resnet18-cifar:4", "--batch", "2", "--data", "sample", "--seeds", "0", "--every", "1"]
TINY += ["--programs", "cinet", "cinet-reference"]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A benchmark, imported as when it is run."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / f"{name}.py")])
        return importlib.import_module(name)

    return load


def rows_in(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    assert rows
    for row in rows:
        assert row.keys() >= KEYS
    return rows


def test_convolutions_are_compared_layer_by_layer(program: Any, tmp_path: Path) -> None:
    convolutions = program("convolutions")
    file = tmp_path / "rows.json"
    convolutions.main(["--layers", "8x4x2", "4x7x1", "--repeats", "2", "--json", str(file)])
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert [(row["layer"], row["name"]) for row in rows] == [(k, p) for k in ("8x4x2", "4x7x1") for p in convolutions.PRODUCTS]
    for row in rows:
        assert row.keys() >= {"command", "commit", "seed", "device", "threads", "versions"}
        assert max(row["errors"]) < 5e-6  # both are the same product
        assert not row["taken"]
        theirs, ours = row["milliseconds"]
        assert row["ratio_vs_torch"] == pytest.approx(theirs / ours, rel=0.01)


def test_step_compares_whole_rounds(program: Any, tmp_path: Path) -> None:
    step = program("step")
    file = tmp_path / "rows.json"
    models = ["--models", "resnet18-cifar:4", "torchvision/resnet18"]
    programs = ["baseline", "cinet", "cinet, mixed, last 90 %"]
    step.main(
        [
            *models,
            "--programs",
            *programs,
            "--batches",
            "2",
            "--max-pixels",
            "4096",
            "--repeats",
            "1",
            "--no-memory",
            "--json",
            str(file),
        ]
    )
    rows = rows_in(file)
    assert [row["name"] for row in rows] == programs  # 256 pixels are too many
    assert rows[0]["ratio_vs_baseline"] == 1
    assert all(row["peak_share"] > 0 and row["units"] > 1 for row in rows)


def test_memory_is_that_of_the_rounds_whatever_the_size_of_who_asks(program: Any) -> None:
    # B = 64 at width 4 keeps some 50 MiB; this process has had more than the whole of that one
    held = b"x" * 2**30  # not zeros: those would take no memory
    del held
    assert program("step").extra_memory("secant", "resnet18-cifar:4", 64, channels=8) > 10


def test_a_goal_that_is_not_reached_is_censored(program: Any, tmp_path: Path) -> None:
    quality = program("time_to_quality")
    file = tmp_path / "rows.json"
    arguments = [*TINY, "--rounds", "cinet=3", "cinet-reference=3", "--goals", "psnr=1", "ssim=0.95"]
    arguments += ["--work", str(tmp_path / "work"), "--json", str(file)]
    quality.main(arguments)
    rows = rows_in(file)
    assert [row["name"] for row in rows] == ["cinet", "cinet-reference"] * 2
    for run, summary in zip(rows[:2], rows[2:], strict=True):
        assert list(run["reached"]) == ["psnr=1"]
        assert run["rounds_run"] == 3
        assert summary["times"]["ssim=0.95"]["seconds"] == [run["seconds"], None]
        assert summary["times"]["psnr=1"]["seconds"] == [run["reached"]["psnr=1"]["seconds"]] * 2
    assert rows[0]["ratio_vs_baseline"] is None  # neither reached SSIM .95
    quality.main(arguments)
    assert rows_in(file)[:2] == rows[:2]  # finished runs are kept


def test_a_run_that_a_limit_stopped_goes_on_and_so_does_its_clock(program: Any, tmp_path: Path) -> None:
    quality = program("time_to_quality")
    file = tmp_path / "rows.json"
    arguments = [*TINY[:-2], "cinet", "--rounds", "cinet=4", "--goals", "ssim=0.95"]
    arguments += ["--work", str(tmp_path / "work"), "--json", str(file)]
    quality.main([*arguments, "--seconds", "1e-6"])
    before = rows_in(file)[0]
    assert before["rounds_run"] == 1
    assert "the limit" in before["stopped"]
    quality.main(arguments)
    after = rows_in(file)[0]
    assert after["rounds_run"] == 4
    assert after["curve"][0] == before["curve"][0]
    assert after["curve"][1]["seconds"] > before["seconds"]
    assert not list((tmp_path / "work").iterdir())


def test_a_program_is_an_attack_or_one_with_settings_of_its_own(program: Any) -> None:
    quality = program("time_to_quality")
    assert quality.recipe("cinet", rounds=3) == attack("cinet", snapshots=0, rounds=3)
    adam = quality.recipe("cinet:optimiser=adam,learning_rate=5e-3", rounds=3)
    assert adam == attack("cinet", snapshots=0, rounds=3, optimiser="adam", learning_rate=5e-3)
    assert quality.pair("cinet:matched=0.4=120") == ("cinet:matched=0.4", 120)
    with pytest.raises(SpecError, match="key=value"):
        quality.recipe("cinet:adam")


def test_medians_and_ratios_of_censored_times_are_bounds(program: Any) -> None:
    quality = program("time_to_quality")
    reached, censored = (2.0, 2.0), (30.0, math.inf)
    assert quality.shown(quality.quotient(censored, reached)) == ">= 15"
    assert quality.shown(quality.quotient(reached, censored)) == "<= 0.0667"
    assert quality.shown(quality.quotient(censored, censored)) == "-"
    # the middle one of three is known though the slowest is not
    assert quality.median([reached, (4.0, 4.0), censored]) == (4.0, 4.0)
    assert quality.shown(quality.median([reached, (40.0, 40.0), censored])) == "30 to 40"
    assert quality.shown(quality.median([reached, censored, censored])) == ">= 30"


def test_scaling_fits_slopes_and_reads_what_audits_cost(program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program("step"), "convolution_peak", lambda device: 1e10)
    scaling = program("scaling")
    assert scaling.fit([1, 2, 4], [3, 6, 12]) == (1.0, 1.0)
    monkeypatch.setattr(scaling, "LAUNCHERS", {"one process": ["-m", "gradleak"], "two processes": ["-m", "gradleak.nothing"]})
    file = tmp_path / "rows.json"
    sizes = ["--width", "4", "--batch", "2", "--batches", "2", "4", "--channels", "8", "--rounds", "2", "--repeats", "1"]
    scaling.main([*sizes, "--axes", "batch", "processes", "--no-memory", "--json", str(file)])
    rows = rows_in(file)
    assert sum("slope" in row for row in rows) == 3  # baseline, cinet, F's forward pass
    one, two = (row for row in rows if row["axis"] == "processes")
    assert one["seconds_per_round"] > 0
    assert one["ratio_vs_baseline"] == 1
    assert "gradleak.nothing" in two["error"]
    assert two["ratio_vs_baseline"] is None
