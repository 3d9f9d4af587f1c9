"""One self-contained HTML page about a run: pictures first, numbers after, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FunctionLoader
from markupsafe import Markup
from torch import Tensor

from gradleak.errors import printable
from gradleak.evaluate import remark
from gradleak.files import write_atomically
from gradleak.folder import batch_of
from gradleak.layers import Layer, in_words, modules
from gradleak.observation import Truth
from gradleak.report.figures import curve_svg, grid_png, picture, png_data_uri, webp_data_uri
from gradleak.targets import are_classes

#: Values of all pictures of the gallery together up to which they are shown without loss, and at all.
LOSSLESS_PIXELS = 600_000
MAX_PIXELS = 6_000_000
MAX_LONGEST = 512
MAX_PICTURES = 256
OPEN_PICTURES = 30
OPEN_LAYERS = 8
STRIPS = 4
FRAMES = 8


_LAYER = tuple(field.name for field in dataclasses.fields(Layer))


@dataclass(frozen=True)
class ReportData:
    """What a report shows.

    Attributes:
        result: What result.json holds; every key is optional.
        images: B x C x H x W reconstructions, clamped to [0, 1] for display; ``None`` for a redacted report: rows and
            figures, and no picture.
        truth: The private batch, or ``None`` when there is none: then reconstructions are shown alone, without metrics.
        snapshots: S x B x C x H x W intermediate reconstructions, in the order of ``images``.
        history: Rows with ``round``, ``loss``, ``learning_rate`` and ``seconds``.
        quality: ``{"round": [...], "psnr": [...], "ssim": [...]}``, one entry per snapshot; without truth ``round`` alone.
    """

    result: dict[str, Any]
    images: Tensor | None
    truth: Truth | None
    snapshots: Tensor | None
    history: list[dict[str, float]]
    quality: dict[str, list[float]]

    @property
    def scored(self) -> bool:
        """Whether there are metrics to show: with a truth, or recorded in a redacted run."""
        return self.truth is not None or (self.images is None and bool(self.result.get("metrics")))


@dataclass(frozen=True)
class _Metric:
    key: str
    name: str
    digits: int
    unit: str
    better: str
    meaning: str


_METRICS = (
    _Metric("ssim", "SSIM", 3, "", "1 is identical", "structural similarity: do edges and textures agree, from -1 to 1"),
    _Metric("psnr", "PSNR", 1, " dB", "higher is closer", "mean squared error of pixels on a decibel scale"),
    _Metric("fsim", "FSIM", 3, "", "1 is identical", "do the features that the eye notices first agree, from 0 to 1"),
    _Metric("lpips", "LPIPS", 3, "", "lower is closer", "distance in the features of a VGG-16 network, near human judgement"),
)


@dataclass(frozen=True)
class _Picture:
    """True image ``index`` and its reconstruction, ready for the template."""

    index: int
    name: str
    label: int | None
    truth: Tensor | None
    rebuilt: Tensor | None
    values: dict[str, float | None]


def render(data: ReportData) -> str:
    """The report as HTML text: the same text for the same data, everything in it, all foreign text escaped."""
    pictures, result = _best_first(data), data.result
    measured = _measured(pictures)
    if data.images is None:
        shape, height, width, shown = "", 0, 0, []
    else:
        shape, (height, width) = "×".join(str(n) for n in data.images.shape[1:]), data.images.shape[-2:]
        shown = pictures[:MAX_PICTURES]
    pixels = 2 * len(shown) * height * width
    scale = min(1.0, math.sqrt(MAX_PIXELS / pixels)) if pixels else 1.0
    verdict, verdict_rest, doubt = _verdict(result)
    found = result.get("identification") or {}
    ranks = (found.get("ranks") or {}).get("mse") if data.scored and measured else None
    layers = [Layer(**{field: row.get(field) for field in _LAYER}) for row in result.get("layers") or []]
    values = {
        "result": result,
        "redacted": data.images is None,
        "private": data.images is not None,
        "has_truth": data.scored,
        "verdict": verdict,
        "verdict_rest": verdict_rest,
        "given": _given(result),
        "warnings": [doubt] * bool(doubt) + list(result.get("warnings") or []),
        "shape": shape,
        "pictures": pictures,
        "shown": shown,
        "opened": OPEN_PICTURES,
        "small": max(height, width) <= 128,
        "width": width,
        "height": height,
        "longest": min(MAX_LONGEST, max(32, int(scale * max(height, width)))),
        "lossless": pixels <= LOSSLESS_PIXELS,
        "lossless_frames": max(height, width) <= 64,
        "measured": measured,
        "ranks": ranks,
        "candidates": found["candidates"] if ranks and found["candidates"] > 1 else None,
        "tiles": _tiles(data, measured),
        "strips": _strips(data, pictures) if data.snapshots is not None and data.images is not None else [],
        "curves": _curves(data),
        "layers": layers,
        "layers_say": in_words(layers),
        "layers_opened": OPEN_LAYERS,
        "modules": modules(layers),
        "comparison": _comparison(result, measured) if data.scored else [],
        "run": _run(result),
        "repeat": repeat_lines(result),
        "settings": _flat(result.get("attack") or {}),
        "versions": _flat(result.get("versions") or {}),
    }
    return environment().get_template("template.html").render(values, sections=_sections(values))


def _sections(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Identifier and name of each section that the page has, in its order."""
    result = values["result"]
    rows = (
        ("pictures", "Pictures", not values["redacted"]),
        ("table", "Every image", values["measured"]),
        ("rounds", "Rounds", values["strips"] or values["curves"]),
        ("layers", "Layers", values["modules"]),
        ("defences", "Defences", result.get("defence_costs")),
        ("assumptions", "Assumptions", result.get("assumptions")),
        ("controls", "Controls" if result.get("controls") else "Other scores", values["comparison"]),
        ("advice", "What to change", result.get("advice")),
        ("repeat", "How to repeat", values["repeat"] or values["run"] or values["settings"] or values["versions"]),
    )
    return [(key, name) for key, name, there in rows if there]


