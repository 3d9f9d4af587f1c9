"""One federated round: it is the step it says it is, and protection costs accuracy."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradleak.defences import Gaussian, Prune
from gradleak.errors import DataError
from gradleak.federation import accuracy_after_round, best_rate, federated_round, held_out_score
from gradleak.observation import Truth
from gradleak.spec import ClientSpec

SGD = ClientSpec()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(128, 3)).double()


def bright(images: int, *, seed: int) -> Truth:
    """Images whose class is the channel that is brightest: a step of gradient descent learns it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % 3
    pixels = 0.5 * torch.rand(images, 3, 8, 8, generator=generator, dtype=torch.float64)
    pixels[torch.arange(images), labels] += 0.5
    return Truth(pixels, labels)


def test_a_round_is_one_step_on_all_the_clients_images() -> None:
    """Clients of different sizes, weighted by them, give the step on the union; the caller's model stays."""
    model, truth = network(), bright(10, seed=1)
    clients = [Truth(truth.images[:3], truth.labels[:3]), Truth(truth.images[3:], truth.labels[3:])]
    after = federated_round(model, SGD, clients, rate=0.3)
    plain = network()
    cross_entropy(plain(truth.images), truth.labels).backward()
    for p, q, r in zip(after.parameters(), plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach() - 0.3 * q.grad)
        assert torch.equal(q, r)


def test_a_round_of_fedavg_with_one_step_is_that_step() -> None:
    """FedAvg's update already holds the client's rate."""
    clients = [bright(6, seed=1), bright(6, seed=2)]
    one = federated_round(network(), ClientSpec(protocol="fedavg", learning_rate=0.2), clients, rate=1.0)
    other = federated_round(network(), SGD, clients, rate=0.2)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_more_protection_costs_more() -> None:
    """A round helps, and the more noise or pruning the less; each client draws noise of its own, the same for one seed."""
    model, clients, held_out = network(), [bright(12, seed=k) for k in range(4)], bright(60, seed=9)
    rate = best_rate(model, SGD, clients, bright(60, seed=8), rates=(0.01, 0.1, 1.0))
    before, plain = held_out_score(model, held_out), accuracy_after_round(model, SGD, clients, held_out, rate=rate)
    assert plain.loss < before.loss
    assert plain.accuracy > before.accuracy + 0.1

    def loss(*defences: Gaussian | Prune, seed: int = 0) -> float:
        return accuracy_after_round(model, SGD, clients, held_out, rate=rate, defences=defences, seed=seed).loss

    noisy = [loss(Gaussian(sigma=s)) for s in (0, 0.3, 3, 30)]
    assert noisy[0] == pytest.approx(plain.loss)
    assert noisy == sorted(noisy)
    assert loss(Prune(fraction=0.99)) > plain.loss
    assert loss(Gaussian(sigma=1)) == loss(Gaussian(sigma=1)) != loss(Gaussian(sigma=1), seed=1)


def test_noise_of_many_clients_averages_out() -> None:
    """Sixteen clients with the same images and noise of their own miss the plain step by a quarter of one client's miss."""
    truth, model = bright(6, seed=1), network()
    plain = nn.utils.parameters_to_vector(federated_round(model, SGD, [truth], rate=1.0).parameters())

    def miss(count: int) -> float:
        after = federated_round(model, SGD, [truth] * count, rate=1.0, defences=[Gaussian(sigma=1)])
        return float((nn.utils.parameters_to_vector(after.parameters()) - plain).detach().norm())

    assert miss(16) == pytest.approx(miss(1) / 4, rel=0.15)


def test_a_round_needs_clients() -> None:
    with pytest.raises(DataError, match="at least one client"):
        federated_round(network(), SGD, [], rate=1.0)
    with pytest.raises(DataError, match="protocol of its own"):
        federated_round(network(), ClientSpec(protocol="average", clients=2), [bright(4, seed=0)], rate=1.0)
