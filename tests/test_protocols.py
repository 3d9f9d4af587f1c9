"""What clients send: local epochs, averages, some layers, rounded numbers; each with the transpose that inverts it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from gradleak import models, threat
from gradleak.attacks import attack
from gradleak.client import Average, ClientOperator, FedAvg, FedSGD, build_client, operator, simulate
from gradleak.defences import Defended, Transport
from gradleak.errors import DataError, ObservationError, SpecError
from gradleak.observation import Observation, Truth, Update
from gradleak.spec import ClientSpec, ModelSpec, load
from gradleak.tensors import read_tensors, write_tensors
from gradleak.vjp import SelfChecking, exact, secant

NORMS = {"batch": nn.BatchNorm2d, "group": lambda n: nn.GroupNorm(2, n), "none": lambda n: nn.Identity()}
#: epochs, batch size, momentum
LOCAL = [(1, None, 0.0), (3, None, 0.0), (1, 2, 0.0), (2, 2, 0.9), (2, 3, 0.5)]


seeds = st.integers(0, 2**31)


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


def network(norm: str = "none", *, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A convolution and a linear layer for 3 x 6 x 6 images and 4 classes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), NORMS[norm](4), nn.Sigmoid(), nn.Flatten(), nn.Linear(36, 4)
    ).to(dtype)


def batch(images: int = 5, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(images, 3, 6, 6, dtype=dtype, generator=generator), torch.arange(images) % 4


def soft(labels: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.rand(len(labels), 4, dtype=torch.float64, generator=generator).softmax(1)


def random_like(update: Update) -> Update:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(t.shape, dtype=t.dtype, generator=generator) for name, t in update.items()}


def close(found: Update, expected: Update, *, rtol: float = 1e-9, atol: float = 1e-13) -> None:
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol)


def same(a: Update, b: Update) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("norm", NORMS)
def test_one_step_of_fedavg_is_the_learning_rate_times_the_gradient(norm: str) -> None:
    """To the last bit; the transposes agree too, and by the secant as well, which takes less time than double backward."""
    (x, y), model = batch(), network(norm)
    (_, back), client = FedSGD(model).vjp(x, y), FedAvg(model, learning_rate=0.05)
    assert same(client(x, y), {name: 0.05 * g for name, g in FedSGD(model)(x, y).items()})
    update, transpose = client.vjp(x, y)
    close(update, client(x, y), rtol=1e-12)
    u = random_like(update)
    expected = 0.05 * back(u)
    torch.testing.assert_close(transpose(u), expected, rtol=1e-12, atol=1e-15)
    assert relative_error(client.vjp(x, y, engine=secant)[1](u), expected) < 1e-2


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize(("epochs", "size", "momentum"), LOCAL)
def test_fedavg_is_what_sgd_does(norm: str, epochs: int, size: int | None, momentum: float) -> None:
    """W - W_after of torch's optimiser on the caller's model, in the order of the images."""
    (x, y), model = batch(), network(norm)
    client = FedAvg(model, learning_rate=0.3, epochs=epochs, batch_size=size, momentum=momentum)
    found = client(x, y)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.3, momentum=momentum)
    for _ in range(epochs):
        for images, labels in zip(x.split(size or len(x)), y.split(size or len(x)), strict=True):
            optimiser.zero_grad()
            cross_entropy(model.train()(images), labels).backward()
            optimiser.step()
    close(found, {name: before[name] - p.detach() for name, p in model.named_parameters()}, rtol=1e-8)


def unrolled(model: nn.Module, x: Tensor, y: Tensor, epochs: int, size: int | None, momentum: float) -> Update:
    """Local SGD as one graph, written without the package."""
    start = dict(model.named_parameters())
    weights, velocity = dict(start), {name: torch.zeros_like(p) for name, p in start.items()}
    for _ in range(epochs):
        for images, labels in zip(x.split(size or len(x)), y.split(size or len(x)), strict=True):
            value = cross_entropy(functional_call(model.train(), weights, (images,)), labels)
            gradients = torch.autograd.grad(value, list(weights.values()), create_graph=True)
            velocity = {name: momentum * velocity[name] + g for name, g in zip(weights, gradients, strict=True)}
            weights = {name: w - 0.3 * velocity[name] for name, w in weights.items()}
    return {name: start[name] - w for name, w in weights.items()}


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize(("epochs", "size", "momentum"), LOCAL)
def test_the_transpose_of_fedavg_is_that_of_the_unrolled_steps(
    norm: str, epochs: int, size: int | None, momentum: float
) -> None:
    """With respect to the images, and to soft labels; ``auto`` takes the exact transpose of several steps and says so."""
    (x, y), model = batch(), network(norm)
    client = FedAvg(model, learning_rate=0.3, epochs=epochs, batch_size=size, momentum=momentum)
    checking = SelfChecking()
    update, transpose = client.vjp(x, y, engine=checking)
    assert len(client.batches(len(x))) == 1 or (checking.trusted, checking.error) == (False, 0.0)
    u = random_like(update)

    leaf = x.clone().requires_grad_()
    graph = unrolled(model, leaf, y, epochs, size, momentum)
    close(update, {name: t.detach() for name, t in graph.items()}, rtol=1e-8)
    (expected,) = torch.autograd.grad(sum((graph[name] * u[name]).sum() for name in u), leaf)
    if len(client.batches(len(x))) == 1:  # one step's is the self-checking secant
        assert relative_error(transpose(u), expected) < 1e-4
        transpose = client.vjp(x, y)[1]
    torch.testing.assert_close(transpose(u), expected, rtol=1e-8, atol=1e-13)

    leaf, labels = x.clone().requires_grad_(), soft(y).requires_grad_()
    graph = unrolled(model, leaf, labels, epochs, size, momentum)
    expected, to_labels = torch.autograd.grad(sum((graph[name] * u[name]).sum() for name in u), [leaf, labels])
    found = client.joint_vjp(x, labels.detach())[1](u)
    torch.testing.assert_close(found[0], expected, rtol=1e-8, atol=1e-13)
    torch.testing.assert_close(found[1], to_labels, rtol=1e-8, atol=1e-13)


def test_fedavg_of_several_steps_has_no_secant() -> None:
    x, y = batch()
    with pytest.raises(SpecError, match=r'attack.engine.*FedAvg.*"exact"'):
        FedAvg(network(), learning_rate=0.1, epochs=2).vjp(x, y, engine=secant)


def test_an_unknown_order_is_drawn_by_the_client_alone() -> None:
    """What is sent depends on the seed, and A does not; where a step sees all images, their order does not matter."""
    x, y = batch()
    client = FedAvg(network(), learning_rate=0.3, batch_size=2, epochs=2, order="shuffled")
    known = FedAvg(network(), learning_rate=0.3, batch_size=2, epochs=2)
    first, again, other = (client.sent(x, y, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert same(first, again)
    assert not same(first, other)
    assert same(client(x, y), known(x, y))
    assert same(known.sent(x, y, torch.Generator()), known(x, y))
    orders = client.batches(5, torch.Generator().manual_seed(0))
    assert [len(b) for b in orders] == [2, 2, 1, 2, 2, 1]
    assert sorted(torch.cat(orders).tolist()) == sorted([*range(5), *range(5)])
    whole = FedAvg(network(), learning_rate=0.3, epochs=2, order="shuffled")
    close(whole.sent(x, y, torch.Generator().manual_seed(3)), whole(x, y))


@pytest.mark.parametrize(
    ("epochs", "size", "momentum"), [(1, None, 0.0), (3, None, 0.0), (3, None, 0.9), (2, 2, 0.0), (1, 3, 0.0)]
)
def test_gradient_scale_is_the_limit_of_small_steps(epochs: int, size: int | None, momentum: float) -> None:
    """For a learning rate near zero, and local batches of equal size and weight, the update is the scale times the gradient."""
    x, y = batch(6)
    client = FedAvg(network(), learning_rate=1e-7, epochs=epochs, batch_size=size, momentum=momentum)
    gradient = FedSGD(network())(x, y)
    scaled = {name: t / client.gradient_scale(6) for name, t in client(x, y).items()}
    close(scaled, gradient, rtol=1e-4, atol=1e-8)
    assert Average(client, sizes=[3, 3]).gradient_scale(6) == pytest.approx(client.gradient_scale(3))


@pytest.mark.parametrize("norm", NORMS)
def test_average_is_the_weighted_mean_of_its_clients(norm: str) -> None:
    """An explicit loop; and the gradient of the union of the batches exactly where there are no batch statistics."""
    (x, y), client = batch(), FedSGD(network(norm))
    average = Average(client, sizes=[1, 3, 1] if norm != "batch" else [2, 3])
    found, start = average(x, y), 0
    expected = {name: torch.zeros_like(w) for name, w in client.weights.items()}
    for size in average.sizes:
        part = client(x[start : start + size], y[start : start + size])
        expected = {name: e + size / 5 * part[name] for name, e in expected.items()}
        start += size
    close(found, expected)
    union = client(x, y)
    if norm == "batch":
        assert max(relative_error(found[name], union[name]) for name in ("0.weight", "4.weight")) > 1e-3
    else:
        close(found, union)
    assert same(Average(client, sizes=[5])(x, y), union)


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5), norm=st.sampled_from(["none", "group", "batch"]), seed=seeds)
@settings(max_examples=40, deadline=None)
def test_secure_aggregation_shows_the_gradient_of_the_union(sizes: list[int], norm: str, seed: int) -> None:
    """C.3 of the CI-Net paper, against autograd on the caller's model: weights by sample count, whatever the shares.

    A batch norm in eval mode does not couple images, so it makes no difference either.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(sum(sizes), 3, 6, 6, dtype=torch.float64, generator=generator)
    y = torch.randint(4, (sum(sizes),), generator=generator)
    model = network(norm)
    spec = ClientSpec(protocol="average", clients=sizes, mode="eval" if norm == "batch" else "train")
    found = build_client(model, spec, len(x))(x, y)
    loss = cross_entropy(model.eval()(x) if norm == "batch" else model(x), y)
    parameters = dict(model.named_parameters())
    union = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    close(found, union, rtol=1e-8, atol=1e-12)


