"""The errors a user can mend: each says what was found, where, what was expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: Longest message of an error: text of a hostile file can be quoted in it.
MAX_MESSAGE = 2000
#: Most names that a message lists.
MAX_NAMES = 40


def printable(text: str, *, most: int = MAX_MESSAGE) -> str:
    r"""``text`` on one line, safe to show in a terminal, a log or a page, whoever wrote it.

    Line breaks and tabs become spaces. Other characters that do not print (escape sequences, controls, marks that reverse
    the direction of text, lone surrogates) are written out: ``\x1b``, ``\u202e``. What is longer than ``most`` characters is
    cut in the middle, and says so.
    """
    if len(text) <= most and text.isprintable():
        return text
    if len(text) > most:
        cut = f" [... {len(text) - most} characters left out ...] "
        text = text[: most * 2 // 3] + cut + text[len(text) - most // 3 :]
    return "".join(c if c.isprintable() else " " if c in "\n\r\t" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class GradleakError(Exception):
    """Bad input or an impossible request. The command line prints its message alone and exits with code 2.

    The message is :func:`printable`: it may quote files that other people wrote.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


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


class BusyError(OutputError):
    """The output folder is in use by another process, which may soon be done with it."""


class CheckpointError(GradleakError):
    """A checkpoint is damaged, or belongs to another run."""


class MemoryLimitError(GradleakError):
    """An attack does not fit into the memory that it may use."""


class DivergedError(GradleakError):
    """No round of an attack had a finite matching loss."""


def closest(word: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that ``word`` was probably meant to be."""
    close = difflib.get_close_matches(
        word[:100], sorted(known), n=1, cutoff=0.5
    )  # its time grows with the square of the length
    return close[0] if close else None


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of ``known``, else a list of what there is."""
    known = sorted(known)
    close = closest(word, known)
    more = f" and {len(known) - MAX_NAMES} more" if len(known) > MAX_NAMES else ""
    return f"; did you mean {close!r}?" if close else f"; known are: {', '.join(known[:MAX_NAMES])}{more}"
