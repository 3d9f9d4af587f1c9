"""The whitened distance: its value and cotangent, its metric, and where it is left out."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import gradleak as gl
from gradleak import mixed, whitening
from gradleak.attacks import attack
from gradleak.attacks.recipe import Problem
from gradleak.defences import Gaussian
from gradleak.distance import cosine
from gradleak.invert import _Loop
from gradleak.labels import Labels
from gradleak.whitening import Factors, Whitened, factors, whitened

SHAPES = {"conv": (4, 3, 3, 3), "one by one": (5, 4, 1, 1), "linear": (3, 6), "bias": (7,)}


def update(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def dense(found: Factors, shape: tuple[int, ...]) -> Tensor:
    """M_l as a matrix, column by column."""
    n = torch.Size(shape).numel()
    return torch.stack([found(column.view(shape)).flatten() for column in torch.eye(n, dtype=torch.float64)], dim=1)


@pytest.fixture(scope="module")
def metric() -> dict[str, Factors]:
    return factors((update(seed) for seed in range(10)), damping=0.01)


def test_each_matrix_is_symmetric_and_positive(metric: dict[str, Factors]) -> None:
    for name, shape in SHAPES.items():
        matrix = dense(metric[name], shape)
        assert torch.allclose(matrix, matrix.T)
        assert torch.linalg.eigvalsh(matrix).min() > 0


@pytest.mark.parametrize("towards", [0.1, 1.0, -1.0])
def test_value_and_cotangent_are_those_of_the_cosine_in_the_metric(metric: dict[str, Factors], towards: float) -> None:
    """Also where the angle is small, and where it is obtuse."""
    target = update(100)
    g = {name: (target[name] + towards * 3 * t).requires_grad_() for name, t in update(101).items()}
    if towards < 0:
        g = {name: (t - 2 * target[name]).detach().requires_grad_() for name, t in g.items()}

    def product(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return sum(((a[name] * metric[name](b[name])).sum() for name in a), torch.zeros((), dtype=torch.float64))

    expected = 1 - product(g, target) / (product(g, g) * product(target, target)).sqrt()
    gradients = torch.autograd.grad(expected, list(g.values()))
    value, cotangent = Whitened(metric, target)({name: t.detach() for name, t in g.items()}, target)
    assert value == pytest.approx(float(expected.detach()), rel=1e-9)
    for found, gradient in zip(cotangent.values(), gradients, strict=True):
        assert torch.allclose(found, gradient, rtol=1e-9, atol=1e-12)


def test_it_does_not_depend_on_the_length_of_an_update(metric: dict[str, Factors]) -> None:
    distance, g = Whitened(metric, target := update(1)), update(2)
    assert distance({name: 7 * t for name, t in g.items()}, target)[0] == pytest.approx(distance(g, target)[0], rel=1e-12)
    assert distance({name: 7 * t for name, t in target.items()}, target)[0] == pytest.approx(0, abs=1e-15)


def test_a_small_distance_keeps_its_digits_in_float32(metric: dict[str, Factors]) -> None:
    """1 - cos has none left below 6e-8."""
    target, g = update(1), {name: t + 1e-5 * update(2)[name] for name, t in update(1).items()}
    expected = Whitened(metric, target)(g, target)[0]
    half = {
        name: Factors(f.scale, *(None if m is None else m.float() for m in (f.outputs, f.inputs, f.kernel)))
        for name, f in metric.items()
    }
    single = {name: t.float() for name, t in target.items()}
    found = Whitened(half, single)({name: t.float() for name, t in g.items()}, single)[0]
    assert 0 < expected < 1e-8
    assert found == pytest.approx(expected, rel=0.05)


def test_updates_of_a_kronecker_covariance_become_white() -> None:
    """With samples enough, the square root of M turns their covariance into nearly a multiple of the identity."""
    generator = torch.Generator().manual_seed(0)

    def root(n: int) -> Tensor:
        return torch.randn(n, n, generator=generator, dtype=torch.float64) + 2 * torch.eye(n, dtype=torch.float64)

    a, b, c = root(3), root(4), root(2)
    samples = [
        torch.einsum("xo,yi,zk,oik->xyz", a, b, c, torch.randn(3, 4, 2, generator=generator, dtype=torch.float64))
        for _ in range(4000)
    ]
    (found,) = factors(({"w": 5 + s} for s in samples), damping=0.01).values()
    covariance = torch.cov(torch.stack([s.flatten() for s in samples]).T)
    before, after = torch.linalg.eigvalsh(covariance), torch.linalg.eigvals(dense(found, (3, 4, 2)) @ covariance).real
    assert before.max() / before.min() > 1000
    assert after.max() / after.min() < 3


def test_what_the_images_do_not_change_is_left_out() -> None:
    """A tensor of round-off, such as the gradient of a bias before a batch norm, would else weigh as much as the others."""
    noise = [{"w": update(k)["conv"], "b": 1e-9 * update(k)["bias"]} for k in range(5)]
    found = factors(noise, damping=0.01)
    assert found["b"].scale == 0
    assert found["w"].scale > 0


def test_large_factors_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whitening, "LARGEST", 5)
    found = factors(({"w": update(k)["linear"]} for k in range(5)), damping=0.01)["w"]
    assert (found.outputs is None, found.inputs is None, found.kernel is None) == (False, True, True)


def test_eigenvalues_below_the_damping_are_taken_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor is then of few columns, and its matrix the full one within the share that is left out, up to a scale."""
    generator = torch.Generator().manual_seed(0)
    faint = 10 ** -torch.linspace(0, 4, 12, dtype=torch.float64)[:, None]
    updates = [{"w": faint * torch.randn(12, 5, generator=generator, dtype=torch.float64)} for _ in range(50)]
    few = factors(iter(updates), damping=0.1)["w"]
    monkeypatch.setattr(whitening, "TAIL", 0.0)
    full = factors(iter(updates), damping=0.1)["w"]
    assert few.outputs is not None
    assert full.outputs is not None
    assert few.outputs.shape[1] < 6
    assert full.outputs.shape == (12, 12)
    one, other = dense(few, (12, 5)), dense(full, (12, 5))
    assert torch.allclose(one, one.T)
    ratios = torch.linalg.eigvals(torch.linalg.solve(other, one)).real
    assert 1 < ratios.max() / ratios.min() < 1.3
    assert ratios.mean() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("tail", [0.0, 1.0, 1e9])
