"""The loop: it rebuilds images, repeats itself, keeps the best, stops when it should, and never sees the truth."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradleak.invert
from gradleak.attacks import Attack, Problem, attack
from gradleak.attacks.cinet import PRESETS, CINetAttack
from gradleak.client import FedSGD, simulate
from gradleak.data import load
from gradleak.distance import DISTANCES
from gradleak.errors import DivergedError
from gradleak.evaluate import evaluate, mean_image_control
from gradleak.invert import Reconstruction, invert, noise_update, snapshot_rounds
from gradleak.labels import Labels, recover
from gradleak.observation import Observation, Truth
from gradleak.spec import DataSpec
from gradleak.whitening import whitened


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    """Threads that wait for each other cost more than these small tensors."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def truth() -> Truth:
    """Two photographs of 16 x 16 pixels."""
    return load(DataSpec(source="sample", batch=2, size=16))


def client(
    *, loss: Callable[[Tensor, Tensor], Tensor] | str = "cross-entropy", activation: type[nn.Module] = nn.Sigmoid
) -> FedSGD:
    """Two convolutions and a linear layer, without batch statistics: the update tells the gain of the images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=2, padding=2),
        activation(),
        nn.Conv2d(16, 16, 3, padding=1),
        activation(),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )
    return FedSGD(model, loss=loss)


def run(operator: FedSGD, truth: Truth, *, seed: int = 0, **settings: Any) -> Reconstruction:
    observation = simulate(operator, truth)
    recipe = attack("cinet", **{"rounds": 6, "channels": 8, **settings})
    return invert(
        observation, recipe, client=operator, labels=recover("known", observation, operator), seed=seed, progress=False
    )


@pytest.fixture(scope="module")
def rebuilt(truth: Truth) -> Reconstruction:
    """One attack that is long enough to succeed, with the default settings otherwise."""
    torch.set_num_threads(1)
    return run(client(), truth, rounds=150, channels=32)


def mean_psnr(images: Tensor, truth: Truth) -> float:
    value = evaluate(images, truth, lpips="off").summary["psnr"]["mean"]
    assert value is not None
    return value


def test_images_are_rebuilt(rebuilt: Reconstruction, truth: Truth) -> None:
    """Far closer to the truth than the start and than the best guess without an attack."""
    control = mean_image_control(truth, lpips="off").summary["psnr"]["mean"]
    found = mean_psnr(rebuilt.images, truth)
    assert control is not None
    assert found > control + 12
    assert found > 28
    assert mean_psnr(rebuilt.snapshots[0].float() / 255, truth) < found - 10
    assert rebuilt.matching_loss < rebuilt.history[0]["loss"] / 100


def test_the_gain_is_not_changed_against_the_update(rebuilt: Reconstruction, truth: Truth) -> None:
    """The images that are returned are those that were matched: here the update tells their gain."""
    operator = client()
    observed = operator(truth.images, truth.labels)
    loss, _ = DISTANCES["cosine"](operator(rebuilt.images, rebuilt.labels.values), observed)
    assert loss == pytest.approx(rebuilt.notes["cosine_distance"], rel=0.05, abs=1e-8)  # values beyond [0, 1] are clamped


@pytest.mark.parametrize("distance", [*DISTANCES, "whitened"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_matching_loss_is_the_distance_of_the_returned_images(truth: Truth, distance: str, precision: str) -> None:
    """Recomputed from the result alone, in float64."""
    found = run(client(), truth, distance=distance, precision=precision, gain="free")
    operator = client().to("cpu", torch.float64)
    update, observed = (operator(x.double(), truth.labels) for x in (found.images, truth.images))
    if distance == "whitened":
        loss, _ = whitened(operator, truth.labels, observed, (3, *truth.images.shape[2:]))(update, observed)
    else:
        loss, _ = DISTANCES[distance](update, observed)
    assert loss == pytest.approx(found.matching_loss, rel=1e-3)


def test_the_best_round_is_returned(rebuilt: Reconstruction, truth: Truth) -> None:
    """The least loss of the history, or the iterate after the last step, which no row holds."""
    crude = run(client(), truth, rounds=12, schedule="constant", learning_rate=1.0, gain="free", distance="cosine")
    for result in (rebuilt, crude):
        losses = [row["loss"] for row in result.history]
        assert result.matching_loss <= min(losses)
        if result.best_round <= result.rounds:
            assert losses[result.best_round - 1] == result.matching_loss
        else:
            assert result.best_round == result.rounds + 1
    assert crude.matching_loss < crude.history[-1]["loss"]  # a step this long overshoots: last is not best


def test_the_same_seed_gives_the_same_bytes(truth: Truth) -> None:
    """Images, snapshots and losses; another seed gives others; the caller's random state and operator are untouched."""
    operator, state = client(), torch.get_rng_state()
    weights = {name: w.clone() for name, w in operator.weights.items()}
    first, again, other = (run(operator, truth, seed=seed) for seed in (1, 1, 2))
    torch.rand(1)  # the global state plays no part
    later = run(operator, truth, seed=1)
    for same in (again, later):
        assert torch.equal(first.images, same.images)
        assert torch.equal(first.snapshots, same.snapshots)
        assert [row["loss"] for row in first.history] == [row["loss"] for row in same.history]
    assert not torch.equal(first.images, other.images)
    torch.set_rng_state(state)
    run(operator, truth, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(w, operator.weights[name]) for name, w in weights.items())


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_runs(name: str, truth: Truth) -> None:
    """With its own settings, shortened: images of the right shape and range, the best loss, bounded snapshots."""
    observation, operator = simulate(client(), truth), client()
    labels = recover("known", observation, operator)
    found = invert(observation, attack(name, rounds=3, channels=8, snapshots=2), client=operator, labels=labels, progress=False)
    assert found.images.shape == truth.images.shape
    assert found.images.dtype == torch.float32
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    assert found.matching_loss <= found.history[0]["loss"]
    assert len(found.snapshots) == 2
    assert torch.equal(found.labels.values, truth.labels)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimiser": "sgd", "signed": False},
        {"optimiser": "lbfgs", "signed": False},
        {"optimiser": "muon"},
        {"engine": "exact"},
        {"engine": "secant"},
    ],
    ids=str,
)
def test_every_optimiser_and_engine_lowers_the_loss(truth: Truth, settings: dict[str, Any]) -> None:
    found = run(client(activation=nn.Tanh), truth, rounds=2, schedule="constant", learning_rate=0.01, **settings)
    assert found.matching_loss < found.history[0]["loss"]


