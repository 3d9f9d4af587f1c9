"""The report of studies: means over seeds, published figures beside them, pictures, what is missing, and nobody's markup."""

from __future__ import annotations

import copy
import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from gradleak.errors import OutputError, SpecError
from gradleak.report.figures import Series, comparison_png, panels_svg
from gradleak.study import runner, store
from gradleak.study.report import write_report
from gradleak.study.spec import StudySpec, load_study
from gradleak.study.table import checked, grouped, mean_of, text_of

HOSTILE = "<img src=x onerror=alert(1)> | [a](b)"
STUDY = """
title = "Two attacks"
about = "ABOUT"
size = "small"
seeds = [0, 1]
[base]
data = { source = "sample", batch = 2, size = 16 }
model = { name = "lenet", width = 2, num_classes = 8 }
attack = { channels = 4 }
device = "cpu"
evaluate = { lpips = "off", candidates = 1 }
[grid]
attack = [{ name = "cinet" }, { name = "inverting-gradients" }]
"data.batch" = [2, 3]
[budget]
rounds = 2
[[published]]
where = { "attack.name" = "cinet" }
method = "CI-Net"
ssim = [1.0, 0.0]
note = "T.1"
[report]
curves = ["data.batch"]
rounds = true
pictures = 3
boxed = 1
columns = 2
"""


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study's folder, every cell run for real."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("study")
    (folder / "two.toml").write_text(STUDY.replace("ABOUT", HOSTILE))
    runner.run_studies([load_study(folder / "two.toml")], folder / "out", progress=False)
    return folder


@pytest.fixture
def study(out: Path) -> StudySpec:
    return load_study(out / "two.toml")


@pytest.fixture
def rows(study: StudySpec, out: Path) -> list[dict[str, Any]]:
    return copy.deepcopy(store.rows([study], out / "out"))


def line(markdown: str, label: str) -> list[str]:
    """Cells of the first line of a Markdown table that begins with ``label``."""
    found = next(text for text in markdown.splitlines() if text.startswith(f"| {label}"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", found)[1:-1]]


def test_every_line_is_a_mean_over_seeds_beside_what_was_published(
    study: StudySpec, rows: list[dict[str, Any]], out: Path, tmp_path: Path
) -> None:
    """Mean and sample deviation are those of the rows; each seed links to the page of its run; files are all there."""
    written = write_report([study], rows, tmp_path / "to", cells=out / "out" / "cells")
    assert {path.name.rpartition(".")[2] for path in written} == {"md", "html", "svg", "png"}
    text = written[0].read_text(encoding="utf-8")
    of_cinet = [row for row in rows if row["label"] == "cinet, batch 2"]
    cells = line(text, "cinet, batch 2")
    scores = [row["ssim"] for row in of_cinet]
    assert cells[1] == "2"
    assert cells[3] == text_of((float(np.mean(scores)), float(np.std(scores, ddof=1))), 3)
    assert cells[4] == "1.00±.00"
    links = re.findall(r"\]\(([^)]*)\)", cells[2])
    assert [(tmp_path / "to" / link).resolve() for link in links] == [
        out / "out" / "cells" / row["cell"] / "report.html" for row in of_cinet
    ]
    assert all((tmp_path / "to" / path).is_file() for path in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text))
    assert "8 of 8 runs finished" in text
    assert of_cinet[0]["versions"]["torch"] in text


def test_the_page_is_whole_and_runs_nobodys_markup(
    study: StudySpec, rows: list[dict[str, Any]], out: Path, tmp_path: Path
) -> None:
    """Nothing is loaded from anywhere; hostile text stays text in the page, in Markdown and in curves."""
    for row in rows:
        row["label"] = f"{HOSTILE} {row['label']}"
    write_report([study], rows, tmp_path, cells=out / "out" / "cells")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert HOSTILE in unescape(page)
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)"', page))
    assert page.count("data:image/png") == 2
    assert page.count("data:image/svg+xml") == 2
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<img" not in markdown
    assert len({text.replace(r"\|", "").count("|") for text in markdown.splitlines() if text.startswith("| &lt;img")}) == 2
    for path in (tmp_path / "figures").glob("*.svg"):
        ElementTree.fromstring(path.read_text(encoding="utf-8"))


def test_rows_alone_keep_the_pictures_of_the_same_cells(
    study: StudySpec, rows: list[dict[str, Any]], out: Path, tmp_path: Path
) -> None:
    """Without run folders: the same numbers and curves, the earlier grids byte for byte, keys instead of links."""
    with_folders = write_report([study], rows, tmp_path, cells=out / "out" / "cells", pictures="thumbnails")
    before = {path: path.read_bytes() for path in with_folders}
    alone = write_report([study], json.loads(json.dumps(rows)), tmp_path)
    assert alone == with_folders
    assert all(path.read_bytes() == before[path] for path in alone[2:])
    text = alone[0].read_text(encoding="utf-8")
    assert f"`{rows[0]['cell']}`" in text
    assert "report.html" not in text
    assert line(text, "cinet, batch 2")[3:] == line(before[alone[0]].decode(), "cinet, batch 2")[3:]

    elsewhere = write_report([study], rows, tmp_path / "elsewhere")
    assert not [path for path in elsewhere if path.suffix == ".png"]
    assert "the run folder is not at hand" in elsewhere[0].read_text(encoding="utf-8")
    none = write_report([study], rows, tmp_path, cells=out / "out" / "cells", pictures="none")
    assert not [path for path in none if path.suffix == ".png"]


