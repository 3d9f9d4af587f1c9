"""A run's specification: validated, frozen, and the same in TOML, ``--set key=value`` and Python."""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gradleak.errors import SpecError, closest, nearest, printable
from gradleak.files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_SPEC_BYTES = 250_000
#: Most parts of one key: the time that tomllib needs for a key grows with the square of their number.
MAX_KEY_PARTS = 50
#: Most faults that one message lists.
MAX_FAULTS = 20

Count = Annotated[int, Field(ge=1)]
Pixels = Annotated[int, Field(ge=8, le=1024)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class DataSpec(_Table):
    """The client's private batch: images ``start .. start + batch - 1`` of a source."""

    source: str = Field(default="sample", description="sample | noise | cifar10 | cifar100 | folder:PATH | npz:PATH")
    batch: int = Field(default=8, ge=1, description="B, number of images")
    start: int = Field(default=0, ge=0, description="index of the first image")
    size: Pixels | tuple[Pixels, Pixels] | None = Field(
        default=None, description="pixels, or [height, width]; images are centre-cropped to that shape and resized"
    )
    channels: Literal[1, 3] = Field(default=3, description="folder, noise: 3 for colour, 1 for grey images")
    order: Literal["path", "shuffled"] = Field(
        default="path", description="folder: in the order of the paths, class after class, or as a client shuffles them"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="folder: of the shuffled order; noise: of the images")
    root: Path | None = Field(default=None, description="where cifar10/cifar100 lie (default: the user's cache folder)")
    download: bool = Field(default=False, description="allow torchvision to download cifar10/cifar100")


class ModelSpec(_Table):
    """The attacked model F and its weights W."""

    name: str = Field(
        default="resnet18-cifar", description="a built-in name, torchvision/NAME, timm/NAME, file.py:function, module:function"
    )
    width: int | None = Field(
        default=None, ge=1, le=100_000, description="base width of the CIFAR networks (resnet18-cifar: 64)"
    )
    num_classes: int | None = Field(
        default=None, ge=2, le=1_000_000, description="default: the model's own (10, or torchvision's 1000)"
    )
    activation: Literal["model", "sigmoid", "relu", "tanh", "leaky_relu", "gelu", "silu"] = Field(
        default="model", description="replace every activation of the model; 'model' leaves them"
    )
    weights: Path | None = Field(default=None, description="safetensors file with W; default: random initialisation")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the random initialisation")
    mean: list[float] | None = Field(default=None, description="channel means that the model subtracts from images in [0, 1]")
    std: list[float] | None = Field(default=None, description="channel deviations that the model divides by")

    @field_validator("mean")
    @classmethod
    def _of_the_unit_range(cls, mean: list[float] | None) -> list[float] | None:
        if mean is not None and any(not -1 <= m <= 1 for m in mean):
            raise ValueError("means are of images in [0, 1]; divide those of images in 0..255 by 255, and std too")
        return mean

    @field_validator("std")
    @classmethod
    def _positive(cls, std: list[float] | None) -> list[float] | None:
        if std is not None and any(s <= 0 for s in std):
            raise ValueError("standard deviations must be positive")
        return std


#: Protocol -> its own settings, with their defaults (None: no default, or none needed).
PROTOCOL_SETTINGS: dict[str, dict[str, Any]] = {
    "fedsgd": {},
    "fedavg": {"epochs": 1, "local_batch": None, "learning_rate": None, "momentum": 0.0, "order": "given"},
    "average": {"clients": None},
}


class ClientSpec(_Table):
    """What the client does with its batch, and what it sends of the result.

    ``fedsgd``: one gradient. ``fedavg``: the change of the weights over local epochs. ``average``: the server sees only the
    average of several clients' gradients. Settings of another protocol than the chosen one are an error.
    """

    protocol: Literal["fedsgd", "fedavg", "average"] = Field(
        default="fedsgd",
        description="fedsgd: one gradient; fedavg: local epochs; average: secure aggregation of several clients",
    )
    mode: Literal["train", "eval"] = Field(default="train", description="batch norm: train uses the batch's own statistics")
    loss: str = Field(
        default="cross-entropy", description="cross-entropy | bce-with-logits | mse | file.py:function | module:function"
    )
    epochs: int | None = Field(default=None, ge=1, le=1000, description="fedavg: passes over the client's images (1)")
    local_batch: int | None = Field(default=None, ge=1, description="fedavg: images in a local step (default: all)")
    learning_rate: float | None = Field(default=None, gt=0, description="fedavg: the client's learning rate; needed")
    momentum: float | None = Field(default=None, ge=0, lt=1, description="fedavg: momentum of the client's SGD (0)")
    order: Literal["given", "shuffled"] | None = Field(
        default=None,
        description="fedavg: given: local batches in the order of the images, known to the server; shuffled: not known",
    )
    clients: Count | list[Count] | None = Field(
        default=None, description="average: number of clients, or the number of images of each; needed"
    )
    layers: list[str] | None = Field(
        default=None, min_length=1, description="parameters that are sent: names or patterns (all)"
    )
    transport: str | None = Field(
        default=None,
        pattern=r"^(float16|bfloat16|([2-9]|1[0-6])-bit)$",
        description="number format: float16, bfloat16 or K-bit",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="of what the client draws: noise, order; the server never knows it"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_protocol(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        settings = PROTOCOL_SETTINGS.get(str(table.get("protocol")), {})
        return {**table, **{key: value for key, value in settings.items() if table.get(key) is None}}

    @model_validator(mode="after")
    def _settings_of_the_protocol(self) -> ClientSpec:
        for protocol, settings in PROTOCOL_SETTINGS.items():
            foreign = [key for key in settings if protocol != self.protocol and getattr(self, key) is not None]
            if foreign:
                raise ValueError(
                    f"{foreign[0]!r} is a setting of protocol {protocol!r}, and the protocol is {self.protocol!r}; "
                    "change the one or remove the other"
                )
        needed = {"fedavg": "learning_rate", "average": "clients"}.get(self.protocol)
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"protocol {self.protocol!r} needs the setting {needed!r}")
        return self

    def sizes(self, batch: int) -> list[int]:
        """How many of ``batch`` images each client of ``average`` has: as listed, else as even as can be.

        Raises:
            SpecError: The list does not sum to the batch, or there are more clients than images.
        """
        if isinstance(self.clients, list):
            if sum(self.clients) != batch:
                raise SpecError(
                    f"client.clients: {self.clients} are {sum(self.clients)} images, the batch has {batch}; "
                    "make them sum to data.batch"
                )
            return self.clients
        count = self.clients or 1
        if count > batch:
            raise SpecError(f"client.clients: {count} clients cannot share {batch} images; each needs at least one")
        return [batch // count + (k < batch % count) for k in range(count)]


class DefenceSpec(_Table):
    """One defence of the client: its name, and its settings (:mod:`gradleak.defences` checks them)."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    name: str = Field(description="gaussian | laplace | clip | dp-sgd | prune | sign | quantise | soteria")

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


class ThreatSpec(_Table):
    """What the attacker is granted beside the update, F, W, the batch size and the mode. Labels: see ``labels.rule``."""

    batch_statistics: bool = Field(
        default=False, description="mean and variance of the client's batch at every batch-norm layer"
    )
    surrogate_data: bool = Field(default=False, description="data like the client's, or a generator trained on such data")


class LabelSpec(_Table):
    """How the attack gets the labels."""

    rule: Literal["auto", "known", "joint", "idlg", "counts", "column-minima", "rlg", "ilrg"] = Field(
        default="known",
        description="known: granted; joint: optimised with the images, any loss; idlg: B = 1; counts, ilrg: batches, with "
        "repeats; column-minima: no repeats; rlg: B < classes; auto: idlg or counts by B, joint for other losses than "
        "cross-entropy",
    )


class EvaluateSpec(_Table):
    """How close reconstructions are to the truth; never seen by an attack."""

    lpips: str = Field(default="auto", description="auto: if VGG-16 is in torch's cache | off | download | a safetensors file")
    controls: bool = Field(default=False, description="also attack a random-noise gradient, and score the mean image")
    candidates: int = Field(
        default=100, ge=1, le=10_000, description="images among which the true one is looked for: the batch, and decoys"
    )


class MatrixSpec(_Table):
    """Several attacks against several defences: a run for each pair (:mod:`gradleak.matrix`)."""

    attacks: list[dict[str, Any]] | None = Field(
        default=None, min_length=1, description="names, or tables with a name and settings; default: the one of [attack]"
    )
    defences: list[list[DefenceSpec]] | None = Field(
        default=None, min_length=1, description="what a client does: a list of defences each, [] for none; default: [[defence]]"
    )

    @property
    def given(self) -> bool:
        """Whether there is a matrix at all."""
        return self.attacks is not None or self.defences is not None

    @field_validator("attacks", mode="before")
    @classmethod
    def _attacks(cls, attacks: Any) -> Any:
        if not isinstance(attacks, list):
            return attacks
        named = [_with_name(entry) for entry in attacks]
        if bad := [entry for entry in named if not (isinstance(entry, dict) and isinstance(entry.get("name"), str))]:
            raise ValueError(
                f'each attack is a name or a table with a name, such as {{name="dlg", rounds=50}}; found {bad[0]!r}'
            )
        return named

    @field_validator("defences", mode="before")
    @classmethod
    def _defences(cls, defences: Any) -> Any:
        if not isinstance(defences, list):
            return defences
        lists = [entry if isinstance(entry, list) else [entry] for entry in defences]
        return [[_with_name(entry) for entry in entries] for entries in lists]


def _with_name(entry: Any) -> Any:
    """A name alone is a table with it."""
    return {"name": entry} if isinstance(entry, str) else entry


class RunSpec(_Table):
    """One audit: simulate a client, attack what it sends, evaluate."""

    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the attack")
    device: str = Field(default="auto", description="auto | cpu | cuda | cuda:N | mps")
    threads: int | None = Field(default=None, ge=1, le=1024, description="CPU threads (default: torch's own choice)")
    checkpoint_seconds: float = Field(
        default=60.0, ge=0, allow_inf_nan=False, description="seconds between two checkpoints; 0: one after every round"
    )
    memory_limit_mb: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="MiB that the attack may take (default: 9/10 of what is free)",
    )
    data: DataSpec = DataSpec()
    model: ModelSpec = ModelSpec()
    client: ClientSpec = ClientSpec()
    defence: list[DefenceSpec] = Field(default_factory=list, description="of the client, in the order it applies them")
    threat: ThreatSpec = ThreatSpec()
    labels: LabelSpec = LabelSpec()
    attack: dict[str, Any] = Field(default_factory=lambda: {"name": "cinet"}, description="name, and its settings")
    evaluate: EvaluateSpec = EvaluateSpec()
    matrix: MatrixSpec = MatrixSpec()

    @field_validator("attack")
    @classmethod
    def _named(cls, attack: dict[str, Any]) -> dict[str, Any]:
        return {"name": "cinet", **attack}

    @field_validator("defence", mode="before")
    @classmethod
    def _listed(cls, defence: Any) -> Any:
        if isinstance(defence, dict):
            raise ValueError("expected a list of tables: write [[defence]] with two brackets")
        return [_with_name(entry) for entry in defence] if isinstance(defence, list) else defence


#: What ``gradleak audit`` runs when no specification is given: eight embedded photographs, sigmoid ResNet-18 of width 32.
DEFAULT: dict[str, Any] = {
    "data": {"source": "sample", "batch": 8, "size": 32},
    "model": {"name": "resnet18-cifar", "width": 32, "activation": "sigmoid"},
    "attack": {"name": "cinet", "rounds": 400},
}


def load(path: Path | None = None, overrides: list[str] | None = None) -> RunSpec:
    """The specification in a TOML file (or the embedded default), changed by ``key=value`` overrides.

    Args:
        path: TOML file; ``None`` for :data:`DEFAULT`.
        overrides: ``"attack.rounds=300"``; the value is read as TOML, else as a string.

    Raises:
        SpecError: Names the key, what is wrong with it, and the nearest known key.
    """
    table = read_table(path) if path is not None else {k: dict(v) for k, v in DEFAULT.items()}
    named = {text.partition("=")[0].strip() for text in overrides or []} if path is None else set()
    for key in ("model", "attack"):
        if f"{key}.name" in named:
            table[key] = {}  # the default's other settings are those of its own model and attack
    return override(table, overrides or [], where=str(path) if path is not None else "specification")


def override(table: dict[str, Any], overrides: list[str], *, where: str = "specification") -> RunSpec:
    """The specification in a table of tables, changed by ``key=value`` overrides.

    Raises:
        SpecError: As :func:`load`.
    """
    for text in overrides:
        set_value(table, text)
    return parse(table, where=where)


def set_value(table: dict[str, Any], text: str) -> None:
    """Change a table of tables as ``--set KEY=VALUE`` says; the value is read as TOML, else as a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SpecError(f"--set {text}: expected key=value, for example --set attack.rounds=300")
    set_key(table, key.strip(), _value(value.strip()))


def parse(table: dict[str, Any], *, where: str = "specification") -> RunSpec:
    """Validate a table of tables. Raises :class:`SpecError` naming key, fault and nearest known key."""
    try:
        return RunSpec.model_validate(table)
    except ValidationError as error:
        raise SpecError(f"{where}: {describe(error, RunSpec)}") from None


def describe(error: ValidationError, root: type[BaseModel]) -> str:
    """Pydantic's findings as one line each: the dotted key, what was expected and found, the nearest known key."""
    lines = []
    faults = error.errors(include_url=False)
    for item in faults[:MAX_FAULTS]:
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            fields = _fields_at(root, item["loc"][:-1])
            lines.append(f"unknown key {key!r}{nearest(str(item['loc'][-1]), fields)}")
        else:
            lines.append(f"{key}: {fault(item)}")
    if len(faults) > MAX_FAULTS:
        lines.append(f"and {len(faults) - MAX_FAULTS} more")
    return "; ".join(lines)


def fault(item: Mapping[str, Any]) -> str:
    """One of pydantic's findings: what was expected and found, and which word may have been meant."""
    words = re.findall(r"'([^']*)'", item["ctx"]["expected"]) if item["type"] == "literal_error" else []
    close = closest(item["input"], words) if isinstance(item["input"], str) else None
    meant = f"; did you mean {close!r}?" if close else ""
    return f"{item['msg'].removeprefix('Value error, ')} (found {shown(item['input'])}){meant}"


def shown(value: Any) -> str:
    """What was found, short enough for a message."""
    return printable(reprlib.repr(value) if isinstance(value, (dict, list)) else repr(value), most=200)


def dump(spec: RunSpec, *, leave_out: set[str] | None = None) -> str:
    """The fully resolved specification as TOML. ``None`` (not set) has no TOML form and is left out."""
    leave_out = (leave_out or set()) | (set() if spec.matrix.given else {"matrix"})
    table = _without_none(spec.model_dump(mode="json", exclude=leave_out))
    return str(tomli_w.dumps(table))


def read_table(source: Path | str) -> dict[str, Any]:
    """The tables of a TOML file, or of a text.

    Raises:
        SpecError: No such file, not a regular one, too large, too deep, or not TOML.
    """
    if isinstance(source, str):
        return _toml(source, where="specification")
    return _toml(read_text(source, most=MAX_SPEC_BYTES, what="a TOML specification", error=SpecError), where=str(source))


def _toml(text: str, *, where: str) -> dict[str, Any]:
    if any(piece.count(".") >= MAX_KEY_PARTS for piece in re.split(r"[=,\[\]{}\n]", text)):
        raise SpecError(f"{where}: a key of more than {MAX_KEY_PARTS} parts; is it a TOML specification?")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{where}: not valid TOML: {error}") from None
    except RecursionError:
        raise SpecError(f"{where}: not valid TOML: nested too deeply") from None


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Tables in tables as one, with dotted keys."""
    pairs: dict[str, Any] = {}
    for key, value in table.items():
        pairs |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return pairs


def _value(text: str) -> Any:
    try:
        return _toml(f"v = {text}", where="--set")["v"]
    except SpecError:
        return text


def set_key(table: dict[str, Any], key: str, value: Any) -> None:
    """Put a value at a dotted key of a table of tables; tables on the way are made."""
    *parents, leaf = key.split(".")
    if len(parents) >= MAX_KEY_PARTS:
        raise SpecError(f"--set {key}: a key of more than {MAX_KEY_PARTS} parts")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise SpecError(f"--set {key}: {parent!r} is a value, not a table")
    table[leaf] = value


def _fields_at(root: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys of the table at ``loc``: in a list, of its entries; of an optional table, of the table."""
    kind: Any = root
    for part in loc:
        if not isinstance(part, int):
            kind = kind.model_fields[part].annotation
        while not hasattr(kind, "model_fields"):
            kind = get_args(kind)[0]
    return list(kind.model_fields)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value
