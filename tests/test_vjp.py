"""The client operator and its transposes: A is the model's gradient, A^T its transpose, the caller's model is left alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.ops import StochasticDepth

import gradleak.vjp
from gradleak.client import FedSGD, simulate
from gradleak.distance import cosine
from gradleak.models.cifar import resnet18
from gradleak.observation import Truth, Update
from gradleak.vjp import Engine, SelfChecking, engine, exact, secant

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(2, channels),
    "none": lambda channels: nn.Identity(),
}
ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
#: normalisation, mode, activation
MODELS = [
    (norm, mode, activation)
    for norm, mode in (("batch", "train"), ("batch", "eval"), ("group", "train"), ("none", "train"))
    for activation in ACTIVATIONS
]
SMOOTH = [case for case in MODELS if case[2] != "relu"]


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    """Threads that wait for each other cost more than these small tensors."""
    torch.set_num_threads(1)


def network(norm: str, activation: str, *, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two convolutions and a linear layer for 3 x 8 x 8 images and 5 classes, with running statistics that are not 0 and 1."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        NORMS[norm](4),
        ACTIVATIONS[activation](),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        NORMS[norm](6),
        ACTIVATIONS[activation](),
        nn.Flatten(),
        nn.Linear(96, 5),
    ).to(dtype)
    with torch.no_grad():
        model.train()(torch.rand(4, 3, 8, 8, dtype=dtype))
    return model


def batch(*, dtype: torch.dtype = torch.float64, images: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(images, 3, 8, 8, dtype=dtype, generator=generator), torch.arange(images) % 5


def random_like(update: Update, *, seed: int = 2) -> Update:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, dtype=t.dtype, generator=generator) for name, t in update.items()}


def inner(a: Update, b: Update) -> float:
    return sum(float((a[name] * b[name]).sum()) for name in a)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def same_bytes(a: Update, b: Update) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("norm", "mode", "activation"), MODELS)
def test_update_is_the_gradient_of_the_callers_model(norm: str, mode: str, activation: str) -> None:
    """A(x, y) = grad_W L(F(x), y), by backward() on the caller's own model; every engine returns the same update."""
    model, (x, y) = network(norm, activation), batch()
    client = FedSGD(model, mode=mode)  # type: ignore[arg-type]
    update = client(x, y)

    cross_entropy(model.train(mode == "train")(x), y).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert list(update) == list(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(update[name], gradient, rtol=1e-10, atol=1e-14)
    for chosen in (exact, secant, SelfChecking()):
        found, _ = client.vjp(x, y, engine=chosen)
        for name in update:
            torch.testing.assert_close(found[name], update[name], rtol=1e-10, atol=1e-14)
            assert not found[name].requires_grad


@pytest.mark.parametrize(("norm", "mode", "activation"), MODELS)
def test_exact_is_the_transpose(norm: str, mode: str, activation: str) -> None:
    """<A'(x) v, u> = <v, A'(x)^T u> with A'(x) v by central differences, and A'(x)^T u by an independent double backward."""
    model, (x, y) = network(norm, activation), batch()
    client = FedSGD(model, mode=mode)  # type: ignore[arg-type]
    update, transpose = client.vjp(x, y)
    u = random_like(update)
    transposed = transpose(u)

    v, h = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3)), 1e-6
    ahead, behind = client(x + h * v, y), client(x - h * v, y)
    forward = {name: (ahead[name] - behind[name]) / (2 * h) for name in update}
    assert inner(forward, u) == pytest.approx(float((v * transposed).sum()), rel=1e-6, abs=1e-9)

    leaf = x.clone().requires_grad_()
    loss = cross_entropy(model.train(mode == "train")(leaf), y)
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    product = sum((g * u[name]).sum() for (name, _), g in zip(model.named_parameters(), gradients, strict=True))
    (independent,) = torch.autograd.grad(product, leaf)
    torch.testing.assert_close(transposed, independent, rtol=1e-9, atol=1e-13)
    assert transposed.shape == x.shape
    assert not transposed.requires_grad