def test_a_product_is_that_of_the_factors_and_leaves_its_argument_as_it_was(
    tail: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole factors, those of few columns, and both: products are computed in place of each other."""
    monkeypatch.setattr(whitening, "TAIL", tail)
    for name, found in factors((update(seed) for seed in range(5)), damping=0.05).items():
        g = update(7)[name]
        before = g.clone()
        given = [found.outputs, found.inputs, found.kernel]
        whole = [f if f is None or f.shape[0] == f.shape[1] else torch.eye(len(f)).double() - f @ f.T for f in given]
        expected = found.scale * g.reshape(*g.shape[:2], -1) if g.ndim > 1 else found.scale * g
        for factor, product in zip(whole, ("ao,oik->aik", "ai,oik->oak", "ak,oik->oia"), strict=True):
            if factor is not None:
                expected = torch.einsum(product, factor, expected)
        torch.testing.assert_close(found(g), expected.reshape(g.shape))
        assert torch.equal(g, before)


@pytest.mark.parametrize("columns", [3, 40, 128], ids=str)
def test_products_of_large_matrices_are_those_of_small_ones(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which another library computes."""
    torch.manual_seed(0)
    outputs, inputs = (torch.linalg.qr(torch.randn(n, n)).Q[:, :columns] for n in (192, 128))
    if columns == 128:
        inputs = inputs @ inputs.T
    weighed = Factors(0.5, outputs, inputs, torch.rand(9, 9))
    g = torch.randn(192, 128, 3, 3)
    found = weighed(g)
    monkeypatch.setattr(whitening, "ONEDNN_FROM", g.numel() + 1)
    torch.testing.assert_close(found, weighed(g), rtol=1e-4, atol=1e-4)


def test_only_the_asked_for_tensors_have_factors_and_these_are_the_same() -> None:
    """What is round-off is judged by the whole update."""
    whole = factors((update(seed) for seed in range(5)), damping=0.05)
    some = factors((update(seed) for seed in range(5)), damping=0.05, names=["linear", "bias"])
    assert set(some) == {"linear", "bias"}
    for name, found in some.items():
        assert found.scale == whole[name].scale
        torch.testing.assert_close(found(update(9)[name]), whole[name](update(9)[name]), rtol=0, atol=0)


def setting() -> tuple[gl.Observation, gl.FedSGD, gl.Truth]:
    truth = gl.Truth(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(5)), torch.tensor([0, 1, 2, 3]))
    client = gl.FedSGD(gl.build_model(gl.ModelSpec(name="convnet", activation="sigmoid"), image_shape=(3, 16, 16)))
    return gl.simulate(client, truth), client, truth


