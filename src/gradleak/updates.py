"""Updates that somebody else's code computed: from a model in training, from arrays, from weights before and after.

All of them give an :class:`~gradleak.observation.Observation`, which every attack takes and which can be saved.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradleak.archive import read_archive
from gradleak.errors import ObservationError, SpecError, nearest, printable
from gradleak.observation import FORMAT, Normalisation, Observation, Update, check_update
from gradleak.spec import ClientSpec, DefenceSpec
from gradleak.targets import LOSSES
from gradleak.tensors import read_checkpoint, read_tensors

Arrays = Mapping[str, Any] | Sequence[Any]
"""Tensors or NumPy arrays: by name, or in the order of ``model.parameters()`` or of ``model.state_dict()``."""

#: What wrappers put before the names of a model's parameters: Opacus, DataParallel, torch.compile.
PREFIXES = ("_module.", "module.", "_orig_mod.")

#: How far images may leave [0, 1] by rounding and resizing before a warning asks for their normalisation.
RANGE_TOLERANCE = 0.02

#: Share of an update that may be float32's rounding of the weights before a warning says so.
ROUND_OFF = 0.01

log = logging.getLogger(__name__)


def from_gradient(
    gradient: Arrays,
    model: nn.Module,
    *,
    batch: int,
    image_shape: Sequence[int],
    client: ClientSpec | None = None,
    labels: Any = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    defences: Iterable[DefenceSpec | Mapping[str, Any]] = (),
) -> Observation:
    r"""What a server holds that was sent a gradient :math:`g^* = \nabla_W L(F(x; W), y)`.

    Parameters that the gradient does not have, or for which it is None or zero throughout, count as not sent: the attack
    matches the others.

    Args:
        gradient: :math:`g^*` (:data:`Arrays`). Prefixes that wrappers add to names (``_module.``, ``module.``, ``_orig_mod.``)
            are removed.
        model: F with the weights W at which the gradient was taken, and its buffers.
        batch: B, number of images.
        image_shape: (C, H, W).
        client: How the client computed it: mode, loss, transport; FedSGD unless said otherwise.
        labels: Classes, B, or other targets, B x ...; None: the server does not know them.
        mean, std: What the client subtracts from images in [0, 1] and divides them by, for each channel.
        defences: What the client did to protect its update, as in ``[[defence]]``.

    Raises:
        ObservationError: Names, shapes or numbers do not fit the model; says which.
    """
    parameters = _parameters(model)
    shapes = {name: p.shape for name, p in parameters.items()}
    update = _named(gradient, shapes, model, where="the gradient")
    if unknown := [name for name in update if name not in parameters]:
        raise ObservationError(f"the gradient: {unknown[0]!r} is no parameter of the model; is it another model?")
    state = {**parameters, **{plain_name(name): b for name, b in model.named_buffers()}}
    return _observation(
        {name: t.float() for name, t in update.items()},
        state,
        model,
        batch=batch,
        image_shape=image_shape,
        client=client,
        labels=labels,
        mean=mean,
        std=std,
        defences=defences,
    )


def from_weights(
    before: Arrays | None,
    after: Arrays,
    model: nn.Module,
    *,
    batch: int,
    image_shape: Sequence[int],
    client: ClientSpec | None = None,
    labels: Any = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    defences: Iterable[DefenceSpec | Mapping[str, Any]] = (),
) -> Observation:
    r"""What a server holds that sent weights W and was sent :math:`W_T`: the update is :math:`W - W_T`  (FedAvg).

    For ``client.protocol = "fedavg"`` the learning rate, epochs and local batches are known. With ``"fedsgd"`` the change is
    taken for one gradient of all images times a learning rate that need not be known: the cosine distance ignores it. Label
    recovery and squared distances do not, so a warning says so where no labels are given.

    Args:
        before: W (:data:`Arrays`), with buffers if they are in it; None: those of ``model``.
        after: :math:`W_T`, with the same names or in the same order. What is not in it, or did not change at all, counts as
            not sent.
        model: F.
        batch, image_shape, client, labels, mean, std, defences: As of :func:`from_gradient`.

    Raises:
        ObservationError: Names, shapes or numbers do not fit the model, or nothing changed.
    """
    own = _state(model)
    shapes = {name: t.shape for name, t in own.items()}
    old = {**own, **({} if before is None else _named(before, shapes, model, where="the weights before"))}
    new = _named(after, shapes, model, where="the weights after")
    parameters = _parameters(model)
    trained = [name for name in new if name in parameters and parameters[name].requires_grad]
    update = {name: _change(old[name], new[name]) for name in trained}
    if labels is None and (client is None or client.protocol == "fedsgd"):
        log.warning(
            "the learning rate is not known, so labels that are recovered from this update can be wrong: give labels, or "
            "client=ClientSpec(protocol='fedavg', learning_rate=...)"
        )
    size = _norm(update.values())
    # a rounded number is off by up to half its spacing: spacing / sqrt(12) in the mean square
    rounding = _norm(old[name].float() for name in trained) * torch.finfo(torch.float32).eps / 12**0.5
    if size and rounding > ROUND_OFF * size:
        log.warning(
            "the weights changed so little that about %.2g %% of the update is float32's rounding", 100 * rounding / size
        )
    return _observation(
        update,
        old,
        model,
        batch=batch,
        image_shape=image_shape,
        client=client,
        labels=labels,
        mean=mean,
        std=std,
        defences=defences,
    )


class observe:
    r"""Look at a training step of one's own, and keep what its server would be sent.

    .. code-block:: python

        with gradleak.observe(model) as seen:
            criterion(model(images), labels).backward()
        seen.save("update.safetensors")

    Without a protocol, the update is what is in ``p.grad`` at the end of the block, at the weights of its beginning: with
    Opacus, ``optimizer.step()`` belongs into the block, so that the noise is in it. With ``client=ClientSpec(
    protocol="fedavg", ...)`` it is the change of the weights over the block. The model is neither changed nor kept.

    Args:
        model: F, or what Opacus, DataParallel or torch.compile made of it.
        client: What the client does; None: FedSGD in the mode in which the model is. A loss other than cross-entropy has to
            be named here.
        labels: As of :func:`from_gradient`.
        batch: B; None: the number of images that go through the model in the block, in train mode of FedAvg those of one epoch.
        image_shape: (C, H, W); None: that of the images that go through the model.
        mean, std, defences: As of :func:`from_gradient`.

    Attributes:
        observation: After the block: what the server holds.

    Raises:
        ObservationError: At the end of the block: no image went through the model, there is no gradient or no change, or
            images of several shapes went through it.
    """

    observation: Observation

    def __init__(
        self,
        model: nn.Module,
        *,
        client: ClientSpec | None = None,
        labels: Any = None,
        batch: int | None = None,
        image_shape: Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        defences: Iterable[DefenceSpec | Mapping[str, Any]] = (),
    ) -> None:
        self._model, self._client, self._labels = model, client, labels
        self._batch, self._image_shape, self._mean, self._std, self._defences = batch, image_shape, mean, std, defences

    def __enter__(self) -> observe:
        model = self._model
        # zero_grad() as the block's first line makes new ones; those that are still there at its end were added to
        self._earlier = [p.grad for p in model.parameters() if p.grad is not None and bool(p.grad.any())]
        self._before = {name: t.detach().clone() for name, t in _state(model).items()}
        self._mode, self._shapes, self._images = model.training, set[tuple[int, ...]](), 0
        self._begun, self._stepped, self._range = self._versions(), False, (0.0, 1.0)
        self._hook = model.register_forward_pre_hook(self._look, prepend=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._hook.remove()
        if kind is not None:
            return
        client = self._client or ClientSpec(mode="train" if self._mode else "eval")
        if client.protocol != "fedavg":
            self._check_one_step()
        low, high = self._range
        if self._mean is None and self._std is None and (low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE):
            log.warning(
                "the images that went through the model lie in [%.3g, %.3g], not in [0, 1]: if the client normalises them, "
                "give observe mean= and std=; the attack rebuilds images in [0, 1] and would look weaker than it is",
                low,
                high,
            )
        batch = self._batch or self._images // (client.epochs or 1)
        if self._image_shape is None and len(self._shapes) != 1:
            found = f"images of shapes {sorted(self._shapes)}" if self._shapes else "no image"
            raise ObservationError(
                f"observe: {found} went through the model in the block; expected images of one shape (B, C, H, W). "
                "Give batch= and image_shape= if the model is called otherwise"
            )
        image_shape = self._image_shape or next(iter(self._shapes))
        parameters = _parameters(self._model)
        if client.protocol == "fedavg":
            update = {name: _change(self._before[name], p.detach()) for name, p in parameters.items()}
        else:
            update = {name: p.grad.detach().float() for name, p in parameters.items() if p.grad is not None}
        if not update:
            raise ObservationError(
                "observe: no parameter has a gradient at the end of the block; call backward() in it, and zero_grad() before"
            )
        self.observation = _observation(
            update,
            self._before,
            self._model,
            batch=batch,
            image_shape=image_shape,
            client=client,
            labels=self._labels,
            mean=self._mean,
            std=self._std,
            defences=self._defences,
        )

    def save(self, path: str | Path) -> None:
        """Write :attr:`observation` to a safetensors file (docs/observation-format.md)."""
        self.observation.save(Path(path))

    def _look(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Notes how many images of which shape go through the model while it is trained."""
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].ndim == 4 and torch.is_grad_enabled():
            images = inputs[0].detach()
            self._images += len(images)
            self._shapes.add(tuple(images.shape[1:]))
            self._range = min(self._range[0], float(images.min())), max(self._range[1], float(images.max()))
            self._stepped = self._stepped or self._versions() != self._begun

    def _versions(self) -> list[int]:
        """How often each parameter was changed in place."""
        return [p._version for p in self._model.parameters()]

    def _check_one_step(self) -> None:
        """Raise :class:`~gradleak.errors.ObservationError` where ``p.grad`` is not the gradient at the block's beginning."""
        if self._stepped:
            raise ObservationError(
                "observe: the weights changed between two forward passes of the block, so it holds several local steps; say so "
                "with client=ClientSpec(protocol='fedavg', learning_rate=..., epochs=..., local_batch=...), or observe one step"
            )
        if any(p.grad is not None and p.grad is earlier for earlier in self._earlier for p in self._model.parameters()):
            raise ObservationError(
                "observe: gradients of an earlier step were added to; call optimizer.zero_grad() before the block or as its "
                "first line"
            )