@given(sizes=st.lists(st.integers(1, 4), min_size=2, max_size=4), seed=seeds)
@settings(max_examples=20, deadline=None)
def test_with_batch_statistics_it_does_not(sizes: list[int], seed: int) -> None:
    """In train mode each client normalises by its own images: the aggregate is another gradient than the union's."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(sum(sizes), 3, 6, 6, dtype=torch.float64, generator=generator)
    y = torch.randint(4, (sum(sizes),), generator=generator)
    client = FedSGD(network("batch"))
    found, union = Average(client, sizes=sizes)(x, y), client(x, y)
    assert relative_error(found["0.weight"], union["0.weight"]) > 1e-3


def test_the_transpose_of_an_average_is_that_of_the_union() -> None:
    """By every engine, for images and for soft labels, without batch statistics."""
    (x, y), client = batch(), FedSGD(network())
    average, u = Average(client, sizes=[2, 3]), random_like(client.weights)
    expected = client.vjp(x, y)[1](u)
    torch.testing.assert_close(average.vjp(x, y)[1](u), expected, rtol=1e-9, atol=1e-14)
    assert relative_error(average.vjp(x, y, engine=secant)[1](u), expected) < 1e-2
    checking = SelfChecking()
    for _ in range(2):
        assert relative_error(average.vjp(x, y, engine=checking)[1](u), expected) < 1e-2
    labels = soft(y)
    pairs = zip(average.joint_vjp(x, labels)[1](u), client.joint_vjp(x, labels)[1](u), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-14)


def test_the_transpose_of_an_average_with_batch_statistics() -> None:
    """<A'(x) v, u> = <v, A'(x)^T u>, A'(x) v by central differences."""
    x, y = batch()
    average = Average(FedSGD(network("batch")), sizes=[2, 3])
    update, transpose = average.vjp(x, y)
    u, v, h = random_like(update), torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3)), 1e-6
    ahead, behind = average(x + h * v, y), average(x - h * v, y)
    forward = sum(float(((ahead[name] - behind[name]) / (2 * h) * u[name]).sum()) for name in u)
    assert forward == pytest.approx(float((v * transpose(u)).sum()), rel=1e-6)


