"""Every attack against every client protocol on one small model: it runs and gives images, or says why it cannot."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from gradleak import data
from gradleak.attacks import ATTACKS, Attack, attack
from gradleak.client import build_client, operator, simulate
from gradleak.errors import ObservationError
from gradleak.evaluate import evaluate
from gradleak.invert import Reconstruction, invert
from gradleak.labels import recover
from gradleak.observation import Observation, Truth
from gradleak.spec import ClientSpec, DataSpec
from gradleak.threat import check_granted

PROTOCOLS: dict[str, dict[str, Any]] = {
    "fedsgd": {},
    "fedsgd, eval mode": {"mode": "eval"},
    "fedavg, given order": {"protocol": "fedavg", "learning_rate": 0.1, "epochs": 2, "local_batch": 2, "momentum": 0.5},
    "fedavg, shuffled": {"protocol": "fedavg", "learning_rate": 0.1, "epochs": 2, "local_batch": 2, "order": "shuffled"},
    "average": {"protocol": "average", "clients": [1, 3], "mode": "eval"},
    "some layers": {"layers": ["0.*", "4.*"]},
    "float16": {"transport": "float16"},
    "8-bit": {"transport": "8-bit"},
}

#: Small and quick where an attack's own settings are not; the rest is its preset.
SMALL: dict[str, dict[str, Any]] = {
    "cinet": {"channels": 4},
    "cinet-paper": {"channels": 4},
    "cinet-reference": {"channels": 4},
    "gi-nas": {"channels": 4, "candidates": 3},
    "gias": {"width": 4},
}


def model(kind: str) -> nn.Sequential:
    """For 3 x 8 x 8 images and 8 classes, with a batch norm; or a linear layer first, wide enough for the closed form."""
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 400), nn.ReLU(), nn.Identity(), nn.Linear(400, 8))
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.Sigmoid(), nn.Flatten(), nn.Linear(96, 8)
    )


def truth() -> Truth:
    return data.load(DataSpec(source="sample", batch=4, size=8))


@functools.cache
def observation(protocol: str, kind: str) -> Observation:
    spec = ClientSpec.model_validate(PROTOCOLS[protocol])
    client = build_client(model(kind), spec, 4)
    statistics = kind == "convolutions"
    return simulate(client, truth(), grant_batch_statistics=statistics, grant_surrogate_data=True, seed=5)


def recipe(name: str, **changed: Any) -> Attack:
    return attack(name, **{**SMALL.get(name, {}), "rounds": 2, "snapshots": 1, **changed})


def run(name: str, protocol: str, *, kind: str = "convolutions", seed: int = 0, **changed: Any) -> Reconstruction:
    chosen, held = recipe(name, **changed), observation(protocol, kind)
    check_granted(name, chosen, held)
    client = operator(held, model(kind))
    return invert(held, chosen, client=client, labels=recover("known", held, client), seed=seed, progress=False)


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_meets_every_protocol(name: str, protocol: str) -> None:
    """Images of the right shape in [0, 1], of the least matching loss of all rounds; or the error that the docs name."""
    if name == "analytic":
        with pytest.raises(ObservationError, match="first layer"):
            run(name, protocol)
        return
    found = run(name, protocol)
    assert found.images.shape == (4, 3, 8, 8)
    assert 0 <= float(found.images.min()) <= float(found.images.max()) <= 1
    assert found.rounds == len(found.history) == 2
    assert found.matching_loss <= min(row["loss"] for row in found.history)
    assert sorted(found.labels.values.tolist()) == sorted(truth().labels.tolist()) or found.labels.rule == "joint"


#: What keeps the closed form from the images: an order that it does not know, a layer that is not sent, rounded rows.
REFUSALS = {"fedavg, shuffled": "by chance", "some layers": "not in the update", "float16": "mix them", "8-bit": "mix them"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_closed_form_is_exact_or_says_why_not(protocol: str) -> None:
    """On a model that begins with a linear layer."""
    if protocol in REFUSALS:
        with pytest.raises(ObservationError, match=f"analytic.*{REFUSALS[protocol]}"):
            run("analytic", protocol, kind="linear")
        return
    found = run("analytic", protocol, kind="linear")
    assert evaluate(found.images, truth(), lpips="off").summary["psnr"]["worst"] > 60  # type: ignore[operator]


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "analytic"])
def test_restarts_keep_the_least_matching_loss(name: str) -> None:
    """``repeat``: the seeds that follow, the best by matching loss and by nothing else, with its images."""
    alone = [run(name, "fedsgd", seed=seed) for seed in (3, 4, 5)]
    together = run(name, "fedsgd", seed=3, repeat=3)
    best = min(alone, key=lambda found: found.matching_loss)
    assert len({found.matching_loss for found in alone}) > 1
    assert together.matching_loss == best.matching_loss
    assert torch.equal(together.images, best.images)


def test_the_table_has_every_setting_of_a_client() -> None:
    """One that is added must be added here."""
    changed = {key for settings in PROTOCOLS.values() for key in settings}
    assert changed == set(ClientSpec.model_fields) - {"loss", "seed"}
