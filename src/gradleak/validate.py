"""What an update file holds, whether it is whole, and whether it fits a model: before an attack is run on it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gradleak import models
from gradleak.client import operator
from gradleak.errors import ObservationError
from gradleak.invariance import image_sensitivity
from gradleak.labels import joint
from gradleak.observation import FORMAT, TRUTH_FORMAT, Observation, Truth
from gradleak.run import named, protocol_in_words, spec_for
from gradleak.tensors import read_metadata
from gradleak.threat import LETTERS, letter


@dataclass(frozen=True)
class Validation:
    """What was found in a file.

    Attributes:
        format: ``gradleak-observation`` or ``gradleak-truth``.
        version: Of the format.
        batch: B.
        image_shape: (C, H, W).
        labels: Shape of the labels or targets; None where the file has none.
        parameters: P, how many numbers the update has; None of a truth.
        unknowns: B C H W.
        layers: Parameter -> share of the update's squared norm, largest first; None of a truth.
        protocol: In words.
        loss: Its name.
        mode: ``train`` or ``eval``.
        defences: In words.
        normalisation: ``mean`` and ``std``.
        threat_model: Letter and words.
        model: The model that the file names; None where it is one's own.
        fits: Whether the update fits the model that was named; None where none was.
        image_sensitivity: Relative change of the model's update from one batch of random images to another; None as ``fits``.
        remarks: What a person should know.
    """

    format: str
    version: str
    batch: int
    image_shape: tuple[int, int, int]
    labels: list[int] | None
    unknowns: int
    parameters: int | None = None
    layers: dict[str, float] | None = None
    protocol: str | None = None
    loss: str | None = None
    mode: str | None = None
    defences: list[str] = field(default_factory=list)
    normalisation: dict[str, list[float]] | None = None
    threat_model: str | None = None
    model: str | None = None
    fits: bool | None = None
    image_sensitivity: float | None = None
    remarks: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        shape = "x".join(map(str, self.image_shape))
        rows = [
            f"{self.format}, version {self.version}: {self.batch} images of {shape}, "
            + ("no labels: an attack recovers them" if self.labels is None else f"labels of shape {tuple(self.labels)}")
        ]
        if self.parameters is not None:
            rows.append(f"  update: {self.parameters:,} numbers for {self.unknowns:,} unknown ones")
            rows.append(
                f"  client: {self.protocol}; {self.mode} mode; loss {self.loss}; defences: {', '.join(self.defences) or 'none'}"
            )
            rows.append(f"  threat model {self.threat_model}")
        if self.normalisation is not None:
            rows.append(f"  images are normalised by mean {self.normalisation['mean']} and std {self.normalisation['std']}")
        elif self.parameters is not None:
            rows.append("  images are not normalised, or inside the model")
        rows += [f"  {100 * share:5.1f} % of the squared norm: {name}" for name, share in list((self.layers or {}).items())[:5]]
        if self.fits is not None:
            rows.append(f"  fits {self.model}; its update changes by {self.image_sensitivity:.2g} with the images")
        rows += [f"  note: {remark}" for remark in self.remarks]
        return [*rows, "valid"]


def validate(
    path: Path, *, model: str | None = None, loss: str | None = None, overrides: list[str] | None = None
) -> Validation:
    """Read a file of updates, or of private images, and check all that an attack would check.

    Args:
        path: The file.
        model: Name of the attacked model; None: the built-in one that the file describes. Where there is none, what needs a
            model is left out.
        loss: The client's loss where it is one's own.
        overrides: ``key=value``, such as ``model.num_classes=20``.

    Raises:
        ObservationError: The file is no update, damaged, or does not fit the model; names the tensor or key, what was
            expected, what was found, and what to do.
    """
    metadata = read_metadata(path, error=ObservationError)
    kind, version = metadata.get("format"), metadata.get("version", "?")
    if kind == TRUTH_FORMAT:
        truth = Truth.load(path)
        count, (channels, height, width) = len(truth.images), truth.images.shape[1:]
        return Validation(
            TRUTH_FORMAT,
            version,
            batch=count,
            image_shape=(channels, height, width),
            labels=list(truth.labels.shape),
            unknowns=truth.images.numel(),
            remarks=["these are private images: keep the file where the client's data is"],
        )
    if kind != FORMAT:
        raise ObservationError(
            f"{path}: format is {kind!r}, expected {FORMAT!r}; make an update file of arrays with `gradleak convert`"
        )
    try:
        observation = Observation.load(path, loss=loss)
    except ObservationError as error:
        if loss is None and "--loss" in str(error):
            raise ObservationError(f"{error}; the rest of the file was not looked at") from None
        raise
    sizes = {name: float(t.double().square().sum()) for name, t in observation.update.items()}
    total = sum(sizes.values())
    shares = {name: size / total for name, size in sorted(sizes.items(), key=lambda item: -item[1])}
    parameters = sum(t.numel() for t in observation.update.values())
    unknowns = observation.batch * math.prod(observation.image_shape)
    remarks = []
    if parameters < unknowns:
        remarks.append("fewer numbers in the update than in the images: they cannot be unique, a prior must fill the gap")
    if not observation.weights:
        remarks.append(
            "no weights in the file: the model's own are used, so name the very weights with --set model.weights=FILE"
        )
    if zero := [name for name, size in sizes.items() if size == 0]:
        remarks.append(f"{len(zero)} tensors are zero throughout ({zero[0]}): sent like that, or frozen?")
    fits, sensitivity, described = None, None, None if observation.model is None else observation.model.name
    if model is not None or observation.model is not None:
        spec = spec_for(observation, model=model, overrides=overrides or [], where=str(path))
        described = spec.model.name
        client = operator(observation, models.build(spec.model, image_shape=observation.image_shape), where=str(path))
        labels = observation.labels
        if labels is None:
            labels = joint(observation, client)
        sensitivity, fits = image_sensitivity(client, labels, observation.image_shape), True
    else:
        remarks.append("whether it fits your model was not checked: name it with --model")
    return Validation(
        FORMAT,
        version,
        batch=observation.batch,
        image_shape=observation.image_shape,
        labels=None if observation.labels is None else list(observation.labels.shape),
        unknowns=unknowns,
        parameters=parameters,
        layers=shares,
        protocol=protocol_in_words(observation),
        loss=observation.protocol.loss,
        mode=observation.protocol.mode,
        defences=[named(defence) for defence in observation.defences],
        normalisation=None
        if observation.normalisation is None
        else {key: list(values) for key, values in observation.normalisation._asdict().items()},
        threat_model=f"{letter(observation)}: {LETTERS[letter(observation)]}",
        model=described,
        fits=fits,
        image_sensitivity=sensitivity,
        remarks=remarks,
    )
