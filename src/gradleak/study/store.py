"""Rows: one for each cell of a study, made from the run folders at any time; as Parquet and as JSON."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gradleak.checkpoint import Checkpoint
from gradleak.errors import GradleakError, OutputError
from gradleak.evaluate import RECOGNISABLE_SSIM
from gradleak.files import parse_json, read_text, write_atomically
from gradleak.folder import CHECKPOINT, ROWS
from gradleak.results import read_result
from gradleak.study.runner import CELLS, read_cell, state
from gradleak.study.spec import Cell, Published, StudySpec, all_cells

Row = dict[str, Any]

#: Metrics of a row: means over the images.
METRICS = ("psnr", "ssim", "fsim", "lpips")

#: What tells a row from any other.
IDENTITY = ("study", "size", "cell")

MAX_ROWS_BYTES = 256_000_000


def rows(studies: list[StudySpec], out: Path) -> list[Row]:
    """A row for each cell, from the run folders in ``out/cells``; ``state`` is ``missing`` where there is none.

    Keys: ``study, size, cell, dataset, image_shape, batch, model, method, label, settings, seed, rounds, seconds, psnr, ssim,
    fsim, lpips, worst, recognisable, labels, matching_loss, device, processes, threads, versions, commit, command, date,
    quality, published, state, error``. Metrics are means over the images, one to one; ``worst`` has the worst image's;
    ``recognisable`` counts images of SSIM .6 or more; ``labels`` is ``granted`` or the accuracy of the recovered ones;
    ``quality`` has SSIM and PSNR of some rounds; ``published`` is what the paper states.
    """
    return [row(cell, out / CELLS / cell.key) for cell in all_cells(studies)]


def row(cell: Cell, folder: Path) -> Row:
    """One cell's row, from its run folder."""
    about, there = read_cell(folder), state(folder)
    result: dict[str, Any] = {}
    error = about.get("error")
    if there in ("finished", "partial"):
        try:
            result = read_result(folder)
        except GradleakError as fault:
            error = None if there == "partial" else str(fault)
    metrics, cost, labels = (result.get(key) or {} for key in ("metrics", "cost", "labels"))
    scores = [score for score in (result.get("per_image") or {}).get("ssim") or [] if score is not None]
    quality = result.get("quality") or {}
    done = Checkpoint(folder / CHECKPOINT).done() if there == "partial" else ""
    return {
        "study": cell.study,
        "size": cell.size,
        "cell": cell.key,
        "dataset": cell.dataset,
        "image_shape": result.get("image_shape"),
        "batch": cell.spec.data.batch,
        "model": _model(cell),
        "method": str(cell.spec.attack["name"]),
        "label": cell.label,
        "settings": cell.settings,
        "seed": cell.seed,
        "rounds": cost.get("rounds"),
        "seconds": cost.get("seconds"),
        **{name: (metrics.get(name) or {}).get("mean") for name in METRICS},
        "worst": {name: (metrics.get(name) or {}).get("worst") for name in METRICS},
        "recognisable": sum(score >= RECOGNISABLE_SSIM for score in scores) if scores else None,
        "labels": "granted" if labels.get("rule") == "known" else labels.get("accuracy"),
        "matching_loss": result.get("matching_loss"),
        "device": result.get("device"),
        "processes": result.get("processes"),
        "threads": result.get("threads"),
        "versions": result.get("versions"),
        "commit": about.get("commit"),
        "command": f"gradleak study run {cell.study}.toml",
        "date": result.get("date"),
        "quality": {key: quality.get(key) for key in ("round", "ssim", "psnr")} if quality.get("ssim") else None,
        "published": _published(cell.published),
        "state": there,
        "error": error or (done or result.get("stopped") if there == "partial" else None),
    }


def measured(row: Row) -> bool:
    """Whether a row has a result to count: of a finished run, or of one that was interrupted, after the ``rounds`` it says."""
    return row["state"] in ("finished", "partial") and (row["ssim"] is not None or row.get("psnr") is not None)


def _model(cell: Cell) -> str:
    model = cell.spec.model
    width = "" if model.width is None else f" of width {model.width}"
    kind = "" if model.activation == "model" else f", {model.activation}"
    return f"{model.name.rpartition('/')[2] if ':' in model.name else model.name}{width}{kind}"


