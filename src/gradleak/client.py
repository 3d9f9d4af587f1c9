r"""The client operator A: from images and labels to the update that a client sends.

One object both simulates the client and is inverted by the attacks, so the two cannot disagree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from gradleak.errors import DataError, ObservationError, SpecError
from gradleak.models import import_function
from gradleak.observation import Observation, Truth, Update
from gradleak.spec import ClientSpec, ModelSpec
from gradleak.vjp import Engine, Transpose, exact

TrainingLoss = Callable[[Tensor, Tensor], Tensor]
"""Output of F and labels to the client's training loss (a scalar, the mean over the batch)."""

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class FedSGD:
    r"""A client of FedSGD: :math:`A(x, y) = \nabla_W L(F(x; W), y)`  (CI-Net, section 3).

    Works on a copy of the caller's model: its weights, its mode and its running statistics stay as they are. Layers in
    ``train`` mode use the batch's own statistics. Dropout is off in both modes: the server could not know its masks.

    Args:
        model: F with its weights W. Parameters with ``requires_grad=False`` are not part of the update.
        loss: L, from F's output and the labels to a scalar; or its name (:func:`training_loss`).
        mode: ``train`` or ``eval`` of the model while the client computes its gradient.

    Attributes:
        weights: W, name -> tensor, the parameters whose gradient is sent.
        buffers: F's buffers (running statistics), name -> tensor.
    """

    def __init__(
        self, model: nn.Module, *, loss: TrainingLoss | str = "cross-entropy", mode: Literal["train", "eval"] = "train"
    ) -> None:
        self.model = copy.deepcopy(model).train(mode == "train")
        for module in self.model.modules():
            if isinstance(module, DROPOUT):
                module.eval()
        self.mode = mode
        self.loss_name = loss if isinstance(loss, str) else getattr(loss, "__name__", "own")
        self.training_loss = training_loss(loss) if isinstance(loss, str) else loss
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.weights: Update = {name: p.detach() for name, p in trainable.items()}
        self._frozen = {name: p.detach() for name, p in self.model.named_parameters() if name not in trainable}
        self.buffers = {name: b.detach() for name, b in self.model.named_buffers()}
        self.model.requires_grad_(False)

    @property
    def parameters(self) -> int:
        """P(F), the number of scalars in the update."""
        return sum(w.numel() for w in self.weights.values())

    @property
    def has_dropout(self) -> bool:
        """Whether F has dropout layers (which the operator switches off)."""
        return any(isinstance(m, DROPOUT) and m.p > 0 for m in self.model.modules())

    @property
    def has_batch_statistics(self) -> bool:
        """Whether images of a batch are coupled through batch norm in train mode."""
        return self.mode == "train" and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules())

    def outputs(self, images: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """F(x; W) in the client's mode. B x C x H x W to F's output."""
        # fresh buffers for each call: running statistics must not drift while an attack queries F
        state = {
            **self._frozen,
            **(self.weights if weights is None else weights),
            **{name: b.clone() for name, b in self.buffers.items()},
        }
        output: Tensor = functional_call(self.model, state, (images,))
        return output

    def loss(self, weights: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """L(F(x; W), y), a scalar."""
        return self.training_loss(self.outputs(images, weights), labels)

    def __call__(self, images: Tensor, labels: Tensor) -> Update:
        """A(x, y): the update, name -> tensor."""
        leaves = [w.detach().requires_grad_() for w in self.weights.values()]
        value = self.loss(dict(zip(self.weights, leaves, strict=True)), images, labels)
        gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        return dict(zip(self.weights, gradients, strict=True))

    def vjp(self, images: Tensor, labels: Tensor, *, engine: Engine = exact) -> tuple[Update, Transpose]:
        """A(x, y) and the transpose of its derivative at x, by an engine of :mod:`gradleak.vjp`."""
        return engine(lambda weights, x: self.loss(weights, x, labels), self.weights, images)

    def joint_vjp(
        self, images: Tensor, labels: Tensor, *, engine: Engine = exact
    ) -> tuple[Update, Callable[[Update], tuple[Tensor, Tensor]]]:
        """A(x, y) for soft labels y (B x classes, rows summing to 1), and the transpose with respect to both (DLG).

        Returns:
            The update, and a function from its cotangent to those of images and labels.
        """
        sizes = [images[0].numel(), labels[0].numel()]

        def split(packed: Tensor) -> tuple[Tensor, Tensor]:
            x, y = packed.split(sizes, dim=1)
            return x.reshape(images.shape), y.reshape(labels.shape)

        def loss(weights: Mapping[str, Tensor], packed: Tensor) -> Tensor:
            return self.loss(weights, *split(packed))

        update, transpose = engine(loss, self.weights, torch.cat([images.flatten(1), labels.flatten(1)], dim=1))
        return update, lambda cotangent: split(transpose(cotangent))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> FedSGD:
        """The same operator on another device or in another precision (float64 for reference computations)."""
        model = copy.deepcopy(self.model).to(device=device, dtype=dtype)
        for name, p in model.named_parameters():
            p.requires_grad_(name in self.weights)
        moved = FedSGD(model, loss=self.training_loss, mode=self.mode)
        moved.loss_name = self.loss_name
        return moved


def simulate(client: FedSGD, truth: Truth, *, grant_labels: bool = True, model: ModelSpec | None = None) -> Observation:
    """What the server holds after this client sent its update for ``truth``.

    Args:
        client: The operator A.
        truth: The client's private batch.
        grant_labels: Whether the threat model grants the labels.
        model: The built-in model's description, so that ``gradleak invert`` can rebuild F by itself.

    Raises:
        DataError: A label is outside F's classes.
    """
    weight = next(iter(client.weights.values()))
    images, labels = truth.images.to(weight), truth.labels.to(weight.device)
    with torch.no_grad():
        classes = client.outputs(images[:2].repeat(2, 1, 1, 1)[:2]).shape[-1]
    if labels.min() < 0 or labels.max() >= classes:
        bad = next(int(label) for label in labels if not 0 <= label < classes)
        raise DataError(
            f"label {bad} is out of range: the model has {classes} classes (0 to {classes - 1}); "
            "set model.num_classes, or choose other images"
        )
    return Observation(
        update={name: t.cpu() for name, t in client(images, labels).items()},
        weights={name: t.cpu() for name, t in client.weights.items()},
        buffers={name: t.cpu() for name, t in client.buffers.items()},
        image_shape=(images.shape[1], images.shape[2], images.shape[3]),
        batch=len(images),
        protocol=ClientSpec(mode=client.mode, loss=client.loss_name),
        labels=truth.labels if grant_labels else None,
        model=model,
    )


def operator(observation: Observation, model: nn.Module, *, where: str = "observation") -> FedSGD:
    """The client operator A of an observation: F with the observed weights, buffers, mode and loss.

    Args:
        observation: What the server holds.
        model: F; its own weights are used when the observation has none.
        where: What an error message calls the observation.

    Raises:
        ObservationError: The observation does not fit the model; names the parameter and both shapes.
    """
    client = FedSGD(model, loss=observation.protocol.loss, mode=observation.protocol.mode)
    observation.check_fits(client, where=where)
    state = {**observation.weights, **observation.buffers}
    known = {**client.weights, **client.buffers}
    for name, tensor in state.items():
        if name not in known or known[name].shape != tensor.shape:
            found = "is not in the model" if name not in known else f"has shape {tuple(known[name].shape)} in the model"
            raise ObservationError(f"{where}: {name!r} of shape {tuple(tensor.shape)} {found}; is it another model?")
        known[name].copy_(tensor)
    return client


def training_loss(name: str) -> TrainingLoss:
    """L by name: ``cross-entropy`` (mean), or one's own as ``path/to/file.py:function`` or ``package.module:function``."""
    if name == "cross-entropy":
        return cross_entropy
    if ":" not in name:
        raise SpecError(f'client.loss: unknown loss {name!r}; use "cross-entropy", file.py:function or module:function')
    loss: TrainingLoss = import_function(name, error=SpecError)
    return loss
