"""One self-contained HTML page about a matrix of runs: attacks down, defences across, a cell for each pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from torch import Tensor

from gradleak.evaluate import RECOGNISABLE_SSIM
from gradleak.report.figures import MARKERS, Line, lines_svg
from gradleak.report.html import environment, repeat_lines

#: What matrix.json calls the defence of a client that has none.
NO_DEFENCE = "none"
THUMBNAILS = 4
_COLOURS = 8
_COSTS = (
    (
        "distortion",
        "relative distortion of the update",
        "over the distortion: a defence is good where its curve falls far to the left",
    ),
    ("epsilon", "epsilon of DP-SGD", "over epsilon: from strong privacy on the left to weak on the right"),
)


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
    plots = []
    for key, right, note in _COSTS:
        lines = [
            Line(points, colour, kinds.index(kind))
            for attack, colour in colours.items()
            for kind in kinds
            if len(points := _points(measured, attack, kind, key)) > 1
        ]
        # Markup: our own strokes and numbers, no text of the user's is in it
        if svg := lines_svg(lines, label="Mean SSIM", right=right):
            plots.append((note, Markup(svg)))
    height, width = matrix["image_shape"][-2:]
    has_pictures = bool(data.thumbnails) and data.originals is not None
    columns = ["distortion", "SSIM", "worst", "PSNR dB", "recognisable", "identified", "rounds", "time"]
    if any(row["epsilon"] is not None for row in matrix["rows"]):
        columns.insert(1, "epsilon")
    sections = [("matrix", "Matrix"), ("cost", "Leak against cost"), ("numbers", "Numbers"), ("repeat", "How to repeat")]
    return (
        environment()
        .get_template("matrix.html")
        .render(
            matrix=matrix,
            sections=[(key, name) for key, name in sections if key != "cost" or plots],
            cells=by_pair,
            costs=costs,
            columns=columns,
            verdict=verdict(matrix).replace(" >= ", " ≥ "),
            shape="×".join(str(n) for n in matrix["image_shape"]),
            images=matrix["images"],
            width=width,
            height=height,
            private=has_pictures,
            lossless=max(height, width) <= 64,
            originals=list(data.originals[:THUMBNAILS]) if has_pictures and data.originals is not None else [],
            thumbnails={folder: list(images[:THUMBNAILS]) for folder, images in data.thumbnails.items()},
            small=max(height, width) <= 128,
            threshold=RECOGNISABLE_SSIM,
            plots=plots,
            colours=colours,
            markers={kind: MARKERS[i % len(MARKERS)] for i, kind in enumerate(kinds)},
            repeat=repeat_lines(matrix),
        )
    )


def _points(rows: list[dict[str, Any]], attack: str, kind: str, key: str) -> list[tuple[float, float]]:
    """(cost, mean SSIM) of an attack against one kind of defence, from the undefended client on where that has a cost."""
    return sorted(
        (row[key], row["ssim_mean"])
        for row in rows
        if row["attack"] == attack and row["kind"] in (kind, NO_DEFENCE) and row[key] is not None
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