def _verdict(result: dict[str, Any]) -> tuple[str, str, str]:
    """The verdict's first sentence, what follows it, and the doubt in it (:func:`gradleak.evaluate.remark`)."""
    text = str(result.get("verdict") or "").replace(" >= ", " ≥ ").replace("`", "")
    mean_ssim = ((result.get("metrics") or {}).get("ssim") or {}).get("mean")
    doubt = remark(mean_ssim, result.get("controls"), image_sensitivity=result.get("image_sensitivity"))
    doubt = doubt if doubt in text else ""
    first, separator, rest = (text.replace(doubt, "") if doubt else text).partition("; the closest is ")
    return (f"{first}.", f"The closest is {rest.strip()}", doubt) if separator else (first.strip(), "", doubt)


def _given(result: dict[str, Any]) -> str:
    """The assumptions that decide most, in a few words; ``""`` where none were recorded."""
    rows = {row["name"]: str(row["value"]) for row in result.get("assumptions") or []}
    words = (
        ("Threat model", lambda value: f"threat model {value.partition(':')[0]}"),
        ("Labels", lambda value: f"labels {value}"),
        ("Targets", lambda value: f"targets {value}"),
        ("Client", str),
        ("Batch size", lambda value: f"batch size {value}"),
        ("Mode", lambda value: f"{value} mode"),
        ("Activations of F", lambda value: f"activations {value}"),
        (
            "Normalisation of the images",
            lambda value: "images not normalised" if value == "none" else f"images normalised by {value}",
        ),
        ("Defences", lambda value: "no defence" if value == "none" else f"defences {value}"),
    )
    return " · ".join(phrase(rows[name]) for name, phrase in words if name in rows)


def repeat_lines(result: dict[str, Any]) -> list[str]:
    """What is copied to repeat a run: the command, then seed, device and versions as comments of a shell."""
    if not result.get("command"):
        return []
    where = {"seed": result.get("seed"), "device": result.get("device"), "threads": result.get("threads")}
    lines = [
        ", ".join(f"{name} {value}" for name, value in each.items() if value is not None)
        for each in (where, result.get("versions") or {})
    ]
    return [one_line(str(result["command"]), most=4000), *(f"# {one_line(line)}" for line in lines if line)]


def write_report(folder: Path, data: ReportData) -> None:
    """Write ``report.html`` and ``grid.png`` into a folder, each replaced atomically; best images first in both.

    A redacted report has no ``grid.png``.

    Raises:
        OutputError: The folder cannot be written.
    """
    if data.images is not None:
        pictures = _best_first(data)[:MAX_PICTURES]
        order = [p.index for p in pictures]
        captions = [p.name if p.values["ssim"] is None else f"{p.name}\nSSIM {p.values['ssim']:.3f}" for p in pictures]
        truth = None if data.truth is None else data.truth.images[order]
        rebuilt = data.images[[_assignment(data)[i] for i in order]]
        grid_png(folder / "grid.png", truth, rebuilt, captions=captions)
    write_atomically(folder / "report.html", [render(data).encode("utf-8", "replace")])


