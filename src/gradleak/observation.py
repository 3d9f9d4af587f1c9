"""What the server sees (an :class:`Observation`) and what only the client has (a :class:`Truth`), in safetensors files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError
from torch import Tensor

from gradleak.errors import DataError, ObservationError, SpecError
from gradleak.files import parse_json
from gradleak.spec import ClientSpec, DefenceSpec, ModelSpec, describe
from gradleak.targets import LOSSES
from gradleak.tensors import check_state, read_tensors, write_tensors

if TYPE_CHECKING:
    from gradleak.protocols import ClientOperator

Update = dict[str, Tensor]
"""What a client sends: parameter name -> tensor of that parameter's shape."""

FORMAT = "gradleak-observation"
TRUTH_FORMAT = "gradleak-truth"
#: Version 2 added targets other than classes, and the normalisation; files of version 1 are read.
VERSION = 2
READABLE = ("1", "2")
#: Largest label: arrays of this length are made to count labels.
MAX_LABEL = 999_999
#: Largest sides and number of values of a batch that an update file may name.
MAX_SIDE = 2048
MAX_VALUES = 2**28


class Normalisation(NamedTuple):
    r""":math:`x \mapsto (x - \mathrm{mean}) / \mathrm{std}`, for each channel of images x in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Truth:
    """The client's private batch. Only the simulation of the client and the evaluation see it.

    Attributes:
        images: B x C x H x W, float, in [0, 1].
        labels: One class for each image, B, int64; or the targets that the loss takes (:mod:`gradleak.targets`), B x ...
        names: One name per image for people (class or photograph); may be empty.
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...] = ()

    def save(self, path: Path | str) -> None:
        """Write ``images`` and ``labels`` to a safetensors file (personal data: keep it where the client's data is).

        Raises:
            DataError: The images are not B x C x H x W in [0, 1], or there are not as many labels.
        """
        images = self.images
        if images.ndim != 4 or not images.is_floating_point() or self.labels.shape[:1] != images.shape[:1]:
            raise DataError(
                f"{path}: expected float images (B, C, H, W) and labels (B), or targets (B, ...); "
                f"found {images.dtype} {tuple(images.shape)} and {tuple(self.labels.shape)}"
            )
        if not (images.min() >= 0 and images.max() <= 1):  # NaN fails it too
            raise DataError(
                f"{path}: images must be in [0, 1], found [{float(images.min()):.3g}, {float(images.max()):.3g}]; undo the "
                "normalisation first: images * std + mean"
            )
        write_tensors(
            Path(path),
            {"images": self.images, "labels": self.labels},
            {"format": TRUTH_FORMAT, "version": str(VERSION), "names": json.dumps(self.names)},
        )

    @staticmethod
    def load(path: Path) -> Truth:
        """Read what :meth:`save` wrote. Raises :class:`~gradleak.errors.DataError` naming the file and the fault."""
        tensors, metadata = read_tensors(path, error=DataError)
        for key in ("images", "labels"):
            if key not in tensors:
                raise DataError(f"{path}: no tensor {key!r}; expected a truth file as `gradleak capture --truth` writes it")
        images, labels = tensors["images"], tensors["labels"]
        if images.ndim != 4 or not images.is_floating_point() or labels.shape[:1] != images.shape[:1]:
            raise DataError(
                f"{path}: expected float images (B, C, H, W) and labels (B), or targets (B, ...); "
                f"found {images.dtype} {tuple(images.shape)} and {labels.dtype} {tuple(labels.shape)}"
            )
        if 0 in images.shape:
            raise DataError(f"{path}: no image in it: images are {tuple(images.shape)}")
        if not bool(torch.isfinite(images).all()) or images.min() < 0 or images.max() > 1:
            raise DataError(f"{path}: images must be finite and in [0, 1]")
        check_labels(labels, where=str(path))
        names = parse_json(metadata.get("names", "[]"), where=f"{path}: the names in the header", error=DataError)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{path}: the names in the header must be a list of strings")
        if names and len(names) != len(images):
            raise DataError(f"{path}: {len(names)} names in the header for {len(images)} images")
        return Truth(images.float(), labels.float() if labels.is_floating_point() else labels.long(), tuple(names))


