"""Opacus: that an observation holds what a private optimiser really sent, and the epsilon that its accountant counted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("opacus", reason="Opacus is not installed: pip install 'gradleak[opacus]'")

from opacus import PrivacyEngine

import gradleak as gl
from gradleak.errors import ObservationError, SpecError
from gradleak.integrations.opacus import dp_sgd, leak_by_noise, observe_private, plain_model, spent
from gradleak.observation import Observation

pytestmark = pytest.mark.filterwarnings("ignore")  # Opacus' own, of its random numbers and hooks

DELTA, CLIP = 1e-5, 0.7


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


def build() -> nn.Module:
    return gl.build_model(gl.ModelSpec(name="lenet"), image_shape=(3, 16, 16))


def truth(batch: int = 4) -> gl.Truth:
    return gl.load_data(gl.DataSpec(source="sample", batch=batch, size=16))


def private(noise: float, *, accountant: str = "rdp", seed: int = 0, **settings: Any) -> tuple[Any, ...]:
    """A real private client: its model, optimiser, loader and engine."""
    model, own, engine = build(), truth(), PrivacyEngine(accountant=accountant)
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(own.images, own.labels), batch_size=4),
        noise_multiplier=noise,
        max_grad_norm=CLIP,
        poisson_sampling=False,
        noise_generator=torch.Generator().manual_seed(seed),
        **settings,
    )
    return (*made, engine)


def step(noise: float, **settings: Any) -> tuple[observe_private, dict[str, Tensor], dict[str, Tensor]]:
    """One observed step; what ``p.grad`` held after it, and the weights before it."""
    model, optimizer, loader, engine = private(noise, **settings)
    before = {name.removeprefix("_module."): p.detach().clone() for name, p in model.named_parameters()}
    with observe_private(model, optimizer, engine, delta=DELTA, labels=truth().labels) as seen:
        for images, labels in loader:
            cross_entropy(model(images), labels).backward()
            optimizer.step()
    return seen, {name.removeprefix("_module."): p.grad.clone() for name, p in model.named_parameters()}, before


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(sum((a[name] - b[name]).square().sum() for name in b)) ** 0.5


def test_the_update_is_what_the_optimiser_left_in_the_gradients() -> None:
    """Noise included; under the model's own names, at the weights of before the step."""
    seen, gradients, before = step(1.0)
    update = seen.observation.update
    assert update.keys() == gradients.keys() == dict(build().named_parameters()).keys()
    assert all(torch.equal(update[name], gradients[name]) for name in update)
    assert all(torch.equal(seen.observation.weights[name], t) for name, t in before.items())
    assert (seen.observation.batch, seen.observation.image_shape) == (4, (3, 16, 16))


def test_without_noise_it_is_what_the_operator_computes() -> None:
    """Opacus' clipped mean, by the operator that an attacker builds from the observation."""
    seen, gradients, _ = step(0.0)
    client = gl.operator(seen.observation, build())
    update = client(truth().images, truth().labels)
    assert distance(update, gradients) < 1e-4 * distance(
        gradients, {name: torch.zeros_like(t) for name, t in gradients.items()}
    )
    assert seen.epsilon is None


def test_the_noise_has_the_size_that_was_declared() -> None:
    """z C / B for each entry, around the clipped mean."""
    (noisy, gradients, _), (_, clean, _) = step(2.0), step(0.0)
    count = sum(t.numel() for t in gradients.values())
    assert distance(gradients, clean) == pytest.approx(2.0 * CLIP / 4 * count**0.5, rel=0.05)
    (defence,) = noisy.observation.defences
    assert (defence.name, defence.settings["clip"], defence.settings["noise"]) == ("dp-sgd", CLIP, 2.0)


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_epsilon_is_the_accountants(accountant: str) -> None:
    """After several steps, the observed one among them; the defence counts as many."""
    model, optimizer, loader, engine = private(1.5, accountant=accountant)
    for number in range(3):
        optimizer.zero_grad()
        with observe_private(model, optimizer, engine, delta=DELTA) as seen:
            for images, labels in loader:
                cross_entropy(model(images), labels).backward()
                optimizer.step()
        assert seen.epsilon == pytest.approx(engine.get_epsilon(DELTA))
        assert seen.observation.defences[0].settings["steps"] == number + 1
    assert seen.observation.defences[0].settings["delta"] == seen.delta == DELTA
    if accountant == "rdp":
        assert dp_sgd(optimizer, engine.accountant, delta=DELTA).epsilon == pytest.approx(seen.epsilon)