def _assignment(data: ReportData) -> list[int]:
    """Index of the reconstruction of every true image; without truth every reconstruction stands for itself."""
    if data.images is None:
        return list(range(batch_of(data.result["labels"])))
    if data.truth is None:
        return list(range(len(data.images)))
    return data.result.get("assignment") or list(range(len(data.truth.images)))


def _best_first(data: ReportData) -> list[_Picture]:
    """All pairs by falling SSIM (PSNR where images are too small for it); unmeasured ones last, in their own order."""
    per_image = (data.result.get("per_image") or {}) if data.scored else {}
    pictures = []
    for i, j in enumerate(_assignment(data)):
        values = {m.key: _known(per_image[m.key][i]) if per_image.get(m.key) else None for m in _METRICS}
        if data.images is None:
            pictures.append(_Picture(i, f"image {i}", None, None, None, values))
        elif data.truth is None:
            pictures.append(_Picture(i, f"image {i}", None, None, data.images[j], values))
        else:
            name = one_line(data.truth.names[i]) if i < len(data.truth.names) else f"image {i}"
            label = int(data.truth.labels[i]) if are_classes(data.truth.labels) else None
            pictures.append(_Picture(i, name, label, data.truth.images[i], data.images[j], values))
    if measured := _measured(pictures):
        pictures.sort(key=lambda p: (p.values[measured[0].key] is None, -(p.values[measured[0].key] or 0.0)))
    return pictures


def _measured(pictures: list[_Picture]) -> list[_Metric]:
    """The metrics that at least one picture has, the one that ranks them first."""
    return [m for m in _METRICS if any(p.values[m.key] is not None for p in pictures)]


def _tiles(data: ReportData, measured: list[_Metric]) -> list[dict[str, str]]:
    """The key figures: name, value, and what the value means."""
    result, tiles = data.result, []
    if data.scored:
        metrics = result.get("metrics") or {}
        for m in _METRICS:
            row = metrics.get(m.key) or {}
            if m.key != "fsim" and m in measured:
                tiles.append({"name": f"mean {m.name}", "value": _number(row.get("mean"), m.digits, m.unit), "note": m.better})
        worst = (metrics.get("ssim") or {}).get("worst")
        if _known(worst) is not None:
            tiles.append({"name": "worst SSIM", "value": _number(worst, 3), "note": "of all images"})
        found = result.get("identification") or {}
        if (found.get("candidates") or 0) > 1 and _identified(found):
            note = f"nearest of {found['candidates']:,} to the true image; a guess: {100 * found['chance']:.2g} %"
            tiles.append({"name": "identified", "value": _identified(found), "note": note})
    elif _known(result.get("matching_loss")) is not None:
        tiles.append({"name": "matching loss", "value": _plain(result["matching_loss"]), "note": "0 fits the update"})
    cost = result.get("cost") or {}
    if cost.get("rounds") is not None:
        tiles.append({"name": "rounds", "value": f"{cost['rounds']:,}", "note": "of optimisation"})
    if cost.get("seconds") is not None:
        tiles.append({"name": "time", "value": duration(cost["seconds"]), "note": str(result.get("device") or "")})
    return tiles


def _strips(data: ReportData, pictures: list[_Picture]) -> list[dict[str, Any]]:
    """For the best few images: at most eight snapshots from first to last, evenly chosen, each with its round."""
    assert data.snapshots is not None
    count = len(data.snapshots)
    if count == 0:
        return []
    rounds = data.quality.get("round") or []
    numbered = len(rounds) == count
    chosen = np.unique(np.linspace(0, count - 1, FRAMES).round().astype(int)).tolist()
    assignment = _assignment(data)
    return [
        {
            "picture": p,
            "numbered": numbered,
            "frames": [
                {
                    "image": data.snapshots[s, assignment[p.index]],
                    "when": f"{int(rounds[s]):,}" if numbered else f"{s + 1} of {count}",
                }
                for s in chosen
            ],
        }
        for p in pictures[:STRIPS]
    ]


def _curves(data: ReportData) -> list[dict[str, Any]]:
    rounds, losses = [row["round"] for row in data.history], [row["loss"] for row in data.history]
    drawn = [
        (
            "Matching loss",
            "logarithmic; lower fits the update better",
            curve_svg(rounds, losses, label="Matching loss", log=True),
        )
    ]
    for key, title, note, top in (
        ("ssim", "Mean SSIM", "1 is identical", 1.0),
        ("psnr", "Mean PSNR", "dB; higher is closer", None),
    ):
        if data.scored and data.quality.get(key):
            drawn.append((title, note, curve_svg(data.quality["round"], data.quality[key], label=title, top=top)))
    # Markup: these are our own strokes and numbers, no text of the user's is in them.
    return [{"title": title, "note": note, "svg": Markup(svg)} for title, note, svg in drawn if svg]


