"""Pictures and curves: tensors to PNG, the grid of truth above reconstruction, SVG curves in the page's own colours."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gradleak.files import write_atomically

MAX_POINTS = 600
MAX_GRID_WIDTH = 1600
#: Bytes of a comparison up to which it is kept without loss.
MAX_LOSSLESS = 400_000

# Drawn with these, then replaced by the page's own variables, so that a curve changes with the page's colour scheme.
_PAGE_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--line)",
    "#030303": "var(--accent)",
    "#040404": "var(--muted)",
}
_INK, _LINE, _ACCENT, _MUTED = _PAGE_COLOURS
#: Signs of :class:`Line` for the text of a page, and the same as matplotlib calls them.
MARKERS = "●■◆▲▼✚✖★"
_SHAPES = "osD^vPX*"
_BOX = "#d6281f"
_SERIES = ("#1560a8", "#b3450f", "#2d7a3a", "#7a3f9d", "#8a6600", "#a8255e", "#1f737c", "#5c6168")


def picture(image: Tensor, *, longest: int | None = None) -> Image.Image:
    """An image to look at: C x H x W, clamped to [0, 1], as 8 bits.

    Three channels or more show the first three as red, green and blue; one or two show the first as grey.
    Values that are not finite show as black.

    Args:
        image: C x H x W.
        longest: Shrink (area average) so that neither side exceeds this many pixels.
    """
    pixels = image.detach().float().cpu().nan_to_num(0.0, 0.0, 0.0).clamp(0, 1).mul(255).round().byte().numpy()
    shown = Image.fromarray(np.ascontiguousarray(pixels[:3].transpose(1, 2, 0)) if len(pixels) >= 3 else pixels[0])
    if longest is not None and max(shown.size) > longest:
        factor = longest / max(shown.size)
        size = (max(1, round(shown.width * factor)), max(1, round(shown.height * factor)))
        shown = shown.resize(size, Image.Resampling.BOX)
    return shown


def png_data_uri(image: Image.Image) -> str:
    """``data:image/png;base64,...`` of an image, at its own size."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def webp_data_uri(image: Image.Image) -> str:
    """``data:image/webp;base64,...`` of an image, compressed with loss: about a tenth of a PNG of the same photograph."""
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=80, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def grid_png(path: Path, truth: Tensor | None, reconstruction: Tensor, *, captions: Sequence[str] = ()) -> None:
    """A PNG with rows of true images above rows of their reconstructions (as in CI-Net, Fig. 10).

    Small images are enlarged by whole factors (nearest neighbour), large ones shrunk to 256 pixels; the grid is at most
    1600 pixels wide and breaks into as many pairs of rows as it needs.

    Args:
        path: Where to write; replaced atomically.
        truth: B x C x H x W in [0, 1], or ``None`` to show reconstructions alone.
        reconstruction: B x C x H x W, image i belonging to true image i.
        captions: One text per image, lines separated by ``\\n``; cut where it is wider than its image.

    Raises:
        OutputError: The file cannot be written.
    """
    rows = [("rebuilt", reconstruction)] if truth is None else [("truth", truth), ("rebuilt", reconstruction)]
    batch, _, height, width = reconstruction.shape
    cell_width, cell_height = _cell(width, height)
    gap, margin, font = 4, 12, _font(13)
    left = margin + max(math.ceil(font.getlength(name)) for name, _ in rows) + 10
    line = 17
    caption = line * max((text.count("\n") + 1 for text in captions), default=0)

    per_row = max(1, (MAX_GRID_WIDTH - left - margin + gap) // (cell_width + gap))
    bands = math.ceil(batch / per_row)
    columns = math.ceil(batch / bands)
    band = len(rows) * (cell_height + gap) + caption + 10
    canvas = Image.new("RGB", (left + columns * (cell_width + gap) - gap + margin, 2 * margin + bands * band - 10), "white")
    draw = ImageDraw.Draw(canvas)

    for i in range(batch):
        x = left + (i % columns) * (cell_width + gap)
        y = margin + (i // columns) * band
        for name, images in rows:
            if i % columns == 0:
                draw.text((left - 10, y + cell_height // 2), name, fill="#555555", font=font, anchor="rm")
            shown = picture(images[i], longest=max(cell_width, cell_height))
            canvas.paste(shown.resize((cell_width, cell_height), Image.Resampling.NEAREST), (x, y))
            y += cell_height + gap
        for text in captions[i].split("\n") if i < len(captions) else ():
            draw.text((x, y), _cut(text, font, cell_width), fill="#222222", font=font)
            y += line

    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG", optimize=True)
    write_atomically(path, [buffer.getvalue()])


def comparison_png(
    path: Path, rows: Mapping[str, Tensor], *, pixels: int = 48, columns: int | None = None, boxed: int = 0
) -> None:
    """A PNG of named rows of images, for example the truth above what several attacks made of it.

    Above 400 kB it has 256 colours, which makes it a third as large.

    Args:
        path: Where to write; replaced atomically.
        rows: Name (lines separated by ``\\n``) -> N x C x H x W in [0, 1]; rows may differ in N.
        pixels: Width and height of each image in the picture: the nearest whole multiple of its own size up to it; larger
            images are shrunk to it.
        columns: Images side by side; the rows break into as many bands as they need. None: all.
        boxed: So many images, the first, have a box around them, unless these are all.

    Raises:
        OutputError: The file cannot be written.
    """
    gap, margin, font = 3, 8, _font(12)
    largest = max(max(images.shape[2:]) for images in rows.values())
    cell = largest * (pixels // largest) or pixels
    left = margin + max(math.ceil(font.getlength(line)) for name in rows for line in name.split("\n")) + 8
    count = max(len(images) for images in rows.values())
    columns = min(columns or count, count)
    band = len(rows) * (cell + gap) + 9
    size = (left + columns * (cell + gap) - gap + margin, 2 * margin + math.ceil(count / columns) * band - 9 - gap)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for top in range(math.ceil(count / columns)):
        if boxed < count and (inside := min(columns, boxed - top * columns)) > 0:
            x, y = left + inside * (cell + gap) - gap, margin + top * band
            draw.rectangle((left - 3, y - 3, x + 2, y + len(rows) * (cell + gap) - gap + 2), outline=_BOX, width=2)
    for j, (name, images) in enumerate(rows.items()):
        for i, image in enumerate(images):
            x, y = left + i % columns * (cell + gap), margin + i // columns * band + j * (cell + gap)
            if i % columns == 0:
                draw.multiline_text((margin, y + cell // 2), name, fill="#222222", font=font, anchor="lm", spacing=2)
            shown = picture(image, longest=cell)
            factor = max(1, cell // max(shown.size))
            shown = shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)
            canvas.paste(shown, (x, y))
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG", optimize=True)
    if buffer.tell() > MAX_LOSSLESS:
        buffer = io.BytesIO()
        canvas.quantize(256).save(buffer, format="PNG", optimize=True)
    write_atomically(path, [buffer.getvalue()])


def curve_svg(
    rounds: Sequence[float], values: Sequence[float | None], *, label: str, log: bool = False, top: float | None = None
) -> str:
    """A quantity over rounds as an SVG element for an HTML page; ``""`` if there is nothing to draw.

    It is drawn in the page's CSS variables ``--ink``, ``--line``, ``--accent`` and ``--muted``, and is the same text
    for the same numbers. More than 600 points are thinned evenly; the first and last stay.

    Args:
        rounds: Positions, ascending.
        values: One per round; ``None``, NaN, infinite and (with ``log``) non-positive ones are left out.
        label: What it shows, for people who do not see it, and the prefix of identifiers inside.
        log: Logarithmic vertical axis.
        top: Upper end of the vertical axis (1 for SSIM). An axis that is not logarithmic includes 0.
    """
    points = [(r, v) for r, v in zip(rounds, values, strict=True) if v is not None and math.isfinite(v) and (v > 0 or not log)]
    if not points:
        return ""
    kept = np.unique(np.linspace(0, len(points) - 1, MAX_POINTS).round().astype(int))
    x, y = zip(*(points[i] for i in kept), strict=True)

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's own style must not change the report
        matplotlib.rcParams.update(_style(label))
        figure = Figure(figsize=(3.75, 2.4), layout="constrained")
        axes = figure.subplots()
        axes.plot(x, y, color=_ACCENT, linewidth=1.5, marker="o" if len(x) < 20 else "", markersize=3)
        _plain(axes, log=log, bounds=(min(0.0, *y), max(1.0, 1.08 * max(y)) if top is None else top))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), label)


@dataclass(frozen=True)
class Line:
    """A curve: points (position, value) with ascending positions of at least 0, a CSS colour, an index of MARKERS."""

    points: Sequence[tuple[float, float]]
    colour: str
    marker: int = 0


def lines_svg(lines: Sequence[Line], *, label: str, right: str, top: float = 1.0) -> str:
    """Several curves through marked points as an SVG element for an HTML page; ``""`` if there is nothing to draw.

    The horizontal axis starts at 0; it is logarithmic beyond the least positive position where positions differ by more
    than a factor of 20. No text of a user's is in it: a page says in its own words which colour and marker is which.

    Args:
        lines: What is drawn.
        label: As of :func:`curve_svg`.
        right: What the horizontal axis shows.
        top: Upper end of the vertical axis, which starts at 0.
    """
    positions = [x for line in lines for x, _ in line.points]
    if not positions:
        return ""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_style(label))
        figure = Figure(figsize=(5.2, 2.8), layout="constrained")
        axes = figure.subplots()
        drawn = [f"#0501{i:02x}" for i in range(len(lines))]
        for line, colour in zip(lines, drawn, strict=True):
            x, y = zip(*line.points, strict=True)
            shape = _SHAPES[line.marker % len(_SHAPES)]
            axes.plot(x, y, color=colour, linewidth=1.5, marker=shape, markersize=5, clip_on=False, zorder=3)
        _plain(axes, log=False, bounds=(min(0.0, *(y for line in lines for _, y in line.points)), top))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        positive = [x for x in positions if x > 0]
        if positive and max(positive) > 20 * min(positive):
            axes.set_xscale("symlog", linthresh=min(positive))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(0, 1.04 * max(positions) or 1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(right)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = _inline(buffer.getvalue(), label, over=right)
    for line, colour in zip(lines, drawn, strict=True):
        svg = svg.replace(colour, line.colour)
    return svg


def _style(label: str, *, muted: str = _MUTED, line: str = _LINE) -> Any:
    """Matplotlib's settings for a curve, by default in the page's own colours."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": label,
        "font.size": 9,
        "text.parse_math": False,
        "axes.edgecolor": muted,
        "axes.labelcolor": muted,
        "xtick.color": muted,
        "ytick.color": muted,
        "grid.color": line,
    }


def leak_against_cost_svg(
    path: Path,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    cost: str,
    leak: str = "SSIM of the reconstruction",
    log: bool = False,
    marks: Mapping[str, float] | None = None,
) -> None:
    """Curves of defences, one point for each strength: what still leaks (0 to 1) against what the strength costs.

    Args:
        path: An SVG file; replaced atomically. It is the same for the same numbers.
        curves: Defence -> (cost, leak) of each strength, in the order of the strengths.
        cost: Label of the horizontal axis.
        leak: Label of the vertical axis.
        log: Logarithmic horizontal axis; points of cost 0 are then left out.
        marks: Name -> cost, drawn as vertical lines: no defence, say.

    Raises:
        OutputError: The file cannot be written.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's own style must not change the figure
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": path.name, "font.size": 9})
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
        for k, (name, points) in enumerate(curves.items()):
            shown = [(x, y) for x, y in points if x > 0 or not log]
            axes.plot(
                [x for x, _ in shown],
                [y for _, y in shown],
                label=name,
                color=colours[k % 10],
                marker="os^Dv<>ph*"[k % 10],
                markersize=4,
                linewidth=1.2,
            )
        for name, position in (marks or {}).items():
            axes.axvline(position, color="#888888", linewidth=0.8, linestyle="--")
            axes.annotate(name, (position, 0.02), rotation=90, ha="right", va="bottom", fontsize=8, color="#666666")
        if log:
            axes.set_xscale("log")
        axes.set_xlabel(cost)
        axes.set_ylabel(leak)
        axes.set_ylim(0, 1.02)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, linewidth=0.5, color="#dddddd")
        axes.set_axisbelow(True)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    write_atomically(path, buffer.getvalue())


@dataclass(frozen=True)
class Series:
    """A curve of means: points (position, mean, spread), the spread NaN where there is none, and published (position, mean)."""

    name: str
    points: Sequence[tuple[float, float, float]]
    published: Sequence[tuple[float, float]] = ()


def panels_svg(path: Path, panels: Mapping[str, Sequence[Series]], *, below: str, ticks: Sequence[str] = ()) -> None:
    """Curves of the same name in several panels side by side, with spreads; published values are hollow markers.

    The horizontal axis is logarithmic where it has at most 8 positions, all positive, and they span a factor of 8.

    Args:
        path: An SVG file; replaced atomically. It is the same for the same numbers.
        panels: Label of the vertical axis -> curves. An axis whose values stay below 1 ends at 1; all begin at 0 or below.
        below: Label of the horizontal axis.
        ticks: Names of the positions 0, 1, 2 ...; empty: they are numbers.

    Raises:
        OutputError: The file cannot be written.
    """
    names = list(dict.fromkeys(series.name for curves in panels.values() for series in curves))
    positions = sorted({p[0] for curves in panels.values() for s in curves for p in (*s.points, *s.published)})
    few = bool(ticks) or len(positions) <= 8  # then each has a tick and error bars
    columns = max(1, min(len(names) + 1, 120 // (max(map(len, names)) + 8)))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's own style must not change the figure
        matplotlib.rcParams.update(_style(path.name, muted="#5c6168", line="#e2e1dc"))
        height = 2.75 + 0.2 * math.ceil((len(names) + 1) / columns)
        figure = Figure(figsize=(3.9 * len(panels), height), layout="constrained")
        handles: dict[str, Any] = {}
        for axes, (label, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for series in curves:
                k = names.index(series.name)
                colour, shape = _SERIES[k % len(_SERIES)], _SHAPES[(k + k // len(_SERIES)) % len(_SHAPES)]
                style: Any = {"color": colour, "marker": shape, "clip_on": False, "zorder": 3}
                if series.published:
                    x, y = zip(*series.published, strict=True)
                    hollow = {"linestyle": "", "markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.1}
                    axes.plot(x, y, **style, **hollow)
                if not series.points:
                    continue
                at, mean, spread = np.nan_to_num(np.asarray(series.points)).T
                (handles[series.name],) = axes.plot(at, mean, **style, linewidth=1.5, markersize=4)
                if spread.any():
                    axes.fill_between(at, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
                if spread.any() and few:
                    axes.errorbar(at, mean, yerr=spread, fmt="none", ecolor=colour, elinewidth=0.8, capsize=2, zorder=2)
            values = [p[1] for s in curves for p in (*s.points, *s.published)]
            _plain(axes, log=False, bounds=(min(0.0, *values, 0.0), 1.0 if max(values) <= 1 else 1.08 * max(values)))
            axes.set_ylabel(label)
            axes.set_xlabel(below)
            if few and not ticks and positions[0] > 0 and positions[-1] >= 8 * positions[0]:
                axes.set_xscale("log")
                axes.xaxis.set_minor_locator(NullLocator())
            if few:
                axes.set_xticks(positions, [ticks[int(x)] if ticks else f"{x:,g}" for x in positions])
        if any(series.published for curves in panels.values() for series in curves):
            handles["published"] = Line2D(
                [], [], linestyle="", marker="o", markersize=8, color="#5c6168", markerfacecolor="none"
            )
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    write_atomically(path, buffer.getvalue())


def _plain(axes: Axes, *, log: bool, bounds: tuple[float, float]) -> None:
    """Two axis lines, a faint grid, few ticks, plain numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("round")
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        low, high = axes.get_ylim()
        narrow = high / low < 100  # ticks at powers of ten alone would then be one or none
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,), numticks=7))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value, plain=narrow and low > 0.001)))
    else:
        axes.set_ylim(bounds)


def _power(value: float, *, plain: bool) -> str:
    """0.02 if plain, else 2·10⁻²."""
    if plain:
        return f"{value:g}"
    digits, exponent = f"{value:.0e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if digits == "1" else f"{digits}·{power}"


def _inline(svg: str, label: str, *, over: str = "rounds") -> str:
    """Matplotlib's SVG file as an element of an HTML page: bare, with identifiers of its own and the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    prefix = re.sub(r"\W+", "-", f"{label} {over}".lower())
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for drawn, variable in _PAGE_COLOURS.items():
        svg = svg.replace(drawn, variable)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label} over {over}"', 1).strip()


def _cell(width: int, height: int) -> tuple[int, int]:
    """Size at which an image of this size is shown in the grid."""
    longest = max(width, height)
    if longest > 256:
        return max(1, round(width * 256 / longest)), max(1, round(height * 256 / longest))
    factor = max(1, round(112 / longest))
    return width * factor, height * factor


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