def test_an_observation_can_be_saved_and_attacked(tmp_path: Any) -> None:
    """The defence is in the file, and the attack gets a model without Opacus' hooks."""
    model, optimizer, loader, engine = private(0.1)
    with observe_private(model, optimizer, engine, labels=truth().labels) as seen:
        for images, labels in loader:
            cross_entropy(model(images), labels).backward()
            optimizer.step()
    seen.save(tmp_path / "update.safetensors")
    observation = Observation.load(tmp_path / "update.safetensors")
    plain = plain_model(model)
    leak = gl.measure_leak(observation, plain, truth(), attack={"name": "cinet", "rounds": 2, "channels": 8})
    assert 0 <= leak.score < 1
    assert not any(hasattr(p, "grad_sample") for p in plain.parameters())
    assert all(hasattr(p, "grad_sample") for p in model.parameters())  # the client trains on


@pytest.mark.parametrize("steps", [0, 2])
def test_a_block_has_exactly_one_private_step(steps: int) -> None:
    model, optimizer, loader, engine = private(1.0)

    def train() -> None:
        for images, labels in loader:
            cross_entropy(model(images), labels).backward()
            for _ in range(steps):
                cross_entropy(model(images), labels).backward()
                optimizer.step()
                optimizer.zero_grad()

    with pytest.raises(ObservationError, match=f"{steps} private steps"), observe_private(model, optimizer, engine):
        train()


def test_clipping_layer_by_layer_is_refused() -> None:
    model, engine = build(), PrivacyEngine()
    own, layers = truth(), len(list(model.parameters()))
    wrapped, optimizer, _ = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(own.images, own.labels), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=[1.0] * layers,
        clipping="per_layer",
    )
    with pytest.raises(SpecError, match='clipping="flat"'):
        observe_private(wrapped, optimizer, engine)


def test_more_noise_buys_epsilon_and_hides_the_images() -> None:
    """A row for each noise multiplier: real steps, the accountant's epsilon of the planned training, the leak."""
    plan: dict[str, Any] = {"sample_rate": 0.01, "steps": 500, "delta": DELTA}
    attack = {"name": "cinet", "rounds": 60, "channels": 32}
    rows = leak_by_noise(build, truth(2), [0.0, 1.0, 4.0], clip=CLIP, attack=attack, **plan)
    assert [row.noise for row in rows] == [0.0, 1.0, 4.0]
    assert rows[0].epsilon is None
    assert rows[1].epsilon > rows[2].epsilon > 0
    for row in rows[1:]:
        expected = gl.DefenceSpec(name="dp-sgd", clip=CLIP, noise=row.noise, **plan)
        assert row.epsilon == pytest.approx(_epsilon(expected))
        assert row.leak.score < rows[0].leak.score - 0.2


def _epsilon(spec: gl.DefenceSpec) -> float | None:
    from gradleak.defences import DPSGD

    return DPSGD(**spec.settings).epsilon


def test_batch_norm_is_replaced_as_it_has_no_gradient_of_one_image() -> None:
    (row,) = leak_by_noise(
        lambda: gl.build_model(gl.ModelSpec(name="resnet20-cifar", width=4), image_shape=(3, 16, 16)),
        truth(2),
        [1.0],
        clip=CLIP,
        attack={"name": "cinet", "rounds": 1, "channels": 8},
    )
    assert row.leak.score < 0.5


def test_a_history_without_noise_has_no_epsilon() -> None:
    engine = PrivacyEngine()
    engine.accountant.history = [(1.0, 0.1, 5), (0.0, 0.1, 1)]
    assert spent(engine.accountant, delta=DELTA) is None
    engine.accountant.history = copy.copy([(1.0, 0.1, 5)])
    assert spent(engine.accountant, delta=DELTA) == pytest.approx(engine.get_epsilon(DELTA))
