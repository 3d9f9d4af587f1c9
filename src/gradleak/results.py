"""Reading a run folder back, whoever wrote it, and removing its pictures."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from torch import Tensor

from gradleak.errors import DataError, GradleakError, OutputError
from gradleak.files import parse_json, read_text, write_atomically
from gradleak.folder import FIGURES, LOG, MATRIX, RECONSTRUCTION, REPORT, RESULT, ROWS, batch_of, lock_folder
from gradleak.observation import check_labels
from gradleak.report import MatrixData, ReportData, render_matrix, write_report
from gradleak.spec import describe
from gradleak.tensors import read_metadata, read_tensors

#: Files of a run that hold pictures, or what pictures can be made from; report.html is rewritten without them.
PICTURES = (RECONSTRUCTION, "grid.png", "checkpoint*.safetensors")

MAX_JSON_BYTES = 64_000_000

_Number = int | float
_Means = dict[str, dict[str, _Number | None]]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Labels(_Part):
    rule: str = ""
    values: list[int] | None
    shape: list[NonNegativeInt] = []
    classes: int | None = Field(default=None, ge=1, le=1_000_000)
    accuracy: _Number | None = None


class _Cost(_Part):
    rounds: int
    seconds: _Number
    seconds_per_round: _Number | None = None
    peak_memory_mb: _Number | None = None


class _Assumption(_Part):
    name: str
    value: str | int | float | bool | None
    why: str | None = None


class _Advice(_Part):
    title: str
    text: str


class _Layer(_Part):
    name: str
    module: str
    numbers: int
    norm_share: _Number
    image_share: _Number
    image_sensitivity: _Number | None = None
    distance: _Number | None = None


class _DefenceCost(_Part):
    name: str
    distortion: _Number
    total: _Number
    epsilon: _Number | None = None
    delta: _Number | None = None


class _Quality(_Part):
    round: list[_Number] = []
    psnr: list[_Number | None] = []
    ssim: list[_Number | None] = []


class _Identification(_Part):
    candidates: int
    ranks: dict[str, list[int] | None] = {}
    rate: dict[str, _Number | None]
    chance: _Number


class _Control(_Part):
    psnr: dict[str, _Number | None] = {}
    ssim: dict[str, _Number | None] = {}
    fsim: dict[str, _Number | None] = {}
    lpips: dict[str, _Number | None] = {}
    mse: dict[str, _Number | None] = {}
    identification: _Identification | None = None


class _Result(_Part):
    """What the report and the command line read of result.json; other keys may be anything."""

    labels: _Labels
    cost: _Cost
    matching_loss: _Number
    verdict: str = ""
    attack: dict[str, Any] = {}
    warnings: list[str] = []
    assumptions: list[_Assumption] = []
    advice: list[_Advice] = []
    metrics: _Means = {}
    per_image: dict[str, list[_Number | None]] = {}
    assignment: list[int] = []
    many_to_one: dict[str, _Number | None] = {}
    controls: dict[str, _Control] = {}
    notes: dict[str, str] = {}
    quality: _Quality = _Quality()
    versions: dict[str, str] = {}
    seed: int | None = None
    device: str | None = None
    stopped: str | None = None
    command: str = ""
    redacted: bool = False
    partial: bool = False
    interrupted: Literal["SIGINT", "SIGTERM"] | None = None
    image_sensitivity: _Number | None = None
    identification: _Identification | None = None
    layers: list[_Layer] = []
    defence_costs: list[_DefenceCost] = []


class _Row(_Part):
    round: int
    loss: _Number | None
    learning_rate: _Number | None
    seconds: _Number


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        result: Of result.json.
        history: Rows of log.jsonl.
        images: B x C x H x W.
        labels: B x ..., int64 or floats, those that the attack used.
        snapshots: S x B x C x H x W, uint8; S may be 0.
        snapshot_rounds: S round numbers.
    """

    result: dict[str, Any]
    history: list[dict[str, float]]
    images: Tensor
    labels: Tensor
    snapshots: Tensor
    snapshot_rounds: list[int]


