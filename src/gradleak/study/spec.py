"""A study's specification: a grid of runs, validated, and the cells that it describes."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gradleak import run
from gradleak.attacks import ATTACKS, REVISIONS, attack
from gradleak.errors import SpecError
from gradleak.spec import RunSpec, describe, flat, parse, read_table, set_key, set_value
from gradleak.study.prepare import PREPARED, Prepare

#: Most cells that one study may have: more is a mistake in a grid.
MAX_CELLS = 100_000

#: Names of data sources that --source may place elsewhere.
NAME = re.compile(r"^[a-z][a-z0-9_-]*$")

#: A mean, and the spread beside it where one is published.
Figure = tuple[float, float | None]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Override(_Table):
    """What is different in some cells: those that agree with every key of ``where``."""

    where: dict[str, Any] = Field(default_factory=dict, description="dotted keys of a run, or names of axes, and their values")
    set: dict[str, Any] = Field(default_factory=dict, description="dotted keys of a run and their values")
    seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="another budget.seconds, and no rounds")
    skip: bool = Field(default=False, description="there is no such cell")


class Budget(_Table):
    """How long an attack may run: by its rounds, or by seconds of its loop."""

    rounds: int | None = Field(default=None, ge=1, description="attack.rounds of every cell that does not set it")
    seconds: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="of every cell that sets no attack.rounds: how many fit is measured first, written down, and kept for good",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Budget:
        if self.rounds is not None and self.seconds is not None:
            raise ValueError("give rounds or seconds, not both")
        return self


class Resources(_Table):
    """What one cell takes. The engine ``ray`` places cells by it; ``local`` gives each process so many threads."""

    cpus: int = Field(default=1, ge=1, le=1024, description="threads of a cell, of each process")
    gpus: float = Field(default=0, ge=0, allow_inf_nan=False, description="GPUs of a cell, of each process")
    memory_mb: float = Field(default=0, ge=0, allow_inf_nan=False, description="memory of a cell; 0: not said")
    processes: int = Field(default=1, ge=1, le=1024, description="processes that share the images of one attack (torchrun)")


class Published(_Table):
    """What a paper states for some cells: means and spreads."""

    where: dict[str, Any] = Field(default_factory=dict, description="as of an override")
    method: str = Field(default="", description="what the paper calls it")
    psnr: Figure | None = None
    ssim: Figure | None = None
    fsim: Figure | None = None
    lpips: Figure | None = None
    note: str = Field(default="", description="where it stands")

    @field_validator("psnr", "ssim", "fsim", "lpips", mode="before")
    @classmethod
    def _spread(cls, value: Any) -> Any:
        return (value, None) if isinstance(value, (int, float)) else (*value, None) if _is_one(value) else value


def _is_one(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 1


class ReportSpec(_Table):
    """What a report shows of a study beside its table."""

    curves: list[str] = Field(default_factory=list, description="axes over which SSIM and PSNR are drawn")
    rounds: bool = Field(default=False, description="quality over the rounds")
    pictures: int = Field(default=0, ge=0, le=1024, description="images of the picture grid; 0: none")
    boxed: int = Field(default=0, ge=0, le=1024, description="how many of them, the first, have a box")
    columns: int = Field(default=16, ge=1, le=64, description="images in a row of it")


class StudySpec(_Table):
    """A grid of runs. ``name`` is the stem of its file; (``name``, ``size``) is its identity."""

    name: str = Field(default="study", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="set from the file's name")
    title: str = Field(default="", description="for the report")
    about: str = Field(default="", description="for the report: what it asks, and what is known")
    size: Literal["small", "full"] = Field(default="full", description="small: minutes on two cores; full: as published")
    sources: dict[str, str] = Field(default_factory=dict, description="name of a data source -> where it is; see --source")
    seeds: list[int] = Field(default=[0], min_length=1, description="axis: seed of the attack and of F's weights")
    base: dict[str, Any] = Field(default_factory=dict, description="keys of a run, of every cell")
    grid: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="axis -> values. An axis is a dotted key of a run, or any other name; then each value is a table of keys",
    )
    override: list[Override] = Field(default_factory=list, description="in order; a later one wins")
    prepare: list[Prepare] = Field(default_factory=list, description="files that are trained before the first cell")
    budget: Budget = Budget()
    resources: Resources = Resources()
    published: list[Published] = Field(default_factory=list, description="the first one that agrees belongs to a cell")
    report: ReportSpec = ReportSpec()

    @field_validator("grid", mode="before")
    @classmethod
    def _dotted(cls, grid: Any) -> Any:
        """``data.batch = [4, 8]`` with and without quotes."""
        if not isinstance(grid, dict):
            return grid
        for axis, values in (axes := flat(grid)).items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"axis {axis!r}: expected a list of its values")
        return axes

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is there twice")
        return seeds


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        study, size: Of the study.
        key: 16 hexadecimal digits, a hash of everything that decides the result; names the folder ``cells/KEY``. Where images
            and trained files lie is not in it, only which they are.
        spec: The run; data sources and files are where this machine has them.
        settings: Axis -> value, without the seed; a table's keys one by one.
        label: The settings, for people.
        seed: Of the attack, and of F's weights unless the study says otherwise.
        dataset: The data source as the study calls it.
        resources: What it takes.
        seconds: Its budget of loop time; None: its rounds are in ``spec``.
        published: What the paper states for it.
    """

    study: str
    size: str
    key: str
    spec: RunSpec
    settings: dict[str, Any]
    label: str
    seed: int
    dataset: str
    resources: Resources
    seconds: float | None
    published: Published | None


