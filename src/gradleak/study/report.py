"""The report of studies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradleak.study.spec import StudySpec


def write_report(studies: list[StudySpec], rows: list[dict[str, Any]], to: Path, *, cells: Path | None = None) -> list[Path]:
    """Nothing yet."""
    return []
