"""A run's folder: private, locked while it is in use, and never emptied of what no run wrote."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gradleak.errors import BusyError, GradleakError, OutputError

RESULT, RECONSTRUCTION, SPEC, LOG = "result.json", "reconstruction.safetensors", "spec.toml", "log.jsonl"
REPORT, GRID, MATRIX = "report.html", "grid.png", "matrix.json"
CHECKPOINT, CONTROL, LOCK = "checkpoint.safetensors", "checkpoint-control.safetensors", ".lock"
CELL, ROWS, FIGURES = "cell.json", "rows.json", "figures"

#: What a finished run leaves.
RUN_FILES = (RESULT, RECONSTRUCTION, SPEC, LOG, REPORT, GRID)

#: What an unfinished one leaves beside them.
UNFINISHED_FILES = (
    CHECKPOINT,
    "checkpoint.previous.safetensors",
    CONTROL,
    "checkpoint-control.previous.safetensors",
)


def check_folder(out: Path, *, force: bool = False, resume: bool = False) -> None:
    """Whether a run may use the folder: absent, empty, or with ``force`` or ``resume`` an earlier run's.

    Raises:
        OutputError: It is no folder, or it has files and neither was asked for.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: exists and is not a folder; choose another --out")
    try:
        files = {file.name for file in out.iterdir()} - {LOCK} if out.is_dir() else set()
    except OSError as error:
        raise OutputError(f"{out}: cannot be used as the output folder: {error.strerror or error}") from None
    if force or resume or not files:
        return
    if files & set(UNFINISHED_FILES):
        raise OutputError(f"{out}: holds an unfinished run: go on with --resume, or overwrite it with --force")
    raise OutputError(f"{out}: the folder is not empty; choose another --out, or overwrite it with --force")


@contextmanager
def open_folder(out: Path, *, force: bool = False, resume: bool = False) -> Iterator[None]:
    """Create a private run folder (0700) and hold its lock. With ``force`` an earlier run's files are removed first.

    The lock is the operating system's, so a process that dies gives it back. Nothing is removed but a run's own files, by
    their names, and what a killed run left half written.

    Raises:
        OutputError: Not a folder, not empty, not writable, or in use by another process.
    """
    check_folder(out, force=force, resume=resume)
    try:
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        out.chmod(0o700)
    except OSError as error:
        raise OutputError(f"{out}: cannot be used as the output folder: {error.strerror or error}") from None
    with lock_folder(out):
        check_folder(out, force=force, resume=resume)  # again: another process may have finished meanwhile
        try:
            for name in (*RUN_FILES, *UNFINISHED_FILES):
                for remains in out.glob(f".{name}.*.tmp"):
                    remains.unlink(missing_ok=True)
                if force:
                    (out / name).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{out}: cannot be used as the output folder: {error.strerror or error}") from None
        try:
            yield
        except GradleakError:
            _forget(out)
            raise


def _forget(out: Path) -> None:
    """Leave no trace of a run that was refused before it had computed anything."""
    with contextlib.suppress(OSError):
        if {file.name for file in out.iterdir()} <= {SPEC, LOCK}:
            (out / SPEC).unlink(missing_ok=True)
            (out / LOCK).unlink(missing_ok=True)
            out.rmdir()


@contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Hold the lock of an existing folder.

    Raises:
        BusyError: Another process holds it.
        OutputError: The folder is not writable.
    """
    if not os.access(out, os.W_OK):
        raise OutputError(f"{out}: the folder is not writable")
    lock = FileLock(out / LOCK, mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(f"{out}: is in use by another gradleak process; wait for it, or choose another --out") from None
    except (OSError, NotImplementedError) as error:
        raise OutputError(f"{out}: cannot be locked: {error}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file; then it stays, and is harmless
            (out / LOCK).unlink(missing_ok=True)
        lock.release()


def batch_of(labels: dict[str, Any]) -> int:
    """B, by what result.json says of the labels: ``shape``, or ``values`` in older ones."""
    return int(labels["shape"][0]) if labels.get("shape") else len(labels["values"] or [])
