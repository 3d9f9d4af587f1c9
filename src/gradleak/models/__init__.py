"""The attacked models F: built by name, from a user's own function, with replaced activations and loaded weights."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradleak.errors import GradleakError, ModelError, closest, nearest
from gradleak.files import machine_memory
from gradleak.models.cifar import NETWORKS, ImageShape
from gradleak.observation import Normalisation
from gradleak.spec import ModelSpec
from gradleak.tensors import check_state, read_tensors

__all__ = ["available", "build", "described", "import_function", "normalisation", "normalised"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}

_REPLACEABLE = (
    *ACTIVATIONS.values(),
    nn.CELU,
    nn.ELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,  # and ReLU6, its subclass
    nn.Mish,
    nn.PReLU,
    nn.RReLU,
    nn.SELU,
    nn.Softplus,
    nn.Softsign,
)

#: Activations that are recognised when forward() calls them as functions. Not sigmoid and tanh: they also gate.
_RECTIFIERS = {"relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish", "softplus"}


def available() -> list[str]:
    """Names that :func:`build` knows: built-in networks, ``torchvision/NAME``, and ``timm/NAME`` where timm is installed."""
    names = [*NETWORKS, *(f"torchvision/{name}" for name in _torchvision_names())]
    return [*names, *(f"timm/{name}" for name in _timm().list_models())] if find_spec("timm") else names


def described() -> dict[str, str]:
    """Name -> one line about it; only the built-in networks have one."""
    lines = {name: (inspect.getdoc(network) or "").partition("\n")[0] for name, network in NETWORKS.items()}
    return {name: lines.get(name, "") for name in available()}


def build(spec: ModelSpec, *, image_shape: ImageShape) -> nn.Module:
    """Build the attacked model F with weights W, on the CPU, in float32 and train mode.

    The weights are a function of ``spec`` alone; torch's random state is left as it was. In-place activations become
    out-of-place ones, for the double backward. Parameter names are the model's own whatever ``spec`` asks for.

    Args:
        spec: Name, width, classes, activation, weights, seed, normalisation.
        image_shape: (C, H, W) of the images that F takes, in [0, 1].

    Returns:
        A module that maps B x C x H x W to B x ..., logits B x num_classes for a classifier.

    Raises:
        ModelError: The name is unknown, the user's code fails, an activation cannot be replaced, the weights do not
            fit, or the model does not take such images. Says which and why.
    """
    channels = image_shape[0]
    for key, values in (("mean", spec.mean), ("std", spec.std)):
        if values is not None and len(values) != channels:
            raise ModelError(f"model.{key} has {len(values)} values, the images have {channels} channels")
    large = (spec.width or 0) > 1024 or (spec.num_classes or 0) > 100_000 or spec.name.startswith("timm/")
    if ":" not in spec.name and large:
        _check_size(spec, image_shape)
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed: it would also reset the caller's accelerators
        torch.default_generator.manual_seed(spec.seed)
        model = _construct(spec, image_shape)
        if spec.activation != "model":
            _replace_activations(model, spec)
        for module in model.modules():
            if getattr(module, "inplace", False) is True:
                setattr(module, "inplace", False)  # noqa: B010 (nn.Module's attributes are typed as tensors)
        if spec.mean is not None or spec.std is not None:
            mean, std = spec.mean or [0.0] * channels, spec.std or [1.0] * channels
            _normalise(model, Normalisation(tuple(mean), tuple(std)))
        _probe(model, spec, image_shape)
    if spec.weights is not None:
        _load_weights(model, spec.weights)
    return model.train()


def import_function(where: str, *, error: type[GradleakError] = ModelError) -> Callable[..., Any]:
    """The function that ``path/to/file.py:function`` or ``package.module:function`` names. Runs the file or module.

    Args:
        where: The name.
        error: Class of the error.

    Raises:
        GradleakError: Of class ``error``: no such file, module or function, or the code fails when it is imported.
    """
    source, _, name = where.rpartition(":")
    if not source or not name:
        raise error(f"{where}: expected path/to/file.py:function or package.module:function")
    path = Path(source).expanduser()
    if path.suffix == ".py" and not path.is_file():
        raise error(f"{where}: no such file: {path}")
    try:
        module = _run_file(path) if path.suffix == ".py" else importlib.import_module(source)
    except SystemExit as cause:
        raise error(
            f"{where}: {source} ended the program while it was imported ({cause}); put what it does as a script under "
            'if __name__ == "__main__":'
        ) from cause
    except Exception as cause:  # the user's code may raise anything
        hint = ". Is it installed, or its folder on PYTHONPATH?" if isinstance(cause, ModuleNotFoundError) else ""
        raise error(f"{where}: importing {source} failed: {type(cause).__name__}: {cause}{hint}") from cause
    function = getattr(module, name, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise error(f"{where}: {source} has no function {name!r}{nearest(name, public)}")
    return function


def normalised(model: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    r"""A copy of F for images in [0, 1] where F takes normalised ones: :math:`x \mapsto F((x - \mathrm{mean}) / \mathrm{std})`.

    Parameters keep their names.

    Args:
        model: F.
        mean, std: One number for each channel.

    Raises:
        ModelError: A deviation is not positive, there are not as many of one as of the other, or F is normalised already.
    """
    if len(mean) != len(std) or any(s <= 0 for s in std):
        raise ModelError(f"normalisation: mean {list(mean)} and std {list(std)}; expected one positive std for each mean")
    if normalisation(model) is not None:
        raise ModelError("normalisation: this model normalises its images already; declare mean and std once")
    model = copy.deepcopy(model)
    _normalise(model, Normalisation(tuple(map(float, mean)), tuple(map(float, std))))
    return model


def normalisation(model: nn.Module) -> Normalisation | None:
    """What :func:`normalised` or :func:`build` made F subtract and divide by; None: nothing."""
    hooks = model._forward_pre_hooks.values()
    return next((hook.constants for hook in hooks if isinstance(hook, _Normalise)), None)


@dataclass(frozen=True)
class _Normalise:
    """Forward pre-hook ``x -> (x - mean) / std`` per channel; holds numbers, so it follows any device and copy."""

    constants: Normalisation

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        images, *rest = inputs
        mean = images.new_tensor(self.constants.mean)[:, None, None]
        std = images.new_tensor(self.constants.std)[:, None, None]
        return ((images - mean) / std, *rest)


def _normalise(model: nn.Module, constants: Normalisation) -> None:
    model.register_forward_pre_hook(_Normalise(constants), prepend=True)


def _construct(spec: ModelSpec, image_shape: ImageShape) -> nn.Module:
    classes = {} if spec.num_classes is None else {"num_classes": spec.num_classes}
    if spec.name in NETWORKS:
        width = {} if spec.width is None else {"width": spec.width}
        return NETWORKS[spec.name](image_shape=image_shape, **classes, **width)
    library, _, bare = spec.name.partition("/") if ":" not in spec.name else ("", "", "")
    known = {"torchvision": _torchvision_names, "timm": lambda: _timm().list_models()}.get(library, list)
    if bare not in known() and ":" not in spec.name:
        own = f"; name its function: '{spec.name}:FUNCTION'" if spec.name.endswith(".py") else _suggestion(spec.name)
        raise ModelError(f"unknown model {spec.name!r}{own}")
    if spec.width is not None:
        raise ModelError(f"model.width is a setting of {', '.join(NETWORKS)}; {spec.name} has none: remove it")
    if library == "torchvision":
        return _torchvision_model(spec.name, classes, image_shape)
    if library == "timm":
        return _timm_model(bare, classes, image_shape)
    return _own_model(spec.name, {**classes, "image_shape": image_shape})


def _check_size(spec: ModelSpec, image_shape: ImageShape) -> None:
    """A model's name and size may come from an update file: they must not ask for more memory than there is."""
    with torch.device("meta"):
        needed = sum(p.numel() * p.element_size() for p in _construct(spec, image_shape).parameters())
    if needed > machine_memory() // 4:  # weights, gradient, update and moved weights
        raise ModelError(
            f"{spec.name}: its weights take {needed} bytes (model.width = {spec.width}, model.num_classes = "
            f"{spec.num_classes}); with their gradients that is more than the {machine_memory()} bytes of this machine"
        )


