"""A few of the faults of ``tests/faults.py``; ``make faults`` injects all of them, many times."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import faults


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of a run that nothing happens to."""
    found = faults.undisturbed(tmp_path_factory.mktemp("reference"))
    assert not found["leftovers"]
    assert len(found["losses"]) == faults.ROUNDS
    return found


@pytest.mark.parametrize("kind", ["kill", "sigterm", "full-disk", "concurrent"])
def test_nothing_is_lost(kind: str, reference: dict[str, Any], tmp_path: Path) -> None:
    """A real process, injured once: the result is the undisturbed one's, to the last bit."""
    try:
        outcome = faults.FAULTS[kind](tmp_path / "run", reference, 1, random.Random(0))
    except faults.Skip as why:
        pytest.skip(str(why))
    assert not outcome.lost, outcome.note
