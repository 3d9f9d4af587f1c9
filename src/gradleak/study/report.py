"""The report of studies: tables beside published figures, curves, picture grids; as Markdown and as one HTML page."""

from __future__ import annotations

import base64
import hashlib
import html
import logging
import math
import os
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup
from torch import Tensor

from gradleak import data
from gradleak.errors import DataError, GradleakError, OutputError, SpecError
from gradleak.evaluate import RECOGNISABLE_SSIM
from gradleak.files import write_atomically
from gradleak.folder import FIGURES, REPORT, SPEC
from gradleak.report.figures import Series, comparison_png, panels_svg
from gradleak.report.html import duration, environment, one_line
from gradleak.results import read_run
from gradleak.spec import DataSpec, load
from gradleak.study.spec import Published, StudySpec
from gradleak.study.spec import cells as cells_of
from gradleak.study.table import CheckedRow, Group, canonical, checked, grouped, mean_of, text_of

#: What ``pictures`` may be -> most pixels of the longer side of an image in a grid.
PICTURES = {"all": 128, "thumbnails": 64, "none": 0}

#: Pixels up to which small images are enlarged, by whole factors.
ENLARGED = 64

#: Metric -> its name and the digits shown of it.
METRICS = {"ssim": ("SSIM", 3), "fsim": ("FSIM", 3), "psnr": ("PSNR", 2), "lpips": ("LPIPS", 3)}

