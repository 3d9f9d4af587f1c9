"""The first layers of F, computed once where no weight of theirs moves: fewer calls, the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from gradleak.client import FedSGD
from gradleak.distance import cosine
from gradleak.models.cifar import resnet18
from gradleak.prefix import Prefix, sharing
from gradleak.protocols import FedAvg
from gradleak.vjp import SelfChecking, exact, secant


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


class Counted(nn.Module):
    """A convolution that counts its calls."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convolution, self.calls = nn.Conv2d(inputs, outputs, 3, padding=1), [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        y: Tensor = self.convolution(x)
        return y


class Branching(nn.Module):
    """What a prefix must get right: a module used twice, a sum, an in-place activation, a function between modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.activation = Counted(3, 4), Counted(4, 4), nn.Sigmoid()
        self.inplace, self.middle, self.last = nn.SiLU(inplace=True), Counted(4, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.first(x))
        h = h + self.activation(self.again(h))
        h = self.again(h)
        h = self.inplace(self.middle(h)) + h
        y: Tensor = self.last(h.mean((2, 3)))
        return y


class InPlace(Branching):
    """Changes an output of its first layers in place."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h += 1
        y: Tensor = self.last(self.middle(self.activation(h)).mean((2, 3)))
        return y


def torchvision_resnet() -> nn.Module:
    """With in-place ReLU and a ``forward`` of its own; smoothed, for the secant's sake."""
    net = torchvision.models.resnet18(num_classes=5, norm_layer=lambda c: nn.GroupNorm(1, c))
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU(inplace=True))
    return net


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "resnet": (lambda: resnet18(image_shape=(3, 16, 16), num_classes=5, width=4), ["layer3*", "layer4*", "linear*"]),
    "resnet, middle": (lambda: resnet18(image_shape=(3, 16, 16), num_classes=5, width=4), ["layer2.1.conv2*"]),
    "resnet, last": (lambda: resnet18(image_shape=(3, 16, 16), num_classes=5, width=4), ["linear*"]),
    "torchvision": (torchvision_resnet, ["layer4*", "fc*"]),
    "branching": (Branching, ["middle*", "last*"]),
    "branching, twice": (Branching, ["again*"]),
    "in place": (InPlace, ["middle*", "last*"]),
    "everything": (Branching, ["*"]),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_the_secant_is_as_close_to_the_exact_transpose(name: str) -> None:
    """In float64, where its error is that of curvature alone; and again at the same point with another step."""
    torch.manual_seed(0)
    build, layers = MODELS[name]
    client = FedSGD(build(), layers=layers).to("cpu", torch.float64)
    x, y = torch.rand(3, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2])
    observed = client(torch.rand_like(x), y)
    update, transpose = client.vjp(x, y, engine=exact)
    _, cotangent = cosine(update, observed)
    wanted = transpose(cotangent)
    found, candidate = client.vjp(x, y, engine=lambda *a: secant(*a, step=1e-6))
    for key, tensor in update.items():
        torch.testing.assert_close(found[key], tensor)
    for step in (1e-6, 1e-5):
        assert float((candidate(cotangent, step=step) - wanted).norm()) < 1e-3 * float(wanted.norm())  # type: ignore[call-arg]


def test_the_first_layers_are_computed_once() -> None:
    torch.manual_seed(0)
    client = FedSGD(Branching(), layers=["middle*", "last*"])
    first, again, middle = (client.model.get_submodule(name) for name in ("first", "again", "middle"))
    x, y = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    _, transpose = client.vjp(x, y, engine=secant)
    transpose({name: torch.ones_like(w) for name, w in client.weights.items()})
    # the sum after ``again`` is no module: what follows it is computed anew
    assert [m.calls[0] for m in (first, again, middle)] == [1, 3, 2]  # type: ignore[union-attr]


def test_nothing_of_it_stays_behind() -> None:
    """No module keeps another ``forward``, and a call outside the engine records nothing."""
    client = FedSGD(resnet18(image_shape=(3, 16, 16), num_classes=5, width=4), layers=["layer4*"])
    x, y = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    client.vjp(x, y, engine=secant)[1]({name: torch.ones_like(w) for name, w in client.weights.items()})
    assert all("forward" not in vars(module) for module in client.model.modules())
    with sharing(client.model, client.weights):
        assert all("forward" not in vars(module) for module in client.model.modules())


def test_a_fault_inside_leaves_the_model_as_it_was() -> None:
    client = FedSGD(resnet18(image_shape=(3, 16, 16), num_classes=5, width=4), layers=["linear*"])
    prefix = Prefix(torch.rand(2, 4, 16, 16).requires_grad_())  # a channel too many
    with pytest.raises(RuntimeError, match="channels"):
        prefix(lambda: client.outputs(prefix.images))
    assert all("forward" not in vars(module) for module in client.model.modules())


def test_the_last_layers_hold_the_share_and_their_update_is_that_of_the_whole() -> None:
    torch.manual_seed(0)
    client = FedSGD(resnet18(image_shape=(3, 16, 16), num_classes=5, width=4))
    x, y = torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 2])
    whole = client(x, y)
    for share in (0.05, 0.5, 0.9, 1.0):
        last = client.last(share)
        assert last.parameters >= share * client.parameters
        names = list(last.weights)
        assert names == list(client.weights)[-len(names) :]
        if share < 1:
            assert sum(client.weights[name].numel() for name in names[1:]) < share * client.parameters
        for name, tensor in last(x, y).items():
            torch.testing.assert_close(tensor, whole[name])
    assert client.last(1.0) is client


def test_a_client_of_several_steps_is_matched_as_a_whole() -> None:
    client = FedAvg(Branching(), learning_rate=0.1, epochs=2)
    assert client.last(0.5) is client


def test_the_self_check_works_on_the_last_layers() -> None:
    torch.manual_seed(0)
    client = FedSGD(resnet18(image_shape=(3, 16, 16), num_classes=5, width=4).apply(_smooth), layers=["layer4*", "linear*"])
    x, y = torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 2])
    check = SelfChecking()
    update, transpose = client.vjp(x, y, engine=check)
    transpose(cosine(update, client(torch.rand_like(x), y))[1])
    assert check.trusted
    assert check.error < 0.05


def _smooth(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.Sigmoid())
