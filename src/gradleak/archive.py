"""NumPy archives (.npz), read as plain numbers: bounded, member by member, never through numpy's own loader."""

from __future__ import annotations

import contextlib
import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, cast

import numpy as np

from gradleak.errors import GradleakError
from gradleak.files import machine_memory, open_regular

MAX_MEMBER_BYTES = 64 << 30
MAX_DIRECTORY_BYTES = 1_000_000

#: What the zip format, its decompression and numpy's headers raise on damaged files.
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, OSError, ValueError, EOFError, RuntimeError)


class Header(NamedTuple):
    """What stands before an array's numbers."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype


class _Directory(io.BufferedReader):
    """A file from which nothing larger than an archive's directory is read, until ``most`` is lifted."""

    most: float = MAX_DIRECTORY_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self.most:
            raise zipfile.BadZipFile(f"its directory has {size} bytes, at most {MAX_DIRECTORY_BYTES}")
        return super().read(size)


@contextlib.contextmanager
def open_archive(file: BinaryIO) -> Iterator[zipfile.ZipFile]:
    """An archive whose directory was bounded before it was read; its members are numpy's own, stored or deflated."""
    reader = _Directory(cast(io.RawIOBase, file))
    with zipfile.ZipFile(reader) as archive:
        reader.most = math.inf
        yield archive


@contextlib.contextmanager
def open_member(
    archive: zipfile.ZipFile, member: str, *, where: str, error: type[GradleakError]
) -> Iterator[tuple[IO[bytes], Header]]:
    """A member's stream behind its header, and the header.

    Raises:
        GradleakError: Of class ``error``: another compression, too large, or no plain array of numbers.
    """
    entry = archive.getinfo(member)
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise error(f"{where}: compressed by another method than np.savez_compressed uses")
    if entry.file_size > MAX_MEMBER_BYTES:
        raise error(f"{where}: {entry.file_size} bytes when unpacked, at most {MAX_MEMBER_BYTES}")
    with archive.open(member) as stream:
        # version 1 bounds the header at 64 KiB; later ones serve structured types only
        if np.lib.format.read_magic(stream) != (1, 0):
            raise error(f"{where}: unknown .npy version; expected a plain array of numbers")
        try:
            header = Header(*np.lib.format.read_array_header_1_0(stream))
        except Exception as cause:  # the header is a Python literal, and its tokenizer and parser raise many kinds
            raise error(f"{where}: its header is not readable: {cause}") from None
        if header.dtype.kind not in "uifbc":
            raise error(f"{where}: type {header.dtype}; expected numbers")
        yield stream, header


def read_archive(path: Path, *, error: type[GradleakError]) -> dict[str, np.ndarray]:
    """All arrays of a .npz archive, in the order in which they were saved.

    Args:
        path: The file.
        error: Class of the error.

    Raises:
        GradleakError: Of class ``error``: no archive, damaged, larger than memory, or an array is not of plain numbers.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        with open_regular(path, what="a .npz archive", error=error) as file, open_archive(file) as archive:
            members = [name for name in archive.namelist() if name.endswith(".npy")]
            total = sum(archive.getinfo(name).file_size for name in members)
            if total > machine_memory():
                raise error(f"{path}: {total} bytes when unpacked, this machine has {machine_memory()} bytes of memory")
            for member in members:
                name = member.removesuffix(".npy")
                where = f"{path}: array {name!r}"
                with open_member(archive, member, where=where, error=error) as (stream, header):
                    if any(not isinstance(n, int) or not 0 <= n < 1 << 48 for n in header.shape):
                        raise error(f"{where}: shape {header.shape} is not one")
                    wanted = header.dtype.itemsize * math.prod(header.shape)
                    content = stream.read(min(wanted, archive.getinfo(member).file_size))
                if len(content) < wanted:
                    raise error(f"{where}: truncated: shape {header.shape} needs more bytes than there are")
                order = "F" if header.fortran_order else "C"
                arrays[name] = np.frombuffer(content, header.dtype).reshape(header.shape, order=order)  # type: ignore[call-overload]
    except DAMAGE as cause:
        raise error(f"{path}: not a readable .npz archive: {cause}") from None
    if not arrays:
        raise error(f"{path}: no array in it")
    return arrays