def load_study(path: Path, *, sources: Mapping[str, str] | None = None, overrides: list[str] | None = None) -> StudySpec:
    """The study in a TOML file.

    Args:
        path: The file; its stem is the study's name.
        sources: Name -> data source, ``{"cifar10": "npz:images.npz"}``: where the images that the study calls so lie.
        overrides: ``"KEY=VALUE"``: keys of the run, which win in every cell.

    Raises:
        SpecError: Names the file, the key, what is wrong with it, and the nearest known key.
    """
    table = read_table(path)
    if "grid" not in table and "base" not in table and {"data", "attack", "model"} & table.keys():
        raise SpecError(f"{path}: is the specification of one run, which `gradleak audit` takes; a study has [base] and [grid]")
    if "name" in table:
        raise SpecError(f"{path}: unknown key 'name': a study is called by its file's name")
    last: dict[str, Any] = {}
    for text in overrides or []:
        set_value(last, text)
    try:
        study = StudySpec.model_validate({**table, "name": path.stem})
    except ValidationError as error:
        raise SpecError(f"{path}: {describe(error, StudySpec)}") from None
    override = [Override(set=flat(last))] if last else []
    named = {**study.sources, **(sources or {})}
    study = study.model_copy(update={"override": [*study.override, *override], "sources": named})
    for _ in cells(study):  # a fault of any cell is found before the first one runs
        pass
    return study


def load_studies(
    paths: list[Path], *, sources: Mapping[str, str] | None = None, overrides: list[str] | None = None
) -> list[StudySpec]:
    """:func:`load_study` of every file; of a folder, of every ``*.toml`` in it.

    Raises:
        SpecError: As :func:`load_study`; nothing to load; two studies of one name and size.
    """
    files = [file for path in paths for file in (sorted(path.glob("*.toml")) if path.is_dir() else [path])]
    if not files:
        raise SpecError(f"{', '.join(map(str, paths))}: no study there; expected a TOML file, or a folder with some")
    for name, source in (sources or {}).items():
        if not NAME.match(name):
            raise SpecError(f"--source {name}={source}: expected NAME=SOURCE, for example cifar10=npz:images.npz")
    studies = [load_study(file, sources=sources, overrides=overrides) for file in files]
    for one, other in itertools.combinations(range(len(studies)), 2):
        if (studies[one].name, studies[one].size) == (studies[other].name, studies[other].size):
            raise SpecError(f"{files[other]}: a study of the same name and size is in {files[one]}; rename one file")
    return studies


