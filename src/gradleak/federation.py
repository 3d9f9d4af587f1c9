"""One round of federated training with defended clients: what a defence costs in accuracy on held-out images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradleak.client import build_client
from gradleak.defences import Defence, prepare
from gradleak.errors import DataError
from gradleak.observation import Truth
from gradleak.protocols import Mode
from gradleak.spec import ClientSpec


@dataclass(frozen=True)
class HeldOut:
    """How well a model does on images that no client has.

    Attributes:
        accuracy: Share of images whose class has the largest output, in [0, 1].
        loss: Mean cross-entropy; more sensitive than the accuracy.
    """

    accuracy: float
    loss: float


@torch.no_grad()
def held_out_score(model: nn.Module, held_out: Truth, *, mode: Mode = "eval", batch: int = 256) -> HeldOut:
    """Accuracy and loss on held-out images.

    Args:
        model: F.
        held_out: Images that no client has.
        mode: ``eval``: batch norm uses running statistics; ``train``: those of the images, ``batch`` at a time.
        batch: Images in one pass.
    """
    network = copy.deepcopy(model).train(mode == "train")
    weight = next(network.parameters())
    images, labels = held_out.images.to(weight), held_out.labels.to(weight.device)
    outputs = torch.cat([network(some) for some in images.split(batch)])
    return HeldOut(accuracy=float((outputs.argmax(1) == labels).double().mean()), loss=float(cross_entropy(outputs, labels)))


@torch.no_grad()
def federated_round(
    model: nn.Module,
    spec: ClientSpec,
    clients: Sequence[Truth],
    *,
    rate: float,
    defences: Sequence[Defence] = (),
    seed: int = 0,
) -> nn.Module:
    r"""The server's model after one round: :math:`W \leftarrow W - \eta \sum_k \frac{n_k}{n} A_k(x_k, y_k)`.

    Each client applies the defences to its own update, with draws of its own; the server sees their average. Running
    statistics stay as they are. For FedAvg, whose update is already a step, eta is 1.

    Args:
        model: F with W; it stays as it is. With DP-SGD its batch norm is replaced (:func:`gradleak.defences.prepare`).
        spec: ``fedsgd`` or ``fedavg``.
        clients: Each one's images and labels.
        rate: eta, the server's step.
        defences: Of every client.
        seed: Of the clients' draws; client k has ``seed + k``.

    Raises:
        DataError: There are no clients, or the protocol is already an average.
    """
    if not clients or spec.protocol == "average":
        raise DataError("a round needs at least one client, each with a protocol of its own (fedsgd or fedavg)")
    after, _ = prepare(copy.deepcopy(model), defences)
    named, total = dict(after.named_parameters()), sum(len(truth.labels) for truth in clients)
    before = copy.deepcopy(after)
    for k, truth in enumerate(clients):
        with torch.enable_grad():
            client = build_client(before, spec, len(truth.labels), defences=defences)
            weight = next(iter(client.weights.values()))
            images, labels = truth.images.to(weight), truth.labels.to(weight.device)
            update = client.sent(images, labels, torch.Generator().manual_seed(seed + k))
        for name, change in update.items():
            named[name].sub_(rate * len(truth.labels) / total * change)
    return after


def accuracy_after_round(
    model: nn.Module,
    spec: ClientSpec,
    clients: Sequence[Truth],
    held_out: Truth,
    *,
    rate: float,
    defences: Sequence[Defence] = (),
    seed: int = 0,
) -> HeldOut:
    """What a defence costs in one round: :func:`held_out_score` in the client's mode after :func:`federated_round`."""
    after = federated_round(model, spec, clients, rate=rate, defences=defences, seed=seed)
    return held_out_score(after, held_out, mode=spec.mode)


def best_rate(
    model: nn.Module, spec: ClientSpec, clients: Sequence[Truth], validation: Truth, *, rates: Sequence[float]
) -> float:
    """The server's step of least loss on validation images after one undefended round."""
    return min(rates, key=lambda rate: accuracy_after_round(model, spec, clients, validation, rate=rate).loss)
