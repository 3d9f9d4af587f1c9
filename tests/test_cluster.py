"""Cells on a real cluster of Ray: what a lost machine leaves is gone on with, and no number depends on it."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from gradleak.errors import BusyError, SpecError
from gradleak.folder import CHECKPOINT, RESULT, lock_folder
from gradleak.models import build
from gradleak.spec import ModelSpec
from gradleak.study import cluster
from gradleak.study.cluster import Remote, download, run_at, run_on_ray, run_studies_on_ray
from gradleak.study.runner import state
from gradleak.study.spec import Cell, Resources, StudySpec, cells
from gradleak.tensors import write_tensors

pytest.importorskip("fsspec", reason="needs fsspec: pip install 'gradleak[ray]'")

#: A loss that kills when its file ``calls`` has counted down to 0, and notes in which process it was called.
LOSS = """
import os, signal
from pathlib import Path
from torch.nn.functional import cross_entropy

here = Path(__file__).parent

def loss(output, labels):
    with open(here / "log", "a") as log:
        log.write(f"{os.getpid()}\\n")
    left = int((here / "calls").read_text()) - 1
    (here / "calls").write_text(str(left))
    if left == 0:
        KILL
    return cross_entropy(output, labels)
"""
WORKER = "os.kill(os.getpid(), signal.SIGKILL)"
MACHINE = "os.kill(os.getppid(), signal.SIGKILL); os.kill(os.getpid(), signal.SIGKILL)"
TERM = "os.kill(os.getpid(), signal.SIGTERM)"


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


def study(seeds: list[int] | None = None, **base: Any) -> list[Cell]:
    return cells(specified(seeds, **base))


def specified(seeds: list[int] | None = None, **base: Any) -> StudySpec:
    table = {
        "data": {"source": "sample", "batch": 2, "size": 16},
        "model": {"name": "lenet", "activation": "sigmoid"},
        "attack": {"name": "cinet", "channels": 4, "rounds": 40},
        "evaluate": {"lpips": "off"},
        "device": "cpu",
        "checkpoint_seconds": 0,
        **base,
    }
    return StudySpec(seeds=seeds or [0], base=table)


def killing(folder: Path, kill: str, after: int) -> dict[str, Any]:
    """The part of a specification whose loss kills at its call number ``after``; never for -1."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "loss.py").write_text(LOSS.replace("KILL", kill))
    (folder / "calls").write_text(str(after))
    (folder / "log").write_text("")
    return {"client": {"loss": f"{folder / 'loss.py'}:loss"}}


def calls(folder: Path) -> list[int]:
    """How often each process called the loss, in their order."""
    pids = (folder / "log").read_text().split()
    return [pids.count(pid) for pid in dict.fromkeys(pids)]


def numbers(folder: Path) -> dict[str, Any]:
    """What must not depend on where and how often a cell was run."""
    result = json.loads((folder / RESULT).read_text())
    kept = {key: result[key] for key in ("metrics", "matching_loss", "best_round", "verdict", "stopped", "warnings", "partial")}
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    return {**kept, "losses": losses, "bytes": (folder / "reconstruction.safetensors").read_bytes()}


def folder_of(out: Path, cell: Cell) -> Path:
    return out / "cells" / cell.key


# a real cluster


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray, connected to a head without cores and two machines of one core each; a test kills one. Workers are started once."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'gradleak[ray]'")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    health = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
    machines = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": health}
    )
    for _ in range(2):
        machines.add_node(num_cpus=1)
    cluster._connect(ray, machines.address)
    yield ray
    ray.shutdown()
    machines.shutdown()