def _published(published: Published | None) -> Row | None:
    return None if published is None else published.model_dump(mode="json", exclude={"where"})


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Old and new rows, one for each study, size and cell: a new finished one, else the old one.

    Rows of a study's cells that are no longer in it are kept only if none of its cells is among the new ones.
    """
    new = list(new)
    there = {_identity(row): row for row in old}
    studies = {(row["study"], row["size"]) for row in new}
    current = {_identity(row) for row in new}
    kept = {key: row for key, row in there.items() if (row["study"], row["size"]) not in studies or key in current}
    for found in new:
        before = kept.get(_identity(found))
        if before is None or found["state"] == "finished" or before["state"] != "finished":
            kept[_identity(found)] = found
    return [kept[key] for key in sorted(kept)]


def _identity(row: Row) -> tuple[str, ...]:
    return tuple(str(row[key]) for key in IDENTITY)


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON file; none where there is no such file.

    Raises:
        OutputError: It holds no rows; says what it holds.
    """
    if not path.exists():
        return []
    text = read_text(path, most=MAX_ROWS_BYTES, what="rows of studies", error=OutputError)
    found = parse_json(text, where=str(path), error=OutputError)
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise OutputError(f"{path}: expected a list of rows, as `gradleak study report --rows` writes it")
    for number, each in enumerate(found):
        if missing := [key for key in (*IDENTITY, "label", "settings", "seed", "state", *METRICS) if key not in each]:
            raise OutputError(f"{path}: row {number} has no {missing[0]!r}; was it written by an older version?")
    return found


def write_rows(path: Path, found: list[Row]) -> None:
    """Rows as JSON, one to a line, so that a change of one is a change of one line."""
    lines = ",\n".join(json.dumps(each, allow_nan=False, ensure_ascii=False) for each in found)
    write_atomically(path, f"[\n{lines}\n]\n" if found else "[]\n")


def write_parquet(path: Path, found: list[Row]) -> None:
    """Rows as a Parquet file: numbers and texts as columns, tables and lists as JSON texts."""
    import pyarrow as pa  # a large import that nothing else needs
    from pyarrow import parquet

    texts = (
        "study",
        "size",
        "cell",
        "dataset",
        "model",
        "method",
        "label",
        "device",
        "commit",
        "command",
        "date",
        "state",
        "error",
    )
    numbers = {
        "batch": pa.int64(),
        "seed": pa.int64(),
        "rounds": pa.int64(),
        "recognisable": pa.int64(),
        "threads": pa.int64(),
        "processes": pa.int64(),
    }
    numbers |= {name: pa.float64() for name in ("seconds", *METRICS, "matching_loss")}
    nested = ("image_shape", "settings", "worst", "labels", "versions", "quality", "published")
    columns = {name: pa.array([each.get(name) for each in found], pa.string()) for name in texts}
    columns |= {name: pa.array([each.get(name) for each in found], kind) for name, kind in numbers.items()}
    columns |= {name: pa.array([json.dumps(each.get(name)) for each in found], pa.string()) for name in nested}
    content = io.BytesIO()
    parquet.write_table(pa.table(columns), content)
    write_atomically(path, [content.getvalue()])


def status_lines(found: list[Row]) -> list[str]:
    """How far studies are, for people: a line for each, and one for each cell that is unfinished or failed."""
    lines = []
    for study, size in dict.fromkeys((each["study"], each["size"]) for each in found):
        own = [each for each in found if (each["study"], each["size"]) == (study, size)]
        counts = Counter(each["state"] for each in own)
        rest = ", ".join(f"{counts[name]} {name}" for name in ("partial", "failed", "missing") if counts[name])
        minutes = sum(each["seconds"] or 0 for each in own) / 60
        lines.append(
            f"{study} ({size}): {counts['finished']} of {len(own)} cells finished{f'; {rest}' if rest else ''}; "
            f"{minutes:.0f} minutes of attacks"
        )
        lines += [
            f"  {each['label']}, seed {each['seed']}: {each['state']}{', ' + each['error'] if each['error'] else ''}"
            for each in own
            if each["state"] in ("partial", "failed")
        ]
    return lines


def save(studies: list[StudySpec], out: Path) -> list[Row]:
    """Make ``rows.parquet`` and ``rows.json`` of a study's folder anew from its run folders; returns the rows."""
    found = rows(studies, out)
    everything = merge(read_rows(out / ROWS), found)
    write_rows(out / ROWS, everything)
    write_parquet(out / "rows.parquet", everything)
    return found