def _suggestion(name: str) -> str:
    library, _, bare = name.rpartition("/")
    if library in ("timm", "torchvision"):
        close = closest(name, [known for known in available() if known.startswith(library)])
        return f"; did you mean {close!r}?" if close else f"; `gradleak list models {library}` shows what there is"
    if bare in _torchvision_names():
        return f"; did you mean 'torchvision/{bare}'?"
    return nearest(name, [*NETWORKS, "torchvision/NAME", "timm/NAME", "path/to/file.py:function", "package.module:function"])


def _torchvision_names() -> list[str]:
    return [str(name) for name in torchvision.models.list_models(module=torchvision.models)]


def _torchvision_model(name: str, classes: dict[str, int], image_shape: ImageShape) -> nn.Module:
    if image_shape[0] != 3:
        raise ModelError(f"{name} takes images of 3 channels, these have {image_shape[0]}; use a CIFAR network or your own")
    bare = name.removeprefix("torchvision/")
    # without the auxiliary heads these two return logits in train mode, as all others do
    plain = {"aux_logits": False, "init_weights": True} if bare in ("googlenet", "inception_v3") else {}
    model: nn.Module = torchvision.models.get_model(bare, weights=None, **classes, **plain)
    return model


def _timm() -> Any:
    """timm, imported when it is asked for: it is an optional extra."""
    try:
        return importlib.import_module("timm")
    except ImportError as cause:
        raise ModelError(f'models named timm/NAME need timm ({cause}); install it with: pip install "gradleak[timm]"') from None


