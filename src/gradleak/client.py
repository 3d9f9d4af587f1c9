"""From a specification to a client operator A, and from a client to what the server holds of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gradleak.defences import DPSGD, Defence, Transport, defend, distortion, parse, prepare
from gradleak.errors import DataError, ObservationError, SpecError
from gradleak.models import normalisation, normalised
from gradleak.observation import Observation, Truth
from gradleak.protocols import Average, ClientOperator, FedAvg, FedSGD, TrainingLoss, training_loss
from gradleak.spec import ClientSpec, ModelSpec
from gradleak.targets import are_classes, fault

__all__ = [
    "Average",
    "ClientOperator",
    "Cost",
    "FedAvg",
    "FedSGD",
    "TrainingLoss",
    "build_client",
    "defence_costs",
    "operator",
    "simulate",
    "training_loss",
]


@dataclass(frozen=True)
class Cost:
    """What a defence costs one client.

    Attributes:
        name: Of the defence; ``transport`` for the number format.
        distortion: Of the update by this defence, relative to the update before it.
        total: Of the update by all defences so far, relative to the undefended update.
        epsilon: Of DP-SGD, at ``delta``; None for other defences, and without noise.
        delta: Of DP-SGD.
    """

    name: str
    distortion: float
    total: float
    epsilon: float | None = None
    delta: float | None = None


def build_client(
    model: nn.Module,
    spec: ClientSpec,
    batch: int,
    *,
    defences: Sequence[Defence] = (),
    observation: Observation | None = None,
) -> ClientOperator:
    """The client operator A that a specification describes.

    Each client applies the defences in their order, then the transport's number format; an average is taken last.

    Args:
        model: F with its weights W. With DP-SGD its batch norm is replaced (:func:`gradleak.defences.prepare`); the
            operator's ``notes`` say so.
        spec: Protocol, mode, loss, sent layers, transport.
        batch: B, all images together.
        defences: What each client does to protect itself (:func:`gradleak.defences.parse`).
        observation: For an attacker: the update, which may show what was pruned from it.

    Raises:
        SpecError: Sizes do not sum to the batch, no layer matches, or a defence does not go with the protocol.
    """
    model, notes = prepare(model, defences)
    layers = spec.layers or ["*"]
    client: ClientOperator
    if spec.protocol == "fedavg":
        assert spec.epochs is not None
        assert spec.learning_rate is not None
        client = FedAvg(
            model,
            learning_rate=spec.learning_rate,
            epochs=spec.epochs,
            batch_size=spec.local_batch,
            momentum=spec.momentum or 0.0,
            order=spec.order or "given",
            loss=spec.loss,
            mode=spec.mode,
            layers=layers,
        )
    else:
        client = FedSGD(model, loss=spec.loss, mode=spec.mode, layers=layers)
    client.notes = notes
    transport = [Transport(spec.transport)] if spec.transport is not None else []
    # in an average nobody sees which entries one client pruned
    seen = observation if spec.protocol != "average" else None
    client = defend(client, [*defences, *transport], observation=seen)
    return Average(client, sizes=spec.sizes(batch)) if spec.protocol == "average" else client


def simulate(
    client: ClientOperator,
    truth: Truth,
    *,
    grant_labels: bool = True,
    grant_batch_statistics: bool = False,
    grant_surrogate_data: bool = False,
    model: ModelSpec | None = None,
    seed: int = 0,
) -> Observation:
    """What the server holds after this client sent its update for ``truth``.

    Args:
        client: The operator A.
        truth: The client's private batch.
        grant_labels: Whether the threat model grants the labels, in the order of the images.
        grant_batch_statistics: Whether it grants :meth:`ClientOperator.batch_statistics` of the images.
        grant_surrogate_data: Whether the attacker holds data like the client's.
        model: The built-in model's description, so that ``gradleak invert`` can rebuild F by itself.
        seed: Of what the client draws: noise, order. It is not part of the observation.

    Raises:
        DataError: The labels or targets do not go with F's output and the loss (:func:`gradleak.targets.fault`), or the loss
            fails.
        SpecError: Batch statistics are granted, and F has no batch norm.
    """
    weight = next(iter(client.weights.values()))
    images, labels = truth.images.to(weight), truth.labels.to(weight.device)
    with torch.no_grad():
        output = client.outputs(images[:2].repeat(2, 1, 1, 1)[:2])
        statistics = client.batch_statistics(images) if grant_batch_statistics else None
    if statistics == {}:
        raise SpecError("threat.batch_statistics: the model has no batch-norm layer, so there are no statistics to grant")
    if bad := fault(client.loss_name, labels, output):
        classes = client.loss_name == "cross-entropy" and are_classes(labels) and output.ndim == 2
        raise DataError(f"{bad}; {'set model.num_classes, or choose other images' if classes else _OTHER_LOSS}")
    client.check_loss(images, labels)
    try:
        update = client.sent(images, labels, torch.Generator().manual_seed(seed))
    except ValueError as error:  # torch's batch norm: one value per channel has no variance
        count = "one image" if len(images) == 1 else f"{len(images)} images"
        raise DataError(
            f"the client cannot compute its update from {count} of {tuple(images.shape[1:])}; a batch norm that is left with "
            f'one value a channel has no variance ({error}); use more or larger images, or client.mode="eval"'
        ) from None
    return Observation(
        update={name: t.cpu() for name, t in update.items()},
        weights={name: t.cpu() for name, t in {**client.weights, **client.frozen}.items()},
        buffers={name: t.cpu() for name, t in client.buffers.items()},
        image_shape=(images.shape[1], images.shape[2], images.shape[3]),
        batch=len(images),
        protocol=client.spec,
        labels=truth.labels if grant_labels else None,
        model=model,
        defences=client.defences,
        batch_statistics=None
        if statistics is None
        else {name: (mean.cpu(), variance.cpu()) for name, (mean, variance) in statistics.items()},
        surrogate_data=grant_surrogate_data,
        normalisation=normalisation(client.model),
    )


def operator(observation: Observation, model: nn.Module, *, where: str = "observation") -> ClientOperator:
    """The client operator A of an observation, as its server knows it: F with the observed weights, buffers, mode and loss,
    the protocol, and the defences with what the update shows of them.

    Args:
        observation: What the server holds. Its normalisation is put before F, unless F has one.
        model: F; its own weights are used when the observation has none.
        where: What an error message calls the observation.

    Raises:
        ObservationError: The observation does not fit the model; names the parameter and both shapes.
    """
    defences = parse(observation.defences, where=f"{where}: defence")
    if observation.normalisation is not None and normalisation(model) is None:
        model = normalised(model, **observation.normalisation._asdict())
    client = build_client(model, observation.protocol, observation.batch, defences=defences, observation=observation)
    observation.check_fits(client, where=where)
    state = {**observation.weights, **observation.buffers}
    known = {**client.weights, **client.frozen, **client.buffers}
    for name, tensor in state.items():
        if name not in known or known[name].shape != tensor.shape:
            found = "is not in the model" if name not in known else f"has shape {tuple(known[name].shape)} in the model"
            raise ObservationError(f"{where}: {name!r} of shape {tuple(tensor.shape)} {found}; is it another model?")
        if not bool(tensor.isfinite().all()):
            raise ObservationError(f"{where}: {name!r} has NaN or infinite values")
        known[name].copy_(tensor)
    if observation.labels is not None:
        weight = next(iter(client.weights.values()))
        with torch.no_grad():
            output = client.outputs(torch.zeros(2, *observation.image_shape).to(weight))
        if bad := fault(client.loss_name, observation.labels, output):
            raise ObservationError(f"{where}: {bad}; is it another model?")
    return client


def defence_costs(
    model: nn.Module, spec: ClientSpec, truth: Truth, *, defences: Sequence[Defence], seed: int = 0
) -> list[Cost]:
    r"""The relative distortion :math:`\|g' - g\| / \|g\|` of this client's update by each of its defences, in their order.

    For DP-SGD g is the gradient of the model that DP-SGD trains (:func:`gradleak.defences.prepare`). The seeds are those
    of :func:`simulate`, so the last total is the distortion of what was sent.

    Args:
        model, spec, defences: As of :func:`build_client`.
        truth: The client's private batch.
        seed: As of :func:`simulate`.
    """
    model, _ = prepare(model, defences)
    plain = spec.model_copy(update={"transport": None})
    steps = [(plain, list(defences[:count])) for count in range(len(defences) + 1)]
    steps += [(spec, list(defences))] if spec.transport is not None else []
    updates = []
    for each, some in steps:
        client = build_client(model, each, len(truth.images), defences=some)
        weight = next(iter(client.weights.values()))
        images, labels = truth.images.to(weight), truth.labels.to(weight.device)
        updates.append(client.sent(images, labels, torch.Generator().manual_seed(seed)))
    applied: list[Defence] = [*defences, *([Transport(spec.transport)] if spec.transport is not None else [])]
    return [
        Cost(
            name="transport" if isinstance(defence, Transport) else defence.name,
            distortion=distortion(after, before),
            total=distortion(after, updates[0]),
            epsilon=defence.epsilon if isinstance(defence, DPSGD) else None,
            delta=defence.delta if isinstance(defence, DPSGD) else None,
        )
        for defence, before, after in zip(applied, updates, updates[1:], strict=False)
    ]


_OTHER_LOSS = (
    'name the loss with client.loss ("cross-entropy", "bce-with-logits", "mse" or file.py:function), or change targets'
)