def load_weights(model: nn.Module, weights: Arrays, *, where: str = "the weights") -> None:
    """Put weights, and buffers if they are among them, into a model; what is not there stays as it is.

    Raises:
        ObservationError: As :func:`from_gradient`.
    """
    own = _state(model)
    found = _named(weights, {name: t.shape for name, t in own.items()}, model, where=where)
    with torch.no_grad():
        for name, tensor in found.items():
            if name in own:
                own[name].copy_(tensor)


def read_arrays(path: Path) -> Arrays:
    """Gradients or weights from a file: by name, or in the order in which they were saved.

    ``.safetensors``; ``.npz``, whose arrays are by name, or in order where numpy named them itself (``arr_0``, ``arr_1``, ...:
    as ``np.savez(path, *arrays)`` saves Flower's parameters); ``.pt``, ``.pth``, ``.bin`` and ``.ckpt`` of ``torch.save``, by
    torch's restricted unpickler.

    Raises:
        ObservationError: Another kind of file, or a damaged one.
    """
    suffix = path.suffix.lower()
    if suffix == ".npz":
        arrays = read_archive(path, error=ObservationError)
        numbers = [name.removeprefix("arr_") for name in arrays]
        if all(name.startswith("arr_") for name in arrays) and all(n.isascii() and n.isdecimal() for n in numbers):
            return [arrays[f"arr_{n}"] for n in sorted(numbers, key=int)]
        return arrays
    if suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return read_checkpoint(path)
    if suffix == ".safetensors":
        tensors, metadata = read_tensors(path)
        if metadata.get("format") == FORMAT:
            raise ObservationError(f"{path}: is an update file already; attack it with `gradleak invert`")
        return tensors
    raise ObservationError(f"{path}: unknown kind of file; expected .safetensors, .npz, .pt, .pth, .bin or .ckpt")


