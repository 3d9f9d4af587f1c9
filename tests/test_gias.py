"""GIAS and its generator: two phases that change what they say, files that come back whole, training that learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from gradleak.attacks import Problem, attack
from gradleak.attacks.gias import GIASAttack, LatentGenerator
from gradleak.client import FedSGD, simulate
from gradleak.data import load
from gradleak.dcgan import Generator, discriminator, train
from gradleak.errors import DataError, ModelError, ObservationError, SpecError
from gradleak.invert import Reconstruction, invert
from gradleak.labels import recover
from gradleak.observation import Observation, Truth
from gradleak.spec import DataSpec
from gradleak.tensors import read_tensors, write_tensors
from gradleak.threat import check_granted

SHAPE = (3, 8, 8)


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def reds() -> Tensor:
    """32 public images, each of one colour near red."""
    noise = torch.rand(32, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    colours = torch.tensor([0.8, 0.1, 0.1])[:, None, None] + 0.1 * noise
    return colours.expand(-1, -1, *SHAPE[1:]).contiguous()


@pytest.fixture(scope="module")
def trained(reds: Tensor) -> Generator:
    return train(reds, rounds=40, width=8, latent=8, batch=16, learning_rate=1e-3)


@pytest.fixture(scope="module")
def file(trained: Generator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generator") / "generator.safetensors"
    trained.save(path)
    return path


def victim() -> FedSGD:
    torch.manual_seed(0)
    return FedSGD(nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(128, 4)))


def observe(images: Tensor) -> Observation:
    return simulate(victim(), Truth(images, torch.arange(len(images))))


def run(recipe: Any, observation: Observation) -> Reconstruction:
    client = victim()
    return invert(observation, recipe, client=client, labels=recover("known", observation, client), progress=False)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))
class Watched(GIASAttack):
    """GIAS that notes latents and weights after every step (a frozen dataclass may hold a list)."""

    seen: list[tuple[Tensor, Tensor]]

    def project(self, image_model: nn.Module) -> None:
        assert isinstance(image_model, LatentGenerator)
        weights = torch.cat([p.detach().flatten() for p in image_model.generators.parameters()])
        self.seen.append((image_model.latents.detach().clone(), weights))


@pytest.mark.parametrize("weights", ["per-image", "shared"])
def test_the_first_phase_moves_the_latents_and_the_second_the_weights(weights: Any) -> None:
    recipe = Watched(rounds=6, latent_share=0.5, width=4, weights=weights, seen=[])
    found = run(recipe, observe(load(DataSpec(source="sample", batch=2, size=8)).images))
    latents, parameters = zip(*recipe.seen, strict=True)
    moved = [(not torch.equal(latents[t], latents[t + 1]), not torch.equal(parameters[t], parameters[t + 1])) for t in range(5)]
    assert moved == [(True, False)] * 2 + [(False, True)] * 3
    rates = [row["learning_rate"] for row in found.history]
    assert rates[0] == recipe.learning_rate
    assert rates[3] == recipe.weight_learning_rate
    assert found.matching_loss < found.history[0]["loss"]


@pytest.mark.parametrize(("share", "phases"), [(0.0, 1), (0.5, 2), (1.0, 1)])
def test_a_phase_without_rounds_is_left_out(share: float, phases: int) -> None:
    recipe = GIASAttack(rounds=4, latent_share=share, width=4)
    model = LatentGenerator(Generator(image_shape=SHAPE, width=4), images=2, weights="shared")
    assert [phase.rounds for phase in recipe.phases(model)] == [4 // phases] * phases


def test_copies_start_equal_and_go_their_own_ways() -> None:
    """Per-image weights of a generator in eval mode give the same images as shared ones, from the same latents."""
    torch.manual_seed(0)
    generator = Generator(image_shape=SHAPE, width=4).eval()
    own, shared = (LatentGenerator(generator, images=3, weights=w) for w in ("per-image", "shared"))  # type: ignore[arg-type]
    shared.latents.data.copy_(own.latents.data)
    torch.testing.assert_close(own(), shared())
    own()[0].sum().backward()
    touched = [any(p.grad is not None and bool(p.grad.any()) for p in g.parameters()) for g in own.generators]
    assert touched == [True, False, False]


def test_a_generator_that_knows_such_images_starts_ahead(trained: Generator, file: Path) -> None:
    """The client's images come from the generator's own range: its latents alone find a better match than an untrained one."""
    with torch.no_grad():
        images = trained(torch.randn(2, 8, generator=torch.Generator().manual_seed(3)))
    observation = observe(images)
    known = run(attack("gias", rounds=30, latent_share=1.0, generator=str(file)), observation)
    unknown = run(attack("gias", rounds=30, latent_share=1.0, width=8, latent=8), observation)
    assert known.matching_loss < 0.5 * known.history[0]["loss"]
    assert known.matching_loss < 0.5 * unknown.matching_loss
    assert known.notes["surrogate_data"] is True
    assert unknown.notes["surrogate_data"] is False


def test_a_generator_file_comes_back_whole(trained: Generator, file: Path) -> None:
    again = Generator.load(file)
    assert (again.image_shape, again.latent, again.width) == (SHAPE, 8, 8)
    assert not again.training
    z = torch.randn(5, 8)
    assert torch.equal(again(z), trained(z))
    assert all(p.requires_grad for p in again.parameters())


def test_a_generator_of_images_like_the_clients_must_be_granted(file: Path) -> None:
    """A trained generator is surrogate data: the error names the grant and its key. An untrained one needs nothing."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SHAPE[1] * SHAPE[2], 10))
    truth = Truth(images=torch.rand(2, *SHAPE), labels=torch.arange(2))
    bare, granted = (simulate(FedSGD(model), truth, grant_surrogate_data=grant) for grant in (False, True))
    with pytest.raises(ObservationError, match=r"'gias' requires.*surrogate-data.*threat.surrogate_data"):
        check_granted("gias", attack("gias", generator=str(file)), bare)
    check_granted("gias", attack("gias", generator=str(file)), granted)
    check_granted("gias", attack("gias"), bare)


