"""Rows of a study as a report reads them: checked, grouped over seeds, their numbers as text."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gradleak.errors import OutputError
from gradleak.spec import describe
from gradleak.study.spec import Published
from gradleak.study.store import measured


class CheckedRow(BaseModel):
    """What the report reads of a row of the store."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    study: str
    size: str
    cell: str = Field(pattern=r"^[\w-]+$")
    label: str
    settings: dict[str, Any]
    seed: int
    state: Literal["finished", "partial", "failed", "missing"]
    ssim: float | None
    fsim: float | None
    psnr: float | None
    lpips: float | None
    rounds: int | None
    seconds: float | None
    dataset: str | None = None
    batch: int | None = None
    image_shape: list[int] | None = None
    worst: dict[str, float | None] | None = None
    recognisable: int | None = None
    labels: str | float | None = None
    device: str | None = None
    threads: int | None = None
    versions: dict[str, str] | None = None
    commit: str | None = None
    command: str | None = None
    date: str | None = None
    quality: dict[str, list[float | None]] | None = None
    published: Published | None = None
    error: str | None = None

    @property
    def measured(self) -> bool:
        """Whether there is a result to count."""
        return measured(vars(self))


@dataclass(frozen=True)
class Group:
    """The cells that differ in the seed alone, at least one: a line of a table."""

    rows: list[CheckedRow]

    @property
    def label(self) -> str:
        return self.rows[0].label

    @property
    def settings(self) -> dict[str, Any]:
        return self.rows[0].settings

    @property
    def published(self) -> Published | None:
        return next((row.published for row in self.rows if row.published is not None), None)

    @property
    def counted(self) -> list[CheckedRow]:
        """The finished runs; if there are none, what the unfinished ones have reached."""
        return [r for r in self.rows if r.measured and r.state == "finished"] or [r for r in self.rows if r.measured]

    def over_seeds(self, key: str) -> tuple[float, float] | None:
        """Mean and standard deviation of a number of the rows; None if it is not known."""
        return mean_of(value for row in self.counted if not isinstance(value := getattr(row, key), str))


def checked(row: Mapping[str, Any], number: int) -> CheckedRow:
    """A row of the store, if it is one.

    Raises:
        OutputError: Names the row and what is wrong with it.
    """
    try:
        return CheckedRow.model_validate(row)
    except ValidationError as error:
        of = f" (study {row.get('study')!r}, cell {row.get('cell')!r})" if isinstance(row, Mapping) else ""
        raise OutputError(f"row {number}{of} is not what a study's store writes: {describe(error, CheckedRow)}") from None


def grouped(rows: Iterable[CheckedRow]) -> list[Group]:
    """Rows of equal settings together, in the order of their first ones."""
    members: dict[str, list[CheckedRow]] = {}
    for row in rows:
        members.setdefault(canonical(row.settings), []).append(row)
    return [Group(each) for each in members.values()]


def canonical(value: Any) -> str:
    """A text that two values share when they are equal."""
    return json.dumps(value, sort_keys=True, default=str)


def mean_of(values: Iterable[float | None]) -> tuple[float, float] | None:
    """Mean and sample standard deviation of what is known, NaN of a single value; None of nothing."""
    known = [float(value) for value in values if value is not None and not math.isnan(value)]
    if not known:
        return None
    spread = statistics.stdev(known) if len(known) > 1 and all(map(math.isfinite, known)) else math.nan
    return math.fsum(known) / len(known), spread


def text_of(value: tuple[float, float | None] | None, digits: int) -> str:
    """``0.998±.001``; without a spread where there is none."""
    if value is None or math.isnan(value[0]):
        return "–"
    mean, spread = value
    text = "∞" if math.isinf(mean) else f"{mean:.{digits}f}"
    return text if spread is None or math.isnan(spread) else f"{text}±{f'{spread:.{digits}f}'.removeprefix('0')}"
