"""The attacked models: size, seeds, activations, weights, and what is said when something does not fit."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gradleak.client import FedAvg, FedSGD
from gradleak.errors import GradleakError, ModelError, ObservationError, OutputError
from gradleak.models import ACTIVATIONS, available, build
from gradleak.spec import ModelSpec
from gradleak.tensors import check_state, read_tensors, write_tensors

CIFAR = (3, 32, 32)
SMALL = (3, 8, 8)


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    """Threads that wait for each other cost more than these small tensors."""
    torch.set_num_threads(1)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def small(**settings: object) -> nn.Module:
    """A narrow ResNet-18 for images of SMALL size."""
    return build(ModelSpec(**{"name": "resnet18-cifar", "width": 4, **settings}), image_shape=SMALL)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet18-cifar", 11_173_962), ("resnet20-cifar", 269_722), ("convnet", 331_498), ("lenet", 19_438)],
)
def test_published_sizes(name: str, count: int) -> None:
    assert parameters(build(ModelSpec(name=name), image_shape=CIFAR)) == count


@pytest.mark.parametrize("name", ["resnet18-cifar", "resnet20-cifar", "convnet", "lenet"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (5, 17, 23)])
def test_any_channels_sizes_and_classes(name: str, shape: tuple[int, int, int]) -> None:
    model = build(ModelSpec(name=name, width=3, num_classes=7), image_shape=shape)
    assert model(torch.rand(4, *shape)).shape == (4, 7)


def test_seeds_repeat_and_differ() -> None:
    first, again, other = small(seed=3), small(seed=3), small(seed=4)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.get_parameter("conv1.weight"), other.get_parameter("conv1.weight"))


def test_random_state_of_the_caller_is_untouched() -> None:
    before = torch.get_rng_state()
    small(seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_initialisation_is_torchvisions() -> None:
    """Kaiming's normal, fan out: variance 2 / (9 outputs); batch norm ones and zeros."""
    model = build(ModelSpec(name="resnet18-cifar"), image_shape=CIFAR)
    weight = model.get_parameter("layer4.1.conv2.weight")
    assert weight.var().item() == pytest.approx(2 / (9 * 512), rel=0.01)
    assert (model.get_parameter("bn1.weight") == 1).all()
    assert not model.get_parameter("bn1.bias").any()


def test_lenet_is_uniform() -> None:
    weights = torch.cat([p.flatten() for p in build(ModelSpec(name="lenet"), image_shape=CIFAR).parameters()])
    assert weights.min() >= -0.5
    assert weights.max() <= 0.5
    assert weights.var().item() == pytest.approx(1 / 12, rel=0.05)


def double_backward(model: nn.Module, images: Tensor) -> Tensor:
    images.requires_grad_(True)
    loss = nn.functional.cross_entropy(model(images), torch.arange(len(images)))
    gradient = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return torch.autograd.grad(sum((g.square().sum() for g in gradient), torch.zeros(())), images)[0]


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/squeezenet1_1"])
def test_second_derivatives_exist(name: str) -> None:
    """torchvision's activations work in place; the models we build do not."""
    model = build(ModelSpec(name=name, num_classes=10), image_shape=CIFAR)
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    gradient = double_backward(model, torch.rand(2, *CIFAR))
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize("name", ["resnet20-cifar", "torchvision/mobilenet_v3_small"])
def test_sigmoid_is_everywhere(name: str) -> None:
    plain = build(ModelSpec(name=name), image_shape=CIFAR)
    model = build(ModelSpec(name=name, activation="sigmoid"), image_shape=CIFAR)
    kinds = {type(module) for module in model.modules()}
    assert nn.Sigmoid in kinds
    assert not kinds & {nn.ReLU, nn.Hardswish, nn.Hardsigmoid}
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives_of_every_activation(activation: str) -> None:
    gradient = double_backward(small(activation=activation), torch.rand(2, *SMALL))
    assert gradient.isfinite().all()
    assert gradient.any()


