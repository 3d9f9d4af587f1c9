"""GI-NAS: the search space is what it says, the search is seeded and trains nothing, and the best first loss is fitted."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from gradleak.attacks import Problem, attack
from gradleak.attacks.gi_nas import UPSAMPLING, Architecture, SkipGenerator, architecture, search_space_size
from gradleak.cinet import CINet
from gradleak.client import FedSGD, simulate
from gradleak.data import load
from gradleak.distance import DISTANCES
from gradleak.errors import SpecError
from gradleak.invert import invert
from gradleak.labels import recover
from gradleak.spec import DataSpec


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def problem() -> Problem:
    torch.manual_seed(0)
    client = FedSGD(nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(512, 10)))
    truth = load(DataSpec(source="sample", batch=2, size=16))
    observation = simulate(client, truth)
    return Problem(
        observation=observation, client=client, observed=observation.update, labels=truth.labels, gain_sensitivity=1.0
    )


def searched(problem: Problem, *, seed: int = 0, candidates: int = 6) -> SkipGenerator:
    torch.manual_seed(seed)
    model = attack("gi-nas", channels=8, candidates=candidates).image_model(problem)
    assert isinstance(model, SkipGenerator)
    return model


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_the_search_space_has_its_size_and_begins_with_cinet(blocks: int) -> None:
    size = search_space_size(blocks)
    assert size == 3 * 2 ** (blocks * (blocks - 1) // 2)
    every = [architecture(index, blocks) for index in range(size)]
    assert len(set(every)) == size
    assert every[0] == Architecture("nearest")
    assert all(0 <= i < j < blocks for found in every for i, j in found.skips)


def test_without_skips_it_is_cinet() -> None:
    sizes = {"batch": 2, "image_shape": (3, 12, 20), "channels": 8}
    torch.manual_seed(0)
    ours = SkipGenerator(Architecture("nearest"), **sizes)  # type: ignore[arg-type]
    torch.manual_seed(0)
    theirs = CINet(**sizes)  # type: ignore[arg-type]
    assert torch.equal(ours(), theirs())


@pytest.mark.parametrize("upsampling", UPSAMPLING)
def test_every_skip_connection_matters_and_is_trained(upsampling: str) -> None:
    skips = ((0, 1), (0, 2), (1, 2))
    torch.manual_seed(0)
    model = SkipGenerator(Architecture(upsampling, skips), batch=2, image_shape=(3, 16, 16), channels=8)
    images = model()
    assert images.shape == (2, 3, 16, 16)
    images.square().sum().backward()
    for skip in model.skips:
        gradient = skip.get_parameter("weight").grad
        assert gradient is not None
        assert bool(gradient.any())
    with torch.no_grad():
        for skip in model.skips:
            weight = skip.get_parameter("weight")
            kept = weight.clone()
            weight.zero_()
            assert not torch.equal(model(), images)
            weight.copy_(kept)


def test_the_search_takes_the_least_first_loss(problem: Problem) -> None:
    """The chosen generator is the one that was scored: its first images have the loss that the search saw."""
    model = searched(problem)
    losses = [loss for _, loss in model.candidates]
    assert len(losses) == 6
    assert losses == sorted(losses)
    assert len({found for found, _ in model.candidates}) == 6
    assert Architecture("nearest") in [found for found, _ in model.candidates]
    with torch.no_grad():
        images = model()
    update = problem.client(images, problem.labels)
    assert DISTANCES["cosine"](update, problem.observed)[0] == pytest.approx(losses[0], rel=1e-4)
    assert model.architecture == model.candidates[0][0]


def test_the_search_is_seeded_and_uses_one_start_for_all(problem: Problem) -> None:
    first, again, other = searched(problem), searched(problem), searched(problem, seed=1)
    assert first.candidates == again.candidates
    assert torch.equal(first(), again())
    assert first.candidates != other.candidates
    plain, more = searched(problem, candidates=1), searched(problem, candidates=8)
    assert torch.equal(plain.z0, more.z0)
    assert torch.equal(plain.stem[0].weight, more.stem[0].weight)  # type: ignore[arg-type]


def test_a_small_space_is_searched_whole(problem: Problem) -> None:
    model = searched(problem, candidates=1000)
    assert len(model.candidates) == search_space_size(3) == 24


def test_it_fits_the_update_and_reports_the_search(problem: Problem) -> None:
    labels = recover("known", problem.observation, problem.client)
    recipe = attack("gi-nas", rounds=30, channels=8, candidates=4, learning_rate=5e-3)
    found = invert(problem.observation, recipe, client=problem.client, labels=labels, progress=False)
    assert found.matching_loss < 0.5 * found.history[0]["loss"]
    assert json.loads(json.dumps(found.notes, allow_nan=False))["search_space"] == 24
    rows = found.notes["searched"]
    assert len(rows) == 4
    assert found.notes["architecture"] == {key: rows[0][key] for key in ("upsampling", "skips")}
    # the engine computes the update anew, in its own order of operations
    assert math.isclose(found.history[0]["loss"], rows[0]["matching_loss"], rel_tol=1e-3)


def test_members_of_a_group_search_for_themselves(problem: Problem) -> None:
    labels = recover("known", problem.observation, problem.client)
    recipe = attack("gi-nas", rounds=2, channels=8, candidates=3, group=2)
    torch.manual_seed(0)
    members = recipe.image_model(problem).members
    assert [len(member.candidates) for member in members] == [3, 3]  # type: ignore[arg-type, union-attr]
    assert members[0].candidates != members[1].candidates  # type: ignore[index, union-attr]
    found = invert(problem.observation, recipe, client=problem.client, labels=labels, progress=False)
    assert found.images.shape == (2, 3, 16, 16)


def test_settings_are_checked() -> None:
    with pytest.raises(SpecError, match="candidates"):
        attack("gi-nas", candidates=0)
    with pytest.raises(SpecError, match="no such setting"):
        attack("gi-nas", interpolation="nearest")