def test_the_truth_is_at_distance_zero_and_the_metric_is_repeatable() -> None:
    observation, client, truth = setting()
    one, two = (whitened(client, truth.labels, observation.update, (3, 16, 16)) for _ in range(2))
    sent = client(truth.images, truth.labels)
    assert one(sent, observation.update)[0] == pytest.approx(0, abs=1e-10)
    other = client(1 - truth.images, truth.labels)
    assert one(other, observation.update)[0] == two(other, observation.update)[0] > 1e-3


def test_the_attack_says_which_distance_it_had_and_the_cosine_that_it_reached() -> None:
    observation, client, truth = setting()
    recipe = attack("cinet", rounds=3, channels=8)
    found = gl.invert(observation, recipe, client=client, labels=Labels(truth.labels, "known"), progress=False)
    assert found.notes["whitened"] is True
    assert recipe.distance == "whitened"
    assert found.notes["cosine_distance"] > 0
    assert found.matching_loss != pytest.approx(found.notes["cosine_distance"], rel=1e-3)
    plain = attack("cinet-reference", rounds=3, channels=8)
    assert (
        "whitened"
        not in gl.invert(observation, plain, client=client, labels=Labels(truth.labels, "known"), progress=False).notes
    )


def test_a_defended_update_is_compared_by_the_cosine() -> None:
    """Its noise is not in the covariance."""
    truth = setting()[2]
    model = gl.build_model(gl.ModelSpec(name="convnet", activation="sigmoid"), image_shape=(3, 16, 16))
    client = gl.client.build_client(model, gl.ClientSpec(), 4, defences=[Gaussian(sigma=0.01)])
    observation = gl.simulate(client, truth)
    found = gl.invert(
        observation, attack("cinet", rounds=2, channels=8), client=client, labels=Labels(truth.labels, "known"), progress=False
    )
    assert found.notes["whitened"] is False
    update = client(found.images, truth.labels)
    assert found.notes["cosine_distance"] == pytest.approx(found.matching_loss, rel=1e-6)
    assert cosine(update, observation.update)[0] > 0


def test_the_metric_is_in_float32_also_where_mixed_rounds_make_it() -> None:
    observation, client, truth = setting()
    plain = whitened(client, truth.labels, observation.update, (3, 16, 16))
    with mixed.rounds(True, torch.device("cpu")):
        made_inside = whitened(client, truth.labels, observation.update, (3, 16, 16))
    for name, factor in plain.factors.items():
        assert factor.scale == made_inside.factors[name].scale
    assert all(torch.equal(made_inside.whitened[name], t) for name, t in plain.whitened.items())