def read_run(folder: Path) -> Run:
    """The rows and the pictures of a run folder, each checked.

    Raises:
        OutputError: It is no run folder, its pictures were left out or removed, or a file in it is damaged.
    """
    result = read_result(folder)
    path = folder / RECONSTRUCTION
    if not os.path.lexists(path):
        why = "it was written with --redact" if result.get("redacted") else "was it purged?"
        raise OutputError(f"{folder}: no {RECONSTRUCTION} in it: {why} Without the images there is nothing to score")
    tensors, _ = read_tensors(path, error=OutputError)
    if not {"images", "labels"} <= tensors.keys():
        raise OutputError(f"{path}: has no tensors 'images' and 'labels'")
    images, labels = tensors["images"], tensors["labels"]
    if images.ndim != 4 or 0 in images.shape or not images.is_floating_point():
        raise OutputError(f"{path}: images are {images.dtype} {tuple(images.shape)}; expected float (B, C, H, W)")
    if (labels.dtype != torch.int64 and not labels.is_floating_point()) or labels.shape[:1] != images.shape[:1]:
        raise OutputError(
            f"{path}: labels are {labels.dtype} {tuple(labels.shape)}; expected torch.int64 or floats ({len(images)}, ...)"
        )
    if batch_of(result["labels"]) != len(images):
        raise OutputError(f"{folder}: {batch_of(result['labels'])} labels in {RESULT} for {len(images)} images")
    try:
        check_labels(labels, where=str(path))
    except DataError as error:
        raise OutputError(str(error)) from None
    snapshots = tensors.get("snapshots", torch.empty(0, *images.shape, dtype=torch.uint8))
    rounds = tensors.get("snapshot_rounds", torch.empty(0, dtype=torch.int64))
    if snapshots.dtype != torch.uint8 or snapshots.shape[1:] != images.shape or rounds.shape != snapshots.shape[:1]:
        raise OutputError(
            f"{path}: snapshots are {snapshots.dtype} {tuple(snapshots.shape)} at rounds {tuple(rounds.shape)}; expected "
            f"torch.uint8 (S, {', '.join(map(str, images.shape))}) and (S,)"
        )
    return Run(result, read_history(folder), images, labels, snapshots, [int(n) for n in rounds.tolist()])


def read_result(folder: Path) -> dict[str, Any]:
    """What result.json of a run folder holds.

    Raises:
        OutputError: There is none, or it is not what a run writes.
    """
    path = folder / RESULT
    if not os.path.lexists(path):
        raise OutputError(f"{folder}: no {RESULT} in it; expected a folder written by `gradleak invert` or `audit`")
    text = read_text(path, most=MAX_JSON_BYTES, what="a run's result", error=OutputError)
    found = parse_json(text, where=f"{path}: is damaged: it", error=OutputError)
    try:
        result = _Result.model_validate(found)
    except ValidationError as error:
        raise OutputError(f"{path}: is damaged: it is not what a run writes: {describe(error, _Result)}") from None
    count = batch_of(found["labels"])
    if result.assignment and sorted(result.assignment) != list(range(count)):
        raise OutputError(f"{path}: is damaged: the assignment is not one of {count} images")
    if any(len(values) != count for values in result.per_image.values()):
        raise OutputError(f"{path}: is damaged: per_image has not {count} values for each metric")
    found_ranks = {} if result.identification is None else result.identification.ranks
    if any(ranks is not None and len(ranks) != count for ranks in found_ranks.values()):
        raise OutputError(f"{path}: is damaged: identification has not {count} ranks")
    quality = result.quality
    if any(len(values) not in (0, len(quality.round)) for values in (quality.psnr, quality.ssim)):
        raise OutputError(f"{path}: is damaged: quality has lists of different lengths")
    return dict(found)


def read_history(folder: Path) -> list[dict[str, float]]:
    """The rows of log.jsonl; none if there is no such file.

    Raises:
        OutputError: It is not what a run writes.
    """
    path = folder / LOG
    if not os.path.lexists(path):
        return []
    rows = []
    text = read_text(path, most=MAX_JSON_BYTES, what="a run's log", error=OutputError)
    for number, line in enumerate(text.split("\n"), 1):
        if not line:
            continue
        where = f"{path}: is damaged: line {number}"
        row = parse_json(line, where=where, error=OutputError, nan=True)
        try:
            _Row.model_validate(row)
        except ValidationError as error:
            raise OutputError(f"{where}: {describe(error, _Row)}") from None
        rows.append(row)
    return rows