@pytest.mark.parametrize(
    ("client", "order", "invariant"),
    [
        (Average(FedSGD(network("batch")), sizes=[2, 3]), [1, 0, 4, 2, 3], True),  # within each client
        (Average(FedSGD(network("batch")), sizes=[2, 3]), [2, 1, 0, 3, 4], False),  # between clients
        (Average(FedSGD(network("none")), sizes=[2, 3]), [2, 1, 0, 3, 4], True),
        (FedAvg(network("batch"), learning_rate=0.3, batch_size=2, epochs=2), [1, 0, 3, 2, 4], True),  # within local batches
        (FedAvg(network("batch"), learning_rate=0.3, batch_size=2, epochs=2), [2, 3, 0, 1, 4], False),
        (FedAvg(network("batch"), learning_rate=0.3, epochs=3), [4, 2, 0, 1, 3], True),
    ],
)
def test_the_order_matters_only_across_clients_and_steps(client: ClientOperator, order: list[int], invariant: bool) -> None:
    x, y = batch()
    found, permuted = client(x, y), client(x[order], y[order])
    change = max(relative_error(permuted[name], found[name]) for name in ("0.weight", "4.weight"))
    assert (change < 1e-9) is invariant


def test_average_needs_as_many_images_as_its_clients_have() -> None:
    with pytest.raises(DataError, match="6 together, found 5"):
        Average(FedSGD(network()), sizes=[2, 4])(*batch())


