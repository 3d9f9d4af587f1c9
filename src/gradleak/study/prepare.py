"""Files that a study trains before its first cell: weights of F, and generators."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gradleak import data, dcgan, models, run
from gradleak.errors import OutputError, SpecError
from gradleak.federation import held_out_score
from gradleak.spec import DataSpec, ModelSpec, Pixels
from gradleak.tensors import write_tensors
from gradleak.training import train_model

#: Before the name of a trained file, in a study's ``model.weights`` and ``attack.generator``.
PREPARED = "prepared:"

#: Kind -> its own settings.
OWN = {"model": {"model", "optimiser"}, "generator": {"width", "latent"}}

log = logging.getLogger(__name__)


class Prepare(BaseModel):
    """One file: a model that :func:`gradleak.training.train_model` trains, or a generator of :func:`gradleak.dcgan.train`.

    What is not set is those functions' own default. Cells name it ``prepared:NAME``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="what cells call it")
    kind: Literal["model", "generator"] = Field(description="weights of F, or a generator for gias")
    source: str = Field(description="public images: a data source, never those that are attacked")
    start: int = Field(default=0, ge=0, description="index of the first one")
    images: int = Field(ge=2, description="how many")
    size: Pixels | tuple[Pixels, Pixels] | None = Field(default=None, description="pixels, or [height, width]")
    rounds: int | None = Field(default=None, ge=1, description="training steps")
    batch: int | None = Field(default=None, ge=1, description="images in a step")
    learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="of the training")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the training")
    model: ModelSpec | None = Field(default=None, description="model: F, as [model] of a run; needed")
    optimiser: Literal["adam", "sgd"] | None = Field(default=None, description="model: of the training")
    width: int | None = Field(default=None, ge=1, description="generator: channels of its last hidden layer")
    latent: int | None = Field(default=None, ge=1, description="generator: length of the latent")

    @model_validator(mode="after")
    def _settings_of_the_kind(self) -> Prepare:
        other = next(kind for kind in OWN if kind != self.kind)
        foreign = [key for key in sorted(OWN[other]) if getattr(self, key) is not None]
        if foreign:
            raise ValueError(f"{foreign[0]!r} is a setting of kind {other!r}, and the kind is {self.kind!r}; remove it")
        if self.kind == "model" and self.model is None:
            raise ValueError("kind 'model' needs the table 'model': which F is trained")
        return self

    @property
    def key(self) -> str:
        """16 hexadecimal digits of everything that decides the file; its name and where the images lie do not."""
        text = json.dumps(self.model_dump(mode="json", exclude={"name"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def training(self) -> dict[str, object]:
        """Arguments of the training function, without those that are not set."""
        own = (OWN[self.kind] - {"model"}) | {"rounds", "batch", "learning_rate", "seed"}
        return {key: value for key in sorted(own) if (value := getattr(self, key)) is not None}


def prepare(entries: Sequence[Prepare], folder: Path, *, sources: Mapping[str, str]) -> dict[str, Path]:
    """Train what is not in the folder yet.

    A file is written whole or not at all, and one that is there is kept: its name is the hash of what it is trained from.

    Args:
        entries: Of a study.
        folder: Where the files are, ``KEY.safetensors`` each.
        sources: Name of a data source -> where it lies.

    Returns:
        Name -> file.

    Raises:
        SpecError: Two entries have one name.
        GradleakError: The images cannot be read, the model cannot be built, or the training diverges.
    """
    files = {entry.name: folder / f"{entry.key}.safetensors" for entry in entries}
    if len(files) < len(entries):
        raise SpecError("prepare: two files have one name; rename one of them")
    for entry in entries:
        if not (path := files[entry.name]).is_file():
            log.info("training %s: %s on %d images of %s", entry.name, entry.kind, entry.images, entry.source)
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"{path.parent}: cannot be used for trained files: {error.strerror or error}") from None
            _train(entry, path, sources.get(entry.source, entry.source))
    return files


def _train(entry: Prepare, path: Path, source: str) -> None:
    public = data.load(DataSpec(source=source, batch=entry.images, start=entry.start, size=entry.size))
    device = run.choose_device("auto")
    settings: dict[str, object] = {**entry.training, "device": device}
    if entry.model is None:
        dcgan.train(public.images, **settings).save(path)  # type: ignore[arg-type]
        return
    channels, height, width = public.images.shape[1:]
    model = models.build(entry.model, image_shape=(channels, height, width))
    trained = train_model(model, public, **settings)  # type: ignore[arg-type]
    write_tensors(path, trained.state_dict(), {})
    log.info("%s: training accuracy %.3f", entry.name, held_out_score(trained, public).accuracy)