def test_what_is_not_finished_is_said_and_in_no_mean(study: StudySpec, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """A partial, a failed and a missing cell: named in their lines; the mean is that of the finished seed."""
    rows[0] |= {"state": "partial", "error": "812 of 2000 rounds", "ssim": 0.9}
    rows[2] |= dict.fromkeys(("ssim", "psnr", "fsim", "rounds", "seconds")) | {"state": "failed", "error": "no finite loss"}
    rows[3] |= dict.fromkeys(("ssim", "psnr", "fsim", "rounds", "seconds")) | {"state": "missing"}
    text = write_report([study], rows, tmp_path)[0].read_text(encoding="utf-8")
    partial, failed = line(text, "cinet, batch 2"), line(text, "cinet, batch 3")
    assert "seed 0: partial, 812 of 2,000 rounds" in partial[0]
    assert partial[1:4] == ["1", "1", f"{rows[1]['ssim']:.3f}"]
    assert "seed 0: failed, no finite loss" in failed[0]
    assert "seed 1: not run yet" in failed[0]
    assert failed[1] == "0"
    assert "5 of 8 runs finished" in text


@pytest.mark.parametrize("damage", ["redacted", "no source"])
def test_pictures_that_cannot_be_made_are_named(
    damage: str, study: StudySpec, rows: list[dict[str, Any]], out: Path, tmp_path: Path
) -> None:
    """One line says why, without a path of this machine; the other rows of the grid are drawn."""
    shutil.copytree(out / "out" / "cells", tmp_path / "cells")
    folder = tmp_path / "cells" / rows[0]["cell"]
    if damage == "redacted":
        (folder / "reconstruction.safetensors").unlink()
    else:
        for spec in (tmp_path / "cells").glob("*/spec.toml"):
            spec.write_text(spec.read_text().replace('source = "sample"', 'source = "npz:/nowhere/there.npz"'))
    written = write_report([study], rows, tmp_path / "to", cells=tmp_path / "cells")
    text = written[0].read_text(encoding="utf-8")
    why = "the run folder has no pictures, or is damaged" if damage == "redacted" else "the images of sample cannot be read"
    assert why in text
    assert "nowhere" not in text
    assert len([path for path in written if path.suffix == ".png"]) == (2 if damage == "redacted" else 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda row: row.pop("ssim"), "ssim"),
        (lambda row: row.update(state="done"), "state"),
        (lambda row: row.update(cell="../../secret"), "cell"),
        (lambda row: row.update(psnr="high"), "psnr"),
    ],
)
def test_a_row_that_no_store_wrote_is_refused(
    change: Any, says: str, study: StudySpec, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The row and its key are named; nothing is written."""
    change(rows[1])
    with pytest.raises(OutputError, match=rf"row 1 .*{says}: "):
        write_report([study], rows, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_an_unknown_kind_of_pictures_is_refused(study: StudySpec, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="thumbnails"):
        write_report([study], [], tmp_path, pictures="some")


def test_numbers_are_grouped_and_written_as_papers_do(rows: list[dict[str, Any]]) -> None:
    """Rows that differ in the seed alone are one line; one value has no spread, none is a dash."""
    assert [len(group.rows) for group in grouped(checked(row, 0) for row in rows)] == [2, 2, 2, 2]
    assert mean_of([None, float("nan")]) is None
    assert text_of(mean_of([0.5]), 2) == "0.50"
    assert text_of(mean_of([1.0, 3.0]), 2) == "2.00±1.41"
    assert text_of(mean_of([0.99, 0.97]), 3) == "0.980±.014"
    assert text_of(mean_of([float("inf"), 30.0]), 2) == "∞"


def test_images_break_into_bands_and_the_first_have_a_box(tmp_path: Path) -> None:
    """Every image is there at the size that was asked for; large ones are shrunk; a box around all would say nothing."""
    red, blue = torch.zeros(5, 3, 16, 16), torch.zeros(5, 3, 128, 128)
    red[:, 0], blue[:, 2] = 1, 1
    for boxed, wanted in ((2, True), (5, False)):
        comparison_png(tmp_path / "a.png", {"truth": red}, pixels=32, columns=2, boxed=boxed)
        pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
        assert (pixels == (255, 0, 0)).all(-1).sum() == 5 * 32 * 32
        assert (pixels == (0xD6, 0x28, 0x1F)).all(-1).any() == wanted
    comparison_png(tmp_path / "b.png", {"truth": blue}, pixels=64, columns=3)
    assert (np.asarray(Image.open(tmp_path / "b.png").convert("RGB")) == (0, 0, 255)).all(-1).sum() == 5 * 64 * 64


def test_a_large_grid_is_kept_small(tmp_path: Path) -> None:
    """Pictures of noise, which do not compress: 256 colours, and still the same picture."""
    noise = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    comparison_png(tmp_path / "noise.png", {"truth": noise, "rebuilt": noise}, pixels=64, columns=16)
    assert (tmp_path / "noise.png").stat().st_size < 700_000


def test_panels_are_the_same_file_for_the_same_numbers(tmp_path: Path) -> None:
    """Spreads, published markers, words on the axis, signs of mathematics in names: all drawn, and drawn alike."""
    curves = [
        Series("a $x^2 & b", [(0, 0.5, 0.1), (1, 0.7, float("nan"))], [(0, 0.9)]),
        Series("only published", [], [(1, 0.2)]),
    ]
    texts = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        panels_svg(tmp_path / name / "c.svg", {"SSIM": curves, "PSNR (dB)": curves}, below="model", ticks=["relu", "tanh"])
        texts.append((tmp_path / name / "c.svg").read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    ElementTree.fromstring(texts[0])
    assert all(word in texts[0] for word in ("a $x^2 &amp; b", "relu", "tanh", "published", "PSNR (dB)"))
