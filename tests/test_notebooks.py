"""The notebooks run from top to bottom, and show what their text says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))


def outputs(path: Path, folder: Path) -> str:
    """What the cells print, after running all of them in a folder."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells), f"{path.name}: commit it without outputs"
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    shown = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown)
    return "".join(output.text for output in shown if output.output_type == "stream" and output.name == "stdout")


def test_the_first_audit_rebuilds_its_photographs(tmp_path: Path) -> None:
    printed = outputs(NOTEBOOKS[0], tmp_path)
    ssim = re.search(r"ssim: mean ([\d.]+)", printed)
    assert ssim is not None
    assert float(ssim[1]) > 0.5
    assert re.search(r"recovered: (.*)\ntrue: +(.*)\n", printed)[1] == "[0, 1]"  # type: ignore[index]
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_noise_hides_what_ones_own_model_gives_away(tmp_path: Path) -> None:
    printed = outputs(NOTEBOOKS[1], tmp_path)
    ssim = [float(found) for found in re.findall(r"SSIM (-?[\d.]+)", printed)]
    assert len(ssim) == 3
    assert ssim[0] > 0.6 > 0.3 > ssim[1] > ssim[2] - 0.05
