"""One self-contained HTML page about a matrix of runs: attacks down, defences across, a cell for each pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from torch import Tensor

from gradleak.evaluate import RECOGNISABLE_SSIM
from gradleak.report.figures import MARKERS, Line, lines_svg
from gradleak.report.html import environment

#: What matrix.json calls the defence of a client that has none.
NO_DEFENCE = "none"
THUMBNAILS = 4
_COLOURS = 8


@dataclass(frozen=True)
class MatrixData:
    """What the report of a matrix shows.

    Attributes:
        matrix: What matrix.json holds.
        originals: The private images, B x C x H x W; None where there are no pictures any more.
        thumbnails: Folder of a finished cell -> its reconstructions of the first :data:`THUMBNAILS` originals. A cell
            without pictures is left out; where all are, no original is shown either.
    """

    matrix: dict[str, Any]
    originals: Tensor | None
    thumbnails: dict[str, Tensor]


def render_matrix(data: MatrixData) -> str:
    """The report as HTML text: the same text for the same data, everything in it, all foreign text escaped."""
    matrix = data.matrix
    by_pair = {(row["attack"], row["defence"]): row for row in matrix["rows"]}
    costs = {}
    for row in matrix["rows"]:
        if row["distortion"] is not None:
            costs[row["defence"]] = (row["distortion"], row["epsilon"])
    measured = [row for row in matrix["rows"] if row["ssim_mean"] is not None]
    colours = {attack: f"var(--series-{i % _COLOURS})" for i, attack in enumerate({row["attack"]: 0 for row in measured})}
    kinds = list({row["kind"]: 0 for row in measured if row["distortion"]})
    lines = [
        Line(points, colour, kinds.index(kind))
        for attack, colour in colours.items()
        for kind in kinds
        if len(points := _points(measured, attack, kind)) > 1
    ]
    svg = lines_svg(lines, label="Mean SSIM", right="relative distortion of the update")
    size = max(matrix["image_shape"][-2:])
    return (
        environment()
        .get_template("matrix.html")
        .render(
            matrix=matrix,
            cells=by_pair,
            costs=costs,
            verdict=verdict(matrix),
            shape="×".join(str(n) for n in matrix["image_shape"]),
            images=matrix["images"],
            originals=list(data.originals[:THUMBNAILS]) if data.thumbnails and data.originals is not None else [],
            thumbnails={folder: list(images[:THUMBNAILS]) for folder, images in data.thumbnails.items()},
            small=size <= 128,
            threshold=RECOGNISABLE_SSIM,
            # Markup: our own strokes and numbers, no text of the user's is in it
            plot=Markup(svg),
            colours=colours,
            markers={kind: MARKERS[i % len(MARKERS)] for i, kind in enumerate(kinds)},
        )
    )


def _points(rows: list[dict[str, Any]], attack: str, kind: str) -> list[tuple[float, float]]:
    """(distortion, mean SSIM) of an attack against one kind of defence, from the undefended client on."""
    return sorted(
        (row["distortion"], row["ssim_mean"]) for row in rows if row["attack"] == attack and row["kind"] in (kind, NO_DEFENCE)
    )


def verdict(matrix: dict[str, Any]) -> str:
    """The matrix in at most three sentences: how many runs finished, the strongest attack, the defence that leaks least."""
    done = [row for row in matrix["rows"] if row["error"] is None]
    measured = [row for row in done if row["ssim_mean"] is not None]
    text = f"{len(done)} of {len(matrix['attacks']) * len(matrix['defences'])} runs finished."
    if not measured:
        return text
    closest = max(measured, key=lambda row: row["ssim_mean"])
    against = "without a defence" if closest["distortion"] == 0 else f"against {closest['defence']}"
    text += (
        f" The closest reconstructions are those of {closest['attack']} {against}: mean SSIM {closest['ssim_mean']:.2f}, "
        f"{closest['recognisable']} of {closest['images']} images recognisable (SSIM >= {RECOGNISABLE_SSIM:.2f})."
    )
    strongest: dict[str, dict[str, Any]] = {}
    for row in measured:
        if row["distortion"] and row["ssim_mean"] >= strongest.get(row["defence"], row)["ssim_mean"]:
            strongest[row["defence"]] = row
    if strongest:
        least = min(strongest.values(), key=lambda row: row["ssim_mean"])
        text += (
            f" Of the defences {least['defence']} leaks least: mean SSIM {least['ssim_mean']:.2f} at most, for a relative "
            f"distortion of {least['distortion']:.3g}."
        )
    return text
