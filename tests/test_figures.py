"""Pictures and curves for documents: complete, and the same file for the same numbers."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image

from gradleak.report.figures import comparison_png, leak_against_cost_svg


def test_rows_of_images_are_drawn_beside_their_names(tmp_path: Path) -> None:
    """Every image of every row is in the picture at a whole multiple of its size, exactly."""
    red, blue = torch.zeros(2, 3, 16, 16), torch.zeros(3, 3, 16, 16)
    red[:, 0], blue[:, 2] = 1, 1
    comparison_png(tmp_path / "rows.png", {"truth": red, "attack\n12.3 dB": blue}, pixels=40)
    pixels = np.asarray(Image.open(tmp_path / "rows.png"))
    assert (pixels == (255, 0, 0)).all(-1).sum() == 2 * 32 * 32
    assert (pixels == (0, 0, 255)).all(-1).sum() == 3 * 32 * 32


def test_leak_against_cost_is_the_same_file_for_the_same_numbers(tmp_path: Path) -> None:
    """Every defence is named; a cost of zero has no place on a logarithmic axis."""
    curves = {"noise & more": [(0.0, 0.9), (0.1, 0.5), (1.0, 0.1)], "pruning": [(0.2, 0.8)]}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        leak_against_cost_svg(tmp_path / name / "curve.svg", curves, cost="distortion", log=True, marks={"none": 0.05})
    text = (tmp_path / "a" / "curve.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "b" / "curve.svg").read_text(encoding="utf-8")
    assert "noise &amp; more" in text
    assert "pruning" in text
    ElementTree.fromstring(text)
