"""Studies: cells and their names, runs that are kept, killed and resumed, rows."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow.parquet
import pytest
import torch

from gradleak.errors import OutputError, SpecError
from gradleak.folder import lock_folder
from gradleak.results import read_result
from gradleak.spec import RunSpec
from gradleak.study import runner, store
from gradleak.study.spec import Cell, StudySpec, cells, dump_study, load_studies, load_study
from test_cli import call

TINY = """
title = "A study of tests"
size = "small"
seeds = [0, 1]
[base]
data = { source = "sample", batch = 2, size = 16 }
model = { name = "lenet", width = 2, num_classes = 8 }
attack = { channels = 4 }
device = "cpu"
checkpoint_seconds = 0
evaluate = { lpips = "off", candidates = 4 }
[grid]
attack = [{ name = "cinet" }, { name = "inverting-gradients" }]
[budget]
rounds = 3
[[published]]
where = { "attack.name" = "cinet" }
method = "CI-Net"
ssim = [1.0, 0.0]
psnr = 33.7
"""


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


def study(folder: Path, text: str = TINY) -> Path:
    (path := folder / "tiny.toml").write_text(text)
    return path


def loaded(folder: Path, text: str = TINY, **options: Any) -> StudySpec:
    return load_study(study(folder, text), **options)


def keys(spec: StudySpec) -> list[str]:
    return [cell.key for cell in cells(spec)]


def outcome(folder: Path) -> dict[str, Any]:
    """What two runs of one cell have in common to the last bit."""
    result = read_result(folder)
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    picture = (folder / "reconstruction.safetensors").read_bytes()
    return {"losses": losses, "metrics": result["metrics"], "pictures": picture, "best": result["best_round"]}


def test_the_grid_is_a_product_with_seeds_innermost(tmp_path: Path) -> None:
    found = cells(loaded(tmp_path, TINY.replace("[budget]", "data.batch = [2, 3]\n[budget]")))
    assert [(c.label, c.seed) for c in found][:4] == [
        ("cinet, batch 2", 0),
        ("cinet, batch 2", 1),
        ("cinet, batch 3", 0),
        ("cinet, batch 3", 1),
    ]
    assert len(found) == 8
    assert len({c.key for c in found}) == 8
    assert all(c.spec.seed == c.spec.model.seed == c.seed for c in found)
    assert {c.spec.attack["rounds"] for c in found} == {3}
    # an attack takes of [base] what it has
    assert [c.spec.attack.get("channels") for c in found] == [4] * 4 + [None] * 4
    assert found[0].published is not None
    assert found[0].published.psnr == (33.7, None)
    assert found[-1].published is None


def test_overrides_change_some_cells_and_skip_others(tmp_path: Path) -> None:
    text = TINY + '[[override]]\nwhere = { "attack.name" = "cinet", seed = 1 }\nset = { "attack.rounds" = 7 }\n'
    text += '[[override]]\nwhere = { "attack.name" = "inverting-gradients" }\nskip = true\n'
    assert [c.spec.attack["rounds"] for c in cells(loaded(tmp_path, text))] == [3, 7]
    assert [c.spec.attack["rounds"] for c in cells(loaded(tmp_path, text, overrides=["attack.rounds=2"]))] == [2, 2]


def test_a_slow_start_does_not_count_for_the_rounds_that_a_time_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of .1 s after some that waited for a busy processor: a hundred of them in ten seconds."""
    now, rounds = 0.0, iter([4.0, 0.5, 0.5, *[0.1] * 20])

    def attacked(*_: object, stop: Callable[[], str], **__: object) -> SimpleNamespace:
        nonlocal now
        for elapsed in rounds:
            now += elapsed
            if stop():
                break
        return SimpleNamespace(history=[])

    monkeypatch.setattr(runner, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(runner, "TIMED_ROUNDS", 8)
    monkeypatch.setattr(runner.run, "prepare", lambda spec: (None, None))
    monkeypatch.setattr(runner.run, "simulate_client", lambda spec: SimpleNamespace(observation=None, model=None))
    monkeypatch.setattr(runner.run, "attack_observation", attacked)
    assert runner.rounds_within(RunSpec(), 10.0) == 100


def test_seconds_are_for_cells_without_rounds(tmp_path: Path) -> None:
    text = TINY.replace("rounds = 3", "seconds = 9").replace('"cinet" }', '"cinet", rounds = 5 }').replace("[0, 1]", "[0]")
    assert [c.seconds for c in cells(loaded(tmp_path, text))] == [None, 9]
    assert [c.seconds for c in cells(loaded(tmp_path, text, overrides=["attack.rounds=2"]))] == [None, None]
    text += '[[override]]\nwhere = { "attack.name" = "cinet" }\nseconds = 4\n'
    found = cells(loaded(tmp_path, text))
    assert [c.seconds for c in found] == [4, 9]
    assert found[0].spec.attack["rounds"] == 1000  # the attack's own; those that fit are measured


def test_an_axis_of_ones_own_name_changes_several_keys(tmp_path: Path) -> None:
    axis = 'images = [{ label = "two", data = { batch = 2 } }, { label = "noisy", "data.batch" = 3, defence = ["sign"] }]\n'
    text = TINY.replace("[budget]", f"{axis}[budget]")
    found = [c for c in cells(loaded(tmp_path, text)) if c.seed == 0 and c.settings["attack.name"] == "cinet"]
    assert [(c.label, c.spec.data.batch, len(c.spec.defence)) for c in found] == [("cinet, two", 2, 0), ("cinet, noisy", 3, 1)]
    assert found[1].settings == {"attack.name": "cinet", "images": "noisy"}


def test_a_key_is_what_decides_the_result_and_nothing_else(tmp_path: Path) -> None:
    first = keys(loaded(tmp_path))
    assert keys(loaded(tmp_path, overrides=["threads=2", "checkpoint_seconds=9", "evaluate.candidates=9"])) == first
    assert keys(loaded(tmp_path, TINY.replace("A study of tests", "Another title"))) == first
    # an edited study re-uses what it still has
    assert set(keys(loaded(tmp_path, TINY.replace("[0, 1]", "[0, 1, 2]")))) > set(first)
    for change in ("attack.rounds=4", "data.start=1", "model.width=3", "evaluate.controls=true", "attack.learning_rate=0.2"):
        assert not set(keys(loaded(tmp_path, overrides=[change]))) & set(first), change
    assert not set(keys(loaded(tmp_path, TINY.replace("rounds = 3", "seconds = 3")))) & set(first)


def test_where_images_lie_is_not_in_a_key(tmp_path: Path) -> None:
    text = TINY.replace('"sample"', '"pictures"')
    here, there = (loaded(tmp_path, text, sources={"pictures": f"folder:{tmp_path / name}"}) for name in "ab")
    assert keys(here) == keys(there)
    assert cells(here)[0].spec.data.source == f"folder:{tmp_path / 'a'}"
    assert cells(here)[0].dataset == "pictures"
    done = runner.run_studies([loaded(tmp_path, text)], tmp_path / "out", processes=1, progress=False)
    assert {each.outcome for each in done} == {"failed"}
    assert "'pictures' is no data source by itself; say where the images are with --source pictures=" in done[0].reason


def test_a_study_survives_being_written_and_read(tmp_path: Path) -> None:
    before = loaded(tmp_path, overrides=["attack.rounds=2"], sources={"x": "npz:x.npz"})
    (tmp_path / "again").mkdir()
    assert load_study(study(tmp_path / "again", dump_study(before))) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TINY.replace("title =", "titel ="), "unknown key 'titel'; did you mean 'title'"),
        (TINY.replace("[0, 1]", "[0, 0]"), "a seed is there twice"),
        (TINY.replace("rounds = 3", "rounds = 3\nseconds = 4"), "give rounds or seconds, not both"),
        (TINY.replace('name = "cinet" }, {', 'name = "cinett" }, {'), "cell 'cinett': attack.name: unknown attack 'cinett'"),
        (TINY.replace('name = "inverting-gradients"', 'name = "cinet"'), "two cells are the same run"),
        (TINY.replace("batch = 2", "bach = 2"), "unknown key 'data.bach'; did you mean 'batch'"),
        (TINY.replace("[budget]", "data.batch = 3\n[budget]"), "axis 'data.batch': expected a list"),
        (TINY.replace("[budget]", "mine = [1, 2]\n[budget]"), "axis 'mine': is no key of a run"),
        (TINY + "[[override]]\nskip = true\n", "every cell is skipped"),
        ('[data]\nsource = "sample"\n', "is the specification of one run, which `gradleak audit` takes"),
        (TINY.replace("seeds = [0, 1]", f"seeds = {list(range(2000))}").replace("[budget]", "data.batch = "
         f"{list(range(1, 101))}\n[budget]"), "400,000 cells, at most 100,000"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_study_is_said(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        loaded(tmp_path, text)
    assert message in str(error.value)


def test_two_studies_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [study(tmp_path), study(tmp_path / "other")]
    with pytest.raises(SpecError, match="a study of the same name and size is in"):
        load_studies(paths)
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(SpecError, match="no study there"):
        load_studies([empty])


def test_finished_cells_are_kept_and_rows_say_what_was_found(tmp_path: Path) -> None:
    spec, out = loaded(tmp_path), tmp_path / "out"
    done = runner.run_studies([spec], out, processes=1, progress=False)
    assert [each.outcome for each in done] == ["finished"] * 4
    dates = {each.cell.key: (out / "cells" / each.cell.key / "result.json").stat().st_mtime_ns for each in done}
    more = loaded(tmp_path, TINY.replace("[0, 1]", "[1, 2]"))
    done = runner.run_studies([more], out, processes=1, progress=False)
    assert [each.outcome for each in done] == ["before", "finished", "before", "finished"]
    assert dates == {key: (out / "cells" / key / "result.json").stat().st_mtime_ns for key in dates}
    found = store.save([spec], out)
    for row in found:
        result = read_result(out / "cells" / row["cell"])
        assert row["state"] == "finished"
        assert row["psnr"] == result["metrics"]["psnr"]["mean"]
        assert row["worst"]["ssim"] == result["metrics"]["ssim"]["worst"]
        assert (row["rounds"], row["batch"], row["image_shape"], row["labels"]) == (3, 2, [3, 16, 16], "granted")
        assert row["recognisable"] == sum(score >= 0.6 for score in result["per_image"]["ssim"])
    assert found[0]["published"] == {"method": "CI-Net", "psnr": [33.7, None], "ssim": [1.0, 0.0], "fsim": None, "lpips": None,
                                     "note": ""}  # fmt: skip
    table = pyarrow.parquet.read_table(out / "rows.parquet").to_pylist()
    assert [(row["cell"], row["ssim"], json.loads(row["settings"])) for row in table] == [
        (row["cell"], row["ssim"], row["settings"]) for row in store.read_rows(out / "rows.json")
    ]
    # rebuilt at any time
    for name in ("rows.parquet", "rows.json"):
        (out / name).unlink()
    assert store.save([spec], out) == found


def test_side_by_side_equals_one_after_another(tmp_path: Path) -> None:
    spec = loaded(tmp_path)
    for name, processes in (("one", 1), ("two", 2)):
        done = runner.run_studies([spec], tmp_path / name, processes=processes, progress=False)
        assert [each.outcome for each in done] == ["finished"] * 4
    for key in keys(spec):
        assert outcome(tmp_path / "one" / "cells" / key) == outcome(tmp_path / "two" / "cells" / key)


def test_a_cell_that_cannot_be_run_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # the closed form of `analytic` needs a linear first layer, and LeNet has none
    path = study(tmp_path, TINY.replace('"inverting-gradients"', '"analytic"').replace("[0, 1]", "[0]"))
    assert call("study", "run", path, "--out", tmp_path / "out", "--processes", "1", "--json") == 2
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == 2
    assert found["cells"] == {"finished": 1, "before": 0, "failed": 1, "busy": 0}
    assert "analytic" in found["failed"][0]["label"]
    rows = {row["method"]: row for row in store.read_rows(tmp_path / "out" / "rows.json")}
    assert rows["cinet"]["state"] == "finished"
    assert (rows["analytic"]["state"], rows["analytic"]["error"]) == ("failed", found["failed"][0]["reason"])
    assert call("study", "status", "--out", tmp_path / "out") == 0
    assert "1 of 2 cells finished; 1 failed" in capsys.readouterr().out
    (tmp_path / "out" / "rows.parquet").unlink()
    assert call("study", "report", "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "rows.parquet").is_file()
    assert "1 of 2 runs finished" in (tmp_path / "out" / "report.md").read_text()
    assert call("study", "report", path, "--out", tmp_path / "nothing") == 2
    assert "no such folder" in capsys.readouterr().err


def test_an_unfinished_cell_asks_what_to_do(tmp_path: Path) -> None:
    spec, out = loaded(tmp_path), tmp_path / "out"
    cell = cells(spec)[0]
    (out / "cells" / cell.key).mkdir(parents=True)
    (out / "cells" / cell.key / "checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(OutputError, match=r"has 1 unfinished cells \(tiny: cinet\).*--resume.*--force"):
        runner.run_studies([spec], out, processes=1, progress=False)
    done = runner.run_studies([spec], out, processes=1, progress=False, force=True)
    assert [each.outcome for each in done] == ["finished"] * 4


def test_a_cell_of_another_process_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PATIENCE", 0.1)
    spec, out = loaded(tmp_path), tmp_path / "out"
    folder = out / "cells" / keys(spec)[0]
    folder.mkdir(parents=True)
    with lock_folder(folder):
        done = runner.run_studies([spec], out, processes=1, progress=False)
    assert [each.outcome for each in done] == ["busy", "finished", "finished", "finished"]
    assert store.rows([spec], out)[0]["state"] == "missing"


def test_a_budget_of_seconds_becomes_rounds_for_good(tmp_path: Path) -> None:
    text = TINY.replace("rounds = 3", "seconds = 0.5").replace("[0, 1]", "[0]")
    spec, out = loaded(tmp_path, text), tmp_path / "out"
    cell = cells(spec)[0]
    folder = out / "cells" / cell.key
    rounds = runner.run_cell(cell, folder, progress=False)["cost"]["rounds"]
    assert rounds == json.loads((folder / "cell.json").read_text())["rounds"] > 3
    (folder / "result.json").unlink()
    assert runner.run_cell(cell, folder, progress=False)["cost"]["rounds"] == rounds


def test_one_cell_over_two_processes(tmp_path: Path) -> None:
    text = TINY.replace("[0, 1]", "[0]").replace('{ name = "cinet" }, { name = "inverting-gradients" }', '{ name = "cinet" }')
    alone, shared = (loaded(tmp_path, text + more) for more in ("", "[resources]\nprocesses = 2\n"))
    assert keys(alone) == keys(shared)
    results = []
    for name, spec in (("alone", alone), ("shared", shared)):
        (done,) = runner.run_studies([spec], tmp_path / name, processes=1, progress=False)
        assert done.outcome == "finished", done.reason
        results.append(read_result(tmp_path / name / "cells" / done.cell.key))
    assert results[0]["matching_loss"] == pytest.approx(results[1]["matching_loss"], rel=1e-2)
    assert [result["processes"] for result in results] == [1, 2]


def _start(path: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gradleak", "study", "run", str(path), "--out", str(out), "--resume"]
    return subprocess.Popen(
        [*command, "--processes", "2"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


LONG = TINY.replace("rounds = 3", "rounds = 120")


def test_killed_at_random_moments_and_resumed_equals_undisturbed(tmp_path: Path) -> None:
    """`tests/faults.py --kinds study` does it ten times."""
    path = study(tmp_path, LONG.replace("[0, 1]", "[0]"))
    spec = load_study(path)
    runner.run_studies([spec], tmp_path / "calm", processes=1, progress=False)
    out, dice = tmp_path / "killed", random.Random(0)
    for _ in range(2):
        process = _start(path, out)
        end = time.monotonic() + 60
        while not list(out.glob("cells/*/checkpoint.safetensors")) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(dice.uniform(0, 0.6))
        process.kill()
        process.communicate()
    process = _start(path, out)
    assert process.wait(timeout=120) == 0, process.communicate()
    for key in keys(spec):
        assert outcome(tmp_path / "calm" / "cells" / key) == outcome(out / "cells" / key)
    calm, killed = (store.rows([spec], tmp_path / name) for name in ("calm", "killed"))
    indifferent = ("seconds", "date")
    assert [{k: v for k, v in row.items() if k not in indifferent} for row in calm] == [
        {k: v for k, v in row.items() if k not in indifferent} for row in killed
    ]


def test_a_signal_leaves_partial_cells_that_go_on(tmp_path: Path) -> None:
    path, out = study(tmp_path, LONG.replace("rounds = 120", "rounds = 100000")), tmp_path / "out"
    process = _start(path, out)
    end = time.monotonic() + 60
    while len(list(out.glob("cells/*/checkpoint.safetensors"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, text
    found = store.rows([load_study(path)], out)
    assert sorted(row["state"] for row in found) == ["missing", "missing", "partial", "partial"]
    assert all(row["ssim"] is not None and "of 100000 rounds" in row["error"] for row in found if row["state"] == "partial")


def test_a_worker_that_dies_is_replaced_and_its_cell_goes_on(tmp_path: Path) -> None:
    path, out = study(tmp_path, LONG.replace("[0, 1]", "[0]").replace("rounds = 120", "rounds = 400")), tmp_path / "out"
    process = _start(path, out)
    end = time.monotonic() + 60
    while not list(out.glob("cells/*/checkpoint.safetensors")) and time.monotonic() < end:
        time.sleep(0.02)
    workers = [child for child in psutil.Process(process.pid).children() if any("spawn_main" in a for a in child.cmdline())]
    workers[0].kill()
    _, text = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert {row["state"] for row in store.rows([load_study(path)], out)} == {"finished"}


def test_rows_of_an_edited_study_replace_old_ones() -> None:
    def row(study: str, cell: str, state: str, ssim: float) -> store.Row:
        return {"study": study, "size": "small", "cell": cell, "state": state, "ssim": ssim}

    old = [row("a", "1", "finished", 0.1), row("a", "2", "finished", 0.2), row("b", "1", "finished", 0.3)]
    new = [row("a", "1", "missing", 0.0), row("a", "3", "finished", 0.4)]
    assert store.merge(old, new) == [row("a", "1", "finished", 0.1), row("a", "3", "finished", 0.4), old[2]]
    partial = row("a", "1", "partial", 0.05)
    assert store.measured(partial)
    assert not store.measured(new[0])
    assert store.merge(old, [partial])[0] == old[0]  # never in place of a finished one
    assert store.merge([partial], [old[0]])[0] == old[0]
    assert store.merge([partial], [{**partial, "ssim": 0.07}])[0]["ssim"] == 0.07


def test_damaged_rows_are_named(tmp_path: Path) -> None:
    (path := tmp_path / "rows.json").write_text('[{"study": "a"}]')
    with pytest.raises(OutputError, match="row 0 has no 'size'"):
        store.read_rows(path)
    assert store.read_rows(tmp_path / "none.json") == []


def test_cell_knows_its_resources(tmp_path: Path) -> None:
    cell: Cell = cells(loaded(tmp_path, TINY + "[resources]\ncpus = 3\nmemory_mb = 100\n"))[0]
    assert (cell.resources.cpus, cell.spec.threads, cell.resources.memory_mb) == (3, 3, 100)