def dump_study(study: StudySpec) -> str:
    """The study as TOML, with the sources and overrides that it was loaded with."""

    def without_none(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_none(item) for key, item in value.items() if item is not None}
        return [without_none(item) for item in value if item is not None] if isinstance(value, (list, tuple)) else value

    return str(tomli_w.dumps(without_none(study.model_dump(mode="json", exclude={"name"}))))


def cells(study: StudySpec, *, prepared: Path | None = None) -> list[Cell]:
    """The cells of a study, the seed innermost.

    Args:
        study: The study.
        prepared: The folder of its trained files; None: they are named, and not looked for.

    Raises:
        SpecError: A cell is no valid run, or there are too many; names the study and the cell.
    """
    axes = [[(axis, value) for value in values] for axis, values in study.grid.items()]
    count = len(study.seeds)
    for axis in axes:
        count *= len(axis)
    if count > MAX_CELLS:
        raise SpecError(f"{study.name}: the grid has {count:,} cells, at most {MAX_CELLS:,} are allowed; split it")
    found = [
        cell
        for values in itertools.product(*axes)
        for seed in study.seeds
        if (cell := _cell(study, dict(values), seed, prepared)) is not None
    ]
    if not found:
        raise SpecError(f"{study.name}: every cell is skipped; nothing to run")
    keys: dict[str, Cell] = {}
    for cell in found:
        if cell.key in keys:
            same = f"{keys[cell.key].label!r} and {cell.label!r}"
            raise SpecError(f"{study.name}: two cells are the same run, {same}; leave one out of the grid")
        keys[cell.key] = cell
    return found


def _cell(study: StudySpec, values: dict[str, Any], seed: int, prepared: Path | None) -> Cell | None:
    where = study.name
    table: dict[str, Any] = copy.deepcopy(study.base)
    settings: dict[str, Any] = {}
    words: list[str] = []
    chosen = {key: value for key, value in table.get("attack", {}).items() if key != "name"}
    if study.budget.rounds is not None and "rounds" not in chosen:
        chosen["rounds"] = study.budget.rounds
    own: set[str] = set()  # the attack's settings that an axis gives it
    for key in ("seed", "model.seed"):
        set_key(table, key, seed)
    for axis, value in values.items():
        pairs, word = _axis(axis, value, where=f"{where}: axis {axis!r}")
        for key, setting in pairs.items():
            set_key(table, key, copy.deepcopy(setting))
        own |= {key.removeprefix("attack.") for key in pairs if key.startswith("attack.")}
        settings |= pairs if _is_key(axis) else {axis: word}
        words.append(word)
    label = ", ".join(words) or study.name
    where = f"{where}, cell {label!r}"
    _merge_attack(table, chosen, own)
    seconds = None
    for override in study.override:
        known = {**flat(table), **settings, "seed": seed}
        if any(known.get(key) != value for key, value in override.where.items()):
            continue
        if override.skip:
            return None
        for key, setting in override.set.items():
            set_key(table, key, copy.deepcopy(setting))
        if "attack.rounds" in override.set:
            seconds = None
        seconds = override.seconds or seconds
    if seconds is None and "rounds" not in table["attack"]:
        seconds = study.budget.seconds
    elif seconds is not None:
        table["attack"].pop("rounds", None)
    spec = parse(table, where=where)
    if spec.matrix.given:
        raise SpecError(f"{where}: matrix: a study is a grid itself; make an axis of it")
    named = {key: value for key, value in spec.attack.items() if key != "name"}
    try:
        spec = run.resolve(spec, attack(str(spec.attack["name"]), **named))
    except SpecError as fault:
        raise SpecError(f"{where}: {fault}") from None
    known = {**flat(table), **settings}
    published = next((p for p in study.published if all(known.get(k) == v for k, v in p.where.items())), None)
    trained = {entry.name: entry for entry in study.prepare}
    identity, here = _files(spec, trained, prepared, where=where)
    source = study.sources.get(spec.data.source, spec.data.source)
    return Cell(
        study=study.name,
        size=study.size,
        key=_hash(identity, seconds),
        spec=here.model_copy(
            update={"data": spec.data.model_copy(update={"source": source}), "threads": spec.threads or study.resources.cpus}
        ),
        settings=settings,
        label=label,
        seed=seed,
        dataset=spec.data.source.partition(":")[0] + _stem(spec.data.source),
        resources=study.resources,
        seconds=seconds,
        published=published,
    )