def _identified(found: dict[str, Any]) -> str:
    """The share of images that are identified, by squared error."""
    rate = _known((found.get("rate") or {}).get("mse"))
    return _share(rate) or ""


def _comparison(result: dict[str, Any], measured: list[_Metric]) -> list[tuple[str, list[str]]]:
    """Mean metrics and identification of this attack, of it scored many-to-one, and of the controls; empty if it stands
    alone.
    """
    rows = {"this attack": {**(result.get("metrics") or {}), "identification": result.get("identification")}}
    if result.get("many_to_one"):
        rows["this attack, many-to-one"] = result["many_to_one"]
    rows |= {f"control: {name}": row for name, row in (result.get("controls") or {}).items()}

    def mean(entry: Any) -> Any:
        return entry.get("mean") if isinstance(entry, dict) else entry

    if len(rows) == 1:
        return []
    return [
        (
            name,
            [_number(mean(row.get(m.key)), m.digits) for m in measured]
            + ([_identified(row.get("identification") or {}) or "–"] if result.get("identification") else []),
        )
        for name, row in rows.items()
    ]


def _run(result: dict[str, Any]) -> list[tuple[str, str]]:
    """How the run went, as rows of name and value."""
    cost, labels = result.get("cost") or {}, result.get("labels") or {}
    rows = (
        ("seed", result.get("seed")),
        ("device", result.get("device")),
        ("stopped", result.get("stopped")),
        ("matching loss", None if result.get("matching_loss") is None else _plain(result["matching_loss"])),
        ("labels by", labels.get("rule")),
        ("labels right", _share(labels.get("accuracy"))),
        ("classes found", _share(labels.get("classes_found"))),
        ("counts of classes exact", _share(labels.get("counts_exact"))),
        ("time per round", None if cost.get("seconds_per_round") is None else duration(cost["seconds_per_round"])),
        ("peak memory", None if cost.get("peak_memory_mb") is None else f"{cost['peak_memory_mb']:,.0f} MB"),
    )
    return [(name, str(value)) for name, value in rows if value is not None]


def _share(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.4g} %"


def _percent(value: float) -> str:
    """With as many digits as tell: 15 %, 8.3 %, 0.02 %."""
    if 0 < value < 1e-4:
        return "< 0.01 %"
    return f"{100 * value:.{0 if value >= 0.0995 or value == 0 else 1 if value >= 0.000995 else 2}f} %"


def _flat(table: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in table.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", _plain(value)))
    return rows


def _known(value: Any) -> float | None:
    """A number to show, or ``None`` for what was not measured (``None``, NaN)."""
    return None if value is None or math.isnan(value) else float(value)


def one_line(text: str, *, most: int = 400) -> str:
    """Printable, without line breaks, and without the lone surrogates of file names that are not UTF-8."""
    return " ".join(printable(text.encode("utf-8", "replace").decode(), most=most).split())


def _number(value: Any, digits: int, unit: str = "") -> str:
    value = _known(value)
    if value is None:
        return "–"
    return "∞" if math.isinf(value) else f"{value:.{digits}f}{unit}"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def duration(seconds: float) -> str:
    """Seconds for people: ``12.3 s``, ``4.5 min``."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _small(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}"


def _finalised(value: Any) -> Any:
    """Foreign text has no control characters on the page; Jinja escapes its markup after this."""
    return printable(value, most=len(value)) if isinstance(value, str) and not isinstance(value, Markup) else value


def _uri(image: Tensor, longest: int = MAX_LONGEST, lossless: bool = True) -> str:
    shown = picture(image, longest=longest)
    return png_data_uri(shown) if lossless else webp_data_uri(shown)


def environment() -> Environment:
    """The templates beside this file, with everything that they show escaped, and the filters that they use.

    The one script is allowed by its digest: text that came into the page as markup, whatever escaped the escaping, would
    not run.
    """
    here = resources.files(__package__)
    files = FunctionLoader(lambda name: here.joinpath(name).read_text("utf-8"))
    templates = Environment(loader=files, autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_finalised)
    templates.filters |= {
        "number": _number,
        "plain": _plain,
        "small": _small,
        "share": _percent,
        "duration": duration,
        "uri": _uri,
    }
    script = here.joinpath("script.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    templates.globals |= {"script": Markup(script), "script_hash": Markup(f"'sha256-{digest}'"), "newline": Markup("\n")}
    return templates