@pytest.mark.parametrize("kind", ["fedsgd", "fedavg", "average", "transport"])
def test_moved_operators_are_the_same(kind: str) -> None:
    """``to`` keeps every setting; in the same precision the update is the same to the last bit."""
    model, (x, y) = network("batch", dtype=torch.float32), batch()
    model[0].bias.requires_grad_(False)
    client: ClientOperator = FedSGD(model)
    if kind == "fedavg":
        client = FedAvg(model, learning_rate=0.3, epochs=2, batch_size=2, momentum=0.5, order="shuffled")
    if kind == "average":
        client = Average(client, sizes=[2, 3])
    if kind == "transport":
        client = Defended(client, Transport("float16"))
    moved, precise = client.to("cpu", torch.float32), client.to("cpu", torch.float64)
    assert type(moved) is type(client)
    assert moved.spec == client.spec
    assert "0.bias" in moved.frozen
    assert same(moved(x.float(), y), client(x.float(), y))
    assert next(iter(precise(x, y).values())).dtype == torch.float64


@pytest.mark.parametrize("make", [lambda m: FedAvg(m, learning_rate=1.0, epochs=2), lambda m: Average(FedSGD(m), sizes=[2, 3])])
def test_the_callers_model_is_untouched(make: Any) -> None:
    model, (x, y) = network("batch"), batch()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    client = make(model)
    weights = {name: w.clone() for name, w in client.weights.items()}
    update, transpose = client.vjp(x, y)
    transpose(random_like(update))
    assert same(dict(before), dict(model.state_dict()))
    assert same(weights, client.weights)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("layers", "sent"),
    [(["4.*"], ["4.weight", "4.bias"]), (["*.weight"], ["0.weight", "4.weight"]), (["0.bias", "4.b*"], ["0.bias", "4.bias"])],
)
@pytest.mark.parametrize("protocol", ["fedsgd", "fedavg", "average"])
def test_only_some_layers_are_sent(layers: list[str], sent: list[str], protocol: str, tmp_path: Path) -> None:
    """By name or pattern: their values are those of the whole update where nothing else moves, and the file says which."""
    settings: dict[str, Any] = {"fedavg": {"learning_rate": 0.1}, "average": {"clients": 2}}.get(protocol, {})
    model, (x, y) = network(dtype=torch.float32), batch(dtype=torch.float32)
    client = build_client(model, ClientSpec(protocol=protocol, layers=layers, **settings), 5)
    whole = build_client(model, ClientSpec(protocol=protocol, **settings), 5)(x, y)
    assert list(client(x, y)) == sent
    assert client.parameters == sum(whole[name].numel() for name in sent)
    close(client(x, y), {name: whole[name] for name in sent}, rtol=1e-5, atol=1e-8)

    simulate(client, Truth(x, y)).save(tmp_path / "update.safetensors")
    seen = Observation.load(tmp_path / "update.safetensors")
    torch.manual_seed(5)
    other = nn.Sequential(*(copy.deepcopy(m) for m in network(dtype=torch.float32)))
    for p in other.parameters():
        nn.init.normal_(p)
    assert same(operator(seen, other)(x, y), seen.update)  # what was not sent of W is in the file as well


