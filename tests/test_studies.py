"""The studies of the paper's tables and figures: they load, small and full ask the same, full states the paper's figures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gradleak.study import store
from gradleak.study.spec import Cell, StudySpec, cells, load_studies, load_study

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "studies"
NAMES = sorted(path.stem for path in (STUDIES / "full").glob("*.toml"))

#: (study, method) -> mean and spread of SSIM, FSIM, PSNR, LPIPS, as the paper has them; None: not stated.
PUBLISHED: dict[tuple[str, str], tuple[tuple[float, float | None] | None, ...]] = {
    ("table-1", "dlg"): ((0.10, 0.01), (0.58, 0.01), (6.13, 0.06), (0.65, 0.01)),
    ("table-1", "idlg"): ((0.10, 0.01), (0.57, 0.01), (6.03, 0.01), (0.61, 0.01)),
    ("table-1", "inverting-gradients"): ((0.16, 0.01), (0.59, 0.01), (8.03, 0.26), (0.61, 0.01)),
    ("table-1", "gias"): ((0.26, 0.11), (0.66, 0.06), (11.05, 2.85), (0.59, 0.06)),
    ("table-1", "cinet"): ((0.98, 0.01), (0.98, 0.01), (31.40, 0.14), (0.03, 0.01)),
    ("table-2", "dlg"): ((0.01, None), (0.45, None), (5.40, None), (0.84, None)),
    ("table-2", "idlg"): ((0.01, None), (0.47, None), (6.09, None), (0.83, None)),
    ("table-2", "inverting-gradients"): ((0.04, None), (0.53, None), (7.90, None), (0.77, None)),
    ("table-2", "gias"): ((0.04, None), (0.54, None), (8.03, None), (0.78, None)),
    ("table-2", "cinet"): ((0.52, 0.06), (0.77, 0.03), (19.64, 1.05), (0.49, 0.04)),
    ("table-3-4", "gias"): ((0.87, 0.01), (0.94, 0.01), (16.06, 0.38), (0.04, 0.01)),
    ("table-3-4", "cinet"): ((1.00, 0.00), (1.00, 0.00), (33.72, 0.05), (0.01, 0.00)),
    ("table-5", "cinet"): ((0.98, 0.01), (0.99, 0.01), (34.11, 0.13), (0.02, 0.01)),
    ("notebook-cifar", "cinet-reference"): ((0.96, None), None, None, None),
    ("notebook-imagenet", "cinet-reference"): ((0.67, None), None, None, None),
}

#: Study -> batch sizes of the paper.
BATCHES = {
    "table-1": {128},
    "table-2": {24},
    "table-3-4": {64},
    "table-5": {256},
    "figure-3": {4},
    "figure-5": {4, 8, 16, 32, 64, 128},
    "figure-6": {128},
    "figure-10": {128},
    "figure-11": {24},
    "figure-12": {32},
    "notebook-cifar": {16},
    "notebook-imagenet": {4},
    "secure-aggregation": {64},
}


def load(size: str, name: str) -> StudySpec:
    return load_study(STUDIES / size / f"{name}.toml")


def methods(study: StudySpec) -> set[str]:
    return {str(cell.spec.attack["name"]) for cell in cells(study)}


def test_small_and_full_are_the_same_studies() -> None:
    assert sorted(path.stem for path in (STUDIES / "small").glob("*.toml")) == NAMES
    assert set(BATCHES) | {name for name, _ in PUBLISHED} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_small_asks_what_full_asks(name: str) -> None:
    """The same axes, data and methods, and a report of the same kind."""
    small, full = load("small", name), load("full", name)
    assert (small.size, full.size) == ("small", "full")
    assert list(small.grid) == list(full.grid)
    assert {cell.dataset for cell in cells(small)} == {cell.dataset for cell in cells(full)}
    assert methods(small) == methods(full)
    assert bool(small.report.curves) == bool(full.report.curves)
    assert (small.report.pictures > 0, small.report.boxed) == (full.report.pictures > 0, full.report.boxed)


@pytest.mark.parametrize("name", NAMES)
def test_full_is_the_papers_setting(name: str) -> None:
    """Its batch, its networks at their full width with sigmoid activations, and three seeds where it has a spread."""
    study = load("full", name)
    found = cells(study)
    assert {cell.spec.data.batch for cell in found} == BATCHES.get(name, {16})
    assert all(cell.spec.model.width is None for cell in found)
    if name != "activation":
        assert {cell.spec.model.activation for cell in found} == {"sigmoid"}
    if name.startswith("table"):
        assert study.seeds == [0, 1, 2]
    if "imagenet" in {cell.dataset for cell in found}:
        assert {cell.spec.data.size for cell in found} == {256}


@pytest.mark.parametrize("name", NAMES)
def test_full_states_the_papers_figures(name: str) -> None:
    """Every figure that the paper has for a cell, and none that it has not; small studies are not compared with them."""

    def stated(cell: Cell) -> tuple[tuple[float, float | None] | None, ...] | None:
        figures = cell.published
        return None if figures is None else (figures.ssim, figures.fsim, figures.psnr, figures.lpips)

    for cell in cells(load("full", name)):
        assert stated(cell) == PUBLISHED.get((name, str(cell.spec.attack["name"]))), cell.label
    assert not load("small", name).published


@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_trained_on_what_is_attacked(name: str, size: str) -> None:
    """Images of [[prepare]] begin beyond every batch of their source; surrogate data is granted where it is used."""
    study = load(size, name)
    for cell in cells(study):
        for entry in study.prepare:
            assert entry.source != cell.dataset or entry.start >= cell.spec.data.start + cell.spec.data.batch
        assert bool(cell.spec.attack.get("generator")) <= cell.spec.threat.surrogate_data


def test_pictures_are_of_runs_that_the_tables_have() -> None:
    """The figures show the tables' own batches: they cost no further run."""
    for figure, table in {"figure-6": "table-1", "figure-10": "table-1", "figure-11": "table-2"}.items():
        for size in ("small", "full"):
            assert {cell.key for cell in cells(load(size, figure))} <= {cell.key for cell in cells(load(size, table))}


def test_the_page_says_what_the_rows_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import reproduction

    shutil.copytree(ROOT / "docs" / "reproduction" / "figures", tmp_path / "figures")
    assert reproduction.page(tmp_path) == reproduction.PAGE.read_text(encoding="utf-8"), "run tools/reproduction.py"


def test_committed_rows_are_of_cells_that_the_studies_have() -> None:
    rows = store.read_rows(STUDIES / "results" / "rows.json")
    everything = load_studies([STUDIES / "small", STUDIES / "full"])
    current = {(c.study, c.size, c.key) for study in everything for c in cells(study)}
    assert {(row["study"], row["size"], row["cell"]) for row in rows} <= current
    assert all(store.measured(row) and row["commit"] for row in rows)
    partial = [(row["study"], row["size"]) for row in rows if row["state"] != "finished"]
    assert all(size == "full" for _, size in partial)
