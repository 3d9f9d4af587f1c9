"""Writing files so that a reader sees the old content or the whole new one, also after a power cut."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from gradleak.errors import OutputError


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