def test_layers_that_match_nothing_are_named() -> None:
    with pytest.raises(SpecError, match=r"client.layers: .*'layer4.\*'.*4.weight"):
        build_client(network(), ClientSpec(layers=["layer4.*"]), 5)


@pytest.mark.parametrize(
    ("transport", "largest"), [("float16", 2**-11), ("bfloat16", 2**-8), ("16-bit", 2**-15), ("8-bit", 2**-7), ("2-bit", 0.5)]
)
def test_transport_rounds(transport: str, largest: float) -> None:
    """At most half a unit in the last place (of the largest entry, for k bits); the cotangent passes unchanged."""
    (x, y), plain = batch(), FedSGD(network())
    client = build_client(network(), ClientSpec(transport=transport), 5)
    assert client.spec == ClientSpec(transport=transport)
    assert client.defences == ()
    exactly, rounded = plain(x, y), client(x, y)
    for name, t in exactly.items():
        unit = t.abs().clamp_min(2**-14) if "float" in transport else t.abs().max()
        assert bool(((rounded[name] - t).abs() <= largest * unit * (1 + 1e-9)).all())
        assert rounded[name].unique().numel() <= (2 ** int(transport[:-4]) if "-bit" in transport else t.numel())
    assert not same(exactly, rounded)
    u = random_like(exactly)
    assert torch.equal(client.vjp(x, y)[1](u), plain.vjp(x, y)[1](u))
    assert same(Transport(transport).expected(rounded), rounded) or transport == "bfloat16"


SPECS = [
    ClientSpec(mode="eval"),
    ClientSpec(protocol="fedavg", learning_rate=0.2, epochs=2, local_batch=2, momentum=0.9),
    ClientSpec(protocol="average", clients=2),
    ClientSpec(protocol="average", clients=[1, 4], mode="eval", transport="8-bit"),
    ClientSpec(protocol="fedavg", learning_rate=0.1, transport="bfloat16", layers=["4.*"]),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.protocol)
def test_the_server_rebuilds_the_operator_from_the_file(spec: ClientSpec, tmp_path: Path) -> None:
    """A(x*) at the rebuilt operator is the observed update, to the last bit, for every protocol without chance."""
    x, y = batch(dtype=torch.float32)
    client = build_client(network("batch", dtype=torch.float32), spec, 5)
    simulate(client, Truth(x, y)).save(tmp_path / "update.safetensors")
    seen = Observation.load(tmp_path / "update.safetensors")
    rebuilt = operator(seen, network("batch", dtype=torch.float32))
    assert same(rebuilt(x, y), seen.update)
    assert seen.protocol == rebuilt.spec == client.spec


