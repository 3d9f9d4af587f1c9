"""Writing files so that a reader sees the old content or the whole new one, also after a power cut."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from gradleak.errors import OutputError


def write_atomically(path: Path, parts: Iterable[bytes | memoryview] | str) -> None:
    """Replace ``path`` by the concatenation of ``parts`` (or by a text as UTF-8), readable by its owner only.

    Args:
        path: The file; its folder must exist.
        parts: Bytes in pieces, so that large content need not be joined in memory.

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
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}; choose another place") from None