@pytest.mark.parametrize(("norm", "mode", "activation"), SMOOTH)
def test_secant_converges_to_exact(norm: str, mode: str, activation: str) -> None:
    """In float64 the error of a smooth model falls in proportion to the step."""
    (x, y), client = batch(), FedSGD(network(norm, activation), mode=mode)  # type: ignore[arg-type]
    update, transpose = client.vjp(x, y)
    u = random_like(update)
    expected = transpose(u)
    steps = (1e-2, 1e-3, 1e-4, 1e-5)
    errors = [
        relative_error(client.vjp(x, y, engine=lambda *a, step=step: secant(*a, step=step))[1](u), expected) for step in steps
    ]
    assert errors[-1] < 1e-4
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(10, rel=0.3)


@pytest.mark.parametrize(("norm", "mode", "activation"), SMOOTH)
def test_secant_error_in_float32(norm: str, mode: str, activation: str) -> None:
    """Whatever the cotangent's scale, the default step is within 2 % of the exact transpose; a zero cotangent gives zero."""
    (x, y), client = batch(dtype=torch.float32), FedSGD(network(norm, activation, dtype=torch.float32), mode=mode)  # type: ignore[arg-type]
    for scale in (1e-15, 1.0, 1e15):
        update, transpose = client.vjp(x, y, engine=secant)
        u = {name: scale * r for name, r in random_like(update).items()}
        assert relative_error(transpose(u), client.vjp(x, y)[1](u)) < 0.02
    for chosen in (exact, secant):
        update, transpose = client.vjp(x, y, engine=chosen)
        assert not transpose({name: torch.zeros_like(t) for name, t in update.items()}).any()


def test_self_checking_trusts_the_secant_where_it_is_right() -> None:
    """A smooth model: the check returns the mean of steps both ways, later rounds the secant with the best of the steps."""
    (x, y), client = batch(), FedSGD(network("none", "tanh"))
    checking, u = SelfChecking(every=3), random_like(client.weights)
    first = client.vjp(x, y, engine=checking)[1](u)
    torch.testing.assert_close(first, client.vjp(x, y)[1](u), rtol=1e-5, atol=1e-6)
    assert checking.trusted
    assert checking.step == min(checking.steps)  # in float64 only the curvature counts
    assert checking.error == pytest.approx(
        relative_error(client.vjp(x, y, engine=lambda *a: secant(*a, step=checking.step))[1](u), first)
    )
    second = client.vjp(x, y, engine=checking)[1](u)
    assert torch.equal(second, client.vjp(x, y, engine=lambda *a: secant(*a, step=checking.step))[1](u))