def test_the_clients_seed_stays_with_the_client(tmp_path: Path) -> None:
    """The seed of an unknown order is in no file; other seeds send other updates."""
    x, y = batch(dtype=torch.float32)
    spec = ClientSpec(protocol="fedavg", learning_rate=0.5, local_batch=2, order="shuffled", seed=12345)
    client = build_client(network(dtype=torch.float32), spec, 5)
    observations = [simulate(client, Truth(x, y), seed=seed) for seed in (spec.seed, spec.seed, 7)]
    assert same(observations[0].update, observations[1].update)
    assert not same(observations[0].update, observations[2].update)
    observations[0].save(tmp_path / "update.safetensors")
    assert "12345" not in str(read_tensors(tmp_path / "update.safetensors")[1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"protocol": "fedsgd", "epochs": 2}, ["'epochs'", "'fedavg'", "'fedsgd'"]),
        ({"protocol": "average", "clients": 2, "learning_rate": 0.1}, ["'learning_rate'", "'fedavg'", "'average'"]),
        ({"protocol": "fedavg", "learning_rate": 0.1, "clients": 2}, ["'clients'", "'average'", "'fedavg'"]),
        ({"order": "shuffled"}, ["'order'", "'fedavg'", "'fedsgd'"]),
        ({"protocol": "fedavg"}, ["'fedavg'", "needs", "'learning_rate'"]),
        ({"protocol": "average"}, ["'average'", "needs", "'clients'"]),
        ({"protocol": "average", "clients": 0}, ["clients", "1"]),
        ({"protocol": "fedavg", "learning_rate": 0.1, "momentum": 1.0}, ["momentum"]),
        ({"transport": "1-bit"}, ["transport"]),
        ({"transport": "float8"}, ["transport"]),
        ({"layers": []}, ["layers"]),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValidationError) as error:
        ClientSpec(**settings)
    assert all(word in str(error.value) for word in words), error.value


def test_the_command_line_names_them_too() -> None:
    spec = load(None, ["client.protocol=fedavg", "client.learning_rate=0.1", "client.local_batch=4"])
    assert (spec.client.epochs, spec.client.momentum, spec.client.order) == (1, 0.0, "given")
    with pytest.raises(SpecError, match=r"client: 'epochs' is a setting of protocol 'fedavg', and the protocol is 'fedsgd'"):
        load(None, ["client.epochs=2"])


def test_sizes_of_an_average() -> None:
    """As even as can be for a number, as listed for a list; what cannot be is named."""
    assert ClientSpec(protocol="average", clients=3).sizes(8) == [3, 3, 2]
    assert ClientSpec(protocol="average", clients=[1, 7]).sizes(8) == [1, 7]
    with pytest.raises(SpecError, match=r"9 clients cannot share 8 images"):
        ClientSpec(protocol="average", clients=9).sizes(8)
    with pytest.raises(SpecError, match=r"\[1, 6\] are 7 images, the batch has 8"):
        ClientSpec(protocol="average", clients=[1, 6]).sizes(8)