def read_labels(text: str) -> Tensor:
    """Classes from ``3,0,7``, or targets from the array ``labels``, ``targets`` or ``y`` of a .npz or .safetensors file.

    Raises:
        SpecError: Neither whole numbers nor a file with such an array.
    """
    numbers = [part.strip() for part in text.split(",")]
    if all(n.isascii() and n.isdecimal() for n in numbers):
        return torch.tensor([int(n) for n in numbers])
    path = Path(text)
    if path.suffix.lower() not in (".npz", ".safetensors"):
        raise SpecError(
            f"--labels {text}: expected classes such as 3,0,7, or a .npz or .safetensors file with an array 'labels'"
        )
    arrays = read_arrays(path)
    names = ("labels", "targets", "y")
    found = next((arrays[name] for name in names if isinstance(arrays, dict) and name in arrays), None)
    if found is None:
        raise SpecError(f"--labels {text}: no array {' or '.join(map(repr, names))} in it")
    return torch.as_tensor(found)


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes of :data:`PREFIXES`."""
    while prefix := next((p for p in PREFIXES if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name.replace("._orig_mod.", ".")


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {plain_name(name): p for name, p in model.named_parameters()}


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers."""
    return {plain_name(name): t for name, t in model.state_dict().items()}


def _change(before: Tensor, after: Tensor) -> Tensor:
    """A difference of weights, in float64: small steps would drown."""
    return (before.double() - after.double()).float()