def test_a_check_looks_near_the_last_step_and_finds_the_best_of_all() -> None:
    """The same step as by trying all, with fewer passes: in float32 round-off takes over below some step."""
    (x, y), client = batch(dtype=torch.float32), FedSGD(network("none", "tanh", dtype=torch.float32))
    u, sizes = random_like(client.weights), 0

    def size(t: Tensor) -> float:
        nonlocal sizes
        sizes += 1
        return float(t.norm())

    alone = {}
    for step in SelfChecking().steps:
        checking = SelfChecking(steps=(step,))
        client.vjp(x, y, engine=checking)[1](u)
        alone[step] = checking.error
    checking, tried = SelfChecking(every=1, size=size), []
    for start in (checking.step, min(alone), max(alone)):
        for checking.step in (start, min(alone, key=alone.__getitem__)):
            sizes = 0
            client.vjp(x, y, engine=checking)[1](u)
            assert checking.step == min(alone, key=alone.__getitem__)
            assert checking.error == min(alone.values())
            tried.append(sizes // 2)
    assert tried[1::2] == [tried[1]] * 3
    assert tried[1] <= 3


def test_self_checking_falls_back_to_exact_where_the_secant_is_wrong() -> None:
    """Steps far across ReLU's kinks: the exact transpose until a later check finds the secant right again."""
    (x, y), client = batch(), FedSGD(network("none", "relu"))
    checking, u = SelfChecking(every=2, steps=(30.0, 100.0)), random_like(client.weights)
    expected = client.vjp(x, y)[1](u)
    for _ in range(4):
        assert torch.equal(client.vjp(x, y, engine=checking)[1](u), expected)
        assert not checking.trusted
        assert checking.error > checking.tolerance
    checking.steps = (1e-6,)
    client.vjp(x, y, engine=checking)[1](u)
    assert checking.trusted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_self_checking_finds_the_kinks_of_a_deep_network(dtype: torch.dtype) -> None:
    """With the default steps, which cross few of them: both directions then disagree, and the exact transpose is used."""
    torch.manual_seed(0)
    client = FedSGD(resnet18(image_shape=(3, 16, 16), num_classes=10, width=8)).to("cpu", dtype)
    x, y = torch.rand(4, 3, 16, 16, dtype=dtype), torch.arange(4)
    update, transpose = client.vjp(x, y)
    _, u = cosine(update, client(x.roll(1, dims=3), y))
    expected, checking = transpose(u), SelfChecking()
    torch.testing.assert_close(client.vjp(x, y, engine=checking)[1](u), expected)
    assert not checking.trusted
    assert checking.error > 0.2


def test_a_check_keeps_no_graph_of_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where F is smooth: its memory is that of the secant."""
    (x, y), client = batch(), FedSGD(network("batch", "sigmoid"))

    def refused(*arguments: object) -> None:
        raise AssertionError("double backward")

    monkeypatch.setattr(gradleak.vjp, "exact", refused)
    checking = SelfChecking()
    client.vjp(x, y, engine=checking)[1](random_like(client.weights))
    assert checking.trusted


@pytest.mark.parametrize(("name", "expected"), [("exact", exact), ("secant", secant)])
def test_engine_by_name(name: str, expected: Engine) -> None:
    assert engine(name) is expected  # type: ignore[arg-type]
    assert isinstance(engine("auto"), SelfChecking)
    assert engine("auto") is not engine("auto")  # it has state


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_callers_model_is_untouched(mode: str) -> None:
    """Parameters, running statistics, training flags, requires_grad, grad and the random state, through every use of A."""
    model, (x, y) = network("batch", "sigmoid"), batch()
    model.insert(6, nn.Dropout(0.5))
    model[0].weight.requires_grad_(False)
    model[1].eval()
    before, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    random_state = torch.get_rng_state()

    client = FedSGD(model, mode=mode)  # type: ignore[arg-type]
    weights, buffers = ({k: t.clone() for k, t in part.items()} for part in (client.weights, client.buffers))
    simulate(client, Truth(x, y))
    for chosen in (exact, secant, SelfChecking()):
        update, transpose = client.vjp(x, y, engine=chosen)
        transpose(random_like(update))
    moved = client.to("cpu", torch.float32)
    moved(x.float(), y)

    assert same_bytes(before, model.state_dict())
    assert flags == [module.training for module in model.modules()]
    assert [p.requires_grad for p in model.parameters()] == [False] + 9 * [True]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(random_state, torch.get_rng_state())
    assert same_bytes(weights, client.weights)  # the operator itself does not drift either
    assert same_bytes(buffers, client.buffers)
    assert moved.mode == mode
    assert list(moved.weights) == list(client.weights)


def test_frozen_parameters_are_not_sent() -> None:
    """The update has the trainable parameters only, with the values it has when all are trained."""
    model, (x, y) = network("group", "tanh"), batch()
    full = FedSGD(model)(x, y)
    model[0].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    client = FedSGD(model)
    sent = [name for name in full if name not in ("0.weight", "0.bias", "4.bias")]
    assert same_bytes(client(x, y), {name: full[name] for name in sent})
    assert client.parameters == sum(full[name].numel() for name in sent)
    u = random_like(client.weights)
    padded = {name: u.get(name, torch.zeros_like(t)) for name, t in full.items()}
    everything = FedSGD(network("group", "tanh"))
    torch.testing.assert_close(client.vjp(x, y)[1](u), everything.vjp(x, y)[1](padded), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("norm", "mode", "activation"), MODELS)
def test_the_order_of_the_images_does_not_matter(norm: str, mode: str, activation: str) -> None:
    """A(x[pi], y[pi]) = A(x, y), and the transpose is permuted with the images."""
    x, y = batch(images=6)
    client, order = FedSGD(network(norm, activation), mode=mode), torch.tensor([3, 0, 5, 1, 4, 2])  # type: ignore[arg-type]
    update, transpose = client.vjp(x, y)
    permuted, permuted_transpose = client.vjp(x[order], y[order])
    for name in update:
        torch.testing.assert_close(permuted[name], update[name], rtol=1e-9, atol=1e-12)
    u = random_like(update)
    torch.testing.assert_close(permuted_transpose(u), transpose(u)[order], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "mode", "coupled"),
    [
        (nn.BatchNorm2d(3), "train", True),
        (nn.BatchNorm2d(3), "eval", False),
        (nn.BatchNorm2d(3, track_running_stats=False), "eval", True),  # it has no other statistics than the batch's
        (nn.GroupNorm(3, 3), "train", False),
        (nn.InstanceNorm2d(3), "train", False),
        (nn.Identity(), "train", False),
    ],
)
def test_has_batch_statistics_says_whether_images_are_coupled(layer: nn.Module, mode: str, coupled: bool) -> None:
    """It is what it says: the output for one image depends on the others exactly where it is true."""
    torch.manual_seed(0)
    client = FedSGD(nn.Sequential(layer, nn.Flatten(), nn.Linear(192, 5)).double(), mode=mode)  # type: ignore[arg-type]
    x, _ = batch()
    with torch.no_grad():
        alone = torch.equal(client.outputs(x)[0], client.outputs(torch.cat([x[:1], x[1:].square()]))[0])
    assert alone is not coupled
    assert client.has_batch_statistics is coupled


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.5),
        nn.Dropout2d(0.5),
        nn.AlphaDropout(0.5),
        nn.FeatureAlphaDropout(0.5),
        StochasticDepth(0.5, "row"),  # efficientnet's and convnext's
        nn.RReLU(),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_operator_has_no_randomness(layer: nn.Module, mode: str) -> None:
    """Layers with random masks are off in both modes: the server could not know the masks, and A must be a function."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), layer, nn.Flatten(), nn.Linear(256, 5)).double()
    client, (x, y) = FedSGD(model, mode=mode), batch()  # type: ignore[arg-type]
    assert same_bytes(client(x, y), client(x, y))
    if isinstance(layer, nn.modules.dropout._DropoutNd):
        assert client.has_dropout


@pytest.mark.parametrize("chosen", [exact, secant, SelfChecking], ids=["exact", "secant", "auto"])
def test_the_same_call_gives_the_same_bytes(chosen: Engine | type[SelfChecking]) -> None:
    client, (x, y) = FedSGD(network("batch", "sigmoid")), batch()
    u = random_like(client.weights)
    results = [client.vjp(x, y, engine=chosen() if chosen is SelfChecking else chosen) for _ in range(2)]  # type: ignore[arg-type, call-arg]
    assert same_bytes(results[0][0], results[1][0])
    assert torch.equal(results[0][1](u), results[1][1](u))


def test_another_tolerance_is_checked_at_once() -> None:
    """A phase whose steps are exact does not begin with a secant that signs could bear."""
    (x, y), client = batch(), FedSGD(network("none", "relu"))
    checking, u = SelfChecking(tolerance=10.0, steps=(30.0,)), random_like(client.weights)
    client.vjp(x, y, engine=checking)[1](u)
    assert checking.trusted
    checking.tolerate(10.0)
    client.vjp(x, y, engine=checking)[1](u)
    assert checking.trusted
    checking.tolerate(1e-6)
    found = client.vjp(x, y, engine=checking)[1](u)
    assert not checking.trusted
    torch.testing.assert_close(found, client.vjp(x, y, engine=exact)[1](u))
