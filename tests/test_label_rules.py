"""The published rules of label recovery: what each reads from the gradient, when it is exact, and other protocols."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradleak.client import Average, ClientOperator, FedAvg, FedSGD, build_client, operator, simulate
from gradleak.defences import Gaussian, Prune
from gradleak.errors import ObservationError
from gradleak.labels import Rule, column_minima, ilrg, recover, rlg
from gradleak.observation import Observation, Truth
from gradleak.spec import ClientSpec

CLASSES = 10
RULES: list[Rule] = ["counts", "column-minima", "rlg", "ilrg"]


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


def network(activation: type[nn.Module] = nn.ReLU, *, seed: int = 0, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), activation(), nn.Flatten(), nn.Linear(128, CLASSES, bias=bias)
    )


def truth(labels: list[int], *, seed: int = 1) -> Truth:
    return Truth(torch.rand(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.tensor(labels))


def observe(client: ClientOperator, labels: list[int], *, seed: int = 1) -> Observation:
    return simulate(client, truth(labels, seed=seed), grant_labels=False)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_batches_without_repeats(rule: Rule, activation: type[nn.Module], seed: int) -> None:
    """Every rule is exact on an untrained network whose features are not negative."""
    labels = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(seed))[:4].tolist()
    client = FedSGD(network(activation, seed=seed))
    assert recover(rule, observe(client, labels, seed=seed), client).values.tolist() == sorted(labels)


@pytest.mark.parametrize("rule", ["column-minima", "rlg"])
def test_rules_that_do_not_need_a_bias(rule: Rule) -> None:
    client = FedSGD(network(bias=False))
    assert recover(rule, observe(client, [7, 0, 3]), client).values.tolist() == [0, 3, 7]


@pytest.mark.parametrize("labels", [[2, 2, 9], [0, 0, 0, 0], [1, 1, 5, 8, 8]])
def test_repeats(labels: list[int]) -> None:
    """iLRG counts them; RLG finds the classes, and fills up among them alone; column minima cannot give a class twice."""
    client = FedSGD(network())
    observation = observe(client, labels)
    assert ilrg(observation, client).tolist() == labels
    assert rlg(observation, client).tolist() == labels
    assert len(set(column_minima(observation, client).tolist())) == len(labels)


def test_more_images_than_classes() -> None:
    labels = torch.randint(CLASSES, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    client = FedSGD(network(nn.Sigmoid))
    assert ilrg(observe(client, labels), client).tolist() == sorted(labels)


def probabilities_observed(rows: Tensor, features: Tensor, client: FedSGD, observation: Observation) -> Observation:
    """An observation whose last layer has the gradient of these rows p_i - e_{y_i} and features."""
    gradient = rows.T @ features / len(rows)
    update = {**observation.update, "3.weight": gradient, "3.bias": rows.mean(0)}
    return dataclasses.replace(observation, update=update, batch=len(rows))


def test_rlg_reads_the_weight_gradient_alone() -> None:
    """Whatever the features and the (confident) probabilities: one negative entry in each row is enough."""
    client, generator = FedSGD(network()), torch.Generator().manual_seed(3)
    observation = observe(client, [0, 1, 2])
    labels = torch.tensor([4, 1, 9, 9])
    rows = (4 * torch.randn(4, CLASSES, generator=generator)).softmax(1) - nn.functional.one_hot(labels, CLASSES)
    features = torch.randn(4, 128, generator=generator)  # of both signs
    found = rlg(probabilities_observed(rows, features, client, observation), client).tolist()
    assert set(found) == {1, 4, 9}
    assert len(found) == 4


def test_rlg_finds_nothing_in_nothing() -> None:
    """A gradient of rank one whose rows have no single negative entry."""
    client = FedSGD(network())
    rows = torch.tensor([[1.0, -1.0, -1.0, 1.0] + [0.0] * 6] * 2)
    seen = probabilities_observed(rows, torch.ones(2, 128), client, observe(client, [0, 1]))
    with pytest.raises(ObservationError, match=r"'rlg' found no class.*counts"):
        rlg(seen, client)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "client",
    [
        FedAvg(network(), learning_rate=0.02, epochs=2, batch_size=2),
        FedAvg(network(), learning_rate=0.01, momentum=0.9, epochs=3),
        Average(FedSGD(network()), sizes=[1, 3]),
    ],
    ids=["fedavg", "fedavg with momentum", "average"],
)
def test_other_protocols_send_a_scaled_gradient(client: ClientOperator, rule: Rule) -> None:
    """Small local steps, and averages, are read like one gradient."""
    labels = [0, 2, 5, 8]
    assert recover(rule, observe(client, labels), client).values.tolist() == labels


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("settings", [{"layers": ["3.*"]}, {"transport": "float16"}, {"transport": "12-bit"}])
def test_rules_read_what_is_sent(rule: Rule, settings: dict[str, Any]) -> None:
    """The last layer alone is enough, and rounding to half the digits does no harm."""
    client = build_client(network(), ClientSpec(**settings), 3)
    labels = [1, 4, 6]
    seen = observe(client, labels)
    assert recover(rule, seen, operator(seen, network())).values.tolist() == labels


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("defence", [Gaussian(sigma=1.0), Prune(fraction=0.95)], ids=lambda d: d.name)
def test_defended_updates_give_labels(rule: Rule, defence: Any) -> None:
    """Perhaps wrong ones, but B of them."""
    seen = observe(defence.wrap(FedSGD(network())), [1, 4, 6])
    found = recover(rule, seen, operator(seen, network())).values
    assert len(found) == 3
    assert 0 <= found.min() <= found.max() < CLASSES


def test_f_may_be_the_layer_itself() -> None:
    """A bias-free one-layer classifier of flat images, and one with a bias."""
    for bias in (True, False):
        torch.manual_seed(0)
        client = FedSGD(nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES, bias=bias)))
        rules: list[Rule] = ["counts", "column-minima", "rlg"] + (["ilrg"] if bias else [])
        for rule in rules:
            assert recover(rule, observe(client, [3, 7]), client).values.tolist() == [3, 7]