def _timm_model(name: str, classes: dict[str, int], image_shape: ImageShape) -> nn.Module:
    timm = _timm()
    # these have position embeddings, windows or token mixers of one image size; the others take any
    sized = {"img_size": image_shape[1:]} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, in_chans=image_shape[0], **classes, **sized)
    except Exception as cause:  # sizes that the model's patches or windows do not divide, and much else
        size = "x".join(map(str, image_shape))
        raise ModelError(f"timm/{name} cannot be built for images of {size}: {type(cause).__name__}: {cause}") from cause
    return model


def _own_model(name: str, offered: dict[str, Any]) -> nn.Module:
    function = import_function(name)
    try:
        parameters = inspect.signature(function).parameters
        model = function(**{key: value for key, value in offered.items() if key in parameters})
    except Exception as cause:  # the user's code may raise anything
        raise ModelError(f"{name}: calling it failed: {type(cause).__name__}: {cause}") from cause
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name}: returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def _run_file(path: Path) -> ModuleType:
    name = f"gradleak_own_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look the module up by name
    if (folder := str(path.resolve().parent)) not in sys.path:  # as `python file.py` would; behind all that is installed
        sys.path.append(folder)
    spec.loader.exec_module(module)
    return module


def _replace_activations(model: nn.Module, spec: ModelSpec) -> None:
    # shared instances have several names: replace under each
    named = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, _REPLACEABLE)]
    if not named:
        raise ModelError(
            f"model.activation = {spec.activation!r}: {spec.name} has no activation module to replace. Activations "
            "called as functions (torch.nn.functional.relu) cannot be replaced: make them modules (torch.nn.ReLU)"
        )
    for name in named:
        model.set_submodule(name, ACTIVATIONS[spec.activation]())


class _FunctionNames(TorchFunctionMode):
    """Records the names of the torch functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.add(getattr(func, "__name__", "").rstrip("_"))
        return func(*args, **(kwargs or {}))


def _probe(model: nn.Module, spec: ModelSpec, image_shape: ImageShape) -> None:
    """Run two random images through the model: it must take them, and give a tensor for each."""
    size = "x".join(map(str, image_shape))
    calls = _FunctionNames()
    try:
        with torch.no_grad(), calls:
            output = model.eval()(torch.rand(2, *image_shape))
    except Exception as cause:  # the user's code may raise anything
        raise ModelError(
            f"{spec.name} does not take images of {size} (C x H x W): {type(cause).__name__}: {cause}. "
            "Set data.size and data.channels, or the image shape, to what it was written for"
        ) from cause
    if not isinstance(output, Tensor):
        raise ModelError(
            f"{spec.name} returns {type(output).__name__}, expected a tensor whose first dimension is the batch, such as "
            "logits; wrap it in a module that returns the tensor that the loss takes"
        )
    if output.ndim == 0 or len(output) != 2 or not output.is_floating_point():
        raise ModelError(
            f"{spec.name} gives {output.dtype} of shape {tuple(output.shape)} for two images of {size}, expected floats whose "
            "first dimension is the batch: (2, num_classes) for a classifier"
        )
    if spec.num_classes is not None and output.shape[1:2] != (spec.num_classes,):
        raise ModelError(
            f"{spec.name} gives a tensor of shape {tuple(output.shape)} for two images of {size}, expected "
            f"(2, {spec.num_classes}{', ...' * (output.ndim > 2)})"
        )
    remaining = calls.seen & _RECTIFIERS - {spec.activation}
    if spec.activation != "model" and remaining:
        raise ModelError(
            f"model.activation = {spec.activation!r}: {spec.name} calls {', '.join(sorted(remaining))} as a function "
            "in forward(), which cannot be replaced: make it a module (torch.nn.ReLU), or leave 'model'"
        )


def _load_weights(model: nn.Module, path: Path) -> None:
    found, _ = read_tensors(path, error=ModelError)
    # older files have no counter of batches; batch norm with momentum does not use it
    state = {
        name: tensor for name, tensor in model.state_dict().items() if name in found or not name.endswith("num_batches_tracked")
    }
    check_state(found, {name: tensor.shape for name, tensor in state.items()}, where=str(path), error=ModelError)
    model.load_state_dict(found, strict=False)