@pytest.mark.parametrize(("mode", "batch", "damping"), [("train", 4, 0.125), ("train", 64, 0.5 / 64), ("eval", 64, 0.01)])
def test_a_larger_batch_has_less_damping_where_images_are_coupled(
    mode: str, batch: int, damping: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    monkeypatch.setattr(whitening, "factors", lambda updates, damping, names: used.append(damping) or {})
    monkeypatch.setattr(whitening, "Whitened", lambda found, observed, shard: found)
    client = gl.FedSGD(gl.build_model(gl.ModelSpec(name="resnet18-cifar", width=2), image_shape=(3, 16, 16)), mode=mode)
    whitened(client, torch.zeros(batch, dtype=torch.long), {}, (3, 16, 16))
    assert used == [damping]


def test_the_metric_is_made_before_the_rounds_own_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both at a time would take twice the memory of a round."""
    observation, client, truth = setting()
    calls = []
    loop = sys.modules["gradleak.invert"]  # gl.invert is its function
    own, made = client.vjp, loop.distance_to
    monkeypatch.setattr(client, "to", lambda *_: client)
    monkeypatch.setattr(client, "vjp", lambda *a, **k: calls.append("round") or own(*a, **k))
    monkeypatch.setattr(loop, "distance_to", lambda *a: calls.append("metric") or made(*a))
    recipe = attack("cinet", rounds=2, channels=8)
    gl.invert(observation, recipe, client=client, labels=Labels(truth.labels, "known"), progress=False)
    assert calls[:2] == ["metric", "round"]
    assert calls.count("metric") == 1


def last_layers(monkeypatch: pytest.MonkeyPatch, *, threshold: float) -> Any:
    """A loop that compares all but the first convolution, and all of the update in the generator's last rounds and after."""
    monkeypatch.setattr(sys.modules["gradleak.attacks.cinet"], "WHITENED_EXPLAINED", threshold)
    observation, client, truth = setting()
    problem = Problem(observation, client, observation.update, truth.labels, gain_sensitivity=1.0)
    torch.manual_seed(0)
    recipe = attack("cinet", rounds=10, channels=8, pixel_share=0.4, matched=0.5, engine="exact")
    return _Loop(problem, recipe, Labels(truth.labels, "known"))


def test_the_last_rounds_compare_all_of_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last two of the generator's six, and the pixels'; what is reported is the loss of everything since then."""
    loop = last_layers(monkeypatch, threshold=math.inf)
    everything = loop.everything
    for t in range(10):
        loop.round()
        assert (loop.problem is everything) == (t >= 4)
        assert len(loop.problem.observed) == (6 if t >= 4 else 4)
        expected = whitened(everything.client, everything.labels, loop.problem.observed, (3, 16, 16))
        images = loop.images.detach()
        loss, _ = expected(loop.problem.client(images, everything.labels), loop.problem.observed)
        assert loop.history[-1]["loss"] == pytest.approx(loss, rel=1e-4)
    found = loop.result()
    assert loop.best.round > 4
    loss, _ = loop.distance(everything.client(loop.best.images, everything.labels), everything.observed)
    assert found.matching_loss == pytest.approx(loss, rel=1e-4)


def test_so_they_do_without_rounds_on_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = last_layers(monkeypatch, threshold=0.0)
    while not loop.stopped:
        loop.round()
        assert (loop.problem is loop.everything) == (loop.t > 4)
    found = loop.result()
    loss, _ = loop.distance(loop.everything.client(loop.best.images, loop.everything.labels), loop.everything.observed)
    assert found.matching_loss == pytest.approx(loss, rel=1e-4)


def test_an_attack_of_one_phase_compares_all_in_its_last_rounds_too() -> None:
    observation, client, truth = setting()
    problem = Problem(observation, client, observation.update, truth.labels, gain_sensitivity=1.0)
    torch.manual_seed(0)
    recipe = attack("inverting-gradients", optimiser="lbfgs", rounds=5, matched=0.5)
    loop = _Loop(problem, recipe, Labels(truth.labels, "known"))
    compared = []
    for _ in range(5):
        loop.round()
        compared.append(len(loop.problem.observed))
    assert compared == [4, 4, 4, 6, 6]
    loss, _ = loop.distance(client(loop.result().images, truth.labels), observation.update)
    assert loop.best.loss == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("t", [3, 4, 5, 6, 7])
def test_such_a_run_goes_on_from_any_round(t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (last_layers(monkeypatch, threshold=math.inf) for _ in range(2))
    for _ in range(t):
        one.round()
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(t, 10):
        one.round()
        other.round()
    assert torch.equal(one.result().images, other.result().images)
