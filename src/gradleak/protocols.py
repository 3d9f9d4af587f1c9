r"""The client operators A: from images and labels to the update that a client sends, one for each protocol.

One object both simulates the client and is inverted by the attacks, so the two cannot disagree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import StochasticDepth

from gradleak.errors import DataError, SpecError, nearest
from gradleak.models import import_function
from gradleak.observation import Update
from gradleak.prefix import sharing
from gradleak.spec import ClientSpec, DefenceSpec
from gradleak.targets import LOSSES, TrainingLoss
from gradleak.vjp import Engine, SelfChecking, Transpose, exact, second_derivative

Mode = Literal["train", "eval"]
Order = Literal["given", "shuffled"]

JointTranspose = Callable[[Update], tuple[Tensor, Tensor]]
"""Cotangent of the update to those of the images and of targets that are floats, such as soft labels."""

#: Layers with random masks in train mode.
RANDOM = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.RReLU,
    StochasticDepth,
)


class LastLinear(NamedTuple):
    """F's last layer, where that is an ``nn.Linear``.

    Attributes:
        name: In F; empty where F itself is the layer.
        features: Its input r, B x D, differentiable with respect to the images.
        output: F's output, B x classes.
    """

    name: str
    features: Tensor
    output: Tensor

    def parameter(self, kind: str) -> str:
        """The name in F of the layer's ``weight`` or ``bias``."""
        return f"{self.name}.{kind}" if self.name else kind


