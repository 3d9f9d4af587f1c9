"""Several attacks against several defences: a run folder for each pair, and one page about all of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradleak import data, models, run
from gradleak.attacks import ATTACKS, attack
from gradleak.defences import parse as defences_of
from gradleak.errors import GradleakError, OutputError, SpecError, nearest
from gradleak.evaluate import RECOGNISABLE_SSIM
from gradleak.files import write_atomically
from gradleak.folder import MATRIX, RECONSTRUCTION, REPORT, RESULT, SPEC, check_folder, open_folder
from gradleak.observation import Truth
from gradleak.report import MatrixData, render_matrix
from gradleak.report.matrix import NO_DEFENCE, THUMBNAILS, verdict
from gradleak.spec import MatrixSpec, RunSpec, dump
from gradleak.tensors import read_tensors


@dataclasses.dataclass(frozen=True)
class Cell:
    """One attack against one defence.

    Attributes:
        attack: Its name with the settings that the matrix gives it, for people.
        defence: The defences with their settings, for people; ``none``.
        folder: Name of its run folder: letters, digits, dots and hyphens, unique in the matrix.
        spec: The specification of this run alone.
    """

    attack: str
    defence: str
    folder: str
    spec: RunSpec


def cells(spec: RunSpec) -> list[Cell]:
    """Every attack of ``[matrix]`` against every defence, defences outermost.

    The settings of ``[attack]`` hold for each attack that has them, and an attack's own win.

    Raises:
        SpecError: An attack or defence is not known, or has no such setting; one is there twice; ``[[defence]]`` stands
            beside ``matrix.defences``.
    """
    if spec.defence and spec.matrix.defences is not None:
        raise SpecError("matrix.defences: the specification has [[defence]] too; move it into the lists of matrix.defences")
    attacks = _attacks(spec)
    entries = [spec.defence] if spec.matrix.defences is None else spec.matrix.defences
    defences = {" + ".join(map(run.named, entry)) or NO_DEFENCE: entry for entry in entries}
    if len(defences) < len(entries):
        raise SpecError("matrix.defences: the same defences are there twice; leave one out")
    for number, entry in enumerate(entries):
        defences_of(entry, where=f"matrix.defences.{number}")
    found: list[Cell] = []
    taken: set[str] = set()
    for (against, entry), (name, settings) in itertools.product(defences.items(), attacks.items()):
        folder = _folder(name, against, taken)
        alone = spec.model_copy(update={"matrix": MatrixSpec(), "attack": settings, "defence": entry})
        found.append(Cell(name, against, folder, alone))
    return found


def audit_matrix(
    spec: RunSpec,
    out: Path,
    *,
    force: bool = False,
    resume: bool = False,
    progress: bool = True,
    command: str = "",
    redact: bool = False,
) -> dict[str, Any]:
    """:func:`gradleak.run.audit` for every cell; the client is simulated once for each defence.

    ``matrix.json`` and ``report.html`` are written anew after each cell, so that finished cells are kept whatever comes. A
    cell that cannot be run (an attack that requires what is not granted, a defence that does not go with the protocol)
    has its error in them, and the others go on.

    Args:
        spec: With ``matrix.attacks`` or ``matrix.defences``.
        out: The folder of the matrix, with a run folder in it for each cell; must be empty or absent unless ``force`` or
            ``resume``.
        force: Overwrite an earlier matrix's files; cells of other names are left alone.
        resume: Keep the cells that are finished and have the same specification; run the others.
        progress: Show progress on standard error.
        command: How a reader of the report can repeat the matrix.
        redact: Keep the figures and no picture.

    Returns:
        The content of ``matrix.json``.

    Raises:
        SpecError: As :func:`cells`.
        OutputError: The folder cannot be used, or, with ``resume``, a cell's folder holds another run.
        GradleakError: No cell could be run: the first one's reason.
    """
    table = cells(spec)
    _, device = run.prepare(table[0].spec.model_copy(update={"defence": []}))
    truth = data.load(spec.data)
    channels, height, width = truth.images.shape[1:]
    models.build(spec.model, image_shape=(channels, height, width))  # a fault of all cells is named before the first one
    check_folder(out, force=force, resume=resume)
    kept = _kept(out, table) if resume else {}
    with open_folder(out, force=force, resume=resume):
        if force:
            (out / MATRIX).unlink(missing_ok=True)
        write_atomically(out / SPEC, dump(spec))
        matrix = _run_cells(
            spec, out, table, truth, kept, device, resume=resume, progress=progress, command=command, redact=redact
        )
    if all(row["error"] is not None for row in matrix["rows"]):
        raise GradleakError(
            f"no cell of the matrix could be run ({out / MATRIX} has all reasons): {matrix['rows'][0]['error']}"
        )
    return matrix


def _run_cells(
    spec: RunSpec,
    out: Path,
    table: list[Cell],
    truth: Truth,
    kept: dict[str, dict[str, Any]],
    device: torch.device,
    *,
    resume: bool,
    progress: bool,
    command: str,
    redact: bool,
) -> dict[str, Any]:
    """One cell after another, until a signal ends one; matrix.json and report.html after each."""
    matrix: dict[str, Any] = {
        "format": "gradleak-matrix",
        "version": 1,
        "attacks": list(dict.fromkeys(cell.attack for cell in table)),
        "defences": list(dict.fromkeys(cell.defence for cell in table)),
        "images": len(truth.images),
        "image_shape": list(truth.images.shape[1:]),
        "rows": [],
        "seed": spec.seed,
        "device": run.device_name(device),
        "threads": torch.get_num_threads(),
        "versions": run.versions(),
        "partial": False,
        "interrupted": None,
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M:%S%z"),
    }
    rows: dict[str, dict[str, Any]] = {name: {} for name in (cell.folder for cell in table)}
    number = 0
    for _, column in itertools.groupby(table, key=lambda cell: cell.defence):
        client: run.Client | GradleakError | None = None
        for cell in column:
            number += 1
            if progress:
                state = " (finished before)" if cell.folder in kept else ""
                print(
                    f"cell {number} of {len(table)}: {cell.attack}, defence {cell.defence}{state}", file=sys.stderr, flush=True
                )
            if cell.folder in kept:
                rows[cell.folder] = _row(cell, kept[cell.folder])
                if number < len(table):
                    continue
            else:
                client = client if client is not None else _simulate(cell.spec)
                rows[cell.folder] = _run(cell, out / cell.folder, client, resume=resume, progress=progress, redact=redact)
            interrupted = rows[cell.folder]["interrupted"]
            matrix |= {"partial": interrupted is not None, "interrupted": interrupted}
            _write(out, matrix, [rows[other.folder] for other in _by_attack(table) if rows[other.folder]], truth)
            if interrupted is not None:
                return matrix
    return matrix


def lines(matrix: dict[str, Any]) -> list[str]:
    """A matrix for people: the verdict, and a table with a line for each cell."""
    head = ("attack", "defence", "SSIM", "worst", "PSNR", "recognisable", "identified", "distortion", "seconds")
    table = [head]
    for row in matrix["rows"]:
        if row["error"] is not None:
            table.append((row["attack"], row["defence"], row["error"]) + ("",) * (len(head) - 3))
            continue
        count = "-" if row["recognisable"] is None else f"{row['recognisable']} of {row['images']}"
        found = "-" if row["identification"] is None else f"{100 * row['identification']:.0f} %"
        numbers = [
            "-" if row[key] is None else f"{row[key]:.{digits}f}"
            for key, digits in (("ssim_mean", 3), ("ssim_worst", 3), ("psnr_mean", 1), ("distortion", 3), ("seconds", 0))
        ]
        table.append((row["attack"], row["defence"], *numbers[:3], count, found, *numbers[3:]))
    # an error is a sentence: it does not widen the column of a number
    widths = [max(len(row[i]) for row in table if i < 2 or row[-1]) for i in range(len(head))]
    rows = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        if row[-1]
        else f"{row[0].ljust(widths[0])}  {row[1].ljust(widths[1])}  error: {row[2]}"
        for row in table
    ]
    return [verdict(matrix), *(row.rstrip() for row in rows)]


def _attacks(spec: RunSpec) -> dict[str, dict[str, Any]]:
    """For people -> name and settings, of each attack of the matrix."""
    entries = [spec.attack] if spec.matrix.attacks is None else spec.matrix.attacks
    shared = {} if spec.matrix.attacks is None else {key: value for key, value in spec.attack.items() if key != "name"}
    attacks: dict[str, dict[str, Any]] = {}
    known: set[str] = set()
    for entry in entries:
        name = entry["name"]
        has = {field.name for field in dataclasses.fields(ATTACKS[name][0])} if name in ATTACKS else set()
        own = {key: value for key, value in entry.items() if key != "name"}
        settings = {key: value for key, value in shared.items() if key in has} | own
        try:
            attack(name, **settings)
        except SpecError as fault:
            raise SpecError(f"matrix.attacks: {fault}") from None
        words = ", ".join(f"{key} {value}" for key, value in own.items())
        label = f"{name} ({words})" if words and spec.matrix.attacks is not None else name
        if label in attacks:
            raise SpecError(f"matrix.attacks: {label!r} is there twice; leave one out")
        attacks[label] = {"name": name, **settings}
        known |= has
    for key in shared.keys() - known:
        raise SpecError(f"attack.{key}: no attack of the matrix has such a setting{nearest(key, known)}")
    return attacks


def _folder(name: str, against: str, taken: set[str]) -> str:
    """A readable folder name of letters, digits, dots and hyphens, another one than those taken; adds it to them."""
    parts = (name, "undefended" if against == NO_DEFENCE else against)
    readable = "--".join(re.sub(r"[^a-z0-9.]+", "-", part.lower())[:60].strip("-.") for part in parts)
    folder = next(f for n in itertools.count(1) if (f := readable if n == 1 else f"{readable}--{n}") not in taken)
    taken.add(folder)
    return folder


def _kept(out: Path, table: list[Cell]) -> dict[str, dict[str, Any]]:
    """Cell folder -> result.json of the cells that are finished already."""
    if (out / RESULT).exists():
        raise OutputError(f"{out}: holds a single run, no matrix; choose another --out")
    kept = {}
    for cell in table:
        settings = {key: value for key, value in cell.spec.attack.items() if key != "name"}
        text = dump(run.resolve(cell.spec, attack(str(cell.spec.attack["name"]), **settings)))
        result = run.check_resumable(out / cell.folder, text)
        if result is None:
            continue
        try:
            _row(cell, result)
        except (KeyError, TypeError, AttributeError) as fault:
            raise OutputError(
                f"{out / cell.folder / RESULT}: damaged ({fault!r}); remove the folder to run this cell again"
            ) from None
        kept[cell.folder] = result
    return kept


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"{path}: cannot be read: {error}") from None


def _simulate(spec: RunSpec) -> run.Client | GradleakError:
    """The client of a column, or why there is none."""
    try:
        return run.simulate_client(spec)
    except GradleakError as fault:
        return fault


def _run(
    cell: Cell, folder: Path, client: run.Client | GradleakError, *, resume: bool, progress: bool, redact: bool
) -> dict[str, Any]:
    """A cell's row, after its run."""
    command = shlex.join(["gradleak", "audit", str(folder / SPEC)])
    try:
        if isinstance(client, GradleakError):
            raise client
        result = run.audit(
            cell.spec, folder, force=not resume, resume=resume, progress=progress, command=command, redact=redact, client=client
        )
    except OutputError:  # the disk is full, say: the next cell would not fare better
        raise
    except GradleakError as fault:
        return _row(cell, None, error=str(fault))
    return _row(cell, result)