#: Panel of a curve -> metric.
PANELS = {"SSIM": "ssim", "PSNR (dB)": "psnr"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Figure:
    """A file under ``figures/``, and what is said of it."""

    path: Path
    title: str
    note: str = ""

    @property
    def uri(self) -> str:
        kind = "svg+xml" if self.path.suffix == ".svg" else "png"
        return f"data:image/{kind};base64,{base64.b64encode(self.path.read_bytes()).decode('ascii')}"


def write_report(
    studies: list[StudySpec], rows: list[dict[str, Any]], to: Path, *, cells: Path | None = None, pictures: str = "all"
) -> list[Path]:
    """Write ``report.md``, ``report.html`` and ``figures/`` into a folder; the page has its pictures within.

    A line of a table is a mean over the seeds, with the sample standard deviation where there are two or more. Cells that
    are not finished are named, and are in no mean that has finished ones.

    Args:
        studies: What is reported, in this order.
        rows: Of the store. Those of other studies are left out.
        to: The folder; made if it is not there.
        cells: The folder that has a run folder for each cell, for links and pictures. None: tables and curves are made of
            the rows alone, and the picture grids that ``figures/`` has of the same cells stay.
        pictures: ``all``: images of at most 128 pixels a side; ``thumbnails``: 64; ``none``: no picture.

    Returns:
        The files that the report consists of.

    Raises:
        OutputError: A row is not what the store writes, or the folder cannot be written.
        SpecError: ``pictures`` is none of these.
    """
    if pictures not in PICTURES:
        raise SpecError(f"pictures: {pictures!r}; expected one of {', '.join(PICTURES)}")
    found = [checked(row, number) for number, row in enumerate(rows)]
    try:
        (to / FIGURES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{to}: cannot be used as the report's folder: {error.strerror or error}") from None
    parts = []
    for study in studies:
        place = {cell.key: number for number, cell in enumerate(cells_of(study))}
        own = [row for row in found if (row.study, row.size) == (study.name, study.size)]
        own.sort(key=lambda row: place.get(row.cell, len(place)))  # rows of a file are in the order of their keys
        parts.append(_study(study, own, to, cells, PICTURES[pictures]))
    templates = environment()
    templates.filters["md"] = _markdown
    values = {
        "studies": parts,
        "done": sum(part["done"] for part in parts),
        "all": sum(part["all"] for part in parts),
        "threshold": RECOGNISABLE_SSIM,
        "metrics": [name for name, _ in METRICS.values()],
        "sections": [("summary", "Summary"), *((part["id"], part["title"]) for part in parts)],
        "private": any(figure.path.suffix == ".png" for part in parts for figure in part["figures"]),
    }
    written = [to / "report.md", to / "report.html"]
    for path, template in zip(written, ("study.md", "study.html"), strict=True):
        text = templates.get_template(template).render(values)
        write_atomically(path, [text.encode("utf-8", "replace")])
    return [*written, *(figure.path for part in parts for figure in part["figures"])]


def _study(study: StudySpec, rows: list[CheckedRow], to: Path, cells: Path | None, pixels: int) -> dict[str, Any]:
    """What the templates show of one study."""
    groups = grouped(rows)
    published = [m for m in METRICS if any(g.published and getattr(g.published, m) for g in groups)]
    heads = [head for m, (name, _) in METRICS.items() for head in ([name, "published"] if m in published else [name])]
    links = {row.cell: _link(row, to, cells) for row in rows}
    figures, notes = _curves(study, groups, to)
    more, reasons = _pictures(study, groups, to, cells, pixels)
    best_first = sorted((g for g in groups if g.counted), key=lambda g: -(g.over_seeds("ssim") or (-1.0,))[0])
    return {
        "id": f"{study.name}-{study.size}",
        "title": one_line(study.title or study.name),
        "name": study.name,
        "size": study.size,
        "about": study.about,
        "done": sum(row.state == "finished" for row in rows),
        "all": len(rows),
        "best": _headline(best_first[0]) if best_first else None,
        "worst": _headline(best_first[-1]) if len(best_first) > 1 else None,
        "heads": [*heads, "worst SSIM", "recognisable", "labels", "rounds", "time"],
        "lines": [_line(group, published, links) for group in groups],
        "runs": [_run(row, links) for row in rows if row.state != "missing"],
        "figures": [*figures, *more],
        "notes": [*notes, *reasons],
        "provenance": _provenance(rows),
    }


def _line(group: Group, published: list[str], links: dict[str, str | None]) -> dict[str, Any]:
    """A line of a study's table."""
    values = []
    for metric, (_, digits) in METRICS.items():
        values.append(text_of(group.over_seeds(metric), digits))
        if metric in published:
            values.append(_stated(group.published, metric))
    worst = [value for row in group.counted if (value := (row.worst or {}).get("ssim")) is not None]
    labels = {row.labels for row in group.counted if isinstance(row.labels, str)}
    right, seconds, found, rounds = map(group.over_seeds, ("labels", "seconds", "recognisable", "rounds"))
    values += [
        f"{min(worst):.3f}" if worst else "–",
        f"{f'{found[0]:.1f}'.removesuffix('.0')} of {group.counted[0].batch}" if found else "–",
        f"{100 * right[0]:.3g} %" if right else ", ".join(sorted(labels)) or "–",
        f"{rounds[0]:,.0f}" if rounds else "–",
        duration(seconds[0]) if seconds else "–",
    ]
    source = group.published
    return {
        "label": group.label,
        "published": ", ".join(filter(None, (source.method, source.note))) if source else "",
        "seeds": [(row.seed, links[row.cell], row.cell) for row in group.counted],
        "values": values if group.counted else [],
        "notes": [f"seed {row.seed}: {state}" for row in group.rows if (state := _unfinished(row))],
    }


def _unfinished(row: CheckedRow) -> str:
    """Why a cell is not finished; ``""`` if it is."""
    if row.state == "finished":
        return ""
    if row.state == "missing":
        return "not run yet"
    reached = f"{row.rounds:,} rounds" if row.rounds is not None else "not measured yet"
    text = one_line(row.error or (reached if row.state == "partial" else "no reason known"))
    return f"{row.state}, {re.sub(r'[0-9]{4,}(?= )', lambda number: f'{int(number[0]):,}', text)}"


def _run(row: CheckedRow, links: dict[str, str | None]) -> dict[str, Any]:
    """A line of the list of runs."""
    return {
        "label": row.label,
        "seed": row.seed,
        "values": [text_of(mean_of([getattr(row, metric)]), digits) for metric, (_, digits) in METRICS.items()],
        "rounds": "–" if row.rounds is None else f"{row.rounds:,}",
        "time": "–" if row.seconds is None else duration(row.seconds),
        "state": _unfinished(row),
        "cell": row.cell,
        "link": links[row.cell],
    }


def _headline(group: Group) -> dict[str, str]:
    return {
        "label": group.label,
        "measured": text_of(group.over_seeds("ssim"), 3),
        "published": _stated(group.published, "ssim"),
    }


def _provenance(rows: list[CheckedRow]) -> list[tuple[str, str]]:
    """Name and what was found of it, each once."""
    ran = [row for row in rows if row.state != "missing"]
    torch = sorted({row.versions["torch"] for row in ran if row.versions and row.versions.get("torch")})
    dates = sorted({row.date[:10] for row in ran if row.date})
    commits, commands = (_once(getattr(row, key) for row in ran) for key in ("commit", "command"))
    found = {
        "commit": ", ".join(commit[:12] for commit in commits),
        "device": ", ".join(_once(row.device for row in ran)),
        "threads": ", ".join(sorted({str(row.threads) for row in ran if row.threads})),
        "torch": ", ".join(torch),
        "dates": f"{dates[0]} to {dates[-1]}" if len(dates) > 1 else "".join(dates),
        "command": "; ".join(commands[:3]) + (f"; and {len(commands) - 3} more" if len(commands) > 3 else ""),
    }
    return [(name, one_line(value)) for name, value in found.items() if value]


def _curves(study: StudySpec, groups: list[Group], to: Path) -> tuple[list[_Figure], list[str]]:
    """SSIM and PSNR over each axis of ``report.curves``, and over the rounds; what cannot be drawn is said."""
    figures, notes = [], []
    for axis in [*study.report.curves, *(["round"] if study.report.rounds else [])]:
        name, ticks = axis.rpartition(".")[2].replace("_", " "), []
        if axis == "round":
            drawn = {panel: _over_rounds(groups, metric) for panel, metric in PANELS.items()}
        else:
            values = list({canonical(v): v for group in groups if (v := group.settings.get(axis)) is not None}.values())
            if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
                ticks = [str(value) for value in values]
            places = {canonical(value): place if ticks else value for place, value in enumerate(values)}
            drawn = {panel: _over_axis(groups, axis, places, metric) for panel, metric in PANELS.items()}
        drawn = {panel: curves for panel, curves in drawn.items() if any(series.points for series in curves)}
        if not drawn:
            notes.append(f"No curve over {axis}: no run has such results yet.")
            continue
        path = to / FIGURES / f"{study.name}-{study.size}-over-{re.sub(r'[^A-Za-z0-9]+', '-', axis)}.svg"
        panels_svg(path, drawn, below=name, ticks=ticks)
        figures.append(_Figure(path, f"Over {name}", "Means over the seeds and their standard deviation."))
    return figures, notes


def _over_axis(groups: list[Group], axis: str, places: Mapping[str, float], metric: str) -> list[Series]:
    """A curve for each combination of the other settings, in the order of their places."""
    curves: dict[str, list[Group]] = {}
    for group in groups:
        if group.settings.get(axis) is not None:
            curves.setdefault(canonical({key: value for key, value in group.settings.items() if key != axis}), []).append(group)
    found = []
    for members in curves.values():
        points, stated = [], []
        for group in sorted(members, key=lambda group: places[canonical(group.settings[axis])]):
            at = places[canonical(group.settings[axis])]
            if (value := group.over_seeds(metric)) and math.isfinite(value[0]):
                points.append((at, value[0], value[1]))
            if group.published and (figure := getattr(group.published, metric)):
                stated.append((at, figure[0]))
        value, last = members[0].settings[axis], axis.rpartition(".")[2].replace("_", " ")
        words = [word for word in members[0].label.split(", ") if word not in (str(value), f"{last} {value}")]
        if points or stated:
            found.append(Series(", ".join(words) or "measured", points, stated))
    return found


def _over_rounds(groups: list[Group], metric: str) -> list[Series]:
    """A curve for each line of the table, at the rounds that all its seeds have."""
    found = []
    for group in groups:
        qualities = [row.quality for row in group.counted if row.quality and row.quality.get(metric)]
        runs = [
            {r: v for r, v in zip(q["round"], q[metric], strict=False) if r is not None and v is not None} for q in qualities
        ]
        shared = sorted(set.intersection(*map(set, runs))) if runs else []
        values = [(r, mean_of(run[r] for run in runs)) for r in shared]
        points = [(r, value[0], value[1]) for r, value in values if value and math.isfinite(value[0])]
        if points:
            found.append(Series(group.label, points))
    return found


def _pictures(
    study: StudySpec, groups: list[Group], to: Path, cells: Path | None, pixels: int
) -> tuple[list[_Figure], list[str]]:
    """A grid for each batch: the truth above what each line's first seed made of it."""
    if not (count := study.report.pictures) or not pixels:
        return [], []
    batches: dict[str, list[CheckedRow]] = {}
    for group in groups:
        if group.counted:
            row = group.counted[0]
            own = {key: value for key, value in row.settings.items() if key.startswith("data.")}
            batches.setdefault(canonical([row.dataset, row.batch, row.image_shape, own]), []).append(row)
    figures, notes = [], []
    for rows in batches.values():
        first, boxed = rows[0], study.report.boxed
        shown = min(count, first.batch or count)
        digest = hashlib.sha256(" ".join(row.cell for row in rows).encode()).hexdigest()[:8]
        path = to / FIGURES / f"{study.name}-{study.size}-pictures-{digest}.png"
        drawn, reasons = _reconstructions(rows, cells, count)
        if drawn and not (reasons and path.is_file()):  # an earlier grid may have what is not at hand now
            side = pixels if max(drawn["truth"].shape[2:]) > ENLARGED else ENLARGED
            comparison_png(path, drawn, pixels=side, columns=study.report.columns, boxed=boxed)
            notes += reasons
        if not path.is_file():
            notes += reasons
            continue
        note = f"The truth above what was rebuilt of it, assigned one-to-one; {shown} of {first.batch} images"
        note += f", seed {first.seed}" * (len({row.seed for row in rows}) == 1)
        note += f"; the first {boxed} are in the box" * (0 < boxed < shown)
        title = f"Pictures: {first.dataset}, {first.batch} images" if len(batches) > 1 else "Pictures"
        figures.append(_Figure(path, title, f"{note}."))
    return figures, list(dict.fromkeys(notes))


def _reconstructions(rows: list[CheckedRow], cells: Path | None, count: int) -> tuple[dict[str, Tensor], list[str]]:
    """Names and images of a grid's rows, the truth first, and why some are not there; nothing if there is no truth."""
    drawn: dict[str, Tensor] = {}
    reasons: dict[str, list[str]] = {}
    batch: DataSpec | None = None
    for row in rows:
        if cells is None or not (folder := cells / row.cell).is_dir():
            reasons.setdefault("the run folder is not at hand", []).append(row.label)
            continue
        try:
            run, own = read_run(folder), load(folder / SPEC).data
            if batch is None:
                drawn["truth"] = data.load(own.model_copy(update={"batch": min(own.batch, count)})).images
                batch = own
            elif own != batch:
                raise OutputError(f"{folder}: other images than those of {rows[0].label!r}")
        except GradleakError as error:  # its text may name paths of this machine, which are no part of a report
            log.warning("no pictures of %s: %s", row.cell, error)
            why = (
                f"the images of {row.dataset} cannot be read"
                if isinstance(error, DataError)
                else "the run folder has no pictures, or is damaged"
            )
            reasons.setdefault(why, []).append(row.label)
            continue
        order = (run.result.get("assignment") or list(range(len(run.images))))[:count]
        name = f"{textwrap.fill(row.label, 24)}\nSSIM {text_of(mean_of([row.ssim]), 2)}"
        drawn[name if name not in drawn else f"{name}\n{row.cell}"] = run.images[order]
    said = [
        f"No pictures of {'; '.join(names[:4])}{f' and {len(names) - 4} more' * (len(names) > 4)}: {why}."
        for why, names in reasons.items()
    ]
    return drawn if len(drawn) > 1 else {}, said


def _link(row: CheckedRow, to: Path, cells: Path | None) -> str | None:
    """Where a cell's run is, from the report's folder."""
    if cells is None or not (folder := cells / row.cell).is_dir():
        return None
    there = folder / REPORT if (folder / REPORT).is_file() else folder
    return quote(Path(os.path.relpath(there.resolve(), to.resolve())).as_posix())


def _stated(published: Published | None, metric: str) -> str:
    """A published figure with two digits, as papers give them."""
    return text_of(getattr(published, metric) if published else None, 2)


def _once(values: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def _markdown(text: Any) -> Markup:
    """Text that stays text in Markdown, in a table too."""
    return Markup(re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(one_line(str(text)), quote=False)))