class _Normalisation(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    mean: list[FiniteFloat] = Field(strict=False)
    std: list[Annotated[FiniteFloat, Field(gt=0)]] = Field(strict=False)


class _Header(BaseModel):
    """The JSON object in an observation's file; old files lack the last keys."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(strict=False)
    batch: PositiveInt
    protocol: ClientSpec = Field(strict=False)
    model: ModelSpec | None = Field(strict=False)
    defences: tuple[DefenceSpec, ...] = Field(default=(), strict=False)
    surrogate_data: bool = False
    normalisation: _Normalisation | None = None


@dataclass(frozen=True)
class Observation:
    """Everything that the server holds about one client's batch: what an attack is given.

    Attributes:
        update: g*, name -> tensor.
        weights: W at which the client computed it, name -> tensor.
        buffers: F's buffers (running statistics) at that moment.
        image_shape: (C, H, W).
        batch: B.
        protocol: How the client turned images into the update.
        labels: Classes, B, int64, or other targets (:mod:`gradleak.targets`), B x ..., in the order of the images, when the
            threat model grants them; else None.
        model: The built-in model's description; None when F is the user's own code.
        defences: What the client did to protect itself; the server is told, as it is told the protocol.
        batch_statistics: Batch-norm layer -> mean and biased variance of what it is given for the client's images, when
            the threat model grants them; else None.
        surrogate_data: Whether the attacker holds data like the client's, or a generator trained on such data.
        normalisation: What the client subtracts from images in [0, 1] and divides them by before it gives them to F, for each
            channel; None: nothing, or F does it itself.
    """

    update: Update
    weights: Update
    buffers: dict[str, Tensor]
    image_shape: tuple[int, int, int]
    batch: int
    protocol: ClientSpec
    labels: Tensor | None = None
    model: ModelSpec | None = None
    defences: tuple[DefenceSpec, ...] = ()
    batch_statistics: dict[str, tuple[Tensor, Tensor]] | None = None
    surrogate_data: bool = False
    normalisation: Normalisation | None = None

    @property
    def granted(self) -> frozenset[str]:
        """What the threat model grants beside update, F and W."""
        grants = {"batch-size", "mode"}
        if self.labels is not None:
            grants.add("labels")
        if self.batch_statistics is not None:
            grants.add("batch-norm-statistics")
        if self.surrogate_data:
            grants.add("surrogate-data")
        return frozenset(grants)

    def save(self, path: Path | str) -> None:
        """Write a safetensors file: ``update/NAME``, ``weights/NAME``, ``buffers/NAME``, ``labels``,
        ``statistics/LAYER/mean`` and ``statistics/LAYER/variance``; the rest as JSON.
        """
        tensors = {f"update/{name}": t for name, t in self.update.items()}
        tensors |= {f"weights/{name}": t for name, t in self.weights.items()}
        tensors |= {f"buffers/{name}": t for name, t in self.buffers.items()}
        if self.labels is not None:
            tensors["labels"] = self.labels
        for name, (mean, variance) in (self.batch_statistics or {}).items():
            tensors |= {f"statistics/{name}/mean": mean, f"statistics/{name}/variance": variance}
        header = {
            "image_shape": list(self.image_shape),
            "batch": self.batch,
            "protocol": self.protocol.model_dump(mode="json"),
            "model": None if self.model is None else self.model.model_dump(mode="json", exclude={"weights"}),
            "defences": [defence.model_dump(mode="json") for defence in self.defences],
            "surrogate_data": self.surrogate_data,
            "normalisation": None if self.normalisation is None else self.normalisation._asdict(),
        }
        write_tensors(Path(path), tensors, {"format": FORMAT, "version": str(VERSION), "observation": json.dumps(header)})

    @staticmethod
    def load(path: Path, *, loss: str | None = None) -> Observation:
        """Read what :meth:`save` wrote; nothing in the file is executed or imported.

        Args:
            path: The file.
            loss: The client's loss where it is one's own (``file.py:function``, ``module:function``): a file never says
                which code runs, so a person must.

        Raises:
            ObservationError: Not safetensors, cut short, another format, NaN or infinity, all zeros, bad header, statistics
                without their partner, a loss or model that is code.
        """
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != FORMAT:
            raise ObservationError(
                f"{path}: format is {metadata.get('format')!r}, expected {FORMAT!r}; write it with `gradleak capture`"
            )
        if metadata.get("version") not in READABLE:
            raise ObservationError(
                f"{path}: version {metadata.get('version')!r}, this release reads versions {' and '.join(READABLE)}"
            )
        written = parse_json(metadata.get("observation", ""), where=f"{path}: the observation header", error=ObservationError)
        parts: dict[str, dict[str, Tensor]] = {"update": {}, "weights": {}, "buffers": {}, "statistics": {}}
        for key, tensor in tensors.items():
            kind, slash, name = key.partition("/")
            if slash and kind in parts:
                parts[kind][name] = tensor
            elif key != "labels":
                raise ObservationError(
                    f"{path}: unexpected tensor {key!r}; known are update/*, weights/*, buffers/*, statistics/*, labels"
                )
        try:
            header = _Header.model_validate(written)
        except ValidationError as error:
            raise ObservationError(f"{path}: the observation header is not valid: {describe(error, _Header)}") from None
        (colours, height, width), batch = header.image_shape, header.batch
        protocol, model = header.protocol, header.model
        if max(height, width) > MAX_SIDE or colours * height * width * batch > MAX_VALUES:
            raise ObservationError(
                f"{path}: {batch} images of shape {(colours, height, width)} are out of range: sides of at most {MAX_SIDE}, "
                f"and {MAX_VALUES} values in all"
            )
        try:
            protocol.sizes(batch)
        except SpecError as error:
            raise ObservationError(f"{path}: {error}") from None
        if protocol.loss not in LOSSES:
            if loss is None:
                raise ObservationError(
                    f"{path}: the client's loss is its own ({protocol.loss!r}), and a file never says which code runs: "
                    "name the loss yourself (--loss, or loss= in Python)"
                )
            protocol = protocol.model_copy(update={"loss": loss})
        if model is not None and (":" in model.name or model.weights is not None):
            raise ObservationError(
                f"{path}: its header names code or a file as the model ({model.weights or model.name}), which is never "
                "followed: name the model yourself (--model)"
            )
        labels = tensors.get("labels")
        if labels is not None and (labels.shape[:1] != (batch,) or (labels.dtype != torch.int64 and not is_finite(labels))):
            raise ObservationError(
                f"{path}: 'labels' is {labels.dtype} {tuple(labels.shape)}; expected torch.int64 ({batch},), or targets "
                f"({batch}, ...) of int64 or finite floats"
            )
        normalisation = header.normalisation
        for key, values in {} if normalisation is None else {"mean": normalisation.mean, "std": normalisation.std}.items():
            if len(values) != colours:
                raise ObservationError(f"{path}: normalisation.{key} has {len(values)} values for {colours} channels")
        observation = Observation(
            update=parts["update"],
            weights=parts["weights"],
            buffers=parts["buffers"],
            image_shape=(colours, height, width),
            batch=batch,
            protocol=protocol,
            labels=labels,
            model=model,
            defences=header.defences,
            batch_statistics=_statistics(path, parts["statistics"]) or None,
            surrogate_data=header.surrogate_data,
            normalisation=None if normalisation is None else Normalisation(tuple(normalisation.mean), tuple(normalisation.std)),
        )
        check_update(observation.update, where=str(path))
        return observation

    def check_fits(self, client: ClientOperator, *, where: str = "observation") -> None:
        """Raise :class:`~gradleak.errors.ObservationError` unless the update has exactly the parameters that are sent."""
        expected = {name: w.shape for name, w in client.weights.items()}
        check_state(self.update, expected, where=where, error=ObservationError)
        if self.weights:
            # parameters that are not sent may be in the file, and are F's own where they are not
            frozen = {name: w.shape for name, w in client.frozen.items() if name in self.weights}
            check_state(self.weights, {**expected, **frozen}, where=f"{where} (weights)", error=ObservationError)


def is_finite(targets: Tensor) -> bool:
    """Whether targets are floats without NaN and infinity."""
    return targets.is_floating_point() and bool(targets.isfinite().all())


def check_labels(labels: Tensor, *, where: str) -> None:
    """Raise :class:`~gradleak.errors.DataError` for a target that is not finite, or a class that is negative or larger than any
    class number there is.
    """
    if labels.is_floating_point():
        if not is_finite(labels):
            raise DataError(f"{where}: targets must be finite, found NaN or infinite values")
        return
    if bool((labels < 0).any()):
        raise DataError(f"{where}: labels must not be negative, found {int(labels.min())}")
    if bool((labels.long() > MAX_LABEL).any()):
        raise DataError(f"{where}: label {int(labels.max())} is larger than {MAX_LABEL}; classes count from 0")


def check_update(update: Update, *, where: str) -> None:
    """Raise :class:`~gradleak.errors.ObservationError` for an empty, non-finite or all-zero update."""
    if not update:
        raise ObservationError(f"{where}: no update in it; expected tensors named update/PARAMETER")
    for name, tensor in update.items():
        if not tensor.is_floating_point():
            raise ObservationError(f"{where}: {name!r} is {tensor.dtype}, expected floating point")
        if not bool(torch.isfinite(tensor).all()):
            raise ObservationError(f"{where}: {name!r} has NaN or infinite entries; was the client's loss finite?")
    if all(not bool(t.any()) for t in update.values()):
        raise ObservationError(f"{where}: every entry of the update is zero: there is nothing to invert")


def _statistics(path: Path, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (mean, variance), from tensors named LAYER/mean and LAYER/variance."""
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    for key in tensors:
        name, _, kind = key.rpartition("/")
        mean, variance = tensors.get(f"{name}/mean"), tensors.get(f"{name}/variance")
        if (
            kind not in ("mean", "variance")
            or mean is None
            or variance is None
            or mean.ndim != 1
            or mean.shape != variance.shape
        ):
            raise ObservationError(
                f"{path}: 'statistics/{key}' is not one of a pair statistics/{name}/mean and statistics/{name}/variance of "
                "equal length"
            )
        if not bool(mean.isfinite().all() & variance.isfinite().all()) or bool((variance < 0).any()):
            raise ObservationError(f"{path}: 'statistics/{name}' has values that are NaN or infinite, or a negative variance")
        layers[name] = (mean, variance)
    return layers