def _row(cell: Cell, result: dict[str, Any] | None, *, error: str | None = None) -> dict[str, Any]:
    """What matrix.json says of a cell."""
    result = result or {}
    metrics, costs = result.get("metrics") or {}, result.get("defence_costs") or []
    scores = [score for score in (result.get("per_image") or {}).get("ssim") or [] if score is not None]
    found, cost = result.get("identification") or {}, result.get("cost") or {}

    def of(metric: str, key: str) -> float | None:
        return (metrics.get(metric) or {}).get(key)

    return {
        "attack": cell.attack,
        "defence": cell.defence,
        "kind": " + ".join(defence.name for defence in cell.spec.defence) or NO_DEFENCE,
        "folder": cell.folder,
        "distortion": None if error is not None else costs[-1]["total"] if costs else 0.0,
        "epsilon": next((each["epsilon"] for each in costs if each["epsilon"] is not None), None),
        "ssim_mean": of("ssim", "mean"),
        "ssim_worst": of("ssim", "worst"),
        "psnr_mean": of("psnr", "mean"),
        "recognisable": sum(score >= RECOGNISABLE_SSIM for score in scores) if scores else None,
        "images": len(result["assignment"]) if error is None else None,
        "labels_right": (result.get("labels") or {}).get("accuracy"),
        "identification": (found.get("rate") or {}).get("mse"),
        "candidates": found.get("candidates"),
        "matching_loss": result.get("matching_loss"),
        "rounds": cost["rounds"] if error is None else None,
        "seconds": cost["seconds"] if error is None else None,
        "verdict": result.get("verdict"),
        "interrupted": result.get("interrupted"),
        "error": error,
    }