def test_history_and_schedule(truth: Truth) -> None:
    """One row a round; the learning rate follows its schedule; time goes forward."""
    cosine, constant, step = (
        run(client(), truth, rounds=8, learning_rate=5e-3, schedule=s).history for s in ("cosine", "constant", "step")
    )
    assert [row["round"] for row in cosine] == list(range(1, 9))
    rates = [row["learning_rate"] for row in cosine]
    assert rates[0] == pytest.approx(5e-3)
    assert rates == sorted(rates, reverse=True)
    assert rates[4] == pytest.approx(2.5e-3)
    assert {row["learning_rate"] for row in constant} == {5e-3}
    assert [row["learning_rate"] for row in step] == pytest.approx([5e-3] * 3 + [5e-4] * 2 + [5e-5] * 2 + [5e-6])
    assert [row["seconds"] for row in cosine] == sorted(row["seconds"] for row in cosine)


def test_patience_stops_on_a_plateau_only(truth: Truth) -> None:
    """A loss that stands still ends the run early; one that falls slowly, but by more than 1 % in that time, does not."""
    settings = {"rounds": 40, "optimiser": "sgd", "schedule": "constant", "patience": 5, "gain": "free"}
    still = run(client(), truth, learning_rate=1e-9, **settings)
    assert still.rounds == 6
    assert "plateau" in still.stopped
    falling = run(client(), truth, learning_rate=2e-5, **settings)
    best = [row["loss"] for row in falling.history]
    ratios = [b / a for a, b in itertools.pairwise(best)]
    assert min(ratios) > 0.99  # never 1 % in one round
    if falling.rounds < 40:
        assert min(best) > 0.99 * min(best[:-5])
    else:
        assert best[-1] < 0.99 * best[-6]