def test_functional_activations_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, first):\n"
        "        super().__init__()\n"
        "        self.first, self.linear = first, nn.Linear(3 * 32 * 32, 10)\n"
        "    def forward(self, x):\n"
        "        return self.linear(nn.functional.relu(self.first(x).flatten(1)))\n"
        "def only(): return Net(nn.Identity())\n"
        "def partly(): return Net(nn.ReLU())\n"
    )
    with pytest.raises(ModelError, match="no activation module to replace"):
        build(ModelSpec(name=f"{file}:only", activation="sigmoid"), image_shape=CIFAR)
    with pytest.raises(ModelError, match="calls relu as a function"):
        build(ModelSpec(name=f"{file}:partly", activation="sigmoid"), image_shape=CIFAR)
    build(ModelSpec(name=f"{file}:partly", activation="relu"), image_shape=CIFAR)


def test_normalisation_survives_copies_and_functional_calls() -> None:
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    plain, model = small().eval(), small(mean=mean, std=std).eval()
    images = torch.rand(2, *SMALL)
    expected = plain((images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    for logits in (
        model(images),
        copy.deepcopy(model)(images),
        torch.func.functional_call(model, state, (images,)),
        copy.deepcopy(model).double()(images.double()).float(),
    ):
        torch.testing.assert_close(logits, expected)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_normalisation_needs_one_value_per_channel() -> None:
    with pytest.raises(ModelError, match=r"model\.mean has 2 values, the images have 3 channels"):
        small(mean=[0.1, 0.2])


def test_trained_resnet20_loads_and_classifies(shared: Path) -> None:
    spec = ModelSpec(
        name="resnet20-cifar",
        weights=shared / "weights" / "cifar10_resnet20.safetensors",
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
    )
    model = build(spec, image_shape=CIFAR).eval()
    with np.load(shared / "data" / "cifar10_train_first1024.npz", allow_pickle=False) as data:
        images, labels = torch.from_numpy(data["x"][:128]), torch.from_numpy(data["y"][:128])
    with torch.no_grad():
        predicted = model(images.permute(0, 3, 1, 2) / 255).argmax(dim=1)
    assert (predicted == labels).float().mean() > 0.95


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    return tmp_path / "weights.safetensors", {k: v.clone() for k, v in small(seed=9).state_dict().items()}


def test_weights_round_trip(weights: tuple[Path, dict[str, Tensor]]) -> None:
    path, state = weights
    write_tensors(path, state, {})
    loaded = small(seed=1, weights=path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_weights_that_do_not_fit(weights: tuple[Path, dict[str, Tensor]]) -> None:
    path, state = weights

    def message(changed: dict[str, Tensor]) -> str:
        write_tensors(path, changed, {})
        with pytest.raises(ModelError) as caught:
            small(weights=path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    renamed = {("fc.bias" if name == "linear.bias" else name): tensor for name, tensor in state.items()}
    assert "lacks 'linear.bias' and has unexpected 'fc.bias'" in message(renamed)
    reshaped = {**state, "linear.weight": torch.zeros(7, 32)}
    assert "'linear.weight' has shape (7, 32), the model expects (10, 32)" in message(reshaped)
    infinite = {**state, "linear.bias": torch.full((10,), torch.inf)}
    assert "'linear.bias' has 10 values of 10 that are NaN or infinite" in message(infinite)


def test_own_model_by_file_and_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import math\n"
        "from torch import nn\n"
        "def net(num_classes, image_shape):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image_shape), num_classes))\n"
        "def fixed(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))\n"
        "def text(): return 'net'\n"
        "def broken(): raise RuntimeError('out of order')\n"
        "def one_number(): return type('Sum', (nn.Module,), {'forward': lambda self, x: x.sum()})()\n"
        "def several(): return type('Pair', (nn.Module,), {'forward': lambda self, x: (x, x)})()\n"
    )
    (tmp_path / "own_gradleak_model.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    file = str(tmp_path / "own_gradleak_model.py")
    for source in (file, "own_gradleak_model"):
        model = build(ModelSpec(name=f"{source}:net", num_classes=6), image_shape=(1, 8, 8))
        assert model(torch.rand(2, 1, 8, 8)).shape == (2, 6)
        assert parameters(build(ModelSpec(name=f"{source}:fixed"), image_shape=CIFAR)) == 3073 * 4
    for name, reason in {
        "net": "calling it failed: TypeError",
        "nett": "did you mean 'net'",
        "text": "returned str, expected a torch.nn.Module",
        "broken": "RuntimeError: out of order",
        "one_number": r"gives torch.float32 of shape \(\) for two images of 3x32x32",
        "several": "returns tuple, expected a tensor",
    }.items():
        with pytest.raises(ModelError, match=reason):
            build(ModelSpec(name=f"{file}:{name}"), image_shape=CIFAR)
    with pytest.raises(ModelError, match=r"expected \(2, 5\)"):
        build(ModelSpec(name=f"{file}:fixed", num_classes=5), image_shape=CIFAR)


@pytest.mark.parametrize(
    ("settings", "shape", "reason"),
    [
        ({"name": "resnet18-cifr"}, CIFAR, "did you mean 'resnet18-cifar'"),
        ({"name": "vgg16"}, CIFAR, "did you mean 'torchvision/vgg16'"),
        ({"name": "torchvision/resnet81"}, CIFAR, "did you mean 'torchvision/resnet"),
        ({"name": "torchvision/resnet18"}, (1, 32, 32), "3 channels, these have 1"),
        ({"name": "torchvision/resnet18", "width": 8}, CIFAR, r"model\.width"),
        ({"name": "torchvision/squeezenet1_1"}, (3, 8, 8), "squeezenet1_1 does not take images of 3x8x8"),
        ({"name": "missing.py:net"}, CIFAR, r"no such file: missing\.py"),
        ({"name": "no_such_module:net"}, CIFAR, "PYTHONPATH"),
    ],
)
def test_models_that_cannot_be_built(settings: dict[str, object], shape: tuple[int, int, int], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        build(ModelSpec(**settings), image_shape=shape)  # type: ignore[arg-type]


def test_available_names() -> None:
    assert {"resnet18-cifar", "resnet20-cifar", "convnet", "lenet", "torchvision/resnet18"} <= set(available())


def test_tensor_files_repeat_to_the_byte(tmp_path: Path) -> None:
    path, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = {"w": torch.arange(6.0).reshape(2, 3).T, "n": torch.tensor(3)}
    metadata = {str(i): str(i) for i in range(20)}
    write_tensors(path, tensors, metadata)
    write_tensors(again, tensors, dict(reversed(metadata.items())))
    assert path.read_bytes() == again.read_bytes()
    read, found = read_tensors(path)
    assert found == metadata
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_every_cut_of_a_tensor_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    write_tensors(path, {"w": torch.rand(4)}, {"k": "v"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ObservationError, match=r"cut\.safetensors"):
            read_tensors(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04" + bytes(100),
        (1 << 62).to_bytes(8, "little") + b"{" + bytes(100),
        (200_000_000).to_bytes(8, "little") + b"{" + bytes(100),
        (59).to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,999999]}}',
        (71).to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,16]}}'[:71],
    ],
)
def test_hostile_tensor_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"hostile\.safetensors"):
        read_tensors(path, error=ModelError)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(GradleakError, match=r"not read here: write the weights anew with safetensors\.torch\.save_file"):
        read_tensors(tmp_path / "weights.pth")