def _by_attack(table: list[Cell]) -> list[Cell]:
    order = list(dict.fromkeys(cell.attack for cell in table))
    return sorted(table, key=lambda cell: order.index(cell.attack))


def _write(out: Path, matrix: dict[str, Any], rows: list[dict[str, Any]], truth: Truth) -> None:
    """matrix.json and report.html with the rows that there are."""
    matrix["rows"] = rows
    pictures = {row["folder"]: _thumbnails(out / row["folder"]) for row in rows if row["error"] is None}
    thumbnails = {folder: images for folder, images in pictures.items() if images is not None}
    page = render_matrix(MatrixData(matrix=matrix, originals=truth.images, thumbnails=thumbnails))
    write_atomically(out / REPORT, [page.encode("utf-8", "replace")])
    write_atomically(out / MATRIX, json.dumps(matrix, indent=1, allow_nan=False) + "\n")


def _thumbnails(folder: Path) -> Tensor | None:
    """The reconstructions of the first originals, or None where a run kept no pictures."""
    if not (folder / RECONSTRUCTION).is_file():
        return None
    images = read_tensors(folder / RECONSTRUCTION, error=OutputError)[0]["images"]
    assignment = json.loads(_text(folder / RESULT))["assignment"]
    return images[assignment[:THUMBNAILS]]
