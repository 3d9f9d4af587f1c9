"""Label recovery: exact where the mathematics says so, with errors that name what is not granted."""

from __future__ import annotations

import dataclasses
import signal
import typing
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradleak.client import FedSGD, simulate
from gradleak.errors import GradleakError, ObservationError
from gradleak.labels import RULES, counts, idlg, recover, whole_counts
from gradleak.observation import Observation, Truth
from gradleak.spec import LabelSpec

CLASSES = 7


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    """Threads that wait for each other cost more than these small tensors."""
    torch.set_num_threads(1)


@pytest.fixture
def at_once() -> Iterator[None]:
    """An endless loop fails after three seconds, where the system has alarms."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def fail(*_: object) -> None:
        raise TimeoutError("no answer within three seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(3)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def network(*, bias: bool = True, seed: int = 0, norm: bool = False) -> nn.Sequential:
    """An untrained sigmoid network: features of one sign, and nearly equal probabilities for all images."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(96, CLASSES, bias=bias),
    )


def observe(model: nn.Module, labels: Tensor, *, seed: int = 1, grant: bool = False) -> tuple[Observation, FedSGD]:
    images = torch.rand(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    client = FedSGD(model)
    return simulate(client, Truth(images, labels), grant_labels=grant), client


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("label", range(CLASSES))
def test_idlg_finds_the_label_of_one_image(label: int, bias: bool) -> None:
    """For every class, by name and as what ``auto`` does for one image; the truth is not needed."""
    observation, client = observe(network(bias=bias, norm=True), torch.tensor([label]))
    assert observation.labels is None
    assert idlg(observation, client).tolist() == [label]
    for rule in ("idlg", "auto"):
        found = recover(rule, observation, client)  # type: ignore[arg-type]
        assert (found.values.tolist(), found.rule) == ([label], "idlg")


@pytest.mark.parametrize("norm", [True, False], ids=["batch norm", "no norm"])
@pytest.mark.parametrize("size", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("seed", range(3))
def test_counts_are_exact_on_untrained_networks(size: int, seed: int, norm: bool) -> None:
    """Random batches with repeats, also far more images than classes; ``auto`` does the same for more than one image."""
    labels = torch.randint(CLASSES, (size,), generator=torch.Generator().manual_seed(seed))
    observation, client = observe(network(seed=seed, norm=norm), labels)
    assert counts(observation, client).tolist() == labels.sort().values.tolist()
    found = recover("auto", observation, client)
    assert found.values.tolist() == labels.sort().values.tolist()
    assert found.rule == ("idlg" if size == 1 else "counts")


@pytest.mark.parametrize("labels", [[3] * 16, list(range(CLASSES)), [0, 6, 6, 6]])
def test_counts_of_special_batches(labels: list[int]) -> None:
    """All one class, each class once; with and without a bias."""
    for bias in (True, False):
        observation, client = observe(network(bias=bias), torch.tensor(labels))
        assert counts(observation, client).tolist() == labels


def test_recovery_changes_nothing() -> None:
    """Neither the client's buffers nor the caller's random state."""
    observation, client = observe(network(norm=True), torch.tensor([1, 2]))
    buffers, state = {k: b.clone() for k, b in client.buffers.items()}, torch.get_rng_state()
    first = recover("counts", observation, client)
    assert torch.equal(first.values, recover("counts", observation, client).values)
    assert all(torch.equal(b, client.buffers[k]) for k, b in buffers.items())
    assert torch.equal(state, torch.get_rng_state())


@given(st.lists(st.floats(-3, 60), min_size=1, max_size=12), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_whole_counts_sum_to_the_batch(expected: list[float], batch: int) -> None:
    labels = whole_counts(torch.tensor(expected), batch)
    assert len(labels) == batch
    assert labels.tolist() == sorted(labels.tolist())
    assert labels.min() >= 0
    assert labels.max() < len(expected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(lambda x: sum(x) > 0.1), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_whole_counts_are_within_one_of_expected_counts(shares: list[float], batch: int) -> None:
    """Where these are not negative and sum to B; whole ones come back as they are."""
    expected = torch.tensor(shares, dtype=torch.float64)
    expected *= batch / expected.sum()
    found = torch.bincount(whole_counts(expected, batch), minlength=len(shares))
    assert (found - expected).abs().max() < 1 + 1e-9
    assert torch.equal(torch.bincount(whole_counts(found, batch), minlength=len(shares)), found)


@pytest.mark.parametrize("scale", [1e6, 1e30])
def test_an_update_of_another_scale_still_ends(scale: float, at_once: None) -> None:
    """A sum in place of a mean, or a hostile client: B labels, at once."""
    observation, client = observe(network(), torch.tensor([1, 2, 2]))
    update = {name: scale * t for name, t in observation.update.items()}
    assert len(counts(dataclasses.replace(observation, update=update), client)) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_without_a_sign_are_an_error(value: float, at_once: None) -> None:
    """No bias, and features that are zero on random images: the quotient is not a number, and that is said."""
    with pytest.raises(ObservationError, match="label"):
        whole_counts(torch.tensor([value, 1.0]), 2)


def test_known_labels_are_passed_on() -> None:
    observation, client = observe(network(), torch.tensor([4, 0]), grant=True)
    found = recover("known", observation, client)
    assert (sorted(found.values.tolist()), found.rule) == ([0, 4], "known")


class Scaled(nn.Module):
    """A linear layer whose output is not F's output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.linear(x.flatten(1))


FROZEN_HEAD = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(96, CLASSES).requires_grad_(False))


@pytest.mark.parametrize(
    ("rule", "model", "labels", "words"),
    [
        ("known", network(), [0, 1], ["known", "does not grant", "labels.rule"]),
        ("idlg", network(), [0, 1], ["idlg", "one image", "2", "counts"]),
        ("counts", Scaled(), [0, 1], ["linear layer", 'labels.rule="known"']),
        ("auto", Scaled(), [0], ["linear layer", 'labels.rule="known"']),
        ("counts", FROZEN_HEAD, [0, 1], ["linear layer", "in the update"]),
        ("column-minima", network(), [*list(range(CLASSES)), 0], ["column-minima", "8 images", "7 classes", "counts"]),
        ("rlg", network(), list(range(CLASSES)), ["rlg", "7 images", "7 classes", "counts"]),
        ("ilrg", network(bias=False), [0, 1], ["ilrg", "bias", "counts"]),
    ],
)
def test_errors_name_what_is_missing(rule: str, model: nn.Module, labels: list[int], words: list[str]) -> None:
    observation, client = observe(model, torch.tensor(labels))
    with pytest.raises(GradleakError) as error:
        recover(rule, observation, client)  # type: ignore[arg-type]
    assert all(word in str(error.value) for word in words), error.value


def test_every_rule_is_described() -> None:
    """What a specification may name is what there is, each with a line about it."""
    assert set(RULES) == set(typing.get_args(LabelSpec.model_fields["rule"].annotation))
    assert all(RULES.values())


@pytest.mark.parametrize(
    ("rule", "labels"),
    [("column-minima", [0, 2, 5]), ("rlg", [1, 4, 6]), ("ilrg", [0, 2, 5]), ("ilrg", [3, 3, 3, 1, 6, 6]), ("ilrg", [2] * 20)],
)
def test_published_rules_are_exact_where_they_hold(rule: str, labels: list[int]) -> None:
    """No repeats for column minima, fewer images than classes for RLG, a bias for iLRG; on an untrained network."""
    for seed in range(3):
        observation, client = observe(network(seed=seed), torch.tensor(labels), seed=seed)
        found = recover(rule, observation, client)  # type: ignore[arg-type]
        assert (found.values.tolist(), found.rule) == (sorted(labels), rule)