def _named(arrays: Arrays, shapes: Mapping[str, torch.Size], model: nn.Module, *, where: str) -> dict[str, Tensor]:
    """Arrays by the names of F's parameters and buffers, their shapes checked."""
    if isinstance(arrays, Mapping):
        found = {plain_name(str(name)): _tensor(t, f"{where}: {str(name)!r}") for name, t in arrays.items() if t is not None}
    else:
        tensors = [_tensor(t, f"{where}: array {i}") for i, t in enumerate(arrays)]
        found = dict(zip(_order(tensors, model, where=where), tensors, strict=True))
    for name, tensor in found.items():
        if name in shapes and tensor.shape != shapes[name]:
            raise ObservationError(
                f"{where}: {name!r} has shape {tuple(tensor.shape)}, the model expects {tuple(shapes[name])}. Was it taken "
                "from another architecture, width or number of classes?"
            )
    if not any(name in shapes for name in found):
        theirs, own = (", ".join(map(repr, list(names)[:3])) for names in (found, shapes))
        raise ObservationError(f"{where}: none of its names is a parameter of the model: it has {theirs}, the model {own}")
    return found


def _order(tensors: list[Tensor], model: nn.Module, *, where: str) -> list[str]:
    """The names that arrays in F's order have: of trainable parameters, of all parameters, or of the whole state."""
    parameters = _parameters(model)
    orders = {
        "state_dict()": {name: t.shape for name, t in _state(model).items()},
        "parameters()": {name: p.shape for name, p in parameters.items()},
        "the trainable parameters()": {name: p.shape for name, p in parameters.items() if p.requires_grad},
    }
    sizes = [tuple(t.shape) for t in tensors]
    for order in orders.values():
        if [tuple(shape) for shape in order.values()] == sizes:
            return list(order)
    counts = ", ".join(f"{len(order)} in {name}" for name, order in orders.items())
    same = next((o for o in orders.values() if len(o) == len(sizes)), None)
    fault = f"{len(sizes)} arrays; the model has {counts}"
    if same is not None:
        i = next(i for i, (shape, size) in enumerate(zip(same.values(), sizes, strict=True)) if tuple(shape) != size)
        fault = f"array {i} has shape {sizes[i]}, and {list(same)[i]!r} of the model {tuple(list(same.values())[i])}"
    raise ObservationError(f"{where}: {fault}. Give the arrays in the model's order, or by name")