def test_a_generator_of_another_size_is_refused(file: Path) -> None:
    larger = dataclasses.replace(observe(torch.rand(1, *SHAPE)), image_shape=(3, 16, 16))
    problem = Problem(
        observation=larger, client=victim(), observed=larger.update, labels=torch.tensor([0]), gain_sensitivity=1.0
    )
    with pytest.raises(ModelError, match="images of 3x8x8, the client's are 3x16x16"):
        attack("gias", generator=str(file)).image_model(problem)


def test_damaged_generator_files_are_named(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        Generator.load(tmp_path / "absent.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cut\.safetensors"):
        Generator.load(cut)
    tensors, metadata = read_tensors(file)
    other = tmp_path / "other.safetensors"
    write_tensors(other, tensors, {"format": "something"})
    with pytest.raises(ModelError, match="expected 'gradleak-generator'"):
        Generator.load(other)
    for sizes in ('{"image_shape": [3, 8, 8], "latent": 8, "width": 16}', '{"latent": 8}', "[", '{"image_shape": [3, 0, 0]}'):
        write_tensors(other, tensors, {**metadata, "generator": sizes})
        with pytest.raises(ModelError, match=r"other\.safetensors"):
            Generator.load(other)
    # a header alone cannot ask for memory
    write_tensors(other, tensors, {**metadata, "generator": '{"image_shape": [3, 8, 8], "latent": 8, "width": 100000}'})
    with pytest.raises(ModelError, match="has shape"):
        Generator.load(other)


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 64, 64), (1, 28, 28), (3, 8, 8), (3, 12, 20)])
def test_both_networks_take_any_size(shape: tuple[int, int, int]) -> None:
    with torch.no_grad():
        images = Generator(image_shape=shape, width=4)(torch.randn(2, 100))
        assert images.shape == (2, *shape)
        assert images.min() >= 0
        assert images.max() <= 1
        assert discriminator(image_shape=shape, width=4)(images).shape == (2, 1)


def test_training_learns_the_colour_of_public_images(reds: Tensor, trained: Generator) -> None:
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    untrained = Generator(image_shape=SHAPE, width=8, latent=8)
    wanted = reds.mean(dim=(0, 2, 3))
    with torch.no_grad():
        after, before = ((g(z).mean(dim=(0, 2, 3)) - wanted).norm() for g in (trained, untrained))
    assert after < 0.7 * before


def test_training_repeats_itself_and_leaves_the_random_state(reds: Tensor) -> None:
    state = torch.get_rng_state()
    first, second, third = (train(reds, rounds=2, width=4, latent=4, batch=8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    z = torch.randn(2, 4)
    assert torch.equal(first(z), second(z))
    assert not torch.equal(first(z), third(z))


@pytest.mark.parametrize(
    "images",
    [torch.rand(1, 3, 8, 8), torch.rand(4, 3, 4, 8), torch.rand(3, 8, 8), torch.rand(4, 3, 8, 8) * 255],
    ids=["one", "small", "no batch", "0 to 255"],
)
def test_training_refuses_what_are_not_images(images: Tensor) -> None:
    with pytest.raises(DataError, match="training"):
        train(images, rounds=1)


def test_settings_are_checked() -> None:
    with pytest.raises(SpecError, match="latent_share"):
        attack("gias", latent_share=2.0)
    with pytest.raises(SpecError, match="weights"):
        attack("gias", weights="both")