def test_a_lost_process_and_a_lost_machine_change_no_number(
    ray: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One cell's machine is killed in mid-cell, one cannot be run, one is undisturbed: three outcomes, no number changed."""
    own = killing(tmp_path / "own", MACHINE, -1)
    (lost,) = study(**own)
    (fails,) = study(labels={"rule": "idlg"})
    (plain,) = study(seeds=[1])
    assert run_at(lost, str(tmp_path / "whole")).outcome == "finished"
    assert run_at(plain, str(tmp_path / "whole")).outcome == "finished"
    (undisturbed,) = calls(tmp_path / "own")
    killing(tmp_path / "own", MACHINE, undisturbed * 2 // 3)
    out = tmp_path / "out"
    done = run_on_ray([lost, fails, plain], str(out), progress=False)
    assert capfd.readouterr().out == ""
    assert [each.outcome for each in done] == ["finished", "failed", "finished"]
    assert "idlg" in done[1].reason
    for cell in (lost, plain):
        assert numbers(folder_of(out, cell)) == numbers(folder_of(tmp_path / "whole", cell))
    before, after = calls(tmp_path / "own")
    assert before == undisturbed * 2 // 3
    assert after < undisturbed  # rounds before the kill are not computed again
    assert folder_of(out, lost).stat().st_mode & 0o777 == 0o700
    again = run_on_ray([lost, plain], str(out), progress=False)
    assert [each.outcome for each in again] == ["before", "before"]


def test_a_lost_process_behind_a_url(ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are behind the URL before the process dies, and its private folder does not outlive the next cell."""
    monkeypatch.chdir(tmp_path)
    wait = "import time; time.sleep(3 * 2)"  # so that a checkpoint is sent: every two seconds
    own = killing(tmp_path / "own", WORKER, -1)
    (cell,) = study(**own)
    assert run_at(cell, str(tmp_path / "whole")).outcome == "finished"
    (undisturbed,) = calls(tmp_path / "own")
    killing(tmp_path / "own", f"{wait}; {WORKER}", undisturbed * 2 // 3)
    url = f"file://{tmp_path}/bucket/out"
    assert [each.outcome for each in run_studies_on_ray([specified(**own)], url, progress=False)] == ["finished"]
    assert numbers(folder_of(tmp_path / "out", cell)) == numbers(folder_of(tmp_path / "whole", cell))
    before, after = calls(tmp_path / "own")
    assert (before, after < undisturbed) == (undisturbed * 2 // 3, True)
    died = (tmp_path / "own" / "log").read_text().split()[0]
    assert not list(Path(tempfile.gettempdir()).glob(f"gradleak-cell-{died}-*"))


def test_a_signal_to_the_driver(ray: Any, tmp_path: Path) -> None:
    """SIGTERM in mid-cell: it finishes the round and saves, what had not begun is left out, and all of it can go on."""
    out = tmp_path / "out"
    own = killing(tmp_path / "own", f"os.kill({os.getpid()}, signal.SIGTERM); import time; time.sleep(4)", -1)
    (slow,) = study(**own)
    waits = dataclasses.replace(study(seeds=[1])[0], resources=Resources(cpus=2))
    assert run_at(slow, str(tmp_path / "whole")).outcome == "finished"
    (undisturbed,) = calls(tmp_path / "own")
    (tmp_path / "own" / "calls").write_text(str(undisturbed * 2 // 3))
    (done,) = run_on_ray([slow, waits], str(out), progress=False)
    assert (done.cell.key, done.outcome, done.reason) == (slow.key, "interrupted", "SIGTERM")
    assert state(folder_of(out, slow)) == "partial"
    assert (folder_of(out, slow) / CHECKPOINT).is_file()
    assert run_at(slow, str(out)).outcome == "finished"
    assert numbers(folder_of(out, slow)) == numbers(folder_of(tmp_path / "whole", slow))


def test_a_cell_that_fits_on_no_machine(ray: Any) -> None:
    (cell,) = study()
    large = dataclasses.replace(cell, resources=Resources(cpus=1, gpus=1, memory_mb=1e9))
    cluster._check_resources(ray, [cell], alone=True)
    with pytest.raises(SpecError, match=r"1 GPUs \(most on a machine: 0 GPUs\), 1000000000 MiB"):
        cluster._check_resources(ray, [large], alone=True)


# one worker, in this process


def test_a_worker_behind_a_url_that_is_interrupted_goes_on(tmp_path: Path) -> None:
    """Another worker, which has nothing of it on its own disk, ends in the numbers of an undisturbed run."""
    own = killing(tmp_path / "own", TERM, -1)
    (cell,) = study(**own)
    assert run_at(cell, str(tmp_path / "whole")).outcome == "finished"
    url = "memory://study/interrupted"
    (tmp_path / "own" / "calls").write_text("15")
    done = run_at(cell, url)
    assert (done.outcome, done.reason) == ("interrupted", "SIGTERM")
    remote = Remote(url, f"cells/{cell.key}")
    assert {CHECKPOINT, RESULT} <= set(remote.names())
    remote.fs.pipe_file(f"{remote.path}/.{CHECKPOINT}.of-a-lost-attempt", b"half a file")
    assert run_at(cell, url).outcome == "finished"
    assert run_at(cell, url).outcome == "before"
    assert CHECKPOINT not in remote.names()
    assert remote.names(hidden=True) == []
    download(url, tmp_path / "out")
    assert numbers(folder_of(tmp_path / "out", cell)) == numbers(folder_of(tmp_path / "whole", cell))
    assert {path.name for path in folder_of(tmp_path / "out", cell).iterdir()} == set(remote.names())
    assert folder_of(tmp_path / "out", cell).stat().st_mode & 0o777 == 0o700
    assert (folder_of(tmp_path / "out", cell) / RESULT).stat().st_mode & 0o777 == 0o600


def test_a_worker_that_was_held_for_lost_sends_nothing_more(tmp_path: Path) -> None:
    first, second = (Remote("memory://study/taken", "cells/0123456789abcdef") for _ in range(2))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CHECKPOINT).write_text("old")
    first.take()
    first.push(tmp_path / "run")
    second.take()
    (tmp_path / "run" / CHECKPOINT).write_text("older than the other's")
    with pytest.raises(BusyError, match="another worker has begun this cell again"):
        first.push(tmp_path / "run")
    assert second.fs.cat_file(f"{second.path}/{CHECKPOINT}") == b"old"


def test_a_download_writes_run_folders_only(tmp_path: Path) -> None:
    """Whoever can write to the storage cannot make a reader write elsewhere."""
    remote = Remote("memory://study/hostile", "cells/0123456789abcdef")
    remote.take()
    for name in (".bashrc", "no name", "cell.json"):
        remote.fs.pipe_file(f"{remote.path}/{name}", b"{}")
    remote.fs.pipe_file("/study/hostile/cells/other/cell.json", b"{}")
    download("memory://study/hostile", tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")] == ["cells/0123456789abcdef/cell.json"]


def test_a_worker_waits_for_one_that_still_holds_the_folder(tmp_path: Path) -> None:
    (cell,) = study()
    folder = folder_of(tmp_path, cell)
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        stack.enter_context(lock_folder(folder))
        free = threading.Timer(1.0, stack.close)
        free.start()
        assert run_at(cell, str(tmp_path)).outcome == "finished"
        free.join()


def test_trained_files_go_to_workers_behind_the_url(tmp_path: Path) -> None:
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    (cell,) = study()
    spec = cell.spec.model_copy(update={"model": cell.spec.model.model_copy(update={"weights": prepared / "f.safetensors"})})
    cell = dataclasses.replace(cell, spec=spec)
    model = build(ModelSpec(name="lenet"), image_shape=(3, 16, 16))
    write_tensors(prepared / "f.safetensors", dict(model.state_dict()), {})
    cluster._send_prepared("memory://study/trained", prepared)
    (prepared / "f.safetensors").unlink()
    assert run_at(cell, "memory://study/trained", prepared=prepared).outcome == "finished"
    assert (prepared / "f.safetensors").is_file()


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="nowhere"):
        run_at(study()[0], "nowhere://bucket/study")
    if find_spec("s3fs") is None:
        with pytest.raises(SpecError, match="s3fs"):
            download("s3://bucket/study", tmp_path)
    with pytest.raises(SpecError, match="--address localhost:1: no Ray cluster answers there"):
        cluster._connect(None, "localhost:1")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SpecError, match=r'pip install "gradleak\[ray\]"'):
        run_on_ray(study(), str(tmp_path))