class Turning:
    """Mean cross-entropy that counts its calls, and turns to NaN after some of them."""

    def __init__(self, after: float = math.inf) -> None:
        self.calls, self.after = 0, after

    def __call__(self, output: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return cross_entropy(output, labels) * (float("nan") if self.calls > self.after else 1)


def test_a_loss_that_turns_nan_ends_the_run_and_keeps_the_best(truth: Truth) -> None:
    """The rounds until then are those of a healthy run, and the best of them is returned."""
    settings = {"engine": "exact", "rounds": 20, "gain": "free"}
    loss = Turning()
    healthy = run(client(loss=loss), truth, **settings)
    found = run(client(loss=Turning(after=loss.calls // 2)), truth, **settings)
    assert 2 <= found.rounds < 20
    assert f"nan in round {found.rounds + 1}" in found.stopped
    assert [row["loss"] for row in found.history] == [row["loss"] for row in healthy.history[: found.rounds]]
    assert found.matching_loss == min(row["loss"] for row in found.history)
    assert found.best_round <= found.rounds
    assert found.images.isfinite().all()


def test_a_line_search_that_turns_nan_in_its_first_round_keeps_the_best(truth: Truth) -> None:
    """L-BFGS evaluates several times in a round: its first matching loss was finite, so there is something to keep."""
    settings = {"engine": "exact", "distance": "squared-l2", "optimiser": "lbfgs", "signed": False, "gain": "free", "rounds": 1}
    loss = Turning()
    run(client(loss=loss, activation=nn.Tanh), truth, **settings)
    assert loss.calls > 12  # most of them by the one round
    found = run(client(loss=Turning(after=loss.calls // 2), activation=nn.Tanh), truth, **settings)
    assert found.images.isfinite().all()
    assert found.matching_loss < math.inf
    assert "nan in round 1" in found.stopped


def test_an_absurd_learning_rate_gives_finite_images(truth: Truth) -> None:
    found = run(client(), truth, optimiser="sgd", learning_rate=1e38, schedule="constant", rounds=5)
    assert found.images.isfinite().all()
    assert found.matching_loss <= found.history[0]["loss"]


def test_a_first_loss_that_is_nan_is_an_error(truth: Truth) -> None:
    with pytest.raises(DivergedError, match=r"first matching loss is nan.*float64"):
        run(client(loss=Turning(1)), truth)


@pytest.mark.parametrize("rounds", [1, 2, 7, 600, 30_000])
@pytest.mark.parametrize("count", [0, 1, 12, 64])
def test_snapshot_rounds(rounds: int, count: int) -> None:
    """At most ``count`` of them within the run, the last round among them."""
    found = snapshot_rounds(rounds, count)
    assert len(found) <= count
    assert found <= set(range(1, rounds + 1))
    assert (rounds in found) == (count > 0)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_snapshots_are_bounded(truth: Truth, count: int) -> None:
    found = run(client(), truth, rounds=9, snapshots=count)
    assert len(found.snapshots) == len(found.snapshot_rounds) == count
    assert found.snapshot_rounds == sorted(snapshot_rounds(9, count))
    if count:
        assert found.snapshots.dtype == torch.uint8
        assert found.snapshots.shape[1:] == truth.images.shape


def test_repeat_keeps_the_restart_with_the_least_loss(truth: Truth) -> None:
    """Restarts are the runs of the next seeds."""
    alone = [run(client(), truth, seed=seed, rounds=3) for seed in (3, 4)]
    best = min(alone, key=lambda result: result.matching_loss)
    kept = run(client(), truth, seed=3, rounds=3, repeat=2)
    assert kept.matching_loss == best.matching_loss
    assert torch.equal(kept.images, best.images)


def test_progress_lines(truth: Truth, capsys: pytest.CaptureFixture[str]) -> None:
    """Not a terminal: about twenty lines on standard error, nothing on standard output; silence when not wanted."""
    observation = simulate(client(), truth)
    labels = recover("known", observation, client())
    for progress in (True, False):
        invert(observation, attack("cinet", rounds=24, channels=4), client=client(), labels=labels, progress=progress)
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert (15 < len(lines) < 30 and lines[0].startswith("round 1/24") and lines[-1].startswith("round 24/24")) is progress


def test_the_truth_never_enters() -> None:
    """No argument of the loop, and no field of what an attack is given, is or holds a Truth."""
    known = {"observation", "attack", "client", "labels", "seed", "progress", "checkpoint", "stop", "watch", "memory_limit_mb"}
    assert set(inspect.signature(invert).parameters) == known
    given: list[Any] = [Observation, FedSGD, Labels, Problem, Attack, CINetAttack]
    names = [field.name for kind in given if dataclasses.is_dataclass(kind) for field in dataclasses.fields(kind)]
    assert not [name for name in names if "truth" in name or "private" in name]
    hints = typing.get_type_hints(Observation, {**vars(gradleak.observation), "FedSGD": FedSGD})
    assert Truth not in hints.values()
    for module in (gradleak.invert, gradleak.attacks, gradleak.attacks.recipe, gradleak.attacks.cinet, gradleak.labels):
        assert Truth not in vars(module).values()
        assert evaluate not in vars(module).values()


def test_the_noise_control_has_the_updates_norms(truth: Truth) -> None:
    """Tensor by tensor, repeatable by seed, and nearly orthogonal to the update."""
    observation = simulate(client(), truth)
    noise, again, other = (noise_update(observation, seed=seed) for seed in (0, 0, 1))
    for name, tensor in observation.update.items():
        torch.testing.assert_close(noise.update[name].norm(), tensor.norm())
        assert torch.equal(noise.update[name], again.update[name])
        assert not torch.equal(noise.update[name], other.update[name])
    assert DISTANCES["cosine"](noise.update, observation.update)[0] == pytest.approx(1, abs=0.6)
    assert noise.labels is observation.labels