def _tensor(array: Any, where: str) -> Tensor:
    try:
        tensor = array.detach().cpu() if isinstance(array, Tensor) else torch.from_numpy(np.array(array))
    except (TypeError, ValueError) as fault:
        raise ObservationError(f"{where}: is no array of numbers: {printable(str(fault))}") from None
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ObservationError(f"{where}: has NaN or infinite entries; was the client's loss finite?")
    return tensor


def _observation(
    update: Update,
    state: Mapping[str, Tensor],
    model: nn.Module,
    *,
    batch: int,
    image_shape: Sequence[int],
    client: ClientSpec | None,
    labels: Any,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    defences: Iterable[DefenceSpec | Mapping[str, Any]],
) -> Observation:
    """What the constructors share: ``update`` of F's trainable parameters, at ``state``, its parameters and buffers."""
    parameters = _parameters(model)
    update = {name: t for name, t in update.items() if parameters[name].requires_grad}
    client = client or ClientSpec(mode="train" if model.training else "eval")
    normalisation = _normalisation(mean, std, channels=image_shape[0])
    if batch < 1 or len(image_shape) != 3 or min(image_shape) < 1:
        raise ObservationError(f"expected batch >= 1 and image_shape (C, H, W), found {batch} and {tuple(image_shape)}")
    if client.loss not in LOSSES and ":" not in client.loss:
        raise SpecError(f"client.loss: unknown loss {client.loss!r}{nearest(client.loss, [*LOSSES, 'file.py:function'])}")
    client.sizes(batch)
    check_update(update, where="the update")
    sent = {name: t.cpu() for name, t in update.items() if bool(t.any())}
    unsent = [name for name in parameters if name not in sent]
    if unsent and client.layers is None:
        log.info(
            "%d of %d parameters are not in the update, or zero throughout it (%s): the attack matches the others",
            len(unsent),
            len(parameters),
            ", ".join(unsent[:3]) + (" ..." if len(unsent) > 3 else ""),
        )
        client = client.model_copy(update={"layers": list(sent)})
    targets = None if labels is None else torch.as_tensor(np.array(labels) if not isinstance(labels, Tensor) else labels).cpu()
    if targets is not None:
        targets = targets.float() if targets.is_floating_point() else targets.long()
        if targets.shape[:1] != (batch,):
            raise ObservationError(f"labels have shape {tuple(targets.shape)}, expected the batch of {batch} first")
    return Observation(
        update=sent,
        weights={name: state[name].detach().cpu().clone() for name in parameters},
        buffers={name: t.detach().cpu().clone() for name, t in state.items() if name not in parameters},
        image_shape=(int(image_shape[0]), int(image_shape[1]), int(image_shape[2])),
        batch=batch,
        protocol=client,
        labels=targets,
        defences=tuple(d if isinstance(d, DefenceSpec) else DefenceSpec(**d) for d in defences),
        normalisation=normalisation,
    )


def _normalisation(mean: Sequence[float] | None, std: Sequence[float] | None, *, channels: int) -> Normalisation | None:
    if mean is None and std is None:
        return None
    constants = Normalisation(tuple(mean or [0.0] * channels), tuple(std or [1.0] * channels))
    if len(constants.mean) != channels or len(constants.std) != channels or min(constants.std) <= 0:
        raise ObservationError(
            f"mean {list(constants.mean)} and std {list(constants.std)}: expected {channels} numbers each, one for each "
            "channel, and positive deviations"
        )
    return constants


def _norm(tensors: Iterable[Tensor]) -> float:
    return sum(float(t.double().square().sum()) for t in tensors) ** 0.5
