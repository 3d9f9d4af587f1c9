"""Where optional test data lies: real CIFAR-10 and ImageNet images, LPIPS weights, trained models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of optional data: ``GRADLEAK_TEST_DATA``, else ``shared`` beside the repository; skips when absent."""
    folder = Path(os.environ.get("GRADLEAK_TEST_DATA", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no optional test data at {folder}: set GRADLEAK_TEST_DATA to a folder with data/ and weights/")
    return folder


@pytest.fixture(autouse=True)
def _threads() -> None:
    """Two threads at most: the small tensors of tests gain nothing from more, and results stay comparable."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