def test_batch_statistics_are_what_batch_norm_sees(tmp_path: Path) -> None:
    """Mean and biased variance of each layer's input; granted, kept in the file to the last bit, and the letter is E."""
    model, (x, y) = network("batch", dtype=torch.float32), batch(dtype=torch.float32)
    client = FedSGD(model)
    plain = simulate(client, Truth(x, y))
    assert plain.batch_statistics is None
    assert threat.letter(plain) == "C"
    granted = simulate(client, Truth(x, y), grant_batch_statistics=True)
    assert granted.batch_statistics is not None
    (mean, variance) = granted.batch_statistics["1"]
    into = model[0](x).detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, into.mean(1))
    torch.testing.assert_close(variance, (into - into.mean(1, keepdim=True)).square().mean(1))

    file = tmp_path / "update.safetensors"
    granted.save(file)
    loaded = Observation.load(file)
    assert loaded.batch_statistics is not None
    assert all(torch.equal(a, b) for a, b in zip(loaded.batch_statistics["1"], (mean, variance), strict=True))
    assert loaded.granted == granted.granted == plain.granted | {"batch-norm-statistics"}
    assert threat.letter(loaded) == "E"
    assert threat.letter(simulate(client, Truth(x, y), grant_surrogate_data=True)) == "D"
    assert set(threat.GRANTS) >= loaded.granted

    class Greedy(type(attack("cinet"))):  # type: ignore[misc]
        requires = frozenset({"batch-norm-statistics"})

    threat.check_granted("greedy", Greedy(), loaded)
    with pytest.raises(ObservationError, match=r"'greedy' requires.*batch-norm-statistics.*threat.batch_statistics"):
        threat.check_granted("greedy", Greedy(), plain)
    with pytest.raises(SpecError, match=r"threat.batch_statistics.*no batch-norm"):
        simulate(FedSGD(network(dtype=torch.float32)), Truth(x, y), grant_batch_statistics=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("statistics/1/mean"), ["statistics/1/variance", "pair"]),
        (lambda t: t.update({"statistics/1/median": torch.ones(4)}), ["statistics/1/median", "pair"]),
        (lambda t: t["statistics/1/mean"].fill_(float("nan")), ["statistics/1", "NaN"]),
        (lambda t: t["statistics/1/variance"].fill_(-1), ["statistics/1", "negative variance"]),
        (lambda t: t.update({"statistics/1/mean": torch.ones(3)}), ["equal length"]),
    ],
)
def test_damaged_statistics_are_named(change: Any, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "update.safetensors"
    client, (x, y) = FedSGD(network("batch", dtype=torch.float32)), batch(dtype=torch.float32)
    simulate(client, Truth(x, y), grant_batch_statistics=True).save(file)
    tensors, metadata = read_tensors(file)
    change(tensors)
    write_tensors(file, tensors, metadata)
    with pytest.raises(ObservationError) as error:
        Observation.load(file)
    assert all(word in str(error.value) for word in [str(file), *words]), error.value


def test_an_own_loss_is_named_by_a_person(tmp_path: Path) -> None:
    """The file of a client with its own loss says that it has one; which code runs, the reader says."""
    (tmp_path / "own.py").write_text("def squared(output, labels):\n    return output.square().mean()\n")
    own, file = f"{tmp_path / 'own.py'}:squared", tmp_path / "update.safetensors"
    x, y = batch(dtype=torch.float32)
    simulate(FedSGD(network(dtype=torch.float32), loss=own), Truth(x, y)).save(file)
    with pytest.raises(ObservationError, match=r"a file never says which code runs.*--loss"):
        Observation.load(file)
    seen = Observation.load(file, loss=own)
    assert same(operator(seen, network(dtype=torch.float32))(x, y), seen.update)


def test_an_average_is_as_real_as_a_builtin_model(tmp_path: Path) -> None:
    """A built-in residual network with batch norm: four clients behind secure aggregation, sent, saved and rebuilt."""
    model = models.build(ModelSpec(name="resnet18-cifar", width=2), image_shape=(3, 8, 8))
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    truth = Truth(x, torch.arange(8))
    client = build_client(model, ClientSpec(protocol="average", clients=4), 8)
    seen = simulate(client, truth, model=ModelSpec(name="resnet18-cifar", width=2))
    seen.save(tmp_path / "update.safetensors")
    assert same(operator(Observation.load(tmp_path / "update.safetensors"), model)(x, truth.labels), seen.update)
    update, transpose = client.vjp(x, truth.labels, engine=exact)
    assert transpose(random_like(update)).shape == x.shape
