"""The examples that need no framework run as their pages say; with fewer rounds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gradleak

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("rule", ["known", "joint"])
def test_segmentation(tmp_path: Path, rule: str) -> None:
    """Grey images and masks, a U-Net, its loss by name and its normalisation, through the commands of the page."""
    folder = shutil.copytree(EXAMPLES / "segmentation", tmp_path / "segmentation")
    environment = {**os.environ, "PYTHONPATH": str(Path(gradleak.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    quick = ["--set", "attack.rounds=4", "--set", "attack.channels=8", "--set", f"labels.rule={rule}"]
    for command in (["coins.py"], ["-m", "gradleak", "audit", "audit.toml", *quick, "--out", "run", "--quiet"]):
        subprocess.run([sys.executable, *command], cwd=folder, env=environment, check=True, capture_output=True, timeout=120)
    result = json.loads((folder / "run" / "result.json").read_text())
    assert result["labels"]["shape"] == [2, 1, 64, 64]
    assert len(result["per_image"]["ssim"]) == 2
    assumed = {row["name"]: row["value"] for row in result["assumptions"]}
    assert assumed["Targets"] == ("granted" if rule == "known" else "optimised together with the images")
    assert "bce-with-logits" in next(row["why"] for row in result["assumptions"] if row["name"] == "Client")
