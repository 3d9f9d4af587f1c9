"""Files: reading bounded ones of other people, and writing so that a reader sees the old content or the whole new one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from gradleak.errors import GradleakError, OutputError

#: Deepest nesting of a JSON document: ours need six levels.
MAX_DEPTH = 64


def open_regular(path: Path, *, what: str, error: type[GradleakError]) -> BinaryIO:
    """Open a regular file for reading. A pipe, socket or device is refused before a byte is read, so nothing can hang.

    Args:
        path: The file; a symbolic link to one will do.
        what: What was expected, for the message: ``"a safetensors file"``.
        error: Class of the error.

    Raises:
        GradleakError: Of class ``error``: there is no such file, it is of another kind, or it cannot be read.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
        if kind == stat.S_IFREG:
            # without blocking, and looked at again: another process may have put a pipe there
            file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file
            file.close()
    except (OSError, ValueError) as cause:  # ValueError: a null character in the name
        reason = "no such file" if isinstance(cause, FileNotFoundError) else getattr(cause, "strerror", None) or cause
        raise error(f"{path}: {reason}; expected {what}") from None
    name = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}.get(kind, "a device")
    raise error(f"{path}: no such file: it is {name}; expected {what}")


def read_text(path: Path, *, most: int, what: str, error: type[GradleakError]) -> str:
    """The UTF-8 text of a regular file of at most ``most`` bytes.

    Raises:
        GradleakError: Of class ``error``: as :func:`open_regular`, or the file is larger, or not UTF-8.
    """
    with open_regular(path, what=what, error=error) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise error(f"{path}: larger than {most} bytes; is it {what}?")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise error(f"{path}: not UTF-8 text ({fault}); expected {what}") from None


def parse_json(text: str | bytes, *, where: str, error: type[GradleakError], nan: bool = False) -> Any:
    """A JSON document from somebody else: no key twice, at most :data:`MAX_DEPTH` levels, no NaN or infinity unless ``nan``.

    Raises:
        GradleakError: Of class ``error``, beginning with ``where``.
    """
    try:
        value = json.loads(
            text, parse_constant=float if nan else _no_constant, parse_float=_finite, object_pairs_hook=_no_key_twice
        )
    except RecursionError:
        raise error(f"{where} is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as fault:  # and UnicodeDecodeError
        raise error(f"{where} is not valid JSON: {fault}") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [x for v in level if isinstance(v, (dict, list)) for x in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return value
    raise error(f"{where} is nested deeper than {MAX_DEPTH} levels")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is larger than any number that can be stored")
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in table if keys.count(k) > 1)!r} is there twice")
    return table


def machine_memory() -> int:
    """Bytes of memory that this machine has; nothing larger can be read into it."""
    return int(psutil.virtual_memory().total)


def write_atomically(path: Path, parts: Iterable[bytes | memoryview] | str, *, keep: Path | None = None) -> None:
    """Replace ``path`` by the concatenation of ``parts`` (or by a text as UTF-8), readable by its owner only.

    Args:
        path: The file; its folder must exist.
        parts: Bytes in pieces, so that large content need not be joined in memory.
        keep: Where the old content goes, once the new one is whole; None: it is replaced.

    Raises:
        OutputError: The folder is missing, full or not writable; the old content is still there.
    """
    pieces: Iterable[bytes | memoryview] = [parts.encode()] if isinstance(parts, str) else parts
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None:
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, keep)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}; choose another place") from None


def sync_folder(folder: Path) -> None:
    """Make renames in a folder outlast a power cut, where the system can (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:  # some network file systems refuse it for folders
            pass
        finally:
            os.close(descriptor)