def test_missing_tensor_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ObservationError, match="no such file"):
        read_tensors(tmp_path / "none.safetensors")
    with pytest.raises(OutputError, match="cannot be written"):
        write_tensors(tmp_path / "none" / "w.safetensors", {"w": torch.zeros(1)}, {})


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "folder.safetensors"
    path.mkdir()
    with pytest.raises(OutputError):
        write_tensors(path, {"w": torch.zeros(1)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["folder.safetensors"]


def test_other_libraries_files_are_read(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "w.safetensors")
    tensors, metadata = read_tensors(tmp_path / "w.safetensors")
    check_state(tensors, {"w": torch.Size([2])}, where="w.safetensors")
    assert metadata == {}


def test_attention_has_second_derivatives() -> None:
    """Though torch's fused kernels have none: the operator runs it unfused, a user's own transformer too."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation="gelu")
    model = nn.Sequential(
        nn.Flatten(2), layer_norm := nn.LayerNorm(64), nn.Linear(64, 8), layer, nn.Flatten(), nn.Linear(24, 4)
    )
    assert layer_norm.weight.requires_grad
    images, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    update, transpose = FedSGD(model).vjp(images, labels)
    cotangent = {name: torch.randn_like(t) for name, t in update.items()}
    direction, step = torch.randn_like(images), 1e-3
    ahead, behind = (FedSGD(model)(images + s * step * direction, labels) for s in (1, -1))
    slope = sum(float(((ahead[name] - behind[name]) * c).sum()) for name, c in cotangent.items()) / (2 * step)
    assert float((transpose(cotangent) * direction).sum()) == pytest.approx(slope, rel=0.02)


def test_an_operation_without_a_second_derivative_is_named() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Hardsigmoid(), nn.Linear(8, 4))
    images, labels = torch.rand(2, *SMALL), torch.tensor([0, 1])
    for client in (FedSGD(model), FedAvg(model, learning_rate=0.1)):
        update, transpose = client.vjp(images, labels)
        with pytest.raises(ModelError, match=r"hardsigmoid.*second derivative.*model\.activation"):
            transpose(update)


def test_timm_is_named_where_it_is_missing() -> None:
    if find_spec("timm"):
        pytest.skip("timm is installed")
    with pytest.raises(ModelError, match=r'pip install "gradleak\[timm\]"'):
        build(ModelSpec(name="timm/resnet18"), image_shape=CIFAR)


@pytest.mark.parametrize(
    ("name", "shape"), [("test_resnet", (1, 32, 40)), ("test_vit", (2, 48, 32)), ("test_efficientnet", CIFAR)]
)
def test_models_of_timm(name: str, shape: tuple[int, int, int], tmp_path: Path) -> None:
    """Channels, sizes (of a transformer too) and classes are the client's; nothing works in place; weights come from a file."""
    pytest.importorskip("timm")
    spec = ModelSpec(name=f"timm/{name}", num_classes=5, seed=1)
    model = build(spec, image_shape=shape)
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    images = torch.rand(2, *shape)
    assert model(images).shape == (2, 5)
    assert double_backward_of(FedSGD(model), images).isfinite().all()
    write_tensors(tmp_path / "w", dict(model.state_dict()), {})
    again = build(spec.model_copy(update={"seed": 2, "weights": tmp_path / "w"}), image_shape=shape)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def double_backward_of(client: FedSGD, images: Tensor) -> Tensor:
    update, transpose = client.vjp(images, torch.arange(len(images)))
    return transpose(update)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("timm/resnet81", CIFAR, "did you mean 'timm/resnet18'"),
        ("timm/qqqqqq", CIFAR, "gradleak list models timm"),
        ("timm/vit_7b_patch16_dinov3", (3, 10_016, 10_016), "of this machine|cannot be built"),
        ("timm/test_vit", (3, 30, 30), "timm/test_vit.*3x30x30"),
    ],
)
def test_bad_models_of_timm(name: str, shape: tuple[int, int, int], words: str) -> None:
    """The nearest name; a model that is larger than the machine is not allocated; sizes that patches do not divide."""
    pytest.importorskip("timm")
    with pytest.raises(ModelError, match=words):
        build(ModelSpec(name=name), image_shape=shape)
