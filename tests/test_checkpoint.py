"""Checkpoints: a run that is interrupted anywhere, however it is, ends in the numbers of one that was not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradleak.attacks import attack
from gradleak.checkpoint import FAILURES, Checkpoint
from gradleak.client import ClientOperator, FedAvg, FedSGD, simulate
from gradleak.data import load
from gradleak.errors import CheckpointError, OutputError
from gradleak.invert import Reconstruction, invert
from gradleak.labels import recover
from gradleak.observation import Truth
from gradleak.spec import DataSpec


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def truth() -> Truth:
    """Two photographs of 8 x 8 pixels."""
    return load(DataSpec(source="sample", batch=2, size=8))


def network(*, batch_norm: bool = False) -> nn.Module:
    """One convolution and a linear layer, with or without batch norm between them."""
    torch.manual_seed(0)
    norm: list[nn.Module] = [nn.BatchNorm2d(4)] if batch_norm else []
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), *norm, nn.Sigmoid(), nn.Flatten(), nn.Linear(64, 10))


def run(
    truth: Truth,
    path: Path | None = None,
    *,
    name: str = "cinet",
    client: ClientOperator | None = None,
    pieces: int | None = None,
    until: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Reconstruction:
    """An attack that stops after ``until`` rounds of this call, if it is given, with so many images at a time."""
    client = FedSGD(network(batch_norm=True)) if client is None else client
    observation = simulate(client, truth)
    client.in_pieces(pieces)
    left = iter(range(until - 1)) if until is not None else None

    def stop() -> str:
        return "a test" if left is not None and next(left, None) is None else ""

    return invert(
        observation,
        attack(name, **options),
        client=client,
        labels=recover("known", observation, client),
        seed=seed,
        progress=False,
        checkpoint=None if path is None else Checkpoint(path, every=0),
        stop=stop,
    )


def equal(first: Reconstruction, second: Reconstruction) -> bool:
    """To the last bit, in all but times and memory."""
    losses = [[row["loss"] for row in result.history] for result in (first, second)]
    return (
        torch.equal(first.images, second.images)
        and torch.equal(first.labels.values, second.labels.values)
        and torch.equal(first.snapshots, second.snapshots)
        and losses[0] == losses[1]
        and (first.matching_loss, first.best_round, first.rounds, first.stopped, first.warnings)
        == (second.matching_loss, second.best_round, second.rounds, second.stopped, second.warnings)
    )


ATTACKS: dict[str, dict[str, Any]] = {
    "cinet": {"channels": 4},
    "cinet, muon": {"channels": 4, "optimiser": "muon"},
    "cinet-paper": {"channels": 4},
    "cinet-reference": {"channels": 4, "group": 2},
    "dlg": {"learning_rate": 0.1},
    "idlg": {"learning_rate": 0.1},
    "inverting-gradients": {},
    "gradinversion": {"group": 2},
    "gias": {"width": 2, "latent": 4, "latent_share": 0.4},
    "gi-nas": {"channels": 4, "candidates": 3},
}


@pytest.mark.parametrize("name", list(ATTACKS))
def test_resuming_equals_never_stopping(name: str, truth: Truth, tmp_path: Path) -> None:
    """Every optimiser, image model, phase, group and joint label; interrupted twice, at rounds 2 and 5."""
    options = {"rounds": 7, "snapshots": 3, **ATTACKS[name]}
    name = name.partition(",")[0]
    whole = run(truth, name=name, **options)
    first = run(truth, tmp_path / "c.safetensors", name=name, until=2, **options)
    assert first.interrupted == "a test"
    assert first.rounds == 2
    second = run(truth, tmp_path / "c.safetensors", name=name, until=3, **options)
    assert second.rounds == 5
    assert equal(run(truth, tmp_path / "c.safetensors", name=name, **options), whole)


@pytest.mark.parametrize("until", [1, 3, 4, 5, 7, 8, 9])
def test_resuming_among_restarts(truth: Truth, tmp_path: Path, until: int) -> None:
    """In the first of three restarts, at its end, in the second, in the last: the best of all is kept."""
    options = {"channels": 4, "rounds": 3, "repeat": 3}
    run(truth, tmp_path / "c.safetensors", until=until, **options)
    assert equal(run(truth, tmp_path / "c.safetensors", **options), run(truth, **options))


def test_resuming_between_checks_of_the_engine(truth: Truth, tmp_path: Path) -> None:
    """The self-checking secant goes on with the step that it chose."""
    client = FedSGD(network())
    options = {"channels": 4, "rounds": 6, "client": client}
    run(truth, tmp_path / "c.safetensors", until=3, **options)
    again, whole = run(truth, tmp_path / "c.safetensors", **options), run(truth, **options)
    assert equal(again, whole)
    assert again.notes["engine_check"] == whole.notes["engine_check"]


def test_a_finished_run_is_not_repeated(truth: Truth, tmp_path: Path) -> None:
    calls = 0

    def count(output: Tensor, labels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return nn.functional.cross_entropy(output, labels)

    options = {"channels": 4, "rounds": 5, "client": FedSGD(network(), loss=count)}
    whole, before = run(truth, tmp_path / "c.safetensors", **options), calls
    assert equal(run(truth, tmp_path / "c.safetensors", **options), whole)
    assert calls - before < before - 5  # what is left is the simulation and the sensitivities


def test_an_interruption_after_the_last_round_is_none(truth: Truth, tmp_path: Path) -> None:
    found = run(truth, tmp_path / "c.safetensors", channels=4, rounds=3, until=3)
    assert not found.interrupted
    assert found.stopped == "all 3 rounds done"


def test_local_steps_and_pieces(truth: Truth, tmp_path: Path) -> None:
    """FedAvg, and FedSGD in pieces of one image, which a limit of memory asked for."""
    avg = FedAvg(network(), learning_rate=0.1, epochs=2, batch_size=1)
    run(truth, tmp_path / "a.safetensors", client=avg, channels=4, rounds=4, until=2)
    assert equal(
        run(truth, tmp_path / "a.safetensors", client=avg, channels=4, rounds=4), run(truth, client=avg, channels=4, rounds=4)
    )
    run(truth, tmp_path / "b.safetensors", client=FedSGD(network()), pieces=1, channels=4, rounds=4, until=2)
    # the pieces are those of the checkpoint, whatever this call's operator says
    resumed = run(truth, tmp_path / "b.safetensors", client=FedSGD(network()), channels=4, rounds=4)
    assert equal(resumed, run(truth, client=FedSGD(network()), pieces=1, channels=4, rounds=4))
    assert resumed.notes["images_at_a_time"] == 1


Damage = Callable[[Path], object]


def flip(path: Path) -> None:
    """One bit of the last tensor."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Damage] = {
    "one bit": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\0\1\2\3" * 100),
    "missing": lambda path: path.unlink(),
    "half written": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_checkpoint_falls_back_to_the_one_before(truth: Truth, tmp_path: Path, damage: str) -> None:
    options = {"channels": 4, "rounds": 6}
    run(truth, tmp_path / "c.safetensors", until=4, **options)
    DAMAGES[damage](tmp_path / "c.safetensors")
    assert equal(run(truth, tmp_path / "c.safetensors", **options), run(truth, **options))


