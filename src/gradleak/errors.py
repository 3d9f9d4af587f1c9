"""The errors a user can mend: each says what was found, where, what was expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GradleakError(Exception):
    """Bad input or an impossible request. The command line prints its message alone and exits with code 2."""


class SpecError(GradleakError):
    """A run's specification (TOML, ``--set`` or keyword) is not valid."""


class DataError(GradleakError):
    """Images or labels are missing, unreadable or out of range."""


class ModelError(GradleakError):
    """The attacked model cannot be built, or cannot take these images."""


class ObservationError(GradleakError):
    """An update file is damaged, or does not fit the model it is said to come from."""


class OutputError(GradleakError):
    """The output folder cannot be used."""


class CheckpointError(GradleakError):
    """A checkpoint is damaged, or belongs to another run."""


class MemoryLimitError(GradleakError):
    """An attack does not fit into the memory that it may use."""


class DivergedError(GradleakError):
    """No round of an attack had a finite matching loss."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of ``known``, else a list of what there is."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are: {', '.join(known)}"