class ClientOperator:
    """A client operator A: F with its weights W, and how a client turns a batch into what it sends.

    A subclass says what the update is (:meth:`__call__`) and its transpose (:meth:`vjp`). Works on a copy of the caller's
    model: its weights, mode and running statistics stay as they are. Layers in ``train`` mode use the batch's own
    statistics. Layers with random masks (dropout) are off in both modes: the server could not know the masks.

    Args:
        model: F with its weights W. Parameters with ``requires_grad=False`` are not part of the update.
        loss: L, from F's output and the targets to a scalar; or its name (:func:`training_loss`).
        mode: ``train`` or ``eval`` of the model while the client computes its gradient.
        layers: Names, or patterns of :mod:`fnmatch`, of the parameters that are sent. The others stay at W.

    Attributes:
        weights: The part of W whose update is sent, name -> tensor.
        frozen: The rest of W, name -> tensor.
        buffers: F's buffers (running statistics), name -> tensor.
        notes: What a report must say of F or the client beside its settings.

    Raises:
        SpecError: No parameter is sent, or the loss is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: TrainingLoss | str = "cross-entropy",
        mode: Mode = "train",
        layers: Sequence[str] = ("*",),
    ) -> None:
        self.model = copy.deepcopy(model).train(mode == "train")
        for module in self.model.modules():
            if isinstance(module, RANDOM):
                module.eval()
        self.mode: Mode = mode
        self.loss_name = loss if isinstance(loss, str) else getattr(loss, "__name__", "own")
        self.training_loss = training_loss(loss) if isinstance(loss, str) else loss
        parameters = dict(self.model.named_parameters())
        sent = {name for name, p in parameters.items() if p.requires_grad and _matches(name, layers)}
        if not sent:
            raise SpecError(
                f"client.layers: no trainable parameter of the model matches {', '.join(map(repr, layers))}; "
                f"its parameters are named like {', '.join(map(repr, list(parameters)[-3:]))}"
            )
        self.weights: Update = {name: p.detach() for name, p in parameters.items() if name in sent}
        self.frozen: Update = {name: p.detach() for name, p in parameters.items() if name not in sent}
        self.buffers = {name: b.detach() for name, b in self.model.named_buffers()}
        self.notes: tuple[str, ...] = ()
        self.model.requires_grad_(False)

    @property
    def parameters(self) -> int:
        """P(F), the number of scalars in the update."""
        return sum(w.numel() for w in self.weights.values())

    @property
    def has_dropout(self) -> bool:
        """Whether F has layers with random masks, dropout above all (which the operator switches off)."""
        return any(isinstance(m, RANDOM) and getattr(m, "p", 1) > 0 for m in self.model.modules())

    @property
    def has_batch_statistics(self) -> bool:
        """Whether images of a batch are coupled through batch norm: in train mode, or without running statistics."""
        return any(isinstance(m, _BatchNorm) and (m.training or m.running_mean is None) for m in self.model.modules())

    @property
    def spec(self) -> ClientSpec:
        """The specification that this operator follows: what the server knows of the protocol."""
        return ClientSpec(mode=self.mode, loss=self.loss_name, layers=list(self.weights) if self.frozen else None)

    @property
    def defences(self) -> tuple[DefenceSpec, ...]:
        """The defences that the client applies, in their order."""
        return ()

    def outputs(self, images: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """F(x; W) in the client's mode. B x C x H x W to F's output."""
        # fresh buffers for each call: running statistics must not drift while an attack queries F
        state = {
            **self.frozen,
            **(self.weights if weights is None else weights),
            **{name: b.clone() for name, b in self.buffers.items()},
        }
        # fused attention has no second derivative
        with sdpa_kernel(SDPBackend.MATH), sharing(self.model, self.weights):
            output: Tensor = functional_call(self.model, state, (images,))
        return output

    def loss(self, weights: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """L(F(x; W), y), a scalar; y are classes, or whatever targets the loss takes (:mod:`gradleak.targets`)."""
        return self._compare(self.outputs(images, weights), labels)

    def _compare(self, output: Tensor, labels: Tensor) -> Tensor:
        return self.training_loss(output, labels.to(output) if labels.is_floating_point() else labels)

    def check_loss(self, images: Tensor, labels: Tensor) -> None:
        """Raise :class:`~gradleak.errors.SpecError` unless L takes F's output and these targets, and gives one number.

        Two images are tried.
        """
        weight = next(iter(self.weights.values()))
        x, y = images[:2].to(weight), labels[:2].to(weight.device)
        if len(x) == 1:  # batch norm in train mode refuses one value per channel
            x, y = x.repeat(2, 1, 1, 1), y.repeat(2, *[1] * (y.ndim - 1))
        with torch.no_grad():
            output = self.outputs(x)
            try:
                value = self._compare(output, y)
            except Exception as cause:  # the user's code may raise anything
                raise SpecError(
                    f"client.loss: {self.loss_name} fails on two outputs {tuple(output.shape)} and targets {y.dtype} "
                    f"{tuple(y.shape)}: {type(cause).__name__}: {cause}"
                ) from cause
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise SpecError(f"client.loss: {self.loss_name} returns {found}, expected one number: the mean over the batch")

    def gradient(self, weights: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> Update:
        r""":math:`\nabla_W L(F(x; W), y)`, name -> tensor."""
        leaves = [w.detach().requires_grad_() for w in weights.values()]
        value = self.loss(dict(zip(weights, leaves, strict=True)), images, labels)
        gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        return dict(zip(weights, gradients, strict=True))

    def _vjp(self, images: Tensor, labels: Tensor, engine: Engine) -> tuple[Update, Transpose]:
        """The gradient at W, and its transpose."""
        return engine(lambda weights, x: self.loss(weights, x, labels), self.weights, images)

    def batch_statistics(self, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and biased variance, per channel, of what each batch-norm layer is given for these images together.

        Differentiable with respect to the images.

        Returns:
            Layer name -> (mean, variance), each of the layer's number of channels.
        """
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def look(name: str, x: Tensor) -> None:
            rest = [d for d in range(x.ndim) if d != 1]
            seen[name] = (x.mean(rest), x.var(rest, unbiased=False))

        layers = [(name, m) for name, m in self.model.named_modules() if isinstance(m, _BatchNorm)]
        handles = [m.register_forward_pre_hook(lambda _, args, name=name: look(name, args[0])) for name, m in layers]
        try:
            self.outputs(images)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def last_linear(self, images: Tensor) -> LastLinear | None:
        """The linear layer that gives F's output, as these images show it; None where F does not end in one."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        layers = [(name, m) for name, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        handles = [
            m.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)})) for name, m in layers
        ]
        try:
            output = self.outputs(images)
        finally:
            for handle in handles:
                handle.remove()
        return next((LastLinear(name, r, output) for name, (r, out) in seen.items() if torch.equal(out, output)), None)

    def gradient_scale(self, batch: int) -> float:
        """s such that an update from ``batch`` images is about s times the gradient of their mean loss at W."""
        return 1.0

    def __call__(self, images: Tensor, labels: Tensor) -> Update:
        """A(x, y): the update, name -> tensor, as far as the server can compute it (no noise, its own order)."""
        raise NotImplementedError

    def sent(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Update:
        """What a client sends: A(x, y), with what only the client draws (its order of images, its noise)."""
        return self(images, labels)

    def vjp(self, images: Tensor, labels: Tensor, *, engine: Engine = exact) -> tuple[Update, Transpose]:
        """A(x, y) and the transpose of its derivative at x, by an engine of :mod:`gradleak.vjp`."""
        raise NotImplementedError

    def joint_vjp(self, images: Tensor, labels: Tensor, *, engine: Engine = exact) -> tuple[Update, JointTranspose]:
        """A(x, y) for targets y that are floats (:class:`gradleak.targets.FreeTargets`), and the transpose for both (DLG).

        Returns:
            The update, and a function from its cotangent to those of images and labels.
        """
        raise NotImplementedError

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ClientOperator:
        """The same operator on another device or in another precision (float64 for reference computations)."""
        raise NotImplementedError

    def last(self, share: float) -> ClientOperator:
        """The operator whose update is only the last tensors of this one's, which hold at least so much of its numbers.

        Itself where the whole is no more than its parts side by side: a defence or several steps see all of it.
        """
        return self

    @property
    def can_split(self) -> bool:
        """Whether :meth:`in_pieces` applies: each image then has a gradient of its own."""
        return False

    @property
    def piece(self) -> int | None:
        """Largest number of images that are computed with at a time; None: all."""
        return None

    def in_pieces(self, size: int | None) -> None:
        """From now on compute with at most ``size`` images at a time (None: all), for less memory and more time.

        Raises:
            SpecError: The operator cannot be split.
        """
        if size is not None:
            raise SpecError("this client's images cannot be processed in pieces")

    def held_images(self, batch: int) -> int:
        """How many of ``batch`` images a transpose holds the graph of at once."""
        return batch

    def _moved_model(self, device: torch.device | str, dtype: torch.dtype | None) -> nn.Module:
        """F there, with a gradient required of what is sent and of nothing else."""
        model = copy.deepcopy(self.model).to(device=device, dtype=dtype)
        for name, p in model.named_parameters():
            p.requires_grad_(name in self.weights)
        return model

    def _named_like(self, other: ClientOperator) -> None:
        self.loss_name, self.notes = other.loss_name, other.notes


class FedSGD(ClientOperator):
    r"""A client of FedSGD: :math:`A(x, y) = \nabla_W L(F(x; W), y)`  (CI-Net, section 3).

    Without batch statistics L is a mean over images, so :math:`A(x, y) = \sum_k \frac{B_k}{B} A(x_k, y_k)` over pieces of the
    batch: :meth:`in_pieces` computes it so, piece by piece, and the transpose computes each piece once more. Memory is
    that of one piece, time about half as much again.

    Args: as :class:`ClientOperator`.

    """

    _piece: int | None = None

    @property
    def can_split(self) -> bool:
        return not self.has_batch_statistics

    @property
    def piece(self) -> int | None:
        return self._piece

    def in_pieces(self, size: int | None) -> None:
        if size is not None and not self.can_split:
            raise SpecError("batch statistics couple the images of this client, so they cannot be processed in pieces")
        self._piece = size

    def held_images(self, batch: int) -> int:
        return min(batch, self.piece or batch)

    def __call__(self, images: Tensor, labels: Tensor) -> Update:
        if self.held_images(len(images)) == len(images):
            return self.gradient(self.weights, images, labels)
        total = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        for x, y, share in self._pieces(images, labels):
            torch._foreach_add_(list(total.values()), list(self.gradient(self.weights, x, y).values()), alpha=share)
        return total

    def vjp(self, images: Tensor, labels: Tensor, *, engine: Engine = exact) -> tuple[Update, Transpose]:
        if self.held_images(len(images)) == len(images):
            return self._vjp(images, labels, engine)

        def transpose(cotangent: Update) -> Tensor:
            pieces = self._pieces(images, labels)
            return torch.cat([share * self._vjp(x, y, engine)[1](cotangent) for x, y, share in pieces])

        return self(images, labels), transpose

    def joint_vjp(self, images: Tensor, labels: Tensor, *, engine: Engine = exact) -> tuple[Update, JointTranspose]:
        if self.held_images(len(images)) == len(images):
            return self._joint_vjp(images, labels, engine)

        def transpose(cotangent: Update) -> tuple[Tensor, Tensor]:
            pieces = self._pieces(images, labels)
            back = [[share * t for t in self._joint_vjp(x, y, engine)[1](cotangent)] for x, y, share in pieces]
            to_images, to_labels = zip(*back, strict=True)
            return torch.cat(to_images), torch.cat(to_labels)

        return self(images, labels), transpose

    def _pieces(self, images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor, float]]:
        """The batch in pieces, and the share of each in the mean."""
        assert self.piece is not None
        parts = zip(images.split(self.piece), labels.split(self.piece), strict=True)
        return [(x, y, len(x) / len(images)) for x, y in parts]

    def _joint_vjp(self, images: Tensor, labels: Tensor, engine: Engine) -> tuple[Update, JointTranspose]:
        count, sizes = len(images), [images[0].numel(), labels[0].numel()]

        def split(packed: Tensor) -> tuple[Tensor, Tensor]:
            x, y = packed.split(sizes, dim=1)
            return x.reshape(images.shape), y.reshape(labels.shape)

        def loss(weights: Mapping[str, Tensor], packed: Tensor) -> Tensor:
            return self.loss(weights, *split(packed))

        update, transpose = engine(loss, self.weights, torch.cat([images.reshape(count, -1), labels.reshape(count, -1)], dim=1))
        return update, lambda cotangent: split(transpose(cotangent))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> FedSGD:
        return self._copy(device, dtype, list(self.weights))

    def last(self, share: float) -> FedSGD:
        names, held = list(self.weights), 0
        kept = len(names)
        while kept and held < share * self.parameters:
            kept -= 1
            held += self.weights[names[kept]].numel()
        weight = self.weights[names[0]]
        return self if kept == 0 else self._copy(weight.device, weight.dtype, names[kept:])

    def _copy(self, device: torch.device | str, dtype: torch.dtype | None, names: Sequence[str]) -> FedSGD:
        copied = FedSGD(self._moved_model(device, dtype), loss=self.training_loss, mode=self.mode, layers=names)
        copied._piece = self._piece
        copied._named_like(self)
        return copied


class FedAvg(ClientOperator):
    r"""A client of FedAvg: local epochs of mini-batch SGD from W; the update is :math:`W - W_T`  (McMahan et al. 2017).

    .. math:: v_{t+1} = \mu v_t + \nabla_W L(F(x_t; W_t), y_t), \qquad W_{t+1} = W_t - \eta v_{t+1}

    so that one step of all images sends :math:`\eta\, \nabla_W L`. The update is summed up step by step, not as a difference
    of weights, in which small steps would drown in float32's rounding.

    Its transpose is exact: the adjoint recursion over the steps, backwards. Memory: W once per step and the graph of one
    step. The secant engine is not defined for several steps; ``auto`` uses the exact transpose then.

    Args:
        model, loss, mode, layers: As :class:`ClientOperator`.
        epochs: Passes over the client's images.
        batch_size: Images in a local step (the last of an epoch may have fewer); None: all of them.
        learning_rate: eta.
        momentum: mu, in [0, 1), as in ``torch.optim.SGD``.
        order: ``given``: in each epoch the images come in their order, and the server knows it. ``shuffled``: the client
            draws an order for each epoch (:meth:`sent`), which the server does not know: A itself, and so an attack,
            assumes the given order.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float,
        epochs: int = 1,
        batch_size: int | None = None,
        momentum: float = 0.0,
        order: Order = "given",
        loss: TrainingLoss | str = "cross-entropy",
        mode: Mode = "train",
        layers: Sequence[str] = ("*",),
    ) -> None:
        super().__init__(model, loss=loss, mode=mode, layers=layers)
        self.epochs, self.batch_size, self.learning_rate = epochs, batch_size, learning_rate
        self.momentum, self.order = momentum, order

    @property
    def spec(self) -> ClientSpec:
        return ClientSpec(
            **super().spec.model_dump(include={"mode", "loss", "layers"}),
            protocol="fedavg",
            epochs=self.epochs,
            local_batch=self.batch_size,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            order=self.order,
        )

    def batches(self, count: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Which of ``count`` images each local step sees, in turn; shuffled in each epoch when a generator is given."""
        size = min(self.batch_size or count, count)
        orders = (
            torch.arange(count) if generator is None else torch.randperm(count, generator=generator) for _ in range(self.epochs)
        )
        return [batch for order in orders for batch in order.split(size)]

    def held_images(self, batch: int) -> int:
        return min(batch, self.batch_size or batch)

    def gradient_scale(self, batch: int) -> float:
        steps = len(self.batches(batch))
        # step t moves W in all later steps too: 1 + mu + ... + mu^(T-1-t)
        return self.learning_rate * sum(self.momentum**k for t in range(steps) for k in range(t + 1))

    def __call__(self, images: Tensor, labels: Tensor) -> Update:
        return self._train(images, labels, self.batches(len(images)))[0]

    def sent(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Update:
        drawn = generator if self.order == "shuffled" else None
        return self._train(images, labels, self.batches(len(images), drawn))[0]

    def vjp(self, images: Tensor, labels: Tensor, *, engine: Engine = exact) -> tuple[Update, Transpose]:
        if len(self.batches(len(images))) == 1:  # eta times one gradient, which any engine can transpose
            gradient, back = self._vjp(images, labels, engine)
            return self._scaled(gradient), lambda cotangent: back(self._scaled(cotangent))
        update, transpose = self._adjoint(images, labels, engine, soft=False)
        return update, lambda cotangent: transpose(cotangent)[0]

    def joint_vjp(self, images: Tensor, labels: Tensor, *, engine: Engine = exact) -> tuple[Update, JointTranspose]:
        return self._adjoint(images, labels, engine, soft=True)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> FedAvg:
        moved = FedAvg(
            self._moved_model(device, dtype),
            learning_rate=self.learning_rate,
            epochs=self.epochs,
            batch_size=self.batch_size,
            momentum=self.momentum,
            order=self.order,
            loss=self.training_loss,
            mode=self.mode,
        )
        moved._named_like(self)
        return moved

    def _scaled(self, gradient: Update) -> Update:
        return {name: self.learning_rate * t for name, t in gradient.items()}

    def _train(self, images: Tensor, labels: Tensor, batches: list[Tensor]) -> tuple[Update, list[Update]]:
        """The update, and the weights at which each local step began."""
        total = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        velocity, begun = total, []
        for batch in batches:
            begun.append({name: w - total[name] for name, w in self.weights.items()})
            gradient = self.gradient(begun[-1], images[batch], labels[batch])
            velocity = {name: self.momentum * velocity[name] + g for name, g in gradient.items()}
            total = {name: total[name] + self.learning_rate * v for name, v in velocity.items()}
        return total, begun

    def _adjoint(self, images: Tensor, labels: Tensor, engine: Engine, *, soft: bool) -> tuple[Update, JointTranspose]:
        if isinstance(engine, SelfChecking):
            engine.decline()
        elif engine is not exact:
            raise SpecError('attack.engine: FedAvg has the exact transpose only; use "auto" or "exact"')
        batches = self.batches(len(images))
        update, begun = self._train(images, labels, batches)

        def transpose(cotangent: Update) -> tuple[Tensor, Tensor]:
            to_images, to_labels = torch.zeros_like(images), torch.zeros_like(labels)
            to_total = dict(cotangent)
            to_velocity = {name: torch.zeros_like(c) for name, c in cotangent.items()}
            for weights, batch in zip(reversed(begun), reversed(batches), strict=True):
                # backwards through total += eta v, v = mu v + grad L(W - total)
                to_velocity = {name: v + self.learning_rate * to_total[name] for name, v in to_velocity.items()}
                to_weights, x, y = self._step_transpose(weights, images[batch], labels[batch], to_velocity, soft=soft)
                to_images[batch] += x
                if y is not None:
                    to_labels[batch] += y
                to_total = {name: c - to_weights[name] for name, c in to_total.items()}
                to_velocity = {name: self.momentum * v for name, v in to_velocity.items()}
            return to_images, to_labels

        return update, transpose

    def _step_transpose(
        self, weights: Update, images: Tensor, labels: Tensor, cotangent: Update, *, soft: bool
    ) -> tuple[Update, Tensor, Tensor | None]:
        """The transpose of one gradient with respect to weights, images and (when soft) labels, by double backward."""
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        inputs = [images.detach().requires_grad_()] + ([labels.detach().requires_grad_()] if soft else [])
        value = self.loss(leaves, inputs[0], inputs[1] if soft else labels)
        gradients = torch.autograd.grad(
            value, list(leaves.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
        attached = [(g, cotangent[name]) for name, g in zip(leaves, gradients, strict=True) if g.requires_grad]
        wanted = [*leaves.values(), *inputs]
        if attached:
            outputs, cotangents = zip(*attached, strict=True)
            back = second_derivative(outputs, wanted, cotangents)
        else:
            back = tuple(torch.zeros_like(t) for t in wanted)
        to_weights = dict(zip(leaves, back[: len(leaves)], strict=True))
        return to_weights, back[len(leaves)], back[len(leaves) + 1] if soft else None


class Around(ClientOperator):
    """An operator made of another one: the same F, weights, buffers, loss and mode.

    Attributes:
        client: The operator inside.
    """

    def __init__(self, client: ClientOperator) -> None:
        self.client = client
        self.model, self.mode = client.model, client.mode
        self.training_loss, self.loss_name, self.notes = client.training_loss, client.loss_name, client.notes
        # the very same tensors: weights that are copied into one are seen by both
        self.weights, self.frozen, self.buffers = client.weights, client.frozen, client.buffers

    @property
    def spec(self) -> ClientSpec:
        return self.client.spec

    @property
    def defences(self) -> tuple[DefenceSpec, ...]:
        return self.client.defences

    @property
    def can_split(self) -> bool:
        return self.client.can_split

    @property
    def piece(self) -> int | None:
        return self.client.piece

    def in_pieces(self, size: int | None) -> None:
        self.client.in_pieces(size)

    def held_images(self, batch: int) -> int:
        return self.client.held_images(batch)

    def gradient_scale(self, batch: int) -> float:
        return self.client.gradient_scale(batch)


class Average(Around):
    r"""The average over K clients: :math:`A(x, y) = \sum_k \frac{B_k}{B} A_k(x_k, y_k)`  (secure aggregation; CI-Net, C.3).

    What the server sees, under secure aggregation or multi-party computation, of K clients with the same W. The images
    x are those of all clients, one client after the other. Without batch statistics the average of FedSGD clients is
    the gradient of the union of their batches; with batch statistics it is not, as each client normalises by its own.

    Any engine of :mod:`gradleak.vjp` applies if it does for the clients: the transpose is taken client by client.

    Args:
        client: The operator of each client.
        sizes: :math:`B_k`, images of each client.
    """

    def __init__(self, client: ClientOperator, *, sizes: Sequence[int]) -> None:
        super().__init__(client)
        if not sizes or min(sizes) < 1:
            raise SpecError(f"client.clients: sizes must be positive, found {list(sizes)}")
        self.sizes = tuple(sizes)

    @property
    def spec(self) -> ClientSpec:
        each = self.client.spec
        if each.protocol != "fedsgd":
            raise SpecError(f"client.protocol: no specification has an average of {each.protocol!r} clients")
        return ClientSpec(**each.model_dump(exclude={"protocol", "clients"}), protocol="average", clients=list(self.sizes))

    def gradient_scale(self, batch: int) -> float:
        return sum(share * self.client.gradient_scale(size) for share, size in zip(self._shares, self.sizes, strict=True))

    def held_images(self, batch: int) -> int:
        held = [(self.client.held_images(size), size) for size in self.sizes]
        # what a client computes in pieces is computed again for its transpose; all others are held until then
        return sum(h for h, size in held if h == size) + max((h for h, size in held if h < size), default=0)

    def __call__(self, images: Tensor, labels: Tensor) -> Update:
        return self._mean([self.client(x, y) for x, y in self._split(images, labels)])

    def sent(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Update:
        return self._mean([self.client.sent(x, y, generator) for x, y in self._split(images, labels)])

    def vjp(self, images: Tensor, labels: Tensor, *, engine: Engine = exact) -> tuple[Update, Transpose]:
        pairs = [self.client.vjp(x, y, engine=engine) for x, y in self._split(images, labels)]

        def transpose(cotangent: Update) -> Tensor:
            parts = zip(pairs, self._shares, strict=True)
            return torch.cat([back({name: share * c for name, c in cotangent.items()}) for (_, back), share in parts])

        return self._mean([update for update, _ in pairs]), transpose

    def joint_vjp(self, images: Tensor, labels: Tensor, *, engine: Engine = exact) -> tuple[Update, JointTranspose]:
        pairs = [self.client.joint_vjp(x, y, engine=engine) for x, y in self._split(images, labels)]

        def transpose(cotangent: Update) -> tuple[Tensor, Tensor]:
            parts = zip(pairs, self._shares, strict=True)
            both = [back({name: share * c for name, c in cotangent.items()}) for (_, back), share in parts]
            to_images, to_labels = zip(*both, strict=True)
            return torch.cat(to_images), torch.cat(to_labels)

        return self._mean([update for update, _ in pairs]), transpose

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Average:
        return Average(self.client.to(device, dtype), sizes=self.sizes)

    @property
    def _shares(self) -> list[float]:
        return [size / sum(self.sizes) for size in self.sizes]

    def _split(self, images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        if len(images) != sum(self.sizes):
            raise DataError(f"clients of {self.sizes} images have {sum(self.sizes)} together, found {len(images)} images")
        return list(zip(images.split(self.sizes), labels.split(self.sizes), strict=True))

    def _mean(self, updates: list[Update]) -> Update:
        return {
            name: sum((share * u[name] for share, u in zip(self._shares, updates, strict=True)), torch.zeros_like(w))
            for name, w in self.weights.items()
        }


def training_loss(name: str) -> TrainingLoss:
    """L by name: of :data:`gradleak.targets.LOSSES`, or one's own as ``file.py:function`` or ``package.module:function``."""
    if name in LOSSES:
        return LOSSES[name]
    if ":" not in name:
        known = [*LOSSES, "path/to/file.py:function", "package.module:function"]
        raise SpecError(f"client.loss: unknown loss {name!r}{nearest(name, known)}")
    loss: TrainingLoss = import_function(name, error=SpecError)
    return loss


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)
