"""Which layers leak: shares of what the images change, and what a run says of them, without the truth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradleak import run
from gradleak.client import FedAvg, FedSGD
from gradleak.distance import cosine, squared_l2
from gradleak.invariance import random_updates
from gradleak.layers import Layer, in_words, layers, modules
from gradleak.observation import Observation
from gradleak.results import purge
from gradleak.spec import RunSpec, parse

LABELS = torch.tensor([0, 1])
SHAPE = (3, 8, 8)


class Branches(nn.Module):
    """One branch sees the images, one sees zeros, and one parameter is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.seeing = nn.Linear(192, 4)
        self.blind = nn.Linear(192, 4)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        return torch.tanh(self.seeing(x)) + self.blind(0 * x)


@pytest.fixture(scope="module")
def found() -> dict[str, Layer]:
    torch.manual_seed(0)
    client = FedSGD(Branches())
    one, other = torch.rand(2, 2, *SHAPE)
    rows = layers(client(one, LABELS), client(other, LABELS), random_updates(client, LABELS, SHAPE))
    return {layer.name: layer for layer in rows}


def test_shares_add_up_and_a_layer_that_sees_no_image_has_none(found: dict[str, Layer]) -> None:
    assert list(found) == ["unused", "seeing.weight", "seeing.bias", "blind.weight", "blind.bias"]
    assert sum(layer.image_share for layer in found.values()) == pytest.approx(1)
    assert sum(layer.norm_share for layer in found.values()) == pytest.approx(1)
    assert found["seeing.weight"].image_share > 0.9
    assert found["blind.weight"].norm_share == found["blind.weight"].image_share == found["unused"].image_share == 0
    # zero updates have no direction to compare
    assert found["blind.weight"].distance is found["unused"].distance is found["unused"].image_sensitivity is None
    assert found["seeing.weight"].numbers == 768
    assert [found[name].module for name in ("unused", "seeing.bias")] == ["unused", "seeing"]


def test_a_share_is_the_tensors_part_of_the_squared_distance() -> None:
    """The matching loss between two updates that differ by their images alone, tensor by tensor."""
    torch.manual_seed(0)
    client = FedAvg(nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Sigmoid(), nn.Linear(8, 4)), learning_rate=0.1, epochs=3)
    first, second = random_updates(client, LABELS, SHAPE)
    whole, _ = squared_l2(first, second)
    for layer in layers(first, first, (first, second)):
        part, _ = squared_l2({"": first[layer.name]}, {"": second[layer.name]})
        assert layer.image_share == pytest.approx(part / whole, rel=1e-4)
        assert layer.distance == pytest.approx(0, abs=1e-12)


def test_the_misfit_is_the_cosine_distance_of_each_tensor(found: dict[str, Layer]) -> None:
    torch.manual_seed(0)
    client = FedSGD(Branches())
    one, other = torch.rand(2, 2, *SHAPE)
    observed, rebuilt = client(one, LABELS), client(other, LABELS)
    for name in ("seeing.weight", "seeing.bias", "blind.bias"):
        expected, _ = cosine({name: rebuilt[name]}, {name: observed[name]})
        assert found[name].distance == pytest.approx(expected)


def layer(name: str, share: float) -> Layer:
    return Layer(name, name.rpartition(".")[0] or name, 10, 0.0, share, 1.0, 0.0)


def test_modules_are_taken_as_deep_as_they_stay_few() -> None:
    rows = [layer(f"stage{i}.{j}.conv.weight", 1 / 24) for i in range(4) for j in range(6)]
    assert len(modules(rows, most=24)) == 24
    assert [m.name for m in modules(rows, most=23)] == ["stage0", "stage1", "stage2", "stage3"]
    assert modules(rows, most=1)[0].numbers == 60
    best = modules([*rows, layer("head.weight", 0.9)], most=5)[0]
    assert (best.name, best.image_share) == ("head", 0.9)


@given(st.lists(st.floats(0, 1), max_size=8))
@settings(max_examples=50, deadline=None)
def test_the_sentence_names_the_layers_of_the_largest_shares(shares: list[float]) -> None:
    total = sum(shares) or 1.0
    rows = [layer(f"m{i}.weight", share / total) for i, share in enumerate(shares)]
    text = in_words(rows)
    if not shares:
        assert text == ""
    elif not any(shares):
        assert "No layer" in text
    else:
        largest = max(range(len(shares)), key=lambda i: shares[i] / total)
        assert f"m{largest}" in text
        assert sum(f"m{i}" in text for i in range(len(shares))) <= 3


def small(**other: Any) -> RunSpec:
    return parse(
        {
            "device": "cpu",
            "threads": 1,
            "data": {"source": "sample", "batch": 2, "size": 16},
            "model": {"name": "lenet", "width": 2, "num_classes": 8},
            "attack": {"name": "cinet", "rounds": 2, "channels": 4},
            "evaluate": {"lpips": "off", "candidates": 2},
            **other,
        }
    )


def test_a_run_says_which_layers_leak_and_an_attack_on_the_file_says_the_same(tmp_path: Path) -> None:
    """The observation is all that it needs: no truth, and the same numbers from a saved update."""
    spec = small()
    client = run.simulate_client(spec)
    audited = run.audit(spec, tmp_path / "a", progress=False, client=client)
    client.observation.save(tmp_path / "update.safetensors")
    observation = Observation.load(tmp_path / "update.safetensors")
    inverted = run.invert_observation(observation, spec, tmp_path / "i", where="update", progress=False)
    assert inverted["layers"] == audited["layers"]
    assert [row["name"] for row in audited["layers"]] == list(client.observation.update)
    assert audited["image_sensitivity"] == max(row["image_sensitivity"] or 0 for row in audited["layers"])

    page = (tmp_path / "i" / "report.html").read_text("utf-8")
    assert in_words([Layer(**row) for row in audited["layers"]]) in page
    assert all(f">{row['name']}<" in page for row in audited["layers"])
    purge(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "result.json").read_text())["layers"] == audited["layers"]
    assert "Which layers leak" in (tmp_path / "a" / "report.html").read_text("utf-8")


def test_a_tensor_that_arrives_empty_has_no_misfit(tmp_path: Path) -> None:
    client = run.simulate_client(small(client={"layers": ["fc.*", "body.0.*"]}))
    emptied = {n: torch.zeros_like(t) if n == "fc.weight" else t for n, t in client.observation.update.items()}
    result = run.invert_observation(
        replace(client.observation, update=emptied), small(), tmp_path / "run", where="update", progress=False
    )
    row = next(row for row in result["layers"] if row["name"] == "fc.weight")
    assert row["norm_share"] == 0
    assert row["distance"] is None
    assert row["image_share"] > 0