def _stem(source: str) -> str:
    _, colon, path = source.partition(":")
    return f":{Path(path).name}" if colon else ""


def _is_key(axis: str) -> bool:
    """Whether an axis is a key of a run; if not, its name is the study's own."""
    return axis.partition(".")[0] in RunSpec.model_fields


def _axis(axis: str, value: Any, *, where: str) -> tuple[dict[str, Any], str]:
    """Dotted keys of a run and their values, and the word for one value of an axis."""
    if not isinstance(value, dict):
        if not _is_key(axis):
            raise SpecError(f"{where}: is no key of a run, so each value must be a table of keys and a label; found {value!r}")
        return {axis: value}, _word(axis, value)
    table = dict(value)
    label = table.pop("label", None)
    pairs = flat(table)
    if _is_key(axis):
        pairs = {f"{axis}.{key}": setting for key, setting in pairs.items()}
    word = label or " ".join(_word(key, setting) for key, setting in pairs.items())
    return pairs, str(word)


def _word(key: str, value: Any) -> str:
    last = key.rpartition(".")[2]
    if isinstance(value, list):
        value = " + ".join(str(v.get("name", v)) if isinstance(v, dict) else str(v) for v in value) or "none"
    return str(value) if last in ("name", "activation", "protocol", "source", "mode") else f"{last.replace('_', ' ')} {value}"


def _merge_attack(table: dict[str, Any], chosen: dict[str, Any], own: set[str]) -> None:
    """The attack's settings: what [base] and the budget say holds for each attack that has such a setting."""
    given = table.setdefault("attack", {})
    name = given.get("name", "cinet")
    has = {field.name for field in dataclasses.fields(ATTACKS[name][0])} if name in ATTACKS else set(chosen)
    kept = {key: value for key, value in given.items() if key in own or key == "name"}
    table["attack"] = {**{key: value for key, value in chosen.items() if key in has}, **kept}


def _files(
    spec: RunSpec, trained: Mapping[str, Prepare], prepared: Path | None, *, where: str
) -> tuple[dict[str, Any], RunSpec]:
    """What names the run's content, and the run with the trained files in their places."""
    table = spec.model_dump(mode="json")
    here = spec
    for part, key in (("model", "weights"), ("attack", "generator")):
        value = table[part].get(key)
        if not isinstance(value, str) or not value.startswith(PREPARED):
            continue
        entry = trained.get(value.removeprefix(PREPARED))
        if entry is None:
            raise SpecError(f"{where}: {part}.{key}: no [[prepare]] is called {value.removeprefix(PREPARED)!r}")
        table[part][key] = f"{PREPARED}{entry.key}"
        if prepared is not None:
            path = prepared / f"{entry.key}.safetensors"
            change: Any = {**spec.attack, key: str(path)} if part == "attack" else spec.model.model_copy(update={key: path})
            here = here.model_copy(update={part: change})
    return table, here


def _hash(table: dict[str, Any], seconds: float | None) -> str:
    """16 hexadecimal digits of everything that decides the result."""
    decides = {key: value for key, value in table.items() if key not in run.INDIFFERENT and key != "matrix"}
    decides["controls"] = table["evaluate"]["controls"]
    decides["seconds"] = seconds
    if revision := REVISIONS.get(table["attack"]["name"]):
        decides["revision"] = revision
    text = json.dumps(decides, sort_keys=True, allow_nan=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def all_cells(studies: list[StudySpec], *, prepared: Path | None = None) -> Iterator[Cell]:
    """The cells of several studies; one that two of them share is there for each."""
    for study in studies:
        yield from cells(study, prepared=prepared)