def purge(root: Path) -> list[Path]:
    """Remove the pictures of a run folder, or of all run folders below a folder; rows, logs and specifications stay.

    ``report.html`` is written anew without pictures; that of a study is removed. Links are not followed. The files are
    unlinked, not overwritten: what the disk, its snapshots and its backups still hold is beyond a program's reach.

    Returns:
        What was removed or rewritten.

    Raises:
        OutputError: There is no run folder in it, one is in use, or a file cannot be removed.
    """
    if not root.is_dir():
        raise OutputError(f"{root}: no such folder; expected a run folder, or a folder with run folders in it")
    folders = [Path(folder) for folder, _, _ in os.walk(root) if is_run(Path(folder))]
    if not folders:
        raise OutputError(
            f"{root}: there is no run folder in it, so nothing was removed; expected what `gradleak audit` writes"
        )
    changed = []
    for folder in folders:
        with lock_folder(folder):
            changed += remove_pictures(folder)
    for folder in [Path(folder) for folder, _, files in os.walk(root) if MATRIX in files]:
        with lock_folder(folder):
            changed += _rewrite_matrix(folder)
    for folder in [Path(folder) for folder, _, files in os.walk(root) if ROWS in files]:
        # the report of a study: `gradleak study report` writes it anew from what is left
        pages = [folder / REPORT, folder / "report.md", *sorted((folder / FIGURES).glob("*-pictures-*.png"))]
        for path in pages:
            if os.path.lexists(path):
                path.unlink()
                changed.append(path)
    return changed


def _rewrite_matrix(folder: Path) -> list[Path]:
    """Write the page of a matrix without pictures; where its rows are damaged, remove the page."""
    report = folder / REPORT
    if not os.path.lexists(report):
        return []
    try:
        text = read_text(folder / MATRIX, most=MAX_JSON_BYTES, what="a matrix", error=OutputError)
        matrix = parse_json(text, where=f"{folder / MATRIX}: is damaged: it", error=OutputError)
        page = render_matrix(MatrixData(matrix=matrix, originals=None, thumbnails={}))
        write_atomically(report, [page.encode("utf-8", "replace")])
    except (GradleakError, KeyError, TypeError, ValueError, AttributeError, IndexError):
        report.unlink()
    return [report]


def is_run(folder: Path) -> bool:
    """Whether a run wrote this folder: its result can be read, or a reconstruction or checkpoint says that it is one."""
    with contextlib.suppress(GradleakError):
        read_result(folder)
        return True
    for pattern in PICTURES:
        for path in folder.glob(pattern):
            with contextlib.suppress(GradleakError):
                if read_metadata(path, error=OutputError).get("format", "").startswith("gradleak-"):
                    return True
    return False


def remove_pictures(folder: Path) -> list[Path]:
    """Remove the pictures of one run folder, and write its report without them; returns what was changed."""
    report = folder / REPORT
    # beside the files themselves: what a killed process left half written
    patterns = [f"{hidden}{name}{rest}" for name in PICTURES for hidden, rest in (("", ""), (".", ".*.tmp"))]
    found = [path for pattern in [*patterns, ".report.html.*.tmp"] for path in sorted(folder.glob(pattern))]
    try:
        if os.path.lexists(report):
            found.append(report)
            try:
                result, history = read_result(folder), read_history(folder)
                quality = result.get("quality") or {}
                write_report(
                    folder, ReportData(result, images=None, truth=None, snapshots=None, history=history, quality=quality)
                )
            except GradleakError:
                report.unlink()  # it cannot be written anew, and shows pictures
        for path in found:
            if path != report:
                path.unlink()
    except OSError as error:
        raise OutputError(f"{folder}: cannot be purged: {error.strerror or error}") from None
    return found
