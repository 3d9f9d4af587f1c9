"""Watching an attack: it changes no number, and it cannot lose the run."""

from __future__ import annotations

import base64
import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import gradleak as gl
from gradleak import cli, run
from gradleak.attacks import attack
from gradleak.client import FedSGD, simulate
from gradleak.errors import OutputError, SpecError
from gradleak.invert import Progress, Reconstruction, Watcher, invert
from gradleak.labels import Labels
from gradleak.live import NotebookFigure, TensorBoard, figure_png, picture_grid
from gradleak.observation import Truth
from gradleak.spec import RunSpec, parse

SMALL = {
    "device": "cpu",
    "threads": 1,
    "data": {"source": "sample", "batch": 2, "size": 16},
    "model": {"name": "lenet", "width": 2, "num_classes": 8},
    "attack": {"name": "cinet", "rounds": 6, "channels": 4, "snapshots": 3},
    "evaluate": {"lpips": "off", "candidates": 2},
}


def small(**attack_settings: object) -> RunSpec:
    return parse({**SMALL, "attack": {**SMALL["attack"], **attack_settings}})  # type: ignore[dict-item]


def rebuild(spec: RunSpec, watch: Watcher | None = None) -> Reconstruction:
    recipe, device = run.prepare(spec)
    client = run.simulate_client(spec)
    return run.attack_observation(client.observation, client.model, recipe, spec, device, progress=False, watch=watch)


def meddling(progress: Progress) -> None:
    """Draws from torch's random state, and overwrites what it is given."""
    torch.rand(100)
    torch.manual_seed(progress.round)
    progress.images.zero_()


@pytest.mark.parametrize(
    ("name", "settings"),
    [("cinet", {"channels": 4, "snapshots": 3}), ("cinet", {"channels": 4, "group": 2, "repeat": 2}), ("dlg", {})],
    ids=["cinet", "group", "dlg"],
)
def test_a_watcher_changes_no_number(name: str, settings: dict[str, int]) -> None:
    spec = parse({**SMALL, "attack": {"name": name, "rounds": 5, **settings}})
    alone, watched = rebuild(spec), rebuild(spec, meddling)
    assert torch.equal(alone.images, watched.images)
    assert torch.equal(alone.snapshots, watched.snapshots)
    assert (alone.matching_loss, alone.best_round, alone.warnings) == (
        watched.matching_loss,
        watched.best_round,
        watched.warnings,
    )
    assert [row["loss"] for row in alone.history] == [row["loss"] for row in watched.history]


def test_every_round_is_shown_as_the_history_has_it() -> None:
    seen: list[Progress] = []
    found = rebuild(small(gain="free"), seen.append)
    assert [(p.round, p.loss, p.learning_rate) for p in seen] == [
        (row["round"], row["loss"], row["learning_rate"]) for row in found.history
    ]
    assert [p.best_loss for p in seen] == np.minimum.accumulate([p.loss for p in seen]).tolist()
    assert {(p.rounds, p.restart, tuple(p.images.shape)) for p in seen} == {(6, 0, (2, 3, 16, 16))}
    best = seen[min(found.best_round, 6) - 1]
    if found.best_round <= 6:
        assert torch.equal(best.images.clamp(0, 1), found.images)


def test_restarts_are_told_apart() -> None:
    seen: list[Progress] = []
    rebuild(small(rounds=2, repeat=3), seen.append)
    assert [(p.restart, p.round) for p in seen] == [(k, t) for k in range(3) for t in (1, 2)]


def test_a_closed_form_is_shown_once() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.Sigmoid(), nn.Linear(12, 4))
    truth = Truth(torch.rand(1, 3, 8, 8), torch.tensor([1]))
    client = FedSGD(model)
    seen: list[Progress] = []
    found = invert(
        simulate(client, truth),
        attack("analytic"),
        client=client,
        labels=Labels(truth.labels, "known"),
        progress=False,
        watch=seen.append,
    )
    assert [(p.round, p.rounds, p.best_loss) for p in seen] == [(1, 1, found.matching_loss)]
    assert torch.equal(seen[0].images, found.images)


def test_a_watcher_that_fails_is_left_out_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def failing(progress: Progress) -> None:
        calls.append(progress.round)
        if progress.round == 2:
            raise RuntimeError("no more ink")

    with caplog.at_level(logging.WARNING, logger="gradleak.invert"):
        found = rebuild(small(), failing)
    assert calls == [1, 2]
    assert torch.equal(found.images, rebuild(small()).images)
    assert [record.getMessage() for record in caplog.records if "watcher" in record.getMessage()] == [
        "the watcher failed in round 2, and the attack goes on without it: RuntimeError('no more ink')"
    ]