def test_a_damaged_checkpoint_never_replaces_the_whole_one_before(truth: Truth, tmp_path: Path) -> None:
    """Damage, one more round, damage again: the one before is still the whole one, and the run is not lost."""
    options = {"channels": 4, "rounds": 8}
    run(truth, tmp_path / "c.safetensors", until=3, **options)
    for _ in range(3):
        flip(tmp_path / "c.safetensors")
        run(truth, tmp_path / "c.safetensors", until=1, **options)
    flip(tmp_path / "c.safetensors")
    assert equal(run(truth, tmp_path / "c.safetensors", **options), run(truth, **options))


def test_two_damaged_checkpoints_are_an_error(truth: Truth, tmp_path: Path) -> None:
    run(truth, tmp_path / "c.safetensors", until=4, channels=4, rounds=6)
    flip(tmp_path / "c.safetensors")
    flip(tmp_path / "c.previous.safetensors")
    with pytest.raises(CheckpointError, match=r"c\.safetensors: damaged.*c\.previous\.safetensors: damaged.*--force"):
        run(truth, tmp_path / "c.safetensors", channels=4, rounds=6)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"learning_rate": 1e-3}, {"rounds": 7}, {"client": FedSGD(network())}],
    ids=["seed", "rate", "rounds", "client"],
)
def test_another_runs_checkpoint_is_refused(truth: Truth, tmp_path: Path, change: dict[str, Any]) -> None:
    options = {"channels": 4, "rounds": 6}
    run(truth, tmp_path / "c.safetensors", until=2, **options)
    with pytest.raises(CheckpointError, match="another run"):
        run(truth, tmp_path / "c.safetensors", **{**options, **change})


def states() -> st.SearchStrategy[Any]:
    """What a checkpoint can hold, nested."""
    shapes = st.lists(st.integers(0, 3), max_size=3)
    dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool])
    tensors = st.builds(lambda shape, dtype: (10 * torch.rand(shape)).to(dtype), shapes, dtypes)
    scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), tensors)
    keys = st.one_of(st.text(), st.integers())
    return st.recursive(
        scalars,
        lambda inner: st.one_of(st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(keys, inner)),
        max_leaves=12,
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b


@settings(max_examples=40, deadline=None)
@given(state=states())
def test_a_state_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    """Types, order of keys, NaN, negative zero and integers as keys included."""
    path = tmp_path_factory.mktemp("state") / "c.safetensors"
    Checkpoint(path).save({"state": state}, run="x")
    found = Checkpoint(path).load(run="x")
    assert found is not None
    assert same(found["state"], state)


def test_a_state_that_is_code_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot hold a function"):
        Checkpoint(tmp_path / "c.safetensors").save({"a": lambda: None}, run="x")


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path / "c.safetensors").load(run="x") is None


@pytest.fixture
def vanished(tmp_path: Path) -> Path:
    """A checkpoint whose folder is gone."""
    return tmp_path / "gone" / "c.safetensors"


def test_a_folder_that_vanished_ends_the_run_after_some_attempts(
    truth: Truth, vanished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each failure is told; the space may come back, so only several in a row end the run."""
    short = run(truth, vanished, channels=4, rounds=FAILURES - 2)
    assert short.rounds == FAILURES - 2
    assert "no checkpoint" in caplog.text
    with pytest.raises(OutputError, match="cannot be written"):
        run(truth, vanished, channels=4, rounds=FAILURES)


def test_large_states_are_written_less_often(tmp_path: Path) -> None:
    """At most a twentieth of the time: a checkpoint that took a second is not followed by another at once."""
    keep = Checkpoint(tmp_path / "c.safetensors", every=1e-9)
    keep.save({"big": torch.zeros(4_000_000)}, run="x")
    assert not keep.due()
    always = Checkpoint(tmp_path / "d.safetensors", every=0)
    always.save({"big": torch.zeros(4_000_000)}, run="x")
    assert always.due()