def test_audit_shows_the_attack_and_not_its_control(tmp_path: Path) -> None:
    seen: list[Progress] = []
    spec = parse({**SMALL, "evaluate": {**SMALL["evaluate"], "controls": True}})  # type: ignore[dict-item]
    gl.audit(spec, tmp_path / "run", progress=False, watch=seen.append)
    assert [p.round for p in seen] == list(range(1, 7))


def progress_at(t: int, *, rounds: int = 200, restart: int = 0, channels: int = 3) -> Progress:
    return Progress(t, rounds, restart, 1 / t, 1 / t, 0.01, torch.rand(5, channels, 8, 8) * 1.5 - 0.2)


def test_tensorboard_has_every_loss_and_ever_fewer_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path / "logs") as watch:
        assert not (tmp_path / "logs").exists()
        for restart in (0, 1):
            for t in range(1, 201):
                watch(progress_at(t, restart=restart))
    assert (tmp_path / "logs").stat().st_mode & 0o777 == 0o700
    log = EventAccumulator(str(tmp_path / "logs"), size_guidance={"images": 0, "scalars": 0})
    log.Reload()
    assert set(log.Tags()["scalars"]) == {"loss", "best loss", "learning rate"}
    losses = log.Scalars("loss")
    assert [event.step for event in losses] == list(range(1, 401))
    assert [event.value for event in losses[:200]] == pytest.approx([1 / t for t in range(1, 201)])
    steps = [event.step for event in log.Images("best iterate")]
    assert steps[0] == 1
    assert {200, 400} <= set(steps)
    assert len(steps) < 30
    gaps = np.diff([step for step in steps if step < 200])
    assert (np.diff(gaps) >= 0).all()
    with Image.open(io.BytesIO(log.Images("best iterate")[0].encoded_image_string)) as picture:
        assert picture.size == (3 * 9 + 1, 2 * 9 + 1)


def test_tensorboard_without_pictures_has_none(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path, images=False) as watch:
        watch(progress_at(1))
    log = EventAccumulator(str(tmp_path))
    log.Reload()
    assert log.Tags()["images"] == []
    assert len(log.Scalars("loss")) == 1


def test_the_command_line_logs_for_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [f"--set={key}.{name}={value}" for key in ("data", "model", "attack") for name, value in SMALL[key].items()]  # type: ignore[attr-defined]
    options = [*rows, "--set=evaluate.lpips=off", "--quiet", "--redact", "--tensorboard", str(tmp_path / "logs")]

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["gradleak", *arguments])
        with pytest.raises(SystemExit) as leave:
            cli.main()
        return int(leave.value.code or 0)

    assert call("audit", "--out", str(tmp_path / "run"), *options) == 0
    log = EventAccumulator(str(tmp_path / "logs"))
    log.Reload()
    assert len(log.Scalars("loss")) == 6
    assert log.Tags()["images"] == []  # --redact
    assert call("audit", "--out", str(tmp_path), *options) == 2
    assert call("audit", "--out", str(tmp_path / "m"), "--set", 'matrix.attacks=["cinet"]', *options) == 2


@pytest.mark.parametrize(
    ("module", "make", "words"),
    [
        ("torch.utils.tensorboard", lambda: TensorBoard("logs"), 'pip install "gradleak[tensorboard]"'),
        ("IPython", NotebookFigure, "needs IPython"),
    ],
    ids=["tensorboard", "notebook"],
)
def test_what_is_not_installed_is_named(
    module: str, make: Callable[[], object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as python marks a module that cannot be imported
    with pytest.raises(SpecError) as error:
        make()
    assert words in str(error.value)


def test_a_file_is_no_folder_for_logs(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        TensorBoard(tmp_path / "file")


def test_a_notebook_gets_one_figure_that_replaces_itself() -> None:
    pytest.importorskip("IPython")
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    InteractiveShell.instance()
    watch = NotebookFigure(every_seconds=1000)
    with capture_output() as shown:
        for t in (1, 2, 3):
            watch(progress_at(t, rounds=3))
    assert len(watch.losses) == 3
    assert len(shown.outputs) == 2  # the first round and the last
    for output in shown.outputs:
        with Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))) as picture:
            assert picture.size == (900, 360)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_pictures_are_made_of_any_images(channels: int) -> None:
    grid = picture_grid(progress_at(1, channels=channels).images)
    assert grid.shape == (3, 19, 28)
    assert grid.min() >= 0
    assert grid.max() <= 1
    zero = Progress(1, 2, 0, 0.0, 0.0, 0.1, torch.full((1, channels, 4, 4), float("nan")))
    with Image.open(io.BytesIO(figure_png([(1, 0.0)], zero))) as picture:
        assert picture.format == "PNG"
